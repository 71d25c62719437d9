"""Dynamic hyper-connections (DHC)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..streams.mixing import full_precision
from .projection import project_each_normed
from .static import StaticConnection

SCALE = 0.01


class DynamicConnection(StaticConnection):
    """Dynamic hyper-connections: coefficients that depend on the token.

    Hyper-Connections, arXiv 2409.19606, section 2.3, eq. 10 to 13, and algorithm 2 of appendix J:
    to the static part comes ``scale * tanh(norm(X[j]) @ W)``, one projection for what stream j
    gives to the branch input, to every target stream, and for the weight with which the branch
    output is written to it. W starts at zero, the scales at 0.01.

    The norm is an RMS norm without gain (a gain before a projection is part of it), applied
    after the projection, where it costs one number a token. The paper has a layer norm.

    Args:
        num_streams, settings: as for :class:`Connection`; ``dim`` is needed.
        tanh: False leaves the tanh out, as the ``hyper-connections`` package offers.
    """

    needs_dim = True

    def __init__(self, num_streams: int, *, tanh: bool = True, **settings: Any) -> None:
        super().__init__(num_streams, **settings)
        assert self.dim is not None  # checked by the base class
        self.tanh = tanh
        self.projection = nn.Parameter(torch.zeros(self.dim, num_streams + 2))  # (D, n + 2)
        self.scale_alpha = nn.Parameter(torch.full((1,), SCALE))  # of h_pre and h_res
        self.scale_beta = nn.Parameter(torch.full((1,), SCALE))  # of h_post

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return static plus dynamic parts: ``[..., n]``, ``[..., n]``, ``[..., n, n]``."""
        h_pre, h_post, h_res = super().coefficients(streams)
        dynamic = project_each_normed(streams, self.projection, self.feature_axis)  # [..., n + 2, n]
        if self.tanh:
            dynamic = torch.tanh(dynamic)
        scale_alpha, scale_beta = full_precision(self.scale_alpha), full_precision(self.scale_beta)
        return (
            h_pre + scale_alpha * dynamic[..., 0, :],
            h_post + scale_beta * dynamic[..., 1, :],
            h_res + scale_alpha * dynamic[..., 2:, :],  # [target, source]
        )
