"""torch.vmap in traced code: one node, whose function is a graph of its own.

What ``torch.vmap`` is given is traced on one entry of the batch, and what was recorded meanwhile is cut out of the
graph. Parameters and values from outside, which the function closes over, become inputs of its own, so that they get
gradients and follow the model that the graph runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..graphs.graph_code import shared_function_of
from ..graphs.serialize import flatten_graph, unflatten_graph
from .recorder import Recorder


class Vmapped:
    """``torch.vmap`` of a graph, under a name that generated code can use.

    Args:
        graph: of the function, whose inputs are the batched ones and then those from outside.
        in_dims: the batched axis of each input.
        settings: ``out_dims``, ``randomness`` and ``chunk_size``.
    """

    def __init__(self, graph: fx.Graph, in_dims: tuple[int | None, ...], settings: dict[str, Any]) -> None:
        self.graph, self.in_dims, self.settings = graph, in_dims, settings
        self.function = shared_function_of(graph)
        self.__name__ = self.__qualname__ = "vmapped"

    def __call__(self, *args: Any) -> Any:
        """Call the function on every entry of the batch at once."""
        function = self.function
        return torch.vmap(lambda *inputs: function(None, *inputs), self.in_dims, **self.settings)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Vmapped:
        return self  # it has no state

    def __reduce__(self) -> Any:
        return _vmapped, (flatten_graph(self.graph), self.in_dims, self.settings)


def _vmapped(rows: list[tuple[Any, ...]], in_dims: tuple[int | None, ...], settings: dict[str, Any]) -> Vmapped:
    return Vmapped(unflatten_graph(rows), in_dims, settings)


def entry_of_batch(x: Any, dim: int) -> Any:
    """Return one entry of a batch, in memory of its own."""
    return x.select(dim, 0).clone()


def record_vmap(tracer: Recorder, func: Callable[..., Any], settings: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """Record a call of what ``torch.vmap`` returned.

    Args:
        tracer: that traces the code around it.
        func: the function that was given to ``torch.vmap``.
        settings: what else was given to it.
        args, kwargs: of the call; keywords are not batched but on their first axis, as torch has it.
    """
    settings = dict(settings)
    leaves, spec = pytree.tree_flatten(args)
    dims = pytree._broadcast_to_and_flatten(settings.pop("in_dims"), spec)
    if dims is None or kwargs:
        raise NotImplementedError("in_dims that do not fit the inputs of vmap, or keywords, are not traced")
    batched = [(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    with _apart(tracer) as made:
        entries = [tracer.create_proxy("call_function", entry_of_batch, pair, {}) for pair in batched]
        heads = [entry.node for entry in entries]
        given = iter(entries)
        inner = [leaf if dim is None else next(given) for leaf, dim in zip(leaves, dims, strict=True)]
        output = tracer.create_arg(func(*pytree.tree_unflatten(inner, spec)))
    graph, outside = _cut(made, heads, output)
    in_dims = (*(dim for _, dim in batched), *(None for _ in outside))
    for node in reversed(made):
        if node.op != "get_attr":
            tracer.graph.erase_node(node)
    given_values = (*(leaf for leaf, _ in batched), *(tracer.proxy_of(node) for node in outside))
    return tracer.create_proxy("call_function", Vmapped(graph, in_dims, settings), given_values, {})


@contextmanager
def _apart(tracer: Recorder) -> Iterator[list[fx.Node]]:
    """Yield what will be the nodes recorded meanwhile, which are not to be met again afterwards."""
    made: list[fx.Node] = []
    before = set(tracer.graph.nodes)
    with tracer.inlining_all():
        yield made
    made += [node for node in tracer.graph.nodes if node not in before]


def _cut(made: list[fx.Node], heads: list[fx.Node], output: Any) -> tuple[fx.Graph, list[fx.Node]]:
    """Return a graph of what was recorded, and the nodes from outside that it takes after its ``heads``."""
    graph = fx.Graph()
    copies = {head: graph.placeholder(f"batched_{i}") for i, head in enumerate(heads)}
    within = [node for node in made if node.op != "get_attr" and node not in copies]
    used = [n for node in within for n in node.all_input_nodes]
    fx.node.map_arg(output, used.append)
    outside = [n for n in dict.fromkeys(used) if n not in copies and n not in set(within)]
    for i, node in enumerate(outside):
        copies[node] = graph.placeholder(f"outside_{i}")
    for node in within:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.node.map_arg(output, copies.__getitem__))
    return graph, outside
