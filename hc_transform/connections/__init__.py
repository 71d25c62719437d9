"""Connections: how h_pre, h_post and h_res of one residual are made, and the ends of trunks.

May import: streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from .base import Connection
from .constrained import ConstrainedConnection, IdentityConnection, KromHCConnection, MHCConnection, MHCLiteConnection
from .dynamic import DynamicConnection
from .frac import FracConnection
from .static import StaticConnection

CONNECTIONS: dict[str, type[Connection]] = {
    "static": StaticConnection,
    "dynamic": DynamicConnection,
    "mhc": MHCConnection,
    "mhc-lite": MHCLiteConnection,
    "kromhc": KromHCConnection,
    "identity": IdentityConnection,
    "frac": FracConnection,
}

ConnectionLike = str | Callable[..., Connection]


def connection_maker(connection: ConnectionLike) -> Callable[..., Connection]:
    """Return what makes a connection: the class of a name, or a class, partial or function as given."""
    return CONNECTIONS[connection] if isinstance(connection, str) else connection


def connection_name(connection: ConnectionLike) -> str:
    """Return a name for printouts."""
    if isinstance(connection, str):
        return connection
    if isinstance(connection, functools.partial):
        return connection_name(connection.func)
    return getattr(connection, "__name__", repr(connection))


__all__ = [
    "CONNECTIONS",
    "Connection",
    "ConnectionLike",
    "ConstrainedConnection",
    "DynamicConnection",
    "FracConnection",
    "IdentityConnection",
    "KromHCConnection",
    "MHCConnection",
    "MHCLiteConnection",
    "StaticConnection",
    "connection_maker",
    "connection_name",
]
