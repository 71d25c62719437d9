"""Of residuals that lie in branches of others, choose the level that is converted.

Residuals that chain up, with the same residual around all of them or none, are a level. A level is converted as a
whole, or what lies inside of its residuals is: whichever has more residuals, the outer of equals. Where what
lies inside is a stream of its own (residual groups of residual blocks), residuals of the level with nothing
inside stay with it; else (attention that adds up its queries) a chain would be left with holes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from .findings import Reason, Residual, Skipped
from .passage import Passage
from .trunks import as_skipped, group, is_inside


@dataclass(eq=False)
class _Level:
    """Residuals that chain up, and the levels inside of them.

    Attributes:
        count: how many residuals the better choice converts.
        length: the most of them on one chain.
        opened: whether the better choice is what lies inside.
        keeps: whether residuals with nothing inside are converted beside it.
    """

    members: list[Residual]
    inside: list[_Level] = field(default_factory=list)
    count: int = 0
    length: int = 0
    opened: bool = False
    keeps: bool = False


def without_nested(residuals: list[Residual], passage: Passage) -> tuple[list[Residual], list[Skipped]]:
    """Return the residuals of the levels that are converted, and the verdicts on the others."""
    around = _around(residuals)
    children: dict[fx.Node | None, list[Residual]] = {}
    for residual in residuals:
        parent = min(around[residual.add], key=lambda r: len(r.region), default=None)
        children.setdefault(None if parent is None else parent.add, []).append(residual)
    levels = _levels(children, passage)
    for level in reversed(levels):  # inner ones first
        _judge(level, children, passage)
    chosen = _chosen(levels[0], children)
    kept: dict[fx.Node, Residual] = {}
    for members in sorted(chosen, key=lambda m: -len(m)):
        if not any(_conflicts(r, kept, around) for r in members):
            kept.update((r.add, r) for r in members)
    skipped = _verdicts(residuals, kept, around, passage)
    return [r for r in residuals if r.add in kept], skipped


def _around(residuals: Sequence[Residual]) -> dict[fx.Node, list[Residual]]:
    """Return for each residual's add the residuals in whose branch it lies."""
    by_add = {r.add: r for r in residuals}
    around: dict[fx.Node, list[Residual]] = {r.add: [] for r in residuals}
    for outer in residuals:
        for add in outer.region & by_add.keys():
            if is_inside(by_add[add], outer):
                around[add].append(outer)
    return around


def _levels(children: Mapping[fx.Node | None, list[Residual]], passage: Passage) -> list[_Level]:
    """Return all levels, each before those inside of it; the first holds the outermost ones."""
    levels = [_Level([])]
    for level in levels:  # which grows
        adds: list[fx.Node | None] = [r.add for r in level.members] if level.members else [None]
        inner = sorted((r for add in adds for r in children.get(add, ())), key=lambda r: r.add)
        level.inside = [_Level(members) for members in group(inner, passage)]
        levels += level.inside
    return levels


def _judge(level: _Level, children: Mapping[fx.Node | None, list[Residual]], passage: Passage) -> None:
    full = [r for r in level.members if r.add in children]
    lengths = {r.add: inner.length for inner in level.inside for r in inner.members}
    level.keeps = all(
        _goes_through(r, children[r.add][0], passage) or max(lengths[c.add] for c in children[r.add]) > 1 for r in full
    )
    beside = len(level.members) - len(full) if level.keeps else 0
    within = sum(inner.count for inner in level.inside) + beside
    level.opened = within > len(level.members)
    level.count = max(within, len(level.members))
    inner_lengths = (inner.length for inner in level.inside)
    level.length = max(beside, *inner_lengths) if level.opened and level.inside else len(level.members)


def _goes_through(outer: Residual, inner: Residual, passage: Passage) -> bool:
    """Whether the first residual inside of another has the same value to begin with: the trunk goes on inside."""
    value = inner.skip
    while value is not outer.skip:
        operands = passage.operands(value) if value in outer.region else []
        if not operands:
            return False
        value = operands[0]
    return True


def _chosen(outermost: _Level, children: Mapping[fx.Node | None, list[Residual]]) -> list[list[Residual]]:
    chosen: list[list[Residual]] = []
    waiting = [outermost]
    while waiting:
        level = waiting.pop()
        if level.members and not level.opened:
            chosen.append(level.members)
            continue
        if level.keeps and level.members:
            chosen.append([r for r in level.members if r.add not in children])
        waiting += level.inside
    return chosen


def _conflicts(
    residual: Residual, kept: Mapping[fx.Node, Residual], around: Mapping[fx.Node, Sequence[Residual]]
) -> bool:
    if any(outer.add in kept for outer in around[residual.add]):
        return True
    return any(is_inside(kept[add], residual) for add in residual.region & kept.keys())


def _verdicts(
    residuals: Sequence[Residual],
    kept: Mapping[fx.Node, Residual],
    around: Mapping[fx.Node, Sequence[Residual]],
    passage: Passage,
) -> list[Skipped]:
    """Return for each residual that is left the trunk that it lies inside of or around."""
    lengths = {r.add: members for members in group([r for r in residuals if r.add in kept], passage) for r in members}
    skipped = []
    for residual in residuals:
        if residual.add in kept:
            continue
        rival = next((r.add for r in around[residual.add] if r.add in kept), None)
        inner = (add for add in sorted(residual.region & kept.keys()) if is_inside(kept[add], residual))
        rival = rival or next(inner, None)
        detail = "" if rival is None else f"the trunk of {lengths[rival][0].name} has {len(lengths[rival])}"
        skipped.append(as_skipped(residual, Reason.NESTED, detail or "its chain is converted on another level"))
    return skipped
