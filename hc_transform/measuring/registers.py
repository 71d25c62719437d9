"""Registers and spills of compiled kernels on an NVIDIA H100, from its assembler; none is needed, and nothing runs.

Bytes (:mod:`hc_transform.measuring.cost`) are not all of a kernel's time: one that keeps more values than a thread
has registers writes some of them to memory and reads them back.
"""

from __future__ import annotations

import ast
import copy
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from .cost import GraphCost
from .h100 import believed


@dataclass(frozen=True)
class Registers:
    """What one kernel takes of an H100, launched with ``warps`` warps a block.

    Attributes:
        kernel: its name in the code.
        warps: of 32 threads, in each block.
        registers: of each thread, 255 at most.
        spilled_bytes: that each thread writes for want of registers and reads back.
    """

    kernel: str
    warps: int
    registers: int
    spilled_bytes: int


def registers_of(graph: GraphCost, warps: int | None = None) -> list[Registers]:
    """Return the registers of each different Triton kernel of a graph.

    Args:
        graph: ``inductor_cost(...).forward``, or ``backward``.
        warps: of a block; None for what Inductor takes, each where it would try several.

    >>> import torch
    >>> from hc_transform.measuring.cost import inductor_cost
    >>> (kernel,) = registers_of(inductor_cost(lambda x: x + 1, torch.zeros(1024), training=False).forward, warps=4)
    >>> kernel.registers < 64, kernel.spilled_bytes
    (True, 0)
    """
    import triton
    from torch._inductor.codecache import PyCodeCache

    found = []
    compiled: list[Any] = []
    compile_kernel = triton.compile

    def kept(*args: Any, **kwargs: Any) -> Any:
        compiled.append(compile_kernel(*args, **kwargs))
        return compiled[-1]

    with believed(), mock.patch.object(triton, "compile", kept):
        for name, source in dict.fromkeys(_kernels(graph.code)):
            kernel = getattr(PyCodeCache.load(source), name)
            configs = kernel.configs
            if warps is not None:
                configs = [copy.deepcopy(configs[0])]
                configs[0].num_warps = warps
            for config in configs:
                kernel._precompile_config(config)
                found.append(Registers(name, config.num_warps, *assembled(compiled[-1].asm["ptx"])))
    return found


def assembled(ptx: str) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills, as ``ptxas`` says of a kernel for ``sm_90a``."""
    import triton

    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", os.devnull, "-"]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas reports its figures in a form that is not known here: {said!r}")
    return int(registers[1]), int(spilled[1])


def _kernels(code: str) -> Iterator[tuple[str, str]]:
    """Yield name and source of each Triton kernel that code by Inductor defines."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
            name, source = (ast.literal_eval(argument) for argument in node.args[:2])
            yield name, source
