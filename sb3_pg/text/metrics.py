"""How good and how varied texts are, by the field's own libraries where there are some.

All take lists of texts and return one number, or several by name. References are one text for each completion, or a
list of texts of which the best match counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sb3_pg.common.errors import ArgumentError, as_number, check_choice, check_count, check_parameters, did_you_mean
from sb3_pg.text.packages import package
from sb3_pg.text.rewards import name_of

Texts = Sequence[str]
References = Sequence[Any]

#: A metric of the user's own: from completions and references (None if there are none) to a number, or several.
Metric = Callable[[Texts, Any], float | dict[str, float]]


def _lists(completions: Texts, references: References) -> list[list[str]]:
    """Return the references of each completion.

    :raises ArgumentError: one has none, or they are no texts, or not as many as the completions
    """
    _check_numbers(completions, references)
    lists = []
    for number, reference in enumerate(references):
        some = _texts(reference)
        if some is None:
            raise ArgumentError(f"Reference {number} must be a text or a list of texts, not {reference!r}.")
        lists.append(some)
    return lists


def _are_texts(references: References) -> bool:
    """Return whether each is a text or a list of texts, and not what only a reward can read, such as a number."""
    return all(_texts(r) for r in references)


def _texts(reference: Any) -> list[str] | None:
    """Return the texts of a reference; None if it has none."""
    some = [reference] if isinstance(reference, str) else reference
    is_list = isinstance(some, list | tuple) and len(some) > 0
    return list(some) if is_list and all(isinstance(r, str) for r in some) else None


def _check_numbers(completions: Any, references: Any) -> None:
    for name, given in (("completions", completions), ("references", references)):
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise ArgumentError(f"`{name}` must be a list, not {given!r}.")
    if not len(completions):
        raise ArgumentError("There are no completions to measure.")
    if len(references) != len(completions):
        raise ArgumentError(f"There are {len(completions)} completions, but {len(references)} references.")


def _columns(completions: Texts, references: References) -> list[list[str]]:
    """Return references as sacrebleu takes them: the first of every completion, the second of every, ..."""
    lists = _lists(completions, references)
    longest = max(map(len, lists))
    return [[some[min(i, len(some) - 1)] for some in lists] for i in range(longest)]


def bleu(completions: Texts, references: References) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100."""
    return float(package("sacrebleu").corpus_bleu(list(completions), _columns(completions, references)).score)


def chrf(completions: Texts, references: References) -> float:
    """Corpus chrF of sacrebleu, 0 to 100."""
    return float(package("sacrebleu").corpus_chrf(list(completions), _columns(completions, references)).score)


def rouge(kind: str) -> Callable[[Texts, References], float]:
    """Mean F1 of ROUGE by rouge-score, 0 to 1.

    :param kind: "rouge1", "rouge2" (and so on to 9) or "rougeL"
    :raises ArgumentError: it is another
    """
    check_choice("kind", kind, [*(f"rouge{n}" for n in range(1, 10)), "rougeL", "rougeLsum"])

    def mean(completions: Texts, references: References) -> float:
        scorer = package("rouge_score.rouge_scorer").RougeScorer([kind])
        best = [
            scorer.score_multi(some, text)[kind].fmeasure
            for text, some in zip(completions, _lists(completions, references), strict=True)
        ]
        return float(np.mean(best))

    mean.__name__ = kind
    return mean


def normalized(text: str) -> str:
    """Lower case, without punctuation and the English articles, as SQuAD's evaluation compares answers."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(completions: Texts, references: References) -> float:
    """Share of completions that are a reference to the letter, but for white space."""
    pairs = zip(completions, _lists(completions, references), strict=True)
    return float(np.mean([text.split() in [r.split() for r in some] for text, some in pairs]))


def accuracy(completions: Texts, references: References) -> float:
    """Share of completions that are a reference after :func:`normalized`."""
    pairs = zip(completions, _lists(completions, references), strict=True)
    return float(np.mean([normalized(text) in [normalized(r) for r in some] for text, some in pairs]))


def _overlap(text: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the words of a text, as SQuAD's evaluation counts them."""
    found, expected = normalized(text).split(), normalized(reference).split()
    if not found or not expected:
        same = float(found == expected)
        return same, same, same
    common = sum((Counter(found) & Counter(expected)).values())
    precision, recall = common / len(found), common / len(expected)
    return precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0


