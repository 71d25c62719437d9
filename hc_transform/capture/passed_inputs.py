"""Find the inputs that code only passes on, so that one graph serves whatever they are.

A trace holds None, flags and numbers as constants, for Python decides on them. Most are only handed to
modules that stay whole: a mask that may be left out, a flag for the attention. To tell, the same code is
traced again with the input as something else, on the values of the first trace; where the same graph
comes out, nothing was decided on it, and it needs no check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from ..graphs.guards import CHECKS, check_input, check_tensor_input
from ..graphs.operations import TOLD_APART, is_constant
from .proxy import CannotInline

Again = Callable[[Mapping[str, Any], frozenset[str]], fx.Graph]


def loosen(graph: fx.Graph, inputs: Mapping[str, Any], defaults: Mapping[str, Any], again: Again) -> fx.Graph:
    """Return a graph in which inputs that are only passed on are neither constant nor checked.

    Args:
        graph: of the first trace.
        inputs: what it was traced with, by parameter name.
        defaults: of the forward's parameters that have one and are named.
        again: traces once more with other inputs, some of them as proxies in place of constants.
    """
    values = {name: inputs.get(name, default) for name, default in defaults.items()}
    values.update({name: value for name, value in inputs.items() if name not in values})
    constant = [n for n, value in values.items() if is_constant(value) and not isinstance(value, TOLD_APART)]
    given = [name for name, value in values.items() if not is_constant(value) and defaults.get(name, 0) is None]
    loose = _passed_on(constant, lambda names: again(inputs, frozenset(names)), graph)
    absent = _passed_on(given, lambda names: again({**inputs, **dict.fromkeys(names)}, frozenset()), graph)
    if loose:
        proxied = again(inputs, frozenset(loose))
        flags = {name: not values[name] for name in loose if isinstance(values[name], bool)}  # ``flag is True``
        if flags and not _same(
            proxied, lambda _: again({**inputs, **flags}, frozenset(loose).difference(flags)), loose
        ):
            loose = [name for name in loose if name not in flags]
            proxied = again(inputs, frozenset(loose)) if loose else graph
        graph = proxied
    for node in list(graph.nodes):
        if node.target in (check_input, check_tensor_input) and node.args[0].op == "placeholder":
            if node.args[0].target in (*loose, *absent):
                graph.erase_node(node)
    return graph


def _passed_on(names: list[str], trace: Callable[[list[str]], fx.Graph], graph: fx.Graph) -> list[str]:
    """Return those of ``names`` that may be something else without a change to the graph."""
    if not names or _same(graph, trace, names):
        return names
    if len(names) == 1:
        return []
    alone = [name for name in names if _same(graph, trace, [name])]
    return alone if len(alone) < 2 or _same(graph, trace, alone) else alone[:1]


def _same(graph: fx.Graph, trace: Callable[[list[str]], fx.Graph], names: list[str]) -> bool:
    try:
        other = trace(names)
    except CannotInline:
        return False
    ours, theirs = ([n for n in g.nodes if n.target not in CHECKS] for g in (graph, other))
    if len(ours) != len(theirs):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for a, b in zip(ours, theirs, strict=True):
        if a.op != b.op or not _same_target(a.target, b.target) or len(a.args) != len(b.args):
            return False
        twin[a] = b
        if a.op != "placeholder" and not _alike((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs)), twin, set(names)):
            return False
    return True


def _same_target(a: Any, b: Any) -> bool:
    return a is b or a == b or getattr(a, "function", a) is getattr(b, "function", b) is not b


def _alike(a: Any, b: Any, twin: Mapping[fx.Node, fx.Node], names: set[str]) -> bool:
    """Whether two arguments are the same, but for the inputs that are something else on purpose."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return twin.get(a) is b
    for one, other in ((a, b), (b, a)):
        if isinstance(one, fx.Node):
            return one.op == "placeholder" and one.target in names and not isinstance(other, fx.Node)
    if isinstance(a, (tuple, list)):
        return (
            type(a) is type(b)
            and len(a) == len(b)
            and all(_alike(x, y, twin, names) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_alike(a[k], b[k], twin, names) for k in a)
    if isinstance(a, slice):
        parts = ("start", "stop", "step")
        return isinstance(b, slice) and all(_alike(getattr(a, p), getattr(b, p), twin, names) for p in parts)
    return type(a) is type(b) and a == b
