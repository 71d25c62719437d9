"""Which residual of one trace of a module is which of another: of a call of another kind, or in another mode.

A residual is known by the module whose code adds, by what its branch runs, and by the lines that add: the same
residual may be written in both branches of an ``if``, and several may share one line of a helper function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from torch import fx

from ..errors import TraceError
from ..graphs import meta
from .findings import Findings, Residual
from .trunks import Trunk, way_between

DEPTH = 2  # atoms of a path, below the module that adds, that tell branches apart


class Operation(NamedTuple):
    """What an operation of a trace is known by: the module and its call, the function or module, the user's line."""

    module: str
    call: tuple[int, ...]
    target: str
    location: str


def operation(node: fx.Node) -> Operation:
    """Return what a node is known by."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return Operation(meta.MODULE.of(node), meta.CALL.of(node), name, meta.LOCATION.of(node) or "")


@dataclass(frozen=True)
class Identity:
    """What a residual is known by.

    Attributes:
        name: its name where it was converted, None where it was left plain.
        module: path of the module whose code adds.
        branch: paths, below that module, of the modules and parameters that its branch uses.
        lines: the user's lines that lead to the add, the innermost first.
        call: which call of the module it is in, within that of the module around, and so on.
        next: the residual that comes after it on its trunk.
        way: the operations that lead there, carried on its streams.
        elsewhere: whether another residual of the other trace uses modules of its branch.
        beside: how many adds on its line are no residuals.
    """

    name: str | None
    module: str
    branch: frozenset[str]
    lines: tuple[str, ...]
    call: tuple[int, ...] = ()
    next: str | None = None
    way: frozenset[Operation] = frozenset()
    elsewhere: bool = False
    beside: int = 0


def identities(
    findings: Findings, names: Mapping[fx.Node, str], below: str = "", calls: int = 1
) -> tuple[Identity, ...]:
    """Return the identity of each residual; ``names`` are those of converted ones by their adds.

    Args:
        findings: its residuals, in order of execution, and what is none.
        names: what converted ones are called.
        below: path of the module that other paths are relative to.
        calls: of that module, in which what is no residual was found.
    """
    none = Counter((s.module, s.location) for s in findings.skipped)
    return tuple(_identity(r, names.get(r.add), below, none, calls) for r in findings.residuals)


def _identity(
    residual: Residual, name: str | None, below: str, none: Mapping[tuple[str, str], int], calls: int
) -> Identity:
    prefix = residual.module + "." if residual.module else ""
    used = set()
    for node in (*residual.region, *(n for r in residual.region for n in r.all_input_nodes if n.op == "get_attr")):
        path = str(node.target) if node.op in ("call_module", "get_attr") else str(meta.MODULE.of(node))
        if path.startswith(prefix) and path != residual.module and not path.endswith(".training"):
            used.add(".".join(path[len(prefix) :].split(".")[:DEPTH]))
    module = relative_path(residual.module, below)
    lines = meta.LINES.of(residual.add)
    beside = none.get((residual.module, lines[0]), 0) // calls if lines else 0
    return Identity(name, module, frozenset(used), lines, meta.CALL.of(residual.add), beside=beside)


def with_ways(known: Iterable[Identity], trunks: Iterable[Trunk]) -> tuple[Identity, ...]:
    """Return identities that know what comes after each residual on its trunk."""
    after: dict[str | None, tuple[str, frozenset[Operation]]] = {}
    for trunk in trunks:
        adds = {r.add for r in trunk.residuals}
        for residual, following in pairwise(trunk.residuals):
            way = way_between(following.skip, trunk.carried, adds)
            after[residual.name] = following.name, frozenset(map(operation, way))
    return tuple(replace(k, next=after[k.name][0], way=after[k.name][1]) if k.name in after else k for k in known)


def way_after(name: str, known: Sequence[Identity]) -> frozenset[Operation]:
    """Return the operations that streams went through after a residual, in so far as others of its trunk followed."""
    by_name = {identity.name: identity for identity in known if identity.name}
    way: frozenset[Operation] = frozenset()
    at: str | None = name
    while at is not None and at in by_name:
        way |= by_name[at].way
        at = by_name[at].next
    return way


def relative_path(path: str, below: str) -> str:
    """Return a module's path below another one."""
    if below and path.startswith(below + "."):
        return path[len(below) + 1 :]
    return "" if path == below else path


def scopes_of(nodes: Iterable[fx.Node], residuals: Iterable[Residual], below: str = "") -> frozenset[str]:
    """Return the paths below a module of those to trace into, and their parents.

    Args:
        nodes: made by code that is to be seen.
        residuals: whose skips are to be seen too, where a module returns them.
        below: path of the module.
    """
    paths = {str(meta.MODULE.of(node)) for node in nodes}
    paths.update(path for residual in residuals for path in meta.GIVEN_BACK.of(residual.skip))
    scopes = {""}
    for path in paths:
        if path.startswith(f"{below}." if below else ""):
            atoms = relative_path(path, below).split(".")
            scopes.update(".".join(atoms[: i + 1]) for i in range(len(atoms)))
    return frozenset(scopes)


