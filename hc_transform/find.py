"""Find the residual adds of a graph, with a verdict for every add on tensors."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from .aliases import written_through
from .kinds import Kind, Kinds, is_tensor, name_of, shape_of

ADDS = frozenset({"add", "add_", "iadd", "radd"})


class Reason(enum.Enum):
    """Why an add was not converted."""

    SHAPES_DIFFER = "shapes differ: the branch output is broadcast onto the skip"
    INDEPENDENT = "operands independent: neither is computed from the other"
    POINTWISE_BRANCH = "branch is pointwise: an activation or a gate, not a residual"
    PROJECTION = "projection shortcut: both operands are computed from one value, neither is that value"
    CARRIED = "projection shortcut, carried: the shortcut is applied to every stream"
    SHORT = "its trunk has fewer residuals than min_residuals"
    MERGED = "part of a sum that is converted as one residual"
    OVERWRITTEN = "the skip is overwritten in place by its own branch"
    OPAQUE = "inside a module that stayed whole"
    NESTED = "nested: inside or around the branches of a trunk with more residuals"
    SHARED_READ = "its branch starts inside the branch of another residual on the same value"
    EXCLUDED = "excluded"
    PLAIN = "left plain: num_streams is 1"


@dataclass(frozen=True)
class Residual:
    """One residual add ``skip + branch``.

    Attributes:
        name: module path that tells it apart, such as "blocks.0.attn".
        module: path of the module whose code adds.
        location: "file.py:123", the full path of the file.
        add: the (last) add.
        skip: the value that the branch is computed from.
        skip_ops: operations between ``skip`` and the add, in order.
        branch: the branch outputs; there are several in ``x + attn(x) + mlp(x)``.
        region: all nodes from ``skip`` (without it) to the branch outputs.
        absorbed: the other adds of the sum.
        skip_scale, branch_scale: the factor ``alpha`` of ``torch.add``, where it is on that side.
        branch_first: whether the branch is the add's first operand, which gives the sum its memory format.
    """

    name: str
    module: str
    location: str
    add: fx.Node
    skip: fx.Node
    skip_ops: tuple[fx.Node, ...]
    branch: tuple[fx.Node, ...]
    region: frozenset[fx.Node]
    absorbed: tuple[fx.Node, ...] = ()
    skip_scale: Any = 1
    branch_scale: Any = 1
    branch_first: bool = False


@dataclass(frozen=True)
class Skipped:
    """One add (or opaque module) that is not converted, and why."""

    name: str
    module: str
    location: str
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


@dataclass(frozen=True)
class Shortcut:
    """A projection shortcut ``s(x) + f(x)``, s being a chain of operations that mixes less than f.

    Attributes:
        add: the add.
        value: x.
        way: the operations of s, in order.
        verdict: the add as it stands among those that are not residuals.
    """

    add: fx.Node
    value: fx.Node
    way: tuple[fx.Node, ...]
    verdict: Skipped


@dataclass(frozen=True)
class Findings:
    """All adds of a graph: those that are residuals, and those that are not."""

    residuals: tuple[Residual, ...]
    skipped: tuple[Skipped, ...]
    shortcuts: tuple[Shortcut, ...] = ()


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
            tuple(_named(list(residuals.values()), self.kinds.modules)),
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


def is_add(node: fx.Node) -> bool:
    """Whether ``node`` adds two tensors, in any spelling."""
    if node.op not in ("call_function", "call_method") or name_of(node) not in ADDS:
        return False
    if node.op == "call_function" and getattr(node.target, "__module__", "") not in ("_operator", "torch", None):
        return False
    if not is_tensor(node):
        return False
    a, b, _ = operands(node)
    return is_tensor(a) and is_tensor(b) and a is not b


def operands(add: fx.Node) -> tuple[Any, Any, Any]:
    """Return the two operands of an add, and the factor of the second one."""
    args = [*add.args, *(add.kwargs[key] for key in ("input", "other") if key in add.kwargs)]
    first, second = (*args, None, None)[:2]
    return first, second, add.kwargs.get("alpha", 1)


def module_of(node: fx.Node) -> str:
    """Return the path of the module whose code made ``node``."""
    if "hc_module" in node.meta:
        return node.meta["hc_module"]
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def location_of(node: fx.Node) -> str:
    """Return "file:line" of the user's code that made ``node``."""
    return node.meta.get("hc_location", "unknown location")


def _skip(add: fx.Node, reason: Reason, detail: str = "") -> Skipped:
    module = module_of(add)
    return Skipped(module or add.name, module, location_of(add), reason, detail)


def _shape_text(node: fx.Node) -> str:
    shape = shape_of(node)
    return "unknown" if shape is None else str(tuple(shape))


def _named(residuals: list[Residual], modules: dict[str, nn.Module]) -> list[Residual]:
    """Name residuals by module paths: the adding module, and the branch's where a module adds more than once."""
    per_module = Counter(r.module for r in residuals)
    taken: Counter[str] = Counter()
    named = []
    for residual in residuals:
        name = residual.module
        if not name or per_module[residual.module] > 1:
            name = _branch_path(residual, modules) or name or residual.add.name
        taken[name] += 1
        named.append(replace(residual, name=name if taken[name] == 1 else f"{name}:{taken[name]}"))
    return named


def _branch_path(residual: Residual, modules: dict[str, nn.Module]) -> str:
    """Return the path of the branch's largest module, one level below the module that adds."""
    prefix = residual.module + "." if residual.module else ""
    best, size = "", -1
    for node in residual.region:
        path = str(node.target) if node.op == "call_module" else module_of(node)
        if not path.startswith(prefix) or path == residual.module:
            continue
        atoms = path[len(prefix) :].split(".")
        depth = 1
        while depth < len(atoms) and isinstance(
            modules.get(prefix + ".".join(atoms[:depth])), (nn.ModuleList, nn.ModuleDict)
        ):
            depth += 1
        path = prefix + ".".join(atoms[:depth])
        numel = sum(p.numel() for p in modules[path].parameters()) if path in modules else 0
        if (numel, path) > (size, best):
            best, size = path, numel
    return best
