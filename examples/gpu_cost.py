"""Count what each connection costs a whole model on a GPU; none is needed.

A GPT of ``--depth`` blocks, or a ViT-S/16 (``--model vit``), compiled forward and backward in bf16
by Inductor for an H100, plain and converted: launches (Triton kernels and library calls), bytes and saved
activations of each residual on top of the plain model's, everything counted: expansion, readouts, and what
crosses blocks. u is the bytes of one stream. ``--registers``: what the assembler says of the kernels, too.

    python examples/gpu_cost.py --scope graph blocks --recompute
    python examples/gpu_cost.py --model vit --connections static dynamic mhc
    python examples/gpu_cost.py --depth 2 --registers --tuned
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark_peers import MODELS, ByHand, example
from tabulate import tabulate
from torch import Tensor, nn

import hc_transform as hct
from hc_transform.measuring.cost import Cost, inductor_cost, regional_cost
from hc_transform.measuring.registers import registers_of

CONNECTIONS = ["static", "identity", "dynamic", "kromhc", "mhc", "mhc-lite"]
DIMS = {"gpt": 768, "vit": 384}


def counted(name: str, count: Callable[..., Cost], model: nn.Module, x: Tensor) -> Cost:
    """Return the cost of a training step of one model."""
    start = time.perf_counter()
    cost = count(model.train(), x)
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return cost


def row(name: str, cost: Cost, u: int) -> dict[str, Any]:
    """Return the figures of one model."""
    return {
        "model": name,
        "launches forward": len(cost.forward.launches),
        "launches backward": len(cost.backward.launches),
        "u forward": cost.forward.bytes / u,
        "u backward": cost.backward.bytes / u,
        "u both": cost.bytes / u,
        "u saved": cost.saved_bytes / u,
    }


def register_row(name: str, cost: Cost) -> dict[str, Any]:
    """Return what the assembler says of the Triton kernels of one model, as Inductor launches them and with 4 warps."""
    made: dict[str, Any] = {"model": name}
    for how, warps in (("", None), (", 4 warps", 4)):
        found = [kernel for graph in (cost.forward, cost.backward) for kernel in registers_of(graph, warps)]
        made[f"launches tried{how}"] = len(found)  # Inductor may try a kernel with several block sizes
        made[f"spill{how}"] = sum(kernel.spilled_bytes > 0 for kernel in found)
        made[f"most bytes a thread{how}"] = max(kernel.spilled_bytes for kernel in found)
        made[f"most registers{how}"] = max(kernel.registers for kernel in found)
    return made


def per_residual(rows: Sequence[dict[str, Any]], residuals: int) -> list[list[Any]]:
    """Return the first row divided by the number of residuals, and what the others have on top of it."""
    plain, *others = rows
    keys = [key for key in plain if key != "model"]
    made = [["plain (absolute)", *(plain[key] / residuals for key in keys)]]
    return made + [[other["model"], *((other[key] - plain[key]) / residuals for key in keys)] for other in others]


def main() -> None:
    """Print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=DIMS, default="gpt")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--connections", nargs="*", default=CONNECTIONS)
    parser.add_argument("--scope", nargs="*", choices=("graph", "blocks"), default=["graph"])
    parser.add_argument("--recompute", action="store_true", help="each connection with recompute=True too")
    parser.add_argument("--regions", action="store_true", help="each graph compiled in regions too")
    parser.add_argument("--tuned", action="store_true", help="graphs compiled by hct.inductor")
    parser.add_argument("--registers", action="store_true", help="assemble the Triton kernels")
    parser.add_argument("--peers", nargs="*", default=[], help="HyperConnections, mHCv2: applied by hand")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    dim = DIMS[options.model]
    plain = MODELS[options.model](options.depth, dim, dim // 64).bfloat16()
    x = example(options.model, options.batch, 1024)
    x = x.bfloat16() if x.is_floating_point() else x
    u = 2 * options.batch * dim * (1024 if options.model == "gpt" else 196)
    costs = {"plain": counted("plain", inductor_cost, plain, x)}
    for scope in options.scope:
        for connection in options.connections:
            for recompute in (False, True) if options.recompute else (False,):
                settings = {"connection": connection, "scope": scope, "recompute": recompute}
                model = hct.convert(plain, (x[:1],), num_streams=options.streams, verify=False, **settings)
                name = f"{connection}, {scope}{', recompute' if recompute else ''}"
                costs[name] = counted(name, functools.partial(inductor_cost, tuned=options.tuned), model, x)
                if options.regions and scope == "graph":
                    costs[f"{name}, regions"] = counted(f"{name}, regions", regional_cost, model, x)
    for peer in options.peers:
        model = ByHand(plain, dim, options.streams, peer).bfloat16()
        costs[f"lucidrains {peer}"] = counted(f"lucidrains {peer}", inductor_cost, model, x)
    residuals = 2 * options.depth
    rows = [row(name, cost, u) for name, cost in costs.items()]
    registers = [register_row(name, cost) for name, cost in costs.items()] if options.registers else []
    if options.json:
        json.dump({"residuals": residuals, "rows": rows, "registers": registers}, sys.stdout, indent=1)
        return
    print(f"{options.model}, {options.depth} blocks, {residuals} residuals, n = {options.streams}\n")
    print(tabulate(per_residual(rows, residuals), headers=rows[0].keys(), floatfmt=".2f"))
    if registers:
        print(f"\n{tabulate(registers, headers='keys')}")


if __name__ == "__main__":
    main()
