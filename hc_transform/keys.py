"""Names of new modules: one for each residual, and those of the ends of its trunk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from .findings import Residual

DROPOUT_KEY = "stream_dropout"
EXPAND, READOUT = "_expand", "_readout"


def key_of(name: str) -> str:
    """Return a residual's name as a Python identifier: "blocks.0.attn" becomes "blocks_0_attn"."""
    key = re.sub(r"\W", "_", name)
    return key if key.isidentifier() else f"_{key}"


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """Return a key for each name, :func:`key_of` where that is free.

    No key is that of another residual, of the end of a trunk, or an attribute of the ``ModuleDict`` that they are in.

    >>> keys_of(["enc.a", "enc_a", "items"])
    {'enc.a': 'enc_a', 'enc_a': 'enc_a_2', 'items': 'items_2'}
    """
    taken = set(dir(nn.ModuleDict())) | {DROPOUT_KEY}
    keys: dict[str, str] = {}
    for name in names:
        if name in keys:
            continue
        key, number = key_of(name), 1
        while taken.intersection((key, key + EXPAND, key + READOUT)):
            number += 1
            key = f"{key_of(name)}_{number}"
        taken.update((key, key + EXPAND, key + READOUT))
        keys[name] = key
    return keys


def with_keys(residuals: Sequence[Residual]) -> list[Residual]:
    """Return the residuals of one plan, each with a key of its own."""
    keys = keys_of(r.name for r in residuals)
    return [replace(r, key=keys[r.name]) for r in residuals]
