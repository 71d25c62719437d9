"""Where new modules stand: the connection of a residual under the module that holds it, in either scope.

A residual ``blocks.0.attn`` of ``blocks.0`` has its connection at ``blocks.0.hyper_connections.attn``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..connections.container import ConnectionDict
from .findings import Residual

CONNECTIONS_NAME = "hyper_connections"
DROPOUT_KEY = f"{CONNECTIONS_NAME}.stream_dropout"
EXPAND, READOUT = "_expand", "_readout"
_RESERVED = frozenset({*dir(nn.ModuleDict()), *dir(ConnectionDict()), "stream_dropout"})


def label_of(name: str) -> str:
    """Return a residual's name as a Python identifier: "blocks.0.attn" becomes "blocks_0_attn"."""
    label = re.sub(r"\W", "_", name)
    return label if label.isidentifier() else f"_{label}"


def relative(name: str, module: str) -> str:
    """Return a residual's name below a module; what only tells its calls apart is "residual" there."""
    if module and name.startswith(module + "."):
        return name[len(module) + 1 :]
    if module and name.partition(":")[0] == module:
        return "residual" + name[len(module) :]
    return name


def keys_of(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the path of a connection for each residual, given as (name, path of its module).

    Within a module no two are the same, nor that of a trunk's end, nor an attribute of a ``ModuleDict``.

    >>> keys_of([("enc.a", ""), ("enc.b", "enc"), ("enc_a", ""), ("items", "")])  # doctest: +NORMALIZE_WHITESPACE
    {'enc.a': 'hyper_connections.enc_a', 'enc.b': 'enc.hyper_connections.b', 'enc_a': 'hyper_connections.enc_a_2',
     'items': 'hyper_connections.items_2'}
    """
    taken: dict[str, set[str]] = {}
    keys: dict[str, str] = {}
    for name, module in names:
        if name in keys:
            continue
        own = taken.setdefault(module, set(_RESERVED))
        label = key = label_of(relative(name, module))
        number = 1
        while own.intersection((key, key + EXPAND, key + READOUT)):
            number += 1
            key = f"{label}_{number}"
        own.update((key, key + EXPAND, key + READOUT))
        keys[name] = ".".join(filter(None, (module, CONNECTIONS_NAME, key)))
    return keys


def with_keys(residuals: Sequence[Residual]) -> list[Residual]:
    """Return the residuals of one plan, each with a key of its own."""
    keys = keys_of((r.name, r.module) for r in residuals)
    return [replace(r, key=keys[r.name]) for r in residuals]


def add_modules(root: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Put new modules at their paths below ``root``, in the mode of the modules that hold them."""
    for path, module in modules:
        home, _, name = path.rpartition(".")
        holder = root.get_submodule(home.rpartition(".")[0])
        if CONNECTIONS_NAME not in holder._modules:
            holder.add_module(CONNECTIONS_NAME, ConnectionDict().train(holder.training))
        within: Any = holder._modules[CONNECTIONS_NAME]
        within[name] = module.train(holder.training)


def added_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that conversion added, by their paths below ``root``."""
    holders = (m for m in root.named_modules() if m[0].rpartition(".")[2] == CONNECTIONS_NAME)
    return {f"{path}.{name}": getattr(holder, name) for path, holder in holders for name in _names_in(holder)}


def _names_in(holder: Any) -> Iterator[str]:
    """Return the names of a module's connections, also where PEFT has wrapped what holds them (``modules_to_save``)."""
    return iter(getattr(holder, "original_module", holder)._modules)


def take_out(root: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Take the new modules out of ``root``; return those that held them, each with what it held."""
    held = []
    for module in list(root.modules()):
        connections = module._modules.pop(CONNECTIONS_NAME) if CONNECTIONS_NAME in module._modules else None
        if connections is not None:
            held.append((module, connections))
    return held


@contextmanager
def taken_out(root: nn.Module) -> Iterator[None]:
    """Take the new modules out of ``root``, whose code may go through all that it holds; put them back on exit."""
    held = take_out(root)
    try:
        yield
    finally:
        for module, connections in held:
            module._modules[CONNECTIONS_NAME] = connections
