"""A block of a model that stays Python around it: its code runs as graphs.

A converted block is of a subclass of its class, under the same name, so that ``isinstance``, wrap
policies, gradient checkpointing wrapped around ``forward`` and everything else that goes by classes
work as before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ..errors import UnsupportedModel
from ..graphs.dialects import name_of
from ..residuals.keys import add_modules
from ..streams.hook_readouts import observe
from ..streams.linear_ops import linear_operand
from ..streams.trunk_value import read_out
from .block_runner import BASE, RUNNER, BlockRunner

BACKWARD_HOOKS = ("register_backward_hook", "register_full_backward_hook", "register_full_backward_pre_hook")


def install(block: nn.Module, runner: BlockRunner, modules: Mapping[str, nn.Module]) -> None:
    """Make ``block`` run ``runner``'s graphs, with new ``modules`` at their paths below it."""
    base: Any = type(block)
    block.__class__ = block_class(base)
    block.__dict__[RUNNER] = runner
    add_modules(block, modules.items())
    for registry, before in ((block._forward_hooks, False), (block._forward_pre_hooks, True)):
        for key, hook in registry.items():
            registry[key] = observe(hook, before)
    if any(call.leaves for call in runner.plan.calls) and (block._backward_hooks or block._backward_pre_hooks):
        raise UnsupportedModel(_backward_hooks(runner.plan.path))


@functools.cache
def block_class(base: Any) -> Any:
    """Return the subclass of ``base`` whose instances run graphs; it goes by the same name."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return _as_leaf(self, args, kwargs)
        return self.__dict__[RUNNER](self, args, kwargs)

    def register_forward_hook(self: nn.Module, hook: Any, **settings: Any) -> Any:
        return base.register_forward_hook(self, observe(hook, before=False), **settings)

    def register_forward_pre_hook(self: nn.Module, hook: Any, **settings: Any) -> Any:
        return base.register_forward_pre_hook(self, observe(hook, before=True), **settings)

    def backward_hook(name: str) -> Any:
        def register(self: nn.Module, *args: Any, **settings: Any) -> Any:
            if any(call.leaves for call in self.__dict__[RUNNER].plan.calls):
                raise UnsupportedModel(_backward_hooks(self.__dict__[RUNNER].plan.path))
            return getattr(base, name)(self, *args, **settings)

        return register

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _remade, (base,), self.__dict__

    return type(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "register_forward_hook": register_forward_hook,
            "register_forward_pre_hook": register_forward_pre_hook,
            **{name: backward_hook(name) for name in BACKWARD_HOOKS},
            "__reduce_ex__": reduce,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            BASE: base,
        },
    )


def _remade(base: Any) -> Any:
    cls: Any = block_class(base)
    return cls.__new__(cls)


def _as_leaf(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stand in another tracer's graph as one call, whose value is its readout for everyone but the next block."""
    tracer: Any = next(value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)).tracer
    given, given_by_name = fx.node.map_aggregate((args, kwargs), _with_streams)
    made = tracer.create_proxy("call_module", tracer.path_of_module(block), given, given_by_name)
    if not any(call.leaves for call in block.__dict__[RUNNER].plan.calls):
        return made
    return tracer.create_proxy("call_function", read_out, (made,), {})


def _with_streams(value: Any) -> Any:
    """Return the streams that another tracer's value is the readout of, or else the value."""
    streams = _streams_of(value.node) if isinstance(value, fx.Proxy) else None
    return value if streams is None else fx.Proxy(streams, value.tracer)


def _streams_of(node: Any) -> fx.Node | None:
    """Return the node of the streams that a node is the readout of, also through what is done to each stream."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target is read_out:
        return node.args[0]  # type: ignore[return-value]
    found = [_streams_of(value) for value in node.args]
    place = linear_operand(name_of(node), node.args, dict(node.kwargs), [value is not None for value in found])
    if place is None or any(_streams_of(value) for value in node.kwargs.values()):
        return None
    args = (*node.args[:place], found[place], *node.args[place + 1 :])
    return node.graph.create_node(node.op, node.target, args, node.kwargs)


def block_graphs(model: nn.Module) -> dict[str, list[fx.Graph]]:
    """Return the graphs that the blocks of a model converted with ``scope="blocks"`` run, by the blocks' paths.

    A block has one for each kind of call that has occurred.
    """
    graphs: dict[str, list[fx.Graph]] = {}
    for path, module in model.named_modules():
        if RUNNER in module.__dict__:
            variants = {id(v): v for group in module.__dict__[RUNNER].variants.values() for v in group}
            graphs[path] = [variant.graph for variant in variants.values()]
    return graphs


def _backward_hooks(path: str) -> str:
    return (
        f"{path} hands streams on to another block, so that a backward hook on it would see the gradients of n streams "
        "in place of one value's. Put the hook on a module inside its branches, or convert without it"
    )
