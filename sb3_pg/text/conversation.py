"""Conversations as an environment: it answers the model, and goes on until the conversation ends."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from sb3_pg.common.errors import ArgumentError, NonFiniteError, as_number, check_count, check_number, is_finite
from sb3_pg.text.chat import (
    Message,
    check_form,
    check_messages,
    check_template,
    continuation,
    rendered,
    tokens_of,
    turn_end,
)
from sb3_pg.text.ends import Ends, check_known
from sb3_pg.text.prompts import shown
from sb3_pg.text.spaces import EMPTY, text_space

#: The attributes that say where a conversation is; archives know them without the underscore.
_STATE = ("row", "length", "turn", "messages", "state")


class Reply(NamedTuple):
    """What an environment says to the model.

    :param messages: one or several, of any role that the chat template knows but the model's own ("assistant"); none
        ends the conversation
    :param reward: for the turn that is answered
    :param state: what the environment wants to know when it answers next: plain data (numbers, texts, arrays, lists
        and dictionaries of them), so that archives can hold it
    :param info: more about this turn, for callbacks; ``is_success`` of the last one is logged
    """

    messages: Sequence[Message] = ()
    reward: float = 0.0
    state: Any = None
    info: Mapping[str, Any] = {}


class ChatEnv(gym.Env[np.ndarray, np.integer[Any]]):
    """A conversation of several turns; an episode is the whole of it. Write ``begin`` and ``answer``.

    A turn of the model ends with an end token, that of the chat template's turns included, a stop string, or
    ``response_length``. Then the environment answers, and what has been said moves into the prompt: the model's tokens
    exactly as it wrote them, what the template writes between two turns, and the answer's messages. So all that is
    acted, rewarded and learned from are the model's own tokens, and values look through the end of a turn to what
    comes after it.

    A conversation ends when the reply has no messages, after ``max_turns``, or when the next prompt would have more
    than ``prompt_length`` tokens; nothing is ever cut off. The last ``info`` has all its "messages", "n_turns", whether
    the last response "ended" by itself, and whether it was "too_long" to go on.

    Any number may be stepped side by side, as with any environment: ``make_vec_env(MyEnv, n_envs=32)``.

    :param tokenizer: a Hugging Face tokenizer with an end token and a chat template
    :param prompt_length: columns of an observation for all that has been said before a turn. More allow longer
        conversations, and take more memory
    :param response_length: longest turn of the model in tokens, its end included
    :param max_turns: of the model
    :param missing_end_penalty: taken from the reward of a turn that has reached ``response_length`` without its end
    :param end_tokens: tokens, by number or as texts, that end a turn besides the tokenizer's own and the template's
    :param stop_strings: texts that end a turn when it contains one; they stay in it
    :param render_mode: "ansi" or None
    :raises ArgumentError: the tokenizer has no template or no end token, or an argument cannot work; when it is
        stepped, also for replies that cannot work
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012  # as gymnasium declares it

    def __init__(
        self,
        tokenizer: Any,
        prompt_length: int = 256,
        response_length: int = 32,
        max_turns: int = 8,
        missing_end_penalty: float = 0.0,
        end_tokens: Sequence[int | str] = (),
        stop_strings: Sequence[str] = (),
        render_mode: str | None = None,
    ) -> None:
        for name, count in (("prompt", prompt_length), ("response", response_length)):
            check_count(f"{name}_length", count)
        check_count("max_turns", max_turns)
        check_number("missing_end_penalty", missing_end_penalty)
        self.ends = Ends.of(tokenizer, end_tokens, stop_strings)
        check_template("Conversations", tokenizer)
        turn = turn_end(tokenizer)
        self.turn_end = self.ends.tokens[0] if turn is None else turn
        self.ends = self.ends.with_token(self.turn_end)
        self.tokenizer = tokenizer
        self.width = prompt_length
        self.response_length = response_length
        self.max_turns = max_turns
        self.missing_end_penalty = missing_end_penalty
        self.render_mode = render_mode
        self.observation_space = text_space(prompt_length, response_length, len(tokenizer))
        self.action_space = self.ends.vocabulary
        self._row: np.ndarray = np.full(prompt_length + response_length, EMPTY, dtype=np.int32)
        self._length = self._turn = 0
        self._messages: list[dict[str, str]] = []
        self._state: Any = None

    @abstractmethod
    def begin(self, rng: np.random.Generator) -> Reply:
        """Return the messages with which a conversation begins, and what to remember of it.

        :param rng: for all that is drawn, so that seeds repeat it
        """

    @abstractmethod
    def answer(self, text: str, state: Any, messages: list[dict[str, str]]) -> Reply:
        """Answer a turn of the model.

        :param text: of the turn, without its end
        :param state: of the reply before
        :param messages: all that has been said before the turn
        """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a new conversation."""
        super().reset(seed=seed)
        reply = _checked("begin", self.begin(self.np_random))
        check_messages("What `begin` returns", reply.messages)
        prompt = self._first_prompt(reply.messages)
        if len(prompt) > self.width:
            raise ArgumentError(
                f"A conversation begins with {len(prompt)} tokens, more than prompt_length={self.width}: raise it."
            )
        self._messages, self._state = [dict(message) for message in reply.messages], reply.state
        self._row, self._length, self._turn = self._shown(prompt), 0, 0
        return self._row.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Add a token to the turn; if ``answer`` fails, it is not added."""
        row = self._row.copy()
        row[self.width + self._length] = action
        response = row[None, self.width :]
        ended = bool(self.ends.have_ended(response)[0])
        if not ended and self._length + 1 < self.response_length:
            self._row, self._length = row, self._length + 1
            return row.copy(), 0.0, False, False, {}
        (text,) = self.ends.decode(response)
        reply = _checked("answer", self.answer(text, self._state, [dict(message) for message in self._messages]))
        reward = self._reward(reply, ended)
        prompt = self._next_prompt(row, reply)
        over = not reply.messages or self._turn + 1 == self.max_turns or len(prompt) > self.width
        self._messages += [{"role": "assistant", "content": text}, *(dict(message) for message in reply.messages)]
        self._state, self._turn = reply.state, self._turn + 1
        self._row, self._length = (row, self._length + 1) if over else (self._shown(prompt), 0)
        info = {**reply.info, "completion": text, "ended": ended}
        if over:
            too_long = bool(reply.messages) and self._turn < self.max_turns
            info |= {"messages": self._messages, "n_turns": self._turn, "too_long": too_long}
        return self._row.copy(), reward, over, False, info

    def turns_of(self, conversations: Iterable[Sequence[Message]]) -> np.ndarray:
        """Return rows of prompt and response for each turn of the model in some conversations, for a supervised start.

        They are those that the environment would have shown: ``sb3_pg.text.supervised.train(policy, rows)`` imitates
        them.

        :param conversations: lists of messages, those of the role "assistant" being the model's
        :return: (n, prompt_length + response_length)
        :raises ArgumentError: one does not fit
        """
        rows = []
        for messages in conversations:
            check_form("What `turns_of` is given", messages)
            turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            if not turns:
                raise ArgumentError(f"The conversation {shown(messages)!r} has no message of the assistant.")
            row, last = None, 0
            for number in turns:
                before = messages[last:number]
                if not before:
                    raise ArgumentError(
                        f"Message {number} of {shown(messages)!r} is the assistant's, but answers none."
                    )
                prompt = self._first_prompt(before) if row is None else self._next_prompt(row, Reply(before))
                row, last = self._whole(prompt, messages[number]["content"]), number + 1
                rows.append(row)
        return np.array(rows, dtype=np.int32).reshape(-1, self.width + self.response_length)

    def _whole(self, prompt: list[int], text: str) -> np.ndarray:
        """Return a prompt with a response, up to its first end."""
        ids = [*tokens_of(self.tokenizer, text), self.turn_end]
        check_known(self.tokenizer, "A turn", text, ids)
        for what, n, most in (("prompt", len(prompt), self.width), ("response", len(ids), self.response_length)):
            if n > most:
                raise ArgumentError(f"The turn {text!r} has {n} tokens in its {what}; raise {what}_length={most}.")
        row = self._shown(prompt)
        row[self.width : self.width + len(ids)] = ids
        row[self.width :] = self.ends.cut(row[None, self.width :])[0]
        return row

    def _first_prompt(self, messages: Sequence[Message]) -> list[int]:
        text = rendered(self.tokenizer, messages)
        tokens = tokens_of(self.tokenizer, text)
        check_known(self.tokenizer, "The beginning of a conversation", text, tokens)
        return tokens

    def _next_prompt(self, row: np.ndarray, reply: Reply) -> list[int]:
        """Return what has been said so far, (length,), with a reply and the beginning of the model's next turn."""
        if not reply.messages:
            return []
        check_messages("What `answer` returns", reply.messages)
        said = row[row != EMPTY].tolist()
        tokens = continuation(self.tokenizer, reply.messages, said[-1])
        check_known(self.tokenizer, "A reply", " ".join(its["content"] for its in reply.messages), tokens)
        return [*said, *tokens]

    def _shown(self, prompt: list[int]) -> np.ndarray:
        row = np.full(self.width + self.response_length, EMPTY, dtype=np.int32)
        row[self.width - len(prompt) : self.width] = prompt
        return row

    def _reward(self, reply: Reply, ended: bool) -> float:
        reward = as_number(reply.reward)
        if reward is None:
            raise ArgumentError(f"The reward of a Reply must be a number, not {reply.reward!r}.")
        if not is_finite(np.asarray(reward)):
            raise NonFiniteError(f"`answer` gave the reward {reward}: it must be finite in single precision.")
        return reward - self.missing_end_penalty * (not ended)

    def get_state(self) -> dict[str, Any]:
        """Return where the conversation is, for archives; the generator goes on by itself."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in _STATE:
            setattr(self, f"_{name}", state[name])

    def render(self) -> str:
        """Return what has been said, with the turn that the model has begun."""
        (text,) = self.ends.decode(self._row[None, self.width :])
        said = [shown(self._messages)] if self._messages else []
        is_begun = self._length > 0 and self._messages[-1]["role"] != "assistant"
        return "\n".join([*said, f"assistant: {text}"] if is_begun else said)


def _checked(method: str, reply: Any) -> Reply:
    if not isinstance(reply, Reply):
        raise ArgumentError(f"`{method}` must return a Reply, not {reply!r}.")
    return reply
