"""What archives say besides parameters and attributes, so that learning goes on as if never interrupted."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution

from sb3_pg.common import workers
from sb3_pg.common.archive.plain import (
    LARGEST_OF_ALL,
    Plain,
    Stateful,
    UnstorableError,
    fingerprint,
    generator_state,
    plain,
    set_generator_state,
    value,
)
from sb3_pg.common.archive.simulations import go_on, prepare_reset, take_statistics
from sb3_pg.common.archive.simulations import state_of as state_of_environments
from sb3_pg.common.arrays import leaves, mapped
from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.common.rollout import TOLD, Cut, Rollout, Step, Told

if TYPE_CHECKING:
    from sb3_pg.common.archive.archived import Archived

#: What an info dictionary has that learning reads.
_READ_INFOS = ("episode", "is_success", "terminal_observation", "TimeLimit.truncated", *TOLD)


def state_of(model: "Archived") -> dict[str, Plain] | None:
    """Return as plain data what :func:`resuming` needs; None for a model that has not begun to learn.

    That is the state of the random generators, of the environments, as far as they give it, what the policy has last
    seen and remembers, and the rollout that a callback has interrupted or is asked about.
    """
    has_acted = model._last_obs is not None or model._rollout is not None or model.num_timesteps
    if model._resume is not None or not has_acted:
        return model._resume  # nothing was learned since it was loaded
    state: dict[str, Plain] = {
        "generators": plain(_global_generators()),
        "last": plain((model._last_obs, model._last_episode_starts, model._last_memory)),
        "n_envs": model.n_envs,
    }
    if model.env is not None:
        state["environments"] = state_of_environments(model.env)
        if "generators" not in state["environments"]:  # the same streams would begin again
            state["environments"]["seed"] = int(fingerprint(th.get_rng_state().numpy())[:7], 16)
    if model._last_obs is None:  # an error stopped a step of the environments: they are reset
        state.get("environments", {}).pop("simulations", None)
        return state
    if model._rollout is not None and model._is_amid_rollout:
        try:
            state["rollout"] = plain(_described(model._rollout))
        except UnstorableError as error:  # of its size, or in what environments say of their episodes
            if model.verbose >= 1:
                print(f"The unfinished rollout is not in the archive: {error}.")
        if model.use_sde:
            state["noise"] = plain(_noise(model))
    return state


def with_new_generators(state: dict[str, Plain] | None) -> dict[str, Plain] | None:
    """Return the state without random generators and all that depends on them: the environments will be reset."""
    if state is None:
        return None
    kept = ("wrappers", "statistics")
    environments = {name: its for name, its in state.get("environments", {}).items() if name in kept}
    return {"environments": environments, "n_envs": state["n_envs"]}


@contextmanager
def resuming(model: "Archived", reset_num_timesteps: bool) -> Iterator[None]:
    """Let a loaded model go on from the state in its archive, if it is asked to go on; reset environments in the block.

    With ``force_reset=False`` in ``load`` or ``set_env`` the environments stay as they are.
    """
    state, env = model._resume, model.env
    if state is None or reset_num_timesteps or env is None:
        yield
        model._resume = None
        return
    if workers.size() > 1 and "generators" in state:
        state = _share(model, state)
    is_reset, environments = model._last_obs is None, state.get("environments", {})
    if "generators" in state:
        _set_global_generators(value(state["generators"]))
    if is_reset:
        take_statistics(env, environments)
        if state["n_envs"] == env.num_envs:
            prepare_reset(env, environments)
    yield
    model._resume = None
    reason: str | None = f"there are {env.num_envs} environments, but there were {state['n_envs']}"
    if state["n_envs"] == env.num_envs:
        reason = go_on(env, environments) if is_reset else None
    if reason is None and "generators" in state:
        _set_global_generators(value(state["generators"]))  # the reset may have used them
        _restore(model, state)
    elif model.verbose >= 1:
        print(f"The environments begin new episodes: {reason or 'of a seed of their own'}.")


def _share(model: "Archived", state: dict[str, Plain]) -> dict[str, Plain]:
    """Return what a worker goes on from: the first one where the archive was saved, others with streams of their own.

    All begin a new rollout, for that of the archive is the first one's alone.
    """
    if not workers.rank():
        return {name: its for name, its in state.items() if name != "rollout"}
    model.set_random_seed(int(fingerprint(value(state["generators"])["torch"])[:7], 16))
    assert model._resume is not None
    return model._resume


def _restore(model: "Archived", state: dict[str, Plain]) -> None:
    """Let acting go on where it was."""
    model._last_obs, model._last_episode_starts, model._last_memory = value(state["last"])
    if "rollout" in state:
        model._rollout = _rollout_of(model.rollout_buffer, value(state["rollout"]))
    if "noise" in state:
        _set_noise(model, value(state["noise"]))


# ------------------------------------------------------------------ generators


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the random generators that everybody uses as they are, whatever the block does with them."""
    state = _global_generators()
    try:
        yield
    finally:
        _set_global_generators(state)


