"""What ``--vec-env`` knows beside rl-zoo's dummy and subproc: gymnasium's sync and async, and envpool."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from sb3_pg.common.vec_env import as_vec_env

EnvMakers = Sequence[Callable[[], gym.Env[Any, Any]]]

POOL = "envpool"


def sync(makers: EnvMakers) -> VecEnv:
    """Return environments that gymnasium steps one after the other."""
    return as_vec_env(SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED))


def in_processes(makers: EnvMakers) -> VecEnv:
    """Return environments in a process each, which write their observations into shared memory."""
    return as_vec_env(AsyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED))


VEC_ENVS: dict[str, Callable[[EnvMakers], VecEnv]] = {"sync": sync, "async": in_processes}


def pool(env_id: str, n_envs: int, seed: int, options: dict[str, Any], log: Path | None, keywords: Any) -> VecEnv:
    """Return environments of EnvPool.

    :param options: of ``envpool.make``
    :param log: the folder to write the episodes into; None for none
    :param keywords: what of infos is written, too
    :raises ImportError: EnvPool is not installed
    """
    import envpool

    env = as_vec_env(envpool.make(env_id, env_type="gymnasium", num_envs=n_envs, seed=seed, **options))
    file = None if log is None else str(log / "0.monitor.csv")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The environment is already wrapped")  # episodes are noted, not written
        return VecMonitor(env, file, tuple(keywords))
