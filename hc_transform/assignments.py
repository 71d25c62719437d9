"""What traced code stores on its modules: nodes at the end of the graph store it on every call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .proxy import CannotInline


def assign(attributes: dict[str, Any], name: str, value: Any) -> None:
    """Store ``value`` as the buffer or attribute ``name`` of the module that ``attributes`` belong to."""
    attributes[name] = value


def show_plain_tensors(work: nn.Module, inlined: frozenset[str]) -> None:
    """Make tensors that modules hold as plain attributes buffers of ``work``, so that a trace sees them read."""
    for path, module in work.named_modules():
        for name in [n for n, value in module.__dict__.items() if isinstance(value, torch.Tensor) and path in inlined]:
            module._buffers[name] = module.__dict__.pop(name)
            module._non_persistent_buffers_set.add(name)


def record_assignments(graph: fx.Graph, work: nn.Module, model: nn.Module, inlined: frozenset[str]) -> None:
    """Add a node to the traced ``graph`` for each tensor that traced code of ``work`` stored on a module.

    Args:
        graph: of a forward of ``work``.
        work: the structural copy of ``model`` that was traced; it gets back what ``model`` holds.
        model: the model as it was.
        inlined: paths of the modules whose code was traced.

    Raises:
        CannotInline: the code stores something else, or a tensor that it may read on the next call.
    """
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    for path, name, value in list(_stored(work, inlined)):
        before = model.get_submodule(path)
        kind = "_buffers" if name in before._buffers else "__dict__"
        old = getattr(before, kind).get(name)
        if not isinstance(value, fx.Proxy):
            raise CannotInline(path, f"its code collects tensors in its attribute {name!r}, which a graph would not")
        keeps = not isinstance(old, torch.Tensor) or (f"{path}.{name}" if path else name) in read
        if kind == "__dict__" and keeps:
            raise CannotInline(path, f"its code keeps a state in its attribute {name!r}, which a graph would not")
        place = work.get_submodule(path)
        (place._buffers if name in place._buffers else place.__dict__)[name] = old
        if value.hc_value is not old:  # else it was changed in place
            with graph.inserting_before(graph.output_node()):
                attributes = graph.create_node("get_attr", f"{path}.{kind}" if path else kind, (), {})
                graph.call_function(assign, (attributes, name, value.node))


def _stored(work: nn.Module, inlined: frozenset[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, name, value) of all that holds a proxy; a module once."""
    own = frozenset(nn.Module().__dict__)
    for path, module in work.named_modules():
        if path in inlined:
            for name, value in (*module._buffers.items(), *module.__dict__.items()):
                if name not in own and any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value)):
                    yield path, name, value
