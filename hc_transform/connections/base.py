"""The base class of all connections. It knows no torch.fx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

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
from .numbers import Numbers, numbers_of
from .per_token import Weights
from .projection import without_autocast
from .starts import Resettable

INITS = ("paper", "mirrored")
MIRRORED_SPREAD = 0.5
MAX_UNROLLED = 8  # streams that n * n tensors of weights mix; above it n * n launches and as many sums take too long
NOT_OF_FORMULAS = {"index", "init", "dim", "recompute", "_hc_made_with", *vars(nn.Module())} - {"training"}
PACKED_DEVICES = ("cpu",)  # where compiled code gains nothing from single numbers, and takes long to compile


class Connection(Resettable):
    """Make the coefficients of one residual from its streams.

    A variant defines :meth:`coefficients` and nothing else, with operations of torch. Compiled code runs it on
    numbers of a token (:class:`Numbers`) that stand for its parameters and for what ``project_flattened`` and
    ``project_each_normed`` make of the parameters named in ``projections``. What depends on ``index``, ``init``
    and ``dim`` is made in the constructor: compiled code serves all connections that are alike but for those.
    A variant with modules or other attributes than tensors and constants is compiled as it is in eager code.

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
    _unrolled: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls._unrolled = staticmethod(_unrolled(cls))

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

    def _forward(self, *streams: Tensor) -> AnyCoefficients:
        with without_autocast(streams[0]):
            if compiling() and self._unrolls(streams[0]):
                return self._compiled(streams)
            return self.made(streams)

    def _unrolls(self, stream: Tensor) -> bool:
        return (
            self.num_streams <= MAX_UNROLLED
            and stream.device.type not in PACKED_DEVICES
            and not self._modules
            and all(_is_constant(value) for _, value in self._settings())
        )

    def _settings(self) -> tuple[tuple[str, Any], ...]:
        return tuple([(name, value) for name, value in vars(self).items() if name not in NOT_OF_FORMULAS])

    def _compiled(self, streams: tuple[Tensor, ...]) -> AnyCoefficients:
        n = self.num_streams
        own = (*self._parameters.values(), *self._buffers.values())
        names = (tuple(self._parameters), tuple(self._buffers))
        fresh = n > 1 and streams[0] is streams[1]
        if not self.needs_dim or fresh or not torch.is_grad_enabled():
            return self.assembled(*self._unrolled(self._settings(), *names, *own, *streams))
        copies = twice(*streams)
        made = self.assembled(*self._unrolled(self._settings(), *names, *own, *copies[:n]))
        return CompiledCoefficients(*made, streams, copies[n:]) if isinstance(made, Coefficients) else made

    def made(self, streams: Sequence[Tensor]) -> AnyCoefficients:
        """Return the coefficients for ``streams``, entry by entry."""
        h_pre, h_post, h_res = self.coefficients(streams)
        pre, post = self.row(h_pre), self.row(h_post)
        if h_res is not None and self.num_streams > MAX_UNROLLED:
            return PackedCoefficients(pre, post, h_res, self.feature_axis)
        return self.assembled(pre, post, None if h_res is None else self.rows(h_res))

    def assembled(self, h_pre: Any, h_post: Any, h_res: Any) -> AnyCoefficients:
        """Return coefficients from their entries."""
        return Coefficients(h_pre, h_post, h_res)

    def row(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Return the entries of ``[..., n]``, each broadcastable against a stream."""
        return weights.entries if isinstance(weights, Numbers) else entries(weights, self.feature_axis)

    def rows(self, weights: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Return the entries of ``[..., m, n]``, row by row."""
        return tuple(self.row(row) for row in weights.unbind(-2))

    def extra_repr(self) -> str:
        """Return the settings for the printout of the module."""
        parts = [f"num_streams={self.num_streams}", f"index={self.index}", f"init={self.init!r}"]
        if self.needs_dim:
            parts.insert(1, f"dim={self.dim}, feature_axis={self.feature_axis}")
        return ", ".join(parts)


def _unrolled(cls: type[Connection]) -> Callable[..., Any]:
    """Return the formula of a class on numbers of a token, as one call for Dynamo, which need not look at each.

    Dynamo passes no modules: the connection is made again, without its constructor.
    """

    def unrolled(settings: Any, parameters: Sequence[str], buffers: Sequence[str], *tensors: Tensor) -> Any:
        parts = iter(tensors)
        own = dict(zip(parameters, parts, strict=False))
        connection = cls.__new__(cls)
        nn.Module.__init__(connection)
        connection._buffers.update(zip(buffers, parts, strict=False))
        streams = tuple(parts)
        spread = [name for name in parameters if name not in cls.projections]
        in_numbers = numbers_of([own[name] for name in spread], streams[0], dict(settings)["feature_axis"])
        weights = {name: Weights(own[name]) for name in parameters if name in cls.projections}
        vars(connection).update(settings, **weights, **dict(zip(spread, in_numbers, strict=True)))
        return tuple(connection.made(streams))[:3]

    return torch.compiler.allow_in_graph(unrolled)


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_constant(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


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
