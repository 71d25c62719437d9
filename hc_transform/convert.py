"""convert and plan: the way from a model to a converted model."""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, UnflattenedModule

from .capture.tape import record
from .capture.trace import bind_inputs, describe
from .connections import ConnectionLike
from .convert_blocks import convert_blocks, move_into
from .errors import HCTransformError, NothingToConvert, TraceError, UnsupportedModel
from .exported import convert_exported, example_of, is_exported, plan_exported, refuse_choices
from .graphs.dialects import name_of
from .models.compare import compare
from .models.copies import clone_structure, in_other_mode, uncompile
from .models.examples import example_inputs
from .models.selection import Hints
from .models.state import generators_seeded, no_inference_mode
from .options import Options
from .residuals.analysis import Analysis, analyse
from .residuals.find import find_residuals
from .residuals.findings import Reason
from .residuals.keys import CONNECTIONS_NAME
from .residuals.planner import Plan
from .residuals.report import report_of
from .rewriting.new_modules import make_connections, new_modules, other_parameters
from .running.graph_model import HyperConnectedModule
from .running.variants import decides_on_training
from .threads import one_at_a_time, uncompiled
from .verification.verify import not_equivalent, run_like, tolerance_of
from .verification.verify import verify as verify_graph
from .verification.verify_blocks import verify_blocks

log = logging.getLogger("hc_transform")

OPTIMIZER_NOTE = "An optimizer made before the conversion does not know the new parameters: make it anew."
Example = tuple[tuple[Any, ...], dict[str, Any]]
LOTS = frozenset("rand rand_like randn randint randperm multinomial bernoulli bernoulli_ uniform_ random_".split())
MAY_BE_BLOCKS = (TraceError, UnsupportedModel, NothingToConvert)  # what one graph is refused with
USUAL = frozenset(dir(nn.Module))
SCOPES = ("graph", "blocks", "auto")


