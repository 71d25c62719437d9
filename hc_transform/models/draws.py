"""Random numbers of Python and numpy in traced code: each draw becomes a call in the graph."""

from __future__ import annotations

import importlib
import random
import sys
from typing import Any

from .state import is_generator

KEEPS_STATE = frozenset("seed getstate setstate get_state set_state shuffle default_rng set_bit_generator".split())


class Draw:
    """A function that draws from Python's or numpy's generator, under a name that generated code can use."""

    def __init__(self, home: str, name: str) -> None:
        self.home = home
        self.name = name
        self.__name__ = self.__qualname__ = f"{home.replace('.', '_')}_{name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw."""
        return getattr(importlib.import_module(self.home), self.name)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Draw:
        return self

    def __eq__(self, other: object) -> bool:
        return type(other) is Draw and (other.home, other.name) == (self.home, self.name)

    def __hash__(self) -> int:
        return hash((self.home, self.name))


def drawing_functions() -> dict[int, tuple[Draw, Any]]:
    """Return the functions of the modules ``random`` and ``numpy.random`` that draw, by their id."""
    found: dict[int, tuple[Draw, Any]] = {}
    for home in ("random", "numpy.random"):
        module = sys.modules.get(home)
        for name, function in vars(module).items() if module is not None else ():
            owner = getattr(function, "__self__", None)
            if not name.startswith("_") and name not in KEEPS_STATE and is_generator(owner):
                found[id(function)] = (Draw(home, name), function)
    return found


def shared_generators() -> list[Any]:
    """Return the generators that all code draws from: a copy of a model is to draw from them, not from copies."""
    return list({id(f.__self__): f.__self__ for _, f in drawing_functions().values()}.values())


def draw_of(value: Any, functions: dict[int, tuple[Draw, Any]]) -> Draw | None:
    """Return the draw that ``value``, perhaps another bound method of the same generator, makes."""
    if id(value) in functions:
        return functions[id(value)][0]
    owner = getattr(value, "__self__", None)
    if owner is None or not is_generator(owner):
        return None
    for draw, function in functions.values():
        if getattr(function, "__self__", None) is owner and function.__name__ == getattr(value, "__name__", None):
            return draw
    return None


def is_number(value: Any) -> bool:
    """Whether a drawn value can stand in a graph: a number, an array, or a list of numbers."""
    if isinstance(value, (list, tuple)):
        return all(is_number(v) for v in value)
    return isinstance(value, (bool, int, float, complex)) or type(value).__module__.startswith("numpy")


def host_states() -> tuple[Any, ...]:
    """Return the states of Python's and numpy's generators, to be compared."""
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.get_state()
    return random.getstate(), kind, keys.tobytes(), *rest
