"""Static hyper-connections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Connection, full_precision

MIRRORED_SPREAD = 0.5


class StaticConnection(Connection):
    """Static hyper-connections: learnt h_pre, h_post and h_res, the same for every token.

    Hyper-Connections, arXiv 2409.19606, section 2.1 and, for start "paper", eq. 14: h_pre is
    one-hot on stream ``index mod n``, h_res the identity, h_post ones. Start "mirrored" reads the
    mean and writes with weights spread evenly over [0.5, 1.5], so that the streams separate while
    their mean stays the original value.
    """

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
        if init == "paper":
            h_pre = torch.zeros(num_streams)
            h_pre[index % num_streams] = 1.0
            h_post = torch.ones(num_streams)
        else:
            h_pre = torch.full((num_streams,), 1.0 / num_streams)
            h_post = 1.0 + MIRRORED_SPREAD * torch.linspace(-1.0, 1.0, num_streams)
        self.h_pre = nn.Parameter(h_pre)  # [n]
        self.h_post = nn.Parameter(h_post)  # [n]
        self.h_res = nn.Parameter(torch.eye(num_streams))  # [n, n]

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters themselves, in at least fp32."""
        return full_precision(self.h_pre), full_precision(self.h_post), full_precision(self.h_res)
