"""The state of vectorised environments as plain data, and environments that go on from it."""

import warnings
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_pg.common.archive.plain import (
    LARGEST_OF_ALL,
    LARGEST_STATE,
    Plain,
    Reader,
    UnstorableError,
    Writer,
    generator_state,
    name_of,
)
from sb3_pg.common.errors import ArgumentError

#: What the usual wrappers remember of an episode. Environments in other processes are asked for it by name.
_OF_WRAPPERS = ("_elapsed_steps", "_has_reset", "rewards", "needs_reset", "total_steps")


def state_of(env: VecEnv) -> dict[str, Plain]:
    """Return what is known of where environments are.

    :param env: the outermost of its wrappers
    :return: "generators" and "wrappers", from which an equal reset can be made; "statistics" of VecNormalize, which
        others can take too; and "simulations", from which the environments can go on; "reason", why the last of them
        that is not there is not
    """
    state: dict[str, Plain] = {}
    parts = {
        "generators": _generators,
        "wrappers": _wrappers,
        "statistics": _statistics,
        "simulations": _simulations,
    }
    for name, part in parts.items():
        try:
            state[name] = part(env)
        except Exception as error:  # of an environment or a wrapper of somebody's: saving the model must go on
            reason = str(error) if isinstance(error, UnstorableError) else f"{type(error).__name__}: {error}"
            state["reason"] = reason
    return state


def prepare_reset(env: VecEnv, state: dict[str, Plain]) -> None:
    """Let the next reset be what it would have been for the environments with this state."""
    if "generators" in state:
        env.unwrapped._reset_seeds()
    elif "seed" in state:
        env.seed(state["seed"])
    for name, read in {"generators": _read_generators, "wrappers": _read_wrappers}.items():
        if name in state:
            reader = Reader()
            try:
                read(reader, state[name], env)
            except UnstorableError:
                continue  # not the environments that they were
            reader.apply()


def take_statistics(env: VecEnv, state: dict[str, Plain]) -> None:
    """Give the VecNormalize of an environment what that of the state has seen, whatever else is different."""
    if "statistics" not in state:
        return
    own, its = _running_statistics(env), state["statistics"]
    try:
        if len(own) != len(its):
            raise UnstorableError(
                f"there are {len(own)} VecNormalize around the environments, but there were {len(its)}"
            )
        reader = Reader()
        for seen, there in zip(its, own, strict=True):
            reader(seen, there, "VecNormalize")
    except UnstorableError as error:
        warnings.warn(f"The running statistics of the archive cannot be taken: {error}.", stacklevel=2)
        return
    reader.apply()


def go_on(env: VecEnv, state: dict[str, Plain]) -> str | None:
    """Let environments that have just been reset go on from a state.

    :return: None if they do; else why they are still at the reset
    :raises ArgumentError: an environment fails to take its own state
    """
    if "simulations" not in state or "wrappers" not in state:
        return str(state.get("reason", "the archive has no state of them"))
    reader = Reader()
    try:
        _read_wrappers(reader, state["wrappers"], env)
        _read_simulations(reader, state["simulations"], env)
        drawn = Reader()  # it numbers its objects by itself
        if "generators" in state:  # which the reset has used
            _read_generators(drawn, state["generators"], env)
    except UnstorableError as error:
        return str(error)
    try:
        drawn.apply()
        reader.apply()
    except Exception as error:
        raise ArgumentError(
            f"The environments do not go on from the state that the archive has of them ({type(error).__name__}: "
            f"{error}). Mend their set_state(), or save without it: save(path, exclude=['resume'])."
        ) from error
    return None


# -------------------------------------------------------------------- wrappers


def _chain(env: VecEnv) -> list[VecEnv]:
    """Return the wrappers, from the outermost, without the environments."""
    return [env, *_chain(env.venv)] if isinstance(env, VecEnvWrapper) else []


def _wrappers(env: VecEnv) -> Plain:
    writer = Writer(largest=LARGEST_OF_ALL)
    return [writer(wrapper, type(wrapper).__name__) for wrapper in _chain(env)]


def _read_wrappers(reader: Reader, state: Plain, env: VecEnv) -> None:
    wrappers = _chain(env)
    if len(wrappers) != len(state):
        raise UnstorableError(f"the environments have {len(wrappers)} wrappers, but had {len(state)}")
    for its, wrapper in zip(state, wrappers, strict=True):
        reader(its, wrapper, type(wrapper).__name__)


