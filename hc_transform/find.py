"""Find the residual adds of a graph, with a verdict for every add on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from .adds import ADDS, is_add, location_of, module_of, named, operands
from .aliases import written_through
from .findings import Findings, Reason, Residual, Shortcut, Skipped
from .kinds import Kind, Kinds, is_tensor, name_of, shape_of


def find_residuals(gm: fx.GraphModule) -> Findings:
    """Find the residual adds of a traced graph.

    An add is one when one operand is, through transparent or scaling operations, a
    value that the other was computed from, the shapes agree, and on the way from that value to
    the other operand something more than pointwise arithmetic happens.

    Args:
        gm: any traced graph. Shapes are compared where nodes carry ``meta["tensor_meta"]`` or
            ``meta["val"]``; module paths and lines come from the metadata of our tracer, else
            from ``nn_module_stack`` and ``stack_trace``.

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
    return _Finder(gm).run()


class _Finder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.kinds = Kinds(gm)
        self.nodes = list(gm.graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors: dict[fx.Node, int] = {}  # a bit for every node it is computed from
        for node in self.nodes:
            bits = 0
            if self.kinds.of(node) is not Kind.SHAPE:
                for source in node.all_input_nodes:
                    bits |= self.ancestors[source] | 1 << self.number[source]
            self.ancestors[node] = bits

    def run(self) -> Findings:
        residuals: dict[fx.Node, Residual] = {}
        skipped: dict[fx.Node, Skipped] = {}
        for add in self.nodes:
            if not is_add(add):
                continue
            a, b, _ = operands(add)
            overwritten = self._overwritten(a, b) or self._overwritten(b, a)
            found = None if overwritten else self._binary(add) or self._sum(add)
            if found is None:
                skipped[add] = self._verdict(add)
                continue
            residuals[add] = found
            for other in found.absorbed:
                residuals.pop(other, None)
                skipped[other] = _skip(other, Reason.MERGED)
        shortcuts = [self._shortcut(add, s) for add, s in skipped.items() if s.reason is Reason.PROJECTION]
        return Findings(
            tuple(named(list(residuals.values()), self.kinds.modules)),
            tuple(skipped.values()),
            tuple(s for s in shortcuts if s is not None),
        )

    def _binary(self, add: fx.Node) -> Residual | None:
        a, b, alpha = operands(add)
        for skip, branch, first in ((a, b, True), (b, a, False)):
            base = self._base(skip, [branch])
            if base is not None and self._fits(add, [skip, branch]) and self._mixes(base[0], [branch]):
                more = {"branch_scale": alpha} if first else {"skip_scale": alpha, "branch_first": True}
                return self._residual(add, base, (branch,), (), more)
        return None

    def _sum(self, add: fx.Node) -> Residual | None:
        """Test a sum of three terms or more, ``(x + attn(x)) + mlp(x)``, as one."""
        terms, absorbed = self._terms(add)
        if not absorbed:
            return None
        for skip in terms:
            branch = [t for t in terms if t is not skip]
            base = self._base(skip, branch)
            if base is not None and self._fits(add, terms) and all(self._mixes(base[0], [t]) for t in branch):
                more = {"branch_first": terms[0] is not skip}
                return self._residual(add, base, tuple(branch), tuple(absorbed), more)
        return None

    def _terms(self, add: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        terms: list[fx.Node] = []
        absorbed: list[fx.Node] = []
        for operand in operands(add)[:2]:
            if is_add(operand) and len(operand.users) == 1 and operands(operand)[2] == 1 and operands(add)[2] == 1:
                inner, more = self._terms(operand)
                terms += inner
                absorbed += [operand, *more]
            else:
                terms.append(operand)
        return terms, absorbed

    def _residual(
        self,
        add: fx.Node,
        base: tuple[fx.Node, tuple[fx.Node, ...]],
        branch: tuple[fx.Node, ...],
        absorbed: tuple[fx.Node, ...],
        more: dict[str, Any],
    ) -> Residual:
        region = frozenset(node for term in branch for node in self._region(base[0], term))
        return Residual("", module_of(add), location_of(add), add, base[0], base[1], branch, region, absorbed, **more)

    def _base(self, skip: fx.Node, branch: list[fx.Node]) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
        """Return the value behind ``skip`` that all of ``branch`` is computed from, and the way to it."""
        for value, ops in self._behind(skip):
            bit = 1 << self.number[value]
            if all(self.ancestors[term] & bit for term in branch) and not self.kinds.is_constant(value):
                return value, ops
        return None

    def _behind(self, skip: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
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
        if len(data) != 1 or not node.args or data[0] not in node.args:
            return None
        shifted = name_of(node) in ADDS and self._fits(node, [data[0]])
        return data[0] if kind in (Kind.IDENTITY, Kind.SCALE, Kind.RANDOM) or shifted else None

    def _fits(self, add: fx.Node, terms: list[fx.Node]) -> bool:
        shapes = {shape for shape in map(shape_of, (add, *terms)) if shape is not None}
        return len(shapes) <= 1

    def _region(self, skip: fx.Node, end: fx.Node) -> list[fx.Node]:
        bit, before = 1 << self.number[skip], self.ancestors[end]
        first, last = self.number[skip] + 1, self.number[end]
        return [n for n in self.nodes[first:last] if before >> self.number[n] & 1 and self.ancestors[n] & bit] + [end]

    def _mixes(self, skip: fx.Node, branch: list[fx.Node]) -> bool:
        kinds = {self.kinds.of(node) for term in branch for node in self._region(skip, term)}
        return bool(kinds & {Kind.MIX, Kind.NORM, Kind.REDUCE})

    def _overwritten(self, skip: fx.Node, branch: fx.Node) -> bool:
        """Whether ``skip`` is what the branch left of its input, and not what it was computed from."""
        for value, _ in self._behind(skip):
            if value.target is written_through and not self._comes_from(value, branch):
                return value.args[1] is branch or self._comes_from(value.args[1], branch)
        return False

    def _comes_from(self, source: Any, node: fx.Node) -> bool:
        return bool(self.ancestors[node] >> self.number[source] & 1)

    def _verdict(self, add: fx.Node) -> Skipped:
        a, b, _ = operands(add)
        if self._overwritten(a, b) or self._overwritten(b, a):
            return _skip(add, Reason.OVERWRITTEN)
        for skip, branch in ((a, b), (b, a)):
            base = self._base(skip, [branch])
            if base is not None:
                if not self._mixes(base[0], [branch]):
                    return _skip(add, Reason.POINTWISE_BRANCH)
                return _skip(add, Reason.SHAPES_DIFFER, f"{_shape_text(skip)} and {_shape_text(branch)}")
        for node in (a, b):
            if self.kinds.is_constant(node):
                return _skip(
                    add, Reason.INDEPENDENT, f"{node.target if node.op == 'get_attr' else node.name} is constant"
                )
        for skip, branch in ((a, b), (b, a)):
            chain = self._chain(skip, branch)
            if chain is not None:
                kinds = {self.kinds.of(node) for node in chain[1]}
                if Kind.MOVE in kinds and Kind.MIX not in kinds:
                    return _skip(add, Reason.SHAPES_DIFFER, "the skip is reshaped or sliced")
                return _skip(add, Reason.PROJECTION if Kind.MIX in kinds else Reason.POINTWISE_BRANCH)
        return _skip(add, Reason.INDEPENDENT)

    def _chain(self, skip: fx.Node, branch: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
        """Return the value that ``skip`` is made from by single operations and ``branch`` too, and the way from it."""
        way: tuple[fx.Node, ...] = ()
        while True:
            data = [n for n in skip.all_input_nodes if is_tensor(n) and not self.kinds.is_constant(n)]
            if len(data) != 1:
                return None
            skip, way = data[0], (skip, *way)
            if self.ancestors[branch] >> self.number[skip] & 1:
                return skip, way

    def _shortcut(self, add: fx.Node, verdict: Skipped) -> Shortcut | None:
        a, b, alpha = operands(add)
        found = []
        for skip, branch in ((a, b), (b, a)):
            chain = self._chain(skip, branch)
            if chain is not None and all(len(node.users) == 1 for node in chain[1]) and self._fits(add, [a, b]):
                if self._mixing(chain[1]) < self._mixing(self._region(chain[0], branch)):
                    found.append(Shortcut(add, *chain, verdict))
        return found[0] if len(found) == 1 and alpha == 1 else None

    def _mixing(self, nodes: Iterable[fx.Node]) -> tuple[int, int]:
        """Return how many operations mix with weights, and how many at all: pooling does little beside a layer."""
        mixing = [node for node in nodes if self.kinds.of(node) in (Kind.MIX, Kind.REDUCE)]
        weighted = sum(
            node.op != "call_module" or any(True for _ in self.kinds.modules[str(node.target)].parameters())
            for node in mixing
        )
        return weighted, len(mixing)


def _skip(add: fx.Node, reason: Reason, detail: str = "") -> Skipped:
    module = module_of(add)
    return Skipped(module or add.name, module, location_of(add), reason, detail)


def _shape_text(node: fx.Node) -> str:
    shape = shape_of(node)
    return "unknown" if shape is None else str(tuple(shape))
