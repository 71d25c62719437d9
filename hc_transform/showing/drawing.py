"""Draw a converted model: its trunks with their streams, reads, branches and writes."""

from __future__ import annotations

import html
import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from torch import nn

from ..text import counted
from .sketch import elements_in, sketch
from .svg import STYLE, TOP, Column, Layout, label_width

FORMATS = (".svg", ".png")
TITLE = 8.8  # width of a character of the title, in pixels
LEGEND = (
    "dots: streams read (h_pre); bar: mixed (h_res), written (h_post)",
    "oval: done to every stream; x 12: equal blocks, drawn once",
)


def draw(hc: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Draw what a converted model runs into a file, an SVG by itself; return its path.

    From top to bottom: a value becomes streams, each residual reads them into its branch, which is beside them, and
    writes back; what is done to every stream lies across them; streams are read out where the trunk ends. Equal blocks
    are drawn once, a residual whose branch holds trunks in a frame. Of a model converted by blocks the Python between
    them is a dashed box.

    Args:
        hc: what :func:`hc_transform.convert` returns, in either scope.
        path: of the file, ``.svg``, or ``.png`` where cairosvg or the program rsvg-convert is installed.

    Raises:
        UnsupportedModel: ``hc`` is not converted.
        ValueError: another kind of file.
        ModuleNotFoundError: a PNG, and nothing is installed that makes one.

    >>> import tempfile, torch, hc_transform as hct
    >>> encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> hc = hct.convert(encoder, args=(torch.randn(2, 5, 8),))
    >>> hct.draw(hc, tempfile.mkdtemp() + "/encoder.svg").read_text()[:4]
    '<svg'
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ValueError(f"draw writes {' or '.join(FORMATS)}, got {target.name!r}")
    svg = svg_of(hc)
    if target.suffix.lower() == ".svg":
        target.write_text(svg)
    else:
        _write_png(svg, target)
    return target


def svg_of(hc: nn.Module) -> str:
    """Return the drawing of a converted model as SVG."""
    content = sketch(hc)
    widest = max((_most(element) for element in elements_in(content)), default=4)
    layout = Layout(widest)
    canvas = layout.canvas
    column = Column(24 + label_width(content) + layout.half, TOP)
    canvas.text(12, 18, _title(hc), "title")
    layout.sequence(content, column)
    canvas.line(column.x, column.y, column.x, column.y + 10, "value")
    _long_skips(layout, content)
    height = max(column.y + 10, canvas.low) + 46
    for i, line in enumerate(LEGEND):
        canvas.text(12, height - 28 + 16 * i, line, "soft")
    width = max(canvas.right, len(_title(hc)) * TITLE) + 14
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    shapes = "\n".join(canvas.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{html.escape(_title(hc))}</title>\n'
        f'<style>{STYLE}</style>\n<rect class="bg" width="{width:.0f}" height="{height:.0f}"/>\n{shapes}\n</svg>\n'
    )


def _most(element: Any) -> int:
    inner = (_most(other) for other in elements_in(element.inside))
    return max(element.streams, *inner, 1) if element.inside else max(element.streams, 1)


def _title(hc: nn.Module) -> str:
    report = getattr(hc, "hc_report", None)
    if report is None or not report.converted:
        return type(hc).__name__
    first, trunks = report.converted[0], len({r.trunk for r in report.converted})
    what = f"{counted(len(report.converted), 'residual')} on {counted(trunks, 'trunk')}"
    return f"{type(hc).__name__}: {what}, {counted(first.streams, 'stream')}, {first.connection}"


def _long_skips(layout: Layout, content: Any) -> None:
    """Draw values that are read out of a trunk, or come right after it, and are used again further down."""
    elements = [element for element in elements_in(content) if not element.beside]
    canvas = layout.canvas
    right = canvas.right
    for i, element in enumerate(elements[:-2]):
        ended = element.kind == "readout" or (element.kind == "ops" and i and elements[i - 1].kind == "readout")
        for later in elements[i + 2 :] if ended else ():
            if later.kind == "ops" and any(n in element.nodes for node in later.nodes for n in node.all_input_nodes):
                (x, top), (to, low) = (canvas.ends[id(e)] for e in (element, later))
                canvas.right = max(canvas.right, right + 12) + 12
                bend = canvas.right - 12
                canvas.path(f"M{x:.0f} {top:.0f}H{bend:.0f}V{low:.0f}H{to + 5:.0f}", "skip")
                canvas.path(f"M{to:.0f} {low:.0f}l5 -3v6z", "tip")


def _write_png(svg: str, target: Path) -> None:
    try:
        cairosvg: Any = importlib.import_module("cairosvg")
    except ImportError:
        program = shutil.which("rsvg-convert")
        if program is None:
            raise ModuleNotFoundError(
                f"{target.name}: a PNG takes cairosvg (pip install cairosvg) or the program rsvg-convert; "
                "an .svg takes nothing"
            ) from None
        subprocess.run([program, "--zoom=2", "--output", str(target)], input=svg.encode(), check=True)
        return
    cairosvg.svg2png(bytestring=svg.encode(), write_to=str(target), scale=2)
