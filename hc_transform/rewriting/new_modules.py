"""The modules that conversion adds: connections, readouts, embeddings, dropout; and their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..connections import Connection
from ..connections.starts import MadeIn
from ..connections.trunk_ends import LearnedReadout, StreamDropout, StreamEmbedding
from ..errors import UnsupportedModel
from ..graphs.dialects import is_lifted, value_of
from ..graphs.operations import shape_of
from ..residuals.features import feature_axis
from ..residuals.findings import Residual
from ..residuals.keys import DROPOUT_KEY, EXPAND, READOUT
from ..residuals.planner import Plan
from ..residuals.trunks import Trunk


def expand_key(trunk: Trunk) -> str:
    """Return the path of a trunk's stream embedding, beside the connection of its first residual."""
    return (trunk.keys[0] if trunk.keys else trunk.residuals[0].key) + EXPAND


def readout_key(trunk: Trunk) -> str:
    """Return the path of a trunk's learnt readout, beside the connection of its last residual."""
    return (trunk.keys[1] if trunk.keys else trunk.residuals[-1].key) + READOUT


def new_modules(connections: Mapping[str, Connection], plan: Plan) -> dict[str, nn.Module]:
    """Return all new modules of a plan by their paths.

    Those are the connections, at the keys of the residuals, and what its options ask for besides (readouts,
    embeddings, dropout).
    """
    keys = {r.name: r.key for r in plan.residuals}
    return {**{keys[name]: made for name, made in connections.items()}, **make_ends(plan)}


def make_connections(plan: Plan) -> dict[str, Connection]:
    """Return the connection of each residual of ``plan``, on its parameters' device: new, one for each key.

    Raises:
        UnsupportedModel: the connection needs the feature size and it is not known.
    """
    modules = dict(plan.graph_module.named_modules(remove_duplicate=False))
    made: dict[str, Connection] = {}
    by_key: dict[str, Connection] = {}
    for trunk in plan.trunks:
        for index, residual in enumerate(trunk.residuals):
            if residual.key in by_key:
                made[residual.name] = by_key[residual.key]
                continue
            axis, dim = features_of(residual, plan, modules)
            try:
                with MadeIn(_dtype_near(residual, modules)):
                    connection = plan.options.make_connection(index=index, dim=dim, feature_axis=axis)
            except ValueError as error:
                hint = "; give example inputs with args=, which show the size" if dim is None else ""
                raise UnsupportedModel(f"{residual.name} ({residual.location}): {error}{hint}") from error
            made[residual.name] = by_key[residual.key] = _like(connection, residual, modules)
    return made


def other_parameters(modules: Iterable[nn.Module], connections: Mapping[str, Connection]) -> int:
    """Return how many parameters ``modules``, all that conversion adds, have beside ``connections``."""

    def count(parts: Iterable[nn.Module]) -> int:
        return sum({id(p): p.numel() for part in parts for p in part.parameters()}.values())

    return count(modules) - count(connections.values())


def make_ends(plan: Plan) -> dict[str, nn.Module]:
    """Return the modules of trunks, as opposed to those of residuals."""
    modules = dict(plan.graph_module.named_modules(remove_duplicate=False))
    options = plan.options
    made: dict[str, nn.Module] = {}
    for trunk in plan.trunks:
        for wanted, key, module, residual in (
            (options.stream_embedding, expand_key(trunk), StreamEmbedding, trunk.residuals[0]),
            (options.readout == "learned", readout_key(trunk), LearnedReadout, trunk.residuals[-1]),
        ):
            if wanted:
                axis, dim = features_of(residual, plan, modules)
                if dim is None:
                    raise UnsupportedModel(
                        f"{module.__name__} needs the feature size of {residual.name} ({residual.location}), which is "
                        "not known: give example inputs with args="
                    )
                with MadeIn(_dtype_near(residual, modules)):
                    made[key] = _like(module(options.num_streams, dim, axis), residual, modules)
    if options.stream_dropout and plan.trunks:
        made[DROPOUT_KEY] = StreamDropout(options.stream_dropout)
    return made


def features_of(residual: Residual, plan: Plan, modules: Mapping[str, nn.Module]) -> tuple[int, int | None]:
    """Return the feature axis of a residual's value and its size, None if that is not known."""
    if plan.options.feature_axis is None:
        return feature_axis(residual, modules)
    shape = shape_of(residual.skip)
    return plan.options.feature_axis, None if shape is None else shape[plan.options.feature_axis]


def _like(made: Any, residual: Residual, modules: Mapping[str, nn.Module]) -> Any:
    """Move a new module to the device of the residual's branch, in its dtype but at least fp32."""
    return made.to(_parameter_near(residual, modules).device, _dtype_near(residual, modules))


def _dtype_near(residual: Residual, modules: Mapping[str, nn.Module]) -> torch.dtype:
    return torch.promote_types(torch.float32, _parameter_near(residual, modules).dtype)


def _parameter_near(residual: Residual, modules: Mapping[str, nn.Module]) -> torch.Tensor:
    """Return a floating-point parameter of the branch, or what stands for one, for its device and dtype."""
    branch = [modules[str(node.target)] for node in residual.region if node.op == "call_module"]
    read = [value_of(n) for node in residual.region for n in node.all_input_nodes if is_lifted(n)]
    held = (p for module in (*branch, modules[""]) for p in module.parameters())  # not a list: the whole model's
    candidates = chain(read, held, (value_of(residual.skip),))
    near = (p for p in candidates if isinstance(p, torch.Tensor) and p.is_floating_point())
    return next(near, torch.empty(0))
