"""The graphs of one module's forward: each for some kinds of calls, the first that fits a call runs it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..capture.python_state import GlobalTensor, PythonState, is_plain
from ..connections.frozen import FrozenWatch
from ..errors import DecisionChanged
from ..graphs import meta
from ..graphs.graph_code import shared_function_of
from ..graphs.guards import CHECKS, HINT
from ..graphs.operations import ASKED, is_tensor
from ..graphs.serialize import flatten_graph, unflatten_graph
from ..graphs.shape_reads import is_shape_read
from ..models.copies import copy_inputs
from ..models.state import modules_within, state_restored, undone_on
from ..streams.in_place import has_own_hooks, of_engine

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class Needs:
    """What must be known of a call to tell whether a graph is the right one.

    Attributes:
        late: whether it may stop after an operation that changed the state.
        values: whether it decides on values of tensors or on random numbers.
        asks: whether it asks for the state of torch, such as autocast, or for that of gradients of parameters.
        writes: whether it writes into inputs before it may stop.
        flags: paths of the ``training`` flags that it reads.
        tensors: paths of the parameters and buffers that it decides on.
        touched: modules whose state may have changed when it stops.
    """

    late: bool
    values: bool
    asks: bool
    writes: bool
    flags: tuple[str, ...]
    touched: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


class Variant:
    """A graph, and the Python state that it was traced in.

    Args:
        graph: rewritten.
        state: what its code read of attributes and globals.
        left_out: names of converted residuals that are not in it.
        forward: what runs it, by default code made of the graph.
    """

    def __init__(
        self,
        graph: fx.Graph,
        state: PythonState | None = None,
        left_out: tuple[str, ...] = (),
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self.graph = graph
        self.state = state or PythonState()
        self.left_out = left_out
        self.whole = self.forward = forward or shared_function_of(graph)
        self.needs = needs_of(graph)

    def twin(self) -> Variant:
        """Return the same graph for another module, which is to be in the same Python state."""
        new = object.__new__(Variant)
        new.__dict__.update(self.__dict__)
        new.state = copy.deepcopy(self.state)
        return new

    def __reduce__(self) -> Any:
        return _variant, (flatten_graph(self.graph), self.state, self.left_out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        return Variant(copy.deepcopy(self.graph, memo), copy.deepcopy(self.state, memo), self.left_out)


def _variant(rows: list[tuple[Any, ...]], state: PythonState, left_out: tuple[str, ...]) -> Variant:
    return Variant(unflatten_graph(rows), state, left_out)


def nothing() -> None:
    """Stand for a weak reference to nothing."""
    return None


class Captures:
    """The graphs of a model's blocks, for those that are alike to share."""

    def __init__(self) -> None:
        self._made: dict[Hashable, list[Variant]] = {}
        self.watch = FrozenWatch()
        self.ended: dict[int, Callable[[], Any]] = {}  # what the last block of each trunk gave, read out

    def __reduce__(self) -> Any:
        return Captures, ()

    def add(self, alike: Hashable, variant: Variant) -> None:
        """Offer a graph to blocks that are ``alike``; one that holds objects or tensors of its own is no one else's."""
        if not _holds_objects(variant.graph):
            self._made.setdefault(alike, []).append(variant)

    def twins(self, alike: Hashable) -> Iterator[Variant]:
        """Yield the graphs of blocks that are ``alike``, made for the one that asks."""
        for variant in list(self._made.get(alike, ())):
            yield variant.twin()


def _holds_objects(graph: fx.Graph) -> bool:
    held: list[Any] = []
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            return True
        fx.node.map_aggregate((node.args, node.kwargs), held.append)  # type: ignore[arg-type, func-returns-value]
    return not all(isinstance(value, (fx.Node, range, type(...))) or is_plain(value) for value in held)


def run_first(
    variants: Iterable[Variant], module: nn.Module, holder: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Variant | None, Any]:
    """Run the first graph that decides as this call does; what others did to the state before they stopped is undone.

    Args:
        variants: to try, in order.
        module: that the graphs run on.
        holder: the module that holds the attributes that they read.
        args, kwargs: of the call.

    Returns:
        The graph that fitted and its output; (None, why the first one did not fit) if none did.
    """
    first: DecisionChanged | None = None
    for variant in variants:
        change = variant.state.change(holder)
        if change is not None:
            first = first or DecisionChanged(f"{change}. {HINT}")
            continue
        try:
            return variant, run(variant, module, args, kwargs)
        except DecisionChanged as decision:
            first = first or decision
    return None, first


