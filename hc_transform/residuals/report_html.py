"""The report as HTML, for notebooks and pages: it takes the colours of what it stands in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .records import Row, files_and_lines, row_of, rows_of
from .report_text import HEADERS, Told, by_reason, cells_of, notes_of, remedy, summary

CELL = "text-align:left;padding:2px 14px 2px 0;vertical-align:top;white-space:nowrap"
RIGHT = CELL.replace("left", "right", 1)


def html_of(report: Told) -> str:
    """Return a report as one ``div`` without scripts: the summary, a table of what was converted, reasons, notes."""
    parts = [f"<p><b>{html.escape(summary(report))}</b></p>"]
    if report.converted:
        parts.append(_converted(rows_of(report.converted)))
        every = _converted([row_of(r) for r in report.converted])
        parts.append(f"<details><summary>every residual ({len(report.converted):,})</summary>{every}</details>")
    for reason, records in by_reason(report.skipped).items():
        help = remedy(reason)
        body = html_table(
            ("add", "number", "location"), [(str(r), f"{r.count:,}", _where(r)) for r in rows_of(records)], (1,)
        )
        advice = f"<p>{html.escape(help)}</p>" if help else ""
        kept = "not to be converted" if report.is_plan else "not converted"
        title = html.escape(f"{len(records):,} {kept}: {reason}")
        parts.append(f"<details><summary>{title}</summary>{body}{advice}</details>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in notes_of(report))
    return f'<div class="hc-report">{"".join(parts)}{f"<ul>{notes}</ul>" if notes else ""}</div>'


def html_table(headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table; the columns in ``numbers`` are set to the right."""
    styles = [RIGHT if i in numbers else CELL for i in range(len(headers))]
    head = "".join(f'<th style="{s}">{html.escape(h)}</th>' for s, h in zip(styles, headers, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td style="{s}">{html.escape(c)}</td>' for s, c in zip(styles, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _converted(rows: Iterable[Row]) -> str:
    return html_table(HEADERS, [cells_of(row) for row in rows], (1, 4))


def _where(row: Row) -> str:
    return files_and_lines(row.locations)
