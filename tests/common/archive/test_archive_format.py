"""Files of the first format are read by all later versions.

They were made by ``python tests/common/archive/test_archive_format.py``.
"""

import json
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_pg import PPO
from sb3_pg.common.archive.container import FORMAT, read_archive
from sb3_pg.common.vec_env import VecNormalize

HERE = Path(__file__).parent
OBSERVATIONS = np.linspace(-1, 1, 30).reshape(10, 3).astype(np.float32)


def facts(model, statistics):
    """What must be read from the files, in JSON."""
    weights = th.nn.utils.parameters_to_vector(model.policy.parameters())
    optimizer = model.policy.optimizer.state_dict()["state"]
    return {
        "actions": model.predict(OBSERVATIONS, deterministic=True)[0].tolist(),
        "weights": weights.tolist(),
        "moments": [float(its["exp_avg"].double().sum()) for its in optimizer.values()],
        "steps": [float(its["step"]) for its in optimizer.values()],
        "num_timesteps": model.num_timesteps,
        "clip_range": model.clip_range if isinstance(model.clip_range, float) else model.clip_range(0.5),
        "learning_rate": model.lr_schedule(0.5),
        "kl_coef": model.kl_coef,
        "activation": model.policy_kwargs["activation_fn"].__name__,
        "episodes": len(model.ep_info_buffer),
        "normalized": statistics.normalize_obs(OBSERVATIONS).tolist(),
        "count": float(statistics.ret_rms.count),
    }


def make(folder):
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0), clip_obs=2.0)
    policy_kwargs = {"net_arch": [4], "activation_fn": th.nn.ReLU}
    options = {"n_steps": 64, "batch_size": 32, "kl_coef": 0.5, "seed": 0, "device": "cpu"}
    model = PPO("MlpPolicy", env, policy_kwargs=policy_kwargs, **options).learn(512)
    env.training = False
    model.save(folder / "format_1.zip")
    env.save(folder / "format_1.pkl")
    (folder / "format_1.json").write_text(json.dumps(facts(model, env), indent=1))


def test_the_first_format_is_read():
    expected = json.loads((HERE / "format_1.json").read_text())
    statistics = VecNormalize.load(HERE / "format_1.pkl", make_vec_env("Pendulum-v1", 2))
    model = PPO.load(HERE / "format_1.zip", env=statistics, device="cpu")
    found = facts(model, statistics)
    for name in ("actions", "normalized"):  # another machine may round in another way
        np.testing.assert_allclose(found.pop(name), expected.pop(name), rtol=0, atol=1e-6)
    assert found == expected
    model.learn(128, reset_num_timesteps=False)


def test_what_is_written_says_its_format_and_algorithm(tmp_path):
    make(tmp_path)
    for folder in (tmp_path, HERE):
        seal = read_archive(folder / "format_1.zip").seal
        assert seal["algorithm"] == "PPO"
        assert set(seal["sha256"]) >= {"data", "policy.pth", "policy.optimizer.pth"}
    assert read_archive(tmp_path / "format_1.zip").seal["format"] == FORMAT


if __name__ == "__main__":
    make(HERE)
