"""What is found in a graph: residual adds, and the adds that are none."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import fx

from .spellings import Term


class Reason(enum.Enum):
    """Why an add was not converted."""

    SHAPES_DIFFER = "shapes differ: the branch output is broadcast onto the skip"
    INDEPENDENT = "operands independent: neither is computed from the other"
    POINTWISE_BRANCH = "branch is pointwise: an activation or a gate, not a residual"
    PROJECTION = "projection shortcut: both operands are computed from one value, neither is that value"
    CARRIED = "projection shortcut, carried: the shortcut is applied to every stream"
    SHORT = "its trunk has fewer residuals than min_residuals"
    MERGED = "part of a sum that is converted as one residual"
    DETACHED = "detached: the branch passes no gradient to the skip"
    SUBTRACTED = "the skip is subtracted from what is computed from it"
    CENTRED = "what is subtracted is taken from the skip without weights: a norm or a filter"
    ENTANGLED = "the skip is a factor of the branch in the same operation"
    OVERWRITTEN = "the skip is overwritten in place by its own branch"
    SHARED_MEMORY = "it writes into memory that another tensor shares, which is used later"
    OPAQUE = "inside a module that stayed whole"
    NESTED = "nested: inside or around the branches of a trunk with more residuals"
    SHARED_READ = "its branch starts inside the branch of another residual on the same value"
    EXCLUDED = "excluded"
    UNEVEN = "another call of its module, which nothing tells from this one, is left as it is"
    OTHER_STREAM = "a mixture of two values, one of which another stream makes of the other"
    UNUSED = "its value reaches no output"
    NO_FEATURES = "no features: no axis of its value is one that its branch has weights for"
    PLAIN = "left plain: num_streams is 1"


@dataclass(frozen=True)
class Residual:
    """One residual add ``skip + branch``.

    Attributes:
        name: module path that tells it apart, such as "blocks.0.attn".
        module: path of the module whose code adds.
        location: "file.py:123", the full path of the file.
        add: the (last) add.
        skip: the value that the branch is computed from.
        skip_ops: operations between ``skip`` and the add, in order.
        branch: the terms that are added to it; there are several in ``x + attn(x) + mlp(x)``.
        region: all nodes from ``skip`` (without it) to the branch outputs.
        whole: the region before it was cut at another stream; empty if it was not.
        absorbed: the other nodes that are part of the sum.
        scaled_skip: the skip's term, with its factor.
        branch_first: whether the branch is the add's first operand, which gives the sum its memory format.
        key: where its connection stands, unique within its plan.
    """

    name: str
    module: str
    location: str
    add: fx.Node
    skip: fx.Node
    skip_ops: tuple[fx.Node, ...]
    branch: tuple[Term, ...]
    region: frozenset[fx.Node]
    scaled_skip: Term
    absorbed: tuple[fx.Node, ...] = ()
    branch_first: bool = False
    key: str = ""
    whole: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Skipped:
    """One add (or opaque module) that is not converted, and why."""

    name: str
    module: str
    location: str
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


@dataclass(frozen=True)
class Shortcut:
    """A projection shortcut ``s(x) + f(x)``, s being a chain of operations that mixes less than f.

    Attributes:
        add: the add.
        value: x.
        way: the operations of s, in order.
        verdict: the add as it stands among those that are not residuals.
    """

    add: fx.Node
    value: fx.Node
    way: tuple[fx.Node, ...]
    verdict: Skipped


@dataclass(frozen=True)
class Findings:
    """All adds of a graph: those that are residuals, and those that are not."""

    residuals: tuple[Residual, ...]
    skipped: tuple[Skipped, ...]
    shortcuts: tuple[Shortcut, ...] = ()
