"""SB3's DummyVecEnv, which copies only what can change."""

import copy
from typing import Any

import numpy as np
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs


class DummyVecEnv(sb3.DummyVecEnv):
    """Steps its environments one after the other, copying only what they might change later.

    That is the observation of every step, the info dictionary, and what is in it unless it cannot change, such as
    numbers and texts.

    :param env_fns: functions that make the environments
    """

    def step_wait(self) -> VecEnvStepReturn:
        """Step every environment with the actions given before, resetting those whose episode ended."""
        infos: list[dict[str, Any]] = []
        own_infos: list[dict[str, Any]] = []
        rewards = np.empty(self.num_envs, dtype=np.float32)
        dones = np.empty(self.num_envs, dtype=bool)
        for i, env in enumerate(self.envs):
            observation, reward, terminated, truncated, info = env.step(self.actions[i])
            rewards[i] = reward
            dones[i] = done = terminated or truncated
            own_infos.append(info)
            info = snapshot(info) if info else {}
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = copied(observation)
                observation, self.reset_infos[i] = env.reset()
            self._save_obs(i, observation)
            infos.append(info)
        # The attributes that code outside may read, as SB3 leaves them.
        self.buf_rews, self.buf_dones, self.buf_infos = rewards, dones, own_infos
        return self._obs_from_buf(), rewards.copy(), dones.copy(), infos

    def _obs_from_buf(self) -> Any:
        if len(self.keys) == 1 and self.keys[0] is None:
            return self.buf_obs[None].copy()
        copies = type(self.buf_obs)((key, value.copy()) for key, value in self.buf_obs.items())
        return dict_to_obs(self.observation_space, copies)


#: Types of what cannot change.
_FIXED = frozenset((bool, int, float, complex, str, bytes, type(None), *np.sctypeDict.values()))


def snapshot(info: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of an info dictionary that no later change reaches (SB3 issue 618)."""
    if _FIXED.issuperset(map(type, info.values())):
        return info.copy()
    return {key: value if type(value) in _FIXED else copied(value) for key, value in info.items()}


def copied(x: Any) -> Any:
    """Return a deep copy, in less time of what infos mostly hold: numbers in arrays, and dictionaries of numbers."""
    if type(x) is np.ndarray and not x.dtype.hasobject:
        return x.copy()
    if type(x) is dict and _FIXED.issuperset(map(type, x.values())):
        return x.copy()
    return copy.deepcopy(x)
