"""The errors of the package. Each says what happened, where, and what to do next."""

from __future__ import annotations

import torch


class HCTransformError(Exception):
    """Base class of every error that hc_transform raises on purpose."""


class TraceError(HCTransformError):
    """The model, or the inputs given with it, could not be traced into a graph."""


class DecisionChanged(TraceError):
    """A call would decide something otherwise than the trace it is about to run on."""


class NothingToConvert(HCTransformError):
    """The model holds no residual add that could be converted."""


class NotEquivalent(HCTransformError):
    """The converted model does not compute what the original computes."""


class UnsupportedModel(HCTransformError):
    """The model is of a kind that is not converted, for the reason in the message."""


class PatternError(HCTransformError, ValueError):
    """A pattern in ``include`` or ``exclude`` matches no residual."""


class UnknownDialect(UnsupportedModel):
    """A graph is written in operators that are not known, so that its residuals would not be seen."""


class NotConverted(HCTransformError, ValueError):
    """A model that is to be a converted one has no connections."""


class CheckpointError(HCTransformError, RuntimeError):
    """A checkpoint was saved from another conversion than the model's, or from none."""


OUT_OF_RESOURCES = (MemoryError, RecursionError, torch.OutOfMemoryError)
# What is never taken for a property of the model, such as code that cannot be traced.
NEVER_HIDDEN = (HCTransformError, *OUT_OF_RESOURCES)
