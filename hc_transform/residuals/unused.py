"""Residuals whose value reaches nothing."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..graphs.dialects import name_of
from ..graphs.operations import IDENTITIES, MOVES, NORMS, POINTWISES, REDUCES
from ..graphs.shape_reads import is_shape_read
from .findings import Findings, Reason
from .passage import IN_PLACE_OPERATORS
from .trunks import as_skipped

PURE = (MOVES | POINTWISES | IDENTITIES | REDUCES | NORMS) - {"set_item", "requires_grad_"}


def without_unused(findings: Findings) -> Findings:
    """Return findings in which a residual whose value reaches no output is left as it is.

    Nothing would train its connection. What a module, an in-place write or an unknown function reads is used, and what
    only gives its shape is not.
    """
    if not findings.residuals:
        return findings
    used = _used(findings.residuals[0].add.graph)
    unused = tuple(r for r in findings.residuals if r.add not in used)
    return replace(
        findings,
        residuals=tuple(r for r in findings.residuals if r.add in used),
        skipped=(*findings.skipped, *(as_skipped(r, Reason.UNUSED) for r in unused)),
    )


def _used(graph: fx.Graph) -> set[fx.Node]:
    waiting = [node for node in graph.nodes if node.op == "output" or not node.users and not _is_pure(node)]
    used: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in used:
            used.add(node)
            waiting += () if is_shape_read(node) else node.all_input_nodes
    return used


def _is_pure(node: fx.Node) -> bool:
    name = name_of(node)
    writes = name.endswith("_") or name in IN_PLACE_OPERATORS or "out" in node.kwargs
    return node.op in ("call_function", "call_method") and name in PURE and not writes
