"""Print what a converted model runs, as wide as the terminal."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from ..folding import Node, fold
from ..graphs.dialects import module_of
from ..text import counted, shortened, terminal_width, wrapped
from .code import detailed
from .steps import Site, Step, gives_streams, joined, origin, relative_to, steps_of
from .within import below

ROLE = 9  # columns of a step's part
HIDDEN = ("check", "enter", "hand on", "coefficients")
OF_TRUNKS = ("expand", "readout")


class Printout(str):
    """Text that a terminal and a notebook show as it is."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self)}</pre>"


@dataclass(frozen=True)
class Line:
    """What is printed in one line: steps of one part and one place in the code.

    Attributes:
        role: the part that they play.
        depth: in how many branches they are.
        names: of the modules and functions, below the path that the line stands at.
        at: place in the code.
    """

    role: str
    depth: int
    names: tuple[str, ...]
    at: str


def show(hc: nn.Module, block: str | None = None, width: int | None = None) -> Printout:
    """Return a printout of what a converted model runs: a string that a terminal and a notebook show.

    Without ``block`` the whole model by module paths, equal blocks once, a line for each place in the code and part:
    "expand" where a trunk begins, then for each residual "read", "branch" and "write", "carried" for what is done to
    every stream, "readout" where a trunk ends or another user takes its value. With ``block`` each operation of one
    module below the line of code that asks for it.

    Args:
        hc: what :func:`hc_transform.convert` returns, in either scope. Of graphs for several kinds of calls the first
            is shown.
        block: path of a module, "blocks.0".
        width: in columns; by default that of the terminal, 80 where there is none.

    Raises:
        UnsupportedModel: ``hc`` is not converted, or no code of ``block`` is in a graph; the message names those that
            have some.

    >>> import torch, hc_transform as hct
    >>> encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> hc = hct.convert(encoder, args=(torch.randn(2, 5, 8),), scope="graph")
    >>> print(hct.show(hc).splitlines()[0])
    TransformerEncoderLayer: 2 residuals on 1 trunk, 4 streams, connection dynamic.
    """
    width = width or terminal_width()
    steps = steps_of(hc)
    if block is not None:
        return Printout("\n".join(detailed(below(steps, block), block, width)))
    lines = list(_printed(fold(_entries(hc, steps)), "", width))
    return Printout("\n".join([*_title(hc, steps, width), "", *lines]))


def _title(hc: nn.Module, steps: Sequence[Step], width: int) -> Iterator[str]:
    report = getattr(hc, "hc_report", None)
    graphs = {step.prefix for step in steps}
    text = type(hc).__name__ + ": "
    if report is not None and report.converted:
        first, trunks = report.converted[0], len({r.trunk for r in report.converted})
        text += f"{counted(len(report.converted), 'residual')} on {counted(trunks, 'trunk')}, "
        text += f"{counted(first.streams, 'stream')}, connection {first.connection}."
    else:
        text += f"{counted(sum(step.role == 'write' for step in steps), 'residual')}."
    if graphs != {""}:
        run = "runs a graph" if len(graphs) == 1 else "run graphs"
        text += f" {counted(len(graphs), 'block')} {run}; the code around is Python as before."
    yield wrapped(text, width)


def _entries(hc: nn.Module, steps: Sequence[Step]) -> Iterator[tuple[str, Line]]:
    """Yield the lines of steps, each with the path that it stands at."""
    homes = trunk_paths(hc, steps)
    shown = [step for step in steps if not is_hidden(step)]
    after = [*(step.path for step in shown[1:]), None]
    placed = [(home_of(step, homes, then), step) for step, then in zip(shown, after, strict=True)]

    def key(one: tuple[str, Step]) -> Any:
        path, step = one
        return path, step.role, step.prefix, step.sites[-1].write if step.sites else None

    for (path, role, *_), group in groupby(placed, key=key):
        members = [step for _, step in group]
        depth = len(members[0].sites) - (role in ("read", "write"))
        at = "" if role in OF_TRUNKS else places([step.at for step in members])
        yield path, Line(role, depth, tuple(_names(members, path, role)), at)


def places(given: Sequence[str]) -> str:
    """Return places in code as one: the first, and the last where that is in the same file.

    >>> places(["vit.py:44", "vit.py:46", ""]), places(["vit.py:44"])
    ('vit.py:44-46', 'vit.py:44')
    """
    known = [at.rpartition(":") for at in given if at]
    lines = [int(line) for file, _, line in known if file == known[0][0] and line.isdigit()]
    if not lines:
        return ""
    low, high = min(lines), max(lines)
    return f"{known[0][0]}:{low}" + (f"-{high}" if high > low else "")


