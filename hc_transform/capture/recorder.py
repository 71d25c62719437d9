"""What the parts of tracing need of the tracer that they record with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import fx, nn


class Recorder(Protocol):
    """The tracer, as proxies, placeholders and patches see it.

    Attributes:
        graph: what is recorded.
        root: the module that is traced.
        evaluating: whether an operation is being computed on example values.
        probing: whether what a graph cannot hold is traced too.
        merges_inputs, loose: how inputs are checked.
        drawing_functions: those of Python's and numpy's generators.
        watch: what is read and written beside tensors.
    """

    graph: fx.Graph
    root: Any
    evaluating: Any
    probing: bool
    merges_inputs: bool
    loose: frozenset[str]
    drawing_functions: Any
    watch: Any
    _paths: list[str]

    def is_tracing(self) -> bool:
        """Whether what runs now is traced code."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on the example values and record it."""

    def create_arg(self, a: Any) -> Any:
        """Return what a node holds of a value."""

    def placeholder(self, target: str, default: tuple[Any, ...], value: Any) -> Any:
        """Make the placeholder of one parameter."""

    def proxy_of(self, node: fx.Node) -> Any:
        """Return the proxy of a node."""

    def inlining_all(self) -> AbstractContextManager[Any]:
        """Trace into every module meanwhile."""

    def look_at(self, value: Any, name: str) -> Any:
        """Return an attribute of an example value."""

    def attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """Return an attribute of a module as traced code is to see it."""

    def found_otherwise(self, module: nn.Module, name: str) -> Any:
        """Return an attribute that a module's ``__getattr__`` gives, and note if there is none."""

    def is_own_tensor(self, value: Any) -> bool:
        """Whether a value is a parameter or a buffer of the model."""

    def own_tensor(self, value: Any) -> Any:
        """Return what stands for a value that is a parameter or a buffer of the model."""

    def training_flag(self, module: nn.Module) -> Any:
        """Return a module's mode as traced code is to see it."""

    def grad_mode_flag(self) -> Any:
        """Return whether gradients are enabled, asked anew on every call."""

    def inference_mode_flag(self) -> Any:
        """Return whether the call is in inference mode, asked anew on every call."""

    def needs_gradients(self) -> None:
        """Start anew with gradients if this trace has none."""

    def decides_on_values(self) -> None:
        """Note that code decides on values of tensors."""

    def record_decision(self, *decision: Any) -> Any:
        """Record what the code decided on."""

    def drawing(self, draw: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what records a draw in place of a function that draws."""

    def kept_whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what records a call of a function in place of its code."""
