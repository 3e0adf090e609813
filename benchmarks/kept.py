"""Results that a file keeps by their names, so that a benchmark may be stopped at any time and started side by side."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from processes import machine


def read(path: Path) -> dict[str, Any]:
    """Return what the file holds."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def kept(path: Path, name: str, find: Callable[[], Any]) -> Any:
    """Return what the file holds by a name, or find it and add it to the file, which others may add to too."""
    known = read(path)
    if name not in known:
        found = find()
        with FileLock(f"{path}.lock"):
            known = read(path) | {name: found, "machine": machine("NumPy")}
            path.write_text(json.dumps(known, indent=1))
    return known[name]


def run_or_report(
    parser: argparse.ArgumentParser,
    path: Path,
    do_runs: Callable[[Path, argparse.Namespace], None],
    report: Callable[[Path], None],
) -> None:
    """Do what the command line asks for: the runs and their table, or the table alone.

    :param path: the file of the results, in the folder that is the default
    """
    parser.add_argument("--folder", type=Path, default=path.parent, help="where the results are")
    parser.add_argument("--report", action="store_true", help="only write the table again")
    args = parser.parse_args()
    file = args.folder / path.name
    if not args.report:
        do_runs(file, args)
    report(file)
