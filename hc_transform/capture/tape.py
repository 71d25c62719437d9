"""Record one real run of a model as a graph.

Nothing is traced: the model runs as it always does, on real tensors, and every torch call is
written down with the module calls it was made in. So a tape exists of any model that runs, whatever its
Python does; it shows where the residuals are and how values travel between modules. It holds for that
one run alone: what Python decided is not on it.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from ..graphs import meta
from ..graphs.aliases import layout_of, memory_of, written_through
from ..graphs.dialects import name_of
from ..graphs.operations import Kind, set_item
from ..graphs.passes import logged_pass
from ..graphs.row_sums import unflatten_row_sums
from ..graphs.shape_reads import LAYOUT_METHODS, SHAPE_ATTRIBUTES
from ..graphs.source_lines import is_library_code, user_frame, user_lines
from ..models.compare import tensors_of
from ..models.copies import compiled_from, copy_inputs, has_hooks, keep_plain_tensors
from ..models.draws import host_states
from ..models.state import grad_mode_of_runs, seed_generators, state_restored
from ..streams.in_place import version_of
from ..threads import replaced, uncompiled
from .add_bytecode import INLINED_FROM_TORCH, may_add
from .kinds import Kinds
from .proxy import AppliedFunction
from .watch import shared_state_restored

CONSTANT = "_tape_constant"
VALUE_READS = frozenset(
    "item tolist numpy equal allclose __bool__ __int__ __float__ __index__ __contains__ nonzero".split()
)


@dataclass(frozen=True)
class Call:
    """One call of a module: the ``index``-th of the module at ``path``, counted from 0."""

    path: str
    index: int


@dataclass(frozen=True)
class Tape:
    """One recorded run.

    Attributes:
        graph_module: every torch call as a node. ``meta.CALLS`` holds the module calls it was
            made in, outermost first; ``meta.MODULE`` the path of the innermost.
        inputs: the tensors of the run's inputs, in the order of the placeholders.
        reads_values: whether Python took numbers out of computed tensors, so that other values could take
            another way.
        draws: whether Python's or numpy's generators were drawn from.
        closes_over: whether a function under ``torch.vmap`` uses more than it is given.
        asks_layout: whether code asked how a tensor lies in memory.
        leaves: what modules of the user's that stand as one operation, and whose code adds, were first called with.
    """

    graph_module: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    reads_values: bool = False
    draws: bool = False
    closes_over: bool = False
    asks_layout: bool = False
    leaves: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def decides(self) -> bool:
        """Whether another run may take another way."""
        return self.reads_values or self.draws

    @property
    def named_inputs(self) -> dict[str, torch.Tensor]:
        """The inputs by the names of their placeholders."""
        names = [str(node.target) for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        return dict(zip(names, self.inputs, strict=True))


@logged_pass
def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tape:
    """Run ``model`` once and return the tape. State and random numbers are put back afterwards."""
    args, kwargs = copy_inputs(tuple(args)), copy_inputs(dict(kwargs))
    recorder = _Recorder(model)
    with (
        state_restored(model, True),
        shared_state_restored(model),
        grad_mode_of_runs(),
        uncompiled(),
        recorder.patched(),
    ):
        seed_generators()
        inputs = [t for leaf in pytree.tree_leaves((args, kwargs)) for t in tensors_in(leaf)]
        for tensor in inputs:
            recorder.input(tensor)
        kept = tuple(tensor.clone() for tensor in inputs)  # a model may write into its inputs
        host = host_states()
        with recorder:
            output = model(*args, **kwargs)
        draws = host_states() != host
    seen = recorder.reads_values, draws, recorder.closes_over, recorder.asks_layout
    return Tape(recorder.finish(output), kept, *seen, recorder.leaves)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph = fx.Graph()
        self.paths = {module: path for path, module in model.named_modules()}
        self.kinds = Kinds(fx.GraphModule(nn.Module(), fx.Graph()))
        self.node_of: dict[int, fx.Node] = {}
        self.versions: dict[int, int] = {}  # of the tensors, as nodes stand for them
        self.writes: dict[int, list[tuple[int, torch.Tensor, fx.Node]]] = {}  # by memory: version then, into what, by
        self.alive: list[Any] = []  # so that no id is used twice
        self.constants: dict[str, Any] = {}
        self.attributes = {id(p): name for name, p in (*model.named_parameters(), *model.named_buffers())}
        self.calls: list[Call] = []
        self.count: Counter[str] = Counter()
        self.inside_leaf = 0
        self.leaves: dict[str, tuple[Any, Any]] = {}
        self.reads_values = False
        self.closes_over = False
        self.asks_layout = False
        self.used: dict[int, torch.Tensor] | None = None  # within torch.vmap: what its function is seen to use

    # -- what is recorded

    def input(self, tensor: torch.Tensor) -> None:
        node = self.graph.placeholder(f"input_{len(self.alive)}")
        self._stands_for(node, tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: C901  # one rule for each kind of call
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in LAYOUT_METHODS:  # torch's code asks too, and works on any layout
            self.asks_layout = self.asks_layout or not is_library_code(sys._getframe(1))
        if self.inside_leaf:
            if self.used is not None:
                known = (t for t in tensors_in((args, kwargs)) if id(t) in self.node_of or id(t) in self.attributes)
                self.used.update((id(t), t) for t in known)
            return func(*args, **kwargs)
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        if name == "__set__" or not (tensors_in((args, kwargs)) or _is_factory(func)):
            return func(*args, **kwargs)
        before = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs)) if not tensor.is_inference()]
        value = func(*args, **kwargs)
        self.reads_values = self.reads_values or name in VALUE_READS
        method = is_tensor_method_or_property(func)
        target: Any = name if method else func
        if name == "__setitem__":
            method, target = False, set_item
        if not tensors_in(value) and target is not set_item:
            return value  # reads a shape or a number
        node = self._node("call_method" if method else "call_function", target, args, kwargs)
        if target is not set_item:
            self._results(node, value)
        changed = [tensor for tensor, version in before if tensor._version != version]
        for tensor in changed:  # views of one tensor change together; the first is what was written to
            if tensor is changed[0] or tensor.untyped_storage()._cdata != changed[0].untyped_storage()._cdata:
                self._rebind(tensor, node)
        return value

    def _attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = func(*args, **kwargs)
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if isinstance(value, torch.Tensor) and name not in SHAPE_ATTRIBUTES and name != "grad":
            self._results(self._node("call_function", getattr, (args[0], name), {}), value)
        return value

    def call_module(self, module: nn.Module, plain: Any, args: Any, kwargs: Any) -> Any:
        path = self.paths.get(module)
        if self.inside_leaf or path is None:
            return plain(module, *args, **kwargs)
        self.calls.append(Call(path, self.count[path]))
        self.count[path] += 1
        try:
            several = len(tensors_in((args, kwargs))) > 1  # one that adds them up is looked into
            written = None if has_hooks(module) else compiled_from(module)
            if written is not None:
                return written(*args, **kwargs)
            if path == "" or not self._is_leaf(module) or several and may_add(module):
                value = plain(module, *args, **kwargs)
                self._note_given_back(path, (args, kwargs), value)
                return value
        finally:
            self.calls.pop()
        if not type(module).__module__.startswith("torch.") and may_add(module):
            self.leaves.setdefault(path, (args, kwargs))
        self.inside_leaf += 1
        try:
            value = plain(module, *args, **kwargs)
        finally:
            self.inside_leaf -= 1
        self._results(self._node("call_module", path, args, kwargs), value)
        return value

    def _note_given_back(self, path: str, given: Any, value: Any) -> None:
        """Note which of its inputs a module returned: in a graph that does not look into it they are others."""
        inputs = {id(tensor) for tensor in tensors_in(given)}
        for tensor in tensors_in(value):
            if id(tensor) in inputs and (node := self.node_of.get(id(tensor))) is not None:
                meta.GIVEN_BACK.set(node, (*meta.GIVEN_BACK.of(node), path))

    def vmap(self, plain: Any, func: Any, settings: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        """Record a call of what ``torch.vmap`` returned as one, also of what its function closes over."""
        if self.inside_leaf:
            return plain(func, *settings, *args, **kwargs)
        self.inside_leaf, self.used = 1, {}
        try:
            value = plain(func, *settings, *args, **kwargs)
        finally:
            self.inside_leaf, used, self.used = 0, self.used, None
        given = {id(tensor) for tensor in tensors_in((args, kwargs))}
        outside = [self._node_of(tensor) for key, tensor in used.items() if key not in given]
        self.closes_over = self.closes_over or any(node.op != "get_attr" for node in outside)
        node = self._node("call_function", RecordedVmap(plain, func, settings), (tuple(args), dict(kwargs), ()), {})
        node.args = (*node.args[:2], tuple(outside))
        self._results(node, value)
        return value

    def _is_leaf(self, module: nn.Module) -> bool:
        """Whether a module is written down as one: torch's own, and small ones such as norms."""
        if isinstance(module, torch.jit.ScriptModule):
            return True
        # A class that parametrize makes is of torch, and the code that it runs is not.
        home = next(c.__module__ for c in type(module).__mro__ if c.__module__ != "torch.nn.utils.parametrize")
        if home.startswith(("torch.nn.", "torch.ao.")):
            return not home.startswith(INLINED_FROM_TORCH)
        if next(module.children(), None) is not None:
            return False
        self.inside_leaf += 1  # judging a module runs its code
        try:
            return self.kinds.of_module(module) is not Kind.MIX
        finally:
            self.inside_leaf -= 1

    # -- how it is recorded

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node_args, node_kwargs = self._argument(tuple(args)), self._argument(dict(kwargs))
        node = self.graph.create_node(op, target, node_args, node_kwargs)
        self._locate(node)
        return node

    def _locate(self, node: fx.Node) -> None:
        meta.CALLS.set(node, tuple(self.calls))
        meta.MODULE.set(node, self.calls[-1].path if self.calls else "")
        frame = user_frame()
        if frame is not None:
            meta.LOCATION.set(node, f"{frame[0]}:{frame[1]}")
            meta.LINES.set(node, user_lines())

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._node_of(value)
        if type(value) in (tuple, list):
            return type(value)(self._argument(v) for v in value)
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: self._argument(v) for key, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.Size):
            return tuple(value)
        if value is None or value is Ellipsis or type(value) in (bool, int, float, complex, str):
            return value
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return value
        leaves, spec = pytree.tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            return self._constant(value)
        entries, how = [self._argument(v) for v in leaves], self._constant(spec)
        rebuilt = self.graph.call_function(pytree.tree_unflatten, (entries, how))
        self._locate(rebuilt)
        return rebuilt

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        node = self.node_of.get(id(tensor))
        if node is not None:
            return self._after_writes(tensor, node)
        name = self.attributes.get(id(tensor))
        if name is None:  # made where no torch function shows: a constant of this run
            kept = tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
            return self._stands_for(self._constant(kept), tensor)
        return self._stands_for(self.graph.get_attr(name), tensor)

    def _after_writes(self, tensor: torch.Tensor, node: fx.Node) -> fx.Node:
        """Return what stands for a tensor after others that share its memory were written into."""
        before = self.versions[id(tensor)]
        if version_of(tensor) == before:
            return node
        for version, written, write in self.writes.get(memory_of(tensor), ()):
            layouts = layout_of(tensor), layout_of(written)
            if version > before and None not in layouts:
                node = self.graph.call_function(written_through, (node, write, layouts))
                self._locate(node)
                self._stands_for(node, tensor)
        return node

    def _constant(self, value: Any) -> fx.Node:
        name = f"{CONSTANT}{len(self.constants)}"
        self.constants[name] = value
        return self.graph.create_node("get_attr", name)

    def _stands_for(self, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
        self.node_of[id(tensor)] = node
        self.versions[id(tensor)] = version_of(tensor)
        self.alive.append(tensor)
        meta.TYPE.set(node, torch.Tensor)
        node.meta["tensor_meta"] = _extract_tensor_metadata(tensor)
        return node

    def _rebind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Let ``node`` stand for a tensor that was changed in place."""
        self._stands_for(node, tensor)
        self.writes.setdefault(memory_of(tensor), []).append((version_of(tensor), tensor, node))

    def _results(self, node: fx.Node, value: Any) -> None:
        """Let nodes stand for every tensor in a nested result."""
        if isinstance(value, torch.Tensor):
            known = self.node_of.get(id(value))
            if known is not None and node.op == "call_function" and node.target is getattr:
                return
            if known is not None and self._is_given_back(node, value):  # x.to(x.dtype) is x, for all who use either
                self.graph.erase_node(node)
                return
            self._stands_for(node, value)
            return
        meta.TYPE.set(node, type(value))
        if isinstance(value, Mapping):
            entries: Iterator[tuple[Any, Any]] = iter(value.items())
        elif isinstance(value, (tuple, list)):
            entries = iter(enumerate(value))
        elif hasattr(value, "__dict__"):
            entries = iter(vars(value).items())
        else:
            return
        for key, entry in entries:
            if tensors_in(entry) and not (isinstance(entry, torch.Tensor) and id(entry) in self.node_of):
                access = getattr if not isinstance(value, (Mapping, tuple, list)) else operator.getitem
                item = self.graph.call_function(access, (node, key))
                self._locate(item)
                self._results(item, entry)

    def _is_given_back(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Whether a function returned one of its operands, and did nothing to it.

        A module that does stands for a step of its own, as it does in a trace.
        """
        if (
            node.op == "call_module"
            or node.users
            or value.is_inference()
            or version_of(value) != self.versions[id(value)]
        ):
            return False
        return self.node_of[id(value)] in node.all_input_nodes and not name_of(node).endswith("_")

    def finish(self, output: Any) -> fx.GraphModule:
        self.graph.output(tuple(self._node_of(t) for t in tensors_of(output)))
        unflatten_row_sums(self.graph)
        root = nn.Module()
        for name in ("_parameters", "_buffers", "_modules"):
            root.__dict__[name] = dict(self.model.__dict__[name])
        keep_plain_tensors(root, self.model)
        root.__dict__.update(self.constants)
        module = _TapeModule(root, self.graph)
        module.training = self.model.training
        self.alive.clear()
        self.node_of.clear()
        return module

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Let calls of modules and of custom autograd functions pass through the recorder."""
        plain_call = nn.Module.__call__
        plain_apply = torch.autograd.Function.__dict__["apply"]
        plain_vmap = torch._functorch.apis.vmap_impl  # type: ignore[attr-defined]  # which it imports
        plain_script: Any = torch.jit.ScriptFunction.__call__
        recorder, thread = self, threading.get_ident()

        def vmap(func: Any, *given: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return plain_vmap(func, *given, **kwargs)
            return recorder.vmap(plain_vmap, func, given[:4], given[4:], kwargs)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return plain_call(module, *args, **kwargs)
            return recorder.call_module(module, plain_call, args, kwargs)

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if recorder.inside_leaf or threading.get_ident() != thread:
                return plain_apply.__get__(None, cls)(*args, **kwargs)
            if cls is CheckpointFunction:  # what it runs is the model's own code
                function, _, *given = args
                return function(*given)
            recorder.inside_leaf += 1
            try:
                value = plain_apply.__get__(None, cls)(*args, **kwargs)
            finally:
                recorder.inside_leaf -= 1
            recorder._results(recorder._node("call_function", AppliedFunction(cls), args, kwargs), value)
            return value

        def script(function: Any, *args: Any, **kwargs: Any) -> Any:
            if recorder.inside_leaf or threading.get_ident() != thread:
                return plain_script(function, *args, **kwargs)
            value = plain_script(function, *args, **kwargs)
            recorder._results(recorder._node("call_function", function, args, kwargs), value)
            return value

        with replaced(
            (torch.jit.ScriptFunction, "__call__", script),
            (nn.Module, "__call__", call),
            (torch.autograd.Function, "apply", classmethod(apply)),
            (torch._functorch.apis, "vmap_impl", vmap),
        ):
            yield


class _TapeModule(fx.GraphModule):
    """A graph that is looked at and interpreted, never run as Python code: its constants may be anything."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in root.__dict__.items() if k.startswith(CONSTANT)})
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = root.__dict__[name]
        keep_plain_tensors(self, root)
        self.__dict__["_graph"] = graph
        graph.owning_module = self

    def recompile(self) -> Any:
        """Make no code."""


class RecordedVmap:
    """Calls what ``torch.vmap`` returned as it was called in a recorded run."""

    __name__ = "vmap"

    def __init__(self, vmap: Any, function: Any, settings: tuple[Any, ...]) -> None:
        self.vmap, self.function, self.settings = vmap, function, settings

    def __call__(self, args: Any, kwargs: Any, outside: Any) -> Any:
        """Call it; ``outside`` is what its function has closed over."""
        return self.vmap(self.function, *self.settings, *args, **kwargs)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a nested value, also in those of mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    return []


def _is_factory(func: Any) -> bool:
    from ..graphs.operations import FACTORIES

    return getattr(func, "__name__", "") in FACTORIES
