"""From a model to a graph that shows its residual adds and keeps everything else in leaf modules."""

from __future__ import annotations

import contextlib
import inspect
import logging
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..errors import NEVER_HIDDEN, TraceError, UnsupportedModel
from ..graphs import meta
from ..graphs.aliases import written_through
from ..graphs.guards import CHECKS, check_equal
from ..graphs.passes import logged_pass
from ..graphs.row_sums import unflatten_row_sums
from ..graphs.shape_reads import is_shape_read
from ..graphs.source_lines import INTERNAL_FILES
from ..models.copies import clone_structure, copy_inputs, has_hooks, keep_plain_tensors
from ..models.selection import Hints
from ..models.state import Undo, saved_state, state_restored
from ..threads import uncompiled
from .add_bytecode import candidates, with_parents
from .passed_inputs import loosen
from .proxy import UNKNOWN, AsksForGradients, CannotInline
from .python_state import Count, Present, PythonState, Read
from .stored_attributes import record_assignments, show_plain_tensors
from .tracer import ValueTracer

log = logging.getLogger("hc_transform")


@dataclass(frozen=True)
class Trace:
    """One traced forward.

    Attributes:
        graph_module: the graph, over a structural copy of the model.
        inlined: paths of the modules whose code is in the graph.
        opaque: modules that may hold residual adds and stayed leaves, with the reason.
        calls: what those were called with, by path, where example inputs tell.
        reads_training: whether the graph reads a ``training`` flag.
        has_values: whether example inputs were given.
        state: the Python state that the code read.
        deciders: paths of modules whose code decides on values of tensors or on random numbers.
    """

    graph_module: fx.GraphModule
    inlined: frozenset[str]
    opaque: Mapping[str, str] = field(default_factory=dict)
    calls: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    reads_training: bool = False
    has_values: bool = True
    state: PythonState = field(default_factory=PythonState)
    deciders: frozenset[str] = frozenset()


