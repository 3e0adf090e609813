"""Two conversations that need no download: a guessing game, and sums with a calculator.

Their tokenizers have whole words, and a token for each role.
"""

from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sb3_pg.text.conversation import ChatEnv, Reply
from sb3_pg.text.tokenizers import digits, word_tokenizer

DIGITS = [str(digit) for digit in range(10)]


@cache
def _tokenizer(words: str) -> PreTrainedTokenizerFast:
    return word_tokenizer([*DIGITS, *words.split()], chat=True)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class GuessingGame(ChatEnv):
    """Guess a number from 0 to 9 in four turns; the answer is "higher" or "lower".

    The reward is 1 for the number, 0 for another, and -0.2 for what is no number.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        tokenizer = _tokenizer("guess a number higher lower right")
        super().__init__(tokenizer, prompt_length=30, response_length=2, max_turns=4, render_mode=render_mode)

    def begin(self, rng: np.random.Generator) -> Reply:
        return Reply([_message("user", "guess a number")], state=int(rng.integers(10)))

    def answer(self, text: str, state: Any, messages: list[dict[str, str]]) -> Reply:
        if text not in DIGITS:
            return Reply([_message("user", "a number")], -0.2, state)
        if int(text) == state:
            return Reply(reward=1.0, info={"is_success": True})
        return Reply([_message("user", "higher" if state > int(text) else "lower")], 0.0, state, {"is_success": False})


class Calculator(ChatEnv):
    """Answer a question such as "what is 3 times 4 plus 5 ?", with a calculator as a tool.

    A turn of the form "calc 3 * 4 + 5" is answered by the tool, with digits as words: "1 7", or "error". Any other turn
    is the answer, which ends the conversation: the reward is 1 if it is right. The first call of the tool that works
    is worth 0.1.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        tokenizer = _tokenizer("what is times plus ? calc * + error")
        super().__init__(tokenizer, prompt_length=40, response_length=7, max_turns=3, render_mode=render_mode)

    def begin(self, rng: np.random.Generator) -> Reply:
        a, b, c = (int(x) for x in rng.integers(10, size=3))
        return Reply(
            [_message("user", f"what is {a} times {b} plus {c} ?")], state={"right": a * b + c, "called": False}
        )

    def answer(self, text: str, state: Any, messages: list[dict[str, str]]) -> Reply:
        if not text.startswith("calc"):
            is_right = text == digits(state["right"])
            return Reply(reward=float(is_right), info={"is_success": is_right})
        result = calculate(text.split()[1:])
        if result is None:
            return Reply([_message("tool", "error")], 0.0, state)
        reward = 0.0 if state["called"] else 0.1
        return Reply([_message("tool", digits(result))], reward, {**state, "called": True})

    def demonstrations(self, n: int, seed: int = 0) -> list[list[dict[str, str]]]:
        """Return conversations to imitate; in half of them the model guesses instead of calling the tool."""
        rng, conversations = np.random.default_rng(seed), []
        for number in range(n):
            a, b, c = (int(x) for x in rng.integers(10, size=3))
            question = _message("user", f"what is {a} times {b} plus {c} ?")
            if number % 2:
                conversations.append([question, _message("assistant", digits(int(rng.integers(91))))])
                continue
            call, result = _message("assistant", f"calc {a} * {b} + {c}"), digits(a * b + c)
            conversations.append([question, call, _message("tool", result), _message("assistant", result)])
        return conversations


def calculate(words: list[str]) -> int | None:
    """Return the value of digits with ``*`` and ``+`` between them, None if it is of another form."""
    numbers, signs = words[::2], words[1::2]
    if len(numbers) != len(signs) + 1 or not set(numbers) <= set(DIGITS) or not set(signs) <= {"*", "+"}:
        return None
    products = [int(numbers[0])]
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            products[-1] *= int(number)
        else:
            products.append(int(number))
    return sum(products)