def _running_statistics(env: VecEnv) -> list[dict[str, Any]]:
    """Return what each VecNormalize has seen, which does not depend on the number of environments."""
    of_each = [vars(wrapper) for wrapper in _chain(env) if isinstance(wrapper, VecNormalize)]
    return [{name: its[name] for name in ("obs_rms", "ret_rms") if name in its} for its in of_each]


def _statistics(env: VecEnv) -> Plain:
    writer = Writer(largest=LARGEST_OF_ALL)
    return [writer(its, "VecNormalize") for its in _running_statistics(env)]


# ------------------------------------------------------------------ generators


def _levels(env: Any) -> list[Any]:
    return [env, *_levels(env.env)] if isinstance(env, gym.Wrapper) else [env]


def _generators_in(env: Any) -> list[dict[str, Any]]:
    """Return the random generators of an environment and its wrappers, by the names of attributes."""
    return [
        {
            name: its
            for name, its in vars(level).items()
            if generator_state(its) is not None or isinstance(its, spaces.Space)
        }
        for level in _levels(env)
    ]


def _generators(env: VecEnv) -> Plain:
    base, writer = env.unwrapped, Writer(most=LARGEST_STATE * env.num_envs)
    if isinstance(base, DummyVecEnv):
        return [writer(_generators_in(single), "generators") for single in base.envs]
    if isinstance(base, SubprocVecEnv):
        return [writer(drawn, "np_random") for drawn in base.get_attr("np_random")]
    if not any(generator_state(its) is not None for its in vars(base).values()):
        raise UnstorableError(f"the random generators of a {type(base).__name__} are not among its attributes")
    return writer(_generators_in(base), "generators")


def _read_generators(reader: Reader, state: Plain, env: VecEnv) -> None:
    base = env.unwrapped
    if isinstance(base, SubprocVecEnv):
        _check_number(state, base)
        for i, its in enumerate(state):
            drawn = reader(its, None, "np_random")
            reader.later(lambda i=i, drawn=drawn: base.set_attr("np_random", drawn, i))  # type: ignore[misc]
    elif isinstance(base, DummyVecEnv):
        _check_number(state, base)
        for its, single in zip(state, base.envs, strict=True):
            _read_attributes(reader, its, single)
    else:
        _read_attributes(reader, state, base)


def _read_attributes(reader: Reader, state: Plain, env: Any) -> None:
    levels = _levels(env)
    found = reader(state, _generators_in(env), "generators")
    if len(found) != len(levels):
        raise UnstorableError(f"an environment has {len(levels) - 1} wrappers, but had {len(found) - 1}")
    for level, generators in zip(levels, found, strict=True):
        reader.later(lambda level=level, generators=generators: level.__dict__.update(generators))  # type: ignore[misc]


def _check_number(state: Plain, env: VecEnv) -> None:
    if len(state) != env.num_envs:
        raise UnstorableError(f"there are {env.num_envs} environments, but there were {len(state)}")


# ----------------------------------------------------------------- simulations


def _simulations(env: VecEnv) -> Plain:
    base, writer = env.unwrapped, Writer(most=LARGEST_STATE * env.num_envs)
    if not isinstance(base, SubprocVecEnv):
        return {"class": name_of(base), "state": writer(base, type(base).__name__)}
    if not (base.has_attr("get_state") and base.has_attr("set_state")):
        raise UnstorableError("environments in other processes have neither get_state() nor set_state()")
    names = [name for name in _OF_WRAPPERS if base.has_attr(name)]
    wrappers = {name: writer(base.get_attr(name), name) for name in names}
    states = writer.unlimited(base.env_method("get_state"), "get_state()", copies=True)
    return {"class": name_of(base), "state": states, "wrappers": wrappers}


def _read_simulations(reader: Reader, state: Plain, env: VecEnv) -> None:
    base = env.unwrapped
    if name_of(base) != state["class"]:
        raise UnstorableError(f"the environments are a {name_of(base)}, but were a {state['class']}")
    if not isinstance(base, SubprocVecEnv):
        if isinstance(base, DummyVecEnv):
            _check_number(state["state"]["attributes"]["envs"]["items"], base)
        reader(state["state"], base, type(base).__name__)
        return
    states = reader(state["state"], None, "get_state()")
    _check_number(states, base)
    wrappers = {name: reader(its, None, name) for name, its in state["wrappers"].items()}
    for i in range(base.num_envs):
        for name, its in wrappers.items():
            _call_later(reader, base, i, "set_wrapper_attr", name, its[i])
        _call_later(reader, base, i, "set_state", states[i])


def _call_later(reader: Reader, env: VecEnv, index: int, method: str, *arguments: Any) -> None:
    reader.later(lambda: env.env_method(method, *arguments, indices=index))
