"""Rewrite a graph after a plan: streams in place of trunk values."""

from __future__ import annotations

import copy
import logging
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from ..capture.kinds import Kinds
from ..connections import Connection
from ..errors import UnsupportedModel
from ..graphs import meta
from ..graphs.aliases import lost_writes
from ..graphs.dialects import location_of, takes_first
from ..graphs.guards import CHECKS
from ..graphs.operations import holds_no_mean, shape_of
from ..graphs.passes import logged_pass
from ..graphs.shape_reads import is_shape_read
from ..models.copies import REGISTERED_HOOKS
from ..residuals.findings import Residual
from ..residuals.keys import DROPOUT_KEY, add_modules, label_of
from ..residuals.planner import Plan
from ..residuals.spellings import Term
from ..residuals.trunks import Trunk, at_end, outer_first, readers_of, way_between
from ..streams import mixing as ops
from ..streams import trunk_value
from ..streams.carried import carry
from .carried_ops import carried_call
from .new_modules import expand_key, features_of, make_connections, new_modules, readout_key

log = logging.getLogger("hc_transform")

TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def rewrite(gm: fx.GraphModule, plan: Plan, *, connections: Mapping[str, Connection] | None = None) -> fx.GraphModule:
    """Return a new GraphModule with the residuals of ``plan`` rewritten into hyper-connections.

    Args:
        gm: the graph that the plan was made from; it is not changed. Parameters are shared. The result takes the same
            inputs and gives its output in the same structure.
        plan: see :func:`hc_transform.make_plan`.
        connections: the connection of each residual name; by default new ones.

    A connection becomes the submodule ``hyper_connections.<name>`` of the module that holds its residual.
    """
    connections = make_connections(plan) if connections is None else connections
    graph = rewritten_graph(gm, plan)
    added = new_modules(connections, plan)
    root = _with_holders(gm, added)
    add_modules(root, added.items())
    result = fx.GraphModule(root, graph, type(gm).__name__)
    _take_over(result, gm)
    result.__dict__["_modules"] = root._modules
    result.graph.lint()
    return result


def _with_holders(gm: fx.GraphModule, added: Iterable[str]) -> fx.GraphModule:
    """Return a copy of ``gm`` that shares all but the modules on the way to ``added``, where new ones can be put."""
    root = _opened(gm)
    opened: dict[str, nn.Module] = {"": root}
    for path in added:
        atoms = path.split(".")[:-2]
        for i in range(len(atoms)):
            at, parent = ".".join(atoms[: i + 1]), opened[".".join(atoms[:i])]
            if at not in opened:
                held = parent._modules.get(atoms[i])
                opened[at] = nn.Module().train(gm.training) if held is None else _opened(held)
                parent._modules[atoms[i]] = opened[at]
    return root


def _opened(module: Any) -> Any:
    """Return a copy of a module to which others can be added."""
    new = object.__new__(type(module))
    new.__dict__.update(module.__dict__, _modules=dict(module._modules))
    return new


