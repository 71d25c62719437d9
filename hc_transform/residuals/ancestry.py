"""Which nodes of a graph are computed from which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from ..capture.kinds import Kinds
from ..graphs.operations import Kind


class Ancestry:
    """For each node what it is computed from, as a bit for each of those nodes.

    Args:
        nodes: all nodes of a graph, in order.
        kinds: theirs.
        opaque: kinds of operations that nothing is seen through.
    """

    def __init__(self, nodes: Sequence[fx.Node], kinds: Kinds, opaque: frozenset[Kind]) -> None:
        self.number = {node: i for i, node in enumerate(nodes)}
        self._bits: dict[fx.Node, int] = {}
        for node in nodes:
            bits = 0
            if kinds.of(node) not in opaque:
                for source in node.all_input_nodes:
                    bits |= self._bits[source] | 1 << self.number[source]
            self._bits[node] = bits

    def leads(self, source: Any, node: Any) -> bool:
        """Whether ``node`` is computed from ``source``."""
        return isinstance(node, fx.Node) and bool(self._bits[node] >> self.number[source] & 1)

    def between(self, source: fx.Node, ends: Iterable[Any]) -> frozenset[fx.Node]:
        """Return the nodes on the ways from ``source``, without it, to ``ends``, with those that it leads to."""
        found: set[fx.Node] = set()
        waiting = [end for end in ends if self.leads(source, end)]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [n for n in node.all_input_nodes if n not in found and self.leads(source, n)]
        return frozenset(found)
