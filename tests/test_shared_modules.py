"""Tied weights, and modules that are called several times."""

from __future__ import annotations

import copy

import pytest
import torch
from awkward import Residual, chain, check, rows
from models import Mixing
from torch import nn


class Tied(nn.Module):
    """Two branches with one weight, an embedding and a head with another."""

    def __init__(self):
        super().__init__()
        self.embed, self.fs, self.head = nn.Embedding(7, 8), nn.ModuleList(Mixing() for _ in range(3)), nn.Linear(8, 7)
        self.head.weight = self.embed.weight
        self.fs[2].fc.weight = self.fs[0].fc.weight

    def forward(self, i):
        x = self.embed(i)
        for f in self.fs:
            x = x + f(x)
        return self.head(x)


def test_tied_weights():
    hc = check(Tied(), (torch.randint(0, 7, (2, 5)),), 3, trunks=1)
    assert hc.head.weight is hc.embed.weight and hc.fs[2].fc.weight is hc.fs[0].fc.weight
    hc.to(torch.float32)
    assert hc.head.weight is hc.embed.weight and hc.fs[2].fc.weight is hc.fs[0].fc.weight
    twin = copy.deepcopy(hc)
    assert twin.head.weight is twin.embed.weight and twin.head.weight is not hc.head.weight


class SharedBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.norms = Mixing(), nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x):
        for norm in self.norms:
            x = x + self.f(norm(x))
        return x


class TwoNames(nn.Module):
    """One block registered under two names."""

    def __init__(self):
        super().__init__()
        self.a = Residual(Mixing())
        self.b = self.a
        self.blocks = nn.ModuleList([self.a, Residual(Mixing()), self.a])

    def forward(self, x):
        x = self.b(self.a(x))
        for block in self.blocks:
            x = block(x)
        return x


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(Residual(Mixing()), nn.LayerNorm(8))

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = chain()

    def forward(self, a, b):
        return self.encoder(a) - self.encoder(b)


SHARED = {
    "block called three times": (Repeated, 1, 3),
    "branch of two residuals": (SharedBranch, 1, 2),
    "block under two names": (TwoNames, 1, 5),
    "encoder of two inputs": (Siamese, 2, 4),
}


@pytest.mark.parametrize("kind", SHARED)
def test_modules_called_several_times(kind):
    make, inputs, count = SHARED[kind]
    hc = check(make(), tuple(rows() for _ in range(inputs)), count, trunks=inputs)
    names = [r.name for r in hc.hc_report.converted]
    assert len(set(names)) == count
