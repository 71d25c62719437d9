"""What traced code reads and writes beside tensors: attributes, settings, globals.

Reads become guards (:mod:`hc_transform.capture.python_state`). What a graph would not do again, such as counting in an
attribute or collecting in a list, keeps the module that does it whole.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..graphs.source_lines import INTERNAL_FILES
from ..models.state import (
    CONTAINERS,
    Contents,
    closure_of,
    is_array,
    is_generator,
    is_state,
    mutable_defaults,
    slots_of,
    state_of,
)
from .code_guards import Code, code_of, is_library
from .python_state import (
    FUNCTIONS,
    LONGEST,
    Absent,
    Held,
    Read,
    Same,
    SameEntries,
    Step,
    find,
    frozen,
    is_plain,
    is_whole,
)

LARGEST_TENSOR = 1 << 20  # entries of a tensor whose values are compared
_DisableTorchFunction: Any = torch._C.DisableTorchFunction  # so that what is looked at is not traced
Key = tuple[str, str]  # (path of a module, name of an attribute)
DEEPEST = 3  # objects within objects that are compared
DEEPEST_READ = 6  # and whose fields traced code may read
LARGEST = 1000  # entries of a dictionary that are looked at


class Watch:
    """Watch the code that is traced.

    Args:
        root: the module that is traced.
        is_on: whether traced code is running now, in this thread.
        where: the path of the module whose code is running.
    """

    def __init__(self, root: nn.Module, is_on: Callable[[], bool], where: Callable[[], str]) -> None:
        self.root = root
        self.is_on = is_on
        self.where = where
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.reads: dict[Key, Any] = {}
        self.writes: dict[Key, str] = {}  # with the module whose code wrote first
        self.closures: dict[Key, tuple[Any, Any, str]] = {}  # as they were, and who read them
        self.shared = SharedState(root, is_on, where)
        self.names = self.shared.names
        self._held: dict[int, Read] = {}  # by the tensors' ids
        self._looked_at: tuple[int, ...] | None = None

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """Note that traced code read an attribute of a module."""
        path = self.paths.get(id(module))
        if path is None or name == "training" or not is_state(name) or name.startswith("__"):
            return
        if isinstance(value, (nn.Module, torch.Tensor, fx.Proxy, types.MethodType)):
            if isinstance(value, torch.Tensor) or name not in module.__dict__ or isinstance(value, nn.Module):
                return
        cls: Any = type(module)
        key = (path, name)
        if key not in self.reads and key not in self.writes and not _is_property(cls, name):
            self.reads[key] = value
            if closure_of(value):
                self.closures[key] = value, _fingerprint(value, 0), self.where()

    def write(self, module: nn.Module, name: str) -> None:
        """Note that traced code sets an attribute of a module."""
        path = self.paths.get(id(module))
        if path is not None and name != "training" and is_state(name):
            self.writes.setdefault((path, name), self.where())

    def changed_closures(self) -> Iterator[tuple[str, str]]:
        """Yield who changed what a function in an attribute closes over, and the name of the attribute."""
        for (_, name), (function, before, where) in self.closures.items():
            if _fingerprint(function, 0) != before:
                yield where, name

    # -- what was read

    def held_at(self, tensor: torch.Tensor) -> Read | None:
        """Return where a tensor stands that traced code came by through what it read, None if it made it."""
        seen = len(self.reads), len(self.names), len(self.shared.seen)
        if seen != self._looked_at:
            self._looked_at = seen
            places = ((id(find(read, self.root)), read) for read in self.guards() if read.expected is Held)
            self._held = dict(places)
        return self._held.get(id(tensor))

    def guards(self) -> tuple[Read, ...]:
        """Return a guard for everything that was read."""
        found: dict[tuple[Any, ...], Read] = {}
        for (path, name), value in self.reads.items():
            for read in self._guards_of(path, (("attribute", name),), value, 0):
                found.setdefault(_place_of(read), read)
        for read in (*self._guards_of_shared(), *self.shared.functions_of_modules()):
            found.setdefault(_place_of(read), read)
        return tuple(found.values())

    def _guards_of_shared(self) -> Iterator[Read]:
        """Yield guards on globals and on attributes of classes."""
        for shared in self.shared.seen.values():
            space: Any = shared.owner
            if isinstance(space, type) and self._is_read_from_its_class(shared):
                yield from self._guards_of(str(shared.where), (("attribute", shared.name),), shared.value, 0)
            if isinstance(space, type) or shared.where is None:
                continue
            home = str(space.get("__name__", ""))
            if getattr(sys.modules.get(home), "__dict__", None) is not space or is_library(home):
                continue
            name, value = shared.name, shared.value
            if isinstance(value, FUNCTIONS) and not inspect.isclass(value):
                value = shared.now()  # for which something else may have stood while code was traced
            yield from self._guards_of(f"module:{home}", (("attribute", name),), value, 0)

    def _is_read_from_its_class(self, shared: _Shared) -> bool:
        """Whether code may have read an attribute of a module's class otherwise than from the module."""
        if shared.name not in self.names or shared.where is None:
            return False
        return shared.name not in self.root.get_submodule(shared.where).__dict__

    def methods(self, inlined: Iterable[str], model: nn.Module) -> Iterator[Read]:
        """Yield a guard on the methods of each module of ``model`` whose code was traced."""
        for path in inlined:
            with contextlib.suppress(AttributeError):  # within what a graph made
                code = code_of(model.get_submodule(path), self.names)
                if code is not None:
                    yield Read(path, (), code)

    def _guards_of(self, home: str, steps: tuple[Step, ...], value: Any, depth: int) -> Iterator[Read]:  # noqa: C901  # one guard for each kind of value
        if value is Absent:
            yield Read(home, steps, Absent)
            return
        if isinstance(value, nn.Module):
            yield from self._guards_of_module(home, steps, value)
            return
        if isinstance(value, torch.Tensor) and not isinstance(value, fx.Proxy):
            if not any(str(key).startswith("__") for _, key in steps):  # what functions close over
                yield Read(home, steps, Held)
            return
        if isinstance(value, fx.Proxy) or is_generator(value):
            return
        if isinstance(value, types.ModuleType):
            if depth == 0 and not is_library(value.__name__):
                yield from self._named_in(home, steps, vars(value), "attribute", depth)
            return
        if inspect.isclass(value):
            if not is_library(value.__module__) and not issubclass(value, (nn.Module, BaseException)):
                code = code_of(value, self.names)
                if code is not None:
                    yield Read(home, steps, code)
                yield from self._named_in(home, steps, vars(value), "attribute", depth)
            if not home.startswith("module:"):
                yield Read(home, steps, Same)
            return
        expected = frozen(value)
        if is_plain(value):
            yield Read(home, steps, expected)
            return
        if isinstance(value, dict):
            yield Read(home, steps, expected)
            if depth < DEEPEST_READ and len(value) <= LARGEST:
                for key, entry in dict.items(value):
                    if isinstance(key, (str, int)) and isinstance(entry, FUNCTIONS) and type(value) is dict:
                        yield Read(home, (*steps, ("entry", key)), entry)
                    elif isinstance(key, (str, int)) and (is_plain(entry) or not isinstance(entry, FUNCTIONS)):
                        yield from self._guards_of(home, (*steps, ("entry", key)), entry, depth + 1)
            return
        if isinstance(value, (list, tuple)) and not is_whole(expected) and len(value) <= LONGEST:
            yield Read(home, steps, SameEntries)
            for place, entry in enumerate(value) if depth < DEEPEST_READ else ():
                yield from self._guards_of(home, (*steps, ("entry", place)), entry, depth + 1)
            return
        if expected is not None:
            yield Read(home, steps, expected)
            return
        yield Read(home, steps, value if isinstance(value, FUNCTIONS) else Same)
        if depth < DEEPEST_READ:
            for further, held in _held_by(value):
                yield from self._guards_of(home, (*steps, *further), held, depth + 1)
        fields = _fields_of(value)
        if fields is not None and not isinstance(value, FUNCTIONS) and not _is_torch(type(value).__module__):
            cls: Any = type(value)
            serves = hasattr(cls, "__getattr__")  # what it holds under other names
            yield from self._named_in(home, steps, fields, "attribute", depth, fields if serves else self.names)
            own = not is_library(cls.__module__) or cls is types.SimpleNamespace
            code = code_of(value, self.names) if own else None
            if code is not None:
                yield Read(home, steps, code)
            if own and not serves and depth < DEEPEST_READ:
                for name in sorted(n for n in self.shared.asked if n not in fields and not hasattr(cls, n)):
                    yield Read(home, (*steps, ("attribute", name)), Absent)
            of_class = {n: getattr(value, n) for n in self.names if _is_setting(cls, n) and n not in fields}
            yield from self._named_in(home, steps, of_class, "attribute", depth)

    def _guards_of_module(self, home: str, steps: tuple[Step, ...], module: nn.Module) -> Iterator[Read]:
        """Yield guards on a module that is none of the model's: a global, or in a list that no module registers."""
        if id(module) not in self.paths:
            if steps[-1][0] == "attribute":
                yield Read(home, steps, Same)
            for name, value in module.__dict__.items():
                if is_state(name) and is_plain(value):
                    yield Read(home, (*steps, ("attribute", name)), value)

    def _named_in(  # noqa: PLR0913  # where it stands, and what of it
        self, home: str, steps: tuple[Step, ...], fields: Any, how: str, depth: int, names: Iterable[str] | None = None
    ) -> Iterator[Read]:
        if depth < DEEPEST_READ:
            for name in sorted(n for n in (self.names if names is None else names) if n in fields):
                if not name.startswith("__") and not isinstance(fields[name], FUNCTIONS):
                    yield from self._guards_of(home, (*steps, (how, name)), fields[name], depth + 1)
                elif type(fields) is dict and isinstance(fields[name], FUNCTIONS):  # of an object, not of a class
                    yield Read(home, (*steps, (how, name)), fields[name])


