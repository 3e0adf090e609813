"""Three tasks that need no download: question answering, translation, and texts of a sentiment.

Each function gives the training task or the held-out one, on prompts that the other does not have, with a tokenizer
of whole words. The examples to imitate are like texts found somewhere: a third of the answers are wrong, half of the
translations bad, and a third of the reviews good. Telling them apart is what is left to the reward, which is never
the metric by which the task is judged (``metric`` of :class:`BuiltIn`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np

from sb3_pg.common.errors import check_choice
from sb3_pg.text.environment import TextEnv, TextTask
from sb3_pg.text.packages import package
from sb3_pg.text.tokenizers import digits, word_tokenizer, words_of

#: Every fifth example is held out.
HELD_OUT = 5


@dataclass(frozen=True)
class BuiltIn:
    """A task, and by which number a model of it is judged.

    :param make: "train" or "test" to the task
    :param metric: name of one of :mod:`sb3_pg.text.metrics`, or "sentiment"
    """

    make: Callable[[str], TextTask]
    metric: str


@dataclass(frozen=True)
class Example:
    """A prompt, what to imitate, and the right answer if there is one."""

    prompt: str
    found: tuple[str, ...]
    right: str | None = None


def _split(examples: list[Example], split: str, **task: Any) -> TextTask:
    """Return the training or the held-out part, with lengths and words of both."""
    check_choice("split", split, ("train", "test"))
    tokenizer = word_tokenizer(words_of(text for example in examples for text in (example.prompt, *example.found)))
    part = [example for i, example in enumerate(examples) if (i % HELD_OUT == 0) == (split == "test")]
    return TextTask(
        [example.prompt for example in part],
        references=[example.right for example in part] if part[0].right is not None else None,
        examples=[example.found for example in part],
        tokenizer=tokenizer,
        prompt_length=max(len(example.prompt.split()) for example in examples),
        **task,
    )


def _shuffled(examples: Sequence[Any], seed: int) -> list[Any]:
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ---------------------------------------------------------- question answering

#: what it says, and what its young is called
ANIMALS = {
    "cat": ("meow", "kitten"),
    "cow": ("moo", "calf"),
    "dog": ("woof", "puppy"),
    "duck": ("quack", "duckling"),
    "frog": ("croak", "tadpole"),
    "goat": ("bleat", "kid"),
    "goose": ("honk", "gosling"),
    "hen": ("cluck", "chick"),
    "horse": ("neigh", "foal"),
    "lion": ("roar", "cub"),
    "pig": ("oink", "piglet"),
    "sheep": ("baa", "lamb"),
}
QUESTIONS = (
    ("what does a {} say ?", "how does a {} sound ?", "which sound comes from a {} ?", "say what a {} says ."),
    (
        "what is a young {} called ?",
        "how do you call a young {} ?",
        "name the young of a {} .",
        "a {} has which young ?",
    ),
)
BEGINNINGS = ("", "please tell me : ", "do you know : ", "quick : ")


def question_answering(split: str = "train", seed: int = 0) -> TextTask:
    """Numbers below 100 plus numbers below 10, and questions about animals.

    Wrong sums are off by one, wrong animals are any. The reward is the share of the answer's words
    that are right and in their place; the metric is exact match.
    """
    rng = np.random.default_rng(seed)

    def number(question: str, right: int) -> Example:
        wrong = right + int(rng.choice((-1, 1))) if right else 1
        return Example(question, (digits(right), digits(right), digits(wrong)), digits(right))

    examples = [number(f"{digits(a)} + {digits(b)} =", a + b) for a in range(100) for b in range(10)]
    for animal, facts in ANIMALS.items():
        for which, right in enumerate(facts):
            for beginning, question in product(BEGINNINGS, QUESTIONS[which]):
                wrong = ANIMALS[str(rng.choice(sorted(ANIMALS)))][which]
                examples.append(Example(beginning + question.format(animal), (right, right, wrong), right))
    examples = _shuffled(examples, seed)
    return _split(examples, split, reward=words_in_place, response_length=4, name="question_answering")


def words_in_place(prompts: list[str], completions: list[str], references: list[Any]) -> list[float]:
    """Share of places, of the longer of completion and reference, at which both have the same word."""

    def share(text: str, reference: str) -> float:
        found, expected = text.split(), reference.split()
        return sum(a == b for a, b in zip(found, expected, strict=False)) / max(len(found), len(expected))

    return [share(text, reference) for text, reference in zip(completions, references, strict=True)]


# ---------------------------------------------------------------- translation

MONTHS = {
    "en": _words("january february march april may june july august september october november december"),
    "fr": _words("janvier février mars avril mai juin juillet août septembre octobre novembre décembre"),
    "es": _words("enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre"),
}
LANGUAGES = {"fr": "french", "es": "spanish"}


@cache
def _number(n: int, language: str, kind: str = "cardinal") -> str:
    words = package("num2words").num2words(n, lang=language, to=kind)
    return " ".join(words.replace("-", " ").replace(",", " ").split())


def _date(day: int, month: int, year: int, language: str) -> str:
    name = MONTHS[language][month]
    if language == "en":
        return f"the {_number(day, 'en', 'ordinal')} of {name} {_number(year, 'en', 'year')}"
    if language == "fr":
        return f"le {'premier' if day == 1 else _number(day, 'fr')} {name} {_number(year, 'fr')}"
    return f"el {_number(day, 'es')} de {name} de {_number(year, 'es')}"


def translation(split: str = "train", seed: int = 0) -> TextTask:
    """Numbers below 10,000 and dates in words, from English to French and Spanish.

    Bad translations of numbers are in the other language, those of dates leave words out. The reward is chrF of the
    sentence, 0 to 1; the metric is BLEU over all.
    """
    rng = np.random.default_rng(seed)
    numbers = sorted({*range(100), *rng.integers(100, 10_000, 1500).tolist()})
    dates = sorted(
        {(day, month, year) for day, month, year in rng.integers((1, 0, 1900), (32, 12, 2030), (1500, 3)).tolist()}
    )
    examples = []
    for language, other in (("fr", "es"), ("es", "fr")):
        to = f"to {LANGUAGES[language]} :"
        for n in numbers:
            right, wrong = _number(n, language), _number(n, other)
            examples.append(Example(f"{to} {_number(n, 'en')}", (right, wrong), right))
        for date in dates:
            right, wrong = _date(*date, language), _flawed(_date(*date, language), rng)
            examples.append(Example(f"{to} {_date(*date, 'en')}", (right, wrong), right))
    examples = _shuffled(examples, seed)
    longest = max(len(text.split()) for example in examples for text in example.found)
    return _split(examples, split, reward=sentence_chrf, response_length=longest + 1, name="translation")


def _flawed(text: str, rng: np.random.Generator) -> str:
    """Return the text without one or two of its words."""
    words = text.split()
    missing = rng.choice(len(words), size=int(rng.integers(1, 3)), replace=False)
    return " ".join(word for i, word in enumerate(words) if i not in missing)


def sentence_chrf(prompts: list[str], completions: list[str], references: list[Any]) -> list[float]:
    """Sacrebleu's chrF of each completion, 0 to 1."""
    sacrebleu = package("sacrebleu")
    pairs = zip(completions, references, strict=True)
    return [sacrebleu.sentence_chrf(text, [reference]).score / 100 for text, reference in pairs]


