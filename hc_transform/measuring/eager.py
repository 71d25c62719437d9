"""What a model costs on a GPU in eager mode: launches, bytes and saved activations, counted on any machine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.copies import tensors_within
from ..streams import mixing
from .cost import Cost, GraphCost
from .launches import KernelCost

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FILLS = {"fill_", "zero_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
IN_ZEROS = {"slice_backward", "select_backward"}  # a fill, then a copy into a part


def eager_cost(function: nn.Module | Callable[..., Any], *inputs: Any, training: bool = True) -> Cost:
    """Return what ``function(*inputs)`` costs on a GPU in eager mode, with the fields of ``inductor_cost``.

    Nothing is computed: operators are called on tensors without data. Each that is
    neither a view nor an allocation is a launch, which reads its inputs and writes its outputs, axes of stride 0
    once; a custom operator is one. What torch does by other operators on a GPU than on a CPU counts as on the CPU (a
    norm as its parts).

    Args:
        function: a module or function, which does not look at values of tensors.
        inputs: its arguments.
        training: count the backward pass too; else the forward pass runs under ``no_grad``.

    Raises:
        RuntimeError: the code depends on values of tensors; torch's own error.

    >>> cost = eager_cost(lambda x: (x + 1).sin(), torch.zeros(1024), training=False)
    >>> len(cost.forward.launches), cost.forward.bytes
    (2, 16384)
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = [function] if isinstance(function, nn.Module) else []
    own = [tensor for m in module for tensor in (*m.parameters(), *m.buffers())]
    memo: dict[int, Any] = {id(t): mode.from_tensor(t) for t in (*own, *tensors_within(inputs, set()))}
    known = {_storage(fake) for fake in memo.values()}
    run = copy.deepcopy(function, memo) if module else function
    arguments = copy.deepcopy(inputs, memo)
    forward, backward = _Launches(), _Launches()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    with mode, torch.set_grad_enabled(training), mock.patch.object(mixing, "UNPACKED_DEVICES", ()):
        with forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = [y for y in _tensors(run(*arguments)) if y.requires_grad]
        if outputs:
            gradients = [torch.empty_like(y) for y in outputs]
            with backward:
                torch.autograd.backward(outputs, gradients)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Cost(GraphCost(tuple(forward.made)), GraphCost(tuple(backward.made)), saved)


class _Launches(TorchDispatchMode):
    """Note the launches of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[KernelCost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        given, made = ({id(t): t for t in _tensors(value)} for value in ((args, kwargs), result))
        mutates = func._schema.is_mutable
        if not made and not mutates or name in ALLOCATIONS:
            return result
        old = {_storage(t) for t in given.values()}
        if not mutates and all(_storage(t) in old for t in made.values()):  # a view
            return result
        read = [] if name in FILLS else list(given.values())[1 if name == "copy_" else 0 :]
        written = made or {id(t): t for t in _tensors((args[0],))}
        sizes = [sum(map(_bytes, tensors)) for tensors in (read, written.values())]
        if name in IN_ZEROS:
            self.made.append(KernelCost("aten::zeros", sizes[1], library=True))
            sizes[1] = sizes[0]
        self.made.append(KernelCost(func._schema.name, sum(sizes), library=True))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    leaves = pytree.tree_leaves(dict(value) if isinstance(value, dict) else value)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of memory that a tensor covers."""
    covered = [n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    return math.prod(covered) * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
