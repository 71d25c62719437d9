"""Choose the modules that get a rewritten graph, and how streams travel between their calls.

A residual lives in the innermost module call that leads from the skip to the add by itself. The
outermost of those modules are the blocks. Two residuals of one trunk in different blocks stay on
one trunk if the value goes from the one block to the other as it is, or through sums and multiples, which a trunk
value does to each of its streams; where the code between them changes it otherwise, the trunk is cut: read out before,
expanded after.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import fx, nn

from ..capture.tape import Call
from ..graphs import meta
from ..graphs.dialects import location_of, name_of
from ..streams.in_place import write_of
from ..streams.linear_ops import LINEAR, linear_operand
from .findings import Findings, Reason, Residual, Skipped
from .identity import Identity, identities, relative_path, scopes_of
from .keys import relative
from .planner import Plan
from .trunks import Trunk, as_skipped, way_between

T = TypeVar("T")
AROUND = "it is around a stack of blocks, which keep their hooks and checkpoints; scope='graph' takes both"


@dataclass(frozen=True)
class CallPlan:
    """What one call of a block is to do.

    Attributes:
        step: how many block calls of its chain come before it.
        residuals: name of each residual of the call, in order.
        known: what all residuals of the call are known by, those left plain among them, under the names that
            their connections have in the block.
        leaves: those of these names after which the streams go on to another block.
        begins: those on trunks that begin in the call.
        trunks: the names on each trunk that passes through the call.
    """

    step: int
    residuals: tuple[str, ...]
    known: tuple[Identity, ...]
    leaves: frozenset[str]
    begins: frozenset[str]
    trunks: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class BlockPlan:
    """One block: a module whose code is replaced by graphs.

    Attributes:
        path: of the module.
        scopes: paths below it of the modules whose code becomes part of its graph.
        calls: what each call is to do; calls with the same step do the same.
        keys: paths of its connections below it, by the names that their residuals have below it.
        shared: whether all calls use the connections of the first one.
        counted: whether streams count the blocks that they pass, for blocks that are called several times.
        listed: the modules below it and the lines of adds that are none, as one of a constant, which it cannot see.
    """

    path: str
    scopes: frozenset[str]
    calls: tuple[CallPlan, ...]
    keys: Mapping[str, str]
    shared: bool = False
    counted: bool = False
    listed: frozenset[tuple[str, str]] = frozenset()

    @property
    def ends(self) -> dict[str, tuple[str, str]]:
        """The keys of the block's first and last residual on the same trunk, by each residual's name below the block.

        The modules that begin and end a trunk's streams stand beside them, also where a call does without them.
        """
        ends = {}
        for on_trunk in zip(*(call.trunks for call in self.calls), strict=True):
            names = [
                str(k.name) for call, own in zip(self.calls, on_trunk, strict=True) for k in call.known if k.name in own
            ]
            ends.update({name: (self.keys[names[0]], self.keys[names[-1]]) for name in names})
        return ends


@dataclass(frozen=True)
class BlocksPlan:
    """The plan on the tape, its trunks cut where streams cannot go on, and the blocks that carry it out."""

    plan: Plan
    blocks: tuple[BlockPlan, ...]
    cuts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_blocks(
    plan: Plan,
    holders: Mapping[fx.Node, tuple[Call, ...]],
    found: Findings = Findings((), ()),  # noqa: B008
    *,
    share_calls: bool = False,
    apart: str = "",
    refused: Collection[str] = (),
) -> BlocksPlan:
    """Return how the residuals of a tape's plan are spread over blocks.

    Args:
        plan: made on a tape.
        holders: the module calls around each residual's add (:func:`find_holders`).
        found: what the tape holds.
        share_calls: one connection for all calls of a module.
        apart: why no streams go from one block to another; "" if they do.
        refused: paths of modules that cannot become blocks.
    """
    stacks = {r.add: holders[r.add] for r in plan.residuals}
    needed = {stack[-1].path for stack in stacks.values()}
    homes = _homes(stacks, needed)
    between = _passed_between(plan)
    if not apart:
        needed |= _around_parts(plan.trunks, stacks, homes, between).difference(refused)
        homes = _homes(stacks, needed)
    whole = [
        replace(t, residuals=tuple(replace(r, region=inside(r, homes[r.add])) for r in t.residuals))
        for t in plan.trunks
    ]
    trunks, cuts = _cut_unlike(*_cut(whole, homes, between, apart), homes)
    least = plan.options.min_residuals
    short = [r for t in trunks if len(t.residuals) < least for r in t.residuals]
    trunks = [t for t in trunks if len(t.residuals) >= least]
    plan = replace(
        plan,
        trunks=tuple(replace(t, index=i) for i, t in enumerate(trunks)),
        skipped=(*plan.skipped, *(as_skipped(r, Reason.SHORT) for r in short)),
    )
    blocks, notes = _blocks(plan, homes, found, share_calls)
    return BlocksPlan(plan, blocks, tuple(cuts), tuple(notes))


def _homes(stacks: Mapping[fx.Node, tuple[Call, ...]], needed: Collection[str]) -> dict[fx.Node, Call]:
    """Return the call of the block that converts each residual: the outermost of those that are needed."""
    return {add: next(c for c in stack if c.path in needed) for add, stack in stacks.items()}


def _around_parts(
    trunks: Iterable[Trunk],
    stacks: Mapping[fx.Node, tuple[Call, ...]],
    homes: Mapping[fx.Node, Call],
    between: Collection[fx.Node],
) -> set[str]:
    """Return the modules around parts of a trunk whose own code does something to its streams, as a group of blocks.

    A module around all of it, such as an encoder, stays Python: the blocks in it are what engines wrap.
    """
    found = set()
    for trunk in trunks:
        adds = {r.add for r in trunk.residuals}
        for residual in trunk.residuals:
            for node in _on_the_way(residual, trunk, adds, homes, between)[1]:
                calls = meta.CALLS.of(node)
                if calls and calls[-1].path:
                    held = [add for add in adds if calls[-1] in stacks[add]]
                    if 0 < len(held) < len(adds):
                        found.add(calls[-1].path)
    return found


def _on_the_way(
    residual: Residual,
    trunk: Trunk,
    adds: set[fx.Node],
    homes: Mapping[fx.Node, Call],
    between: Collection[fx.Node],
) -> tuple[set[fx.Node], list[fx.Node]]:
    """Return what the way to a residual's skip begins with, and the operations on it that are done on no streams."""
    way = way_between(residual.skip, trunk.carried, adds)
    ends = {residual.skip, *(n for operands in way.values() for n in operands)} - way.keys()
    inside = {homes[add] for add in (residual.add, *ends.intersection(adds))}
    outside = [n for n in sorted(way) if not inside.intersection(meta.CALLS.of(n)) and not _is_filled(n)]
    if all(len(_streams_among(operands)) <= 1 for operands in way.values()):  # one value comes to the block
        outside = [n for n in outside if n not in between]
    return ends, outside


