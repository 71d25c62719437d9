"""What a compiled model costs on a GPU: kernels, bytes and saved activations, counted on any machine.

Hyper-connections are bound by memory traffic. :func:`inductor_cost` has Inductor generate the code of
an NVIDIA H100 (none is needed, and nothing runs) and counts what its kernels read and write. The
figures do not depend on the machine or its load.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..models.copies import tensors_within
from ..running.graph_model import HyperConnectedModule
from .h100 import compile_for_gpu, formulated_for_gpu, gpu_backend
from .launches import KernelCost, launches_of

H100_BANDWIDTH = 3.35e12  # bytes a second


@dataclass(frozen=True)
class GraphCost:
    """The launches of one compiled graph, forward or backward."""

    launches: tuple[KernelCost, ...] = ()
    code: str = ""

    @property
    def kernels(self) -> int:
        """Triton kernels."""
        return sum(not launch.library for launch in self.launches)

    @property
    def library_calls(self) -> int:
        """Calls of libraries and of operators that the compiler does not look into."""
        return sum(launch.library for launch in self.launches)

    @property
    def bytes(self) -> int:
        """Bytes read and written by all of them."""
        return sum(launch.bytes for launch in self.launches)


@dataclass(frozen=True)
class Cost:
    """The cost of one function: its graphs, and the bytes kept from forward to backward.

    ``saved_bytes`` leaves out inputs and parameters, which are there anyway.
    """

    forward: GraphCost
    backward: GraphCost
    saved_bytes: int

    @property
    def kernels(self) -> int:
        """Triton kernels and library calls of both graphs."""
        return len(self.forward.launches) + len(self.backward.launches)

    @property
    def bytes(self) -> int:
        """Bytes of both graphs."""
        return self.forward.bytes + self.backward.bytes

    def milliseconds(self, bandwidth: float = H100_BANDWIDTH) -> tuple[float, float]:
        """Return the time that forward and backward take at least, at ``bandwidth`` bytes a second.

        That is the time of moving the bytes: a lower bound, which large matrix products exceed.
        """
        return 1e3 * self.forward.bytes / bandwidth, 1e3 * self.backward.bytes / bandwidth


def cost_available() -> bool:
    """Whether :func:`inductor_cost` can run here: it needs Triton's compiler, which CPU-only builds of torch lack."""
    return importlib.util.find_spec("triton") is not None and torch.version.cuda is not None


def inductor_cost(
    function: nn.Module | Callable[..., Any], *inputs: Any, training: bool = True, tuned: bool = False
) -> Cost:
    """Return what ``function(*inputs)`` costs, compiled by Inductor for an NVIDIA H100.

    For each kernel every buffer that it touches counts once, with the part of it that is touched: what
    a persistent kernel moves, and what one that loops over its rows twice at least moves. Library calls and
    custom operators count their inputs and outputs.

    Args:
        function: a module or function that compiles into one graph; its tensors on the CPU.
        inputs: its arguments, on the CPU.
        training: count the backward pass too; else the forward pass is compiled under ``no_grad``.
        tuned: compiled as by ``torch.compile(function, backend=hc_transform.inductor)``.

    >>> cost = inductor_cost(lambda x: x + 1, torch.zeros(1024), training=False)
    >>> cost.forward.kernels, cost.forward.bytes
    (1, 8192)
    """
    counter = _Counter()
    with contextlib.nullcontext() if training else torch.no_grad():
        compile_for_gpu(function, inputs, counter, tuned)
    return counter.cost()


