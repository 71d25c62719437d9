"""The arithmetic of streams: expand, read, write and readout.

A trunk value x becomes a Python tuple of n tensors of x's shape and dtype. There is no stream
axis, so any layout works and Inductor fuses each function below into few kernels. With h_pre[i],
h_post[i] and h_res[i][j] (Hyper-Connections, arXiv 2409.19606, eq. 1 to 5):

    branch input = sum_i h_pre[i] X[i]
    X'[i]        = sum_j h_res[i][j] X[j] + h_post[i] y
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from .packed_sums import are_packed, packed_sums

Streams = tuple[Tensor, ...]

UNPACKED_DEVICES = ("cpu", "meta")  # where eager code adds up products one by one


class Coefficients(NamedTuple):
    """The weights of one connection, each entry broadcastable against a stream.

    ``h_res[i][j]`` weighs source stream j into target stream i; ``h_res=None`` is the identity.
    """

    h_pre: tuple[Tensor, ...]
    h_post: tuple[Tensor, ...]
    h_res: tuple[tuple[Tensor, ...], ...] | None


class CompiledCoefficients(NamedTuple):
    """:class:`Coefficients` of compiled code, with other names of the streams they were made from.

    The gradient that :func:`write` gives to ``written_from`` is added to that of the coefficients, which
    comes last: the kernel that adds up both then computes the first, in place of reading it from memory.
    """

    h_pre: tuple[Tensor, ...]
    h_post: tuple[Tensor, ...]
    h_res: tuple[tuple[Tensor, ...], ...] | None
    made_from: tuple[Tensor, ...]
    written_from: tuple[Tensor, ...]


class PackedCoefficients(NamedTuple):
    """:class:`Coefficients` of many streams, whose n * n weights stay one tensor ``[..., n, n]``."""

    h_pre: tuple[Tensor, ...]
    h_post: tuple[Tensor, ...]
    matrix: Tensor
    feature_axis: int

    @property
    def h_res(self) -> tuple[tuple[Tensor, ...], ...]:
        """The rows, entry by entry."""
        return tuple(entries(row, self.feature_axis) for row in self.matrix.unbind(-2))


class FractionCoefficients(NamedTuple):
    """The weights of a connection that joins fractions of streams (arXiv 2503.14125).

    Each of n streams is cut into m fractions along ``axis``; row ``k = s * m + f`` is fraction f of
    stream s. ``h_pre[v][f][k]`` weighs row k into fraction f of the branch's input view v,
    ``h_res[k][j]`` row j into row k. ``h_post[k]`` has one entry, for the branch output's own
    fraction ``k mod m``, or m entries, one for each of its fractions.
    """

    h_pre: tuple[tuple[tuple[Tensor, ...], ...], ...]
    h_post: tuple[tuple[Tensor, ...], ...]
    h_res: tuple[tuple[Tensor, ...], ...]
    num_fractions: int
    axis: int


AnyCoefficients = Coefficients | CompiledCoefficients | PackedCoefficients | FractionCoefficients


def entries(weights: Tensor, feature_axis: int) -> tuple[Tensor, ...]:
    """Return the n entries of ``[..., n]``, the feature axis of a stream put back with size 1."""
    parts = weights.unbind(-1)
    if weights.dim() == 1:
        return parts
    return tuple(part.unsqueeze(feature_axis) for part in parts)


def expand(x: Tensor, num_streams: int, keep_layout: bool = False) -> Streams:
    """Return ``num_streams`` streams, all equal to ``x``.

    Tokens ``(B, N, D)`` that lie in memory as ``(B, D, N)``, as an embedding of patches leaves them, are put
    in order once: everything that sums over features would else have to, for each stream. With ``keep_layout``
    they stay as they lie.

    >>> len(expand(torch.ones(2, 3), 4))
    4
    """
    return (x.contiguous() if x.dim() == 3 and not keep_layout else x,) * num_streams


def read(streams: Sequence[Tensor], coefficients: AnyCoefficients) -> Tensor:
    """Return the branch input ``sum_i h_pre[i] X[i]``, of a stream's shape and dtype.

    With several input views (:class:`FractionCoefficients`) they are stacked on a new first axis.
    """
    dtype = streams[0].dtype
    if not isinstance(coefficients, FractionCoefficients):
        return stored([_weighted_sum(coefficients.h_pre, streams, dtype)])[0]
    rows = _fractions(streams, coefficients)
    views = [
        _joined([_weighted_sum(weights, rows, dtype) for weights in view], coefficients.axis)
        for view in coefficients.h_pre
    ]
    return views[0] if len(views) == 1 else torch.stack(views)


def write(
    streams: Sequence[Tensor],
    branch: Tensor,
    coefficients: AnyCoefficients,
    branch_first: bool = False,
) -> Streams:
    """Return the streams after one branch, ``X'[i] = sum_j h_res[i][j] X[j] + h_post[i] y``.

    Dtype and memory format are those of ``stream + branch``, as in the residual add this replaces,
    or of ``branch + stream`` with ``branch_first``.
    """
    dtype = torch.promote_types(streams[0].dtype, branch.dtype)
    if isinstance(coefficients, FractionCoefficients):
        return _write_fractions(streams, branch, coefficients, dtype, branch_first)
    if isinstance(coefficients, CompiledCoefficients) and coefficients.made_from[0] is streams[0]:
        streams = coefficients.written_from
    if coefficients.h_res is None:
        pairs = zip(streams, coefficients.h_post, strict=True)
        if branch_first:
            return stored([(_product(branch, post) + stream).to(dtype) for stream, post in pairs])
        return stored([(stream + _product(branch, post)).to(dtype) for stream, post in pairs])
    first = (branch, *streams) if branch_first else streams
    if isinstance(coefficients, PackedCoefficients) and _takes_matrix(first, coefficients):
        pairs = zip(_mixed_by_matrix(streams, coefficients.matrix), coefficients.h_post, strict=True)
        return stored([(mixed + _product(branch, post)).to(dtype) for mixed, post in pairs])
    rows = list(zip(coefficients.h_res, coefficients.h_post, strict=True))
    if _packs_sums([weight for row, post in rows for weight in (*row, post)], (*streams, branch), dtype):
        return packed_sums([(*row, post) for row, post in rows], (*streams, branch))
    if branch_first:
        return stored([_weighted_sum((post, *row), (branch, *streams), dtype) for row, post in rows])
    return stored([_weighted_sum(_second(post, row), _second(branch, streams), dtype) for row, post in rows])


def _second(value: Tensor, others: Sequence[Tensor]) -> Streams:
    """Return ``others`` with ``value``, of the branch, after the first.

    Were it the last, compiled code would add up the streams as soon as it makes them, and keep the sums in fp32.
    """
    return (others[0], value, *others[1:])


def mix(streams: Sequence[Tensor], coefficients: AnyCoefficients) -> Streams:
    """Return the part of :func:`write` that comes from the streams, ``sum_j h_res[i][j] X[j]``."""
    dtype = streams[0].dtype
    if coefficients.h_res is None:
        return tuple(streams)
    if isinstance(coefficients, PackedCoefficients) and _takes_matrix(streams, coefficients):
        return tuple(mixed.to(dtype) for mixed in _mixed_by_matrix(streams, coefficients.matrix))
    if isinstance(coefficients, FractionCoefficients):
        rows = _fractions(streams, coefficients)
        return _merged([_weighted_sum(row, rows, dtype) for row in coefficients.h_res], coefficients)
    return tuple(_weighted_sum(row, streams, dtype) for row in coefficients.h_res)


def _takes_matrix(streams: Sequence[Tensor], coefficients: PackedCoefficients) -> bool:
    """Whether the streams can be mixed by a matrix product and keep their layout in memory."""
    last = coefficients.feature_axis in (-1, streams[0].dim() - 1)
    return (last or coefficients.matrix.dim() == 2) and all(stream.is_contiguous() for stream in streams)


def _mixed_by_matrix(streams: Sequence[Tensor], matrix: Tensor) -> Streams:
    """Return ``sum_j matrix[..., i, j] X[j]`` of contiguous streams, accumulated in at least fp32."""
    dtype = torch.promote_types(streams[0].dtype, matrix.dtype)
    matrix = matrix.to(dtype)
    if matrix.dim() == 2:
        packed = torch.stack([stream.to(dtype) for stream in streams])
        return (matrix @ packed.flatten(1)).view_as(packed).unbind(0)
    return (matrix @ torch.stack([stream.to(dtype) for stream in streams], -2)).unbind(-2)


def distribute(branch: Tensor, coefficients: AnyCoefficients) -> Streams:
    """Return the part of :func:`write` that comes from the branch, ``h_post[i] y``."""
    if not isinstance(coefficients, FractionCoefficients):
        return tuple(_product(branch, post).to(branch.dtype) for post in coefficients.h_post)
    ys = branch.chunk(coefficients.num_fractions, coefficients.axis)
    rows = [_weighted_sum(post, _given_to(k, post, ys), branch.dtype) for k, post in enumerate(coefficients.h_post)]
    return _merged(rows, coefficients)


def _write_fractions(
    streams: Sequence[Tensor],
    branch: Tensor,
    coefficients: FractionCoefficients,
    dtype: torch.dtype,
    branch_first: bool,
) -> Streams:
    rows = _fractions(streams, coefficients)
    ys = branch.chunk(coefficients.num_fractions, coefficients.axis)
    written = []
    for k, (res, post) in enumerate(zip(coefficients.h_res, coefficients.h_post, strict=True)):
        given = _given_to(k, post, ys)
        if branch_first:
            written.append(_weighted_sum((*post, *res), (*given, *rows), dtype))
        else:
            written.append(_weighted_sum((*res, *post), (*rows, *given), dtype))
    return _merged(written, coefficients)


def _given_to(row: int, post: Sequence[Tensor], ys: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the fractions of the branch output that ``post`` weighs into ``row``."""
    return ys if len(post) == len(ys) else (ys[row % len(ys)],)


