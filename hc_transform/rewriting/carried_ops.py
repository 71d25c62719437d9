"""Carried operations in the graph: one operation on a trunk value becomes that operation on each stream."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.kinds import Kinds
from ..graphs.dialects import OPERATORS, has_several_outputs, name_of, out_of_place, overwrites_first, statistics_of
from ..graphs.operations import Kind
from ..residuals.passage import IN_PLACE_OPERATORS
from ..streams import carried as ops
from ..streams.mixing import write, write_recomputed

NORMS_OF_BATCHES = frozenset("batch_norm instance_norm".split())


def carried_call(
    node: fx.Node, kinds: Kinds, target: Any, streams: Mapping[fx.Node, fx.Node], args: tuple[Any, ...], kwargs: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return what to call in place of ``node``, and with what: (function, args, kwargs).

    The memory of streams is overwritten only where nothing else can need it: a stream that is fresh from a
    write and has no other reader. Else a connection would need for its backward pass what is gone.

    Args:
        node: the operation of the plan's graph.
        kinds: of the plan's graph.
        target: the node's target, or the node of the new graph that stands for its module.
        streams: its operands that are streams, with those.
        args, kwargs: its arguments in the new graph.
    """
    positions = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in streams]
    given = [streams[node.args[i]] for i in positions]  # type: ignore[index]
    if node.op == "call_module" and any(map(_keeps_statistics, kinds.modules[str(node.target)].modules())):
        return ops.carry_folded, (target, given[0]), {}
    if has_several_outputs(node):
        target = ops.FirstOutput(target)
    rest = tuple(a for i, a in enumerate(args) if i not in positions)
    kwargs = dict(kwargs)
    if name_of(node) in NORMS_OF_BATCHES and node.op == "call_function":
        statistics = statistics_of(node)
        if statistics[1] is not False:
            kwargs["statistics"] = tuple(_argument(value, node, args, kwargs) for value in statistics)
            return ops.CarriedFunction(target, ops.carry_statistics), (given[0], *rest), kwargs
    carry: Any = ops.carry_random if kinds.of(node) is Kind.RANDOM else ops.carry
    if _in_place(node, kinds) and (positions != [0] or not _sole_reader(node, given[0])):
        found = None if node.op == "call_module" else _out_of_place(target, kwargs)
        target, kwargs = found or (target, kwargs)
        if found is None and carry is ops.carry:
            carry = ops.carry_on_copies
    first: Any = given[0]
    if len(positions) > 1:
        first = tuple(given)
        carry = ops.carry_together if carry is ops.carry else ops.carry_together_on_copies
        kwargs["positions"] = tuple(positions)
    elif positions != [0]:
        kwargs["position"] = positions[0]
    if callable(target):
        return ops.CarriedFunction(target, carry), (first, *rest), kwargs
    return carry, (target, first, *rest), kwargs


def _argument(value: Any, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what the new graph has in place of an argument of ``node``."""
    if not isinstance(value, fx.Node):
        return value
    old, new = (*node.args, *node.kwargs.values()), (*args, *(kwargs[key] for key in node.kwargs))
    return new[old.index(value)]


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm that updates statistics: it is to see all streams at once."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats


def _in_place(node: fx.Node, kinds: Kinds) -> bool:
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in kinds.modules[str(node.target)].modules())
    overwrites = overwrites_first(node.target)
    if overwrites is not None:
        return overwrites
    name = name_of(node)
    inplace = node.kwargs.get("inplace") or any(a is True for a in node.args)  # True may be F.relu's inplace
    return name.endswith("_") or name in IN_PLACE_OPERATORS or bool(inplace)


def _sole_reader(node: fx.Node, streams: fx.Node) -> bool:
    value = next(a for a in node.args if isinstance(a, fx.Node))
    return streams.target in (write, write_recomputed) and list(value.users) == [node]


def _out_of_place(target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Return the operation that makes a new tensor where ``target`` overwrites its first argument, if it has a name."""
    if kwargs.get("inplace"):
        return target, {**kwargs, "inplace": False}
    if isinstance(target, str):
        method = target.rstrip("_")
        return (method, kwargs) if method != target and callable(getattr(Tensor, method, None)) else None
    if isinstance(target, OPERATORS):
        found = out_of_place(target)
        return None if found is None else (found, kwargs)
    name = getattr(target, "__name__", "")
    if name.strip("_") in IN_PLACE_OPERATORS:
        return getattr(operator, name.strip("_")[1:]), kwargs
    bare = getattr(torch, name.rstrip("_"), None)
    return (bare, kwargs) if name.endswith("_") and callable(bare) else None
