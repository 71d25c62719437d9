"""A graph as a sequence of regions, of which equal ones are one compiled function.

A compiler that is given a deep model as one graph optimises each of its equal blocks anew. Cut before writes, the
graph is a sequence of regions; equal ones become one function of their modules, streams and branch output, which is
compiled once. A write is then in one piece with the coefficients and the read of the residual after it, whose
kernel it can share: the new streams are written once and not read.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..connections.base import Connection
from ..graphs.graph_code import code_key, function_of, shared_function_of
from ..graphs.guards import CHECKS
from ..graphs.shape_reads import is_shape_read
from ..streams import mixing as ops
from ..streams.handed_on import hand_on_coefficients, take_over_coefficients

WRITES = (ops.write, ops.write_recomputed)
READS = (ops.read, ops.read_recomputed)
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
        region = region_of(part, root)
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
    """Return consecutive nodes of a graph in parts that begin with a write, of which few differ.

    All have the same number of residuals, but for the first and the last. Of the cuts that leave hardly more
    code to compile than the best one, that with the fewest parts is taken. The streams of a trunk's first write are
    one tensor, which takes code of its own: there is no cut before it.
    """
    later = [i for i, node in enumerate(nodes) if node.target in WRITES and not _begins(node)]
    ends = [0, *later, len(nodes)]
    pieces = [list(nodes[a:b]) for a, b in itertools.pairwise(ends) if a < b]
    kinds = [region_of(piece, root).kind(root) for piece in pieces]

    def code(cuts: Sequence[int]) -> int:
        """Return the number of nodes to compile."""
        return sum({tuple(kinds[a:b]): sum(map(len, pieces[a:b])) for a, b in itertools.pairwise(cuts)}.values())

    cuts = [[0, len(pieces)]]
    for period in range(1, MAX_PERIOD + 1):
        cuts += [[0, *range(first, len(pieces), period), len(pieces)] for first in range(1, period + 1)]
    least = min(map(code, cuts))
    best = min((c for c in cuts if code(c) <= SLACK * least), key=len)
    return [list(itertools.chain(*pieces[a:b])) for a, b in itertools.pairwise(best)]


def _begins(write: fx.Node) -> bool:
    """Whether a write is the first of its trunk."""
    streams: Any = write.args[0]
    return streams.target is ops.expand


def region_of(part: Sequence[fx.Node], root: nn.Module) -> Region:
    """Return consecutive nodes of a graph as a region.

    Coefficients that writes of another region take are made there again if they are the same for all tokens, and
    go there as few tensors else.
    """
    again = [node for node in _taken_from_outside(part) if _is_same_for_all_tokens(node, root)]
    part = (*again, *part)
    inside = set(part)
    inputs = tuple(_taken_from_outside(part))
    attributes = tuple(dict.fromkeys(str(node.target) for node in part if node.op in ("call_module", "get_attr")))
    outputs = tuple(node for node in part if node not in again and _is_used_outside(node, inside, root))
    graph = fx.Graph()
    given = {path: graph.placeholder(f"module_{i}") for i, path in enumerate(attributes)}
    copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    for node in filter(_is_handed_on, inputs):
        copies[node] = graph.call_function(take_over_coefficients, (copies[node],))
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
    for node in filter(_is_handed_on, outputs):
        copies[node] = graph.call_function(hand_on_coefficients, (copies[node],))
    graph.output(tuple(copies[node] for node in outputs))
    return Region(graph, attributes, inputs, outputs)


def _taken_from_outside(part: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """Return the nodes before consecutive ones that these use, in order."""
    inside = set(part)
    return dict.fromkeys(node for member in part for node in member.all_input_nodes if node not in inside)


def _is_used_outside(node: fx.Node, inside: Collection[fx.Node], root: nn.Module) -> bool:
    return any(user not in inside for user in node.users) and not _is_same_for_all_tokens(node, root)


def _is_handed_on(node: fx.Node) -> bool:
    """Whether a node makes coefficients that are read at once, so that only writes can take them in other regions."""
    writes = [user for user in node.users if user.target in WRITES and user.args[2] is node]
    rest = [user for user in node.users if user not in writes]
    return bool(writes) and all(user.target in READS and user is node.next for user in rest)


def _is_same_for_all_tokens(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node makes coefficients from parameters alone, which is less than to hand them on."""
    if node.op != "call_module" or not _is_handed_on(node):
        return False
    connection = root.get_submodule(str(node.target))
    return isinstance(connection, Connection) and not connection.needs_dim


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _shapes(value: Any) -> Any:
    """Return what compiled code depends on in a module or parameter."""
    if isinstance(value, nn.Module):
        state = [*value.named_parameters(), *value.named_buffers()]
        return type(value), tuple((name, tensor.shape, tensor.dtype) for name, tensor in state)
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
