"""A board game for masks: five in a row on 9 x 9 against an opponent that plays at random.

An action is one of the 81 fields, or to pass; fields that are taken are forbidden. Five in a row win (1), the
opponent's lose (-1), a full board is a draw (0).
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SIZE = 9
PASS = SIZE * SIZE
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


class FiveInARow(gym.Env[np.ndarray, int]):
    """Observations are the board, 81 numbers: 1 own stones, -1 the opponent's, 0 free."""

    observation_space = spaces.Box(-1.0, 1.0, (PASS,), np.float32)
    action_space = spaces.Discrete(PASS + 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.board = np.zeros(PASS, np.float32)
        self.free = list(range(PASS))
        self.mask = np.ones(PASS + 1, bool)
        return self.board.copy(), {}

    def action_masks(self) -> np.ndarray:
        return self.mask

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, ends = self._play(int(action), 1)
        if not ends:
            reward, ends = self._play(self.free[int(self.np_random.integers(len(self.free)))], -1)
        return self.board.copy(), reward, ends, False, {}

    def _play(self, field: int, stone: int) -> tuple[float, bool]:
        """Place a stone; return the reward and whether the game is over."""
        if field == PASS:
            return 0.0, False
        if not self.mask[field]:
            return -float(stone), True  # a forbidden move loses
        self.board[field], self.mask[field] = stone, False
        self.free.remove(field)
        if self._wins(field, stone):
            return float(stone), True
        return 0.0, not self.free

    def _wins(self, field: int, stone: int) -> bool:
        row, column = divmod(field, SIZE)
        return any(
            1 + self._run(row, column, *d, stone) + self._run(row, column, -d[0], -d[1], stone) >= 5 for d in DIRECTIONS
        )

    def _run(self, row: int, column: int, down: int, right: int, stone: int) -> int:
        n = 0
        while True:
            row, column = row + down, column + right
            if not (0 <= row < SIZE and 0 <= column < SIZE) or self.board[row * SIZE + column] != stone:
                return n
            n += 1
