"""Operations that Python between blocks does to each stream of a trunk value.

They are linear, so that the readout of the result is the operation on the readout, whoever takes it.
"""

from __future__ import annotations

from typing import Any

SUMS = frozenset("add radd sub subtract rsub".split())
PRODUCTS = frozenset("mul multiply rmul".split())
QUOTIENTS = frozenset("div divide true_divide truediv".split())
MASKED = {"where": (1, 2), "masked_fill": (0,)}  # where the values are
LINEAR = SUMS | PRODUCTS | QUOTIENTS | frozenset(MASKED)


def linear_operand(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], held: list[bool]) -> int | None:
    """Return which operand a call does the same to as to its mean, None if there is none.

    Args:
        name: of the function.
        args, kwargs: that it is given.
        held: which of ``args`` are trunk values; in ``kwargs`` there is none.

    >>> linear_operand("__add__", ("a", "b"), {}, [False, True])
    1
    """
    bare = name.strip("_")
    if name.endswith("_") and not name.endswith("__") or held.count(True) != 1 or kwargs.get("out") is not None:
        return None
    place = held.index(True)
    if bare in SUMS or bare in PRODUCTS or place in MASKED.get(bare, ()):
        return place
    return place if bare in QUOTIENTS and place == 0 and kwargs.get("rounding_mode") is None else None
