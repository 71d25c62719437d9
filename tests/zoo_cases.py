"""What is in the zoo: how each model is made, its example inputs, and the number of residuals to expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from zoo_counts import TIMM, TORCHVISION
from zoo_others import OTHERS
from zoo_rebuilt import REBUILT

Expected = Callable[[Callable[..., int]], int]


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: "package:model".
        make: builds it with random weights.
        inputs: example inputs for a batch size.
        expected: the number of residuals, from a function that counts modules by class name.
        other_size: inputs of another size; left out where the model itself does not take them.
        options: of convert.
        in_double: whether it is the same model in double precision; else it is compared in fp32.
        refused: a part of the message with which it is refused, where it is to be.
        bound, gradient_bound: on errors in double precision.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    expected: Expected
    other_size: Callable[[], tuple[Tensor, ...]] | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"num_streams": 2})
    in_double: bool = True
    refused: str | None = None
    bound: float = 1e-9
    gradient_bound: float = 1e-7


def images(*size: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function from a batch size to images or clips."""
    return lambda batch: (torch.randn(batch, 3, *size),)


# The smallest of these families is too large for two models with gradients in double precision: fewer
# blocks, smaller images. The formulas count blocks, so they hold.
SMALLER: dict[str, tuple[dict[str, Any], int]] = {
    "beit_base_patch16_224": ({"depth": 4}, 224),
    "csatv2": ({}, 256),
    "deepseek_vit_412m": ({"depth": 2, "embed_dim": 256, "num_heads": 4}, 224),
    "gemma4_vit_167m": ({"depth": 2}, 192),
    "naflexvit_base_patch16_parfac_gap": ({"depth": 3}, 224),
    "nasnetalarge": ({}, 224),
    "pnasnet5large": ({}, 224),
    "qwen3_vit_88m": ({"depth": 3}, 192),
    "samvit_base_patch16_224": ({"depth": 3}, 224),
    "vgg11": ({}, 64),
}


def _timm(name: str, expected: Expected) -> Case:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, **SMALLER.get(name, ({}, 0))[0])

    def inputs(batch: int, smaller: bool = False) -> tuple[Tensor, ...]:
        import timm

        config = timm.get_pretrained_cfg(name)
        size = 224 if config is None else config.input_size[-1]
        size = SMALLER.get(name, ({}, size))[1]
        return images(*[size * 3 // 4 // 32 * 32 if smaller else size] * 2)(batch)

    return Case(f"timm:{name}", make, inputs, expected, lambda: inputs(1, smaller=True))


def _smaller_mvit(name: str) -> nn.Module:
    """Return a video MViT for clips of half the size on each side: its size is fixed, and no argument sets it."""
    from torchvision import models
    from torchvision.models.video import mvit

    plain = mvit._mvit
    smaller = {"spatial_size": (112, 112), "temporal_size": 8}
    with mock.patch.object(mvit, "_mvit", lambda **settings: plain(**{**settings, **smaller})):
        return models.get_model(name, weights=None)


def _torchvision(name: str, expected: Expected) -> Case:
    kind, _, bare = name.rpartition("/")

    def make() -> nn.Module:
        from torchvision import models

        if kind == "detection":
            return models.get_model(bare, weights=None, weights_backbone=None).backbone
        if kind == "segmentation":
            return models.get_model(bare, weights=None, weights_backbone=None)
        if bare.startswith("mvit"):
            return _smaller_mvit(bare)
        return models.get_model(bare, weights=None)

    size = (224, 224)
    if kind in ("detection", "segmentation"):
        size = (300, 300) if bare.startswith("ssd300") else (128, 128)
    elif bare.startswith("mvit"):
        size = (8, 112, 112)
    elif kind == "video":
        size = (16, 224, 224) if bare == "s3d" else (8, 64, 64)
    elif bare.startswith(("resnet", "resnext", "wide_resnet", "regnet", "shufflenet", "mobilenet", "mnasnet")):
        size = (128, 128)
    elif bare == "inception_v3":
        size = (299, 299)
    elif bare.startswith("swin_v2"):
        size = (256, 256)
    other = images(*size[:-2], size[-2] + 32, size[-1] + 64)
    return Case(f"torchvision:{name}", make, images(*size), expected, lambda: other(1))


CASES = [
    *(_timm(name, expected) for name, (expected, _) in TIMM.items()),
    *(_torchvision(name, expected) for name, (expected, _) in TORCHVISION.items()),
    *(Case(name, make, inputs, expected, **settings) for name, make, inputs, expected, settings in [*OTHERS, *REBUILT]),
]
