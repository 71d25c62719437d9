"""The package's imports go one way: each wing imports from those before it in WINGS, and no files import in a ring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hc_transform

ROOT = Path(hc_transform.__file__).parent
WINGS = [
    *("errors", "version", "threads", "text", "folding", "streams", "connections", "options", "models", "graphs"),
    *("capture", "residuals", "rewriting", "running", "verification", "request", "refusals", "convert_graph"),
    *("convert_blocks", "exported", "sites", "inputs_record", "config", "convert", "layer", "training", "measuring"),
    *("showing", "__init__", "__main__"),
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported(name: str) -> Iterator[str]:
    """Yield the package's files that a file imports, wherever in its code."""
    package = FILES[name].relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            home = ".".join(filter(None, base))
            found = {f"{home}.{alias.name}".lstrip(".") for alias in node.names}.intersection(FILES)
            yield from found or {home or "__init__"}


def wing_of(name: str) -> int:
    return WINGS.index(name.partition(".")[0])


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_only_from_above(name):
    upwards = {other for other in imported(name) if wing_of(other) > wing_of(name)}
    assert not upwards


def test_no_file_imports_itself_by_way_of_others():
    list(TopologicalSorter({name: set(imported(name)) - {name} for name in FILES}).static_order())


@pytest.mark.parametrize("wing", sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
def test_each_wing_says_what_it_is_for(wing):
    assert "May import: " in (ast.get_docstring(ast.parse((ROOT / wing / "__init__.py").read_text())) or "")
