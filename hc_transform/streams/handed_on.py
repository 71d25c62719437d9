"""Coefficients between pieces of compiled code: what the write takes of them, in two tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .mixing import AnyCoefficients, Coefficients, FractionCoefficients, PackedCoefficients


class HandedOn(NamedTuple):
    """The weights of a write: ``h_post`` ``[n, ...]``, and ``h_res`` ``[n, n, ...]`` or None.

    The axes after are those of the entries, which broadcast against a stream.
    """

    h_post: Tensor
    h_res: Tensor | None


def hand_on_coefficients(coefficients: AnyCoefficients) -> HandedOn | PackedCoefficients | FractionCoefficients:
    """Return what :func:`~hc_transform.streams.mixing.write` takes of ``coefficients``, for another piece of code.

    Each tensor that a piece of compiled code returns takes a launch of its own and some time in Python.
    """
    if isinstance(coefficients, (PackedCoefficients, FractionCoefficients)):
        return coefficients._replace(h_pre=())
    rows = coefficients.h_res
    h_res = None if rows is None else _stacked([_stacked(row) for row in rows])
    return HandedOn(_stacked(coefficients.h_post), h_res)


def take_over_coefficients(
    handed: HandedOn | PackedCoefficients | FractionCoefficients,
) -> AnyCoefficients:
    """Return coefficients for a write from what :func:`hand_on_coefficients` made; they have no weights for a read."""
    if not isinstance(handed, HandedOn):
        return handed
    h_res = None if handed.h_res is None else tuple(row.unbind() for row in handed.h_res.unbind())
    return Coefficients((), handed.h_post.unbind(), h_res)


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """Return weights as one tensor, each expanded to the shape that they have together."""
    return torch.stack(torch.broadcast_tensors(*weights))
