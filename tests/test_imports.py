"""Which modules of sb3_pg import which, read from their source: inside functions too, for type checkers only not."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sb3_pg

ROOT = Path(sb3_pg.__file__).parent


def sources():
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}


def import_statements(tree):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from import_statements(ast.Module(node.orelse, []))
        else:
            yield from import_statements(node)


def imported_names(source):
    for node in import_statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import: {ast.unparse(node)}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from (alias.name for alias in node.names)


def import_graph(sources):
    """Return the modules that each module imports; ``from package import module`` imports that module."""

    def module_of(name):
        return name if name in sources or "." not in name else module_of(name.rpartition(".")[0])

    return {
        module: {module_of(name) for name in imported_names(source)} & {*sources} for module, source in sources.items()
    }


def reachable(graph, starts):
    found, todo = set(), [*starts]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize(
    "module_b, is_circle",
    [
        ("import a.c", True),
        ("from a import c", True),
        ("from a.c import f", True),
        ("def f():\n    import a.c", True),
        ("try:\n    from a import c\nexcept ImportError:\n    pass", True),
        ("if TYPE_CHECKING:\n    import a.c", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import a.c", True),
        ("import a\nimport c", False),
    ],
)
def test_circles_are_found(module_b, is_circle):
    assert bool(circle(import_graph({"a": "", "a.c": "from b import g", "b": module_b}))) == is_circle


def test_no_module_imports_itself_by_a_detour():
    graph = import_graph(sources())
    assert graph["sb3_pg.zoo"] >= {"sb3_pg", "sb3_pg.zoo.manager"}
    assert circle(graph) == []


@pytest.mark.parametrize("bridge", ["sb3_pg.text", "sb3_pg.zoo", "sb3_pg.demo"])
def test_what_the_algorithms_share_does_not_know_the_bridges(bridge):
    graph = import_graph(sources())
    common = [module for module in graph if module.startswith("sb3_pg.common")]
    assert len(common) > 10
    known = reachable(graph, common)
    assert [module for module in known if module == bridge or module.startswith(f"{bridge}.")] == []
