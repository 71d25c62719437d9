"""Compare two outputs of a model, whatever objects they are made of.

Two outputs are walked side by side: through containers, and through the attributes of plain objects.
Every tensor, array, number and string in them is compared; what could not be is told by its path.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..streams.hook_readouts import OPAQUE
from ..streams.trunk_value import TrunkValue
from .state import slots_of

NO_VALUES = "no values on the meta device"
ATOMS = (str, bytes, bool, int, float, complex, type(None), Enum, range, slice)


@dataclass(frozen=True)
class Comparison:
    """What two outputs have in common.

    Attributes:
        error: the largest relative error of any tensor or number; infinite if anything else differs.
        where: the path of that error in the output, such as ``.logits`` or ``[0]``; "" if nothing differs.
        values: how many tensors, arrays and numbers were compared.
        unseen: the paths of what was not compared, with the reason.
    """

    error: float
    where: str = ""
    values: int = 0
    unseen: tuple[str, ...] = ()


def compare(actual: Any, expected: Any, *, dtypes: bool = False) -> Comparison:
    """Compare two nested outputs.

    An error is relative to the largest absolute value of each tensor, or to the number. Outputs of different
    structure, shape, text or with NaN in other places are infinitely apart; with ``dtypes`` those of
    different dtype too.

    >>> compare({"a": torch.ones(2), "n": 3.0}, {"a": torch.ones(2), "n": 4.0})
    Comparison(error=0.25, where="['n']", values=2, unseen=())
    """
    worst, where, values = 0.0, "", 0
    unseen: list[str] = []
    for path, a, e in _pairs(actual, expected):
        missing = _not_compared(e)
        if missing:
            unseen.append(f"{path or 'the output'} ({missing})")
        elif _is_value(e):
            values += 1
        error = leaf_error(a, e)
        if dtypes and isinstance(a, Tensor) and isinstance(e, Tensor) and a.dtype != e.dtype:
            error = math.inf
        if not error <= worst:
            worst, where = error, path or "the output"
    return Comparison(worst, where, values, tuple(unseen))


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest error of any value in two nested outputs; see :func:`compare`.

    >>> relative_error((1.0, torch.zeros(1)), (2.0, torch.zeros(1)))
    0.5
    """
    return compare(actual, expected).error


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors anywhere in a nested output."""
    return [leaf for _, leaf, _ in _pairs(value, value) if isinstance(leaf, Tensor)]


def leaf_error(actual: Any, expected: Any) -> float:
    """Return the relative error of one tensor, array or number; of anything else 0 if it is equal, or infinity."""
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        return tensor_error(actual, expected)
    if _is_array(actual) and _is_array(expected):
        return tensor_error(_from_array(actual), _from_array(expected))
    if type(actual) is not type(expected):
        return math.inf
    if isinstance(expected, (float, complex)):
        return _number_error(actual, expected)
    if isinstance(expected, (*ATOMS, torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return 0.0 if actual == expected else math.inf
    return 0.0


def tensor_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest expected value."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = _dense(actual), _dense(expected)
    if expected.numel() == 0 or expected.is_meta or actual.is_meta:
        return 0.0 if expected.is_meta == actual.is_meta else math.inf
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else math.inf
    if actual.dtype == expected.dtype:
        difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
        if difference == 0 or math.isfinite(difference) and math.isfinite(largest) and largest > 0:
            return difference and difference / largest
    a, e = actual.detach().to(torch.complex128 if expected.is_complex() else torch.float64), expected.detach()
    e = e.to(a.dtype)
    unequal = ~((a == e) | (a.isnan() & e.isnan()))
    if not unequal.any():
        return 0.0
    scale = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0.0
    worst = (a - e)[unequal].abs().max().item()
    return worst / scale if scale > 0 and worst == worst else math.inf


def _number_error(actual: complex, expected: complex) -> float:
    if actual == expected or actual != actual and expected != expected:
        return 0.0
    difference = abs(actual - expected)
    finite = math.isfinite(difference) and math.isfinite(abs(expected)) and expected != 0
    return difference / abs(expected) if finite else math.inf


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the leaves of two nested values side by side; containers that do not match are leaves that differ."""
    waiting = [("", actual, expected)]
    seen: set[tuple[int, int]] = set()
    alive: list[Any] = []  # so that no id is used twice
    while waiting:
        path, a, e = waiting.pop()
        ours, theirs = _parts(a), _parts(e)
        if ours is None and theirs is None:
            yield path, a, e
        elif ours is None or theirs is None or list(ours) != list(theirs):
            yield path, _Unlike(), None
        elif (id(a), id(e)) not in seen:
            seen.add((id(a), id(e)))
            alive += (a, e)
            waiting += reversed([(path + name, ours[name], theirs[name]) for name in ours])


class _Unlike:
    """What stands for a container that the other output does not have."""


def _parts(value: Any) -> dict[str, Any] | None:
    """Return what a container or object holds, each under the text by which it is reached; None of a leaf."""
    if isinstance(value, Tensor):
        return _numbered(value.unbind()) if value.is_nested else None
    if _is_array(value) and value.dtype.kind not in "biufc":  # of strings or objects
        return _numbered(value.ravel().tolist())
    if isinstance(value, TrunkValue) or isinstance(value, (*ATOMS, *OPAQUE)):
        return None
    if isinstance(value, Mapping):
        keys = sorted(value) if all(isinstance(key, str) for key in value) else list(value)
        return {f"[{key!r}]": value[key] for key in keys}
    if isinstance(value, Set):
        return _numbered(sorted(value, key=_order))
    if isinstance(value, Sequence):
        return _numbered(value)
    return _attributes(value)


def _attributes(value: Any) -> dict[str, Any] | None:
    found = {**slots_of(value), **getattr(value, "__dict__", {})}
    return {f".{name}": found[name] for name in sorted(found)} or None


def _numbered(values: Any) -> dict[str, Any]:
    return {f"[{i}]": value for i, value in enumerate(values)}


def _order(value: Any) -> Any:
    """Return by what the elements of a set are put in order: not by where they lie in memory."""
    if isinstance(value, Tensor):
        known = not value.is_meta and value.numel()
        return "Tensor", str(tuple(value.shape)), float(value.double().sum()) if known else 0.0
    return type(value).__name__, repr(value), 0.0


def _not_compared(leaf: Any) -> str:
    """Return why a leaf has no value that could be compared; "" if it has one."""
    if isinstance(leaf, Tensor):
        return NO_VALUES if leaf.is_meta else ""
    known = (*ATOMS, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return "" if isinstance(leaf, known) or _is_array(leaf) else f"a {type(leaf).__name__}"


def _is_value(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.numel() > 0
    return _is_array(leaf) or isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _from_array(value: Any) -> Tensor:
    wide = {"f": "float64", "c": "complex128"}.get(value.dtype.kind) if value.dtype.itemsize > 8 else None
    return torch.as_tensor(value.astype(wide) if wide else value.copy())  # torch has no long double


def _dense(x: Tensor) -> Tensor:
    x = x.dequantize() if x.is_quantized else x
    return x if x.layout == torch.strided else x.to_dense()
