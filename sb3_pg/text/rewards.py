"""Rewards of responses: functions, what they ask for, and what several of them give together."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch as th

from sb3_pg.common.errors import ArgumentError, NonFiniteError, check_number, is_finite
from sb3_pg.common.rollout import Rollout

#: (prompts, completions, references), and by name what else it asks for, to one entry for each completion: a finite
#: number, a number for each of its tokens, or None where the reward does not apply. References are None where the task
#: has none
RewardFunction: TypeAlias = Callable[..., Sequence[Any] | np.ndarray | th.Tensor]

#: What every reward is given, in this order or by these names.
USUAL = ("prompts", "completions", "references")

#: What it may ask for besides the task's columns: the tokens of each completion, what ends it included.
TOKEN_IDS = "token_ids"


class Given(NamedTuple):
    """What one reward gives for n completions."""

    totals: np.ndarray  #: float64 (n,), NaN where it does not apply
    by_token: list[np.ndarray | None]  #: numbers for each token, (length,), where it gave some


class Scores(NamedTuple):
    """What all rewards give for n completions."""

    totals: np.ndarray  #: weighted sums, float64 (n,)
    texts: list[str]  #: the completions
    named: list[dict[str, float]]  #: what each of several rewards gave that apply, not weighted; else empty
    by_token: list[np.ndarray] | None  #: the share of each token in ``totals``, (length,); None if all is for the last


@dataclass(frozen=True)
class Reward:
    """One of the rewards of a task.

    :param function: see :data:`RewardFunction`
    :param name: for the log
    :param weight: in the sum
    :param label: for errors
    :param in_order: whether it takes prompts, completions and references by their places
    :param asks: what it is given by name
    """

    function: RewardFunction
    name: str
    weight: float
    label: str
    in_order: bool
    asks: tuple[str, ...]

    def __call__(self, columns: Mapping[str, list[Any]]) -> Given:
        """Return what it gives for completions.

        :param columns: what rewards may be given, by name, with an entry for each completion
        :raises ArgumentError: it returned something else than numbers for each of them
        :raises NonFiniteError: it returned one that is not finite
        """
        usual = [columns[name] for name in USUAL] if self.in_order else []
        returned = self.function(*usual, **{name: columns[name] for name in self.asks})
        entries = self._entries(returned, [len(ids) for ids in columns[TOKEN_IDS]])
        for number, its in enumerate(entries):
            if its is not None and not is_finite(its):
                prompt, text = columns["prompts"][number], columns["completions"][number]
                raise NonFiniteError(
                    f"{self.label} returned {its} for the prompt {prompt!r} and the completion {text!r}: it must "
                    "return finite numbers in single precision."
                )
        totals = np.array([math.nan if its is None else its.sum() for its in entries])
        return Given(totals, [its if its is not None and its.ndim else None for its in entries])

    def _entries(self, returned: Any, lengths: list[int]) -> list[np.ndarray | None]:
        n = len(lengths)
        if isinstance(returned, th.Tensor):
            returned = returned.detach().cpu().double().numpy()
        if not _has_entries(returned) or len(returned) != n:
            raise ArgumentError(
                f"{self.label} must return one number for each of the {n} completions it is given, but returned "
                f"{_described(returned)}."
            )
        entries = [_numbers(its) for its in returned]
        for number, (its, length) in enumerate(zip(entries, lengths, strict=True)):
            if its is not None and (its.dtype != np.float64 or its.shape not in ((), (length,))):
                raise ArgumentError(
                    f"{self.label} must return a number, None, or one number for each of its {length} tokens for "
                    f"completion {number} of {n}, but returned {_described(returned[number])}."
                )
        return entries


def _has_entries(returned: Any) -> bool:
    if isinstance(returned, np.ndarray):
        return returned.ndim > 0
    return hasattr(returned, "__len__") and hasattr(returned, "__getitem__") and not isinstance(returned, str | Mapping)


def _numbers(given: Any) -> np.ndarray | None:
    """Return numbers as float64, None for None; what is none has another type."""
    if given is None:
        return None
    if isinstance(given, th.Tensor):
        given = given.detach().cpu().double().numpy()
    try:
        array = np.asarray(given)
    except ValueError:  # lists of different lengths
        return np.array(None)
    return array.astype(np.float64) if array.dtype.kind in "fiub" else array


def _described(returned: Any) -> str:
    if not _has_entries(returned):
        is_array = isinstance(returned, int | float | np.ndarray | np.generic)
        return f"an array of shape {np.shape(returned)}" if is_array else repr(returned)[:60]
    shape = np.shape(returned) if isinstance(returned, np.ndarray) else (len(returned),)
    return f"an array of shape {shape}" if all(isinstance(x, int | float) for x in returned) else repr(returned)[:60]


# ------------------------------------------------------------------- arguments


def as_rewards(reward: Any, weights: Sequence[float] | None, columns: Sequence[str]) -> list[Reward]:
    """Return the rewards of a task.

    :param reward: a function, or several
    :param weights: of them; None gives each the weight 1
    :param columns: what a reward may ask for by name, besides ``token_ids``
    :raises ArgumentError: there is none, one cannot be called, or the weights do not fit
    """
    functions = list(reward) if isinstance(reward, list | tuple) else [reward]
    if not functions:
        raise ArgumentError("`reward` is empty: pass a function, or several.")
    weights = [1.0] * len(functions) if weights is None else weights
    if not isinstance(weights, list | tuple | np.ndarray) or len(weights) != len(functions):
        raise ArgumentError(f"`reward_weights` must have one number for each of {len(functions)} rewards: {weights!r}.")
    for weight in weights:
        check_number("reward_weights", weight, -math.inf)
    for name in columns:
        if name in (*USUAL, TOKEN_IDS):
            raise ArgumentError(f"`columns` has {name!r}, which rewards are given anyway. Give it another name.")
    made: list[Reward] = []
    for function, weight in zip(functions, weights, strict=True):
        base, taken = name_of(function, "reward"), [other.name for other in made]
        names = (f"{base}_{number}" if number > 1 else base for number in itertools.count(1))
        name = next(name for name in names if name not in taken)
        label = "`reward`" if len(functions) == 1 else f"The reward {name!r}"
        made.append(Reward(function, name, float(weight), label, *_asked(label, function, columns)))
    return made


def name_of(function: Any, nameless: str) -> str:
    """Return what to call a function in the log.

    :param nameless: the name of one that has none
    """
    if isinstance(function, functools.partial):
        return name_of(function.func, nameless)
    name: str = getattr(function, "__name__", type(function).__name__)
    return nameless if name == "<lambda>" else name


def _asked(label: str, function: Any, columns: Sequence[str]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a reward takes what is usual in order, and what it is given by name.

    By name are called those whose parameters have known names, such as TRL's ``f(completions, answer, **kwargs)``.
    """
    more, kinds = (TOKEN_IDS, *columns), inspect.Parameter
    try:
        signature = inspect.signature(function)
    except ValueError:  # it does not tell, as some of NumPy's
        return True, ()
    except TypeError:
        raise ArgumentError(f"{label} must be a function of ({', '.join(USUAL)}), not {function!r}.") from None
    parameters = signature.parameters.values()
    takes_all = any(its.kind is kinds.VAR_KEYWORD for its in parameters)
    first = [its for its in parameters if its.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)][:3]
    named = [its for its in parameters if its.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    in_order = not _by_name(first, named, (*USUAL, *more))
    may_ask = [its for its in named if its not in first] if in_order else named
    known = more if in_order else (*USUAL, *more)
    unknown = [its.name for its in may_ask if its.default is kinds.empty and its.name not in known]
    if unknown:
        raise ArgumentError(
            f"{label} asks for {unknown[0]!r}, but besides {', '.join(USUAL)} there is only: {', '.join(more)}."
        )
    asks = tuple(name for name in known if takes_all or any(its.name == name for its in may_ask))
    try:
        signature.bind(*(USUAL if in_order else ()), **dict.fromkeys(asks))
    except TypeError as error:
        raise ArgumentError(f"{label} must be a function of ({', '.join(USUAL)}), but: {error}.") from None
    return in_order, asks


def _by_name(first: list[inspect.Parameter], named: list[inspect.Parameter], known: Sequence[str]) -> bool:
    """Return whether a function means its parameters by their names.

    :param first: those that would take what is usual
    """
    if not any(its.name in USUAL for its in named):
        return False
    is_misplaced = any(its.name in known and its.name != usual for its, usual in zip(first, USUAL, strict=False))
    return is_misplaced or all(its.name in known for its in first)


# --------------------------------------------------------------------- together


def scored(rewards: Sequence[Reward], columns: Mapping[str, list[Any]]) -> Scores:
    """Return what rewards give together for completions.

    :param columns: as for :class:`Reward`
    :raises ArgumentError: none of them applies to one
    """
    found, texts = [reward(columns) for reward in rewards], columns["completions"]
    table, weights = np.array([its.totals for its in found]), np.array([reward.weight for reward in rewards])
    applies = ~np.isnan(table)
    for number in np.flatnonzero(~applies.any(axis=0)):
        prompt, text = columns["prompts"][number], texts[number]
        raise ArgumentError(
            f"No reward applies to the prompt {prompt!r} and the completion {text!r}: at least one must return a "
            "number, such as 0.0."
        )
    named: list[dict[str, float]] = [{} for _ in texts]
    if len(rewards) > 1:
        named = [
            {reward.name: float(x) for reward, x in zip(rewards, column, strict=True) if not math.isnan(x)}
            for column in table.T
        ]
    totals = weights @ np.where(applies, table, 0.0)
    return Scores(totals, texts, named, _by_token(rewards, found, [len(ids) for ids in columns[TOKEN_IDS]]))


def _by_token(rewards: Sequence[Reward], found: list[Given], lengths: list[int]) -> list[np.ndarray] | None:
    if all(its is None for given in found for its in given.by_token):
        return None
    shares = [np.zeros(length) for length in lengths]
    for reward, given in zip(rewards, found, strict=True):
        for share, total, its in zip(shares, given.totals, given.by_token, strict=True):
            if its is not None:
                share += reward.weight * its
            elif not math.isnan(total):
                share[-1] += reward.weight * total
    return shares


def at_their_tokens(rollout: Rollout, rewards: np.ndarray) -> np.ndarray:
    """Return rewards, (n_steps * n_envs,), with those for single tokens at the steps of these.

    A response is scored when it is whole, so the environments give the sum with its last token, which is what Monitor
    counts, and say in ``info["step_rewards"]`` how much of it belongs to each step. Of a response that began in an
    earlier rollout the tokens there have been learned from, without theirs; ``n_episodes`` has whole ones.

    :raises ArgumentError: the sum is no longer what was given
    """
    table = rewards.reshape(rollout.n_steps, rollout.n_envs).copy()
    for step, env, told in rollout.told:
        shares = told.get("step_rewards")
        if shares is None:
            continue
        tolerance = 1e-4 * (1.0 + np.abs(shares).sum())
        if abs(table[step, env] - shares.sum()) > tolerance:
            raise ArgumentError(
                f"The rewards of single tokens add up to {shares.sum():g}, but {table[step, env]:g} was recorded: "
                "something scales or changes rewards. Use VecNormalize(norm_reward=False), and no wrapper that does."
            )
        first = max(0, step + 1 - len(shares))
        table[first : step + 1, env] = shares[len(shares) - (step + 1 - first) :]
    return table.reshape(-1)


def mean_by_name(rollout: Rollout) -> dict[str, float]:
    """Return the mean of each named reward over the episodes that ended in a rollout and that it applies to."""
    found: dict[str, list[float]] = {}
    for _, _, told in rollout.told:
        for name, value in told.get("reward_scores", {}).items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}