def _fractions(streams: Sequence[Tensor], coefficients: FractionCoefficients) -> Streams:
    return tuple(row for x in streams for row in x.chunk(coefficients.num_fractions, coefficients.axis))


def _merged(rows: Sequence[Tensor], coefficients: FractionCoefficients) -> Streams:
    m = coefficients.num_fractions
    return tuple(_joined(rows[k : k + m], coefficients.axis) for k in range(0, len(rows), m))


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenate tensors; the result lies in memory in their order of axes, as that of an add does."""
    like = parts[0]
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: -strides[d])
    if torch.compiler.is_compiling() or order == sorted(order):
        return torch.cat(tuple(parts), axis)
    joined = torch.cat([part.permute(order) for part in parts], order.index(axis % like.dim()))
    return joined.permute([order.index(d) for d in range(like.dim())])


def read_recomputed(streams: Sequence[Tensor], coefficients: AnyCoefficients) -> Tensor:
    """Return :func:`read`, done again in the backward pass in place of saving its intermediate values."""
    return recomputed(read, streams, coefficients)


def write_recomputed(
    streams: Sequence[Tensor],
    branch: Tensor,
    coefficients: AnyCoefficients,
    branch_first: bool = False,
) -> Streams:
    """Return :func:`write`, done again in the backward pass in place of saving its intermediate values."""
    return recomputed(write, streams, branch, coefficients, branch_first)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that draws no random numbers; the backward pass calls it again."""
    if not torch.is_grad_enabled() or transformed():  # which take no hooks on saved tensors
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def readout(streams: Sequence[Tensor], mode: str = "mean") -> Tensor:
    """Return one value for all streams: their mean, or their sum (``mode="sum"``).

    >>> readout(expand(torch.full((2,), 3.0), 4)).tolist()
    [3.0, 3.0]
    """
    if len(streams) == 1:
        return streams[0]
    total = full_precision(streams[0])
    for stream in streams[1:]:
        total = total + stream
    if mode == "mean":
        total = total / len(streams)
    return total.to(streams[0].dtype)


