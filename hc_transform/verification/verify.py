"""Compare a converted model with its original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.trace import bind_inputs
from ..connections.trunk_ends import StreamDropout
from ..errors import DecisionChanged, NotEquivalent
from ..graphs import meta
from ..graphs.dialects import inputs_of
from ..models.compare import Comparison, compare, relative_error
from ..models.copies import copy_inputs, doubled_modules
from ..residuals.keys import added_modules
from ..residuals.planner import Plan
from ..residuals.trunks import nest
from ..threads import again_beside_threads
from .pairs import Pair, failures_of, judge_start, run_like, tolerance_of
from .reference import NamedInputs, ReferenceInterpreter, separate
from .rounding import OUTPUTS, Judgement, Rounding, judge, largest_error

__all__ = ["Verification", "relative_error", "run_like", "tolerance_of", "verify"]

DECIDES = "the model decides on values of tensors, which other streams change"
# For separated streams, whose sums the reference rounds in another order and the layers amplify. A stream
# in a wrong place shows at about 1e-1. Half precision is not compared so. Where either bound is exceeded, what
# rounding does to the model is measured.
STREAM_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}


@dataclass(frozen=True)
class Verification:
    """What verification found.

    Attributes:
        error: the largest relative error of the outputs; None if nothing could be compared.
        apart: why the streams were not compared with coefficients off their start; "" if they were.
        unseen: what of the outputs was not compared.
        scaled: whether the outputs are others by definition (``readout="sum"``).
        rounding: what rounding explains of errors above the usual bounds.
        unclear: why it cannot be told whether the outputs differ by rounding; "" if it can.
    """

    error: float | None
    apart: str = ""
    unseen: tuple[str, ...] = ()
    scaled: bool = False
    rounding: tuple[str, ...] = ()
    unclear: str = ""

    @property
    def note(self) -> str:
        """What the report says of it."""
        shown = ", ".join(self.unseen[:3]) + (" and others" if len(self.unseen) > 3 else "")
        if self.error is None:
            return f"Not verified: the output holds no value to compare{': ' + shown if shown else ''}."
        unseen = f" Not compared: {shown}." if shown else ""
        unseen = "".join(f" {text[:1].upper()}{text[1:]}." for text in self.rounding) + unseen
        if self.scaled:
            streams = f"Nor were its streams: {self.apart}." if self.apart else "Its streams agree with the reference."
            return f"Not verified: readout='sum' gives other outputs than the original. {streams}{unseen}"
        if self.unclear:
            return f"Not verified: the outputs differ by {self.error:.1e} (relative), and {self.unclear}.{unseen}"
        if self.apart:
            return (
                f"Verified on the example inputs at the start alone, where all streams are alike: largest relative "
                f"error {self.error:.1e}. Not verified with separated streams: {self.apart}.{unseen}"
            )
        return f"Verified on the example inputs: largest relative error {self.error:.1e}.{unseen}"


@again_beside_threads
def verify(
    original: nn.Module,
    converted: fx.GraphModule,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: Any = None,
) -> Verification:
    """Compare a converted model with its original on the example inputs.

    Both run in the model's present mode with the same random seeds. Equal outputs at the start do not
    show that each stream goes where it should, for then all streams are equal; so the streams after
    each residual are compared once more, with coefficients moved off their start, to those of
    :class:`ReferenceInterpreter`. ``expected`` is what :func:`run_like` returns for the
    original, if that is known already.

    Raises:
        NotEquivalent: an error is above the bound of the dtype. Names the first residual after
            which the values differ.
        HCTransformError: the reference itself, or the converted model with separated streams, fails.
    """
    if expected is None:
        expected = run_like(original, args, kwargs)
    where, apart = None, not_covered(plan)
    start = judged = Judgement()
    bound = tolerance_of(expected, original)
    with without_stream_dropout(converted):
        found = outputs_compared(converted, plan, args, kwargs, expected)
        pair = _Graphs(original, converted, plan, args, kwargs)
        covered = plan.residuals and not apart
        if covered:
            try:
                with separated(pair.connections, plan):
                    judged = judge(pair)
                where, apart = described_difference(plan, judged.wrong), judged.unclear
            except DecisionChanged:
                apart = DECIDES
        if is_wrong(found, bound, plan) and where is None:
            start = judge_start(pair, found.error) if covered else Judgement({OUTPUTS: found.error})
    if start.wrong or where is not None:
        raise not_equivalent(original, found, bound, where)
    return result_of(found, plan, apart, start, judged.explained)


def outputs_compared(
    converted: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any], expected: Any
) -> Comparison:
    """Return how the outputs of the converted model compare with the original's."""
    return compare(run_like(converted, args, kwargs), expected, dtypes=plan.options.readout != "sum")


def is_wrong(found: Comparison, bound: float, plan: Plan) -> bool:
    """Whether outputs differ that should not; with ``readout="sum"`` they are n times the original's by definition."""
    return not found.error <= bound and plan.options.readout != "sum"