def _place_of(read: Read) -> tuple[Any, ...]:
    return read.home, read.steps, type(read.expected) is Code


def _fields_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, those in slots too; None if it has none."""
    fields, slots = getattr(value, "__dict__", None), slots_of(value)
    if not isinstance(fields, dict) and not slots:
        return None
    return {**(fields if isinstance(fields, dict) else {}), **slots}


def _held_by(value: Any) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """Yield what a method, a partial function or a closure holds beside its code, and how to come there."""
    if isinstance(value, types.MethodType):
        yield (("attribute", "__self__"),), value.__self__
    elif isinstance(value, functools.partial):
        for name in ("func", "args", "keywords"):
            yield (("attribute", name),), getattr(value, name)
    elif _keeps_values(value):
        for place, default in enumerate(value.__defaults__ or ()):
            if isinstance(default, CONTAINERS):
                yield (("attribute", "__defaults__"), ("entry", place)), default
        for name, default in (value.__kwdefaults__ or {}).items():
            if isinstance(default, CONTAINERS):
                yield (("attribute", "__kwdefaults__"), ("entry", name)), default
        cells: Any = value.__closure__
        for place, cell in enumerate(cells or ()):
            with contextlib.suppress(ValueError):  # an empty one
                yield (
                    (("attribute", "__closure__"), ("entry", place), ("attribute", "cell_contents")),
                    cell.cell_contents,
                )


class SharedState:
    """Globals and attributes of classes that code which runs mentions, as they were when it first did.

    Args:
        root: the module that is run.
        is_on: whether what runs now counts.
        where: the path of the module whose code is running.
    """

    def __init__(self, root: nn.Module, is_on: Callable[[], bool], where: Callable[[], str]) -> None:
        self.is_on = is_on
        self.where = where
        self.names: set[str] = set()  # that the code mentions
        self.asked: set[str] = set()  # those that it mentions as strings
        self.seen: dict[tuple[int, str], _Shared] = {}
        self._codes: dict[int, types.CodeType] = {}  # that ran, by their ids
        self._counted: set[int] = set()  # ids of those that count
        self._chains: dict[tuple[int, tuple[str, ...]], Mapping[str, Any]] = {}  # functions of modules, as F.gelu
        self._packages: set[str] = set()  # that the model's own classes are of
        for path, module in root.named_modules():
            for cls in type(module).__mro__:
                self._packages.add(cls.__module__.partition(".")[0])
                if not is_library(cls.__module__) and (id(cls), "") not in self.seen:
                    self.seen[id(cls), ""] = _Shared(cls, "__dict__", f"a class attribute of {cls.__name__}", path)
                    for name in [n for n, v in vars(cls).items() if _is_data(n, v) or mutable_defaults(v)]:
                        self.seen[id(cls), name] = _Shared(cls, name, f"{cls.__name__}.{name}", path)

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """Watch the code that this thread runs; what others hang on the collector of garbage is none of it."""
        before, collects = sys.getprofile(), gc.isenabled()
        gc.disable()
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            _profile_on(before)
            if collects:
                gc.enable()

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if id(code) in self._codes and (id(code) in self._counted or not self.is_on()):
            return
        self._codes[id(code)], counts = code, self.is_on()
        if counts:
            self._counted.add(id(code))
        if code.co_filename.startswith(INTERNAL_FILES) or self._is_of_a_library(code, frame.f_globals):
            return
        space, where = frame.f_globals, self.where() if counts else None
        if counts:
            asks = not {"getattr", "hasattr"}.isdisjoint(code.co_names)
            asked = [c for c in code.co_consts if type(c) is str and c.isidentifier()] if asks else []
            self.asked.update(asked)  # getattr(x, "name", default)
            self.names.update(code.co_names, asked)
            self._chains.update(((id(space), chain), space) for chain in _chains_of(code))
        for name in _globals_of(code):
            if name in space and not name.startswith("__") and name != "type":  # which a trace sets itself
                shared = self.seen.get((id(space), name))
                if shared is None:
                    self.seen[id(space), name] = _Shared(space, name, name, where)
                elif shared.where is None:
                    shared.where = where

    def _is_of_a_library(self, code: types.CodeType, space: Mapping[str, Any]) -> bool:
        """Whether code is of an installed package that the model is not of: its caches are its own affair."""
        name = str(space.get("__name__"))
        installed = "site-packages" in code.co_filename and name.partition(".")[0] not in self._packages
        return installed or is_library(name)

    def functions_of_modules(self) -> Iterator[Read]:
        """Yield a guard on each function that code found in a module, as ``F.gelu``."""
        for (_, (first, *names)), space in self._chains.items():
            owner = space.get(first)
            for name in names:
                if not isinstance(owner, types.ModuleType) or sys.modules.get(owner.__name__) is not owner:
                    break
                value = vars(owner).get(name)
                if callable(value):
                    expected = value if isinstance(value, FUNCTIONS) else Same
                    yield Read(f"module:{owner.__name__}", (("attribute", name),), expected)
                owner = value

    def put_back(self) -> list[tuple[str, str]]:
        """Put back what code changed; return which module's code that counts did, and that as a reason."""
        changed = [was for was in self.seen.values() if was.changed()]
        for was in changed:
            if isinstance(was.owner, type) and not self.names.intersection(was.put_back()):
                was.where = None  # the code of a module that stays whole did
            else:
                was.put_back()
        reason = "its code changes {!r}, which a graph would not"
        return [(was.where, reason.format(was.title)) for was in changed if was.where is not None]


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Do not watch what this thread runs meanwhile; a profiler of the user's goes on."""
    before = sys.getprofile()
    watched = isinstance(getattr(before, "__self__", None), SharedState)
    if watched:
        sys.setprofile(None)
    try:
        yield
    finally:
        if watched:
            sys.setprofile(before)


