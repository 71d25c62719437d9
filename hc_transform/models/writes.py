"""What a run writes into the parameters of a model, undone: they are saved just before they are first written into."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def writes_undone(parameters: Iterable[nn.Parameter], watched: bool = True) -> Iterator[Collection[int]]:
    """Put parameters back on exit: values, gradients, and whether they require them. Yield what is written into.

    A write through ``.data`` changes no version, so every operation is looked at, below autograd. Parameters that
    nothing is written into are not copied.

    Args:
        parameters: what is put back.
        watched: whether values may be written; else operations are not looked at.
    """
    before = [(p, p.detach(), p.requires_grad, p.grad) for p in parameters]
    saving = _SavesBeforeWrites(t for _, value, _, grad in before for t in (value, grad) if t is not None)
    try:
        with saving if watched else contextlib.nullcontext():
            yield saving.saved
    finally:
        for storage, saved in saving.saved.values():
            if storage.nbytes() != saved.nbytes():
                storage.resize_(saved.nbytes())
            storage.copy_(saved)
        for parameter, value, requires_grad, grad in before:
            if not _is_same_memory(parameter, value):
                parameter.data = value
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


class _SavesBeforeWrites(TorchDispatchMode):
    """Save the memory of tensors just before an operation first writes into it."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.watched = {s._cdata: s for s in map(_storage_of, tensors) if s is not None}
        self.saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for written in _written(func, args, kwargs):
            storage = _storage_of(written)
            if storage is not None and storage._cdata in self.watched and storage._cdata not in self.saved:
                self.saved[storage._cdata] = storage, storage.clone()
        return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operation writes into; those that it may, where its schema does not say."""
    places = _places_written(func)
    if places is None:
        values: Any = (args, kwargs)
    elif places:
        values = [args[i] if i < len(args) else kwargs.get(name) for i, name in places]
    else:
        return
    yield from (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))


@functools.cache
def _places_written(func: Any) -> tuple[tuple[int, str], ...] | None:
    """Return the positions and names of the arguments that an operation writes into; None if it does not say."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    arguments = enumerate(schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return the memory of a tensor; None if it has none of its own, as one that wraps others."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _is_same_memory(parameter: torch.Tensor, value: torch.Tensor) -> bool:
    storage = _storage_of(parameter)
    if storage is None:
        return True
    other = _storage_of(value)
    places = [(t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (parameter, value)]
    return other is not None and storage._cdata == other._cdata and places[0] == places[1]
