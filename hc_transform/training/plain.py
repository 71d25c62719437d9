"""The way back: the original structure with its trained parameters, connections dropped."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import CONFIG, HF_KEY, config_of
from ..connections.starts import Resettable
from ..errors import HCTransformError, UnsupportedModel
from ..inputs_record import made_inputs
from ..models.compare import relative_error
from ..models.copies import clone_structure
from ..request import Example, checked_example
from ..residuals.keys import take_out
from ..running.block_runner import BASE, RUNNER
from ..running.graph_model import HyperConnectedModule
from ..sites import converted_models, unwrapped
from ..streams.hook_readouts import EngineHook, ObservingHook, read_outputs
from ..verification.pairs import TOLERANCES as ROUNDING
from ..verification.verify import run_like

log = logging.getLogger("hc_transform")

MADE_BY_US = ("hc_report", CONFIG)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class Difference:
    """How a model without its connections differs from the converted one.

    Attributes:
        moved: paths of connections, readouts and embeddings that are not at their start.
        connections: how many there are.
        change: the largest difference of outputs relative to the largest value; None if there were no inputs to
            compare them on.
    """

    moved: tuple[str, ...]
    connections: int
    change: float | None

    def __str__(self) -> str:
        if not self.moved:
            where = f"All {self.connections} connections are at their start, where the residual is the plain one"
        else:
            where = f"{len(self.moved)} of {self.connections} connections have moved from their start, and are lost"
        if self.change is None:
            return f"{where}. Outputs were not compared: give inputs with args= and kwargs=."
        return f"{where}. Outputs change by {self.change:.1e} (relative)."


def plain(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return the original structure of a converted model, with its (trained) parameters and without connections.

    The result has the class, methods and names of the model that was converted, and shares its parameters and buffers
    with ``model``, which stays as it is. At the start of the connections it computes the same.

    Args:
        model: a converted model in either scope.
        args, kwargs: inputs to compare both models' outputs on, in the model's present mode; by default they are made
            of the shapes and dtypes that were recorded when it was converted.

    Returns:
        A module with one more attribute, ``hc_difference``: see :class:`Difference`.

    Raises:
        NotConverted: the model holds no converted model.
        UnsupportedModel: it was made of an exported program, which has no modules to go back to.

    Warns:
        UserWarning: the outputs change, by how much; or the connections have moved and nothing could be compared.

    >>> import torch, hc_transform as hct
    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    >>> hc = hct.convert(block, args=(torch.randn(2, 5, 8),))
    >>> again = hct.plain(hc)
    >>> type(again).__name__, again.state_dict().keys() == block.state_dict().keys()
    ('TransformerEncoderLayer', True)
    >>> print(again.hc_difference)  # doctest: +ELLIPSIS
    All 2 connections are at their start, where the residual is the plain one. Outputs change by ...
    """
    model = unwrapped(model)
    roots = converted_models(model)
    example = checked_example(args, kwargs) or (_recorded(model) if "" in roots else None)
    made = _without_connections(model, roots)
    moved = tuple(path for path, part in model.named_modules() if isinstance(part, Resettable) and _has_moved(part))
    count = sum(isinstance(part, Resettable) for part in model.modules())
    change = None if example is None else _change(model, made, example)
    difference = Difference(moved, count, change)
    made.__dict__["hc_difference"] = difference
    log.info("%s", difference)
    if moved if change is None else not change <= ROUNDING[_least_precise(model)]:
        warnings.warn(str(difference), UserWarning, stacklevel=2)
    return made


def _without_connections(model: nn.Module, roots: Mapping[str, nn.Module]) -> nn.Module:
    for root in roots.values():
        if isinstance(root, torch.fx.GraphModule) and not isinstance(root, HyperConnectedModule):
            raise UnsupportedModel(
                f"{type(root).__name__} was made of an exported program, which is one graph: there are no modules to "
                "go back to. Load its weights into the original, load_state_dict(hc.state_dict(), strict=False)"
            )
    made = clone_structure(_opened(model) if isinstance(model, HyperConnectedModule) else model)
    for path in roots:
        inner = made.get_submodule(path)
        if isinstance(inner, HyperConnectedModule):  # within a wrapper
            holder, _, name = path.rpartition(".")
            made.get_submodule(holder)._modules[name] = _opened(inner)
    for module in list(made.modules()):
        _restore(module)
    take_out(made)
    return made


def _opened(graph: HyperConnectedModule) -> nn.Module:
    """Return the original that a graph was made of, in the graph's mode."""
    original: nn.Module = graph.__dict__["_original"]
    original.training = graph.training
    return original


def _restore(module: nn.Module) -> None:
    """Give a module of a copy its own class, hooks and attributes again."""
    if RUNNER in module.__dict__:
        module.__class__ = getattr(type(module), BASE)
        del module.__dict__[RUNNER]
    for registry in (getattr(module, name) for name in HOOKS):
        for key, hook in list(registry.items()):
            if hook is read_outputs:
                del registry[key]
            elif isinstance(hook, (ObservingHook, EngineHook)):
                registry[key] = hook.hook
    for name in list(module._buffers):
        if name.startswith("_tensor_constant"):
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)
    for name in MADE_BY_US:
        module.__dict__.pop(name, None)
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict") and hasattr(config, HF_KEY):
        delattr(config, HF_KEY)


def _has_moved(module: Resettable) -> bool:
    start = module.starting_state()
    own = dict(module.named_parameters())
    return any(not torch.equal(own[name].detach().cpu(), start[name].to(own[name].dtype)) for name in own)


def _least_precise(model: nn.Module) -> torch.dtype:
    """Return the floating dtype of the parameters that rounds the most."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype in ROUNDING}
    return max(dtypes, key=lambda dtype: ROUNDING[dtype], default=torch.float32)


def _recorded(model: nn.Module) -> Example | None:
    try:
        inputs = config_of(model)["inputs"]
        return None if inputs is None else made_inputs(inputs, model)
    except HCTransformError as error:
        log.info("outputs are not compared: %s", error)
        return None


def _change(model: nn.Module, made: nn.Module, example: Example) -> float | None:
    if next((p.is_meta for p in model.parameters()), False):
        return None
    return float(relative_error(run_like(made, *example), run_like(model, *example)))