def result_of(found: Comparison, plan: Plan, apart: str, start: Judgement, explained: str) -> Verification:
    """Return what is to be reported of outputs that agree.

    Args:
        found: how they compare.
        plan: what was converted.
        apart: why the streams were not compared with coefficients off their start; "" if they were.
        start: what is said of outputs that differ by more than the usual bound.
        explained: what rounding explains of streams that do; "" if they do not.
    """
    error = found.error if found.values else None
    rounding = tuple(filter(None, (start.explained, explained)))
    return Verification(error, apart, found.unseen, plan.options.readout == "sum", rounding, start.unclear)


def not_equivalent(original: nn.Module, found: Comparison, bound: float, where: str | None) -> NotEquivalent:
    """Return the error of a converted model that differs from its original."""
    place = f" in {found.where}" if found.where.startswith((".", "[")) else ""
    return NotEquivalent(
        f"the converted {type(original).__name__} differs from the original by {found.error:.1e}{place} (relative; at "
        f"most {bound:.0e} was expected); {where or 'no residual differs by itself'}. Leave that residual out with "
        "exclude=[...], keep its module whole with leaf_modules=[...], or report the model."
    )


def not_covered(plan: Plan) -> str:
    """Return why the reference cannot tell what separated streams are to be; "" if it can."""
    for i, trunk in enumerate(plan.trunks):
        for other in plan.trunks[i + 1 :]:
            if nest(trunk.residuals, other.residuals):
                inner = other.residuals[0].name
                return f"the reference knows no trunk within a branch of another (nested='all', {inner})"
    return ""


class _Graphs(Pair):
    """The graph of a plan beside the one that it became, or copies of both."""

    module: nn.Module | None = None  # that the plan's graph runs on

    @property
    def connections(self) -> nn.Module:
        """The modules that conversion added."""
        return nn.ModuleList(added_modules(self.converted).values())

    def reference(self, rounding: Rounding | None = None) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the outputs and the streams of the reference.

        Raises:
            HCTransformError: it cannot be run.
        """
        module = self.module or self.plan.graph_module
        reference = ReferenceInterpreter(self.plan, added_modules(self.converted), module, rounding)
        reference.wide = self.wide
        given = self._given()
        with failures_of("the reference implementation", self.original):
            return run_like(module, (), given, reference.run_on), reference.written

    def differences(self) -> dict[str, float]:
        """Return the errors of streams above the usual bound.

        Raises:
            HCTransformError: one of the two cannot be run with separated streams.
            DecisionChanged: the graph decides on values that are others then.
        """
        graph: Any = self.converted
        recorder = _Recorder(graph, dict(self.reference()[1]))
        recorder.wide = self.wide
        given = self._given()
        with failures_of("the converted graph", self.original):
            run_like(self.converted, (), given, recorder.run_on)
        return recorder.wrong

    def _given(self) -> dict[str, Any]:
        """Return the inputs by the names of the graph's placeholders."""
        given = inputs_of(self.plan.graph_module, self.args, self.kwargs)
        return bind_inputs(self.original, self.args, self.kwargs) if given is None else given

    def copied(self) -> _Graphs:
        """Return copies in double precision."""
        module = self.module or self.plan.graph_module
        original, converted, module = doubled_modules(self.original, self.converted, module)
        inputs = copy_inputs((self.args, self.kwargs), double=True)
        pair = _Graphs(original, converted, self.plan, *inputs)
        pair.module, pair.wide = module, True
        return pair


@contextmanager
def separated(connections: nn.Module, plan: Plan) -> Iterator[None]:
    """Move all coefficients of ``plan`` off their start, and put them back on exit."""
    start = [(value, value.detach().clone()) for value in (*connections.parameters(), *connections.buffers())]
    try:
        separate(connections, max((len(t.residuals) for t in plan.trunks), default=1))
        yield
    finally:
        with torch.no_grad():
            for value, before in start:
                value.copy_(before)


def described_difference(plan: Plan, wrong: Mapping[str, float]) -> str | None:
    """Return a phrase that names the first residual of ``plan`` in ``wrong``, errors by name."""
    for residual in plan.residuals:
        if residual.name in wrong:
            error = wrong[residual.name]
            return f"the first difference, {error:.1e}, is after the residual {residual.name} ({residual.location})"
    return None


def streams_error(streams: Any, expected: Tensor) -> float:
    """Return the largest error of streams, expected as ``[n, ...]``; 0 if it is within the bound."""
    streams, expected = [stream.detach() for stream in streams], expected.to(streams[0].dtype)
    if len(streams) != len(expected):
        return math.inf
    error = largest_error(streams, expected)
    return 0.0 if error <= STREAM_TOLERANCES.get(expected.dtype, math.inf) else error


@contextmanager
def without_stream_dropout(converted: nn.Module) -> Iterator[None]:
    """Switch the dropout that conversion adds off: it is no part of the original."""
    modules = [m for m in converted.modules() if isinstance(m, StreamDropout)]
    modes = [m.training for m in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


class _Recorder(NamedInputs):
    """Compare the streams after each residual with those of the reference, ``[n, ...]``, which are freed."""

    def __init__(self, gm: fx.GraphModule, expected: dict[str, Tensor]) -> None:
        super().__init__(gm)
        self.expected = expected
        self.wrong: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = meta.RESIDUAL.of(n)
        if name is not None:  # at once: what comes next may overwrite the streams
            if error := streams_error(value, self.expected.pop(name)):
                self.wrong[name] = error
        return value
