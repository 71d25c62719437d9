"""Statements of random blocks: residuals, and what stands between them."""

from __future__ import annotations

from fuzz_parts import ACTIVATIONS
from fuzz_writer import Class, Expressions


class Statements(Expressions):
    """Statements, each written into the code of a class."""

    def residual(self, c: Class) -> None:
        c.body += self.spelled(c, self.branch(c))

    def two_on_a_line(self, c: Class) -> None:
        self.feature("two on a line")
        a, b = self.branch(c), self.branch(c)
        if self.chance(0.5):
            c.body.append(f"x = x + {a}; x = x + {b}  # residual 2")
        else:
            c.body.append(f"x = add(add(x, {a}), {b.replace('mask)', 'None)')})  # residual in helper")

    def parallel(self, c: Class) -> None:
        self.feature("parallel")
        c.body.append(f"h = {c.own('norm', self.norm())}(x)")
        a, b = (f"{c.own(stem, self.mixing())}(h)" for stem in ("attn", "mlp"))
        c.body.append(self.pick(f"x = x + {a} + {b}", f"x = x + ({a} + {b})", f"x = {a} + {b} + x") + "  # residual")

    def post_norm(self, c: Class) -> None:
        self.feature("post norm")
        y = self.branch(c)
        c.body.append(f"x = {c.own('norm', self.norm())}(x + {y})  # residual")

    def chosen(self, c: Class) -> None:
        """Write the same residual into both ways of an ``if``."""
        f = c.own("f", self.mixing())
        condition = self.condition(c)
        other = self.pick(f"x = x + 0.5 * {f}(x)", f"x = x - {f}(x)", f"x = {f}(x) + x", f"x = torch.tanh(x) + {f}(x)")
        mark = "" if "tanh" in other else "  # residual"
        c.body += [f"if {condition}:", f"    x = x + {f}(x)  # residual", "else:", f"    {other}{mark}"]

    def condition(self, c: Class) -> str:
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

    def branch_changed(self, c: Class) -> None:
        """Decide on something inside the branch."""
        c.body += [f"y = {self.branch(c)}", f"if {self.condition(c)}:"]
        c.body.append("    " + self.pick("y = F.gelu(y)", "y = y * 0.5", "y = y + 1", "y = y.relu_()"))
        c.body.append("x = x + y  # residual")

    def draw(self) -> str:
        kind = self.pick("random.random()", "np.random.rand()", "torch.rand(1).item()", "random.uniform(0, 1)")
        self.feature("draws")
        return kind  # type: ignore[no-any-return]

    def dropped(self, c: Class) -> None:
        """Leave a branch out by a draw while training."""
        y, p = self.branch(c), self.probability(c)
        if self.chance(0.5):
            c.body += [f"if not self.training or {self.draw()} >= {p}:", f"    x = x + {y}  # residual"]
        else:
            c.body += [f"y = {y}", f"if self.training and {self.draw()} < {p}:", "    y = y * 0.0"]
            c.body.append("x = x + y  # residual")

    def stochastic_depth(self, c: Class) -> None:
        """Drop samples of a branch, as timm's DropPath does."""
        ones = {"flat": "(x.shape[0], 1)", "tokens": "(x.shape[0], 1, 1)", "image": "(x.shape[0], 1, 1, 1)"}
        self.feature("drop path")
        c.body += [f"y = {self.branch(c)}", f"if self.training and {self.probability(c)} > 0:"]
        c.body.append(f"    y = y * x.new_empty({ones[self.layout]}).bernoulli_(0.7) / 0.7")
        c.body.append("x = x + y  # residual")

    def carried(self, c: Class) -> None:
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

    def counted(self, c: Class) -> None:
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

    def running(self, c: Class) -> None:
        """Keep a running mean in a buffer while training."""
        self.feature("running mean")
        c.init.append('self.register_buffer("mean", torch.zeros(()))')
        c.body += ["if self.training:", "    self.mean.mul_(0.9).add_(0.1 * x.detach().mean())"]
        c.body.append(f"x = x + {self.branch(c)} * (1 + self.mean)  # residual")

    def wrapped(self, c: Class) -> None:
        """Write a residual around several others."""
        self.feature("residual around")
        c.body.append("outer = x")
        for _ in range(2):
            c.body.append(f"x = x + {self.branch(c)}  # residual")
        c.body.append(self.pick("x = outer + x", "x = x + 0.5 * outer", "x = outer + 0.2 * x") + "  # residual")

    def unrolled(self, c: Class) -> None:
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
