"""What is changed in Python and torch while a model is traced, and put back afterwards."""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

from ..graphs.operations import FACTORIES, QUESTIONS, is_constant
from ..graphs.shape_reads import SHAPE_METHODS
from ..graphs.source_lines import is_library_code
from ..streams.in_place import name_of
from ..threads import replaced
from .add_bytecode import ADD_NAMES
from .proxy import CHANGES_GRAD_MODE, UNKNOWN, AppliedFunction, CannotInline, ScriptedFunction, ValueProxy, is_compiled
from .recorder import Recorder
from .vmapped import record_vmap

UNBOUND = [name for name in sorted(ADD_NAMES | {"mul", "mul_"}) if hasattr(torch.Tensor, name)]
# What is asked of parameters that graphs need not ask anew, and attributes that give or tell of values.
AS_THEY_ARE = SHAPE_METHODS | frozenset(
    "element_size data_ptr untyped_storage is_contiguous __repr__ __deepcopy__ __reduce_ex__ __dir__".split()
)
ABOUT_VALUES = frozenset("data grad requires_grad T mT H mH real imag".split())


class _RecordCalls(TorchFunctionMode):
    """Send every torch call of traced code to the tracer."""

    def __init__(self, tracer: Recorder) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, func = kwargs or {}, getattr(func, "hc_plain", func)
        if self.tracer.evaluating:
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        name = getattr(func, "__name__", "")
        traced = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        if self.tracer.is_tracing() and any(map(self.tracer.is_own_tensor, leaves)):
            if name == "__set__":
                return setattr(self.tracer.own_tensor(args[0]), name_of(func).removeprefix("setting "), args[1])
            if not traced:
                return self._of_own_tensors(func, name, args, kwargs)
        if not traced and not (name in FACTORIES and all(is_constant(leaf) for leaf in leaves)):
            return func(*args, **kwargs)
        if isinstance(func, torch._C.ScriptMethod):
            raise CannotInline(self.tracer._paths[-1], "it calls a scripted method")
        with self:  # the mode is off while it handles a call; what follows may run user code
            if is_tensor_method_or_property(func):
                return self.tracer.create_proxy("call_method", name, args, kwargs)
            return self.tracer.create_proxy("call_function", func, args, kwargs)

    def _of_own_tensors(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record a call on parameters and buffers that code came by otherwise than by their names, as parameters()."""
        if name in AS_THEY_ARE or name == "__get__" and name_of(func) not in ABOUT_VALUES:
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(self.tracer.own_tensor, (args, kwargs))
        if name.startswith("__") and name != "__get__":  # some look at the tensor itself
            return getattr(ValueProxy, name)(*args, **kwargs)
        with self:
            if name == "__get__":
                return getattr(args[0], name_of(func))
            return self.__torch_function__(func, (), args, kwargs)


@contextlib.contextmanager
def patched(tracer: Recorder) -> Iterator[None]:  # noqa: C901  # one small function for each of torch's
    """Let ``isinstance``, ``module.training`` and autograd functions see through proxies."""
    plain_isinstance, plain_callable = builtins.isinstance, builtins.callable
    plain_apply = torch.autograd.Function.__dict__["apply"]

    def value_isinstance(obj: Any, kinds: Any) -> bool:
        if type(obj) is ValueProxy and not plain_isinstance(obj, kinds):
            return obj.hc_value is not UNKNOWN and plain_isinstance(obj.hc_value, kinds) and kinds is not nn.Parameter
        return plain_isinstance(obj, kinds)

    def value_callable(obj: Any) -> bool:  # a proxy's class has __call__, whatever it stands for
        known = type(obj) is ValueProxy and obj.hc_value is not UNKNOWN
        return plain_callable(obj.hc_value if known else obj)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        function = plain_apply.__get__(None, cls)
        if tracer.evaluating or not any(type(a) is ValueProxy for a in pytree.tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        if cls is torch.utils.checkpoint.CheckpointFunction and tracer.is_tracing():
            if tracer.probing:
                return args[0](*args[2:], **kwargs)
            refuse_checkpoint()
        return tracer.create_proxy("call_function", AppliedFunction(cls), args, kwargs)

    def refuse_checkpoint() -> None:
        raise CannotInline(tracer._paths[-1], "it uses activation checkpointing; turn that off before converting")

    def around_function(plain: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand for the generator that ``checkpoint`` steps before and after it calls the function."""
        if not tracer.is_tracing():  # a leaf that runs for real
            return plain(*args, **kwargs)
        if tracer.probing:
            return iter([None])
        refuse_checkpoint()

    def make(factory: Any, *args: Any, **kwargs: Any) -> Any:
        """Record a factory that is given a proxy, which torch may find to be no number or dtype."""
        if tracer.evaluating or not any(type(a) is ValueProxy for a in pytree.tree_leaves((args, kwargs))):
            return factory(*args, **kwargs)
        return tracer.create_proxy("call_function", factory, args, kwargs)

    def call_script(script: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.evaluating or not any(type(a) is ValueProxy for a in pytree.tree_leaves((args, kwargs))):
            return plain_script(script, *args, **kwargs)
        return tracer.create_proxy("call_function", ScriptedFunction(script), args, kwargs)

    def vmap(
        func: Any, in_dims: Any, out_dims: Any, randomness: Any, chunk_size: Any, *args: Any, **kwargs: Any
    ) -> Any:
        settings = {"in_dims": in_dims, "out_dims": out_dims, "randomness": randomness, "chunk_size": chunk_size}
        if not tracer.is_tracing():
            return plain_vmap(func, *settings.values(), *args, **kwargs)
        return record_vmap(tracer, func, settings, args, kwargs)

    # checkpoint() is imported by name into user code, so what it calls is patched; the name varies by version.
    generators = [n for n in vars(torch.utils.checkpoint) if n.startswith("_checkpoint_without_reentrant_generator")]
    plain_checkpoints = {name: getattr(torch.utils.checkpoint, name) for name in generators}
    plain_grad_mode = torch.is_grad_enabled
    plain_vmap = torch._functorch.apis.vmap_impl  # type: ignore[attr-defined]  # which it imports
    plain_enter = torch.autocast.__enter__
    plain_turn_on, plain_set = torch.enable_grad.__enter__, torch.set_grad_enabled.__init__
    plain_factories = {name: getattr(torch, name) for name in FACTORIES}
    plain_limits = {name: getattr(torch, name) for name in ("finfo", "iinfo")}
    plain_script = torch._C.ScriptFunction.__call__

    def limits_of(limits: Any, dtype: Any = None) -> Any:
        if type(dtype) is ValueProxy and isinstance(dtype.hc_value, torch.dtype):
            hash(dtype)  # which records what it is
            dtype = dtype.hc_value
        return limits() if dtype is None else limits(dtype)

    def is_grad_enabled() -> Any:
        """Record the question, but of torch's own code, which chooses between ways to compute the same."""
        asked_by_torch = str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.")
        return plain_grad_mode() if asked_by_torch or not tracer.is_tracing() else tracer.grad_mode_flag()

    def enter(region: torch.autocast) -> Any:
        if (
            tracer.is_tracing() and not tracer.probing
        ):  # also one that changes nothing now: it would under another state
            raise CannotInline(tracer._paths[-1], "it sets the autocast state, which a graph does not hold")
        return plain_enter(region)

    def turn_on(region: torch.enable_grad) -> None:
        refuse_grad_mode(True)
        plain_turn_on(region)

    def set_grad_mode(region: torch.set_grad_enabled, mode: bool) -> None:
        refuse_grad_mode(mode)
        plain_set(region, mode)

    def refuse_grad_mode(mode: bool) -> None:
        """Refuse to turn on gradients, which are on in a trace, so that no operation would show it."""
        if tracer.is_tracing() and not tracer.probing and mode and plain_grad_mode():
            raise CannotInline(tracer._paths[-1], CHANGES_GRAD_MODE)

    training = property(
        lambda module: tracer.training_flag(module),
        lambda module, mode: module.__dict__.__setitem__("training", mode),
    )
    plain_setattr = nn.Module.__setattr__

    def get_attribute(module: nn.Module, name: str) -> Any:
        looked_at = not name.startswith("__") and tracer.is_tracing()
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            if not looked_at:
                raise
            value = tracer.found_otherwise(module, name)
        return tracer.attribute(module, name, value) if looked_at else value

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if tracer.is_tracing():
            tracer.watch.write(module, name)
        plain_setattr(module, name, value)

    with (
        replaced(
            (torch._functorch.apis, "vmap_impl", vmap),
            (torch, "is_grad_enabled", is_grad_enabled),
            (torch.autocast, "__enter__", enter),
            (torch.enable_grad, "__enter__", turn_on),
            (torch.set_grad_enabled, "__init__", set_grad_mode),
            (torch._C.ScriptFunction, "__call__", call_script),
            (builtins, "isinstance", value_isinstance),
            (builtins, "callable", value_callable),
            (torch.autograd.Function, "apply", classmethod(apply)),
            *((torch.utils.checkpoint, n, functools.partial(around_function, f)) for n, f in plain_checkpoints.items()),
            *((torch, name, functools.partial(make, factory)) for name, factory in plain_factories.items()),
            *((torch, name, functools.partial(limits_of, limits)) for name, limits in plain_limits.items()),
            *_drawing(tracer),
            *_unbound(tracer),
            *_compiled(tracer),
            *_cached(tracer),
            *_types_asked_for(tracer),
            *_asked_of_torch(tracer),
            (nn.Module, "training", training),
            (nn.Module, "__setattr__", set_attribute),
            (nn.Module, "__getattribute__", get_attribute),
        ),
        torch._dynamo.config.patch(error_on_nested_fx_trace=False),
        _RecordCalls(tracer),
    ):
        yield


def _drawing(tracer: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is to stand for the functions of ``random`` and ``numpy.random`` that draw."""
    for draw, function in tracer.drawing_functions.values():
        yield sys.modules[draw.home], draw.name, tracer.drawing(draw, function)


def _unbound(tracer: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is to stand for methods of tensors that code calls by their class, ``torch.Tensor.add(x, y)``."""

    def method_of(name: str, plain: Any) -> Any:
        @functools.wraps(plain)
        def method(*args: Any, **kwargs: Any) -> Any:
            if tracer.is_tracing() and any(type(a) is ValueProxy for a in args):
                return tracer.create_proxy("call_method", name, args, kwargs)
            return plain(*args, **kwargs)

        method.hc_plain = plain  # type: ignore[attr-defined]  # torch asks the class for what it calls
        return method

    for name in UNBOUND:
        yield torch.Tensor, name, method_of(name, getattr(torch.Tensor, name))


def _asked_of_torch(tracer: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """Yield what records a question about the state of torch; torch's own code gets the answer."""

    def recorded(name: str, plain: Any) -> Any:
        @functools.wraps(plain)
        def ask(*args: Any, **kwargs: Any) -> Any:
            if is_library_code(sys._getframe(1)) or not tracer.is_tracing():
                return plain(*args, **kwargs)
            if name == "is_inference_mode_enabled":
                return tracer.inference_mode_flag()
            return tracer.create_proxy("call_function", plain, args, kwargs)

        return ask

    for name in QUESTIONS:
        if hasattr(torch, name):
            yield torch, name, recorded(name, getattr(torch, name))


def _cached(tracer: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is to stand for cached functions of the traced modules, whose caches no traced value is to enter."""

    def uncached(function: Any) -> Any:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            return (function.__wrapped__ if tracer.is_tracing() else function)(*args, **kwargs)

        for name in ("cache_info", "cache_clear", "cache_parameters"):
            setattr(called, name, getattr(function, name))
        return called

    classes = _classes_of(tracer)
    for owner in (*classes, *_homes_of(classes)):
        for name, value in list(vars(owner).items()):
            if type(value) is functools._lru_cache_wrapper:
                yield owner, name, uncached(value)


def _classes_of(tracer: Recorder) -> set[type]:
    return {cls for module in tracer.root.modules() for cls in type(module).__mro__ if cls is not nn.Module}


def _homes_of(classes: set[type]) -> set[Any]:
    """Return the Python modules of classes, and those of the same packages where their helper functions are."""
    homes = {sys.modules.get(cls.__module__) for cls in classes if not cls.__module__.startswith("torch.nn.modules")}
    for home in list(homes):
        used = {getattr(value, "__module__", None) for value in vars(home).values() if callable(value)} if home else ()
        package = home.__name__.partition(".")[0] if home else ""
        homes |= {sys.modules.get(name) for name in used if name and name.partition(".")[0] == package}
    return {home for home in homes if home is not None}


class _SeenThrough(type):
    """The class of what stands for ``type`` in traced code, which tells of a proxy what it stands for."""

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 1 and type(args[0]) is ValueProxy and args[0].hc_value is not UNKNOWN:
            return type(args[0].hc_value)
        return type(*args)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)


class _TypeSeen(type, metaclass=_SeenThrough):
    pass


def _types_asked_for(tracer: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is to stand for ``type`` in the Python modules whose code asks for types of values."""
    for home in _homes_of(_classes_of(tracer)):
        if "type" not in vars(home) and not home.__name__.startswith("torch."):
            yield home, "type", _TypeSeen


def _compiled(tracer: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is to stand for the compiled functions that are globals of the code of the traced modules."""
    homes = {cls.__module__ for module in tracer.root.modules() for cls in type(module).__mro__}
    for home in (sys.modules.get(name) for name in homes if not name.startswith("torch.nn.modules")):
        for name, value in list(vars(home).items()) if home is not None else ():
            if is_compiled(value):
                yield home, name, tracer.kept_whole(value)
