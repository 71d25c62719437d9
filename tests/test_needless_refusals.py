"""Code that runs and once was refused without need: modules made in forward, functions of functions, asserts."""

from __future__ import annotations

import pytest
import torch
from checks import check_preserved
from einops.layers.torch import Rearrange
from torch import nn

import hc_transform as hct

SCOPES = ("graph", "blocks")
D = 8


class Block(nn.Module):
    """x + how(self, f(x))."""

    def __init__(self, how):
        super().__init__()
        self.f, self.how = nn.Linear(D, D), how

    def forward(self, x):
        return x + self.how(self, self.f(x))


def stack(how, depth=2):
    return nn.Sequential(*(Block(how) for _ in range(depth)))


def x_of(*shape):
    return torch.randn(*(shape or (4, D)))


# -- modules that are made in forward

MADE = {
    "activation": lambda block, y: nn.ReLU()(y),
    "sequence": lambda block, y: nn.Sequential(nn.Tanh(), nn.Softmax(-1))(y),
    "einops": lambda block, y: Rearrange("b (h d) -> b h d", h=2)(y).flatten(1),
    "norm": lambda block, y: nn.LayerNorm(D, elementwise_affine=False)(y),
    "loss": lambda block, y: y * nn.MSELoss()(y, torch.zeros_like(y)),
    "loss-with-weights": lambda block, y: y * nn.BCEWithLogitsLoss(pos_weight=torch.ones(D))(y, y.detach().sigmoid()),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", MADE.values(), ids=MADE)
def test_modules_made_in_forward_are_part_of_its_code(how, scope):
    model = stack(how)
    hc = hct.convert(model, x_of(), scope=scope)
    assert len(hc.hc_report.converted) == 2, str(hc.hc_report)
    check_preserved(model, hc, (x_of(),), others=[(x_of(6, D),)])


@pytest.mark.parametrize("scope", SCOPES)
def test_a_module_with_weights_that_is_no_submodule_is_named(scope):
    outside = nn.Linear(D, D)
    with pytest.raises(hct.NothingToConvert, match="calls a Linear that is no submodule of the model"):
        hct.convert(stack(lambda block, y: outside(y)), x_of(), scope=scope)
