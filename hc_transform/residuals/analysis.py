"""From what was seen of a model to its plan, and to the graph of its code that the plan is carried out on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..capture.kinds import Kinds
from ..capture.trace import Trace, trace
from ..errors import HCTransformError, TraceError, UnsupportedModel
from ..models.selection import Hints
from ..options import Options
from .find import find_residuals
from .findings import Findings, Reason, Residual, Skipped
from .identity import (
    Identity,
    hidden_by,
    identities,
    operation,
    recognised,
    refuse_hidden,
    scopes_of,
    stayed_whole,
    way_after,
    with_ways,
)
from .observation import Observation
from .passage import Passage
from .planner import Plan, choose, plan_again, refuse_nonlinear, with_keys_of
from .report import has_nothing, nothing_to_convert
from .trunks import Trunk, as_skipped, flow_of
from .unused import without_unused

log = logging.getLogger("hc_transform")

ATTEMPTS = 20  # times that a plan turns out to hold what no graph of the code shows
NOT_SHOWN = "a graph of its code does not show it"


@dataclass(frozen=True)
class Analysis:
    """A plan as it is carried out on a trace.

    Attributes:
        plan: on the graph of the trace.
        trace: of the model's code.
        known: what all residuals of the trace are known by.
        chosen: the plan as it was made, on what was seen of the model; None for a later call.
    """

    plan: Plan
    trace: Trace
    known: tuple[Identity, ...] = ()
    chosen: Plan | None = None

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the residuals that were converted and that this trace does without."""
        there = {residual.name for residual in self.plan.residuals}
        return tuple(str(identity.name) for identity in self.known if identity.name and identity.name not in there)


def analyse(
    model: nn.Module,
    observed: Observation,
    inputs: Mapping[str, Any] | None,
    options: Options,
    hints: Hints,
) -> Analysis:
    """Plan the conversion of what was seen of ``model``, and trace its code for one graph of the whole.

    Only modules that hold a residual to convert are traced into, so that the graph stays readable and all others keep
    their Python. What turns out to be in a module that stays whole is left plain, and the plan made anew.

    Args:
        model: as it is before conversion.
        observed: what was seen of it.
        inputs: example values by parameter name; None to trace without.
        options, hints: of the request.

    Raises:
        NothingToConvert: no residual is left.
        TraceError: the root's own code cannot be traced.
    """
    refused: dict[str, str] = {}  # residuals, by their names
    for _ in range(ATTEMPTS):
        plan = _plan_of(observed, options, refused)
        if has_nothing(plan):
            raise nothing_to_convert(model, plan)
        known = identities(observed.findings, {r.add: r.name for r in plan.residuals})
        nonlinear: UnsupportedModel | None = None
        missing: dict[str, str] = {}
        for traced in _traces(model, inputs, _scopes(plan), hints):
            try:
                analysis, missing, for_good = _captured(plan, known, traced)
            except UnsupportedModel as error:  # a module that it did not go into is not linear, for all it knows
                nonlinear = error
                continue
            nonlinear = None
            if for_good or not missing and len(analysis.plan.trunks) == len(plan.trunks):
                break
        if nonlinear is not None:
            raise nonlinear
        if not missing:
            return analysis
        refused.update(missing)
    raise HCTransformError(
        f"more than {ATTEMPTS} plans of {type(model).__name__} hold residuals that no graph shows, among them "
        f"{', '.join(list(refused)[:3])}: {next(iter(refused.values()))}"
    )


def _captured(plan: Plan, known: Sequence[Identity], traced: Trace) -> tuple[Analysis, dict[str, str], bool]:
    """Return a plan as it is carried out on a graph, with its keys and verdicts.

    And why residuals are not in that graph, by their names, and whether no other graph has them.
    """
    findings = find_residuals(traced.graph_module)
    residuals, absent, extra = recognised(findings, known)
    captured = plan_again(traced.graph_module, Findings(residuals, (), findings.shortcuts), plan.options)
    captured = with_keys_of(captured, {r.name: r.key for r in plan.residuals}, {})
    captured = replace(captured, skipped=plan.skipped)
    names = {r.add: r.name for r in captured.residuals}
    whole = {str(k.name): stayed_whole(k, traced.opaque) for k in absent}
    missing = {str(k.name): whole[str(k.name)] or hidden_by(k, findings, extra) or NOT_SHOWN for k in absent}
    missing.update({r.name: NOT_SHOWN for r in residuals if r.name not in names.values()})
    ways = with_ways(identities(findings, names), captured.trunks)
    return Analysis(captured, traced, ways, plan), missing, any(whole.values())


def _plan_of(observed: Observation, options: Options, refused: Mapping[str, str]) -> Plan:
    """Return the plan of what was seen, without residuals that are refused by their names or in modules that are."""
    findings = without_unused(observed.findings)
    kept: list[Residual] = []
    out: list[Skipped] = []
    for residual in findings.residuals:
        why = refused.get(residual.name) or observed.stays_whole(residual.module)
        if why is None:
            kept.append(residual)
        else:
            out.append(as_skipped(residual, Reason.OPAQUE, why))
    plan = choose(observed.graph_module, replace(findings, residuals=tuple(kept)), options)
    layout = plan.options.keep_layout or observed.asks_layout
    skipped = (*plan.skipped, *out, *observed.hidden)
    return replace(plan, skipped=skipped, options=replace(plan.options, keep_layout=layout))


def _traces(
    model: nn.Module, inputs: Mapping[str, Any] | None, scopes: frozenset[str], hints: Hints
) -> Iterator[Trace]:
    """Yield traces that go into the modules that hold residuals alone, and into more of them.

    Should fewer give other trunks: all that may add but those whose code decides on values, where that is of no use,
    and all.
    """
    yield trace(model, inputs, inline=scopes, hints=hints)
    wide = trace(model, inputs, hints=hints)
    fewer = frozenset(p for p in wide.inlined if p in scopes or not _within(p, wide.deciders))
    if fewer != wide.inlined:
        yield trace(model, inputs, inline=fewer, hints=hints)
    yield wide


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
    listed: Collection[tuple[str, str]] = (),
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
        listed: modules and lines of adds that are none in the model, which may be residuals for all that this sees.

    Raises:
        TraceError: a residual that was converted cannot be told, or there are new ones.
    """
    traced = trace(model, inputs, inline=inline, hints=hints, observed=observed, loose=loose)
    findings = find_residuals(traced.graph_module)
    selected, missing, new = recognised(findings, known)
    extra = [residual for residual in new if (residual.module, residual.location) not in listed]
    for identity in missing:
        why = stayed_whole(identity, traced.opaque) or hidden_by(identity, findings, extra)
        refuse_hidden(identity, why, change)
    if extra:
        raise TraceError(
            f"for these inputs the model has other residuals than those that were converted: "
            f"{', '.join(r.name for r in extra)} at {extra[0].location}. {change or ''} Convert another copy of the "
            "model with example inputs like these."
        )
    plan = plan_again(traced.graph_module, Findings(selected, (), findings.shortcuts), options)
    lost = {r.name for r in selected} - {r.name for r in plan.residuals}
    if lost:
        raise TraceError(
            f"for these inputs the residuals {', '.join(sorted(lost))} cannot be converted as they were. "
            f"{change or ''} Convert another copy of the model with example inputs like these, or leave them out with "
            "exclude=[...]."
        )
    if missing:
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
    nodes = {node for trunk in plan.trunks for node in trunk.carried}
    for residual in plan.residuals:
        nodes.update((residual.add, *residual.absorbed))
    return scopes_of(nodes, plan.residuals)
