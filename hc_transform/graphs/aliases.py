"""Tensors that share memory: which proxies an in-place operation changes."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from . import meta

Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride and offset of a tensor in its memory


def written_through(x: Any, write: Any, layouts: tuple[Layout, Layout] | None = None) -> Any:
    """Return ``x`` as it is after ``write``, an in-place operation on a tensor that shares its memory.

    A graph of values does not show such a write; this node does.

    Args:
        x: before the write, or after it where it has its memory still.
        write: what the operation returned.
        layouts: of both, where the values that the graph runs on do not share memory.
    """
    if layouts is None:
        return x
    extents = [
        offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 for size, stride, offset in layouts
    ]
    memory = x.new_empty(max(extents))
    for value, layout in zip((x, write), layouts, strict=True):
        memory.as_strided(*layout).copy_(value)
    return memory.as_strided(*layouts[0])


def layout_of(tensor: torch.Tensor) -> Layout | None:
    """Return where a tensor lies in its memory; None if that is not by strides."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel():
        return None
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def is_seen_elsewhere(write: fx.Node) -> bool:
    """Whether a tensor that shares memory with what ``write`` wrote into is used afterwards."""
    return any(user.target is written_through and user.args[1] is write and user.users for user in write.users)


def lost_writes(graph: fx.Graph, gone: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return the last write into each tensor that outlives the graph, where it is not done any more.

    Args:
        graph: as traced.
        gone: nodes that are done on streams.

    Returns:
        The tensor written into, as it is before all writes, by the last write.
    """
    first: dict[fx.Node, fx.Node] = {}  # what is written into, by what stands for it afterwards
    last: dict[fx.Node, fx.Node] = {}
    lost: set[fx.Node] = set()
    for node in graph.nodes:
        operand = meta.WRITES.of(node)
        if operand is not None:
            target = node.all_input_nodes[operand]
            first[node] = first.get(target, target)
            if node in gone or target in lost:
                lost.add(node)
            last[first[node]] = node
        elif node.target is written_through and isinstance(node.args[0], fx.Node):
            first[node] = first.get(node.args[0], node.args[0])
            if node.args[1] in lost:
                lost.add(node)
    return {write: tensor for tensor, write in last.items() if write in lost}


class Aliases:
    """The living proxies of each piece of memory."""

    def __init__(self) -> None:
        self._proxies: dict[int, list[weakref.ref[Any]]] = {}

    def add(self, proxy: Any) -> None:
        """Remember a proxy whose value is a tensor."""
        self._proxies.setdefault(memory_of(proxy.hc_value), []).append(weakref.ref(proxy))

    def of(self, tensor: torch.Tensor) -> Iterator[Any]:
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
