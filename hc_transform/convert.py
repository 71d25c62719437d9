"""convert and plan: the way from a model to a converted model."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import nn
from torch.export import ExportedProgram

from .capture.trace import bind_inputs, describe
from .config import note_config
from .connections import ConnectionLike
from .convert_blocks import convert_blocks, move_into
from .convert_graph import convert_graph, trace_mode
from .errors import NEVER_HIDDEN, HCTransformError, NothingToConvert, TraceError, UnsupportedModel
from .exported import carried_example, convert_exported, is_exported, refuse_choices
from .graphs.dialects import name_of
from .models.compare import compare
from .models.copies import clone_structure
from .models.examples import example_inputs
from .models.state import generators_seeded, no_inference_mode, one_model, runs_with_gradients
from .refusals import refuse_meta_device, refuse_unsupported
from .request import Example, Request, checked_example, request_of
from .residuals.observation import Observation, observe, observe_unrun
from .residuals.planner import Plan
from .running.graph_model import HyperConnectedModule
from .threads import one_at_a_time, uncompiled
from .verification.verify import Ran, not_equivalent, run_whole, tolerance_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .request import Choices

Model = TypeVar("Model", bound=nn.Module)

log = logging.getLogger("hc_transform")

LOTS = frozenset("rand rand_like randn randint randperm multinomial bernoulli bernoulli_ uniform_ random_".split())
MAY_BE_BLOCKS = (TraceError, UnsupportedModel, NothingToConvert)  # what one graph is refused with
USUAL = frozenset(dir(nn.Module))
CALLED_BY_SYNTAX = frozenset("__call__ __len__ __getitem__ __iter__ __contains__".split())


@overload
def convert(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    scope: Literal["graph"],
    **choices: Unpack[Choices],
) -> HyperConnectedModule: ...


@overload
def convert(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    scope: Literal["blocks"],
    **choices: Unpack[Choices],
) -> Model: ...


@overload
def convert(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    scope: Literal["auto"] = "auto",
    **choices: Unpack[Choices],
) -> Any: ...


def convert(  # noqa: PLR0913  # the options, for whoever reads them
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
        readout: "mean"; "learned", weights that depend on the token and start as the mean, at the end of each trunk
            (values on its way are read out as the mean); or "sum" (which gives n times the original's value).
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

    >>> import torch
    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> hc = convert(block, args=(torch.randn(2, 5, 8),))
    >>> len(hc.hc_report.converted)
    2
    """

    choices = {name: value for name, value in locals().items() if name in _DEFAULTS}
    return _converted(model, args, kwargs, request_of(choices))[0]


def plan(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    scope: str = "auto",
    **choices: Unpack[Choices],
) -> Plan:
    """Return what :func:`convert` would do: a dry run, printed as the same table.

    Takes the arguments of :func:`convert`, goes the same way but does not verify, and raises the same errors but
    NotEquivalent.

    >>> import torch
    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> [residual.name for residual in plan(block, args=(torch.randn(2, 5, 8),)).residuals]
    ['self_attn', 'linear1']
    """
    given: dict[str, Any] = {**_DEFAULTS, "scope": scope, **choices}
    unknown = given.keys() - _DEFAULTS.keys()
    if unknown:
        raise TypeError(f"plan() got an unexpected keyword argument {min(unknown)!r}; it takes those of convert()")
    return _converted(model, args, kwargs, replace(request_of(given), verify=False, inplace=False))[1]


_SIGNATURE = inspect.signature(convert)
_DEFAULTS = {p.name: p.default for p in _SIGNATURE.parameters.values() if p.kind is p.KEYWORD_ONLY}
plan.__signature__ = _SIGNATURE.replace(return_annotation="Plan")  # type: ignore[attr-defined]


