"""Errors and checks: what is wrong, where, and what to do about it."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule


class ArgumentError(ValueError, AssertionError):
    """An argument that cannot work. Also an ``AssertionError``, because SB3 raises that in the same places."""


class NonFiniteError(ValueError):
    """An observation, reward, action or gradient that is not a finite number."""


class PolicyError(NonFiniteError):
    """The policy or its gradient, and not the environment, gives numbers that are not finite."""


class EnvironmentNumberError(NonFiniteError):
    """An environment has given a number that cannot be learned from.

    :param what: "observation" or "reward"
    :param env: the number of the environment
    :param value: what it gave
    :param step: of the rollout; None where it is not known
    :param verdict: what is wrong with it
    """

    def __init__(
        self, what: str, env: int, value: float, step: int | None = None, verdict: str = "is not finite"
    ) -> None:
        when = "" if step is None else f" at step {step} of this rollout"
        shown = f"({value})"
        if verdict == "is not finite" and math.isfinite(value):
            shown = f"in single precision ({value:g})"
        super().__init__(
            f"The {what} of environment {env}{when} {verdict} {shown}. The policy is unchanged since its last update "
            "and can be saved. Look for a division by zero or a diverging simulation in the environment."
        )
        self._said, self._step, self._verdict = (what, env, value), step, verdict

    def at(self, step: int) -> "EnvironmentNumberError":
        """Return the same with its step in the rollout, if that is missing.

        :param step: in which the environment acted; an observation is for the next
        """
        if self._step is None:
            step += self._said[0].startswith("observation")
        else:
            step = self._step
        return EnvironmentNumberError(*self._said, step, self._verdict)


class EnvironmentProcessError(RuntimeError):
    """A process that steps an environment has ended.

    :param number: of the environment
    :param owner: the kind of vectorised environment
    :param how: it has ended, if that is known
    """

    def __init__(self, number: int, owner: str, how: str = "") -> None:
        its_end = f" ({how})" if how else ""
        super().__init__(
            f"The process of environment {number} has ended{its_end}, so its {owner} can do no more. Mend the cause, "
            "pass new environments to set_env(), and learning can go on."
        )


def check_number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above_low: bool = False,
    or_schedule: bool = False,
) -> None:
    """Check one coefficient before training; a schedule is checked when it is evaluated.

    :param name: the argument's name, for the message
    :param value: of the argument
    :param low: the smallest allowed value
    :param high: the largest allowed value
    :param above_low: whether ``low`` itself is excluded
    :param or_schedule: whether the value may also be a schedule, about which nothing more is checked
    :raises ArgumentError: the value is not a finite number within the limits
    """
    if or_schedule and callable(value):
        return
    number = as_number(value)
    if number is None:
        wanted = "a number or a schedule" if or_schedule else "a number"
        raise ArgumentError(f"`{name}` must be {wanted}, not {value!r}.")
    if not math.isfinite(number) or not low <= number <= high or (above_low and number == low):
        sign = ">" if above_low else ">="
        lower = "" if low == -math.inf else f" {sign} {low:g}"
        upper = "" if high == math.inf else f" and <= {high:g}" if lower else f" <= {high:g}"
        raise ArgumentError(f"`{name}` must be a finite number{lower}{upper}, not {value!r}.")


#: NumPy's random generators take no larger seed.
LAST_SEED = 2**32 - 1


def is_whole(value: Any) -> bool:
    """Return whether it is a whole number, NumPy's too, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Check an argument that counts something.

    :raises ArgumentError: the value is not a whole number of at least ``low``
    """
    if not is_whole(value) or value < low:
        raise ArgumentError(f"`{name}` must be a whole number >= {low}, not {value!r}.")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check an argument that names one of several options.

    :raises ArgumentError: the value is none of ``choices``
    """
    choices = list(choices)
    if not any(value is choice or value == choice for choice in choices):
        raise ArgumentError(f"`{name}` must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def name_of(function: Any) -> str:
    """Return what a class or function is called in a message, whatever has been put in its place."""
    return function.__name__ if inspect.isroutine(function) or inspect.isclass(function) else repr(function)


def did_you_mean(name: str, known: Iterable[str], *, suffix: str = "") -> str:
    """Return a question about the nearest known name, to put after an error; nothing if none is near.

    :param suffix: what a name may lack
    """
    spellings = {spelling: x for x in known for spelling in (x.lower().removesuffix(suffix), x.lower())}
    near = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.7)
    return f" Did you mean {spellings[near[0]]!r}?" if near else ""


def as_number(x: Any) -> float | None:
    """Return a number of any library as Python's; None for what is no number, such as texts and booleans."""
    if isinstance(x, str | bool | np.bool_) or np.ndim(x):
        return None
    try:
        return float(x)
    except (TypeError, ValueError):
        return None


def check_parameters(name: str, function: Callable[..., Any], *parameters: str) -> None:
    """Check that an argument which is a function can be called with these parameters.

    :raises ArgumentError: it cannot
    """
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        wanted = ", ".join(parameters)
        raise ArgumentError(f"`{name}` must be a function of ({wanted}), but: {error}.") from None
    except ValueError:
        return  # it does not tell, as some of NumPy's


