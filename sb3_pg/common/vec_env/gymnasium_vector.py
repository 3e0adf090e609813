"""Any ``gymnasium.vector.VectorEnv`` as a VecEnv of SB3.

gymnasium's return a step's results apart for terminated and truncated episodes, information by columns, and what
comes after an episode in one of three ways (``AutoresetMode``): in the same step, in the next one, whose action is
ignored, or when asked to. SB3's return the first observation of the next episode with the last step of one.
"""

import copy
import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_pg.common.arrays import leaves, length, mapped, take
from sb3_pg.common.errors import ArgumentError, EnvironmentProcessError
from sb3_pg.common.interrupts import uninterrupted
from sb3_pg.common.masks import METHOD
from sb3_pg.common.returned import USUAL, checked_observations, checked_step, numbers
from sb3_pg.common.spaces import check_spaces
from sb3_pg.common.vec_env import partial_reset
from sb3_pg.common.vec_env.infos import Info, spread
from sb3_pg.common.vec_env.partial_reset import Environments, ResetMask, layers

#: What information about an environment holds if it says which actions are allowed (as gymnasium's Taxi does).
MASK_KEY = "action_mask"

#: Attributes of wrappers that note each episode: SB3's Monitor, and gymnasium's RecordEpisodeStatistics.
_NOTING = ("get_episode_rewards", "return_queue")

#: Information about a step that no time limit follows.
_NOT_CUT = {"TimeLimit.truncated": False}

#: Methods of single environments that only the vectorised one may call.
_NOT_APART = ("reset", "step", "close")


