"""Wrappers that the configurations name."""

from typing import Any

import gymnasium as gym
import numpy as np


class TaxiMasks(gym.Wrapper[Any, Any, Any, Any]):
    """Taxi with masks of the actions that change its state."""

    def action_masks(self) -> np.ndarray:
        """Return which actions are allowed now."""
        taxi: Any = self.unwrapped
        masks: np.ndarray = taxi.action_mask(taxi.s).astype(bool)
        return masks
