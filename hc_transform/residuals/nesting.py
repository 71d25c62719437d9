"""Of residuals that lie in branches of others, choose the level that is converted.

Residuals that chain up, with the same residuals around all of them, are a level. A level is converted as a
whole, or what lies inside of its residuals is: whichever has more residuals, the outer of equals. A chain is
opened where each of its residuals that holds others holds a stream of its own: of values as large (residual groups
of residual blocks), or one that all of the branch runs through (layers with a bottleneck at either end); its
residuals with nothing inside stay with that. Else (norms that add, attention that adds up its queries) it would be
left with holes for parts of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from torch import fx

from ..graphs.operations import shape_of
from .findings import Reason, Residual, Skipped
from .passage import Flow, Passage
from .trunks import as_skipped, group, is_inside

Around = Mapping[fx.Node, Mapping[fx.Node, Residual]]  # by their adds, those in whose branch a residual lies
Children = Mapping[fx.Node | None, list[Residual]]


@dataclass(eq=False)
class _Level:
    """Residuals that chain up, and the levels inside of them.

    Attributes:
        chosen: the adds of the residuals that the better choice converts.
        length: the most of them on one chain.
    """

    members: list[Residual]
    inside: list[_Level] = field(default_factory=list)
    chosen: frozenset[fx.Node] = frozenset()
    length: int = 0


def without_nested(residuals: list[Residual], passage: Passage) -> tuple[list[Residual], list[Skipped]]:
    """Return the residuals of the levels that are converted, and the verdicts on the others."""
    around = _around(residuals, passage)
    children = _children(residuals, around)
    levels = _levels(children, passage)
    for level in reversed(levels):  # inner ones first
        _judge(level, children, passage)
    chosen = {add for level in levels[:1] for add in level.chosen}
    groups = group([r for r in residuals if r.add in chosen], passage)
    kept: dict[fx.Node, Residual] = {}
    for members in sorted(groups, key=lambda m: -len(m)):
        kept.update((r.add, r) for r in members if not _conflicts(r, kept, around))
    return [r for r in residuals if r.add in kept], _verdicts(residuals, kept, around, passage)


def _around(residuals: Sequence[Residual], passage: Passage) -> Around:
    """Return for each residual those in whose branch it lies.

    The branch may pass through residuals of another stream, which it reads. They lie inside only if their stream
    begins there: two streams that read each other in turn do not nest. Where the branch ends in a value of the other
    stream, one of both is no stream.
    """
    by_add = {r.add: r for r in residuals}
    flow = Flow(passage, by_add)
    before = {r.add: flow.trunk_value(r.skip) for r in residuals}
    around: dict[fx.Node, dict[fx.Node, Residual]] = {r.add: {} for r in residuals}
    for outer in residuals:
        for add in sorted(outer.region & by_add.keys()):
            last = before[add]
            begins = by_add[add].skip is outer.skip or last not in outer.region
            if is_inside(by_add[add], outer) and (begins or last is not None and outer.add in around[last]):
                around[add][outer.add] = outer
        for term in outer.branch:
            ends = None if term.value is None else flow.trunk_value(term.value)
            if ends in outer.region:
                around[ends][outer.add] = outer
    return around


def _children(residuals: Sequence[Residual], around: Around) -> Children:
    """Return the residuals next inside of each, those with none around under None."""
    children: dict[fx.Node | None, list[Residual]] = {}
    for residual in residuals:
        next_around: list[fx.Node] = []
        for outer in sorted(around[residual.add].values(), key=lambda r: len(r.region)):
            if not any(outer.add in around[inner] for inner in next_around):
                next_around.append(outer.add)
        parents: Sequence[fx.Node | None] = next_around or [None]
        for add in parents:
            children.setdefault(add, []).append(residual)
    return children


def _levels(children: Children, passage: Passage) -> list[_Level]:
    """Return all levels, each before those inside of it; the first holds none, and the outermost inside."""
    known: dict[tuple[fx.Node, ...], _Level] = {}
    root = _Level([])
    waiting = [root]
    while waiting:
        level = waiting.pop()
        adds: list[fx.Node | None] = [r.add for r in level.members] if level.members else [None]
        inner = {r.add: r for add in adds for r in children.get(add, ())}
        for members in group([inner[add] for add in sorted(inner)], passage):
            key = tuple(r.add for r in members)
            if key not in known:
                known[key] = _Level(members)
                waiting.append(known[key])
            level.inside.append(known[key])
    done = {id(root)}
    order: list[_Level] = []
    stack = [(root, iter(root.inside))]
    while stack:
        level, rest = stack[-1]
        following = next((inner for inner in rest if id(inner) not in done), None)
        if following is None:
            order.append(level)
            stack.pop()
        else:
            done.add(id(following))
            stack.append((following, iter(following.inside)))
    return order[::-1]


def _judge(level: _Level, children: Children, passage: Passage) -> None:
    """Choose between a level and what lies inside of it, which is judged already."""
    own = frozenset(r.add for r in level.members)
    full = [r for r in level.members if r.add in children]
    within: frozenset[fx.Node] = frozenset().union(*(inner.chosen for inner in level.inside))
    streams = all(_goes_through(r, children, passage) or _holds_a_stream(r, children, level.inside) for r in full)
    beside = own - {r.add for r in full} if streams else frozenset()
    more = len(within | beside) > len(own) and (streams or len(own) == 1)
    opened = more or len(own) == 1 and bool(full) and _is_a_tap(full[0], children, passage)
    level.chosen = within | beside if opened else own
    level.length = max([len(beside), *(inner.length for inner in level.inside)]) if opened else len(own)


def _holds_a_stream(outer: Residual, children: Children, inside: Sequence[_Level]) -> bool:
    """Whether a chain inside of a residual is a stream of its own and no part of a layer.

    Its values are as large, or the branch is nothing but what leads to it, itself, and what it leads to.
    """
    size, next_inside = _size_of(outer), {r.add for r in children[outer.add]}
    for inner in inside:
        chain = [r for r in inner.members if r.add in next_inside] if inner.length > 1 else []
        if any(size is None or _size_of(r) in (size, None) for r in chain):
            return True
        if chain and _runs_through(outer, {r.add for r in chain}):
            return True
    return False


def _runs_through(outer: Residual, adds: Set[fx.Node]) -> bool:
    """Whether every way from the skip to the end of the branch passes one of ``adds``."""
    seen: set[fx.Node] = set()
    way = [node for term in outer.branch for node in term.nodes]
    while way:
        node = way.pop()
        if node is outer.skip:
            return False
        if node not in seen and node not in adds and node in outer.region:
            way += node.all_input_nodes
        seen.add(node)
    return True


def _size_of(residual: Residual) -> int | None:
    shape = shape_of(residual.skip)
    return None if shape is None else shape.numel()


def _goes_through(outer: Residual, children: Children, passage: Passage) -> bool:
    """Whether the trunk goes on inside of a residual: a chain begins with its value and ends in its branch."""
    value = children[outer.add][0].skip
    while value is not outer.skip:
        operands = passage.operands(value) if value in outer.region else []
        if not operands:
            return False
        value = operands[0]
    return _is_a_tap(outer, children, passage)


def _is_a_tap(residual: Residual, children: Children, passage: Passage) -> bool:
    """Whether a residual adds an older value to a stream that runs inside: positions, in every layer."""
    flow = Flow(passage, [r.add for r in children[residual.add]])
    return any(term.value is not None and flow.trunk_value(term.value) is not None for term in residual.branch)


def _conflicts(residual: Residual, kept: Mapping[fx.Node, Residual], around: Around) -> bool:
    if around[residual.add].keys() & kept.keys():
        return True
    return any(residual.add in around[add] for add in residual.region & kept.keys())


def _verdicts(
    residuals: Sequence[Residual], kept: Mapping[fx.Node, Residual], around: Around, passage: Passage
) -> list[Skipped]:
    """Return for each residual that is left the trunk that it lies inside of or around."""
    groups = group([r for r in residuals if r.add in kept], passage)
    trunk_of = {r.add: members for members in groups for r in members}
    skipped = []
    for residual in residuals:
        if residual.add in kept:
            continue
        outer = sorted(around[residual.add].keys() & kept.keys())
        inner = (add for add in sorted(residual.region & kept.keys()) if residual.add in around[add])
        rival = outer[0] if outer else next(inner, None)
        detail = "its chain is converted on another level"
        if rival is not None:
            detail = f"the trunk of {trunk_of[rival][0].name} has {len(trunk_of[rival])}"
        skipped.append(as_skipped(residual, Reason.NESTED, detail))
    return skipped


def apart_from(residual: Residual, residuals: Mapping[fx.Node, Residual]) -> Residual | None:
    """Return a residual whose branch ends where another stream begins that only looks at its skip.

    None if nothing is left of the branch: two values are mixed, of which one goes into the other through a stream.
    Another stream that reads the skip and is read by the branch later takes a readout, as whoever is not of the branch.
    """
    residual = replace(residual, region=residual.whole or residual.region)
    inside = {residual.skip, *residual.region}
    other = {n for n in residual.region if n in residuals and residuals[n].skip not in inside} - {residual.add}
    if not other:
        return residual
    ends = [node for term in residual.branch for node in term.nodes if node in residual.region]
    back = _reached(ends, lambda n: [m for m in n.all_input_nodes if m in residual.region and m not in other])
    ahead = _reached([residual.skip], lambda n: [m for m in n.users if m in back])
    if not ahead.issuperset(ends):
        return None
    return replace(residual, region=frozenset(ahead - {residual.skip}), whole=residual.region)


def _reached(start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return all nodes that ``step`` leads to, one after the other, from those of ``start``."""
    found: set[fx.Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [n for n in step(node) if n not in found]
    return found


def among(residuals: Iterable[Residual]) -> list[Residual]:
    """Return residuals with their branches as they are beside each other: others that were found are no streams."""
    residuals = list(residuals)
    by_add = {r.add: r for r in residuals}
    return [apart_from(r, by_add) or r for r in residuals]
