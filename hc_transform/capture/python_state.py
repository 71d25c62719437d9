"""Guards on Python state: attributes, settings and globals that traced code read, checked before a graph runs.

A graph holds what the code found while it was traced. Each such value is compared on every call, at the cost of a
look into a dictionary, and in compiled code becomes one of the compiler's own guards.
"""

from __future__ import annotations

import collections
import enum
import functools
import pickle
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import DecisionChanged
from ..graphs.guards import HINT
from .code_guards import Code, CodeGuards, is_library

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
LONGEST = 64  # containers of containers with more entries are known by their length
LONGEST_PLAIN = 4096  # and those of constants
_MISSING = object()
_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Step = tuple[str, Any]  # ("attribute", name) or ("entry", key)


@dataclass(frozen=True)
class Read:
    """One value that traced code found.

    Attributes:
        home: path of the module that holds it, or ``module:`` and the name of a Python module for a global.
        steps: how to come from there to the value.
        expected: the value or function, :func:`frozen` of a container, or one of the markers :class:`Same`,
            :class:`SameEntries`, :class:`Absent`, :class:`Present`, :class:`Held`.
    """

    home: str
    steps: tuple[Step, ...]
    expected: Any

    def __str__(self) -> str:
        home = self.home.removeprefix("module:")
        return home + "".join(f".{k}" if how == "attribute" else f"[{k!r}]" for how, k in self.steps)


class Same:
    """Stands for an object that is to stay itself: a function, or one that holds settings."""


class Absent:
    """Stands for an attribute that is not there, as code that asks for it may find out later."""


class Present:
    """Stands for a parameter or buffer that is a tensor: code may ask whether it is None."""


class Held:
    """Stands for a tensor in a container, an object or a global, which a graph reads anew on every call."""


@dataclass(frozen=True)
class Count:
    """Stands for how many modules a container holds that traced code went through."""

    number: int


class SameEntries:
    """Stands for a list whose entries are to stay themselves: modules, or objects that hold settings."""


