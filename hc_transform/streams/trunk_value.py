"""A trunk value on its way from one converted block to the next through Python code that knows no streams.

The code between blocks mostly hands the value on. Whoever looks at it sees its readout: a torch
function, an operator, an attribute or a method of a :class:`TrunkValue` is that of the mean of its
streams, and what writes into it moves all its streams. A sum with another value or a multiple is one of each
stream (:mod:`hc_transform.streams.linear_ops`), which is the same to whoever looks.

It is a real tensor, so that ``isinstance(x, torch.Tensor)`` takes the branch of a tensor: a subclass made
by ``as_subclass``, with NaN for its values. Three things were weighed:

- An object that says by ``__class__`` that it is a tensor crashes as soon as it reaches C++, and
  ``torch.compile`` does not believe it.
- A subclass with ``__torch_dispatch__`` (``_make_wrapper_subclass``) sees what passes by ``__torch_function__``,
  but Dynamo cannot make one in its graph, nor trace one that is not taken apart into tensors at every border.
- A subclass with ``__torch_function__`` alone is made, read and written inside of Dynamo's graph: there streams between
  blocks cost nothing, and nothing is left of the subclass. This is it.

What passes by ``__torch_function__`` are custom autograd functions and C++ extensions. For them the tensor has the
shape of the value, the gradient of the readout (each stream gets its part) and NaN in every element: an extension
that reads its memory gives NaN, never another number. In eager code, and where a block is compiled by itself, this
costs one write of a stream: 13 us a hand-over of 4 small streams on a CPU (8 us without gradients; 0.2 us for an object
that is no tensor), of some hundreds for a block.

In eager code writes are seen by the versions of the readouts that were given out, so that views count. Dynamo passes
by ``__torch_function__`` for ``x[...] = value``, ``torch.relu_`` and views: there the next block refuses, while it is
traced. (``is_dynamo_compiling`` holds in traced code alone: Dynamo itself reads attributes of real values meanwhile.)

It is a pytree of its n streams; hooks of sharding engines see it taken apart
(:mod:`hc_transform.streams.hook_readouts`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModel
from .in_place import Write, name_of, refusal, version_of, write_of
from .linear_ops import linear_operand
from .mixing import Streams, expand, readout, transformed

OF_ONE_STREAM = frozenset(
    "shape ndim dtype device layout is_cuda is_meta is_sparse is_quantized is_nested itemsize size dim numel nelement "
    "is_floating_point is_complex element_size get_device __len__".split()
)
# What these give is the same operation on each stream: engines move and cast by them what a block is given.
CARRIED = frozenset("to cpu cuda half float double bfloat16 contiguous".split())


class TrunkValue(Tensor):
    """The n streams of a trunk value, which stand for their readout wherever no converted block takes them.

    Attributes:
        streams: n tensors of one shape.
        step: how many block calls of its chain it has passed.
        reduction: how it is read out, "mean" or "sum".
        given: the readouts that were given out, by whether gradients were recorded, each with its version then.
        untouched: what the streams began with, where the blocks since then have none of their residuals in this call.
        origin: the tensor that a block was given, overwrote and gave back, with its version then: one memory with this.
        traced_origin: that tensor in compiled code.
        traced: what compiled code must not write into: the readouts that it gave out, and what it made the value of.
    """

    streams: Streams
    step: int
    reduction: str
    given: dict[bool, tuple[Tensor, int]]
    origin: tuple[weakref.ref[Tensor], int] | None
    untouched: Tensor | None
    traced: tuple[Tensor, ...]
    traced_origin: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls: Any, streams: Streams, step: int = 1, reduction: str = "mean") -> TrunkValue:
        """Return ``streams`` as one value."""
        shell = _shell(streams, reduction)
        try:
            value = shell.as_subclass(TrunkValue)
        except RuntimeError:  # fake tensors are a subclass of their own, and stay one
            with _disable_current_modes():
                value = torch.empty(0).as_subclass(TrunkValue)
        value.streams = streams
        value.step = step
        value.reduction = reduction
        value.given = {}
        value.untouched = None
        value.origin, value.traced_origin = None, ()
        value.traced = (shell,) if torch.compiler.is_dynamo_compiling() else ()
        return value

    def read_out(self) -> Tensor:
        """Return the value that the streams stand for."""
        if torch.compiler.is_dynamo_compiling():
            value = readout(self.streams, self.reduction)
            if len(self.streams) > 1:
                value = _made(value)
                self.traced = (*self.traced, value)
            return value
        settle(self)
        recorded = torch.is_grad_enabled()
        if recorded not in self.given:
            with torch.inference_mode(False), torch.set_grad_enabled(recorded):  # a tensor that counts its versions
                value = readout(self.streams, self.reduction)
            self.given[recorded] = value, value._version
        return self.given[recorded][0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_readouts(func, args, kwargs or {})

    def set_(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Refuse: torch would set the memory of what stands for the streams in C++."""
        raise UnsupportedModel(refusal("set_"))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TrunkValue({len(self.streams)} streams of {tuple(self.streams[0].shape)})"

    def __hash__(self) -> int:
        return id(self)