def _token_metric(which: int, name: str, doc: str) -> Callable[[Texts, References], float]:
    def mean(completions: Texts, references: References) -> float:
        best = [
            max((_overlap(text, r) for r in some), key=lambda scores: scores[2])[which]
            for text, some in zip(completions, _lists(completions, references), strict=True)
        ]
        return float(np.mean(best))

    mean.__name__, mean.__doc__ = name, doc
    return mean


token_precision = _token_metric(0, "token_precision", "Mean share of a completion's words that the reference has.")
token_recall = _token_metric(1, "token_recall", "Mean share of a reference's words that the completion has.")
token_f1 = _token_metric(2, "token_f1", "Mean harmonic mean of the two.")


def distinct(n: int) -> Callable[[Texts], float]:
    """Different n-grams divided by all n-grams of all texts (Li et al. 2016); 0 if there are none."""

    def share(completions: Texts) -> float:
        grams = [tuple(words[i : i + n]) for words in map(str.split, completions) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) if grams else 0.0

    share.__name__ = f"distinct_{n}"
    return share


distinct_1, distinct_2 = distinct(1), distinct(2)


def self_bleu(completions: Texts) -> float:
    """Mean BLEU of each text against all others, 0 to 100; lower is more varied (Zhu et al. 2018).

    Grows with the square of their number; the callback takes at most a hundred.
    """
    sacrebleu, texts = package("sacrebleu"), list(completions)
    if len(texts) < 2:
        return 0.0
    scores = [
        sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]], smooth_method="exp").score
        for i, text in enumerate(texts)
    ]
    return float(np.mean(scores))


def classification(completions: Texts, references: References, labels: Sequence[str] | None = None) -> dict[str, float]:
    """Return how well completions name labels: accuracy, and precision, recall and F1 of each label and their means.

    They are compared by :func:`normalized`, or by lower case and white space alone where that would make two labels, or
    one and the empty text, the same: "+" and "-". A completion that is no label is wrong and counts for no label's
    precision. What would be divided by zero is 0, as in scikit-learn with ``zero_division=0``: the precision of a label
    that is never given, the recall of one that is never right, both F1.

    :param labels: those to report; None takes all that are references
    :return: "accuracy", "macro_precision", "macro_recall", "macro_f1" (plain means over labels), and "precision/LABEL",
        "recall/LABEL", "f1/LABEL" with the label as it is written first, all 0 to 1
    :raises ArgumentError: ``labels`` is no list of texts or has none, or the references are not those of texts
    """
    if labels is not None:
        _check_labels(labels)
    lists = _lists(completions, references)
    compared = _comparison([*(label for some in lists for label in some), *(labels or ())])
    given, written = [compared(text) for text in completions], dict[str, str]()
    right = []
    for text, some in zip(given, lists, strict=True):
        plain = [compared(r) for r in some]
        right.append(text if text in plain else plain[0])
        written.setdefault(right[-1], some[plain.index(right[-1])])
    if labels is not None:
        written = {compared(label): label for label in labels}
    found = {"accuracy": float(np.mean([a == b for a, b in zip(given, right, strict=True)]))}
    scores = {label: _label_scores(label, given, right) for label in sorted(written)}
    for which, name in enumerate(("precision", "recall", "f1")):
        found[f"macro_{name}"] = float(np.mean([its[which] for its in scores.values()]))
        found.update({f"{name}/{written[label]}": its[which] for label, its in scores.items()})
    return found


def _check_labels(labels: Any) -> None:
    is_list = isinstance(labels, list | tuple) and len(labels) > 0
    if not is_list or not all(isinstance(label, str) for label in labels):
        raise ArgumentError(f"`labels` must be a list of texts, at least one, not {labels!r}.")


def _comparison(labels: Iterable[str]) -> Callable[[str], str]:
    """Return what makes of texts those that are compared, and leaves different labels different."""
    written = {"", *map(_lowered, labels)}
    return normalized if len(set(map(normalized, written))) == len(written) else _lowered


def _lowered(text: str) -> str:
    return " ".join(text.lower().split())


def _label_scores(label: str, given: list[str], right: list[str]) -> tuple[float, float, float]:
    """Return precision, recall and F1 of one label."""
    n_given, n_right = given.count(label), right.count(label)
    n_both = sum(a == b == label for a, b in zip(given, right, strict=True))
    return n_both / max(n_given, 1), n_both / max(n_right, 1), 2 * n_both / max(n_given + n_right, 1)


