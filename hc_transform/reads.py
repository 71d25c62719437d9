"""Operations that read something else than a tensor: its shape, dtype or device, or its values as numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .dialects import SYMBOLS, reads_symbols, type_of
from .inputs import is_constant
from .proxy import ValueProxy

SHAPE_METHODS = frozenset("size dim ndimension numel nelement stride is_floating_point is_complex get_device".split())
SHAPE_ATTRIBUTES = frozenset("shape ndim dtype device is_cuda is_sparse is_nested layout itemsize".split())
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


def _all_inputs_plain(node: fx.Node) -> bool:
    plain = (bool, int, float, str, torch.Size, torch.dtype, torch.device, *SYMBOLS)
    return all(issubclass(type_of(n) or torch.Tensor, plain) for n in node.all_input_nodes)


def is_arithmetic_on_sizes(target: Any, args: Any) -> bool:
    """Whether an operation is arithmetic on sizes: no argument is a tensor."""
    if getattr(target, "__module__", None) not in (operator.add.__module__, math.__name__):
        return False
    leaves = pytree.tree_leaves(args)
    return any(type(a) is ValueProxy for a in leaves) and all(
        isinstance(a.hc_value, (bool, int, float, torch.Size)) if type(a) is ValueProxy else is_constant(a)
        for a in leaves
    )


def reads_values(node: fx.Node) -> bool:
    """Whether a number, or a list of them, depends on the values of tensors."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    sources = node.all_input_nodes
    if name in VALUE_READS and any(issubclass(n.meta.get("hc_type", object), torch.Tensor) for n in sources):
        return True
    return any("hc_on_values" in n.meta for n in sources)
