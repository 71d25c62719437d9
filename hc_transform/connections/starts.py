"""Modules that know how they start: what hyper-connections add to a model can be put back to where it began."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Resettable(nn.Module):
    """A module whose tensors at the start follow from the arguments that it was made with.

    Everything that hyper-connections add to a model and that has parameters is one.

    Attributes:
        projections: names of the parameters that are matrices over features, which may be decayed. All others
            (static weights, biases, scales) may not: the skip itself is among them.
    """

    projections: ClassVar[tuple[str, ...]] = ("projection",)
    _hc_made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """Make a module and keep the arguments."""
        made = super().__new__(cls)
        made.__dict__["_hc_made_with"] = (args, settings)
        return made

    def starting_state(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of a module made like this one, by name, in its dtype, on the CPU."""
        args, settings = self._hc_made_with
        own = next(self.parameters(), torch.empty(0))
        with torch.device("cpu"), MadeIn(torch.promote_types(own.dtype, torch.float32)), torch.no_grad():
            made: nn.Module = type(self)(*args, **settings)
        return {name: tensor.detach() for name, tensor in _tensors_of(made).items()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Put all parameters and buffers to where they started, also after ``to_empty`` and in shards (DTensor)."""
        own = _tensors_of(self)
        for name, start in self.starting_state().items():
            own[name].copy_(_sharded_like(own[name], start))


class MadeIn(TorchFunctionMode):
    """Make what has no dtype of its own in ``dtype``: starts that are rounded to fp32 are none in double precision."""

    FACTORIES = (torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace, torch.randn, torch.empty)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give a factory the dtype."""
        kwargs = dict(kwargs or {})
        if self.dtype is torch.float64 and func in self.FACTORIES:
            whole = func is torch.full and not isinstance(kwargs.get("fill_value", args[-1]), float)
            if kwargs.get("dtype") is None and not whole:
                kwargs["dtype"] = self.dtype
        return func(*args, **kwargs)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _sharded_like(own: Tensor, start: Tensor) -> Tensor:
    """Return ``start`` spread over ranks as ``own`` is; every rank makes the same, so that nothing is sent."""
    placed: Any = own
    if not hasattr(own, "placements"):
        return start
    from torch.distributed.tensor import distribute_tensor

    start = start.to(own.device, own.dtype)
    return distribute_tensor(start, placed.device_mesh, placed.placements, src_data_rank=None)
