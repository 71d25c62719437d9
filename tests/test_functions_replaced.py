"""Functions and methods that traced code calls, replaced after conversion: the next call runs the new ones."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import connections, error
from torch import Tensor, nn

import hc_transform as hct

D = 8
SCOPES = ["graph", "blocks"]
HERE = sys.modules[__name__]


def same(x: Tensor) -> Tensor:
    return x * 1.0


def five(x: Tensor) -> Tensor:
    return x * 5.0


def helper(x: Tensor) -> Tensor:
    return x * 1.0


TABLE = {"act": same}


@torch.compile(backend="eager")
def compiled_before(x: Tensor) -> Tensor:
    return x * 1.0


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any) -> Any:
        return function(*args)

    return called


@twice
def decorated(x: Tensor) -> Tensor:
    return x * 1.0


class Act:
    def __call__(self, x: Tensor) -> Tensor:
        return x * 1.0

    def named(self, x: Tensor) -> Tensor:
        return x * 1.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)
        self.act, self.acts, self.space, self.object = same, {"act": same}, types.SimpleNamespace(act=same), Act()

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x * 1.0

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * 1.0

    def method(self, x: Tensor) -> Tensor:
        return x * 1.0

    @property
    def gain(self) -> float:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.space.act(self.acts["act"](self.act(F.gelu(self.f(x)))))
        y = self.object.named(self.object(self.method(self.of_class(self.static(y)))))
        return x + TABLE["act"](helper(y)) * self.gain


class Child(Block):
    """Of which no test replaces what another reads."""


Change = Callable[[Any, pytest.MonkeyPatch], None]
CHANGES: dict[str, Change] = {
    "attribute": lambda b, m: setattr(b, "act", five),
    "dictionary": lambda b, m: b.acts.update(act=five),
    "attribute of an object": lambda b, m: setattr(b.space, "act", five),
    "method of an instance": lambda b, m: setattr(b, "method", five),
    "method": lambda b, m: m.setattr(Block, "method", lambda self, x: x * 5),
    "static method": lambda b, m: m.setattr(Block, "static", staticmethod(five)),
    "class method": lambda b, m: m.setattr(Block, "of_class", classmethod(lambda cls, x: x * 5)),
    "property": lambda b, m: m.setattr(Block, "gain", property(lambda self: 5.0)),
    "forward": lambda b, m: m.setattr(Block, "forward", lambda self, x: x + 5 * self.f(x)),
    "method of an object": lambda b, m: m.setattr(Act, "named", lambda self, x: x * 5),
    "call of an object": lambda b, m: m.setattr(Act, "__call__", lambda self, x: x * 5),
    "global": lambda b, m: m.setattr(HERE, "helper", five),
    "global dictionary": lambda b, m: m.setitem(TABLE, "act", five),
    "function of torch": lambda b, m: m.setattr(F, "gelu", five),
}
COMPILED = ["attribute", "dictionary", "global", "function of torch"]  # methods eager code alone looks up


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_replaced_counts(kind: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Child()), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope)
    with torch.no_grad():
        before = model(x)
        assert error(hc(x), before) < 1e-5
        for m in (model, hc):
            CHANGES[kind](m.get_submodule("0"), monkeypatch)
        assert error(model(x), before) > 1e-3, "the change does something"
        assert error(hc(x), model(x)) < 1e-5
    assert len(connections(hc)) == 2


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_code_notices_it(kind: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Child()), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope)
    compiled = torch.compile(hc, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert error(compiled(x), model(x)) < 1e-5
        for m in (model, hc):
            CHANGES[kind](m.get_submodule("0"), monkeypatch)
        assert error(hc(x), model(x)) < 1e-5  # once in eager mode, which traces again
        assert error(compiled(x), model(x)) < 1e-5


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + decorated(compiled_before(self.f(x)))


@pytest.mark.parametrize("scope", SCOPES)
def test_functions_that_are_no_plain_ones_compile(scope: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(Decorated(), Decorated()), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope)
    assert len(hc.hc_report.converted) == 2
    with torch.no_grad():
        assert error(torch.compile(hc, backend="eager", fullgraph=True)(x), model(x)) < 1e-5


GAINS = {"gain": 1.0}


def positional(x: Tensor, gains: dict[str, float] = GAINS) -> Tensor:
    return x * gains["gain"]


def by_name(x: Tensor, *, gain: float = 1.0) -> Tensor:
    return x * gain


class Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def scaled(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return x * gain

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaled(by_name(positional(self.f(x))))


DEFAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "what a default holds": lambda m: m.setitem(GAINS, "gain", 5.0),
    "defaults": lambda m: m.setattr(positional, "__defaults__", ({"gain": 5.0},)),
    "by name": lambda m: m.setattr(by_name, "__kwdefaults__", {"gain": 5.0}),
    "of a method": lambda m: m.setattr(Defaults.scaled, "__defaults__", (5.0,)),
}


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_that_change_count(kind: str, scope: str, verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Defaults(), Defaults()), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope, verify=verify)
    with torch.no_grad():
        before = model(x)
        DEFAULTS[kind](monkeypatch)
        assert error(model(x), before) > 1e-3
        assert error(hc(x), model(x)) < 1e-5
