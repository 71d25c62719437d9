"""Where in the user's code something happens."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import einops
import torch

# Frames of these files are not the user's code; what they do was asked for further up.
INTERNAL_FILES = (
    *(
        os.path.join(os.path.dirname(torch.__file__), *part.split("/"))
        for part in (
            "__init__.py",
            "_dynamo/",
            "fx/",
            "overrides.py",
            "_ops.py",
            "_tensor.py",
            "functional.py",
            "nn/functional.py",
            "nn/modules/module.py",
            "nn/modules/container.py",
            "_jit_internal.py",
            "utils/",
            "autograd/",
        )
    ),
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(einops.__file__) + os.sep,
    contextlib.__file__,
    "<",
)


# Further ones in stack traces of graphs: the tools that made them.
TORCH = tuple(
    os.path.join(os.path.dirname(torch.__file__), part, "") for part in ("_dynamo", "_export", "export", "_functorch")
)

DEEPEST = 6  # lines of helper functions within helper functions
_MODULE = os.path.join(os.path.dirname(torch.__file__), "nn", "modules", "module.py")


def user_frame() -> tuple[str, int, str] | None:
    """Return (file, line, function) of the user's code that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(INTERNAL_FILES):
            return filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return None


def user_lines() -> tuple[str, ...]:
    """Return "file:line" of the user's code that is running and of what called it, up to the call of its module."""
    frame: Any = sys._getframe(1)
    lines: list[str] = []
    while frame is not None and len(lines) < DEEPEST:
        filename = frame.f_code.co_filename
        if not filename.startswith(INTERNAL_FILES):
            lines.append(f"{filename}:{frame.f_lineno}")
        elif lines and filename == _MODULE:
            break
        frame = frame.f_back
    return tuple(lines)


def is_library_code(frame: Any) -> bool:
    """Whether a frame runs code of torch or of this package."""
    return str(frame.f_globals.get("__name__")).startswith(("torch.", "hc_transform."))


def short_name(filename: str) -> str:
    """Return a file's name without its folder."""
    return filename.rsplit("/", 1)[-1]
