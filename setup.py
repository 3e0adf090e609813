"""What pyproject.toml cannot say: the packages and the description for a package index."""

import re
from pathlib import Path

from setuptools import find_packages, setup

#: Settings lie at the top of the checkout, where they are easily found, and are installed inside the package.
SETTINGS = "sb3_pg.zoo.configs"


def description() -> str:
    """Return the README without pictures, and with the names of files in place of links to them."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    packages=[*find_packages(include=["sb3_pg", "sb3_pg.*"]), SETTINGS],
    package_dir={SETTINGS: "zoo_configs"},
    long_description=description(),
    long_description_content_type="text/markdown",
)
