"""Code that decides on the values of tensors."""

from __future__ import annotations

import pytest
import torch
from awkward import Residual, chain, check, reasons, rows
from checks import error
from models import Mixing
from torch import nn

import hc_transform as hct


class Deciding(nn.Module):
    """Decides on the values of its input: in a branch, or around its own residual."""

    def __init__(self, decide, block=False):
        super().__init__()
        self.f, self.decide, self.block = Mixing(), decide, block

    def forward(self, x):
        h = self.f(x) if self.decide(x) else -2 * self.f(x)
        return x + h if self.block else h


DECISIONS = {
    "sum > 0": lambda x: x.sum() > 0,
    "item": lambda x: x.sum().item() > 0,
    "float": lambda x: float(x.sum()) > 0,
    "tolist": lambda x: x.sum((1, 2)).tolist()[0] > 0,
    "any": lambda x: (x.sum() > 0).any(),
    "equal": lambda x: not torch.equal(x, -x.abs()),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")  # the model does
@pytest.mark.parametrize("place", ["branch", "block"])
@pytest.mark.parametrize("kind", DECISIONS)
def test_decisions_on_values(kind, place):
    deciding = Deciding(DECISIONS[kind], place == "block")
    model = nn.Sequential(deciding if place == "block" else Residual(deciding), chain())
    positive, negative = rows().abs(), -rows().abs()
    whole = kind == "float" and place == "block"  # Python has to have it as a number
    hc = check(model, (positive,), 2 if whole else 3, others=[(negative,), (positive,)])
    assert reasons(hc, "of a tensor") == (["0"] if whole else [])


class LayerDrop(nn.Module):
    """A stack of blocks that draws whether to leave one out; with p=0 it never does."""

    def __init__(self, p=0.0):
        super().__init__()
        self.blocks, self.p = nn.ModuleList(Residual(Mixing()) for _ in range(3)), p

    def forward(self, x):
        for block in self.blocks:
            if not (self.training and torch.rand(1).item() <= self.p):
                x = block(x)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_a_stack_that_decides_on_values_is_looked_into(training):
    check(nn.Sequential(LayerDrop(), nn.Linear(8, 8)).train(training), (rows(),), 3, trunks=1)


@pytest.mark.parametrize("kind", DECISIONS)
def test_decisions_on_values_in_the_root(kind):
    model = Deciding(DECISIONS[kind], True).double()
    positive, negative = rows().abs(), -rows().abs()
    try:
        hc = hct.convert(model, (positive,))
    except hct.HCTransformError as refusal:
        assert "of a tensor" in str(refusal)
        return
    for x in (positive, negative, positive, 2 * positive, 2 * negative):
        assert error(hc(x), model(x)) <= 1e-10
