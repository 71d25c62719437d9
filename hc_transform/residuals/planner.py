"""Decide which residuals are converted, in which trunks."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..capture.kinds import Kinds
from ..errors import PatternError, UnsupportedModel
from ..graphs import meta
from ..graphs.dialects import location_of
from ..graphs.passes import logged_pass
from ..graphs.shape_reads import asks_layout
from ..options import Options
from .features import feature_axis, no_features
from .findings import Findings, Reason, Residual, Shortcut, Skipped
from .keys import with_keys
from .nesting import among, without_nested
from .passage import Passage, nonlinear_in
from .report import Report, report_of
from .trunks import Trunk, as_skipped, boundary_before, carried_by, group, split, with_reads_of_their_own


@dataclass(frozen=True)
class Plan:
    """What :func:`hc_transform.rewriting.rewrite` is to do with one graph."""

    graph_module: fx.GraphModule
    trunks: tuple[Trunk, ...]
    skipped: tuple[Skipped, ...]
    options: Options

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """All residuals that are converted, in order of execution."""
        return tuple(sorted((r for trunk in self.trunks for r in trunk.residuals), key=lambda r: r.add))

    @property
    def report(self) -> Report:
        """The table that the converted model's ``hc_report`` would show."""
        return report_of(self)

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def make_plan(graph_module: fx.GraphModule, findings: Findings, options: Options) -> Plan:
    """Group the residuals of ``graph_module`` into trunks, for this graph to be rewritten.

    Raises:
        PatternError: a pattern in ``include`` or ``exclude`` matches no residual.
        UnsupportedModel: ``init="mirrored"`` on a trunk that carries a nonlinear operation.
    """
    plan = choose(graph_module, findings, options)
    refuse_nonlinear(plan.trunks, Kinds(graph_module), options)
    return plan


@logged_pass
def choose(graph_module: fx.GraphModule, findings: Findings, options: Options) -> Plan:
    """Decide which residuals of ``graph_module`` are converted, in which trunks, in whatever graphs of the code.

    Of residuals that nest, the level with the most of them is converted, unless
    ``options.nested`` is "all".

    Raises:
        PatternError: a pattern in ``include`` or ``exclude`` matches no residual.
    """
    kinds = Kinds(graph_module)
    active, skipped = selected(findings.residuals, options)
    shortcuts = findings.shortcuts if options.shortcuts == "carry" else ()
    passage = Passage(kinds, shortcuts)
    if options.nested == "largest":
        active, nested = without_nested(among(active), passage)
        skipped += nested
    active = among(active)
    active, shared = with_reads_of_their_own(active)
    skipped += shared
    groups, passage = _groups(with_keys(active), kinds, shortcuts)
    short = [members for members in groups if len(members) < options.min_residuals]
    skipped += [as_skipped(r, Reason.SHORT, f"{len(members)}") for members in short for r in members]
    groups = [members for members in groups if members not in short]
    if options.feature_axis is None:
        lengths = [members for members in groups if no_features(members, kinds.modules)]
        skipped += [as_skipped(r, Reason.NO_FEATURES) for members in lengths for r in members]
        groups = [members for members in groups if members not in lengths]
    trunks = _trunks(_shared(groups, kinds), passage)
    if options.plain:
        skipped += [as_skipped(r, Reason.PLAIN) for t in trunks for r in t.residuals]
        trunks = ()
    return _planned(graph_module, findings, (trunks, skipped), options)


@logged_pass
def plan_again(graph_module: fx.GraphModule, findings: Findings, options: Options) -> Plan:
    """Group residuals that an earlier plan chose, as they are in another graph of the same code.

    Those that cannot be converted in it are left out of the trunks.

    Raises:
        UnsupportedModel: as for :func:`make_plan`.
    """
    kinds = Kinds(graph_module)
    shortcuts = findings.shortcuts if options.shortcuts == "carry" else ()
    active, skipped = with_reads_of_their_own(among(list(findings.residuals)))
    groups, passage = _groups(with_keys(active), kinds, shortcuts)
    trunks = _trunks(_shared(groups, kinds), passage)
    refuse_nonlinear(trunks, kinds, options)
    return _planned(graph_module, findings, (trunks, skipped), options)


def _groups(
    residuals: Sequence[Residual], kinds: Kinds, shortcuts: Sequence[Shortcut]
) -> tuple[list[list[Residual]], Passage]:
    """Return the residuals of each trunk, in order of execution, and what leads from one to the next."""
    passage = Passage(kinds, shortcuts, [r.add for r in residuals])
    groups = split(group(residuals, passage), passage)
    return sorted(groups, key=lambda members: members[0].add), passage


