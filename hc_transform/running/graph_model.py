"""The converted model: an ordinary GraphModule that traces itself again when a decision changes."""

from __future__ import annotations

import contextlib
import copy
import functools
import html
import logging
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..capture.python_state import is_plain
from ..capture.trace import bind_inputs, raise_own_error
from ..connections.frozen import FrozenWatch
from ..errors import DecisionChanged, TraceError
from ..graphs.serialize import flatten_graph, unflatten_graph
from ..models.copies import REGISTERED_HOOKS, keep_plain_tensors
from ..models.selection import Hints
from ..models.state import is_state, state_restored
from ..options import Options
from ..residuals.analysis import Analysis, analyse_again, log_left_out
from ..residuals.identity import Identity
from ..residuals.keys import add_modules, added_modules, taken_out
from ..residuals.planner import with_keys_of
from ..residuals.report import Report
from ..rewriting.rewrite import rewritten_graph
from ..threads import one_at_a_time
from .module_text import modules_of
from .regions import in_regions
from .retrace import Retraced, foreign_tracer
from .variants import Variant, adopt_constants, run_compiled, run_first

log = logging.getLogger("hc_transform")

HOOKS = (*REGISTERED_HOOKS, "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")
OF_A_GRAPH = frozenset("forward extra_repr _get_name _call_impl _wrapped_call_impl compile".split())
NEVER_PICKLED = ("_graph", "_tracer_cls", "_tracer_extras", "_lineno_map", "_code", "_main", "_chosen")