@one_at_a_time
def convert(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_streams: int | None = None,
    connection: ConnectionLike = "dynamic",
    num_fractions: int | None = None,
    init: str = "paper",
    readout: str = "mean",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    nested: str = "largest",
    feature_axis: int | None = None,
    stream_embedding: bool = False,
    stream_dropout: float = 0.0,
    recompute: bool = False,
    shortcuts: str = "break",
    min_residuals: int = 1,
    scope: str = "auto",
    share_calls: bool = False,
    inplace: bool = False,
    verify: bool = True,
    wrap_functions: Sequence[Callable[..., Any]] = (),
    leaf_modules: Sequence[str | type] = (),
    inline_modules: Sequence[str | type] = (),
) -> Any:
    """Return ``model`` with its residual streams widened to ``num_streams`` hyper-connected streams.

    The result computes what ``model`` computes until it is trained. It shares the parameters and
    buffers of ``model``, which stays as it is. It is a :class:`HyperConnectedModule`, an FX graph, or
    with ``scope="blocks"`` a model of the class of ``model``.

    Args:
        model: any nn.Module that is not wrapped (DDP, FSDP, torch.compile, torch.jit), or an ExportedProgram, whose
            graph is converted as it is, in the mode that it was exported in.
        args, kwargs: example inputs. Without them those that the model carries are tried
            (``example_input_array``, ``dummy_inputs``, timm's ``default_cfg``, those of an export), else it is traced
            without values and not verified. Inputs that are None, numbers, strings or dtypes are held as
            constants: a call with another one traces again, once for each. All others may change.
        num_streams: n, by default 4, and 1 for "frac". With one stream of one fraction all residuals
            stay plain.
        connection: "static" or "dynamic" (arXiv 2409.19606), "mhc" (2512.24880), "mhc-lite"
            (2601.05732), "kromhc" (2601.21579), "identity" (2607.28611), "frac" (2503.14125), or what
            makes a :class:`Connection`: a subclass, or ``functools.partial(MHCConnection, iterations=5)``.
        num_fractions: m, of "frac": fractions of each stream, by default 4.
        init: "paper" (one-hot reads) or "mirrored" (mean reads, writes mirrored around 1; only for
            trunks that carry nothing nonlinear).
        readout: "mean"; "learned", weights that depend on the token and start as the mean; or "sum"
            (which gives n times the original's value).
        include, exclude: patterns (``fnmatch``) on residual names or module paths.
        nested: of trunks that nest convert the "largest" only, or "all".
        feature_axis: the axis of features, where looking at the branch's layers would get it wrong.
        stream_embedding: add a learnt vector, zero at the start, to each stream where it begins.
        stream_dropout: probability of dropout on the streams after each residual, while training.
        recompute: make coefficients, reads and writes (not branches) again in the backward pass in
            place of saving their intermediate values.
        shortcuts: projection shortcuts (the first block of a ResNet's stage, pooling) "break" the trunk, or
            "carry" the streams: the shortcut is applied to each of them.
        min_residuals: trunks with fewer residuals are left alone.
        scope: "graph", one FX graph of the whole model; "blocks", the model stays itself (class, methods,
            ``generate``) and the modules that hold residuals run graphs; "auto", blocks for a class with
            public methods or properties of its own, graph for one that is its forward alone, else whichever converts.
        share_calls: with scope "blocks", one connection for all calls of a module that is called several
            times, in place of one for each.
        inplace: with scope "blocks", change ``model`` itself and return it.
        verify: run both models on the example inputs and compare.
        wrap_functions: functions that are not to be traced into.
        leaf_modules: modules that are not to be traced into, by class or pattern of paths.
        inline_modules: modules that are, although no add is seen in their code.

    Raises:
        NothingToConvert: no residual add was found; the message counts the reasons.
        TraceError: the model or the inputs cannot be traced.
        NotEquivalent: verification failed.
        UnknownDialect: an exported program is written in operators that are not known.
        UnsupportedModel: a wrapped or already converted model, or an option that it does not fit.
        PatternError: a pattern matches nothing.
        ValueError: an option is out of range.

    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> hc = convert(block, args=(torch.randn(2, 5, 8),))
    >>> len(hc.hc_report.converted)
    2
    """
    options = _options(
        num_streams=num_streams,
        connection=connection,
        num_fractions=num_fractions,
        init=init,
        readout=readout,
        include=include,
        exclude=exclude,
        nested=nested,
        feature_axis=feature_axis,
        stream_embedding=stream_embedding,
        stream_dropout=stream_dropout,
        recompute=recompute,
        shortcuts=shortcuts,
        min_residuals=min_residuals,
    )
    if is_exported(model):
        _check_exported(model, args, kwargs, scope, wrap_functions, leaf_modules, inline_modules)
        refuse_choices(inplace=inplace, share_calls=share_calls)
        with no_inference_mode():
            made = _plan_exported(model, options)
            return convert_exported(made, example_of(model, tuple(args), kwargs), verify, OPTIMIZER_NOTE)
    if inplace and scope == "graph":
        raise ValueError("inplace=True needs scope='blocks': a graph is a new module")
    refuse_unsupported(model)
    assert isinstance(model, nn.Module)
    if torch.get_default_device().type == "meta" and any(p.device.type != "meta" for p in model.parameters()):
        raise UnsupportedModel(
            "the default device is meta and the model's is not, so that nothing can be computed: convert outside of "
            "torch.device('meta')"
        )
    # New parameters are to be ordinary ones, and what is compiled in the model is looked into.
    with no_inference_mode(), generators_seeded(model), uncompiled():
        example, expected = _prepare(model, args, kwargs, scope)
        hints = _hints(wrap_functions, leaf_modules, inline_modules)
        full = full_mode(model, example)
        wanted = _Wanted(options, hints, "blocks" if inplace else scope, share_calls, inplace, verify)
        if full is None:
            return _convert(model, example, expected, wanted)
        return _convert_in_full(model, full, example, expected, wanted)


