"""The parameters that conversion added, and those of the model: groups for optimisers, what is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from ..connections.frozen import is_frozen, warn_of_frozen
from ..connections.starts import Resettable
from ..errors import NotConverted
from ..residuals.keys import CONNECTIONS_NAME
from ..running.graph_model import HyperConnectedModule

Model = TypeVar("Model", bound=nn.Module)

GROUPS = ("decay", "no_decay", "connection_projections", "connections")


def connection_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hyper-connections add, by their names in ``model``.

    Those of connections, learnt readouts and stream embeddings, in either scope and under any wrapper (DDP, FSDP2,
    ``torch.compile``, PEFT), each once; where PEFT trains copies of connections, those.

    Args:
        model: a converted model, or one with :class:`HyperConnections` in it.

    Raises:
        NotConverted: there are none.

    >>> import torch, hc_transform as hct
    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> hc = hct.convert(block, args=(torch.randn(2, 5, 8),), connection="static")
    >>> list(hct.connection_parameters(hc))[:3]  # doctest: +NORMALIZE_WHITESPACE
    ['hyper_connections.self_attn.h_pre', 'hyper_connections.self_attn.h_post', 'hyper_connections.self_attn.h_res']
    """
    own = {id(parameter) for module in _added(model) for parameter in module.parameters()}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in own and f"{CONNECTIONS_NAME}.original_module." not in name
    }
    if not found:
        raise NotConverted(
            f"{type(model).__name__} has no hyper-connections: convert it first, hct.convert(model, args=(x,)), and go "
            "on with what that returns"
        )
    return found


def _added(model: nn.Module) -> Iterator[Resettable]:
    return (module for module in model.modules() if isinstance(module, Resettable))


def freeze_base(model: Model) -> Model:
    """Let only the connections be trained; return ``model``.

    Sets ``requires_grad`` of every parameter: those of :func:`connection_parameters` get True, the others False.

    Raises:
        NotConverted: the model has no connections.
    """
    own = {id(parameter) for parameter in connection_parameters(model).values()}
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(id(parameter) in own)
    return model


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float | None = None,
    connection_lr: float | None = None,
    connection_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return groups of trainable parameters for any optimiser of torch.

    Weight decay pulls a connection away from its start, h_res = I and writes of 1, and so shrinks the skip itself; the
    paper (arXiv 2409.19606) decays no static parts either. So static weights, biases, gates and scales of
    connections are never decayed.

    Args:
        model: a converted model, in either scope, before or after it is wrapped by DDP or FSDP2.
        lr: of the model's own parameters; None leaves it to the optimiser, here and below.
        weight_decay: of the model's matrices (two axes or more). Vectors, scalars and what ``no_weight_decay()`` of
            the model or of a module in it names are not decayed.
        connection_lr: of the connections; by default ``lr``.
        connection_weight_decay: of the connections' projections alone.

    Returns:
        Up to four groups with a ``name`` each, those without parameters left out: "decay", "no_decay",
        "connection_projections" and "connections". Muon is for the matrices of "decay", without embeddings and heads;
        connections belong to AdamW whatever their shape.

    Raises:
        NotConverted: the model has no connections.
        ValueError: a rate or a decay is negative.

    >>> import torch, hc_transform as hct
    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> hc = hct.convert(block, args=(torch.randn(2, 5, 8),))
    >>> groups = hct.parameter_groups(hc, lr=1e-3, weight_decay=0.1)
    >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
    [('decay', 4, 0.1), ('no_decay', 8, 0.0), ('connection_projections', 2, 0.0), ('connections', 10, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    given = {"lr": lr, "weight_decay": weight_decay, "connection_lr": connection_lr}
    for name, value in {**given, "connection_weight_decay": connection_weight_decay}.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} is at least 0, got {value!r}")
    sorted_out = _sorted_out(model)
    if is_frozen(model):
        warn_of_frozen(type(model).__name__)
    rate = lr if connection_lr is None else connection_lr
    settings = {
        "decay": (lr, weight_decay),
        "no_decay": (lr, 0.0),
        "connection_projections": (rate, connection_weight_decay),
        "connections": (rate, 0.0),
    }
    return [_group(name, parameters, *settings[name]) for name, parameters in sorted_out.items() if parameters]


def _sorted_out(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters by the names of their groups."""
    connections = connection_parameters(model)
    projections = {
        id(parameter)
        for module in _added(model)
        for name, parameter in module.named_parameters(recurse=False)
        if name in module.projections
    }
    kept = no_weight_decay(model)
    found: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in connections:
            found["connection_projections" if id(parameter) in projections else "connections"].append(parameter)
        else:
            found["no_decay" if parameter.ndim < 2 or name in kept else "decay"].append(parameter)
    return found


def _group(name: str, parameters: list[nn.Parameter], lr: float | None, decay: float | None) -> dict[str, Any]:
    options = {"lr": lr, "weight_decay": decay}
    return {"name": name, "params": parameters, **{key: value for key, value in options.items() if value is not None}}


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the names of parameters that ``no_weight_decay()`` of ``model``, or of modules in it, asks to leave out.

    timm's models have it. The graph of a model asks the model that it was made of.
    """
    kept: set[str] = set()
    for path, module in model.named_modules():
        asked = module.__dict__["_original"] if isinstance(module, HyperConnectedModule) else module
        method = getattr(asked, "no_weight_decay", None)
        if callable(method):
            kept.update(".".join(filter(None, (path, name))) for name in method())
    return kept
