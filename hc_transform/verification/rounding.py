"""How far rounding alone moves the values of a model, and what that says of a difference.

A converted model sums in another order than its reference, so that both round otherwise, and some models amplify
that: batch norms over a few values, attention with large logits. Where a usual bound is exceeded, the reference is
run again with every sum of streams moved by a unit in the last place. A difference of the size of what that moves is
rounding, and is to vanish in double precision, where a mistake does not. Where the model does not run in double
precision, or is as unsteady there, a difference counts as rounding only if that could not hide a mistake.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import HCTransformError
from ..models.compare import relative_error, tensor_error

log = logging.getLogger("hc_transform")

OUTPUTS = ""  # what a model returns, beside the names of residuals
PROBES = 3
# Where a value is decided by its last bit, as by an attention between two equal logits, half of the probes miss it.
MOST_PROBES = 16
FLIPS = "rounding alone moves as much now and then, and in double precision they agree"
# Over 20 models of the zoos in both modes a difference was up to 1.6 times what the probes moved.
FACTOR = 8.0
# A stream in a wrong place shows at about 1e-1: a larger bound would hide it.
LARGEST_BOUND = 1e-2


class Rounding:
    """Moves values at random by a unit in the last place, or not, as another order of their sum may."""

    def __init__(self, seed: int, unit: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.unit = unit

    def __call__(self, value: Tensor) -> Tensor:
        """Return ``value`` moved; it is left as it is if it is not floating."""
        if not value.is_floating_point():
            return value
        steps = torch.randint(-1, 2, value.shape, generator=self.generator).to(value.device, value.dtype)
        return value * (1 + max(self.unit, torch.finfo(value.dtype).eps) * steps)


class Compared(Protocol):
    """A converted model beside its reference.

    Attributes:
        unit: the least that rounding moves a value by, relative to it, if the dtypes of the run do not show it.
    """

    unit: float

    def differences(self) -> dict[str, float]:
        """Return the errors above the usual bound, by residual in order of execution and :data:`OUTPUTS`."""

    def reference(self, rounding: Rounding | None = None) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the reference's outputs, and its streams after each residual by name."""

    def run_converted(self) -> Any:
        """Run the converted model."""

    def doubled(self) -> Compared | None:
        """Return copies in double precision; None if nothing would be more precise."""


@dataclass(frozen=True)
class Judgement:
    """What differences are.

    Attributes:
        wrong: those that rounding does not explain.
        unclear: why nothing can be told of them, or of some; "" if all are told.
        explained: how rounding explains them; "" if there are none, or it does not.
    """

    wrong: Mapping[str, float] = field(default_factory=dict)
    unclear: str = ""
    explained: str = ""


def judge(compared: Compared, errors: Mapping[str, float] | None = None) -> Judgement:
    """Tell differences above the usual bound from rounding.

    Args:
        compared: the models.
        errors: what ``compared.differences()`` gave, if that is known.
    """
    errors = compared.differences() if errors is None else errors
    if not errors:
        return Judgement()
    wrong, hidden, effect = _told_apart(errors, moved_by_rounding(compared))
    if wrong and not hidden:
        return Judgement(wrong) if not _flips(compared, errors) else Judgement(explained=FLIPS)
    precise = None
    try:
        precise = compared.doubled()
        if precise is not None:
            errors = precise.differences()
            if not errors:
                return Judgement(explained=f"{effect}, and in double precision they agree")
            wrong, hidden, effect = _told_apart(errors, moved_by_rounding(precise))
    except (HCTransformError, MemoryError, torch.OutOfMemoryError) as failure:
        log.info("not compared in double precision: %s", failure)
        effect += ", and it does not run in double precision"
    else:
        effect += ", in double precision" if precise is not None else ""
    if wrong:
        return Judgement(wrong)
    return Judgement(unclear=effect) if hidden else Judgement(explained=effect)


def _flips(compared: Compared, errors: Mapping[str, float]) -> bool:
    """Whether differences vanish in double precision, and rounding moves as much now and then."""
    try:
        precise = compared.doubled()
        if precise is None or precise.differences():
            return False
    except (HCTransformError, MemoryError, torch.OutOfMemoryError) as failure:
        log.info("not compared in double precision: %s", failure)
        return False
    moved = moved_by_rounding(compared, MOST_PROBES)
    return all(error <= FACTOR * moved[name] for name, error in errors.items())


def _told_apart(errors: Mapping[str, float], moved: Mapping[str, float]) -> tuple[dict[str, float], bool, str]:
    """Return which differences are wrong, whether rounding may hide more, and what it does.

    What comes after the first place where rounding may hide a mistake is not judged.
    """
    effects = {name: f"rounding alone moves {_place(name)} by {moved[name]:.1e} (relative)" for name in errors}
    log.info("differences of %s; %s", dict(errors), "; ".join(effects.values()))
    for name, error in errors.items():
        bound = FACTOR * moved[name]
        hidden = not bound <= LARGEST_BOUND
        if not error <= bound:
            return {name: error}, hidden, effects[name]
        if hidden:
            return {}, True, effects[name]
    return {}, False, effects[max(errors, key=lambda name: moved[name])]


def _place(name: str) -> str:
    return "the outputs" if name == OUTPUTS else f"the streams after the residual {name}"


def moved_by_rounding(compared: Compared, probes: int = PROBES) -> dict[str, float]:
    """Return how far rounding moves the streams after each residual, and the outputs."""
    with _Dtypes() as computed:  # a norm in fp32 within a model in double precision rounds in fp32
        compared.run_converted()
        outputs, streams = compared.reference()
    unit = max(compared.unit, *(torch.finfo(dtype).eps for dtype in computed.floating), 0.0)
    moved = {OUTPUTS: 0.0, **dict.fromkeys(streams, 0.0)}
    for seed in range(probes):
        others, other_streams = compared.reference(Rounding(seed, unit))
        moved[OUTPUTS] = max(moved[OUTPUTS], relative_error(others, outputs))
        for name, value in streams.items():
            moved[name] = max(moved[name], largest_error(other_streams[name], value))
    return moved


def largest_error(streams: Any, expected: Tensor) -> float:
    """Return the largest error of any stream, expected as ``[n, ...]``."""
    return max(tensor_error(stream, e) for stream, e in zip(streams, expected, strict=True))


class _Dtypes(TorchDispatchMode):
    """Notes the floating dtypes that anything is computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.floating: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.floating.add(value.dtype)
        return result
