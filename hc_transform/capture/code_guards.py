"""Guards on code: functions, and the methods of classes, that traced code called and that may be replaced later.

Many functions are looked up in one dictionary each, so that they are compared together, at the speed of C.
"""

from __future__ import annotations

import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

LIBRARIES = frozenset({"torch", "numpy", "einops", "builtins", "hc_transform", *sys.stdlib_module_names})
SPECIAL = frozenset({"forward", "__call__", "__getitem__", "__getattr__"})  # that code calls without a mention
_METHODS = (types.FunctionType, classmethod, staticmethod, property)


def is_library(name: str) -> bool:
    """Whether a module is of a library, whose code is not the user's."""
    return name.partition(".")[0] in LIBRARIES


@dataclass(frozen=True)
class Code:
    """Stands for the methods of an object or a class that are to stay themselves.

    Attributes:
        names: of the methods.
        of_class: those of them that the object itself has no attribute in place of.
    """

    names: tuple[str, ...]
    of_class: frozenset[str] = frozenset()


def code_of(value: Any, mentioned: frozenset[str] | set[str]) -> Code | None:
    """Return what stands for the methods of ``value`` whose names code mentions, None if there are none."""
    names = {name for _, found in _methods(value, (mentioned | SPECIAL)) for name in found}
    if not names:
        return None
    own = getattr(value, "__dict__", {}) if isinstance(value, nn.Module) else names
    return Code(tuple(sorted(names)), frozenset(n for n in names if n not in own and n not in SPECIAL))


def _methods(value: Any, names: Iterable[str]) -> Iterator[tuple[type, list[str]]]:
    """Yield the classes of the user's that a value is of, with the names of the methods that each defines."""
    for cls in (value if inspect.isclass(value) else type(value)).__mro__:
        if not is_library(cls.__module__):
            found = sorted(name for name in names if isinstance(vars(cls).get(name), _METHODS))
            if found:
                yield cls, found


class CodeGuards:
    """Compare functions and methods with those that were there."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, dict[Any, tuple[Any, str]]]] = {}  # by the dictionary they are in
        self._defaults: list[tuple[Any, Any, Any]] = []
        self._own: list[tuple[Any, frozenset[str], str]] = []
        self._compared: list[tuple[Callable[[Any], Any], Any, Any]] | None = None

    def add(self, holder: Any, key: Any, expected: Any, title: str) -> None:
        """Have an entry of a plain dictionary compared."""
        self._found.setdefault(id(holder), (holder, {}))[1][key] = expected, title
        self._add_defaults(expected)

    def _add_defaults(self, function: Any) -> None:
        """Have the defaults of a function of the user's compared."""
        function = getattr(function, "__func__", function)
        if type(function) is types.FunctionType and not is_library(str(function.__module__)):
            if function.__defaults__ or function.__kwdefaults__:
                self._defaults.append((function, function.__defaults__, function.__kwdefaults__))

    def add_code(self, value: Any, code: Code, title: str) -> None:
        """Have the methods of a value's class compared, and its own attributes that would go before them."""
        for cls, names in _methods(value, code.names):
            held: Mapping[str, Any] = vars(cls)
            for name in names:
                self._found.setdefault(id(cls), (held, {}))[1][name] = held[name], f"{cls.__qualname__}.{name}"
                self._add_defaults(held[name])
        if code.of_class:
            self._own.append((value.__dict__.keys(), code.of_class, title))

    def change(self) -> str | None:
        """Return what is another one than it was, None if nothing is."""
        if self._compared is None:
            self._compared = [_together(holder, entries) for holder, entries in self._found.values()]
        for get, holder, expected in self._compared:
            try:
                if get(holder) != expected:
                    return self._first()
            except KeyError:
                return self._first()
        for function, defaults, by_name in self._defaults:
            if function.__defaults__ is not defaults or function.__kwdefaults__ is not by_name:
                return f"{function.__qualname__} has other defaults than while tracing"
        for keys, names, title in self._own:
            if not keys.isdisjoint(names):
                return f"{title} has {min(names.intersection(keys))!r} of its own now, as it had not while tracing"
        return None

    def _first(self) -> str:
        for holder, entries in self._found.values():
            for key, (expected, title) in entries.items():
                if key not in holder or holder[key] is not expected:
                    return f"{title} is another function than while tracing"
        return "a function is another one than while tracing"


def _together(holder: Any, entries: dict[Any, tuple[Any, str]]) -> tuple[Callable[[Any], Any], Any, Any]:
    keys = [*entries, *list(entries)[:1]]  # two at least, so that a tuple comes
    return operator.itemgetter(*keys), holder, tuple(entries[key][0] for key in keys)
