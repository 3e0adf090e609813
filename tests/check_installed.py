"""Check an installed package from outside of any checkout: run by ``make dist`` where nothing else is installed."""

import subprocess
import sys
from pathlib import Path

import sb3_pg
from sb3_pg.zoo import CONFIGS

PACKAGE = Path(sb3_pg.__file__).parent


def main() -> None:
    assert PACKAGE.is_relative_to(sys.prefix), PACKAGE
    assert (PACKAGE / "py.typed").exists()
    assert sorted(file.name for file in CONFIGS.glob("*.yml")) == ["ppo.yml", "reinforce.yml", "trpo.yml"], CONFIGS
    assert CONFIGS.is_relative_to(PACKAGE), CONFIGS
    assert not {"transformers", "rl_zoo3", "sb3_contrib", "matplotlib"} & sys.modules.keys()
    for algorithm in (sb3_pg.REINFORCE, sb3_pg.TRPO, sb3_pg.PPO):
        size = {} if algorithm is sb3_pg.REINFORCE else {"n_steps": 128}
        model = algorithm("MlpPolicy", "CartPole-v1", seed=1, **size).learn(256)
        model.save("model")
        observation = model.observation_space.sample()
        loaded = algorithm.load("model")
        assert loaded.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    done = subprocess.run([sys.executable, "-m", "sb3_pg.zoo", "train"], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'sb3_pg[zoo]'" in done.stderr, done.stderr
    print(f"sb3_pg {sb3_pg.__version__} works in {PACKAGE}")


if __name__ == "__main__":
    main()