def recognised(
    findings: Findings, known: Sequence[Identity]
) -> tuple[tuple[Residual, ...], tuple[Identity, ...], tuple[Residual, ...]]:
    """Return the converted residuals among those found, under their names; those that are not there; and new ones.

    Args:
        findings: of the new trace.
        known: the residuals of the module, those left plain among them.
    """
    found = identities(findings, {})
    twin: dict[int, int] = {}
    for module in {identity.module for identity in known}:
        ours = [i for i, identity in enumerate(known) if identity.module == module]
        theirs = [i for i, identity in enumerate(found) if identity.module == module]
        twin.update((theirs[b], ours[a]) for a, b in _aligned([known[i] for i in ours], [found[i] for i in theirs]))
    selected, extra = [], []
    for i, residual in enumerate(findings.residuals):
        name = known[twin[i]].name if i in twin else None
        if name is not None:
            selected.append(replace(residual, name=name))
        elif i not in twin:
            extra.append(residual)
    there = set(twin.values())
    missing = tuple(k for i, k in enumerate(known) if i not in there and k.name is not None)
    return tuple(selected), missing, tuple(extra)


def _aligned(known: Sequence[Identity], found: Sequence[Identity]) -> list[tuple[int, int]]:
    """Return pairs of equal residuals: of one branch in any order, the others in the order of both.

    Code may run its layers in another order; what tells those of one branch apart is which comes first.
    """
    ours, theirs = _by_branch(known), _by_branch(found)
    pairs = []
    for branch in ours.keys() & theirs.keys():
        if branch and len(ours[branch]) == len(theirs[branch]):
            a, b = ours[branch], theirs[branch]
            pairs += [(a[i], b[j]) for i, j in _in_order([known[i] for i in a], [found[j] for j in b])]
    a = sorted(set(range(len(known))) - {i for i, _ in pairs})
    b = sorted(set(range(len(found))) - {j for _, j in pairs})
    used_before = frozenset(path for identity in known for path in identity.branch)
    used_now = frozenset(path for identity in found for path in identity.branch)
    left = [replace(known[i], elsewhere=bool(known[i].branch & used_now)) for i in a]
    new = [replace(found[j], elsewhere=bool(found[j].branch & used_before)) for j in b]
    return pairs + [(a[i], b[j]) for i, j in _in_order(left, new)]


def _by_branch(residuals: Sequence[Identity]) -> dict[frozenset[str], list[int]]:
    places: dict[frozenset[str], list[int]] = {}
    for i, identity in enumerate(residuals):
        places.setdefault(identity.branch, []).append(i)
    return places


def _in_order(known: Sequence[Identity], found: Sequence[Identity]) -> list[tuple[int, int]]:
    """Return pairs of equal residuals, in the order of both, that are alike the most."""
    best = [[0.0] * (len(found) + 1) for _ in range(len(known) + 1)]
    for i in range(len(known) - 1, -1, -1):
        for j in range(len(found) - 1, -1, -1):
            alike = _likeness(known[i], found[j])
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + alike if alike else 0.0)
    pairs, i, j = [], 0, 0
    while i < len(known) and j < len(found):
        alike = _likeness(known[i], found[j])
        if alike and best[i][j] == best[i + 1][j + 1] + alike:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _likeness(a: Identity, b: Identity) -> float:
    """Return how much two residuals of one module are alike, 0 if they are two."""
    alike = _likeness_of_code(a, b)
    return alike + 0.25 * (a.call == b.call) if alike else 0.0


def _likeness_of_code(a: Identity, b: Identity) -> float:
    same_lines = a.lines == b.lines
    if not a.branch or not b.branch:
        return 1.0 if same_lines or not a.branch and not b.branch else 0.0
    common = _covered(a.branch, b.branch) + _covered(b.branch, a.branch)
    if not common and (a.elsewhere or b.elsewhere):
        return 0.0  # a loop over layers: the line is that of all of them
    return common + 0.5 * same_lines


def _covered(one: frozenset[str], other: frozenset[str]) -> float:
    def related(p: str, q: str) -> bool:
        return p == q or p.startswith(q + ".") or q.startswith(p + ".")

    return sum(any(related(p, q) for q in other) for p in one) / len(one)


def hidden_by(identity: Identity, findings: Findings, extra: Iterable[Residual]) -> str | None:
    """Return why a residual that is not found may be there all the same, None if the code does without it.

    Args:
        identity: what it is known by.
        findings, extra: of the new trace, and those among its residuals that were not there before.
    """
    here = (identity.module, identity.lines[0]) if identity.lines else None
    none = [skipped for skipped in findings.skipped if (skipped.module, skipped.location) == here]
    if len(none) > identity.beside:  # what was an add of its line that is no residual may still be there
        return f"its add is none now: {none[-1]}"
    return "the module has others in its place" if any(r.module == identity.module for r in extra) else None


def stayed_whole(identity: Identity, opaque: Mapping[str, str]) -> str | None:
    """Return why a residual's code is in no graph, None if it is."""
    for path, reason in opaque.items():
        if identity.module == path or identity.module.startswith(path + "."):
            return f"{path} stayed whole: {reason}"
    return None


def refuse_hidden(identity: Identity, why: str | None, change: object = None) -> None:
    """Raise TraceError if a residual that is not found may be there all the same.

    Args:
        identity: what it is known by.
        why: of :func:`stayed_whole` or :func:`hidden_by`.
        change: what led to the new trace.
    """
    if why is not None:
        raise TraceError(
            f"for these inputs the model has other residuals than those that were converted: {identity.name} cannot be "
            f"found ({why}). {change or ''} Convert another copy of the model with example inputs like these, or leave "
            "this residual out with exclude=[...]."
        )
