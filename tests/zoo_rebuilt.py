"""Models that no package at hand has, rebuilt small from their papers, for the zoo: each as a graph and by blocks.

``REBUILT`` holds ``(name, make, inputs, expected, settings)``, as in a Case. The note before each row says where the
adds are, and what is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import ESRGAN
from rebuilt_audio import Conformer, Whisper, WhisperByHand
from rebuilt_folding import Evoformer
from rebuilt_text import NanoChat, NanoGPT, NBeats
from rebuilt_vision import Clip, DinoV2
from torch import Tensor, nn

Make = Callable[[], nn.Module]
Inputs = Callable[[int], tuple[Tensor, ...]]
Rebuilt = tuple[str, Make, Inputs, Callable[..., int], dict[str, Any]]

REBUILT: list[Rebuilt] = []


def _add(
    name: str, make: Make, inputs: Inputs, expected: Callable[..., int], *, scopes="graph blocks", **settings: Any
) -> None:
    for scope in scopes.split():
        options = {"num_streams": 2, "scope": scope}
        REBUILT.append((f"rebuilt:{name}:{scope}", make, inputs, expected, {"options": options, **settings}))


def _images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 32, 32),)


def _tokens(length: int, count: int = 1) -> Inputs:
    return lambda batch: tuple(torch.randint(1, 50, (batch, length)) for _ in range(count))


# WhisperBlock: x + attention, x + cross-attention in the decoder, x + mlp. Positions are added to embeddings.
def _speech(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 8, 32), torch.randint(0, 50, (batch, 10))


def _of_whisper(c: Callable[..., int]) -> int:
    return 2 * c("WhisperBlock") + c("WhisperBlock", lambda b: b.cross_attn)


_add("whisper", Whisper, _speech, _of_whisper)
_add("whisper_scores", WhisperByHand, _speech, _of_whisper)

# NanoBlock: x + attention, x + mlp
_add("nanogpt", NanoGPT, _tokens(12), lambda c: 2 * c("NanoBlock"), other_size=lambda: _tokens(7)(1))
_add("nanogpt_loss", NanoGPT, _tokens(12, 2), lambda c: 2 * c("NanoBlock"))
_add("nanogpt_masked", lambda: NanoGPT(fused=False), _tokens(12), lambda c: 2 * c("NanoBlock"))

# ChatBlock: x + attention, x + mlp; the trunk mixed with its beginning is carried, values mixed with embeddings of
# tokens are within a branch
_add("nanochat", NanoChat, _tokens(12), lambda c: 2 * c("ChatBlock"), other_size=lambda: _tokens(7)(1))
_add("nanochat_loss", NanoChat, _tokens(12, 2), lambda c: 2 * c("ChatBlock"))


# EvoformerBlock: 3 adds to the alignment (row and column attention, transition), 6 to the pairs (outer product mean,
# two triangle multiplications, two triangle attentions, transition)
def _alignment(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 5, 7, 6), torch.randn(batch, 7, 6)


_add("evoformer", Evoformer, _alignment, lambda c: 9 * c("EvoformerBlock"))

# DinoBlock: x + attention, x + mlp, written three times: for evaluation, for training, for training on a subset
_add("dinov2", DinoV2, _images, lambda c: 2 * c("DinoBlock"))
_add("dinov2_drop_path", lambda: DinoV2(drop=0.1), _images, lambda c: 2 * c("DinoBlock"))
_add("dinov2_subset", lambda: DinoV2(drop=0.4), _images, lambda c: 2 * c("DinoBlock"))
_add(
    "dinov2_masked",
    lambda: DinoV2(drop=0.4),
    lambda batch: (*_images(batch), torch.rand(batch, 16) < 0.3),
    lambda c: 2 * c("DinoBlock"),
)

# ClipBlock: x + attention, x + mlp. Without texts there is one tower: 3 of the 5 blocks
_add("clip", Clip, lambda batch: (*_images(batch), *_tokens(12)(batch)), lambda c: 2 * c("ClipBlock"))
_add("clip_image", Clip, _images, lambda c: 2 * c("ClipBlock", lambda b: b.attn_mask is None))


# ConformerLayer: half a feedforward, attention, convolution, half a feedforward
def _frames(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 15, 8), torch.arange(15, 15 - batch, -1)


_add("conformer", Conformer, _frames, lambda c: 4 * c("ConformerLayer"))
_add("conformer_drop", lambda: Conformer(drop_layers=0.1), _frames, lambda c: 4 * c("ConformerLayer"))

# Each RRDB has three dense blocks with an add; the adds of the RRDBs and of the whole body are around these
_add("esrgan", ESRGAN, lambda batch: (torch.randn(batch, 3, 8, 8),), lambda c: c("DenseBlock"))


# Each block but the last subtracts what it explains from what the next one sees (of the last one nobody sees it);
# forecasts are sums of what blocks return, none is computed from the sum
def _series(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 20), (torch.rand(batch, 20) < 0.9).float()


_add("nbeats", NBeats, _series, lambda c: c("NBeatsBlock") - 1)
