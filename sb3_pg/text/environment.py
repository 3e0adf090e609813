"""Text as an environment: the prompt is where an episode begins, each action adds a token, the reward comes last."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_pg.common.errors import ArgumentError, check_count, check_number
from sb3_pg.text.chat import is_chat, turn_end
from sb3_pg.text.ends import Ends
from sb3_pg.text.prompts import Prompt, encode_prompts, read_prompts, shown
from sb3_pg.text.rewards import TOKEN_IDS, RewardFunction, Scores, as_rewards, scored
from sb3_pg.text.sequences import listed
from sb3_pg.text.spaces import EMPTY, text_space


@dataclass
class TextTask:
    """What to answer and how answers are scored.

    Prompts that are lists of messages are written by the tokenizer's chat template, up to where the model begins to
    write, and responses to them end with the template's end of a turn, too. Rewards get such prompts as they are, and
    completions as texts.

    A reward is a function of prompts, completions and references, lists of the same length, that returns a number for
    each completion. It is given more if its parameters have these names: ``token_ids``, the tokens of each completion
    with the one that ends it, and those of ``columns``. A function all of whose parameters have such names may leave
    some out, as TRL's do: ``f(completions, answer, **kwargs)``. In place of a number it may return None, where it does
    not apply; or a list with a number for each of ``token_ids``: these are the rewards of the single tokens, learned
    from where they stand, while Monitor sees their sum with the last token.

    :param prompts: texts to continue, or lists of messages (``{"role": ..., "content": ...}``) to answer; each episode
        begins with one of them, drawn at random. Or a ``datasets.Dataset`` with a column "prompt" of either kind; its
        columns "reference" and "completion" are ``references`` and ``examples`` (the one for the other where it is
        missing), all others ``columns``
    :param reward: scores finished responses, several at once: one call in each step of a :class:`TextVecEnv`. Several
        rewards are added up, and each is logged as ``text/reward/<name>``, the mean of where it applies
    :param tokenizer: a Hugging Face tokenizer with an end token
    :param references: the right response to each prompt (or several), for the reward and for metrics
    :param examples: texts for each prompt that a supervised start imitates; None takes the references
    :param prompt_length: columns of an observation for the prompt; None takes those of the longest
    :param response_length: longest response in tokens, the end token included; reaching it ends the episode
    :param missing_end_penalty: taken from the reward of a response that has reached that length without its end
    :param name: for logs
    :param end_tokens: tokens, by number or as texts, that end a response besides the tokenizer's own end token, such as
        the end of a turn
    :param stop_strings: texts that end a response when it contains one. They stay in the completion, as in transformers
        and TRL: the model has written them, and rewards may look at them
    :param reward_weights: of several rewards; None gives each the weight 1
    :param columns: more about each prompt, by name, for rewards that ask for it
    :raises ArgumentError: no prompts, an empty one, one that is too long or has words that the tokenizer does not know,
        no tokenizer, one without an end token, or without a chat template for messages, a reward that asks for what
        there is not, or a different number of references
    """

    prompts: Sequence[Prompt]
    reward: RewardFunction | Sequence[RewardFunction]
    tokenizer: Any
    references: Sequence[Any] | None = None
    examples: Sequence[Any] | None = None
    prompt_length: int | None = None
    response_length: int = 32
    missing_end_penalty: float = 0.0
    name: str = "text"
    end_tokens: Sequence[int | str] = ()
    stop_strings: Sequence[str] = ()
    reward_weights: Sequence[float] | None = None
    columns: Mapping[str, Sequence[Any]] | None = None
    rows: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("response_length", self.response_length)
        check_number("missing_end_penalty", self.missing_end_penalty)
        if self.prompt_length is not None:
            check_count("prompt_length", self.prompt_length)
        given = read_prompts(self.prompts, self.references, self.examples, self.columns)
        self.prompts, self.references, self.examples, self.columns = given
        self._rewards = as_rewards(self.reward, self.reward_weights, list(given.columns))
        self.ends = Ends.of(self.tokenizer, self.end_tokens, self.stop_strings)
        self.rows = encode_prompts(self.tokenizer, given.prompts, self.prompt_length)
        #: the token that ends what a supervised start imitates
        self.answer_end = self.ends.tokens[0]
        turn = turn_end(self.tokenizer) if is_chat(given.prompts[0]) else None
        if turn is not None:
            self.ends = self.ends.with_token(turn)
            self.answer_end = turn
        self.observation_space = text_space(self.width, self.response_length, len(self.tokenizer))
        self.action_space = self.ends.vocabulary

    @property
    def width(self) -> int:
        """Columns of an observation that belong to the prompt."""
        return int(self.rows.shape[1])

    @property
    def end_token(self) -> int:
        """The tokenizer's token that ends a response."""
        return self.ends.tokens[0]

    def observations(self, numbers: Any = None) -> np.ndarray:
        """First observations, (n, prompt_length + response_length), of the prompts with these numbers or of all."""
        prompts = self.rows if numbers is None else self.rows[numbers]
        rows = np.full((len(prompts), self.width + self.response_length), EMPTY, dtype=np.int32)
        rows[:, : self.width] = prompts
        return rows

    def have_ended(self, responses: np.ndarray) -> np.ndarray:
        """Return which responses, (n, response_length), have an end: an end token or a stop string, (n,)."""
        return self.ends.have_ended(responses)

    def decode(self, responses: np.ndarray) -> list[str]:
        """Return the texts of responses, (n, response_length), without the tokens that end them.

        Other special tokens, and stop strings, are shown: the model has written them.
        """
        return self.ends.decode(responses)

    def cut(self, responses: np.ndarray) -> np.ndarray:
        """Return responses, (n, response_length), of those who do not know the ends, up to the first one."""
        return self.ends.cut(responses)

    def score(self, numbers: Sequence[int], responses: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Rewards, float64 (n,), and texts of finished responses to the prompts with these numbers.

        :raises ArgumentError: a reward returned something else than a number for each of them
        :raises NonFiniteError: it returned one that is not finite
        """
        scores = self.scores(numbers, responses)
        return scores.totals, scores.texts

    def scores(self, numbers: Sequence[int], responses: np.ndarray) -> Scores:
        """Return all that the rewards say of finished responses; otherwise as ``score``."""
        numbers = [int(number) for number in numbers]
        columns: dict[str, list[Any]] = {
            "prompts": [self.prompts[number] for number in numbers],
            "completions": self.decode(responses),
            "references": [None if self.references is None else self.references[number] for number in numbers],
            TOKEN_IDS: listed(responses),
        }
        more = {name: [values[number] for number in numbers] for name, values in (self.columns or {}).items()}
        scores = scored(self._rewards, columns | more)
        penalties = self.missing_end_penalty * ~self.have_ended(responses)
        for share, penalty in zip(scores.by_token or (), penalties, strict=False):
            share[-1] -= penalty
        return scores._replace(totals=scores.totals - penalties)

    def info(self, number: int, i: int, scores: Scores, row: np.ndarray) -> dict[str, Any]:
        """Return what the last step of an episode tells besides its reward.

        :param number: of the prompt
        :param i: of the response among those of ``scores``
        :param row: the whole observation
        """
        info = {
            "prompt": self.prompts[number],
            "completion": scores.texts[i],
            "reference": None if self.references is None else self.references[number],
            "ended": bool(self.have_ended(row[None, self.width :])[0]),
        }
        if scores.named[i]:
            info["reward_scores"] = scores.named[i]
        if scores.by_token is not None:
            info["step_rewards"] = scores.by_token[i]
        return info


def check_task(task: Any) -> None:
    """Refuse what is not a TextTask, such as an environment.

    :raises ArgumentError: says what to do with it
    """
    if isinstance(task, TextTask):
        return
    its = f"a {type(task).__name__}"
    advice = "Make one: TextTask(prompts, reward, tokenizer)."
    if isinstance(task, TextEnv | TextVecEnv):
        advice = "Pass its task: env.task."
    elif isinstance(task, gym.Env | VecEnv):
        advice = "Environments, conversations too, are learned as they are, and evaluated by SB3's EvalCallback."
    raise ArgumentError(f"`task` must be a TextTask, not {its}. {advice}")


class TextEnv(gym.Env[np.ndarray, np.integer[Any]]):
    """One prompt after the other. For training prefer :class:`TextVecEnv`, which scores many responses at once.

    :param task: prompts, tokenizer and reward
    :raises ArgumentError: it is no TextTask; of ``reset``, there is no prompt with the number of ``options``
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012  # as gymnasium declares it

    def __init__(self, task: TextTask, render_mode: str | None = None) -> None:
        check_task(task)
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
        number = (options or {}).get("prompt", drawn)
        if not isinstance(number, int | np.integer) or not 0 <= number < len(self.task.prompts):
            raise ArgumentError(
                f"There is no prompt {number!r}: `options` may have numbers < {len(self.task.prompts)}."
            )
        self._number = int(number)
        self._length = 0
        self._row = self.task.observations([self._number])[0]
        return self._row.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Add a token to the response; if the reward function fails, it is not added."""
        task, row = self.task, self._row.copy()
        row[task.width + self._length] = action
        responses = row[None, task.width :]
        over = self._length + 1 == task.response_length or bool(task.have_ended(responses)[0])
        reward, info = 0.0, {}
        if over:
            scores = task.scores([self._number], responses)
            reward, info = float(scores.totals[0]), task.info(self._number, 0, scores, row)
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
        return f"{shown(self.task.prompts[self._number])} | {self.task.decode(self._row[None, self.task.width :])[0]}"


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
        check_task(task)
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
        task, going = self.task, np.flatnonzero(self._left > 0)
        rows, lengths = self._rows.copy(), self._lengths.copy()
        rows[going, task.width + lengths[going]] = self._actions[going]
        lengths[going] += 1
        dones = np.zeros(self.num_envs, dtype=bool)
        dones[going] = (lengths[going] == task.response_length) | task.ends.is_end(self._actions[going])
        if task.ends.strings:
            dones[going] |= task.have_ended(rows[going, task.width :])
        over = np.flatnonzero(dones)
        scores = task.scores(self._numbers[over].tolist(), rows[over, task.width :]) if len(over) else None

        self._rows, self._lengths = rows, lengths
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        if scores is not None:
            rewards[over] = scores.totals
            for i, env in enumerate(over):
                infos[env].update(self._last_info(int(env), i, scores))
        self._left[over] -= 1
        self._show_prompts(over[self._left[over] > 0])
        self._close_resting(over[self._left[over] <= 0])
        return self._rows.copy(), rewards, dones, infos

    def _last_info(self, env: int, i: int, scores: Scores) -> dict[str, Any]:
        row, passed = self._rows[env].copy(), round(time.time() - self._start_time, 6)
        episode = {"r": round(float(scores.totals[i]), 6), "l": int(self._lengths[env]), "t": passed}
        info = self.task.info(int(self._numbers[env]), i, scores, row)
        return {**info, "terminal_observation": row, "episode": episode}

    def _close_resting(self, envs: np.ndarray) -> None:
        """Put an end token behind responses that ended by a stop string: policies see that nothing follows them."""
        for env in envs[self._lengths[envs] < self.task.response_length]:
            column = self.task.width + self._lengths[env]
            if not self.task.ends.is_end(self._rows[env, column - 1]):
                self._rows[env, column] = self.task.end_token

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

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]
