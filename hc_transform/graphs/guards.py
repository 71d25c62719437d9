"""Decisions taken while tracing, checked again on every call.

Each check is a node of the traced graph. It costs one comparison of Python numbers in eager mode
and nothing in compiled code, where it becomes one of the compiler's own guards.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from ..errors import DecisionChanged

HINT = (
    "The model was traced on the other answer. Convert it with example inputs of this kind, or call "
    "it once in eager mode with them: it is then traced again with the same connections."
)


def check_true(value: Any, where: str) -> None:
    """Raise DecisionChanged unless ``value`` is true, as it was when ``where`` was traced."""
    if not value:
        raise DecisionChanged(f"a condition that was true while tracing is false now, at {where}. {HINT}")


def check_false(value: Any, where: str) -> None:
    """Raise DecisionChanged unless ``value`` is false, as it was when ``where`` was traced."""
    if value:
        raise DecisionChanged(f"a condition that was false while tracing is true now, at {where}. {HINT}")


def check_equal(value: Any, expected: Any, where: str) -> None:
    """Raise DecisionChanged unless ``value`` equals what it was when ``where`` was traced."""
    if value != expected:
        raise DecisionChanged(f"a value that was {expected!r} while tracing is {value!r} now, at {where}. {HINT}")


def check_len(value: Any, expected: int, where: str) -> None:
    """Raise DecisionChanged unless ``value`` has as many items as when ``where`` was traced."""
    length = 0 if value is None else len(value)  # None stands for a default that is a container
    if length != expected:
        raise DecisionChanged(f"{expected} items while tracing, {length} now, at {where}. {HINT}")


def check_input(value: Any, expected: Any, name: str) -> None:
    """Raise DecisionChanged unless the input ``name`` is the constant that it was while tracing."""
    kind: Any = tuple if type(value) is torch.Size else type(value)  # as a graph holds sizes
    if value is not expected and (value is None or expected is None or kind is not type(expected) or value != expected):
        shown = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
        raise DecisionChanged(f"input {name!r} was {expected!r} while tracing and is {shown} now. {HINT}")


def check_tensor_input(value: Any, name: str) -> None:
    """Raise DecisionChanged if the input ``name``, given while tracing, is left out now."""
    if value is None:
        raise DecisionChanged(f"input {name!r} was given while tracing and is None now. {HINT}")


def check_object(value: Any, expected: int, default: str, name: str) -> None:
    """Raise DecisionChanged unless the input ``name`` is the object that it was while tracing.

    Args:
        value: of the input.
        expected: the object's ``id``.
        default: what stands for it where it is left out; "" if it is not the default.
        name: of the input.
    """
    if id(value) != expected and not (default and value == default):
        raise DecisionChanged(f"input {name!r} is another object than while tracing. {HINT}")


def check_kind(value: Any, expected: str, default: bool, name: str) -> None:
    """Raise DecisionChanged unless the input ``name`` is of the class, or the function, that it was while tracing.

    None stands for a ``default`` that no code can name.
    """
    if kind_of(value) != expected and not (default and value is None):
        raise DecisionChanged(f"input {name!r} was a {expected} while tracing and is a {kind_of(value)} now. {HINT}")


def kind_of(value: Any) -> str:
    """Return what tells a class or a function from others."""
    if isinstance(value, types.FunctionType):
        return f"function {value.__qualname__}, line {value.__code__.co_firstlineno}"
    return type(value).__qualname__


def check_attribute(value: Any, name: str, there: bool, where: str) -> None:
    """Raise DecisionChanged unless it is still ``there``, or not, that ``value`` has the attribute ``name``."""
    if hasattr(value, name) is not there:
        now = "has none" if there else "has one"
        raise DecisionChanged(f"an object whose attribute {name!r} was asked for {now} now, at {where}. {HINT}")


def check_same(value: Any, other: Any, names: str) -> None:
    """Raise DecisionChanged unless two inputs are one and the same object, as they were while tracing."""
    if value is not other:
        raise DecisionChanged(f"inputs {names} were the same tensor while tracing and are two now. {HINT}")


def check_keys(value: Any, expected: tuple[Any, ...], where: str) -> None:
    """Raise DecisionChanged unless ``value`` has the keys that it had when ``where`` was traced."""
    keys = () if value is None else tuple(value)  # None stands for a default that is a container
    if keys != tuple(expected):
        raise DecisionChanged(f"keys {tuple(expected)} while tracing, {keys} now, at {where}. {HINT}")


CHECKS = frozenset(
    {
        check_attribute,
        check_equal,
        check_false,
        check_input,
        check_keys,
        check_kind,
        check_len,
        check_object,
        check_same,
        check_tensor_input,
        check_true,
    }
)
