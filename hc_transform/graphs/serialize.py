"""Graphs as flat data, for pickling: a linked list of nodes would recurse once per node."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from . import meta

KEPT = (meta.MODULE, meta.LOCATION, meta.ON_VALUES, meta.STREAMS, meta.WRITES_INPUT)
KEPT_META = (*(entry.name for entry in KEPT), "stack_trace")


class NodeRef(NamedTuple):
    """Stands for the node at a place of the list."""

    place: int


class OperatorRef(NamedTuple):
    """Stands for an operator of ``torch.ops``, which does not pickle."""

    name: str
    overload: str | None

    def found(self) -> Any:
        """Return the operator."""
        namespace, _, name = self.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name)
        return packet if self.overload is None else getattr(packet, self.overload)


def _named_target(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return OperatorRef(target._schema.name, target._overloadname)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return OperatorRef(target._qualified_op_name, None)
    return target


def flatten_graph(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Return a graph as a list of (op, name, target, args, kwargs, meta)."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    rows = []
    for node in graph.nodes:
        args, kwargs = (_replaced(a, fx.Node, lambda n: NodeRef(index[n])) for a in (node.args, node.kwargs))
        kept = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        if getattr(meta.TYPE.of(node), "__module__", None) in ("builtins", "torch"):
            kept[meta.TYPE.name] = meta.TYPE.of(node)
        rows.append((node.op, node.name, _named_target(node.target), args, kwargs, kept))
    return rows


def unflatten_graph(rows: list[tuple[Any, ...]]) -> fx.Graph:
    """Return the graph that :func:`flatten_graph` made the list from."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, name, target, args, kwargs, kept in rows:
        args, kwargs = (_replaced(a, NodeRef, lambda ref: nodes[ref.place]) for a in (args, kwargs))
        target = target.found() if isinstance(target, OperatorRef) else target
        node = graph.create_node(op, target, args, kwargs, name)
        node.meta.update(kept)
        nodes.append(node)
    return graph


def _replaced(value: Any, kind: type, replace: Any) -> Any:
    if isinstance(value, kind):
        return replace(value)
    if isinstance(value, slice):
        return slice(*(_replaced(v, kind, replace) for v in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _replaced(v, kind, replace) for key, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, kind, replace) for v in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_replaced(v, kind, replace) for v in value)
    return value