@dataclass(frozen=True)
class Frozen:
    """What a container held: its entries where all are constants, else how many."""

    kind: type
    entries: Any


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a constant that can be compared."""
    return value is None or isinstance(value, (*CONSTANTS, enum.Enum))


def _is_compiled(expected: Any) -> bool:
    """Whether compiled code checks it too; what else it reads the compiler guards itself."""
    if expected is Held:
        return False
    if expected is Absent or expected is Present or type(expected) is Count or is_plain(expected):
        return True
    if isinstance(expected, Frozen) and expected.kind in (list, tuple, slice) and type(expected.entries) is tuple:
        return len(expected.entries) <= LONGEST and all(map(_is_compiled, expected.entries))
    if not isinstance(expected, FUNCTIONS) or expected is Same or expected is SameEntries:
        return False
    if type(expected) is types.FunctionType and is_library(str(expected.__module__)):
        return False  # of torch's functions and Python's the compiler knows some as what it does not compare
    marks = getattr(expected, "__dict__", ())  # of functions that the compiler sees others in place of
    return not any(name.startswith("_torchdynamo") for name in marks)


def frozen(value: Any) -> Any:
    """Return what is to be compared of a value: itself, a :class:`Frozen` container, or None where nothing is."""
    if is_plain(value):
        return value
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        if len(value) <= LONGEST or len(value) <= LONGEST_PLAIN and all(map(is_plain, value)):
            entries = [frozen(v) for v in value]
            if all(e is not None or v is None for e, v in zip(entries, value, strict=True)):
                return Frozen(type(value), frozenset(entries) if isinstance(value, (set, frozenset)) else (*entries,))
        return Frozen(type(value), len(value))
    if isinstance(value, dict):
        return Frozen(type(value), len(value))
    if type(value) is slice and all(map(is_plain, (value.start, value.stop, value.step))):
        return Frozen(slice, (value.start, value.stop, value.step))
    if type(value).__module__ == "numpy" and not callable(value) and hasattr(value, "tobytes"):
        small = value.size <= LONGEST_PLAIN and not value.dtype.hasobject
        return Frozen(type(value), (value.shape, str(value.dtype), value.tobytes()) if small else value.shape)
    return None


def is_whole(expected: Any) -> bool:
    """Whether what :func:`frozen` returned holds all of a value, and not the lengths of some containers alone."""
    if not isinstance(expected, Frozen):
        return expected is not None
    return type(expected.entries) in (tuple, frozenset) and all(e is None or is_whole(e) for e in expected.entries)


def _as_it_was(found: Any, expected: Any) -> bool:
    """Whether a value is what was expected, by identity or, of a list of constants, at the speed of a comparison."""
    if found is expected:
        return True
    kind: Any = type(found)
    if type(expected) is Frozen and kind is expected.kind and kind in (list, tuple):
        try:
            return bool(found == kind(expected.entries))
        except (RuntimeError, ValueError, TypeError):  # tensors and arrays do not say whether they are equal
            return False
    return False


@dataclass
class PythonState:
    """The Python state that one graph was traced in.

    Args:
        reads: what its code found.
        inlined: modules whose code is part of it; hooks and forwards set on them later would not be called.
        observed: those of them whose forward hooks the graph calls.
        outdated: what has been replaced that the graph holds, so that it fits no call any more.
    """

    reads: tuple[Read, ...] = ()
    inlined: tuple[str, ...] = ()
    observed: frozenset[str] = frozenset()
    outdated: str | None = None
    _bound: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain = tuple(r for r in self.reads if _is_compiled(r.expected) and not (r.expected is Absent and r.steps[1:]))
        # For compiled code: raises DecisionChanged if a value is another one; what it reads becomes a guard.
        self.compiled = _checker(plain) if plain else None

    def __deepcopy__(self, memo: dict[int, Any]) -> PythonState:
        return PythonState(self.reads, self.inlined, self.observed, self._outdated())

    def __reduce__(self) -> Any:
        reads = tuple(r for r in self.reads if _picklable(r))
        return PythonState, (reads, self.inlined, self.observed, self._outdated())

    def _outdated(self) -> str | None:
        """Return what was replaced since this was bound: a copy would take it for what was there while tracing."""
        if self._bound is None or self.outdated is not None:
            return self.outdated
        return _replaced(*self._bound[3:])

    def bind(self, root: nn.Module) -> None:
        """Look up where the values stand, and remember the modules as they are."""
        places, slow, objects, lists, code = _places(self.reads, root)
        self._bound = (root, places, slow, _structure(self.inlined, self.observed, root), objects, lists, code)

    def change(self, root: nn.Module) -> str | None:
        """Return what is otherwise than it was, None if nothing is."""
        if self.outdated is not None:
            return self.outdated
        if self._bound is None or self._bound[0] is not root:
            self.bind(root)
        _, places, slow, structure, objects, lists, code = self._bound
        for holder, key, expected, read in places:
            value = dict.get(holder, key, _MISSING)
            if value is not expected and (type(value) is not type(expected) or value != expected):
                return _changed(read, value)
        for find, expected, read in slow:
            found = find()
            if _as_it_was(found, expected):
                continue
            value = frozen(found)
            if value is None and found is not None:
                return f"{read} is another object than while tracing"
            if type(value) is not type(expected) or value != expected:
                return _changed(read, value)
        return _replaced(structure, objects, lists, code)


def _replaced(structure: tuple[list[Any], ...], objects: list[Any], lists: list[Any], code: CodeGuards) -> str | None:  # noqa: C901  # one rule for each kind of container
    """Return which object, entry, module, forward or hook is another one than it was, None if none is."""
    modules, forwards, hooks = structure
    for holder, key, same, read in objects:
        if dict.get(holder, key, _MISSING) is not same:
            return f"{read} is another object than while tracing"
    for find, entries, read in lists:
        value = find()
        if not isinstance(value, (list, tuple)) or len(value) != len(entries):
            return f"{read} holds other entries than while tracing"
        if any(now is not was and not _are_tensors(now, was) for now, was in zip(value, entries, strict=True)):
            return f"{read} holds other entries than while tracing"
    for holder, name, module, path in modules:
        if holder.get(name) is not module:
            return f"the module {path!r}, whose code is part of the graph, was replaced"
    for module, forward, path in forwards:
        if "forward" in module.__dict__ or type(module).forward is not forward:
            return f"the forward of {path!r}, whose code is part of the graph, was replaced"
    if any(hooks):
        return "a hook was added to a module whose code is part of the graph"
    return code.change()


def _are_tensors(now: Any, was: Any) -> bool:
    return isinstance(now, torch.Tensor) and isinstance(was, torch.Tensor)


def _changed(read: Read, value: Any) -> str:
    now = "gone" if value is _MISSING else repr(value.entries if isinstance(value, Frozen) else value)
    if read.expected in (Absent, Present, Held):
        return f"{read} is {'there' if read.expected is Absent else 'no tensor'} now, as it was not while tracing"
    was = read.expected.entries if isinstance(read.expected, Frozen) else read.expected
    return f"{read} was {was!r} while tracing and is {now} now"


def _places(reads: Iterable[Read], root: nn.Module) -> tuple[list[Any], list[Any], list[Any], list[Any], CodeGuards]:  # noqa: C901  # one rule for each kind of container
    """Return where reads stand, for checks.

    Those are the entries of dictionaries, functions that find other values, objects to stay themselves, the
    dictionaries that lead to others among them, functions that find lists whose entries are to, and functions and
    methods.
    """
    places: list[Any] = []
    slow: list[Any] = []
    objects: list[Any] = []
    lists: list[Any] = []
    code = CodeGuards()
    for read in reads:
        if type(read.expected) is Code:
            value = find(read, root)
            if value is not _MISSING:
                code.add_code(value, read.expected, str(read))
            continue
        if read.expected is Absent:
            slow.append((functools.partial(find, read, root), _MISSING, read))
            continue
        if type(read.expected) is Count:
            slow.append((functools.partial(_length_of, read.home, root), read.expected.number, read))
            continue
        if read.expected is Held:
            slow.append((functools.partial(_finds_tensor, read, root), True, read))
            continue
        if read.expected is Present:
            slow.append((functools.partial(_is_tensor, read.steps[-1][1], _dictionary_of(read, root)), True, read))
            continue
        holder, key = _holder(read, root), read.steps[-1][1]
        if read.expected is SameEntries:
            found = find(read, root)
            entries = tuple(found) if isinstance(found, (list, tuple)) else ()
            lists.append((functools.partial(find, read, root), entries, read))
            continue
        if holder is not None and isinstance(read.expected, Frozen) and issubclass(read.expected.kind, dict):
            objects.append((holder, key, dict.get(holder, key), read))
        if holder is None:
            if read.expected is not Same:
                slow.append((functools.partial(find, read, root), read.expected, read))
        elif isinstance(read.expected, FUNCTIONS) and read.expected is not Same and type(holder) is dict:
            code.add(holder, key, read.expected, str(read))
        elif read.expected is Same:
            objects.append((holder, key, dict.get(holder, key), read))
        elif isinstance(read.expected, Frozen):
            slow.append((functools.partial(dict.get, holder, key, _MISSING), read.expected, read))
        else:
            places.append((holder, key, read.expected, read))
    return places, slow, objects, lists, code


def _holder(read: Read, root: nn.Module) -> dict[Any, Any] | None:
    """Return the dictionary that a value stands in, None if it is found otherwise.

    The objects on the way to it are compared by themselves, so that they can be passed through once.
    """
    try:
        owner = follow(_home(read.home, root), read.steps[:-1])
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    how, key = read.steps[-1]
    holder = owner if how == "entry" else getattr(owner, "__dict__", None)
    if how == "attribute" and hasattr(getattr(type(owner), str(key), None), "__set__"):
        return None  # a property goes before
    return holder if isinstance(holder, dict) and dict.__contains__(holder, key) else None


def read_held(attributes: dict[str, Any], *steps: Step) -> Any:
    """Return what a module holds in a container or an object; the first step is into its attributes."""
    return follow(attributes, steps)


class GlobalTensor:
    """Reads a tensor that a global or an attribute of a class is or holds, under a name that generated code can use.

    Args:
        home: the name of a Python module, or a class.
        steps: how to come from there to the tensor.
    """

    def __init__(self, home: str | type, steps: tuple[Step, ...]) -> None:
        self.home, self.steps = home, steps
        self.__name__ = self.__qualname__ = f"global_{steps[0][1]}"

    def __call__(self) -> Any:
        """Return the tensor that is there now."""
        return follow(sys.modules[self.home] if isinstance(self.home, str) else self.home, self.steps)

    def __eq__(self, other: object) -> bool:
        return type(other) is GlobalTensor and (self.home, self.steps) == (other.home, other.steps)

    def __hash__(self) -> int:
        return hash((self.home, self.steps))


def home_of_global(read: Read, root: nn.Module) -> str | type | None:
    """Return the Python module or the class that holds what was read, None if a module of ``root`` does."""
    if read.home.startswith("module:"):
        return read.home.removeprefix("module:")
    module, name = root.get_submodule(read.home), read.steps[0][1]
    if name in module.__dict__:
        return None
    return next((cls for cls in type(module).__mro__ if name in vars(cls)), None)


def find(read: Read, root: nn.Module) -> Any:
    """Return what stands where a value was read; ``_MISSING`` if nothing does."""
    try:
        return follow(_home(read.home, root), read.steps)
    except (AttributeError, KeyError, IndexError, TypeError):
        return _MISSING


def _finds_tensor(read: Read, root: nn.Module) -> bool:
    return isinstance(find(read, root), torch.Tensor)


def _dictionary_of(read: Read, root: nn.Module) -> dict[str, Any]:
    """Return which of a module's dictionaries holds a tensor."""
    module, name = _home(read.home, root), read.steps[-1][1]
    return next((d for d in (module._parameters, module._buffers, module.__dict__) if name in d), {})


