"""A graph as a sequence of regions, of which equal ones are one compiled function.

A compiler that is given a deep model as one graph optimises each of its equal blocks anew. Cut after writes, where
nothing but streams goes on, the graph is a sequence of regions; equal ones become one function of their
modules and streams, which is compiled once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..graphs.graph_code import code_key, function_of, shared_function_of
from ..graphs.guards import CHECKS
from ..graphs.shape_reads import is_shape_read
from ..streams import mixing as ops

WRITES = (ops.write, ops.write_recomputed)
MAX_PERIOD = 8  # residuals of one region
SLACK = 1.5  # times the least code, for fewer regions


@dataclass(frozen=True)
class Region:
    """Some nodes of a graph as a graph of their own, made of all that makes it differ from others.

    Attributes:
        graph: its inputs are ``attributes``, then ``inputs``; it returns a tuple of ``outputs``.
        attributes: the paths of the modules and parameters that it uses.
        inputs: the nodes before the region that it uses.
        outputs: those of its nodes that others use.
    """

    graph: fx.Graph
    attributes: tuple[str, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    def kind(self, root: nn.Module) -> Any:
        """Return what is equal for regions that one compiled function can run."""
        return code_key(self.graph), tuple(_shapes(operator.attrgetter(path)(root)) for path in self.attributes)


def in_regions(graph: fx.Graph, root: nn.Module, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function that runs ``graph`` in compiled regions.

    Args:
        graph: of a converted model.
        root: the model, which has the graph's modules.
        settings: arguments of ``torch.compile``.
    """
    outer = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    compiled: dict[Any, Callable[..., Any]] = {}
    for node in decisions_on_inputs(graph):
        copies[node] = outer.node_copy(node, lambda n: copies[n])
    for part in repeating_parts([n for n in graph.nodes if n not in copies and n.op != "output"], root):
        region = region_of(part)
        kind = region.kind(root)
        if kind not in compiled:
            function = function_of(region.graph, f"region_{len(compiled)}")
            compiled[kind] = torch.compile(function, **settings)
        attributes = [outer.get_attr(path) for path in region.attributes]
        arguments = (None, *attributes, *(copies[node] for node in region.inputs))
        call = outer.call_function(compiled[kind], arguments)
        for i, node in enumerate(region.outputs):
            copies[node] = outer.call_function(operator.getitem, (call, i))
    outer.output(fx.node.map_arg(graph.output_node().args[0], lambda node: copies[node]))
    return shared_function_of(outer)


def decisions_on_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs and the checks of them alone, which run first and in Python, where they may fail."""
    early: set[fx.Node] = set()
    for node in graph.nodes:
        cheap = node.op in ("placeholder", "get_attr") or node.target in CHECKS or is_shape_read(node)
        if cheap and early.issuperset(node.all_input_nodes):
            early.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in early and (node.op == "placeholder" or node.target in CHECKS or node in needed):
            needed.update((node, *node.all_input_nodes))
    return [node for node in graph.nodes if node in needed]


def repeating_parts(nodes: Sequence[fx.Node], root: nn.Module) -> list[list[fx.Node]]:
    """Return consecutive nodes of a graph in parts that end with a write, of which few differ.

    All have the same number of residuals, but for the first and the last. Of the cuts that leave hardly more
    code to compile than the best one, that with the fewest parts is taken.
    """
    ends = [0, *(i + 1 for i, node in enumerate(nodes) if node.target in WRITES), len(nodes)]
    pieces = [list(nodes[a:b]) for a, b in itertools.pairwise(ends) if a < b]
    kinds = [region_of(piece).kind(root) for piece in pieces]

    def code(cuts: Sequence[int]) -> int:
        """Return the number of nodes to compile."""
        return sum({tuple(kinds[a:b]): sum(map(len, pieces[a:b])) for a, b in itertools.pairwise(cuts)}.values())

    cuts = [[0, len(pieces)]]
    for period in range(1, MAX_PERIOD + 1):
        cuts += [[0, *range(first, len(pieces), period), len(pieces)] for first in range(1, period + 1)]
    least = min(map(code, cuts))
    best = min((c for c in cuts if code(c) <= SLACK * least), key=len)
    return [list(itertools.chain(*pieces[a:b])) for a, b in itertools.pairwise(best)]


def region_of(part: Sequence[fx.Node]) -> Region:
    """Return consecutive nodes of a graph as a region."""
    inside = set(part)
    outside = [node for member in part for node in member.all_input_nodes if node not in inside]
    attributes = tuple(dict.fromkeys(str(node.target) for node in part if node.op in ("call_module", "get_attr")))
    inputs = tuple(dict.fromkeys(outside))
    outputs = tuple(node for node in part if any(user not in inside for user in node.users))
    graph = fx.Graph()
    given = {path: graph.placeholder(f"module_{i}") for i, path in enumerate(attributes)}
    copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    for i, node in enumerate(part):
        if node.op == "get_attr":
            copies[node] = given[str(node.target)]
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: copies[n])
        if node.op == "call_module":
            copies[node] = graph.create_node(
                "call_function", _call, (given[str(node.target)], *args), kwargs, f"value_{i}"
            )
        else:
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, f"value_{i}")
    graph.output(tuple(copies[node] for node in outputs))
    return Region(graph, attributes, inputs, outputs)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _shapes(value: Any) -> Any:
    """Return what compiled code depends on in a module or parameter."""
    if isinstance(value, nn.Module):
        state = [*value.named_parameters(), *value.named_buffers()]
        return type(value), tuple((name, tensor.shape, tensor.dtype) for name, tensor in state)
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
