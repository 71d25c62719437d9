"""Converted models in the hands of other tools: torch.fx's tracer, feature extractors, ensembles, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from checks import moved
from torch import Tensor, fx, nn
from torch.func import functional_call, stack_module_state, vmap
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import hc_transform as hct

SCOPES = ("graph", "blocks")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if x.shape[1] > 100:
            x = x[:, :100]
        return x + scale * self.drop(self.f(self.norm(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for block in self.blocks:
            x = block(x, scale)
        return self.norm(x)


@pytest.mark.parametrize("around", [False, True], ids=["itself", "in another model"])
@pytest.mark.parametrize("scope", SCOPES)
def test_torch_fx_traces_a_converted_model(scope: str, around: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    hc = moved(hct.convert(Net().eval(), (x,), scope=scope), seed=0)
    model = nn.Sequential(nn.Linear(8, 8), hc, nn.Linear(8, 3)).eval() if around else hc
    traced = fx.symbolic_trace(model)
    traced.graph.lint()
    assert set(traced.state_dict()) == set(model.state_dict())
    for train in (False, True):
        for size in (2, 7):
            x = torch.randn(size, 5, 8)
            torch.manual_seed(1)
            expected = torch.as_tensor(model.train(train)(x))
            torch.manual_seed(1)
            torch.testing.assert_close(torch.as_tensor(traced.train(train)(x)), expected)


class Between(nn.Module):
    """Adds to the value between its blocks, and multiplies it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.add(2 * block(x), 1).sub(0.5)
        return x


def test_a_trace_keeps_streams_through_sums_between_blocks() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    hc = moved(hct.convert(Between().eval(), (x,), scope="blocks"), seed=0)
    assert {r.trunk for r in hc.hc_report.converted} == {0}
    torch.testing.assert_close(torch.as_tensor(fx.symbolic_trace(hc)(x)), torch.as_tensor(hc(x)))


def test_a_traced_graph_keeps_its_decisions() -> None:
    hc = hct.convert(Net().eval(), (torch.randn(2, 5, 8),), scope="graph")
    traced = fx.symbolic_trace(hc)
    with pytest.raises(hct.DecisionChanged):
        traced(torch.randn(2, 101, 8))


@pytest.mark.parametrize("scope", SCOPES)
def test_feature_extractors_find_what_modules_return(scope: str) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(1, 3, 64, 64)
    wanted = {"layer1": "a", "layer3": "b", "flatten": "c"}
    with torch.no_grad():
        expected = create_feature_extractor(model, wanted)(x)
        hc = hct.convert(model, (x,), scope=scope)
        assert "layer1.0.conv1" in get_graph_node_names(hc)[0] or scope == "blocks"
        start = create_feature_extractor(hc, wanted)(x)
        for name, value in expected.items():
            torch.testing.assert_close(torch.as_tensor(start[name]), value, rtol=1e-5, atol=1e-5)
        output = moved(hc, seed=0)(x)
        features = create_feature_extractor(hc, {**wanted, "fc": "d"})(x)
    torch.testing.assert_close(features["d"], torch.as_tensor(output))
    assert features["a"].shape == expected["a"].shape


@pytest.mark.parametrize("scope", SCOPES)
def test_copies_make_an_ensemble(scope: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    hc = hct.convert(Net().eval(), (x,), scope=scope)
    models = [moved(copy.deepcopy(hc), seed=0) for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            for p in model.parameters():
                p.mul_(1 + 0.1 * i)
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(functional_call(base, (params, buffers), (x,)))

    with torch.no_grad():
        outputs = vmap(call, (0, 0, None))(params, buffers, x)
        expected = torch.stack([torch.as_tensor(model(x)) for model in models])
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1])


def test_a_copy_is_rewritten_by_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    hc = hct.convert(Net().eval(), (x,), scope="graph")
    other = copy.deepcopy(hc)
    assert type(other) is type(hc)
    with torch.no_grad():
        expected = hc(x)
        node = next(n for n in reversed(other.graph.nodes) if n.op == "call_module")
        with other.graph.inserting_after(node):
            doubled = other.graph.call_function(torch.mul, (node, 2))
        node.replace_all_uses_with(doubled, lambda user: user is not doubled)
        other.recompile()
        torch.testing.assert_close(hc(x), expected)
        torch.testing.assert_close(other(x), 2 * expected)
        longer = torch.randn(2, 101, 8)
        hc(longer)  # traced again, and not for the other
        torch.testing.assert_close(hc(x), expected)
        torch.testing.assert_close(other(x), 2 * expected)