def scattered(source: Tensor, like: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return zeros of the shape of ``like`` with ``source`` added at ``index``: what ``index_add`` adds.

    >>> scattered(torch.ones(1, 2), torch.empty(2, 2), 0, torch.tensor([1])).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    return source.new_zeros(like.shape).index_add(dim, index, source)


def scattered_entries(source: Tensor, like: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return what ``scatter_add`` adds to ``like``."""
    return source.new_zeros(like.shape).scatter_add(dim, index, source)


def put_entries(source: Tensor, like: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Return what ``index_put`` with ``accumulate=True`` adds to ``like``."""
    return source.new_zeros(like.shape).index_put(tuple(indices), source, accumulate=True)


def summed_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over a batch of matrix products, what ``addbmm`` adds."""
    return torch.bmm(a, b).sum(0)


def _weighted_sum(weights: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return ``sum_k weights[k] * values[k]`` in ``dtype``, accumulated in at least fp32.

    Values come first in each product, so that the result has their memory format (channels last).
    """
    if _packs_sums(weights, values, dtype):
        return packed_sums([weights], values)[0]
    return _sum_of_products(dtype, *weights, *values)


def _packs_sums(weights: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether eager code on a GPU makes sums as one product; on a CPU that takes longer."""
    if torch.compiler.is_compiling() or values[0].device.type in UNPACKED_DEVICES or transformed():
        return False
    return are_packed(weights, values, dtype)


@torch.compiler.allow_in_graph
def _sum_of_products(dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """Return the sum for as many weights as values; Dynamo need not look at each product."""
    weights, values = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    total = _product(values[0], weights[0])
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + _product(value, weight)
    return total.to(dtype)


def _product(value: Tensor, weight: Tensor) -> Tensor:
    """Return ``value * weight`` in at least fp32.

    A weight with axes promotes the product itself. A copy of the value in fp32 is then no value of
    its own, which the backward pass would keep in place of the half as large original.
    """
    return value * (weight if weight.dim() else weight.view((1,) * value.dim()))


def stored(values: Sequence[Tensor]) -> Streams:
    """Return ``values``; in compiled code they and the sums of their gradients are written to memory once.

    Several kernels read each of them. Inductor would make some anew in every kernel, and keep others in fp32.
    """
    return _stored(*values) if compiling() else tuple(values)


def compiling() -> bool:
    """Whether a compiler will run this code here, forward and backward alone.

    Exported programs run anywhere, and transforms have rules for them: torch's own operators.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not transformed()


@torch.compiler.assume_constant_result  # Dynamo guards the transforms around the code that it traces
def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is at work, for which custom operators have no rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.compiler.allow_in_graph
def twice(*values: Tensor) -> Streams:
    """Return ``values`` and again ``values``; the gradients of both are added up last."""
    return _Twice.apply(*values)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Streams:
        return tuple([value.clone() for value in (*values, *values)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        n = len(gradients) // 2
        return tuple([a + b for a, b in zip(gradients[:n], gradients[n:], strict=True)])


@torch.compiler.allow_in_graph
def _stored(*values: Tensor) -> Streams:
    return _Stored.apply(*values)


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Streams:
        return tuple([in_memory(value) for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple([in_memory(gradient) for gradient in gradients])


def in_memory(x: Tensor) -> Tensor:
    """Return ``x``; compiled code puts it into memory here, and does not compute it in every kernel that uses it."""
    _teach_inductor()
    return _store(x)


@torch.library.custom_op("hc_transform::store", mutates_args=())
def _store(x: Tensor) -> Tensor:
    return x.clone()


@_store.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_store.register_autograd(lambda ctx, gradient: gradient)


@functools.cache
def _teach_inductor() -> None:
    """Tell Inductor how to compile ``hc_transform::store``, which otherwise is a copy."""
    from torch._inductor import lowering

    def stored_in_memory(x: Any) -> Any:
        x.realize()
        return x

    lowering.register_lowering(torch.ops.hc_transform.store.default, type_promotion_kind=None)(stored_in_memory)


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is when it is fp32 or fp64 already."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
