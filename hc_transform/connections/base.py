"""The base class of all connections. It knows no torch.fx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..streams.mixing import (
    AnyCoefficients,
    Coefficients,
    CompiledCoefficients,
    PackedCoefficients,
    compiling,
    entries,
    recomputed,
    twice,
)
from .projection import without_autocast

INITS = ("paper", "mirrored")
MIRRORED_SPREAD = 0.5
MAX_UNROLLED = 8  # streams that n * n tensors of weights mix; above it n * n launches and as many sums take too long
PACKED_DEVICES = ("cpu",)  # where compiled code gains nothing from single numbers, and takes long to compile


class Connection(nn.Module):
    """Make the coefficients of one residual from its streams.

    A variant defines :meth:`coefficients` and nothing else.

    Args:
        num_streams: n.
        index: place of the residual in its trunk; start "paper" reads stream ``index mod n``.
        dim: size of the feature axis, for variants with ``needs_dim``.
        feature_axis: the feature axis of a stream, -1 for ``(..., D)``, 1 for ``(B, C, ...)``.
        init: "paper" (one-hot read, unit writes) or "mirrored" (mean read, writes mirrored around 1).
        recompute: make the coefficients again in the backward pass in place of saving what they
            were made from.

    Raises:
        ValueError: for an ``init`` or ``num_streams`` out of range, or a missing ``dim``.
    """

    needs_dim: ClassVar[bool] = False
    min_streams: ClassVar[int] = 1

    def __init__(
        self,
        num_streams: int,
        *,
        index: int = 0,
        dim: int | None = None,
        feature_axis: int = -1,
        init: str = "paper",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if num_streams < self.min_streams:
            raise ValueError(
                f"{type(self).__name__} joins at least {self.min_streams} streams, got num_streams={num_streams}"
            )
        if init not in INITS:
            raise ValueError(f"init is one of {', '.join(INITS)}; got {init!r}")
        if self.needs_dim and dim is None:
            raise ValueError(f"{type(self).__name__} needs dim, the size of the feature axis")
        self.num_streams = num_streams
        self.index = index
        self.dim = dim
        self.feature_axis = feature_axis
        self.init = init
        self.recompute = recompute

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return h_pre ``[..., n]``, h_post ``[..., n]`` and h_res ``[..., n, n]``, at least fp32.

        The leading dimensions are those of a stream without its feature axis, or none at all.
        ``h_res=None`` is the identity.
        """
        raise NotImplementedError

    def forward(self, streams: Sequence[Tensor]) -> AnyCoefficients:
        """Return the coefficients for ``streams``, n tensors of one shape.

        They are computed in fp32 (fp64 for fp64 parameters) whatever the autocast state.
        """
        if self.recompute:
            return recomputed(self._forward, *streams)
        return self._forward(*streams)

    def compiled_coefficients(self, streams: Sequence[Tensor]) -> Coefficients | None:
        """Return the coefficients as single numbers of a token, the form that a compiler fuses best.

        None, the default, leaves them to :meth:`coefficients`. See :mod:`hc_transform.connections.per_token`.
        """
        return None

    def _forward(self, *streams: Tensor) -> AnyCoefficients:
        with without_autocast(streams[0]):
            if compiling() and self._unrolls(streams[0]):
                compiled = self._compiled(streams)
                if compiled is not None:
                    return compiled
            h_pre, h_post, h_res = self.coefficients(streams)
        if h_res is not None and self.num_streams > MAX_UNROLLED:
            return PackedCoefficients(self._split(h_pre), self._split(h_post), h_res, self.feature_axis)
        rows = None if h_res is None else tuple(self._split(row) for row in h_res.unbind(-2))
        return Coefficients(self._split(h_pre), self._split(h_post), rows)

    def _unrolls(self, stream: Tensor) -> bool:
        return self.num_streams <= MAX_UNROLLED and stream.device.type not in PACKED_DEVICES

    def _compiled(self, streams: tuple[Tensor, ...]) -> AnyCoefficients | None:
        n = self.num_streams
        fresh = n > 1 and streams[0] is streams[1]
        if not self.needs_dim or fresh or not torch.is_grad_enabled():
            return self.compiled_coefficients(streams)
        names = twice(*streams)
        compiled = self.compiled_coefficients(names[:n])
        return None if compiled is None else CompiledCoefficients(*compiled, streams, names[n:])

    def _split(self, weights: Tensor) -> tuple[Tensor, ...]:
        return entries(weights, self.feature_axis)

    def extra_repr(self) -> str:
        """Return the settings for the printout of the module."""
        parts = [f"num_streams={self.num_streams}", f"index={self.index}", f"init={self.init!r}"]
        if self.needs_dim:
            parts.insert(1, f"dim={self.dim}, feature_axis={self.feature_axis}")
        return ", ".join(parts)


def starting_reads(num_streams: int, index: int, init: str, peak: float = 1.0) -> Tensor:
    """Return h_pre ``[n]`` at the start, which sums to 1.

    Start "paper": ``peak`` on stream ``index mod n``, the rest shared by the others. Start
    "mirrored": the mean.
    """
    if init == "mirrored" or num_streams == 1:
        return torch.full((num_streams,), 1.0 / num_streams)
    reads = torch.full((num_streams,), (1.0 - peak) / (num_streams - 1))
    reads[index % num_streams] = peak
    return reads


def starting_writes(num_streams: int, init: str) -> Tensor:
    """Return h_post ``[n]`` at the start: ones, or spread evenly over [0.5, 1.5]; the mean is 1."""
    if init == "paper" or num_streams == 1:
        return torch.ones(num_streams)
    return 1.0 + MIRRORED_SPREAD * torch.linspace(-1.0, 1.0, num_streams)
