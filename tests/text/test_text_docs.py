"""The table of metrics and settings in docs/text.md: each line runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from sb3_pg import text
from sb3_pg.text.presets import ARGUMENTS, RATES

DOCS = Path(__file__).parent.parent.parent / "docs"
SECTION = (DOCS / "text.md").read_text(encoding="utf-8").split("## Metrics, generation, and what")[1]
BLOCK = re.search(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)[1]
LINES = dict(re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", SECTION, re.MULTILINE))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    module = type(sys)("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs"))
        exec(BLOCK, vars(module))
        yield vars(module)


@pytest.mark.parametrize("what", LINES)
def test_each_line_runs(what, names):
    assert eval(LINES[what], names) is not None


def test_all_that_articles_name_is_there():
    words = " ".join(LINES).lower()
    for word in ("accuracy", "precision", "recall", "f1", "bleu", "rouge", "pass@k", "diversity", "human"):
        assert word in words
    for word in ("greedy", "beam", "temperature", "top-k", "top-p", "best of n"):
        assert word in words
    for word in ("split", "early stopping", "dropout", "weight decay", "lora", "half precision"):
        assert word in words
    assert len(LINES) == SECTION.count("\n| ") - 1


def test_the_generated_table_has_all_defaults():
    table = runpy.run_path(str(DOCS / "generate.py"))["presets"]()
    for arguments in ARGUMENTS.values():
        for name, value in arguments.items():
            assert re.search(rf"^\| `{name}` \|.* {re.escape(repr(value))} \|", table, re.MULTILINE)
    assert all(f"{rate:g}" in table for rate in RATES.values())
    assert {"best_of_n", "evaluate_texts"} <= set(text.__all__)
