"""Example inputs as plain data, and inputs made of them again: shapes, dtypes, the range of whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import HCTransformError
from .request import Example

FEW = 64  # whole numbers and flags that are kept as they are: positions, lengths, small masks
PLAIN = (bool, int, float, str, type(None))


def described_inputs(example: Example | None) -> dict[str, Any] | None:
    """Return example inputs as data ready for JSON; None if there are none.

    Of floating-point tensors shape and dtype are kept, of whole numbers and flags also their range, or all of up to 64.
    """
    if example is None:
        return None
    args, kwargs = example
    return {"args": [_described(value) for value in args], "kwargs": {k: _described(v) for k, v in kwargs.items()}}


def made_inputs(recorded: Mapping[str, Any], model: nn.Module) -> Example:
    """Return inputs like those recorded, on the device of ``model``, the same on every call.

    Raises:
        HCTransformError: an input was of a class that is not kept.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    args = tuple(_made(value, device, generator) for value in recorded["args"])
    return args, {name: _made(value, device, generator) for name, value in recorded["kwargs"].items()}


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_nested:
            return {"other": f"{type(value).__name__} ({value.layout})"}
        found: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not (value.is_floating_point() or value.is_complex() or value.is_meta) and value.numel():
            if value.numel() <= FEW:
                found["values"] = value.tolist()
            else:
                whole = value.to(torch.int64)  # of which every device knows the range
                found["range"] = [int(whole.min()), int(whole.max())]
        return {"tensor": found}
    if isinstance(value, PLAIN):
        return {"value": value}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(entry) for entry in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(entry) for key, entry in value.items()}}
    return {"other": f"{type(value).__module__}.{type(value).__qualname__}"}


def _made(recorded: Mapping[str, Any], device: torch.device, generator: torch.Generator) -> Any:
    ((kind, value),) = recorded.items()
    if kind == "tensor":
        return _tensor(value, generator).to(device)
    if kind == "value":
        return value
    if kind == "dtype":
        return _dtype(value)
    if kind in ("list", "tuple"):
        made = [_made(entry, device, generator) for entry in value]
        return made if kind == "list" else tuple(made)
    if kind == "dict":
        return {key: _made(entry, device, generator) for key, entry in value.items()}
    raise HCTransformError(
        f"an input of the conversion was a {value}, which is not kept in a file: give example inputs with args= and "
        "kwargs="
    )


def _tensor(recorded: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    shape, dtype = recorded["shape"], _dtype(recorded["dtype"])
    if "values" in recorded:
        return torch.tensor(recorded["values"], dtype=dtype).view(shape)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    low, high = recorded.get("range", (0, 0))
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise HCTransformError(f"the record of example inputs names a dtype {name!r}, which torch does not have")
    return found
