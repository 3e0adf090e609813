"""How rl_zoo3 reads the files of a run: as plain data, unless they are trusted."""

import ast
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import yaml

from sb3_pg.common.archive.archived import Archived
from sb3_pg.common.archive.pickles import Name
from sb3_pg.common.archive.unpickling import ForeignError, known_class
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env import VecNormalize


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = inspect.getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def trusting_files() -> Iterator[None]:
    """Let models and statistics be loaded with all that they hold for a while."""

    def load_model(cls: type[Archived], *arguments: Any, **more: Any) -> Archived:
        return model.__func__(cls, *arguments, trusted=True, **more)  # type: ignore[no-any-return]

    model, statistics = vars(Archived)["load"], partial(VecNormalize.load, trusted=True)
    with ExitStack() as stack:
        stack.enter_context(replaced(Archived, "load", classmethod(load_model)))
        stack.enter_context(replaced(VecNormalize, "load", staticmethod(statistics)))
        yield


@contextmanager
def running_no_settings() -> Iterator[None]:
    """Let rl_zoo3 read settings (config.yml, args.yml) without running what they may hold, for a while."""
    with replaced(yaml, "UnsafeLoader", SettingsLoader):
        yield


class SettingsLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Reads what rl_zoo3 writes: plain values, ordered dictionaries, tuples and the classes that archives may name."""

    def get_single_data(self) -> Any:
        """Return the settings.

        :raises ArgumentError: they hold what would run code
        """
        try:
            settings = super().get_single_data()
            if isinstance(settings, dict) and isinstance(settings.get("normalize"), str):
                settings["normalize"] = _keywords(settings["normalize"])  # rl_zoo3 runs it otherwise
        except yaml.constructor.ConstructorError as error:
            raise self._refused(error.problem) from None
        except (ValueError, SyntaxError):
            raise self._refused(f"normalize={settings['normalize']!r}") from None
        return settings

    def _refused(self, what: str) -> ArgumentError:
        return ArgumentError(
            f"{self.name} holds more than plain settings ({what}). Pass trusted=True to run what it holds."
        )


def _keywords(text: str) -> Any:
    """Return what "{'norm_obs': True}" or "dict(norm_obs=True)" means.

    :raises ValueError: it is neither
    """
    call = ast.parse(text.strip(), mode="eval").body
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "dict" and not call.args:
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return ast.literal_eval(call)


def _ordered(loader: SettingsLoader, node: yaml.Node) -> OrderedDict[str, Any]:
    return OrderedDict(*loader.construct_sequence(node, deep=True))


def _tuple(loader: SettingsLoader, node: yaml.Node) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _class(loader: SettingsLoader, name: str, node: yaml.Node) -> Any:
    module, _, its_name = name.rpartition(".")
    try:
        return known_class(Name(module, its_name))
    except ForeignError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error)) from None


_PYTHON = "tag:yaml.org,2002:python/"
SettingsLoader.add_constructor(f"{_PYTHON}object/apply:collections.OrderedDict", _ordered)
SettingsLoader.add_constructor(f"{_PYTHON}tuple", _tuple)
SettingsLoader.add_multi_constructor(f"{_PYTHON}name:", _class)
