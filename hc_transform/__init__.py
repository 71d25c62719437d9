"""Hyper-connections for existing PyTorch models, as a graph transformation."""

from __future__ import annotations

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
from .connections.sinkhorn import SinkhornError, sinkhorn, sinkhorn_error
from .connections.trunk_ends import LearnedReadout, StreamEmbedding
from .convert import convert, plan
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
from .layer.layer import HyperConnections, PlainResidual, get_init_and_expand_reduce_stream_functions
from .layer.packed_streams import StreamEmbed, get_expand_reduce_stream_functions
from .options import Options
from .residuals.find import find_residuals
from .residuals.findings import Findings, Reason, Residual, Shortcut, Skipped
from .residuals.planner import Plan, make_plan
from .residuals.report import Record, Report
from .residuals.trunks import Trunk
from .rewriting.rewrite import rewrite
from .running.block_module import block_graphs
from .running.graph_model import HyperConnectedModule
from .running.regional import compile_regions
from .streams.carried import carry
from .streams.mixing import Coefficients, FractionCoefficients, expand, read, readout, write
from .streams.trunk_value import TrunkValue

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
