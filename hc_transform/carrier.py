"""A trunk value on its way from one converted block to the next through Python code that knows no streams.

The code between blocks mostly hands the value on. Whoever looks at it sees its readout: a torch
function, an operator, an attribute or a method of a :class:`TrunkValue` is that of the mean of its
streams.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .streams import Streams, expand, readout


@dataclass(eq=False, repr=False)
class TrunkValue:
    """The n streams of a trunk value, which stand for their readout wherever no converted block takes them.

    Not a tensor for ``isinstance``, on purpose: every way in which torch's engines take a tensor
    apart would lose the streams. It is a dataclass and a pytree of n tensors for them (FSDP's hooks).

    Attributes:
        streams: n tensors of one shape.
        step: how many block calls of its chain it has passed.
        mode: how it is read out, "mean" or "sum".
    """

    streams: Streams
    step: int = 1
    mode: str = "mean"

    def read_out(self) -> Tensor:
        """Return the value that the streams stand for."""
        return readout(self.streams, self.mode)

    def to(self, *args: Any, **kwargs: Any) -> TrunkValue:
        """Return the streams moved or cast."""
        return TrunkValue(tuple(stream.to(*args, **kwargs) for stream in self.streams), self.step, self.mode)

    @property
    def shape(self) -> torch.Size:
        """The shape of one stream."""
        return self.streams[0].shape

    @property
    def ndim(self) -> int:
        """The number of dimensions of one stream."""
        return self.streams[0].ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of one stream."""
        return self.streams[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the streams."""
        return self.streams[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether a stream needs a gradient."""
        return any(stream.requires_grad for stream in self.streams)

    def size(self, *args: Any) -> Any:
        """Return the size of one stream."""
        return self.streams[0].size(*args)

    def dim(self) -> int:
        """Return the number of dimensions of one stream."""
        return self.streams[0].dim()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = read_out((args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("streams", "step", "mode"):
            raise AttributeError(name)
        return getattr(self.read_out(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.read_out()[index]

    def __len__(self) -> int:
        return len(self.streams[0])

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.read_out())

    def __repr__(self) -> str:
        return f"TrunkValue({len(self.streams)} streams of {tuple(self.shape)})"


def _binary(function: Any) -> Any:
    return lambda self, other: function(self.read_out(), read_out(other))


def _reflected(function: Any) -> Any:
    return lambda self, other: function(read_out(other), self.read_out())


for _name in "add sub mul truediv floordiv mod pow matmul".split():
    setattr(TrunkValue, f"__{_name}__", _binary(getattr(operator, _name)))
    setattr(TrunkValue, f"__r{_name}__", _reflected(getattr(operator, _name)))
for _name in "lt le gt ge".split():
    setattr(TrunkValue, f"__{_name}__", _binary(getattr(operator, _name)))
setattr(TrunkValue, "__neg__", lambda self: -self.read_out())  # noqa: B010


pytree.register_pytree_node(
    TrunkValue,
    lambda value: (list(value.streams), (value.step, value.mode)),
    lambda streams, context: TrunkValue(tuple(streams), *context),
    serialized_type_name="hc_transform.TrunkValue",
)


def is_trunk_value(value: Any) -> bool:
    """Whether ``value`` is a trunk value held as streams."""
    return type(value) is TrunkValue


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
    return any(type(leaf) is TrunkValue for leaf in pytree.tree_leaves(values, is_leaf=is_trunk_value))


def enter(value: Any, num_streams: int) -> Streams:
    """Return the streams that a block is given: those of a trunk value, or a tensor expanded.

    >>> len(enter(torch.ones(2), 4))
    4
    """
    return value.streams if type(value) is TrunkValue else expand(value, num_streams)


def hand_on(streams: Streams, step: int, mode: str) -> TrunkValue:
    """Return streams as the one value that the code between two blocks hands on."""
    return TrunkValue(streams, step, mode)