@dataclass(frozen=True)
class _Wanted:
    """What :func:`convert` was asked for."""

    options: Options
    hints: Hints
    scope: str
    share_calls: bool
    inplace: bool
    verify: bool


def _convert(model: nn.Module, example: Example | None, expected: Any, wanted: _Wanted) -> nn.Module:
    """Return the model as one graph, or with graphs in its blocks, as the scope says."""
    if wanted.scope == "blocks":
        return _convert_blocks(model, example, expected, wanted, "")
    if wanted.scope == "graph" or example is None:
        return _convert_graph(model, example, expected, wanted)
    own = own_interface(model)
    if own:
        why = (
            f"{type(model).__name__} has {', '.join(own[:3])}{' and more' if len(own) > 3 else ''}, as a graph has not"
        )
        with contextlib.suppress(HCTransformError):
            return _convert_blocks(model, example, expected, wanted, why)
    return _convert_either(model, example, expected, wanted)


def _convert_either(model: nn.Module, example: Example, expected: Any, wanted: _Wanted) -> nn.Module:
    """Return the model as one graph; where it is none, or decides on values, with graphs in its blocks."""
    try:
        graph = _convert_graph(model, example, expected, wanted)
    except MAY_BE_BLOCKS as error:
        if isinstance(error.__cause__, ValueError):
            raise
        try:
            return _convert_blocks(model, example, expected, wanted, f"the whole model is no one graph: {error}")
        except HCTransformError:
            raise error from None
    if graph.decides_on_values:
        why = "its code decides on values of tensors or on random numbers, which each block does by itself"
        with contextlib.suppress(HCTransformError):
            blocks: Any = _convert_blocks(model, example, expected, wanted, why)
            if len(blocks.hc_report.converted) >= len(graph.hc_report.converted):
                return blocks
    return graph


def own_interface(model: nn.Module) -> list[str]:
    """Return the methods and properties of a model that its users call, beside ``forward`` and those of nn.Module."""
    kinds = (types.FunctionType, property, classmethod, staticmethod, functools.cached_property)
    names: dict[str, None] = {}
    for cls in type(model).__mro__:
        if not cls.__module__.startswith(("torch.nn.modules", "builtins")):
            own = (name for name, member in vars(cls).items() if isinstance(member, kinds))
            names.update(dict.fromkeys(name for name in own if name[0] != "_" and name not in USUAL))
    return list(names)


def _convert_in_full(
    model: nn.Module, full: nn.Module, example: Example | None, expected: Any, wanted: _Wanted
) -> nn.Module:
    """Convert a model in training mode that leaves residuals out at random: with all that it has in eval mode."""
    modes = {path: module.training for path, module in model.named_modules()}
    assert example is not None
    converted: Any = _convert(full, example, None, replace(wanted, inplace=False))
    _set_modes(converted, modes)
    note = f"{type(model).__name__} leaves residuals out in training mode: those of eval mode were converted."
    if isinstance(converted, HyperConnectedModule):
        note += _trace_mode(converted, *example)
    if wanted.verify:
        found = compare(run_like(converted, *example), expected, dtypes=wanted.options.readout != "sum")
        bound = tolerance_of(expected, model)
        if not found.error <= bound and wanted.options.readout != "sum":
            raise not_equivalent(model, found, bound, "the modes differ")
        note += f" Largest relative error in the given mode: {found.error:.1e}."
    report = replace(converted.hc_report, notes=(*converted.hc_report.notes, note))
    if wanted.inplace:
        move_into(model, converted)
        converted = model
    converted.__dict__["hc_report"] = report
    return converted


