"""Frac-connections: fractions of the hidden vector in place of copies of it, or of copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..streams.mixing import AnyCoefficients, FractionCoefficients, full_precision
from .base import MAX_UNROLLED, Connection, starting_reads, starting_writes
from .dynamic import SCALE
from .projection import project_each_normed


class FracConnection(Connection):
    """Dynamic frac-connections: m fractions of each of n streams are joined, fraction by fraction.

    Frac-Connections, arXiv 2503.14125: the hidden vector is cut into m fractions; h_pre and h_res
    are matrices over fractions, h_post one weight a fraction, each with a static part and a dynamic
    one, ``scale * tanh(norm(fraction) @ W)``. With n = 1 no stream is copied. With n > 1 the
    ``n * m`` rows (fraction f of stream s is row ``s * m + f``) are joined in the same way, as the
    ``hyper-connections`` package generalises it. Fraction f of the branch input starts as fraction
    f of the stream that is read, so the start is the plain residual for any n and m.

    Args:
        num_streams, settings: as for :class:`Connection`; ``dim`` is needed, and is a multiple of m.
        num_fractions: m.
        num_views: v, branch inputs that are read; they are stacked on a new first axis.
        tanh: False leaves the tanh out.
        mix_outputs: weigh every fraction of the branch output into every row (``h_post``
            ``[n * m, m]``), as the ``hyper-connections`` package does; the paper writes each
            fraction to its own.

    Raises:
        ValueError: m does not divide ``dim``.
    """

    needs_dim = True

    def __init__(
        self,
        num_streams: int,
        *,
        num_fractions: int = 4,
        num_views: int = 1,
        tanh: bool = True,
        mix_outputs: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(num_streams, **settings)
        n, m, v = num_streams, num_fractions, num_views
        assert self.dim is not None  # checked by the base class
        if m < 1 or self.dim % m:
            raise ValueError(f"a feature axis of size {self.dim} cannot be cut into num_fractions={m} equal fractions")
        self.num_fractions, self.num_views, self.tanh, self.mix_outputs = m, v, tanh, mix_outputs
        own = torch.eye(m)
        h_pre = starting_reads(n, self.index, self.init)[:, None] * own[:, None, :]  # [m, n, m]
        h_post = starting_writes(n, self.init)[:, None].expand(n, m)  # [n, m]
        self.h_pre = nn.Parameter(h_pre.flatten(1).repeat(v, 1, 1))  # [v, m, n * m]
        self.h_post = nn.Parameter(((h_post[..., None] * own) if mix_outputs else h_post).flatten(0, 1).clone())
        self.h_res = nn.Parameter(torch.eye(n * m))  # [target, source]
        self.sizes = [v * m, m if mix_outputs else 1, n * m]
        self.projection = nn.Parameter(torch.zeros(self.dim // m, sum(self.sizes)))
        self.scale_alpha = nn.Parameter(torch.full((1,), SCALE))  # of h_pre and h_res
        self.scale_beta = nn.Parameter(torch.full((1,), SCALE))  # of h_post

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return h_pre ``[..., v, m, nm]``, h_post ``[..., nm]`` or ``[..., nm, m]``, h_res ``[..., nm, nm]``."""
        n, m = self.num_streams, self.num_fractions
        rows = [row for stream in streams for row in stream.chunk(m, self.feature_axis)]
        dynamic = project_each_normed(rows, self.projection, self.feature_axis)  # [..., k, nm]
        if self.tanh:
            dynamic = torch.tanh(dynamic)
        pre, post, res = dynamic.split(self.sizes, -2)
        if self.mix_outputs:  # row (s, g) gives [f], the weight of output fraction g into row (s, f)
            h_post = post.unflatten(-1, (n, m)).movedim(-2, -3).flatten(-3, -2)
        else:
            h_post = post[..., 0, :]
        scale_alpha, scale_beta = full_precision(self.scale_alpha), full_precision(self.scale_beta)
        return (
            full_precision(self.h_pre) + scale_alpha * pre.unflatten(-2, (self.num_views, m)),
            full_precision(self.h_post) + scale_beta * h_post,
            full_precision(self.h_res) + scale_alpha * res,
        )

    def _unrolls(self, stream: Tensor) -> bool:
        return self.num_streams * self.num_fractions <= MAX_UNROLLED and super()._unrolls(stream)

    def made(self, streams: Sequence[Tensor]) -> AnyCoefficients:
        """Return the coefficients for ``streams``."""
        h_pre, h_post, h_res = self.coefficients(streams)
        if not self.mix_outputs:
            h_post = h_post.unsqueeze(-1)
        views = tuple(self.rows(view) for view in h_pre.unbind(-3))
        return self.assembled(views, self.rows(h_post), self.rows(h_res))

    def assembled(self, h_pre: Any, h_post: Any, h_res: Any) -> AnyCoefficients:
        """Return the coefficients with their fractions."""
        return FractionCoefficients(h_pre, h_post, h_res, self.num_fractions, self.feature_axis)

    def extra_repr(self) -> str:
        """Return the settings for the printout of the module."""
        return f"{super().extra_repr()}, num_fractions={self.num_fractions}"
