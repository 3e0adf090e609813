"""Resetting some environments of a ``gymnasium.vector.VectorEnv`` while the others stay where they are.

By the option ``reset_mask``, as gymnasium has it for environments without autoreset. With autoreset at the next step
it does the same in most of them, and saves the step that only resets.
"""

from typing import Any

import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorObservationWrapper
from gymnasium.vector import VectorWrapper as Wrapper
from gymnasium.vector.utils import concatenate
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward

from sb3_pg.common.arrays import take
from sb3_pg.common.errors import ArgumentError

Environments = VectorEnv[Any, Any, Any]

MASK = "reset_mask"


class ResetMask(dict[str, Any]):
    """Options of ``reset`` in which wrappers still find the mask when gymnasium's environments have taken it out.

    They take it out for single environments, which find none. RecordEpisodeStatistics looks for it afterwards, and
    forgets all episodes without it.

    :param done: which environments to reset, (n_envs,)
    """

    def __init__(self, done: np.ndarray) -> None:
        super().__init__({MASK: done.copy()})
        self.mask = self[MASK]

    def __contains__(self, key: object) -> bool:
        return key == MASK or super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key == MASK:
            return self.mask
        raise KeyError(key)

    def pop(self, key: str, *default: Any) -> Any:
        """Remove a value and return it, the mask also if it has been removed before."""
        return super().pop(key, self.mask) if key == MASK else super().pop(key, *default)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # other processes need not import this class


class _CartPole(CartPoleVectorEnv):
    """gymnasium's, which also resets some."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Any]:
        if options is None or MASK not in options or self.state is None:
            return super().reset(seed=seed, options=options)
        mask, state = options[MASK], self.state
        state[:, mask] = self.np_random.uniform(self.low, self.high, (4, np.count_nonzero(mask)))
        self.steps[mask], self.prev_done[mask] = 0, False
        return state.T.astype(np.float32), {}


class _Async(AsyncVectorEnv[Any, Any]):
    """gymnasium's without shared memory, whose workers reset at the step after an episode also when they just have."""

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if options is None or MASK not in options:
            return super().reset(seed=seed, options=options)
        for pipe, is_done in zip(self.parent_pipes, options[MASK], strict=True):
            pipe.send(("step" if is_done else "reset-noop", None))  # so this step is what resets
        results, successes = zip(*[pipe.recv() for pipe in self.parent_pipes], strict=True)
        self._raise_if_errors(successes)
        infos: dict[str, Any] = {}
        for i, result in enumerate(results):
            infos = self._add_info(infos, result[-1], i)
        rows = [result[0] for result in results]
        self.observations = concatenate(self.single_observation_space, rows, self.observations)
        return self.observations, infos


def layers(env: Environments) -> list[Environments]:
    """Return the wrappers of a vectorised environment from the outermost on, and itself."""
    return [env, *layers(env.env)] if isinstance(env, Wrapper) else [env]


def enable(env: Environments) -> None:
    """Let ``reset_mask`` do what it should in those of gymnasium's environments where it does not.

    :raises ArgumentError: a wrapper cannot be around an environment that is reset partly
    """
    for layer in layers(env):
        if isinstance(layer, NormalizeObservation | NormalizeReward):
            raise ArgumentError(
                f"gymnasium's {type(layer).__name__} forgets its statistics when some environments are reset: leave it "
                "out, and wrap as_vec_env(env) in sb3_pg.common.vec_env.VecNormalize."
            )
    inside = env.unwrapped
    if type(inside) is CartPoleVectorEnv:
        inside.__class__ = _CartPole  # the same attributes, another method
    elif type(inside) is AsyncVectorEnv and not inside.shared_memory:
        inside.__class__ = _Async if inside.autoreset_mode is AutoresetMode.NEXT_STEP else AsyncVectorEnv


def needs_check(env: Environments) -> bool:
    """Return whether only its results tell that an environment obeys the mask, and whether they can."""
    *wrappers, inside = layers(env)
    is_known = isinstance(inside, SyncVectorEnv | AsyncVectorEnv | _CartPole)
    return not is_known and not any(isinstance(wrapper, VectorObservationWrapper) for wrapper in wrappers)


def check(env: Environments, done: np.ndarray, before: Any, after: Any) -> None:
    """Look at one environment that should not have been reset.

    :param done: which should, (n_envs,)
    :param before: the observations before, (n_envs, ...), and
    :param after: after the reset
    :raises ArgumentError: its observation is another now
    """
    if done.all():
        return
    stays = int(done.argmin())
    x, y = take(before, stays), take(after, stays)
    pairs = [(x[key], y[key]) for key in x] if isinstance(x, dict) else [(x, y)]
    if not all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
        raise ArgumentError(
            f"{env} must reset those environments only that options={{'reset_mask': ...}} of its reset() names, but "
            f"environment {stays} was reset or changed too. Implement the mask, or make it with "
            "AutoresetMode.SAME_STEP."
        )
