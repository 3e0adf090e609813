"""Where the default settings of the algorithms lie."""

from pathlib import Path

#: One file for each algorithm, in a folder next to the package sb3_pg, in a checkout and when installed.
CONFIGS = Path(__file__).parents[2] / "zoo_configs"