def settle(value: TrunkValue) -> None:
    """Move the streams by what was written into a readout that was given out, or into a view of it."""
    origin = value.origin and value.origin[0]()
    if value.origin and origin is not None and version_of(origin) != value.origin[1]:
        _move(value, readout(value.streams, value.reduction), origin)
        value.origin = value.origin[0], version_of(origin)
        value.given = {}
    for recorded, (seen, version) in list(value.given.items()):
        if seen._version != version:
            if len(value.streams) > 1:  # of one stream the readout is the stream
                with torch.set_grad_enabled(recorded or torch.is_grad_enabled()):
                    _move(value, readout(value.streams, value.reduction), seen)
            value.given = {recorded: (seen, seen._version)}
            _renew_origin(value)


def _move(value: TrunkValue, before: Tensor, after: Tensor) -> None:
    """Move every stream by the same, so that the readout goes from ``before`` to ``after``."""
    change = after - before
    value.untouched = None
    if value.reduction == "sum":
        change = change / len(value.streams)
    value.streams = tuple([stream + change for stream in value.streams])


def _on_readouts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: C901  # one rule for each kind of function
    """Return ``func`` of the readouts; what it writes into a trunk value moves the streams."""
    if func is checkpoint:
        return _checkpointed(*args, **kwargs)
    name, first = name_of(func), args[0] if args else None
    if type(first) is TrunkValue:
        if name in OF_ONE_STREAM:
            return func(first.streams[0], *args[1:], **kwargs)
        if name in ("grad", "_base"):
            return None
        if name == "requires_grad":
            return any([stream.requires_grad for stream in first.streams])
        if name == "contiguous" and all([s.is_contiguous(*args[1:], **kwargs) for s in first.streams]):
            return first
        if name in CARRIED:
            streams = tuple([func(s, *args[1:], **kwargs) for s in first.streams])
            same = all([new is old for new, old in zip(streams, first.streams, strict=True)])
            return first if same else hand_on(streams, first.step, first.reduction)
        if reason := refusal(name):
            raise UnsupportedModel(reason)
    write = write_of(name, args, kwargs)
    if write is not None and type(write.target) is TrunkValue:
        if write.carried or write.random or torch.compiler.is_dynamo_compiling():
            return _written(write, func, args, kwargs)
    held = [type(a) is TrunkValue for a in args]
    if any(held) and not any([type(v) is TrunkValue for v in kwargs.values()]):
        place = linear_operand(name, args, kwargs, held)
        if place is not None and args[place].reduction == "mean" and _recorded(args[place]):
            return _on_each(func, args, kwargs, place)
    result = func(*read_out(args), **read_out(kwargs))
    if not torch.compiler.is_dynamo_compiling():
        for value in trunk_values((args, kwargs)):
            settle(value)
            if any([result is seen for seen, _ in value.given.values()]):
                return value  # what passes its input through, and functions that write without a name that tells
    return result


