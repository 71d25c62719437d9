"""Code that runs and once was refused without need: modules made in forward, functions of functions, asserts."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import error, outputs_and_gradients
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


def check(how, x, scope, model=None):
    """Convert a stack of blocks and compare outputs and gradients, for other batches too; return the converted model."""
    model = model or stack(how)
    hc = hct.convert(model, x, scope=scope)
    assert len(hc.hc_report.converted) == 2, str(hc.hc_report)
    for inputs in (x, torch.cat([x, x[:1]])):
        ours, our_gradients = outputs_and_gradients(hc, (inputs,), {})
        theirs, their_gradients = outputs_and_gradients(model, (inputs,), {})
        assert error(ours, theirs) < 1e-5
        for name, gradient in their_gradients.items():
            assert (our_gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    return hc


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
    check(how, x_of(), scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_module_with_weights_that_is_no_submodule_is_named(scope):
    outside = nn.Linear(D, D)
    with pytest.raises(hct.NothingToConvert, match="calls a Linear that is no submodule of the model"):
        hct.convert(stack(lambda block, y: outside(y)), x_of(), scope=scope)


# -- torch.vmap


def _closing(block, x):
    k = block.f(x).mean(0)
    return torch.vmap(lambda q, scale: q * k * scale, in_dims=(0, None))(x, block.f.bias)


MAPPED = {
    "module": lambda block, x: torch.vmap(block.f)(x),
    "lambda": lambda block, x: torch.func.vmap(lambda t: block.f(t).relu(), in_dims=1, out_dims=1)(x),
    "nested": lambda block, x: torch.vmap(torch.vmap(block.f))(x),
    "tuple": lambda block, x: torch.vmap(lambda t: (block.f(t), t))(x)[0],
    "shape": lambda block, x: torch.vmap(lambda t: block.f(t) / t.shape[0])(x),
    "dropout": lambda block, x: torch.vmap(lambda t: torch.dropout(block.f(t), 0.2, block.training), randomness="same")(x),
    "chunks": lambda block, x: torch.vmap(block.f, chunk_size=2)(x),
    "closure": _closing,
}


class Mapped(Block):
    def forward(self, x):
        return x + self.how(self, x)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", MAPPED.values(), ids=MAPPED)
def test_vmap_in_a_branch(how, scope):
    model, x = nn.Sequential(Mapped(how), Mapped(how)), x_of(4, 3, D)
    hc = check(how, x, scope, model).eval()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(hc, backend="eager", fullgraph=True)(x), hc(x))


@pytest.mark.parametrize("scope", SCOPES)
def test_what_vmap_runs_uses_the_weights_of_the_model_that_it_is_in(scope):
    model, x = nn.Sequential(Mapped(MAPPED["lambda"]), Mapped(MAPPED["lambda"])), x_of(4, 3, D)
    hc = hct.convert(model, x, scope=scope)
    twin = copy.deepcopy(hc).double()
    with torch.no_grad():
        twin.get_submodule("0.f").weight.zero_()
        model[0].f.weight.mul_(2)
    assert error(twin(x.double()), nn.Sequential(Zeroed(model[0]), model[1]).double()(x.double())) < 1e-6
    model.float()
    assert error(hc(x), model(x)) < 1e-5


class Zeroed(nn.Module):
    """A block as it is with weights of zero."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)
        nn.init.zeros_(self.block.f.weight)

    def forward(self, x):
        return self.block(x)
