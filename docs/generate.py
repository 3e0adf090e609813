"""Write what is not written by hand: the legends of the log and the tables of measurements."""

import re
from pathlib import Path

from sb3_pg.common.figures import SB3_LEGEND, Figures, legend
from sb3_pg.ppo.figures import PPOFigures
from sb3_pg.reinforce.figures import REINFORCEFigures
from sb3_pg.text.figures import TextFigures
from sb3_pg.text.presets import ARGUMENTS, RATES
from sb3_pg.trpo.figures import TRPOFigures

#: The tables of benchmarks/: by the name of their page, the file and what makes it.
TABLES = {
    "speed": ("speed/table.md", "make benchmark-speed"),
    "learning": ("learning/table.md", "make benchmark-learning` and `make benchmark-report"),
    "budget": ("learning/budget.md", "python benchmarks/budget.py"),
    "atari": ("learning/atari.md", "python benchmarks/atari.py"),
    "memory": ("memory/table.md", "benchmarks/memory.py"),
    "workers": ("workers/table.md", "benchmarks/workers.py"),
    "vectorised": ("vectorised/table.md", "benchmarks/vectorised.py"),
    "archives": ("archives/table.md", "benchmarks/archives.py"),
    "resume": ("resume/table.md", "benchmarks/resume.py"),
    "faults": ("faults/table.md", "benchmarks/faults.py"),
    "text": ("text/table.md", "make benchmark-text"),
    "text_tasks": ("text/tasks.md", "make benchmark-text"),
    "text_trl": ("text/trl.md", "make benchmark-text"),
    "text_trl_cuda": ("text/trl_cuda.md", "python benchmarks/text_trl.py --device cuda"),
    "text_smollm": ("text/smollm.md", "make benchmark-text"),
    "text_chat": ("text/chat.md", "make benchmark-text"),
}


def table(figures: dict[str, str]) -> str:
    """Return a legend as a Markdown table."""
    rows = [f"| `{name}` | {doc.replace('|', '&#124;')} |" for name, doc in figures.items()]
    return "\n".join(["| key | meaning |", "|---|---|", *rows, ""])


def legends() -> dict[str, dict[str, str]]:
    """Return each part of the log's legend: what all algorithms log, and what each one adds."""
    common = legend(Figures)
    own = {"ppo": PPOFigures, "trpo": TRPOFigures, "reinforce": REINFORCEFigures}
    parts = {"common": SB3_LEGEND | common}
    for name, kind in own.items():
        parts[name] = {key: doc for key, doc in legend(kind).items() if key not in common}
    return parts | {"text": legend(TextFigures)}


def presets() -> str:
    """Return the default arguments for language models as a Markdown table."""
    names = list(ARGUMENTS)
    rows = [["argument", *names], ["---"] * (1 + len(names))]
    for argument in dict.fromkeys(argument for its in ARGUMENTS.values() for argument in its):
        rows.append([f"`{argument}`", *(repr(its[argument]) if argument in its else "" for its in ARGUMENTS.values())])
    for kind, rate in RATES.items():
        rows.append([f"`learning_rate`, {kind}", *("" if name == "TRPO" else f"{rate:g}" for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def measured(text: str) -> str:
    """Return a table without its links to files that lie beside it."""
    return re.sub(r"(?<!!)\[([^]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)


def generate(root: Path, folder: Path) -> None:
    """Write all legends and tables.

    :param root: of the checkout
    :param folder: where to write
    """
    folder.mkdir(exist_ok=True)
    for name, part in legends().items():
        (folder / f"legend_{name}.md").write_text(table(part), encoding="utf-8")
    (folder / "presets.md").write_text(presets(), encoding="utf-8")
    for name, (file, maker) in TABLES.items():
        source = root / "benchmarks" / file
        missing = f"# {name.capitalize()}\n\nNot measured in this checkout. It is made by `{maker}`.\n"
        text = measured(source.read_text(encoding="utf-8")) if source.exists() else missing
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
