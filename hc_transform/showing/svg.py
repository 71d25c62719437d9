"""Lay out a sketch from top to bottom, and write it as SVG: no other program, no fonts, light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..folding import Node
from ..text import shortened
from .printout import listed
from .sketch import Element

CHARACTER = 6.7  # width of one, in pixels
GAP = 8  # between streams
MOST = 8  # streams that are drawn
NAMES = 46  # characters of a line of names
TOP = 44  # where drawings begin
LONG = 560  # height above which the next trunk is drawn beside
STYLE = """
.bg{fill:#ffffff}
text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1f2328}
.strong{font-weight:600}.soft{fill:#656d76}.count{fill:#0969da;font-weight:600}
.title{font:600 14px system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif}
.value{stroke:#57606a;stroke-width:1.5;fill:none}.stream{stroke:#0969da;stroke-width:1.5;fill:none}
.way{stroke:#57606a;stroke-width:1.2;fill:none}.skip{stroke:#8250df;stroke-width:1.2;fill:none;stroke-dasharray:4 3}
.ops{fill:#f6f8fa;stroke:#d0d7de}.branch{fill:#ddf4ff;stroke:#54aeff}.carried{fill:#fff8c5;stroke:#d4a72c}
.mix{fill:#0969da;stroke:none}.end{fill:#1a7f37}.frame{fill:none;stroke:#54aeff;stroke-dasharray:4 3}
.python{fill:none;stroke:#8c959f;stroke-dasharray:3 3}.fold{stroke:#0969da;stroke-width:2;fill:none}
.hold{stroke:#d0d7de;stroke-width:1.5;fill:none}.tip{fill:#57606a}
@media (prefers-color-scheme: dark){
.bg{fill:#0d1117}text{fill:#e6edf3}.soft{fill:#8d96a0}.count{fill:#4493f8}.ops{fill:#161b22;stroke:#30363d}
.branch{fill:#0c2d6b;stroke:#1f6feb}.carried{fill:#3b2300;stroke:#9e6a03}.value,.way{stroke:#8d96a0}
.stream,.fold{stroke:#4493f8}.mix{fill:#4493f8}.end{fill:#3fb950}.hold{stroke:#30363d}.tip{fill:#8d96a0}}
"""


@dataclass
class Canvas:
    """What is drawn so far."""

    parts: list[str] = field(default_factory=list)
    right: float = 0.0
    low: float = 0.0
    ends: dict[int, tuple[float, float]] = field(default_factory=dict)  # where the value of an element comes out

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Write ``text``, its middle at ``y``."""
        placed = f'<text x="{x:.0f}" y="{y + 4:.0f}"'
        placed += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(f"{placed}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{html.escape(text)}</text>")
        if anchor == "start":
            self.right = max(self.right, x + len(text) * CHARACTER)

    def line(self, x: float, y: float, to_x: float, to_y: float, kind: str) -> None:
        """Draw a straight line."""
        self.parts.append(f'<path class="{kind}" d="M{x:.0f} {y:.0f}L{to_x:.0f} {to_y:.0f}"/>')

    def path(self, way: str, kind: str) -> None:
        """Draw a curve."""
        self.parts.append(f'<path class="{kind}" d="{way}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, radius: int = 4) -> None:
        """Draw a box from its upper left corner."""
        size = f'width="{width:.0f}" height="{height:.0f}"'
        self.parts.append(f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" {size} rx="{radius}"/>')
        self.right = max(self.right, x + width)

    def arrow(self, x: float, y: float, to_x: float) -> None:
        """Draw a horizontal arrow."""
        back = 5 if to_x > x else -5
        self.line(x, y, to_x - back, y, "way")
        self.parts.append(f'<path class="tip" d="M{to_x:.0f} {y:.0f}l{-back} -3v6z"/>')


@dataclass
class Column:
    """Where elements of one level are drawn.

    Attributes:
        x: the middle of the trunk.
        y: how far down.
        streams: how many run there, 1 for a plain value.
        outer: whether it is the level of the model.
        beside: operations beside the trunk, each with the place that its value comes from.
    """

    x: float
    y: float
    streams: int = 1
    outer: bool = True
    beside: list[tuple[Element, float, float]] = field(default_factory=list)

    @property
    def half(self) -> float:
        """Half the width of the streams."""
        return GAP * (min(self.streams, MOST) - 1) / 2


class Layout:
    """Draw the elements of a sketch below each other."""

    def __init__(self, most_streams: int) -> None:
        self.canvas = Canvas()
        self.half = GAP * (min(most_streams, MOST) - 1) / 2

    def sequence(self, content: Sequence[Any], column: Column, prefix: str = "") -> None:
        """Draw elements and what holds them."""
        for i, part in enumerate(content):
            then = content[i + 1] if i + 1 < len(content) else None
            if column.outer and column.streams == 1 and column.y > LONG and _opens(part):
                self._next_column(column, content[i:])
            if isinstance(part, Element):
                self._element(part, then, column)
                continue
            path = f"{prefix}.{part.path}" if prefix else part.path
            top, where = column.y, column.x
            self.sequence(part.content, column, "" if is_held(part) else path)
            if is_held(part) and where == column.x:
                self._bracket(part, path, column, top)

    def _next_column(self, column: Column, content: Sequence[Any]) -> None:
        """Go on at the top, on the right of what is drawn."""
        x = self.canvas.right + 60 + label_width(content) + self.half
        between = self.canvas.right + 24
        low = column.y + 12
        way = f"M{column.x:.0f} {column.y:.0f}V{low:.0f}H{between:.0f}V{TOP:.0f}H{x:.0f}V{TOP + 8:.0f}"
        self.canvas.path(way, "value")
        self.canvas.low = max(self.canvas.low, low)
        column.x, column.y = x, TOP + 8

    def _bracket(self, node: Node[Element], path: str, column: Column, top: float) -> None:
        """Draw what several elements belong to, on the left of them."""
        x = column.x - self.half - 16 - label_width(node.content)
        low = column.y - 3
        self.canvas.path(f"M{x + 5:.0f} {top + 3:.0f}h-5V{low:.0f}h5", "fold" if node.times > 1 else "hold")
        middle = (top + low) / 2
        if node.times > 1:
            self.canvas.text(x - 6, middle - 7, shortened(path, 30), "", "end")
            self.canvas.text(x - 6, middle + 8, f"x {node.times}", "count", "end")
        else:
            self.canvas.text(x - 6, middle, shortened(path, 30), "soft", "end")

    def _lines(self, column: Column, height: float) -> None:
        """Draw the value, or its streams, further down."""
        kind = "value" if column.streams == 1 else "stream"
        for i in range(min(column.streams, MOST)):
            x = column.x - column.half + GAP * i
            self.canvas.line(x, column.y, x, column.y + height, kind)

    def _element(self, element: Element, then: Any, column: Column) -> None:
        if element.kind in ("ops", "python"):
            self._beside(element, column) if element.beside else self._operations(element, column)
        elif element.kind in ("expand", "readout"):
            self._end(element, column)
        elif element.kind == "carried":
            self._carried(element, column)
        elif element.kind == "tap":
            self._tap(element, then, column)
        elif element.inside:
            self._nested(element, column)
        else:
            self._site(element, column)

    def _operations(self, element: Element, column: Column) -> None:
        text = listed(element.names, NAMES)
        self._lines(column, 8)
        column.y += 8
        x = column.x - self.half - 8
        self.canvas.box(x, column.y, len(text) * CHARACTER + 16, 22, "python" if element.kind == "python" else "ops")
        self.canvas.text(x + 8, column.y + 11, text, "soft" if element.kind == "python" else "")
        self.canvas.ends[id(element)] = x + len(text) * CHARACTER + 16, column.y + 11
        column.y += 22

    def _beside(self, element: Element, column: Column) -> None:
        text = listed(element.names, NAMES)
        x = column.x + self.half + 56
        self.canvas.box(x, column.y + 2, len(text) * CHARACTER + 16, 22, "ops")
        self.canvas.text(x + 8, column.y + 13, text)
        column.beside.append((element, x + 14, column.y + 24))
        self._lines(column, 28)
        column.y += 28

    def _end(self, element: Element, column: Column) -> None:
        """Draw a value that becomes streams, or streams that become one."""
        opens = element.kind == "expand"
        wide = element.streams if opens else column.streams
        self._lines(column, 6)
        y = column.y + 6
        half = GAP * (min(wide, MOST) - 1) / 2
        for i in range(min(wide, MOST)):
            x = column.x - half + GAP * i
            start, end = (column.x, x) if opens else (x, column.x)
            self.canvas.path(
                f"M{start:.0f} {y:.0f}C{start:.0f} {y + 9:.0f} {end:.0f} {y + 9:.0f} {end:.0f} {y + 18:.0f}", "stream"
            )
        self.canvas.text(column.x + self.half + 16, y + 9, f"expand to {wide} streams" if opens else "readout", "end")
        self.canvas.ends[id(element)] = column.x + self.half + 70, y + 9
        column.streams = wide if opens else 1
        column.y = y + 18

    def _carried(self, element: Element, column: Column) -> None:
        text = listed(element.names, NAMES)
        self._lines(column, 22)
        self.canvas.box(column.x - self.half - 6, column.y + 3, 2 * self.half + 12, 15, "carried", 7)
        self.canvas.text(column.x + self.half + 16, column.y + 10, text, "soft")
        given = {value for node in element.nodes for value in node.all_input_nodes}
        for ops, x, low in column.beside:
            if given.intersection(ops.nodes):
                to = column.x + self.half + 16 + len(text) * CHARACTER + 6
                self.canvas.line(max(x, to + 8), low, max(x, to + 8), column.y + 10, "way")
                self.canvas.arrow(max(x, to + 8), column.y + 10, to)
        column.y += 22

    def _tap(self, element: Element, then: Any, column: Column) -> None:
        """Draw a value that is read out on the way; operations beside the trunk that take it follow at once."""
        y = column.y + (13 if _takes(then, element) else 10)
        to = column.x + self.half + (56 if _takes(then, element) else 34)
        self.canvas.arrow(column.x + column.half, y, to)
        if not _takes(then, element):
            self.canvas.text(to + 6, y, "readout", "end")
            self._lines(column, 20)
            column.y += 20

    def _site(self, element: Element, column: Column) -> None:
        names = listed(element.names, NAMES)
        title = shortened(element.label, NAMES)
        lines = [line for line in (title, names) if line and (line != title or title != names)] or ["branch"]
        if title and names == title:
            lines = [title]
        height = 16 * len(lines) + 12
        x = column.x + self.half + 56
        self._lines(column, height + 8)
        self.canvas.box(x, column.y + 4, max(map(len, lines)) * CHARACTER + 16, height, "branch")
        for i, line in enumerate(lines):
            strong = "strong" if i == 0 and title else ""
            self.canvas.text(x + 8, column.y + 4 + 14 + 16 * i, line, strong)
        self._read_and_write(column, column.y + 4 + 8, column.y + 4 + height - 8, x)
        column.y += height + 8

    def _read_and_write(self, column: Column, read: float, write: float, x: float) -> None:
        edge = column.x + column.half
        for i in range(min(column.streams, MOST)):
            self.canvas.parts.append(
                f'<circle class="mix" cx="{column.x - column.half + GAP * i:.0f}" cy="{read:.0f}" r="2.4"/>'
            )
        self.canvas.arrow(edge, read, x)
        self.canvas.box(column.x - column.half - 4, write - 3, 2 * column.half + 8, 6, "mix", 3)
        self.canvas.arrow(x, write, edge + 5)

    def _nested(self, element: Element, column: Column) -> None:
        """Draw a residual whose branch holds trunks, in a frame of its own."""
        x, top = column.x + self.half + 56, column.y
        inner = Column(x + label_width(element.inside) + 26 + self.half, top + 28, outer=False)
        self.canvas.text(x + 8, top + 16, shortened(element.label or "branch", NAMES), "strong")
        before, self.canvas.right = self.canvas.right, 0.0
        self.sequence(element.inside, inner)
        right = self.canvas.right
        self._lines(inner, 8)
        height = inner.y + 12 - top
        self._lines(column, height + 6)
        self.canvas.box(x, top + 4, right - x + 12, height - 4, "frame")
        self.canvas.right = max(before, right + 12)
        self._read_and_write(column, top + 16, top + height - 10, x)
        column.y = top + height + 6


def label_width(content: Sequence[Any], prefix: str = "") -> float:
    """Return how much room the labels of what is in ``content`` take on its left."""
    widest = 0.0
    for part in content:
        if isinstance(part, Node):
            path = f"{prefix}.{part.path}" if prefix else part.path
            own = min(len(path), 30) * CHARACTER + 22 if is_held(part) else 0.0
            widest = max(widest, own + label_width(part.content, "" if is_held(part) else path))
    return widest


def is_held(node: Node[Element]) -> bool:
    """Whether what is in a node has its path on the left of it."""
    return node.times > 1 or any(isinstance(p, Element) and p.kind in ("site", "carried") for p in node.content)


def _opens(part: Any) -> bool:
    """Whether a trunk begins with an element, or with the first one of a node."""
    while isinstance(part, Node):
        part = part.content[0]
    return bool(part.kind == "expand")


def _takes(then: Any, tap: Element) -> bool:
    """Whether the next element stands beside the trunk and takes what is read out."""
    if not isinstance(then, Element) or not then.beside:
        return False
    return any(tap.nodes.intersection(node.all_input_nodes) for node in then.nodes)
