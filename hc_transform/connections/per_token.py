"""Coefficients as single numbers of a token, for compiled code.

A compiler fuses what runs over the same axes. With every coefficient, and every sum over features that
it is made from, a tensor of one number a token, making the coefficients of a residual runs in the kernel that
wrote the streams and goes on to read them, and so do all sums of the backward pass: the streams are
moved once. A coefficient that is the same for all tokens is expanded to them, so that its gradient too is summed
over features in that kernel, and over tokens from the few sums that are left.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from ..streams.mixing import Coefficients, full_precision
from .projection import EPS

Entries = tuple[Tensor, ...]

UNROLLED_BYTES = 1 << 17  # of weights in bf16, that every token reads: about what stays in the L1 cache of an SM


@torch.compiler.allow_in_graph
def dynamic_entries(axis: int, tanh: bool, projection: Tensor, *tensors: Tensor) -> Entries:
    """Return h_pre, h_post and h_res (row by row) of dynamic hyper-connections.

    Args:
        axis: of the features.
        tanh: whether the dynamic part passes through it.
        projection: ``(D, n + 2)``.
        tensors: h_pre ``[n]``, h_post ``[n]``, h_res ``[n, n]``, both scales ``[1]``, and n streams.
    """
    pre, post, res, (scale_alpha,), (scale_beta,) = spread(tensors[:5], tensors[5], axis)
    n = len(pre)
    h_pre, h_post, h_res = [], [], [*res]
    products = products_with(projection.unsqueeze(0), axis)
    for j, stream in enumerate(tensors[5:]):
        scale = torch.rsqrt(mean_square((stream,), axis) + EPS)
        dynamic = [part * scale for part in products(stream)]
        if tanh:
            dynamic = [torch.tanh(part) for part in dynamic]
        h_pre.append(pre[j] + scale_alpha * dynamic[0])
        h_post.append(post[j] + scale_beta * dynamic[1])
        for i, part in enumerate(dynamic[2:]):
            h_res[i * n + j] = res[i * n + j] + scale_alpha * part
    return (*h_pre, *h_post, *h_res)


@torch.compiler.allow_in_graph
def constrained_entries(
    axis: int, sizes: tuple[int, ...], norm_eps: float, eps: float, projection: Tensor, *tensors: Tensor
) -> Entries:
    """Return h_pre, h_post and the logits of h_res of the family of mHC.

    Args:
        axis: of the features.
        sizes: n, n and, if there are any, the number of logits.
        norm_eps: of the RMS norm.
        eps: added to h_pre.
        projection: ``(n, D, sum of sizes)``.
        tensors: a scale ``[1]`` and a bias of each size, and n streams.
    """
    count = 2 * len(sizes)
    spreads = spread(tensors[:count], tensors[count], axis)
    streams = tensors[count:]
    scale = torch.rsqrt(mean_square(streams, axis) + norm_eps)
    projected = iter([part * scale for part in row_products(streams, projection, axis)])
    logits = []
    for (factor,), biases in zip(spreads[::2], spreads[1::2], strict=True):
        logits.append([factor * next(projected) + bias for bias in biases])
    h_pre = [torch.sigmoid(x) + eps if eps else torch.sigmoid(x) for x in logits[0]]
    h_post = [2 * torch.sigmoid(x) for x in logits[1]]
    return (*h_pre, *h_post, *(logits[2] if len(sizes) > 2 else ()))


@torch.compiler.allow_in_graph
def kronecker_entries(factors: tuple[int, ...], *logits: Tensor) -> Entries:
    """Return, row by row, the Kronecker product of a combination of permutations for each factor.

    Args:
        factors: sizes of the matrices.
        logits: the weights of all permutations of each size are the softmax of so many logits.
    """
    product: list[Tensor] = []
    size, start = 1, 0
    for factor in factors:
        count = math.factorial(factor)
        matrix = _combined(logits[start : start + count], factor)
        start += count
        both = range(size * factor)
        product = (
            [
                product[i // factor * size + j // factor] * matrix[i % factor * factor + j % factor]
                for i in both
                for j in both
            ]
            if product
            else matrix
        )
        size *= factor
    return tuple(product)


def _combined(logits: Sequence[Tensor], n: int) -> list[Tensor]:
    """Return ``sum_k softmax(logits)[k] permutation[k]`` of all permutations of n, row by row."""
    largest = functools.reduce(torch.maximum, logits).detach()
    weights = [torch.exp(logit - largest) for logit in logits]
    total = functools.reduce(operator.add, weights)
    entries: list[Any] = [None] * (n * n)
    for weight, permutation in zip(weights, permutations(range(n)), strict=True):
        for i, j in enumerate(permutation):
            place = i * n + j
            entries[place] = weight if entries[place] is None else entries[place] + weight
    return [entry / total for entry in entries]


@torch.compiler.allow_in_graph
def static_entries(axis: int, like: Tensor, *parameters: Tensor) -> Entries:
    """Return the numbers of all parameters, expanded to the tokens of ``like``."""
    return tuple(entry for part in spread(parameters, like, axis) for entry in part)


def in_rows(entries: Sequence[Tensor], n: int) -> Coefficients:
    """Return ``n + n + n * n`` entries (or ``n + n``: the identity) as coefficients."""
    h_res = entries[2 * n :]
    rows = tuple([tuple(h_res[i * n : i * n + n]) for i in range(n)]) if h_res else None
    return Coefficients(tuple(entries[:n]), tuple(entries[n : 2 * n]), rows)


def spread(parameters: Sequence[Tensor], like: Tensor, axis: int) -> list[Entries]:
    """Return the numbers of each parameter, every one expanded to the tokens of ``like``.

    They are one tensor before, so that one pass sums the gradients of all.
    """
    flat = torch.cat([full_precision(parameter).flatten() for parameter in parameters])
    shape = list(like.shape)
    shape[axis] = 1
    entries = flat.view(-1, *(1,) * len(shape)).expand(-1, *shape).unbind(0)
    parts, start = [], 0
    for parameter in parameters:
        parts.append(entries[start : start + parameter.numel()])
        start += parameter.numel()
    return parts


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
