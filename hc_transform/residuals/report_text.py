"""The report as text, as wide as the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from ..text import counted, percent, sized, table, terminal_width, wrapped
from .estimate import Estimate
from .findings import Reason
from .records import Record, Row, files_and_lines, merged, row_of, rows_of

H100_BANDWIDTH = 3.35e12  # bytes a second
REMEDIES = {
    Reason.PROJECTION: 'shortcuts="carry" takes the streams through a shortcut that ends a trunk.',
    Reason.SHORT: "min_residuals=1 converts it.",
    Reason.NESTED: 'nested="all" converts every one.',
    Reason.UNEVEN: 'scope="graph" tells the calls apart.',
    Reason.PLAIN: "num_streams=4 converts it.",
    Reason.NO_FEATURES: "feature_axis= names the axis of features, if there is one.",
}
OPAQUE = (  # of modules that stayed whole: what the reason says, and what helps
    ("hooks", "Remove the hooks before the conversion, or scope='blocks'."),
    ("leaf_modules", "Leave it out of leaf_modules=."),
    ("scope='graph' takes both", ""),
    ("stack of blocks", "scope='graph' converts it."),
    ("", "scope='blocks' runs each block by itself; inline_modules=[...] has its code looked into."),
)


HEADERS = ("residuals", "adds", "location", "trunk", "params")
FOLDED = 4  # rows of one reason, above which the numbers in their paths are left out


class Told(Protocol):
    """What a report tells; see :class:`hc_transform.Report`."""

    @property
    def residuals(self) -> tuple[Record, ...]:
        """A record for every add."""

    @property
    def converted(self) -> tuple[Record, ...]:
        """Those that are converted."""

    @property
    def skipped(self) -> tuple[Record, ...]:
        """Those that are not."""

    @property
    def parameters(self) -> int:
        """The number of new parameters."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What else is to be known."""

    @property
    def other_parameters(self) -> int:
        """New parameters beside connections."""

    @property
    def base_parameters(self) -> int | None:
        """Parameters of the model."""

    @property
    def estimate(self) -> Estimate | None:
        """What it costs."""

    @property
    def is_plan(self) -> bool:
        """Whether nothing was done yet."""


def text_of(report: Told, width: int | None = None, verbose: bool = False) -> str:
    """Return a report in lines of at most ``width`` columns, by default those of the terminal.

    Args:
        report: to print.
        width: in columns.
        verbose: a line for every add, in place of one for blocks that are equal.
    """
    width = width or terminal_width()
    parts = [wrapped(summary(report), width)]
    if report.converted:
        parts.append(_converted(report.converted, width, verbose))
    if report.skipped:
        parts.append("\n".join(_skipped(report, width, verbose)))
    parts += [wrapped(note, width) for note in notes_of(report)]
    return "\n\n".join(parts)


def summary(report: Told) -> str:
    """Return what was done, or will be, in a sentence or two."""
    trunks = len({r.trunk for r in report.converted})
    done, left = len(report.converted), len(report.skipped)
    what = f"{counted(done, 'residual')} on {counted(trunks, 'trunk')}"
    share = f" ({percent(report.parameters, report.base_parameters)} of the model's)" if report.base_parameters else ""
    new = f"{counted(report.parameters, 'new parameter')}{share}"
    if report.other_parameters:
        new += f", {report.other_parameters:,} of them in readouts and embeddings"
    if report.is_plan:
        stays = f"{counted(left, 'add')} would stay as {'it is' if left == 1 else 'they are'}"
        text = f"Plan, nothing is changed yet: {what} would be converted, {stays}, {new}."
    else:
        text = f"{what} converted, {counted(left, 'add')} left as {'it was' if left == 1 else 'they were'}, {new}."
    if report.converted:
        first = report.converted[0]
        text += f" Each has {counted(first.streams or 1, 'stream')}, connection {first.connection}."
    return text


