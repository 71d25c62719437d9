"""What a run of a model changes, put back whole: what its modules hold and its random generators."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import operator
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from .writes import writes_undone

Undo = Callable[[], None]

# What every module has; none of it is the user's own state.
REGISTRIES = frozenset({*nn.Module().__dict__, *(n for n in vars(nn.Module) if n.startswith("_"))}) - {"training"}
SETS = (dict, set)
CONTAINERS = (list, dict, set, collections.deque, bytearray)
OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
MOST = 50_000  # Python values that are looked at; what is behind them is left alone


@contextlib.contextmanager
def no_inference_mode() -> Iterator[None]:
    """Make ordinary tensors, in the grad mode that the caller is in: ``inference_mode(False)`` alone turns it on."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield


_WITH_GRADIENTS = contextvars.ContextVar("with_gradients", default=False)


@contextlib.contextmanager
def runs_with_gradients(wanted: bool) -> Iterator[None]:
    """Run models with gradients meanwhile, where conversion runs them."""
    before = _WITH_GRADIENTS.set(wanted)
    try:
        yield
    finally:
        _WITH_GRADIENTS.reset(before)


def grad_mode_of_runs() -> torch.set_grad_enabled:
    """Return what sets the grad mode that a model is run in: gradients cost memory, and few models ask for them."""
    return torch.set_grad_enabled(_WITH_GRADIENTS.get())


# The modes of a model's modules in which a whole run wrote into no parameter; None outside of a conversion.
_WRITES_NOTHING: contextvars.ContextVar[set[frozenset[bool]] | None] = contextvars.ContextVar("quiet", default=None)


@contextlib.contextmanager
def one_model() -> Iterator[None]:
    """Take what is found out about a model's writes in one run for all runs of it and of its copies meanwhile.

    To look at each operation makes small ones slow.
    """
    before = _WRITES_NOTHING.set(set())
    try:
        yield
    finally:
        _WRITES_NOTHING.reset(before)


@contextlib.contextmanager
def state_restored(model: nn.Module, whole: bool = False) -> Iterator[None]:
    """Put parameters, and what :func:`saved_state` saves, back on exit.

    Args:
        model: what is run, or a part of it.
        whole: whether it is the whole model that runs, as its code stands.
    """
    restore, parameters = _saved(model)
    known, modes = _WRITES_NOTHING.get(), frozenset(module.training for module in model.modules())
    try:
        with writes_undone(parameters, watched=known is None or modes not in known) as written:
            yield
        if whole and known is not None and not written:
            known.add(modes)
    finally:
        restore()


@contextlib.contextmanager
def undone_on(error: type[Exception], model: nn.Module, within: Iterable[str] | None = None) -> Iterator[None]:
    """Put what :func:`saved_state` saves back if ``error`` is raised."""
    restore = saved_state(model, within)
    try:
        yield
    except error:
        restore()
        raise


def saved_state(model: nn.Module, within: Iterable[str] | None = None) -> Undo:
    """Save what a run of ``model``, or of its modules ``within``, may change; return what puts it back.

    That is what modules hold (parameters, buffers, modules, hooks, attributes with the contents of the lists, dicts
    and objects among them), the values of buffers, and the states of torch's, Python's and numpy's random generators.
    The values of parameters are not saved (see :mod:`hc_transform.models.writes`).
    """
    return _saved(model, within)[0]


def _saved(model: nn.Module, within: Iterable[str] | None = None) -> tuple[Undo, list[nn.Parameter]]:
    """Save as :func:`saved_state`; return also all parameters, those too that no module registers."""
    undo = saved_generators(model)
    contents = Contents()
    contents.modules += model.modules() if within is None else modules_within(model, within)
    parameters: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    for module in contents.modules:  # which grows by those found in attributes
        registered = list(_held(module._parameters))
        if id(module) in seen or any(map(is_lazy, registered)):
            continue  # a lazy one is made for good by its first run
        seen.add(id(module))
        contents.modules += module.children()
        parameters.update((id(p), p) for p in registered)
        for buffer in _held(module._buffers):
            contents.save(buffer)
        undo.append(_registries_put_back(module.__dict__))
        if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
            for value in module.__dict__.values():  # beside those that are its own code
                if isinstance(value, (nn.Module, torch.Tensor)) or is_generator(value):
                    contents.save(value)
            continue
        own = {name: value for name, value in module.__dict__.items() if is_state(name)}
        undo.append(_attributes_put_back(module.__dict__, own))
        for value in own.values():
            contents.save(value)
    undo += contents.undo
    parameters.update((id(p), p) for p in contents.parameters)

    def restore() -> None:
        for step in undo:
            step()

    return restore, list(parameters.values())


