"""Sums into chosen rows in the shape of the value, where code flattens rows to add to them."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from . import meta
from .dialects import name_of
from .operations import has_known_home, shape_of


def unflatten_row_sums(graph: fx.Graph) -> None:
    """Make ``index_add(x.flatten(1), 0, rows, y)`` an ``index_add(x, 0, rows, y.unflatten(1, x.shape[1:]))``.

    The result is flattened for those who read it so, and not for a ``view_as(x)``. It is the same sum of the same
    elements, as rows stay rows; what it is added to is ``x``, of the shape that streams have. Training on a random
    part of the batch is written so (DINOv2, arXiv 2304.07193).

    >>> class Some(torch.nn.Module):
    ...     def forward(self, x, rows, y):
    ...         return torch.index_add(x.flatten(1), 0, rows, y.flatten(1)).view_as(x)
    >>> gm, x = fx.symbolic_trace(Some()), torch.zeros(2, 1, 3)
    >>> inputs = (x, torch.tensor([1]), torch.ones(1, 1, 3))
    >>> from torch.fx.passes.shape_prop import ShapeProp
    >>> _ = ShapeProp(gm).propagate(*inputs)
    >>> unflatten_row_sums(gm.graph)
    >>> [node.name for node in gm.graph.nodes if node.op.startswith("call")]
    ['flatten_1', 'getattr_1', 'getitem', 'unflatten', 'index_add_1']
    """
    for node in list(graph.nodes):
        if name_of(node) == "index_add" and node.op in ("call_function", "call_method") and has_known_home(node):
            names = ("input", "dim", "index", "source")
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            x = _flattened(given.get("input"))
            if x is not None and given.get("dim") == 0 and isinstance(given.get("source"), fx.Node):
                _unflatten(graph, node, x, given)


def _flattened(node: object) -> fx.Node | None:
    """Return what ``node`` flattens to rows of one axis, None if it does something else."""
    if not isinstance(node, fx.Node) or name_of(node) != "flatten" or not has_known_home(node):
        return None
    if node.op not in ("call_function", "call_method") or node.args[1:] != (1,) or node.kwargs:
        return None
    x = node.args[0]
    return x if isinstance(x, fx.Node) and shape_of(x) is not None and shape_of(node) is not None else None


def _unflatten(graph: fx.Graph, node: fx.Node, x: fx.Node, given: dict[str, object]) -> None:
    flat, source = given["input"], given["source"]
    assert isinstance(flat, fx.Node) and isinstance(source, fx.Node)
    with graph.inserting_before(node):
        shape = graph.call_function(getattr, (x, "shape"))
        row = graph.call_function(getitem, (shape, slice(1, None)))
        rows = graph.call_method("unflatten", (source, 1, row))
        extra = {"alpha": given["alpha"]} if "alpha" in given else {}
        total = graph.call_function(torch.index_add, (x, 0, given["index"], rows), extra)  # type: ignore[arg-type]
    made = {shape: torch.Size, row: torch.Size, rows: torch.Tensor, total: torch.Tensor}
    for new, of_type in made.items():
        new.meta = {**node.meta, meta.TYPE.name: of_type}
        new.meta.pop("tensor_meta", None)
    if "tensor_meta" in x.meta:
        total.meta["tensor_meta"] = x.meta["tensor_meta"]
    if "tensor_meta" in source.meta:
        size = torch.Size((*source.meta["tensor_meta"].shape[:1], *(shape_of(x) or ())[1:]))
        like = torch.empty(size, device="meta")
        rows.meta["tensor_meta"] = source.meta["tensor_meta"]._replace(shape=size, stride=like.stride())
    for user in list(node.users):
        if user.op == "call_method" and user.target in ("view_as", "reshape_as") and user.args == (node, x):
            user.replace_all_uses_with(total)
            graph.erase_node(user)
    if node.users:
        with graph.inserting_before(node):
            again = graph.call_method("flatten", (total, 1))
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again)
    graph.erase_node(node)
    if not flat.users:
        graph.erase_node(flat)
