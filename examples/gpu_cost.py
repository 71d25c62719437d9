"""Count what each connection costs a whole model on a GPU; none is needed.

A GPT of ``--depth`` blocks, or a ViT of timm with so many (``--model vit``), compiled forward and backward in bf16
by Inductor for an H100, plain and converted: launches (Triton kernels and library calls), bytes and saved
activations of each residual on top of the plain model's, everything counted: expansion, readouts, and what
crosses blocks. u is the bytes of one stream.

    python examples/gpu_cost.py --scope graph blocks --recompute
    python examples/gpu_cost.py --model vit --connections static dynamic mhc
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark_peers import ByHand, Transformer
from tabulate import tabulate
from torch import Tensor, nn

import hc_transform as hct
from hc_transform.cost import inductor_cost


def gpt(depth: int, batch: int) -> tuple[nn.Module, Callable[[int], Tensor], int]:
    """Return a GPT of 768 features, tokens for a batch of 1024 each, and the elements of one stream."""
    return Transformer(depth, 768, 12), lambda n: torch.randint(0, 256, (n, 1024)), batch * 1024 * 768


def vit(depth: int, batch: int) -> tuple[nn.Module, Callable[[int], Tensor], int]:
    """Return timm's ViT-S/16, images of 224 x 224, and the elements of one stream."""
    import timm

    model = timm.create_model("vit_small_patch16_224", depth=depth)
    return model, lambda n: torch.randn(n, 3, 224, 224).bfloat16(), batch * 197 * 384


CONNECTIONS = ["static", "identity", "dynamic", "kromhc", "mhc", "mhc-lite"]
MODELS = {"gpt": gpt, "vit": vit}


def row(name: str, model: nn.Module, x: Tensor, u: int) -> dict[str, Any]:
    """Return the figures of a training step of one model."""
    start = time.perf_counter()
    cost = inductor_cost(model.train(), x)
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return {
        "model": name,
        "launches forward": len(cost.forward.launches),
        "launches backward": len(cost.backward.launches),
        "u forward": cost.forward.bytes / u,
        "u backward": cost.backward.bytes / u,
        "u both": cost.bytes / u,
        "u saved": cost.saved_bytes / u,
    }


def per_residual(rows: Sequence[dict[str, Any]], residuals: int) -> list[list[Any]]:
    """Return the first row divided by the number of residuals, and what the others have on top of it."""
    plain, *others = rows
    keys = [key for key in plain if key != "model"]
    made = [["plain (absolute)", *(plain[key] / residuals for key in keys)]]
    return made + [[other["model"], *((other[key] - plain[key]) / residuals for key in keys)] for other in others]


def main() -> None:
    """Print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--connections", nargs="*", default=CONNECTIONS)
    parser.add_argument("--scope", nargs="*", choices=("graph", "blocks"), default=["graph"])
    parser.add_argument("--recompute", action="store_true", help="each connection with recompute=True too")
    parser.add_argument("--peers", nargs="*", default=[], help="HyperConnections, mHCv2: applied by hand to the GPT")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    plain, inputs, elements = MODELS[options.model](options.depth, options.batch)
    plain.bfloat16()
    x, u = inputs(options.batch), 2 * elements
    rows = [row("plain", plain, x, u)]
    for scope in options.scope:
        for connection in options.connections:
            for recompute in (False, True) if options.recompute else (False,):
                settings = {"connection": connection, "scope": scope, "recompute": recompute}
                model = hct.convert(plain, (inputs(2),), num_streams=options.streams, verify=False, **settings)
                rows.append(row(f"{connection}, {scope}{', recompute' if recompute else ''}", model, x, u))
    for peer in options.peers:
        rows.append(row(f"lucidrains {peer}", ByHand(plain, 768, options.streams, peer).bfloat16(), x, u))
    residuals = 2 * options.depth
    if options.json:
        json.dump({"residuals": residuals, "rows": rows}, sys.stdout, indent=1)
        return
    print(f"{options.model}, {options.depth} blocks, {residuals} residuals, n = {options.streams}\n")
    print(tabulate(per_residual(rows, residuals), headers=rows[0].keys(), floatfmt=".2f"))


if __name__ == "__main__":
    main()
