"""A second, slow implementation of a plan, to hold the rewritten graph against.

It interprets the graph as it was before rewriting, keeps the streams of a trunk value as one stacked
tensor beside it, and applies the equations of hyper-connections with tensor contractions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.kinds import Kinds
from ..graphs.dialects import has_several_outputs, name_of, statistics_of, takes_first
from ..graphs.operations import Kind, holds_no_mean
from ..graphs.shape_reads import is_shape_read
from ..residuals.findings import Residual
from ..residuals.planner import Plan
from ..residuals.trunks import Trunk, at_end, readers_of
from ..rewriting.carried_ops import NORMS_OF_BATCHES
from ..rewriting.new_modules import expand_key, readout_key
from ..streams.mixing import FractionCoefficients


class NamedInputs(fx.Interpreter):
    """An interpreter that takes inputs by the names of parameters too, ``*args`` and ``**kwargs`` whole.

    With ``wide`` it computes in double precision what the graph says is to be fp32.
    """

    given: Mapping[str, Any] | None = None
    wide = False

    def run_on(self, **given: Any) -> Any:
        """Run the graph on inputs by name."""
        self.given = given
        return self.run()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the input of that name, or its default; with :meth:`run`, the next input."""
        if self.given is None:
            return super().placeholder(target, args, kwargs)
        name = target.lstrip("*")
        if name in self.given:
            return self.given[name]
        if target.startswith("*"):
            return {} if target.startswith("**") else ()
        return args[0]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Return a node's arguments."""
        found = super().fetch_args_kwargs_from_env(n)
        return fx.node.map_aggregate(found, _widened) if self.wide else found


