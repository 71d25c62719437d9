"""The converted model: an ordinary GraphModule that traces itself again when a decision changes."""

from __future__ import annotations

import copy
import functools
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .additions import CONNECTIONS_NAME
from .errors import DecisionChanged, TraceError
from .flat import flatten_graph, unflatten_graph
from .graph_code import shared_function_of
from .guards import CHECKS
from .hints import Hints
from .options import Options
from .pipeline import Analysis, analyse
from .reads import is_shape_read
from .regions import in_regions
from .report import Report
from .rewrite import rewritten_graph
from .structure import keep_plain_tensors, state_restored, undone_on
from .trace import bind_inputs

log = logging.getLogger("hc_transform")

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
NEVER_PICKLED = ("_graph", "_tracer_cls", "_tracer_extras", "_lineno_map", "_code")


class Variant:
    """A graph for calls that decide otherwise than the main one."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.whole = self.forward = shared_function_of(graph)
        self.needs = needs_of(graph)

    def __reduce__(self) -> Any:
        return _variant, (flatten_graph(self.graph),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        return Variant(copy.deepcopy(self.graph, memo))


class HyperConnectedModule(fx.GraphModule):
    """A converted model.

    It holds the original's modules under their names, and the connections under
    ``hyper_connections``. A call that decides something otherwise than the trace (an optional
    input given later, an image size that needs padding) is traced again with the same connections.

    Attributes:
        hc_report: what was converted, what was not, and why.
    """

    hc_report: Report
    _run_graph: Callable[..., Any]

    def __init__(
        self,
        original: nn.Module,
        analysis: Analysis,
        connections: nn.ModuleDict,
        hints: Hints | None = None,
    ) -> None:
        """Build the module around ``original``, a structural copy that it takes over."""
        if connections:
            original.add_module(CONNECTIONS_NAME, connections)
        graph = rewritten_graph(analysis.trace.graph_module, analysis.plan)
        adopt_constants(original, graph, analysis.trace.graph_module)
        super().__init__(original, graph, type(original).__name__)
        # One set of dictionaries for both, so that moves, casts and loads reach both.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS):
            self.__dict__[name] = original.__dict__[name]
        keep_plain_tensors(self, original)
        self.__dict__["_original"] = original
        self.training = original.training
        self._options: Options = analysis.plan.options
        self._names = tuple(r.name for r in analysis.plan.residuals)
        self._hints = hints
        self._variants: list[Variant] = []
        self.graph.lint()

    def recompile(self) -> Any:
        """Compile the graph's code; ``forward`` runs it and minds its decisions."""
        code = super().recompile()
        cls: Any = type(self)
        cls._run_graph = self._in_regions(self._graph, cls.forward)
        for variant in self.__dict__.get("_variants", ()):
            variant.forward = self._in_regions(variant.graph, variant.whole)
        self._needs = needs_of(self._graph)
        self._watched = self._needs.late
        self._chosen: dict[Any, int] = {}  # for each kind of call, the graph that ran it

        @functools.wraps(cls.forward)
        def forward(self: HyperConnectedModule, *args: Any, **kwargs: Any) -> Any:
            if self._watched and not torch.compiler.is_compiling():
                return self._run_watched(args, kwargs)
            try:
                return self._run_graph(*args, **kwargs)
            except DecisionChanged as change:
                return self._run_otherwise(change, args, kwargs)

        own: Any = forward
        own.__code__ = own.__code__.replace()  # torch.compile counts recompilations by code object
        cls.forward = own
        return code

    def compile_regions(self, **settings: Any) -> None:
        """See :func:`hc_transform.compile_regions`."""
        self._region_settings = settings
        self.recompile()

    def _in_regions(self, graph: fx.Graph, whole: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs ``graph``: compiled regions if they were asked for, else ``whole``."""
        settings = self.__dict__.get("_region_settings")
        if settings is None:
            return whole
        regions = in_regions(graph, self, settings)

        def run(self: HyperConnectedModule, *args: Any, **kwargs: Any) -> Any:
            function = whole if torch.compiler.is_compiling() else regions  # a compiler that looks on gets all of it
            return function(self, *args, **kwargs)

        return run

    def _run_watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first graph that decides as this call does; undo what others did to the state before they stopped."""
        graphs: list[Callable[..., Any]] = [
            self._run_graph,
            *(functools.partial(variant.forward, self) for variant in self._variants),
        ]
        kind = self._kind_of_call(args, kwargs)
        if kind in self._chosen:
            return graphs[self._chosen[kind]](*args, **kwargs)
        first: DecisionChanged | None = None
        for number, run in enumerate(graphs):
            try:
                with undone_on(DecisionChanged, self):
                    output = run(*args, **kwargs)
            except DecisionChanged as change:
                first = first or change
                continue
            if kind is not None:
                self._chosen[kind] = number
            return output
        return self.trace_variant(args, kwargs, first).forward(self, *args, **kwargs)

    def _kind_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return all that decisions on a call depend on; None if they depend on more than is seen from outside."""
        graphs = [self._needs, *(variant.needs for variant in self._variants)]
        leaves, structure = pytree.tree_flatten((args, kwargs))
        kinds = tuple(map(_kind_of_input, leaves))
        if None in kinds or any(needs.values for needs in graphs):
            return None
        return structure, kinds, tuple(operator.attrgetter(flag)(self) for needs in graphs for flag in needs.flags)

    def _run_otherwise(self, change: DecisionChanged, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for variant in self._variants:
            try:
                return variant.forward(self, *args, **kwargs)
            except DecisionChanged:
                continue
        if torch.compiler.is_compiling():
            raise change
        return self.trace_variant(args, kwargs, change).forward(self, *args, **kwargs)

    def trace_variant(
        self, args: Sequence[Any], kwargs: dict[str, Any], change: DecisionChanged | None = None
    ) -> Variant:
        """Trace the original once more for inputs like these, with the same connections.

        Raises:
            TraceError: the model has other residuals for these inputs, or cannot be traced.
        """
        original: nn.Module = self.__dict__["_original"]
        original.training = self.training
        options = self._options
        connections = original._modules.pop(CONNECTIONS_NAME, None)  # which an nn.Sequential would call
        try:
            with state_restored(self):
                analysis = analyse(original, bind_inputs(original, tuple(args), kwargs), options, self._hints)
        finally:
            if connections is not None:
                original._modules[CONNECTIONS_NAME] = connections
        names = tuple(r.name for r in analysis.plan.residuals)
        if names != self._names:
            differ = sorted(set(names) ^ set(self._names))
            raise TraceError(
                f"for these inputs the model has other residuals than those that were converted: {', '.join(differ)}. "
                f"{change or ''} Convert another copy of the model with example inputs like these."
            ) from change
        graph = rewritten_graph(analysis.trace.graph_module, analysis.plan)
        adopt_constants(self, graph, analysis.trace.graph_module)
        log.info("traced again: %s", change)
        variant = Variant(graph)
        variant.forward = self._in_regions(graph, variant.whole)
        self._variants.append(variant)
        self._watched = self._watched or variant.needs.late
        return variant

    def __deepcopy__(self, memo: dict[int, Any]) -> HyperConnectedModule:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = {name: value for name, value in self.__dict__.items() if name not in NEVER_PICKLED}
        return _restored(new, copy.deepcopy(state, memo), copy.deepcopy(self._graph, memo))

    def __reduce__(self) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in NEVER_PICKLED}
        return _rebuilt, (state, flatten_graph(self._graph))


def decides_on_training(graph: fx.Graph) -> bool:
    """Whether a check of ``graph`` depends on a ``training`` flag."""
    for node in graph.nodes:
        if node.target in CHECKS and any(n.op == "get_attr" for n in node.all_input_nodes):
            return True
    return False


def _variant(rows: list[tuple[Any, ...]]) -> Variant:
    return Variant(unflatten_graph(rows))


def _rebuilt(state: dict[str, Any], rows: list[tuple[Any, ...]]) -> HyperConnectedModule:
    return _restored(HyperConnectedModule.__new__(HyperConnectedModule), state, unflatten_graph(rows))


def _restored(new: HyperConnectedModule, state: dict[str, Any], graph: fx.Graph) -> HyperConnectedModule:
    nn.Module.__init__(new)
    new.__dict__.update(state, _tracer_cls=None, _tracer_extras={})
    new.graph = graph
    type(new).__name__ = type(state["_original"]).__name__
    return new


def _kind_of_input(value: Any) -> Any:
    """Return what decisions on an input may depend on: a tensor's shape, a constant itself. None if it is not known."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return type(value), value
    return None


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


class Needs(NamedTuple):
    """What must be known of a call to tell whether a graph is the right one.

    ``late``: it may stop after an operation that changed the state; ``values``: it decides on values of
    tensors; ``flags``: paths of the ``training`` flags that it reads.
    """

    late: bool
    values: bool
    flags: tuple[str, ...]


def needs_of(graph: fx.Graph) -> Needs:
    """Return what ``graph`` needs to know of a call."""
    working = late = False
    for node in graph.nodes:
        if node.target in CHECKS:
            late = late or working
        elif node.op not in ("placeholder", "get_attr", "output") and not is_shape_read(node):
            working = True
    values = any("hc_on_values" in node.meta for node in graph.nodes if node.target in CHECKS)
    reads = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    return Needs(late, values, tuple(target for target in reads if target.rpartition(".")[2] == "training"))