def _passed_between(plan: Plan) -> set[fx.Node]:
    """Return the carried operations that a trunk value does to each of its streams outside of blocks."""
    if plan.options.readout == "sum":
        return set()
    held = {r.add for trunk in plan.trunks for r in trunk.residuals[:-1]}  # those that may come as trunk values
    held.update(node for trunk in plan.trunks for node in trunk.carried if not _is_filled(node))
    for node in plan.graph_module.graph.nodes:
        if name_of(node) in LINEAR and any(_is_held(value, held) for value in node.args):
            held.add(node)
    return {n for trunk in plan.trunks for n in trunk.carried if _is_passed(n, trunk.carried[n], held)}


def _is_held(value: Any, held: Collection[fx.Node]) -> bool:
    return isinstance(value, fx.Node) and value in held


def _is_passed(node: fx.Node, operands: tuple[fx.Node, ...], held: Collection[fx.Node]) -> bool:
    kwargs: dict[str, Any] = dict(node.kwargs)
    name, write = name_of(node), write_of(name_of(node), node.args, kwargs)
    if write is not None:
        return write.carried and operands == (write.target,)
    if any(_is_held(value, held) for value in kwargs.values()):
        return False
    place = linear_operand(name, node.args, kwargs, [_is_held(value, held) for value in node.args])
    return place is not None and _streams_among(operands) == (node.args[place],)


