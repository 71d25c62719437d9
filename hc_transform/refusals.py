"""Models that cannot be converted, whatever is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import UnflattenedModule

from .errors import UnsupportedModel
from .residuals.keys import CONNECTIONS_NAME
from .running.graph_model import HyperConnectedModule


def refuse_unsupported(model: Any) -> None:
    """Raise UnsupportedModel for anything that is not a plain, unconverted module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"convert takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, UnflattenedModule):
        raise UnsupportedModel(
            "the model is an exported program that was unflattened: convert the exported program itself, which has the "
            "same names"
        )
    wrapped = _wrapper(model)
    if wrapped:
        raise UnsupportedModel(
            f"the model is wrapped by {wrapped}: convert the model inside it first, and wrap the result afterwards"
        )
    for module in model.modules():
        if isinstance(module, HyperConnectedModule) or CONNECTIONS_NAME in dict(module.named_children()):
            raise UnsupportedModel(
                f"{type(model).__name__} is converted already: convert the original model, with other options, instead"
            )
        if "hyperconnection" in type(module).__name__.lower():
            raise UnsupportedModel(
                f"{type(model).__name__} is written with hyper-connections already ({type(module).__name__}): its "
                "residual streams are not converted once more"
            )


def _wrapper(model: nn.Module) -> str | None:
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        return "torch.compile"
    if isinstance(model, torch.jit.ScriptModule):
        return "torch.jit"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return type(model).__name__
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        if any(isinstance(m, (FullyShardedDataParallel, FSDPModule)) for m in model.modules()):
            return "FSDP"
    return None


def refuse_meta_device(model: nn.Module) -> None:
    """Raise UnsupportedModel if nothing can be computed, for the default device is meta and the model's is not."""
    if torch.get_default_device().type == "meta" and any(p.device.type != "meta" for p in model.parameters()):
        raise UnsupportedModel(
            "the default device is meta and the model's is not, so that nothing can be computed: convert outside of "
            "torch.device('meta')"
        )