def notes_of(report: Told) -> Iterator[str]:
    """Yield what else is to be known: what a step costs, trunks of one residual, the notes of the conversion."""
    if report.estimate is not None:
        yield cost(report.estimate)
    trunks = [r.trunk for r in report.converted]
    single = [r for r in report.converted if trunks.count(r.trunk) == 1]
    if single:
        one = len(single) == 1
        names = f"{', '.join(r.name for r in single[:3])}{', ...' if len(single) > 3 else ''}"
        told, gain, kept = ("holds", "gains", "it as it was") if one else ("hold", "gain", "them as they were")
        trunks_told = counted(len(single), "trunk")
        yield f"{trunks_told} {told} one residual alone ({names}) and {gain} little; min_residuals=2 leaves {kept}."
    yield from report.notes


def cost(estimate: Estimate) -> str:
    """Return an estimate as sentences."""
    seconds = estimate.traffic_bytes / H100_BANDWIDTH
    time = f", {1e3 * seconds:.2g} ms of an H100" if seconds >= 5e-5 else ""
    kept, moved = (_each(b, estimate) for b in (estimate.saved_bytes, estimate.traffic_bytes))
    return (
        f"Estimate for a training step of compiled code on these inputs, beside the plain model: "
        f"{sized(estimate.saved_bytes)} more are kept for the backward pass{kept}, and "
        f"{sized(estimate.traffic_bytes)} more are read and written{moved}{time}."
    )


def _each(size: int, estimate: Estimate) -> str:
    return f" ({sized(size / estimate.tokens)} for each {estimate.per})" if estimate.tokens > 1 else ""


def remedy(reason: str) -> str:
    """Return what to do about adds that were not converted for a reason; "" if there is nothing."""
    if reason.startswith(Reason.OPAQUE.value):
        return next(help for said, help in OPAQUE if said in reason)
    return next((help for known, help in REMEDIES.items() if reason.startswith(known.value)), "")


def _converted(records: Sequence[Record], width: int, verbose: bool) -> str:
    rows = [row_of(r) for r in records] if verbose else rows_of(records)
    cells = [cells_of(row) for row in rows]
    headers: Sequence[str] = HEADERS
    if len({r.trunk for r in records}) == 1:  # then the summary says so
        headers, cells = HEADERS[:3] + HEADERS[4:], [cell[:3] + cell[4:] for cell in cells]
    return table(cells, headers, width, numbers=(1, len(headers) - 1))


def cells_of(row: Row) -> tuple[str, ...]:
    """Return the cells of a row, under ``HEADERS``."""
    trunks = list(map(str, row.trunks))
    return str(row), f"{row.count:,}", files_and_lines(row.locations), ", ".join(trunks), f"{row.parameters:,}"


def by_reason(skipped: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the adds that were not converted by why they were not; of reasons that differ in numbers the first."""
    groups: dict[str, list[Record]] = {}
    for record in skipped:
        groups.setdefault(re.sub(r"_?\d+", "", str(record.reason)), []).append(record)
    return {str(group[0].reason): group for group in groups.values()}


def _skipped(report: Told, width: int, verbose: bool) -> Iterator[str]:
    yield "Not converted:" if not report.is_plan else "Not to be converted:"
    for reason, records in by_reason(report.skipped).items():
        yield wrapped(f"  {counted(len(records), 'add')}: {reason}", width, "    ")
        rows = [row_of(r) for r in records] if verbose else rows_of(records)
        if not verbose and len(rows) > FOLDED:
            starred = [replace(r, name=re.sub(r"\d+", "*", r.name.partition(":")[0])) for r in records]
            rows = merged(rows_of(starred))
        cells = [
            (str(row), f"x {row.count:,}" if row.count > 1 else "", files_and_lines(row.locations)) for row in rows
        ]
        yield from _indented(cells, width)
        help = remedy(reason)
        if help:
            yield wrapped(f"    -> {help}", width, "       ")


def _indented(cells: Sequence[tuple[str, str, str]], width: int) -> Iterator[str]:
    """Yield rows without headers."""
    lines = table(cells, ("", "", ""), width - 6).splitlines()[2:]
    yield from (f"      {line}" for line in lines)
