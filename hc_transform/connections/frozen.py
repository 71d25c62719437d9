"""Notice that nothing is learnt: other parameters are trained, and no connection is."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from .starts import Resettable


def is_frozen(model: nn.Module) -> bool:
    """Whether parameters of ``model`` are trained, but none of the connections in it."""
    held = False
    for module in model.modules():
        if isinstance(module, Resettable):
            if any(p.requires_grad for p in module.parameters()):
                return False
            held = held or next(module.parameters(), None) is not None
    return held and any(p.requires_grad for p in model.parameters())


def warn_of_frozen(name: str, stacklevel: int = 3) -> None:
    """Warn that no connection of a model is trained, and say how they are."""
    warnings.warn(
        f"all connections of {name} are frozen while other parameters are trained, so that conversion has no effect: "
        'have PEFT train them with modules_to_save=["hyper_connections"], or set requires_grad_() on those of '
        "hct.connection_parameters(model)",
        UserWarning,
        stacklevel=stacklevel,
    )


class FrozenWatch:
    """Look at the blocks of a model in the calls of one training step; warn once if the connections of all are frozen.

    PEFT freezes what it is not told to train, with no call that could be seen. The first block with a connection that
    is trained ends the look, so that it costs one block's parameters a step.
    """

    def __init__(self) -> None:
        self.warned = False
        self.frozen = False

    def passed(self, module: nn.Module, name: str, *, first: bool, last: bool) -> None:
        """Look at a module that is called in training mode, the first or the last one of a trunk."""
        if self.warned or not torch.is_grad_enabled():
            return
        if first or self.frozen:
            self.frozen = is_frozen(module)
            if self.frozen and last:
                self.warned = True
                warn_of_frozen(name, stacklevel=2)
