"""What several workers compute, and one worker with all of their environments: run by ``test_workers``.

``torchrun --nproc-per-node 2 together.py FILE FOLDER`` writes what each case finds to FILE.
"""

import atexit
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common import batch as batches
from sb3_pg.common import workers
from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.engines.closed_form import ClosedFormEngine
from sb3_pg.common.engines.closed_recurrent import ClosedRecurrentEngine
from sb3_pg.common.engines.protocol import Acted
from sb3_pg.common.vec_env import DummyVecEnv, VecNormalize

N_ENVS = 6  # of all workers


class Numbered(gym.Env):
    """An environment whose observations, rewards and episodes follow from its number alone, not from actions.

    :param number: among those of all workers
    :param same_start: begin every episode with one of two observations
    """

    def __init__(self, number: int, same_start: bool = False) -> None:
        self.observation_space, self.action_space = spaces.Box(-9, 9, (3,)), spaces.Discrete(2)
        self.number, self.t, self.episode, self.same_start = number, 0, 0, same_start

    def _observation(self) -> np.ndarray:
        if self.same_start and self.t == 0:
            return np.full(3, self.number % 2, np.float32)
        return np.sin(np.arange(3) * (self.number + 1) + self.t + 10 * self.episode).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        over = self.t >= 3 + (self.number + self.episode) % 4
        self.episode += over
        reward = float(np.cos(self.t * (self.number + 2)))
        return self._observation(), reward, over and self.number % 2 == 0, over and self.number % 2 == 1, {}


def envs(**kwargs: Any) -> DummyVecEnv:
    """Return this worker's share of the environments."""
    n = N_ENVS // workers.size()
    first = workers.rank() * n
    return DummyVecEnv([partial(Numbered, number, **kwargs) for number in range(first, first + n)])


def by_observations(original: Any) -> Any:
    """Return a way of acting whose actions follow from the observations alone, so that any number of workers agrees."""

    def act(self: Any, seen: Any, deterministic: bool = False) -> Acted:
        actions = (np.abs(1000 * seen.observations).sum(1).astype(int) % 2).astype(np.int64)
        acted: Acted = original(self, seen, True)._replace(actions=actions)
        return acted

    return act


def own(size: int) -> int:
    """Return a worker's share of a size."""
    return size // workers.size()


def trained(
    kind: Any, policy: str = "MlpPolicy", *, env: Any = None, steps: int = 3 * 16 * N_ENVS, **kwargs: Any
) -> dict[str, Any]:
    """Return parameters and logged figures after some steps."""
    model = kind(policy, envs() if env is None else env, seed=1, device="cpu", **kwargs)
    model.learn(steps)
    logged = model.logger.name_to_value
    names = [k for k, v in logged.items() if k.startswith("train/") and isinstance(v, float | np.floating)]
    if "n_episodes" in kwargs:  # how long environments go on after their episodes depends on the others of the worker
        names = [k for k in names if k not in ("train/explained_variance", "train/samples_used")]
    figures = [logged[name] for name in sorted(names)]
    parameters = th.cat([p.detach().reshape(-1) for p in model.policy.parameters()]).numpy()
    found = {"parameters": parameters, "figures": np.array(figures, np.float64)}
    return found if "n_episodes" in kwargs else {**found, "steps": model.num_timesteps}


def whole_episodes(kind: Any, baseline: Any, **kwargs: Any) -> dict[str, Any]:
    """Return what is learned from two episodes of each environment, all unlike in length."""
    env = envs(same_start=baseline in ("group", "leave_one_out_same_start"))
    return trained(kind, env=env, steps=1, baseline=baseline, n_episodes=2 * own(N_ENVS), **kwargs)


def statistics() -> dict[str, Any]:
    """Return VecNormalize's statistics after two rollouts."""
    env = VecNormalize(envs())
    model = TRPO("MlpPolicy", env, n_steps=16, seed=1, device="cpu")
    model.learn(2 * 16 * N_ENVS)
    return {"mean": env.obs_rms.mean, "var": env.obs_rms.var, "returns": np.array([env.ret_rms.mean, env.ret_rms.var])}


def unequal() -> dict[str, Any]:
    """Return a PPO update of workers with different numbers of samples in minibatches: that it ends at all."""
    model = PPO("MlpPolicy", envs(), n_episodes=own(N_ENVS), batch_size=4, baseline="ema", seed=1, device="cpu")
    model.learn(60)
    sums = [float(p.detach().sum()) for p in model.policy.parameters()]
    return {"is_equal": len({tuple(x) for x in workers.gathered(sums)}) == 1}


