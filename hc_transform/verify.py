"""Compare a converted model with its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .additions import CONNECTIONS_NAME
from .compare import Comparison, compare, relative_error, tensor_error, tensors_of
from .dialects import inputs_of
from .ends import StreamDropout
from .errors import DecisionChanged, HCTransformError, NotEquivalent
from .planner import Plan
from .reference import NamedInputs, ReferenceInterpreter, separate
from .state import seed_generators, state_restored
from .structure import copy_inputs
from .threads import again_beside_threads
from .trace import bind_inputs
from .trunks import nest
from .watch import shared_state_restored

__all__ = ["Verification", "first_difference", "relative_error", "run_like", "tolerance_of", "verify"]

# Relative to the largest absolute value of each output. Start "paper" is exact up to the rounding of
# the readout; start "mirrored" rounds at every write.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# For separated streams, whose sums the reference rounds in another order and the layers amplify. A stream
# in a wrong place shows at about 1e-1. Half precision is not compared so.
DECIDES = "the model decides on values of tensors, which other streams change"
STREAM_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}


@dataclass(frozen=True)
class Verification:
    """What verification found.

    Attributes:
        error: the largest relative error of the outputs; None if nothing could be compared.
        apart: why the streams were not compared with coefficients off their start; "" if they were.
        unseen: what of the outputs was not compared.
        scaled: whether the outputs are others by definition (``readout="sum"``).
    """

    error: float | None
    apart: str = ""
    unseen: tuple[str, ...] = ()
    scaled: bool = False

    @property
    def note(self) -> str:
        """What the report says of it."""
        shown = ", ".join(self.unseen[:3]) + (" and others" if len(self.unseen) > 3 else "")
        if self.error is None:
            return f"Not verified: the output holds no value to compare{': ' + shown if shown else ''}."
        unseen = f" Not compared: {shown}." if shown else ""
        if self.scaled:
            streams = f"Nor were its streams: {self.apart}." if self.apart else "Its streams agree with the reference."
            return f"Not verified: readout='sum' gives other outputs than the original. {streams}{unseen}"
        if self.apart:
            return (
                f"Verified on the example inputs at the start alone, where all streams are alike: largest relative "
                f"error {self.error:.1e}. Not verified with separated streams: {self.apart}.{unseen}"
            )
        return f"Verified on the example inputs: largest relative error {self.error:.1e}.{unseen}"


def run_like(model: nn.Module, args: Any, kwargs: Any, forward: Callable[..., Any] | None = None) -> Any:
    """Return the model's outputs on copies of the inputs, with all random generators seeded.

    The state of the model and of the generators (torch's, Python's, numpy's) is put back after.
    """
    with state_restored(model), shared_state_restored(model), torch.no_grad():
        seed_generators()
        return (forward or model)(*copy_inputs(tuple(args)), **copy_inputs(dict(kwargs)))


def tolerance_of(outputs: Any, model: nn.Module | None = None) -> float:
    """Return the bound for the least precise floating dtype among the outputs, or else the model's parameters."""
    tensors = tensors_of(outputs)
    if model is not None and not any(t.is_floating_point() for t in tensors):
        tensors = list(model.parameters())
    return max((TOLERANCES.get(t.dtype, 0.0) for t in tensors), default=TOLERANCES[torch.float32])


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
    :class:`hc_transform.reference.ReferenceInterpreter`. ``expected`` is what :func:`run_like` returns for the
    original, if that is known already.

    Raises:
        NotEquivalent: an error is above the bound of the dtype. Names the first residual after
            which the values differ.
        HCTransformError: the reference itself, or the converted model with separated streams, fails.
    """
    if expected is None:
        expected = run_like(original, args, kwargs)
    where, apart = None, not_covered(plan)
    with without_stream_dropout(converted):
        found = outputs_compared(converted, plan, args, kwargs, expected)
        if not apart:
            try:
                where = first_difference(original, converted, plan, args, kwargs)
            except DecisionChanged:
                apart = DECIDES
    bound = tolerance_of(expected, original)
    if is_wrong(found, bound, plan) or where is not None:
        raise not_equivalent(original, found, bound, where)
    return result_of(found, plan, apart)


def outputs_compared(
    converted: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any], expected: Any
) -> Comparison:
    """Return how the outputs of the converted model compare with the original's."""
    return compare(run_like(converted, args, kwargs), expected, dtypes=plan.options.readout != "sum")


def is_wrong(found: Comparison, bound: float, plan: Plan) -> bool:
    """Whether outputs differ that should not; with ``readout="sum"`` they are n times the original's by definition."""
    return not found.error <= bound and plan.options.readout != "sum"


def result_of(found: Comparison, plan: Plan, apart: str) -> Verification:
    """Return what is to be reported of outputs that agree."""
    error = found.error if found.values else None
    return Verification(error, apart, found.unseen, plan.options.readout == "sum")


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


def first_difference(
    original: nn.Module, converted: fx.GraphModule, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str | None:
    """Return a phrase that names the first residual whose streams differ from the reference's, if any.

    Raises:
        HCTransformError: one of the two cannot be run with separated streams.
        DecisionChanged: the graph decides on values that are others then.
    """
    if not plan.residuals:
        return None
    given = inputs_of(plan.graph_module, args, kwargs)
    given = bind_inputs(original, args, kwargs) if given is None else given
    connections = converted.get_submodule(CONNECTIONS_NAME)
    with separated(connections):
        reference = ReferenceInterpreter(plan, dict(connections.named_children()))
        with failures_of("the reference implementation", original):
            run_like(plan.graph_module, (), given, reference.run_on)
        recorder = _Recorder(converted, reference.written)
        with failures_of("the converted graph", original):
            run_like(converted, (), given, recorder.run_on)
    return described_difference(plan, recorder.wrong)


@contextmanager
def separated(connections: nn.Module) -> Iterator[None]:
    """Move all coefficients off their start, and put them back on exit."""
    start = {name: value.clone() for name, value in connections.state_dict().items()}
    try:
        separate(connections)
        yield
    finally:
        connections.load_state_dict(start)


@contextmanager
def failures_of(what: str, original: nn.Module) -> Iterator[None]:
    """Say what failed while streams were compared, so that no failure of ours passes for one of the model."""
    try:
        yield
    except (HCTransformError, MemoryError, RecursionError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        text = " ".join(str(failure).split())[:300]
        raise HCTransformError(
            f"verification of the converted {type(original).__name__} fails: {what} cannot be run with separated "
            f"streams ({type(failure).__name__}: {text}). Leave the residual out with exclude=[...], convert with "
            "verify=False and compare the outputs yourself, or report the model."
        ) from failure


def described_difference(plan: Plan, wrong: Mapping[str, float]) -> str | None:
    """Return a phrase that names the first residual of ``plan`` in ``wrong``, errors by name."""
    for residual in plan.residuals:
        if residual.name in wrong:
            error = wrong[residual.name]
            return f"the first difference, {error:.1e}, is after the residual {residual.name} ({residual.location})"
    return None


def streams_error(streams: Any, expected: Tensor) -> float:
    """Return the largest error of streams, expected as ``[n, ...]``; 0 if it is within the bound."""
    expected = expected.to(streams[0].dtype)
    if len(streams) != len(expected):
        return math.inf
    error = max(tensor_error(stream, e) for stream, e in zip(streams, expected, strict=True))
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
        if "hc_residual" in n.meta:  # at once: what comes next may overwrite the streams
            name = n.meta["hc_residual"]
            if error := streams_error(value, self.expected.pop(name)):
                self.wrong[name] = error
        return value
