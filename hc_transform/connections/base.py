"""The base class of all connections. It knows no torch.fx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..streams import Coefficients

INITS = ("paper", "mirrored")


class Connection(nn.Module):
    """Make the coefficients of one residual from its streams.

    A variant defines :meth:`coefficients` and nothing else.

    Args:
        num_streams: n, at least 2.
        index: place of the residual in its trunk; start "paper" reads stream ``index mod n``.
        dim: size of the feature axis, for variants with ``needs_dim``.
        feature_axis: the feature axis of a stream, -1 for ``(..., D)``, 1 for ``(B, C, ...)``.
        init: "paper" (one-hot read, identity mixing, unit writes) or "mirrored" (mean read,
            identity mixing, writes mirrored around 1).

    Raises:
        ValueError: for an ``init`` or ``num_streams`` out of range, or a missing ``dim``.
    """

    needs_dim: ClassVar[bool] = False

    def __init__(
        self,
        num_streams: int,
        *,
        index: int = 0,
        dim: int | None = None,
        feature_axis: int = -1,
        init: str = "paper",
    ) -> None:
        super().__init__()
        if num_streams < 2:
            raise ValueError(f"a connection joins at least 2 streams, got num_streams={num_streams}")
        if init not in INITS:
            raise ValueError(f"init is one of {', '.join(INITS)}; got {init!r}")
        if self.needs_dim and dim is None:
            raise ValueError(f"{type(self).__name__} needs dim, the size of the feature axis")
        self.num_streams = num_streams
        self.index = index
        self.dim = dim
        self.feature_axis = feature_axis
        self.init = init

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return h_pre ``[..., n]``, h_post ``[..., n]`` and h_res ``[..., n, n]``, at least fp32.

        The leading dimensions are those of a stream without its feature axis, or none at all.
        """
        raise NotImplementedError

    def forward(self, streams: Sequence[Tensor]) -> Coefficients:
        """Return the coefficients for ``streams``, n tensors of one shape.

        They are computed in fp32 (fp64 for fp64 parameters) whatever the autocast state.
        """
        with torch.autocast(streams[0].device.type, enabled=False):
            h_pre, h_post, h_res = self.coefficients(streams)
        return Coefficients(
            self._split(h_pre),
            self._split(h_post),
            tuple(self._split(row) for row in h_res.unbind(-2)),
        )

    def _split(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Return the n entries of ``[..., n]``, the feature axis put back with size 1."""
        entries = weights.unbind(-1)
        if weights.dim() == 1:
            return entries
        return tuple(entry.unsqueeze(self.feature_axis) for entry in entries)

    def extra_repr(self) -> str:
        """Return the settings for the printout of the module."""
        parts = [f"num_streams={self.num_streams}", f"index={self.index}", f"init={self.init!r}"]
        if self.needs_dim:
            parts.insert(1, f"dim={self.dim}, feature_axis={self.feature_axis}")
        return ", ".join(parts)


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is when it is fp32 or fp64 already."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
