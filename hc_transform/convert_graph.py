"""scope="graph": the model as one FX graph."""

from __future__ import annotations

from typing import Any

from torch import nn

from .capture.tape import Tape
from .capture.trace import bind_inputs
from .errors import HCTransformError
from .models.copies import clone_structure, in_other_mode, uncompile
from .request import OPTIMIZER_NOTE, Example, Request
from .residuals.analysis import Analysis, analyse
from .residuals.keys import added_modules
from .residuals.observation import Observation
from .residuals.planner import Plan
from .residuals.report import report_of
from .rewriting.new_modules import make_connections, new_modules, other_parameters
from .running.graph_model import HyperConnectedModule
from .running.variants import decides_on_training
from .verification.verify import Seen, verify


def convert_graph(
    model: nn.Module, example: Example | None, observed: Observation, request: Request
) -> tuple[HyperConnectedModule, Plan]:
    """Return the model as one graph, and its plan.

    Args:
        model: the original.
        example: inputs to trace it with; None to trace without values.
        observed: what is seen of it.
        request: what it is to become.
    """
    inputs = None if example is None else bind_inputs(model, *example)
    analysis = analyse(model, observed, inputs, request.options, request.hints)
    connections = make_connections(analysis.plan)
    modules = new_modules(connections, analysis.plan)
    original = uncompile(clone_structure(model), analysis.trace.inlined)
    converted = HyperConnectedModule(original, analysis, modules, request.hints)
    notes, error = [OPTIMIZER_NOTE], None
    if example is not None and decides_on_training(analysis.trace.graph_module.graph):
        with in_other_mode(converted):  # now, for compiled code cannot
            notes += filter(None, [trace_mode(converted, *example).strip()])
    if example is None:
        notes.insert(0, "Not verified: there are no example inputs. Give them with args= to compare the outputs.")
    elif request.verify:
        seen = _seen(analysis, converted, observed.tape)
        found = verify(model, converted, seen, *example, expected=observed.ran)
        error = found.error
        notes.insert(0, found.note)
    others = other_parameters(modules.values(), connections)
    converted.hc_report = report_of(analysis.plan, connections, error, tuple(notes), others)
    return converted, analysis.plan


def _seen(analysis: Analysis, converted: HyperConnectedModule, tape: Tape | None) -> Seen | Plan:
    """Return the recorded run, which knows nothing of our tracer, where it is a measure; else the plan on the trace."""
    plan, chosen = analysis.plan, analysis.chosen
    if tape is None or chosen is None or tape.reads_values or tape.closes_over:
        return plan
    if _on_trunks(chosen) != _on_trunks(plan):
        return plan
    return Seen(chosen, tape.graph_module, tape.named_inputs, added_modules(converted), tape)


def _on_trunks(plan: Plan) -> list[list[str]]:
    return [[residual.name for residual in trunk.residuals] for trunk in plan.trunks]


def trace_mode(converted: HyperConnectedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Trace the mode that the model is in; return what is to be said where that is not the same code."""
    mode = "training" if converted.training else "eval"
    try:
        variant = converted.trace_variant(args, kwargs)
    except HCTransformError as error:
        return f" In {mode} mode calls are refused: {error}"
    if variant.left_out and not variant.needs.values:
        return (
            f" In {mode} mode its code does without {', '.join(variant.left_out)}, whose connections do nothing then."
        )
    return ""
