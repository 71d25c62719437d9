"""Hooks on blocks that are given or give streams: they see ordinary values, the readouts."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedModel
from .in_place import of_engine
from .mixing import Streams
from .trunk_value import TrunkValue, enter, hand_on, holds_streams, is_trunk_value, read_out

OPAQUE = (
    nn.Module,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.GeneratorType,
    functools.partial,
)
PLAIN = (torch.Tensor, fx.Proxy, fx.Node, int, float, complex, str, bytes, type(None))  # holds nothing else


class ObservingHook:
    """A forward hook or forward pre-hook that sees readouts in place of streams.

    What it changes is changed in the streams: each moves by as much as the readout did.
    """

    def __init__(self, hook: Any, before: bool) -> None:
        self.hook = hook
        self.before = before

    def __call__(self, module: Any, *given: Any) -> Any:
        """Call the hook on what the streams stand for."""
        if not holds_streams(given):
            return self.hook(module, *given)
        seen = read_out(given)
        versions = _versions(seen)
        result = self.hook(module, *seen)
        if result is None and _versions(seen) == versions:
            return None
        if not self.before:
            return _moved(given[-1], seen[-1] if result is not None else read_out(given[-1]), _or(result, seen[-1]))
        if len(given) == 2:  # with keywords
            return _moved(given, seen if result is not None else read_out(given), _or(result, seen))
        if result is not None and not isinstance(result, tuple):
            result = (result,)
        return _moved(given[0], seen[0] if result is not None else read_out(given[0]), _or(result, seen[0]))


@dataclass
class Apart:
    """The streams of a trunk value, for engines, which look for tensors in dataclasses and pytrees."""

    streams: Streams
    step: int
    reduction: str

    def to(self, *args: Any, **kwargs: Any) -> Apart:
        """Return the streams moved or cast."""
        return Apart(tuple([stream.to(*args, **kwargs) for stream in self.streams]), self.step, self.reduction)


pytree.register_pytree_node(
    Apart,
    lambda value: (list(value.streams), (value.step, value.reduction)),
    lambda streams, context: Apart(tuple(streams), *context),
    serialized_type_name="hc_transform.Apart",
)


class EngineHook:
    """A hook of an engine that shards or moves what a block is given and gives: it sees all streams as tensors."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, module: Any, *given: Any) -> Any:
        """Call the hook on the streams, and put together what it returns."""
        result = self.hook(module, *pytree.tree_map(_taken_apart, given, is_leaf=is_trunk_value))
        return pytree.tree_map(_put_together, result, is_leaf=lambda value: type(value) is Apart)


def _taken_apart(value: Any) -> Any:
    if type(value) is not TrunkValue:
        return value
    return Apart(enter(value, len(value.streams)), value.step, value.reduction)


def _put_together(value: Any) -> Any:
    return hand_on(value.streams, value.step, value.reduction) if type(value) is Apart else value


def observe(hook: Any, before: bool) -> Any:
    """Return ``hook``, called before or after a block, so that it sees readouts; an engine's sees all streams."""
    if isinstance(hook, (ObservingHook, EngineHook)):
        return hook
    if of_engine(hook):
        return EngineHook(hook)
    return ObservingHook(hook, before)


