"""Chain residuals into trunks: which operations streams pass, and which trunks nest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .findings import Reason, Residual, Shortcut, Skipped
from .kinds import Kind, Kinds, is_tensor, name_of

CARRIED_RANDOMS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout stochastic_depth drop_path".split())


@dataclass(frozen=True)
class Trunk:
    """A chain of residuals that one set of streams runs through.

    Attributes:
        index: its number, in order of execution.
        residuals: its residuals, in order.
        carried: operations between them, each with the operand that is the trunk's value.
        entry: the input of the graph that the trunk begins with, where it may come as streams.
        exits: the outputs of the graph that go on as streams.
        steps: how many graphs the streams have gone through after this one.
        boundary: the operation that streams of an earlier trunk do not pass, which this one begins behind.
    """

    index: int
    residuals: tuple[Residual, ...]
    carried: Mapping[fx.Node, fx.Node]
    entry: fx.Node | None = None
    exits: tuple[fx.Node, ...] = ()
    steps: int = 1
    boundary: fx.Node | None = None


class Passage:
    """What streams pass through: operations that are applied to each of them.

    Args:
        kinds: the kinds of the graph's nodes.
        shortcuts: projection shortcuts that are passed too.
    """

    def __init__(self, kinds: Kinds, shortcuts: Iterable[Shortcut] = ()) -> None:
        self.kinds = kinds
        self.forced: dict[fx.Node, fx.Node] = {}
        for shortcut in shortcuts:
            way = (shortcut.value, *shortcut.way, shortcut.add)
            self.forced.update(zip(way[1:], way, strict=False))

    def way_back(self, start: fx.Node, adds: Mapping[fx.Node, Residual]) -> list[fx.Node]:
        """Return the nodes from ``start`` back to a residual's add over carried operations, [] if there is no way."""
        dead: set[fx.Node] = set()
        way = [start]
        while way:
            node = way[-1]
            if node in adds:
                return way
            step = next((s for s in self.operands(node) if s not in dead), None)
            if step is None:
                dead.add(way.pop())
            else:
                way.append(step)
        return []

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands of ``node`` that may be streams; none if it is a boundary."""
        if node in self.forced:
            return [self.forced[node]]
        return carried_operands(node, self.kinds)


def carried_operands(node: fx.Node, kinds: Kinds) -> list[fx.Node]:
    """Return the operands of ``node`` that may be streams; none if it is a boundary."""
    kind = kinds.of(node)
    data = [a for a in node.args if isinstance(a, fx.Node) and is_tensor(a) and not kinds.is_constant(a)]
    if node.op == "call_method" and data[:1] != list(node.args[:1]):
        return []  # a method of another tensor
    if len([n for n in node.all_input_nodes if is_tensor(n) and not kinds.is_constant(n)]) != len(data):
        return []  # a stream given by keyword or inside a list
    if not is_tensor(node) or kind in (Kind.MIX, Kind.REDUCE, Kind.SHAPE) or name_of(node) == "detach_":
        return []
    if kind is Kind.RANDOM and node.op != "call_module" and name_of(node) not in CARRIED_RANDOMS:
        return []
    if kind is Kind.POINTWISE:
        return data
    if name_of(node) == "set_item" or len(data) != 1:
        return []
    return data


def group(residuals: Sequence[Residual], passage: Passage) -> list[list[Residual]]:
    """Chain residuals: one joins the group of the residual whose output reaches its skip."""
    by_add = {r.add: r for r in residuals}
    group_of: dict[fx.Node, list[Residual]] = {}
    for residual in residuals:  # in order of execution
        before = passage.way_back(residual.skip, by_add)
        members = group_of[before[-1]] if before else []
        members.append(residual)
        group_of[residual.add] = members
    unique = {id(members): members for members in group_of.values()}
    return list(unique.values())


def carried_by(members: Sequence[Residual], passage: Passage) -> dict[fx.Node, fx.Node]:
    """Return the operations between the residuals of one trunk, each with the operand that is its value."""
    by_add = {r.add: r for r in members}
    carried: dict[fx.Node, fx.Node] = {}
    for residual in members:
        way = passage.way_back(residual.skip, by_add)
        carried.update(zip(way, way[1:], strict=False))
    return carried


def boundary_before(value: fx.Node, passage: Passage, adds: Iterable[fx.Node]) -> fx.Node | None:
    """Return the operation next to ``value`` that streams do not pass, if an earlier add of ``adds`` leads to it."""
    seen: set[fx.Node] = set()
    way = [value]
    first = None
    while way:
        node = way.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in adds:
            return first
        operands = passage.operands(node)
        if first is None and not operands:
            first = node
        way += [n for n in (operands or node.all_input_nodes) if is_tensor(n)]
    return None


def split(groups: list[list[Residual]], passage: Passage) -> list[list[Residual]]:
    """Keep the longest chain of each group, and give residuals that lie inside or around it groups of their own."""
    separate: list[list[Residual]] = []
    for members in groups:
        chain = longest_chain(members, passage)
        apart = [r for r in members if r not in chain and nest([r], chain)]
        separate.append([r for r in members if r not in apart])
        if apart:
            separate += split(group(apart, passage), passage)
    return separate


def longest_chain(members: Sequence[Residual], passage: Passage) -> list[Residual]:
    """Return the longest chain of residuals, each with the one before as its skip; of equals the outermost."""
    by_add = {r.add: r for r in members}
    before: dict[fx.Node, Residual | None] = {}
    length: dict[fx.Node, int] = {}
    for residual in members:  # in order of execution
        way = passage.way_back(residual.skip, by_add)
        before[residual.add] = by_add[way[-1]] if way else None
        length[residual.add] = 1 + (length[way[-1]] if way else 0)
    last: Residual | None = max(members, key=lambda r: (length[r.add], len(r.region)))
    chain = []
    while last is not None:
        chain.append(last)
        last = before[last.add]
    return chain[::-1]


def readers_of(residual: Residual) -> list[fx.Node]:
    """Return the users of the skip that begin the branch."""
    return [user for user in residual.skip.users if user in residual.region]


def with_reads_of_their_own(residuals: list[Residual]) -> tuple[list[Residual], list[Skipped]]:
    """Leave out residuals whose branch begins within another's on the same value, side by side."""
    kept: list[Residual] = []
    skipped: list[Skipped] = []
    for residual in residuals:
        beside = [k for k in kept if k.skip is residual.skip and not nest([k], [residual])]
        taken = {reader for other in beside for reader in readers_of(other)}
        if set(readers_of(residual)) <= taken:
            skipped.append(as_skipped(residual, Reason.SHARED_READ))
        else:
            kept.append(residual)
    return kept, skipped


def without_nested(residuals: list[Residual], passage: Passage) -> tuple[list[Residual], list[Skipped]]:
    """Keep, of groups that nest or cross, the one with the most residuals, the outer one of equals."""
    kept: list[list[Residual]] = []
    skipped: list[Skipped] = []
    for members in sorted(
        split(group(residuals, passage), passage), key=lambda g: (-len(g), -sum(len(r.region) for r in g))
    ):
        rival = next((k for k in kept if nest(k, members)), None)
        if rival is None:
            kept.append(members)
        else:
            skipped += [as_skipped(r, Reason.NESTED, f"the trunk of {rival[0].name} has {len(rival)}") for r in members]
    adds = {r.add for members in kept for r in members}
    return [r for r in residuals if r.add in adds], skipped


def nest(one: Sequence[Residual], other: Sequence[Residual]) -> bool:
    """Whether a residual of one lies in a branch of the other."""
    return any(a.add in b.region or b.add in a.region for a in one for b in other)


def as_skipped(residual: Residual, reason: Reason, detail: str = "") -> Skipped:
    """Return the verdict on a residual that is left as it was."""
    return Skipped(residual.name, residual.module, residual.location, reason, detail)