def full_mode(model: nn.Module, example: Example | None) -> nn.Module | None:
    """Return a copy of ``model`` in eval mode if it has more residuals there, as layers that are dropped at random."""
    if example is None or not any(module.training for module in model.modules()):
        return None
    tape = record(model, *example)
    if not tape.decides and LOTS.isdisjoint(name_of(node) for node in tape.graph_module.graph.nodes):
        return None
    copy = clone_structure(model).eval()
    try:
        residuals = [len(find_residuals(t.graph_module).residuals) for t in (tape, record(copy, *example))]
    except Exception as error:
        log.info("%s cannot be run in eval mode: %s", type(model).__name__, describe(error))
        return None
    return copy if residuals[1] > residuals[0] else None


def _set_modes(converted: nn.Module, modes: Mapping[str, bool]) -> None:
    """Give the modules of a converted model the modes that they had, and new ones that of the module they are in."""
    for path, module in converted.named_modules():
        while path not in modes:
            path = path.rpartition(".")[0]
        module.training = modes[path]


def _convert_graph(model: nn.Module, example: Example | None, expected: Any, wanted: _Wanted) -> HyperConnectedModule:
    """Return the model as one graph."""
    analysis = _analyse(model, example, wanted.options, wanted.hints)
    connections = make_connections(analysis.plan)
    modules = new_modules(connections, analysis.plan)
    original = uncompile(clone_structure(model), analysis.trace.inlined)
    converted = HyperConnectedModule(original, analysis, modules, wanted.hints)
    notes, error = [OPTIMIZER_NOTE], None
    if example is not None and decides_on_training(analysis.trace.graph_module.graph):
        with in_other_mode(converted):  # now, for compiled code cannot
            notes += filter(None, [_trace_mode(converted, *example).strip()])
    if example is None:
        notes.insert(0, "Not verified: there are no example inputs. Give them with args= to compare the outputs.")
    elif wanted.verify:
        found = verify_graph(model, converted, analysis.plan, *example, expected=expected)
        error = found.error
        notes.insert(0, found.note)
    others = other_parameters(modules.values(), connections)
    converted.hc_report = report_of(analysis.plan, connections, error, tuple(notes), others)
    return converted


def _convert_blocks(model: nn.Module, example: Example | None, expected: Any, wanted: _Wanted, why: str) -> nn.Module:
    """Return the model with graphs in its blocks."""
    if example is None:
        raise TraceError(
            f"scope='blocks' runs {type(model).__name__} once to find its residuals: give example inputs with args= "
            "and kwargs="
        )
    converted, planned, tape, modules = convert_blocks(
        model, *example, wanted.options, wanted.hints, share_calls=wanted.share_calls
    )
    plan = planned.plan
    plain = any(s.reason is Reason.PLAIN for s in plan.skipped)
    if not plan.residuals and not plain:
        raise NothingToConvert(_nothing(model, plan))
    notes, error = [], None
    if wanted.verify:
        found = verify_blocks(model, converted, planned, tape, modules, *example, expected=expected)
        error = found.error
        notes.append(found.note)
    reason = f"because {why.rstrip('.')}" if why else "as asked"
    notes.append(f"Scope blocks, {reason}. {len(planned.blocks)} modules run graphs; the rest is Python as before.")
    notes += [f"Streams are read out and begin anew {cut}." for cut in planned.cuts]
    notes += [*planned.notes, OPTIMIZER_NOTE]
    connections = {r.name: modules[r.key] for r in plan.residuals}
    others = other_parameters(modules.values(), connections)
    report = report_of(plan, connections, error, tuple(notes), others)
    if wanted.inplace:
        move_into(model, converted)
        converted = model
    converted.__dict__["hc_report"] = report
    return converted


