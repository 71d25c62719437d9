"""The operations of a graph as lines of code, and the lines of the user's code that they come from."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import fx

from ..graphs import meta
from ..residuals.keys import label_of
from ..text import shortened
from .steps import Step, gives_streams

ROLE = 14


def detailed(steps: Sequence[Step], block: str, width: int) -> Iterator[str]:
    """Yield the operations of one module, below the lines of code that ask for them."""
    name = short_names(block, steps)
    for path, of_path in groupby([s for s in steps if s.role != "check"], key=lambda step: step.path):
        yield path or "(the model)"
        for at, members in groupby(of_path, key=lambda step: step.at):
            group = list(members)
            if at:
                yield fitted(f"  {at}  {source_of(group[0])}", width)
            for step in group:
                yield fitted(f"    {step.role or '.':<{ROLE}}{expression(step, name)}", width)


def source_of(step: Step) -> str:
    """Return the line of code that a step comes from, "" if its file is not at hand."""
    file, _, line = (meta.LOCATION.of(step.node) or "").rpartition(":")
    return linecache.getline(file, int(line)).strip() if file and line.isdigit() else ""


def short_names(block: str, steps: Sequence[Step]) -> Callable[[fx.Node], str]:
    """Return what names nodes within a module: without the module's own path, "streams" those that it is given."""
    prefix = label_of(block) + "_" if block else ""
    taken = {step.node.name for step in steps}
    own = {step.node for step in steps}
    used = (value for step in steps for value in step.node.all_input_nodes)
    given = next((value for value in used if value not in own and gives_streams(value)), None)

    def name(node: fx.Node) -> str:
        if node is given:
            return "streams"
        short = node.name.removeprefix(prefix)
        return short if short.isidentifier() and short not in taken - {node.name} else node.name

    return name


def expression(step: Step, name: Callable[[fx.Node], str]) -> str:
    """Return a node as an assignment."""
    node = step.node
    args = [argument(value, name) for value in node.args]
    args += [f"{key}={argument(value, name)}" for key, value in node.kwargs.items()]
    if node.op == "placeholder":
        return f"{name(node)}" + (f" = {args[0]}" if args else "")
    if node.op == "output":
        return f"return {', '.join(args)}"
    if node.op == "get_attr":
        return f"{name(node)} = self.{step.what}"
    if node.op == "call_method":
        return f"{name(node)} = {args[0]}.{node.target}({', '.join(args[1:])})"
    what = step.what if node.op == "call_module" else str(getattr(node.target, "__name__", node.target))
    return f"{name(node)} = {what}({', '.join(args)})"


def argument(value: Any, name: Callable[[fx.Node], str]) -> str:
    """Return an argument of a node as code."""
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, tuple):
        inner = ", ".join(argument(v, name) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(argument(v, name) for v in value)}]"
    if isinstance(value, slice):
        parts = ["" if v is None else argument(v, name) for v in (value.start, value.stop)]
        return ":".join(parts)
    return shortened(repr(value), 32)


def fitted(line: str, width: int) -> str:
    """Return a line in at most ``width`` columns, its end left out where it is longer."""
    line = line.rstrip()
    return line if len(line) <= width else line[: width - 3] + "..."
