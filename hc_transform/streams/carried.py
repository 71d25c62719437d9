"""Operations that are carried: each is done to every stream of a trunk value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from .hook_readouts import within_hooks
from .in_place import has_own_hooks
from .mixing import Streams


def carry(
    op: Callable[..., Tensor] | str,
    streams: Sequence[Tensor],
    *args: Any,
    position: int = 0,
    **kwargs: Any,
) -> Streams:
    """Apply ``op`` to every stream; a string names a tensor method.

    ``position`` is where the stream stands among ``op``'s positional arguments.

    >>> from hc_transform import expand
    >>> [s.shape for s in carry("reshape", expand(torch.ones(2, 3), 2), 3, 2)]
    [torch.Size([3, 2]), torch.Size([3, 2])]
    """
    if _is_hooked(op):
        return _within_hooks(carry, op, streams, args, position, kwargs)
    return tuple(_apply(op, stream, args, position, kwargs) for stream in streams)


class CarriedFunction:
    """A function as carried by streams, ``carry_gelu(streams)``: generated code can name it."""

    def __init__(self, function: Callable[..., Tensor], carry: Callable[..., Streams]) -> None:
        self.function = function
        self.carry = carry
        self.__name__ = self.__qualname__ = f"{carry.__name__}_{plain_name(function)}"

    def __call__(self, streams: Sequence[Tensor], *args: Any, **kwargs: Any) -> Streams:
        """Apply the function to every stream."""
        return self.carry(self.function, streams, *args, **kwargs)


def carry_on_copies(
    op: Callable[..., Tensor] | str,
    streams: Sequence[Tensor],
    *args: Any,
    position: int = 0,
    **kwargs: Any,
) -> Streams:
    """Apply an in-place ``op`` to a copy of every stream: fresh streams are one and the same tensor."""
    return carry(op, [stream.clone() for stream in streams], *args, position=position, **kwargs)


def carry_together(
    op: Callable[..., Tensor] | str,
    operands: Sequence[Sequence[Tensor]],
    *args: Any,
    positions: Sequence[int],
    **kwargs: Any,
) -> Streams:
    """Apply ``op`` to the first stream of every operand, to the second of every operand, and so on.

    ``positions`` is where the operands stand among ``op``'s positional arguments, in order.

    >>> from hc_transform import expand
    >>> x, y = expand(torch.full((2,), 3.0), 2), expand(torch.full((2,), 5.0), 2)
    >>> [s.tolist() for s in carry_together(torch.lerp, (x, y), 0.5, positions=(0, 1))]
    [[4.0, 4.0], [4.0, 4.0]]
    """
    made = []
    for values in zip(*operands, strict=True):
        arguments = list(args)
        for position, value in zip(positions, values, strict=True):
            arguments.insert(position, value)
        made.append(_call(op, arguments, kwargs))
    return tuple(made)


def carry_together_on_copies(
    op: Callable[..., Tensor] | str,
    operands: Sequence[Sequence[Tensor]],
    *args: Any,
    positions: Sequence[int],
    **kwargs: Any,
) -> Streams:
    """Apply an in-place ``op`` as :func:`carry_together` does, to copies of the streams."""
    copies = [[stream.clone() for stream in streams] for streams in operands]
    return carry_together(op, copies, *args, positions=positions, **kwargs)


def carry_random(
    op: Callable[..., Tensor] | str,
    streams: Sequence[Tensor],
    *args: Any,
    position: int = 0,
    **kwargs: Any,
) -> Streams:
    """Apply a random scaling ``op`` (dropout, stochastic depth) with one draw for all streams.

    Such an operation multiplies its input by a random mask, so the mask is what it makes of
    ones. It takes as much from the random generator as one call of ``op`` does.
    """
    if _is_hooked(op):
        return _within_hooks(carry_random, op, streams, args, position, kwargs)
    mask = _apply(op, torch.ones_like(streams[0]), args, position, kwargs)
    return tuple(stream * mask for stream in streams)


class FirstOutput:
    """An operator of several outputs as one that returns the first of them."""

    def __init__(self, operator: Callable[..., Any]) -> None:
        self.operator = operator
        self.__name__ = self.__qualname__ = f"first_of_{plain_name(operator)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the first output."""
        first: Tensor = self.operator(*args, **kwargs)[0]
        return first


