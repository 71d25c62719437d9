"""One line of the report, and the table of many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..folding import Node, fold


@dataclass(frozen=True)
class Record:
    """One add.

    Attributes:
        name: module path of the residual (or of the module that adds).
        module: path of the module whose code adds.
        location: "file.py:123".
        converted: whether it became a hyper-connection.
        reason: None, or why it was not converted.
        trunk: number of its trunk, None if it was not converted.
        streams, connection, parameters: what it was converted into; parameters counts new ones, at the first of those
            that share them.
    """

    name: str
    module: str
    location: str
    converted: bool
    reason: str | None = None
    trunk: int | None = None
    streams: int | None = None
    connection: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Row:
    """What several adds have in common: equal blocks, and what is in each of them.

    Attributes:
        path: of the blocks, "layers.0..47".
        names: of the adds below it.
        locations: of the code that adds, "file.py:123".
        count: how many adds these are.
        trunks: numbers of their trunks.
        parameters: new ones, of all of them.
        calls: how often each is called, where that is more than once.
    """

    path: str
    names: tuple[str, ...]
    locations: tuple[str, ...]
    count: int
    trunks: tuple[int, ...]
    parameters: int
    calls: int = 1

    def __str__(self) -> str:
        names = ", ".join(self.names)
        if self.path:
            names = f"{self.path}: {names}" if len(self.names) > 1 else f"{self.path}.{names}"
        return f"{names} ({self.calls} calls{' each' if len(self.names) > 1 else ''})" if self.calls > 1 else names


@dataclass(frozen=True)
class _Fact:
    """What must be equal for adds of equal blocks."""

    location: str
    trunk: int | None
    parameters: int
    calls: int = 1


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Return records as rows: equal blocks that follow each other, and adds of one module, share one."""
    return list(_rows(fold((name, fact) for name, fact in _by_calls(records)), "", 1))


def row_of(record: Record) -> Row:
    """Return a record as a row of its own."""
    trunks = () if record.trunk is None else (record.trunk,)
    return Row("", (record.name,), (short(record.location),), 1, trunks, record.parameters or 0)


def merged(rows: Sequence[Row]) -> list[Row]:
    """Return rows, those of the same names as one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row), []).append(row)
    made = []
    for group in groups.values():
        locations = tuple(dict.fromkeys(place for row in group for place in row.locations))
        made.append(replace(group[0], locations=locations, count=sum(row.count for row in group)))
    return made


def short(location: str) -> str:
    """Return a location without the folder of its file."""
    return location.rsplit("/", 1)[-1]


def files_and_lines(locations: Iterable[str]) -> str:
    """Return places in code, each file named once.

    >>> files_and_lines(["gpt.py:44", "gpt.py:45", "rope.py:7"])
    'gpt.py:44, 45; rope.py:7'
    """
    lines: dict[str, list[str]] = {}
    for location in dict.fromkeys(locations):
        file, _, line = location.rpartition(":")
        lines.setdefault(file or location, []).append(line)
    return "; ".join(f"{file}:{', '.join(numbers)}" if numbers != [file] else file for file, numbers in lines.items())


def _by_calls(records: Sequence[Record]) -> Iterator[tuple[str, _Fact]]:
    """Yield records by name; further calls of a module ("attn:2") are counted at the first one."""
    first: dict[Any, str] = {}
    facts: dict[str, _Fact] = {}
    for i, record in enumerate(records):
        base, _, call = record.name.partition(":")
        fact = _Fact(short(record.location), record.trunk, record.parameters or 0)
        same = base, fact.location, fact.trunk
        if call.isdigit() and same in first:
            known = facts[first[same]]
            total = known.parameters + fact.parameters
            facts[first[same]] = replace(known, calls=known.calls + 1, parameters=total)
            continue
        key = record.name if record.name not in facts else f"{record.name}\0{i}"
        first.setdefault(same, key)
        facts[key] = fact
    yield from ((key.partition("\0")[0], fact) for key, fact in facts.items())


def _rows(content: Iterable[Any], prefix: str, times: int) -> Iterator[Row]:
    """Yield the rows of what stands below ``prefix``, which stands for ``times`` blocks."""
    together: list[Node[_Fact]] = []  # leaves of one module that is called as they are
    for node in content:
        alone = isinstance(node, _Fact)
        if not alone and _is_leaf(node):
            if together and node.content[0].calls != together[0].content[0].calls:
                yield _row(prefix, together, times)
                together = []
            together.append(node)
            continue
        if together:
            yield _row(prefix, together, times)
            together = []
        if alone:  # what stands at the prefix itself
            yield _row("", [Node(prefix, 1, (node,))], times)
        else:
            yield from _rows(node.content, f"{prefix}.{node.path}" if prefix else node.path, times * node.times)
    if together:
        yield _row(prefix, together, times)


def _is_leaf(node: Node[_Fact]) -> bool:
    """Whether a node is adds alone, of one module that has a name of its own and no number."""
    numbered = ".." in node.path or any(atom[:1].isdigit() for atom in node.path.split("."))
    return not numbered and all(isinstance(part, _Fact) for part in node.content)


def _row(prefix: str, nodes: Sequence[Node[_Fact]], times: int) -> Row:
    facts = [(fact, node.times * times) for node in nodes for fact in node.content]
    trunks = tuple(sorted({fact.trunk for fact, _ in facts if fact.trunk is not None}))
    return Row(
        prefix,
        tuple(node.path for node in nodes),
        tuple(dict.fromkeys(fact.location for fact, _ in facts)),
        sum(fact.calls * n for fact, n in facts),
        trunks,
        sum(fact.parameters * n for fact, n in facts),
        max(fact.calls for fact, _ in facts),
    )
