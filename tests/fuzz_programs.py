"""Random programs with residual streams: a seed gives Python source of nn.Modules, and inputs for them.

    python tests/fuzz_programs.py SEED      print the source

A line that ends in ``# residual`` adds a branch to what it was computed from; ``# residual in helper`` does so in
a function or module whose line ends in ``# helper``. What runs of these lines must be converted or listed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fuzz_parts import BRANCHES, FRAGMENTS, HEADER, NEEDS
from fuzz_stacks import Stacks
from fuzz_writer import Class, Knob


@dataclass(frozen=True)
class Program:
    """A random program.

    Attributes:
        source: Python code with a function ``make()`` that returns the model.
        layout: "flat" (B, D), "tokens" (B, T, D), "ids" (B, T) or "image" (B, C, H, W).
        knobs: attributes that code reads, with another value each.
        features: words for what is in it.
    """

    seed: int
    source: str
    layout: str
    knobs: tuple[Knob, ...]
    features: frozenset[str]

    def inputs(self, batch: int = 2, size: int = 0, mask: bool | None = None) -> tuple[Any, ...]:
        """Return inputs of another batch size, ``size`` steps longer; with a mask, where it takes one, if asked for."""
        generator = torch.Generator().manual_seed(self.seed + 7 * batch + size)
        length = 5 + size
        if self.layout == "flat":
            x = torch.randn(batch, 8, generator=generator)
        elif self.layout == "image":
            side = 8 + 4 * size
            x = torch.randn(batch, 3 if "image stem" in self.features else 8, side, side, generator=generator)
        elif self.layout == "ids":
            x = torch.randint(0, 16, (batch, length), generator=generator)
        else:
            x = torch.randn(batch, length, 8, generator=generator)
        if "two inputs" in self.features:
            return x, torch.randn(batch, length + 1, 8, generator=generator)
        if "mask" not in self.features or mask is False or (mask is None and "mask left out" in self.features):
            return (x,)
        kept = torch.ones(batch, length)
        kept[0, -1] = 0
        return x, kept

    def load(self, directory: str | Path) -> ModuleType:
        """Write the source to a file, import it and return the module; :func:`unload` forgets it."""
        name = f"fuzz_program_{self.seed}"
        path = Path(directory) / f"{name}.py"
        path.write_text(self.source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    def unload(self) -> None:
        """Forget the imported module."""
        sys.modules.pop(f"fuzz_program_{self.seed}", None)


def generate(seed: int) -> Program:
    """Return the program of a seed."""
    return _Models(seed).program()


class _Models(Stacks):
    """Writes whole models."""

    def program(self) -> Program:
        masked = self.layout == "tokens" and self.chance(0.25)
        if masked:
            self.feature("mask")
            if self.chance(0.5):
                self.feature("mask left out")
        if self.layout == "tokens" and not masked and self.chance(0.12):
            make = self.pair_model()
        elif self.chance(0.1) and not masked:
            make = self.sequential_model()
        else:
            make = self.model(masked)
        body = "\n\n\n".join([*self.classes, f"def make():\n    return {make}"]) + "\n"
        source = "\n\n".join([HEADER, *self.fragments(body), body])
        layout = "ids" if "ids" in self.features else self.layout
        return Program(self.seed, source, layout, tuple(self.knobs), frozenset(self.features))

    def fragments(self, body: str) -> list[str]:
        """Return the fragments that ``body`` needs."""
        used = {name for name in FRAGMENTS if re.search(rf"\b{name}\b", body)}
        for name in tuple(used):
            used.update(NEEDS.get(name, ()))
        return [FRAGMENTS[name] for name in FRAGMENTS if name in used]

    def transition(self, c: Class) -> None:
        """Write what lies between two stacks."""
        kind = self.pick("none", "project", "norm", "pool", "concatenate", "carried")
        self.feature(f"then {kind}")
        image, dense = self.layout == "image", self.layout != "image"
        if kind == "project":
            c.body.append(f"x = {c.own('down', 'Downsample()' if image else 'nn.Linear(D, D)')}(x)")
        elif kind == "norm":
            c.body.append(f"x = {c.own('norm', self.norm())}(x)")
        elif kind == "pool" and self.layout != "flat":
            c.body.append(
                "x = F.avg_pool2d(x, 2)" if image else self.pick("x = x[:, :4]", "x = x - x.mean(1, keepdim=True)")
            )
            if "[:, :4]" in c.body[-1] and c.masked:
                c.body.append("mask = mask[:, :4] if mask is not None else None")
        elif kind == "concatenate":
            merge = c.own("merge", "nn.Linear(2 * D, D)" if dense else "nn.Conv2d(2 * D, D, 1)")
            c.body.append(f"x = {merge}(torch.cat([x, x * 0.5], {1 if image else -1}))")
        elif kind == "carried":
            self.carried(c)

    def outputs(self, c: Class) -> None:
        """Write the head and what is returned."""
        if self.layout == "image" and self.chance(0.6):
            c.body.append(f"x = {c.own('head', 'nn.Linear(D, 3)')}(x.mean((2, 3)))")
        elif self.layout != "image" and self.chance(0.6):
            c.body.append(f"x = {c.own('head', 'nn.Linear(D, 3)')}({c.own('norm', self.norm())}(x))")
        kind = self.pick("tensor", "tensor", "tuple", "dict", "dataclass", "named", "namespace", "list")
        self.feature(f"returns {kind}")
        c.body.append(
            {
                "tensor": "return x",
                "tuple": "return x, taps",
                "dict": 'return {"value": x, "taps": taps, "size": 3}',
                "dataclass": "return Output(x, taps)",
                "named": "return Named(x, taps)",
                "namespace": "return types.SimpleNamespace(value=x, taps=taps, none=None)",
                "list": "return [x, {'taps': tuple(taps)}]",
            }[kind]
        )

    def model(self, masked: bool) -> str:
        """Write the class of a model; return code that makes it."""
        c = Class("Model", masked=masked)
        c.body.append("taps = []")
        if self.layout == "tokens" and self.chance(0.3):
            self.feature("ids")
            c.body.append(f"x = {c.own('embed', 'nn.Embedding(16, D)')}(x)")
            if self.chance(0.5):
                c.body.append(f"x = x + {c.own('pos', 'nn.Parameter(torch.randn(1, 12, D))')}[:, : x.shape[1]]")
        elif self.layout == "image" and self.chance(0.5):
            self.feature("image stem")
            c.body.append(f"x = {c.own('stem', 'nn.Conv2d(3, D, 3, padding=1)')}(x)")
        elif self.chance(0.6):
            c.body.append(f"x = {c.own('stem', self.pick(*BRANCHES[self.layout][:2]))}(x)")
        self.stack(c, masked)
        if self.chance(0.35):
            self.transition(c)
            self.stack(c, masked)
        if self.chance(0.15):
            self.residual(c)
            self.feature("residual in the root")
        if self.chance(0.15):
            c.own("unused", self.mixing())
            self.feature("unused")
        self.outputs(c)
        signature = "x, mask=None" if masked else "x"
        if self.chance(0.15):
            self.feature("method of the root")
            c.methods.append("\n".join([f"def encode(self, {signature}):", *(f"    {line}" for line in c.body)]))
            c.body = [f"return self.encode({'x, mask' if masked else 'x'})"]
        self.classes.append(c.source(signature))
        return "Model()"

    def sequential_model(self) -> str:
        """Write nothing but blocks; the model is a Sequential of them."""
        self.feature("root is a Sequential")
        made = [f"{self.block(False).name}()" for _ in range(2)]
        stem = self.pick(*BRANCHES[self.layout][:2])
        return f"nn.Sequential({', '.join([stem, *made, made[0]])})"

    def pair_model(self) -> str:
        """Write a model of two streams that read each other."""
        self.features |= {"two inputs", "streams read each other"}
        layer = Class("Layer")
        direct, helped = ("{v} = {v} + {y}", "{v} = {y} + {v}"), "{v} = add({v}, {y})"
        for v, other in (("x", "z"), ("z", "x")):
            f, g = layer.own("f", "nn.Linear(D, D)"), layer.own("g", "Gated()")
            for y in (f"{f}({v} + {other}.mean(1, keepdim=True))", f"{g}({v})")[: self.pick(1, 2)]:
                spelled = self.pick(*direct, helped)
                mark = "  # residual in helper" if spelled is helped else "  # residual"
                layer.body.append(spelled.format(v=v, y=y) + mark)
            if self.chance(0.2):
                layer.body.append(f"{v} = {layer.own('norm', self.norm())}({v})")
        layer.body.append("return x, z")
        self.classes.append(layer.source("x, z"))
        c = Class("Model")
        layers = c.own("layers", "nn.ModuleList([Layer(), Layer()])")
        end = self.pick("return x, z", "return x + z.mean(1, keepdim=True)")
        c.body += [f"for layer in {layers}:", "    x, z = layer(x, z)", end]
        self.classes.append(c.source("x, z"))
        return "Model()"


if __name__ == "__main__":
    program = generate(int(sys.argv[1]))
    print(program.source)
    print("#", program.layout, ", ".join(sorted(program.features)))
    print("#", program.knobs)
    with tempfile.TemporaryDirectory() as directory:
        model = program.load(directory).make().eval()
        model(*program.inputs())