def pass_at_k(right: Any, k: int) -> float:
    """Return the chance that one of k samples is right, unbiased, as a mean over prompts (Chen et al. 2021, eq. 1).

    :param right: whether each sample of each prompt is right, (n_prompts, n_samples); more samples have less variance
    :param k: at most n_samples
    :raises ArgumentError: it is more, or ``right`` is of another shape
    """
    right = np.asarray(right, dtype=bool)
    check_count("k", k)
    if right.ndim != 2 or not right.size or k > right.shape[1]:
        raise ArgumentError(f"`right` must be (n_prompts, n_samples) with at least k={k} samples, not {right.shape}.")
    n_wrong, n = (~right).sum(axis=1), right.shape[1]
    # C(wrong, k) / C(n, k), factor by factor: the chance that none of k drawn without putting back is right
    i = np.arange(k)
    return float(1 - np.prod(np.maximum(n_wrong[:, None] - i, 0) / (n - i), axis=1).mean())


#: By the names under which they are logged.
WITH_REFERENCES: dict[str, Callable[[Texts, References], float]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": rouge("rouge1"),
    "rougeL": rouge("rougeL"),
    "exact_match": exact_match,
    "accuracy": accuracy,
    "token_precision": token_precision,
    "token_recall": token_recall,
    "token_f1": token_f1,
}
WITHOUT: dict[str, Callable[[Texts], float]] = {
    "distinct_1": distinct_1,
    "distinct_2": distinct_2,
    "self_bleu": self_bleu,
}


#: Those that are computed only when they are named.
ON_REQUEST: dict[str, Metric] = {"rouge2": rouge("rouge2"), "classification": classification}


def measure(
    completions: Texts, references: References | None, names: Sequence[str | Metric] | None = None
) -> dict[str, float]:
    """Return several metrics at once, those that are several numbers as "metric/number".

    :param completions: texts, at least one
    :param references: one (or a list) for each, or None
    :param names: of :data:`WITH_REFERENCES`, :data:`WITHOUT` and :data:`ON_REQUEST`, and functions of your own, which
        go by their names; None takes all of the first two that can be computed: those with references if these are
        texts
    :raises ArgumentError: there is no such metric, it needs references, or the numbers of texts differ
    """
    _check_numbers(completions, completions if references is None else references)
    check_names(names, references is not None)
    known = [*WITHOUT, *(WITH_REFERENCES if references is not None and _are_texts(references) else [])]
    found: dict[str, float] = {}
    for metric in known if names is None else names:
        name = metric if isinstance(metric, str) else name_of(metric, "metric")
        value = _measured(metric, completions, references)
        found.update({f"{name}/{part}": x for part, x in value.items()} if isinstance(value, dict) else {name: value})
    return found


def check_names(names: Sequence[str | Metric] | None, has_references: bool) -> None:
    """Check the argument ``names`` of :func:`measure`.

    :raises ArgumentError: there is no such metric, or it needs references
    """
    if isinstance(names, str) or not isinstance(names, Iterable | None):
        raise ArgumentError(f"`names` must be a list of metrics, not {names!r}.")
    compared, alone = [*WITH_REFERENCES, *ON_REQUEST], list[Any](WITHOUT.values())
    for metric in names or ():
        if callable(metric):
            if metric not in alone:
                check_parameters("names", metric, "completions", "references")
        elif metric not in (*WITHOUT, *compared):
            known = [*WITHOUT, *compared]
            hint = did_you_mean(str(metric), known)
            raise ArgumentError(f"There is no metric {metric!r}. There are {', '.join(known)}, and functions.{hint}")
        elif metric in compared and not has_references:
            raise ArgumentError(f"The metric {metric!r} needs references, which the task does not have.")


def _measured(metric: str | Metric, completions: Texts, references: References | None) -> float | dict[str, float]:
    every: dict[str, Any] = {**WITHOUT, **WITH_REFERENCES, **ON_REQUEST}
    function: Any = every[metric] if isinstance(metric, str) else metric
    if function in list[Any](WITHOUT.values()):
        return float(function(completions[:100] if function is self_bleu else completions))
    value = function(completions, references)
    parts = value if isinstance(value, dict) else {"": value}
    numbers = {part: number for part, x in parts.items() if (number := as_number(x)) is not None}
    if len(numbers) < len(parts):
        name = metric if isinstance(metric, str) else name_of(metric, "metric")
        raise ArgumentError(f"The metric {name!r} must return a number, or several by name, not {value!r}.")
    return numbers if isinstance(value, dict) else numbers[""]