def is_hidden(step: Step) -> bool:
    """Whether a step is left out of what is short: checks, coefficients, what blocks are given and give."""
    blocks = bool(step.prefix) and step.role in ("input", "output")
    return step.role in HIDDEN or blocks or step.node.op == "get_attr" or step.role == "output"


def _names(members: Sequence[Step], path: str, role: str) -> Iterator[str]:
    if role in ("read", "write"):
        yield relative_to(path, members[0].sites[-1].name) if members[0].sites[-1].name != path else ""
    elif role == "expand":
        given = members[0].node.args
        yield f"{given[1]} streams" if len(given) > 1 else "streams with an embedding"
    elif role == "readout":
        kind = members[0].node.args[1] if len(members[0].node.args) > 1 else "mean"
        yield "learned" if members[0].node.op == "call_module" else str(kind)
    else:
        yield from (step.what for step in members)


def trunk_paths(hc: nn.Module, steps: Sequence[Step]) -> Mapping[Any, str]:
    """Return for each node that streams begin with the path of the module that the whole trunk is in."""
    sites = {id(site): site for step in steps for site in step.sites}.values()
    report = getattr(hc, "hc_report", None)
    numbers = {r.name: r.trunk for r in report.converted} if report is not None else {}
    modules: dict[Any, list[str]] = {}

    def trunk(site: Site) -> Any:
        return numbers.get(site.name, site.trunk)

    for site in sites:
        modules.setdefault(trunk(site), []).append(site.module)
    return {site.trunk: common_path(modules[trunk(site)]) for site in sites}


def common_path(paths: Iterable[str]) -> str:
    """Return the path of the module that holds all of ``paths``.

    >>> common_path(["blocks.0", "blocks.1"]), common_path(["blocks.0"]), common_path(["down.0", "up.0"])
    ('blocks', 'blocks.0', '')
    """
    return ".".join(os.path.commonprefix([path.split(".") if path else [] for path in paths]))


def home_of(step: Step, homes: Mapping[Any, str], then: str | None) -> str:
    """Return the path that a step is printed at: a trunk's ends stand where the whole trunk is.

    A readout that only the module of the next step takes, whose path is ``then``, is printed in that one; at the end of
    a trunk it is printed in the module of the last residual where that goes on.
    """
    if step.role == "expand":
        return homes.get(step.node, step.path)
    if step.role != "readout" or then == step.path:
        return step.path
    streams: Any = step.node.args[0]
    if not any(gives_streams(user) for user in streams.users):
        return homes.get(origin(streams), step.path)
    users = {joined(step.prefix, module_of(user)) for user in step.node.users}
    return then if then and users == {then} else step.path


def _least_depth(content: Iterable[Any]) -> int:
    return min((_least_depth(part.content) if isinstance(part, Node) else part.depth for part in content), default=0)


def _printed(content: Iterable[Any], indent: str, width: int) -> Iterator[str]:
    for part in content:
        if isinstance(part, Node):
            alike = f" ({part.times:,} alike)" if part.times > 1 else ""
            start = indent + "  " * _least_depth(part.content)
            yield start + shortened(part.path, width - len(start) - len(alike)) + alike
            yield from _printed(part.content, indent + "  ", width)
        else:
            yield _printed_line(part, indent + "  " * part.depth, width)


def _printed_line(line: Line, indent: str, width: int) -> str:
    start = f"{indent}{line.role or '.':<{ROLE}}"
    room = width - len(start) - (len(line.at) + 2 if line.at else 0)
    text = start + listed(line.names, room)
    return (text.ljust(width - len(line.at)) + line.at if line.at else text).rstrip()


def listed(names: Sequence[str], room: int) -> str:
    """Return names with commas, those in the middle counted where there is no room.

    >>> listed(["norm", "qkv", "reshape", "permute", "unbind", "proj"], 28)
    'norm, qkv, (3 more), proj'
    """
    whole = ", ".join(names)
    for kept in range(len(names) - 2, 0, -1) if len(whole) > room else ():
        whole = ", ".join([*names[:kept], f"({len(names) - kept - 1} more)", names[-1]])
        if len(whole) <= room:
            break
    return shortened(whole, room)