def bind_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each forward parameter that ``args`` and ``kwargs`` give.

    Raises:
        TraceError: they do not fit the signature of ``model.forward``.
    """
    signature = inspect.signature(model.forward)
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TraceError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}. "
            "Give args= and kwargs= as you would call the model."
        ) from None


@logged_pass
def trace(  # noqa: C901  # one attempt after the other, each with what it falls back to
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    *,
    inline: frozenset[str] | None = None,
    hints: Hints | None = None,
    probing: bool = False,
    loose: bool = False,
    observed: frozenset[str] = frozenset(),
) -> Trace:
    """Trace ``model``, leaving as leaves those modules whose code cannot be traced.

    Args:
        model: the model; it is not changed.
        inputs: example values by parameter name (see :func:`bind_inputs`); None to trace without.
        inline: paths of the modules to trace into; by default all that may hold a residual add.
        hints: what to wrap, to leave whole and to look into.
        probing: trace also what a graph cannot hold, to see what is there. The graph is not to be run.
        loose: inputs that the code only passes on are not checked; see :mod:`hc_transform.capture.passed_inputs`.
        observed: modules to trace into although they have forward hooks, which the graph calls.

    Raises:
        PatternError: a hint names no module.
        TraceError: the root's own code cannot be traced.
    """
    hints = hints or Hints()
    wanted = inline
    if wanted is None:
        wanted = candidates(model).union(*(with_parents(p) for p in hints.chosen("inline_modules", model)))
    opaque = dict.fromkeys(hints.chosen("leaf_modules", model), "leaf_modules names it")
    for path, module in model.named_modules():
        if path and path in wanted and not probing and (reason := _must_stay_leaf(module, path in observed)):
            opaque[path] = reason
    grad_mode, gradients = torch.is_grad_enabled(), False
    inference_mode = torch.is_inference_mode_enabled()
    while True:
        leaves = tuple(opaque)
        inlined = frozenset(path for path in wanted if not any(path == o or path.startswith(o + ".") for o in leaves))
        work = clone_structure(model)
        show_plain_tensors(work, inlined)
        for path in observed.intersection(inlined):  # the graph calls these, in place of the trace
            work.get_submodule(path)._forward_hooks = OrderedDict()
        with torch.inference_mode(False):  # traced code may write into the copies
            values = {} if inputs is None else copy_inputs(dict(inputs))
        try:
            # Grad mode is on so that a no_grad region shows in any mode.
            with state_restored(work), torch.inference_mode(False), torch.enable_grad(), uncompiled():
                given = values if inputs is not None else _defaults(model)
                tracer = ValueTracer(
                    inlined,
                    given,
                    hints.wrap_functions,
                    probing=probing,
                    observed=observed,
                    merges_inputs=loose,
                    grad_mode=grad_mode,
                    inference_mode=inference_mode,
                    gradients=gradients,
                )
                tracer.calls.update(dict.fromkeys(opaque))
                graph = tracer.trace(work)
                restore = None
                if loose:
                    graph, work, tracer, restore = _loosened(graph, work, tracer, model, hints)
                if not probing:
                    record_assignments(graph, work, model, inlined, tracer.watch)
                if restore is not None:
                    restore()
            break
        except AsksForGradients:
            gradients = True
        except CannotInline as failure:
            if not failure.path or failure.path not in inlined:
                raise _root_error(model, failure, inputs is not None) from failure
            failed = type(model.get_submodule(failure.path))
            reason = describe(failure.cause)
            log.debug("%s stays a leaf: %s", failure.path, reason)
            opaque[failure.path] = reason
            if not failure.of_place and not any(path.startswith(failure.path + ".") for path in inlined):
                opaque.update({p: reason for p, m in model.named_modules() if type(m) is failed and p in inlined})
    unflatten_row_sums(graph)
    _remove_unused_reads(graph)
    _hoist_decisions(graph)
    _check_placement(graph, work)
    _attach_constants(work)
    graph_module = fx.GraphModule(work, graph, type(model).__name__)
    for name in ("_parameters", "_buffers", "_modules"):  # whole, not only what the graph refers to
        graph_module.__dict__[name] = work.__dict__[name]
    keep_plain_tensors(graph_module, work)
    graph.lint()
    calls = {path: call for path, call in tracer.calls.items() if call is not None}
    code = sorted(inlined | tracer.inlined_within)
    reads = (*tracer.watch.guards(), *_tensors_read(graph, model), *_containers(inlined, model))
    state = PythonState((*reads, *tracer.watch.methods(["", *code], model)), tuple(code), observed)
    deciders = frozenset(tracer.deciders)
    return Trace(graph_module, inlined, opaque, calls, tracer.reads_training, inputs is not None, state, deciders)


def _tensors_read(graph: fx.Graph, model: nn.Module) -> Iterator[Read]:
    """Yield a guard on each parameter and buffer of ``model`` that the graph reads: that it is there."""
    seen = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")
    for path, _, name in (target.rpartition(".") for target in seen):
        with contextlib.suppress(AttributeError):  # within what a graph made
            module = model.get_submodule(path)
            if any(isinstance(held.get(name), torch.Tensor) for held in (module._parameters, module._buffers)):
                yield Read(path, (("attribute", name),), Present)


def _containers(inlined: frozenset[str], model: nn.Module) -> Iterator[Read]:
    """Yield a guard on the number of modules in each container that the traced code may go through."""
    for path in inlined:
        try:
            held = model.get_submodule(path)
        except AttributeError:  # within what a graph made
            continue
        for name, module in held._modules.items():
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                at = f"{path}.{name}" if path else name
                yield Read(at, (("attribute", "_modules"),), Count(len(module._modules)))
        if path and isinstance(held, nn.Sequential):
            yield Read(path, (("attribute", "_modules"),), Count(len(held._modules)))


def raise_own_error(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise what ``model`` itself raises on a call that could not be traced: a failed assert, a shape that is wrong."""
    try:
        with state_restored(model), torch.no_grad():
            model(*copy_inputs(tuple(args)), **copy_inputs(dict(kwargs)))
    except NEVER_HIDDEN:
        return
    except Exception as own:
        raise own from None


