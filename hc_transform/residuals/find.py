"""Find the residual adds of a graph, with a verdict for every add on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ..capture.kinds import Kinds
from ..graphs.aliases import is_seen_elsewhere, written_through
from ..graphs.dialects import is_complete, is_lifted, location_of, module_of, name_of, refuse_unknown, regions_of
from ..graphs.operations import Kind, is_tensor, shape_of
from ..graphs.passes import logged_pass
from ..streams.mixing import summed_products
from .ancestry import Ancestry
from .findings import Findings, Reason, Residual, Shortcut, Skipped
from .naming import named
from .nesting import apart_from
from .spellings import ADDITIONS, SHIFTS, Sum, Term, flattened, sum_of

Base = tuple[fx.Node, tuple[fx.Node, ...]]  # a value, and the operations from it to a skip


@logged_pass
def find_residuals(gm: fx.GraphModule) -> Findings:
    """Find the residual adds of a traced graph.

    An add is one when one operand is, through transparent or scaling operations, a
    value that the other was computed from, the shapes agree, and on the way from that value to
    the other operand something more than pointwise arithmetic happens. So are other sums of that form: a
    subtraction ``x - f(x)``, ``torch.lerp``, ``addcmul``, ``addmm``, a sum over a stack.

    Args:
        gm: a graph of ``torch.fx.symbolic_trace``, of ``torch.export`` (``program.module()`` or
            ``program.graph_module``, decomposed or not) or of Dynamo, as a backend of ``torch.compile`` gets it. Shapes
            are compared where nodes carry ``meta["tensor_meta"]``, ``meta["val"]`` or ``meta["example_value"]``; module
            paths and lines come from the metadata of our tracer, else from ``nn_module_stack`` and ``stack_trace``.

    Raises:
        UnknownDialect: the graph is of operators that are not known (primitives, quantized ones, another tool's), so
            that its residuals would not be seen.

    >>> import torch
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.f = torch.nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + self.f(x)
    >>> [r.add.name for r in find_residuals(fx.symbolic_trace(Block())).residuals]
    ['add']
    """
    findings = _Finder(gm).run()
    findings = replace(findings, skipped=(*findings.skipped, *_in_regions(gm, dict(gm.named_modules()))))
    if is_complete(gm):
        refuse_unknown(gm, bool(findings.residuals or findings.skipped))
    return findings


def _in_regions(gm: fx.GraphModule, modules: Mapping[str, nn.Module]) -> list[Skipped]:
    """Return a verdict for each add in a graph that ``gm`` calls whole, as one that runs under autocast.

    ``modules`` are those of the model, by which the residuals are named.
    """
    rows = []
    for node, region in regions_of(gm):
        found = _Finder(region, modules).run()
        inside = [Skipped(r.name, r.module, r.location, Reason.OPAQUE, name_of(node)) for r in found.residuals]
        rows += [*inside, *found.skipped, *_in_regions(region, modules)]
    return rows


class _Finder:
    def __init__(self, gm: fx.GraphModule, named_after: Mapping[str, nn.Module] | None = None) -> None:
        self.kinds = Kinds(gm)
        self.named_after = self.kinds.modules if named_after is None else named_after
        self.nodes = list(gm.graph.nodes)
        self.all = Ancestry(self.nodes, self.kinds, frozenset({Kind.SHAPE}))
        self.live = Ancestry(self.nodes, self.kinds, frozenset({Kind.SHAPE, Kind.CUT}))
        self.inputs = [node for node in self.nodes if node.op == "placeholder" and not is_lifted(node)]

    def run(self) -> Findings:
        residuals: dict[fx.Node, Residual] = {}
        skipped: dict[fx.Node, Skipped] = {}
        for add in self.nodes:
            total = sum_of(add)
            if total is None:
                continue
            found = None if self._in_others_memory(add, total) else self._residual(add, total) or self._flat(add)
            if found is None:
                verdict = self._verdict(add, total)
                if name_of(add).rstrip("_") in ADDITIONS or verdict.reason in LISTED_IN_ANY_SPELLING:
                    skipped[add] = verdict
                continue
            residuals[add] = found
            for other in found.absorbed:
                residuals.pop(other, None)
                if sum_of(other) is not None:
                    skipped[other] = _skip(other, Reason.MERGED)
        kept = []
        for add, residual in residuals.items():
            apart = apart_from(residual, residuals)
            if apart is not None:
                kept.append(apart)
            elif name_of(add).rstrip("_") in ADDITIONS:
                kept.append(residual)
            else:
                skipped[add] = _skip(add, Reason.OTHER_STREAM)
        shortcuts = [self._shortcut(add, s) for add, s in skipped.items() if s.reason is Reason.PROJECTION]
        return Findings(
            tuple(named(kept, self.named_after)),
            tuple(skipped.values()),
            tuple(s for s in shortcuts if s is not None),
        )

    # -- what is one

    def _flat(self, add: fx.Node) -> Residual | None:
        """Test a sum of three terms or more, ``(x + attn(x)) + mlp(x)``, as one."""
        total = flattened(add)
        return self._residual(add, total) if total is not None and len(total.terms) > 2 else None

    def _residual(self, add: fx.Node, total: Sum) -> Residual | None:
        for skip, branch in _splits(total):
            if skip.subtracted or not self._fits(add, total.terms):
                continue
            base = self._base(skip.factors[0], branch, self.live)
            if base is None or _entangled(base[0], skip, branch):
                continue
            if not all(self._mixes(base[0], term) for term in branch):
                continue
            nodes = [node for term in (skip, *branch) for node in term.nodes if node is not skip.value]
            region = self.all.between(base[0], nodes)
            first = total.terms[0] is not skip
            where = (module_of(add), location_of(add), add)
            return Residual("", *where, *base, branch, region, skip, total.absorbed, first)
        return None

    def _base(self, skip: fx.Node, branch: Sequence[Term], ancestry: Ancestry) -> Base | None:
        """Return the value behind ``skip`` that all of ``branch`` is computed from, and the way to it."""
        for value, ops in self._behind(skip):
            if self.kinds.is_constant(value) and not all(map(self._sees_an_input, branch)):
                continue
            if all(any(n is value or ancestry.leads(value, n) for n in term.factors) for term in branch):
                return value, ops
        return None

    def _sees_an_input(self, term: Term) -> bool:
        """Whether a term is computed from an input too, as what learnt queries attend to."""
        return any(self.live.leads(given, node) for given in self.inputs for node in term.factors)

    def _behind(self, skip: fx.Node) -> Iterator[Base]:
        ops: tuple[fx.Node, ...] = ()
        while True:
            yield skip, ops
            source = self._passed_through(skip)
            if source is None:
                return
            skip, ops = source, (skip, *ops)

    def _passed_through(self, node: fx.Node) -> fx.Node | None:
        """Return the tensor that ``node`` passes on, perhaps scaled or shifted by a parameter; else None."""
        kind = self.kinds.of(node)
        data = [n for n in node.all_input_nodes if is_tensor(n) and not self.kinds.is_constant(n)]
        if len(data) != 1 or list(node.args).count(data[0]) != 1:
            return None
        shifted = kind is Kind.POINTWISE and name_of(node).rstrip("_") in SHIFTS and self._same_shape([node, data[0]])
        return data[0] if kind in (Kind.IDENTITY, Kind.SCALE, Kind.RANDOM) or shifted else None

    def _fits(self, add: fx.Node, terms: Iterable[Term]) -> bool:
        return self._same_shape([add, *(t.value for t in terms if t.value is not None)])

    def _same_shape(self, nodes: Iterable[fx.Node]) -> bool:
        return len({shape for shape in map(shape_of, nodes) if shape is not None}) <= 1

    def _mixes(self, skip: fx.Node, term: Term) -> bool:
        """Whether the way from ``skip`` to a term is more than pointwise; with weights, if it is subtracted."""
        region = self.live.between(skip, [n for n in term.factors if isinstance(n, fx.Node)])
        if term.subtracted:
            return any(self.kinds.of(node) is Kind.MIX and self._weighted(node) for node in region)
        product = term.combine in MIXING_PRODUCTS
        return product or any(self.kinds.of(node) in (Kind.MIX, Kind.NORM, Kind.REDUCE) for node in region)

    def _weighted(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(True for _ in self.kinds.modules[str(node.target)].parameters())
        return any(is_tensor(n) and self.kinds.is_constant(n) for n in node.all_input_nodes)

    def _in_others_memory(self, add: fx.Node, total: Sum) -> bool:
        """Whether something else that is used reads what the sum, or an operation of it, overwrites."""
        return self._writes_elsewhere(add, total) or self._any_overwritten(total)

    def _writes_elsewhere(self, add: fx.Node, total: Sum) -> bool:
        """Whether the sum, or a term of it, is in memory that is written into and read under another name."""
        terms = (node for term in total.terms for node in term.nodes)
        return is_seen_elsewhere(add) or not self.kinds.shared.isdisjoint((add, *terms))

    def _any_overwritten(self, total: Sum) -> bool:
        return len(total.terms) == 2 and any(
            self._overwritten(skip.factors[0], node)
            for skip, branch in _splits(total)
            for node in branch[0].factors[:1]
        )

    def _overwritten(self, skip: fx.Node, branch: fx.Node) -> bool:
        """Whether ``skip`` is what the branch left of its input, and not what it was computed from."""
        for value, _ in self._behind(skip):
            if value.target is written_through and not self.all.leads(value, branch):
                written: Any = value.args[1]
                return written is branch or self.all.leads(written, branch)
        return False

    # -- what is none

    def _verdict(self, add: fx.Node, total: Sum) -> Skipped:  # noqa: C901  # one reason after the other
        if self._any_overwritten(total):
            return _skip(add, Reason.OVERWRITTEN)
        if self._writes_elsewhere(add, total):
            return _skip(add, Reason.SHARED_MEMORY)
        for skip, branch in _splits(total):
            base = self._base(skip.factors[0], branch, self.live)
            if base is not None:
                return self._why_not(add, base, skip, branch)
        for skip, branch in _splits(total):
            base = self._base(skip.factors[0], branch, self.all)
            if base is not None:
                return _skip(add, Reason.DETACHED)
        for node in (term.value for term in total.terms):
            if node is not None and self.kinds.is_constant(node):
                name = node.target if node.op == "get_attr" else node.name
                return _skip(add, Reason.INDEPENDENT, f"{name} is constant")
        for skip, branch in _splits(total):
            chain = self._chain(skip.factors[0], branch[0].factors[0])
            if chain is not None:
                kinds = {self.kinds.of(node) for node in chain[1]}
                if Kind.MOVE in kinds and Kind.MIX not in kinds:
                    return _skip(add, Reason.SHAPES_DIFFER, "the skip is reshaped or sliced")
                return _skip(add, Reason.PROJECTION if Kind.MIX in kinds else Reason.POINTWISE_BRANCH)
        return _skip(add, Reason.INDEPENDENT)

    def _why_not(self, add: fx.Node, base: Base, skip: Term, branch: Sequence[Term]) -> Skipped:
        """Return the verdict on a sum of a value and what is computed from it."""
        plain = [Term(t.factors, t.combine) for t in branch]
        if not all(self._mixes(base[0], term) for term in plain):
            return _skip(add, Reason.POINTWISE_BRANCH)
        if not self._fits(add, (skip, *branch)):
            shapes = [_shape_text(n) for n in (skip.value, branch[0].value) if n is not None]
            return _skip(add, Reason.SHAPES_DIFFER, " and ".join(shapes))
        if skip.subtracted:
            return _skip(add, Reason.SUBTRACTED)
        return _skip(add, Reason.ENTANGLED if _entangled(base[0], skip, branch) else Reason.CENTRED)

    def _chain(self, skip: fx.Node, branch: fx.Node) -> Base | None:
        """Return the value that ``skip`` is made from by single operations and ``branch`` too, and the way from it."""
        way: tuple[fx.Node, ...] = ()
        while True:
            data = [n for n in skip.all_input_nodes if is_tensor(n) and not self.kinds.is_constant(n)]
            if len(data) != 1 or self.kinds.of(skip) is Kind.CUT:
                return None
            skip, way = data[0], (skip, *way)
            if self.live.leads(skip, branch):
                return skip, way

    def _shortcut(self, add: fx.Node, verdict: Skipped) -> Shortcut | None:
        total = sum_of(add)
        if total is None or name_of(add).rstrip("_") not in ADDITIONS or any(t.scale != 1 for t in total.terms):
            return None
        found = []
        for skip, branch in _splits(total):
            chain = self._chain(skip.factors[0], branch[0].factors[0])
            if chain is not None and all(len(n.users) == 1 for n in chain[1]) and self._fits(add, total.terms):
                way = self.all.between(chain[0], branch[0].nodes)
                if self._mixing(chain[1]) < self._mixing(way):
                    found.append(Shortcut(add, *chain, verdict))
        return found[0] if len(found) == 1 else None

    def _mixing(self, nodes: Iterable[fx.Node]) -> tuple[int, int]:
        """Return how many operations mix with weights, and how many at all: pooling does little beside a layer."""
        mixing = [node for node in nodes if self.kinds.of(node) in (Kind.MIX, Kind.REDUCE)]
        weighted = sum(node.op != "call_module" or self._weighted(node) for node in mixing)
        return weighted, len(mixing)


MIXING_PRODUCTS = (torch.matmul, summed_products)
LISTED_IN_ANY_SPELLING = frozenset(
    {
        Reason.SHAPES_DIFFER,
        Reason.DETACHED,
        Reason.SUBTRACTED,
        Reason.CENTRED,
        Reason.ENTANGLED,
        Reason.OVERWRITTEN,
        Reason.SHARED_MEMORY,
    }
)


def _splits(total: Sum) -> Iterator[tuple[Term, tuple[Term, ...]]]:
    """Yield each term that may be the skip, and the others."""
    for skip in total.terms:
        if skip.value is not None:
            yield skip, tuple(t for t in total.terms if t is not skip)


def _entangled(base: fx.Node, skip: Term, branch: Sequence[Term]) -> bool:
    """Whether a node has two roles in one sum, as in ``addcmul(x, x, f(x))``."""
    nodes = [node for term in branch for node in term.factors]
    scales = [t.scale for t in (skip, *branch) if isinstance(t.scale, fx.Node)]
    if base in nodes or skip.value in nodes or len(nodes) != len(set(nodes)):
        return True
    return any(s in nodes or s is skip.value or s is base for s in scales)


def _skip(add: fx.Node, reason: Reason, detail: str = "") -> Skipped:
    module = module_of(add)
    return Skipped(module or add.name, module, location_of(add), reason, detail)


def _shape_text(node: fx.Node) -> str:
    shape = shape_of(node)
    return "unknown" if shape is None else str(tuple(shape))
