"""Hyper-connections by hand: one layer around one branch, for models that are written with them.

The counterpart of the ``hyper-connections`` package, with its interface; the streams of a value
``(b, ...)`` travel packed in the batch axis, ``((b s), ...)``. The mathematics is that of
:mod:`hc_transform.connections`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..connections import CONNECTIONS, Connection, FracConnection, StaticConnection
from ..connections.base import starting_reads
from ..connections.dynamic import SCALE
from ..connections.projection import project_normed, without_autocast
from ..connections.starts import Resettable
from ..streams.mixing import (
    Coefficients,
    Streams,
    distribute,
    full_precision,
    mix,
    read,
    read_recomputed,
    write,
    write_recomputed,
)
from .packed_streams import get_expand_reduce_stream_functions, pack, unpack


def get_init_and_expand_reduce_stream_functions(
    num_streams: int,
    num_fracs: int = 1,
    dim: int | None = None,
    add_stream_embed: bool = False,
    disable: bool | None = None,
    channel_first: bool = False,
    reduction: str = "mean",
    **settings: Any,
) -> tuple[Callable[..., PlainResidual], nn.Module, nn.Module]:
    """Return a function that makes the layers of one trunk, and its expand and reduce modules.

    Layers made without ``layer_index`` are numbered in the order in which they are made, so that no
    two in a row start by reading the same stream.

    Args:
        num_streams, num_fracs, dim, channel_first, settings: given to each :class:`HyperConnections`.
        add_stream_embed, reduction: see :func:`get_expand_reduce_stream_functions`.
        disable: plain residuals in place of hyper-connections, and nothing expanded; by default so
            for one stream and one fraction.

    >>> init_hyper_conn, expand_stream, reduce_stream = get_init_and_expand_reduce_stream_functions(4)
    >>> layer = init_hyper_conn(dim=8, branch=nn.Linear(8, 8))
    >>> reduce_stream(layer(expand_stream(torch.randn(2, 5, 8)))).shape
    torch.Size([2, 5, 8])
    """
    if disable is None:
        disable = num_streams == 1 and num_fracs == 1
    settings.update(num_fracs=num_fracs, channel_first=channel_first)
    if dim is not None:
        settings["dim"] = dim
    numbers = count()

    def init_hyper_conn(**own: Any) -> PlainResidual:
        if disable:
            return PlainResidual(**own)
        if own.get("layer_index") is None:
            own["layer_index"] = next(numbers)
        return HyperConnections(num_streams, **{**settings, **own})

    ends = get_expand_reduce_stream_functions(num_streams, add_stream_embed, dim, disable, channel_first, reduction)
    return init_hyper_conn, *ends


class PlainResidual(nn.Module):
    """The plain residual with the interface of :class:`HyperConnections`: what ``disable=True`` gives.

    Args:
        branch: a module; without it the two-step form is used.
        residual_transform: a module that the skip goes through.
    """

    def __init__(
        self,
        *args: Any,
        branch: nn.Module | None = None,
        residual_transform: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.residual_transform = nn.Identity() if residual_transform is None else residual_transform

    def connect(self, residuals: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the branch's arguments, and the function from its output to the residuals after it."""
        return (residuals, *args), kwargs, lambda output: output + self.residual_transform(residuals)

    def forward(self, residuals: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the branch and add it to the residuals.

        Args:
            residuals: ``((b s), ..., d)``, or ``((b s), d, ...)`` with ``channel_first``.
            args, kwargs: further arguments of the branch.

        Returns:
            With a branch: what it returns, its first tensor replaced by the new residuals. Without:
            ``branch_input, add_residual``, the second a function from the branch's output to that.
        """
        inputs, kwargs, add = self.connect(residuals, args, kwargs)

        def add_residual(branch_output: Any) -> Any:
            (output, *rest), spec = tree_flatten(branch_output)
            return tree_unflatten((add(output), *rest), spec)

        if self.branch is None:
            return self.two_step(inputs, kwargs), add_residual
        return add_residual(self.branch(*inputs, **kwargs))

    def two_step(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the two-step form gives for the branch's arguments: the first of them."""
        return inputs[0]

    def decorate_branch(self, branch: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs ``branch`` within this connection.

        Raises:
            ValueError: a branch was given to the constructor already.
        """
        if self.branch is not None:
            raise ValueError("this layer has a branch already: call it, or make it without branch=")

        @functools.wraps(branch)
        def connected(residuals: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs, kwargs, add = self.connect(residuals, args, kwargs)
            (output, *rest), spec = tree_flatten(branch(*inputs, **kwargs))
            return tree_unflatten((add(output), *rest), spec)

        return connected


class HyperConnections(PlainResidual):
    """Hyper-connections around one branch, arXiv 2409.19606, appendix J, algorithm 2.

    Args:
        num_streams: n.
        dim: size of the feature axis.
        branch: a module; without it the two-step form is used.
        layer_index: place in the trunk; the layer starts by reading stream ``layer_index mod n``.
        tanh: False leaves out the tanh of the dynamic part.
        channel_first: the features are on axis 1, ``((b s), d, ...)``, with any axes after them.
        dropout: on the streams after the branch.
        add_branch_out_to_residual: False returns the branch's output alone.
        num_input_views: v; the branch gets ``(v, b, ...)``, v differently weighted reads.
        depth_residual_fn: in place of the sum of what the branch writes and the mixed streams, both
            packed: ``depth_residual_fn(written, mixed)``.
        num_fracs: m fractions of each stream (arXiv 2503.14125).
        residual_transform: a module that the packed streams go through before they are mixed; the
            branch reads them as they were. One that changes the number of positions needs
            ``connection="static"``: other coefficients are one for each position.
        additional_input_paths: further arguments of the branch that are packed streams of the same
            number too: their position (from 1) or keyword, or ``(path, dim)``. Each gets a read.
        connection: a key of ``CONNECTIONS``; fractions and views are of "dynamic" (or "frac").
        init, recompute, settings: as for the connection's class.

    Raises:
        ValueError: options that do not go together, or out of range.

    >>> layer = HyperConnections(4, dim=8, branch=nn.Linear(8, 8))
    >>> layer(torch.randn(2 * 4, 5, 8)).shape
    torch.Size([8, 5, 8])
    """

    get_expand_reduce_stream_functions = staticmethod(get_expand_reduce_stream_functions)
    get_init_and_expand_reduce_stream_functions = staticmethod(get_init_and_expand_reduce_stream_functions)

    def __init__(  # noqa: PLR0913  # the arguments of the package whose interface it has
        self,
        num_streams: int,
        *,
        dim: int,
        branch: nn.Module | None = None,
        layer_index: int | None = None,
        tanh: bool = True,
        channel_first: bool = False,
        dropout: float = 0.0,
        add_branch_out_to_residual: bool = True,
        num_input_views: int = 1,
        depth_residual_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        num_fracs: int = 1,
        residual_transform: nn.Module | None = None,
        additional_input_paths: Sequence[Any] = (),
        connection: str = "dynamic",
        **settings: Any,
    ) -> None:
        super().__init__(branch=branch, residual_transform=residual_transform)
        settings.update(index=layer_index or 0, dim=dim, feature_axis=1 if channel_first else -1)
        self.num_streams = num_streams
        self.connection = _make_connection(num_streams, connection, num_fracs, num_input_views, tanh, settings)
        self.add_branch_out_to_residual = add_branch_out_to_residual
        self.depth_residual_fn = depth_residual_fn
        self.dropout = nn.Dropout(dropout)
        paths = [path if isinstance(path, tuple) else (path, dim) for path in additional_input_paths]
        if any(isinstance(path, int) and path < 1 for path, _ in paths):
            raise ValueError(f"additional_input_paths counts arguments from 1, the residuals being 0; got {paths}")
        self.additional_input_paths = [path for path, _ in paths]
        self.additional_reads = nn.ModuleList(
            _StreamRead(num_streams, size, layer_index or 0, settings["feature_axis"], tanh) for _, size in paths
        )

    def connect(self, residuals: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the branch's arguments, and the function from its output to the residuals after it."""
        streams = unpack(residuals, self.num_streams)
        coefficients = self.connection(streams)
        recompute = self.connection.recompute
        branch_input = (read_recomputed if recompute else read)(streams, coefficients)
        inputs = [branch_input, *args]
        for path, additional in zip(self.additional_input_paths, self.additional_reads, strict=True):
            holder: Any = inputs if isinstance(path, int) else kwargs
            holder[path] = additional(unpack(holder[path], self.num_streams))
        if not isinstance(self.residual_transform, nn.Identity):
            streams = self._transformed(residuals)

        def add(output: Tensor) -> Tensor:
            if not self.add_branch_out_to_residual:
                return output
            if self.depth_residual_fn is not None:
                written, mixed = pack(distribute(output, coefficients)), pack(mix(streams, coefficients))
                return self.dropout(self.depth_residual_fn(written, mixed))
            return self.dropout(pack((write_recomputed if recompute else write)(streams, output, coefficients)))

        return tuple(inputs), kwargs, add

    def _transformed(self, residuals: Tensor) -> Streams:
        transformed = self.residual_transform(residuals)
        axis = self.connection.feature_axis
        before, after = (list(t.shape) for t in (residuals, transformed))
        del before[axis], after[axis]
        if before != after and type(self.connection) is not StaticConnection:
            raise ValueError(
                f"residual_transform changes the positions of the streams, {tuple(residuals.shape)} to "
                f"{tuple(transformed.shape)}, and there is one set of coefficients for each position: use "
                "connection='static'"
            )
        return unpack(transformed, self.num_streams)

    def two_step(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the branch input; with additional inputs all arguments, ``(args, kwargs)``."""
        return (list(inputs), kwargs) if self.additional_input_paths else inputs[0]


def _make_connection(
    num_streams: int, name: str, num_fracs: int, num_views: int, tanh: bool, settings: dict[str, Any]
) -> Connection:
    if name not in CONNECTIONS:
        raise ValueError(f"connection is one of {', '.join(map(repr, CONNECTIONS))}; got {name!r}")
    if name == "frac" or num_fracs > 1 or num_views > 1:
        if name not in ("frac", "dynamic"):
            raise ValueError(f"num_fracs and num_input_views above 1 need connection='dynamic', got {name!r}")
        return FracConnection(num_streams, num_fractions=num_fracs, num_views=num_views, tanh=tanh, **settings)
    if name == "dynamic":
        settings["tanh"] = tanh
    return CONNECTIONS[name](num_streams, **settings)


class _StreamRead(Resettable):
    """One more read of streams, with static and dynamic weights."""

    def __init__(self, num_streams: int, dim: int, index: int, feature_axis: int, tanh: bool) -> None:
        super().__init__()
        self.feature_axis, self.tanh = feature_axis, tanh
        self.weight = nn.Parameter(starting_reads(num_streams, index, "paper"))  # [n]
        self.projection = nn.Parameter(torch.zeros(dim, 1))
        self.scale = nn.Parameter(torch.full((1,), SCALE))

    def forward(self, streams: Streams) -> Tensor:
        with without_autocast(streams[0]):
            weights = []
            for stream, static in zip(streams, full_precision(self.weight).unbind(0), strict=True):
                dynamic = project_normed(stream, self.projection, self.feature_axis)[..., 0]
                dynamic = torch.tanh(dynamic) if self.tanh else dynamic
                weights.append((static + full_precision(self.scale) * dynamic).unsqueeze(self.feature_axis))
        return read(streams, Coefficients(tuple(weights), (), None))
