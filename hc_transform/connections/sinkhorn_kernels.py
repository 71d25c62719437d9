"""Sinkhorn-Knopp on NVIDIA GPUs: one Triton kernel forward, one backward.

Importing this module imports Triton. A program is one warp. For n <= 4 each thread holds one matrix in its
registers and sums alone; larger matrices are shared among threads, of which none holds more than 32 entries.
Matrices are padded to a power of two by an identity block, which stays as it is. Axes are those of the planes
in ``sinkhorn``: ``[target, source, matrix]``.
"""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SIZE = 16  # n; what was compiled and checked
WARP = 32
MAX_ENTRIES = 1024  # of one program: 32 a thread
SCRATCH_BYTES = 32 << 20  # of all programs of the backward kernel: fits the L2 cache of an A100 (40 MB) or H100 (50 MB)
MIN_PROGRAMS = 256  # however much scratch each needs


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether Triton compiles for ``device``; warns if it is an NVIDIA GPU and Triton fails there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    try:
        with torch.cuda.device(device):
            target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001  # no C compiler, no headers of Python, no driver: each raises what it likes
        warnings.warn(f"sinkhorn runs as many small kernels, for Triton fails on {device}: {error}", stacklevel=2)
        return False
    return target.backend == "cuda" and target.arch >= 70


