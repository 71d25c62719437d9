"""Inputs that a model or a block overwrites are overwritten by the converted one too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from checks import moved
from torch import Tensor, nn

import hc_transform as hct

SCOPES = ("graph", "blocks")


class Block(nn.Module):
    """A block that says what it does to its input by a function."""

    def __init__(self, does: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.g = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.does = (does,)

    def forward(self, x: Tensor) -> Tensor:
        return self.does[0](self, x)


def adds(self: Block, x: Tensor) -> Tensor:
    x += self.f(x.clone())
    return x


def adds_twice(self: Block, x: Tensor) -> Tensor:
    x.add_(self.f(x.clone()))
    x += self.g(x.clone())
    return x


def adds_then_goes_on(self: Block, x: Tensor) -> Tensor:
    x += self.f(x.clone())
    return x + self.g(x)


def scales_after(self: Block, x: Tensor) -> Tensor:
    x += self.f(x.clone())
    x.mul_(0.5)
    return x + self.g(x)


def through_a_view(self: Block, x: Tensor) -> Tensor:
    v = x.view(-1, 8)
    v += self.f(v.clone())
    return (v + self.g(v)).view(-1, 3, 8)


def then_assigns(self: Block, x: Tensor) -> Tensor:
    x += self.f(x.clone())
    x[:, 0] = 1.0
    return x + self.g(x)


KINDS = (adds, adds_twice, adds_then_goes_on, scales_after, through_a_view, then_assigns)


class Model(nn.Module):
    """Blocks, and their caller, who looks at what it gave them."""

    def __init__(self, *kinds: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(kind) for kind in kinds)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        given = h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return h, given


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_the_caller_gave_is_overwritten(kind: Callable[[Block, Tensor], Tensor], scope: str) -> None:
    torch.manual_seed(0)
    block, x = Block(kind), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(block), (x,), scope=scope)
    assert torch.equal(x, x.clone())
    ours, theirs = x.clone(), x.clone()
    with torch.no_grad():
        expected, actual = block(theirs), hc(ours)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(theirs, x)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "kinds",
    [*((kind, adds) for kind in KINDS), (adds, adds, adds), (adds, adds_twice, adds_then_goes_on, adds)],
    ids=lambda kinds: "-".join(kind.__name__ for kind in kinds),
)
def test_a_caller_sees_what_blocks_left_of_its_value(kinds: tuple, scope: str) -> None:
    torch.manual_seed(0)
    model, x = Model(*kinds), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    with torch.no_grad():
        for size in (2, 5):
            x = torch.randn(size, 3, 8)
            torch.testing.assert_close(tuple(map(torch.as_tensor, hc(x))), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_inference_mode_overwrites_too(scope: str) -> None:
    torch.manual_seed(0)
    model, x = Model(adds, adds, adds_then_goes_on), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    with torch.inference_mode():
        torch.testing.assert_close(tuple(map(torch.as_tensor, hc(x))), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_inference_mode_traces_other_calls_that_overwrite(scope: str) -> None:
    def does(self: Block, x: Tensor) -> Tensor:
        x += self.f(x.clone())
        return x * 2.0 if x.shape[1] > 4 else x

    torch.manual_seed(0)
    model = Model(does, does)
    hc = hct.convert(copy.deepcopy(model), (torch.randn(2, 3, 8),), scope=scope)
    with torch.inference_mode():
        x = torch.randn(2, 6, 8)
        torch.testing.assert_close(tuple(map(torch.as_tensor, hc(x))), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_graph_that_turns_out_not_to_fit_leaves_the_input_alone(scope: str) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x[:, 0] += 1.0
            x = x + self.f(x)
            if self.training and torch.rand(()).item() < 0.5:
                x = x * 2.0
            return x + self.g(x)

    torch.manual_seed(0)
    model, x = Draws(), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for seed in range(6):
        ours, theirs = x.clone(), x.clone()
        with torch.no_grad():
            torch.manual_seed(seed)
            actual = hc(ours)
            torch.manual_seed(seed)
            torch.testing.assert_close(actual, model(theirs), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kinds", [(adds, adds), (adds, adds_then_goes_on), (scales_after, adds)])
def test_scopes_agree_off_the_start(kinds: tuple) -> None:
    torch.manual_seed(0)
    model, x = Model(*kinds), torch.randn(2, 3, 8)
    outputs = []
    for scope in SCOPES:
        hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
        moved(hc, 0.1, seed=3)
        with torch.no_grad():
            outputs.append(hc(x)[0] + 0)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_training_code_that_overwrites_its_input(scope: str) -> None:
    torch.manual_seed(0)
    model, x = Model(adds, adds).train(), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for m in (model, hc):
        a, b = m(x)
        (a.square().sum() + b.sum()).backward()
    ours = dict(hc.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name].grad, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_code_overwrites_too(scope: str) -> None:
    torch.manual_seed(0)
    model, x = Model(adds, adds_then_goes_on), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    with torch.no_grad():
        fast = torch.compile(hc, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_add_in_memory_that_others_use_is_listed() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.f, self.g = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            v = x.view(-1, 8)
            v += self.f(v)
            return v + self.g(v), x * 2

    model, x = Slices(), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope="graph")
    assert len(hc.hc_report.converted) == 1
    assert "memory that another tensor shares" in str(hc.hc_report)
    with torch.no_grad():
        torch.testing.assert_close(hc(x), model(x), rtol=1e-5, atol=1e-6)
