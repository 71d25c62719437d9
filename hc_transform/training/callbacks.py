"""Diagnostics while training: callbacks for Lightning and for the Trainer of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .diagnose import diagnose

PREFIX = "hyper_connections/"


def trainer_callback(trainer: Any, batch: Mapping[str, Any], every: int = 100) -> Any:
    """Let a Trainer of Hugging Face log the figures of :func:`hc_transform.diagnose`; return the callback.

    They go where the Trainer logs to (``report_to="tensorboard"``), under ``hyper_connections/<residual>/<figure>``.

    Args:
        trainer: of a converted model.
        batch: inputs by name, with labels if the loss is to be logged.
        every: this many optimiser steps.

    Raises:
        ValueError: ``every`` is below 1.
    """
    from transformers import TrainerCallback

    class Diagnostics(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                trainer.log(figures(model, **_moved(batch, model)))

    _check(every)
    callback = Diagnostics()
    trainer.add_callback(callback)
    return callback


def lightning_callback(every: int = 100, inputs: Callable[[Any], Any] | None = None) -> Any:
    """Return a callback for Lightning's Trainer that logs the figures of :func:`hc_transform.diagnose`.

    They go to the Trainer's loggers, under ``hyper_connections/<residual>/<figure>``.

    Args:
        every: this many batches.
        inputs: a function from a batch to the arguments of the LightningModule's ``forward``, a tuple; by default the
            batch itself, or the first of a tuple or list.

    Raises:
        ValueError: ``every`` is below 1.
    """
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

    class Diagnostics(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % every == 0:
                found = figures(pl_module, *(_first(batch) if inputs is None else inputs(batch)))
                for logger in trainer.loggers:
                    logger.log_metrics(found, step=trainer.global_step)

    _check(every)
    return Diagnostics()


def figures(model: nn.Module, *batch: Any, **named: Any) -> dict[str, float]:
    """Return the figures of a batch by the names that they are logged under."""
    return {PREFIX + name: value for name, value in diagnose(model, *batch, **named).scalars().items()}


def _first(batch: Any) -> tuple[Any, ...]:
    return (batch[0],) if isinstance(batch, (tuple, list)) else (batch,)


def _moved(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    moved: dict[str, Any] = pytree.tree_map(
        lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, dict(batch)
    )
    return moved


def _check(every: int) -> None:
    if every < 1:
        raise ValueError(f"every is a number of steps of at least 1, got {every}")
