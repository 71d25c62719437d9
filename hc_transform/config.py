"""What a conversion was asked for and what it made, as plain data: a small JSON beside weights."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from .connections import CONNECTIONS, ConnectionLike, connection_name
from .errors import CheckpointError
from .inputs_record import described_inputs
from .request import Example, Request
from .running.block_runner import RUNNER
from .sites import converted_models, sites_of
from .version import __version__

log = logging.getLogger("hc_transform")

CONFIG = "_hc_config"  # attribute of a converted model
HF_KEY = "hc_transform"  # in config.json of Hugging Face
FORMAT = 1


def note_config(model: nn.Module, request: Request, example: Example | None) -> None:
    """Let a converted model know what it was converted with; a Hugging Face model also in its ``config``."""
    config = described(model, request, example)
    model.__dict__[CONFIG] = config
    own = getattr(model, "config", None) if hasattr(model, "save_pretrained") else None
    if hasattr(own, "to_dict"):
        setattr(own, HF_KEY, copy.deepcopy(config))


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return what a converted model was converted with, ready for JSON, for :func:`hc_transform.convert_like`.

    Options, scope, the names of residuals with the shapes of their connections' parameters, shapes and dtypes of the
    example inputs, versions.

    Args:
        model: a converted model in either scope, or a wrapper (DDP, ``torch.compile``, PEFT) of one.

    Raises:
        NotConverted: the model holds no converted model.

    >>> import torch, hc_transform as hct
    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> config = hct.config_of(hct.convert(block, args=(torch.randn(2, 5, 8),), connection="static"))
    >>> config["scope"], config["options"]["num_streams"], config["options"]["connection"]
    ('graph', 4, {'name': 'static'})
    >>> config["residuals"][0]["name"], config["residuals"][0]["parameters"]
    ('self_attn', {'h_pre': [4], 'h_post': [4], 'h_res': [4, 4]})
    """
    root = next(iter(converted_models(model).values()))
    if CONFIG not in root.__dict__:
        raise CheckpointError(f"{type(root).__name__} was converted by an older hc_transform, which kept no config")
    return copy.deepcopy(root.__dict__[CONFIG])


def described(model: nn.Module, request: Request, example: Example | None) -> dict[str, Any]:
    """Return the config of a model that was just converted."""
    options = {f.name: getattr(request.options, f.name) for f in fields(request.options) if f.name != "keep_layout"}
    options |= {"connection": _described(request.options.connection), "share_calls": request.share_calls}
    again = [] if "own" not in options["connection"] else ["connection"]
    for f in fields(request.hints):
        entries = getattr(request.hints, f.name)
        options[f.name] = [entry for entry in entries if isinstance(entry, str)]
        if len(options[f.name]) < len(entries):
            again.append(f.name)
    config = {
        "format": FORMAT,
        "versions": {"hc_transform": __version__, "torch": str(torch.__version__)},
        "scope": "blocks" if any(RUNNER in module.__dict__ for module in model.modules()) else "graph",
        "options": options,
        "give_again": again,  # functions and classes, which a file does not hold
        "residuals": residuals_of(model),
        "inputs": described_inputs(example),
    }
    plain: dict[str, Any] = json.loads(json.dumps(config))  # tuples are lists from now on
    return plain


def residuals_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the name of each site with its connection's path and the shapes of its parameters."""
    return [
        {
            "name": site.name,
            "connection": site.path,
            "trunk": site.record.trunk,
            "parameters": {name: list(p.shape) for name, p in site.connection.named_parameters()},
        }
        for site in sites_of(model)
    ]


def choices_of(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``convert`` that a config records, those ``given`` in their place.

    Raises:
        CheckpointError: the config is of another format, or needs a function or a class that is not given.
    """
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"the config is of format {config.get('format')!r}, and this hc_transform ({__version__}) reads {FORMAT}: "
            f"it was written by {config.get('versions')}"
        )
    missing = [name for name in config["give_again"] if name not in given]
    if missing:
        raise CheckpointError(
            f"the model was converted with functions or classes of one's own for {', '.join(missing)} "
            f"({config['options']['connection'].get('own', 'in hints')}), which a file does not hold: give "
            f"{', '.join(f'{name}=' for name in missing)} again"
        )
    options = {**config["options"], "scope": config["scope"]}
    if "connection" not in given:
        options["connection"] = _connection(options["connection"])
    return {**options, **given}


def _described(connection: ConnectionLike) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    partial: Any = connection
    if isinstance(connection, functools.partial) and not partial.args and _is_json(partial.keywords):
        connection, settings = partial.func, partial.keywords
    names = [name for name, made in CONNECTIONS.items() if connection in (name, made)]
    if not names:
        return {"own": connection_name(connection)}
    return {"name": names[0], "settings": settings} if settings else {"name": names[0]}


def _connection(described: Mapping[str, Any]) -> ConnectionLike:
    name, settings = described["name"], described.get("settings")
    if name not in CONNECTIONS:
        raise CheckpointError(
            f"the model was converted with connection={name!r}, which this hc_transform ({__version__}) does not have"
        )
    return functools.partial(CONNECTIONS[name], **settings) if settings else name


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