@one_at_a_time
def plan(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    wrap_functions: Sequence[Callable[..., Any]] = (),
    leaf_modules: Sequence[str | type] = (),
    inline_modules: Sequence[str | type] = (),
    scope: str = "auto",
    **options: Any,
) -> Plan:
    """Return what :func:`convert` would do, without doing it: a dry run, printed as the same table.

    Takes the options of :func:`convert` and raises the same errors but NotEquivalent.

    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> [residual.name for residual in plan(block, args=(torch.randn(2, 5, 8),)).residuals]
    ['self_attn', 'linear1']
    """
    checked = _options(**options)
    if is_exported(model):
        _check_exported(model, args, kwargs, scope, wrap_functions, leaf_modules, inline_modules)
        return _plan_exported(model, checked)
    refuse_unsupported(model)
    assert isinstance(model, nn.Module)
    with no_inference_mode(), generators_seeded(model), uncompiled():
        example, _ = _prepare(model, args, kwargs, scope)
        hints = _hints(wrap_functions, leaf_modules, inline_modules)
        return _plan(full_mode(model, example) or model, example, checked, hints, scope)


def _check_exported(
    program: Any,
    args: Any,
    kwargs: Any,
    scope: str,
    wrap_functions: Sequence[Any],
    leaf_modules: Sequence[Any],
    inline_modules: Sequence[Any],
) -> None:
    """Raise what is wrong with the arguments of a conversion of an exported program."""
    _check_scope(scope)
    _check_inputs(args, kwargs)
    if isinstance(program, nn.Module):
        refuse_unsupported(program)
    refuse_choices(
        **{"scope='blocks'": scope == "blocks"},
        wrap_functions=bool(wrap_functions),
        leaf_modules=bool(leaf_modules),
        inline_modules=bool(inline_modules),
    )


def _plan_exported(program: Any, options: Options) -> Plan:
    made = plan_exported(program, options)
    if not made.residuals and all(s.reason is not Reason.PLAIN for s in made.skipped):
        raise NothingToConvert(_nothing(made.graph_module, made))
    return made


def _plan(model: nn.Module, example: Example | None, options: Options, hints: Hints, scope: str) -> Plan:
    """Return the plan in the scope that :func:`convert` would choose."""
    if scope == "graph" or example is None:
        return _analyse(model, example, options, hints).plan
    if scope == "blocks":
        return _plan_blocks(model, example, options, hints)
    if own_interface(model):
        with contextlib.suppress(HCTransformError):
            return _plan_blocks(model, example, options, hints)
    try:
        return _analyse(model, example, options, hints).plan
    except MAY_BE_BLOCKS as error:
        try:
            return _plan_blocks(model, example, options, hints)
        except HCTransformError:
            raise error from None


def _plan_blocks(model: nn.Module, example: Example, options: Options, hints: Hints) -> Plan:
    plan = convert_blocks(model, *example, options, hints, share_calls=False)[1].plan
    if not plan.residuals and all(s.reason is not Reason.PLAIN for s in plan.skipped):
        raise NothingToConvert(_nothing(model, plan))
    return plan


def _hints(
    wrap_functions: Sequence[Callable[..., Any]],
    leaf_modules: Sequence[str | type],
    inline_modules: Sequence[str | type],
) -> Hints:
    for name, given in (("leaf_modules", leaf_modules), ("inline_modules", inline_modules)):
        if isinstance(given, (str, type)):
            raise ValueError(f"{name} is a list of classes or patterns, got {given!r}")
        for entry in given:
            if not isinstance(entry, (str, type)):
                raise ValueError(f"{name} holds classes or patterns of paths, got a {type(entry).__name__}")
    return Hints(tuple(wrap_functions), tuple(leaf_modules), tuple(inline_modules))


def _options(**given: Any) -> Options:
    """Return the options with the defaults that depend on the connection."""
    frac = given.setdefault("connection", "dynamic") == "frac"
    for name, default in (("num_streams", 1 if frac else 4), ("num_fractions", 4 if frac else 1)):
        if given.get(name) is None:
            given[name] = default
    for name in ("include", "exclude"):
        given[name] = tuple(_list(given.get(name, ())))
    return Options(**given)


