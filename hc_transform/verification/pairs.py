"""A converted model beside its original, run alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..capture.tape import Tape
from ..capture.watch import shared_state_restored
from ..errors import NEVER_HIDDEN, HCTransformError
from ..models.compare import compare, relative_error, tensors_of
from ..models.copies import copy_inputs, doubled_modules
from ..models.state import grad_mode_of_runs, seed_generators, state_restored
from ..residuals.planner import Plan
from ..streams.trunk_value import is_trunk_value
from .reference import NamedInputs, ReferenceInterpreter
from .rounding import OUTPUTS, Judgement, Rounding, judge, largest_error
from .watched import Observe, watched_blocks, watched_graph

# Relative to the largest absolute value of each output. Start "paper" is exact up to the rounding of
# the readout; start "mirrored" rounds at every write.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# For separated streams, whose sums the reference rounds in another order and the layers amplify. A stream
# in a wrong place shows at about 1e-1. Half precision is not compared so. Where either bound is exceeded, what
# rounding does to the model is measured.
STREAM_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}
DECIDES = "the model decides on values of tensors, which other streams change"

log = logging.getLogger("hc_transform")


class Ran(NamedTuple):
    """What a run of a model gave, and its inputs as it left them: it may fill a list or a cache that it is given."""

    outputs: Any
    inputs: Any


def run_whole(model: nn.Module, args: Any, kwargs: Any, forward: Callable[..., Any] | None = None) -> Ran:
    """Run the model on copies of the inputs, with all random generators seeded.

    The state of the model and of the generators (torch's, Python's, numpy's) is put back after.
    """
    with state_restored(model, whole=True), shared_state_restored(model), grad_mode_of_runs():
        seed_generators()
        given = copy_inputs(tuple(args)), copy_inputs(dict(kwargs))
        outputs = (forward or model)(*given[0], **given[1])
    return Ran(pytree.tree_map(_detached, outputs, is_leaf=is_trunk_value), given)


def run_like(model: nn.Module, args: Any, kwargs: Any, forward: Callable[..., Any] | None = None) -> Any:
    """Return the outputs of :func:`run_whole`."""
    return run_whole(model, args, kwargs, forward).outputs


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and not is_trunk_value(value) and value.requires_grad else value


def tolerance_of(outputs: Any, model: nn.Module | None = None) -> float:
    """Return the bound for the least precise floating dtype among the outputs, or else the model's parameters."""
    tensors = tensors_of(outputs)
    if model is not None and not any(t.is_floating_point() for t in tensors):
        tensors = list(model.parameters())
    return max((TOLERANCES.get(t.dtype, 0.0) for t in tensors), default=TOLERANCES[torch.float32])


@contextmanager
def failures_of(what: str, original: nn.Module) -> Iterator[None]:
    """Say what failed while streams were compared, so that no failure of ours passes for one of the model."""
    try:
        yield
    except NEVER_HIDDEN:
        raise
    except Exception as failure:
        text = " ".join(str(failure).split())[:300]
        raise HCTransformError(
            f"verification of the converted {type(original).__name__} fails: {what} cannot be run with separated "
            f"streams ({type(failure).__name__}: {text}). Leave the residual out with exclude=[...], convert with "
            "verify=False and compare the outputs yourself, or report the model."
        ) from failure


@dataclass(frozen=True)
class Seen:
    """A graph of the original, which says what the streams are to be.

    Attributes:
        plan: what is converted, on this graph.
        module: what the graph runs on.
        inputs: the example inputs, by the names of its placeholders.
        added: the modules that conversion added, by the keys of the plan.
        tape: the run that it was recorded in; None if it was traced or given.
    """

    plan: Plan
    module: nn.Module
    inputs: Mapping[str, Any]
    added: Mapping[str, nn.Module]
    tape: Tape | None = None


class Pair:
    """A model and what became of it, or copies of both.

    Args:
        original, converted: the models.
        seen: the original as a graph.
        args, kwargs: example inputs.
    """

    unit = 0.0  # of rounding, as the run shows it

    def __init__(
        self, original: nn.Module, converted: nn.Module, seen: Seen, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.original = original
        self.converted = converted
        self.seen = seen
        self.args, self.kwargs = args, kwargs
        self.connections = nn.ModuleList({id(m): m for m in seen.added.values()}.values())
        self.wide = False  # whether it is a copy in double precision

    def run_original(self) -> Any:
        """Return the original's outputs."""
        return run_like(self.original, self.args, self.kwargs)

    def run_converted(self) -> Any:
        """Return the converted model's outputs.

        Raises:
            HCTransformError: it cannot be run.
        """
        with failures_of("the converted model", self.original):
            return run_like(self.converted, self.args, self.kwargs)

    def reference(self, rounding: Rounding | None = None) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the outputs of the original's graph run with stacked streams, and the streams after each residual.

        Raises:
            HCTransformError: it cannot be run.
        """
        seen = self.seen
        reference = ReferenceInterpreter(seen.plan, seen.added, seen.module, rounding)
        reference.wide = self.wide
        with failures_of("the reference implementation", self.original):
            return run_like(seen.module, (), seen.inputs, reference.run_on), reference.written

    def differences(self) -> dict[str, float]:
        """Return the errors above the usual bounds of the streams after each residual, and of the outputs.

        Raises:
            HCTransformError: one of the two cannot be run.
            DecisionChanged: the graph decides on values that are others now.
        """
        expected, written = self.reference()
        wrong: dict[str, float] = {}
        left = dict(written)

        def compare_streams(name: str, streams: Sequence[Tensor]) -> None:
            if name in left and (error := streams_error(streams, left.pop(name))):
                wrong.setdefault(name, error)

        outputs, told = self._run_watched(compare_streams)
        wrong = wrong if told else {}
        actual = tensors_of(outputs)
        dtype = next((t.dtype for t in actual if t.is_floating_point()), torch.float32)
        error = relative_error(actual, tensors_of(expected))
        if not error <= STREAM_TOLERANCES.get(dtype, math.inf):
            wrong[OUTPUTS] = error
        return wrong

    def _run_watched(self, observe: Observe) -> tuple[Any, bool]:
        """Return the converted model's outputs, and whether ``observe`` was told of the streams after each residual."""
        if isinstance(self.converted, fx.GraphModule):
            with failures_of("the converted graph", self.original):
                run = watched_graph(self.converted, observe, self.wide)
                return run_like(self.converted, self.args, self.kwargs, run), True
        try:
            return run_like(self.converted, self.args, self.kwargs, watched_blocks(self.converted, observe)), True
        except NEVER_HIDDEN:
            raise
        except Exception as failure:  # noqa: BLE001  # of the user's code, which runs as often as it is looked at
            log.info("no residual is named, for the blocks cannot be looked into: %s", failure)
        return self.run_converted(), False

    def doubled(self) -> Pair | None:
        """Return copies in double precision; None if all tensors of the model are."""
        if all(p.dtype == torch.float64 for p in self.original.parameters() if p.is_floating_point()):
            return None
        with failures_of("a copy in double precision", self.original):
            return self._copied()

    def _copied(self) -> Pair:
        keys = list(self.seen.added)
        original, converted, module, *added = doubled_modules(
            self.original, self.converted, self.seen.module, *self.seen.added.values()
        )
        args, kwargs, inputs = copy_inputs((self.args, self.kwargs, dict(self.seen.inputs)), double=True)
        seen = replace(self.seen, module=module, inputs=inputs, added=dict(zip(keys, added, strict=True)))
        pair = Pair(original, converted, seen, args, kwargs)
        pair.wide = True
        return pair

    def excuse(self) -> str:
        """Return why the graph is no measure of this model with separated streams; "" if it is one."""
        tape = self.seen.tape
        if tape is None:
            return ""
        if tape.reads_values:
            return DECIDES
        if tape.closes_over:
            return "the recorded run holds a torch.vmap whose function uses more than it is given"
        plain = NamedInputs(tape.graph_module)
        try:
            repeated = run_like(tape.graph_module, (), self.seen.inputs, plain.run_on)
        except NEVER_HIDDEN:
            raise
        except Exception as failure:  # noqa: BLE001  # operations of the user's may raise anything
            return f"the recorded run cannot be repeated ({' '.join(str(failure).split())[:200]})"
        outputs = tensors_of(self.run_original())
        if not relative_error(outputs, list(repeated)) <= tolerance_of(outputs, self.original):
            return "the recorded run gives other outputs when repeated"
        return ""


def streams_error(streams: Any, expected: Tensor) -> float:
    """Return the largest error of streams, expected as ``[n, ...]``; 0 if it is within the bound."""
    streams, expected = [stream.detach() for stream in streams], expected.to(streams[0].dtype)
    if len(streams) != len(expected):
        return math.inf
    error = largest_error(streams, expected)
    return 0.0 if error <= STREAM_TOLERANCES.get(expected.dtype, math.inf) else error


class Start:
    """The outputs at the start, where a converted model gives those of its original."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        # Where weights of connections are not exact, they stay in double precision what single precision made of them.
        self.unit = torch.finfo(torch.float32).eps if pair.wide else 0.0
        self.run_converted, self.reference = pair.run_converted, pair.reference

    def differences(self) -> dict[str, float]:
        """Return the error of the outputs if it is above the usual bound."""
        with failures_of("the original", self.pair.original):
            expected = self.pair.run_original()
        found = compare(self.run_converted(), expected)
        return {} if found.error <= tolerance_of(expected, self.pair.original) else {OUTPUTS: found.error}

    def doubled(self) -> Start | None:
        """Return copies in double precision; None if all tensors of the model are."""
        pair = self.pair.doubled()
        return None if pair is None else Start(pair)


def judge_start(pair: Pair, error: float) -> Judgement:
    """Say whether an error of the outputs at the start is rounding; wrong if the reference cannot say."""
    try:
        return judge(Start(pair), {OUTPUTS: error})
    except HCTransformError:
        return Judgement({OUTPUTS: error})