def _recorded(value: TrunkValue) -> bool:
    """Whether the gradients of the streams, if they have any, reach what is made of them now.

    In the forward of a custom autograd function they do not: there they go by what stands for the streams in C++.
    """
    return torch.is_grad_enabled() or not any([stream.requires_grad for stream in value.streams])


def _on_each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> Any:
    """Return what a linear function makes of each stream of the trunk value at a place."""
    value = args[place]
    if not torch.compiler.is_dynamo_compiling():
        settle(value)

    def on(tensor: Tensor) -> Tensor:
        return func(*args[:place], tensor, *args[place + 1 :], **kwargs)

    made = hand_on(tuple([on(stream) for stream in value.streams]), value.step, value.reduction)
    made.untouched = None if value.untouched is None else on(value.untouched)
    return made


def _written(write: Write, func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out a function that writes into a trunk value, and return what it returns."""
    value: Any = write.target

    def on(tensor: Tensor) -> Tensor:
        """Return ``tensor`` after the function has written into it, in place of the trunk value."""
        given = pytree.tree_map(lambda v: tensor if v is value else v, (args, kwargs), is_leaf=is_trunk_value)
        given_args, given_kwargs = read_out(given)
        func(*given_args, **given_kwargs)
        return tensor

    if not torch.compiler.is_dynamo_compiling():
        settle(value)
    streams, value.untouched = value.streams, None
    if len(streams) == 1:
        on(streams[0])
    elif write.random:
        mask = on(torch.ones_like(streams[0]))
        value.streams = tuple([stream * mask for stream in streams])
    elif write.carried:
        value.streams = tuple([on(stream.clone()) for stream in streams])
    else:
        before = value.read_out()
        _move(value, before, on(before.clone()))
    _renew(value)
    return value if write.returns else None


def _renew(value: TrunkValue) -> None:
    """Let the readouts that were given out, and views of them, be that of the streams as they are now."""
    if torch.compiler.is_dynamo_compiling():
        for origin in value.traced_origin:
            origin.copy_(readout(value.streams, value.reduction))
        return
    _renew_origin(value)
    kept = {}
    for recorded, (seen, _) in value.given.items():
        if seen.shape == value.streams[0].shape:
            if len(value.streams) > 1:
                with torch.set_grad_enabled(recorded):
                    seen.copy_(readout(value.streams, value.reduction))
            kept[recorded] = (seen, seen._version)
    value.given = kept


def _renew_origin(value: TrunkValue) -> None:
    """Let the tensor that a block was given and gave back be what the streams stand for, if anybody has it still."""
    origin = value.origin and value.origin[0]()
    if value.origin and origin is not None:
        origin.copy_(readout(value.streams, value.reduction))
        value.origin = value.origin[0], version_of(origin)


def _checkpointed(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a function that is given streams: they go in one by one, for Dynamo takes tensors alone in there."""
    structure = [(len(a.streams), a.step, a.reduction) if type(a) is TrunkValue else (0, 0, "") for a in args]
    flat = [t for a in args for t in (a.streams if type(a) is TrunkValue else (a,))]

    def inner(*flat: Any) -> Any:
        given, start = [], 0
        for count, step, mode in structure:
            given.append(hand_on(tuple(flat[start : start + count]), step, mode) if count else flat[start])
            start += count or 1
        return function(*given)

    return checkpoint(inner, *flat, **kwargs)


def _shell(streams: Streams, mode: str) -> Tensor:
    """Return what stands for ``streams`` in C++: of their shape, with the readout's gradient, without its values."""
    if torch.compiler.is_exporting():
        return streams[0]
    if transformed():
        return torch.empty(0)
    shell = _without_values(mode, *streams)
    return _made(shell) if torch.compiler.is_dynamo_compiling() else shell


@torch.compiler.allow_in_graph
def _without_values(mode: str, *streams: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _WithoutValues.apply(mode, *streams)
    return torch.full_like(streams[0], float("nan"))


class _WithoutValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: str, *streams: Tensor) -> Tensor:
        ctx.parts, ctx.scale = len(streams), 1 / len(streams) if mode == "mean" else 1
        return torch.full_like(streams[0], float("nan"))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, *(gradient * ctx.scale,) * ctx.parts)