# ------------------------------------------------------------------ sentiment

THEMES = _words("book film food game hotel meal music party place play room show song story team town trip walk")
VERBS = _words("looked seemed sounded was")
GOOD = _words(
    "amazing beautiful brilliant charming cheerful delightful excellent fantastic friendly fun glad good great happy "
    "impressive lovely nice perfect pleasant sweet wonderful"
)
BAD = _words(
    "annoying awful bad boring cruel disappointing dull horrible lame miserable nasty poor sad stupid terrible ugly "
    "unhappy unpleasant upset weak worse"
)
PLAIN = _words("big brown early large late long new old plain quiet short small warm wide young")
ADVERBS = _words("quite rather really so too very")


def sentiment(split: str = "train", seed: int = 0) -> TextTask:
    """Go on with the beginning of a review; good, bad and neutral ones are equally frequent in the examples.

    The reward is the sentiment by vaderSentiment, -1 to 1; look at KL and distinct-2 beside it, since saying the same
    kind word every time is what it asks for.
    """
    rng = np.random.default_rng(seed)

    def opinion() -> str:
        word = str(rng.choice((GOOD, BAD, PLAIN)[rng.integers(3)]))
        return f"{rng.choice(ADVERBS)} {word}" if rng.random() < 0.4 else word

    def review() -> str:
        more = [f"and the {rng.choice(THEMES)} {rng.choice(VERBS)} {opinion()}" for _ in range(rng.integers(3))]
        return " ".join([opinion(), *more])

    prompts = [
        f"{place}the {theme} {verb}" for place in ("", "yesterday ", "at first ") for theme in THEMES for verb in VERBS
    ]
    examples = [Example(prompt, tuple(review() for _ in range(20))) for prompt in _shuffled(prompts, seed)]
    return _split(examples, split, reward=sentiment_of, response_length=16, name="sentiment")


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    return package("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


def sentiment_of(prompts: list[str], completions: list[str], references: list[Any]) -> list[float]:
    """Return the compound score of each completion, -1 (bad) to 1 (good)."""
    return [_analyzer().polarity_scores(text)["compound"] for text in completions]


TASKS: dict[str, BuiltIn] = {
    "question_answering": BuiltIn(question_answering, "exact_match"),
    "translation": BuiltIn(translation, "bleu"),
    "sentiment": BuiltIn(sentiment, "sentiment"),
}


@cache
def _task(name: str, split: str) -> TextTask:
    return TASKS[name].make(split)


def make_env(task: str, split: str = "train", **options: Any) -> TextEnv:
    """Return the environment behind the registered ids; all of one process share the task's data."""
    return TextEnv(_task(task, split), **options)
