"""TRPO's arguments: what cannot work."""

from typing import TYPE_CHECKING

from sb3_pg.common.errors import ArgumentError, check_count, check_number
from sb3_pg.common.options import check_normalization, check_rollout_size

if TYPE_CHECKING:
    from sb3_pg.trpo.trpo import TRPO


def check_arguments(trpo: "TRPO") -> None:
    """Refuse arguments that cannot work.

    :raises ArgumentError: naming the argument, its value and what is allowed
    """
    for name in ("n_steps", "batch_size", "cg_max_steps", "line_search_max_iter", "sub_sampling_factor"):
        check_count(name, getattr(trpo, name))
    check_count("n_critic_updates", trpo.n_critic_updates, low=0)
    check_number("cg_damping", trpo.cg_damping)
    check_normalization(trpo, True, False, "running")
    check_number("target_kl", trpo.target_kl, above_low=True, or_schedule=True)
    check_number("line_search_shrinking_factor", trpo.line_search_shrinking_factor, above_low=True)
    if trpo.line_search_shrinking_factor >= 1:
        raise ArgumentError(
            f"`line_search_shrinking_factor` must be below 1, not {trpo.line_search_shrinking_factor}: "
            "no step of the search would be shorter than the one before."
        )
    if trpo.env is not None:
        check_rollout_size(trpo, trpo.batch_size)
