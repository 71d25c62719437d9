"""The passes in a row: trace, find, plan; with only the scopes that matter; and again for other calls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..capture.kinds import Kinds
from ..capture.trace import Trace, trace
from ..errors import TraceError
from ..graphs import meta
from ..models.selection import Hints
from ..options import Options
from .find import find_residuals
from .findings import Findings
from .identity import Identity, identities, operation, recognised, way_after, with_ways
from .passage import Passage
from .planner import Plan, make_plan, refuse_nonlinear
from .probe import opaque_adds
from .trunks import Trunk, flow_of
from .unused import without_unused

log = logging.getLogger("hc_transform")


@dataclass(frozen=True)
class Analysis:
    """The plan of a model, the trace it was made on, and what all residuals of that trace are known by."""

    plan: Plan
    trace: Trace
    known: tuple[Identity, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the residuals that were converted and that this trace does without."""
        there = {residual.name for residual in self.plan.residuals}
        return tuple(str(identity.name) for identity in self.known if identity.name and identity.name not in there)


def analyse(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    options: Options,
    hints: Hints | None = None,
) -> Analysis:
    """Trace ``model``, find its residuals and plan their conversion.

    The first trace goes into every module whose code adds, to give each add a verdict. The second
    goes only into modules that hold a residual to convert, so that the graph stays readable and all
    other modules keep their Python.
    """
    wide = trace(model, inputs, hints=hints)
    findings = find_residuals(wide.graph_module)
    plan = make_plan(wide.graph_module, without_unused(findings), options)
    plan = replace(plan, skipped=(*plan.skipped, *opaque_adds(model, wide)))
    scopes = _scopes(plan)
    if scopes == wide.inlined:
        return _known(Analysis(plan, wide), findings)
    # Should fewer scopes give another plan: all but those whose code decides on values, where that is of no use.
    fallback = frozenset(p for p in wide.inlined if p in scopes or not _within(p, wide.deciders))
    for inline in (scopes, fallback) if fallback != wide.inlined else (scopes,):
        narrow = trace(model, inputs, inline=inline, hints=hints)
        found = find_residuals(narrow.graph_module)
        wanted = {r.name for r in plan.residuals}
        chosen = tuple(r for r in found.residuals if r.name in wanted)
        again = make_plan(narrow.graph_module, Findings(chosen, (), found.shortcuts), _chosen_already(options))
        names = [r.name for r in plan.residuals]
        if [r.name for r in again.residuals] == names and len(again.trunks) == len(plan.trunks):
            return _known(Analysis(replace(again, skipped=plan.skipped, options=plan.options), narrow), found)
    return _known(Analysis(plan, wide), findings)


def analyse_again(  # noqa: PLR0913  # what the first trace knew
    model: nn.Module,
    inputs: Mapping[str, Any],
    options: Options,
    hints: Hints | None,
    inline: frozenset[str],
    known: tuple[Identity, ...],
    change: object = None,
    observed: frozenset[str] = frozenset(),
    loose: bool = False,
) -> Analysis:
    """Trace a model once more for a call of another kind, and plan the residuals that were converted.

    Args:
        model: as it was before conversion.
        inputs: of the call.
        options, hints: as for the first trace.
        inline: paths of the modules to trace into.
        known: what all residuals of the first trace are known by.
        change: what this call decides otherwise.
        observed, loose: see :func:`hc_transform.capture.trace.trace`.

    Raises:
        TraceError: a residual that was converted cannot be told, or there are new ones.
    """
    traced = trace(model, inputs, inline=inline, hints=hints, observed=observed, loose=loose)
    findings = find_residuals(traced.graph_module)
    selected, _, extra = recognised(findings, known, traced.opaque, change)
    if extra and not loose:
        raise TraceError(
            f"for these inputs the model has other residuals than those that were converted: "
            f"{', '.join(r.name for r in extra)} at {extra[0].location}. {change or ''} Convert another copy of the "
            "model with example inputs like these."
        )
    plan = make_plan(traced.graph_module, Findings(selected, (), findings.shortcuts), _chosen_already(options))
    lost = {r.name for r in selected} - {r.name for r in plan.residuals}
    if lost:
        raise TraceError(
            f"for these inputs the residuals {', '.join(sorted(lost))} cannot be converted as they were. "
            f"{change or ''} Convert another copy of the model with example inputs like these, or leave them out with "
            "exclude=[...]."
        )
    if any(identity.name not in {r.name for r in selected} for identity in known if identity.name):
        passage = Passage(Kinds(traced.graph_module), adds=[r.add for r in plan.residuals])
        plan = replace(plan, trunks=tuple(_with_ends(trunk, known, passage) for trunk in plan.trunks))
        refuse_nonlinear(plan.trunks, passage.kinds, options)
    return Analysis(replace(plan, options=options), traced, known)


def log_left_out(name: str, analysis: Analysis) -> None:
    """Say which residuals a call of a new kind does without; where it drew lots, that is what was to be expected."""
    if analysis.left_out:
        level = logging.INFO if analysis.trace.deciders else logging.WARNING
        names = ", ".join(analysis.left_out)
        log.log(level, "%s: this kind of call does without the residuals %s", name or "the model", names)


def _chosen_already(options: Options) -> Options:
    """Return the options for residuals that an earlier plan chose."""
    return replace(options, include=(), exclude=(), min_residuals=1, nested="all")


def _known(analysis: Analysis, findings: Findings) -> Analysis:
    names = {r.add: r.name for r in analysis.plan.residuals}
    return replace(analysis, known=with_ways(identities(findings.residuals, names), analysis.plan.trunks))


def _with_ends(trunk: Trunk, known: Sequence[Identity], passage: Passage) -> Trunk:
    """Return a trunk whose streams go as far as they would if the residuals that are left out after it were there."""
    way = way_after(trunk.residuals[-1].name, known)
    if not way:
        return trunk
    flow, last = flow_of(trunk.residuals, passage), trunk.residuals[-1].add
    carried, ends = dict(trunk.carried), []
    node = last.next
    while node.op != "output":
        if operation(node) in way and node not in carried and flow.trunk_value(node) is last:
            carried.update(flow.way_to(node))
            ends.append(node)
        node = node.next
    return replace(trunk, carried=carried, ends=tuple(ends))


def _within(path: str, roots: frozenset[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots if root)


def _scopes(plan: Plan) -> frozenset[str]:
    """Return the paths of modules to trace into: those that add for a converted residual, and their parents."""
    scopes = {""}
    nodes = {node for trunk in plan.trunks for node in trunk.carried}
    for residual in plan.residuals:
        nodes.update((residual.add, *residual.absorbed))
    for node in nodes:
        atoms = str(meta.MODULE.of(node)).split(".")
        scopes.update(".".join(atoms[: i + 1]) for i in range(len(atoms)))
    return frozenset(scopes)
