"""Text for terminals: as wide as the terminal is, numbers that can be read, singular and plural."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

MINIMUM = 40  # columns below which no line can be kept

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def terminal_width() -> int:
    """Return the width of the terminal: ``COLUMNS`` if it is set, 80 where there is none."""
    return max(shutil.get_terminal_size((80, 24)).columns, MINIMUM)


def wrapped(text: str, width: int, indent: str = "") -> str:
    """Return ``text`` in lines of at most ``width`` columns, broken between words; later ones start with ``indent``."""
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def shortened(text: str, width: int) -> str:
    """Return ``text`` in at most ``width`` columns, its middle left out where it is longer.

    >>> shortened("model.layers.0.self_attn", 14)
    'model...f_attn'
    """
    if len(text) <= width:
        return text
    if width <= 5:
        return text[: max(width, 0)]
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number and a noun in its right form.

    >>> counted(1, "trunk"), counted(1200, "trunk"), counted(0, "branch", "branches")
    ('1 trunk', '1,200 trunks', '0 branches')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def sized(number: float) -> str:
    """Return a number of bytes in the unit that fits it.

    >>> sized(512), sized(37_200), sized(1.5e9)
    ('512 B', '37.2 kB', '1.5 GB')
    """
    for unit in UNITS:
        if number < 999.5 or unit == UNITS[-1]:
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 99.95 else f"{number:.1f} {unit}"


def percent(part: float, whole: float) -> str:
    """Return a share in percent with two digits that count.

    >>> percent(872, 65_000), percent(576, 22_100_000), percent(0, 5)
    ('1.3 %', '0.0026 %', '0 %')
    """
    share = 100 * part / whole if whole else 0.0
    return (
        f"{share:.0f} %"
        if share >= 9.95 or not share
        else f"{float(f'{share:.1e}'):.10f}".rstrip("0").rstrip(".") + " %"
    )


def table(rows: Sequence[Sequence[str]], headers: Sequence[str], width: int, numbers: Sequence[int] = ()) -> str:
    """Return rows under headers in at most ``width`` columns; where they are wider, the widest column gives way.

    Args:
        rows: cells as text.
        headers: of the columns.
        width: of the table.
        numbers: columns that are set to the right.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    gaps = 2 * (len(widths) - 1)
    while sum(widths) + gaps > width and max(widths) > 6:
        widths[widths.index(max(widths))] -= 1

    def line(cells: Sequence[str]) -> str:
        fitted = [shortened(cell, w) for cell, w in zip(cells, widths, strict=True)]
        placed = (
            c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(fitted, widths, strict=True))
        )
        return "  ".join(placed).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, rows)])
