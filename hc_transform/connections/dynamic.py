"""Dynamic hyper-connections (DHC)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import full_precision
from .static import StaticConnection

SCALE = 0.01
EPS = 1e-6


class DynamicConnection(StaticConnection):
    """Dynamic hyper-connections: coefficients that depend on the token.

    Hyper-Connections, arXiv 2409.19606, section 2.3, eq. 10 to 13, and algorithm 2 of appendix J:
    to the static part comes ``scale * tanh(norm(X[j]) @ W)``, one projection for what stream j
    gives to the branch input, to every target stream, and for the weight with which the branch
    output is written to it. W starts at zero, the scales at 0.01.

    The norm is an RMS norm without gain (a gain before a projection is part of it), applied
    after the projection, where it costs one number a token.
    """

    needs_dim = True

    def __init__(
        self,
        num_streams: int,
        *,
        index: int = 0,
        dim: int | None = None,
        feature_axis: int = -1,
        init: str = "paper",
    ) -> None:
        super().__init__(num_streams, index=index, dim=dim, feature_axis=feature_axis, init=init)
        assert dim is not None  # checked by the base class
        self.projection = nn.Parameter(torch.zeros(dim, num_streams + 2))  # (D, n + 2)
        self.scale_alpha = nn.Parameter(torch.full((1,), SCALE))  # of h_pre and h_res
        self.scale_beta = nn.Parameter(torch.full((1,), SCALE))  # of h_post

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return static plus dynamic parts: ``[..., n]``, ``[..., n]``, ``[..., n, n]``."""
        h_pre, h_post, h_res = super().coefficients(streams)
        projection = full_precision(self.projection)
        pre, post, res = [], [], []
        for stream in streams:
            dynamic = torch.tanh(self._project(full_precision(stream), projection))  # [..., n + 2]
            pre.append(dynamic[..., 0])
            post.append(dynamic[..., 1])
            res.append(dynamic[..., 2:])
        scale_alpha, scale_beta = full_precision(self.scale_alpha), full_precision(self.scale_beta)
        return (
            h_pre + scale_alpha * torch.stack(pre, -1),
            h_post + scale_beta * torch.stack(post, -1),
            h_res + scale_alpha * torch.stack(res, -1),  # source j stacked last: [target, source]
        )

    def _project(self, x: Tensor, projection: Tensor) -> Tensor:
        """Return ``norm(x) @ projection``: (..., D) or (B, D, ...) to [..., n + 2]."""
        dtype = torch.promote_types(x.dtype, projection.dtype)
        x, projection = x.to(dtype), projection.to(dtype)
        if self.feature_axis in (-1, x.dim() - 1):
            return (x @ projection) * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        axis = self.feature_axis % x.dim()
        x_flat = x.flatten(axis + 1)  # (B, D, S): channels first stay where they are in memory
        projected = projection.t() @ x_flat * torch.rsqrt(x_flat.square().mean(-2, keepdim=True) + EPS)  # (B, n + 2, S)
        return projected.transpose(-1, -2).unflatten(-2, x.shape[axis + 1 :])