@one_at_a_time
def _converted(model: Any, args: Any, kwargs: Any, request: Request) -> tuple[nn.Module, Plan]:
    """Return the converted model and its plan."""
    example = checked_example(args, kwargs)
    if is_exported(model):
        if isinstance(model, nn.Module):
            refuse_unsupported(model)
        _refuse_choices_of_python(request)
        with no_inference_mode():
            exported = convert_exported(model, example, request)
        note_config(exported[0], request, example or carried_example(model))
        return exported
    refuse_unsupported(model)
    refuse_meta_device(model)
    if request.inplace:
        request = replace(request, scope="blocks")
    # New parameters are to be ordinary ones, and what is compiled in the model is looked into.
    with no_inference_mode(), generators_seeded(model), uncompiled(), one_model():
        example = example or example_inputs(model)
        if example is None:
            if request.scope == "blocks":
                raise TraceError(
                    f"scope='blocks' runs {type(model).__name__} once to find its residuals: give example inputs with "
                    "args= and kwargs="
                )
            unrun = convert_graph(model, None, observe_unrun(model, request.hints), request)
            note_config(unrun[0], request, None)
            return unrun
        observed, note = _observed(model, example, request)
        with runs_with_gradients(bool(note)):
            full = full_mode(model, example, observed, request)
            made: tuple[Any, Plan]
            if full is None:
                made = _convert(model, example, observed, request)
            else:
                made = _convert_in_full(model, full, example, observed.ran, request)
        if note:
            report: Any = made[0].hc_report
            made[0].__dict__["hc_report"] = replace(report, notes=(*report.notes, note))
        note_config(made[0], request, example)
        return made


def _refuse_choices_of_python(request: Request) -> None:
    """Raise UnsupportedModel for what an exported program, which is one graph, cannot be asked for."""
    hints = request.hints
    refuse_choices(
        **{"scope='blocks'": request.scope == "blocks"},
        wrap_functions=bool(hints.wrap_functions),
        leaf_modules=bool(hints.leaf_modules),
        inline_modules=bool(hints.inline_modules),
        inplace=request.inplace,
        share_calls=request.share_calls,
    )


def _observed(model: nn.Module, example: Example, request: Request) -> tuple[Observation, str]:
    """Return what is seen of a model on inputs, which are to fit it, and a note if it takes gradients to see it.

    It does where the caller has them and the model gives others without: its code asks for the grad mode or for
    gradients, or torch takes another way, as it does for an encoder with a padding mask.
    """
    bind_inputs(model, *example)
    name = type(model).__name__
    plain, failure = _outputs(model, example)
    note = ""
    if torch.is_grad_enabled():
        with runs_with_gradients(True):
            recorded, _ = _outputs(model, example)
        if recorded is not None and plain is None:
            note = f"{name} itself fails without gradients: it was run with them."
        elif recorded is not None and plain is not None:
            found = compare(recorded.outputs, plain.outputs)
            if not found.error <= tolerance_of(plain.outputs, model):
                note = (
                    f"Without gradients {name} itself gives other outputs, by {found.error:.1e} (relative): it was run "
                    "with them, as convert was called."
                )
        plain = recorded if note else plain
    if plain is None:
        raise TraceError(
            f"{name} itself fails on the example inputs: {type(failure).__name__}: {failure}. "
            "Give inputs with args= and kwargs= that the model runs on."
        ) from failure
    with runs_with_gradients(bool(note)):
        return replace(observe(model, *example, request.hints), ran=plain), note


def _outputs(model: nn.Module, example: Example) -> tuple[Ran | None, Exception | None]:
    """Return what a model gives; or None, and how it fails."""
    try:
        return run_whole(model, *example), None
    except NEVER_HIDDEN:
        raise
    except Exception as failure:  # noqa: BLE001  # whatever the user's code raises
        log.info("%s fails: %s", type(model).__name__, describe(failure))
        return None, failure


def _convert(model: nn.Module, example: Example, observed: Observation, request: Request) -> tuple[nn.Module, Plan]:
    """Return the model as one graph, or with graphs in its blocks, as the scope says, and its plan."""
    if request.scope == "blocks":
        return convert_blocks(model, example, observed, request)
    if request.scope == "graph":
        return convert_graph(model, example, observed, request)
    own = own_interface(model)
    if own:
        why = (
            f"{type(model).__name__} has {', '.join(own[:3])}{' and more' if len(own) > 3 else ''}, as a graph has not"
        )
        with contextlib.suppress(HCTransformError):
            return convert_blocks(model, example, observed, request, why)
    return _convert_either(model, example, observed, request)


