"""The tracer: torch.fx symbolic tracing with example values.

Differences from ``torch.fx.Tracer``: proxies carry values and record what was decided on them;
every torch call of traced code is recorded, also those without a proxy among their arguments
(``torch.arange(n)``, ``torch.rand(1)``); ``self.training`` is read on every call; in-place
operations rebind the proxies of the tensor they change; custom autograd functions stay whole.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import linecache
import math
import operator
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import einops
import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

from . import guards
from .proxy import UNKNOWN, AppliedFunction, ValueProxy

FACTORIES = frozenset(
    "arange bartlett_window blackman_window empty eye full hamming_window hann_window kaiser_window linspace "
    "logspace normal ones rand randint randn randperm tensor tril_indices triu_indices zeros".split()
)
SHAPE_METHODS = frozenset("size dim ndimension numel nelement stride is_floating_point is_complex get_device".split())
SHAPE_ATTRIBUTES = frozenset("shape ndim dtype device is_cuda is_sparse is_nested layout itemsize".split())
# Frames of these files are not the user's code; what they do was asked for further up.
INTERNAL_FILES = (
    *(
        os.path.join(os.path.dirname(torch.__file__), *part.split("/"))
        for part in (
            "__init__.py",
            "fx/",
            "overrides.py",
            "_tensor.py",
            "functional.py",
            "nn/functional.py",
            "nn/modules/module.py",
            "nn/modules/container.py",
            "_jit_internal.py",
            "utils/",
            "autograd/",
        )
    ),
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(einops.__file__) + os.sep,
    contextlib.__file__,
    "<",
)


class CannotInline(Exception):
    """A module's code cannot be traced; it is to stay a leaf.

    ``path`` is the module's, the root's being "".
    """

    def __init__(self, path: str, cause: BaseException | str) -> None:
        super().__init__(path, cause)
        self.path = path
        self.cause = cause


class ValueTracer(fx.Tracer):
    """Trace one forward of a module with example values.

    Args:
        inline: paths of the modules to trace into; all others become ``call_module`` nodes.
        inputs: value of each forward parameter, in order; UNKNOWN where there is none. Constants
            (None, numbers, strings) stay constants, checked on every call.
        wrap_functions: functions to record as one call.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, inline: frozenset[str], inputs: Mapping[str, Any], wrap_functions: tuple[Callable[..., Any], ...] = ()
    ) -> None:
        super().__init__(
            autowrap_modules=(math, einops),  # type: ignore[arg-type]
            autowrap_functions=wrap_functions,
        )
        self.inline = inline
        self.inputs = inputs
        self.evaluating = False
        self.reads_training = False
        self._paths = [""]
        self._known: dict[Any, ValueProxy] = {}
        self._decided: set[Any] = set()
        self._aliases: dict[int, list[weakref.ref[ValueProxy]]] = {}
        self._context = _context_state()

    # -- entry

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Return the graph of ``root.forward``. Raises CannotInline with the module to blame."""
        try:
            with _patched(self):
                return super().trace(root, concrete_args)
        except CannotInline:
            raise
        except Exception as error:
            raise CannotInline("", error) from error

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        signature = inspect.signature(self.root.forward)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in signature.parameters.items():
            value = self.inputs.get(name, parameter.default)
            self._place(name, parameter, value, args, kwargs)
        forward = self.root.forward  # bound, so that one set on the instance counts

        def call() -> Any:
            return forward(*args, **kwargs)

        return call, []

    def _place(
        self, name: str, parameter: inspect.Parameter, value: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        """Make the placeholder of one parameter, and pass it on to the call."""
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            if value is not parameter.empty and len(value):
                proxy = self._placeholder(f"*{name}", (), value)
                args.extend(proxy[i] for i in range(len(value)))
            return
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if value is not parameter.empty and len(value):
                proxy = self._placeholder(f"**{name}", (), value)
                kwargs.update({key: proxy[key] for key in value})
            return
        default = () if parameter.default is parameter.empty else (parameter.default,)
        if value is parameter.empty:
            value = UNKNOWN
        if value is UNKNOWN or not _is_constant(value):
            given: Any = self._placeholder(name, _plain(default), value)
            if default == (None,) and value is not UNKNOWN:
                self.graph.call_function(guards.check_tensor_input, (given.node, name))
        else:
            given = value
            proxy = self._placeholder(name, default or (value,), value)
            self.graph.call_function(guards.check_input, (proxy.node, value, name))
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[name] = given
        else:
            args.append(given)

    def _placeholder(self, target: str, default: tuple[Any, ...], value: Any) -> ValueProxy:
        node = self.create_node("placeholder", target, default, {})
        return self._proxy_of(node, value)

    # -- recording

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        """Run the operation on the example values and record it."""
        if _context_state() != self._context:
            raise CannotInline(
                self._paths[-1], "it changes the grad mode or autocast state, which a graph does not hold"
            )
        about_shape = (kind == "call_method" and target in SHAPE_METHODS) or (
            kind == "call_function" and (target is getattr and args[1] in SHAPE_ATTRIBUTES or _of_sizes(target, args))
        )
        node_args, node_kwargs = self.create_arg(args), self.create_arg(kwargs)
        key = (kind, target, node_args, tuple(node_kwargs.items())) if about_shape else None
        if key is not None and _hashable(key) and key in self._known:
            return self._known[key]
        value, changed = self._evaluate(kind, target, args, kwargs)
        node = self.create_node(kind, target, node_args, node_kwargs, name, type_expr)
        if value is None:
            if target in (operator.getitem, getattr):
                self._record(guards.check_equal, node, None)
            return None
        proxy = self._proxy_of(node, value)
        if key is not None and _hashable(key):
            self._known[key] = proxy
        for tensor in changed:
            self._rebind(tensor, node, returned=value is tensor)
        return proxy

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """Record a node with the module path and the user's line it comes from."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["hc_module"] = self._paths[-1]
        frame = user_frame()
        if frame is not None and kind != "placeholder":
            filename, line, function = frame
            node.meta["hc_location"] = f"{filename}:{line}"
            code = linecache.getline(filename, line).strip()
            node.stack_trace = f'  File "{filename}", line {line}, in {function}\n    {code}\n'
        return node

    def record_decision(self, proxy: ValueProxy, check: Any, *expected: Any) -> None:
        """Record that the code decided on ``proxy``'s value."""
        if not self.evaluating:
            self._record(check, proxy.node, *expected)

    def _record(self, check: Any, node: fx.Node, *expected: Any) -> None:
        key = (check, node, *expected)
        if key in self._decided:
            return
        self._decided.add(key)
        frame = user_frame()
        where = "an unknown line" if frame is None else f"{_short(frame[0])}:{frame[1]}"
        self.create_node("call_function", check, (node, *expected, where), {})

    def refuse_in_submodule(self, reason: str) -> None:
        """Leave the module that is being traced a leaf, unless it is the root."""
        if self._paths[-1]:
            raise CannotInline(self._paths[-1], reason)

    def look_at(self, value: Any, name: str) -> Any:
        """Return ``value``'s attribute, untraced."""
        with self._untraced():
            return getattr(value, name)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, dict) and type(a) is not dict:
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", type(a), (items,), {})
        if isinstance(a, fx.node.base_types) and not isinstance(a, torch.Tensor):
            return a
        return super().create_arg(a)

    def _proxy_of(self, node: fx.Node, value: Any) -> ValueProxy:
        if isinstance(value, torch.Tensor):
            with self._untraced():
                node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        if value is not UNKNOWN:
            node.meta["hc_type"] = type(value)
        proxy = ValueProxy(node, self, value)
        if isinstance(value, torch.Tensor):
            self._aliases.setdefault(id(value), []).append(weakref.ref(proxy))
        return proxy

    def _rebind(self, tensor: torch.Tensor, node: fx.Node, returned: bool) -> None:
        """Let every proxy of a tensor changed in place stand for the changed tensor."""
        for reference in self._aliases.get(id(tensor), []):
            proxy = reference()
            if proxy is not None and proxy.hc_value is tensor:
                if returned:
                    proxy.node = node
                else:
                    node.meta.setdefault("hc_overwrites", []).append(proxy.node)

    # -- values

    @contextlib.contextmanager
    def _untraced(self) -> Iterator[None]:
        before, self.evaluating = self.evaluating, True
        try:
            yield
        finally:
            self.evaluating = before

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        """Return the operation's value and those argument tensors that it changed in place."""
        if kind == "get_attr":
            with self._untraced():
                return _attribute(self.root, target), []
        unknown = False

        def value_of(a: Any) -> Any:
            nonlocal unknown
            if isinstance(a, fx.Proxy):
                a = a.hc_value if isinstance(a, ValueProxy) else UNKNOWN
                unknown = unknown or a is UNKNOWN
            return a

        args, kwargs = (fx.node.map_aggregate(a, value_of) for a in (args, kwargs))
        if unknown:
            return UNKNOWN, []
        with self._untraced(), torch.no_grad():
            tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            versions = [_version(tensor) for tensor in tensors]
            if kind == "call_function":
                value = target(*args, **kwargs)
            elif kind == "call_method":
                value = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                value = self.root.get_submodule(target)(*args, **kwargs)
            return value, [t for t, v in zip(tensors, versions, strict=True) if _version(t) != v]

    # -- modules

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if path not in self.inline:
            return super().call_module(m, forward, args, kwargs)
        self._paths.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except CannotInline:
            raise
        except Exception as error:
            raise CannotInline(path, error) from error
        finally:
            self._paths.pop()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inline

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def training_flag(self, module: nn.Module) -> Any:
        """Return a proxy for ``module.training``, read anew on every call."""
        if "training" not in module.__dict__:  # a scripted module keeps it elsewhere
            return module.__getattr__("training")
        actual = module.__dict__["training"]
        path = (getattr(self, "submodule_paths", None) or {}).get(module)
        if self.evaluating or path is None or (path and path not in self.inline):
            return actual
        self.reads_training = True
        target = f"{path}.training" if path else "training"
        key = ("training", target)
        if key not in self._known:
            self._known[key] = self._proxy_of(self.create_node("get_attr", target, (), {}), actual)
        return self._known[key]


