"""From unbounded numbers to the bounds of a Box, and back."""

import numpy as np
from gymnasium import spaces


class Squash:
    """``tanh(u)`` scaled to the bounds of a space.

    What is recorded of an action is u. Actions of float32 round to a bound from u = 9 on, where their log-probability
    could only be guessed; of u it is exact.

    :param space: with finite bounds
    """

    def __init__(self, space: spaces.Box) -> None:
        self._low, self._high = space.low, space.high
        dtype = np.dtype(np.float64 if space.dtype == np.float64 else np.float32)
        low, high = (x.astype(dtype) / 2 for x in (space.low, space.high))  # halves: the range may overflow
        self._middle, self._radius = low + high, high - low

    def __call__(self, u: np.ndarray) -> np.ndarray:
        """Return actions of the space, (n, *shape)."""
        actions = self._middle + self._radius * np.tanh(u)
        inside: np.ndarray = np.minimum(np.maximum(actions, self._low), self._high)  # not an ulp outside
        return inside

    def inverse(self, actions: np.ndarray) -> np.ndarray:
        """Return u, of actions at a bound the largest that tells them from others in float32, about 8."""
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(self._radius > 0.0, (actions - self._middle) / self._radius, 0.0)
        limit = 1.0 - np.finfo(np.float32).eps
        u: np.ndarray = np.arctanh(np.clip(scaled, -limit, limit))
        return u.astype(np.float32)
