"""Inputs and outputs of any structure."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from awkward import check, rows
from checks import check_preserved, error, weighted
from models import Mixing
from torch import nn

import hc_transform as hct


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    states: tuple = ()
    loss: torch.Tensor | None = None


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict):
    """A dataclass that is a mapping of its fields that are not None, as in diffusers and transformers."""

    hidden: torch.Tensor = None
    states: tuple | None = None
    loss: torch.Tensor | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def to_tuple(self):
        return tuple(self[key] for key in self)


class Returning(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.fs, self.pack = nn.ModuleList(Mixing() for _ in range(2)), pack

    def forward(self, x):
        states = []
        for f in self.fs:
            x = x + f(x)
            states.append(x)
        return self.pack(x, tuple(states))


OUTPUTS = {
    "dict": lambda x, states: {"hidden": x, "states": states},
    "OrderedDict": lambda x, states: collections.OrderedDict(hidden=x, states=states),
    "nested": lambda x, states: {"a": [x, (x.mean(), {"b": states})], "n": 1, "none": None},
    "namedtuple": lambda x, states: Pair(x, states[0]),
    "namedtuple with a default": lambda x, states: Pair(x),
    "list": lambda x, states: [x, *states],
    "dataclass": lambda x, states: Output(x, states),
    "dataclass, by keyword": lambda x, states: Output(hidden=x, loss=x.mean()),
    "dataclass inside a dict": lambda x, states: {"out": Output(x, states)},
    "mapping dataclass": lambda x, states: ModelOutput(x, states),
    "mapping dataclass, by keyword": lambda x, states: ModelOutput(hidden=x, loss=x.mean()),
    "mapping dataclass, to_tuple": lambda x, states: ModelOutput(hidden=x, states=states).to_tuple(),
}


def opened(value):
    """Return an output as types and plain containers."""
    if dataclasses.is_dataclass(value):
        fields = [opened(getattr(value, field.name)) for field in dataclasses.fields(value)]
        return [type(value).__name__, *fields, opened(dict(value)) if isinstance(value, dict) else None]
    if isinstance(value, dict):
        return {"type": type(value).__name__, **{key: opened(v) for key, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *map(opened, value)]
    return value


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(kind):
    model = Returning(OUTPUTS[kind]).double()
    x = rows()
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 2
    for batch in (x, x[:1], rows(3)):
        ours, theirs = opened(hc(batch)), opened(model(batch))
        assert str(torch.utils._pytree.tree_structure(ours)) == str(torch.utils._pytree.tree_structure(theirs))
        assert error(ours, theirs) <= 1e-10
    gradients = []
    for module in (hc, model):
        model.zero_grad()
        weighted(opened(module(x))).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Reading(nn.Module):
    """Residuals on what ``unpack`` takes from one nested argument."""

    def __init__(self, unpack):
        super().__init__()
        self.f, self.g, self.unpack = Mixing(), Mixing(), unpack

    def forward(self, batch):
        x, extra = self.unpack(batch)
        x = x + self.f(x)
        return x + self.g(x + (0 if extra is None else extra))


def by_star(batch):
    def unpacked(x, extra=None):
        return x, extra

    return unpacked(**batch) if isinstance(batch, dict) else unpacked(*batch)


INPUTS = {
    "dict, item": (lambda b: (b["x"], b["extra"]), dict),
    "dict, get": (lambda b: (b.get("x"), b.get("extra")), dict),
    "dict, in": (lambda b: (b["x"], b["extra"] if "extra" in b else None), dict),
    "dict, values": (lambda b: tuple(b.values()), dict),
    "dict, items": (lambda b: [v for k, v in b.items()], dict),
    "dict, keys": (lambda b: [b[k] for k in b.keys()], dict),
    "dict, iteration": (lambda b: [b[k] for k in b], dict),
    "dict, comprehension": (lambda b: list({k: 1 * v for k, v in b.items()}.values()), dict),
    "dict, **": (by_star, dict),
    "list": (lambda b: (b[0], b[1]), list),
    "list, unpacked": (lambda b: [2 * t for t in b], list),
    "list, sum": (lambda b: (sum(b), torch.stack(list(b)).mean(0)), list),
    "list, *": (by_star, list),
    "list, enumerate and zip": (lambda b: [i * t * u for (i, t), u in zip(enumerate(b, 1), b, strict=True)], list),
    "tuple": (lambda b: b, tuple),
    "tuple, last": (lambda b: (b[0], b[-1]), tuple),
    "tuple, slices": (lambda b: (b[:1][0], b[1:][0]), tuple),
    "namedtuple": (lambda b: (b.first, b.second), Pair._make),
    "namedtuple, unpacked": (lambda b: b, Pair._make),
    "dataclass": (lambda b: (b.hidden, b.loss), lambda v: Output(v[0], loss=v[1])),
    "nested": (lambda b: (b["a"][0], b["a"][1]["b"]), lambda v: {"a": [v[0], {"b": v[1]}]}),
}


def packed(pack, *values):
    return dict(zip(("x", "extra"), values, strict=False)) if pack is dict else pack(values)


@pytest.mark.parametrize("kind", INPUTS)
def test_nested_inputs(kind):
    unpack, pack = INPUTS[kind]
    args = (packed(pack, rows(), rows()),)
    check(Reading(unpack), args, 2, others=[(packed(pack, rows(3), rows(3)),)])


OPTIONAL = [kind for kind in INPUTS if kind not in ("list, unpacked", "list, sum", "list, enumerate and zip")]


@pytest.mark.parametrize("first", ["None first", "given first"])
@pytest.mark.parametrize("kind", [k for k in OPTIONAL if "comprehension" not in k])
def test_none_within_nested_inputs(kind, first):
    unpack, pack = INPUTS[kind]
    model = Reading(unpack).double()
    without, given = (packed(pack, rows(), None),), (packed(pack, rows(), rows()),)
    order = [without, given] if first == "None first" else [given, without]
    hc = hct.convert(model, order[0])
    for args in (*order, *order):
        assert error(hc(*args), model(*args)) <= 1e-10


SHORTER = {
    "dict, get": (lambda b: (b.get("x"), b.get("extra")), dict),
    "dict, in": (lambda b: (b["x"], b["extra"] if "extra" in b else None), dict),
    "dict, **": (by_star, dict),
    "list, len": (lambda b: (b[0], b[1] if len(b) > 1 else None), list),
    "list, *": (by_star, list),
    "tuple, slice": (lambda b: (b[0], sum(b[1:])), tuple),
}


@pytest.mark.parametrize("first", ["left out first", "given first"])
@pytest.mark.parametrize("kind", SHORTER)
def test_items_of_nested_inputs_left_out(kind, first):
    unpack, pack = SHORTER[kind]
    model = Reading(unpack).double()
    without, given = (packed(pack, rows()),), (packed(pack, rows(), rows()),)
    order = [without, given] if first == "left out first" else [given, without]
    hc = hct.convert(model, order[0])
    for args in (*order, *order):
        assert error(hc(*args), model(*args)) <= 1e-10


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = Mixing(), Mixing()

    def forward(self, x, mask=None, *, scale=None):
        if mask is not None:
            x = x * mask
        x = x + self.f(x)
        if scale is not None:
            x = x * scale
        return x + self.g(x)


CALLS = [{}, {"mask": rows()}, {"scale": 0.5}, {"scale": rows()}, {"mask": rows(), "scale": 2}, {"scale": 0.25}]


@pytest.mark.parametrize("first", range(len(CALLS)), ids=lambda i: ", ".join(CALLS[i]) or "none")
def test_optional_arguments(first):
    model = Optional().double()
    x = rows()
    hc = hct.convert(model, (x,), CALLS[first])
    for kwargs in (*CALLS, *reversed(CALLS)):
        assert error(hc(x, **kwargs), model(x, **kwargs)) <= 1e-10


class Variadic(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = Mixing(), Mixing()

    def forward(self, x, *more, **named):
        for other in more:
            x = x * other.tanh()
        x = x + self.f(x)
        scale = named.pop("scale", None)
        if scale is not None:
            x = x * scale
        for value in named.values():
            x = x * value.sigmoid()
        return x + self.g(x)


VARIADIC = {
    "none": ((), {}),
    "one": ((rows(),), {}),
    "two": ((rows(), rows()), {}),
    "scale": ((), {"scale": rows()}),
    "gates": ((), {"a": rows(), "b": rows()}),
    "a gate and scale": ((), {"a": rows(), "scale": rows()}),
    "all": ((rows(),), {"scale": rows(), "a": rows()}),
}


@pytest.mark.parametrize("kind", VARIADIC)
def test_args_and_kwargs(kind):
    args, kwargs = VARIADIC[kind]
    model = Variadic().double()
    hc = hct.convert(model, (rows(), *args), kwargs)
    assert len(hc.hc_report.converted) == 2
    check_preserved(model, hc, (rows(), *args), kwargs, bound=1e-10, gradient_bound=1e-9)


VARIADIC_CHANGES = [("none", "one"), ("one", "none"), ("one", "two"), ("two", "one"), ("none", "scale")]
VARIADIC_CHANGES += [
    ("scale", "none"),
    ("scale", "a gate and scale"),
    ("scale", "gates"),
    ("a gate and scale", "scale"),
]


@pytest.mark.parametrize("first, second", VARIADIC_CHANGES, ids=lambda v: v)
def test_args_and_kwargs_of_another_number(first, second):
    model, x = Variadic().double(), rows()
    hc = hct.convert(model, (x, *VARIADIC[first][0]), VARIADIC[first][1])
    for kind in (second, first, second):
        args, kwargs = VARIADIC[kind]
        assert error(hc(x, *args, **kwargs), model(x, *args, **kwargs)) <= 1e-10


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.ModuleDict({"f": Mixing(), "norm": nn.LayerNorm(8)}) for name in "abc"})
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(8)) for _ in range(3))
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.rand(8)) for name in "abc"})

    def forward(self, x, order=("a", "b", "c")):
        for (name, layer), scale in zip(self.layers.items(), self.scales, strict=True):
            if name in order:
                x = x + scale * layer["f"](layer["norm"](x)) * self.gates[name]
        return x


def test_module_dicts_and_loops():
    hc = check(Loops(), (rows(),), 3, trunks=1)
    assert [r.name for r in hc.hc_report.converted] == [f"layers.{name}.f" for name in "abc"] or len(
        {r.name for r in hc.hc_report.converted}
    ) == 3
