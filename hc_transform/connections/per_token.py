"""Sums over features as single numbers of a token, for compiled code.

A compiler fuses what runs over the same axes. With every coefficient, and every sum over features that
it is made from, a tensor of one number a token, making the coefficients of a residual runs in the kernel that
wrote the streams and goes on to read them, and so do all sums of the backward pass: the streams are
moved once. A coefficient that is the same for all tokens is expanded to them, so that its gradient too is summed
over features in that kernel, and over tokens from the few sums that are left.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..streams.mixing import full_precision
from .numbers import Numbers, tokens_of

Entries = tuple[Tensor, ...]

UNROLLED_BYTES = 1 << 17  # of weights in bf16, that every token reads: about what stays in the L1 cache of an SM


class Weights(NamedTuple):
    """A projection in the formula of a connection that runs in compiled code: its products are made number by number.

    See :mod:`hc_transform.connections.projection` for both kinds.
    """

    weight: Tensor

    def each_normed(self, streams: Sequence[Tensor], axis: int, eps: float) -> Numbers:
        """Return ``RMSNorm(x) @ weight`` of every stream, ``(k, n)`` numbers."""
        products = products_with(self.weight.unsqueeze(0), axis)
        columns = []
        for stream in streams:
            scale = torch.rsqrt(mean_square((stream,), axis) + eps)
            columns.append([part * scale for part in products(stream)])
        rows = zip(*columns, strict=True)
        shape = (len(columns[0]), len(columns))
        return Numbers([number for row in rows for number in row], shape, axis, tokens_of(streams[0], axis))

    def flattened_normed(self, streams: Sequence[Tensor], axis: int, eps: float) -> Numbers:
        """Return ``RMSNorm(concatenation of the streams) @ weight``, ``(k,)`` numbers."""
        scale = torch.rsqrt(mean_square(streams, axis) + eps)
        products = row_products(streams, self.weight, axis)
        return Numbers([part * scale for part in products], (len(products),), axis, tokens_of(streams[0], axis))


def mean_square(streams: Sequence[Tensor], axis: int) -> Tensor:
    """Return the mean square of all features of ``streams``, with size 1 on ``axis``."""
    total = full_precision(streams[0]).square().mean(axis, keepdim=True)
    for stream in streams[1:]:
        total = total + full_precision(stream).square().mean(axis, keepdim=True)
    return total / len(streams) if len(streams) > 1 else total


def row_products(streams: Sequence[Tensor], weight: Tensor, axis: int) -> Entries:
    """Return ``sum_j X[j] @ weight[j]``, weight ``(m, D, k)`` for m streams: k tensors with size 1 on ``axis``.

    Small weights are multiplied in the kernels that hold the streams: each number is one more sum over the
    features, and the gradient of the streams k more multiplications. Large ones take a matrix product of
    their own, that reads the streams again.
    """
    if len(streams) > 1 and all(stream is streams[0] for stream in streams):  # as they are where a trunk begins
        streams, weight = streams[:1], full_precision(weight).sum(0, keepdim=True)
    return products_with(weight, axis)(*streams)


def products_with(weight: Tensor, axis: int) -> Callable[..., Entries]:
    """Return :func:`row_products` as a function of the streams alone."""
    weight = full_precision(weight)
    if weight.numel() * 2 <= UNROLLED_BYTES:
        rows = _by_feature(weight.detach())
        return lambda *streams: _RowProducts.apply(weight, rows, axis, *streams)
    return lambda *streams: _MatrixProducts.apply(weight, axis, *streams).unbind(0)


class _RowProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, axis: int, *streams: Tensor) -> Entries:
        ctx.axis = axis
        ctx.save_for_backward(rows, *streams)
        return tuple(
            _sum_of_products(streams, own, axis).sum(axis, keepdim=True) for own in _columns(rows, streams[0], axis)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, *streams = ctx.saved_tensors
        columns = _columns(rows, streams[0], ctx.axis)  # [k][m]
        by_stream = []
        for j, x in enumerate(streams):
            products = [gradient * column[j] for gradient, column in zip(gradients, columns, strict=True)]
            by_stream.append(functools.reduce(operator.add, products).to(x.dtype))
        return (_outer_products(streams, gradients, ctx.axis), None, None, *by_stream)


class _MatrixProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: int, *streams: Tensor) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(weight, *streams)
        return _matrix_products(streams, weight, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, *streams = ctx.saved_tensors
        by_stream = _matrix_products_transposed(gradient, weight, ctx.axis, streams[0].dtype)
        return (_outer_products(streams, gradient.unbind(0), ctx.axis), None, *by_stream)


def _columns(rows: Tensor, like: Tensor, axis: int) -> list[Entries]:
    """Return the weights of number k and stream j as ``[k][j]``, each broadcastable along ``axis``."""
    shape = (-1, *(1,) * (like.dim() - 1 - axis % like.dim()))
    return [tuple(row.view(shape) for row in column.unbind(0)) for column in rows.unbind(1)]


def _sum_of_products(streams: Sequence[Tensor], weights: Entries, axis: int) -> Tensor:
    total = streams[0] * weights[0]
    for stream, weight in zip(streams[1:], weights[1:], strict=True):
        total = total + stream * weight
    return total


@torch.library.custom_op("hc_transform::by_feature", mutates_args=())
def _by_feature(weight: Tensor) -> Tensor:
    """Return ``(m, D, k)`` as ``(m, k, D)`` in memory: a kernel reads one number of all features at a time."""
    return weight.transpose(1, 2).clone(memory_format=torch.contiguous_format)


@_by_feature.register_fake
def _(weight: Tensor) -> Tensor:
    m, d, k = weight.shape
    return weight.new_empty(m, k, d)


@torch.library.custom_op("hc_transform::outer_products", mutates_args=())
def _outer_products(streams: Sequence[Tensor], gradients: Sequence[Tensor], axis: int) -> Tensor:
    """Return the sums over tokens of ``X[j] * gradient[k]``: ``(m, D, k)``, at least fp32."""
    packed = torch.stack(tuple(gradients))  # (k, ..., 1, ...)
    return torch.stack([outer(x, packed, axis % x.dim()) for x in streams])


@_outer_products.register_fake
def _(streams: Sequence[Tensor], gradients: Sequence[Tensor], axis: int) -> Tensor:
    return gradients[0].new_empty(len(streams), streams[0].shape[axis], len(gradients))


@torch.library.custom_op("hc_transform::matrix_products", mutates_args=())
def _matrix_products(streams: Sequence[Tensor], weight: Tensor, axis: int) -> Tensor:
    """Return ``sum_j X[j] @ weight[j]`` as ``(k, ...)`` with size 1 on ``axis``, at least fp32."""
    total: Any = sum(_planes(x, w, axis % x.dim()) for x, w in zip(streams, weight.unbind(0), strict=True))
    return total.unsqueeze(axis % streams[0].dim() + 1).contiguous()


@_matrix_products.register_fake
def _(streams: Sequence[Tensor], weight: Tensor, axis: int) -> Tensor:
    shape = list(streams[0].shape)
    shape[axis] = 1
    return weight.new_empty(weight.shape[2], *shape)


def _planes(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``x @ weight``, weight ``(D, k)``, as ``(k, ...)`` without the feature axis."""
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    if axis == x.dim() - 1:
        return wide_mm(x.reshape(-1, x.shape[-1]), weight).t().reshape(-1, *shape)
    x = x.flatten(axis + 1).flatten(0, axis - 1)  # (B, D, S)
    return (weight.t() @ x.to(weight.dtype)).transpose(0, 1).reshape(-1, *shape)


