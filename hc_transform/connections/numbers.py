"""Numbers of a token in place of tensors: how the formula of a connection runs in compiled code.

A formula is written on tensors ``[..., n]`` or ``[..., n, n]``, which takes eager code few operations. A compiler
fuses best what runs over the same axes, so compiled code gives the formula :class:`Numbers`, that behave as such
tensors and keep each number as a tensor of its own (see :mod:`hc_transform.connections.per_token`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ..streams.mixing import full_precision

ELEMENTWISE = frozenset(
    "abs add clamp cos detach div eq exp float double ge gt le log lt maximum minimum mul ne neg pow radd reciprocal "
    "relu rmul rpow rsub rtruediv "
    "rsqrt sigmoid sin softplus sqrt square sub tanh to truediv where".split()
)
MOVING = frozenset(
    "cat chunk flatten flip getitem movedim narrow permute roll select split stack transpose unbind unflatten "
    "unsqueeze".split()
)
OPERATORS = "add eq ge getitem gt le lt matmul mul ne neg pow radd rmatmul rmul rpow rsub rtruediv sub truediv".split()


class Numbers:
    """What stands for a tensor ``[..., *shape]``: each of its numbers as a tensor, one number a token.

    Functions and methods of torch take it as the tensor: those of each number alone are applied to each, those
    that move numbers move them, sums and softmax are written out. Any other takes the numbers put together to the
    tensor, and its result is taken apart again.

    Args:
        entries: of a stream's shape with size 1 on the feature axis, the last number of ``shape`` first.
        shape: of the numbers of a token.
        axis: the feature axis.
        tokens: the shape of a stream without it.
    """

    __hash__ = None  # type: ignore[assignment]  # as `==` compares numbers

    def __init__(self, entries: Sequence[Tensor], shape: Sequence[int], axis: int, tokens: Sequence[int]) -> None:
        self.entries, self.sizes, self.axis, self.tokens = tuple(entries), tuple(shape), axis, tuple(tokens)

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return torch.Size((*self.tokens, *self.sizes))

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor."""
        return self.entries[0].dtype

    def packed(self) -> Tensor:
        """Return the tensor."""
        flat = torch.stack([entry.squeeze(self.axis) for entry in self.entries], -1)
        return flat.unflatten(-1, self.sizes) if self.sizes else flat[..., 0]

    def like(self, x: Tensor) -> Numbers | Tensor:
        """Return a tensor in numbers too, if it has some for each token."""
        rank = len(self.tokens)
        if tuple(x.shape[:rank]) != self.tokens:
            return x
        flat = x.flatten(rank) if x.dim() > rank else x.unsqueeze(-1)
        return Numbers(
            [entry.unsqueeze(self.axis) for entry in flat.unbind(-1)], x.shape[rank:], self.axis, self.tokens
        )

    def __bool__(self) -> bool:
        raise TypeError("the formula of a connection cannot branch on numbers of a token: use torch.where")

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name)
        if callable(attribute):
            return functools.partial(_applied, attribute, self)
        return _applied(attribute.__get__, self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _applied(function, *args, **kwargs or {})


def _operator(function: Any) -> Callable[..., Any]:
    return lambda x, *others: _applied(function, x, *others)


for _name in OPERATORS:
    setattr(Numbers, f"__{_name}__", _operator(getattr(Tensor, f"__{_name}__")))


def tokens_of(stream: Tensor, axis: int) -> tuple[int, ...]:
    """Return the shape of a stream without its feature axis."""
    shape = list(stream.shape)
    del shape[axis]
    return tuple(shape)


def numbers_of(parameters: Sequence[Tensor], like: Tensor, axis: int) -> list[Numbers]:
    """Return the numbers of each parameter, at least fp32, every one expanded to the tokens of ``like``.

    They are one tensor before, so that one pass sums the gradients of all.
    """
    if not parameters:
        return []
    flat = torch.cat([full_precision(parameter).flatten() for parameter in parameters])
    shape = list(like.shape)
    shape[axis] = 1
    entries = iter(flat.view(-1, *(1,) * len(shape)).expand(-1, *shape).unbind(0))
    tokens = tokens_of(like, axis)
    return [Numbers([next(entries) for _ in range(p.numel())], p.shape, axis, tokens) for p in parameters]


def on_tensors(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of tensors; numbers are put together for it, and its results taken apart again."""
    held = any(isinstance(x, Numbers) for x in args)
    return _on_tensors(function, args, {}) if held else function(*args)


def _applied(function: Any, *args: Any, **kwargs: Any) -> Any:
    name = function.__name__
    if "out" in kwargs or (name.endswith("_") and not name.startswith("_")):
        raise TypeError(f"the formula of a connection cannot write into numbers of a token: {name}")
    rule = RULES.get(name.strip("_"), _on_tensors)
    made = rule(function, args, kwargs)
    return _on_tensors(function, args, kwargs) if made is NotImplemented else made


def _first(args: Any) -> Numbers:
    return next(x for x in tree_leaves(args) if isinstance(x, Numbers))


def _on_tensors(function: Any, args: Any, kwargs: Any) -> Any:
    like = _first((args, kwargs))
    args, kwargs = tree_map_only(Numbers, Numbers.packed, (args, kwargs))
    return tree_map_only(Tensor, like.like, function(*args, **kwargs))


def _on_each(function: Any, args: Any, kwargs: Any) -> Any:
    like = _first(args)
    rank, size = len(like.tokens), max(len(x.sizes) for x in args if isinstance(x, Numbers))
    operands = []
    for x in args:
        if isinstance(x, Tensor) and 0 < x.dim() <= size:  # the same for all tokens
            x = Numbers(x.reshape(-1, *(1,) * (rank + 1)).unbind(0), x.shape, like.axis, like.tokens)
        elif isinstance(x, Tensor) and x.dim():
            x = like.like(x)
        operands.append(x)
    if any(isinstance(x, Tensor) and x.dim() for x in (*operands, *kwargs.values())):
        return NotImplemented
    shape = torch.broadcast_shapes(*(x.sizes for x in operands if isinstance(x, Numbers)))
    columns = [_expanded(x, shape) if isinstance(x, Numbers) else (x,) * math.prod(shape) for x in operands]
    return Numbers([function(*row, **kwargs) for row in zip(*columns, strict=True)], shape, like.axis, like.tokens)


def _expanded(x: Numbers, shape: Sequence[int]) -> Sequence[Tensor]:
    if x.sizes == tuple(shape):
        return x.entries
    with _disable_current_modes():
        places = torch.arange(len(x.entries), device="cpu").view(x.sizes).expand(shape).flatten().tolist()
    return [x.entries[place] for place in places]


def _moved(function: Any, args: Any, kwargs: Any) -> Any:
    """Move places in place of numbers. Those of each token differ, to see whether tokens are moved too."""
    leaves = tree_leaves((args, kwargs))
    held = [x for x in leaves if isinstance(x, Numbers)]
    if any(isinstance(x, Tensor) for x in leaves):
        return NotImplemented
    entries = [entry for x in held for entry in x.entries]
    starts = iter(accumulate((len(x.entries) for x in held), initial=0))
    rank = len(held[0].tokens)
    tokens = (2,) * rank
    with _disable_current_modes():
        steps = len(entries) * torch.arange(2**rank, device="cpu").view(tokens)

        def places(x: Numbers) -> Tensor:
            start = next(starts)
            own = torch.arange(start, start + len(x.entries), device="cpu").view(x.sizes)
            return own + steps.view(*tokens, *(1,) * own.dim())

        def taken(moved: Tensor) -> Any:
            own = moved[(0,) * rank]
            if moved.shape[:rank] != tokens or not torch.equal(moved, own + steps.view(*tokens, *(1,) * own.dim())):
                raise _TokensMoved
            return Numbers(
                [entries[place] for place in own.flatten().tolist()], own.shape, held[0].axis, held[0].tokens
            )

        args, kwargs = tree_map_only(Numbers, places, (args, kwargs))
        try:
            return tree_map_only(Tensor, taken, function(*args, **kwargs))
        except _TokensMoved:
            return NotImplemented


class _TokensMoved(Exception):
    pass


def _along(args: Any, kwargs: Any) -> Any:
    """Return the parts of the numbers along the axis that is summed over, and the axis; None for any other sum."""
    x, dim, *others = (*args, kwargs.get("dim"))[:3] if len(args) == 1 else (*args, None)
    settings = {key: value for key, value in kwargs.items() if key not in ("dim", "_stacklevel") and value is not None}
    if not isinstance(x, Numbers) or not isinstance(dim, int) or not -len(x.sizes) <= dim < 0 or settings:
        return None
    return _applied(Tensor.unbind, x, dim), dim


def _sum(function: Any, args: Any, kwargs: Any) -> Any:
    along = _along(args, kwargs)
    return NotImplemented if along is None else functools.reduce(operator.add, along[0])


def _softmax(function: Any, args: Any, kwargs: Any) -> Any:
    along = _along(args, kwargs)
    if along is None:
        return NotImplemented
    parts, dim = along
    largest = functools.reduce(torch.maximum, parts).detach()
    weights = [torch.exp(part - largest) for part in parts]
    total = functools.reduce(operator.add, weights)
    return torch.stack([weight / total for weight in weights], dim)


RULES = {
    **dict.fromkeys(ELEMENTWISE, _on_each),
    **dict.fromkeys(MOVING, _moved),
    "sum": _sum,
    "softmax": _softmax,
}