def plain_name(function: Callable[..., Any]) -> str:
    """Return a function's name as an identifier: operators of ``torch.ops`` are called "gelu.default".

    >>> plain_name(torch.ops.aten.gelu.default), plain_name(torch.relu)
    ('gelu', 'relu')
    """
    return function.__name__.partition(".")[0]


def carry_statistics(
    op: Callable[..., Tensor],
    streams: Sequence[Tensor],
    *args: Any,
    statistics: tuple[Tensor | None, bool, float],
    **kwargs: Any,
) -> Streams:
    """Apply a batch norm, a function, as :func:`carry_folded` applies a module.

    ``statistics`` are the running variance (None where none is kept), whether those of the batch are used, and the
    momentum.
    """
    running_var, training, momentum = statistics
    if not training:
        return carry(op, streams, *args, **kwargs)
    before = None if running_var is None else running_var.detach().clone()
    folded = op(torch.cat(tuple(streams)), *args, **kwargs)
    if running_var is not None and before is not None:
        samples = folded.numel() // (len(streams) * running_var.numel())
        _as_of_one_stream(running_var, before, momentum, samples, len(streams))
    return folded.chunk(len(streams))


def carry_folded(op: Callable[[Tensor], Tensor], streams: Sequence[Tensor]) -> Streams:
    """Apply ``op`` once, the streams folded into the batch axis.

    Batch norm sees all streams as one batch and updates its running statistics once. Its unbiased
    variance is that of as many values as one stream has, so that equal streams change it as one does.
    """
    if _is_hooked(op):
        return _within_hooks(carry_folded, op, streams)
    count = len(streams)
    module = getattr(op, "__self__", op)
    norms: list[Any] = [m for m in module.modules() if _tracks_variance(m)] if isinstance(module, nn.Module) else []
    before = [norm.running_var.detach().clone() for norm in norms]
    folded: Tensor = op(torch.cat(tuple(streams)))
    for norm, variance in zip(norms, before, strict=True):
        rate = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
        _as_of_one_stream(norm.running_var, variance, rate, folded.numel() // (count * norm.num_features), count)
    return folded.chunk(count)


def _as_of_one_stream(running_var: Tensor, before: Tensor, rate: Any, samples: int, count: int) -> None:
    """Correct a running variance that was updated with ``count`` streams of ``samples`` values for that of one."""
    if samples > 1:
        factor = (1 - 1 / (count * samples)) / (1 - 1 / samples)
        # .data: the backward pass keeps running_var, without needing it, and would mind a change.
        running_var.data.mul_(factor).add_((1 - rate) * (1 - factor) * before)


def _tracks_variance(module: Any) -> bool:
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and module.training and module.running_var is not None


def _is_hooked(op: Any) -> bool:
    """Whether hooks that a user registered are called with a module that is carried."""
    if not isinstance(op, nn.Module):
        return False
    if op._modules and any([has_own_hooks(part) for part in op.modules() if part is not op]):
        raise UnsupportedModel(
            f"a part of a {type(op).__name__} that is done on each stream has a forward hook. Put the hook on the "
            f"{type(op).__name__} itself, or register it before the conversion"
        )
    return has_own_hooks(op)


def _within_hooks(
    carry: Any, module: Any, streams: Any, args: Any = (), position: int = 0, kwargs: dict[str, Any] | None = None
) -> Streams:
    def on(streams: Any, *args: Any, **kwargs: Any) -> Streams:
        return tuple(carry(module.forward, streams, *args, **kwargs))

    placed = {"position": position} if position else {}
    return within_hooks(module, functools.partial(on, **placed), tuple(streams), args, position, kwargs or {})


def _apply(
    op: Callable[..., Tensor] | str, x: Tensor, args: tuple[Any, ...], position: int, kwargs: dict[str, Any]
) -> Tensor:
    return _call(op, [*args[:position], x, *args[position:]], kwargs)


def _call(op: Callable[..., Tensor] | str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    if isinstance(op, str):
        return getattr(args[0], op)(*args[1:], **kwargs)
    return op(*args, **kwargs)
