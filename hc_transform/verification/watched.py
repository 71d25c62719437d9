"""Converted models that tell of their streams while they run."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from ..graphs import meta
from ..graphs.dialects import inputs_of
from ..residuals.keys import relative
from ..residuals.placement import BlockPlan
from ..running.block_runner import RUNNER, BlockRunner
from ..running.variants import Variant
from .reference import NamedInputs

Observe = Callable[[str, Sequence[Tensor]], None]


def watched_graph(converted: fx.GraphModule, observe: Observe, wide: bool = False) -> Callable[..., Any]:
    """Return what runs a graph and calls ``observe`` with the streams after each residual, by its name."""
    teller = _Teller(converted)
    teller.tell, teller.wide = observe, wide

    signature = inspect.signature(converted.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = inputs_of(converted, args, kwargs)
        return teller.run_on(**(signature.bind(*args, **kwargs).arguments if given is None else given))

    def run(*args: Any, **kwargs: Any) -> Any:
        converted.__dict__["forward"] = forward  # so that its own hooks are called
        try:
            return converted(*args, **kwargs)
        finally:
            del converted.__dict__["forward"]

    return run


def watched_blocks(converted: nn.Module, observe: Observe) -> Callable[..., Any]:
    """Return what runs a model with graphs in its blocks, and tells of them as :func:`watched_graph` does."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _observed_blocks(converted, observe):
            return converted(*args, **kwargs)

    return run


@contextmanager
def _observed_blocks(converted: nn.Module, observe: Observe) -> Iterator[None]:
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


def _observed(variant: Variant, names: _Names, number: int, observe: Observe) -> Any:
    signature = inspect.signature(variant.whole)

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(block, *args, **kwargs).arguments)
        given.pop(next(iter(signature.parameters)))
        interpreter = _Teller(block, graph=variant.graph)
        interpreter.tell = lambda name, streams: observe(names.of(number, name), streams)
        return interpreter.run_on(**given)

    return forward


class _Teller(NamedInputs):
    """Tells of the streams after each residual."""

    tell: Observe

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
