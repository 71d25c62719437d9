"""Figures of one call of a connection: what it made, and how the streams lie that it was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..streams.mixing import AnyCoefficients, FractionCoefficients

Matrices = tuple[Tensor, Tensor, Tensor]
SAME = 1e-12  # of the streams' energy, below which their differences are rounding


@dataclass(frozen=True, eq=False)
class StreamStatistics:
    """How n streams lie to one another, over all tokens and features.

    Attributes:
        spread: standard deviation over the streams, relative to their mean absolute value.
        cosine: mean cosine of two streams; 1 while all are equal.
        directions: participation ratio of the streams' differences from their mean, tr(C)^2 / tr(C^2): 0 for equal
            streams, 1 for streams on one line, n - 1 at most.
        effective: exp of the entropy of the normalised spectrum of the Gram matrix: 1 for equal streams, n for
            orthogonal ones of equal size.
        similarity: cosine of each pair, ``[n, n]``.
    """

    spread: float
    cosine: float
    directions: float
    effective: float
    similarity: Tensor


def matrices_of(coefficients: AnyCoefficients) -> Matrices:
    """Return h_pre ``[T, m, k]``, h_post ``[T, k, m]`` and h_res ``[T, k, k]`` for T tokens, 1 if all are alike.

    k rows are joined: n streams, or the n m fractions of them; m is 1 without fractions.
    """
    if isinstance(coefficients, FractionCoefficients):
        pre = _stacked([list(row) for row in coefficients.h_pre[0]])
        post = _stacked([list(row) for row in coefficients.h_post])
        return pre, post, _stacked([list(row) for row in coefficients.h_res])
    pre = _stacked([list(coefficients.h_pre)])
    post = _stacked([[entry] for entry in coefficients.h_post])
    rows = coefficients.h_res
    res = torch.eye(pre.shape[-1], device=pre.device)[None] if rows is None else _stacked([list(row) for row in rows])
    return pre, post, res


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return entries that broadcast against a stream as ``[tokens, rows, columns]``."""
    flat = torch.broadcast_tensors(*(entry.detach().float() for row in rows for entry in row))
    return torch.stack(flat, -1).reshape(-1, len(rows), len(rows[0]))


def read_entropy(h_pre: Tensor) -> float:
    """Return the mean entropy of the reads' absolute weights over log k: 0 reads one stream, 1 all alike."""
    if h_pre.shape[-1] == 1:
        return 0.0
    shares = h_pre.abs() / h_pre.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    entropy = torch.special.entr(shares).sum(-1).mean()
    return float(entropy) / math.log(h_pre.shape[-1])


def mixing_share(h_res: Tensor) -> float:
    """Return ``1 - tr(h_res) / k``, the mean over tokens: what streams get of one another."""
    return float(1 - h_res.diagonal(dim1=-2, dim2=-1).mean())


def sum_error(h_res: Tensor, axis: int) -> float:
    """Return the largest deviation from 1 of a sum over ``axis``: -1 for rows, -2 for columns."""
    return float((h_res.sum(axis) - 1).abs().max())


def gain(composite: Tensor, axis: int) -> float:
    """Return the largest absolute sum over ``axis`` of a product of h_res, the mean over tokens.

    mHC, arXiv 2512.24880, section 3.1: row sums (-1) bound what the forward pass amplifies, column sums (-2) what the
    backward pass does.
    """
    return float(composite.sum(axis).abs().amax(-1).mean())


def stream_statistics(streams: Sequence[Tensor]) -> StreamStatistics:
    """Return how streams lie to one another."""
    n = len(streams)
    if all(stream is streams[0] for stream in streams):
        return StreamStatistics(0.0, 1.0, 0.0, 1.0, torch.ones(n, n))
    packed = torch.stack([stream.detach().float().flatten() for stream in streams])  # [n, values]
    mean = packed.mean(0)
    gram = (packed @ packed.T).double()
    apart = packed - mean
    covariance = (apart @ apart.T).double()
    size = gram.diagonal().sqrt().clamp_min(1e-30)
    similarity = (gram / size[:, None] / size[None, :]).cpu()
    total, energy = float(covariance.trace()), float(gram.trace())
    shares = (torch.linalg.eigvalsh(gram.cpu()) / max(energy, 1e-30)).clamp_min(0)
    return StreamStatistics(
        spread=float(packed.std(0).mean() / mean.abs().mean().clamp_min(1e-30)),
        cosine=float((similarity.sum() - similarity.trace()) / (n * (n - 1))),
        directions=0.0 if total <= SAME * energy else total**2 / float(covariance.square().sum()),
        effective=float(torch.special.entr(shares).sum().exp()),
        similarity=similarity.float(),
    )
