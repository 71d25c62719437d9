"""Streams packed in the batch axis, ``((b s), ...)``: what the layer by hand passes along a trunk.

Axis letters: b batch, s streams.
"""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from ..connections.trunk_ends import LearnedReadout, StreamEmbedding
from ..streams.mixing import Streams, expand, readout


def pack(streams: Sequence[Tensor]) -> Tensor:
    """Return n streams ``(b, ...)`` as one tensor ``((b s), ...)``."""
    return rearrange(list(streams), "s b ... -> (b s) ...")


def unpack(packed: Tensor, num_streams: int) -> Streams:
    """Return the n streams ``(b, ...)`` of ``((b s), ...)``.

    Raises:
        ValueError: the first axis is not a multiple of n.
    """
    if packed.dim() < 1 or packed.shape[0] % num_streams:
        raise ValueError(
            f"residuals of shape {tuple(packed.shape)} do not hold {num_streams} streams in their first axis: expand "
            "them once before the trunk, residuals = expand_stream(residuals)"
        )
    return rearrange(packed, "(b s) ... -> s b ...", s=num_streams).unbind(0)


class StreamEmbed(StreamEmbedding):
    """Add a learnt vector, zero at first, to each of the packed streams.

    Args:
        num_streams, dim: as for :class:`HyperConnections`.
        channel_first: the features are on axis 1.
        expand_to_streams: the input ``(b, ...)`` is expanded first.
    """

    def __init__(
        self, num_streams: int, dim: int, channel_first: bool = False, expand_to_streams: bool = False
    ) -> None:
        super().__init__(num_streams, dim, 1 if channel_first else -1)
        self.expand_to_streams = expand_to_streams

    def forward(self, residuals: Tensor) -> Tensor:  # type: ignore[override]
        """Return packed streams ``((b s), ...)``."""
        n = len(self.embedding)
        return pack(self.embed(expand(residuals, n) if self.expand_to_streams else unpack(residuals, n)))


class ExpandStreams(nn.Module):
    """``(b, ...)`` to n equal streams, packed: ``((b s), ...)``."""

    def __init__(self, num_streams: int) -> None:
        super().__init__()
        self.num_streams = num_streams

    def forward(self, x: Tensor) -> Tensor:
        """Return the packed streams."""
        return pack(expand(x, self.num_streams))


class ReduceStreams(nn.Module):
    """Packed streams ``((b s), ...)`` to one value ``(b, ...)``: "mean", "sum" or "learned"."""

    def __init__(self, num_streams: int, reduction: str = "mean", dim: int | None = None, feature_axis: int = -1):
        super().__init__()
        if reduction not in ("mean", "sum", "learned"):
            raise ValueError(f"reduction is one of 'mean', 'sum', 'learned'; got {reduction!r}")
        if reduction == "learned" and dim is None:
            raise ValueError("reduction='learned' needs dim, the size of the feature axis")
        self.num_streams, self.reduction = num_streams, reduction
        self.head = None if dim is None or reduction != "learned" else LearnedReadout(num_streams, dim, feature_axis)

    def forward(self, residuals: Tensor) -> Tensor:
        """Return the value."""
        streams = unpack(residuals, self.num_streams)
        return readout(streams, self.reduction) if self.head is None else self.head(streams)


def get_expand_reduce_stream_functions(
    num_streams: int,
    add_stream_embed: bool = False,
    dim: int | None = None,
    disable: bool = False,
    channel_first: bool = False,
    reduction: str = "mean",
) -> tuple[nn.Module, nn.Module]:
    """Return the modules that expand a value to packed streams, and reduce them to one value.

    The ``hyper-connections`` package sums the streams, which gives n times the plain residual's
    value; here that is ``reduction="sum"``.

    Raises:
        ValueError: ``add_stream_embed`` or ``reduction="learned"`` without ``dim``.

    >>> import torch
    >>> expand_stream, reduce_stream = get_expand_reduce_stream_functions(4)
    >>> reduce_stream(expand_stream(torch.ones(2, 3))).shape
    torch.Size([2, 3])
    """
    if disable:
        return nn.Identity(), nn.Identity()
    if add_stream_embed and dim is None:
        raise ValueError("add_stream_embed=True needs dim, the size of the feature axis")
    expander: nn.Module = ExpandStreams(num_streams)
    if add_stream_embed and dim is not None:
        expander = StreamEmbed(num_streams, dim, channel_first, expand_to_streams=True)
    return expander, ReduceStreams(num_streams, reduction, dim, 1 if channel_first else -1)
