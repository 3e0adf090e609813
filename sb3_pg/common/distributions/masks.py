"""Masks of allowed actions, which change logits before any formula sees them."""

from sb3_pg.common.arrays import Array, namespace

#: Logits of what is not allowed: every formula stays finite, and the derivative there is zero. Minus infinity gives
#: NaN in entropy and KL.
FORBIDDEN = -1e8


def masked(logits: Array, masks: Array | None) -> Array:
    """Return the logits with those of forbidden actions far below all others.

    :param logits: (n, k)
    :param masks: True for what is allowed, (n, k); None allows all
    """
    if masks is None:
        return logits
    xp = namespace(logits)
    return xp.where(masks, logits, xp.full_like(logits, FORBIDDEN))