def _planned(
    graph_module: fx.GraphModule, findings: Findings, made: tuple[tuple[Trunk, ...], list[Skipped]], options: Options
) -> Plan:
    """Return the plan of trunks that were made, and what was skipped."""
    trunks, skipped = made
    carried = {node for trunk in trunks for node in trunk.carried}
    passed = {s.verdict: replace(s.verdict, reason=Reason.CARRIED) for s in findings.shortcuts if s.add in carried}
    verdicts = [passed.get(verdict, verdict) for verdict in findings.skipped]
    options = replace(options, keep_layout=options.keep_layout or asks_layout(graph_module.graph))
    return Plan(graph_module, trunks, (*verdicts, *skipped), options)


def _shared(groups: Sequence[list[Residual]], kinds: Kinds) -> list[list[Residual]]:
    """Let the calls of a module on several trunks share their connections, as they share its weights.

    Its calls on one trunk are links of a chain, with connections of their own: the first shares with the first on
    another trunk, the second with the second.
    """
    place: dict[fx.Node, int] = {}  # of those that one call adds alike
    seen: Counter[Any] = Counter()
    for residual in sorted((r for members in groups for r in members), key=lambda r: r.add):
        call = meta.CALLS.of(residual.add)[-1:] or meta.CALL.of(residual.add)
        place[residual.add] = seen[call, _spelling(residual)]
        seen[call, _spelling(residual)] += 1
    keys: dict[Any, str] = {}
    shared = []
    for members in groups:
        links: Counter[Any] = Counter()
        chain = []
        for residual in members:
            alike = _spelling(residual), place[residual.add], feature_axis(residual, kinds.modules)
            chain.append(replace(residual, key=keys.setdefault((alike, links[alike]), residual.key)))
            links[alike] += 1
        shared.append(chain)
    return shared


def _spelling(residual: Residual) -> tuple[str, str, str]:
    """Return what residuals of several calls have in common."""
    return residual.module, residual.name.partition(":")[0], residual.location


def _trunks(groups: Sequence[list[Residual]], passage: Passage) -> tuple[Trunk, ...]:
    trunks: list[Trunk] = []
    earlier: set[fx.Node] = set()
    for members in groups:
        boundary = boundary_before(members[0].skip, passage, earlier)
        trunks.append(Trunk(len(trunks), tuple(members), carried_by(members, passage), boundary=boundary))
        earlier.update(r.add for r in members)
    return tuple(trunks)


def selected(residuals: Sequence[Residual], options: Options) -> tuple[list[Residual], list[Skipped]]:
    """Return the residuals that ``include`` and ``exclude`` leave, and the verdicts on the others.

    Raises:
        PatternError: a pattern matches no residual.
    """
    names = [r.name for r in residuals]
    for option, patterns in (("include", options.include), ("exclude", options.exclude)):
        for pattern in patterns:
            if not any(_matches(r, [pattern]) for r in residuals):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise PatternError(
                    f"{option} pattern {pattern!r} matches no residual. Near names: {', '.join(near) or 'none'}; "
                    "plan(model) lists all."
                )
    active, skipped = [], []
    for residual in residuals:
        if options.include and not _matches(residual, options.include):
            skipped.append(as_skipped(residual, Reason.EXCLUDED, "matches no include pattern"))
        elif _matches(residual, options.exclude):
            skipped.append(as_skipped(residual, Reason.EXCLUDED, "matches an exclude pattern"))
        else:
            active.append(residual)
    return active, skipped


def _matches(residual: Residual, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) for p in patterns for path in (residual.name, residual.module))


def refuse_nonlinear(trunks: Iterable[Trunk], kinds: Kinds, options: Options) -> None:
    """Raise UnsupportedModel if streams that keep their mean alone go through an operation that is not linear."""
    for trunk in trunks if options.init == "mirrored" and options.num_streams > 1 else ():
        carried = dict(trunk.carried)
        for residual in trunk.residuals:
            carried.update(
                (op, (source,))
                for source, op in zip((residual.skip, *residual.skip_ops), residual.skip_ops, strict=False)
            )
        node = nonlinear_in(carried, kinds)
        if node is not None:
            raise UnsupportedModel(
                f"init='mirrored' keeps only the mean of the streams, and trunk {trunk.index} (from "
                f"{trunk.residuals[0].name}) carries a nonlinear operation: {node.name} at "
                f"{location_of(node)}. Use init='paper', which holds across it."
            )


def with_keys_of(plan: Plan, keys: Mapping[str, str], ends: Mapping[str, tuple[str, str]]) -> Plan:
    """Return the plan of one kind of call with the keys that its residuals have in the plan of all.

    Args:
        plan: of the call.
        keys: of the residuals, by their names.
        ends: keys of the first and the last residual on each one's trunk, by its name.
    """
    trunks = (
        replace(
            t,
            residuals=tuple(replace(r, key=keys.get(r.name, r.key)) for r in t.residuals),
            keys=ends.get(t.residuals[0].name),
        )
        for t in plan.trunks
    )
    return replace(plan, trunks=tuple(trunks))
