"""Weighted sums of tensors in half precision as one matrix product in fp32, for eager code on GPUs.

Written as products that are added up, each step makes a copy in fp32 and reads it back: 42 times the bytes of a stream
to write one of four, 168 for all. Here every value is copied to fp32 once for all of the sums, in forward and backward
each, and nothing else is kept than the values as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def are_packed(weights: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether :func:`packed_sums` takes these: values alike, and weights that are the same for all features."""
    first = values[0]
    shapes = {weight.shape for weight in weights}
    return (
        dtype in HALVES
        and first.dim() > 0
        and first.numel() > 0
        and all([v.dtype == dtype and v.shape == first.shape and v.is_contiguous() for v in values])
        and all([weight.dtype == torch.float32 for weight in weights])
        and shapes in ({torch.Size()}, {torch.Size((*first.shape[:-1], 1))})
    )


def packed_sums(rows: Sequence[Sequence[Tensor]], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return ``sum_k rows[i][k] * values[k]`` for each row, rounded once to the dtype of the values.

    Args:
        rows: m rows of k weights in fp32, without axes or of the values' shape with size 1 on the last axis.
        values: k contiguous tensors of one shape in half precision.
    """
    made: tuple[Tensor, ...] = _PackedSums.apply(len(values), *[w for row in rows for w in row], *values)
    return made


class _PackedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.k = k
        ctx.save_for_backward(*tensors)
        weights, values = tensors[:-k], tensors[-k:]
        with _full_precision(values[0]):
            return _stored(_product(_matrix(weights, k), _in_fp32(values)), values[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors, k = ctx.saved_tensors, ctx.k
        if torch.is_grad_enabled():  # for gradients of gradients
            return (None, *_differentiable(tensors, k, gradients))
        weights, values = tensors[:-k], tensors[-k:]
        with _full_precision(values[0]):
            given = _in_fp32(gradients)
            own: Sequence[Any] = [None] * k
            if any(ctx.needs_input_grad[-k:]):
                own = _stored(_product(_matrix(weights, k).mT, given), values[0])
            of_weights: Sequence[Any] = [None] * len(weights)
            if any(ctx.needs_input_grad[1:-k]):
                products = torch.bmm(given.transpose(0, 1), _in_fp32(values).permute(1, 2, 0))  # (T, m, k)
                if weights[0].dim() == 0:
                    of_weights = products.sum(0).flatten().unbind()
                else:
                    of_weights = products.flatten(1).t().contiguous().view(-1, *weights[0].shape).unbind()
        return (None, *of_weights, *own)


def _full_precision(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)


def _in_fp32(values: Sequence[Tensor]) -> Tensor:
    """Return tensors ``(..., D)`` as one, ``(k, T, D)``."""
    first = values[0]
    packed = torch.empty((len(values), *first.shape), dtype=torch.float32, device=first.device)
    for own, value in zip(packed.unbind(), values, strict=True):
        own.copy_(value)
    return packed.view(len(values), -1, first.shape[-1])


def _matrix(weights: Sequence[Tensor], k: int) -> Tensor:
    """Return m * k weights as ``(m, k)``, or ``(T, m, k)``."""
    packed = torch.stack(tuple(weights)).view(len(weights) // k, k, -1)
    return packed[..., 0] if weights[0].dim() == 0 else packed.permute(2, 0, 1)


def _product(matrix: Tensor, packed: Tensor) -> Tensor:
    """Return the sums ``(m, T, D)`` of ``(k, T, D)``."""
    if matrix.dim() == 2:
        return (matrix @ packed.flatten(1)).view(-1, *packed.shape[1:])
    return torch.bmm(matrix, packed.transpose(0, 1)).transpose(0, 1)


def _stored(sums: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Return each sum as a tensor of its own and no view, which may be written into."""
    return tuple([torch.empty_like(like).copy_(one.view(like.shape)) for one in sums.unbind()])


def _differentiable(tensors: Sequence[Tensor], k: int, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    rows = (len(tensors) - k) // k
    values = tensors[-k:]
    outputs = []
    for i in range(rows):
        total = values[0] * tensors[i * k]
        for weight, value in zip(tensors[i * k + 1 : (i + 1) * k], values[1:], strict=True):
            total = total + value * weight
        outputs.append(total.to(values[0].dtype))
    found = iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=True, allow_unused=True))
    return tuple([next(found) if tensor.requires_grad else None for tensor in tensors])
