"""Hyper-connections for existing PyTorch models, as a graph transformation."""

from __future__ import annotations

from .block_module import block_graphs
from .carried import carry
from .carrier import TrunkValue
from .connections import (
    CONNECTIONS,
    Connection,
    ConstrainedConnection,
    DynamicConnection,
    FracConnection,
    IdentityConnection,
    KromHCConnection,
    MHCConnection,
    MHCLiteConnection,
    StaticConnection,
)
from .convert import convert, plan
from .ends import LearnedReadout, StreamEmbedding
from .errors import (
    DecisionChanged,
    HCTransformError,
    NotEquivalent,
    NothingToConvert,
    PatternError,
    TraceError,
    UnknownDialect,
    UnsupportedModel,
)
from .find import find_residuals
from .findings import Findings, Reason, Residual, Shortcut, Skipped
from .layer import HyperConnections, PlainResidual, get_init_and_expand_reduce_stream_functions
from .module import HyperConnectedModule
from .options import Options
from .packed import StreamEmbed, get_expand_reduce_stream_functions
from .planner import Plan, make_plan
from .regional import compile_regions
from .report import Record, Report
from .rewrite import rewrite
from .sinkhorn import SinkhornError, sinkhorn, sinkhorn_error
from .streams import Coefficients, FractionCoefficients, expand, read, readout, write
from .trunks import Trunk

__version__ = "0.1.0"

__all__ = [
    "CONNECTIONS",
    "Coefficients",
    "Connection",
    "ConstrainedConnection",
    "DecisionChanged",
    "DynamicConnection",
    "Findings",
    "FracConnection",
    "FractionCoefficients",
    "HCTransformError",
    "HyperConnectedModule",
    "HyperConnections",
    "IdentityConnection",
    "KromHCConnection",
    "LearnedReadout",
    "MHCConnection",
    "MHCLiteConnection",
    "NotEquivalent",
    "NothingToConvert",
    "Options",
    "PatternError",
    "PlainResidual",
    "Plan",
    "Reason",
    "Record",
    "Report",
    "Residual",
    "Shortcut",
    "SinkhornError",
    "Skipped",
    "StaticConnection",
    "StreamEmbed",
    "StreamEmbedding",
    "TraceError",
    "Trunk",
    "TrunkValue",
    "UnknownDialect",
    "UnsupportedModel",
    "block_graphs",
    "carry",
    "compile_regions",
    "convert",
    "expand",
    "find_residuals",
    "get_expand_reduce_stream_functions",
    "get_init_and_expand_reduce_stream_functions",
    "make_plan",
    "plan",
    "read",
    "readout",
    "rewrite",
    "sinkhorn",
    "sinkhorn_error",
    "write",
]
