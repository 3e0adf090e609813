"""REINFORCE's arguments: what cannot work."""

from typing import TYPE_CHECKING

from sb3_pg.common.errors import ArgumentError, check_count, check_number
from sb3_pg.common.options import check_normalization

if TYPE_CHECKING:
    from sb3_pg.reinforce.reinforce import REINFORCE


def check_arguments(reinforce: "REINFORCE") -> None:
    """Refuse arguments that cannot work.

    :raises ArgumentError: naming the argument, its value and what is allowed
    """
    check_count("n_episodes", reinforce.n_episodes)
    for name in ("n_steps", "batch_size"):
        if getattr(reinforce, name) is not None:
            check_count(name, getattr(reinforce, name))
    check_count("n_critic_updates", reinforce.n_critic_updates, low=0)
    check_count("critic_batch_size", reinforce.critic_batch_size)
    check_normalization(reinforce, True, False, "running")
    if reinforce.target_kl is not None:
        check_number("target_kl", reinforce.target_kl, above_low=True, or_schedule=True)
    if reinforce.baseline == "value":
        return
    for name, neutral in (("n_steps", None), ("gae_lambda", 1.0)):
        if getattr(reinforce, name) != neutral:
            raise ArgumentError(
                f"`{name}={getattr(reinforce, name)!r}` needs the value network, but baseline={reinforce.baseline!r} "
                f"has none. Use baseline='value', or leave out {name}."
            )
