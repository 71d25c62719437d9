"""The report: what was converted, what was not, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn

from ..connections import Connection, connection_name
from ..errors import NothingToConvert
from ..graphs.dialects import location_of
from ..graphs.operations import shape_of
from ..options import Options
from .estimate import Estimate, estimate_of
from .features import feature_axis
from .findings import Reason, Residual, Skipped
from .keys import CONNECTIONS_NAME
from .records import Record, short
from .report_html import html_of
from .report_text import summary, text_of
from .trunks import Trunk

_NUMBERS = re.compile(r"(?<![^._])\d+(?![^._])")  # parts of a path, or at the end of a node's name


class Planned(Protocol):
    """What is told of a plan."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph that it was made for."""

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
class Report:
    """All adds of a model. ``str()`` is text of the terminal's width, in which equal blocks share a line.

    Attributes:
        residuals: a record for every add that was looked at.
        max_error: largest relative error of the outputs found by verification, None if it was not run.
        notes: what else a reader should know.
        other_parameters: new parameters of readouts and stream embeddings.
        base_parameters: how many the model had, None if that is not known.
        estimate: what a training step takes more, None if that is not known.
        is_plan: whether it tells what would be done.
    """

    residuals: tuple[Record, ...]
    max_error: float | None = None
    notes: tuple[str, ...] = ()
    other_parameters: int = 0
    base_parameters: int | None = None
    estimate: Estimate | None = None
    is_plan: bool = False

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

    @property
    def summary(self) -> str:
        """What was done, or will be, in a sentence or two."""
        return summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        return {**asdict(self), "parameters": self.parameters}

    def text(self, width: int | None = None, verbose: bool = False) -> str:
        """Return the report in lines of at most ``width`` columns, by default those of the terminal.

        Args:
            width: in columns.
            verbose: a line for every add; by default equal blocks share one, and adds of one module.
        """
        return text_of(self, width, verbose)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return html_of(self)


def report_of(
    plan: Planned,
    connections: Mapping[str, Connection] | None = None,
    max_error: float | None = None,
    notes: tuple[str, ...] = (),
    other_parameters: int = 0,
) -> Report:
    """Return the report of a plan, with the connections that were made for it; without them, of what it would do."""
    records = []
    trunk_of = {r.add: trunk.index for trunk in plan.trunks for r in trunk.residuals}
    streams, connection = plan.options.num_streams, connection_name(plan.options.connection)
    modules = dict(plan.graph_module.named_modules(remove_duplicate=False))
    features = [_features(r, plan, modules) for r in plan.residuals]
    counts = _planned_counts(plan, features) if connections is None else _counts(plan, connections)
    for r in plan.residuals:
        trunk = trunk_of[r.add]
        records.append(Record(r.name, r.module, r.location, True, None, trunk, streams, connection, counts[r.name]))
    for s in plan.skipped:
        records.append(Record(s.name, s.module, s.location, False, str(s)))
    own = {id(p): p.numel() for n, p in plan.graph_module.named_parameters() if CONNECTIONS_NAME not in n.split(".")}
    estimate = estimate_of(plan.residuals, [axis for axis, _ in features], plan.options)
    return Report(
        tuple(records),
        max_error,
        (*_boundaries(plan), *notes),
        other_parameters,
        sum(own.values()) or None,
        estimate,
        connections is None,
    )


def _features(residual: Residual, plan: Planned, modules: Mapping[str, nn.Module]) -> tuple[int, int | None]:
    shape, axis = shape_of(residual.skip), plan.options.feature_axis
    return feature_axis(residual, modules) if axis is None else (axis, None if shape is None else shape[axis])


def _counts(plan: Planned, connections: Mapping[str, Connection]) -> dict[str, int | None]:
    """Return how many parameters the connection of each residual has, at the first of those that share it."""
    counted: set[int] = set()
    counts: dict[str, int | None] = {}
    for r in plan.residuals:
        own = [p for p in connections[r.name].parameters() if id(p) not in counted]
        counted.update(map(id, own))
        counts[r.name] = sum(p.numel() for p in own)
    return counts


def _planned_counts(plan: Planned, features: Sequence[tuple[int, int | None]]) -> dict[str, int | None]:
    """Return how many parameters the connection of each residual would have; None where that is not known."""
    counts: dict[str, int | None] = {}
    made: set[str] = set()
    known: dict[tuple[int, int | None], int | None] = {}
    for r, (axis, dim) in zip(plan.residuals, features, strict=True):
        if (axis, dim) not in known:
            known[axis, dim] = _planned_count(plan, axis, dim)
        counts[r.name] = 0 if r.key in made else known[axis, dim]
        made.add(r.key)
    return counts


def _planned_count(plan: Planned, axis: int, dim: int | None) -> int | None:
    try:
        with torch.device("meta"):
            connection = plan.options.make_connection(index=0, dim=dim, feature_axis=axis)
    except (ValueError, RuntimeError, NotImplementedError):  # as a connection of one's own may raise without values
        return None
    return sum(p.numel() for p in connection.parameters())


def _boundaries(plan: Planned) -> list[str]:
    """Return a note for each line of code that ends trunks."""
    trunks: dict[str, list[int]] = {}
    for trunk in plan.trunks:
        if trunk.boundary is not None:
            location = location_of(trunk.boundary)
            what = trunk.boundary.name if trunk.boundary.op != "call_module" else str(trunk.boundary.target)
            trunks.setdefault(f"{_NUMBERS.sub('*', what)} ({short(location)})", []).append(trunk.index)
    return [
        f"Streams do not pass {where}: they are read out before it and begin anew on trunk"
        f"{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''}."
        for where, numbers in trunks.items()
    ]


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
