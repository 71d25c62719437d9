"""Compare a model converted with scope="blocks" with its original."""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.tape import Tape
from ..errors import NEVER_HIDDEN, HCTransformError, NotEquivalent
from ..graphs import meta
from ..models.compare import relative_error, tensors_of
from ..models.copies import copy_inputs, doubled_modules
from ..residuals.keys import relative
from ..residuals.placement import BlockPlan, BlocksPlan
from ..residuals.planner import Plan
from ..running.block_runner import RUNNER, BlockRunner
from ..running.variants import Variant
from ..threads import again_beside_threads
from .pairs import Pair, failures_of, judge_start, run_like, tolerance_of
from .reference import NamedInputs, ReferenceInterpreter
from .rounding import OUTPUTS, Judgement, Rounding, judge
from .verify import (
    DECIDES,
    STREAM_TOLERANCES,
    Verification,
    described_difference,
    is_wrong,
    not_covered,
    not_equivalent,
    outputs_compared,
    result_of,
    separated,
    streams_error,
    without_stream_dropout,
)

log = logging.getLogger("hc_transform")

Streams = tuple[Tensor, ...]


@again_beside_threads
def verify_blocks(  # noqa: PLR0913  # as verify
    original: nn.Module,
    converted: nn.Module,
    planned: BlocksPlan,
    tape: Tape,
    modules: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: Any = None,
) -> Verification:
    """Compare a converted model with its original on the example inputs, and with its tape off the start.

    Args:
        original, converted: the models.
        planned, tape, modules: what was converted; ``modules`` are the connections by their keys on the tape.
        args, kwargs: the example inputs.
        expected: what :func:`run_like` returns for the original, if that is known already.

    Raises:
        NotEquivalent: as for :func:`hc_transform.verification.verify.verify`. With all coefficients moved off
            their start the outputs are compared to those of the tape, interpreted with stacked streams.
        HCTransformError: the reference itself, or the converted model with separated streams, fails.
    """
    if expected is None:
        expected = run_like(original, args, kwargs)
    plan = planned.plan
    bound = tolerance_of(expected, original)
    start, explained = Judgement(), ""
    with without_stream_dropout(converted):
        found = outputs_compared(converted, plan, args, kwargs, expected)
        apart = not_covered(plan)
        pair = _Blocks(original, converted, plan, args, kwargs, tape, modules)
        covered = plan.residuals and not apart
        if is_wrong(found, bound, plan):
            told = covered and not pair.excuse()
            start = judge_start(pair, found.error) if told else Judgement({OUTPUTS: found.error})
        if start.wrong:
            raise not_equivalent(original, found, bound, pair.first_difference() if covered else None)
        if covered:
            apart, explained = pair.check()
    return result_of(found, plan, apart, start, explained)