class _RecordCalls(TorchFunctionMode):
    """Send every torch call of traced code to the tracer."""

    def __init__(self, tracer: ValueTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.evaluating:
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        name = getattr(func, "__name__", "")
        traced = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        if not traced and not (name in FACTORIES and all(_is_constant(leaf) for leaf in leaves)):
            return func(*args, **kwargs)
        if isinstance(func, torch._C.ScriptMethod):
            raise CannotInline(self.tracer._paths[-1], "it calls a scripted method")
        with self:  # the mode is off while it handles a call; what follows may run user code
            if is_tensor_method_or_property(func):
                return self.tracer.create_proxy("call_method", name, args, kwargs)
            return self.tracer.create_proxy("call_function", func, args, kwargs)


@contextlib.contextmanager
def _patched(tracer: ValueTracer) -> Iterator[None]:
    """Let ``isinstance``, ``module.training`` and autograd functions see through proxies."""
    plain_isinstance, plain_apply = builtins.isinstance, torch.autograd.Function.__dict__["apply"]

    def value_isinstance(obj: Any, kinds: Any) -> bool:
        if type(obj) is ValueProxy and not plain_isinstance(obj, kinds):
            return obj.hc_value is not UNKNOWN and plain_isinstance(obj.hc_value, kinds) and kinds is not nn.Parameter
        return plain_isinstance(obj, kinds)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        function = plain_apply.__get__(None, cls)
        if tracer.evaluating or not any(type(a) is ValueProxy for a in pytree.tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            checkpointed()
        return tracer.create_proxy("call_function", AppliedFunction(cls), args, kwargs)

    def checkpointed(*_: Any, **__: Any) -> Any:
        if not tracer.evaluating:
            raise CannotInline(tracer._paths[-1], "it uses activation checkpointing; turn that off before converting")
        return plain_checkpoint(*_, **__)

    plain_checkpoint = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    training = property(
        lambda module: tracer.training_flag(module),
        lambda module, mode: module.__dict__.__setitem__("training", mode),
    )
    builtins.isinstance = value_isinstance  # type: ignore[assignment]
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    torch.utils.checkpoint._checkpoint_without_reentrant_generator = checkpointed
    nn.Module.training = training  # type: ignore[assignment]
    try:
        with _RecordCalls(tracer):
            yield
    finally:
        builtins.isinstance = plain_isinstance
        torch.autograd.Function.apply = plain_apply  # type: ignore[method-assign]
        torch.utils.checkpoint._checkpoint_without_reentrant_generator = plain_checkpoint
        del nn.Module.training


def user_frame() -> tuple[str, int, str] | None:
    """Return (file, line, function) of the user's code that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(INTERNAL_FILES):
            return filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return None


def _short(filename: str) -> str:
    return filename.rsplit("/", 1)[-1]


def _context_state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
    )


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_constant(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device))


def _plain(default: tuple[Any, ...]) -> tuple[Any, ...]:
    return default if all(_is_constant(value) for value in default) else (None,)


def _of_sizes(target: Any, args: Any) -> bool:
    """Whether an operation is arithmetic on sizes: no argument is a tensor."""
    if getattr(target, "__module__", None) not in (operator.add.__module__, math.__name__):
        return False
    leaves = pytree.tree_leaves(args)
    return any(type(a) is ValueProxy for a in leaves) and all(
        isinstance(a.hc_value, (bool, int, float, torch.Size)) if type(a) is ValueProxy else _is_constant(a)
        for a in leaves
    )


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


__all__ = ["CannotInline", "ValueTracer", "user_frame"]
