"""Which operations streams pass through, and where the value of a node comes from.

An operation may be carried, that is be done to each stream, where it treats every element or every vector alike
and draws nothing: then streams that are equal stay so, and streams with the right mean keep it where the operation
is linear. Of its operands those that come from the same trunk value are streams, all of them; any other is
used as it is for every stream. A reduction is carried aside only: it has to meet a stream again, as the mean of a
norm that is written out does. What it gives is no trunk value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from ..capture.kinds import Kinds
from ..graphs.aliases import is_seen_elsewhere
from ..graphs.dialects import name_of
from ..graphs.operations import FILLED_ALIKE, LINEAR_POINTWISES, PRODUCTS, QUOTIENTS, Kind, is_tensor, tensors_of
from .findings import Shortcut

CARRIED_RANDOMS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout stochastic_depth".split())
IN_PLACE_OPERATORS = frozenset("iadd isub imul itruediv ipow".split())
SHAPED_ALIKE = frozenset("view_as reshape_as expand_as type_as".split())
LINEAR_IN_SOME = {"lerp": 2, "addcmul": 1, "addcdiv": 1, "masked_fill": 1}  # in so many of the first operands


@dataclass(frozen=True)
class Passed:
    """How a value comes from a trunk value.

    Attributes:
        source: the trunk value.
        operands: those operands of the operation that are streams; none at the source itself.
        aside: whether something was reduced on the way, so that it is no trunk value.
    """

    source: fx.Node
    operands: tuple[fx.Node, ...] = ()
    aside: bool = False


class Passage:
    """What streams pass through.

    Args:
        kinds: the kinds of the graph's nodes.
        shortcuts: projection shortcuts that are passed too.
        adds: residual adds that are converted: each begins streams of its own, and those of others end there.
    """

    def __init__(self, kinds: Kinds, shortcuts: Iterable[Shortcut] = (), adds: Iterable[fx.Node] = ()) -> None:
        self.kinds = kinds
        self.adds = frozenset(adds)
        self.forced: dict[fx.Node, fx.Node] = {}
        for shortcut in shortcuts:
            way = (shortcut.value, *shortcut.way, shortcut.add)
            self.forced.update(zip(way[1:], way, strict=False))

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands of ``node`` that may be streams, each once; none if it is a boundary."""
        if node in self.forced:
            return [self.forced[node]]
        if node in self.adds:
            return []
        kind, name = self.kinds.of(node), name_of(node)
        if (
            not is_tensor(node)
            or kind in (Kind.MIX, Kind.SHAPE, Kind.CUT)
            or name == "set_item"
            or "out" in node.kwargs
        ):
            return []
        if kind is Kind.RANDOM and node.op != "call_module" and name not in CARRIED_RANDOMS:
            return []
        data = [n for n in tensors_of(node) if not self.kinds.is_constant(n)]
        if kind is not Kind.POINTWISE and name not in SHAPED_ALIKE and len(data) != 1:
            return []
        return [n for n in dict.fromkeys(data) if n in node.args]


class Flow:
    """Where the values of a graph come from, found out for those that are asked for.

    Args:
        passage: what streams pass through.
        sources: the trunk values, with the length of the chain that leads to each where it is known: of two that
            meet in one operation, the stream with the longer chain goes on.
    """

    def __init__(self, passage: Passage, sources: Collection[fx.Node]) -> None:
        self.passage = passage
        self.lengths: dict[fx.Node, int] = dict.fromkeys(sources, 0)
        self._known: dict[fx.Node, Passed | None] = {}

    def at(self, value: fx.Node) -> Passed | None:
        """Return how ``value`` comes from a source, None if it does not."""
        waiting = [value]
        while value not in self._known:
            node = waiting[-1]
            unknown = [] if node in self.lengths else [n for n in self._asked(node) if n not in self._known]
            if unknown:
                waiting += unknown
            else:
                self._known[node] = self._judged(node)
                waiting.pop()
        return self._known[value]

    def trunk_value(self, value: fx.Node) -> fx.Node | None:
        """Return the source whose streams ``value`` goes on with, None if there is none."""
        passed = self.at(value)
        return None if passed is None or passed.aside else passed.source

    def way_to(self, value: fx.Node) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """Return the operations between ``value`` and its source, each with the operands that are streams."""
        way: dict[fx.Node, tuple[fx.Node, ...]] = {}
        waiting = [value] if self.trunk_value(value) is not None else []
        while waiting:
            node = waiting.pop()
            passed = self.at(node)
            if node not in way and passed is not None and passed.operands:
                way[node] = passed.operands
                waiting += passed.operands
        return way

    def _asked(self, node: fx.Node) -> list[fx.Node]:
        return self.passage.operands(node) and (
            self.passage.operands(node) if node in self.passage.forced else tensors_of(node)
        )

    def _judged(self, node: fx.Node) -> Passed | None:
        if node in self.lengths:
            return Passed(node)
        may = self.passage.operands(node)
        found = {n: passed for n in may if (passed := self._known[n]) is not None}
        if not found:
            return None
        source = max(found.values(), key=lambda p: self.lengths[p.source]).source  # the first of equals
        operands = tuple(n for n, passed in found.items() if passed.source is source)
        aside = all(found[n].aside for n in operands)
        if node in self.passage.forced:
            return None if aside else Passed(source, operands)
        kind = self.passage.kinds.of(node)
        if kind is Kind.RANDOM and aside or is_seen_elsewhere(node) or self._out_of_place(node, operands, source):
            return None
        return Passed(source, operands, aside or kind is Kind.REDUCE)

    def _out_of_place(self, node: fx.Node, operands: tuple[fx.Node, ...], source: fx.Node) -> bool:
        """Whether streams stand where they cannot be: in a list, in a keyword, beside a tensor that is overwritten."""
        positional = [a for a in node.args if isinstance(a, fx.Node)]
        hidden = tensors_of(node)
        for argument in positional:
            if argument in hidden:
                hidden.remove(argument)
        if any((p := self._known.get(n)) is not None and p.source is source for n in hidden):
            return True
        name = name_of(node)
        return (name.endswith("_") or name in IN_PLACE_OPERATORS) and node.args[0] not in operands


def is_linear(node: fx.Node, operands: Collection[fx.Node], kinds: Kinds) -> bool:
    """Whether a carried operation is linear, up to a constant, in the operands that are streams."""
    kind, name = kinds.of(node), name_of(node).rstrip("_")
    streams = [n for n in tensors_of(node) if n in operands]
    if kind in (Kind.IDENTITY, Kind.SCALE, Kind.RANDOM, Kind.MOVE) or name in FILLED_ALIKE | LINEAR_POINTWISES:
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if kind is Kind.REDUCE:
        return name in ("mean", "sum")
    if name in PRODUCTS | QUOTIENTS:
        return len(streams) == 1 and (
            name in PRODUCTS or node.args[0] in operands and "rounding_mode" not in node.kwargs
        )
    if name == "where":
        return node.args[0] not in operands
    first = node.args[: LINEAR_IN_SOME.get(name, 0)]
    return len(streams) == len([a for a in first if isinstance(a, fx.Node) and a in operands]) > 0


def nonlinear_in(carried: Mapping[fx.Node, tuple[fx.Node, ...]], kinds: Kinds) -> fx.Node | None:
    """Return the first carried operation that is not linear, None if all are."""
    return next((node for node, operands in carried.items() if not is_linear(node, operands, kinds)), None)
