"""Which modules may hold residual adds, judged by their code before anything is traced."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn

ADD_NAMES = frozenset(
    "add add_ iadd __add__ __radd__ __iadd__ sum sub sub_ isub rsub subtract subtract_ __sub__ __rsub__ __isub__ lerp "
    "lerp_ addcmul addcmul_ addcdiv addcdiv_ addmm addmm_ addmv addmv_ addr addr_ addbmm addbmm_ baddbmm baddbmm_ "
    "index_add index_add_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ scatter scatter_ index_put "
    "index_put_".split()
)
ADD_OPERATORS = frozenset({"+", "+=", "-", "-="})
ADD_INSTRUCTIONS = frozenset({"BINARY_ADD", "INPLACE_ADD", "BINARY_SUBTRACT", "INPLACE_SUBTRACT"})
INLINED_FROM_TORCH = ("torch.nn.modules.container", "torch.nn.modules.transformer")


def candidates(model: nn.Module) -> frozenset[str]:
    """Return the paths of the modules whose own code adds, and of those that hold one ("" is the root)."""
    found = {""}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and may_add(module):
            found |= with_parents(path)
    return frozenset(found)


def with_parents(path: str) -> set[str]:
    """Return a module's path and those of the modules around it."""
    atoms = path.split(".")
    return {".".join(atoms[: i + 1]) for i in range(len(atoms))}


def may_add(module: nn.Module) -> bool:
    """Whether the module's own code may hold an add."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    own = module.__dict__.get("forward")
    if own is not None and _adds(getattr(own, "__func__", own)):
        return True
    if any(map(_is_an_add, module.__dict__.values())):
        return True  # a function that the module was given to call
    cls: Any = type(module)
    return _class_adds(cls)


@functools.cache
def _class_adds(cls: type) -> bool:
    module = cls.__module__ or ""
    if module.startswith(("torch.nn.", "torch.ao.")) and not module.startswith(INLINED_FROM_TORCH):
        return False
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            continue
        if base.__module__.startswith("torch.nn.modules") and not base.__module__.startswith(INLINED_FROM_TORCH):
            continue
        for name, member in vars(base).items():
            if name not in ("__init__", "extra_repr", "__repr__") and _adds(inspect.unwrap(_function_of(member))):
                return True
    return False


def _function_of(member: Any) -> Any:
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    return member.fget if isinstance(member, property) else member


def _is_an_add(value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType):
        return value.__name__ in ADD_NAMES
    return isinstance(value, (FunctionType, functools.partial)) and _adds(value)


def _adds(function: Any, depth: int = 2) -> bool:
    """Whether a function's bytecode, or that of a plain function it calls, holds an addition or a subtraction."""
    if isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, FunctionType):
        return False
    for code in _code_objects(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ADD_INSTRUCTIONS:
                return True
            if instruction.opname == "BINARY_OP" and instruction.argrepr in ADD_OPERATORS:
                return True
        if ADD_NAMES.intersection(code.co_names):
            return True
        if depth:
            called = (function.__globals__.get(name) for name in code.co_names)
            if any(
                isinstance(f, FunctionType) and not f.__module__.startswith("torch.") and _adds(f, depth - 1)
                for f in called
            ):
                return True
    return False


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_objects(constant)
