"""Other threads: one conversion at a time, and patches that are seen by the thread that made them alone."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch._dynamo.convert_frame import compile_lock

from .errors import NotEquivalent

Function = TypeVar("Function", bound=Callable[..., Any])

_CONVERTING = threading.RLock()
_ABSENT = object()


def one_at_a_time(function: Function) -> Function:
    """Let one thread at a time run ``function``: conversions seed the random generators and put them back."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _CONVERTING:
            return function(*args, **kwargs)

    return alone  # type: ignore[return-value]


def uncompiled() -> Any:
    """Return a context in which functions made by ``torch.compile`` run as they were written."""
    return torch.compiler.set_stance("force_eager")


def again_beside_threads(function: Function) -> Function:
    """Compare again, at most twice, where other threads run: they draw from the generators that models draw from."""

    @functools.wraps(function)
    def compared(*args: Any, **kwargs: Any) -> Any:
        for _ in range(2):
            try:
                return function(*args, **kwargs)
            except NotEquivalent:
                if threading.active_count() == 1:
                    raise
                kwargs["expected"] = None  # which is run again
        return function(*args, **kwargs)

    return compared  # type: ignore[return-value]


@contextlib.contextmanager
def replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes (owner, name, value) of classes and modules; put them back whatever happens.

    Nothing is compiled meanwhile in another thread, whose compiler would look into what stands there.
    """
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in replacements]
    with _CONVERTING, compile_lock:
        try:
            for owner, name, value in replacements:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in reversed(before):
                if value is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)
