"""Text as an environment: the prompt is where an episode begins, each action adds a token, the reward comes last."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_pg.common.errors import (
    ArgumentError,
    NonFiniteError,
    check_count,
    check_number,
    check_parameters,
    first_not_finite,
)
from sb3_pg.text.sequences import last_tokens
from sb3_pg.text.spaces import EMPTY, Vocabulary, text_space

#: (prompts, completions, references) to one finite number for each; references are None where the task has none
RewardFunction = Callable[[list[str], list[str], list[Any]], Sequence[float]]


@dataclass
class TextTask:
    """What to answer and how answers are scored.

    :param prompts: texts to continue; each episode begins with one of them, drawn at random
    :param reward: scores finished responses, several at once: one call in each step of a :class:`TextVecEnv`
    :param tokenizer: a Hugging Face tokenizer with an end token
    :param references: the right response to each prompt (or several), for the reward and for metrics
    :param examples: texts for each prompt that a supervised start imitates; None takes the references
    :param prompt_length: columns of an observation for the prompt; None takes those of the longest
    :param response_length: longest response in tokens, the end token included; reaching it ends the episode
    :param missing_end_penalty: taken from the reward of a response that has reached that length without its end
    :param name: for logs
    :param end_tokens: tokens, by number or as texts, that end a response besides the tokenizer's own end token, such as
        the end of a turn
    :raises ArgumentError: no prompts, an empty one, one that is too long or has words that the tokenizer does not know,
        no tokenizer or one without an end token, or a different number of references
    """

    prompts: Sequence[str]
    reward: RewardFunction
    tokenizer: Any
    references: Sequence[Any] | None = None
    examples: Sequence[Any] | None = None
    prompt_length: int | None = None
    response_length: int = 32
    missing_end_penalty: float = 0.0
    name: str = "text"
    end_tokens: Sequence[int | str] = ()
    rows: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("response_length", self.response_length)
        check_number("missing_end_penalty", self.missing_end_penalty)
        check_parameters("reward", self.reward, "prompts", "completions", "references")
        for name, given in (("prompts", self.prompts), ("references", self.references), ("examples", self.examples)):
            if isinstance(given, str):
                raise ArgumentError(f"`{name}` must be a list of texts, not one text: {given[:60]!r}.")
        self.prompts = list(self.prompts)
        if not self.prompts:
            raise ArgumentError("`prompts` is empty: an episode begins with one of them.")
        for number, prompt in enumerate(self.prompts):
            if not isinstance(prompt, str):
                raise ArgumentError(f"`prompts` must be texts, but prompt {number} is {prompt!r}.")
        for name, given in (("references", self.references), ("examples", self.examples)):
            if given is not None and len(given) != len(self.prompts):
                raise ArgumentError(
                    f"`{name}` must have one entry for each of the {len(self.prompts)} prompts, not {len(given)}."
                )
        check_tokenizer(self.tokenizer)
        if self.tokenizer.eos_token_id is None:
            raise ArgumentError("`tokenizer` has no end token (eos_token), so no response would ever end.")
        self.rows = self._encode_prompts()
        width = self.rows.shape[1]
        self.observation_space = text_space(width, self.response_length, len(self.tokenizer))
        more = [self._end_token(end) for end in self.end_tokens]
        own = self.tokenizer.eos_token_id
        others = [end for end in dict.fromkeys(more) if end != own]
        self.action_space = Vocabulary(len(self.tokenizer), own, others, self.tokenizer)

    def _end_token(self, end: int | str) -> int:
        number = self.tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end
        if number is None or number == self.tokenizer.unk_token_id or not 0 <= number < len(self.tokenizer):
            raise ArgumentError(f"`end_tokens` has {end!r}, which is not a token of the tokenizer.")
        return int(number)

    def _encode_prompts(self) -> np.ndarray:
        """Token numbers of the prompts, each in the last columns of its row."""
        tokens = self.tokenizer(list(self.prompts), add_special_tokens=True)["input_ids"]
        end = self.tokenizer.eos_token_id
        # Tokenizers such as T5's end every text; a prompt that is to be continued must not be at its end.
        tokens = [ids[:-1] if ids and ids[-1] == end and len(ids) > 1 else ids for ids in tokens]
        # And chat templates write the start token that the tokenizer adds, too.
        start = self.tokenizer.bos_token_id
        tokens = [ids[1:] if start is not None and ids[:2] == [start, start] else ids for ids in tokens]
        for number, ids in enumerate(tokens):
            if not ids:
                raise ArgumentError(f"Prompt {number} ({self.prompts[number]!r}) has no tokens.")
            check_known(self.tokenizer, f"Prompt {number}", self.prompts[number], ids)
        longest = max(range(len(tokens)), key=lambda number: len(tokens[number]))
        width = self.prompt_length or len(tokens[longest])
        if len(tokens[longest]) > width:
            raise ArgumentError(
                f"Prompt {longest} has {len(tokens[longest])} tokens, more than prompt_length={width}: "
                f"{self.prompts[longest][:60]!r}. Shorten it or raise `prompt_length`."
            )
        rows = np.full((len(tokens), width), EMPTY, dtype=np.int32)
        for row, ids in zip(rows, tokens, strict=True):
            row[width - len(ids) :] = ids
        return rows

    @property
    def width(self) -> int:
        """Columns of an observation that belong to the prompt."""
        return int(self.rows.shape[1])

    @property
    def end_token(self) -> int:
        """The token that ends a response."""
        return int(self.action_space.end_token)

    def observations(self, numbers: Any = None) -> np.ndarray:
        """First observations, (n, prompt_length + response_length), of the prompts with these numbers or of all."""
        prompts = self.rows if numbers is None else self.rows[numbers]
        rows = np.full((len(prompts), self.width + self.response_length), EMPTY, dtype=np.int32)
        rows[:, : self.width] = prompts
        return rows

    def is_end(self, tokens: Any) -> np.ndarray:
        """Return which tokens end a response."""
        return np.isin(tokens, self.action_space.end_tokens)

    def have_ended(self, responses: np.ndarray) -> np.ndarray:
        """Return which responses, (n, response_length), end with an end token, (n,)."""
        return self.is_end(last_tokens(responses, 0)[0])

    def decode(self, responses: np.ndarray) -> list[str]:
        """Return the texts of responses, (n, response_length), without the tokens that end them.

        Other special tokens are shown: the model has written them.
        """
        ended = self.have_ended(responses)
        tokens = [row[row != EMPTY].tolist() for row in responses]
        tokens = [ids[:-1] if over else ids for ids, over in zip(tokens, ended, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=False)
        return texts

    def score(self, numbers: Sequence[int], responses: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Rewards, float64 (n,), and texts of finished responses to the prompts with these numbers.

        :raises ArgumentError: the reward function returned another number of rewards
        :raises NonFiniteError: it returned one that is not finite
        """
        texts = self.decode(responses)
        prompts = [self.prompts[number] for number in numbers]
        references = [None if self.references is None else self.references[number] for number in numbers]
        rewards = _as_rewards(self.reward(prompts, texts, references), len(texts))
        bad = first_not_finite(rewards)
        if bad is not None:
            raise NonFiniteError(
                f"`reward` returned {rewards[bad]} for the prompt {prompts[bad[0]]!r} and the completion "
                f"{texts[bad[0]]!r}: it must return finite numbers in single precision."
            )
        return rewards - self.missing_end_penalty * ~self.have_ended(responses), texts

    def info(self, number: int, text: str, row: np.ndarray) -> dict[str, Any]:
        """Return what the last step of an episode tells besides its reward."""
        return {
            "prompt": self.prompts[number],
            "completion": text,
            "reference": None if self.references is None else self.references[number],
            "ended": bool(self.have_ended(row[None, self.width :])[0]),
        }


