"""Whether modules that stayed whole hold adds: these are to be listed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..capture.add_bytecode import may_add
from ..capture.trace import Trace, bind_inputs, trace
from ..errors import HCTransformError
from .find import find_residuals
from .findings import Reason, Skipped

log = logging.getLogger("hc_transform")

LEAF = "a norm, an activation or a gate by all that it does, which streams pass as one operation"


def opaque_adds(model: nn.Module, wide: Trace) -> list[Skipped]:
    """Return a verdict for each residual in modules that stayed whole in ``wide``, and for each of those that adds."""
    rows = []
    for path, reason in wide.opaque.items():
        if any(path.startswith(other + ".") for other in wide.opaque):
            continue
        module = model.get_submodule(path)
        whole = Skipped(path, path, _source_of(type(module)), Reason.OPAQUE, reason)
        if path in wide.calls:
            places = _adds(module, *wide.calls[path])
            rows += [replace(whole, location=place or whole.location) for place in places]
        elif not wide.has_values and _may_add(module):  # there are no example inputs, or it was not called on them
            rows.append(whole)
    return rows


def residuals_in_leaves(model: nn.Module, leaves: Mapping[str, tuple[Any, Any]]) -> list[Skipped]:
    """Return a verdict for each residual in modules that stand as one operation in a recorded run.

    What is found in the first module of a class holds for all of them.

    Args:
        model: that was recorded.
        leaves: what those modules were called with, by path.
    """
    found: dict[type, list[str]] = {}
    rows = []
    for path, call in leaves.items():
        module = model.get_submodule(path)
        if type(module) not in found:
            found[type(module)] = [place for place in _adds(module, *call) if place]
        rows += [Skipped(path, path, place, Reason.OPAQUE, LEAF) for place in found[type(module)]]
    return rows


def _adds(module: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """Return where the module has residuals when it is called so; "" for adds that are none or cannot be seen."""
    try:
        found = trace(module, bind_inputs(module, args, kwargs), probing=True)
    except (HCTransformError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        log.debug("%s could not be looked into: %s", type(module).__name__, error)
        return [""] if _may_add(module) else []
    findings = find_residuals(found.graph_module)
    if findings.residuals:
        return [residual.location for residual in findings.residuals]
    hidden = any(may_add(module.get_submodule(path)) for path in found.opaque)
    return [""] if findings.skipped or hidden else []


def _may_add(module: nn.Module) -> bool:
    return any(map(may_add, module.modules()))


def _source_of(cls: type) -> str:
    """Return where the class's forward stands."""
    code = getattr(inspect.unwrap(getattr(cls, "forward", cls)), "__code__", None)
    return "unknown location" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