def run(variant: Variant, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a graph, undoing what it did to the state if it turns out not to fit.

    What hooks did and what was written into inputs is not undone: there a run beforehand, without hooks and on copies,
    tells whether the graph fits.
    """
    needs = variant.needs
    if not needs.late:
        return variant.forward(module, *args, **kwargs)
    if needs.writes or any(map(has_own_hooks, modules_within(module, needs.touched))):
        with state_restored(module):
            variant.forward(_without_hooks(module), *copy_inputs(tuple(args)), **copy_inputs(kwargs))
    with undone_on(DecisionChanged, module, needs.touched):
        return variant.forward(module, *args, **kwargs)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Return a module with the same tensors and objects, without hooks that are no engine's, and so its parts."""
    made: dict[int, nn.Module] = {}

    def bare(module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        if id(module) not in made:
            made[id(module)] = shell = object.__new__(type(module))
            shell.__dict__.update(module.__dict__)
            for name in FORWARD_HOOKS:
                hooks = module.__dict__[name].items()
                shell.__dict__[name] = OrderedDict((key, hook) for key, hook in hooks if of_engine(hook))
            shell.__dict__["_modules"] = {n: m if m is None else bare(m) for n, m in module._modules.items()}
        return made[id(module)]

    return bare(module)


def run_compiled(
    variants: Iterable[Variant], module: nn.Module, holder: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Variant | None, Any]:
    """Do as :func:`run_first` in code that is being compiled, where what is read becomes the compiler's guards."""
    change: Any = None
    for variant in variants:
        try:
            if variant.state.compiled is not None:
                variant.state.compiled(holder)
            return variant, variant.forward(module, *args, **kwargs)
        except (DecisionChanged, TypeError) as decision:
            change = change or decision
    return None, change


def needs_of(graph: fx.Graph) -> Needs:
    """Return what ``graph`` needs to know of a call."""
    working = late = wrote = writes = False
    touched: list[str] = []
    before_check: list[str] = []
    for node in graph.nodes:
        if node.target in CHECKS:
            late, writes = late or working, writes or wrote
            touched += before_check
            before_check = []
            continue
        wrote = wrote or meta.WRITES_INPUT.of(node)
        if node.op == "call_module":
            before_check.append(str(node.target))
            working = True
        elif node.op == "get_attr" and not str(node.target).endswith(("training", "_buffers", "__dict__")):
            before_check.append(str(node.target).rpartition(".")[0])
        elif node.op not in ("placeholder", "get_attr", "output") and not is_shape_read(node):
            working = True
    values = any(meta.ON_VALUES.known(node) for node in graph.nodes if node.target in CHECKS)
    reads = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    flags = tuple(target for target in reads if target.rpartition(".")[2] == "training")
    asks = any(node.target in ASKED or _asks_for_gradients(node) for node in graph.nodes if node.op == "call_function")
    tensors, elsewhere = _decided_on(graph)
    return Needs(late, values, asks or elsewhere, writes, flags, tuple(dict.fromkeys(touched)), tensors)


def _decided_on(graph: fx.Graph) -> tuple[tuple[str, ...], bool]:
    """Return the paths of the tensors that checks depend on, and whether they depend on others that are held."""
    behind: dict[fx.Node, frozenset[fx.Node]] = {}
    decided: set[fx.Node] = set()
    for node in graph.nodes:
        own = frozenset().union(*(behind.get(source, frozenset()) for source in node.all_input_nodes))
        if node.target in CHECKS:
            decided |= own
            continue
        if isinstance(node.target, GlobalTensor) or node.op == "get_attr" and not str(node.target).endswith("training"):
            own = frozenset({node})
        elif is_tensor(node):  # parameters are cast and moved, but no others of another shape take their place
            own = frozenset(n for n in own if not issubclass(meta.TYPE.of(n) or object, nn.Parameter))
        if own:
            behind[node] = own
    paths = {str(node.target) if node.op == "get_attr" else "__dict__" for node in decided}
    held = {path for path in paths if path.endswith("__dict__")}
    return tuple(sorted(paths - held)), bool(held)


def _asks_for_gradients(node: fx.Node) -> bool:
    held: Any = node.args[0] if node.target is getattr else None
    return held is not None and held.op == "get_attr" and node.args[1] in ("grad", "requires_grad")


def decides_on_training(graph: fx.Graph) -> bool:
    """Whether a check of ``graph`` depends on a ``training`` flag."""
    for node in graph.nodes:
        if node.target in CHECKS and any(n.op == "get_attr" for n in node.all_input_nodes):
            return True
    return False


def adopt_constants(module: nn.Module, graph: fx.Graph, traced: nn.Module) -> None:
    """Move the constants of a trace to ``module``, under names that are free there."""
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            value = traced.get_buffer(str(node.target))
            name, number = str(node.target), 0
            while name in module._buffers and module._buffers[name] is not value:
                number += 1
                name = f"{node.target}_{number}"
            module.register_buffer(name, value, persistent=False)
            node.target = name
