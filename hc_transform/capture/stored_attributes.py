"""What traced code stores on its modules: nodes at the end of the graph store it on every call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..models.state import is_generator, is_state
from .proxy import CannotInline
from .python_state import is_plain
from .watch import Watch, differing_state, is_mutable

_MISSING = object()


def assign(attributes: dict[str, Any], name: str, value: Any) -> None:
    """Store ``value`` as the buffer or attribute ``name`` of the module that ``attributes`` belong to."""
    attributes[name] = value


def read_stored(module: nn.Module, name: str) -> Any:
    """Return what ``module`` has stored in an attribute while it ran."""
    return getattr(module, name)


def show_plain_tensors(work: nn.Module, inlined: frozenset[str]) -> None:
    """Make tensors that modules hold as plain attributes buffers of ``work``, so that a trace sees them read."""
    for path, module in work.named_modules():
        for name in [n for n, value in module.__dict__.items() if isinstance(value, torch.Tensor) and path in inlined]:
            module._buffers[name] = module.__dict__.pop(name)
            module._non_persistent_buffers_set.add(name)


def record_assignments(
    graph: fx.Graph, work: nn.Module, model: nn.Module, inlined: frozenset[str], watch: Watch
) -> None:
    """Add a node to the traced ``graph`` for each attribute of a module that traced code of ``work`` set.

    Args:
        graph: of a forward of ``work``.
        work: the structural copy of ``model`` that was traced, as the trace left it.
        model: the model as it was.
        inlined: paths of the modules whose code was traced.
        watch: what the traced code read and wrote.

    Raises:
        CannotInline: the code keeps a state in what it stores, or stores what a graph would not.
    """
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for (path, name), writer in watch.writes.items():
        kind, value = _stored(work.get_submodule(path), name)
        _, old = _stored(model.get_submodule(path), name)
        target = f"{path}.{name}" if path else name
        proxy = isinstance(value, fx.Proxy)
        if value is old or proxy and value.hc_value is old:
            continue  # or changed in place
        leaves = [value] if proxy else pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, fx.Proxy))
        collects = not proxy and any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        if not proxy and not collects and not isinstance(value, (torch.Tensor, nn.Module)):
            if not differing_state(old, value):
                continue
        if (path, name) in watch.reads or kind == "__dict__" and target in read:
            raise CannotInline(writer, f"its code keeps a state in its attribute {name!r}, which a graph would not")
        if kind not in ("_buffers", "__dict__") or not all(isinstance(v, fx.Proxy) or is_plain(v) for v in leaves):
            raise CannotInline(writer, f"its code sets its attribute {name!r} to what a graph would not")
        if any(path == leaf or path.startswith(f"{leaf}.") for leaf in called):
            raise CannotInline(writer, f"its code sets {target!r}, which a module that stays whole may read")
        with graph.inserting_before(graph.output_node()):
            attributes = graph.create_node("get_attr", f"{path}.{kind}" if path else kind, (), {})
            stored = fx.node.map_aggregate(value, lambda v: v.node if isinstance(v, fx.Proxy) else v)
            graph.call_function(assign, (attributes, name, stored))
    _refuse_other_changes(work, model, inlined, watch)


def _refuse_other_changes(work: nn.Module, model: nn.Module, inlined: frozenset[str], watch: Watch) -> None:
    """Raise CannotInline if traced code changed what modules hold without setting an attribute."""
    for where, name in watch.changed_closures():
        raise CannotInline(where, f"its code changes what the function {name!r} closes over, which a graph would not")
    there = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for path in sorted(inlined & there):
        now, before = work.get_submodule(path), model.get_submodule(path)
        of_torch = type(now).__module__.startswith("torch.")  # as what torch.compile returns, which keeps its settings
        for name in () if of_torch else now.__dict__.keys() | before.__dict__.keys():
            if (path, name) not in watch.writes and _set_past_the_module(now, before, name):
                raise CannotInline(path, f"its code sets {name!r} in its __dict__, which a graph would not")
        changed = _changed_inside(now, before)
        if changed is not None:
            raise CannotInline(path, f"its code changes what its attribute {changed!r} holds, which a graph would not")


def _stored(module: nn.Module, name: str) -> tuple[str, Any]:
    """Return which of its dictionaries a module holds an attribute in, and the attribute."""
    for kind in ("_parameters", "_buffers", "_modules"):
        if name in module.__dict__[kind]:
            return kind, module.__dict__[kind][name]
    return "__dict__", module.__dict__.get(name)


def _set_past_the_module(work: nn.Module, before: nn.Module, name: str) -> bool:
    """Whether code set an attribute otherwise than by the module, which does not see it, and not for a cached value."""
    now, old = (module.__dict__.get(name, _MISSING) for module in (work, before))
    if not is_state(name) or now is old or isinstance(getattr(type(work), name, None), functools.cached_property):
        return False
    if isinstance(old, torch.Tensor) and now is _MISSING:
        return False  # it stands among the buffers while it is traced
    plain = is_plain(now) or is_plain(old)
    return now is _MISSING or old is _MISSING or plain and differing_state(old, now)


def _changed_inside(work: nn.Module, before: nn.Module) -> str | None:
    """Return the attribute whose contents, a list's or an object's, are not those of ``before``."""
    for name, value in work.__dict__.items():
        if is_state(name) and name in before.__dict__ and is_mutable(value) and not is_generator(value):
            if value is not before.__dict__[name] and differing_state(before.__dict__[name], value):
                return name
    return None
