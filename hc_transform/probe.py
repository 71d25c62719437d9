"""Whether modules that stayed whole hold adds: these are to be listed."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import nn

from .candidates import may_add
from .errors import HCTransformError
from .find import find_residuals
from .findings import Reason, Skipped
from .trace import Trace, bind_inputs, trace

log = logging.getLogger("hc_transform")


def opaque_adds(model: nn.Module, wide: Trace) -> list[Skipped]:
    """Return a verdict for each module that stayed whole in ``wide`` and adds tensors."""
    rows = []
    for path, reason in wide.opaque.items():
        if any(path.startswith(other + ".") for other in wide.opaque):
            continue
        module = model.get_submodule(path)
        if path in wide.calls:
            adds = _adds_when_called(module, *wide.calls[path])
        else:  # not called on the example inputs, or there are none
            adds = not wide.has_values and _may_add(module)
        if adds:
            rows.append(Skipped(path, path, _source_of(type(module)), Reason.OPAQUE, reason))
    return rows


def _adds_when_called(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether the module adds two tensors when it is called so; if that cannot be seen, whether its code might."""
    try:
        found = trace(module, bind_inputs(module, args, kwargs), probing=True)
    except (HCTransformError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        log.debug("%s could not be looked into: %s", type(module).__name__, error)
        return _may_add(module)
    findings = find_residuals(found.graph_module)
    hidden = any(may_add(module.get_submodule(path)) for path in found.opaque)
    return bool(findings.residuals or findings.skipped) or hidden


def _may_add(module: nn.Module) -> bool:
    return any(map(may_add, module.modules()))


def _source_of(cls: type) -> str:
    """Return where the class's forward stands."""
    code = getattr(inspect.unwrap(getattr(cls, "forward", cls)), "__code__", None)
    return "unknown location" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
