"""How good and how varied texts are, by the field's own libraries where there are some.

All take lists of texts and return one number. References are one text for each completion, or a list of texts of
which the best match counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Texts = Sequence[str]
References = Sequence[Any]


def _lists(references: References) -> list[list[str]]:
    return [[r] if isinstance(r, str) else list(r) for r in references]


def _columns(references: References) -> list[list[str]]:
    """Return references as sacrebleu takes them: the first of every completion, the second of every, ..."""
    lists = _lists(references)
    longest = max(map(len, lists))
    return [[some[min(i, len(some) - 1)] for some in lists] for i in range(longest)]


def bleu(completions: Texts, references: References) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(completions), _columns(references)).score)


def chrf(completions: Texts, references: References) -> float:
    """Corpus chrF of sacrebleu, 0 to 100."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(completions), _columns(references)).score)


def rouge(kind: str) -> Callable[[Texts, References], float]:
    """Mean F1 of ROUGE by rouge-score, 0 to 1.

    :param kind: "rouge1", "rouge2" or "rougeL"
    """

    def mean(completions: Texts, references: References) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])
        best = [
            scorer.score_multi(some, text)[kind].fmeasure
            for text, some in zip(completions, _lists(references), strict=True)
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
    pairs = zip(completions, _lists(references), strict=True)
    return float(np.mean([text.split() in [r.split() for r in some] for text, some in pairs]))


def accuracy(completions: Texts, references: References) -> float:
    """Share of completions that are a reference after :func:`normalized`."""
    pairs = zip(completions, _lists(references), strict=True)
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
            for text, some in zip(completions, _lists(references), strict=True)
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
    import sacrebleu

    texts = list(completions)
    if len(texts) < 2:
        return 0.0
    scores = [
        sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]], smooth_method="exp").score
        for i, text in enumerate(texts)
    ]
    return float(np.mean(scores))


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


def measure(completions: Texts, references: References | None, names: Sequence[str] | None = None) -> dict[str, float]:
    """Several metrics at once.

    :param completions: texts
    :param references: one (or a list) for each, or None
    :param names: of :data:`WITH_REFERENCES` and :data:`WITHOUT`; None takes all that can be computed
    """
    known = [*WITHOUT, *(WITH_REFERENCES if references is not None else [])]
    found = {}
    for name in known if names is None else names:
        if name in WITHOUT:
            found[name] = WITHOUT[name](completions[:100] if name == "self_bleu" else completions)
        else:
            assert references is not None
            found[name] = WITH_REFERENCES[name](completions, references)
    return found