def forward(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Return ``sinkhorn(logits)``, fp32 ``[..., n, n]`` with n up to ``MAX_SIZE``."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if out.numel() == 0:
        return out
    settings = _settings(logits.shape[-1], eps)
    count = _count(logits)
    with torch.cuda.device_of(logits):
        _sinkhorn_forward[(triton.cdiv(count, settings["BLOCK"]),)](
            out, logits.contiguous(), count, iterations, eps, **settings, num_warps=1
        )
    return out


def backward(grad: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Return the gradient of the logits, all ``[..., n, n]`` in fp32."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if out.numel() == 0:
        return out
    settings = _settings(logits.shape[-1], eps)
    count = _count(logits)
    sums = 2 * (iterations - 1) * settings["SIZE"] * settings["BLOCK"]  # of one program
    programs = min(triton.cdiv(count, settings["BLOCK"]), max(MIN_PROGRAMS, SCRATCH_BYTES // (4 * max(sums, 1))))
    scratch = torch.empty(programs * sums, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _sinkhorn_backward[(programs,)](
            out, grad.contiguous(), logits.contiguous(), scratch, count, iterations, eps, **settings, num_warps=1
        )
    return out


def _count(logits: Tensor) -> int:
    return logits.numel() // logits.shape[-1] ** 2


def _settings(n: int, eps: float) -> dict[str, int]:
    """Return the constants that a kernel is compiled for: BLOCK is the number of matrices of one program."""
    size = triton.next_power_of_2(n)
    return {"n": n, "SIZE": size, "BLOCK": min(WARP, MAX_ENTRIES // size**2), "HAS_EPS": eps != 0}


@triton.jit(do_not_specialize=["count", "iterations"])
def _sinkhorn_forward(  # noqa: PLR0913  # pointers and strides of a kernel
    out,
    logits,
    count,
    iterations,
    eps,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EPS: tl.constexpr,
):
    offsets, inside = _places(tl.program_id(0), count, n, SIZE, BLOCK)
    x = _load_padded(logits, offsets, inside, n, SIZE)
    _, p = _first_round(x, eps, n, SIZE, HAS_EPS)
    for _ in range(iterations - 1):
        p *= 1 / (tl.sum(p, 0, keep_dims=True) + eps)
        p *= 1 / (tl.sum(p, 1, keep_dims=True) + eps)
    tl.store(out + offsets, p, inside)


@triton.jit(do_not_specialize=["count", "iterations"], do_not_specialize_on_alignment=["scratch"])
def _sinkhorn_backward(  # noqa: PLR0913  # pointers and strides of a kernel
    out,
    grad,
    logits,
    scratch,
    count,
    iterations,
    eps,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EPS: tl.constexpr,
):
    """Run the forward pass, keeping its sums in ``scratch``, then undo it division by division.

    The gradient is carried as ``w = p * dL/dp``, that of ``log p``: dividing by a sum, with eps or without, takes
    ``p * sum(w)`` from it, and so does each softmax.
    """
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * ((iterations - 1) * (2 * SIZE * BLOCK))
    line, matrix = tl.arange(0, SIZE) * BLOCK, tl.arange(0, BLOCK)[None, None, :]
    column_places = scratch + line[None, :, None] + matrix
    row_places = scratch + line[:, None, None] + matrix + SIZE * BLOCK
    for block in range(program, tl.cdiv(count, BLOCK), tl.num_programs(0)):
        offsets, inside = _places(block, count, n, SIZE, BLOCK)
        x = _load_padded(logits, offsets, inside, n, SIZE)
        _, p = _first_round(x, eps, n, SIZE, HAS_EPS)
        columns, rows = tl.sum(p, 0, keep_dims=True), tl.sum(p, 1, keep_dims=True)  # the loop's values need a start
        for step in range(iterations - 1):
            columns = tl.sum(p, 0, keep_dims=True) + eps
            p *= 1 / columns
            rows = tl.sum(p, 1, keep_dims=True) + eps
            p *= 1 / rows
            tl.store(column_places + step * (2 * SIZE * BLOCK), columns)
            tl.store(row_places + step * (2 * SIZE * BLOCK), rows)
        tl.debug_barrier()  # one thread's sums may be loaded by another

        w = p * tl.load(grad + offsets, inside, 0.0)
        for undone in range(iterations - 1):
            before = tl.maximum(iterations - 3 - undone, 0)  # loaded a round ahead: L2 is slow to answer
            columns_before = tl.load(column_places + before * (2 * SIZE * BLOCK))
            rows_before = tl.load(row_places + before * (2 * SIZE * BLOCK))
            w -= p * tl.sum(w, 1, keep_dims=True)
            p *= rows
            w -= p * tl.sum(w, 0, keep_dims=True)
            p *= columns
            columns, rows = columns_before, rows_before

        x = _load_padded(logits, offsets, inside, n, SIZE)
        q, p = _first_round(x, eps, n, SIZE, HAS_EPS)
        w -= p * tl.sum(w, 1, keep_dims=True)
        if HAS_EPS:
            w *= q / (q + eps)
        w -= q * tl.sum(w, 0, keep_dims=True)
        tl.store(out + offsets, w, inside)
        tl.debug_barrier()  # before the next block's sums


@triton.jit
def _places(block, count, n: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the entries ``[SIZE, SIZE, BLOCK]`` of a block lie, and which of them exist."""
    row, column = tl.arange(0, SIZE)[:, None, None], tl.arange(0, SIZE)[None, :, None]
    matrix = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    inside = matrix < count
    if n < SIZE:
        inside = inside & (row < n) & (column < n)
        column = tl.minimum(column, n - 1)
    return matrix * (n * n) + row * n + column, inside


@triton.jit
def _load_padded(logits, offsets, inside, n: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(logits + offsets, inside, 0.0)
    if n < SIZE:
        row, column = tl.arange(0, SIZE)[:, None, None], tl.arange(0, SIZE)[None, :, None]
        outside = tl.where(row == column, 0.0, float("-inf"))  # exp of it is the identity
        x = tl.where((row < n) & (column < n), x, outside)
    return x


@triton.jit
def _first_round(x, eps, n: tl.constexpr, SIZE: tl.constexpr, HAS_EPS: tl.constexpr):
    """Return ``softmax(x, 0)`` and what normalising its rows makes of it."""
    x -= tl.max(x, 0, keep_dims=True)
    e = tl.exp(x)
    total = tl.sum(e, 0, keep_dims=True)
    q = e * (1 / total)
    if HAS_EPS:
        p = q + eps
        if n < SIZE:
            row, column = tl.arange(0, SIZE)[:, None, None], tl.arange(0, SIZE)[None, :, None]
            p = tl.where((row < n) & (column < n), p, q)
        p *= 1 / (tl.sum(p, 1, keep_dims=True) + eps)
    else:  # by logarithms: a row of q may underflow
        log = x - tl.log(total)
        p = tl.exp(log - tl.max(log, 1, keep_dims=True))
        p *= 1 / tl.sum(p, 1, keep_dims=True)
    return q, p
