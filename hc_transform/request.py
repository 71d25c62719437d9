"""What convert and plan are asked for, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch

from .connections import ConnectionLike
from .models.selection import Hints
from .options import Options

Example = tuple[tuple[Any, ...], dict[str, Any]]
SCOPES = ("graph", "blocks", "auto")
OPTIMIZER_NOTE = (
    "An optimizer made before the conversion does not know the new parameters: make it anew, with "
    "hct.parameter_groups(model, lr=..., weight_decay=...), which does not decay the connections."
)


class Choices(TypedDict, total=False):
    """The keyword arguments of :func:`hc_transform.convert` but ``scope``, which decides what it returns."""

    num_streams: int | None
    connection: ConnectionLike
    num_fractions: int | None
    init: str
    readout: str
    include: Sequence[str]
    exclude: Sequence[str]
    nested: str
    feature_axis: int | None
    stream_embedding: bool
    stream_dropout: float
    recompute: bool
    shortcuts: str
    min_residuals: int
    share_calls: bool
    inplace: bool
    verify: bool
    wrap_functions: Sequence[Callable[..., Any]]
    leaf_modules: Sequence[str | type]
    inline_modules: Sequence[str | type]


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`hc_transform.convert` beside the model and its inputs.

    Raises:
        ValueError: one of them is out of range.
    """

    options: Options
    hints: Hints
    scope: str
    share_calls: bool
    inplace: bool
    verify: bool

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope is one of {', '.join(map(repr, SCOPES))}; got {self.scope!r}")
        if self.inplace and self.scope == "graph":
            raise ValueError("inplace=True needs scope='blocks': a graph is a new module")


def request_of(choices: Mapping[str, Any]) -> Request:
    """Return a request with the defaults that depend on other choices.

    Args:
        choices: the keyword arguments of :func:`hc_transform.convert`.
    """
    given = dict(choices)
    hints = _hints(*(given.pop(field.name) for field in fields(Hints)))
    own = {name: given.pop(name) for name in ("scope", "share_calls", "inplace", "verify")}
    return Request(_options(given), hints, **own)


def checked_example(args: Any, kwargs: Any) -> Example | None:
    """Return example inputs as they are given, None if none are.

    Raises:
        ValueError: positional inputs are given as a mapping, or keywords as something else.
    """
    if isinstance(args, torch.Tensor):
        args = (args,)
    if isinstance(args, Mapping):
        raise ValueError("args is a mapping (dict): give inputs by name with kwargs=, as convert(model, kwargs=inputs)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"kwargs is a mapping of names to inputs, got {type(kwargs).__name__}: give one with args=")
    return (tuple(args), dict(kwargs or {})) if len(args) or kwargs else None


def _hints(
    wrap_functions: Sequence[Callable[..., Any]],
    leaf_modules: Sequence[str | type],
    inline_modules: Sequence[str | type],
) -> Hints:
    for name, given in (("leaf_modules", leaf_modules), ("inline_modules", inline_modules)):
        if isinstance(given, (str, type)):
            raise ValueError(f"{name} is a list of classes or patterns, got {given!r}")
        for entry in given:
            if not isinstance(entry, (str, type)):
                raise ValueError(f"{name} holds classes or patterns of paths, got a {type(entry).__name__}")
    return Hints(tuple(wrap_functions), tuple(leaf_modules), tuple(inline_modules))


def _options(given: dict[str, Any]) -> Options:
    """Return the options with the defaults that depend on the connection."""
    frac = given["connection"] == "frac"
    for name, default in (("num_streams", 1 if frac else 4), ("num_fractions", 4 if frac else 1)):
        if given.get(name) is None:
            given[name] = default
    for name in ("include", "exclude"):
        given[name] = tuple(_list(given[name]))
    return Options(**given)


def _list(patterns: Sequence[str]) -> Sequence[str]:
    if isinstance(patterns, str):
        raise ValueError(f"include and exclude are lists of patterns, got the string {patterns!r}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"include and exclude hold patterns of names or paths, got {pattern!r}")
    return patterns
