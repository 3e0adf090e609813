"""What an update logs: a dataclass per algorithm, whose field docs are the legend of the log."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from stable_baselines3.common.logger import Logger


def logged(doc: str, *, exclude: str | None = None, default: Any = None) -> Any:
    """Make a field of :class:`Logged`.

    :param doc: what the figure means, with its unit, for the legend
    :param exclude: a format that it is not for, such as "tensorboard"
    :param default: None is not logged
    """
    return field(default=default, metadata={"doc": doc, "exclude": exclude})


@dataclass
class Logged:
    """Figures that are logged under ``prefix/``; those that are None are not."""

    prefix: ClassVar[str]

    def named(self) -> dict[str, Any]:
        """Return the figures that are known, by their names in the log."""
        values = {its.name: getattr(self, its.name) for its in fields(self)}
        return {f"{self.prefix}/{name}": value for name, value in values.items() if value is not None}


@dataclass
class Figures(Logged):
    """What all algorithms log after an update."""

    prefix: ClassVar[str] = "train"

    explained_variance: float | None = logged(
        "share of the returns' variance that the values before the update explain; 1 is all, 0 none, below 0 less than "
        "none"
    )
    frac_reward_zero_std: float | None = logged(
        "share of the episodes that teach nothing, since all that began alike earned the same; with the baselines "
        "'group' and 'leave_one_out_same_start'"
    )
    std: float | None = logged(
        "mean standard deviation of the Gaussian policy, before squashing and clipping, if it is the same in all states"
    )
    n_updates: int | None = logged("gradient updates so far; of PPO epochs", exclude="tensorboard")

    def record(self, logger: Logger) -> None:
        """Record the figures that are known under ``train/``."""
        excluded = {f"{self.prefix}/{its.name}": its.metadata["exclude"] for its in fields(self)}
        for name, value in self.named().items():
            logger.record(name, value, exclude=excluded[name])


def legend(kind: type[Logged]) -> dict[str, str]:
    """Return what each figure means, by its name in the log."""
    return {f"{kind.prefix}/{its.name}": its.metadata["doc"] for its in fields(kind)}


#: What SB3 itself logs for every algorithm, by its name in the log, and what is logged beside it.
SB3_LEGEND = {
    "rollout/ep_rew_mean": "mean return of the last 100 episodes (`stats_window_size`), in the task's own reward, "
    "undiscounted and before VecNormalize; actions are drawn at random",
    "rollout/ep_len_mean": "mean length of these episodes, in steps",
    "rollout/success_rate": "share of the last 100 episodes with `is_success` in their info, where environments say so",
    "time/fps": "environment steps per second since `learn` began, all environments together",
    "time/iterations": "updates since `learn` began",
    "time/time_elapsed": "seconds since `learn` began",
    "time/total_timesteps": "environment steps so far, all environments together",
    "train/learning_rate": "the present learning rate of the optimizer",
    "train/critic_learning_rate": "that of the critic, if it has its own",
    "eval/mean_reward": "mean return of an EvalCallback's episodes",
    "eval/mean_ep_length": "their mean length, in steps",
    "eval/success_rate": "the share of them that ended with `is_success`, where environments say so",
}