pytree.register_pytree_node(
    TrunkValue,
    lambda value: (list(value.streams), (value.step, value.reduction)),
    lambda streams, context: TrunkValue(tuple(streams), *context),
    serialized_type_name="hc_transform.TrunkValue",
)


def is_trunk_value(value: Any) -> bool:
    """Whether ``value`` is a trunk value held as streams."""
    return type(value) is TrunkValue


def trunk_values(values: Any) -> list[Any]:
    """Return the trunk values in nested ``values``."""
    return [leaf for leaf in pytree.tree_leaves(values, is_leaf=is_trunk_value) if type(leaf) is TrunkValue]


def read_out(values: Any) -> Any:
    """Return nested ``values`` with the readout of every trunk value in its place."""
    read: dict[int, Tensor] = {}  # what was one value stays one

    def one(value: Any) -> Any:
        if type(value) is not TrunkValue:
            return value
        if id(value) not in read:
            read[id(value)] = value.read_out()
        return read[id(value)]

    return pytree.tree_map(one, values, is_leaf=is_trunk_value)


def holds_streams(values: Any) -> bool:
    """Whether a trunk value is somewhere in nested ``values``."""
    return bool(trunk_values(values))


def enter(value: Any, num_streams: int, kept: bool = False, keep_layout: bool = False) -> Streams:
    """Return the streams that a block is given: those of a trunk value, or a tensor expanded.

    Args:
        value: a trunk value or a tensor.
        num_streams: how many streams a tensor becomes.
        kept: whether the block overwrites the tensor, and the streams are to be what it was.
        keep_layout: whether they stay as the tensor lies in memory.

    >>> len(enter(torch.ones(2), 4))
    4
    """
    if torch.compiler.is_dynamo_compiling():
        for tensor in value.traced if type(value) is TrunkValue else (value,):
            _unwritten(tensor)
    elif type(value) is TrunkValue:
        settle(value)
    if type(value) is TrunkValue:
        return value.streams
    return expand(value.clone() if kept else value, num_streams, keep_layout)


@torch.compiler.allow_in_graph
def _made(tensor: Tensor) -> Tensor:
    """Return ``tensor``; while tracing the fake tensor remembers that nothing is to be written into it."""
    tensor.hc_unwritten = tensor._version  # type: ignore[attr-defined]
    return tensor


@torch.compiler.allow_in_graph
def _unwritten(tensor: Tensor) -> Tensor:
    """Return ``tensor``; raise while tracing if it was made here and written into since."""
    if getattr(tensor, "hc_unwritten", tensor._version) != tensor._version:
        raise UnsupportedModel(
            "compiled code cannot write into a value between two converted blocks by x[...] = value, by torch.relu_ "
            "and the like, or through a view of it. Use a method (x.mul_(2)), make a new tensor, or leave this code "
            "uncompiled"
        )
    return tensor


def hand_on(streams: Streams, step: int, mode: str, given: Any = None) -> TrunkValue:
    """Return streams as the one value that the code between two blocks hands on.

    Args:
        streams: n tensors of one shape.
        step: how many block calls of its chain the value has passed.
        mode: how it is read out, "mean" or "sum".
        given: what the block was given, where it overwrites that and gives it back.
    """
    if given is None:
        return TrunkValue(streams, step, mode)
    overwrite(given, streams, mode)
    if type(given) is TrunkValue:
        given.step = step
        return given
    value = TrunkValue(streams, step, mode)
    if torch.compiler.is_dynamo_compiling():
        value.traced_origin = (given,)
    else:
        value.origin = weakref.ref(given), version_of(given)
    return value


def overwrite(memory: Any, value: Any, mode: str = "mean") -> Any:
    """Let ``memory``, a tensor or a trunk value, be ``value``, a tensor or streams; return it."""
    if type(memory) is not TrunkValue:
        memory.copy_(readout(value, mode) if isinstance(value, tuple) else value)
    elif isinstance(value, tuple):
        memory.streams = value
        _renew(memory)
    else:
        memory.copy_(value)
    return memory
