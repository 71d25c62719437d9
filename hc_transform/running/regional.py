"""Regional compilation of converted models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from ..errors import UnsupportedModel
from .block_runner import RUNNER
from .graph_model import HyperConnectedModule
from .inductor import inductor

Model = TypeVar("Model", bound=nn.Module)


def compile_regions(model: Model, **settings: Any) -> Model:
    """Compile a converted model in regions, in place: of equal blocks one is compiled.

    A compiler that is given the whole model (``torch.compile(model)``) optimises every block anew, which takes
    long for deep ones. Regions are compiled on their first call. They begin with a write (``scope="graph"``), which so
    shares a kernel with the read of the residual after it, or with a converted block (``scope="blocks"``). Streams are
    read from memory once more by the next region, and their gradients written once more.

    Args:
        model: a converted model, or one that has converted modules in it.
        settings: arguments of :func:`torch.compile`; the backend is :func:`hc_transform.inductor` by default.

    Returns:
        ``model``. ``torch.compile`` and ``torch.export`` of it see the whole model as before.

    Raises:
        UnsupportedModel: nothing in the model was converted.

    >>> import torch
    >>> import hc_transform as hct
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + self.fc(x)
    >>> model = nn.Sequential(*[Block() for _ in range(6)])
    >>> hc = hct.compile_regions(hct.convert(model, args=(torch.zeros(2, 4),)), backend="eager")
    >>> hc(torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    """
    found = list(converted_modules(model))
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no converted module to compile. Convert it with hc_transform.convert first, "
            "or compile it with torch.compile."
        )
    if settings.get("backend", "inductor") == "inductor":
        settings["backend"] = inductor
    for module in found:
        if isinstance(module, HyperConnectedModule):
            module.compile_regions(**settings)
        else:
            module.compile(**settings)
    return model


def converted_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the converted modules that are in no other."""
    if isinstance(module, HyperConnectedModule) or RUNNER in module.__dict__:
        yield module
        return
    for child in module.children():
        yield from converted_modules(child)