class _Blocks(Pair):
    """A model whose blocks run graphs beside the tape of its original, or copies of both."""

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        plan: Plan,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tape: Tape,
        modules: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(original, converted, plan, args, kwargs)
        self.tape = tape
        self.modules = modules
        self.connections = nn.ModuleList({id(m): m for m in modules.values()}.values())

    def check(self) -> tuple[str, str]:
        """Return why separated streams cannot be compared, and what rounding explains of how they differ.

        Raises:
            NotEquivalent: they differ.
            HCTransformError: the reference fails.
        """
        try:
            with separated(self.connections, self.plan):
                errors = self.differences()
        except HCTransformError:
            excuse = self.excuse()
            if not excuse:
                raise
            return excuse, ""
        if not errors:
            return "", ""
        if excuse := self.excuse():
            return excuse, ""
        with separated(self.connections, self.plan):
            judged = judge(self, errors)
        if not judged.wrong:
            return judged.unclear, judged.explained
        where = described_difference(self.plan, judged.wrong)
        raise NotEquivalent(
            f"with separated streams the converted {type(self.original).__name__} differs from its reference by "
            f"{errors[OUTPUTS]:.1e} (relative); {where or 'no residual differs by itself'}. "
            "Leave that residual out with exclude=[...], or report the model."
        )

    def differences(self) -> dict[str, float]:
        """Return the errors of the outputs, and then of streams, above the usual bound.

        Raises:
            HCTransformError: one of the two cannot be run with separated streams.
        """
        actual = tensors_of(self.run_converted())
        expected, written = self.reference()
        dtype = next((t.dtype for t in actual if t.is_floating_point()), torch.float32)
        error = relative_error(actual, list(expected))
        if error <= STREAM_TOLERANCES.get(dtype, math.inf):
            return {}
        return {**self._differences_of_streams(written), OUTPUTS: error}

    def first_difference(self) -> str | None:
        """Return a phrase that names the first residual whose streams differ from the reference's, if any."""
        try:
            with separated(self.connections, self.plan):
                judged = judge(self, self._differences_of_streams(self.reference()[1]))
        except HCTransformError:  # the error that this is to explain stands for itself
            return None
        return described_difference(self.plan, judged.wrong)

    def _differences_of_streams(self, written: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the errors of streams above the usual bound, as far as the blocks can be looked into."""
        wrong: dict[str, float] = {}

        def compare(name: str, streams: Streams) -> None:
            error = streams_error(streams, written[name]) if name in written else 0.0
            if error:
                wrong.setdefault(name, error)

        try:
            with observed_blocks(self.converted, compare):
                run_like(self.converted, self.args, self.kwargs)
        except NEVER_HIDDEN:
            raise
        except Exception as failure:  # noqa: BLE001  # of the user's code, which runs as often as it is looked at
            log.info("no residual is named, for the blocks cannot be looked into: %s", failure)
        return wrong

    def reference(self, rounding: Rounding | None = None) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the outputs of the tape run with stacked streams, and the streams after each residual.

        Raises:
            HCTransformError: it cannot be run.
        """
        reference = ReferenceInterpreter(self.plan, self.modules, self.tape.graph_module, rounding)
        reference.wide = self.wide
        with failures_of("the reference implementation", self.original):
            outputs = run_like(self.tape.graph_module, (), self.tape.named_inputs, reference.run_on)
        return outputs, reference.written

    def copied(self) -> _Blocks:
        """Return copies in double precision."""
        keys = list(self.modules)
        original, converted, module, *modules = doubled_modules(
            self.original, self.converted, self.tape.graph_module, *self.modules.values()
        )
        args, kwargs, inputs = copy_inputs((self.args, self.kwargs, self.tape.inputs), double=True)
        tape = replace(self.tape, graph_module=module, inputs=inputs)
        pair = _Blocks(original, converted, self.plan, args, kwargs, tape, dict(zip(keys, modules, strict=True)))
        pair.wide = True
        return pair

    def excuse(self) -> str:
        """Return why the tape is no measure of this model with separated streams; "" if it is one."""
        if self.tape.reads_values:
            return DECIDES
        if self.tape.closes_over:
            return "the recorded run holds a torch.vmap whose function uses more than it is given"
        plain = NamedInputs(self.tape.graph_module)
        try:
            repeated = run_like(self.tape.graph_module, (), self.tape.named_inputs, plain.run_on)
        except NEVER_HIDDEN:
            raise
        except Exception as failure:  # noqa: BLE001  # operations of the user's may raise anything
            return f"the recorded run cannot be repeated ({' '.join(str(failure).split())[:200]})"
        outputs = tensors_of(run_like(self.original, self.args, self.kwargs))
        if not relative_error(outputs, list(repeated)) <= tolerance_of(outputs, self.original):
            return "the recorded run gives other outputs when repeated"
        return ""


@contextmanager
def observed_blocks(converted: nn.Module, observe: Callable[[str, Streams], None]) -> Iterator[None]:
    """Call ``observe`` with the streams after each residual, by its name, while the blocks of ``converted`` run."""
    swapped: list[tuple[Variant, Any]] = []
    for module in converted.modules():
        runner = module.__dict__.get(RUNNER)
        if runner is None:
            continue
        names = _Names(runner)
        for key, variants in runner.variants.items():
            for variant in variants:
                if not any(variant is other for other, _ in swapped):
                    swapped.append((variant, variant.forward))
                    variant.forward = _observed(variant, names, key[0], observe)
    try:
        yield
    finally:
        for variant, forward in swapped:
            variant.forward = forward


def _observed(variant: Variant, names: _Names, number: int, observe: Callable[[str, Streams], None]) -> Any:
    signature = inspect.signature(variant.whole)

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(block, *args, **kwargs).arguments)
        given.pop(next(iter(signature.parameters)))
        interpreter = _BlockRecorder(block, graph=variant.graph)
        interpreter.tell = lambda name, streams: observe(names.of(number, name), streams)
        return interpreter.run_on(**given)

    return forward


class _BlockRecorder(NamedInputs):
    tell: Callable[[str, Streams], None]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = meta.RESIDUAL.of(n)
        if name is not None:  # at once: what comes next may overwrite the streams
            self.tell(name, value)
        return value


class _Names:
    """The names that a block's residuals have in the whole model, call by call."""

    def __init__(self, runner: BlockRunner) -> None:
        self.plan: BlockPlan = runner.plan
        self.calls = runner.calls
        self.seen: Counter[tuple[int, str]] = Counter()

    def of(self, number: int, local: str) -> str:
        """Return the name of the residual ``local`` of the graph of call ``number``."""
        made_by = self.calls[0] if self.plan.shared else self.calls[number]
        calls = [c for c in self.plan.calls if self.plan.shared or c.step == made_by.step]
        first = [relative(name, self.plan.path) for name in made_by.residuals]
        number = 0 if self.plan.shared else number
        call = min(self.seen[number, local], len(calls) - 1)
        self.seen[number, local] += 1
        return calls[call].residuals[first.index(local)] if local in first else local