class HyperConnectedModule(fx.GraphModule):
    """A converted model.

    It holds the original's modules under their names, and each connection under the module that holds its residual,
    in ``hyper_connections``. A call that decides something otherwise than the trace (an optional
    input given later, an image size that needs padding) is traced again with the same connections.

    Attributes:
        hc_report: what was converted, what was not, and why.
    """

    hc_report: Report

    def __init__(
        self,
        original: nn.Module,
        analysis: Analysis,
        added: Mapping[str, nn.Module],
        hints: Hints | None = None,
    ) -> None:
        """Build the module around ``original``, a structural copy that it takes over."""
        add_modules(original, added.items())
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
        self._hints = hints
        self._inlined = analysis.trace.inlined
        self._known = analysis.known
        self._hc_watch = FrozenWatch()
        self._keys = {r.name: r.key for r in analysis.plan.residuals}
        ends = {t.index: (t.residuals[0].key, t.residuals[-1].key) for t in analysis.plan.trunks}
        self._ends = {r.name: ends[t.index] for t in analysis.plan.trunks for r in t.residuals}
        self._variants: list[Variant] = []
        _keep_overridden(self)
        self._main.state = self._state = analysis.trace.state
        self._state.bind(original)  # before anything that it looks up may be replaced
        self.graph.lint()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            original = self.__dict__.get("_original")
            if original is not None and _holds_value(original, name):
                return getattr(original, name)
            if original is None or not hasattr(type(original), name):
                raise
            raise AttributeError(
                f"{name!r} is of the class {type(original).__name__}, and this is its forward as one graph "
                f"(scope='graph'), which has none of its methods: convert with scope='blocks' to keep them"
            ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_original")
        if original is not None and name not in self.__dict__ and is_state(name) and _holds_value(original, name):
            setattr(original, name, value)  # where traced code reads it
        else:
            super().__setattr__(name, value)
            if original is not None and isinstance(original.__dict__.get(name), torch.Tensor):  # both hold it
                original.__dict__[name] = value

    def __repr__(self) -> str:
        return modules_of(self)

    def __str__(self) -> str:
        report = self.__dict__.get("hc_report")
        return repr(self) if report is None else f"{self!r}\n\n{report.summary}"

    def _repr_html_(self) -> str:
        report = self.__dict__.get("hc_report")
        modules = f"<pre>{html.escape(repr(self))}</pre>"
        told = "" if report is None else report._repr_html_()
        return f"<p><b>{type(self).__name__}</b></p>{told}<details><summary>modules</summary>{modules}</details>"

    def recompile(self) -> Any:
        """Compile the graph's code; ``forward`` runs it and minds its decisions."""
        code = super().recompile()
        cls: Any = type(self)
        state = self.__dict__.get("_state")
        self._main = Variant(self._graph, state, forward=cls.forward)
        for variant in (self._main, *self.__dict__.get("_variants", ())):
            variant.forward = self._in_regions(variant.graph, variant.whole)
        self._chosen: dict[Any, Variant] = {}  # for each kind of call, the graph that ran it

        @functools.wraps(cls.forward)
        def forward(self: HyperConnectedModule, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                variant, result = run_compiled(self._all_variants(), self, self._holder, args, kwargs)
                if variant is None:
                    raise result
                return result
            tracer = foreign_tracer(args, kwargs)
            return self._run(args, kwargs) if tracer is None else Retraced(self, tracer).call(args, kwargs)

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

    @property
    def _holder(self) -> nn.Module:
        """The module that holds the attributes that traced code reads."""
        return self.__dict__["_original"]

    @property
    def keys_by_name(self) -> dict[str, str]:
        """The path of the connection of each residual, by the residual's name."""
        return dict(self._keys)

    @property
    def decides_on_values(self) -> bool:
        """Whether its code decides on values of tensors or on random numbers, so that it takes many graphs."""
        return any(variant.needs.values for variant in self._all_variants())

    def _all_variants(self) -> list[Variant]:
        return [self._main, *self._variants]

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first graph that fits the call; trace another if none does."""
        if self.training:
            self._hc_watch.passed(self, type(self).__name__, first=True, last=True)
        variants = self._all_variants()
        kind = self._kind_of_call(args, kwargs) if any(v.needs.late for v in variants) else None
        known = self._chosen.get(kind) if kind is not None else None
        if known is not None and known.state.change(self._holder) is None:
            return known.forward(self, *args, **kwargs)
        variant, output = run_first(variants, self, self._holder, args, kwargs)
        if variant is None:
            variant = self._variant_for(args, kwargs, output)
            output = variant.forward(self, *args, **kwargs)
        if kind is not None:
            self._chosen[kind] = variant
        return output

    def _variant_for(self, args: tuple[Any, ...], kwargs: dict[str, Any], change: DecisionChanged) -> Variant:
        """Return a new graph for a call; where there can be none, raise what the original raises on it, if it does."""
        try:
            return self.trace_variant(args, kwargs, change)
        except TraceError:
            with self._as_it_was() as original:
                raise_own_error(original, args, kwargs)
            raise

    def _kind_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return all that decisions on a call depend on; None if they depend on more than is seen from outside."""
        needs = [variant.needs for variant in self._all_variants()]
        leaves, structure = pytree.tree_flatten((args, kwargs))
        kinds = tuple(map(_kind_of_input, leaves))
        if None in kinds or any(need.values or need.asks for need in needs):
            return None
        flags = tuple(operator.attrgetter(flag)(self) for need in needs for flag in need.flags)
        held = tuple(_kind_of_input(operator.attrgetter(path)(self)) for need in needs for path in need.tensors)
        return structure, kinds, flags, held, torch.is_grad_enabled()

    @torch.compiler.disable  # where compiled code breaks off, it does not compile this
    @one_at_a_time
    def trace_variant(
        self, args: Sequence[Any], kwargs: dict[str, Any], change: DecisionChanged | None = None
    ) -> Variant:
        """Trace the original once more for inputs like these, with the same connections.

        Residuals that this call does without leave their connections out.

        Raises:
            TraceError: the model has other residuals for these inputs, or cannot be traced.
        """
        known = self._still_known()
        with self._as_it_was() as original, state_restored(original):
            analysis = analyse_again(
                original,
                bind_inputs(original, tuple(args), kwargs),
                self._options,
                self._hints,
                self._inlined,
                known,
                change,
                frozenset(path for path in self._inlined if path and _has_forward_hooks(original, path)),
            )
        graph = rewritten_graph(analysis.trace.graph_module, with_keys_of(analysis.plan, self._keys, self._ends))
        adopt_constants(self, graph, analysis.trace.graph_module)
        log.info("traced again: %s", change)
        log_left_out(type(self).__name__, analysis)
        analysis.trace.state.bind(self._holder)
        variant = Variant(graph, analysis.trace.state, analysis.left_out)
        variant.forward = self._in_regions(graph, variant.whole)
        self._variants.append(variant)
        self._chosen.clear()
        return variant

    def _still_known(self) -> tuple[Identity, ...]:
        """Return what residuals are known by; one whose connection went with a module that was replaced is plain."""
        there = added_modules(self)
        gone = {k for k in self._known if k.name is not None and self._keys[k.name] not in there}
        for identity in gone:
            log.warning("%s stays plain: the module that held its connection was replaced", identity.name)
        return tuple(replace(k, name=None) if k in gone else k for k in self._known)

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[nn.Module]:
        """Yield the original, in the present mode and without connections, which an nn.Sequential would call."""
        original: nn.Module = self.__dict__["_original"]
        original.training = self.training
        with taken_out(original):
            yield original

    def __deepcopy__(self, memo: dict[int, Any]) -> HyperConnectedModule:
        new: HyperConnectedModule = object.__new__(type(self))  # of one class, as copies of other modules are
        memo[id(self)] = new
        state = {name: value for name, value in self.__dict__.items() if name not in NEVER_PICKLED}
        return _restored(new, copy.deepcopy(state, memo), copy.deepcopy(self._graph, memo))

    def __reduce__(self) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in NEVER_PICKLED}
        return _rebuilt, (state, flatten_graph(self._graph))


def _rebuilt(state: dict[str, Any], rows: list[tuple[Any, ...]]) -> HyperConnectedModule:
    return _restored(HyperConnectedModule.__new__(HyperConnectedModule), state, unflatten_graph(rows))


def _restored(new: HyperConnectedModule, state: dict[str, Any], graph: fx.Graph) -> HyperConnectedModule:
    nn.Module.__init__(new)
    new.__dict__.update(state, _tracer_cls=None, _tracer_extras={})
    new.graph = graph
    type(new).__name__ = type(state["_original"]).__name__
    _keep_overridden(new)
    return new


def overridden(cls: type[nn.Module]) -> list[str]:
    """Return the names of the methods of nn.Module that a class has in a form of its own, such as ``train``."""
    public = (n for n, m in vars(nn.Module).items() if isinstance(m, types.FunctionType) and n not in OF_A_GRAPH)
    return [n for n in public if n[:2] != "__" and getattr(cls, n) is not getattr(nn.Module, n)]


def _keep_overridden(model: HyperConnectedModule) -> None:
    """Let methods of nn.Module that the original's class has in a form of its own be those of the graph too."""

    def method_of(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(type(model.__dict__["_original"]), name))
        def method(self: HyperConnectedModule, *args: Any, **kwargs: Any) -> Any:
            original: nn.Module = self.__dict__["_original"]
            original.training = self.training
            result = getattr(original, name)(*args, **kwargs)
            self.training = original.training
            return self if result is original else result

        return method

    type(model)._version = type(model.__dict__["_original"])._version  # which loading of old checkpoints asks for
    for name in overridden(type(model.__dict__["_original"])):
        setattr(type(model), name, method_of(name))


def _holds_value(original: nn.Module, name: str) -> bool:
    """Whether an attribute of the original, or of its class, is a value that traced code may read, and no method."""
    of_class = getattr(type(original), name, original)
    return name in original.__dict__ or is_plain(of_class) and not hasattr(nn.Module, name)


def _has_forward_hooks(model: nn.Module, path: str) -> bool:
    try:
        return bool(model.get_submodule(path)._forward_hooks)
    except AttributeError:  # replaced by another module
        return False


def _kind_of_input(value: Any) -> Any:
    """Return what decisions on an input may depend on: a tensor's shape, a constant itself. None if it is not known."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.requires_grad, value.is_contiguous()
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return type(value), value
    return None
