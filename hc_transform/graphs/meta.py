"""What the nodes of a graph know beside what they compute: entries of ``node.meta``, each with its type."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import fx

T = TypeVar("T")


class Entry(Generic[T]):
    """One entry of the ``meta`` of nodes.

    Args:
        name: its key there.
        default: what holds for a node that does not have it.
    """

    def __init__(self, name: str, default: T) -> None:
        self.name = name
        self.default = default

    def of(self, node: fx.Node) -> T:
        """Return what ``node`` holds, or else the default."""
        value: T = node.meta.get(self.name, self.default)
        return value

    def known(self, node: fx.Node) -> bool:
        """Whether ``node`` has this entry."""
        return self.name in node.meta

    def set(self, node: fx.Node, value: T) -> None:
        """Let ``node`` hold ``value``."""
        node.meta[self.name] = value


MODULE: Entry[str] = Entry("hc_module", "")  # path of the module whose code made the node
LOCATION: Entry[str | None] = Entry("hc_location", None)  # "file:line" of the user's code
LINES: Entry[tuple[str, ...]] = Entry("hc_lines", ())  # of the user's code that lead to it, the innermost first
CALL: Entry[tuple[int, ...]] = Entry("hc_call", ())  # which call of its module, within that of the one around
CALLS: Entry[tuple[Any, ...]] = Entry("hc_calls", ())  # the module calls around it, outermost first
GIVEN_BACK: Entry[tuple[str, ...]] = Entry("hc_given_back", ())  # modules that were given it and returned it
TYPE: Entry[type | None] = Entry("hc_type", None)  # of the value on the example inputs
ON_VALUES: Entry[bool] = Entry("hc_on_values", False)  # whether it depends on values of tensors, or was drawn
RESIDUAL: Entry[str | None] = Entry("hc_residual", None)  # name of the residual whose streams it writes
STREAMS: Entry[str | None] = Entry("hc_streams", None)  # how the streams that it gives are read out
WRITES: Entry[int | None] = Entry("hc_writes", None)  # which operand it writes into, where that outlives the graph
WRITES_INPUT: Entry[bool] = Entry("hc_writes_input", False)  # whether that memory is an input's
ORIGIN = (MODULE.name, LOCATION.name, "stack_trace", "nn_module_stack")  # what tells where a node comes from
