"""A converted model beside its original, run alike: what both scopes compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..capture.watch import shared_state_restored
from ..errors import NEVER_HIDDEN, HCTransformError
from ..models.compare import compare, tensors_of
from ..models.copies import copy_inputs
from ..models.state import grad_mode_of_runs, seed_generators, state_restored
from ..residuals.planner import Plan
from ..streams.trunk_value import is_trunk_value
from .rounding import OUTPUTS, Judgement, Rounding, judge

# Relative to the largest absolute value of each output. Start "paper" is exact up to the rounding of
# the readout; start "mirrored" rounds at every write.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def run_like(model: nn.Module, args: Any, kwargs: Any, forward: Callable[..., Any] | None = None) -> Any:
    """Return the model's outputs on copies of the inputs, with all random generators seeded.

    The state of the model and of the generators (torch's, Python's, numpy's) is put back after.
    """
    with state_restored(model, whole=True), shared_state_restored(model), grad_mode_of_runs():
        seed_generators()
        outputs = (forward or model)(*copy_inputs(tuple(args)), **copy_inputs(dict(kwargs)))
    return pytree.tree_map(_detached, outputs, is_leaf=is_trunk_value)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and not is_trunk_value(value) and value.requires_grad else value


def tolerance_of(outputs: Any, model: nn.Module | None = None) -> float:
    """Return the bound for the least precise floating dtype among the outputs, or else the model's parameters."""
    tensors = tensors_of(outputs)
    if model is not None and not any(t.is_floating_point() for t in tensors):
        tensors = list(model.parameters())
    return max((TOLERANCES.get(t.dtype, 0.0) for t in tensors), default=TOLERANCES[torch.float32])


@contextmanager
def failures_of(what: str, original: nn.Module) -> Iterator[None]:
    """Say what failed while streams were compared, so that no failure of ours passes for one of the model."""
    try:
        yield
    except NEVER_HIDDEN:
        raise
    except Exception as failure:
        text = " ".join(str(failure).split())[:300]
        raise HCTransformError(
            f"verification of the converted {type(original).__name__} fails: {what} cannot be run with separated "
            f"streams ({type(failure).__name__}: {text}). Leave the residual out with exclude=[...], convert with "
            "verify=False and compare the outputs yourself, or report the model."
        ) from failure


class Pair:
    """A model and what became of it: what both scopes compare."""

    unit = 0.0  # of rounding, as the run shows it

    def __init__(
        self, original: nn.Module, converted: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.original = original
        self.converted = converted
        self.plan = plan
        self.args, self.kwargs = args, kwargs
        self.wide = False  # whether it is a copy in double precision

    def run_original(self) -> Any:
        """Return the original's outputs."""
        return run_like(self.original, self.args, self.kwargs)

    def run_converted(self) -> Any:
        """Return the converted model's outputs.

        Raises:
            HCTransformError: it cannot be run.
        """
        with failures_of("the converted model", self.original):
            return run_like(self.converted, self.args, self.kwargs)

    def reference(self, rounding: Rounding | None = None) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the outputs and the streams of the reference.

        Raises:
            HCTransformError: it cannot be run.
        """
        raise NotImplementedError

    def differences(self) -> dict[str, float]:
        """Return the errors above the usual bound."""
        raise NotImplementedError

    def doubled(self) -> Pair | None:
        """Return copies in double precision; None if all tensors of the model are."""
        if all(p.dtype == torch.float64 for p in self.original.parameters() if p.is_floating_point()):
            return None
        with failures_of("a copy in double precision", self.original):
            return self.copied()

    def copied(self) -> Pair:
        """Return copies in double precision."""
        raise NotImplementedError


class Start:
    """The outputs at the start, where a converted model gives those of its original."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        # Where weights of connections are not exact, they stay in double precision what single precision made of them.
        self.unit = torch.finfo(torch.float32).eps if pair.wide else 0.0
        self.run_converted, self.reference = pair.run_converted, pair.reference

    def differences(self) -> dict[str, float]:
        """Return the error of the outputs if it is above the usual bound."""
        with failures_of("the original", self.pair.original):
            expected = self.pair.run_original()
        found = compare(self.run_converted(), expected)
        return {} if found.error <= tolerance_of(expected, self.pair.original) else {OUTPUTS: found.error}

    def doubled(self) -> Start | None:
        """Return copies in double precision; None if all tensors of the model are."""
        pair = self.pair.doubled()
        return None if pair is None else Start(pair)


def judge_start(pair: Pair, error: float) -> Judgement:
    """Say whether an error of the outputs at the start is rounding; wrong if the reference cannot say."""
    try:
        return judge(Start(pair), {OUTPUTS: error})
    except HCTransformError:
        return Judgement({OUTPUTS: error})