def _profile_on(before: Any) -> None:
    """Let a profiler go on; one that is written in C, as cProfile, is no function and begins again by itself."""
    if before is None or callable(before):
        sys.setprofile(before)
    else:
        before.enable()


@contextlib.contextmanager
def shared_state_restored(model: nn.Module) -> Iterator[None]:
    """Put back the globals and attributes of classes that a run of ``model`` changes."""
    shared = SharedState(model, lambda: True, lambda: "")
    try:
        with shared.profiled():
            yield
    finally:
        shared.put_back()


class _Shared:
    """A global or an attribute of a class, as it was when code that may change it began to run."""

    def __init__(self, owner: Any, name: str, title: str, where: str | None) -> None:
        self.owner, self.name, self.title, self.where = owner, name, title, where
        self.value = None if name == "__dict__" else self.now()
        self.names = set(vars(owner)) if name == "__dict__" else set()
        self.contents = Contents()
        self.fingerprint: Any = None
        if _is_value(self.value) or _keeps_values(self.value):
            with contextlib.suppress(Exception), _DisableTorchFunction():  # an object that does not let itself be seen
                self.contents.save(self.value)
                self.fingerprint = _fingerprint(self.value, 0)
        self.version = _version_of(self.value)

    def now(self) -> Any:
        """Return what stands there."""
        return self.owner.get(self.name) if isinstance(self.owner, dict) else vars(self.owner).get(self.name)

    def changed(self) -> bool:
        """Whether it is another value now, or holds something else."""
        if self.name == "__dict__":
            return bool({n for n, v in vars(self.owner).items() if _is_data(n, v)} - self.names)
        now = self.now()
        if now is not self.value:
            return any(is_plain(value) or _is_value(value) for value in (now, self.value))
        if self.fingerprint is None:
            return False
        with _DisableTorchFunction():
            return _version_of(now) != self.version or bool(_fingerprint(now, 0) != self.fingerprint)

    def put_back(self) -> set[str]:
        """Make it what it was; return the names that stand for something else then."""
        if self.name == "__dict__":
            new = {n for n, v in vars(self.owner).items() if _is_data(n, v)} - self.names
            for name in new:
                delattr(self.owner, name)
            return new
        for undo in self.contents.undo:
            undo()
        if isinstance(self.owner, dict):
            self.owner[self.name] = self.value
        else:
            setattr(self.owner, self.name, self.value)
        return {self.name}