def _length_of(path: str, root: nn.Module) -> int | None:
    try:
        return len(root.get_submodule(path)._modules)
    except AttributeError:
        return None


def _is_tensor(name: str, holder: dict[str, Any]) -> bool:
    return holder.get(name) is not None


def _home(home: str, root: nn.Module) -> Any:
    if home.startswith("module:"):
        return sys.modules[home.removeprefix("module:")]
    return root.get_submodule(home)


def follow(value: Any, steps: Iterable[Step]) -> Any:
    """Return what steps lead to from ``value``."""
    for how, key in steps:
        value = getattr(value, key) if how == "attribute" else value[key]
    return value


def _structure(inlined: Iterable[str], observed: frozenset[str], root: nn.Module) -> tuple[list[Any], ...]:
    """Return what tells that modules are the same, run the same code and have no hooks that would be missed."""
    modules, forwards, hooks = [], [], []
    for path in inlined:
        if not path:
            continue
        parent, _, name = path.rpartition(".")
        try:
            module = root.get_submodule(path)
        except AttributeError:
            continue  # not part of this copy
        modules.append((root.get_submodule(parent)._modules, name, module, path))
        if "forward" not in module.__dict__:
            forwards.append((module, type(module).forward, path))
        hooks += [getattr(module, registry) for registry in _HOOKS]
        if path not in observed:
            hooks.append(module._forward_hooks)
    return modules, forwards, hooks