def texts() -> dict[str, Any]:
    """Return whether workers that tune language models, one of them by an adapter, stay the same."""
    from text_models import make

    models = [
        make("gpt2", PPO, policy_kwargs={"reference_kl_coef": 0.1, "reference_kl_target": 0.01}),
        make("gpt2", TRPO, policy_kwargs={"lora": {"r": 4}}),
    ]
    before = [float(p.detach().sum()) for model in models for p in model.policy.parameters()]
    for model in models:
        model.learn(2 * 13 * 4 * workers.size())
    after = [float(p.detach().sum()) for model in models for p in model.policy.parameters()]
    coefs = float(models[0].policy.reference_kl_coef)
    return {"is_equal": len({(*x,) for x in workers.gathered([*after, coefs])}) == 1, "has_moved": before != after}


def recurrent() -> dict[str, Any]:
    """Return a recurrent PPO's update, whose sequences are of different numbers."""
    return trained(PPO, "MlpLstmPolicy", n_steps=16, batch_size=own(96), n_epochs=2)


class Stopping(BaseCallback):
    """Stops the last worker only, in the middle of its second rollout."""

    def _on_step(self) -> bool:
        return not (workers.rank() == workers.size() - 1 and self.n_calls == 20)


def stopped() -> dict[str, Any]:
    """Return at how many rollouts all workers stop."""
    model = TRPO("MlpPolicy", envs(), n_steps=16, seed=1, device="cpu")
    model.learn(10_000, callback=Stopping())
    return {"updates": model._n_updates, "paused": model._rollout is not None and model._rollout.is_paused}


def went_on() -> dict[str, Any]:
    """Return whether workers are the same when learning goes on after the callback of one has stopped it."""
    model = PPO(
        "MlpPolicy", envs(), n_steps=16, batch_size=16, seed=1, device="cpu", learning_rate=lambda left: 1e-2 * left
    )
    model.learn(400, callback=Stopping())
    counts = {"stopped at": model.num_timesteps}
    model.learn(200, reset_num_timesteps=False)
    counts["ended at"] = model.num_timesteps
    own = [*counts.values(), *(float(p.detach().sum()) for p in model.policy.parameters())]
    return {"is_equal": len({(*x,) for x in workers.gathered(own)}) == 1, "n_envs": model.n_envs, **counts}


def apart(folder: str) -> dict[str, Any]:
    """Return which random numbers, observations and actions of workers differ: after loading, and without a seed."""

    def balancing() -> DummyVecEnv:
        return DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)

    def differ(model: PPO) -> list[bool]:
        buffer = model.rollout_buffer
        its = [th.get_rng_state().numpy(), buffer.observations, buffer.actions]
        return [len({x.tobytes() for x in workers.gathered(x)}) == workers.size() for x in its]

    options = {"n_steps": 32, "batch_size": 32, "device": "cpu"}
    unseeded = PPO("MlpPolicy", balancing(), **options).learn(64)
    first = PPO("MlpPolicy", balancing(), seed=1, **options).learn(64)
    first.save(f"{folder}/apart")
    kept = first._last_obs
    workers.gathered(0)  # until it is there
    loaded = PPO.load(f"{folder}/apart", env=balancing(), device="cpu").learn(64, reset_num_timesteps=False)
    goes_on = bool((loaded.rollout_buffer.observations[0] == kept).all())
    return {"unseeded": differ(unseeded), "loaded": differ(loaded), "first": goes_on}


def files(folder: str) -> dict[str, Any]:
    """Write logs and checkpoints from all workers into one folder; the first one alone does."""
    name = f"{folder}/{workers.rank()}"
    model = PPO("MlpPolicy", envs(), n_steps=16, batch_size=16, seed=1, device="cpu")
    model.set_logger(configure(name, ["csv"]))
    evaluation = EvalCallback(DummyVecEnv([lambda: Numbered(0)]), eval_freq=16, best_model_save_path=name, verbose=0)
    model.learn(400, callback=[CheckpointCallback(16, name), evaluation])
    model.save(f"{name}/model")
    return {"episodes": len(model.ep_info_buffer or ())}


