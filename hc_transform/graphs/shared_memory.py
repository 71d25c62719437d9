"""Writes into memory that has several names, in graphs that other tools made.

A graph of our tracer shows such writes (:mod:`hc_transform.graphs.aliases`). In others a later reader of another name
has no edge to the write, so that streams, which are memory of their own, would leave it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..streams.in_place import write_of
from . import meta
from .dialects import name_of

VIEWS = frozenset(  # what returns its input's memory, or may
    "view view_as permute transpose t T mT select narrow slice chunk split tensor_split unbind squeeze unsqueeze "
    "expand expand_as movedim moveaxis swapaxes swapdims unflatten flatten reshape reshape_as as_strided diagonal "
    "getitem getattr detach alias contiguous to type_as float half double bfloat16 dropout identity".split()
)


def seen_elsewhere(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """Return the values in whose memory something is written that is read by another name, or outlives the graph.

    >>> graph = fx.Graph()
    >>> a = graph.call_function(torch.relu, (graph.placeholder("x"),))
    >>> row = graph.call_method("select", (a, 0, 0))
    >>> _ = graph.call_method("zero_", (row,))
    >>> _ = graph.output(graph.call_method("exp", (a,)))
    >>> sorted(node.name for node in seen_elsewhere(fx.GraphModule({}, graph)))
    ['relu', 'select', 'zero_']
    """
    nodes = list(gm.graph.nodes)
    if any(meta.TYPE.known(node) or meta.MODULE.known(node) for node in nodes):
        return frozenset()
    modules = dict(gm.named_modules())
    number = {node: i for i, node in enumerate(nodes)}
    owner: dict[fx.Node, fx.Node] = {}  # of the memory, by a name for it
    writes: list[tuple[fx.Node, fx.Node]] = []
    for node in nodes:
        target = _written_by(node, modules)
        if target is None:
            owner[node] = owner[node.all_input_nodes[0]] if _is_view(node) else node
        else:
            owner[node] = owner[target]
            writes.append((node, owner[target]))
    names: dict[fx.Node, list[fx.Node]] = {}
    for node, memory in owner.items():
        names.setdefault(memory, []).append(node)
    shared = {memory for write, memory in writes if _read_after(write, names[memory], number)}
    outlives = {memory for _, memory in writes if memory.op in ("placeholder", "get_attr")}
    later = (node for memory in outlives for node in names[memory] if node is not memory)
    return frozenset({*(node for memory in shared for node in names[memory]), *later})


def _read_after(write: fx.Node, names: list[fx.Node], number: dict[fx.Node, int]) -> bool:
    """Whether a name that was there before ``write`` is read after it."""
    before = (node for node in names if number[node] < number[write])
    return any(number[user] > number[write] for node in before for user in node.users)


def _is_view(node: fx.Node) -> bool:
    if not node.all_input_nodes or node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        returned = node.target._schema.returns
        return bool(returned) and returned[0].alias_info is not None or name_of(node) == "dropout"
    return name_of(node) in VIEWS


def _written_by(node: fx.Node, modules: dict[str, Any]) -> fx.Node | None:
    """Return the value that ``node`` writes into, None if it writes into none."""
    target: Any = None
    if node.op == "call_module":
        target = node.args[0] if getattr(modules.get(str(node.target)), "inplace", False) and node.args else None
    elif isinstance(node.target, torch._ops.OpOverload):
        arguments = zip(node.target._schema.arguments, node.args, strict=False)
        target = next((a for s, a in arguments if s.alias_info is not None and s.alias_info.is_write), None)
    elif node.op in ("call_function", "call_method"):
        name = "__setitem__" if name_of(node) == "setitem" else name_of(node)
        write = write_of(name, node.args, dict(node.kwargs))
        target = None if write is None else write.target
    return target if isinstance(target, fx.Node) else None
