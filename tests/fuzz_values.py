"""Values of random programs: outputs compared, state written down, attributes read and set, lines that run."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


class Wrong(AssertionError):
    """Something that must hold does not."""


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield everything in a nested output, with its path."""
    if isinstance(value, dict):
        parts: Any = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif isinstance(value, types.SimpleNamespace):
        parts = vars(value).items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    else:
        yield path, value
        return
    yield f"{path}:{type(value).__name__}", None
    for key, part in parts:
        yield from leaves(part, f"{path}.{key}")


def compare(actual: Any, expected: Any, bound: float) -> None:
    """Raise Wrong if two nested outputs differ in structure, types, or by more than ``bound`` of the largest value."""
    ours, theirs = list(leaves(actual)), list(leaves(expected))
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        raise Wrong(f"structure differs: {[p for p, _ in ours][:4]} for {[p for p, _ in theirs][:4]}")
    for (path, a), (_, e) in zip(ours, theirs, strict=True):
        if not isinstance(e, torch.Tensor):
            if type(a) is not type(e) or a != e:
                raise Wrong(f"{path} is {a!r} for {e!r}")
            continue
        if type(a) is not type(e) or a.shape != e.shape or a.dtype != e.dtype:
            raise Wrong(f"{path} is {type(a).__name__} {getattr(a, 'shape', '')} for {type(e).__name__} {e.shape}")
        distance = difference(a, e)
        if not distance <= bound:
            raise Wrong(f"values differ by {distance:.0e}")


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    a, e = actual.detach().double(), expected.detach().double()
    return float((a - e).abs().max() / e.abs().max().clamp_min(1e-6))


def loss_of(value: Any) -> torch.Tensor:
    """Return a loss that no gradient vanishes under."""
    tensors = [t for _, t in leaves(value) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum(  # type: ignore[return-value]
        (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors
    )


def sow(seed: int) -> None:
    """Set every generator that a program draws from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def state_of(model: nn.Module, module: types.ModuleType, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Return all that a conversion must leave as it was."""
    state: dict[str, Any] = {f"value of {k}": v.clone() for k, v in model.state_dict().items()}
    for path, m in model.named_modules():
        state[f"class of {path}"] = type(m)
        state[f"hooks of {path}"] = (len(m._forward_hooks), len(m._forward_pre_hooks))
        for key, value in m.__dict__.items():
            if not key.startswith("_"):
                state[f"attribute {path}.{key}"] = repr(value)
    state |= {f"grad of {n}": p.grad is None for n, p in model.named_parameters()}
    state |= {f"input {i}": t.clone() for i, t in enumerate(inputs)}
    state["torch's generator"], state["random's generator"] = torch.get_rng_state(), random.getstate()
    state["numpy's generator"] = [str(part) for part in np.random.get_state()]
    state["globals"] = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str))}
    state["modes"] = (torch.is_grad_enabled(), torch.get_default_dtype())
    return state


def same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return isinstance(after, torch.Tensor) and torch.equal(before, after)
    return bool(before == after)


def residuals_that_run(
    model: nn.Module, inputs: tuple[Any, ...], source: str, filename: str
) -> Counter[tuple[int, str]]:
    """Run the model and count the lines marked as residuals: (line, "" or "in helper") for each that ran."""
    marks: dict[int, tuple[int, str]] = {}
    for number, line in enumerate(source.split("\n"), 1):
        found = re.search(r"# residual( in helper| 2)?$", line)
        if found:
            marks[number] = (2 if found[1] == " 2" else 1, "in helper" if found[1] == " in helper" else "")
    ran: Counter[tuple[int, str]] = Counter()

    def of_line(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno in marks:
            times, kind = marks[frame.f_lineno]
            ran[frame.f_lineno, kind] += times
        return of_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: of_line if frame.f_code.co_filename == filename else None)
    try:
        model(*inputs)
    finally:
        sys.settrace(before)
    return ran


def read_attribute(owner: Any, attribute: str) -> Any:
    """Return ``a``, ``a.b`` or ``a[b]`` of an object."""
    if attribute.endswith("]"):
        name, key = attribute[:-1].split("[")
        return getattr(owner, name)[key]
    for name in attribute.split("."):
        owner = getattr(owner, name)
    return owner


def write_attribute(owner: Any, attribute: str, value: Any) -> None:
    """Set what :func:`read_attribute` reads."""
    if attribute.endswith("]"):
        name, key = attribute[:-1].split("[")
        getattr(owner, name)[key] = value
        return
    *names, last = attribute.split(".")
    for name in names:
        owner = getattr(owner, name)
    setattr(owner, last, value)


class Noise:
    """How far rounding moves the gradients and buffers of a model in fp32: its own, with parameters moved by as much.

    Such as those of a bias before a norm, which cancel, and the running mean of what a norm has centred.
    """

    FACTOR, SHAKES, CAP = 10, 3, 1e-3  # the cap is of the largest gradient, and of the largest buffer

    def __init__(self, model: nn.Module, inputs: Any, train: bool, seed: int, trains: bool) -> None:
        self.model = copy.deepcopy(model).train(train)
        self.inputs, self.seed, self.trains = inputs, seed, train and trains
        self.bounds: dict[str, float] = {}

    def of(self, name: str) -> float:
        """Return the largest difference of a gradient, or a buffer, that may be rounding."""
        if not self.bounds:
            calm, *shaken = (self._values(shake) for shake in range(self.SHAKES + 1))
            for kind in (0, 1):
                most = max((v.abs().max().item() for v in calm[kind].values() if v.numel()), default=0.0)
                for key, value in calm[kind].items():
                    moved = max(((s[kind][key] - value).abs().max().item() for s in shaken if value.numel()), default=0)
                    self.bounds[key] = min(self.FACTOR * moved, self.CAP * most)
        return self.bounds.get(name, 0.0)

    def _values(self, shake: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = copy.deepcopy(self.model)
        if shake:
            generator = torch.Generator().manual_seed(shake)
            with torch.no_grad():
                for p in model.parameters():
                    unit = torch.finfo(torch.float32).eps * (torch.rand(p.shape, generator=generator) - 0.5)
                    p.mul_(1 + unit.to(p.dtype))
        sow(self.seed)
        with torch.set_grad_enabled(self.trains):
            value = model(*(t.clone() for t in self.inputs))
        loss = loss_of(value)
        if self.trains and isinstance(loss, torch.Tensor):
            loss.backward()
        grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        return grads, {n: b.double() for n, b in model.named_buffers()}
