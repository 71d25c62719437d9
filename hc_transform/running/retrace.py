"""A converted graph traced once more by another tool's tracer: torch.fx's own, or that of a feature extractor."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx

from ..capture.proxy import ValueProxy
from ..graphs import meta
from ..streams.mixing import readout


def foreign_tracer(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the tracer that a call is traced by, None if there is none or it is the package's own."""
    given = (v for v in (*args, *kwargs.values()) if isinstance(v, fx.Proxy) and not isinstance(v, ValueProxy))
    return next((value.tracer for value in given), None)


class Retraced(fx.Interpreter):
    """Record the nodes of a converted model's graph in another tracer's graph, its checks among them.

    Tools that name nodes by the modules that they come from (torchvision's feature extractors) get those names, and a
    readout after all streams: the last value of a module is then what it returned before.

    Args:
        model: which is called in traced code.
        tracer: that traces it.
    """

    def __init__(self, model: fx.GraphModule, tracer: Any) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.tracer = tracer
        self.names_modules = hasattr(tracer, "current_module_qualname")
        path = tracer.path_of_module(model)
        self.prefix = f"{path}." if path else ""

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what the model's call is in the other graph."""
        forward = inspect.signature(type(self.module).forward)
        bound = forward.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        given: list[Any] = []
        for name, value in list(bound.arguments.items())[1:]:
            given += value if forward.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL else [value]
        return self.run(*given, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """Record one node."""
        with self._within(n):
            made = super().run_node(n)
            if isinstance(made, fx.Proxy) and n.op not in ("placeholder", "output"):
                made.node.meta.update({k: v for k, v in n.meta.items() if k in ("stack_trace", "nn_module_stack")})
                if self.names_modules and meta.STREAMS.known(n):
                    self.tracer.create_proxy("call_function", readout, (made, meta.STREAMS.of(n)), {})
        return made

    @contextmanager
    def _within(self, n: fx.Node) -> Iterator[None]:
        """Say which module a node comes from."""
        if not self.names_modules:
            yield
            return
        before = self.tracer.current_module_qualname
        path = str(n.target) if n.op == "call_module" else meta.MODULE.of(n)
        self.tracer.current_module_qualname = (self.prefix + path).rstrip(".")
        try:
            yield
        finally:
            self.tracer.current_module_qualname = before

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of a module, which stays whole."""
        return self.tracer.create_proxy("call_module", self.prefix + target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of a function, which stays whole."""
        return self.tracer.create_proxy("call_function", target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of a method."""
        return self.tracer.create_proxy("call_method", target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a read of an attribute."""
        return self.tracer.create_proxy("get_attr", self.prefix + target, (), {})
