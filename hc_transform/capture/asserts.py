"""Asserts on values of tensors in traced code, which stay asserts in the graph."""

from __future__ import annotations

import dis
import functools
import linecache
from types import CodeType
from typing import Any, NamedTuple

import torch

BETWEEN = frozenset({"TO_BOOL", "NOT_TAKEN", "CACHE"})


class Assert(NamedTuple):
    """What an ``assert`` expects of the value that is asked for its truth, and says if it is another."""

    expected: bool
    message: str


def check_assert(value: Any, expected: bool, message: str) -> None:
    """Raise AssertionError unless ``value`` is as true as ``expected``; in compiled code, asynchronously."""
    if torch.compiler.is_compiling():
        if isinstance(value, torch.Tensor):
            torch._assert_async(value if expected else torch.logical_not(value), message)
        else:
            torch._check(value if expected else torch.sym_not(value))
    elif bool(value) is not expected:
        raise AssertionError(message)


def assert_of(frame: Any) -> Assert | None:
    """Return the ``assert`` for which a frame of traced code asks for a value's truth, None if it is for none."""
    found = _assert_at(frame.f_code, frame.f_lasti)
    if found is None or found.message:
        return found
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return found._replace(message=code or "an assert of the model failed")


@functools.lru_cache(maxsize=1024)
def _assert_at(code: CodeType, offset: int) -> Assert | None:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in BETWEEN or i.offset == offset]
    here = next((n for n, i in enumerate(instructions) if i.offset == offset), None)
    if here is None:
        return None
    here += instructions[here].opname == "TO_BOOL"
    jump = instructions[here]
    if "JUMP" not in jump.opname or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    jumps_if = jump.opname.endswith("IF_TRUE")
    if _raises(instructions, here + 1):
        return Assert(jumps_if, _message(instructions, here + 1))
    there = next((n for n, i in enumerate(instructions) if i.offset == jump.argval), len(instructions))
    if _raises(instructions, there):
        return Assert(not jumps_if, _message(instructions, there))
    return None


def _raises(instructions: list[dis.Instruction], place: int) -> bool:
    """Whether AssertionError is raised from a place on."""
    if place >= len(instructions):
        return False
    at = instructions[place]
    return at.opname == "LOAD_ASSERTION_ERROR" or at.opname == "LOAD_COMMON_CONSTANT" and "Assertion" in at.argrepr


def _message(instructions: list[dis.Instruction], place: int) -> str:
    """Return the message that an ``assert`` is written with, "" if it is made when it fails."""
    after = instructions[place + 1]
    constant = after.opname == "LOAD_CONST" and isinstance(after.argval, str)
    called = instructions[place + 2].opname in ("PRECALL", "CALL", "CALL_FUNCTION") if constant else False
    return after.argval if called else ""
