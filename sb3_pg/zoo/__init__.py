"""The bridge to rl-zoo: its commands, files and folders for REINFORCE, TRPO and PPO.

``python -m sb3_pg.zoo train --algo trpo --env Pendulum-v1`` is rl_zoo3's own code after one call of :func:`register`.
Needs the extra ``zoo``; importing this package does not.
"""

import importlib.util
import sys

import sb3_pg
from sb3_pg.common.registry import STEPPERS
from sb3_pg.common.vec_env import VecNormalize
from sb3_pg.zoo.settings import CONFIGS

__all__ = ["CONFIGS", "register"]


def register() -> None:
    """Tell the rl_zoo3 of this process about the algorithms; ``trpo`` and ``ppo`` become ours.

    They are trained with our settings (:data:`CONFIGS`) unless others are given, and searched in our spaces. The
    VecNormalize is ours for all algorithms, so that its files are read without running what is in them. Other programs
    that use rl_zoo3 are not affected. A second call changes nothing.

    :raises ImportError: rl_zoo3 is not installed
    """
    from rl_zoo3 import ALGOS, exp_manager, hyperparams_opt, utils

    from sb3_pg.zoo import search
    from sb3_pg.zoo.manager import ExperimentManager

    ALGOS.update({"reinforce": sb3_pg.REINFORCE, "trpo": sb3_pg.TRPO, "ppo": sb3_pg.PPO})
    hyperparams_opt.HYPERPARAMS_SAMPLER.update(search.SAMPLERS)
    hyperparams_opt.HYPERPARAMS_CONVERTER.update(search.CONVERTERS)
    for name in ("enjoy", "record_video"):
        STEPPERS.add(str(importlib.util.find_spec(f"rl_zoo3.{name}").origin))  # type: ignore[union-attr]
    for module in (exp_manager, utils):
        module.VecNormalize = VecNormalize  # type: ignore[attr-defined]
    exp_manager.ExperimentManager = ExperimentManager  # type: ignore[misc]
    if "rl_zoo3.train" in sys.modules:  # which has looked the name up already
        sys.modules["rl_zoo3.train"].ExperimentManager = ExperimentManager  # type: ignore[attr-defined]
