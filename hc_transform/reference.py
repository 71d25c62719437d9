"""A second, slow implementation of a plan, to hold the rewritten graph against.

It interprets the graph as it was before rewriting, keeps the streams of a trunk value as one stacked
tensor beside it, and applies the equations of hyper-connections with tensor contractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .connections import Connection
from .find import Residual
from .kinds import Kind, Kinds, is_shape_read
from .planner import Plan, readers_of
from .rewrite import key_of


class ReferenceInterpreter(fx.Interpreter):
    """Run a plan on the graph it was made from.

    After :meth:`run`, ``written`` holds the streams after each residual by its name, ``[n, ...]``.
    """

    def __init__(self, plan: Plan, connections: Mapping[str, Connection]) -> None:
        super().__init__(plan.graph_module, garbage_collect_values=False)
        self.num_streams = plan.options.num_streams
        self.sum_readout = plan.options.readout == "sum"
        self.kinds = Kinds(plan.graph_module)
        self.connections = {r.name: connections[key_of(r.name)] for r in plan.residuals}
        self.by_add = {r.add: r for r in plan.residuals}
        self.carried = {node: source for trunk in plan.trunks for node, source in trunk.carried.items()}
        for residual in plan.residuals:
            self.carried.update(zip(residual.skip_ops, (residual.skip, *residual.skip_ops), strict=False))
        self.read_by: dict[fx.Node, Residual] = {}
        for residual in plan.residuals:
            for reader in readers_of(residual):
                if not is_shape_read(reader):
                    self.read_by.setdefault(reader, residual)
        self.streams: dict[fx.Node, Tensor] = {}  # [n, ...]
        self.coefficients: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.written: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value; for a trunk value the readout of its streams."""
        if n in self.by_add:
            self.streams[n] = self._write(self.by_add[n])
        elif n in self.carried:
            self.streams[n] = self._carry(n, self.carried[n], self._streams_at(self.carried[n]))
        else:
            return super().run_node(n)
        total = self.streams[n].sum(0)
        return total if self.sum_readout else total / self.num_streams

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Return a node's arguments; where a branch begins, the read in place of the skip."""
        if n not in self.read_by:
            return super().fetch_args_kwargs_from_env(n)
        residual = self.read_by[n]
        plain, self.env[residual.skip] = self.env[residual.skip], self._read(residual)
        try:
            return super().fetch_args_kwargs_from_env(n)
        finally:
            self.env[residual.skip] = plain

    def _streams_at(self, value: fx.Node) -> Tensor:
        if value not in self.streams:
            self.streams[value] = torch.stack([self.env[value]] * self.num_streams)
        return self.streams[value]

    def _coefficients_of(self, residual: Residual) -> tuple[Tensor, Tensor, Tensor]:
        """Return h_pre ``[n, ...]``, h_post ``[n, ...]`` and h_res ``[n, n, ...]``."""
        if residual.name not in self.coefficients:
            h_pre, h_post, h_res = self.connections[residual.name](tuple(self._streams_at(residual.skip)))
            self.coefficients[residual.name] = (
                torch.stack(h_pre),
                torch.stack(h_post),
                torch.stack([torch.stack(row) for row in h_res]),
            )
        return self.coefficients[residual.name]

    def _read(self, residual: Residual) -> Tensor:
        streams = self._streams_at(residual.skip)
        h_pre = _broadcast(self._coefficients_of(residual)[0], streams)
        return (h_pre * streams).sum(0).to(streams.dtype)

    def _write(self, residual: Residual) -> Tensor:
        _, h_post, h_res = self._coefficients_of(residual)
        streams = self._streams_at((residual.skip, *residual.skip_ops)[-1])
        branch = sum(self.env[term] for term in residual.branch) * residual.branch_scale
        mixed = torch.stack([(_broadcast(row, streams) * streams).sum(0) for row in h_res])
        written = residual.skip_scale * mixed + _broadcast(h_post, streams) * branch
        self.written[residual.name] = written
        return written.to(torch.promote_types(streams.dtype, branch.dtype))

    def _carry(self, node: fx.Node, source: fx.Node, streams: Tensor) -> Tensor:
        if node.op == "call_module":
            module = self.submodules[str(node.target)]
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
                return module(streams.flatten(0, 1)).unflatten(0, streams.shape[:2])
        results, state = [], torch.get_rng_state()
        for stream in streams:
            if self.kinds.of(node) is Kind.RANDOM:
                torch.set_rng_state(state)
            values = {**self.env, source: stream.clone()}
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            results.append(getattr(self, node.op)(node.target, args, kwargs))
        return torch.stack(results)


def _broadcast(weights: Tensor, streams: Tensor) -> Tensor:
    """Give ``[n]`` trailing axes; leave per-token weights as they are."""
    return weights.reshape(-1, *(1,) * (streams.dim() - 1)) if weights.dim() == 1 else weights


def separate(connections: nn.Module) -> None:
    """Move all coefficients off their start, each differently, so that no two streams stay equal."""
    with torch.no_grad():
        for parameter in connections.parameters():
            steps = torch.arange(1, parameter.numel() + 1, device=parameter.device, dtype=torch.float32)
            parameter.add_(0.1 * torch.sin(steps).view_as(parameter).to(parameter.dtype))