class GymnasiumVecEnv(VecEnv):
    """A VecEnv around a vectorised environment of gymnasium, of any autoreset mode.

    - Each step returns the observations to act on next; the last of an episode is in
      ``infos[i]["terminal_observation"]``, and ``infos[i]["TimeLimit.truncated"]`` says whether a limit cut it.
    - With the last step of an episode ``infos[i]["episode"]`` has its return, length and the time, as SB3's Monitor
      notes them, unless a wrapper inside has noted them already.
    - A step that would only reset (``AutoresetMode.NEXT_STEP``) is not made: those environments are reset at once.
    - What is returned stays as it is, whatever memory the environment uses again.

    :param env: the environment; it stays the caller's, as ``env``
    :raises ArgumentError: its spaces cannot be learned on, or it does not say how it is reset
    """

    def __init__(self, env: Environments) -> None:
        check_spaces(env.single_observation_space, env.single_action_space)
        self.env = env
        self.autoreset_mode = _autoreset_mode(env)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            partial_reset.enable(env)
        self._checks_resets = partial_reset.needs_check(env)
        inside: Any = env.unwrapped
        self._whole = functools.partial(_whole, inside) if isinstance(inside, AsyncVectorEnv) else nullcontext
        self._masks: np.ndarray | None = None
        self._found: set[str] = set()  # names of attributes that the single environments have
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = dict(env.metadata)
        is_noted = any(isinstance(layer, RecordEpisodeStatistics) for layer in layers(env)) or any(
            self._singles_have(name) for name in _NOTING
        )
        self._notes = not is_noted
        self._start = time.time()
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)

    # --------------------------------------------------------------- stepping

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment, with the seeds and options that were set for it."""
        options = self._options[0]
        if any(other != options for other in self._options):
            raise ArgumentError(f"{self.env} takes the same options for all its environments, not {self._options}.")
        seed = self._seeds[0]
        with self._whole():
            observations, info = self.env.reset(seed=None if seed is None else int(seed), options=dict(options) or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._spread(info, self.reset_infos)
        self._returns[:], self._lengths[:] = 0, 0
        self._masks = None
        self._note_masks(info, None)
        first: VecEnvObs = checked_observations(self.observation_space, observations, self.num_envs)
        return first

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for ``step_wait``."""
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step every environment with the actions given before, resetting those whose episode ended."""
        with self._whole():
            observations, rewards, terminated, truncated, info = self.env.step(self.actions)
        terminated = numbers("terminated", terminated, (self.num_envs,)).astype(bool)
        truncated = numbers("truncated", truncated, (self.num_envs,)).astype(bool)
        infos: list[Info] = [_NOT_CUT.copy() for _ in range(self.num_envs)]  # quicker than to make each
        exact, returned = rewards, (observations, rewards, terminated | truncated, infos)
        observations, rewards, dones, infos = checked_step(self, returned)
        for i in np.flatnonzero(truncated & ~terminated).tolist():
            infos[i]["TimeLimit.truncated"] = True
        begins = self.autoreset_mode is AutoresetMode.SAME_STEP
        self._spread(_with_masks(info, dones) if begins else info, infos)
        self._note_masks(info, None)
        self._count(exact, info)
        if np.count_nonzero(dones):
            if begins:
                self._take_out_finals(dones, infos)
            else:
                self._restart(dones, observations, infos)
            self._note_episodes(dones, infos)
        return observations, rewards, dones, infos

    def _take_out_finals(self, dones: np.ndarray, infos: list[Info]) -> None:
        """Exchange the information about new episodes, where the environment has begun them, for that about the old."""
        for i in np.flatnonzero(dones).tolist():
            first = self.reset_infos[i] = infos[i]
            if first.get("final_obs") is None:
                raise ArgumentError(
                    f"{self.env} has AutoresetMode.SAME_STEP, but its infos have no 'final_obs' of environment {i}."
                )
            infos[i] = {
                "TimeLimit.truncated": first.pop("TimeLimit.truncated"),
                **first.pop("final_info", {}),
                "terminal_observation": first.pop("final_obs"),
            }
            if "episode" in first:  # noted by a wrapper of all environments
                infos[i]["episode"] = first.pop("episode")

    def _restart(self, dones: np.ndarray, observations: Any, infos: list[Info]) -> None:
        """Reset the environments whose episode ended, and exchange their observations for the first of the next."""
        with self._whole():
            found, info = self.env.reset(options=ResetMask(dones))
        which, rows = np.flatnonzero(dones), length(found)
        found = checked_observations(self.observation_space, found, rows)
        firsts: list[Info] = [{} for _ in range(rows)]
        self._spread(info, firsts)
        self._note_masks(info, dones)
        if rows != len(which):  # EnvPool returns those that were reset, others all
            if self._checks_resets:
                partial_reset.check(self.env, dones, observations, found)
            found, firsts = take(found, which), [firsts[i] for i in which]
        for i, first in zip(which.tolist(), firsts, strict=True):
            infos[i]["terminal_observation"] = mapped(copy.copy, take(observations, i))
            self.reset_infos[i] = first
        for into, rows_of in zip(leaves(observations), leaves(found), strict=True):
            into[which] = rows_of

    # ------------------------------------------------------------ information

    def _spread(self, info: Any, infos: list[Info]) -> None:
        spread(info, infos)

    def _count(self, rewards: Any, info: Any) -> None:
        """Add a step to the episodes."""
        self._returns += np.asarray(rewards, float)
        self._lengths += 1

    def _note_episodes(self, ends: np.ndarray, infos: list[Info]) -> None:
        """Write the episodes that ended into the information about them, if nobody else has."""
        now = round(time.time() - self._start, 6)
        for i in np.flatnonzero(ends).tolist() if self._notes else ():
            episode = {"r": round(float(self._returns[i]), 6), "l": int(self._lengths[i]), "t": now}
            infos[i].setdefault("episode", episode)
        self._returns[ends], self._lengths[ends] = 0, 0

    def _note_masks(self, info: Any, which: np.ndarray | None) -> None:
        """Keep which actions are allowed next, if the information says so; all where it says nothing any more.

        :param which: the environments that it is about; None for all
        """
        if isinstance(info, dict) and MASK_KEY in info:
            masks = np.array(info[MASK_KEY], bool)
            masks[~np.asarray(info.get(f"_{MASK_KEY}", True), bool)] = True
        elif self._masks is not None:
            masks = np.ones_like(self._masks)
        else:
            return
        if self._masks is None or which is None:
            self._masks = masks
        else:
            self._masks[which] = masks[which] if len(masks) == self.num_envs else masks

    # ---------------------------------------------------- single environments

    def _singles_have(self, name: str) -> bool:
        """Return whether gymnasium lets us at the single environments, and all have an attribute."""
        inside = self.env.unwrapped
        if name not in self._found and isinstance(inside, SyncVectorEnv | AsyncVectorEnv):
            with self._whole():
                self._found |= {name} if all(inside.call("has_wrapper_attr", name)) else set()
        return name in self._found

    def _own(self, name: str) -> Any:
        """Return an attribute of the vectorised environment or of one of its wrappers.

        :raises AttributeError: there is none, and in the single environments neither
        """
        for layer in layers(self.env):
            if hasattr(layer, name):
                return getattr(layer, name)
        raise AttributeError(f"Neither {self.env} nor its environments, as far as it lets at them, have {name!r}.")

    def has_attr(self, attr_name: str) -> bool:
        """Return whether the environments have an attribute."""
        if self._singles_have(attr_name) or (attr_name == METHOD and self._masks is not None):
            return True
        return any(hasattr(layer, attr_name) for layer in layers(self.env))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of each environment; what is of all of them together, for each."""
        inside: Any = self.env.unwrapped
        if self._singles_have(attr_name):
            with self._whole():
                values = list(inside.call("get_wrapper_attr", attr_name))
        else:
            values = [self._own(attr_name)] * self.env.num_envs
        return values if indices is None else [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of each environment.

        :raises ArgumentError: the vectorised environment does not let at each
        """
        inside: Any = self.env.unwrapped
        if isinstance(inside, SyncVectorEnv | AsyncVectorEnv):
            values = [value] * self.num_envs if indices is None else self.get_attr(attr_name)
            for i in self._get_indices(indices):
                values[i] = value
            with self._whole():
                inside.set_attr(attr_name, values)
        elif self._are_all(indices):
            setattr(inside, attr_name, value)
        else:
            raise ArgumentError(f"{self.env} has one {attr_name!r} for all its environments. Leave out `indices`.")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> Any:
        """Call a method of each environment, or one that answers for all of them.

        :raises ArgumentError: the vectorised environment cannot call it apart
        """
        inside: Any = self.env.unwrapped
        if method_name in _NOT_APART:
            raise ArgumentError(f"Call {method_name}() of the vectorised environment itself, not of single ones.")
        if self._singles_have(method_name) and isinstance(inside, SyncVectorEnv):
            singles = [inside.envs[i] for i in self._get_indices(indices)]
            return [single.get_wrapper_attr(method_name)(*method_args, **method_kwargs) for single in singles]
        if not self._are_all(indices):
            raise ArgumentError(f"{self.env} calls {method_name!r} of all its environments only. Leave out `indices`.")
        if self._singles_have(method_name):
            with self._whole():
                return list(inside.call(method_name, *method_args, **method_kwargs))
        if method_name == METHOD and self._masks is not None:
            return list(self._masks)
        answers = list(self._own(method_name)(*method_args, **method_kwargs))
        if len(answers) != self.num_envs:
            raise ArgumentError(f"{method_name!r} of {self.env} must answer for each of its environments.")
        return answers

    def _are_all(self, indices: VecEnvIndices) -> bool:
        return indices is None or sorted(self._get_indices(indices)) == list(range(self.num_envs))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Return whether each environment is in a wrapper; in Monitor always, for episodes are noted.

        :raises ArgumentError: the environments are in other processes and cannot be looked at
        """
        inside: Any = self.env.unwrapped
        which = list(self._get_indices(indices))
        if wrapper_class is Monitor or any(isinstance(layer, wrapper_class) for layer in layers(self.env)):
            return [True for _ in which]
        if isinstance(inside, AsyncVectorEnv):
            raise ArgumentError(f"{self.env} does not tell which wrappers its environments are in.")
        return [isinstance(inside, SyncVectorEnv) and is_wrapped(inside.envs[i], wrapper_class) for i in which]

    # ---------------------------------------------------------------- the rest

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return a picture of each environment; none unless it was made with ``render_mode="rgb_array"``."""
        pictures: Any = self.env.render()
        return [None] * self.num_envs if pictures is None else list(pictures)

    def render(self, mode: str | None = None) -> np.ndarray | None:
        """Return the pictures of all environments in one, or let them show themselves."""
        if self.render_mode == "human" and mode in (None, "human"):
            self.env.render()
            return None
        return super().render(mode)

    def close(self) -> None:
        """Close the environments; of processes one of which has ended, the others are not waited for."""
        inside: Any = self.env.unwrapped
        has_lost_one = isinstance(inside, AsyncVectorEnv) and None in inside.parent_pipes
        self.env.close(**({"terminate": True} if has_lost_one else {}))


USUAL.append(GymnasiumVecEnv)


@contextmanager
def _whole(env: Any) -> Iterator[None]:
    """Let interrupts wait: a message half read, or an answer that nobody takes, would be an AsyncVectorEnv's end.

    :raises EnvironmentProcessError: one of its processes has ended, now or in an earlier block
    """
    try:
        if None not in env.parent_pipes:
            with uninterrupted():
                yield
            return
    except (EOFError, ConnectionError):  # of a process that was killed, unless gymnasium passes on an environment's
        ended = wait([process.sentinel for process in env.processes], 1.0)
        numbers_of_ended = [i for i, process in enumerate(env.processes) if process.sentinel in ended]
        if None in env.parent_pipes or not numbers_of_ended:
            raise
        env.parent_pipes = [None if i in numbers_of_ended else pipe for i, pipe in enumerate(env.parent_pipes)]
    raise EnvironmentProcessError(env.parent_pipes.index(None), "AsyncVectorEnv")


def _with_masks(info: Any, dones: np.ndarray) -> Any:
    """Return information with what is said about last steps confined to those that are."""
    if not isinstance(info, dict):
        return info
    missing = {f"_{key}" for key in ("final_obs", "final_info") if key in info} - info.keys()
    return {**info, **dict.fromkeys(missing, dones)} if missing else info


def _autoreset_mode(env: Environments) -> AutoresetMode:
    """Return what a vectorised environment does when an episode ends.

    :raises ArgumentError: it does not say
    """
    try:
        return AutoresetMode(env.metadata.get("autoreset_mode"))
    except ValueError:
        known = ", ".join(map(str, AutoresetMode))
        raise ArgumentError(
            f"{env} does not say what it does when an episode ends: metadata['autoreset_mode'] must be one of {known}, "
            f"not {env.metadata.get('autoreset_mode')!r}."
        ) from None