def arguments_of(kind: type) -> dict[str, inspect.Parameter]:
    """Return what a class is made with by name, what it passes on to its bases by ``**kwargs`` too."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            _, *own = inspect.signature(vars(base)["__init__"]).parameters.values()
            kinds = {its.kind for its in own}
            named = {its.name: its for its in own if its.kind not in (its.VAR_POSITIONAL, its.VAR_KEYWORD)}
            found = {**named, **found}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                break
    return found


def without_wrappers(value: Any) -> Any:
    """Return the number or the schedule of a coefficient that SB3 or the zoo may have wrapped."""
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    return value.val if isinstance(value, ConstantSchedule) else value


def evaluate_schedule(name: str, value: Any, progress_remaining: float) -> float:
    """Return the present value of a coefficient that may be a schedule.

    :param name: the argument's name, for the message
    :param value: a number or a function of the remaining progress (from 1 to 0)
    :param progress_remaining: between 0 and 1
    :raises ArgumentError: it is a negative or non-finite number or something else, or the schedule gave such
    """
    value = without_wrappers(value)  # SB3's have errors of their own
    if not callable(value):
        check_number(name, value)
        return float(value)
    try:
        given = value(progress_remaining)
    except (TypeError, ValueError) as error:
        given, number = error, None
    else:
        number = as_number(given)
    if number is None or not math.isfinite(number) or number < 0:
        shown = repr(given) if number is None else f"{number:g}"
        raise ArgumentError(
            f"The schedule of `{name}` gave {shown} at progress_remaining={progress_remaining:g}; "
            "it must give finite numbers >= 0 from 1 (start) to 0 (end)."
        )
    return number


#: The largest number in single precision, in which policies compute.
LARGEST = float(np.finfo(np.float32).max)

#: If the squares of some numbers add up to less, all are far below ``LARGEST``.
_SQUARE = 1e76

#: Of so many numbers the BLAS adds the squares at once; of more it may take threads, which wait for each other.
_FEW = 1 << 12

#: So many numbers are looked at sooner by Python than by NumPy.
_VERY_FEW = 24


def is_finite(x: np.ndarray) -> bool:
    """Return whether all numbers are finite in single precision; of a few numbers, in less than a microsecond."""
    if x.dtype.kind != "f":
        return True
    if x.size <= _VERY_FEW:
        if math.hypot(*x.ravel().tolist()) < LARGEST:
            return True
    elif x.size <= _FEW:
        flat = x.ravel()
        if float(flat.dot(flat)) < _SQUARE:
            return True
    elif x.dtype.itemsize <= 4 and math.isfinite(np.sum(x, dtype=np.float64)):
        return True
    return bool(_are_finite(x).all())


def _are_finite(x: np.ndarray) -> np.ndarray:
    finite: np.ndarray = np.isfinite(x) if x.dtype.itemsize <= 4 else np.abs(x) <= LARGEST
    return finite


def first_not_finite(x: np.ndarray) -> tuple[int, ...] | None:
    """Return the index of the first number that is not finite in single precision, None if all are."""
    if is_finite(x):
        return None
    found: list[int] = np.argwhere(~_are_finite(x))[0].tolist()
    return tuple(found)


def require_finite(what: str, x: Any, first_step: int = 0) -> None:
    """Check a recorded array of shape (n_steps, n_envs, ...), or a dictionary of them.

    :param what: what the array holds, for the message
    :param first_step: number of the array's first row in the rollout, for the message
    :raises EnvironmentNumberError: naming the environment and the step of the first value that is not finite
    """
    if isinstance(x, dict):
        for key, value in x.items():
            require_finite(f"{what} {key!r}", value, first_step)
        return
    found = first_not_finite(x)
    if found is not None:
        raise EnvironmentNumberError(what, found[1], x[found], found[0] + first_step)


def require_finite_given(what: str, x: Any) -> None:
    """Check what the user has given, an array or a dictionary of them.

    :param what: its name, for the message
    :raises NonFiniteError: naming the first value that is not finite, and where it is
    """
    if isinstance(x, dict):
        for key, value in x.items():
            require_finite_given(f"{what}[{key!r}]", value)
        return
    try:
        numbers = np.asarray(x)
    except ValueError:  # no array, which whoever takes it says better
        return
    found = first_not_finite(numbers) if numbers.dtype.kind == "f" else None
    if found is not None:
        place = ", ".join(map(str, found))
        raise NonFiniteError(f"`{what}` is not finite ({numbers[found]} at [{place}]): look at where it comes from.")


def require_finite_of(env: int | None, what: str, x: Any, step: int | None = None) -> None:
    """Check what one step has given, (n_envs, ...), or a dictionary of such arrays.

    :param env: whose it is, of an array for one environment; None if the rows are those of all
    :param what: what the array holds, for the message
    :param step: of the rollout, for the message; None where it is not known
    :raises EnvironmentNumberError: naming the environment of the first value that is not finite
    """
    if isinstance(x, dict):
        for key, value in x.items():
            require_finite_of(env, f"{what} {key!r}", value, step)
        return
    if not is_finite(x):
        found = first_not_finite(x) or (0,)
        raise EnvironmentNumberError(what, found[0] if env is None else env, x[found], step)
