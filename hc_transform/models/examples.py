"""Example inputs that the ecosystem's models carry with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def example_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return (args, kwargs) that ``model`` offers itself, on its device; None if it offers none.

    Looked at in turn: ``example_input_array`` (Lightning), ``dummy_inputs`` (Hugging Face),
    ``default_cfg["input_size"]`` (timm).
    """
    given = getattr(model, "example_input_array", None)
    if given is None:
        given = getattr(model, "dummy_inputs", None)
    if given is not None:
        given = _on_device(given, model)
        if isinstance(given, Mapping):
            return (), dict(given)
        return (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    if isinstance(size, (tuple, list)) and all(isinstance(s, int) for s in size):
        return (random_input((2, *size), model),), {}
    return None


def random_input(shape: tuple[int, ...], model: nn.Module) -> torch.Tensor:
    """Return the same normal random numbers on each call, of the model's device and dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(parameter.device, parameter.dtype)


def _on_device(value: Any, model: nn.Module) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.utils._pytree.tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, value)
