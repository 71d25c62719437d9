"""Compare a converted model with its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .additions import CONNECTIONS_NAME
from .ends import StreamDropout
from .errors import NotEquivalent
from .planner import Plan
from .reference import NamedInputs, ReferenceInterpreter, separate
from .state import state_restored
from .structure import copy_inputs
from .trace import bind_inputs

# Relative to the largest absolute value of each output. Start "paper" is exact up to the rounding of
# the readout; start "mirrored" rounds at every write.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# For separated streams, whose sums the reference rounds in another order and the layers amplify. A stream
# in a wrong place shows at about 1e-1. Half precision is not compared so.
STREAM_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}


def run_like(model: nn.Module, args: Any, kwargs: Any, forward: Callable[..., Any] | None = None) -> Any:
    """Return the model's outputs on copies of the inputs, its state and the random state put back after."""
    with state_restored(model), torch.no_grad():
        torch.manual_seed(0)
        return (forward or model)(*copy_inputs(tuple(args)), **copy_inputs(dict(kwargs)))


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest error of any tensor in two nested outputs, relative to its largest value.

    Outputs of different structure, shape or with NaN in other places are infinitely apart.
    """
    ours, theirs = pytree.tree_leaves(_opened(actual)), pytree.tree_leaves(_opened(expected))
    if len(ours) != len(theirs):
        return float("inf")
    errors = [0.0]
    for a, e in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(e, Tensor):
            errors.append(_tensor_error(a, e))
        elif type(a) is not type(e):
            errors.append(float("inf"))
    return max(errors)


def tolerance_of(outputs: Any) -> float:
    """Return the bound for the least precise floating dtype among the outputs."""
    dtypes = [t.dtype for t in pytree.tree_leaves(_opened(outputs)) if isinstance(t, Tensor)]
    return max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def verify(
    original: nn.Module,
    converted: fx.GraphModule,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: Any = None,
) -> float:
    """Return the largest relative error of the converted model's outputs on the example inputs.

    Both run in the model's present mode with the same random seed. Equal outputs at the start do not
    show that each stream goes where it should, for then all streams are equal; so the streams after
    each residual are compared once more, with coefficients moved off their start, to those of
    :class:`hc_transform.reference.ReferenceInterpreter`. ``expected`` is what :func:`run_like` returns for the
    original, if that is known already.

    Raises:
        NotEquivalent: an error is above the bound of the dtype. Names the first residual after
            which the values differ.
    """
    if expected is None:
        expected = run_like(original, args, kwargs)
    with without_stream_dropout(converted):
        error = relative_error(run_like(converted, args, kwargs), expected)
        where = first_difference(original, converted, plan, args, kwargs)
    bound = tolerance_of(expected)
    wrong = not error <= bound and plan.options.readout != "sum"  # a sum is n times the original by definition
    if not wrong and where is None:
        return error
    raise NotEquivalent(
        f"the converted {type(original).__name__} differs from the original by {error:.1e} (relative; at most "
        f"{bound:.0e} was expected); {where or 'no residual differs by itself'}. Leave that residual out with "
        "exclude=[...], keep its module whole with leaf_modules=[...], or report the model."
    )


def first_difference(
    original: nn.Module, converted: fx.GraphModule, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str | None:
    """Return a phrase that names the first residual whose streams differ from the reference's, if any."""
    given = bind_inputs(original, args, kwargs)
    if not plan.residuals or plan.options.nested == "all":  # the reference knows no trunks within branches
        return None
    connections = converted.get_submodule(CONNECTIONS_NAME)
    start = {name: value.clone() for name, value in connections.state_dict().items()}
    try:
        separate(connections)
        reference = ReferenceInterpreter(plan, dict(connections.named_children()))
        run_like(plan.graph_module, (), given, reference.run_on)
        recorder = _Recorder(converted, reference.written)
        run_like(converted, (), given, recorder.run_on)
    finally:
        connections.load_state_dict(start)
    for residual in plan.residuals:
        if residual.name in recorder.wrong:
            error = recorder.wrong[residual.name]
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
            expected = self.expected.pop(name).to(value[0].dtype)
            error = max(_tensor_error(stream, e) for stream, e in zip(value, expected, strict=True))
            if not error <= STREAM_TOLERANCES.get(expected.dtype, float("inf")):
                self.wrong[name] = error
        return value


def _tensor_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0 or expected.device.type == "meta":
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if actual.dtype == expected.dtype:
        difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
        if difference == 0 or math.isfinite(difference) and math.isfinite(largest) and largest > 0:
            return difference and difference / largest
    a, e = actual.detach().to(torch.complex128 if expected.is_complex() else torch.float64), expected.detach()
    e = e.to(a.dtype)
    unequal = ~((a == e) | (a.isnan() & e.isnan()))
    if not unequal.any():
        return 0.0
    scale = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0.0
    worst = (a - e)[unequal].abs().max().item()
    return worst / scale if scale > 0 and worst == worst else float("inf")


def _opened(value: Any) -> Any:
    """Return dataclasses and other mappings as plain dicts, so that their tensors are found."""
    if isinstance(value, Mapping):
        return {key: _opened(v) for key, v in value.items()}
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {key: _opened(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, (list, tuple)):
        return [_opened(v) for v in value]
    return value
