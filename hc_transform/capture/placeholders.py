"""The inputs of a traced forward: placeholders, and checks of what was constant or left out."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..graphs import guards, meta
from ..graphs.operations import is_constant
from .proxy import UNKNOWN, ValueProxy
from .recorder import Recorder

_NOTHING: dict[Any, Any] = {inspect.Parameter.VAR_POSITIONAL: (), inspect.Parameter.VAR_KEYWORD: {}}
_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def place_inputs(
    tracer: Recorder, signature: inspect.Signature, inputs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Make a placeholder for each parameter of a forward; return what to call it with.

    Args:
        tracer: it records the placeholders.
        signature: of the forward.
        inputs: value of each parameter, UNKNOWN where there is none; a parameter that is not given
            takes its default. None, numbers and strings stay constants, checked on every call.
    """
    proxies: dict[str, ValueProxy] = {}
    values: dict[str, Any] = {}
    optional = False
    for name, parameter in signature.parameters.items():
        values[name] = inputs.get(name, parameter.default)
        if values[name] is parameter.empty or _is_star(parameter) and values[name] is UNKNOWN:
            values[name] = _NOTHING.get(parameter.kind, UNKNOWN)
        target = _STARS.get(parameter.kind, "") + name
        proxies[name] = tracer.placeholder(target, _default(parameter, optional), values[name])
        optional = optional or bool(proxies[name].node.args)
    given = {name: _checked(tracer, signature.parameters[name], proxies[name], values[name]) for name in proxies}
    if tracer.merges_inputs:
        _merge(tracer, given, values)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    # Decorators around a forward look for inputs by their names, where they can be given so.
    positional = any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in signature.parameters.values())
    for name, parameter in signature.parameters.items():  # entries after all checks, which tell what is missing
        if parameter.kind is parameter.VAR_POSITIONAL:
            args.extend(proxies[name][i] for i in range(len(values[name])))
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update({key: proxies[name][key] for key in values[name]})
        elif parameter.kind is parameter.KEYWORD_ONLY or not positional:
            kwargs[name] = given[name]
        else:
            args.append(given[name])
    return args, kwargs


def _merge(tracer: Recorder, given: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Let inputs that are one tensor be one proxy: a branch may take its skip under another name."""
    first: dict[int, str] = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            other = first.setdefault(id(value), name)
            if other != name:
                names = f"{other!r} and {name!r}"
                tracer.graph.call_function(guards.check_same, (given[other].node, given[name].node, names))
                given[name] = given[other]


def _checked(tracer: Recorder, parameter: inspect.Parameter, proxy: ValueProxy, value: Any) -> Any:
    """Record the check of one input; return its constant, or its proxy."""
    name = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        tracer.graph.call_function(guards.check_len, (proxy.node, len(value), f"*{name}"))
    elif parameter.kind is parameter.VAR_KEYWORD:
        tracer.graph.call_function(guards.check_keys, (proxy.node, tuple(value), f"**{name}"))
    elif name in tracer.loose:
        return proxy
    elif value is not UNKNOWN and is_constant(value) and not (type(value) is list and not value):  # which it may fill
        tracer.graph.call_function(guards.check_input, (proxy.node, value, name))
        return value
    elif is_known_by_identity(value):
        stands = proxy.node.args[0] if value is parameter.default and proxy.node.args else ""
        tracer.graph.call_function(guards.check_object, (proxy.node, id(value), stands, name))
        return value
    elif value is not UNKNOWN and not isinstance(value, torch.Tensor):
        default = proxy.node.args == (None,) and parameter.default not in (None, parameter.empty)
        tracer.graph.call_function(guards.check_kind, (proxy.node, guards.kind_of(value), default, name))
    elif proxy.node.args == (None,) and parameter.default in (None, parameter.empty) and value is not UNKNOWN:
        tracer.graph.call_function(guards.check_tensor_input, (proxy.node, name))
    return proxy


def _default(parameter: inspect.Parameter, optional: bool) -> tuple[Any, ...]:
    """Return the default of a placeholder, () if it has none.

    None stands for a default that no code can name, and for none at all behind an ``optional`` input: a
    keyword without default becomes positional in the graph's code.
    """
    if _is_star(parameter) or parameter.default is parameter.empty and not optional:
        return ()
    if is_known_by_identity(parameter.default) and parameter.default is not parameter.empty:
        return (f"the default of {parameter.name}",)
    return (parameter.default,) if is_constant(parameter.default) else (None,)


def is_known_by_identity(value: Any) -> bool:
    """Whether code may compare a value by identity, or look at what it is: a sentinel, a class, a global function."""
    if isinstance(value, types.FunctionType):
        return "<" not in value.__qualname__  # others are new on every call
    return type(value) is object or isinstance(value, (type, types.BuiltinFunctionType))


def _is_star(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def is_entry_of_input(node: fx.Node) -> bool:
    """Whether ``node`` takes an entry or attribute out of an input that is no tensor."""
    entry = False
    while node.op == "call_function" and getattr(node.target, "__name__", "") in ("getitem", "getattr"):
        source = node.args[0]
        if not isinstance(source, fx.Node) or issubclass(meta.TYPE.of(source) or torch.Tensor, torch.Tensor):
            return False
        node, entry = source, True
    return entry and node.op == "placeholder"
