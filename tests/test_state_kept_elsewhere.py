"""State that code keeps where modules do not see it: in arrays, slots, generators. It counts, and stays as it was."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import error
from torch import Tensor, nn

import hc_transform as hct

D = 8
SCOPES = ["graph", "blocks"]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Slots:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> int:
        self.n += 1
        return self.n


class Keeps(Plain):
    """A residual scaled by what ``scale`` makes of the block, which changes on every call."""

    def __init__(self, scale: Callable[[Any], Any]) -> None:
        super().__init__()
        self.scale = scale
        self.array, self.slots = np.ones(3), Slots()
        self.python, self.numpy, self.old = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)
        self.torch = torch.Generator().manual_seed(0)
        self.listed, self.space = [random.Random(1), torch.Generator()], types.SimpleNamespace(rng=random.Random(2))

    def counted(self, calls: list[int] = []) -> int:  # noqa: B006  # which is what is looked at
        calls.append(1)
        return len(calls)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.scale(self)


TENSOR, ARRAY = torch.ones(1), np.ones(1)


class Shares(Plain):
    """Keeps a state that all of its kind share, and that is no module's."""

    tensor = torch.ones(1)

    def __init__(self, scale: Callable[[Any], Any], count: Callable[[], int]) -> None:
        super().__init__()
        self.scale, self.count = scale, count

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.scale(self)


def clear() -> None:
    with torch.no_grad():
        TENSOR.fill_(1), Shares.tensor.fill_(1), ARRAY.fill(1)


def counter() -> Callable[[], int]:
    n = 0

    def count() -> int:
        nonlocal n
        n += 1
        return n

    return count


def checked(model: nn.Module, scope: str, converted: int, clear: Callable[[], None] = lambda: None) -> nn.Module:
    """Convert a model, which is to stay as it was, and compare three calls of both; ``clear`` begins anew."""
    clear()
    reference, x = copy.deepcopy(model), torch.randn(2, D)
    expected = [reference(x) for _ in range(3)]
    assert error(expected[1], expected[0]) > 1e-3, "the state does something"
    clear()
    hc = hct.convert(model, (x,), scope=scope)
    assert len(hc.hc_report.converted) == converted
    outputs = [model(x)]  # as conversion leaves it
    clear()
    for found, other in zip([*outputs, *(hc(x) for _ in range(3))], [expected[0], *expected], strict=True):
        assert error(found, other) < 1e-5
    return hc


def in_place(block: Any) -> float:
    block.array += 1
    return float(block.array[0])


def entry(block: Any) -> float:
    block.array[0] += 1
    return float(block.array[0])


def rebound(block: Any) -> float:
    block.array = block.array + 1
    return float(block.array[0])


def written_late(block: Any) -> float:
    scale = float(block.array[0])
    block.array[0] += 1
    return scale


def slots(block: Any) -> float:
    return block.slots()


def past_the_module(block: Any) -> float:
    block.__dict__["count"] = block.__dict__.get("count", 0) + 1
    return block.count


def listed(block: Any) -> float:
    return block.listed[0].random()


def listed_of_torch(block: Any) -> Tensor:
    return torch.rand(1, generator=block.listed[1])


def in_an_object(block: Any) -> float:
    return block.space.rng.random()


def default(block: Any) -> int:
    return block.counted()


HIDDEN = [in_place, entry, rebound, written_late, slots, past_the_module, listed, listed_of_torch, in_an_object]
HIDDEN.append(default)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", HIDDEN)
def test_code_that_keeps_a_hidden_state_stays_python(scale: Callable[[Any], Any], scope: str) -> None:
    torch.manual_seed(0)
    hc = checked(nn.Sequential(Plain(), Keeps(scale), Plain()), scope, 2, Keeps.counted.__defaults__[0].clear)
    assert "which a graph would not" in str(hc.hc_report)


def python(block: Any) -> float:
    return block.python.gauss(0, 1)


def numpy(block: Any) -> float:
    return block.numpy.random()


def old_numpy(block: Any) -> float:
    return block.old.rand()


def of_torch(block: Any) -> Tensor:
    return torch.rand(1, generator=block.torch)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [python, numpy, old_numpy, of_torch])
def test_conversion_draws_from_no_generator_for_good(scale: Callable[[Any], Any], scope: str) -> None:
    torch.manual_seed(0)
    checked(nn.Sequential(Plain(), Keeps(scale), Keeps(scale)), scope, 3)
    torch.manual_seed(0)
    checked(Keeps(scale), scope, 1)


def global_tensor(block: Any) -> Tensor:
    return TENSOR.mul_(2)


def tensor_of_a_class(block: Any) -> float:
    Shares.tensor.mul_(2)
    return float(Shares.tensor)


def rebound_on_a_class(block: Any) -> Tensor:
    Shares.tensor = Shares.tensor * 2
    return Shares.tensor


def global_array(block: Any) -> float:
    ARRAY[0] *= 2
    return float(ARRAY[0])


def closure(block: Any) -> int:
    return block.count()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [global_tensor, tensor_of_a_class, rebound_on_a_class, global_array, closure])
def test_code_that_keeps_a_state_in_no_module_stays_python(scale: Callable[[Any], Any], scope: str) -> None:
    torch.manual_seed(0)
    tensor, kept = Shares.tensor, []

    def begin_anew() -> None:
        Shares.tensor = tensor
        clear()
        for cell in kept:
            cell.cell_contents = 0

    model = nn.Sequential(Plain(), Shares(scale, counter()), Plain())
    kept += model[1].count.__closure__
    hc = checked(model, scope, 2, begin_anew)
    reason = "values of a tensor as Python numbers" if scale is tensor_of_a_class else "which a graph would not"
    assert reason in " ".join(str(hc.hc_report).split())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [global_tensor, tensor_of_a_class, rebound_on_a_class, global_array, closure])
def test_a_refusal_leaves_it_as_it_was(scale: Callable[[Any], Any], scope: str) -> None:
    clear()
    model, tensor = nn.Sequential(*(Shares(scale, counter()) for _ in range(2))), Shares.tensor
    with pytest.raises(hct.NothingToConvert):
        hct.convert(model, (torch.randn(2, D),), scope=scope)
    assert Shares.tensor is tensor and TENSOR.item() == Shares.tensor.item() == ARRAY[0] == model[0].count() == 1


class Sees(Plain):
    """Counts the lengths that all of its kind have seen."""

    seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        Sees.seen.add(x.shape[1])
        return x + self.f(x) * len(Sees.seen)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_set_of_a_class_counts(scope: str) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Plain(), Sees(), Sees()), [torch.randn(2, n, D) for n in (3, 4, 3, 5)]
    Sees.seen.clear()
    expected = [model(x) for x in inputs]
    Sees.seen.clear()
    hc = hct.convert(model, inputs[:1], scope=scope)
    assert not Sees.seen
    for x, other in zip(inputs, expected, strict=True):
        assert error(hc(x), other) < 1e-5
