"""The functions of graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

_SHARED: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def function_of(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Return a new function ``(module, *inputs)`` that runs ``graph``, by a name that other graphs can call it by."""
    function: Any = _function(graph.python_code("self"))
    function.__name__ = function.__qualname__ = name
    function.__module__ = __name__
    return function


def shared_function_of(graph: fx.Graph) -> Callable[..., Any]:
    """Return the function of ``graph``; equal graphs share one, and so its compiled code."""
    code = graph.python_code("self")
    key = _key(code)
    function = _SHARED.get(key)
    if function is None:
        function = _SHARED[key] = _function(code)
    return function


def code_key(graph: fx.Graph) -> Any:
    """Return what is equal for graphs of the same code, while the objects that it names are alive."""
    return _key(graph.python_code("self"))


def _key(code: Any) -> Any:
    return code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items()))


def _function(code: Any) -> Callable[..., Any]:
    namespace = dict(code.globals)
    exec(compile(code.src, "<hc_transform>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function
