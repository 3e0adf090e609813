"""Whether torch.compile would help: one PPO minibatch of our autograd engine, eager and compiled, on the CPU.

Prints and writes benchmarks/speed/compile.json: milliseconds of evaluate and backward (median of 20, alternating) and
the seconds that compiling took, fewer where torch has kept the kernels of an earlier run. One thread.
"""

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.envs import FakeImageEnv

from sb3_pg import PPO
from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.autograd import AutogradEngine

REPEATS = 20


def minibatch(engine: AutogradEngine) -> None:
    """One evaluate and backward on the same random samples."""
    rng = np.random.default_rng(0)
    space = engine.policy.observation_space
    observations = engine.asarray((rng.random((64, *space.shape)) * 255).astype(space.dtype))
    actions = np.stack([engine.policy.action_space.sample() for _ in range(64)]).reshape(64, -1)
    evaluation = engine.evaluate(Batch(observations, engine.actions(actions)))
    evaluation.backward(th.ones(64), -0.01, th.ones(64))


def seconds(engine: AutogradEngine) -> float:
    start = time.perf_counter()
    minibatch(engine)
    return time.perf_counter() - start


def measure() -> dict[str, float]:
    env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, discrete=True)
    eager, compiled = (AutogradEngine(PPO("CnnPolicy", env, device="cpu", seed=0).policy) for _ in range(2))
    for name in ("features_extractor", "mlp_extractor"):
        getattr(compiled.policy, name).compile()
    first = seconds(compiled)
    seconds(eager)
    times = [(seconds(eager), seconds(compiled)) for _ in range(REPEATS)]
    medians = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    return {"eager_ms": medians[0], "compiled_ms": medians[1], "compiling_s": first}


def main() -> None:
    th.set_num_threads(1)
    results = {"task": "CnnPolicy, 84x84x4, batch 64", **measure()}
    (Path(__file__).parent / "speed" / "compile.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
