"""Hyper-connections for existing PyTorch models, as a graph transformation.

The way of the data, from :func:`convert` (convert.py) on::

    model, example inputs
      | residuals/     observe: its one real run, recorded (capture/tape), and a verdict on every add (Observation);
      |                choose: trunks, and a key for each residual (Plan); placement: which modules run graphs
      | capture/       trace: a graph of the code of the root or of a block, and guards on what it found
      | rewriting/     rewritten_graph: streams in place of trunk values; the new modules that it calls
      | running/       Variant: a graph that fits a kind of call, traced again for others; graph model and blocks
      | verification/  the outputs beside the original's, and the streams off their start beside the recorded run
      v
    converted model, Report

Below these are streams/ (arithmetic of streams, TrunkValue between blocks), connections/ (Connection: how the
coefficients are made), models/ (copies, state, comparison) and graphs/ (facts about nodes). Beside them are layer/
(hyper-connections by hand), training/ (groups for optimisers, saving, the way back, diagnostics), measuring/ (times,
kernels, bytes) and showing/ (printouts, drawings). Each wing imports from those named before it in
tests/test_architecture.py alone.

Where to add what:

- a connection: a subclass of Connection in connections/, by name in ``CONNECTIONS``.
- an operation that streams are carried through: its kind in graphs/operations.py; one that does not act on each stream
  alone, also in rewriting/carried_ops.py and streams/carried.py.
- a spelling of the add: residuals/spellings.py.
- a kind of graph that another tool makes: graphs/dialects.py.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when it is first asked for, so that the command line answers at once
    from .config import config_of
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
        CheckpointError,
        DecisionChanged,
        HCTransformError,
        NotConverted,
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
    from .residuals.records import Record
    from .residuals.report import Report
    from .residuals.trunks import Trunk
    from .rewriting.rewrite import rewrite
    from .running.block_module import block_graphs
    from .running.graph_model import HyperConnectedModule
    from .running.inductor import inductor
    from .running.regional import compile_regions
    from .showing import Printout, diff, draw, show
    from .streams.carried import carry
    from .streams.mixing import Coefficients, FractionCoefficients, expand, read, readout, write
    from .streams.trunk_value import TrunkValue
    from .training.callbacks import lightning_callback, trainer_callback
    from .training.diagnose import diagnose
    from .training.diagnosis import Diagnosis, SiteDiagnosis, TrunkDiagnosis
    from .training.hugging_face import from_pretrained
    from .training.parameters import connection_parameters, freeze_base, parameter_groups
    from .training.plain import Difference, plain
    from .training.saving import convert_like, load, save
    from .verification import verify

from .version import __version__ as __version__

_NAMES_BY_HOME = {
    "config": "config_of",
    "connections": (
        "CONNECTIONS Connection ConstrainedConnection DynamicConnection FracConnection IdentityConnection "
        "KromHCConnection MHCConnection MHCLiteConnection StaticConnection"
    ),
    "connections.sinkhorn": "SinkhornError sinkhorn sinkhorn_error",
    "connections.trunk_ends": "LearnedReadout StreamEmbedding",
    "convert": "convert plan",
    "errors": (
        "CheckpointError DecisionChanged HCTransformError NotConverted NotEquivalent NothingToConvert PatternError "
        "TraceError UnknownDialect UnsupportedModel"
    ),
    "layer.layer": "HyperConnections PlainResidual get_init_and_expand_reduce_stream_functions",
    "layer.packed_streams": "StreamEmbed get_expand_reduce_stream_functions",
    "options": "Options",
    "residuals.find": "find_residuals",
    "residuals.findings": "Findings Reason Residual Shortcut Skipped",
    "residuals.planner": "Plan make_plan",
    "residuals.records": "Record",
    "residuals.report": "Report",
    "residuals.trunks": "Trunk",
    "rewriting.rewrite": "rewrite",
    "running.block_module": "block_graphs",
    "running.graph_model": "HyperConnectedModule",
    "running.inductor": "inductor",
    "running.regional": "compile_regions",
    "showing": "Printout diff draw show",
    "streams.carried": "carry",
    "streams.mixing": "Coefficients FractionCoefficients expand read readout write",
    "streams.trunk_value": "TrunkValue",
    "training.callbacks": "lightning_callback trainer_callback",
    "training.diagnose": "diagnose",
    "training.diagnosis": "Diagnosis SiteDiagnosis TrunkDiagnosis",
    "training.hugging_face": "from_pretrained",
    "training.parameters": "connection_parameters freeze_base parameter_groups",
    "training.plain": "Difference plain",
    "training.saving": "convert_like load save",
    "verification": "verify",
}
_HOMES = {name: home for home, names in _NAMES_BY_HOME.items() for name in names.split()}

__all__ = [
    "CONNECTIONS",
    "CheckpointError",
    "Coefficients",
    "Connection",
    "ConstrainedConnection",
    "DecisionChanged",
    "Diagnosis",
    "Difference",
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
    "NotConverted",
    "NotEquivalent",
    "NothingToConvert",
    "Options",
    "PatternError",
    "PlainResidual",
    "Plan",
    "Printout",
    "Reason",
    "Record",
    "Report",
    "Residual",
    "Shortcut",
    "SinkhornError",
    "SiteDiagnosis",
    "Skipped",
    "StaticConnection",
    "StreamEmbed",
    "StreamEmbedding",
    "TraceError",
    "Trunk",
    "TrunkDiagnosis",
    "TrunkValue",
    "UnknownDialect",
    "UnsupportedModel",
    "block_graphs",
    "carry",
    "compile_regions",
    "config_of",
    "connection_parameters",
    "convert",
    "convert_like",
    "diagnose",
    "diff",
    "draw",
    "expand",
    "find_residuals",
    "freeze_base",
    "from_pretrained",
    "get_expand_reduce_stream_functions",
    "get_init_and_expand_reduce_stream_functions",
    "inductor",
    "lightning_callback",
    "load",
    "make_plan",
    "parameter_groups",
    "plain",
    "plan",
    "read",
    "readout",
    "rewrite",
    "save",
    "show",
    "sinkhorn",
    "sinkhorn_error",
    "trainer_callback",
    "verify",
    "write",
]


class _Package(ModuleType):
    """This package: what it exports is imported when it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):  # the file of that name, which the import system puts here
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