def call_hooks(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Call the forward hooks of a module whose code is part of a graph, with what it was given and gave.

    Raises:
        UnsupportedModel: a hook changes the output.
    """
    for key, hook in list(module._forward_hooks.items()):
        with_kwargs = key in module._forward_hooks_with_kwargs
        if hook(module, args, *((kwargs,) if with_kwargs else ()), output) is not None:
            raise UnsupportedModel(
                f"a forward hook on a {type(module).__name__} changes its output, and the module's code is part of a "
                "converted block's graph. Put the hook on the block or on a module inside of a branch"
            )


def within_hooks(
    module: Any,
    on_streams: Callable[..., Streams],
    streams: Streams,
    args: tuple[Any, ...],
    position: int,
    kwargs: dict[str, Any],
) -> Streams:
    """Call a module that is carried on all streams, and its hooks once, with readouts.

    Args:
        module: whose hooks to call.
        on_streams: what its forward does to streams, given them and the other arguments.
        streams: n tensors of one shape.
        args: the other positional arguments.
        position: where the streams stand among the positional arguments.
        kwargs: by keyword.

    Raises:
        UnsupportedModel: a hook puts something in place of a value that the streams cannot follow.
    """
    given: Any = (*args[:position], hand_on(streams, 1, "mean"), *args[position:])
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            result = observe(hook, before=True)(module, given, kwargs)
            given, kwargs = (given, kwargs) if result is None else result
        else:
            result = observe(hook, before=True)(module, given)
            given = given if result is None else result if isinstance(result, tuple) else (result,)
    _refuse_plain(module, given[position])
    output: Any = on_streams(enter(given[position], 0), *given[:position], *given[position + 1 :], **kwargs)
    output = hand_on(output, 1, "mean")
    for key, hook in list(module._forward_hooks.items()):
        with_kwargs = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        result = observe(hook, before=False)(module, given, *with_kwargs, output)
        output = output if result is None else result
    _refuse_plain(module, output)
    return enter(output, 0)


def _refuse_plain(module: Any, value: Any) -> None:
    if type(value) is not TrunkValue:
        raise UnsupportedModel(
            f"a hook on a {type(module).__name__} puts a tensor of another shape in place of a value that is held as "
            "streams. Put the hook on a module inside of a branch"
        )


def read_outputs(module: Any, args: Any, output: Any) -> Any:
    """Return a module's output with readouts in place of streams: a forward hook for the module around a chain.

    Plain objects and dataclasses among the outputs stay the objects that they are.
    """
    waiting = _objects_in(output)
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        for name, held in _attributes(value, seen).items():
            if holds_streams(held):
                object.__setattr__(value, name, read_out(held))
            waiting += _objects_in(held)
    return read_out(output) if holds_streams(output) else None


def _objects_in(values: Any) -> list[Any]:
    """Return the leaves of nested values that may hold others."""
    leaves = pytree.tree_leaves(values, is_leaf=is_trunk_value)
    return [leaf for leaf in leaves if not isinstance(leaf, (*PLAIN, *OPAQUE))]


def _attributes(value: Any, seen: set[int]) -> dict[str, Any]:
    """Return what an object holds, once; in compiled code of dataclasses alone: elsewhere streams do as a tensor."""
    if torch.compiler.is_compiling():
        return {name: getattr(value, name) for name in getattr(value, "__dataclass_fields__", ())}
    if id(value) in seen:
        return {}
    seen.add(id(value))
    attributes = dict(getattr(value, "__dict__", ()))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        attributes.update({name: getattr(value, name) for name in names if hasattr(value, name)})
    return attributes


def _moved(given: Any, seen: Any, result: Any) -> Any:
    """Return ``given`` with every stream moved by the difference between ``result`` and ``seen``."""
    values, spec = pytree.tree_flatten(given, is_leaf=is_trunk_value)
    before, after = pytree.tree_leaves(seen), pytree.tree_leaves(result)
    if not len(values) == len(before) == len(after):
        return result
    moved = []
    for value, old, new in zip(values, before, after, strict=True):
        if type(value) is TrunkValue:
            if new is not old and new.shape == old.shape:
                value = TrunkValue(tuple(s + (new - old) for s in value.streams), value.step, value.reduction)
            elif new is not old:
                value = new
        else:
            value = new
        moved.append(value)
    return pytree.tree_unflatten(moved, spec)


def _or(result: Any, seen: Any) -> Any:
    return seen if result is None else result


def _versions(values: Any) -> list[int]:
    return [leaf._version if isinstance(leaf, torch.Tensor) else 0 for leaf in pytree.tree_leaves(values)]
