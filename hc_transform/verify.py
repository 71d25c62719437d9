"""Compare a converted model with its original."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import NotEquivalent
from .planner import Plan
from .structure import copy_inputs, state_restored

# Relative to the largest absolute value of each output. Start "paper" is exact up to the rounding of
# the readout; start "mirrored" rounds at every write.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


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
    original: nn.Module, converted: fx.GraphModule, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float:
    """Return the largest relative error of the converted model's outputs on the example inputs.

    Both run in the model's present mode with the same random seed.

    Raises:
        NotEquivalent: it is above the bound of the outputs' dtype. Names the first residual after
            which the values differ.
    """
    expected = run_like(original, args, kwargs)
    error = relative_error(run_like(converted, args, kwargs), expected)
    bound = tolerance_of(expected)
    if plan.options.readout == "sum":
        return error  # n times the original by definition
    if error <= bound and not _all_zero(expected):
        return error
    where = first_difference(converted, plan, args, kwargs)
    if error <= bound and where is None:
        return error
    raise NotEquivalent(
        f"the converted {type(original).__name__} differs from the original by {error:.1e} (relative; at most "
        f"{bound:.0e} was expected); {where or 'no residual differs by itself'}. Leave that residual out with "
        "exclude=[...], or report the model."
    )


def first_difference(
    converted: fx.GraphModule, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str | None:
    """Return a phrase that names the first residual whose readout is not the original's value."""
    adds = {r.add.name: r for r in plan.residuals}
    written = {n.meta["hc_residual"]: n.name for n in converted.graph.nodes if "hc_residual" in n.meta}
    writes = {written[r.name]: r for r in plan.residuals}
    before = _values(plan.graph_module, set(adds), args, kwargs)
    after = _values(converted, set(writes), args, kwargs)
    originals = {r.name: before[add] for add, r in adds.items() if add in before}
    for node, residual in writes.items():
        expected = originals[residual.name]
        mean = torch.stack([s.double() for s in after[node]]).mean(0)
        error = relative_error(mean, expected.double())
        if not error <= TOLERANCES.get(expected.dtype, 0.0):
            return f"the first difference, {error:.1e}, is after the residual {residual.name} ({residual.location})"
    return None


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.found[n.name] = copy.deepcopy(value)
        return value


def _values(gm: fx.GraphModule, wanted: set[str], args: Any, kwargs: Any) -> dict[str, Any]:
    recorder = _Recorder(gm, wanted)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    given = dict(zip((str(n.target) for n in placeholders), args, strict=False)) | dict(kwargs)
    inputs = [copy_inputs(given[str(n.target)]) for n in placeholders if str(n.target) in given]
    run_like(gm, (), {}, lambda: recorder.run(*inputs))
    return recorder.found


def _all_zero(outputs: Any) -> bool:
    """Whether the outputs are all zero, as with a classifier whose last layer starts at zero."""
    tensors = [t for t in pytree.tree_leaves(_opened(outputs)) if isinstance(t, Tensor)]
    return not any(bool(t.any()) for t in tensors if t.device.type != "meta")


def _tensor_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0 or expected.device.type == "meta":
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else float("inf")
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