CASES: dict[str, Any] = {
    "ppo": lambda: trained(PPO, n_steps=16, batch_size=own(48), n_epochs=2, max_grad_norm=0.5),
    "ppo target_kl": lambda: trained(
        PPO, n_steps=16, batch_size=own(48), n_epochs=9, target_kl=1e-4, learning_rate=1e-2
    ),
    "ppo adaptive": lambda: trained(
        PPO,
        n_steps=16,
        batch_size=own(48),
        adaptive_lr=True,
        kl_coef=0.5,
        adaptive_kl_coef=True,
        normalize_advantage="batch",
    ),
    "ppo autograd": lambda: trained(PPO, n_steps=16, batch_size=own(48), n_epochs=2, engine="autograd"),
    "trpo": lambda: trained(TRPO, n_steps=16, batch_size=own(48)),
    "trpo autograd": lambda: trained(
        TRPO, n_steps=16, batch_size=own(48), engine="autograd", ent_coef=0.01, normalize_advantage="running"
    ),
    "reinforce": lambda: trained(REINFORCE, n_steps=16, critic_batch_size=own(48)),
    "reinforce target_kl": lambda: trained(
        REINFORCE, n_steps=16, critic_batch_size=own(48), target_kl=1e-4, learning_rate=1e-2
    ),
    "reinforce episodes": lambda: whole_episodes(REINFORCE, "value", critic_batch_size=1000),
    "reinforce leave_one_out": lambda: whole_episodes(REINFORCE, "leave_one_out"),
    "reinforce same start": lambda: whole_episodes(REINFORCE, "leave_one_out_same_start"),
    "trpo group": lambda: whole_episodes(TRPO, "group"),
    "ppo gspo": lambda: whole_episodes(
        PPO, "group", scale_rewards="batch", loss_average="sequence", ratio="sequence", batch_size=1000, clip_range=0.01
    ),
    "reinforce constant": lambda: whole_episodes(REINFORCE, "group", scale_rewards=None, loss_average=9),
    "trpo sequences": lambda: whole_episodes(TRPO, "group", loss_average="sequence", engine="autograd"),
    "ppo weighted value": lambda: whole_episodes(PPO, "value", loss_average="sequence", batch_size=1000),
    "ppo ema": lambda: whole_episodes(PPO, "ema", batch_size=1000),
    "ppo parts": lambda: trained(
        PPO,
        n_steps=16,
        batch_size=own(48),
        max_grad_norm=(0.05, 0.2),
        critic_learning_rate=1e-3,
        normalize_advantage="running",
    ),
    "ppo parts autograd": lambda: trained(
        PPO, n_steps=16, batch_size=own(48), max_grad_norm=(0.05, 0.2), critic_learning_rate=1e-3, engine="autograd"
    ),
    "recurrent": recurrent,
}


def messengers() -> list[str]:
    """Return the names of this process's threads that send messages."""
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def prepare(setattr: Any = setattr) -> None:
    """Let actions and the order of samples not depend on the number of workers."""
    for kind in (ClosedFormEngine, AutogradEngine, ClosedRecurrentEngine):
        setattr(kind, "act", by_observations(kind.act))
    setattr(batches, "random_order", lambda batch, rollout: np.arange(len(batch)))


if __name__ == "__main__":
    th.set_num_threads(1)
    allowed = sorted(os.sched_getaffinity(0))
    atexit.register(lambda: print("left" if not messengers() else messengers()))
    workers.join()
    found = {f"apart/{key}": x for key, x in apart(sys.argv[2]).items()}
    prepare()
    found |= {f"{name}/{key}": x for name, case in CASES.items() for key, x in case().items()}
    found |= {f"statistics/{key}": x for key, x in statistics().items()}
    found |= {f"unequal/{key}": x for key, x in unequal().items()}
    found |= {f"texts/{key}": x for key, x in texts().items()}
    found |= {f"stopped/{key}": x for key, x in stopped().items()}
    found |= {f"went on/{key}": x for key, x in went_on().items()}
    found |= {f"files/{key}": x for key, x in files(sys.argv[2]).items()}
    own = workers.gathered(sorted(os.sched_getaffinity(0)))
    found["cores/as_they_should_be"] = own == (
        [[core] for core in allowed] if len(allowed) == workers.size() else [allowed] * workers.size()
    )
    if workers.rank() == 0:
        np.savez(sys.argv[1], **found)
