"""The tracer: torch.fx symbolic tracing with example values.

Differences from ``torch.fx.Tracer``: proxies carry values and record what was decided on them;
every torch call of traced code is recorded, also those without a proxy among their arguments
(``torch.arange(n)``, ``torch.rand(1)``); ``self.training`` is read on every call; in-place
operations rebind the proxies of the memory they change; custom autograd functions stay whole.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import linecache
import math
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import einops
import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree

from ..errors import NEVER_HIDDEN
from ..graphs import guards, meta
from ..graphs.aliases import Aliases, memory_of, written_through
from ..graphs.operations import TOLD_APART, is_constant
from ..graphs.shape_reads import SHAPE_ATTRIBUTES, SHAPE_METHODS, reads_values
from ..graphs.source_lines import short_name, user_frame, user_lines
from ..models.copies import compiled_from, copy_inputs, has_hooks, stands_elsewhere
from ..models.draws import Draw, draw_of, drawing_functions, host_states, is_number
from ..models.state import is_generator, is_state
from ..streams.hook_readouts import call_hooks
from ..streams.in_place import version_of
from .patches import patched
from .placeholders import is_entry_of_input, is_known_by_identity, place_inputs
from .proxy import (
    CHANGES_GRAD_MODE,
    UNKNOWN,
    AsksForGradients,
    CannotInline,
    CompiledFunction,
    FreshObject,
    RebuiltObject,
    ValueProxy,
    holds_proxies,
    is_compiled,
)
from .python_state import Absent, GlobalTensor, Read, home_of_global, read_held
from .stored_attributes import read_stored
from .watch import Watch, differing_state, unwatched


class ValueTracer(fx.Tracer):
    """Trace one forward of a module with example values.

    Args:
        inline: paths of the modules to trace into; all others become ``call_module`` nodes.
        inputs: value of each forward parameter, in order; UNKNOWN where there is none. Constants
            (None, numbers, strings) stay constants, checked on every call.
        wrap_functions: functions to record as one call.
        probing: go on where a graph could not hold what the code does.
        loose: inputs that become proxies without a check though they are constants.
        observed: modules that are traced into and have forward hooks, which the graph calls.
        grad_mode: whether gradients are enabled in the call that is traced.
        inference_mode: whether that call is in inference mode.
        gradients: compute the example values with gradients, as that call does.
        script: what an earlier trace evaluated; its values are taken again, in order.

    Attributes:
        evaluated: every operation with its value, a script for another trace.
        calls: what modules were called with; its keys say of which this is kept.
    """

    proxy_buffer_attributes = True

    def __init__(  # noqa: PLR0913  # what one trace is of
        self,
        inline: frozenset[str],
        inputs: Mapping[str, Any],
        wrap_functions: tuple[Callable[..., Any], ...] = (),
        *,
        probing: bool = False,
        loose: frozenset[str] = frozenset(),
        observed: frozenset[str] = frozenset(),
        script: list[tuple[Any, ...]] | None = None,
        merges_inputs: bool = False,
        grad_mode: bool = True,
        inference_mode: bool = False,
        gradients: bool = False,
    ) -> None:
        super().__init__(
            autowrap_modules=(math, einops),  # type: ignore[arg-type]
            autowrap_functions=wrap_functions,
        )
        self.inline = inline
        self.inputs = inputs
        self.probing = probing
        self.loose = loose
        self.merges_inputs = merges_inputs
        self.observed = observed
        self.grad_mode = grad_mode
        self.inference_mode = inference_mode
        self.gradients = gradients and grad_mode
        self.evaluated: list[tuple[Any, ...]] = []
        self._script = None if script is None else iter(script)
        self.calls: dict[str, tuple[Any, Any] | None] = {}
        self.evaluating = False
        self.reads_training = False
        self._paths = [""]
        self._calls_within: list[Counter[str]] = [Counter()]  # of each module that is being called, its calls of others
        self._number: tuple[int, ...] = ()  # which call this is, within that of the module around, and so on
        self._known: dict[Any, ValueProxy] = {}
        self._value_of: dict[fx.Node, Any] = {}
        self._made: dict[int, ValueProxy] = {}  # tensors that this code computed, by their ids
        self._inlines_all = False
        self.inlined_within: set[str] = set()
        self._decided: set[Any] = set()
        self._aliases = Aliases()
        self._lasting: dict[int, bool] = {}  # memory of inputs, and of what modules hold: whether it is an input's
        self._objects: dict[int, tuple[Any, fx.Node]] = {}
        self._rebuilding: list[Any] = []
        self._tensors: dict[str, ValueProxy] = {}  # parameters and buffers, by their paths
        self._own: dict[int, str] = {}  # the names of the model's parameters and buffers, by their ids
        self._stored: set[tuple[int, str]] = set()  # attributes that modules which stay whole have set in this call
        self._context = _context_state()
        self._thread = threading.get_ident()
        self._host = host_states()
        self.drawing_functions = drawing_functions()
        self.deciders: set[str] = set()

    # -- entry

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Return the graph of ``root.forward``. Raises CannotInline with the module to blame."""
        self.root = root
        self._own = {id(t): name for name, t in (*root.named_parameters(), *root.named_buffers())}
        self.watch = Watch(root, self.is_tracing, lambda: self._paths[-1])
        changed: list[tuple[str, str]] = []
        try:
            with patched(self):
                graph = super().trace(root, concrete_args)
            self._refuse_draws("")
        except (CannotInline, *NEVER_HIDDEN):
            raise
        except Exception as error:
            raise CannotInline("", error) from error
        finally:
            changed += self.watch.shared.put_back()
        if changed and not self.probing:
            raise CannotInline(*changed[0])
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        assert self.submodule_paths is not None
        for path, module in stands_elsewhere(self.root):
            self.submodule_paths.setdefault(module, path)
            self.watch.paths.setdefault(id(module), path)
        forward = self.root.forward  # bound, so that one set on the instance counts
        args, kwargs = place_inputs(self, inspect.signature(forward), self.inputs)

        lists = [value for value in (*args, *kwargs.values()) if type(value) is list]  # of constants
        before = copy.deepcopy(lists)

        def call() -> Any:
            with self.watch.shared.profiled():
                output = forward(*args, **kwargs)
            if not self.probing and differing_state(before, lists):
                raise CannotInline("", "its code changes a list of numbers that it is given, which a graph would not")
            return output

        return call, []

    def is_tracing(self) -> bool:
        """Whether what runs now is traced code: not an evaluation, and not another thread."""
        return not self.evaluating and threading.get_ident() == self._thread

    def placeholder(self, target: str, default: tuple[Any, ...], value: Any) -> ValueProxy:
        """Make the placeholder of one parameter."""
        return self._proxy_of(self.create_node("placeholder", target, default, {}), value)

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
        with unwatched():
            return self._create_proxy(kind, target, args, kwargs, name, type_expr)

    def _create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any, type_expr: Any) -> Any:
        self._refuse_outside()
        node_args, node_kwargs = self.create_arg(args), self.create_arg(kwargs)
        key = _read_twice(kind, target, args, node_args, node_kwargs)
        known, is_entry = self._known.get(key), key is not None and key[0] == "entry"
        if known is not None and not is_entry:
            return known
        value, changed = self._value(kind, target, args, kwargs)
        if known is not None and known.hc_value is value:
            return known
        if is_entry and id(value) in self._made:
            return self._made[id(value)]
        node = self.create_node(kind, target, node_args, node_kwargs, name, type_expr)
        reads = target in (operator.getitem, getattr)
        if value is None or reads and self._is_known_by_what_it_is(node, args[0], value):
            if value is None and reads:
                self._record(guards.check_equal, node, None)
            return value
        proxy = self._proxy_of(node, value)
        drawn = isinstance(target, Draw) or kind == "call_method" and is_generator(getattr(args[0], "hc_value", None))
        if not isinstance(value, torch.Tensor) and (drawn or reads_values(node)):
            meta.ON_VALUES.set(node, True)
        if isinstance(value, torch.Tensor) and is_entry_of_input(node):
            entry = f"[{node_args[1]!r}]" if target is operator.getitem else f".{node_args[1]}"
            self.graph.call_function(guards.check_tensor_input, (node, f"{node_args[0]}{entry}"))
        if key is not None and (not is_entry or isinstance(value, torch.Tensor)):
            self._known[key] = proxy
        for tensor in changed:
            self._note_write(tensor, node)
            self._rebind(tensor, node, returned=value is tensor)
        return proxy

    def _is_known_by_what_it_is(self, node: fx.Node, holder: Any, value: Any) -> bool:
        """Guard what was found in a container or an object; return whether code is to have it as it is."""
        if isinstance(getattr(holder, "hc_value", None), torch.Tensor) or isinstance(value, (torch.Tensor, nn.Module)):
            return False
        if isinstance(value, (bool, *TOLD_APART)):
            self._record(guards.check_equal, node, value)
            return True
        if is_known_by_identity(value):
            self.graph.call_function(guards.check_object, (node, id(value), "", str(node)))
            return True
        if hasattr(value, "__dict__") and value is not UNKNOWN:
            self.graph.call_function(guards.check_kind, (node, guards.kind_of(value), False, str(node)))
        return False

    def _refuse_outside(self) -> None:
        """Raise CannotInline where what is done is not done by the graph, or in another mode."""
        if self.evaluating:
            reason = "code that stays whole closes over values that are traced, as functions of attention masks do"
            raise CannotInline(self._paths[-1], reason)
        if not self.probing and _context_state() != self._context:
            raise CannotInline(self._paths[-1], CHANGES_GRAD_MODE, of_place=True)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """Record a node with the module path and the user's line it comes from."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if node.name == "self":  # which generated code has for the module
            node._rename("self_1")
        meta.MODULE.set(node, self._paths[-1])
        meta.CALL.set(node, self._number)
        frame = user_frame()
        if frame is not None and kind != "placeholder":
            filename, line, function = frame
            meta.LOCATION.set(node, f"{filename}:{line}")
            meta.LINES.set(node, user_lines())
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
        where = "an unknown line" if frame is None else f"{short_name(frame[0])}:{frame[1]}"
        made = self.create_node("call_function", check, (node, *expected, where), {})
        of_tensor = issubclass(meta.TYPE.of(node) or object, torch.Tensor) and check is not guards.check_len
        if of_tensor or meta.ON_VALUES.known(node):
            meta.ON_VALUES.set(made, True)

    def decides_on_values(self) -> None:
        """Note that the module that is being traced decides on values of tensors or on random numbers."""
        self.deciders.add(self._paths[-1])

    def needs_gradients(self) -> None:
        """Start anew with gradients if the call has them and this trace has not."""
        if self.is_tracing() and self.grad_mode and not self.gradients:
            raise AsksForGradients("", "it decides on whether a tensor requires a gradient")

    def grad_mode_flag(self) -> ValueProxy:
        """Return a proxy for ``torch.is_grad_enabled()``, asked anew on every call."""
        if "grad_mode" not in self._known:
            node = self.create_node("call_function", torch._C.is_grad_enabled, (), {})
            self._known["grad_mode"] = self._proxy_of(node, self.grad_mode)
        return self._known["grad_mode"]

    def draw(self, draw: Draw, args: Any, kwargs: Any) -> Any:
        """Record a draw from Python's or numpy's generator, which the graph makes anew on every call."""
        drawn = self.create_proxy("call_function", draw, args, kwargs)
        if not is_number(drawn.hc_value):
            raise CannotInline(self._paths[-1], f"it draws an object with {draw.home}.{draw.name}")
        return drawn

    def _refuse_draws(self, path: str) -> None:
        """Leave the module that is being traced whole if its code has drawn what is not recorded."""
        if host_states() != self._host:
            raise CannotInline(path, "its code draws from Python's or numpy's random generator where a graph would not")

    def attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """Return an attribute of a module as traced code is to see it, and note that it was read."""
        path = (self.submodule_paths or {}).get(module)
        if is_generator(value) and path is not None:
            target = f"{path}.{name}" if path else name
            if ("generator", target) not in self._known:
                self._known["generator", target] = self._proxy_of(self.create_node("get_attr", target, (), {}), value)
            return self._known["generator", target]
        if path is not None and (id(module), name) in self._stored:
            return self._read_stored(path, name, value)
        if hasattr(type(value), "__next__") and path is not None and is_state(name):
            raise CannotInline(self._paths[-1], f"its code takes from the iterator {name!r}, which a graph would not")
        draw = None if isinstance(value, nn.Module) else draw_of(value, self.drawing_functions)
        if draw is not None:
            return self.drawing(draw, value)
        self.watch.read(module, name, value)
        if type(value) is functools._lru_cache_wrapper:
            return value.__wrapped__  # no traced value is to enter its cache
        return self.kept_whole(value) if is_compiled(value) else value

    def inference_mode_flag(self) -> ValueProxy:
        """Return a proxy for ``torch.is_inference_mode_enabled()``: what is traced is in none itself."""
        node = self.create_node("call_function", torch._C.is_inference_mode_enabled, (), {})
        return self._proxy_of(node, self.inference_mode)

    def found_otherwise(self, module: nn.Module, name: str) -> Any:
        """Return what a module's ``__getattr__`` gives: a tensor, a module, or what the user's own does."""
        cls: Any = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            return cls.__getattr__(module, name)
        path = (self.submodule_paths or {}).get(module)
        held = module._parameters.get(name, module._buffers.get(name))
        if path is not None and isinstance(held, torch.Tensor) and not issubclass(type(held), fx.Proxy):
            if not any("__getattr__" in vars(c) for c in cls.__mro__ if c is not nn.Module):
                return self._tensor_at(f"{path}.{name}" if path else name)  # which another may be given later
        try:
            return cls.__getattr__(module, name)
        except AttributeError:
            self.watch.read(module, name, Absent)
            raise

    def _tensor_at(self, target: str) -> ValueProxy:
        if target not in self._tensors:
            self._tensors[target] = self.create_proxy("get_attr", target, (), {})
        return self._tensors[target]

    def is_own_tensor(self, value: Any) -> bool:
        """Whether ``value`` is a tensor that the model holds, or that code reads from a global."""
        return id(value) in self._own or self._held(value) is not None

    def own_tensor(self, value: Any) -> Any:
        """Return a proxy for a tensor that the model holds or code reads from a global; any other value as it is."""
        if id(value) in self._own:
            return self._tensor_at(self._own[id(value)])
        read = self._held(value)
        return value if read is None else self._held_tensor(read, value)

    def _held(self, value: Any) -> Read | None:
        """Return where a tensor stands that is in a container, an object or a global."""
        if not isinstance(value, torch.Tensor) or isinstance(value, fx.Proxy) or not self.is_tracing():
            return None
        with unwatched():
            return self.watch.held_at(value)

    def _held_tensor(self, read: Read, value: torch.Tensor) -> ValueProxy:
        key = "held", read.home, read.steps
        if key not in self._known:
            home = home_of_global(read, self.root)
            if home is not None:
                node = self.create_node("call_function", GlobalTensor(home, read.steps), (), {})
            else:
                attributes = f"{read.home}.__dict__" if read.home else "__dict__"
                owner = self.create_node("get_attr", attributes, (), {})
                (_, name), *further = read.steps
                node = self.create_node("call_function", read_held, (owner, ("entry", name), *further), {})
            self._known[key] = self._proxy_of(node, value)
        return self._known[key]

    def _read_stored(self, path: str, name: str, value: Any) -> Any:
        """Return what a module that stays whole stored in an attribute in this call, such as a loss of its own."""
        if not isinstance(value, torch.Tensor):
            reason = (
                f"its code reads {name!r}, which {path or 'the root'}, a module that stays whole, sets in each call"
            )
            raise CannotInline(self._paths[-1], reason)
        module = self.create_node("get_attr", path, (), {})
        return self._proxy_of(self.create_node("call_function", read_stored, (module, name), {}), value)

    def kept_whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what traced code is to call in place of a function that a graph calls as it is."""

        @functools.wraps(function)
        def whole(*args: Any, **kwargs: Any) -> Any:
            if not self.is_tracing() or not any(isinstance(a, fx.Proxy) for a in pytree.tree_leaves((args, kwargs))):
                return function(*args, **kwargs)
            return self.create_proxy("call_function", CompiledFunction(function), args, kwargs)

        return whole

    def drawing(self, draw: Draw, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what traced code is to call in place of a function that draws."""

        def drawn(*args: Any, **kwargs: Any) -> Any:
            return self.draw(draw, args, kwargs) if self.is_tracing() else function(*args, **kwargs)

        return drawn

    def look_at(self, value: Any, name: str) -> Any:
        """Return ``value``'s attribute, untraced."""
        with self._untraced():
            return getattr(value, name)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if dataclasses.is_dataclass(a) and not isinstance(a, type):  # also one that is a mapping of its fields
            fields = {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a) if f.init}
            return self.create_node("call_function", type(a), (), fields)
        if isinstance(a, dict) and type(a) is not dict:
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", type(a), (items,), {})
        if type(a).__module__ == "numpy" and isinstance(getattr(a, "shape", None), tuple) and a.shape == ():
            a = a.item()  # a number, whose name in code would be of numpy
        if isinstance(a, fx.node.base_types) and not isinstance(a, torch.Tensor):
            return a
        if isinstance(a, torch.Tensor) and (read := self._held(a)) is not None:
            return self._held_tensor(read, a).node
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return self._object(a)

    def _object(self, a: Any) -> fx.Node:
        """Return a node for an object that traced code made: a new one, as it is now, on every call."""
        if id(a) not in self._objects:
            if self._is_of_a_module(a):
                raise NotImplementedError(f"argument of type: {type(a)}")
            if holds_proxies(a):
                return self._rebuilt(a)
            node = self.create_node("call_function", FreshObject(copy_inputs(a)), (), {})
            meta.TYPE.set(node, type(a))
            self._objects[id(a)] = (a, node)  # kept alive, so that its id stays its own
        return self._objects[id(a)][1]

    def _rebuilt(self, a: Any) -> fx.Node:
        """Return a node that makes an object of values of the graph, such as an output of a class of the user's."""
        cls: Any = type(a)
        if any(a is other for other in self._rebuilding) or type(cls.__new__(cls)) is not cls:
            raise NotImplementedError(f"argument of type: {type(a)}")
        self._rebuilding.append(a)
        try:
            fields = {name: self.create_arg(value) for name, value in vars(a).items()}
        finally:
            self._rebuilding.pop()
        if not all(name.isidentifier() for name in fields):
            raise NotImplementedError(f"argument of type: {type(a)}")
        node = self.create_node("call_function", RebuiltObject(type(a)), (), fields)
        meta.TYPE.set(node, type(a))
        return node

    def _is_of_a_module(self, a: Any) -> bool:
        """Whether an object is no value of this call but a method, a function, or something that a module holds."""
        return not hasattr(a, "__dict__") or any(a is v for m in self.root.modules() for v in m.__dict__.values())

    def _proxy_of(self, node: fx.Node, value: Any) -> ValueProxy:
        if isinstance(value, torch.Tensor):
            with self._untraced():
                node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        if value is not UNKNOWN:
            meta.TYPE.set(node, type(value))
        self._value_of[node] = value
        proxy = ValueProxy(node, self, value)
        if node.op in ("placeholder", "get_attr"):
            for tensor in pytree.tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    self._lasting.setdefault(memory_of(tensor), node.op == "placeholder")
        if isinstance(value, torch.Tensor):
            with self._untraced():
                self._aliases.add(proxy)
                if node.op != "get_attr" and memory_of(value) not in self._lasting:
                    self._made.setdefault(id(value), proxy)
        return proxy

    def _note_write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Note in ``node`` that it writes into memory of an input or a module, and which of its operands that is."""
        with self._untraced():
            memory = memory_of(tensor)
            if memory not in self._lasting:
                return
            for place, operand in enumerate(node.all_input_nodes):
                value = self._value_of.get(operand)
                if isinstance(value, torch.Tensor) and memory_of(value) == memory:
                    meta.WRITES.set(node, place)
                    meta.WRITES_INPUT.set(node, self._lasting[memory])
                    return

    def _rebind(self, tensor: torch.Tensor, node: fx.Node, returned: bool) -> None:
        """Let every proxy of memory that ``node`` changed in place stand for what it is now."""
        with self._untraced():
            changed = list(self._aliases.of(tensor))
        for proxy in changed:
            if proxy.node is node:
                continue
            if returned and proxy.hc_value is tensor:
                proxy.node = node
            else:
                before = proxy.node
                proxy.node = self.create_node("call_function", written_through, (before, node), {})
                proxy.node.meta.update({k: before.meta[k] for k in ("tensor_meta", meta.TYPE.name) if k in before.meta})

    # -- values

    @contextlib.contextmanager
    def _untraced(self) -> Iterator[None]:
        before, self.evaluating = self.evaluating, True
        flag = _say_that_fx_traces(False)  # functions that are compiled refuse to run where it does
        try:
            yield
        finally:
            self.evaluating = before
            _say_that_fx_traces(flag)

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        """Return what :meth:`_evaluate` does, or what it did in the trace that the script is of."""
        if self._script is None or kind == "get_attr":
            value, changed = self._evaluate(kind, target, args, kwargs)
        else:
            before, name, value, changed = next(self._script, (None, None, None, []))
            if before != kind or name != getattr(target, "__name__", target):
                raise CannotInline("", "it decides on an input")
        if kind != "get_attr":
            self.evaluated.append((kind, getattr(target, "__name__", target), value, changed))
        return value, changed

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, list[torch.Tensor]]:  # noqa: C901  # one rule for each kind of node
        """Return the operation's value and those argument tensors that it changed in place."""
        if kind == "get_attr":
            with self._untraced():
                return operator.attrgetter(target)(self.root), []
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
        if kind == "call_module" and self.calls.get(target, ()) is None:
            self.calls[target] = (args, kwargs)
        if target is torch.autograd.grad:
            self.needs_gradients()
            bool(self.grad_mode_flag())
        draws = _may_draw(kind, target, args)
        if draws:
            self._refuse_draws(self._paths[-1])
        with self._untraced(), torch.set_grad_enabled(self.gradients):
            tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            versions = [version_of(tensor) for tensor in tensors]
            if kind == "call_function":
                value = target(*args, **kwargs)
            elif kind == "call_method":
                value = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                value = self._call_leaf(self.root.get_submodule(target), args, kwargs)
            if draws:
                self._host = host_states()
            return value, [t for t, v in zip(tensors, versions, strict=True) if version_of(t) != v]

    def _call_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module that stays whole; what its code changes beside itself is put back after the trace."""
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential):
            return module(*args, **kwargs)
        before = _attributes_of(module)
        with self.watch.shared.profiled():
            output = module(*args, **kwargs)
        after = _attributes_of(module)
        self._stored.update(key for key, held in after.items() if not _same(held, before.get(key)))
        return output

    # -- modules

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if not self.is_tracing():
            return forward(*args, **kwargs)
        path = self.submodule_paths.get(m) if self.submodule_paths else None
        if path is None:
            return self._call_foreign(m, forward, args, kwargs)
        if self._inlines_all:
            return self._call_inlined(m, path, forward, args, kwargs)
        if path not in self.inline:
            return super().call_module(m, forward, args, kwargs)
        forward = compiled_from(m) or forward
        self._paths.append(path)
        calls, number = self._calls_within[-1], self._number
        self._number = (*number, calls[path])
        calls[path] += 1
        self._calls_within.append(Counter())
        try:
            output = super().call_module(m, forward, args, kwargs)
            if path in self.observed:
                given = (self.create_arg(args), self.create_arg(kwargs), self.create_arg(output))
                module = self.create_node("get_attr", path, (), {})
                self.create_node("call_function", call_hooks, (module, *given), {})
            self._refuse_draws(path)
            return output
        except (CannotInline, *NEVER_HIDDEN):
            raise
        except Exception as error:
            raise CannotInline(path, error) from error
        finally:
            self._paths.pop()
            self._calls_within.pop()
            self._number = number

    @contextlib.contextmanager
    def inlining_all(self) -> Iterator[None]:
        """Trace into every module; what is found meanwhile of what the code reads and decides is not met again."""
        known, decided, before = dict(self._known), set(self._decided), self._inlines_all
        self._inlines_all = True
        try:
            yield
        finally:
            self._inlines_all = before
            kept = {key: proxy for key, proxy in self._known.items() if proxy.node.op == "get_attr"}
            self._known, self._decided = known | kept, decided

    def _call_inlined(self, m: nn.Module, path: str, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace into a module that is called where a graph cannot call it."""
        if has_hooks(m):
            raise CannotInline(self._paths[-1], f"it calls {path}, which has hooks, within torch.vmap")
        self.inlined_within.add(path)
        return forward(*args, **kwargs)

    def proxy_of(self, node: fx.Node) -> ValueProxy:
        """Return a proxy of a node that was recorded."""
        return ValueProxy(node, self, self._value_of[node])

    def _call_foreign(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace into a module that is none of the model's, such as one that was made in this forward.

        Its code is part of what calls it, and a graph finds no parameters by its paths.
        """
        held = [v for v in (*m.parameters(), *m.buffers()) if not isinstance(v, fx.Proxy)]
        if held:
            name = type(m).__name__
            raise CannotInline(
                self._paths[-1], f"it calls a {name} that is no submodule of the model and holds tensors: register it"
            )
        return forward(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inline

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.is_tracing() or isinstance(attr_val, fx.Proxy):  # a proxy: traced code stored it there
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def training_flag(self, module: nn.Module) -> Any:
        """Return a proxy for ``module.training``, read anew on every call."""
        if "training" not in module.__dict__:  # a scripted module keeps it elsewhere
            return module.__getattr__("training")
        actual = module.__dict__["training"]
        path = (getattr(self, "submodule_paths", None) or {}).get(module)
        if not self.is_tracing() or path is None:
            return actual
        self.reads_training = True
        with self._untraced():
            actual = self.root.get_submodule(path).training  # of which ``module`` may be the one before a copy
        target = f"{path}.training" if path else "training"
        key = ("training", target)
        if key not in self._known:
            self._known[key] = self._proxy_of(self.create_node("get_attr", target, (), {}), actual)
        return self._known[key]


def _say_that_fx_traces(value: bool) -> bool:
    """Set what ``is_fx_symbolic_tracing`` tells; return what it was."""
    home: Any = _symbolic_trace
    if not hasattr(home, "_set_is_fx_tracing"):  # torch 2.13
        home._is_fx_tracing_flag = False  # one for all threads, in which compiled functions would refuse to run
        return False
    before = home._get_is_fx_tracing()
    home._set_is_fx_tracing(value)
    return bool(before)


def _attributes_of(module: nn.Module) -> dict[tuple[int, str], tuple[Any, ...]]:
    """Return the user's attributes of a module and those in it, each with the entries that it holds."""
    return {
        (id(part), name): (value, *(value if isinstance(value, (list, tuple, collections.deque)) else ()))
        for part in module.modules()
        for name, value in part.__dict__.items()
        if is_state(name)
    }


def _same(one: tuple[Any, ...], other: tuple[Any, ...] | None) -> bool:
    return other is not None and len(one) == len(other) and not any(map(operator.is_not, one, other))


def _may_draw(kind: str, target: Any, args: Any) -> bool:
    """Whether an operation that is evaluated may draw from Python's or numpy's generators."""
    if kind == "call_function":
        home = str(getattr(target, "__module__", None) or "torch")
        return isinstance(target, Draw) or not home.startswith(("torch", "_operator", "math", "hc_transform"))
    return kind == "call_module" or is_generator(args[0])


def is_arithmetic_on_sizes(target: Any, args: Any) -> bool:
    """Whether an operation is arithmetic on sizes: no argument is a tensor."""
    if getattr(target, "__module__", None) not in (operator.add.__module__, math.__name__):
        return False
    leaves = pytree.tree_leaves(args)
    return any(type(a) is ValueProxy for a in leaves) and all(
        isinstance(a.hc_value, (bool, int, float, torch.Size)) if type(a) is ValueProxy else is_constant(a)
        for a in leaves
    )


def _context_state() -> tuple[Any, ...]:
    return (
        torch._C.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
    )


def _read_twice(kind: str, target: Any, args: Any, node_args: Any, node_kwargs: Any) -> Any:
    """Return what an operation is known by that gives the same when it is done again, None for any other.

    It is of shapes alone, or reads an entry of a container or an attribute of an object, for as long as that is there.
    """
    about_shape = (kind == "call_method" and target in SHAPE_METHODS) or (
        kind == "call_function"
        and (target is getattr and args[1] in SHAPE_ATTRIBUTES or is_arithmetic_on_sizes(target, args))
    )
    key: tuple[Any, ...] = (kind, target, node_args, tuple(node_kwargs.items()))
    if not about_shape:
        if kind != "call_function" or target not in (operator.getitem, getattr) or not isinstance(args[0], ValueProxy):
            return None
        if isinstance(args[0].hc_value, torch.Tensor) or not isinstance(args[1], (str, int)):
            return None
        key = "entry", *node_args[:2]
    try:
        hash(key)
    except TypeError:
        return None
    return key
