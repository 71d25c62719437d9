"""Sums as nodes of a graph, in any spelling: ``x + y``, ``x - y``, ``torch.lerp``, ``addmm``, a sum over a stack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graphs.dialects import name_of
from ..graphs.operations import has_known_home, is_tensor
from ..streams.mixing import put_entries, scattered, scattered_entries, summed_products

ADDITIONS = frozenset("add iadd radd".split())
SUBTRACTIONS = frozenset("sub isub subtract".split())
SHIFTS = ADDITIONS | SUBTRACTIONS


@dataclass(frozen=True)
class Term:
    """One term of a sum, ``scale * combine(*factors, *rest)``.

    Attributes:
        factors: its tensors; the term is zero where the first of them is.
        combine: what makes one tensor of several; None for a single one.
        rest: what else ``combine`` is given.
        scale: a number, or a node.
        complement: whether the term is scaled by ``1 - scale`` instead.
    """

    factors: tuple[Any, ...]
    combine: Callable[..., Any] | None = None
    rest: tuple[Any, ...] = ()
    scale: Any = 1
    complement: bool = False

    @property
    def value(self) -> fx.Node | None:
        """The node that is scaled, None where several are combined."""
        return self.factors[0] if self.combine is None else None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes whose values it depends on."""
        return tuple(n for n in (*self.factors, self.scale) if isinstance(n, fx.Node))

    @property
    def subtracted(self) -> bool:
        """Whether it is taken from the sum."""
        return not isinstance(self.scale, fx.Node) and self.scale < 0


@dataclass(frozen=True)
class Sum:
    """A node that sums terms, and the other nodes that are part of it."""

    terms: tuple[Term, ...]
    absorbed: tuple[fx.Node, ...] = ()


def sum_of(node: fx.Node) -> Sum | None:
    """Return the terms of a node that sums two tensors or more, None for any other node.

    >>> graph = fx.Graph()
    >>> x, y = graph.placeholder("x"), graph.placeholder("y")
    >>> [t.scale for t in sum_of(graph.call_function(torch.lerp, (x, y, 0.25))).terms]
    [0.75, 0.25]
    """
    if node.op not in ("call_function", "call_method") or not has_known_home(node) or not is_tensor(node):
        return None
    found = _sum(node)
    if found is None or len(found.terms) < 2 or not all(any(map(is_tensor, t.factors)) for t in found.terms):
        return None
    if any(not is_tensor(t.value) for t in found.terms if t.combine is None):
        return None
    values = [t.value for t in found.terms if t.value is not None]
    return found if len(values) == len(set(values)) else None


def flattened(node: fx.Node) -> Sum | None:
    """Return a sum's terms with those of the sums in it, which nothing else reads."""
    outer = sum_of(node)
    if outer is None:
        return None
    terms: list[Term] = []
    absorbed = list(outer.absorbed)
    waiting = list(reversed(outer.terms))
    while waiting:
        term = waiting.pop()
        inner = sum_of(term.value) if term.value is not None and _may_open(term) else None
        if inner is None or term.value is None or any(isinstance(t.scale, fx.Node) for t in inner.terms):
            terms.append(term)
            continue
        absorbed += [term.value, *inner.absorbed]
        waiting += [replace(t, scale=t.scale * term.scale) for t in reversed(inner.terms)]
    return Sum(tuple(terms), tuple(absorbed))


def _may_open(term: Term) -> bool:
    return not isinstance(term.scale, fx.Node) and len(term.factors[0].users) == 1


def _sum(node: fx.Node) -> Sum | None:
    name = name_of(node).rstrip("_")
    if name in SHIFTS:
        a, b, alpha = _arguments(node, "input", "other", alpha=1)
        return _of(Term((a,)), Term((b,), scale=-alpha if name in SUBTRACTIONS else alpha))
    if name == "rsub":
        a, b, alpha = _arguments(node, "input", "other", alpha=1)
        return _of(Term((b,)), Term((a,), scale=-alpha))
    if name == "lerp":
        a, b, weight = _arguments(node, "input", "end", "weight")
        if isinstance(weight, fx.Node):
            return _of(Term((a,), scale=weight, complement=True), Term((b,), scale=weight))
        return _of(Term((a,), scale=1 - weight), Term((b,), scale=weight))
    if name in ("addcmul", "addcdiv"):
        a, b, c, value = _arguments(node, "input", "tensor1", "tensor2", value=1)
        return _of(Term((a,)), Term((b, c), torch.mul if name == "addcmul" else torch.div, scale=value))
    if name in MATRIX_SUMS:
        combine, second, third = MATRIX_SUMS[name]
        a, b, c, beta, alpha = _arguments(node, "input", second, third, beta=1, alpha=1)
        return _of(Term((a,), scale=beta), Term((b, c), combine, scale=alpha))
    if name == "index_add":
        a, dim, index, source, alpha = _arguments(node, "input", "dim", "index", "source", alpha=1)
        return _of(Term((a,)), Term((source,), scattered, (a, dim, index), alpha))
    if name in ("scatter_add", "scatter_reduce", "scatter"):
        last = {"reduce": None, "include_self": True} if name != "scatter_add" else {}
        a, dim, index, source, *how = _arguments(node, "input", "dim", "index", "src", **last)
        return _of(Term((a,)), Term((source,), scattered_entries, (a, dim, index))) if how in SUMMED else None
    if name == "index_put":
        a, indices, values, accumulate = _arguments(node, "input", "indices", "values", accumulate=False)
        return _of(Term((a,)), Term((values,), put_entries, (a, indices))) if accumulate is True else None
    return _sum_of_stack(node) if name == "sum" else None


SUMMED: tuple[list[Any], ...] = ([], ["sum", True], ["add", True])  # how scatter_add, scatter_reduce and scatter add
MATRIX_SUMS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "addr": (torch.outer, "vec1", "vec2"),
    "addmm": (torch.matmul, "mat1", "mat2"),
    "addmv": (torch.matmul, "mat", "vec"),
    "baddbmm": (torch.matmul, "batch1", "batch2"),
    "addbmm": (summed_products, "batch1", "batch2"),
}


def _of(*terms: Term) -> Sum | None:
    numbers = (t.scale for t in terms if not isinstance(t.scale, fx.Node))
    return Sum(terms) if all(isinstance(n, (int, float)) for n in numbers) else None


def _sum_of_stack(node: fx.Node) -> Sum | None:
    stack, dim, *others = _arguments(node, "input", "dim", keepdim=False, dtype=None)
    if not isinstance(stack, fx.Node) or name_of(stack) != "stack" or not has_known_home(stack) or any(others):
        return None
    tensors, along = _arguments(stack, "tensors", dim=0)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if dim != along or not isinstance(tensors, (tuple, list)) or len(stack.users) > 1:
        return None
    return Sum(tuple(Term((t,)) for t in tensors), (stack,))


def _arguments(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """Return a node's arguments in order, those with ``defaults`` last."""
    wanted = {**dict.fromkeys(names), **defaults}
    keywords = dict(node.kwargs)
    if "self" in keywords:
        keywords["input"] = keywords.pop("self")
    given = dict(zip(wanted, node.args, strict=False))
    return [{**wanted, **given, **keywords}[name] for name in wanted]
