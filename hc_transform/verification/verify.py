"""Compare a converted model with its original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..capture.trace import bind_inputs
from ..connections.trunk_ends import StreamDropout
from ..errors import DecisionChanged, HCTransformError, NotEquivalent
from ..graphs.dialects import inputs_of
from ..models.compare import Comparison, compare, relative_error
from ..residuals.keys import added_modules
from ..residuals.planner import Plan
from ..residuals.trunks import nest
from ..threads import again_beside_threads
from .pairs import DECIDES, Pair, Ran, Seen, judge_start, run_like, run_whole, tolerance_of
from .reference import separate
from .rounding import OUTPUTS, Judgement, judge

__all__ = ["Ran", "Seen", "Verification", "relative_error", "run_like", "run_whole", "tolerance_of", "verify"]


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
    converted: nn.Module,
    plan: Plan | Seen,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: Ran | None = None,
) -> Verification:
    """Compare a converted model with its original on the example inputs.

    Both run in the model's present mode with the same random seeds. Equal outputs at the start do not
    show that each stream goes where it should, for then all streams are equal; so the streams after
    each residual, and the outputs, are compared once more, with coefficients moved off their start, to those of
    :class:`ReferenceInterpreter`.

    Args:
        original, converted: the models.
        plan: what was converted, on a graph of the original's code; or another graph of it that says what streams are.
        args, kwargs: the example inputs.
        expected: what :func:`run_whole` returns for the original, if that is known.

    Raises:
        NotEquivalent: an error is above the bound of the dtype. Names the first residual after
            which the values differ. Or what the model writes into its inputs is not what the original does.
        HCTransformError: the reference itself, or the converted model with separated streams, fails.
    """
    if expected is None:
        expected = run_whole(original, args, kwargs)
    seen = plan if isinstance(plan, Seen) else _seen_in(plan, original, converted, args, kwargs)
    plan = seen.plan
    start, judged, apart = Judgement(), Judgement(), not_covered(plan)
    bound = tolerance_of(expected.outputs, original)
    with without_stream_dropout(converted):
        ran = run_whole(converted, args, kwargs)
        found = compare(ran.outputs, expected.outputs, dtypes=plan.options.readout != "sum")
        wrong = is_wrong(found, bound, plan)
        covered = bool(plan.residuals) and not apart
        if covered:
            pair = Pair(original, converted, seen, args, kwargs)
            judged, apart = _compared_apart(pair)
            if wrong and not judged.wrong:
                start = judge_start(pair, found.error) if not apart else Judgement({OUTPUTS: found.error})
        elif wrong:
            start = Judgement({OUTPUTS: found.error})
    if start.wrong or wrong and judged.wrong:
        raise not_equivalent(original, found, bound, described_difference(plan, judged.wrong))
    if judged.wrong:
        where = described_difference(plan, judged.wrong)
        error = judged.wrong.get(OUTPUTS, found.error)
        raise NotEquivalent(
            f"with separated streams the converted {type(original).__name__} differs from its reference"
            f"{f' by {error:.1e} (relative)' if OUTPUTS in judged.wrong else ''}; "
            f"{where or 'no residual differs by itself'}. Leave that residual out with exclude=[...], or report the "
            "model."
        )
    refuse_other_writes(original, ran.inputs, expected.inputs, bound, plan)
    return result_of(found, plan, apart, start, judged.explained)


def _seen_in(plan: Plan, original: nn.Module, converted: nn.Module, args: Any, kwargs: Any) -> Seen:
    """Return what the graph of a plan says of its streams."""
    given = inputs_of(plan.graph_module, args, kwargs)
    inputs = bind_inputs(original, args, kwargs) if given is None else given
    return Seen(plan, plan.graph_module, inputs, added_modules(converted))


def _compared_apart(pair: Pair) -> tuple[Judgement, str]:
    """Return what differences with separated streams are, and why nothing can be told of them; "" if it can.

    Raises:
        HCTransformError: the reference or the converted model fails.
    """
    try:
        with separated(pair.connections, pair.seen.plan):
            errors = pair.differences()
    except DecisionChanged:
        return Judgement(), DECIDES
    except HCTransformError:
        excuse = pair.excuse()
        if not excuse:
            raise
        return Judgement(), excuse
    if errors and (excuse := pair.excuse()):
        return Judgement(), excuse
    with separated(pair.connections, pair.seen.plan):
        judged = judge(pair, errors)
    return judged, judged.unclear


def refuse_other_writes(original: nn.Module, left: Any, expected: Any, bound: float, plan: Plan) -> None:
    """Raise NotEquivalent if a model leaves its inputs otherwise than the original does."""
    found = compare(left, expected)
    if not found.error <= 10 * bound and plan.options.readout != "sum":  # a write that is lost differs by far more
        raise NotEquivalent(
            f"the converted {type(original).__name__} writes something else into its inputs than the original does (by "
            f"{found.error:.1e}, in (args, kwargs){found.where}). Keep the module that does whole with "
            "leaf_modules=[...], or report the model."
        )


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
