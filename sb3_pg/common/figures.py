"""What an update logs: a dataclass per algorithm, whose field docs are the legend of the log."""

from dataclasses import dataclass, field, fields
from typing import Any

from stable_baselines3.common.logger import Logger


def logged(doc: str, *, exclude: str | None = None, default: Any = None) -> Any:
    """Make a field of :class:`Figures`.

    :param doc: what the figure means, with its unit, for the legend
    :param exclude: a format that it is not for, such as "tensorboard"
    :param default: None is not logged
    """
    return field(default=default, metadata={"doc": doc, "exclude": exclude})


@dataclass
class Figures:
    """What all algorithms log after an update."""

    explained_variance: float | None = logged(
        "share of the returns' variance that the values before the update explain; 1 is all, 0 none, below 0 less than "
        "none"
    )
    std: float | None = logged("mean standard deviation of the Gaussian policy, before squashing and clipping")
    n_updates: int | None = logged("gradient updates so far; of PPO epochs", exclude="tensorboard")

    def record(self, logger: Logger) -> None:
        """Record the figures that are known under ``train/``."""
        for its in fields(self):
            value = getattr(self, its.name)
            if value is not None:
                logger.record(f"train/{its.name}", value, exclude=its.metadata["exclude"])


def legend(kind: type[Figures]) -> dict[str, str]:
    """Return what each figure of an algorithm means, by its name in the log."""
    return {f"train/{its.name}": its.metadata["doc"] for its in fields(kind)}