def is_mutable(value: Any) -> bool:
    """Whether a value is a container or an object of the user's that code may change."""
    if isinstance(value, CONTAINERS) or is_generator(value) or is_array(value):
        return True
    if isinstance(value, (*FUNCTIONS, types.ModuleType, types.MethodType, nn.Module, torch.Tensor)):
        return False
    home = type(value).__module__
    own = home in ("types", "argparse") or not is_library(home)
    return own and (type(getattr(value, "__dict__", None)) is dict or bool(slots_of(value)))


def _is_value(value: Any) -> bool:
    """Whether a global or an attribute of a class is a value that code may replace."""
    return is_mutable(value) or isinstance(value, (torch.Tensor, fx.Proxy))


def _keeps_values(value: Any) -> bool:
    """Whether a function closes over variables, or has defaults that it may change."""
    return bool(closure_of(value) or mutable_defaults(value))


def _is_data(name: str, value: Any) -> bool:
    if name.startswith("__"):
        return False
    return is_plain(value) or isinstance(value, (*CONTAINERS, torch.Tensor, fx.Proxy)) or is_generator(value)


def differing_state(before: Any, after: Any) -> bool:
    """Whether a value that a module holds was changed while its copy was traced."""
    try:
        return bool(_fingerprint(before, 0) != _fingerprint(after, 0))
    except Exception:  # noqa: BLE001  # an object that does not let itself be looked at
        return False


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Return what tells whether a tensor was written into."""
    kept = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type != "meta"
    if not kept or tensor.numel() > LARGEST_TENSOR:
        return type(tensor).__name__, tensor.shape
    with torch.no_grad():
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1).contiguous().view(torch.uint8)
    return tensor.shape, flat.numpy().tobytes() if "numpy" in sys.modules else flat.tolist()


def _version_of(value: Any) -> int | None:
    """Return how often a tensor was written into, as far as it counts that."""
    plain = type(value) is torch.Tensor and not value.is_inference()
    return value._version if plain else None


def _name_of(key: Any) -> str:
    return str(key) if is_plain(key) else type(key).__name__


def _fingerprint(value: Any, depth: int) -> Any:
    """Return what tells whether a value was changed, the same for a copy of it."""
    if is_plain(value):
        return value if value == value else "nan"
    if isinstance(value, torch.Tensor) and not isinstance(value, fx.Proxy):
        return _bytes_of(value)
    if isinstance(value, (nn.Module, fx.Proxy)) or depth > DEEPEST:
        return type(value).__name__ if not isinstance(value, fx.Proxy) else "proxy"
    if is_generator(value):
        state = state_of(value)
        return state.tolist() if isinstance(state, torch.Tensor) else str(state)
    if isinstance(value, dict):
        return (
            "dict",
            tuple((_name_of(k), _fingerprint(v, depth + 1)) for k, v in list(dict.items(value))[:1000]),
            dict.__len__(value),
        )
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        entries = [_fingerprint(v, depth + 1) for v in list(value)[:1000]]
        return type(value).__name__, len(value), tuple(sorted(map(str, entries)) if isinstance(value, set) else entries)
    if _keeps_values(value):
        held = [*(held for _, held in closure_of(value)), *mutable_defaults(value)]
        return "function", tuple(_fingerprint(v, depth + 1) for v in held)
    if is_array(value) and not value.dtype.hasobject:
        return value.shape, str(value.dtype), value.tobytes()
    fields = None if isinstance(value, (*FUNCTIONS, types.MethodType, types.ModuleType)) else _fields_of(value)
    if fields is not None and not _is_torch(type(value).__module__):
        return type(value).__name__, tuple((k, _fingerprint(v, depth + 1)) for k, v in list(fields.items())[:1000])
    return type(value).__name__


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Return the globals that code reads or sets; its other names are of attributes."""
    ways = {f"{way}_{kind}" for way in ("LOAD", "STORE", "DELETE") for kind in ("GLOBAL", "NAME")}
    ways.add("LOAD_FROM_DICT_OR_GLOBALS")
    return tuple(dict.fromkeys(step.argval for step in dis.get_instructions(code) if step.opname in ways))


@functools.lru_cache(maxsize=4096)
def _chains_of(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Return the globals that code reads attributes of, each with those, one of the other, as ``("F", "gelu")``."""
    chains: dict[tuple[str, ...], None] = {}
    chain: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = (step.argval,)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain = (*chain, step.argval)
            chains[chain] = None
        elif step.opname != "CACHE":
            chain = ()
    return tuple(chains)


@functools.lru_cache(maxsize=4096)
def _is_property(cls: Any, name: str) -> bool:
    """Whether reading the attribute runs code, which is watched itself."""
    return hasattr(inspect.getattr_static(cls, name, None), "__get__") and hasattr(
        inspect.getattr_static(cls, name, None), "fget"
    )


@functools.lru_cache(maxsize=4096)
def _is_setting(cls: Any, name: str) -> bool:
    member = inspect.getattr_static(cls, name, None)
    return not name.startswith("__") and (isinstance(member, property) or member is not None and is_plain(member))


def _is_torch(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "numpy", "builtins")
