"""The report: what was converted, what was not, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tabulate import tabulate
from torch import nn

from ..connections import Connection, connection_name
from ..errors import NothingToConvert
from ..graphs.dialects import location_of
from ..options import Options
from .findings import Reason, Residual, Skipped
from .trunks import Trunk


class Planned(Protocol):
    """What is told of a plan."""

    @property
    def trunks(self) -> Sequence[Trunk]:
        """The trunks that are converted."""

    @property
    def residuals(self) -> Sequence[Residual]:
        """Their residuals, in order of execution."""

    @property
    def skipped(self) -> Sequence[Skipped]:
        """The adds that are not, with reasons."""

    @property
    def options(self) -> Options:
        """What they are converted into."""


@dataclass(frozen=True)
class Record:
    """One add.

    Attributes:
        name: module path of the residual (or of the module that adds).
        module: path of the module whose code adds.
        location: "file.py:123".
        converted: whether it became a hyper-connection.
        reason: None, or why it was not converted.
        trunk: number of its trunk, None if it was not converted.
        streams, connection, parameters: what it was converted into; parameters counts new ones, at the first of those
            that share them.
    """

    name: str
    module: str
    location: str
    converted: bool
    reason: str | None = None
    trunk: int | None = None
    streams: int | None = None
    connection: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Report:
    """All adds of a model. ``str()`` is a table.

    Attributes:
        residuals: a record for every add that was looked at.
        max_error: largest relative error of the outputs found by verification, None if it was not run.
        notes: what else a reader should know.
        other_parameters: new parameters of readouts and stream embeddings.
    """

    residuals: tuple[Record, ...]
    max_error: float | None = None
    notes: tuple[str, ...] = ()
    other_parameters: int = 0

    @property
    def converted(self) -> tuple[Record, ...]:
        """The records of the adds that were converted."""
        return tuple(r for r in self.residuals if r.converted)

    @property
    def skipped(self) -> tuple[Record, ...]:
        """The records of the adds that were not, each with its reason."""
        return tuple(r for r in self.residuals if not r.converted)

    @property
    def parameters(self) -> int:
        """The number of new parameters."""
        return sum(r.parameters or 0 for r in self.converted) + self.other_parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        return {**asdict(self), "parameters": self.parameters}

    def __str__(self) -> str:
        rows = [(r.name, _short(r.location), r.trunk, r.streams, r.connection, r.parameters) for r in self.converted]
        parts = []
        if rows:
            headers = ("residual", "location", "trunk", "streams", "connection", "parameters")
            parts.append(tabulate(rows, headers=headers))
        if self.skipped:
            parts.append(tabulate(_merged(self.skipped), headers=("not converted", "location", "adds", "reason")))
        trunks = len({r.trunk for r in self.converted})
        parts.append(
            f"{len(self.converted)} residuals on {trunks} trunks converted, {len(self.skipped)} adds left as they "
            f"were, {self.parameters:,} new parameters"
            + (f", {self.other_parameters:,} of them in readouts and embeddings." if self.other_parameters else ".")
        )
        single = [r for r in self.converted if [other.trunk for other in self.converted].count(r.trunk) == 1]
        if single:
            parts.append(
                f"{len(single)} trunks hold one residual alone ({', '.join(r.name for r in single[:3])}"
                f"{', ...' if len(single) > 3 else ''}) and gain little; min_residuals=2 leaves them as they were."
            )
        parts += self.notes
        return "\n\n".join(parts)


def report_of(
    plan: Planned,
    connections: Mapping[str, Connection] | None = None,
    max_error: float | None = None,
    notes: tuple[str, ...] = (),
    other_parameters: int = 0,
) -> Report:
    """Return the report of a plan, with the connections that were made for it."""
    records = []
    trunk_of = {r.add: trunk.index for trunk in plan.trunks for r in trunk.residuals}
    streams, connection = plan.options.num_streams, connection_name(plan.options.connection)
    counted: set[int] = set()
    for r in plan.residuals:
        own = () if connections is None else [p for p in connections[r.name].parameters() if id(p) not in counted]
        counted.update(map(id, own))
        count = None if connections is None else sum(p.numel() for p in own)
        trunk = trunk_of[r.add]
        records.append(Record(r.name, r.module, r.location, True, None, trunk, streams, connection, count))
    for s in plan.skipped:
        records.append(Record(s.name, s.module, s.location, False, str(s)))
    return Report(tuple(records), max_error, (*_boundaries(plan), *notes), other_parameters)


def _boundaries(plan: Planned) -> list[str]:
    """Return a note for each line of code that ends trunks."""
    trunks: dict[str, list[int]] = {}
    for trunk in plan.trunks:
        if trunk.boundary is not None:
            location = location_of(trunk.boundary)
            what = trunk.boundary.name if trunk.boundary.op != "call_module" else str(trunk.boundary.target)
            trunks.setdefault(f"{re.sub(r'[0-9]+', '*', what)} ({_short(location)})", []).append(trunk.index)
    return [
        f"Streams do not pass {where}: they are read out before it and begin anew on trunk"
        f"{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''}."
        for where, numbers in trunks.items()
    ]


def _merged(records: tuple[Record, ...]) -> list[tuple[str, str, int, str]]:
    """Merge records of one line and reason that differ in numbers of their path alone."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        reason = re.sub(r"\d+", "*", str(r.reason)) if "constant" in str(r.reason) else str(r.reason)
        groups.setdefault((re.sub(r"\d+", "*", r.name), r.location, reason), []).append(r)
    rows = []
    for (pattern, location, _), group in groups.items():
        same = len({r.name for r in group}) == 1
        rows.append((group[0].name if same else pattern, _short(location), len(group), str(group[0].reason)))
    return rows


def _short(location: str) -> str:
    return location.rsplit("/", 1)[-1]


def has_nothing(plan: Planned) -> bool:
    """Whether a plan converts nothing, and that is not what was asked for, as with one stream."""
    return not plan.residuals and all(s.reason is not Reason.PLAIN for s in plan.skipped)


def nothing_to_convert(model: nn.Module, plan: Planned) -> NothingToConvert:
    """Return the error of a model that has nothing to convert; it counts the reasons."""
    name = type(model).__name__
    if not plan.skipped:
        return NothingToConvert(
            f"{name} holds no add of two tensors that is seen, so there is no residual to convert. Modules whose adds "
            "are hidden from their Python code are looked into with inline_modules=[...]."
        )
    counts = Counter(s.reason.value for s in plan.skipped)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    first = plan.skipped[0]
    return NothingToConvert(
        f"none of the {len(plan.skipped)} adds in {name} can be converted: {reasons}. The first is in "
        f"{first.module or 'the root'} at {first.location}: {first}."
    )
