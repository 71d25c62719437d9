"""The steps of one module."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import UnsupportedModel
from .steps import Step


def below(steps: Sequence[Step], block: str) -> list[Step]:
    """Return the steps of a module's code and of the modules in it.

    Raises:
        UnsupportedModel: there are none.
    """
    found = [s for s in steps if not block or s.path == block or s.path.startswith(block + ".") or s.prefix == block]
    if not any(step.role not in ("input", "output") for step in found):
        paths = list(dict.fromkeys(step.path for step in steps if step.path))
        near = difflib.get_close_matches(block, paths, n=3, cutoff=0.3) or paths[:3]
        raise UnsupportedModel(
            f"no code of {block!r} is in a rewritten graph: it is no module of the model, or is called whole. "
            f"Near paths that are: {', '.join(near) or 'none'}"
        )
    return found
