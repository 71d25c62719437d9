"""Copies of a model's structure that share its tensors, and copies of its inputs."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .draws import shared_generators

REGISTERED_HOOKS = (  # on calls and on state dicts; those of backward passes are apart
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module, forward: bool = True) -> bool:
    """Whether hooks run when ``module`` is called, or differentiated; without ``forward`` others than forward hooks."""
    return any(getattr(module, name, None) for name in HOOKS if forward or name != "_forward_hooks")


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile`` made ``module`` of, None if it did not."""
    return module._orig_mod if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) else None


class Uncompiled(nn.Module):
    """Stands for a module that is compiled where a graph holds its code, under the same names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self._orig_mod(*args, **kwargs)


def uncompile(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Undo ``torch.compile`` of the modules at ``paths``, for compiled code finds nothing by paths through them."""
    for path in sorted(paths):
        written = compiled_from(model.get_submodule(path))
        if written is not None:
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = Uncompiled(written)
    return model


def stands_elsewhere(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules that forwards set on instances of ``model``'s modules are bound to, with the paths they stand for.

    A closure over a bound method, such as a wrapper of the old forward, is not copied with the module that it is of.
    """
    for path, module in model.named_modules():
        if "forward" in module.__dict__ and compiled_from(module) is None:
            for other in _bound_modules(module.__dict__["forward"], 0):
                if other is not module and type(other) is type(module):
                    for name, part in other.named_modules():
                        yield ".".join(filter(None, (path, name))), part


def _bound_modules(function: Any, depth: int) -> Iterator[nn.Module]:
    """Yield the modules that a function is bound to, by itself or through the functions that it closes over."""
    if isinstance(function, nn.Module):
        yield function
    elif isinstance(function, types.MethodType):
        yield from _bound_modules(function.__self__, depth)
    elif isinstance(function, (types.FunctionType, functools.partial)) and depth < 4:
        cells = getattr(function, "__closure__", None) or ()
        held = [cell.cell_contents for cell in cells if cell != types.CellType()]
        for value in (*held, *getattr(function, "args", ()), getattr(function, "func", None)):
            yield from _bound_modules(value, depth + 1)


def clone_structure(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``'s Python objects around the same parameters and buffers.

    Everything is deep-copied but tensors, scripted modules, functions and hooks, so that bound methods
    and lists of modules refer to the copy, and hooks report to whom they did.
    """
    memo: dict[int, Any] = {id(generator): generator for generator in shared_generators()}
    modules = {id(module) for module in model.modules()}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module
        for name in HOOKS:
            for hook in module.__dict__.get(name, {}).values():
                if id(getattr(hook, "__self__", None)) not in modules:  # a method of a module follows it
                    memo[id(hook)] = hook
        for leaf in (*_tensors_of(module), *_compared_by_identity(module)):
            memo[id(leaf)] = leaf
    return copy.deepcopy(model, memo)


def _compared_by_identity(module: nn.Module) -> Iterator[Any]:
    """Yield the attributes of a module that are nothing but themselves, or globals of its code too."""
    home = getattr(sys.modules.get(type(module).__module__), "__dict__", {})
    for value in module.__dict__.values():
        if type(value) is object:
            yield value
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor)):
            if any(value is other for other in home.values()):
                yield value


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors of a module that are no other module's: parameters, buffers, plain attributes."""
    for value in (*module.__dict__.values(), *module._parameters.values(), *module._buffers.values()):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                yield leaf


def doubled_modules(*modules: nn.Module) -> tuple[Any, ...]:
    """Return copies of modules, in double precision; what they share, their copies share."""
    memo: dict[int, Any] = {id(generator): generator for generator in shared_generators()}
    for root in modules:
        for module in root.modules():
            for leaf in _tensors_of(module):
                if id(leaf) not in memo:
                    memo[id(leaf)] = _doubled_leaf(leaf)
    return tuple(module.double() for module in copy.deepcopy(modules, memo))


def _doubled_leaf(leaf: torch.Tensor) -> torch.Tensor:
    value = _doubled(leaf)
    return nn.Parameter(value, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else value


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().clone()
    return value.double() if value.is_floating_point() else value


@contextlib.contextmanager
def in_other_mode(model: nn.Module) -> Iterator[None]:
    """Have ``model`` in training mode where it is in eval mode, or the reverse; put every module's mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(not model.training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def keep_plain_tensors(module: nn.Module, like: nn.Module) -> None:
    """Give ``module`` the tensors that ``like`` holds as plain attributes, as neither parameter nor buffer."""
    for name, value in like.__dict__.items():
        if isinstance(value, torch.Tensor):
            module.__dict__[name] = value


def copy_inputs(inputs: Any, *, double: bool = False) -> Any:
    """Return ``inputs`` with every tensor cloned (in no graph) and every other object deep-copied.

    Objects may hold tensors of a graph, such as the keys of a cache while training. With ``double``
    floating tensors are cast to double precision.
    """
    memo: dict[int, Any] = {}
    copied = _doubled if double else _cloned

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return memo.setdefault(id(value), copied(value))
        if type(value) is object:  # which is known by its identity
            return value
        for tensor in tensors_within(value, set()):
            memo.setdefault(id(tensor), copied(tensor))
        return copy.deepcopy(value, memo)

    return pytree.tree_map(one, inputs)


def tensors_within(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object holds, in its attributes and containers, but not those of modules."""
    if isinstance(value, torch.Tensor) and not isinstance(value, fx.Proxy):
        yield value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, str, types.ModuleType, fx.Proxy)):
        return
    seen.add(id(value))
    # What a dictionary holds, and not what a subclass makes of it, which may import a library.
    held = list(dict.values(value)) if isinstance(value, dict) else []
    if isinstance(value, (list, tuple, set)):
        held += value
    held += vars(value).values() if hasattr(value, "__dict__") and not callable(value) else ()
    for entry in held:
        yield from tensors_within(entry, seen)


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
