"""Hints for models that the tracer needs help with."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import PatternError


@dataclass(frozen=True)
class Hints:
    """What a user tells the tracer about a model.

    Attributes:
        wrap_functions: functions to keep as one node.
        leaf_modules: modules not to trace into: classes, or patterns (``fnmatch``) of paths.
        inline_modules: modules to trace into although no add is seen in their code.
    """

    wrap_functions: tuple[Callable[..., Any], ...] = ()
    leaf_modules: tuple[str | type, ...] = ()
    inline_modules: tuple[str | type, ...] = ()

    def chosen(self, option: str, model: nn.Module) -> list[str]:
        """Return the paths of the modules that ``option`` names.

        Raises:
            PatternError: an entry names no module.
        """
        modules = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if path]
        chosen: list[str] = []
        for entry in getattr(self, option):
            found = [path for path, module in modules if _named(path, module, entry)]
            if not found:
                near = difflib.get_close_matches(str(entry), [path for path, _ in modules], n=3, cutoff=0.3)
                raise PatternError(
                    f"{option}: {entry!r} is no module of {type(model).__name__}. Near paths: "
                    f"{', '.join(near) or 'none'}; model.named_modules() lists all."
                )
            chosen += found
        return chosen


def _named(path: str, module: nn.Module, entry: str | type) -> bool:
    return isinstance(module, entry) if isinstance(entry, type) else fnmatch.fnmatchcase(path, entry)
