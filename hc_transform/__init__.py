"""Hyper-connections for existing PyTorch models, as a graph transformation."""

from __future__ import annotations

from .connections import CONNECTIONS, Connection, DynamicConnection, StaticConnection
from .convert import convert, plan
from .errors import (
    DecisionChanged,
    HCTransformError,
    NotEquivalent,
    NothingToConvert,
    PatternError,
    TraceError,
    UnsupportedModel,
)
from .find import Findings, Reason, Residual, Skipped, find_residuals
from .module import HyperConnectedModule
from .planner import Options, Plan, Trunk, make_plan
from .report import Record, Report
from .rewrite import rewrite
from .streams import Coefficients, carry, expand, read, readout, write

__version__ = "0.1.0"

__all__ = [
    "CONNECTIONS",
    "Coefficients",
    "Connection",
    "DecisionChanged",
    "DynamicConnection",
    "Findings",
    "HCTransformError",
    "HyperConnectedModule",
    "NotEquivalent",
    "NothingToConvert",
    "Options",
    "PatternError",
    "Plan",
    "Reason",
    "Record",
    "Report",
    "Residual",
    "Skipped",
    "StaticConnection",
    "TraceError",
    "Trunk",
    "UnsupportedModel",
    "carry",
    "convert",
    "expand",
    "find_residuals",
    "make_plan",
    "plan",
    "read",
    "readout",
    "rewrite",
    "write",
]