def _streams_among(operands: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Return the operands but those that are filled, which a trunk value gives as tensors."""
    return tuple(operand for operand in operands if not _is_filled(operand))


def _is_filled(node: fx.Node) -> bool:
    return name_of(node) in ("zeros_like", "ones_like", "full_like")


def container(nodes: Iterable[fx.Node]) -> tuple[Call, ...]:
    """Return the module calls that all of ``nodes`` were made in, outermost first."""
    stacks = [meta.CALLS.of(node) for node in nodes if meta.CALLS.known(node)]
    common = stacks[0]
    for stack in stacks[1:]:
        same = 0
        while same < min(len(common), len(stack)) and common[same] == stack[same]:
            same += 1
        common = common[:same]
    return common


def _holder(residual: Residual, model: nn.Module) -> tuple[Call, ...]:
    """Return the module calls around a residual, up to the innermost that leads from its skip to its add.

    What else the branch is computed from may come from outside, also where that looked at the
    skip (position embeddings that take the hidden states' dtype), but not all of its weights: a module that
    only adds what another made of the skip, and looks at the skip for that once more, holds no branch.
    """
    stack = container((residual.add, *residual.absorbed, *residual.skip_ops))
    weighted = {node for node in residual.region if _is_weighted(node, model)}
    for depth in range(len(stack), 1, -1):
        reached = {residual.skip}
        for node in sorted(inside(residual, stack[depth - 1])):
            if reached.intersection(node.all_input_nodes):
                reached.add(node)
        if all(reached.intersection(term.factors) for term in residual.branch):
            if not weighted or weighted & reached:
                return stack[:depth]
    return stack[:1]


def _is_weighted(node: fx.Node, model: nn.Module) -> bool:
    """Whether an operation has parameters."""
    if node.op == "call_module":
        return next(model.get_submodule(str(node.target)).parameters(), None) is not None
    return any(source.op == "get_attr" for source in node.all_input_nodes)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return everything that ``node`` is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def inside(residual: Residual, call: Call) -> frozenset[fx.Node]:
    """Return the part of a residual's region that is made within a module call."""
    return frozenset(node for node in residual.region if call in meta.CALLS.of(node))


def find_holders(
    residuals: Sequence[Residual], model: nn.Module, refused: Mapping[str, str]
) -> tuple[dict[fx.Node, tuple[Call, ...]], dict[fx.Node, Skipped]]:
    """Return the module calls around each residual's add, and the verdict on residuals that no block can hold.

    Args:
        residuals: found on a tape.
        model: the model that was recorded.
        refused: paths of modules that cannot become blocks, with the reason.
    """
    holders: dict[fx.Node, tuple[Call, ...]] = {}
    homeless: dict[fx.Node, Skipped] = {}
    used = _ancestors(residuals[0].add.graph.output_node()) if residuals else set()
    for residual in residuals:
        stack = _holder(residual, model)
        if residual.add not in used:
            homeless[residual.add] = as_skipped(residual, Reason.UNUSED)
        elif stack[-1].path in refused:
            homeless[residual.add] = as_skipped(residual, Reason.OPAQUE, refused[stack[-1].path])
        else:
            holders[residual.add] = stack
    around = _around_stacks([stack[-1].path for stack in holders.values()], model)
    for residual in residuals:
        if residual.add in holders and holders[residual.add][-1].path in around:
            del holders[residual.add]
            homeless[residual.add] = as_skipped(residual, Reason.OPAQUE, AROUND)
    return holders, homeless


def in_some_calls(
    plan: Plan, residuals: Iterable[Residual], holders: Mapping[fx.Node, tuple[Call, ...]]
) -> list[Residual]:
    """Return the residuals of ``plan`` that are converted in some calls of their module and not in others."""
    calls: dict[str, dict[Call, list[Residual]]] = {}
    for residual in residuals:
        call = holders[residual.add][-1]
        calls.setdefault(call.path, {}).setdefault(call, []).append(residual)
    converted = {r.add for r in plan.residuals}
    uneven = []
    for of_module in calls.values():
        counts = {len(own) for own in of_module.values()}
        if len(of_module) > 1 and len(counts) == 1:
            for same in zip(*of_module.values(), strict=True):
                there = [r for r in same if r.add in converted]
                uneven += there if len(there) < len(same) else []
    return uneven


def _around_stacks(holders: list[str], model: nn.Module) -> list[str]:
    """Return the modules with a few residuals of their own around a stack of blocks with over twice as many."""
    around = []
    for path in sorted(set(holders), key=len):
        below = [p for p in holders if p != path and (not path or p.startswith(path + "."))]
        stacks: dict[str, set[str]] = {}
        for inner in below:
            atoms = inner.split(".")
            for i in range(len(path.split(".")) if path else 0, len(atoms)):
                stack = ".".join(atoms[:i])
                if isinstance(model.get_submodule(stack), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                    stacks.setdefault(stack, set()).add(atoms[i])
        if len(below) > 2 * holders.count(path) and any(len(entries) > 1 for entries in stacks.values()):
            around.append(path)
    return around


def _cut(
    trunks: list[Trunk], homes: Mapping[fx.Node, Call], between: Collection[fx.Node], apart: str
) -> tuple[list[Trunk], list[str]]:
    """Cut trunks where the code between two blocks changes the value."""
    pieces: list[Trunk] = []
    cuts: list[str] = []
    for trunk in trunks:
        adds = {r.add for r in trunk.residuals}
        pending: list[Residual] = []
        for residual in trunk.residuals:
            outside = _changed_on_the_way(residual, trunk, adds, homes, between) if pending else None
            if pending and apart and homes[pending[-1].add] != homes[residual.add]:
                cuts.append(f"before {residual.name}: the code between blocks fails on streams ({apart})")
                pieces.append(_piece(trunk, pending))
                pending = []
            elif outside is not None:
                where = location_of(outside).rsplit("/", 1)[-1]
                cuts.append(f"before {residual.name}: {outside.name} at {where} changes the value between blocks")
                pieces.append(_piece(trunk, pending))
                pending = []
            pending.append(residual)
        pieces.append(_piece(trunk, pending))
    return pieces, cuts


def _cut_unlike(trunks: list[Trunk], cuts: list[str], homes: Mapping[fx.Node, Call]) -> tuple[list[Trunk], list[str]]:
    """Cut trunks after calls that streams go on from where they do not from another call at the same place.

    A block tells its calls apart by the blocks that its streams have passed.
    """
    while unlike := _unlike_ends(trunks, homes):
        pieces = []
        for trunk in trunks:
            pending: list[Residual] = []
            for residual in trunk.residuals:
                pending.append(residual)
                if residual.name in unlike:
                    cuts.append(f"after {residual.name}: other calls of {homes[residual.add].path} end there")
                    pieces.append(_piece(trunk, pending))
                    pending = []
            pieces += [_piece(trunk, pending)] if pending else []
        trunks = pieces
    return trunks, cuts


def _unlike_ends(trunks: Iterable[Trunk], homes: Mapping[fx.Node, Call]) -> set[str]:
    """Return the residuals from which streams go on to another block, and not from those of calls at the same place."""
    steps, leaves = _journey(trunks, homes)
    held: dict[Call, list[Residual]] = {}
    for residual in sorted((r for t in trunks for r in t.residuals), key=lambda r: r.add):
        held.setdefault(homes[residual.add], []).append(residual)
    alike: dict[tuple[str, int], list[Call]] = {}
    for call in held:
        alike.setdefault((call.path, steps[call]), []).append(call)
    unlike: set[str] = set()
    for calls in alike.values():
        ends = [{i for i, r in enumerate(held[call]) if r.name in leaves.get(call, ())} for call in calls]
        by_all = set.intersection(*ends)
        unlike.update(held[call][i].name for call, own in zip(calls, ends, strict=True) for i in own - by_all)
    return unlike


def _journey(trunks: Iterable[Trunk], homes: Mapping[fx.Node, Call]) -> tuple[dict[Call, int], dict[Call, set[str]]]:
    """Return how many calls of its chain come before each, and the residuals from which streams go on to another."""
    steps: dict[Call, int] = {}
    leaves: dict[Call, set[str]] = {}
    for trunk in trunks:
        before: Residual | None = None
        step = 0
        for residual in trunk.residuals:
            call = homes[residual.add]
            if before is not None and homes[before.add] != call:
                leaves.setdefault(homes[before.add], set()).add(before.name)
                step += 1
            steps[call] = max(step, steps.get(call, 0))
            before = residual
    return steps, leaves


def _changed_on_the_way(
    residual: Residual,
    trunk: Trunk,
    adds: set[fx.Node],
    homes: Mapping[fx.Node, Call],
    between: Collection[fx.Node],
) -> fx.Node | None:
    """Return the first operation outside of blocks between a residual and the one before, if any."""
    ends, outside = _on_the_way(residual, trunk, adds, homes, between)
    if not ends <= adds:
        return min(ends - adds)  # the residual before it went: its block stays as it is
    return next(iter(outside), None)


def _piece(trunk: Trunk, residuals: list[Residual]) -> Trunk:
    """Return the part of a trunk that holds ``residuals``, with the operations between them."""
    adds = {r.add for r in residuals}
    carried: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for residual in residuals[1:]:
        carried.update(way_between(residual.skip, trunk.carried, adds))
    return Trunk(trunk.index, tuple(residuals), carried)


def _blocks(  # noqa: C901  # one table of each block
    plan: Plan, homes: Mapping[fx.Node, Call], found: Findings, share_calls: bool
) -> tuple[tuple[BlockPlan, ...], list[str]]:
    steps, leaves = _journey(plan.trunks, homes)
    residuals: dict[Call, list[Residual]] = {}
    order = {node: i for i, node in enumerate(plan.graph_module.graph.nodes)}
    for residual in sorted(plan.residuals, key=lambda r: order[r.add]):
        residuals.setdefault(homes[residual.add], []).append(residual)
    by_path: dict[str, list[Call]] = {}
    for call in residuals:
        by_path.setdefault(call.path, []).append(call)
    carried = _by_call((node, node) for trunk in plan.trunks for node in trunk.carried)
    within = _by_call((r.add, r) for r in found.residuals)
    firsts = {trunk.residuals[0].name for trunk in plan.trunks}
    trunk_of = {r.name: i for i, trunk in enumerate(plan.trunks) for r in trunk.residuals}
    blocks, notes = [], []
    for path, calls in by_path.items():
        several = len(calls) > 1
        sets = {call: tuple(r.key for r in residuals[call]) for call in calls}
        apart = len({(steps[call], sets[call]) for call in calls}) == len({steps[call] for call in calls})
        shared = several and (share_calls or not apart)
        plans = []
        keys: dict[str, str] = {}
        for call in calls:
            like = residuals[calls[0]] if shared else residuals[call]
            local = {r.name: relative(own.name, path) for r, own in zip(residuals[call], like, strict=False)}
            names = {r.add: local[r.name] for r in residuals[call]}
            keys.update((relative(own.name, path), relative_path(own.key, path)) for own in like)
            on_trunks: list[set[str]] = [set() for _ in plan.trunks]
            for name, own_name in local.items():
                on_trunks[trunk_of[name]].add(own_name)
            begun = {local[name] for name in local.keys() & firsts}
            plans.append(
                CallPlan(
                    steps[call],
                    tuple(r.name for r in residuals[call]),
                    identities(replace(found, residuals=tuple(within.get(call, ()))), names, path, len(calls)),
                    frozenset(local[name] for name in leaves.get(call, ())),
                    frozenset(name for own in on_trunks if own & begun for name in own),
                    tuple(map(frozenset, on_trunks)),
                )
            )
        if several:
            distinct = 1 if shared else len(set(sets.values()))
            how = {1: "shared by all", len(calls): "for each"}.get(distinct, "for each place on their trunks")
            why = "" if apart or share_calls else " (its calls are not links of one chain, which would tell them apart)"
            notes.append(f"{path or 'the root'} is called {len(calls)} times: one set of connections {how}{why}.")
        nodes = [node for call in calls for node in carried.get(call, ())]
        for residual in (r for call in calls for r in residuals[call]):
            nodes += (residual.add, *residual.absorbed, *residual.skip_ops)
        scopes = scopes_of(nodes, (r for call in calls for r in residuals[call]), path)
        within_it = f"{path}." if path else ""
        listed = frozenset(
            (relative_path(s.module, path), s.location)
            for s in found.skipped
            if s.module == path or s.module.startswith(within_it)
        )
        blocks.append(BlockPlan(path, scopes, tuple(plans), keys, shared, listed=listed))
    counted = any(len({call.step for call in block.calls}) > 1 for block in blocks)
    return tuple(replace(block, counted=counted) for block in blocks), notes


def _by_call(made: Iterable[tuple[fx.Node, T]]) -> dict[Call, list[T]]:
    """Return things by the module calls around the nodes that they come with."""
    found: dict[Call, list[T]] = {}
    for node, thing in made:
        for call in meta.CALLS.of(node):
            found.setdefault(call, []).append(thing)
    return found
