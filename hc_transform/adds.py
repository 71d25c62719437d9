"""Where residuals stand in the user's code, and what they are called."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import fx, nn

from .findings import Residual


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
    by_add = {r.add: r for r in residuals}
    sizes: dict[str, int] = {}
    per_module = Counter(r.module for r in residuals)
    taken: Counter[str] = Counter()
    named = []
    for residual in residuals:
        name = residual.module
        if not name or per_module[residual.module] > 1:
            name = _branch_path(residual, by_add, modules, sizes) or name or residual.add.name
        taken[name] += 1
        named.append(replace(residual, name=name if taken[name] == 1 else f"{name}:{taken[name]}"))
    return named


def _own_part(residual: Residual, by_add: dict[fx.Node, Residual]) -> set[fx.Node]:
    """Return the region without what another stream does on its way, which the branch only reads."""
    found: set[fx.Node] = set()
    waiting = [node for term in residual.branch for node in term.nodes]
    while waiting:
        node = waiting.pop()
        other = by_add.get(node)
        crosses = other is not None and other.skip is not residual.skip and other.skip not in residual.region
        if node in residual.region and node not in found and not crosses:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _branch_path(
    residual: Residual, by_add: dict[fx.Node, Residual], modules: dict[str, nn.Module], sizes: dict[str, int]
) -> str:
    """Return the path of the branch's largest module, one level below the module that adds."""
    prefix = residual.module + "." if residual.module else ""
    best, size = "", -1
    part = _own_part(residual, by_add) or residual.region
    for path in {str(node.target) if node.op == "call_module" else module_of(node) for node in part}:
        if not path.startswith(prefix) or path == residual.module:
            continue
        atoms = path[len(prefix) :].split(".")
        depth = 1
        while depth < len(atoms) and isinstance(
            modules.get(prefix + ".".join(atoms[:depth])), (nn.ModuleList, nn.ModuleDict)
        ):
            depth += 1
        path = prefix + ".".join(atoms[:depth])
        if path not in sizes:
            sizes[path] = sum(p.numel() for p in modules[path].parameters()) if path in modules else 0
        numel = sizes[path]
        if (numel, path) > (size, best):
            best, size = path, numel
    return best
