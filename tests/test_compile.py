"""torch.compile: one graph, no recompilation for another batch, outputs and gradients as in eager mode."""

from __future__ import annotations

import pytest
import torch
from checks import error, outputs_and_gradients, wake
from models import GPT, Chain, ConvBlock
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import hc_transform as hct

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def tokens(batch):
    return torch.randint(0, 65, (batch, 16)), torch.randint(0, 65, (batch, 16))


def images(batch, size=32):
    return (torch.randn(batch, 3, size, size),)


MODELS = {
    "gpt": (GPT, tokens),
    "vit": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2), images),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0),
        images,
    ),
    "resnet": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), ConvBlock(), ConvBlock()), images),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", MODELS)
def test_one_compilation_for_two_batch_sizes(kind):
    make, inputs = MODELS[kind]
    hc = hct.convert(wake(make()), inputs(2)).train()
    counter = CompileCounter()
    compiled = torch.compile(hc, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        x = inputs(batch)
        assert error(compiled(*x), hc(*x)) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["gpt", "resnet"])
def test_inductor(kind):
    make, inputs = MODELS[kind]
    hc = hct.convert(wake(make()), inputs(2)).train()
    compiled = torch.compile(hc, fullgraph=True, backend="inductor")
    x = inputs(2)
    ours, our_gradients = outputs_and_gradients(compiled, x, {})
    theirs, their_gradients = outputs_and_gradients(hc, x, {})
    assert error(ours, theirs) <= 1e-4
    scale = max(g.abs().max() for g in their_gradients.values())
    for name, gradient in their_gradients.items():
        assert (our_gradients[f"_orig_mod.{name}"] - gradient).abs().max() <= 1e-3 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_inductor_with_dynamic_shapes(kind):
    make, inputs = MODELS[kind]
    hc = hct.convert(wake(make()), inputs(2)).train()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(hc, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3):
        x = inputs(batch)
        outputs = compiled(*x)
        sum(t.sum() for t in torch.utils._pytree.tree_leaves(outputs) if t.is_floating_point()).backward()
        assert error(outputs, hc(*x)) <= 1e-4


def test_carried_operations_compile():
    model = Chain(lambda x, f, i: torch.relu(nn.functional.dropout(x, 0.1, False) + f))
    x = torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,))
    assert error(torch.compile(hc, fullgraph=True, backend="eager")(x), model(x)) <= 1e-5
