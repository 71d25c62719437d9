"""timm's and torchvision's models in scope="blocks": the ways in which features are taken out go on working."""

from __future__ import annotations

import pytest
import torch
from checks import double, doubled, error, wake

import hc_transform as hct

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def vit():
    return wake(timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10)).eval()


def torchvision_vit():
    make = torchvision.models.VisionTransformer
    return wake(make(64, 16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)).eval()


def converted(model, size=64):
    return hct.convert(model, (torch.randn(2, 3, size, size),), scope="blocks", num_streams=2)


def moved(hc):
    with torch.no_grad():
        for name, parameter in hc.named_parameters():
            if "hyper_connections" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return hc


CASES = {
    "vit": (vit, 224, 6),
    "torchvision vit": (torchvision_vit, 64, 6),
    "resnet18": (lambda: wake(torchvision.models.resnet18()).eval(), 64, 5),
    "swin": (lambda: wake(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1))).eval(), 224, 10),
    "convnext": (lambda: wake(timm.create_model("convnext_atto")).eval(), 64, 12),
}


@pytest.mark.parametrize("name", CASES)
def test_vision_models_block_by_block(name):
    make, size, expected = CASES[name]
    model = make()
    hc = converted(model, size)
    assert type(hc) is type(model) and len(hc.hc_report.converted) == expected, str(hc.hc_report)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert error(hc(x), model(x)) <= 1e-5


def test_timm_features():
    model, x = vit(), torch.randn(2, 3, 224, 224)
    hc = converted(model, 224)
    with torch.no_grad():
        assert error(hc.forward_features(x), model.forward_features(x)) <= 1e-5
        ours, theirs = (m.get_intermediate_layers(x, n=3) for m in (hc, model))
        assert all(type(t) is torch.Tensor for t in ours) and error(ours, theirs) <= 1e-5
        ours, theirs = (m.forward_intermediates(x, indices=[0, 2], norm=True) for m in (hc, model))
        assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", ["torchvision vit", "resnet18"])
def test_torchvision_feature_extraction(name):
    from torchvision.models.feature_extraction import create_feature_extractor

    make, size, _ = CASES[name]
    model, x = make(), torch.randn(2, 3, size, size)
    hc = converted(model, size)
    nodes = {"resnet18": ["layer1.0", "layer1.1", "layer3"]}.get(
        name, [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    )
    if name != "resnet18":  # torchvision names the last operation of a block, ours is the block itself
        reference = create_feature_extractor(model, [f"{node}.add_1" for node in nodes])
    else:
        reference = create_feature_extractor(model, nodes)
    extractor = create_feature_extractor(hc, nodes)
    with torch.no_grad():
        ours, theirs = extractor(x), reference(x)
        assert all(type(t) is torch.Tensor for t in ours.values())
        assert error(list(ours.values()), list(theirs.values())) <= 1e-5
        moved(hc)
        last = extractor(x)[nodes[-1]]
        assert not torch.allclose(last, ours[nodes[-1]])
        if name != "resnet18":
            pooled = hc.heads(hc.encoder.ln(last)[:, 0])
            assert error(pooled, hc(x)) <= 1e-5, "the streams travel in the extractor as in the model"


def test_a_vision_model_trains_as_before():
    model = torchvision_vit()
    hc = converted(model)
    doubled(hc, model)
    inputs = double((torch.randn(2, 3, 64, 64),))
    model.train(), hc.train()
    gradients = []
    for module in (model, hc):
        module.zero_grad()
        torch.manual_seed(1)
        module(*inputs).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-8, atol=1e-10), name
