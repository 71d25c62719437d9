"""One module before and after conversion, side by side."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any

from torch import fx, nn

from ..errors import UnsupportedModel
from ..graphs import meta
from ..text import shortened, terminal_width
from .code import expression, fitted, short_names
from .printout import Printout
from .steps import Step, steps_of
from .within import below

CHANGED, SAME = " > ", " | "
NEW = ("expand", "enter", "coefficients", "read", "readout", "hand on")
BEFORE = ("python", "graph")
IDLE = 4  # lines that became nothing, above which they are left out


def diff(
    model: nn.Module, hc: nn.Module, block: str = "", before: str = "python", width: int | None = None
) -> Printout:
    """Return a module before and after conversion side by side: a string that a terminal and a notebook show.

    On the right stands what runs now, one operation a line, on the left what it is made from; ">" between them marks
    what conversion changed. Of a module whose code became part of the graph the modules in it follow.

    Args:
        model: the original.
        hc: what :func:`hc_transform.convert` made of it, in either scope.
        block: path of a module, "blocks.0"; the root by default.
        before: "python", the lines of its forward, or "graph", the operations of the graph before it was rewritten.
        width: in columns; by default that of the terminal, 80 where there is none.

    Raises:
        UnsupportedModel: ``hc`` is not converted, or no code of ``block`` is in a graph; the message names those that
            have some.
        ValueError: ``before`` is something else.

    >>> import torch, hc_transform as hct
    >>> encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> hc = hct.convert(encoder, args=(torch.randn(2, 5, 8),), scope="graph")
    >>> print(hct.diff(encoder, hc, before="graph", width=90).splitlines()[-3])
    linear1_add = self_attn_add + dropout2      > linear1_write = write(self_attn_write, dr...
    """
    if before not in BEFORE:
        raise ValueError(f"before is one of {', '.join(map(repr, BEFORE))}; got {before!r}")
    width = width or terminal_width()
    steps = [step for step in below(steps_of(hc), block) if step.role != "check"]
    name = short_names(block, steps)
    lines: list[str] = []
    if before == "graph":
        lines += [shortened(block or type(model).__name__, width), *_rows(_graphs(steps, name), width)]
        return Printout("\n".join(lines))
    paths = list(dict.fromkeys(step.path for step in steps))
    for path in paths:
        own = [step for step in steps if step.path == path]
        lines += ["", *_python(_module(model, path), path, own, name, width)]
    return Printout("\n".join(lines[1:]))


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"{type(model).__name__} has no module {path!r}: diff takes the original and what convert made of it"
        ) from None


def _graphs(steps: Sequence[Step], name: Callable[[fx.Node], str]) -> Iterator[tuple[str, str, bool]]:
    """Yield (before, after, whether that changed) for each operation."""

    def plain(node: fx.Node) -> str:
        step = known.get(node)
        if step is None or step.role not in (*NEW, "write", "carried"):
            return "x" if name(node) == "streams" else name(node)
        if step.role == "write":
            return name(node).removesuffix("_write") + "_add"
        if step.role == "carried":
            return name(node).removesuffix("_streams")
        given: Any = node.args[0]
        return plain(given) if isinstance(given, fx.Node) else name(node)

    known = {step.node: step for step in steps}
    for step in steps:
        after = expression(step, name)
        if step.role in NEW:
            yield "", after, True
        elif step.role == "write":
            streams, branch = (
                plain(value) if isinstance(value, fx.Node) else str(value) for value in step.node.args[:2]
            )
            yield f"{plain(step.node)} = {streams} + {branch}", after, True
        elif step.role == "carried":
            values = [plain(n) for n in step.node.all_input_nodes if n.op != "get_attr"]
            yield f"{plain(step.node)} = {step.what}({', '.join(values)})", after, True
        else:
            same = expression(step, plain).replace(f"{plain(step.node)} = ", f"{name(step.node)} = ", 1)
            yield same, after, False


def _python(
    module: nn.Module, path: str, steps: Sequence[Step], name: Callable[[fx.Node], str], width: int
) -> Iterator[str]:
    """Yield the lines of a module's forward, each beside the operations that it became."""
    file, first, source = body_of(type(module))
    yield shortened(f"{path or 'the model'} ({type(module).__name__}, {file.rsplit('/', 1)[-1]})", width)
    by_line: dict[int, list[Step]] = {}
    rest: list[Step] = []
    for step in steps:
        line = _line_in(step, file, first, len(source))
        by_line.setdefault(line, []).append(step) if line else rest.append(step)
    before_code = [step for step in rest if step.role in ("input", "enter", "expand")]
    after_code = [step for step in rest if step not in before_code]

    def rows() -> Iterator[tuple[str, str, bool]]:
        given = [expression(step, name) for step in before_code if step.role == "input"]
        if given:
            yield "", f"given {', '.join(given)}", False
        yield from (("", expression(step, name), True) for step in before_code if step.role != "input")
        idle = _idle(len(source), first, by_line)
        for number, text in enumerate(source, first):
            if number in idle:
                if idle[number]:
                    yield f"     ... {idle[number]} lines", "", False
                continue
            made = by_line.get(number, [])
            changed = [step.role in (*NEW, "write", "carried") for step in made]
            right = [expression(step, name) for step in made]
            for i, (left, after) in enumerate(zip_longest([f"{number:>4} {text}"], right, fillvalue="")):
                yield left, after, bool(changed[i : i + 1] and changed[i])
        for at, group in groupby(after_code, key=lambda step: step.at):
            for i, step in enumerate(group):
                yield (f"     ({at})" if at and not i else ""), expression(step, name), step.role in NEW

    yield from _rows(rows(), width)


def _idle(count: int, first: int, by_line: Mapping[int, Any]) -> dict[int, int]:
    """Return the lines that are left out, of many that became nothing: how many these are, at the first, else 0."""
    idle: dict[int, int] = {}
    run: list[int] = []
    for number in range(first, first + count + 1):
        if number < first + count and number not in by_line:
            run.append(number)
            continue
        inner = run[1:-1]
        if len(inner) > IDLE:
            idle.update(dict.fromkeys(inner, 0) | {inner[0]: len(inner)})
        run = []
    return idle


def _rows(rows: Iterator[tuple[str, str, bool]], width: int) -> Iterator[str]:
    left = (width - 3) // 2
    for before, after, changed in rows:
        line = f"{fitted(before, left):<{left}}{CHANGED if changed else SAME}{fitted(after, width - left - 3)}"
        yield line.rstrip(" ") if after else line.rstrip(" |")


def _line_in(step: Step, file: str, first: int, count: int) -> int:
    """Return which of the lines of a function a step comes from, by way of helpers too; 0 if none does."""
    for place in (meta.LOCATION.of(step.node) or "", *meta.LINES.of(step.node)):
        name, _, line = place.rpartition(":")
        if name == file and line.isdigit() and first <= int(line) < first + count:
            return int(line)
    return 0


def body_of(cls: type) -> tuple[str, int, list[str]]:
    """Return the file, the first line and the lines of the body of a class's forward, without its docstring."""
    function = inspect.unwrap(cls.__dict__.get("forward", getattr(cls, "forward", cls)))
    try:
        lines, start = inspect.getsourcelines(function)
        file = inspect.getsourcefile(function) or ""
        text = textwrap.dedent("".join(lines))
        made: Any = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return "source not at hand", 1, []
    statements = made.body[1:] if ast.get_docstring(made) and len(made.body) > 1 else made.body
    first = statements[0].lineno - 1
    return file, start + first, textwrap.dedent("\n".join(text.splitlines()[first:])).splitlines()
