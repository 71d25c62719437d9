"""Inductor set for streams: larger kernels, and threads enough for the rows that they hold.

A kernel of a converted model touches many rows at once, those of each stream and of its gradient. Inductor joins at
most 64 operations in one kernel, which ends it before all that needs the same rows, and gives one warp to a row of
257 to 1024 features, which then has not the registers to hold ten of them. Both are set here for what is compiled,
and for nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

log = logging.getLogger("hc_transform")

MAX_FUSION_SIZE = 128
MANY_ACCESSES = 10  # tensors in memory that a kernel reads and writes
ROW_SIZES = (256, 1024)  # of the rows that Inductor gives one warp
FEATURES_A_WARP = 256
MANY_OPERATIONS = 64  # above which a kernel takes twice the warps; no others are as large without MAX_FUSION_SIZE
VERSION = torch.__version__
TUNED_BY_USER = ("max_autotune", "max_autotune_pointwise", "coordinate_descent_tuning")


def inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph with Inductor, set for streams: a backend for ``torch.compile``.

    Kernels of many streams take more warps and hold up to twice as many operations; with options that have Inductor try
    numbers of warps itself (``mode="max-autotune"``), its choice stays. A torch whose internals differ
    compiles as ``backend="inductor"`` does, with a line in the log. :func:`hc_transform.compile_regions`
    uses it unless it is given another backend.

    Args:
        gm: a graph, from ``torch.compile``.
        example_inputs: its inputs.
        mode: as in ``torch.compile``.
        options: as in ``torch.compile``; they go before what is set here.

    Returns:
        The compiled function.

    >>> import torch
    >>> import hc_transform as hct
    >>> hc = hct.convert(torch.nn.TransformerEncoderLayer(8, 2, 16), args=(torch.zeros(2, 3, 8),))
    >>> fast = torch.compile(hc, backend=hct.inductor)
    """
    from torch._inductor import compile_fx, list_mode_options

    patches = {**settings(), **(list_mode_options(mode) if mode else {}), **(options or {})}
    with for_streams():
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=patches)  # type: ignore[arg-type, return-value]


def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **arguments: Any) -> Any:
    """Compile one graph, forward or backward, which may be long after the other."""
    from torch._inductor import compile_fx

    with for_streams():
        return compile_fx.compile_fx_inner(gm, example_inputs, **arguments)


def settings() -> dict[str, Any]:
    """Return the settings of Inductor for streams; the second is part of what it knows compiled code by."""
    made: dict[str, Any] = {"max_fusion_size": MAX_FUSION_SIZE}
    choices = _choices()
    return made if choices is None else {**made, "inductor_choices_class": choices}


@contextlib.contextmanager
def for_streams() -> Iterator[None]:
    """Have Inductor choose warps for streams in code that it generates here, in this thread."""
    from torch._inductor.virtualized import V

    choices = _choices()
    with contextlib.nullcontext() if choices is None else V.set_choices_handler(choices()):
        yield


@functools.cache
def _choices() -> Any:
    """Return Inductor's choices with another number of warps; None where this torch makes them in another way."""
    try:
        from torch._inductor.choices import InductorChoices
        from torch._inductor.codegen.triton import FixedTritonConfig

        overwritten = InductorChoices.triton_kernel_kwargs
    except (ImportError, AttributeError) as error:
        log.warning("kernels keep Inductor's warps: torch %s has other internals (%s)", VERSION, error)
        return None

    class StreamChoices(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: Any) -> Any:
            given = overwritten(self, kernel_cls, features, groups, kernel_kwargs)
            warps = _warps(self, kernel_cls, features, groups)
            if warps is None or given.get("fixed_config") or given.get("mix_order_reduction"):
                return given
            fixed = FixedTritonConfig({"XBLOCK": 1, "num_warps": warps, "num_stages": 1})
            return {**given, "fixed_config": fixed}

        def uuid(self) -> str:
            return f"hc_transform {MANY_ACCESSES} {ROW_SIZES} {FEATURES_A_WARP} {MANY_OPERATIONS}"

    return StreamChoices


def _warps(choices: Any, kernel_cls: Any, features: Any, groups: Sequence[Any]) -> int | None:
    """Return the warps for a kernel that keeps rows of many tensors in registers, None for any other."""
    try:
        return _warps_of_rows(choices, kernel_cls, features, groups)
    except (AttributeError, TypeError) as error:
        log.warning("a kernel keeps Inductor's warps: torch %s has other internals (%s)", VERSION, error)
        return None


def _warps_of_rows(choices: Any, kernel_cls: Any, features: Any, groups: Sequence[Any]) -> int | None:
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    size = features.reduction_numel
    if (
        kernel_cls is not TritonKernel
        or any(getattr(config, name) for name in TUNED_BY_USER)
        or V.graph.get_current_device_or_throw().type != "cuda"
        or torch.version.hip is not None
        or not size.is_Integer
        or set(groups[0]) != {"x", "r0_"}
    ):
        return None
    row = 1 << (int(size) - 1).bit_length()
    if (
        not ROW_SIZES[0] <= row <= ROW_SIZES[1]
        or config.triton.force_cooperative_reductions
        or not choices.should_use_persistent_reduction(features, False)
        or features.get_reduction_hint() != ReductionHint.INNER
        or len(_in_memory(features.scheduler_nodes())) < MANY_ACCESSES
    ):
        return None
    more = 2 if len(features.scheduler_nodes()) > MANY_OPERATIONS else 1
    return more * row // FEATURES_A_WARP


def _in_memory(nodes: Sequence[Any]) -> set[str]:
    """Return the names of what a kernel of these nodes reads from memory or writes there."""
    inside = set(nodes)
    outputs = {output.get_name(): output for node in nodes for output in node.get_outputs()}
    read = {dep.name for node in nodes for dep in node.read_writes.reads if dep.name not in outputs}
    written = {name for name, output in outputs.items() if any(user.node not in inside for user in output.users)}
    return read | written
