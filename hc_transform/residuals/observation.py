"""One look at a model: its only real run, recorded, or without example inputs a trace without values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from ..capture.tape import Tape, record
from ..capture.trace import trace
from ..models.selection import Hints
from .find import find_residuals
from .findings import Findings, Skipped
from .probe import opaque_adds, residuals_in_leaves


@dataclass(frozen=True)
class Observation:
    """What is seen of a model: every later pass plans on it.

    Attributes:
        graph_module: what it computes, in order.
        findings: a verdict on each of its adds.
        tape: the run that this was recorded from; None if nothing was run.
        hidden: verdicts on modules that were not seen into.
        refused: modules that stay whole in any graph, with the reason.
        ran: the model on the example inputs; None if it was not. What records a run may keep torch from its fast
            paths, which round otherwise.
    """

    graph_module: fx.GraphModule
    findings: Findings
    tape: Tape | None
    hidden: tuple[Skipped, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    ran: Any = None

    @property
    def asks_layout(self) -> bool:
        """Whether code asked how a tensor lies in memory."""
        return self.tape is not None and self.tape.asks_layout

    def stays_whole(self, path: str) -> str | None:
        """Return why the code of a module is in no graph, None if it may be."""
        return next((why for p, why in self.refused.items() if path == p or path.startswith(p + ".")), None)


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], hints: Hints) -> Observation:
    """Run ``model`` once on example inputs and return what is seen of it.

    Raises:
        PatternError: a hint names no module.
    """
    leaves = dict.fromkeys(hints.chosen("leaf_modules", model), "leaf_modules names it")
    hints.chosen("inline_modules", model)
    tape = record(model, args, kwargs)
    hidden = tuple(residuals_in_leaves(model, tape.leaves))
    return Observation(tape.graph_module, find_residuals(tape.graph_module), replace(tape, leaves={}), hidden, leaves)


def observe_unrun(model: nn.Module, hints: Hints) -> Observation:
    """Return what is seen of a model without example inputs, in the code of every module that adds.

    Raises:
        PatternError: a hint names no module.
        TraceError: the root's own code cannot be traced.
    """
    seen = trace(model, None, hints=hints)
    hidden = tuple(opaque_adds(model, seen))
    return Observation(seen.graph_module, find_residuals(seen.graph_module), None, hidden, dict(seen.opaque))
