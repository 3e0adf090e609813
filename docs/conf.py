"""How Sphinx builds this documentation: ``make docs``, without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from generate import generate  # noqa: E402

import sb3_pg  # noqa: E402

generate(HERE.parent, HERE / "generated")

project = "sb3_pg"
author = "The sb3_pg developers"
project_copyright = author
release = version = sb3_pg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "generated/legend_*.md"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what an argument is for, and signatures of a screen's length hide it
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"sb3_pg {release}"
html_show_copyright = False