@torch.library.custom_op("hc_transform::matrix_products_transposed", mutates_args=())
def _matrix_products_transposed(gradient: Tensor, weight: Tensor, axis: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the gradient of every stream, ``gradient`` ``(k, ..., 1, ...)``."""
    axis %= gradient.dim() - 1
    shape = list(gradient.shape[1:])
    shape[axis] = weight.shape[1]
    made = []
    for own in weight.to(dtype).unbind(0):  # (D, k); rounded as the result is
        if axis == len(shape) - 1:
            made.append((gradient.flatten(1).t().to(dtype) @ own.t()).view(shape))
        else:
            planes = gradient.flatten(axis + 2).flatten(1, axis).transpose(0, 1).squeeze(2)  # (B, k, S)
            made.append((own @ planes.to(dtype)).reshape(shape))
    return made


@_matrix_products_transposed.register_fake
def _(gradient: Tensor, weight: Tensor, axis: int, dtype: torch.dtype) -> list[Tensor]:
    shape = list(gradient.shape[1:])
    shape[axis] = weight.shape[1]
    return [weight.new_empty(shape, dtype=dtype) for _ in range(weight.shape[0])]


def outer(x: Tensor, packed: Tensor, axis: int) -> Tensor:
    """Return ``sum over tokens of x * packed[k]``, ``packed`` ``(k, ...)`` with size 1 on ``axis``: ``(D, k)``."""
    k = len(packed)
    if axis == x.dim() - 1:
        return wide_mm(x.reshape(-1, x.shape[-1]).t(), packed.reshape(k, -1).t())
    x = x.flatten(axis + 1).flatten(0, axis - 1)  # (B, D, S)
    packed = packed.reshape(k, x.shape[0], x.shape[2]).permute(1, 2, 0)  # (B, S, k)
    return (x.to(packed.dtype) @ packed).sum(0)


def wide_mm(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` in the dtype of ``y``, fp32, for an ``x`` in half precision or in that dtype.

    On CUDA bf16 stays bf16, in place of being copied to fp32: ``y`` is the sum of two bf16 numbers, which
    leaves an error of 2e-5, and the products are added up in fp32.
    """
    if x.dtype == y.dtype:
        return x @ y
    if x.is_cuda and x.dtype == torch.bfloat16:
        return sum_of_halves(lambda halves: torch.mm(x, halves, out_dtype=torch.float32), y)
    return x.to(y.dtype) @ y


def sum_of_halves(product: Any, y: Tensor) -> Tensor:
    """Return ``product(y)``, linear in ``y``, from the product of its high and its low bf16 part side by side."""
    high = y.bfloat16()
    low = (y - high.float()).bfloat16()
    first, second = product(torch.cat([high, low], 1)).chunk(2, 1)
    return first + second
