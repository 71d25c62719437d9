"""Static hyper-connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..streams.mixing import full_precision
from .base import Connection, starting_reads, starting_writes


class StaticConnection(Connection):
    """Static hyper-connections: learnt h_pre, h_post and h_res, the same for every token.

    Hyper-Connections, arXiv 2409.19606, section 2.1 and, for start "paper", eq. 14: h_pre is
    one-hot on stream ``index mod n``, h_res the identity, h_post ones. Start "mirrored" reads the
    mean and writes with weights spread evenly over [0.5, 1.5], so that the streams separate while
    their mean stays the original value. Takes the arguments of :class:`Connection`.
    """

    def __init__(self, num_streams: int, **settings: Any) -> None:
        super().__init__(num_streams, **settings)
        self.h_pre = nn.Parameter(starting_reads(num_streams, self.index, self.init))  # [n]
        self.h_post = nn.Parameter(starting_writes(num_streams, self.init))  # [n]
        self.h_res = nn.Parameter(torch.eye(num_streams))  # [n, n]

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters themselves, in at least fp32."""
        return full_precision(self.h_pre), full_precision(self.h_post), full_precision(self.h_res)
