"""The passes in a row: trace, find, plan; and once more with only the scopes that matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .find import find_residuals
from .findings import Findings
from .hints import Hints
from .options import Options
from .planner import Plan, make_plan
from .probe import opaque_adds
from .trace import Trace, trace


@dataclass(frozen=True)
class Analysis:
    """The plan of a model, and the trace it was made on."""

    plan: Plan
    trace: Trace


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
    plan = make_plan(wide.graph_module, findings, options)
    plan = replace(plan, skipped=(*plan.skipped, *opaque_adds(model, wide)))
    scopes = _scopes(plan)
    if scopes == wide.inlined:
        return Analysis(plan, wide)
    narrow = trace(model, inputs, inline=scopes, hints=hints)
    wanted = {r.name for r in plan.residuals}
    found = find_residuals(narrow.graph_module)
    again = make_plan(
        narrow.graph_module,
        Findings(tuple(r for r in found.residuals if r.name in wanted), (), found.shortcuts),
        replace(options, include=(), exclude=(), min_residuals=1),
    )
    if [r.name for r in again.residuals] != [r.name for r in plan.residuals] or len(again.trunks) != len(plan.trunks):
        return Analysis(plan, wide)
    return Analysis(replace(again, skipped=plan.skipped, options=options), narrow)


def _scopes(plan: Plan) -> frozenset[str]:
    """Return the paths of modules to trace into: those that add for a converted residual, and their parents."""
    scopes = {""}
    nodes = {node for trunk in plan.trunks for node in trunk.carried}
    for residual in plan.residuals:
        nodes.update((residual.add, *residual.absorbed))
    for node in nodes:
        atoms = str(node.meta.get("hc_module", "")).split(".")
        scopes.update(".".join(atoms[: i + 1]) for i in range(len(atoms)))
    return frozenset(scopes)
