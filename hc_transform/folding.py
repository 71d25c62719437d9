"""Fold what repeats along module paths: ``layers.0`` to ``layers.47``, where they hold the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_NUMBERED = re.compile(r"(.*?)(\d+)")


PERIODS = (1, 2, 3, 4)  # of blocks that take turns


@dataclass(frozen=True)
class Node(Generic[T]):
    """What stands at one path.

    Attributes:
        path: below the node around it; "layers.0..47" or "layers.0,2,4" where it stands for several.
        times: how many it stands for.
        content: what is there, and the nodes below it, in order.
    """

    path: str
    times: int
    content: tuple[Any, ...]


def fold(entries: Iterable[tuple[str, T]]) -> tuple[Any, ...]:
    """Return a tree of what stands at paths, in order: items, and nodes for what stands below.

    Blocks whose numbers follow each other and that hold the same become one node; so do those that take turns.

    >>> fold([("layers.0", "attn"), ("layers.0", "mlp"), ("layers.1", "attn"), ("layers.1", "mlp"), ("", "head")])
    (Node(path='layers.0..1', times=2, content=('attn', 'mlp')), 'head')
    """
    return _tree([(tuple(filter(None, path.split("."))), item) for path, item in entries])


def _tree(entries: Sequence[tuple[tuple[str, ...], T]]) -> tuple[Any, ...]:
    made: list[Any] = []
    for atom, group in groupby(entries, key=lambda entry: entry[0][:1]):
        if atom:
            made.append(Node(atom[0], 1, _tree([(path[1:], item) for path, item in group])))
        else:
            made += [item for _, item in group]
    folded: list[Any] = []
    while made:
        taken, nodes = _first_folded(made)
        folded += [_shortcut(node) if isinstance(node, Node) else node for node in nodes]
        del made[:taken]
    return tuple(folded)


def _first_folded(made: Sequence[Any]) -> tuple[int, list[Any]]:
    """Return what the first of some siblings become, and how many those are: as many as repeat."""
    best = 1, [made[0]]
    numbers = _numbers(made)
    for period in PERIODS:
        length = period
        while length < len(numbers) and made[length].content == made[length % period].content:
            length += 1
        if length >= 2 * period and length > best[0]:
            best = length, [_joined(made[i:length:period], numbers[i:length:period]) for i in range(period)]
    return best


def _numbers(made: Sequence[Any]) -> list[int]:
    """Return the numbers of the first siblings, as long as they follow each other under one name."""
    numbers: list[int] = []
    name = None
    for node in made:
        found = _NUMBERED.fullmatch(node.path) if isinstance(node, Node) else None
        if found is None or numbers and (found[1] != name or int(found[2]) != numbers[-1] + 1):
            break
        name = found[1]
        numbers.append(int(found[2]))
    return numbers


def _joined(nodes: Sequence[Node[T]], numbers: Sequence[int]) -> Node[T]:
    """Return one node for several that hold the same."""
    start = nodes[0].path
    if len(nodes) == 1:
        return nodes[0]
    if numbers[1] == numbers[0] + 1:
        return Node(f"{start}..{numbers[-1]}", len(nodes), nodes[0].content)
    shown = [str(number) for number in numbers[1:]]
    path = ",".join([start, *(shown if len(shown) < 4 else [shown[0], "..", shown[-1]])])
    return Node(path, len(nodes), nodes[0].content)


def _shortcut(node: Node[T]) -> Node[T]:
    """Return a node that holds nothing but another one as one node of both paths."""
    below = node.content[0] if len(node.content) == 1 else None
    if not isinstance(below, Node):
        return node
    return Node(f"{node.path}.{below.path}", node.times * below.times, below.content)