class ReferenceInterpreter(NamedInputs):
    """Run a plan on the graph it was made from.

    After :meth:`run_on`, ``written`` holds the streams after each residual by its name, ``[n, ...]``.

    Args:
        plan: what is converted.
        connections: the modules that conversion adds, by key.
        module: what the plan's graph runs on, by default the module that it was made from.
        rounding: what every value that is summed passes through, by default nothing.
    """

    def __init__(
        self,
        plan: Plan,
        connections: Mapping[str, nn.Module],
        module: nn.Module | None = None,
        rounding: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        graph = plan.graph_module.graph
        super().__init__(module or plan.graph_module, garbage_collect_values=False, graph=graph)
        self.rounded = rounding or (lambda value: value)
        self.num_streams = plan.options.num_streams
        self.fractions = plan.options.num_fractions
        self.readout = plan.options.readout
        self.kinds = Kinds(plan.graph_module)
        self.modules = connections
        self.connections = {r.name: connections[r.key] for r in plan.residuals}
        self.trunk_of: dict[fx.Node, Trunk] = {}
        self.by_add = {r.add: r for r in plan.residuals}
        for trunk in plan.trunks:
            for residual in trunk.residuals:
                nodes = (residual.skip, *residual.skip_ops, residual.add)
                self.trunk_of.update(dict.fromkeys(nodes, trunk))
            self.trunk_of.update((n, trunk) for node, sources in trunk.carried.items() for n in (node, *sources))
        self.carried = {node: sources for trunk in plan.trunks for node, sources in trunk.carried.items()}
        for residual in plan.residuals:
            sources = (residual.skip, *residual.skip_ops)
            self.carried.update((op, (source,)) for op, source in zip(residual.skip_ops, sources, strict=False))
        self.read_by: dict[fx.Node, dict[fx.Node, Residual]] = {}  # by reader and skip
        for residual in plan.residuals:
            for reader in readers_of(residual):
                if not is_shape_read(reader):
                    self.read_by.setdefault(reader, {}).setdefault(residual.skip, residual)
        self.streams: dict[fx.Node, Tensor] = {}  # [n, ...]
        self.coefficients: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}
        self.written: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value; for a trunk value the readout of its streams."""
        if n in self.by_add:
            self.streams[n] = self._write(self.by_add[n])
            like = self._sum(self.by_add[n], {})
        elif n in self.carried:
            carried, like = self._carry(n, {source: self._streams_at(source) for source in self.carried[n]})
            if holds_no_mean(n):
                self.streams[n] = carried
                return super().run_node(n)
            self.streams[n] = self.rounded(carried)
        else:
            return super().run_node(n)
        return _laid_out(self._readout(n), like)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Return a node's arguments; where a branch begins, the read in place of the skip."""
        plain = self.env
        reads = {skip: self._read(residual) for skip, residual in self.read_by.get(n, {}).items()}
        self.env = {**plain, **reads} if reads else plain
        try:
            return super().fetch_args_kwargs_from_env(n)
        finally:
            self.env = plain

    def _streams_at(self, value: fx.Node) -> Tensor:
        if value not in self.streams:
            streams = torch.stack([self.env[value]] * self.num_streams)
            embedding: Any = self.modules.get(expand_key(self.trunk_of[value]))
            if embedding is not None:
                vectors = embedding.embedding.to(streams.dtype)  # [n, D]
                axis = embedding.feature_axis % (streams.dim() - 1) + 1
                streams = (streams.movedim(axis, -1).transpose(0, -2) + vectors).transpose(0, -2).movedim(-1, axis)
            self.streams[value] = streams
        return self.streams[value]

    def _readout(self, value: fx.Node) -> Tensor:
        streams, trunk = self.rounded(self.streams[value]), self.trunk_of[value]
        if self.readout == "sum":
            return streams.sum(0)
        if self.readout == "mean" or value not in at_end(trunk):
            return streams.mean(0)
        head: Any = self.modules[readout_key(trunk)]
        axis = head.feature_axis % (streams.dim() - 1) + 1
        rows = streams.movedim(axis, -1).movedim(0, -2)  # [..., n, D]
        flat = rows.flatten(-2).to(torch.promote_types(rows.dtype, torch.float32))
        normed = flat / (flat.square().mean(-1, keepdim=True) + head.norm_eps).sqrt()
        weights = torch.sigmoid(head.scale * (normed @ head.projection.flatten(0, 1)) + head.bias) + head.eps
        return torch.einsum("...n,...nd->...d", weights, rows).movedim(-1, axis - 1)

    def _coefficients_of(self, residual: Residual) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return h_pre ``[m, k, ...]``, h_post ``[k, m, ...]``, h_res ``[k, k, ...]`` over ``k = n * m``
        rows, and the feature axis of the rows.
        """
        if residual.name not in self.coefficients:
            found = self.connections[residual.name](tuple(self._streams_at(residual.skip)))
            if isinstance(found, FractionCoefficients):
                rows = range(len(found.h_post))
                fractions = range(self.fractions)
                h_pre = torch.stack([torch.stack(row) for row in found.h_pre[0]])
                h_post = torch.stack(
                    [torch.stack([found.h_post[k][0] * (k % self.fractions == f) for f in fractions]) for k in rows]
                )
                axis = found.axis
            else:
                h_pre, h_post = torch.stack(found.h_pre)[None], torch.stack(found.h_post)[:, None]
                axis = -1
            if found.h_res is None:
                one = torch.ones_like(h_post[0, 0])
                h_res = torch.stack(
                    [torch.stack([one * (i == j) for j in range(len(h_post))]) for i in range(len(h_post))]
                )
            else:
                h_res = torch.stack([torch.stack(row) for row in found.h_res])
            self.coefficients[residual.name] = (h_pre, h_post, h_res, axis)
        return self.coefficients[residual.name]

    def _read(self, residual: Residual) -> Tensor:
        h_pre, _, _, axis = self._coefficients_of(residual)
        rows = _to_rows(self._streams_at(residual.skip), self.fractions, axis)
        parts = torch.stack([self.rounded(_broadcast(weights, rows) * rows).sum(0) for weights in h_pre])
        read = _from_rows(parts, self.fractions, axis)[0].to(rows.dtype)
        return _laid_out(read, self.env[residual.skip])

    def _write(self, residual: Residual) -> Tensor:
        _, h_post, h_res, axis = self._coefficients_of(residual)
        streams = self._streams_at((residual.skip, *residual.skip_ops)[-1])
        rows = _to_rows(streams, self.fractions, axis)
        zeros = {term.factors[0]: torch.zeros_like(self.env[term.factors[0]]) for term in residual.branch}
        skip: Any = residual.scaled_skip.value
        branch = self._sum(residual, {skip: torch.zeros_like(streams[0])})
        parts = _to_rows(branch[None], self.fractions, axis)
        mixed = torch.stack([self.rounded(_broadcast(weights, rows) * rows).sum(0) for weights in h_res])
        given = torch.stack([self.rounded(_broadcast(weights, parts) * parts).sum(0) for weights in h_post])
        mixed = _from_rows(mixed, self.fractions, axis)
        kept = torch.stack([self._sum(residual, {**zeros, skip: stream}) for stream in mixed])
        written = kept + _from_rows(given, self.fractions, axis)
        self.written[residual.name] = written.detach()
        return written.to(torch.promote_types(streams.dtype, branch.dtype))

    def _sum(self, residual: Residual, given: Mapping[fx.Node, Tensor]) -> Tensor:
        """Return the sum with other values for some of its terms: it is the skip's part and the branch's, added up."""
        values = {**self.env, **given}
        for node in sorted((*residual.absorbed, residual.add)):
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _cloned(values[n]))
            values[node] = getattr(self, node.op)(node.target, args, kwargs)
        return values[residual.add]

    def _carry(self, node: fx.Node, streams: Mapping[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the streams that an operation gives, and one of them laid out as it gave it."""
        if takes_first(node):
            ((source, only),) = streams.items()
            return only, self.env[source]
        if node.op == "call_module":
            module = self.submodules[str(node.target)]
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
                ((source, only),) = streams.items()
                return module(only.flatten(0, 1)).unflatten(0, only.shape[:2]), self.env[source]
        if name_of(node) in NORMS_OF_BATCHES and node.op == "call_function" and statistics_of(node)[1] is not False:
            ((source, only),) = streams.items()
            values = {**self.env, source: only.flatten(0, 1)}
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            return self._first(node, args, kwargs).unflatten(0, only.shape[:2]), self.env[source]
        results, state = [], torch.get_rng_state()
        for each in zip(*streams.values(), strict=True):
            if self.kinds.of(node) is Kind.RANDOM:
                torch.set_rng_state(state)
            given = {source: _laid_out(one, self.env[source]) for source, one in zip(streams, each, strict=True)}
            values = {**self.env, **given}
            copies = {n: _cloned(values[n]) for n in node.all_input_nodes}
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
            results.append(self._first(node, args, kwargs))
        return torch.stack(results), results[0]

    def _first(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Return what an operation gives, of several outputs the first."""
        made = getattr(self, node.op)(node.target, args, kwargs)
        return made[0] if has_several_outputs(node) else made


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` in memory as ``like`` is: dropout draws in the order of memory."""
    same = value.shape != like.shape or value.stride() == like.stride()
    return value if same else torch.empty_like(like, dtype=value.dtype).copy_(value)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _to_rows(streams: Tensor, m: int, axis: int) -> Tensor:
    """Return the fractions of ``[n, ...]``, stream by stream: ``[n * m, ...]``."""
    axis = axis % (streams.dim() - 1) + 1
    return streams.unflatten(axis, (m, -1)).movedim(axis, 1).flatten(0, 1)


def _from_rows(rows: Tensor, m: int, axis: int) -> Tensor:
    """Undo :func:`_to_rows`."""
    axis = axis % (rows.dim() - 1) + 1
    return rows.unflatten(0, (-1, m)).movedim(1, axis).flatten(axis, axis + 1)


def _broadcast(weights: Tensor, streams: Tensor) -> Tensor:
    """Give ``[n]`` trailing axes; leave per-token weights as they are."""
    return weights.reshape(-1, *(1,) * (streams.dim() - 1)) if weights.dim() == 1 else weights


def separate(connections: nn.Module, longest: int = 1) -> None:
    """Move all coefficients off their start, each differently, so that no two streams stay equal.

    Streams grow by as much at each residual: on long trunks less is moved, for what is not finite tells nothing.

    Args:
        connections: whose parameters are coefficients.
        longest: how many residuals the longest trunk has.
    """
    size = 0.1 * min(1.0, 32 / longest)
    with torch.no_grad():
        for parameter in connections.parameters():
            steps = torch.arange(1, parameter.numel() + 1, device=parameter.device, dtype=torch.float32)
            parameter.add_(size * torch.sin(steps).view_as(parameter).to(parameter.dtype))
