"""Have Inductor generate the code of an NVIDIA H100 on a machine that has none.

Models and inputs stay on the CPU and nothing runs: graphs are traced there, their tensors renamed to
a GPU that torch and Triton are made to believe in, and the scheduler's kernels handed over in place of
being compiled. Relies on internals of torch 2.13 and 2.14.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx

from ..running.inductor import for_streams, settings

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)

OnGraph = Callable[[Any, str, fx.GraphModule, Sequence[Any]], None]  # GraphLowering, its code, graph, inputs


class _HandedOver(Exception):
    """Raised where the compiled code would run."""


def compile_for_gpu(
    function: Callable[..., Any], inputs: Sequence[Any], on_graph: OnGraph, tuned: bool = False
) -> None:
    """Compile ``function(*inputs)`` with Inductor as if for the GPU, forward and (where there is one) backward.

    Args:
        function: a function or module whose tensors are on the CPU.
        inputs: its arguments.
        on_graph: called for each graph, within the lowering's context, with Inductor's GraphLowering, the generated
            code, the graph and its fake inputs.
        tuned: as :func:`hc_transform.inductor` compiles.
    """

    def call(*args: Any) -> Any:  # a GraphModule called by itself would report where its code was stopped
        return function(*args)

    with formulated_for_gpu(), contextlib.suppress(_HandedOver):
        torch.compile(call, backend=gpu_backend(on_graph, tuned), fullgraph=True, dynamic=False)(*inputs)


def gpu_backend(on_graph: OnGraph, tuned: bool = False) -> Callable[..., Any]:
    """Return a backend of ``torch.compile`` that generates the GPU's code, hands it to ``on_graph`` and runs nothing.

    What it returns cannot be called. It is to be used under :func:`formulated_for_gpu`.
    """
    from torch._inductor import compile_fx, graph
    from torch._inductor import config as inductor_config

    def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
        fakes = _moved(gm, example_inputs)

        def compile_to_module(lowering: Any) -> Any:
            code = lowering.codegen()[0]
            on_graph(lowering, getattr(code, "value", code), gm, fakes)
            return SimpleNamespace(call=_hand_over, __file__="handed over")

        with (
            believed(),
            for_streams() if tuned else contextlib.nullcontext(),
            mock.patch.object(graph.GraphLowering, "compile_to_module", compile_to_module),
            inductor_config.patch(fx_graph_cache=False),
        ):
            return compile_fx.compile_fx_inner(gm, fakes, **settings)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        patches = settings() if tuned else None
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=patches)

    return backend


@contextlib.contextmanager
def formulated_for_gpu() -> Iterator[None]:
    """Have connections take the form that they take on GPUs, and backward passes compiled with their forward passes.

    Nothing that was compiled before is used, nor what is compiled here afterwards.
    """
    from torch._functorch import config as functorch_config

    from ..connections import base

    torch._dynamo.reset()
    try:
        with (
            mock.patch.object(base, "PACKED_DEVICES", ()),
            functorch_config.patch(force_non_lazy_backward_lowering=True),
        ):
            yield
    finally:
        torch._dynamo.reset()


def _hand_over(*args: Any) -> Any:
    raise _HandedOver


def _moved(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Rename the devices in ``gm`` to the GPU, and return its inputs there; recompute the values that nodes carry."""
    from torch._guards import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in gm.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(value, _on_gpu) for value in (node.args, node.kwargs))
    mode = detect_fake_mode(inputs)
    assert mode is not None  # Inductor's graphs have fake inputs
    with mode:
        fakes = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU) if isinstance(x, torch.Tensor) else x
            for x in inputs
        ]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    return fakes


def _on_gpu(value: Any) -> Any:
    return GPU if isinstance(value, torch.device) else value


@contextlib.contextmanager
def believed() -> Iterator[None]:
    """Let torch, Inductor and Triton believe in one H100."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import utils as inductor_utils
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton as triton_utils
    from triton.backends.compiler import GPUTarget

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    properties = DeviceProperties(
        "cuda",
        0,
        H100.multi_processor_count,
        90,
        9,
        H100.regs_per_multiprocessor,
        H100.max_threads_per_multi_processor,
        H100.max_threads_per_block,
        H100.warp_size,
    )
    common = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "is_bf16_supported": True,
        "synchronize": None,
    }
    module = {
        **common,
        "get_device_capability": (9, 0),
        "get_device_name": "H100",
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    interface = {
        **common,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "set_device": None,
        "get_compute_capability": 90,
    }
    driver = SimpleNamespace(
        get_current_target=constant(GPUTarget("cuda", 90, 32)),
        get_current_device=constant(0),
        get_active_torch_device=constant(GPU),
        get_device_interface=constant(torch.cuda),
    )
    patches: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, constant(value)) for name, value in module.items()),
        *((CudaInterface, name, staticmethod(constant(value))) for name, value in interface.items()),
        (CudaInterface.Worker, "get_device_properties", staticmethod(constant(H100))),
        (CudaInterface.Worker, "current_device", staticmethod(constant(0))),
        (
            DeviceProperties,
            "create",
            staticmethod(lambda d: properties if d.type == "cuda" else DeviceProperties(d.type, d.index, 1, 0)),
        ),
        (triton.runtime.driver, "_active", driver),
        (triton_helpers, "set_driver_to_gpu", constant(None)),
    ]

    def forget() -> None:
        for cached in (*vars(triton_utils).values(), *vars(inductor_utils).values()):
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()

    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        forget()
        stack.callback(forget)
        yield
