"""Example inputs of the Hugging Face zoo: ``inputs(config)(batch, length)`` gives a model's keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kwargs = dict[str, Any]
Inputs = Callable[[int, int], Kwargs]
FIRST_TOKEN = 5  # below are padding and other special tokens


def vocabulary(config: Any) -> int:
    """Return the number of tokens that a configuration's text part has."""
    for part in (config, *(getattr(config, n, None) for n in ("text_config", "decoder", "encoder"))):
        if size := getattr(part, "vocab_size", None):
            return size
    return 99


def tokens(batch: int, length: int, limit: int) -> Tensor:
    """Return token numbers without special ones."""
    return torch.randint(FIRST_TOKEN, limit, (batch, length))


def text(config: Any, *, mask: bool = True) -> Inputs:
    """Token numbers, and a mask that hides nothing."""

    def inputs(batch: int, length: int) -> Kwargs:
        ids = tokens(batch, length, vocabulary(config))
        return {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if mask else {})}

    return inputs


def boxes(batch: int, length: int, limit: int = 50) -> Tensor:
    """Return corners of boxes: left, top, right, bottom."""
    low = torch.randint(0, limit // 2, (batch, length, 2))
    return torch.cat([low, low + torch.randint(1, limit // 2, (batch, length, 2))], -1)


def encoder(config: Any) -> Inputs:
    """As ``text``, with what some encoders ask for beside it."""
    plain = text(config)

    def inputs(batch: int, length: int) -> Kwargs:
        kwargs = plain(batch, length)
        if config.model_type in ("layoutlm", "layoutlmv3", "lilt"):
            kwargs["bbox"] = boxes(batch, length)
        if config.model_type == "bros":
            kwargs["bbox"] = torch.rand(batch, length, 4)
        return kwargs

    return inputs


def seq2seq(config: Any) -> Inputs:
    """Token numbers for the encoder, fewer of them for the decoder."""
    plain = text(config)

    def inputs(batch: int, length: int) -> Kwargs:
        return {**plain(batch, length), "decoder_input_ids": tokens(batch, length // 2 + 1, vocabulary(config))}

    return inputs


def images(config: Any) -> Inputs:
    """Images, or clips of them, of a side; with text for models that take both."""

    def inputs(batch: int, side: int) -> Kwargs:
        vision = getattr(config, "vision_config", config)
        pixels = torch.randn(batch, getattr(vision, "num_channels", 3), side, side)
        if config.model_type == "imagegpt":
            return {"input_ids": tokens(batch, side, config.vocab_size - 1)}
        if config.model_type in ("videomae", "vivit"):
            return {"pixel_values": pixels[:, None] + 0.5 * torch.randn(batch, config.num_frames, 1, 1, 1)}
        if config.model_type == "siglip2_vision_model":
            return _patches(batch, side // config.patch_size, 3 * config.patch_size**2)
        if config.model_type in ("clip", "siglip", "chinese_clip", "owlvit", "vilt"):
            return {**text(config)(batch, 12), "pixel_values": pixels}
        return {"pixel_values": pixels}

    return inputs


def _patches(batch: int, side: int, width: int) -> Kwargs:
    return {
        "pixel_values": torch.randn(batch, side * side, width),
        "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long),
        "spatial_shapes": torch.full((batch, 2), side),
    }
