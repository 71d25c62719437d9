"""Time and count a transformer: plain, converted, and with lucidrains' hyper-connections applied by hand.

The same pre-norm blocks in each: two residuals a block, attention and MLP. ``HyperConnections`` and ``mHCv2``
of the ``hyper-connections`` package wrap the branches of the plain model one by one.

    python examples/benchmark_peers.py                              # a GPT of 6 blocks
    python examples/benchmark_peers.py --model vit --batch 4        # a ViT-S/16 of 12 blocks
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hc_transform as hct
from hc_transform.measuring.bench import bench, table
from hc_transform.measuring.cost import H100_BANDWIDTH


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.heads, self.causal = nn.RMSNorm(dim), heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Patches(nn.Module):
    """Patches of 16 x 16 pixels of images of 224 x 224, with positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project, self.positions = nn.Conv2d(3, dim, 16, 16), nn.Parameter(torch.zeros(196, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2) + self.positions


class Transformer(nn.Module):
    """Residual blocks between an embedding and a head."""

    def __init__(self, depth: int, dim: int, heads: int, embed: nn.Module, outputs: int, causal: bool) -> None:
        super().__init__()
        self.embed = embed
        self.branches = nn.ModuleList(m for _ in range(depth) for m in (Attention(dim, heads, causal), MLP(dim)))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(self.norm(x))


def gpt(depth: int, dim: int, heads: int) -> Transformer:
    """Return a language model of bytes."""
    return Transformer(depth, dim, heads, nn.Embedding(256, dim), 256, causal=True)


def vit(depth: int, dim: int, heads: int) -> Transformer:
    """Return a classifier of images of 224 x 224, its classes read from every patch."""
    return Transformer(depth, dim, heads, Patches(dim), 1000, causal=False)


MODELS = {"gpt": gpt, "vit": vit}


def example(model: str, batch: int, length: int) -> Tensor:
    """Return what a model of ``MODELS`` takes: tokens, or images."""
    return torch.randint(0, 256, (batch, length)) if model == "gpt" else torch.randn(batch, 3, 224, 224)


class ByHand(nn.Module):
    """The same with lucidrains' layers around the branches."""

    def __init__(self, plain: Transformer, dim: int, streams: int, kind: str) -> None:
        super().__init__()
        if kind == "mHCv2":
            from hyper_connections.mHCv2 import get_expand_reduce_stream_functions, mHC

            layer = mHC
        else:
            from hyper_connections import HyperConnections, get_expand_reduce_stream_functions

            layer = HyperConnections
        self.expand, self.reduce = get_expand_reduce_stream_functions(streams)
        self.embed, self.norm, self.head = plain.embed, plain.norm, plain.head
        self.layers = nn.ModuleList(
            layer(streams, dim=dim, branch=branch, layer_index=i) for i, branch in enumerate(plain.branches)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(self.reduce(x)))


def main() -> None:
    """Print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt")
    for name in ("depth", "dim", "heads"):
        parser.add_argument(f"--{name}", type=int, help="6, 256 and 4 of the GPT, 12, 384 and 6 of the ViT")
    for name, default in (("length", 256), ("batch", 8), ("streams", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--connections", nargs="*", default=["static", "dynamic", "mhc"])
    parser.add_argument("--peers", nargs="*", default=["HyperConnections", "mHCv2"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--regions", action="store_true", help="compile converted models in regions")
    parser.add_argument("--no-count", dest="count", action="store_false", help="leave out kernels and bytes")
    parser.add_argument("--bandwidth", type=float, default=H100_BANDWIDTH / 1e12, help="of the GPU, in TB/s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (6, 256, 4) if options.model == "gpt" else (12, 384, 6)
    depth, dim, heads = (getattr(options, k) or size for k, size in zip(("depth", "dim", "heads"), sizes, strict=True))
    dtype = getattr(torch, options.dtype)
    plain = MODELS[options.model](depth, dim, heads).to(device, dtype)
    x = example(options.model, options.batch, options.length)
    x = x.to(device, dtype if x.is_floating_point() else x.dtype)
    models: dict[str, nn.Module] = {"plain": plain}
    for name in options.connections:
        models[name] = hct.convert(plain, (x,), connection=name, num_streams=options.streams, verify=False)
    for name in options.peers:
        peer = ByHand(plain, dim, options.streams, name)
        models[f"lucidrains {name}"] = peer.to(device, dtype)
    figures = bench(
        models,
        (x,),
        mode=options.mode,
        repeats=options.repeats,
        compiled=options.compile,
        count=options.count,
        regions=options.regions,
    )
    if options.json:
        json.dump({name: f.to_dict() for name, f in figures.items()}, sys.stdout, indent=1)
        return
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.model}, {depth} blocks, {dim} features, input {tuple(x.shape)}, {where}\n")
    print(table(figures, options.bandwidth * 1e12))


if __name__ == "__main__":
    main()