def saved_generators(model: nn.Module) -> list[Undo]:
    """Save the states of the random generators that a run of ``model`` may draw from."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    generator, on_devices = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}
    host = random.getstate()

    def restore() -> None:
        torch.set_rng_state(generator)
        for device, state in on_devices.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(host)

    undo: list[Undo] = [restore]
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        state = numpy.random.get_state()
        undo.append(lambda: numpy.random.set_state(state))
    return undo


def seed_generators(seed: int = 0) -> None:
    """Seed all generators that a model may draw from: torch's on every device, Python's, and numpy's if it is there."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextlib.contextmanager
def generators_seeded(model: nn.Module) -> Iterator[None]:
    """Seed all generators, so that what is traced draws as the runs that it is compared with; put them back on exit."""
    undo = saved_generators(model)
    seed_generators()
    try:
        yield
    finally:
        for step in undo:
            step()


def is_generator(value: Any) -> bool:
    """Whether ``value`` is a random generator with a state of its own."""
    return isinstance(value, (random.Random, torch.Generator)) or _is_numpy_generator(value)


def state_of(generator: Any) -> Any:
    """Return the state of a random generator."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator) or not hasattr(generator, "bit_generator"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _is_numpy_generator(value: Any) -> bool:
    return type(value).__module__.startswith("numpy.random") and type(value).__name__ in ("Generator", "RandomState")


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of numpy, which need not be there."""
    return type(value).__module__.startswith("numpy") and type(value).__name__ == "ndarray"


def slots_of(value: Any) -> dict[str, Any]:
    """Return what an object holds in slots, which its dictionary does not show."""
    names = (n for cls in type(value).__mro__ for n in _names_in(vars(cls).get("__slots__", ())))
    return {n: getattr(value, n) for n in names if hasattr(value, n) and n not in ("__dict__", "__weakref__")}


