"""Parametrized and scripted modules."""

from __future__ import annotations

import copy

import pytest
import torch
from awkward import Residual, chain, check, rows
from checks import error, outputs_and_gradients, seeded
from models import Chain, Mixing
from torch import nn

import hc_transform as hct


def parametrized(wrap):
    return lambda: nn.Sequential(nn.LayerNorm(8), wrap(nn.Linear(8, 8)), nn.GELU(), wrap(nn.Linear(8, 8)))


def orthogonal(layer):
    return nn.utils.parametrizations.orthogonal(layer)


PARAMETRIZED = {
    "weight norm": parametrized(nn.utils.parametrizations.weight_norm),
    "spectral norm": parametrized(nn.utils.parametrizations.spectral_norm),
    "orthogonal": parametrized(orthogonal),
    "old weight norm": parametrized(nn.utils.weight_norm),
    "old spectral norm": parametrized(nn.utils.spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_layers(kind):
    torch.manual_seed(0)
    make = PARAMETRIZED[kind]
    model = nn.Sequential(Residual(make()), Residual(make())).double()
    x = rows()
    model(x)
    state = copy.deepcopy(model.state_dict())
    hc = hct.convert(model, (x,), num_streams=3)
    assert len(hc.hc_report.converted) == 2
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key
    ours, our_gradients = outputs_and_gradients(hc, (x,), {})
    theirs, their_gradients = outputs_and_gradients(model, (x,), {})
    assert error(ours, theirs) <= 1e-10
    assert set(their_gradients) <= set(our_gradients)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-9, atol=1e-9)
    for module in (model, hc):
        module.eval()
    assert error(hc(rows(3)[:1] + x), model(rows(3)[:1] * 0 + x)) >= 0
    assert error(hc(x[:1]), model(x[:1])) <= 1e-10


class Gained(nn.Module):
    """A block with a parametrized parameter of its own."""

    def __init__(self):
        super().__init__()
        self.f, self.gain = Mixing(), nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x + self.gain * self.f(x)


class Positive(nn.Module):
    def forward(self, x):
        return x.exp()


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_a_parametrized_block(scope):
    """Its parameter is computed on each call, as a module of its own."""
    model = nn.Sequential(Gained(), chain())
    nn.utils.parametrize.register_parametrization(model[0], "gain", Positive())
    hc = check(model, (rows(),), 3, trunks=1, scope=scope)
    before = hc(x := rows())
    with torch.no_grad():
        hc.get_parameter("0.parametrizations.gain.original").add_(1.0)
    assert not torch.equal(hc(x), before) and error(hc(x), model(x)) <= 1e-10


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(torch.relu(self.fc(x) + 1.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_branches():
    model = nn.Sequential(*(Residual(torch.jit.script(Scriptable())) for _ in range(2))).double()
    x = rows()
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 2
    for mode in (True, False):
        for module in (model, hc):
            module.train(mode)
        assert error(seeded(hc, (x,), {}), seeded(model, (x,), {})) <= 1e-10
        assert error(seeded(hc, (x[:1],), {}), seeded(model, (x[:1],), {})) <= 1e-10
    for module in (model, hc):
        module.train()
    (_, ours), (_, theirs) = (outputs_and_gradients(module, (x,), {}) for module in (hc, model))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_function_in_a_block():
    @torch.jit.script
    def gelu(x):
        return x * torch.sigmoid(1.702 * x)

    model = Chain(lambda x, f, i: x + gelu(f), 2).double()
    x = rows()
    hc = hct.convert(model, (x,))
    assert error(hc(x), model(x)) <= 1e-10 and error(hc(x[:1]), model(x[:1])) <= 1e-10
