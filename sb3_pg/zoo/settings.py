"""Where the default settings of the algorithms lie."""

from pathlib import Path

_INSTALLED, _IN_CHECKOUT = Path(__file__).parent / "configs", Path(__file__).parents[2] / "zoo_configs"

#: The folder of the default settings, one file for each algorithm.
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _IN_CHECKOUT