def regional_cost(model: HyperConnectedModule, *inputs: Any, training: bool = True) -> Cost:
    """Return what ``model(*inputs)`` costs, compiled in regions: :func:`inductor_cost` of each, for each of its calls.

    They are compiled as :func:`hc_transform.compile_regions` does it, with :func:`hc_transform.inductor`.

    Args:
        model: a converted model with ``scope="graph"``, all of which is in regions.
        inputs: its arguments, on the CPU.
        training: count the backward pass too.
    """
    calls: list[Cost] = []
    regions = copy.deepcopy(model)
    given = {_storage(t) for t in (*regions.parameters(), *regions.buffers(), *tensors_within(inputs, set()))}
    kept: dict[int, torch.Tensor] = {}  # what one region made and another one keeps
    counted: list[torch.Tensor] = []  # what a region made and keeps itself, alive so that no address is used twice

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        counter = _Counter()
        gpu_backend(counter, tuned=True)(gm, example_inputs)
        cost, kept_inputs = counter.cost(), counter.kept_inputs
        returned: Any = gm.graph.output_node().args[0]
        kept_outputs = [i for i in counter.kept_outputs if i < len(returned)]
        values = [node.meta["example_value"] for node in returned]
        outputs = [(t.size(), t.stride(), t.dtype, t.requires_grad) for t in values]

        def run(*args: Any) -> list[torch.Tensor]:
            calls.append(cost)
            kept.update({_storage(args[i]): args[i] for i in kept_inputs if _storage(args[i]) not in given})
            made = [
                torch.empty_strided(size, stride, dtype=dtype).zero_().requires_grad_(differentiable)
                for size, stride, dtype, differentiable in outputs
            ]
            counted.extend(made[i] for i in kept_outputs)
            given.update(_storage(made[i]) for i in kept_outputs)
            return made

        return run

    with formulated_for_gpu(), contextlib.nullcontext() if training else torch.no_grad():
        regions.compile_regions(backend=backend, fullgraph=True, dynamic=False)
        regions(*inputs)
    return Cost(
        _together([call.forward for call in calls]),
        _together([call.backward for call in calls]),
        sum(call.saved_bytes for call in calls) + sum(t.untyped_storage().nbytes() for t in kept.values()),
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _together(graphs: Sequence[GraphCost]) -> GraphCost:
    return GraphCost(tuple(launch for graph in graphs for launch in graph.launches), "\n".join(g.code for g in graphs))


class _Counter:
    """Count the graphs of one function as they are compiled."""

    def __init__(self) -> None:
        self.forward: list[GraphCost] = []
        self.backward: list[GraphCost] = []
        self.produced: dict[str, tuple[int, int]] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.kept_inputs: list[int] = []
        self.kept_outputs: list[int] = []
        self.saved_bytes = 0

    def __call__(self, lowering: Any, code: str, gm: fx.GraphModule, fakes: Sequence[Any]) -> None:
        graph = GraphCost(tuple(launches_of(lowering.scheduler.nodes)), code)
        if lowering.is_backward:
            self.backward.append(graph)
            taken = _inputs(gm)
            kept = {self.produced[name] for name in taken if name in self.produced}
            self.saved_bytes += sum(size for _, size in kept)
            self.kept_inputs = [i for i, name in enumerate(self.inputs) if name in taken]
            self.kept_outputs = [i for i, name in enumerate(self.outputs) if name in taken]
        else:
            self.forward.append(graph)
            self.produced.update(_storages(gm))
            self.inputs = _inputs(gm)
            returned: Any = gm.graph.output_node().args[0]
            self.outputs = [getattr(value, "name", "") for value in returned]

    def cost(self) -> Cost:
        if len(self.forward) != 1:
            raise RuntimeError(f"expected one graph, the compiler made {len(self.forward)}")
        return Cost(self.forward[0], self.backward[0] if self.backward else GraphCost(), self.saved_bytes)


def _inputs(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.find_nodes(op="placeholder")]


def _storages(gm: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Return the memory, as (identity, bytes), of each tensor that ``gm`` makes; views of inputs are left out."""
    values = {node: node.meta.get("val") for node in gm.graph.nodes}
    found = {n: v.untyped_storage() for n, v in values.items() if isinstance(v, torch.Tensor)}
    inputs = {storage._cdata for node, storage in found.items() if node.op == "placeholder"}
    return {
        node.name: (storage._cdata, int(storage.nbytes()))
        for node, storage in found.items()
        if storage._cdata not in inputs
    }
