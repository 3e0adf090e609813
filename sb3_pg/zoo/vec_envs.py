"""What ``--vec-env`` knows beside rl-zoo's dummy and subproc: gymnasium's sync and async, and envpool."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_pg.common.vec_env import as_vec_env
from sb3_pg.common.vec_env.envpool import seed_for_pool

EnvMakers = Sequence[Callable[[], gym.Env[Any, Any]]]

POOL = "envpool"

#: EnvPool's games skip, shrink and stack their frames themselves, and do the rest that this wrapper does when told to.
ATARI_WRAPPER = ["stable_baselines3.common.atari_wrappers.AtariWrapper"]
OF_WRAPPED_GAMES = ("env_wrapper", "frame_stack")
AS_WRAPPED = {"episodic_life": True, "reward_clip": True}


def sync(makers: EnvMakers) -> VecEnv:
    """Return environments that gymnasium steps one after the other."""
    return as_vec_env(SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED))


def in_processes(makers: EnvMakers) -> VecEnv:
    """Return environments in a process each, which write their observations into shared memory."""
    return as_vec_env(AsyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED))


VEC_ENVS: dict[str, Callable[[EnvMakers], VecEnv]] = {"sync": sync, "async": in_processes}


class EpisodeWriter(VecEnvWrapper):
    """Writes the episodes that the environments note, as Monitor writes them; without a file it only is a wrapper.

    Environments for evaluation have to have as many wrappers as those of training, of which SB3 passes statistics on.

    :param env_id: of the environments, for the head of the file
    :param keywords: what of infos is written, too
    """

    def __init__(self, venv: VecEnv, file: Path | None, env_id: str, keywords: Sequence[str]) -> None:
        super().__init__(venv)
        self.keywords = keywords
        head: dict[str, float | str] = {"t_start": time.time(), "env_id": env_id}
        self.writer = None if file is None else ResultsWriter(str(file), head, tuple(keywords))

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones).tolist():
            if self.writer is not None and "episode" in infos[i]:  # a game does not end with each life
                self.writer.write_row(infos[i]["episode"] | {key: infos[i][key] for key in self.keywords})
        return observations, rewards, dones, infos

    def close(self) -> None:
        super().close()
        if self.writer is not None:
            self.writer.close()


def make_known(env_id: str) -> None:
    """Register a task that EnvPool alone has, for rl-zoo asks gymnasium what there is and which are Atari's games.

    :raises ImportError: gymnasium does not have it, and EnvPool is not installed
    """
    if env_id in gym.registry:
        return
    import envpool

    if env_id in envpool.list_all_envs():
        gym.register(env_id, entry_point=f"envpool:{type(envpool.make_spec(env_id)).__name__}")


def pool(env_id: str, n_envs: int, seed: int, options: dict[str, Any], log: Path | None, keywords: Any) -> VecEnv:
    """Return environments of EnvPool.

    :param options: of ``envpool.make``
    :param log: the folder to write the episodes into; None for none
    :param keywords: what of infos is written, too
    :raises ImportError: EnvPool is not installed
    """
    import envpool

    env = as_vec_env(envpool.make(env_id, env_type="gymnasium", num_envs=n_envs, seed=seed_for_pool(seed), **options))
    return EpisodeWriter(env, None if log is None else log / "0.monitor.csv", env_id, keywords)
