"""Chain residuals into trunks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..capture.kinds import Kinds
from ..graphs.operations import is_tensor
from .findings import Reason, Residual, Skipped
from .passage import Flow, Passage


@dataclass(frozen=True)
class Trunk:
    """A chain of residuals that one set of streams runs through.

    Attributes:
        index: its number, in order of execution.
        residuals: its residuals, in order.
        carried: operations between them, each with the operands that are streams.
        entry: the input of the graph that the trunk begins with, where it may come as streams.
        ends: values after the last residual that streams go as far as.
        exits: the outputs of the graph that go on as streams.
        steps: how many graphs the streams have gone through after this one.
        keys: of its first and its last residual in the whole model, where a call does without those.
        boundary: the operation that streams of an earlier trunk do not pass, which this one begins behind.
    """

    index: int
    residuals: tuple[Residual, ...]
    carried: Mapping[fx.Node, tuple[fx.Node, ...]]
    ends: tuple[fx.Node, ...] = ()
    entry: fx.Node | None = None
    exits: tuple[fx.Node, ...] = ()
    steps: int = 1
    keys: tuple[str, str] | None = None
    boundary: fx.Node | None = None


def group(residuals: Sequence[Residual], passage: Passage) -> list[list[Residual]]:
    """Chain residuals: one joins the group of the residual whose output reaches its skip."""
    flow = Flow(passage, [r.add for r in residuals])
    group_of: dict[fx.Node, list[Residual]] = {}
    for residual in residuals:  # in order of execution
        before = flow.trunk_value(residual.skip)
        flow.lengths[residual.add] = 1 + (flow.lengths[before] if before is not None else 0)
        members = group_of[before] if before is not None else []
        members.append(residual)
        group_of[residual.add] = members
    unique = {id(members): members for members in group_of.values()}
    return list(unique.values())


def regrouped(residuals: Sequence[Residual], groups: Iterable[Collection[str]], kinds: Kinds) -> tuple[Trunk, ...]:
    """Return the trunks of a part of a model, chained as they are in the whole.

    Args:
        residuals: of the part, in order of execution.
        groups: the names on each trunk of the whole.
        kinds: of the part's graph.
    """
    passage = Passage(kinds, adds=[r.add for r in residuals])
    chains = [chain for names in groups for chain in group([r for r in residuals if r.name in names], passage)]
    chains.sort(key=lambda members: residuals.index(members[0]))
    return tuple(Trunk(i, tuple(members), carried_by(members, passage)) for i, members in enumerate(chains))


def flow_of(members: Sequence[Residual], passage: Passage) -> Flow:
    """Return where values come from, as seen from the residuals of one trunk."""
    flow = Flow(passage, [r.add for r in members])
    for place, residual in enumerate(members):
        flow.lengths[residual.add] = place
    return flow


def carried_by(members: Sequence[Residual], passage: Passage) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return the operations between the residuals of one trunk, each with the operands that are streams."""
    flow = flow_of(members, passage)
    carried: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for residual in members:
        carried.update(flow.way_to(residual.skip))
    return carried


def way_between(
    value: fx.Node, carried: Mapping[fx.Node, tuple[fx.Node, ...]], ends: Collection[fx.Node]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return the carried operations that lead from ``ends`` to ``value``."""
    way: dict[fx.Node, tuple[fx.Node, ...]] = {}
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if node not in way and node not in ends and node in carried:
            way[node] = carried[node]
            waiting += carried[node]
    return way


def at_end(trunk: Trunk) -> set[fx.Node]:
    """Return the trunk values that no residual follows: those that ``readout="learned"`` weighs streams of."""
    last = trunk.residuals[-1].add
    return {last}.union(*(way_between(value, trunk.carried, (last,)) for value in trunk.ends))


def boundary_before(value: fx.Node, passage: Passage, adds: Collection[fx.Node]) -> fx.Node | None:
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
    waiting = list(reversed(groups))
    while waiting:
        members = waiting.pop()
        chain = longest_chain(members, passage)
        on_chain = {r.add for r in chain}
        apart = [r for r in members if r.add not in on_chain and nest([r], chain)]
        taken = {r.add for r in apart}
        separate += group([r for r in members if r.add not in taken], passage)
        waiting += reversed(group(apart, passage))
    return separate


def longest_chain(members: Sequence[Residual], passage: Passage) -> list[Residual]:
    """Return the longest chain of residuals, each with the one before as its skip; of equals the outermost."""
    by_add = {r.add: r for r in members}
    flow = Flow(passage, by_add)
    before: dict[fx.Node, Residual | None] = {}
    spans: dict[fx.Node, int] = {}  # of the chain that ends there
    for residual in members:  # in order of execution
        add = flow.trunk_value(residual.skip)
        before[residual.add] = None if add is None else by_add[add]
        flow.lengths[residual.add] = 1 + (0 if add is None else flow.lengths[add])
        spans[residual.add] = len(residual.region) + (0 if add is None else spans[add])
    last: Residual | None = max(members, key=lambda r: (flow.lengths[r.add], spans[r.add]))
    chain = []
    while last is not None:
        chain.append(last)
        last = before[last.add]
    return chain[::-1]


def outer_first(trunks: Sequence[Trunk]) -> list[Trunk]:
    """Return trunks such that each comes after those around it, or around a part of it."""
    regions = {t.index: frozenset().union(*(r.region for r in t.residuals)) for t in trunks}
    adds = {t.index: {r.add for r in t.residuals} for t in trunks}
    around = {
        t.index: {o.index for o in trunks if o is not t and not regions[o.index].isdisjoint(adds[t.index])}
        for t in trunks
    }
    ordered: list[Trunk] = []
    waiting = sorted(trunks, key=lambda t: -max(len(r.region) for r in t.residuals))  # where two are around each other
    while waiting:
        left = {t.index for t in waiting}
        trunk = next((t for t in waiting if left.isdisjoint(around[t.index])), waiting[0])
        ordered.append(trunk)
        waiting.remove(trunk)
    return ordered


def readers_of(residual: Residual) -> list[fx.Node]:
    """Return the users of the skip that begin the branch."""
    return [user for user in residual.skip.users if user in residual.region]


def with_reads_of_their_own(residuals: Iterable[Residual]) -> tuple[list[Residual], list[Skipped]]:
    """Leave out residuals whose branch begins within another's on the same value, side by side."""
    kept: dict[fx.Node, list[Residual]] = {}
    skipped: list[Skipped] = []
    for residual in residuals:
        on_same = kept.setdefault(residual.skip, [])
        beside = [k for k in on_same if not nest([k], [residual])]
        taken = {reader for other in beside for reader in readers_of(other)}
        if set(readers_of(residual)) <= taken:
            skipped.append(as_skipped(residual, Reason.SHARED_READ))
        else:
            on_same.append(residual)
    left = {s.name for s in skipped}
    return [r for r in residuals if r.name not in left], skipped


def is_inside(one: Residual, other: Residual) -> bool:
    """Whether a residual lies in the branch of another: it begins and ends there.

    One that only ends there belongs to another stream, which the branch reads.
    """
    return one.add in other.region and (one.skip is other.skip or one.skip in other.region)


def nest(one: Sequence[Residual], other: Sequence[Residual]) -> bool:
    """Whether a residual of one lies in a branch of the other."""
    return any(is_inside(a, b) or is_inside(b, a) for a in one for b in other)


def as_skipped(residual: Residual, reason: Reason, detail: str = "") -> Skipped:
    """Return the verdict on a residual that is left as it was."""
    return Skipped(residual.name, residual.module, residual.location, reason, detail)
