"""What the nodes of a graph know of the user's code."""

from __future__ import annotations

from torch import fx

from .dialects import location, module_path


def module_of(node: fx.Node) -> str:
    """Return the path of the module whose code made ``node``."""
    if "hc_module" in node.meta:
        return node.meta["hc_module"]
    return module_path(node)


def location_of(node: fx.Node) -> str:
    """Return "file:line" of the user's code that made ``node``."""
    return node.meta.get("hc_location") or location(node) or "unknown location"
