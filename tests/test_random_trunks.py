"""Randomness on the trunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from awkward import chain, check, rows
from models import Mixing
from torch import nn


class DropPath(nn.Module):
    """As in timm: one draw for each sample."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = 1 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class ScaledNoise(nn.Module):
    def forward(self, x):
        return x * (1 + 0.1 * torch.randn_like(x)) if self.training else x


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class FunctionalPath(nn.Module):
    """Stochastic depth of a whole residual, decided by a draw for each sample."""

    def __init__(self):
        super().__init__()
        self.f = Mixing()

    def forward(self, x):
        h = self.f(x)
        if self.training:
            h = h * (torch.rand(x.shape[0], 1, 1, dtype=x.dtype) > 0.5) / 0.5
        return x + h


RANDOM = {
    "F.dropout": FunctionalDropout,
    "nn.Dropout": lambda: nn.Dropout(0.5),
    "nn.Dropout, in place": lambda: nn.Dropout(0.5, inplace=True),
    "nn.AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "nn.FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5),
    "drop path": DropPath,
    "drop path that never drops": lambda: DropPath(0.0),
    "drop path of the branch": FunctionalPath,
    "nn.RReLU": nn.RReLU,
    "additive noise": Noise,
    "multiplicative noise": ScaledNoise,
    "activation and dropout": lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
    "dropout and activation": lambda: nn.Sequential(nn.Dropout(0.5), nn.Tanh()),
    "scale and dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Identity()),
    "norm and dropout": lambda: nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", RANDOM)
def test_randomness_on_the_trunk(kind, training):
    model = nn.Sequential(chain(1), RANDOM[kind](), chain(1)).train(training)
    check(model, (rows(),), 3 if kind == "drop path of the branch" else 2)


class OnTheTrunk(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.fs, self.change = nn.ModuleList(Mixing() for _ in range(3)), change

    def forward(self, x):
        for f in self.fs:
            x = self.change(self, x + f(x))
        return x


def sampled(module, x):
    if not module.training:
        return x
    return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.5) / 0.5


INLINE_RANDOM = {
    "F.dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "F.dropout, keywords": lambda m, x: F.dropout(input=x, p=0.5, training=m.training),
    "F.dropout1d": lambda m, x: F.dropout1d(x, 0.5, m.training),
    "F.alpha_dropout": lambda m, x: F.alpha_dropout(x, 0.5, m.training),
    "F.rrelu": lambda m, x: F.rrelu(x, training=m.training),
    "rand mask": sampled,
    "randn_like": lambda m, x: x + 0.1 * torch.randn_like(x),
    "bernoulli mask": lambda m, x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "F.gumbel_softmax": lambda m, x: F.gumbel_softmax(x, dim=-1),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", INLINE_RANDOM)
def test_randomness_in_code_on_the_trunk(kind, training):
    check(OnTheTrunk(INLINE_RANDOM[kind]).train(training), (rows(),), 3)