def _names_in(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def is_state(name: str) -> bool:
    """Whether an attribute of a module is the user's own, and not that of torch, of a trace or of a conversion."""
    return name not in REGISTRIES and not name.startswith(("_hc_", "_tensor_constant", "_torchdynamo"))


def modules_within(model: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """Yield the modules at ``paths`` and below, each once."""
    return iter({id(m): m for path in paths for m in model.get_submodule(path).modules()}.values())


def _registries_put_back(attributes: dict[str, Any]) -> Undo:
    """Save the dictionaries and sets that a module registers in, with their order; a trace's own entries stay."""
    registries = [
        (n, held, held.copy()) for n, held in attributes.items() if n in REGISTRIES and isinstance(held, SETS)
    ]

    def restore() -> None:
        for name, held, saved in registries:
            attributes[name] = held
            if not held and not saved or _is_as_it_was(held, saved):
                continue
            own = [key for key in held if key not in saved and isinstance(key, str) and not is_state(key)]
            kept: Any = {key: held[key] for key in own} if isinstance(held, dict) else own
            refill(held, saved)
            held.update(kept)

    return restore


def _is_as_it_was(held: Any, saved: Any) -> bool:
    if isinstance(held, dict):
        same = all(map(operator.is_, held.values(), saved.values()))
        return same and len(held) == len(saved) and list(held) == list(saved)
    return bool(held == saved)


def _held(registry: Any) -> Iterator[Any]:
    return (value for value in registry.values() if value is not None)


def _attributes_put_back(attributes: dict[str, Any], saved: dict[str, Any]) -> Undo:
    def restore() -> None:
        for name in [n for n in attributes if is_state(n) and n not in saved]:
            del attributes[name]
        attributes.update(saved)

    return restore


class Contents:
    """The contents of Python values that can be changed, and how to put them back.

    Attributes:
        undo: what puts them back.
        modules, parameters: those among them, which are not looked into.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self.seen: set[int] = set()
        self.alive: list[Any] = []
        self.undo: list[Undo] = []

    def save(self, value: Any) -> None:
        """Save ``value`` and all that it holds."""
        waiting = [value]
        while waiting and len(self.seen) < MOST:
            value = waiting.pop()
            if value is None or isinstance(value, (bool, int, float, str, bytes)) or id(value) in self.seen:
                continue
            self.seen.add(id(value))
            self.alive.append(value)
            waiting += self._save_one(value)

    def _save_one(self, value: Any) -> list[Any]:
        """Save one value; return what it holds."""
        if isinstance(value, OPAQUE):
            return self._save_closure(value)
        if isinstance(value, nn.Module):
            self.modules.append(value)
            return []
        if isinstance(value, nn.Parameter):
            self.parameters += [] if is_lazy(value) else [value]
            return []
        if isinstance(value, torch.Tensor):
            if value.device.type != "meta":
                self.undo.append(_tensor_put_back(value))
            return []
        if is_generator(value):
            state = state_of(value)
            self.undo.append(lambda: _set_state(value, state))
            return []
        if isinstance(value, (tuple, frozenset)):
            return list(value)
        if isinstance(value, CONTAINERS):
            saved: Any = dict(dict.items(value)) if isinstance(value, dict) else value.copy()
            self.undo.append(lambda: refill(value, saved))
            return [*saved.values()] if isinstance(saved, dict) else [] if isinstance(saved, bytearray) else [*saved]
        if is_array(value):
            array = value.copy()
            self.undo.append(lambda: value.__setitem__(Ellipsis, array))
            return []
        return self._save_attributes(value)

    def _save_closure(self, value: Any) -> list[Any]:
        """Save what a function keeps in variables of the one around it; return those, or what a method is of."""
        if isinstance(value, types.MethodType):
            return [value.__func__, value.__self__]
        kept = closure_of(value)
        self.undo += [functools.partial(_refill_cell, cell, held) for cell, held in kept]
        return [*(held for _, held in kept), *mutable_defaults(value)]

    def _save_attributes(self, value: Any) -> list[Any]:
        """Save the attributes of an object; return them."""
        if type(value).__module__.partition(".")[0] == "torch":
            return []
        attributes, slots = getattr(value, "__dict__", None), slots_of(value)
        if slots or hasattr(type(value), "__slots__"):
            self.undo.append(lambda: _refill_slots(value, slots))
        if type(attributes) is not dict:
            return [*slots.values()]
        kept = dict(attributes)
        self.undo.append(lambda: refill(attributes, kept))
        return [*kept.values(), *slots.values()]


def closure_of(value: Any) -> list[tuple[types.CellType, Any]]:
    """Return the cells of a function of the user's, each with what it holds; none of those that are empty."""
    if not _is_own_function(value):
        return []
    empty = types.CellType()
    return [(cell, cell.cell_contents) for cell in value.__closure__ or () if cell != empty]


def mutable_defaults(value: Any) -> list[Any]:
    """Return the containers among the defaults of a function's arguments, which all of its calls share."""
    if not _is_own_function(value):
        return []
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    return [default for default in defaults if isinstance(default, CONTAINERS)]


def _is_own_function(value: Any) -> bool:
    """Whether a function is none of a decorator of torch, nor stands for one while it is traced."""
    if type(value) is not types.FunctionType:
        return False
    return str(value.__globals__.get("__name__")).partition(".")[0] not in ("torch", "hc_transform")


def _refill_cell(cell: types.CellType, held: Any) -> None:
    if cell.cell_contents is not held:
        cell.cell_contents = held


def _refill_slots(value: Any, saved: dict[str, Any]) -> None:
    """Make the slots of an object hold what they held."""
    now = slots_of(value)
    for name in now.keys() - saved.keys():
        object.__delattr__(value, name)
    for name in (n for n, held in saved.items() if n not in now or now[n] is not held):
        object.__setattr__(value, name, saved[name])


def _tensor_put_back(tensor: torch.Tensor) -> Undo:
    saved, version = tensor.detach().clone(), None if tensor.is_inference() else tensor._version

    def same() -> bool:
        if tensor.layout is not torch.strided:
            return version is not None and tensor._version == version
        return torch.equal(tensor, saved)

    def restore() -> None:
        with torch.no_grad():
            if not same():
                tensor.data.copy_(saved)  # as it was: not a change that a backward pass is to mind

    return restore


def refill(value: Any, saved: Any) -> None:
    """Make a container hold what it held."""
    if isinstance(value, dict):
        if len(value) != len(saved) or any(k not in value or value[k] is not v for k, v in saved.items()):
            value.clear()
            value.update(saved)
    elif isinstance(value, (list, bytearray)):
        value[:] = saved
    else:
        value.clear()
        value.update(saved) if isinstance(value, set) else value.extend(saved)
