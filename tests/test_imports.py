"""Imports run one way: a room may use the rooms before it, never those after it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "s4c"
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "verify": {"errors", "types"},
    "models": {"errors", "types", "verify"},
    "drafters": {"errors", "types", "verify", "models"},
    "engine": {"errors", "types", "verify", "models", "drafters"},
    "training": {"errors", "types", "verify", "models", "drafters"},
    "bench": {"errors", "types", "verify", "models", "drafters", "engine"},
    "server": {"errors", "types", "verify", "models", "drafters", "engine"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("s4c.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_uses_only_the_rooms_before_it(path: Path) -> None:
    home = room(path)
    if home in ALLOWED:
        assert imported_rooms(path) <= ALLOWED[home] | {home}
    else:
        assert home in {"__init__", "__main__", "cli"}


def test_no_room_but_the_table_names_a_method() -> None:
    methods = {"s4c", "ngram", "medusa", "draft_model", "sdsat"}
    for path in FILES:
        if room(path) == "drafters":
            continue
        modules = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert not {module for module in modules for m in methods if module.startswith(f"s4c.drafters.{m}")}, path
