"""Sinkhorn-Knopp: from any square matrix of logits to a doubly stochastic one, as one operator.

A compiler sees a single call in place of 2 * iterations reductions and as many divisions, and the
backward pass keeps the logits alone. On NVIDIA GPUs forward and backward are one Triton kernel each, in
fp32 and for n up to 16; everything else runs in the operations of torch below. So do exported programs, the
transforms of ``torch.func``, forward mode and gradients of gradients: an operator has no rules for them.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..streams.mixing import transformed


class SinkhornError(NamedTuple):
    """How far a matrix is from doubly stochastic: the largest ``|sum - 1|`` of its rows, of its columns."""

    rows: float
    columns: float


def sinkhorn(logits: Tensor, iterations: int = 20, eps: float = 0.0) -> Tensor:
    """Return ``exp(logits)`` with columns and rows normalised in turn, ``iterations`` times each.

    mHC, arXiv 2512.24880, eq. 9: ``M(0) = exp(logits)``, ``M(t) = rows(columns(M(t - 1)))``. The rows
    come last, so they sum to 1 exactly; the columns do in the limit. For logits with the standard
    deviation given, n = 4, the largest error of any column among 10,000 matrices (seed 0; see
    ``tests/test_sinkhorn.py``):

    ==========  =======  =======  =======
    iterations  std 1    std 4    std 8
    ==========  =======  =======  =======
    1           7.3e-01  2.0e+00  2.2e+00
    5           7.7e-02  9.0e-01  1.7e+00
    10          1.3e-02  3.7e-01  9.8e-01
    20          5.5e-04  6.8e-02  3.7e-01
    50          1.3e-07  2.5e-02  3.3e-02
    100         1.4e-07  1.0e-02  1.5e-02
    ==========  =======  =======  =======

    The first round is done on logarithms; after it every row and column holds an entry of at least
    ``1 / n ** 2``, so that no later sum can vanish, whatever the logits.

    Args:
        logits: ``[..., n, n]``, rows are targets, columns sources. Half precision is computed in fp32.
        iterations: at least 1.
        eps: added to ``softmax(logits, -2)`` and to every sum, as DeepSeek-V4 does with 1e-6.

    Returns:
        ``[..., n, n]``, fp32 or fp64.

    Raises:
        ValueError: the matrices are not square, or ``iterations`` is below 1.

    >>> sinkhorn(torch.zeros(2, 2)).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if has_torch_function((logits,)):
        return handle_torch_function(sinkhorn, (logits,), logits, iterations, eps)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn takes square matrices [..., n, n], got shape {tuple(logits.shape)}")
    if iterations < 1:
        raise ValueError(f"sinkhorn needs at least 1 iteration, got {iterations}")
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if torch.compiler.is_exporting() or transformed():  # exported programs run where this package is not
        return _by_torch(logits, iterations, eps)
    return _sinkhorn(logits, iterations, eps)


def sinkhorn_error(matrix: Tensor) -> SinkhornError:
    """Return the largest error of the row sums and of the column sums of ``[..., n, n]``.

    >>> sinkhorn_error(torch.eye(3))
    SinkhornError(rows=0.0, columns=0.0)
    """
    matrix = matrix.detach().double()
    rows, columns = ((matrix.sum(axis) - 1).abs().max().item() for axis in (-1, -2))
    return SinkhornError(rows, columns)


@torch.library.custom_op("hc_transform::sinkhorn", mutates_args=())
def _sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    if kernels := _kernels_for(logits):
        return kernels.forward(logits, iterations, eps)
    return _by_torch(logits, iterations, eps)


@_sinkhorn.register_fake
def _(logits: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("hc_transform::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Return the gradient of the logits; the forward pass is run again, keeping its sums."""
    if kernels := _kernels_for(logits):
        return kernels.backward(grad, logits, iterations, eps)
    return _gradient_by_torch(grad, logits, iterations, eps)


@_sinkhorn_backward.register_fake
def _(grad: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.iterations, ctx.eps = inputs
    ctx.save_for_backward(logits)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # this gradient is to be differentiated in its turn
        return _gradient_by_torch(grad, logits, ctx.iterations, ctx.eps), None, None
    return _sinkhorn_backward(grad, logits, ctx.iterations, ctx.eps), None, None


_sinkhorn.register_autograd(_differentiate, setup_context=_save)


def _kernels_for(logits: Tensor) -> ModuleType | None:
    """Return the module of Triton kernels where they can run."""
    if logits.device.type != "cuda" or logits.dtype != torch.float32:
        return None
    kernels = _kernels()
    if kernels is None or logits.shape[-1] > kernels.MAX_SIZE or not kernels.usable(logits.device):
        return None
    return kernels


@functools.cache
def _kernels() -> ModuleType | None:
    """Import the kernels when they are first needed: Triton is slow to import, and not everywhere."""
    try:
        from . import sinkhorn_kernels
    except ImportError:
        return None
    return sinkhorn_kernels


def _by_torch(logits: Tensor, iterations: int, eps: float) -> Tensor:
    return _from_planes(_iterate(_to_planes(logits), iterations, eps)[0], logits)


def _gradient_by_torch(grad: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    x = _to_planes(logits)
    p, sums = _iterate(x, iterations, eps)
    g = _to_planes(grad)
    for axis, total in reversed(sums):  # p = before / total, so before = p * total
        g = (g - (g * p).sum(axis, keepdim=True)) / total
        p = p * total
    q = torch.softmax(x, 0)
    if eps == 0:  # p = softmax over sources of log q
        g = g * p
        g = g - p * g.sum(1, keepdim=True)
    else:  # p = q + eps
        g = g * q
    return _from_planes(g - q * g.sum(0, keepdim=True), logits)


def _iterate(x: Tensor, iterations: int, eps: float) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Return the result on planes ``[target, source, N]`` and each division done: its axis and divisor."""
    sums: list[tuple[int, Tensor]] = []
    if eps == 0:
        p = torch.softmax(torch.log_softmax(x, 0), 1)
        axes = [0, 1] * (iterations - 1)
    else:
        p = torch.softmax(x, 0) + eps
        axes = [1] + [0, 1] * (iterations - 1)
    for axis in axes:
        total = p.sum(axis, keepdim=True) + eps
        p = p / total
        sums.append((axis, total))
    return p, sums


def _to_planes(x: Tensor) -> Tensor:
    """``[..., n, n]`` to ``[n, n, N]``, where every sum runs over whole vectors of N."""
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


def _from_planes(x: Tensor, like: Tensor) -> Tensor:
    return x.permute(2, 0, 1).reshape(like.shape).contiguous()
