"""Real models of torchvision and timm: the number of residuals, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from checks import check_preserved, double, doubled, wake

import hc_transform as hct

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

# name: (residuals, image size). Counted from the configurations: identity blocks of a ResNet stage
# (depth - 1; the first projects), two a transformer block, one a ConvNeXt block.
TORCHVISION = {
    "resnet18": (1 + 1 + 1 + 1 + 1, 64),
    "resnet50": (2 + 3 + 5 + 2, 64),
    "vit_b_16": (2 * 12, 224),
    "swin_t": (2 * (2 + 2 + 6 + 2), 224),
    "convnext_tiny": (3 + 3 + 9 + 3, 64),
}
TIMM = {
    "deit_tiny_patch16_224": (2 * 12, 224),
    "convnext_atto": (2 + 2 + 6 + 2, 64),
    "convnextv2_atto": (2 + 2 + 6 + 2, 64),
    "caformer_s18": (2 * (3 + 3 + 9 + 3), 64),
    "efficientformer_l1": (2 * (3 + 2 + 6 + 4), 224),
    "mixer_s16_224": (2 * 8, 224),
    "mobilenetv2_050": (1 + 2 + 3 + 2 + 2, 64),
}


def make(name):
    source, _, model = name.partition(":")
    made = torchvision.models.get_model(model) if source == "torchvision" else timm.create_model(model)
    return wake(made)


CASES = {f"torchvision:{k}": v for k, v in TORCHVISION.items()} | {f"timm:{k}": v for k, v in TIMM.items()}


@pytest.mark.parametrize("name", CASES)
def test_real_models(name):
    expected, size = CASES[name]
    model = make(name).eval()
    hc = hct.convert(model, (torch.randn(2, 3, size, size),), scope="graph")
    assert len(hc.hc_report.converted) == expected, str(hc.hc_report)
    assert hc.hc_report.max_error <= 1e-5
    doubled(hc, model)  # in fp32, batch statistics of a few small images amplify rounding in the gradients
    x, other = torch.randn(2, 3, size, size), torch.randn(1, 3, size, size)
    check_preserved(model, hc, double((x,)), others=[double((other,))], bound=1e-10, gradient_bound=1e-9)


@pytest.mark.parametrize("name", ["vgg11", "densenet121"])
def test_models_without_residuals(name):
    with pytest.raises(hct.NothingToConvert):
        hct.convert(torchvision.models.get_model(name), (torch.randn(1, 3, 64, 64),))


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_grn_is_listed(scope):
    report = hct.plan(timm.create_model("convnextv2_atto"), (torch.randn(1, 3, 64, 64),), scope=scope).report
    assert len([r for r in report.skipped if "grn" in r.name]) == 12


def test_stochastic_depth_draws_as_before():
    model = timm.create_model("deit_tiny_patch16_224", depth=3, drop_path_rate=0.5, proj_drop_rate=0.2)
    hc = hct.convert(wake(model), (torch.randn(2, 3, 224, 224),))
    check_preserved(model, hc, (torch.randn(8, 3, 224, 224),), gradient_bound=1e-4)


def test_a_vit_block_prints_in_about_twenty_lines():
    model, x = timm.create_model("deit_tiny_patch16_224", depth=3), torch.randn(1, 3, 224, 224)
    hc = hct.convert(model, (x,), scope="graph")
    lines = [line for line in hc.code.splitlines() if "blocks_1_" in line.split("=")[0]]
    assert 8 <= len(lines) <= 20
    assert any(line.strip().startswith("blocks_1_attn_read") for line in lines)
    assert any(line.strip().startswith("blocks_1_mlp_write") for line in lines)
    printed = hc.print_readable(print_output=False)
    assert "x = x + self.drop_path1(" in printed, "the user's lines stand above"
