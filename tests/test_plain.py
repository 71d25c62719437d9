"""The way back: a converted model without its connections."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import error, moved
from models import GPT, PostNormBlock, ResNet, SharedBlock, ViT
from torch import nn

import hc_transform as hct

SCOPES = ["graph", "blocks"]
IDS = torch.randint(0, 65, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS = {"gpt": (GPT, IDS), "vit": (ViT, IMAGE), "resnet": (ResNet, IMAGE)}


def convert(model, x, scope, **options):
    return hct.convert(model, (x,), scope=scope, **{"verify": False, **options})


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_original_structure_is_back(name, scope):
    make, x = MODELS[name]
    model = make(depth=2).eval()
    hc = convert(model, x, scope)
    again = hct.plain(hc)
    assert classes(again) == classes(model) and list(again.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert [n for n, _ in again.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert error(again(x), model(x)) == 0
    assert again.hc_difference.moved == () and again.hc_difference.change <= 1e-6
    assert "All" in str(again.hc_difference)
    assert error(hc(x), model(x)) <= 1e-5, "the converted model is still one"
    with pytest.raises(hct.NotConverted):
        hct.plain(again)
    assert len(convert(again, x, scope).hc_report.converted) == len(hc.hc_report.converted)


@pytest.mark.parametrize("scope", SCOPES)
def test_trained_parameters_stay_and_the_change_is_told(scope):
    hc = moved(convert(GPT(depth=2).eval(), IDS, scope))
    with torch.no_grad():
        hc.get_submodule("transformer.h.0.mlp.fc").weight.add_(0.1)
    with pytest.warns(
        UserWarning, match=r"^4 of 4 connections have moved .* lost\. Outputs change by .*e-01 \(relative\)"
    ):
        again = hct.plain(hc, (IDS,))
    assert torch.equal(again.transformer.h[0].mlp.fc.weight, hc.get_submodule("transformer.h.0.mlp.fc").weight)
    assert again.hc_difference.change == pytest.approx(error(again(IDS), hc(IDS)), rel=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_connection_that_moved_is_named(scope):
    hc = convert(GPT(depth=2).eval(), IDS, scope, readout="learned")
    with torch.no_grad():
        hc.get_submodule("transformer.h.1.hyper_connections.attn").h_post.add_(0.5)
    with pytest.warns(UserWarning, match="1 of 5 connections"):
        again = hct.plain(hc)
    assert again.hc_difference.moved == ("transformer.h.1.hyper_connections.attn",)


def test_inputs_that_cannot_be_made_are_said_to_be_missing():
    hc = hct.convert(nn.Sequential(PostNormBlock(), PostNormBlock()), connection="static")
    assert "Outputs were not compared: give inputs" in str(hct.plain(hc).hc_difference)
    with pytest.warns(UserWarning, match="Outputs were not compared"):
        hct.plain(moved(hc))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_mode_goes_along(scope):
    hc = convert(GPT(depth=2, dropout=0.5).train(), IDS, scope)
    hc.eval()
    again = hct.plain(hc)
    assert not any(module.training for module in again.modules())
    again = hct.plain(hc.train())
    assert all(module.training for module in again.modules())


@pytest.mark.parametrize("how", ["before", "after"])
def test_hooks_are_the_users_own(how):
    seen = []
    model = GPT(depth=2).eval()

    def hook(module, args, output):
        seen.append(type(output))

    if how == "before":
        model.transformer.h[0].register_forward_hook(hook)
    hc = convert(model, IDS, "blocks")
    if how == "after":
        hc.transformer.h[0].register_forward_hook(hook)
    again = hct.plain(hc)
    assert list(again.transformer.h[0]._forward_hooks.values()) == [hook]
    assert not any(module._forward_hooks for module in again.modules() if module is not again.transformer.h[0])
    seen.clear()
    again(IDS)
    assert seen == [torch.Tensor]


def test_in_place_and_back_in_a_wrapper():
    model = GPT(depth=2).eval()
    expected = copy.deepcopy(model)(IDS)
    holder = nn.ModuleDict({"inner": hct.convert(model, (IDS,), scope="blocks", inplace=True)})
    again = hct.plain(holder)
    assert "hyper_connections" not in str(again) and error(again["inner"](IDS), expected) == 0
    holder = nn.ModuleDict({"inner": hct.convert(GPT(depth=2), (IDS,), scope="graph")})
    assert type(hct.plain(holder)["inner"]) is GPT


@pytest.mark.parametrize("scope", SCOPES)
def test_a_block_called_twice(scope):
    model, x = SharedBlock().eval(), torch.randn(2, 5, 8)
    again = hct.plain(convert(model, x, scope))
    assert classes(again) == classes(model) and error(again(x), model(x)) == 0


def test_an_exported_program_has_no_way_back():
    program = torch.export.export(ViT(depth=1), (IMAGE,))
    with pytest.raises(hct.UnsupportedModel, match="was made of an exported program"):
        hct.plain(hct.convert(program))


def test_hugging_face_forgets_the_conversion():
    pytest.importorskip("transformers")
    from test_hugging_face import llama

    model = llama()
    hc = hct.convert(model, kwargs={"input_ids": IDS}, verify=False)
    again = hct.plain(hc)
    assert again.config.to_dict() == model.config.to_dict() and type(again) is type(model)
    assert "hc_transform" in hc.config.to_dict()
    with torch.no_grad():
        assert error(again(IDS).logits, model(IDS).logits) == 0
