"""Random programs with residual streams: a seed gives Python source of nn.Modules, and inputs for them.

    python tests/fuzz_programs.py SEED      print the source

A line that ends in ``# residual`` adds a branch to what it was computed from; ``# residual in helper`` does so in
a function or module whose line ends in ``# helper``. What runs of these lines must be converted or listed.
"""

from __future__ import annotations

import importlib.util
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fuzz_parts import ACTIVATIONS, BRANCHES, FRAGMENTS, HEADER, NEEDS, NORMS, SPELLINGS

Knob = tuple[str, str, Any]  # class, attribute (dotted), another value; class "" is the program's module


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
    return _Writer(seed).program()


@dataclass
class _Class:
    """A class that is being written."""

    name: str
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    masked: bool = False
    result: str = "tensor"

    def own(self, stem: str, value: str) -> str:
        """Store a value under a new name and return the expression that reads it."""
        name = next(n for n in (stem, *(f"{stem}_{i}" for i in range(1, 99))) if n not in self.names)
        self.names.add(name)
        self.init.append(f"self.{name} = {value}")
        return f"self.{name}"

    def source(self, signature: str, base: str = "nn.Module") -> str:
        """Return the code of the class."""
        lines = [f"class {self.name}({base}):", *(f"    {line}" for line in self.fields)]
        lines += ["    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in self.init)]
        lines += ["", f"    def forward(self, {signature}):", *(f"        {line}" for line in self.body)]
        for method in self.methods:
            lines += ["", *(f"    {line}" if line else "" for line in method.split("\n"))]
        return "\n".join(lines)


class _Writer:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.layout = self.random.choice(["flat", "tokens", "tokens", "image"])
        self.classes: list[str] = []
        self.knobs: list[Knob] = []
        self.features: set[str] = set()
        self.number = 0

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def feature(self, name: str) -> None:
        self.features.add(name)

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

    # ------------------------------------------------------------ parts of an expression

    def mixing(self) -> str:
        """Return code that makes a module for a branch."""
        made: str = self.pick(*BRANCHES[self.layout])
        if "Inner" in made:
            self.feature("nested")
        if "BatchNorm" in made or "ConvBN" in made:
            self.feature("batch norm")
        return made

    def norm(self) -> str:
        made: str = self.pick(*NORMS[self.layout])
        if "BatchNorm" in made:
            self.feature("batch norm")
        return made

    def gamma(self, c: _Class, start: float = 0.5) -> str:
        shape = "(D, 1, 1)" if self.layout == "image" else "(D,)"
        return c.own("gamma", f"nn.Parameter(torch.full({shape}, {start}))")

    def knob(self, c: _Class, attribute: str, value: Any) -> None:
        self.knobs.append((c.name, attribute, value))

    def probability(self, c: _Class) -> str:
        p = c.own("p", str(self.pick(0.1, 0.5)))
        self.knob(c, p[5:], 0.0)
        return p

    def scale(self, c: _Class) -> str:
        """Return an expression for a number that the code reads somewhere."""
        kind = self.pick("attribute", "config", "dict", "class", "global", "tuple")
        if kind == "attribute":
            name = c.own("scale", "0.75")
            self.knob(c, name[5:], 0.25)
            return name
        if kind == "config":
            name = c.own("config", "Config()")
            self.knob(c, f"{name[5:]}.scale", 0.125)
            return f"{name}.scale"
        if kind == "dict":
            name = c.own("settings", '{"scale": 0.5, "other": None}')
            self.knob(c, f"{name[5:]}[scale]", 0.125)
            return f'{name}["scale"]'
        if kind == "class":
            if "factor = 0.5" not in c.fields:
                c.fields.append("factor = 0.5")
                self.knob(c, "factor", 0.25)
            return "self.factor"
        if kind == "global":
            if ("", "SCALE", 0.25) not in self.knobs:
                self.knobs.append(("", "SCALE", 0.25))
            return "SCALE"
        return c.own("scales", "(0.5, 0.25)") + "[0]"

    def branch(self, c: _Class, x: str = "x") -> str:
        """Return an expression for a branch's output."""
        made = self.mixing()
        f = c.own(self.pick("f", "attn", "mlp", "ff", "proj"), made)
        if made == "Attention()" and c.masked:
            return f"{f}({x}, mask)"
        if self.chance(0.4):
            x = f"{c.own('norm', self.norm())}({x})"
        kind = self.pick(*["plain"] * 6, "scale", "dropout", "module dropout", "gamma", "gate", "method", "cast", "act")
        y = f"{f}({x})"
        if kind == "scale":
            return f"{self.scale(c)} * {y}"
        if kind == "dropout":
            return f"F.dropout({y}, {self.probability(c)}, self.training)"
        if kind == "module dropout":
            return f"{c.own('drop', 'nn.Dropout(0.2)')}({y})"
        if kind == "gamma":
            return f"{self.gamma(c)} * {y}"
        if kind == "gate":
            return f"torch.sigmoid({c.own('gate', self.mixing())}({x})) * {y}"
        if kind == "method":
            self.feature("method")
            method = f"_branch_{len(c.methods)}"
            c.methods.append(f"def {method}(self, h):\n    h = {f}(h)\n    return h * {self.scale(c)}")
            return f"self.{method}({x})"
        if kind == "cast":
            self.feature("cast")
            return f"{y}.float().to(x.dtype)"
        if kind == "act":
            return f"F.silu({y})"
        return y

    def spelled(self, c: _Class, y: str) -> list[str]:
        """Return the statements of one residual."""
        if self.chance(0.05):
            return [f"x = {c.own('add', 'Add()')}(x, {y})  # residual in helper"]
        if self.chance(0.05):
            return [f"x = x * {self.gamma(c, 0.9)} + {y}  # residual"]
        if self.chance(0.05):
            return [f"x = F.dropout(x, {self.probability(c)}, self.training) + {y}  # residual"]
        (spelling,) = self.random.choices(SPELLINGS, [s.weight for s in SPELLINGS])
        if spelling.overwrites and self.chance(0.7):
            y = re.sub(r"\(x\)", "(x.clone())", y, count=1)
        lines = spelling.code.replace("{y}", y).split("\n")
        at = next((i for i, line in enumerate(lines) if "+=" in line or "add_(" in line), len(lines) - 1)
        if spelling.overwrites:
            self.feature("overwrites x")
        lines[at] += "  # residual in helper" if spelling.helper else "  # residual"
        return lines

    # ------------------------------------------------------------ statements

    def residual(self, c: _Class) -> None:
        c.body += self.spelled(c, self.branch(c))

    def two_on_a_line(self, c: _Class) -> None:
        self.feature("two on a line")
        a, b = self.branch(c), self.branch(c)
        if self.chance(0.5):
            c.body.append(f"x = x + {a}; x = x + {b}  # residual 2")
        else:
            c.body.append(f"x = add(add(x, {a}), {b.replace('mask)', 'None)')})  # residual in helper")

    def parallel(self, c: _Class) -> None:
        self.feature("parallel")
        c.body.append(f"h = {c.own('norm', self.norm())}(x)")
        a, b = (f"{c.own(stem, self.mixing())}(h)" for stem in ("attn", "mlp"))
        c.body.append(self.pick(f"x = x + {a} + {b}", f"x = x + ({a} + {b})", f"x = {a} + {b} + x") + "  # residual")

    def post_norm(self, c: _Class) -> None:
        self.feature("post norm")
        y = self.branch(c)
        c.body.append(f"x = {c.own('norm', self.norm())}(x + {y})  # residual")

    def chosen(self, c: _Class) -> None:
        """Write the same residual into both ways of an ``if``."""
        f = c.own("f", self.mixing())
        condition = self.condition(c)
        other = self.pick(f"x = x + 0.5 * {f}(x)", f"x = x - {f}(x)", f"x = {f}(x) + x", f"x = torch.tanh(x) + {f}(x)")
        mark = "" if "tanh" in other else "  # residual"
        c.body += [f"if {condition}:", f"    x = x + {f}(x)  # residual", "else:", f"    {other}{mark}"]

    def condition(self, c: _Class) -> str:
        kinds = ["flag", "flag", "string", "enum", "config", "shape", "training", "number"]
        kind = self.pick(*kinds, *(["value"] if self.chance(0.4) else ()), *(["mask"] * 2 if c.masked else ()))
        self.feature(f"decides on {kind}")
        if kind == "flag":
            name = c.own("flag", "True")
            self.knob(c, name[5:], False)
            return name
        if kind == "string":
            name = c.own("act", '"gelu"')
            self.knob(c, name[5:], "relu")
            return f'{name} == "gelu"'
        if kind == "enum":
            name = c.own("mode", "Mode.SOFT")
            return f"{name} is Mode.SOFT"
        if kind == "config":
            name = c.own("config", "Config()")
            self.knob(c, f"{name[5:]}.double", False)
            return f"{name}.double"
        if kind == "number":
            name = c.own("depth", "3")
            self.knob(c, name[5:], 1)
            return f"{name} > 2"
        if kind == "mask":
            return "mask is not None"
        if kind == "value":
            return self.pick("x.mean() > 0", "x.abs().max().item() > 1.0", "bool((x > 0).any())")
        if kind == "shape":
            return {"flat": "x.shape[0] > 2", "tokens": "x.shape[1] % 2", "image": "x.shape[-1] > 8"}[self.layout]
        return self.pick("self.training", "not self.training")

    def branch_changed(self, c: _Class) -> None:
        """Decide on something inside the branch."""
        c.body += [f"y = {self.branch(c)}", f"if {self.condition(c)}:"]
        c.body.append("    " + self.pick("y = F.gelu(y)", "y = y * 0.5", "y = y + 1", "y = y.relu_()"))
        c.body.append("x = x + y  # residual")

    def draw(self) -> str:
        kind = self.pick("random.random()", "np.random.rand()", "torch.rand(1).item()", "random.uniform(0, 1)")
        self.feature("draws")
        return kind  # type: ignore[no-any-return]

    def dropped(self, c: _Class) -> None:
        """Leave a branch out by a draw while training."""
        y, p = self.branch(c), self.probability(c)
        if self.chance(0.5):
            c.body += [f"if not self.training or {self.draw()} >= {p}:", f"    x = x + {y}  # residual"]
        else:
            c.body += [f"y = {y}", f"if self.training and {self.draw()} < {p}:", "    y = y * 0.0"]
            c.body.append("x = x + y  # residual")

    def stochastic_depth(self, c: _Class) -> None:
        """Drop samples of a branch, as timm's DropPath does."""
        ones = {"flat": "(x.shape[0], 1)", "tokens": "(x.shape[0], 1, 1)", "image": "(x.shape[0], 1, 1, 1)"}
        self.feature("drop path")
        c.body += [f"y = {self.branch(c)}", f"if self.training and {self.probability(c)} > 0:"]
        c.body.append(f"    y = y * x.new_empty({ones[self.layout]}).bernoulli_(0.7) / 0.7")
        c.body.append("x = x + y  # residual")

    def carried(self, c: _Class) -> None:
        """Put an operation between residuals."""
        kind = self.pick("scale", "dropout", "norm", "activation", "reshape", "permute", "in place", "gamma")
        self.feature(f"carries {kind}")
        if kind == "scale":
            c.body.append(f"x = x * {self.scale(c)}")
        elif kind == "dropout":
            c.body.append(f"x = F.dropout(x, {self.probability(c)}, training=self.training)")
        elif kind == "norm":
            c.body.append(f"x = {c.own('norm', self.norm())}(x)")
        elif kind == "activation":
            c.body.append(f"x = {self.pick(*ACTIVATIONS)}")
        elif kind == "gamma":
            c.body.append(f"x = x * {self.gamma(c)}")
        elif kind == "in place":
            c.body.append(self.pick("x = x * 1.0; x.mul_(0.9)", "x = x + 0.1; x.relu_()", "x = F.relu(x - 0.1, True)"))
        elif self.layout == "tokens" and kind == "permute":
            conv = c.own("conv", "nn.Conv1d(D, D, 3, padding=1)")
            c.body += ["x = x.transpose(1, 2)", f"x = x + {conv}(x)  # residual", "x = x.transpose(1, 2)"]
        elif self.layout == "tokens":
            f = c.own("f", "nn.Linear(D, D)")
            c.body += ["B, T, C = x.shape", "x = x.reshape(B * T, C)", f"x = x + {f}(x)  # residual"]
            c.body.append("x = x.view(B, T, C)")
        elif self.layout == "image":
            f = c.own("f", "nn.Linear(D, D)")
            c.body += ["x = x.permute(0, 2, 3, 1)", f"x = x + {f}(x)  # residual", "x = x.permute(0, 3, 1, 2)"]
        else:
            c.body.append("x = x.view(x.shape[0], 2, 4).flatten(1)")

    def counted(self, c: _Class) -> None:
        """Count calls, in a buffer or in a plain number."""
        y = self.branch(c)
        if self.chance(0.6):
            self.feature("counts in a buffer")
            c.init.append('self.register_buffer("calls", torch.zeros(()))')
            c.body.append(self.pick("self.calls += 1", "self.calls.add_(1)", "self.calls = self.calls + 1"))
        else:
            self.feature("counts in a number")
            c.init.append("self.calls = 0")
            c.body.append("self.calls += 1")
        used = self.pick("", " * (1 + 0.1 * self.calls)", " * (0.5 if self.calls > 2 else 1.0)")
        c.body.append(f"x = x + {y}{used}  # residual")

    def running(self, c: _Class) -> None:
        """Keep a running mean in a buffer while training."""
        self.feature("running mean")
        c.init.append('self.register_buffer("mean", torch.zeros(()))')
        c.body += ["if self.training:", "    self.mean.mul_(0.9).add_(0.1 * x.detach().mean())"]
        c.body.append(f"x = x + {self.branch(c)} * (1 + self.mean)  # residual")

    def wrapped(self, c: _Class) -> None:
        """Write a residual around several others."""
        self.feature("residual around")
        c.body.append("outer = x")
        for _ in range(2):
            c.body.append(f"x = x + {self.branch(c)}  # residual")
        c.body.append(self.pick("x = outer + x", "x = x + 0.5 * outer", "x = outer + 0.2 * x") + "  # residual")

    def unrolled(self, c: _Class) -> None:
        """Loop over branches, adding in one line."""
        self.feature("loop of branches")
        fs = c.own("fs", f"nn.ModuleList([{', '.join(self.mixing() for _ in range(2))}])")
        kind = self.pick("plain", "enumerate", "norms", "range")
        if kind == "plain":
            c.body += [f"for f in {fs}:", "    x = x + f(x)  # residual"]
        elif kind == "enumerate":
            c.body += [f"for i, f in enumerate({fs}):", "    x = f(x) / (i + 1) + x  # residual"]
        elif kind == "norms":
            norms = c.own("norms", f"nn.ModuleList([{self.norm()}, {self.norm()}])")
            c.body += [f"for norm, f in zip({norms}, {fs}):", "    x = x + f(norm(x))  # residual"]
        else:
            c.body += [f"for i in range(len({fs})):", f"    x = torch.add(x, {fs}[i](x))  # residual"]

    def early(self, c: _Class) -> None:
        """Return early by a draw while training."""
        c.body += [f"if self.training and {self.draw()} < {self.probability(c)}:", f"    return {self.returned(c)}"]

    # ------------------------------------------------------------ classes

    def returned(self, c: _Class) -> str:
        return {"tensor": "x", "tuple": "x, None", "dict": '{"x": x}', "list": "[x]"}[c.result]

    def block(self, masked: bool, result: str = "tensor") -> _Class:
        """Write a class with one to three statements, at least one of them a residual."""
        self.number += 1
        c = _Class(f"Block{self.number}", masked=masked, result=result)
        if self.chance(0.08):
            self.early(c)
        statements: dict[Callable[[_Class], None], int] = {
            self.residual: 14,
            self.two_on_a_line: 2,
            self.parallel: 2,
            self.post_norm: 2,
            self.chosen: 2,
            self.branch_changed: 2,
            self.dropped: 1,
            self.stochastic_depth: 1,
            self.counted: 1,
            self.running: 1,
            self.wrapped: 1,
            self.unrolled: 2,
        }
        counted = False
        for i in range(self.pick(1, 1, 2, 2, 3)):
            (statement,) = self.random.choices(list(statements), list(statements.values()))
            if statement in (self.counted, self.running):
                statement, counted = (self.residual if counted else statement), True
            statement(c)
            if self.chance(0.2):
                self.carried(c)
        signature = "x, mask=None" if masked else "x"
        if self.chance(0.1):
            self.feature("method does the work")
            c.methods.append("\n".join([f"def work(self, {signature}):", *(f"    {line}" for line in c.body), "    return x"]))
            if any("return" in line for line in c.body):
                c.body, c.methods = [*c.body, f"return {self.returned(c)}"], c.methods[:-1]
            else:
                c.body = [f"x = self.work({'x, mask' if masked else 'x'})", f"return {self.returned(c)}"]
        else:
            c.body.append(f"return {self.returned(c)}")
        base = "nn.Module"
        self.classes.append(c.source(signature, base))
        return c

    def call(self, c: _Class, layer: str) -> list[str]:
        """Return the statements that call a block."""
        args = "x, mask" if c.masked else "x"
        if c.masked and self.chance(0.3):
            args = "x, mask=mask"
        called = f"{layer}({args})"
        if c.result == "tensor":
            return [f"x = {called}"]
        if c.result == "dict":
            return [f'x = {called}["x"]']
        if c.result == "list":
            return [f"(x,) = {called}"]
        return self.pick([f"x, _ = {called}"], [f"x = {called}[0]"], [f"out = {called}", "x = out[0]"])  # type: ignore[no-any-return]

    def stack(self, c: _Class, masked: bool) -> None:
        """Write a stack of blocks into a model."""
        result = self.pick("tensor", "tensor", "tensor", "tensor", "tuple", "dict", "list")
        kinds = ["list", "list", "list", "dict", "reversed", "range", "attributes", "shared", "taps", "collide", "mixed in"]
        if not masked and result == "tensor":
            kinds += ["sequential", "sequential", "around", "stage"]
        kind = self.pick(*kinds)
        self.feature(f"stack {kind}")
        block, depth = self.block(masked, result), self.pick(2, 2, 3)
        made = f"{block.name}()"
        if kind in ("list", "taps", "reversed", "range", "mixed in"):
            mixed = self.chance(0.2)
            other = self.block(masked, result).name + "()" if mixed else made
            layers = c.own(self.pick("layers", "blocks", "h"), f"nn.ModuleList([{', '.join([made, other, made][:depth])}])")
            if not mixed and self.chance(0.1):
                self.feature("tied")
                c.init.append(f"tie({layers})")
            body = self.call(block, "layer")
            head = f"for layer in {layers}:"
            if kind == "taps":
                body.append(self.pick("taps.append(x)", "taps = [*taps, x]", "taps.append(x.mean(-1))"))
            elif kind == "reversed":
                head = f"for layer in {self.pick(f'reversed({layers})', f'{layers}[::-1]')}:"
            elif kind == "range":
                head, body = f"for i in range(len({layers})):", self.call(block, f"{layers}[i]")
            elif kind == "mixed in":
                weights = c.own("mix", f"nn.Parameter(torch.full(({depth},), 0.25))")
                head, c.body = f"for i, layer in enumerate({layers}):", [*c.body, "first = x"]
                body.insert(0, self.pick(f"x = x + {weights}[i] * first", f"x = {weights}[i] * x", "x = x * 0.9"))
            elif self.chance(0.15):
                body.append(self.pick("x = x * 0.9", "x = F.relu(x)", "x = x.contiguous()", "assert x.dim() > 1"))
            c.body += [head, *(f"    {line}" for line in body)]
        elif kind == "dict":
            layers = c.own("stages", f'nn.ModuleDict({{"a": {made}, "a_b": {made}}})')
            if self.chance(0.5):
                c.body += [f"for name, layer in {layers}.items():", *(f"    {line}" for line in self.call(block, "layer"))]
            else:
                for name in ("a", "a_b"):
                    c.body += self.call(block, f'{layers}["{name}"]')
        elif kind == "collide":
            inner, flat = c.own("enc", f'nn.ModuleDict({{"a": {made}}})'), c.own("enc_a", made)
            c.body += [*self.call(block, f'{inner}["a"]'), *self.call(block, flat)]
        elif kind == "attributes":
            for _ in range(depth):
                c.body += self.call(block, c.own("layer", made))
        elif kind == "shared":
            self.feature("shared")
            layer = c.own("layer", made)
            if self.chance(0.5):
                c.body += [f"for _ in range({depth}):", *(f"    {line}" for line in self.call(block, layer))]
            else:
                between = c.own("between", self.block(masked, result).name + "()")
                c.body += [*self.call(block, layer), *self.call(block, between), *self.call(block, layer)]
        elif kind == "sequential":
            layers = c.own("layers", f"nn.Sequential({', '.join([made] * depth)})")
            c.body.append(f"x = {layers}(x)")
        elif kind == "around":
            layers = c.own("body", f"nn.Sequential({', '.join([made] * depth)}, {self.pick(*BRANCHES[self.layout][:2])})")
            c.body.append(self.pick(f"x = x + {layers}(x)", f"x = x + 0.5 * {layers}(x)") + "  # residual")
        else:
            self.number += 1
            stage = _Class(f"Stage{self.number}")
            inner = stage.own("blocks", f"nn.ModuleList([{', '.join([made] * depth)}])")
            stage.body += [f"for block in {inner}:", "    x = block(x)", "return x"]
            self.classes.append(stage.source("x"))
            for _ in range(2):
                c.body.append(f"x = {c.own('stage', f'{stage.name}()')}(x)")

    def transition(self, c: _Class) -> None:
        """Write what lies between two stacks."""
        kind = self.pick("none", "project", "norm", "pool", "concatenate", "carried")
        self.feature(f"then {kind}")
        image, dense = self.layout == "image", self.layout != "image"
        if kind == "project":
            c.body.append(f"x = {c.own('down', 'Downsample()' if image else 'nn.Linear(D, D)')}(x)")
        elif kind == "norm":
            c.body.append(f"x = {c.own('norm', self.norm())}(x)")
        elif kind == "pool" and self.layout != "flat":
            c.body.append("x = F.avg_pool2d(x, 2)" if image else self.pick("x = x[:, :4]", "x = x - x.mean(1, keepdim=True)"))
            if "[:, :4]" in c.body[-1] and c.masked:
                c.body.append("mask = mask[:, :4] if mask is not None else None")
        elif kind == "concatenate":
            merge = c.own("merge", "nn.Linear(2 * D, D)" if dense else "nn.Conv2d(2 * D, D, 1)")
            c.body.append(f"x = {merge}(torch.cat([x, x * 0.5], {1 if image else -1}))")
        elif kind == "carried":
            self.carried(c)

    def outputs(self, c: _Class) -> None:
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
        c = _Class("Model", masked=masked)
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
        self.tie(c)
        self.classes.append(c.source(signature))
        return "Model()"

    def tie(self, c: _Class) -> None:
        """Tie the first parameter of equal layers, where ``tie`` was asked for."""
        for i, line in enumerate(c.init):
            found = re.fullmatch(r"tie\((.*)\)", line)
            if found:
                layers = found[1]
                c.init[i] = (
                    f"next(m for m in {layers}[1].modules() if isinstance(m, (nn.Linear, nn.Conv2d))).weight = next(\n"
                    f"            m for m in {layers}[0].modules() if isinstance(m, (nn.Linear, nn.Conv2d))\n        ).weight"
                )

    def sequential_model(self) -> str:
        """Write nothing but blocks; the model is a Sequential of them."""
        self.feature("root is a Sequential")
        made = [f"{self.block(False).name}()" for _ in range(2)]
        stem = self.pick(*BRANCHES[self.layout][:2])
        return f"nn.Sequential({', '.join([stem, *made, made[0]])})"

    def pair_model(self) -> str:
        """Write a model of two streams that read each other."""
        self.features |= {"two inputs", "streams read each other"}
        layer = _Class("Layer")
        add: Sequence[str] = ("{v} = {v} + {y}  # residual", "{v} = add({v}, {y})  # residual in helper", "{v} = {y} + {v}  # residual")
        for v, other in (("x", "z"), ("z", "x")):
            f, g = layer.own("f", "nn.Linear(D, D)"), layer.own("g", "Gated()")
            for y in (f"{f}({v} + {other}.mean(1, keepdim=True))", f"{g}({v})")[: self.pick(1, 2)]:
                layer.body.append(self.pick(*add).format(v=v, y=y))
            if self.chance(0.2):
                layer.body.append(f"{v} = {layer.own('norm', self.norm())}({v})")
        layer.body.append("return x, z")
        self.classes.append(layer.source("x, z"))
        c = _Class("Model")
        layers = c.own("layers", "nn.ModuleList([Layer(), Layer()])")
        c.body += [f"for layer in {layers}:", "    x, z = layer(x, z)", self.pick("return x, z", "return x + z.mean(1, keepdim=True)")]
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
