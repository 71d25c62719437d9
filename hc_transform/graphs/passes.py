"""Passes over graphs tell at DEBUG how long they took and what became of the number of nodes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

Function = TypeVar("Function", bound=Callable[..., Any])

log = logging.getLogger("hc_transform")


def logged_pass(function: Function) -> Function:
    """Let ``function`` log its name, seconds and number of nodes, of what it is given first and of what it returns."""

    @functools.wraps(function)
    def logged(*args: Any, **kwargs: Any) -> Any:
        if not log.isEnabledFor(logging.DEBUG):
            return function(*args, **kwargs)
        before, start = _nodes_of(args[0] if args else None), time.perf_counter()
        result = function(*args, **kwargs)
        after = _nodes_of(result)
        counts = " -> ".join(str(count) for count in (before, after) if count is not None)
        seconds = time.perf_counter() - start
        log.debug("%s: %.3f s%s", function.__name__, seconds, f", {counts} nodes" if counts else "")
        return result

    return logged  # type: ignore[return-value]


def _nodes_of(value: Any) -> int | None:
    """Return the number of nodes of a graph, or of what holds one; None if it holds none."""
    graph = getattr(getattr(value, "graph_module", value), "graph", value)
    return len(graph.nodes) if isinstance(graph, fx.Graph) else None
