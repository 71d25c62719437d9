"""Tensors that share memory: which proxies an in-place operation changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .proxy import ValueProxy


def written_through(x: Any, write: Any) -> Any:
    """Return ``x`` as it is after ``write``, an in-place operation on a tensor that shares its memory.

    A graph of values does not show such a write; this node does.
    """
    return x


class Aliases:
    """The living proxies of each piece of memory."""

    def __init__(self) -> None:
        self._proxies: dict[int, list[weakref.ref[ValueProxy]]] = {}

    def add(self, proxy: ValueProxy) -> None:
        """Remember a proxy whose value is a tensor."""
        self._proxies.setdefault(memory_of(proxy.hc_value), []).append(weakref.ref(proxy))

    def of(self, tensor: torch.Tensor) -> Iterator[ValueProxy]:
        """Yield the proxies of all tensors that share memory with ``tensor``."""
        memory = memory_of(tensor)
        for reference in self._proxies.get(memory, []):
            proxy = reference()
            # Memory may have been freed and used again: a living proxy keeps its own.
            if proxy is not None and memory_of(proxy.hc_value) == memory:
                yield proxy


def memory_of(tensor: torch.Tensor) -> int:
    """Return a number for the memory of a tensor; a tensor without storage has its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return -1 if tensor.is_inference() else tensor._version
