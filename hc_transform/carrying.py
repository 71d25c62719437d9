"""Carried operations in the graph: one operation on a trunk value becomes that operation on each stream."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import streams as ops
from .kinds import Kind, Kinds, name_of

IN_PLACE_OPERATORS = frozenset("iadd isub imul itruediv ipow".split())


def carried_call(
    node: fx.Node, kinds: Kinds, target: Any, streams: fx.Node, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return what to call in place of ``node``, and with what: (function, args, kwargs).

    The memory of streams is overwritten only where nothing else can need it: a stream that is fresh from a
    write and has no other reader. Else a connection would need for its backward pass what is gone.

    Args:
        node: the operation of the plan's graph.
        kinds: of the plan's graph.
        target: the node's target, or the node of the new graph that stands for its module.
        streams: the streams it is applied to.
        rest, kwargs: its arguments in the new graph, without the trunk value; ``kwargs["position"]`` is
            where the trunk value stands, if not first.
    """
    if node.op == "call_module" and any(map(_keeps_statistics, kinds.modules[str(node.target)].modules())):
        return ops.carry_folded, (target, streams), {}
    carry: Any = ops.carry_random if kinds.of(node) is Kind.RANDOM else ops.carry
    may_overwrite = _sole_reader(node, streams) and "position" not in kwargs
    if carry is ops.carry and _in_place(node, kinds) and not may_overwrite:
        found = None if node.op == "call_module" else _out_of_place(target, kwargs)
        if found is None:
            carry = ops.carry_on_copies
        else:
            target, kwargs = found
    if callable(target):
        return ops.CarriedFunction(target, carry), (streams, *rest), kwargs
    return carry, (target, streams, *rest), kwargs


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm that updates statistics: it is to see all streams at once."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats


def _in_place(node: fx.Node, kinds: Kinds) -> bool:
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in kinds.modules[str(node.target)].modules())
    name = name_of(node)
    inplace = node.kwargs.get("inplace") or any(a is True for a in node.args)  # True may be F.relu's inplace
    return name.endswith("_") or name in IN_PLACE_OPERATORS or bool(inplace)


def _sole_reader(node: fx.Node, streams: fx.Node) -> bool:
    value = next(a for a in node.args if isinstance(a, fx.Node))
    return streams.target in (ops.write, ops.write_recomputed) and list(value.users) == [node]


def _out_of_place(target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Return the operation that makes a new tensor where ``target`` overwrites its first argument, if it has a name."""
    if kwargs.get("inplace"):
        return target, {**kwargs, "inplace": False}
    if isinstance(target, str):
        method = target.rstrip("_")
        return (method, kwargs) if method != target and hasattr(Tensor, method) else None
    name = getattr(target, "__name__", "")
    if name.strip("_") in IN_PLACE_OPERATORS:
        return getattr(operator, name.strip("_")[1:]), kwargs
    bare = getattr(torch, name.rstrip("_"), None)
    return (bare, kwargs) if name.endswith("_") and callable(bare) else None
