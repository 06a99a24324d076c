"""The rooms of the package stand in one order, imports point down it, and Ray stays in its own room.

Every import statement counts, at the top of a file, inside a function or for types alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a file imports from its own room and from those before it.
ORDER = [
    ("_version", "errors", "progress", "config", "hub", "loggers"),
    ("modules",),
    ("snapshots",),
    ("recording",),
    ("generator",),
    ("fitting",),
    ("ensemble",),
    ("evaluation",),
    ("cluster",),
    ("console", "describe", "user_code", "demo", "dial_demo", "cli"),
]
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
RAY_ADAPTERS = {"integrations/ray_train.py", "integrations/ray_tune.py"}


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("pdiff_plugin/**/*.py"), *ROOT.glob("integrations/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("pdiff_plugin", *parts) if parts[0] == "integrations" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports. The front, ``pdiff_plugin`` itself, loads its names on first use."""
    modules = {module_name(path): path for path in source_files()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        if name == "pdiff_plugin":
            continue
        found = set()
        for dotted in imported_names(path):
            home = dotted if dotted in modules else dotted.rpartition(".")[0]
            if home in modules and home != name:
                found.add(home)
        graph[name] = found
    return graph


def floor_of(module: str) -> int | None:
    room = module.split(".")[1]
    return len(ORDER) if room == "integrations" else FLOOR[room]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {module.split(".")[1] for module in import_graph()}
    assert rooms == set(FLOOR) | {"integrations"}


def test_no_import_runs_back_up() -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in import_graph().items()
        for other in others
        if other != "pdiff_plugin" and floor_of(other) > floor_of(module)
    ]
    assert upward == []


def test_nothing_inside_imports_the_front() -> None:
    # The adapters and the commands may: a user's code does.
    allowed = {"cli", "demo", "dial_demo", "integrations"}
    found = [
        module
        for module, others in import_graph().items()
        if "pdiff_plugin" in others and module.split(".")[1] not in allowed
    ]
    assert found == []


def test_modules_do_not_import_one_another_in_circles() -> None:
    assert circles(import_graph()) == []


def test_rooms_do_not_import_one_another_in_circles() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in import_graph().items():
        room = module.split(".")[1]
        rooms.setdefault(room, set()).update(o.split(".")[1] for o in others if o != "pdiff_plugin")
    assert circles({room: others - {room} for room, others in rooms.items()}) == []


def test_only_the_cluster_room_and_the_ray_adapters_import_ray() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in source_files()
        if any(name == "ray" or name.startswith("ray.") for name in imported_names(path))
    }
    assert {path for path in importers if not path.startswith("pdiff_plugin/cluster/")} <= RAY_ADAPTERS


@pytest.mark.parametrize(("graph", "expected"), [({"a": {"b"}, "b": {"a"}}, [["a", "b"]]), ({"a": {"b"}}, [])])
def test_circles_are_found_where_there_are_some(graph: dict[str, set[str]], expected: list[list[str]]) -> None:
    assert circles(graph) == expected