def _as_rewards(returned: Any, n: int) -> np.ndarray:
    """Return what a reward function has returned for n completions as an array.

    :raises ArgumentError: it is not n numbers
    """
    try:
        if isinstance(returned, th.Tensor):
            returned = returned.detach().cpu().double()
        elif isinstance(returned, list | tuple):
            returned = [x.item() if isinstance(x, th.Tensor) else x for x in returned]
        rewards = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError):
        rewards = None
    if returned is None or rewards is None or rewards.shape != (n,):
        is_other = returned is None or rewards is None
        found = repr(returned)[:60] if is_other else f"an array of shape {np.shape(returned)}"
        raise ArgumentError(
            f"`reward` must return one number for each of the {n} completions it is given, but returned {found}."
        )
    return rewards


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is not a tokenizer, such as the name of one."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        name = isinstance(tokenizer, str | Path)
        advice = f" Pass AutoTokenizer.from_pretrained({str(tokenizer)!r})." if name else ""
        raise ArgumentError(f"`tokenizer` must be a Hugging Face tokenizer, not {tokenizer!r}.{advice}")


def check_known(tokenizer: Any, what: str, text: str, tokens: list[int]) -> None:
    """Refuse a text with words that a tokenizer does not know.

    :param what: the text is, for the error
    :param tokens: of the text
    """
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id) or unknown not in tokens:
        return
    words = [word for word in text.split() if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
    raise ArgumentError(
        f"{what} ({text[:60]!r}) has what the tokenizer does not know: {', '.join(map(repr, words[:5])) or 'a token'}. "
        "Make the tokenizer of all texts, or leave such texts out."
    )


class TextEnv(gym.Env[np.ndarray, np.integer[Any]]):
    """One prompt after the other. For training prefer :class:`TextVecEnv`, which scores many responses at once.

    :param task: prompts, tokenizer and reward
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012  # as gymnasium declares it

    def __init__(self, task: TextTask, render_mode: str | None = None) -> None:
        self.task = task
        self.observation_space = task.observation_space
        self.action_space = task.action_space
        self.render_mode = render_mode
        self._row = task.observations([0])[0]
        self._number = self._length = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Show a new prompt; ``options={"prompt": number}`` chooses it."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self.task.prompts)))
        self._number = (options or {}).get("prompt", drawn)
        self._length = 0
        self._row = self.task.observations([self._number])[0]
        return self._row.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Add a token to the response; if the reward function fails, it is not added."""
        task, row = self.task, self._row.copy()
        row[task.width + self._length] = action
        over = bool(task.is_end(action)) or self._length + 1 == task.response_length
        reward, info = 0.0, {}
        if over:
            rewards, texts = task.score([self._number], row[None, task.width :])
            reward, info = float(rewards[0]), task.info(self._number, texts[0], row)
        self._row, self._length = row, self._length + 1
        return row.copy(), reward, over, False, info

    def get_state(self) -> dict[str, Any]:
        """Return where the environment is, for archives; its generator goes on by itself."""
        return {"row": self._row, "number": self._number, "length": self._length}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._row, self._number, self._length = state["row"], state["number"], state["length"]

    def render(self) -> str:
        """Prompt and response as text."""
        return f"{self.task.prompts[self._number]} | {self.task.decode(self._row[None, self.task.width :])[0]}"


#: The attributes of a TextVecEnv that change.
_STATE = ("_rng", "_rows", "_lengths", "_numbers", "_queues", "_seen", "_left", "_next")


class TextVecEnv(VecEnv):
    """Many episodes of a task side by side, stepped as one array and scored in one call.

    Reports the finished episodes as Monitor does, so it needs no such wrapper.

    :param task: prompts, tokenizer and reward
    :param n_envs: episodes side by side. More make better use of the model
    :param completions_per_prompt: neighbouring environments that are shown the same prompts, for baselines that
        compare the responses to one prompt; divides ``n_envs``
    :param in_order: show the prompts one after the other instead of drawing them, for evaluation
    :param seed: of the drawing
    """

    def __init__(
        self,
        task: TextTask,
        n_envs: int = 32,
        completions_per_prompt: int = 1,
        in_order: bool = False,
        seed: int | None = None,
    ) -> None:
        check_count("n_envs", n_envs)
        check_count("completions_per_prompt", completions_per_prompt)
        if n_envs % completions_per_prompt:
            raise ArgumentError(
                f"`completions_per_prompt` must divide n_envs={n_envs}, but {completions_per_prompt} does not."
            )
        self.task = task
        self.completions_per_prompt = completions_per_prompt
        self.in_order = in_order
        self.render_mode = None
        super().__init__(n_envs, task.observation_space, task.action_space)
        self._rng = np.random.default_rng(seed)
        self._actions = np.zeros(n_envs, dtype=np.int64)
        self._rows = task.observations(np.zeros(n_envs, dtype=int))
        self._lengths = np.zeros(n_envs, dtype=int)
        self._numbers = np.zeros(n_envs, dtype=int)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget which prompts each group has seen; from here on its environments see the same ones."""
        self._queues: list[list[int]] = [[] for _ in range(self.num_envs // self.completions_per_prompt)]
        self._seen = np.zeros(self.num_envs, dtype=int)
        self._left = np.full(self.num_envs, np.inf)
        self._next = 0
        self._start_time = time.time()

    def rest_after(self, n_episodes: int) -> None:
        """From here until the next reset let each environment rest after so many episodes.

        One at rest shows its finished response, whatever the action, and gives neither reward nor end. Algorithms ask
        for it that learn from the same number of episodes of each (``n_episodes``), and would throw more away.
        """
        self._left[:] = n_episodes

    def _draw(self) -> int:
        if not self.in_order:
            return int(self._rng.integers(len(self.task.prompts)))
        self._next += 1
        return (self._next - 1) % len(self.task.prompts)

    def _show_prompts(self, envs: Iterable[int]) -> None:
        envs = np.asarray(list(envs), dtype=int)
        for env in envs:
            queue = self._queues[env // self.completions_per_prompt]
            if self._seen[env] == len(queue):
                queue.append(self._draw())
            self._numbers[env] = queue[self._seen[env]]
            self._seen[env] += 1
        self._lengths[envs] = 0
        self._rows[envs] = self.task.observations(self._numbers[envs])

    def reset(self) -> VecEnvObs:
        """Show every environment a new prompt."""
        seed = self._seeds[0]
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._begin_anew()
        self._show_prompts(range(self.num_envs))
        return self._rows.copy()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions).reshape(-1)

    def step_wait(self) -> VecEnvStepReturn:
        """Add a token to each response; if the reward function fails, none is added."""
        task, is_going = self.task, self._left > 0
        columns, lengths = task.width + self._lengths, self._lengths + is_going
        dones = is_going & (task.is_end(self._actions) | (lengths == task.response_length))
        over, going = np.flatnonzero(dones), np.flatnonzero(is_going)
        finished = self._rows[over]
        finished[np.arange(len(over)), columns[over]] = self._actions[over]
        found, texts = np.zeros(0), list[str]()
        if len(over):
            found, texts = task.score(self._numbers[over].tolist(), finished[:, task.width :])

        self._rows[going, columns[going]] = self._actions[going]
        self._lengths = lengths
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        rewards[over] = found
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        passed = round(time.time() - self._start_time, 6)
        for env, row, reward, text in zip(over, finished, found, texts, strict=True):
            infos[env].update(task.info(int(self._numbers[env]), text, row))
            infos[env]["terminal_observation"] = row
            infos[env]["episode"] = {"r": round(float(reward), 6), "l": int(lengths[env]), "t": passed}
        self._left[over] -= 1
        self._show_prompts(over[self._left[over] > 0])
        return self._rows.copy(), rewards, dones, infos

    def get_state(self) -> dict[str, Any]:
        """Return where the environments are and which prompts come next, for archives."""
        return {name: getattr(self, name) for name in _STATE}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in _STATE:
            setattr(self, name, state[name])

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError("The environments of a TextVecEnv are one object and have no methods of their own.")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]
