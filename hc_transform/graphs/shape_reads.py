"""Operations that read something else than a tensor: its shape, dtype or device, or its values as numbers."""

from __future__ import annotations

import operator

import torch
from torch import fx

from . import meta
from .dialects import SYMBOLS, name_of, reads_symbols, type_of

SHAPE_METHODS = frozenset("size dim ndimension numel nelement stride is_floating_point is_complex get_device".split())
SHAPE_ATTRIBUTES = frozenset("shape ndim dtype device is_cuda is_sparse is_nested layout itemsize".split())
LAYOUT_METHODS = frozenset("is_contiguous stride".split())
VALUE_READS = frozenset("item tolist equal allclose is_nonzero numpy __contains__ contains".split())


def is_shape_read(node: fx.Node) -> bool:
    """Whether ``node`` reads only shape, dtype or device of its tensors, or computes with such."""
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in SHAPE_ATTRIBUTES
    if reads_symbols(node):
        return True
    module = getattr(node.target, "__module__", None)
    return module in (operator.add.__module__, "math") and _all_inputs_plain(node)


def asks_layout(graph: fx.Graph) -> bool:
    """Whether code asks how a tensor lies in memory."""
    return any(node.op.startswith("call_") and name_of(node) in LAYOUT_METHODS for node in graph.nodes)


def _all_inputs_plain(node: fx.Node) -> bool:
    plain = (bool, int, float, str, torch.Size, torch.dtype, torch.device, *SYMBOLS)
    return all(issubclass(type_of(n) or torch.Tensor, plain) for n in node.all_input_nodes)


def reads_values(node: fx.Node) -> bool:
    """Whether a number, or a list of them, depends on the values of tensors."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    sources = node.all_input_nodes
    if name in VALUE_READS and any(issubclass(meta.TYPE.of(n) or object, torch.Tensor) for n in sources):
        return True
    return any(meta.ON_VALUES.known(n) for n in sources)
