"""Adds as nodes of a graph, and the names of the residuals they make."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import fx, nn

from .findings import Residual
from .kinds import is_tensor, name_of

ADDS = frozenset({"add", "add_", "iadd", "radd"})


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


def named(residuals: list[Residual], modules: dict[str, nn.Module]) -> list[Residual]:
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
