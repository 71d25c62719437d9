"""Expressions of random programs, and the classes that they are written into."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

from fuzz_parts import BRANCHES, NORMS, SPELLINGS

Knob = tuple[str, str, Any]  # class, attribute (dotted), another value; class "" is the program's module


@dataclass
class Class:
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


def indented(lines: list[str]) -> list[str]:
    """Return lines one level deeper."""
    return [f"    {line}" for line in lines]


class Expressions:
    """What the code of a class is made of, at random."""

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

    def gamma(self, c: Class, start: float = 0.5) -> str:
        shape = "(D, 1, 1)" if self.layout == "image" else "(D,)"
        return c.own("gamma", f"nn.Parameter(torch.full({shape}, {start}))")

    def knob(self, c: Class, attribute: str, value: Any) -> None:
        self.knobs.append((c.name, attribute, value))

    def probability(self, c: Class) -> str:
        p = c.own("p", str(self.pick(0.1, 0.5)))
        self.knob(c, p[5:], 0.0)
        return p

    def scale(self, c: Class) -> str:
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

    def branch(self, c: Class, x: str = "x") -> str:
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

    def spelled(self, c: Class, y: str) -> list[str]:
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
