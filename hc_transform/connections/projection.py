"""Projections of streams to a few numbers a token, with the RMS norm applied after them.

``RMSNorm(x) @ W = (x @ W) / rms(x)``: a norm's gain is part of W, and its scale is one number a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..streams.mixing import full_precision, transformed
from .per_token import Weights

EPS = 1e-6


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on the device of ``x`` keep their dtypes."""
    if x.device.type == "meta":  # has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def project(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``x @ weight`` with the features of ``x`` on ``axis``, ``weight`` ``(D, k)``: ``[..., k]``.

    Features that are not next to each other in memory (channels first) stay where they are.
    """
    weight = full_precision(weight)
    if _keeps_halves(x):
        return _Projection.apply(x, weight, axis % x.dim())
    return _project(x, weight, axis % x.dim())


def _project(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    if axis == 0 or x.dim() < 3:
        return x.movedim(axis, -1) @ weight
    if axis < x.dim() - 1:
        planes = x.flatten(axis + 1).flatten(0, axis - 1)  # (B, D, S)
        return _by_planes(planes, weight).unflatten(1, x.shape[axis + 1 :]).unflatten(0, x.shape[:axis])
    if x.stride(-1) == 1:
        return x @ weight
    return _by_planes(x.movedim(-1, 1).flatten(2), weight).unflatten(1, x.shape[1:-1])


def _by_planes(planes: Tensor, weight: Tensor) -> Tensor:
    """Return ``(B, S, k)`` for ``(B, D, S)``; ``planes.mT @ weight`` would copy the planes and keep the copy."""
    return torch.bmm(weight.t().expand(len(planes), -1, -1), planes).mT


def mean_square(x: Tensor, axis: int) -> Tensor:
    """Return the mean square of the features, the feature axis moved to the end with size 1."""
    square = _MeanSquare.apply(x, axis) if _keeps_halves(x) else _mean_square(x, axis)
    return square.unsqueeze(-1)


def _mean_square(x: Tensor, axis: int) -> Tensor:
    return full_precision(x).square().mean(axis)


def _keeps_halves(x: Tensor) -> bool:
    """Whether ``x`` has to be saved for the backward pass as it is: eager mode would keep its copies in fp32."""
    return x.dtype in (torch.float16, torch.bfloat16) and not torch.compiler.is_compiling() and not transformed()


class _Projection(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, axis: int) -> Tensor:
        return _project(x, weight, axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, ctx.axis = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = x.movedim(ctx.axis, -1).flatten(0, -2).to(weight.dtype)
        own = (gradient @ weight.t()).to(x.dtype).movedim(-1, ctx.axis)
        return own, rows.t() @ gradient.flatten(0, -2), None


class _MeanSquare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axis: int) -> Tensor:
        return _mean_square(x, axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.axis = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ((2 / x.shape[ctx.axis]) * gradient.unsqueeze(ctx.axis) * x).to(x.dtype), None


def project_normed(x: Tensor, weight: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """Return ``RMSNorm(x) @ weight``: ``[..., k]``."""
    return project(x, weight, axis) * torch.rsqrt(mean_square(x, axis) + eps)


def project_each_normed(streams: Sequence[Tensor], weight: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """Return ``RMSNorm(x) @ weight`` of every stream, ``weight`` ``(D, k)``: ``[..., k, n]``."""
    if isinstance(weight, Weights):
        return weight.each_normed(streams, axis, eps)
    parts = torch.stack([project(x, weight, axis) for x in streams])
    return (parts * torch.rsqrt(torch.stack([mean_square(x, axis) for x in streams]) + eps)).movedim(0, -1)


def project_flattened(streams: Sequence[Tensor], weight: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """Return ``RMSNorm(concatenation of the streams) @ weight``, ``weight`` ``(n, D, k)``: ``[..., k]``."""
    if isinstance(weight, Weights):
        return weight.flattened_normed(streams, axis, eps)
    parts = [project(x, w, axis) for x, w in zip(streams, weight.unbind(0), strict=True)]
    squares = [mean_square(x, axis) for x in streams]
    return _sum(parts) * torch.rsqrt(_sum(squares) / len(streams) + eps)


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
