"""The launches of a graph that Inductor has scheduled, and the bytes that each moves.

Relies on internals of torch 2.13 and 2.14, as :mod:`hc_transform.measuring.h100` does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelCost:
    """One launch: its name, the bytes that it reads and writes, and whether a library (cuBLAS, ATen) runs it."""

    name: str
    bytes: int
    library: bool = False


def launches_of(nodes: Sequence[Any]) -> Iterator[KernelCost]:
    """Yield the launches of Inductor's scheduler nodes."""
    from torch._inductor import ir, scheduler

    for node in nodes:
        if isinstance(node, (scheduler.ForeachKernelSchedulerNode, scheduler.GroupedSchedulerNode)):
            parts = list(launches_of(node.snodes))
            if isinstance(node, scheduler.ForeachKernelSchedulerNode):  # all in one kernel
                parts = [KernelCost(node.get_name(), sum(part.bytes for part in parts))]
            yield from parts
        elif isinstance(node, scheduler.NopKernelSchedulerNode):
            continue
        elif isinstance(node, scheduler.ExternKernelSchedulerNode):
            if isinstance(node.node, ir.MultiOutput) or not node.get_outputs():
                continue
            own = isinstance(node.node, ir.UserDefinedTritonKernel)
            yield KernelCost(_name(node.node), _extern_bytes(node), library=not own)
        else:
            yield KernelCost(node.get_name(), _fused_bytes(node))


def _name(node: Any) -> str:
    return str(getattr(node, "op_overload", None) or getattr(node, "python_kernel_name", None) or node.get_name())


def _fused_bytes(node: Any) -> int:
    """Count each buffer that a Triton kernel touches and that is not internal to it, once."""
    from torch._inductor.virtualized import V

    inside = set(node.get_nodes())
    written = {dep.name for dep in node.read_writes.writes}
    total = 0
    for name, parts in _accesses(node).items():
        users = {user.node for user in node.scheduler.name_to_buf[name].users} if name in written else {None}
        if not users - inside:  # lives in registers
            continue
        buffer = V.graph.try_get_buffer(name)
        if buffer is None or isinstance(buffer.get_output_spec(), _layoutless()[:2]):
            continue
        size = _hint(_product(buffer.get_size()))
        total += min(sum(parts.values()), size) * buffer.get_dtype().itemsize
    return total


def _accesses(node: Any) -> dict[str, dict[Any, int]]:
    """Return, for each buffer, the elements that each distinct access to it touches."""
    from torch._inductor.dependencies import MemoryDep, WeakDep

    found: dict[str, dict[Any, int]] = defaultdict(dict)
    for dep in (*node.read_writes.reads, *node.read_writes.writes):
        if isinstance(dep, WeakDep):  # an order, not an access
            continue
        if not isinstance(dep, MemoryDep):
            found[dep.name][dep] = dep.numel_hint()
        elif dep.is_indirect():  # a gather: as many elements as the loop has steps
            found[dep.name][dep] = _hint(_product(dep.size))
        else:
            found[dep.name][dep.normalize()] = _hint(dep.get_numel())
    return found


def _extern_bytes(node: Any) -> int:
    """Count the inputs and outputs of a library call, an operator or a Triton kernel of the user's."""
    inner = node.node
    inputs = {id(value): value for value in _flat((inner.inputs, getattr(inner, "kwargs", {}))) if _is_tensor(value)}
    mutated = set(inner.get_mutation_names())
    total = 0
    for value in inputs.values():
        passes = (not _is_empty(node, value.get_name())) + (value.get_name() in mutated)
        total += passes * _bytes(value)
    return total + sum(_output_bytes(node, output) for output in node.get_outputs())


def _output_bytes(node: Any, output: Any) -> int:
    from torch._inductor import ir

    layout = output.node.get_output_spec()
    if isinstance(layout, ir.MultiOutputLayout):
        parts = {user.node for user in output.users if isinstance(getattr(user.node, "node", None), ir.MultiOutput)}
        return sum(_bytes(part.node) for part in parts)
    if isinstance(layout, _layoutless()) or isinstance(output.node, ir.MutationOutput):
        return 0
    return _bytes(output.node)


def _is_empty(node: Any, name: str) -> bool:
    """Whether a buffer is freshly allocated memory, which is written and not read."""
    from torch._inductor.scheduler import NopKernelSchedulerNode

    buffer = node.scheduler.name_to_buf.get(name)
    return buffer is not None and isinstance(buffer.defining_op, NopKernelSchedulerNode)


def _layoutless() -> tuple[type, ...]:
    from torch._inductor import ir

    return (ir.NoneLayout, ir.MultiOutputLayout, ir.MutationLayoutSHOULDREMOVE)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "get_size") and hasattr(value, "get_dtype") and hasattr(value, "get_name")


def _bytes(value: Any) -> int:
    """Return the bytes of memory that a buffer, or a view of one, covers: expanded axes count once."""
    stride = value.get_stride() if hasattr(value, "get_stride") else None
    size = value.get_size()
    if stride is not None:
        size = [n for n, step in zip(size, stride, strict=True) if step != 0]
    return _hint(_product(size)) * value.get_dtype().itemsize


def _product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _hint(expression: Any) -> int:
    """Return a size as a number; a symbolic one as it was in the example."""
    from torch._inductor.virtualized import V

    if isinstance(expression, int):
        return expression
    sizes: Any = V.graph.sizevars
    hint = getattr(sizes, "optimization_hint", None) or sizes.size_hint
    return int(hint(expression, fallback=0))
