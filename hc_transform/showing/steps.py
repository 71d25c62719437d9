"""What a converted model runs, as a list of steps: the nodes of its graphs, each with the part that it plays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..errors import UnsupportedModel
from ..graphs import meta
from ..graphs.dialects import location_of, module_of, name_of
from ..graphs.guards import CHECKS
from ..graphs.shape_reads import is_shape_read
from ..residuals.keys import CONNECTIONS_NAME, EXPAND, READOUT
from ..residuals.records import short
from ..running.block_runner import RUNNER, BlockRunner
from ..running.graph_model import HyperConnectedModule
from ..streams import mixing, trunk_value
from ..streams.carried import CarriedFunction, plain_name

FUNCTIONS: dict[Any, str] = {
    mixing.expand: "expand",
    mixing.read: "read",
    mixing.read_recomputed: "read",
    mixing.write: "write",
    mixing.write_recomputed: "write",
    mixing.readout: "readout",
    trunk_value.enter: "enter",
    trunk_value.hand_on: "hand on",
    trunk_value.overwrite: "overwrite",
}


@dataclass(frozen=True, eq=False)
class Site:
    """One hyper-connected residual in a graph.

    Attributes:
        name: of the residual, from the root of the model.
        module: path of the module whose code adds.
        trunk: the node that its streams begin with.
        coefficients, write: its nodes.
        region: the nodes of its branch.
    """

    name: str
    module: str
    trunk: fx.Node
    coefficients: fx.Node
    write: fx.Node
    region: frozenset[fx.Node]


@dataclass(frozen=True, eq=False)
class Step:
    """One node, and the part that it plays.

    Attributes:
        role: "input", "expand", "enter" (streams come in, or begin), "coefficients", "read", "branch", "write",
            "carried", "readout", "hand on", "overwrite", "check", "output", or "" for what is as it was.
        path: of the module whose code it is.
        node: of the graph.
        prefix: path of the block whose graph it is, "" for the root.
        sites: the residuals in whose branches it is, or whose part it is, the outermost first.
        at: where its source line stands, "file.py:123", "" if that is not known.
    """

    role: str
    path: str
    node: fx.Node
    prefix: str = ""
    sites: tuple[Site, ...] = field(default=())
    at: str = ""

    @property
    def what(self) -> str:
        """The module that is called, by its path below ``path``, or the function."""
        if self.node.op == "call_module":
            own = relative_to(self.path, joined(self.prefix, str(self.node.target)))
            return f"{self.path.rpartition('.')[2]}.{own}" if own.isdigit() and self.path else own
        if self.node.op in ("placeholder", "get_attr"):
            return str(self.node.target).lstrip("*")
        if self.role == "carried" and self.node.args and self.node.op == "call_function":
            return _carried(self.node, self.path, self.prefix)
        return name_of(self.node)


def graphs_of(hc: nn.Module) -> list[tuple[str, fx.Graph, bool]]:
    """Return the graphs that a converted model runs, each with the path of its module, and whether streams begin there.

    A block that is called several times has one for each call; of those for different kinds of calls it is the first.

    Raises:
        UnsupportedModel: ``hc`` is no converted model, or its blocks have not run yet.
    """
    if isinstance(hc, fx.GraphModule) and (isinstance(hc, HyperConnectedModule) or _is_rewritten(hc)):
        return [("", hc.graph, True)]
    found: list[tuple[str, fx.Graph, bool]] = []
    for path, module in hc.named_modules():
        runner: BlockRunner | None = module.__dict__.get(RUNNER)
        first: dict[int, fx.Graph] = {}
        for key, variants in runner.variants.items() if runner is not None else ():
            first.setdefault(key[0], variants[0].graph)
        if runner is not None:
            found += [(path, first[number], bool(runner.calls[number].begins)) for number in sorted(first)]
    if not found:
        raise UnsupportedModel(
            f"{type(hc).__name__} runs no rewritten graph: show, diff and draw take what convert returns, and a model "
            "whose blocks were called once"
        )
    return found


def steps_of(hc: nn.Module) -> list[Step]:
    """Return the steps of a converted model, in order.

    Of blocks, those of each; what the Python between them does is not among them.
    """
    return [step for path, graph, begins in graphs_of(hc) for step in _steps(graph, path, begins)]


def sites_of(graph: fx.Graph, prefix: str = "") -> list[Site]:
    """Return the hyper-connected residuals of a rewritten graph, in order of their writes."""
    reads: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if FUNCTIONS.get(node.target) == "read":
            reads.setdefault(node.args[1], []).append(node)
    sites = []
    for node in graph.nodes:
        if FUNCTIONS.get(node.target) == "write":
            streams, branch, coefficients = node.args[:3]
            region = _between(reads.get(coefficients, []), branch)
            name = meta.RESIDUAL.of(node) or node.name.removesuffix("_write")
            own = prefix and name.partition(":")[0] == "residual"  # the only one of its block is named after it
            name = prefix + name.removeprefix("residual") if own else joined(prefix, name)
            sites.append(Site(name, joined(prefix, module_of(node)), origin(streams), coefficients, node, region))
    return sites


def origin(streams: Any) -> fx.Node:
    """Return the node that streams begin with: through writes and what is carried."""
    while isinstance(streams, fx.Node):
        before = next((n for n in streams.all_input_nodes if gives_streams(n)), None)
        if before is None:
            break
        streams = before
    made: fx.Node = streams
    return made


def gives_streams(node: fx.Node) -> bool:
    """Whether a node gives streams: a tuple of n tensors."""
    if meta.STREAMS.known(node) or FUNCTIONS.get(node.target) in ("expand", "enter", "write"):
        return True
    return is_new_module(node) and str(node.target).endswith((EXPAND, "stream_dropout"))


def is_new_module(node: fx.Node) -> bool:
    """Whether a node calls a module that conversion added."""
    return node.op == "call_module" and str(node.target).split(".")[-2:-1] == [CONNECTIONS_NAME]


def joined(path: str, below: str) -> str:
    """Return the path of what is below a module."""
    return f"{path}.{below}" if path and below else path or below


def relative_to(path: str, other: str) -> str:
    """Return ``other`` as seen from the module ``path``."""
    return other[len(path) + 1 :] if path and other.startswith(path + ".") else other


def _is_rewritten(gm: fx.GraphModule) -> bool:
    return any(FUNCTIONS.get(node.target) == "write" for node in gm.graph.nodes)


def _steps(graph: fx.Graph, prefix: str, begins: bool) -> Iterator[Step]:
    sites = sites_of(graph, prefix)
    inside: dict[fx.Node, list[Site]] = {}
    for site in sites:
        for node in site.region:
            inside.setdefault(node, []).append(site)
    for around in inside.values():
        around.sort(key=lambda site: -len(site.region))
    parts: dict[fx.Node, Site] = {site.write: site for site in sites} | {site.coefficients: site for site in sites}
    for node in graph.nodes:
        role = _role(node)
        own = parts.get(node) or (parts.get(node.args[1]) if role == "read" else None)
        if role == "enter" and begins:
            role = "expand"
        outer = tuple(inside.get(node if own is None else own.write, ()))
        if role == "" and outer:
            role = "branch"
        path = joined(prefix, module_of(node)) if own is None else own.module
        where = location_of(node)
        known = "" if where == "unknown location" or role in ("input", "output") else short(where)
        yield Step(role, path, node, prefix, (*outer, own) if own else outer, known)


def _role(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    if node.target in CHECKS or is_shape_read(node):
        return "check"
    if is_new_module(node):
        target = str(node.target)
        if target.endswith(EXPAND):
            return "expand"
        if target.endswith(READOUT):
            return "readout"
        return "carried" if target.endswith("stream_dropout") else "coefficients"
    if node.target in FUNCTIONS:
        return FUNCTIONS[node.target]
    return "carried" if meta.STREAMS.known(node) else ""


def _between(reads: list[fx.Node], branch: Any) -> frozenset[fx.Node]:
    """Return the nodes that a read leads to and that lead to the branch's output."""
    below: set[fx.Node] = set()
    waiting = [user for read in reads for user in read.users]
    while waiting:
        node = waiting.pop()
        if node not in below:
            below.add(node)
            waiting += node.users
    found: set[fx.Node] = set()
    waiting = [branch] if isinstance(branch, fx.Node) else []
    while waiting:
        node = waiting.pop()
        if node in below and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return frozenset(found)


def _carried(node: fx.Node, path: str, prefix: str) -> str:
    """Return what is done to each stream."""
    if isinstance(node.target, CarriedFunction):
        return plain_name(node.target.function)
    first: Any = node.args[0]
    if isinstance(first, fx.Node) and first.op == "get_attr":
        return relative_to(path, joined(prefix, str(first.target)))
    if isinstance(first, str):
        return first
    return str(getattr(first, "__name__", None) or name_of(node))
