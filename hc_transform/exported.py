"""Convert programs of torch.export: their graph is there already, so that nothing is traced."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from .capture.trace import describe
from .errors import NEVER_HIDDEN, TraceError, UnsupportedModel
from .graphs.dialects import is_complete
from .options import Options
from .request import OPTIMIZER_NOTE, Example, Request
from .residuals.find import find_residuals
from .residuals.findings import Reason
from .residuals.planner import Plan, make_plan
from .residuals.report import has_nothing, nothing_to_convert, report_of
from .residuals.unused import without_unused
from .rewriting.new_modules import make_connections, new_modules, other_parameters
from .rewriting.rewrite import rewrite
from .verification.verify import run_whole, verify

BAKED = (
    "The graph is what torch.export or Dynamo made of the model: its mode (training or eval) and its decisions are as "
    "they were then, and it is not traced again."
)


def is_exported(model: Any) -> bool:
    """Whether ``model`` is an exported program, or a graph that torch.export or Dynamo made."""
    return isinstance(model, ExportedProgram) or isinstance(model, fx.GraphModule) and is_complete(model)


def refuse_choices(**choices: bool) -> None:
    """Raise UnsupportedModel for an option that was given and that only a model in Python can have."""
    for option, given in choices.items():
        if given:
            raise UnsupportedModel(
                f"{option} needs the model's Python code, and an exported program is one graph: leave it out, or "
                "convert the model before it is exported"
            )


def plan_exported(program: Any, options: Options) -> Plan:
    """Return the plan of an exported program.

    One that writes into memory of several names is taken in its functional form where more residuals are seen so.
    """
    if not isinstance(program, ExportedProgram):
        return _plan_of(program, options)
    plan = _plan_of(program.module(), options)
    if any(s.reason is Reason.SHARED_MEMORY for s in plan.skipped):
        functional = _plan_of(program.run_decompositions({}).module(), options)
        return functional if len(functional.residuals) > len(plan.residuals) else plan
    return plan


def _plan_of(gm: fx.GraphModule, options: Options) -> Plan:
    return make_plan(gm, without_unused(find_residuals(gm)), options)


def carried_example(program: Any) -> Example | None:
    """Return the inputs that a program carries, None if it carries none."""
    carried = program.example_inputs if isinstance(program, ExportedProgram) else None
    return None if carried is None else (tuple(carried[0]), dict(carried[1]))


def convert_exported(program: Any, example: Example | None, request: Request) -> tuple[nn.Module, Plan]:
    """Return the graph of an exported program with its residuals converted, and its plan.

    It takes the inputs that the program takes, and returns the same structure.

    Args:
        program: exported, or a graph that torch.export or Dynamo made.
        example: inputs to compare the outputs on, by default those that the program carries.
        request: what it is to become.

    Raises:
        TraceError: the program itself fails on the example inputs.
        NotEquivalent: verification failed.
    """
    plan = plan_exported(program, request.options)
    if has_nothing(plan):
        raise nothing_to_convert(plan.graph_module, plan)
    if example is None:
        example = carried_example(program)
    original = plan.graph_module
    connections = make_connections(plan)
    modules = new_modules(connections, plan)
    converted = rewrite(original, plan, connections=connections)
    notes, error = [BAKED, OPTIMIZER_NOTE], None
    if example is None:
        notes.insert(0, "Not verified: there are no example inputs. Give them with args= to compare the outputs.")
    elif request.verify:
        try:
            expected = run_whole(original, *example)
        except NEVER_HIDDEN:
            raise
        except Exception as failure:
            raise TraceError(
                f"the exported program itself fails on the example inputs: {describe(failure)}. Give inputs with args= "
                "and kwargs= that it was exported for."
            ) from failure
        found = verify(original, converted, plan, *example, expected=expected)
        error = found.error
        notes.insert(0, found.note)
    report = report_of(plan, connections, error, tuple(notes), other_parameters(modules.values(), connections))
    kept = {**converted.meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {}), "hc_report": report}
    converted.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = kept  # which copies have too
    converted.__dict__["hc_report"] = report
    return converted, plan