def _convert_either(
    model: nn.Module, example: Example, observed: Observation, request: Request
) -> tuple[nn.Module, Plan]:
    """Return the model as one graph; where it is none, or decides on values, with graphs in its blocks."""
    try:
        graph, chosen = convert_graph(model, example, observed, request)
    except MAY_BE_BLOCKS as error:
        if isinstance(error.__cause__, ValueError):
            raise
        try:
            return convert_blocks(model, example, observed, request, f"the whole model is no one graph: {error}")
        except HCTransformError:
            raise error from None
    if graph.decides_on_values:
        why = "its code decides on values of tensors or on random numbers, which each block does by itself"
        with contextlib.suppress(HCTransformError):
            made = convert_blocks(model, example, observed, request, why)
            if len(made[1].residuals) >= len(chosen.residuals):
                return made
    return graph, chosen


def own_interface(model: nn.Module) -> list[str]:
    """Return the methods and properties of a model that its users call, beside ``forward`` and those of nn.Module."""
    kinds = (types.FunctionType, property, classmethod, staticmethod, functools.cached_property)
    names: dict[str, None] = {}
    for cls in type(model).__mro__:
        if not cls.__module__.startswith(("torch.nn.modules", "builtins")):
            own = (name for name, member in vars(cls).items() if isinstance(member, kinds))
            names.update(dict.fromkeys(n for n in own if n[0] != "_" and n not in USUAL or n in CALLED_BY_SYNTAX))
    return list(names)


def _convert_in_full(
    model: nn.Module, full: tuple[nn.Module, Observation], example: Example, expected: Ran, request: Request
) -> tuple[nn.Module, Plan]:
    """Convert a model in training mode that leaves residuals out at random: with all that it has in eval mode."""
    modes = {path: module.training for path, module in model.named_modules()}
    made: tuple[Any, Plan] = _convert(full[0], example, full[1], replace(request, inplace=False))
    converted, chosen = made
    _set_modes(converted, modes)
    note = f"{type(model).__name__} leaves residuals out in training mode: those of eval mode were converted."
    if isinstance(converted, HyperConnectedModule):
        note += trace_mode(converted, *example)
    if request.verify:
        ran = run_whole(converted, *example)
        found = compare(ran.outputs, expected.outputs, dtypes=request.options.readout != "sum")
        bound = tolerance_of(expected.outputs, model)
        if not found.error <= bound and request.options.readout != "sum":
            raise not_equivalent(model, found, bound, "the modes differ")
        note += f" Largest relative error in the given mode: {found.error:.1e}."
    report = replace(converted.hc_report, notes=(*converted.hc_report.notes, note))
    if request.inplace:
        move_into(model, converted)
        converted = model
    converted.__dict__["hc_report"] = report
    return converted, chosen


def full_mode(
    model: nn.Module, example: Example, observed: Observation, request: Request
) -> tuple[nn.Module, Observation] | None:
    """Return a copy of ``model`` in eval mode if it has more residuals there, as layers that are dropped at random.

    And what is seen of that.
    """
    tape = observed.tape
    if tape is None or not any(module.training for module in model.modules()):
        return None
    if not tape.decides and LOTS.isdisjoint(name_of(node) for node in tape.graph_module.graph.nodes):
        return None
    copy = clone_structure(model).eval()
    try:
        full = observe(copy, *example, request.hints)
    except NEVER_HIDDEN:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        log.info("%s cannot be run in eval mode: %s", type(model).__name__, describe(error))
        return None
    return (copy, full) if len(full.findings.residuals) > len(observed.findings.residuals) else None


def _set_modes(converted: nn.Module, modes: Mapping[str, bool]) -> None:
    """Give the modules of a converted model the modes that they had, and new ones that of the module they are in."""
    for path, module in converted.named_modules():
        while path not in modes:
            path = path.rpartition(".")[0]
        module.training = modes[path]
