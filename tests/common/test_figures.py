"""What is logged, and the legend that explains it."""

from dataclasses import fields

import numpy as np
import pytest
from conftest import make_envs
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.advantages import SAME_START
from sb3_pg.common.figures import SB3_LEGEND, Figures, legend
from sb3_pg.ppo.figures import PPOFigures
from sb3_pg.reinforce.figures import REINFORCEFigures
from sb3_pg.trpo.figures import TRPOFigures

SMALL = {"n_steps": 16, "batch_size": 8}
RUNS = [
    (PPO, PPOFigures, SMALL),
    (
        PPO,
        PPOFigures,
        {
            **SMALL,
            "clip_range_vf": 1.0,
            "kl_coef": 0.5,
            "adaptive_kl_coef": True,
            "target_kl": 1e-3,
            "adaptive_lr": True,
        },
    ),
    (PPO, PPOFigures, {**SMALL, "baseline": "leave_one_out"}),
    (PPO, PPOFigures, {**SMALL, "critic_learning_rate": 1e-3}),
    (TRPO, TRPOFigures, SMALL),
    (TRPO, TRPOFigures, {**SMALL, "n_critic_updates": 0, "target_kl": 1e-30}),
    (TRPO, TRPOFigures, {**SMALL, "baseline": None}),
    (REINFORCE, REINFORCEFigures, {"n_episodes": 4}),
    (REINFORCE, REINFORCEFigures, SMALL),
    (REINFORCE, REINFORCEFigures, {**SMALL, "target_kl": 1e-3}),
    (REINFORCE, REINFORCEFigures, {"n_episodes": 4, "baseline": "ema"}),
    (PPO, PPOFigures, {**SMALL, "baseline": "group", "scale_rewards": None, "loss_average": 8, "ratio": "sequence"}),
    (TRPO, TRPOFigures, {**SMALL, "baseline": "group", "scale_rewards": "batch", "loss_average": "sequence"}),
    (REINFORCE, REINFORCEFigures, {"n_episodes": 8, "baseline": "leave_one_out_same_start"}),
]


def envs(options, action="box"):
    """Two environments, whose episodes begin alike now and then where the baseline needs it."""
    observation = "discrete" if options.get("baseline") in SAME_START else "box"
    return make_envs(observation, action, n_envs=2)


class Seen(KVWriter):
    """Everything that is written, and what it is not for."""

    def __init__(self):
        self.values, self.excluded = {}, {}

    def write(self, key_values, key_excluded, step=0):
        self.values.update(key_values)
        self.excluded.update(key_excluded)

    def close(self):
        pass


@pytest.mark.parametrize("action", ["box", "discrete"])
@pytest.mark.parametrize(("algorithm", "kind", "options"), RUNS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_legend_explains_all_that_is_logged(algorithm, kind, options, action):
    model, seen = algorithm("MlpPolicy", envs(options, action), seed=0, **options), Seen()
    model.set_logger(Logger(None, [seen]))
    model.learn(96)
    assert seen.values.keys() <= {*legend(kind), *SB3_LEGEND}
    logged = {name for name in seen.values if name.startswith("train/")}
    assert {"train/explained_variance", "train/n_updates", "train/entropy_loss"} <= logged
    assert ("train/std" in logged) == (action == "box")
    assert "train/learning_rate" in logged
    for name in logged:
        assert np.isscalar(seen.values[name]), name
        is_excluded = isinstance(seen.values[name], str) or name == "train/n_updates"  # no curves
        assert ("tensorboard" in seen.excluded[name]) == is_excluded, name
    assert algorithm is not TRPO or isinstance(seen.values["train/policy_step"], str)


@pytest.mark.parametrize("kind", [PPOFigures, TRPOFigures, REINFORCEFigures])
def test_legends(kind):
    texts = legend(kind)
    assert list(texts) == [f"train/{its.name}" for its in fields(kind)]
    assert all(len(text) > 10 and text == text.strip() for text in texts.values())
    assert legend(Figures).items() <= texts.items()


def test_every_figure_of_the_legend_can_be_logged():
    """By one run or another of those above."""
    logged = {}
    for algorithm, kind, options in RUNS:
        model, seen = algorithm("MlpPolicy", envs(options), seed=0, **options), Seen()
        model.set_logger(Logger(None, [seen]))
        model.learn(96)
        logged.setdefault(kind, set()).update(seen.values)
    for kind, names in logged.items():
        assert legend(kind).keys() <= names


def test_what_is_not_known_is_not_logged():
    seen = Seen()
    logger = Logger(None, [seen])
    TRPOFigures(policy_step="accepted", backtracks=0).record(logger)
    logger.dump()
    assert seen.values == {"train/policy_step": "accepted", "train/backtracks": 0}