def _picklable(read: Read) -> bool:
    try:
        pickle.dumps(read)
    except Exception:  # noqa: BLE001  # a function that has no name, or an object of the user's that does not pickle
        return False
    return not read.home.startswith("module:__main__")


@functools.lru_cache(maxsize=1024)
def _checker(reads: tuple[Read, ...]) -> Callable[[nn.Module], None]:
    """Return code that checks reads one by one, its constants in its text, so that equal blocks share it."""
    namespace: dict[str, Any] = {"DecisionChanged": DecisionChanged}
    lines = ["def check(root):"]
    for read in reads:
        test, now = _test(read, namespace)
        if test is not None:
            message = f"{read} {now} now, as it was not while tracing. {HINT}"
            lines.append(f"    if {test}: raise DecisionChanged({message!r})")
    exec(compile("\n".join([*lines, "    return None"]), "<hc_transform>", "exec"), namespace)
    check: Callable[[nn.Module], None] = namespace["check"]
    return check


def _test(read: Read, namespace: dict[str, Any]) -> tuple[str | None, str]:
    """Return the text of a test whether a value is another one, None if there can be none, and what it is then."""
    expected, text = read.expected, _expression(read, namespace)
    if text is None or expected != expected:
        return None, ""
    owner = _expression(replace(read, steps=read.steps[:-1]), namespace)
    if expected is Absent:
        return f"hasattr({owner}, {read.steps[-1][1]!r})", "is there"
    if isinstance(expected, Count):
        return f"len({owner}) != {expected.number}", "holds other modules"
    if expected is Present:
        return f"{text} is None", "is None"
    if expected is None:
        return f"{text} is not None", "is something"
    name = f"constant_{len(namespace)}"
    if isinstance(expected, FUNCTIONS):
        namespace[name] = expected
        return f"{text} is not {name}", "is another function"
    if isinstance(expected, (complex, enum.Enum, Frozen)) or str(type(expected).__module__) == "torch":
        namespace[name] = _thawed(expected)
        return f"{text} != {name}", "is something else"
    return f"{text} != {expected!r}", f"is not {expected!r}"


def _thawed(expected: Any) -> Any:
    """Return the value that was frozen."""
    if not isinstance(expected, Frozen):
        return expected
    entries = map(_thawed, expected.entries)
    return slice(*entries) if expected.kind is slice else expected.kind(entries)


def _expression(read: Read, namespace: dict[str, Any]) -> str | None:
    """Return the text that reads a value from ``root``."""
    if read.home.startswith("module:"):
        text = f"module_{len(namespace)}"
        namespace[text] = sys.modules[read.home.removeprefix("module:")]
    else:
        text = "root"
        for atom in read.home.split(".") if read.home else ():
            text = f"{text}.{atom}" if atom.isidentifier() else f"getattr({text}, {atom!r})"
    for how, key in read.steps:
        if how == "attribute":
            text = f"{text}.{key}" if str(key).isidentifier() else f"getattr({text}, {key!r})"
        elif isinstance(key, (str, int)):
            text = f"{text}[{key!r}]"
        else:
            return None
    return text
