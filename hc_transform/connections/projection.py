"""Projections of streams to a few numbers a token, with the RMS norm applied after them.

``RMSNorm(x) @ W = (x @ W) / rms(x)``: a norm's gain is part of W, and its scale is one number a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

EPS = 1e-6


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is when it is fp32 or fp64 already."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on the device of ``x`` keep their dtypes."""
    if x.device.type == "meta":  # has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def project(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``x @ weight`` with the features of ``x`` on ``axis``, ``weight`` ``(D, k)``: ``[..., k]``."""
    x, weight = _of_one_dtype(x, weight)
    if axis in (-1, x.dim() - 1):
        return x @ weight
    axis %= x.dim()
    projected = weight.t() @ x.flatten(axis + 1)  # (B, k, S): channels first stay where they are in memory
    return projected.transpose(-1, -2).unflatten(-2, x.shape[axis + 1 :])


def mean_square(x: Tensor, axis: int) -> Tensor:
    """Return the mean square of the features, the feature axis moved to the end with size 1."""
    return full_precision(x).square().mean(axis).unsqueeze(-1)


def project_normed(x: Tensor, weight: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """Return ``RMSNorm(x) @ weight``: ``[..., k]``."""
    return project(x, weight, axis) * torch.rsqrt(mean_square(x, axis) + eps)


def project_each_normed(streams: Sequence[Tensor], weight: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """Return ``RMSNorm(x) @ weight`` of every stream: ``[n, ..., k]``."""
    parts = torch.stack([project(x, weight, axis) for x in streams])
    return parts * torch.rsqrt(torch.stack([mean_square(x, axis) for x in streams]) + eps)


def project_flattened(streams: Sequence[Tensor], weight: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """Return ``RMSNorm(concatenation of the streams) @ weight``, ``weight`` ``(n, D, k)``: ``[..., k]``."""
    parts = [project(x, w, axis) for x, w in zip(streams, weight.unbind(0), strict=True)]
    squares = [mean_square(x, axis) for x in streams]
    return _sum(parts) * torch.rsqrt(_sum(squares) / len(streams) + eps)


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _of_one_dtype(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = full_precision(x), full_precision(weight)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype), weight.to(dtype)
