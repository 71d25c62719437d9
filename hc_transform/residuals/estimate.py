"""What a conversion costs, estimated from figures that were counted once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..connections import CONNECTIONS, connection_name
from ..graphs.dialects import value_of
from ..graphs.operations import shape_of
from ..options import Options
from .findings import Residual

# u a residual on top of the plain model, 4 streams, compiled in bf16: (forward, backward, saved for the backward pass),
# of 12 blocks of a GPT (README, Cost). Fractions of a stream ("frac") have no figure there.
FIGURES = {
    "static": (6.8, 13.8, 4.9),
    "identity": (6.8, 21.5, 4.9),
    "dynamic": (10.6, 26.6, 5.0),
    "kromhc": (6.9, 30.4, 5.0),
    "mhc": (14.9, 34.6, 5.0),
    "mhc-lite": (15.1, 34.9, 5.1),
}
STREAMS = 4  # of these figures


@dataclass(frozen=True)
class Estimate:
    """What a training step takes beside what the plain model takes, on the example inputs, compiled.

    Attributes:
        traffic_bytes: of memory that are read and written more, forward and backward.
        saved_bytes: of activations that are kept more for the backward pass.
        traffic_units: the former in u a residual, u being the bytes of one stream there.
        tokens: positions that carry features, where all residuals have the same number, else the examples of the batch.
        per: what those are, "token" or "example".
    """

    traffic_bytes: int
    saved_bytes: int
    traffic_units: float
    tokens: int
    per: str


def estimate_of(residuals: Sequence[Residual], axes: Sequence[int], options: Options) -> Estimate | None:
    """Return what the residuals of a plan cost; None where their sizes or their connection are not known.

    With u the bytes of the value of a residual (elements times bytes of its dtype), t and s the traffic and the saved
    activations of ``FIGURES`` for 4 streams::

        traffic = sum over residuals of  u * t * (5 n - 3) / 17
        saved   = sum over residuals of  u * s * n / 4

    5 n - 3 being what streams take at least beyond a plain residual: 2 n - 2 forward (n + 1 read and written in
    place of 2 each) and 3 n - 1 backward. Nothing is run: two figures and the shapes of the example inputs.

    Args:
        residuals: in order.
        axes: the axis of features of each.
        options: what they are converted into.
    """
    names = {made.__name__: name for name, made in CONNECTIONS.items()}
    given = connection_name(options.connection)
    figures = FIGURES.get(names.get(given, given))
    sizes = [_size(r) for r in residuals]
    if figures is None or not sizes or any(size is None for size in sizes):
        return None
    forward, backward, saved = figures
    n = options.num_streams
    units = (forward + backward) * (5 * n - 3) / (5 * STREAMS - 3)
    known = [size for size in sizes if size is not None]
    total = sum(math.prod(shape) * width for shape, width in known)
    tokens = {math.prod(shape) // shape[axis] for (shape, _), axis in zip(known, axes, strict=True)}
    shape = known[0][0]
    count, per = (tokens.pop(), "token") if len(tokens) == 1 else (shape[0], "example")
    return Estimate(round(total * units), round(total * saved * n / STREAMS), units, count, per)


def _size(residual: Residual) -> tuple[tuple[int, ...], int] | None:
    """Return the shape of a residual's value and the bytes of an element, None if they are not known."""
    shape = shape_of(residual.skip)
    known: Any = residual.skip.meta.get("tensor_meta", value_of(residual.skip))
    dtype = getattr(known, "dtype", None)
    if shape is None or not shape or not isinstance(dtype, torch.dtype):
        return None
    if not all(type(size) is int and size for size in shape):
        return None
    return tuple(shape), dtype.itemsize