def _loosened(
    graph: fx.Graph, work: nn.Module, tracer: ValueTracer, model: nn.Module, hints: Hints
) -> tuple[fx.Graph, nn.Module, ValueTracer, Undo | None]:
    """Return the graph without checks of inputs that are only passed on, and what made it.

    That is the module it is of, its tracer, and what puts the module's state back.
    """
    made_by: dict[int, tuple[nn.Module, ValueTracer, Undo | None]] = {id(graph): (work, tracer, None)}

    def again(inputs: Mapping[str, Any], loose: frozenset[str]) -> fx.Graph:
        copied = clone_structure(model)
        show_plain_tensors(copied, tracer.inline)
        another = ValueTracer(
            tracer.inline,
            inputs,
            hints.wrap_functions,
            loose=loose,
            observed=tracer.observed,
            script=list(tracer.evaluated),
            merges_inputs=True,
            grad_mode=tracer.grad_mode,
            inference_mode=tracer.inference_mode,
            gradients=tracer.gradients,
        )
        restore = saved_state(copied)
        made = another.trace(copied)
        made_by[id(made)] = copied, another, restore
        return made

    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    given = {p.name: tracer.inputs[p.name] for p in named if p.name in tracer.inputs}
    stars = {name: value for name, value in tracer.inputs.items() if name not in given}
    graph = loosen(graph, given, defaults, lambda inputs, loose: again({**inputs, **stars}, loose))
    return graph, *made_by[id(graph)]


def _must_stay_leaf(module: nn.Module, observed: bool) -> str | None:
    if has_hooks(module, forward=not observed):
        return "it has hooks, which a graph of its code would not call"
    return None


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Without example inputs, parameters with a default are constants and all others unknown."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {
        p.name: UNKNOWN if p.default is p.empty else p.default
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def _root_error(model: nn.Module, failure: CannotInline, has_values: bool) -> Exception:
    name = type(model).__name__
    reason = describe(failure.cause)
    if isinstance(failure.cause, str):
        return UnsupportedModel(
            f"{name}.forward cannot be held in one graph: {reason}. Convert the submodules that add by themselves."
        )
    hint = "" if has_values else " Give example inputs with args=, so that decisions on values can be followed."
    return TraceError(
        f"{name}.forward could not be traced: {reason}.{hint} "
        "If a helper function is the cause, keep it whole with wrap_functions=(function,)."
    )


def describe(cause: BaseException | str) -> str:
    """Return an error as one line, with the user's line that it comes from."""
    if isinstance(cause, str):
        return cause
    every = list(traceback.extract_tb(cause.__traceback__))
    frames = [f for f in every if not f.filename.startswith(INTERNAL_FILES)] or every
    where = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}{where}: {text[0] if text else ''}"[:300]


def _attach_constants(work: nn.Module) -> None:
    """Keep constants that tracing stowed on the root as buffers, outside of the state dict."""
    for name in [n for n in work.__dict__ if n.startswith("_tensor_constant")]:
        value = work.__dict__[name]
        if isinstance(value, torch.Tensor):
            del work.__dict__[name]
            work.register_buffer(name, value, persistent=False)


def _remove_unused_reads(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (is_shape_read(node) or node.op == "get_attr" or node.target is written_through):
            graph.erase_node(node)


def _check_placement(graph: fx.Graph, work: nn.Module) -> None:
    """Check dtype and device of the parameters where the code may have read them: the trace holds them as constants."""
    name, like = next(((n, p) for n, p in work.named_parameters() if p.is_floating_point()), ("", None))
    if like is None:
        return
    constants: set[Any] = set()
    for node in graph.nodes:
        if node.target not in CHECKS:
            held: list[Any] = []
            fx.node.map_aggregate((node.args, node.kwargs), held.append)  # type: ignore[arg-type, func-returns-value]
            line = node.stack_trace or ""  # one that names a dtype itself has not read it
            constants.update(
                v for v in held if isinstance(v, (torch.dtype, torch.device)) and str(v).rpartition(".")[2] not in line
            )
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for attribute in ("dtype", "device"):
        value = getattr(like, attribute)
        if value in constants:
            with graph.inserting_before(first):
                read = graph.call_function(getattr, (graph.create_node("get_attr", name, (), {}), attribute))
                meta.TYPE.set(read, type(value))
                graph.call_function(check_equal, (read, value, f"the {attribute} of the parameters"))


def _hoist_decisions(graph: fx.Graph) -> None:
    """Move checks that depend on shapes of the inputs alone to the top of the graph."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if not placeholders:
        return
    early = set(placeholders)
    last = placeholders[-1]
    for node in list(graph.nodes):
        flag = node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"
        if flag or (is_shape_read(node) or node.target in CHECKS) and all(n in early for n in node.all_input_nodes):
            early.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in early and (node.target in CHECKS or any(user in needed for user in node.users)):
            needed.add(node)
    for node in list(graph.nodes):
        if node in needed and node.op != "placeholder":
            last.append(node)
            last = node