def _global_generators() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": generator_state(random._inst),
        "numpy": np.random.get_state(legacy=False),
        "torch": th.get_rng_state().numpy(),
    }
    if th.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [its.numpy() for its in th.cuda.get_rng_state_all()]
    return state


def _set_global_generators(state: dict[str, Any]) -> None:
    set_generator_state(random._inst, state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(th.from_numpy(state["torch"].copy()))
    if len(state.get("cuda", ())) == th.cuda.device_count() > 0:
        th.cuda.set_rng_state_all([th.from_numpy(its.copy()) for its in state["cuda"]])


# --------------------------------------------------------------------- rollout

#: What a rollout has besides the buffer's columns.
_FIELDS = {its.name for its in fields(Rollout)} - {"buffer", "cuts", "told", "unrecorded", "needs_values"}


def _columns(buffer: Any) -> dict[str, Any]:
    """Return what a rollout buffer records step by step: arrays, dictionaries of them, or what tells its own state."""
    shape = buffer.buffer_size, buffer.n_envs

    def is_column(x: Any) -> bool:
        if isinstance(x, dict):
            return bool(x) and all(map(is_column, x.values()))
        return isinstance(x, Stateful) or (isinstance(x, np.ndarray) and x.shape[:2] == shape)

    return {name: x for name, x in vars(buffer).items() if is_column(x)}


def _described(rollout: Rollout) -> dict[str, Any]:
    """Return an unfinished rollout as values without objects of our own.

    :raises UnstorableError: it is larger than a checkpoint should be
    """
    used = slice(0, rollout.n_steps)
    columns = {
        name: x.get_state() if isinstance(x, Stateful) else mapped(lambda its: its[used], x)
        for name, x in _columns(rollout.buffer).items()
    }
    size = sum(x.nbytes for column in columns.values() for x in leaves(column) if isinstance(x, np.ndarray))
    if size > LARGEST_OF_ALL:
        raise UnstorableError(f"it has {size >> 20:,} MB, more than {LARGEST_OF_ALL >> 20}")
    step = rollout.unrecorded
    if step is not None:
        infos = [{name: info[name] for name in _READ_INFOS if name in info} for info in step.infos]
        step = step._replace(infos=infos)
    return {
        **{name: getattr(rollout, name) for name in _FIELDS},
        "figures": dict(rollout.figures),
        "columns": columns,
        "n_steps": rollout.n_steps,
        "cuts": [tuple(cut) for cut in rollout.cuts],
        "told": [tuple(told) for told in rollout.told],
        "unrecorded": None if step is None else list(step),
    }


def _rollout_of(buffer: Any, described: dict[str, Any]) -> Rollout | None:
    """Return the rollout, and write it into the buffer; None if that is of another's class and too small by now."""
    n = described["n_steps"]
    buffer.reset()
    if isinstance(buffer, RolloutBuffer):
        buffer.enlarge(n)
    elif n > buffer.buffer_size:
        return None
    columns = _columns(buffer)
    for name, x in described["columns"].items():
        of = columns[name]
        if isinstance(of, Stateful):
            of.set_state(x)
            continue
        for column, its in [(of[key], x[key]) for key in x] if isinstance(x, dict) else [(of, x)]:
            column[:n] = its
    buffer.pos, buffer.full = n, n == buffer.buffer_size
    rollout = Rollout(buffer, described["last_observations"], described["last_dones"])
    for name in _FIELDS & described.keys():  # archives of earlier versions have fewer
        setattr(rollout, name, described[name])
    rollout.cuts = [Cut(*cut) for cut in described["cuts"]]
    rollout.told = [Told(*told) for told in described["told"]]
    rollout.unrecorded = None if described["unrecorded"] is None else Step(*described["unrecorded"])
    return rollout


def _noise(model: "Archived") -> list[Any]:
    """Return the matrices of gSDE's noise with which the rollout is acted."""
    its = model.policy.action_dist
    return [its.exploration_mat, its.exploration_matrices] if isinstance(its, StateDependentNoiseDistribution) else []


def _set_noise(model: "Archived", matrices: list[Any]) -> None:
    its = model.policy.action_dist
    if isinstance(its, StateDependentNoiseDistribution) and matrices:
        its.exploration_mat, its.exploration_matrices = (x.to(model.device) for x in matrices)