def _take_over(result: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Give ``result`` all else that ``gm`` holds: tensors that no node reads, hooks, an exported program's checks."""
    for name, value in gm.__dict__.items():
        if name not in result.__dict__:
            own = isinstance(value, types.MethodType) and value.__self__ is gm
            result.__dict__[name] = types.MethodType(value.__func__, result) if own else value
        elif name in TENSORS or name in REGISTERED_HOOKS or name in ("meta", "training", "shape_env"):
            result.__dict__[name] = copy.copy(value)


@logged_pass
def rewritten_graph(gm: fx.GraphModule, plan: Plan) -> fx.Graph:
    """Return a rewritten copy of ``gm.graph``. It refers to connections by the keys of residuals."""
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    copies: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(gm.graph, copies)
    output = gm.graph.output_node()
    graph.output(result).meta.update(output.meta)
    graph.set_codegen(copy.deepcopy(gm.graph._codegen))  # how inputs are taken apart and the output is put together
    kinds = Kinds(gm)
    outer_reads: dict[fx.Node, list[tuple[Residual, fx.Node]]] = {}  # by skip
    gone = {node for trunk in plan.trunks for node in _done_on_streams(trunk)}
    memory = _Memory(graph, copies, gone, lost_writes(gm.graph, gone))
    for trunk in outer_first(plan.trunks):
        _TrunkRewriter(graph, copies, trunk, kinds, plan, outer_reads, memory).run()
    for write in memory.lost.keys() - gone:  # into a readout
        memory.overwrite(write, copies[write])
    graph.lint()
    log.info("rewrote %d residuals on %d trunks", len(plan.residuals), len(plan.trunks))
    return graph


class _Memory:
    """Tensors that outlive the graph and that it is to overwrite, as the original does.

    Args:
        graph: the new one.
        copies: its nodes by those of the plan's graph.
        gone: nodes of the plan's graph that are done on streams.
        lost: writes that are not done any more, each with the tensor that it writes into.
    """

    def __init__(
        self, graph: fx.Graph, copies: dict[fx.Node, fx.Node], gone: set[fx.Node], lost: dict[fx.Node, fx.Node]
    ) -> None:
        self.graph = graph
        self.copies = copies
        self.gone = gone
        self.lost = lost

    def overwrite(self, write: fx.Node, value: fx.Node) -> fx.Node:
        """Let the tensor that ``write`` writes into be ``value``, a tensor or streams, at the end."""
        with self.graph.inserting_before(self.graph.output_node()):
            return self.graph.call_function(trunk_value.overwrite, (self._tensor(self.lost[write]), value))

    def _tensor(self, node: fx.Node) -> fx.Node:
        """Return the node of the new graph for a tensor: a view that is carried is made once more."""
        return self.graph.node_copy(node, self._tensor) if node in self.gone else self.copies[node]


class _TrunkRewriter:
    """Rewrite one trunk. Nodes of the plan's graph are looked up in ``copies``."""

    def __init__(
        self,
        graph: fx.Graph,
        copies: dict[fx.Node, fx.Node],
        trunk: Trunk,
        kinds: Kinds,
        plan: Plan,
        outer_reads: dict[fx.Node, list[tuple[Residual, fx.Node]]],
        memory: _Memory,
    ) -> None:
        self.graph = graph
        self.copies = copies
        self.trunk = trunk
        self.kinds = kinds
        self.plan = plan
        self.options = plan.options
        self.outer_reads = outer_reads  # reads of the trunks around this one
        self.memory = memory
        self.gone = _done_on_streams(trunk)
        self.overwrites = {write: tensor for write, tensor in memory.lost.items() if write in self.gone}
        self.mode = "sum" if self.options.readout == "sum" else "mean"
        self.streams: dict[fx.Node, fx.Node] = {}  # trunk value (in the plan's graph) -> its streams
        self.reads: dict[fx.Node, fx.Node] = {}  # trunk value -> a read of it
        self.labels: dict[fx.Node, str] = {}  # trunk value -> name, for nodes, of the residual it comes from

    def run(self) -> None:
        for residual in self.trunk.residuals:
            self._read(residual)
            self._write(residual)
        for value in self.trunk.ends:
            self._streams_of(value, self.trunk.residuals[-1])
        self._leave()
        self._overwrite()
        copies = {self.copies[node] for node in self.gone}
        for value in self.streams:
            if value in self.gone:
                self._serve_other_users(value, copies)
        for node in sorted(copies, reverse=True):
            self.graph.erase_node(node)

    def _streams_of(self, value: fx.Node, residual: Residual) -> fx.Node:
        """Return the streams of a trunk value: known, carried there, or expanded."""
        for node in sorted(way_between(value, self.trunk.carried, self.streams)):
            operands = self.trunk.carried[node]
            for operand in operands:
                if operand not in self.streams:
                    self.streams[operand] = self._expand(operand, residual)
            self.streams[node] = self._carry(node, operands, self.copies[node])
            self.labels[node] = self.labels.get(operands[0], label_of(residual.name))
        if value not in self.streams:
            self.streams[value] = self._expand(value, residual)
        return self.streams[value]

    def _expand(self, value: fx.Node, residual: Residual) -> fx.Node:
        node = self.copies[value] if value is self.trunk.entry else self._value_for(residual)
        after = node
        while node.op == "placeholder" and (after.next.op == "placeholder" or after.next.target in CHECKS):
            after = after.next
        label = f"{label_of(residual.name)}_expand"
        with self.graph.inserting_after(after):
            if value is self.trunk.entry:
                ways = (bool(self.overwrites), self.options.keep_layout)
                given = ways if any(ways) else ()
                return self._new(trunk_value.enter, (node, self.options.num_streams, *given), label, value)
            if self.overwrites:  # what streams begin with is needed afterwards
                node = self.graph.call_method("clone", (node,))
                after = node
        with self.graph.inserting_after(after):
            if self.options.stream_embedding:
                return self._module(expand_key(self.trunk), (node,), label, value)
            kept = (True,) if self.options.keep_layout else ()
            return self._new(ops.expand, (node, self.options.num_streams, *kept), label, value)

    def _leave(self) -> None:
        """Hand the streams on where the trunk goes on outside of the graph."""
        for value in self.trunk.exits:
            streams = self._streams_of(value, self.trunk.residuals[-1])
            output = self.graph.output_node()
            given: tuple[fx.Node, ...] = ()
            if value in self.overwrites and self.memory.lost[value] is self.trunk.entry:
                given = (self.copies[self.trunk.entry],)
                del self.overwrites[value]
            with self.graph.inserting_before(output):
                name = f"{self.labels[value]}_handed_on"
                handed = self._new(trunk_value.hand_on, (streams, self.trunk.steps, self.mode, *given), name, value)
            output.replace_input_with(self.copies[value], handed)

    def _overwrite(self) -> None:
        """Let inputs that the original overwrites be what it leaves in them."""
        for write, tensor in self.overwrites.items():
            streams = self.streams[write]
            if tensor is self.trunk.entry:
                made = self.memory.overwrite(write, streams)
                made.args = (*made.args, self.mode)
            else:
                with self.graph.inserting_after(streams):
                    readout = self._readout(write)
                self.memory.overwrite(write, readout)

    def _read(self, residual: Residual) -> None:
        streams = self._streams_of(residual.skip, residual)
        label = label_of(residual.name)
        with self.graph.inserting_after(streams):
            coefficients = self._module(residual.key, (streams,), f"{label}_coefficients", residual.add)
        with self.graph.inserting_after(coefficients):
            function = ops.read_recomputed if self.options.recompute else ops.read
            read = self._new(function, (streams, coefficients), f"{label}_read", residual.add)
        self._coefficients = coefficients
        self.reads.setdefault(residual.skip, read)
        value = self._value_for(residual)
        self.outer_reads.setdefault(residual.skip, []).append((residual, read))
        for reader in readers_of(residual):
            if not is_shape_read(reader):
                self.copies[reader].replace_input_with(value, read)

    def _value_for(self, residual: Residual) -> fx.Node:
        """Return the skip's value: inside the branch of another residual on the same value, that one's read."""
        for outer, read in reversed(self.outer_reads.get(residual.skip, [])):
            if residual.add in outer.region:
                return read
        return self.copies[residual.skip]

    def _write(self, residual: Residual) -> None:
        add = self.copies[residual.add]
        source = residual.skip
        for op in residual.skip_ops:
            if op not in self.streams:  # where it stands, so that random draws keep their order
                self.streams[op] = self._carry(op, (source,), self.copies[op])
                self.labels[op] = label_of(residual.name)
            source = op
        streams = self.streams[source]
        with self.graph.inserting_before(add):
            scale = self._scale(residual.scaled_skip)
            if scale is not None:
                streams = self._new(carry, ("mul", streams, scale), None, residual.add)
            branch = self._term(residual.branch[0], residual)
            for term in residual.branch[1:]:
                branch = self.graph.call_function(operator.add, (branch, self._term(term, residual)))
            label = label_of(residual.name)
            function = ops.write_recomputed if self.options.recompute else ops.write
            first = (True,) if residual.branch_first else ()
            written = self._new(function, (streams, branch, self._coefficients, *first), f"{label}_write", residual.add)
            meta.RESIDUAL.set(written, residual.name)
            meta.STREAMS.set(written, self.mode)
            if self.options.stream_dropout:
                written = self._module(DROPOUT_KEY, (written,), f"{label}_dropout", residual.add)
        self.streams[residual.add] = written
        self.labels[residual.add] = label

    def _term(self, term: Term, residual: Residual) -> fx.Node:
        """Return the value of a term of the branch."""
        made = self.copies[term.factors[0]]
        if term.combine is not None:
            given = fx.node.map_arg((*term.factors, *term.rest), lambda node: self.copies.get(node, node))
            made = self.graph.call_function(term.combine, given)
        scale = self._scale(term)
        return made if scale is None else self.graph.call_function(operator.mul, (made, scale))

    def _scale(self, term: Term) -> Any:
        """Return what a term is scaled by, None if it is not."""
        if not isinstance(term.scale, fx.Node):
            return term.scale if term.scale != 1 else None
        scale = self.copies[term.scale]
        return self.graph.call_function(operator.sub, (1, scale)) if term.complement else scale

    def _carry(self, node: fx.Node, operands: tuple[fx.Node, ...], before: fx.Node) -> fx.Node:
        """Apply the operation ``node`` to every stream of ``operands``, at the place ``before``."""
        if takes_first(node):
            return self.streams[operands[0]]
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.copies[n])
        streams = {operand: self.streams[operand] for operand in operands}
        with self.graph.inserting_before(before):
            target: Any = node.target
            if node.op == "call_module":
                target = self.graph.create_node("get_attr", str(node.target), (), {})
            target, arguments, kwargs = carried_call(node, self.kinds, target, streams, args, kwargs)
            made = self._new(target, arguments, f"{node.name}_streams", node)
            made.kwargs = kwargs
            meta.STREAMS.set(made, self.mode)
        return made

    def _serve_other_users(self, value: fx.Node, gone: set[fx.Node]) -> None:
        """Give every user outside of the streams' way a readout, and shape reads any stream."""
        node, streams = self.copies[value], self.streams[value]
        users = [user for user in node.users if user not in gone]
        for user in [u for u in users if is_shape_read(u)]:
            if value not in self.reads:
                with self.graph.inserting_after(streams):
                    self.reads[value] = self.graph.call_function(operator.getitem, (streams, 0))
            user.replace_input_with(node, self.reads[value])
        users = [user for user in users if not is_shape_read(user)]
        if users:
            with self.graph.inserting_after(streams):
                readout = self._readout(value)
            for user in users:
                user.replace_input_with(node, readout)

    def _readout(self, value: fx.Node) -> fx.Node:
        streams, name = self.streams[value], f"{self.labels[value]}_readout"
        weighed = self.options.readout == "learned" and not self.trunk.exits and value in at_end(self.trunk)
        if self.options.readout == "mean" or self.options.readout == "learned" and not weighed:
            return self._new(ops.readout, (streams,), name, value)
        if self.options.readout == "sum":
            return self._new(ops.readout, (streams, "sum"), name, value)
        axis, dim = features_of(self.trunk.residuals[-1], self.plan, self.kinds.modules)
        shape, last = shape_of(value), shape_of(self.trunk.residuals[-1].add)
        if shape is not None and last is not None and (len(shape) != len(last) or shape[axis] != dim):
            raise UnsupportedModel(
                f"readout='learned' weighs features where the last residual has them, and {value.name} "
                f"({location_of(value)}), which is read out, has shape {tuple(shape)} "
                f"in place of {tuple(last)}. Use readout='mean'."
            )
        return self._module(readout_key(self.trunk), (streams,), name, value)

    def _module(self, key: str, args: tuple[Any, ...], name: str, source: fx.Node) -> fx.Node:
        made = self.graph.create_node("call_module", key, args, {}, name)
        _locate(made, source)
        return made

    def _new(self, function: Any, args: tuple[Any, ...], name: str | None, source: fx.Node) -> fx.Node:
        made = self.graph.create_node("call_function", function, args, {}, name)
        _locate(made, source)
        return made


def _done_on_streams(trunk: Trunk) -> set[fx.Node]:
    """Return the nodes of the plan's graph whose work is done on streams alone from now on."""
    gone = set(trunk.carried)
    for residual in trunk.residuals:
        gone.update((residual.add, *residual.absorbed, *residual.skip_ops))
    for node in sorted(trunk.carried, reverse=True):
        if holds_no_mean(node) and not gone.issuperset(node.users):
            gone.discard(node)
    return gone


def _locate(node: fx.Node, source: fx.Node) -> None:
    for key in meta.ORIGIN:
        if key in source.meta:
            node.meta[key] = source.meta[key]
