"""What users can tell the tracer, and the errors that name it."""

from __future__ import annotations

import pytest
import torch
from checks import check_preserved, error
from models import GPT, Chain, Mixing
from torch import nn

import hc_transform as hct
from hc_transform.graphs.guards import check_input


def tokens():
    return (torch.randint(0, 65, (2, 8)),)


@pytest.mark.parametrize("leaf", ["transformer.h.1", "*.h.1", "class"], ids=["path", "pattern", "class"])
def test_leaf_modules_stay_whole(leaf):
    model = GPT(depth=3)
    kind = type("Own", (type(model.transformer.h[1]),), {})
    model.transformer.h[1].__class__ = kind
    hc = hct.convert(model, tokens(), leaf_modules=[kind if leaf == "class" else leaf])
    assert "transformer.h.1.attn" not in {r.name for r in hc.hc_report.converted}
    assert len(hc.hc_report.converted) == 4
    left = [r for r in hc.hc_report.skipped if "leaf_modules names it" in r.reason]
    assert [r.name for r in left] == ["transformer.h.1.attn", "transformer.h.1.mlp"]
    check_preserved(model, hc, tokens())


class HiddenAdd(nn.Module):
    """Its add is made by a function that is looked up by name."""

    def __init__(self):
        super().__init__()
        self.f = Mixing()

    def forward(self, x):
        return getattr(torch, "add")(x, self.f(x))  # noqa: B009


def test_inline_modules_are_looked_into():
    model, x = nn.Sequential(HiddenAdd(), HiddenAdd()), torch.randn(2, 5, 8)
    with pytest.raises(hct.NothingToConvert, match=r"inline_modules=\[\.\.\.\]"):
        hct.convert(model, connection="static")
    hc = hct.convert(model, connection="static", inline_modules=[HiddenAdd])
    assert len(hc.hc_report.converted) == 2
    check_preserved(model, hc, (x,))


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_a_run_shows_adds_that_the_code_does_not(scope):
    model, x = nn.Sequential(HiddenAdd(), HiddenAdd()), torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,), scope=scope)
    assert len(hc.hc_report.converted) == 2
    check_preserved(model, hc, (x,))


def branchy(x):
    return x if float(x.detach().sum()) >= 0 else -x


class Branchy(Chain):
    def forward(self, x):
        return super().forward(branchy(x))


def test_wrap_functions_is_named_by_the_error_that_it_solves():
    model, x = Branchy(lambda x, f, i: x + f), torch.randn(2, 5, 8)
    with pytest.raises(hct.TraceError, match=r"values of a tensor as Python numbers.*wrap_functions=\(function,\)"):
        hct.convert(model, (x,))
    hc = hct.convert(model, (x,), wrap_functions=(branchy,))
    assert error(hc(-x), model(-x)) <= 1e-5


class Choosing(nn.Module):
    """Its flags decide what is computed."""

    def __init__(self):
        super().__init__()
        self.fs = nn.ModuleList(Mixing() for _ in range(2))

    def forward(self, x, act: str = "tanh", steps: int = 1, negate: bool = False, scale: float = 1.0):
        x = -x if negate else x
        for _ in range(steps):
            for f in self.fs:
                x = x + scale * getattr(torch, act)(f(x))
        return x


FLAGS = {"act": "sin", "steps": 2, "negate": True, "scale": 0.5}


@pytest.mark.parametrize("name", [n for n in FLAGS if n != "steps"])
def test_flags_are_constants_that_are_checked(name):
    model, x = Choosing().eval(), torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,), {name: FLAGS[name]})
    checks = [n for n in hc.graph.nodes if n.target is check_input]
    assert {n.args[2]: n.args[1] for n in checks}[name] == FLAGS[name]
    for given in ({name: FLAGS[name]}, {}, {name: FLAGS[name]}):
        assert error(hc(x, **given), model(x, **given)) <= 1e-5
    assert len(hc._variants) == 1, "a value is traced once"
    compiled = torch.compile(hc, fullgraph=True, backend="eager")
    for given in ({name: FLAGS[name]}, {}):
        assert error(compiled(x, **given), model(x, **given)) <= 1e-5


def test_a_flag_that_adds_residuals_is_named():
    model, x = Choosing(), torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,), {"steps": 2})
    assert len(hc.hc_report.converted) == 4
    assert error(hc(x), model(x)) <= 1e-5, "a call with a part of the residuals does without the others"
    with pytest.raises(hct.TraceError, match="input 'steps' was 2 while tracing and is 3 now"):
        hc(x, steps=3)


def test_draws_that_a_graph_would_not_make_keep_a_module_whole():
    import random

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = Mixing()

        def forward(self, x):
            generator = random._inst  # where no function of random's is seen
            return x + generator.random() * self.f(x)

    model, x = nn.Sequential(Drawing(), Chain(lambda x, f, i: x + f, 2)), torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 2
    assert [r.name for r in hc.hc_report.skipped if "random generator" in r.reason] == ["0"]
    for _ in range(3):
        random.seed(0)
        ours = hc(x)
        random.seed(0)
        assert error(ours, model(x)) <= 1e-5


@pytest.mark.parametrize("option", ["leaf_modules", "inline_modules"])
def test_hints_that_name_nothing(option):
    with pytest.raises(hct.PatternError, match=rf"{option}: 'transformer.h.9' is no module of GPT. Near paths: transf"):
        hct.convert(GPT(), tokens(), **{option: ["transformer.h.9"]})
    with pytest.raises(ValueError, match=f"{option} is a list of classes or patterns, got 'transformer.h.0'"):
        hct.convert(GPT(), tokens(), **{option: "transformer.h.0"})


def test_hints_hold_for_later_traces():
    model = GPT(depth=2)
    hc = hct.convert(model, tokens(), leaf_modules=["transformer.h.0"])
    x = tokens()[0]
    assert error(hc(x, x), model(x, x)) <= 1e-5


def test_trunks_of_one_residual_are_told_and_left_alone():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.mix = Mixing(), Mixing(), nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.a(x)
            return (y := self.mix(x)) + self.b(y)

    x = torch.randn(2, 5, 8)
    report = hct.convert(Parts(), (x,)).hc_report
    assert "2 trunks hold one residual alone (a, b) and gain little; min_residuals=2 leaves them" in str(report)
    with pytest.raises(hct.NothingToConvert, match="its trunk has fewer residuals than min_residuals"):
        hct.convert(Parts(), (x,), min_residuals=2)
