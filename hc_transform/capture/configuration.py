"""What two modules are alike by: their classes, the shapes of their tensors, the objects that they hold.

Numbers, flags and strings are left out, for a graph knows which of them its code read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ..models.copies import has_hooks
from ..models.state import is_state
from .python_state import is_plain

DEEPEST = 6  # containers within containers that are looked into


class Itself:
    """Stands for an object that is like no other, and keeps it alive, for names of dead objects are given anew."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def configuration_of(module: nn.Module) -> Hashable:
    """Return what is equal for modules whose code differs by no more than the plain values that it reads."""
    paths = {id(part): path for path, part in module.named_modules()}
    every = module.named_modules(remove_duplicate=False)
    return tuple((path, paths[id(part)], *_own(part, paths)) for path, part in every)


def _own(module: nn.Module, paths: dict[int, str]) -> tuple[Any, ...]:
    if isinstance(module, torch.jit.ScriptModule):
        return (Itself(module),)  # its code is its own
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        Itself(type(module).forward),
        tuple((name, None if tensor is None else _layout(tensor)) for name, tensor in tensors),
        tuple(name for name, part in module._modules.items() if part is None),
        has_hooks(module, forward=False),
        tuple(
            (name, None if is_plain(value) else _alike(value, paths))
            for name, value in module.__dict__.items()
            if is_state(name)
        ),
    )


def _layout(tensor: torch.Tensor) -> Hashable:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return type(tensor), tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad


def _alike(value: Any, paths: dict[int, str], depth: int = 0) -> Hashable:
    """Return what is equal for values that code cannot tell apart."""
    if is_plain(value):
        return type(value), value
    if id(value) in paths:
        return "module", paths[id(value)]
    if type(value) is torch.Tensor and depth == 0:
        return _layout(value)  # a graph finds it by its name
    entries: list[Any] | None = None
    if type(value) in (list, tuple, torch.Size):
        entries = [*value]
    elif type(value) is dict:
        entries = [*value.items()]
    elif type(value) is types.MethodType:
        entries = [value.__func__, value.__self__]
    elif type(value) is functools.partial:
        entries = [value.func, value.args, value.keywords]
    if entries is None or depth > DEEPEST:
        return Itself(value)
    return type(value), tuple(_alike(entry, paths, depth + 1) for entry in entries)
