"""A converted model as text: its modules, equal ones that follow each other once."""

from __future__ import annotations

import re
from itertools import groupby

from torch import nn

_INDEX = re.compile(r"index=\d+, ")  # of connections: each differs in it


def modules_of(module: nn.Module) -> str:
    """Return the tree of modules as torch prints it, with equal ones that follow each other as one.

    >>> print(modules_of(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Tanh())))
    Sequential(
      (0-1): 2 x ReLU()
      (2): Tanh()
    )
    """
    lines = module.extra_repr().split("\n") if module.extra_repr() else []
    children = [(name, modules_of(child)) for name, child in module.named_children()]
    own = f"{type(module).__name__}("
    if len(lines) == 1 and not children:
        return f"{own}{lines[0]})"
    for text, group in groupby(children, key=lambda child: _INDEX.sub("", child[1])):
        names = [name for name, _ in group]
        first = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
        times = f"{len(names)} x " if len(names) > 1 else ""
        lines.append(f"({first}): {times}{text}")
    return f"{own}\n{_indented(lines)}\n)" if lines else f"{own})"


def _indented(parts: list[str]) -> str:
    return "\n".join("  " + line for part in parts for line in part.split("\n"))
