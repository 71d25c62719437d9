"""Where residuals stand in the user's code, and what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import fx, nn

from ..graphs.dialects import is_lifted, module_of, modules_called, value_of
from .findings import Residual


def named(residuals: list[Residual], modules: Mapping[str, nn.Module]) -> list[Residual]:
    """Name residuals by module paths: the adding module, and the branch's where a module adds more than once."""
    by_add = {r.add: r for r in residuals}
    parts = _Parts(residuals[0].add.graph.nodes if residuals else (), modules)
    per_module = Counter(r.module for r in residuals)
    taken: Counter[str] = Counter()
    named = []
    for residual in residuals:
        name = residual.module
        if not name or per_module[residual.module] > 1:
            name = _branch_path(residual, by_add, parts) or name or residual.add.name
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


class _Parts:
    """The parts of a model: which are called, and how large they are.

    Args:
        nodes: of the graph.
        modules: of the graph module. A graph whose parameters are inputs has none: a part is as large as what it reads.
    """

    def __init__(self, nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.called = modules_called(nodes)
        self.sizes: dict[str, int] = {}
        self._read: dict[str, set[fx.Node]] = {}
        for node in nodes:
            for source in node.all_input_nodes if self.called else ():
                if is_lifted(source):
                    self._read.setdefault(module_of(node), set()).add(source)

    def is_container(self, path: str) -> bool:
        """Whether a module only holds others, so that the one in it gives the name."""
        known = isinstance(self.modules.get(path), (nn.ModuleList, nn.ModuleDict))
        return known or bool(self.called) and path not in self.called

    def size(self, path: str) -> int:
        """Return how many parameters a module has."""
        if path not in self.sizes:
            found = {n for p, read in self._read.items() if p == path or p.startswith(path + ".") for n in read}
            held = self.modules[path].parameters() if path in self.modules else map(value_of, found)
            self.sizes[path] = sum(p.numel() for p in held)
        return self.sizes[path]


def _branch_path(residual: Residual, by_add: dict[fx.Node, Residual], parts: _Parts) -> str:
    """Return the path of the branch's largest module, one level below the module that adds."""
    prefix = residual.module + "." if residual.module else ""
    best, size = "", -1
    part = _own_part(residual, by_add) or residual.region
    for path in {str(node.target) if node.op == "call_module" else module_of(node) for node in part}:
        if not path.startswith(prefix) or path == residual.module:
            continue
        atoms = path[len(prefix) :].split(".")
        depth = 1
        while depth < len(atoms) and parts.is_container(prefix + ".".join(atoms[:depth])):
            depth += 1
        path = prefix + ".".join(atoms[:depth])
        numel = parts.size(path)
        if (numel, path) > (size, best):
            best, size = path, numel
    return best
