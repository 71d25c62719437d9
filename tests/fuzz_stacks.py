"""Blocks of random programs, and stacks of them."""

from __future__ import annotations

from collections.abc import Callable

from fuzz_parts import BRANCHES
from fuzz_statements import Statements
from fuzz_writer import Class, indented


class Stacks(Statements):
    """Classes of blocks, and code of a model that holds and calls them."""

    def returned(self, c: Class) -> str:
        return {"tensor": "x", "tuple": "x, None", "dict": '{"x": x}', "list": "[x]"}[c.result]

    def early(self, c: Class) -> None:
        """Return early by a draw while training."""
        c.body += [f"if self.training and {self.draw()} < {self.probability(c)}:", f"    return {self.returned(c)}"]

    def block(self, masked: bool, result: str = "tensor") -> Class:
        """Write a class with one to three statements, each with a residual."""
        self.number += 1
        c = Class(f"Block{self.number}", masked=masked, result=result)
        returns_early = self.chance(0.08)
        if returns_early:
            self.early(c)
        statements: dict[Callable[[Class], None], int] = {
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
        for _ in range(self.pick(1, 1, 2, 2, 3)):
            (statement,) = self.random.choices(list(statements), list(statements.values()))
            if statement in (self.counted, self.running):  # once in a class
                statements = {s: w for s, w in statements.items() if s not in (self.counted, self.running)}
            statement(c)
            if self.chance(0.2):
                self.carried(c)
        signature, args = ("x, mask=None", "x, mask") if masked else ("x", "x")
        if not returns_early and self.chance(0.1):
            self.feature("method does the work")
            c.methods.append("\n".join([f"def work(self, {signature}):", *indented(c.body), "    return x"]))
            c.body = [f"x = self.work({args})"]
        c.body.append(f"return {self.returned(c)}")
        self.classes.append(c.source(signature))
        if self.chance(0.08):
            self.feature("inherits")
            base, c.name = c.name, f"{c.name}Like"
            code = [f"class {c.name}({base}):", f"    def forward(self, {signature}):"]
            self.classes.append("\n".join([*code, f"        return super().forward({args})"]))
        return c

    def call(self, c: Class, layer: str) -> list[str]:
        """Return the statements that call a block."""
        args = self.pick("x, mask", "x, mask", "x, mask=mask") if c.masked else "x"
        called = f"{layer}({args})"
        if c.result == "tensor":
            return [f"x = {called}"]
        if c.result == "dict":
            return [f'x = {called}["x"]']
        if c.result == "list":
            return [f"(x,) = {called}"]
        ways: list[list[str]] = [[f"x, _ = {called}"], [f"x = {called}[0]"], [f"out = {called}", "x = out[0]"]]
        return self.random.choice(ways)

    def stack(self, c: Class, masked: bool) -> None:
        """Write a stack of blocks into a model."""
        result = self.pick("tensor", "tensor", "tensor", "tensor", "tuple", "dict", "list")
        kinds = ["list"] * 3 + ["reversed", "range", "taps", "mixed in", "dict", "collide", "attributes", "shared"]
        if not masked and result == "tensor":
            kinds += ["sequential", "sequential", "around", "stage"]
        kind = self.pick(*kinds)
        self.feature(f"stack {kind}")
        block, depth = self.block(masked, result), self.pick(2, 2, 3)
        made = f"{block.name}()"
        if kind == "dict":
            layers = c.own("stages", f'nn.ModuleDict({{"a": {made}, "a_b": {made}}})')
            if self.chance(0.5):
                c.body += [f"for name, layer in {layers}.items():", *indented(self.call(block, "layer"))]
            else:
                c.body += [*self.call(block, f'{layers}["a"]'), *self.call(block, f'{layers}["a_b"]')]
        elif kind == "collide":  # dots become underscores
            inner, flat = c.own("enc", f'nn.ModuleDict({{"a": {made}}})'), c.own("enc_a", made)
            c.body += [*self.call(block, f'{inner}["a"]'), *self.call(block, flat)]
        elif kind == "attributes":
            for _ in range(depth):
                c.body += self.call(block, c.own("layer", made))
        elif kind == "shared":
            self.shared(c, block, depth)
        elif kind == "sequential":
            layers = c.own("layers", f"nn.Sequential({', '.join([made] * depth)})")
            c.body.append(f"x = {layers}(x)")
        elif kind == "around":
            end = self.pick(*BRANCHES[self.layout][:2])
            body = c.own("body", f"nn.Sequential({', '.join([made] * depth)}, {end})")
            c.body.append(self.pick(f"x = x + {body}(x)", f"x = x + 0.5 * {body}(x)") + "  # residual")
        elif kind == "stage":
            self.stages(c, made, depth)
        else:
            self.looped(c, block, kind, depth)

    def looped(self, c: Class, block: Class, kind: str, depth: int) -> None:
        """Write a loop over layers."""
        made, mixed = f"{block.name}()", self.chance(0.2)
        other = self.block(block.masked, block.result).name + "()" if mixed else made
        layers = c.own(self.pick("layers", "blocks", "h"), f"nn.ModuleList([{', '.join([made, other, made][:depth])}])")
        if not mixed and self.chance(0.1):
            self.feature("tied")
            ends = (f"next(m for m in {layers}[{i}].modules() if hasattr(m, 'weight'))" for i in (1, 0))
            c.init.append(".weight = ".join(ends) + ".weight")
        head, body = f"for layer in {layers}:", self.call(block, "layer")
        if kind == "taps":
            body.append(self.pick("taps.append(x)", "taps = [*taps, x]", "taps.append(x.mean(-1))"))
        elif kind == "reversed":
            head = f"for layer in {self.pick(f'reversed({layers})', f'{layers}[::-1]')}:"
        elif kind == "range":
            head, body = f"for i in range(len({layers})):", self.call(block, f"{layers}[i]")
        elif kind == "mixed in":
            weights = c.own("mix", f"nn.Parameter(torch.full(({depth},), 0.25))")
            c.body.append("first = x")
            head = f"for i, layer in enumerate({layers}):"
            body.insert(0, self.pick(f"x = x + {weights}[i] * first", f"x = {weights}[i] * x", "x = x * 0.9"))
        elif self.chance(0.15):
            body.append(self.pick("x = x * 0.9", "x = F.relu(x)", "x = x.contiguous()", "assert x.dim() > 1"))
        c.body += [head, *indented(body)]

    def shared(self, c: Class, block: Class, depth: int) -> None:
        """Call one block several times, one after the other or with another between."""
        self.feature("shared")
        layer = c.own("layer", f"{block.name}()")
        if self.chance(0.5):
            c.body += [f"for _ in range({depth}):", *indented(self.call(block, layer))]
        else:
            between = self.block(block.masked, block.result)
            other = c.own("between", f"{between.name}()")
            c.body += [*self.call(block, layer), *self.call(between, other), *self.call(block, layer)]

    def stages(self, c: Class, made: str, depth: int) -> None:
        """Write two stages that hold blocks."""
        self.number += 1
        stage = Class(f"Stage{self.number}")
        inner = stage.own("blocks", f"nn.ModuleList([{', '.join([made] * depth)}])")
        stage.body += [f"for block in {inner}:", "    x = block(x)", "return x"]
        self.classes.append(stage.source("x"))
        for _ in range(2):
            c.body.append(f"x = {c.own('stage', f'{stage.name}()')}(x)")
