"""Connections: how h_pre, h_post and h_res of one residual are made."""

from __future__ import annotations

from .base import Connection
from .dynamic import DynamicConnection
from .static import StaticConnection

CONNECTIONS: dict[str, type[Connection]] = {
    "static": StaticConnection,
    "dynamic": DynamicConnection,
}

__all__ = ["CONNECTIONS", "Connection", "DynamicConnection", "StaticConnection"]