def _prepare(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, scope: str
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]] | None, Any]:
    """Check the model and return the example inputs, which fit it, and its outputs on them."""
    _check_scope(scope)
    if isinstance(args, torch.Tensor):
        args = (args,)
    _check_inputs(args, kwargs)
    example = (tuple(args), dict(kwargs or {})) if len(args) or kwargs else example_inputs(model)
    if example is not None:
        bind_inputs(model, *example)
        try:
            return example, run_like(model, *example)
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} itself fails on the example inputs: {type(error).__name__}: {error}. "
                "Give inputs with args= and kwargs= that the model runs on."
            ) from error
    return None, None


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope is one of {', '.join(map(repr, SCOPES))}; got {scope!r}")


def _check_inputs(args: Any, kwargs: Any) -> None:
    """Raise ValueError if positional inputs are given as a mapping, or keywords as something else."""
    if isinstance(args, Mapping):
        raise ValueError("args is a mapping (dict): give inputs by name with kwargs=, as convert(model, kwargs=inputs)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"kwargs is a mapping of names to inputs, got {type(kwargs).__name__}: give one with args=")


def _analyse(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    options: Options,
    hints: Hints,
) -> Analysis:
    inputs = None if example is None else bind_inputs(model, *example)
    analysis = analyse(model, inputs, options, hints)
    plain = any(s.reason is Reason.PLAIN for s in analysis.plan.skipped)
    if not analysis.plan.residuals and not plain:
        raise NothingToConvert(_nothing(model, analysis.plan))
    return analysis


def _nothing(model: nn.Module, plan: Plan) -> str:
    name = type(model).__name__
    if not plan.skipped:
        return (
            f"{name} holds no add of two tensors that is seen, so there is no residual to convert. Modules whose adds "
            "are hidden from their Python code are looked into with inline_modules=[...]."
        )
    counts = Counter(s.reason.value for s in plan.skipped)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    first = plan.skipped[0]
    return (
        f"none of the {len(plan.skipped)} adds in {name} can be converted: {reasons}. The first is in "
        f"{first.module or 'the root'} at {first.location}: {first}."
    )


def refuse_unsupported(model: Any) -> None:
    """Raise UnsupportedModel for anything that is not a plain, unconverted module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"convert takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, UnflattenedModule):
        raise UnsupportedModel(
            "the model is an exported program that was unflattened: convert the exported program itself, which has the "
            "same names"
        )
    wrapped = _wrapper(model)
    if wrapped:
        raise UnsupportedModel(
            f"the model is wrapped by {wrapped}: convert the model inside it first, and wrap the result afterwards"
        )
    for module in model.modules():
        if isinstance(module, HyperConnectedModule) or CONNECTIONS_NAME in dict(module.named_children()):
            raise UnsupportedModel(
                f"{type(model).__name__} is converted already: convert the original model, with other options, instead"
            )
        if "hyperconnection" in type(module).__name__.lower():
            raise UnsupportedModel(
                f"{type(model).__name__} is written with hyper-connections already ({type(module).__name__}): its "
                "residual streams are not converted once more"
            )


def _wrapper(model: nn.Module) -> str | None:
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        return "torch.compile"
    if isinstance(model, torch.jit.ScriptModule):
        return "torch.jit"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return type(model).__name__
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        if any(isinstance(m, (FullyShardedDataParallel, FSDPModule)) for m in model.modules()):
            return "FSDP"
    return None


def _trace_mode(converted: HyperConnectedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Trace the mode that the model is in; return what is to be said where that is not the same code."""
    mode = "training" if converted.training else "eval"
    try:
        variant = converted.trace_variant(args, kwargs)
    except HCTransformError as error:
        return f" In {mode} mode calls are refused: {error}"
    if variant.left_out and not variant.needs.values:
        return (
            f" In {mode} mode its code does without {', '.join(variant.left_out)}, whose connections do nothing then."
        )
    return ""


def _list(patterns: Sequence[str]) -> Sequence[str]:
    if isinstance(patterns, str):
        raise ValueError(f"include and exclude are lists of patterns, got the string {patterns!r}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"include and exclude hold patterns of names or paths, got {pattern!r}")
    return patterns
