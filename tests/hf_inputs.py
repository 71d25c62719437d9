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
