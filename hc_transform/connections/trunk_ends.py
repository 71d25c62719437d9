"""What stands at the ends of a trunk, and on its streams: embeddings, learnt readouts, dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..streams.mixing import Coefficients, Streams, expand, full_precision, read
from .base import starting_reads
from .projection import EPS, project_flattened, without_autocast
from .starts import Resettable


class StreamEmbedding(Resettable):
    """Expand a value to n streams and add a learnt vector to each: ``X[i] = x + embedding[i]``.

    The vectors start at zero.

    Args:
        num_streams: n.
        dim: size of the feature axis.
        feature_axis: -1 for ``(..., D)``, 1 for ``(B, C, ...)``.
    """

    def __init__(self, num_streams: int, dim: int, feature_axis: int = -1) -> None:
        super().__init__()
        self.feature_axis = feature_axis
        self.embedding = nn.Parameter(torch.zeros(num_streams, dim))

    def forward(self, x: Tensor) -> Streams:
        """Return n streams of the shape and dtype of ``x``."""
        return self.embed(expand(x, len(self.embedding)))

    def embed(self, streams: Streams) -> Streams:
        """Add its vector to each stream."""
        axis = self.feature_axis % streams[0].dim()
        shape = (-1, *(1,) * (streams[0].dim() - 1 - axis))
        rows = self.embedding.to(streams[0].dtype).unbind(0)
        return tuple(stream + row.view(shape) for stream, row in zip(streams, rows, strict=True))


class LearnedReadout(Resettable):
    """Read the streams with weights that depend on the token, which start as the mean.

    ``sum_i (sigmoid(scale * RMSNorm(all streams, flattened) @ W + bias)[i] + eps) X[i]``, as
    DeepSeek-V4's hyper head (``DeepseekV4HyperHead`` of transformers, with ``eps=1e-6``). W starts at
    zero, the bias at ``logit(1 / n)``.

    Args:
        num_streams, dim, feature_axis: as for :class:`StreamEmbedding`.
        eps: added to every weight.
        norm_eps: of the RMS norm.
    """

    def __init__(
        self, num_streams: int, dim: int, feature_axis: int = -1, *, eps: float = 0.0, norm_eps: float = EPS
    ) -> None:
        super().__init__()
        self.feature_axis = feature_axis
        self.eps = eps
        self.norm_eps = norm_eps
        self.projection = nn.Parameter(torch.zeros(num_streams, dim, num_streams))  # (n, D, n)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.logit(starting_reads(num_streams, 0, "mirrored") - eps))  # [n]

    def forward(self, streams: Streams) -> Tensor:
        """Return one value of a stream's shape and dtype."""
        with without_autocast(streams[0]):
            projected = project_flattened(streams, self.projection, self.feature_axis, self.norm_eps)
            weights = torch.sigmoid(full_precision(self.scale) * projected + full_precision(self.bias)) + self.eps
        entries = tuple(weight.unsqueeze(self.feature_axis) for weight in weights.unbind(-1))
        return read(streams, Coefficients(entries, (), None))


class StreamDropout(nn.Dropout):
    """Dropout on every stream, each with a mask of its own."""

    def forward(self, streams: Streams) -> Streams:  # type: ignore[override]
        """Return the streams, zeroed at random while training."""
        return tuple(F.dropout(stream, self.p, self.training) for stream in streams)
