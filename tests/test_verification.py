"""What verification compares, what it calls verified, and what it leaves behind."""

from __future__ import annotations

import random
import sys
import types
from collections import namedtuple
from dataclasses import dataclass, field

import numpy
import pytest
import torch
from checks import connections, error
from torch import nn

import hc_transform as hct
from hc_transform.models.compare import compare, relative_error
from hc_transform.verification.verify import run_like, separated


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.f = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.f(x)


class Stack(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass
class Output:
    states: list = field(default_factory=list)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Ring:
    """Holds itself."""

    def __init__(self, value):
        self.value, self.me = value, self


Named = namedtuple("Named", "value")
HOLDERS = {
    "list": lambda v: [v],
    "nested dict": lambda v: {"a": {"b": (1, v)}},
    "named tuple": Named,
    "dataclass": lambda v: Output([v]),
    "namespace": lambda v: types.SimpleNamespace(logits=v),
    "slots": Slotted,
    "cycle": Ring,
}
VALUES = {
    "tensor": (torch.zeros(2), torch.ones(2)),
    "bool tensor": (torch.tensor([True]), torch.tensor([False])),
    "sparse tensor": (torch.zeros(2, 2).to_sparse(), torch.eye(2).to_sparse()),
    "float": (1.0, 2.0),
    "int": (1, 2),
    "complex": (1j, 2j),
    "bool": (True, False),
    "string": ("a", "b"),
    "None": (None, 1),
    "dtype": (torch.float32, torch.float64),
    "array": (numpy.zeros(3), numpy.ones(3)),
    "array of strings": (numpy.array(["a"]), numpy.array(["b"])),
    "numpy scalar": (numpy.float32(1), numpy.float32(2)),
    "type": (1, 1.0),
    "length": ([1], [1, 1]),
    "shape": (torch.zeros(2), torch.zeros(1, 2)),
    "keys": ({"a": 1}, {"b": 1}),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("value", VALUES)
def test_everything_in_an_output_is_compared(holder, value):
    hold, (one, other) = HOLDERS[holder], VALUES[value]
    assert relative_error(hold(one), hold(other)) > 0.1
    assert relative_error(hold(one), hold(one)) == 0


def test_sets_are_compared_whatever_their_order():
    a, b = torch.zeros(2), torch.ones(3)
    assert relative_error({"x", "y", 1}, {1, "y", "x"}) == 0
    assert relative_error({a, b}, {b.clone(), a.clone()}) == 0
    assert relative_error({a, b}, {b.clone(), a + 1}) > 0.1


def test_numbers_give_a_relative_error_and_the_place_is_told():
    found = compare({"loss": 1.0, "x": torch.ones(2)}, {"loss": 1.25, "x": torch.ones(2)})
    assert found.error == pytest.approx(0.2) and found.where == "['loss']" and found.values == 2
    nan = {"loss": float("nan"), "x": torch.tensor([float("nan"), 1.0])}
    assert relative_error(nan, {"loss": float("nan"), "x": torch.tensor([float("nan"), 1.0])}) == 0
    assert (
        relative_error(1.0, float("nan")) == relative_error(torch.ones(1), torch.tensor([float("nan")])) == float("inf")
    )


def test_what_cannot_be_compared_is_told():
    found = compare([torch.zeros(2, device="meta"), nn.ReLU(), 1.0], [torch.zeros(2, device="meta"), nn.ReLU(), 1.0])
    assert found.error == 0 and found.values == 1
    assert found.unseen == ("[0] (no values on the meta device)", "[1] (a ReLU)")


def test_another_dtype_is_another_output():
    assert relative_error(torch.ones(2), torch.ones(2).double()) == 0
    assert compare(torch.ones(2), torch.ones(2).double(), dtypes=True).error == float("inf")


class Returning(Stack):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_nothing_on_meta_is_called_verified(scope):
    with torch.device("meta"):
        report = hct.convert(Stack(), (torch.randn(2, 8),), scope=scope).hc_report
    assert report.max_error is None and len(report.converted) == 3
    note = next(n for n in report.notes if "erified" in n)
    assert note == "Not verified: the output holds no value to compare: the output (no values on the meta device)."


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_an_output_without_values_is_not_verified(scope):
    report = hct.convert(Returning(lambda x: x[:0]), (torch.randn(2, 8),), scope=scope).hc_report
    assert report.max_error is None and "Not verified: the output holds no value to compare." in str(report)


@pytest.mark.parametrize("readout", ["mean", "sum"])
@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_outputs_of_another_kind_by_definition_are_not_called_verified(scope, readout):
    report = hct.convert(Stack(), (torch.randn(2, 8),), scope=scope, readout=readout).hc_report
    said = "Not verified: readout='sum' gives other outputs" in str(report)
    assert said is (readout == "sum") and ("Verified on" in str(report)) is not said


# -- wrong conversions


def _swap_streams(hc, path):
    """Exchange two streams of every residual of a block: equal at the start, wrong as soon as they differ."""
    for variants in hc.get_submodule(path)._hc_runner.variants.values():
        for variant in variants:
            write = next(n for n in variant.graph.nodes if n.name.endswith("_write"))
            with variant.graph.inserting_before(write):
                items = [variant.graph.call_function(lambda v, i: v[i], (write.args[0], i)) for i in (1, 0, 2, 3)]
            write.args = (tuple(items), *write.args[1:])
            variant.__init__(variant.graph)


def _broken(monkeypatch, damage):
    """Let conversion damage what it has made of the blocks."""
    module = sys.modules["hc_transform.convert_blocks"]
    made = module._with_graphs

    def with_graphs(*args, **kwargs):
        converted, *rest = made(*args, **kwargs)
        damage(converted)
        return converted, *rest

    monkeypatch.setattr(module, "_with_graphs", with_graphs)


def test_the_first_residual_that_differs_is_named_in_blocks_too(monkeypatch):
    _broken(monkeypatch, lambda hc: _swap_streams(hc, "layers.1"))
    with pytest.raises(hct.NotEquivalent, match=r"is after the residual layers\.1 \(.*test_verification.py:\d+\)"):
        hct.convert(Stack(), (torch.randn(2, 8),), scope="blocks", connection="static")


class Repeating(Stack):
    def forward(self, x):
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_the_first_residual_that_differs_is_named_where_blocks_are_called_twice(monkeypatch, share):
    _broken(monkeypatch, lambda hc: _swap_streams(hc, "layers.2"))
    with pytest.raises(hct.NotEquivalent, match=r"is after the residual layers\.2\.f "):
        hct.convert(Repeating(), (torch.randn(2, 8),), scope="blocks", connection="static", share_calls=share)


def _snapshot(model):
    return [(path, type(m), set(m.__dict__), list(m._forward_hooks.values())) for path, m in model.named_modules()]


def test_in_place_nothing_is_changed_before_it_is_verified(monkeypatch):
    model, x = Stack(), torch.randn(2, 8)
    model.layers[1].register_forward_hook(lambda *a: None)
    before, output = _snapshot(model), model(x)
    with monkeypatch.context() as patch:
        _broken(patch, lambda hc: _swap_streams(hc, "layers.1"))
        with pytest.raises(hct.NotEquivalent):
            hct.convert(model, (x,), scope="blocks", inplace=True, connection="static")
    assert _snapshot(model) == before and torch.equal(model(x), output) and not hasattr(model, "hc_report")
    assert hct.convert(model, (x,), scope="blocks", inplace=True) is model
    assert model.hc_report.max_error <= 1e-5 and _snapshot(model) != before


class Reporting(nn.Module):
    """Its hook is a method of a module of the model."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = Stack(), 0
        self.body.layers[0].register_forward_hook(self.count)

    def count(self, *args):
        self.calls += 1

    def forward(self, x):
        return self.body(x)


def test_in_place_hooks_report_to_the_given_model():
    model, x = Reporting(), torch.randn(2, 8)
    hct.convert(model, (x,), scope="blocks", inplace=True)
    model.calls = 0
    model(x)
    assert model.calls == 1


# -- what cannot be compared


class Drawing(Stack):
    def forward(self, x):
        x = super().forward(x)
        return x, x.detach() * random.random(), x * float(numpy.random.rand()), torch.rand(2)


def test_all_generators_are_seeded_alike_and_put_back():
    model, x = Drawing(), torch.randn(2, 8)
    first, second = run_like(model, (x,), {}), run_like(model, (x,), {})
    assert relative_error(first, second) == 0
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    hc = hct.convert(model, (x,), scope="blocks")
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert hc.hc_report.max_error <= 1e-5


def test_a_failure_of_the_reference_is_an_error(monkeypatch):
    from hc_transform.verification.reference import ReferenceInterpreter

    def fail(self, residual):
        raise RuntimeError("no such stream")

    monkeypatch.setattr(ReferenceInterpreter, "_write", fail)
    for scope in ("graph", "blocks"):
        with pytest.raises(hct.HCTransformError, match=r"the reference implementation cannot be run .*no such stream"):
            hct.convert(Stack(), (torch.randn(2, 8),), scope=scope)


def test_a_converted_model_that_fails_with_separated_streams_is_an_error(monkeypatch):
    def damage(hc):
        hc.layers[2].register_forward_pre_hook(check)

    def check(module, args):
        streams = module.hyper_connections
        if next(streams.parameters()).detach().double().sum() % 1:  # off its start
            raise RuntimeError("off the start")

    _broken(monkeypatch, damage)
    with pytest.raises(hct.HCTransformError, match=r"the converted model cannot be run .*off the start"):
        hct.convert(Stack(), (torch.randn(2, 8),), scope="blocks", connection="static")


class Deciding(Stack):
    """Decides on values that are others once the streams have separated."""

    known = 0.0

    def forward(self, x):
        x = super().forward(x)
        return x if abs(x.double().sum().item() - self.known) < 1e-3 else -x


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_a_model_that_decides_on_values_is_verified_at_the_start_alone(scope):
    model, x = Deciding().eval(), torch.randn(2, 8)
    model.known = Stack.forward(model, x).double().sum().item()
    report = hct.convert(model, (x,), scope=scope, connection="static").hc_report
    assert report.max_error <= 1e-5
    note = next(n for n in report.notes if "erified" in n)
    assert note.startswith("Verified on the example inputs at the start alone") and "decides on values" in note


def test_a_tape_that_does_not_repeat_is_told(monkeypatch):
    monkeypatch.setattr("hc_transform.verification.pairs.relative_error", lambda a, b: float("inf"))
    report = hct.convert(Stack(), (torch.randn(2, 8),), scope="blocks").hc_report
    note = next(n for n in report.notes if "erified" in n)
    assert note.endswith("Not verified with separated streams: the recorded run gives other outputs when repeated.")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.f = Stack(2), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.f(self.inner(torch.tanh(self.f(x))))


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_trunks_within_branches_are_said_not_to_be_compared(scope):
    x = torch.randn(2, 8)
    report = hct.convert(Nested(), (x,), scope=scope, nested="all").hc_report
    assert len(report.converted) == 3 and "Not verified with separated streams: the reference knows no trunk" in str(
        report
    )
    assert "Not verified" not in str(hct.convert(Stack(), (x,), scope=scope, nested="all").hc_report), "none nests"


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_learned_readouts_are_compared(scope):
    report = hct.convert(Stack(), (torch.randn(2, 8),), scope=scope, readout="learned").hc_report
    assert "Not verified" not in str(report)


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.drop = nn.Conv2d(8, 8, 1), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.f(self.drop(torch.relu(x)))


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_dropout_of_values_that_lie_elsewise_in_memory(scope):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    model = nn.Sequential(Dropped(), Dropped(), Dropped()).train()
    note = next(n for n in hct.convert(model, (x,), scope=scope).hc_report.notes if "erified" in n)
    assert note == "Verified on the example inputs: largest relative error 0.0e+00."


@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc"])
def test_streams_of_long_trunks_are_separated_and_finite(connection):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.f = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.f(self.norm(x))

    torch.manual_seed(0)
    for depth in (3, 120):
        model, x = nn.Sequential(*(Block() for _ in range(depth))).eval(), torch.randn(2, 3, 8)
        hc = hct.convert(model, (x,), scope="graph", connection=connection, verify=False)
        plan = hct.plan(model, (x,), scope="graph", connection=connection)
        with separated(nn.ModuleList(connections(hc).values()), plan), torch.no_grad():
            moved = error(hc(x), model(x))
        assert 1e-3 < moved < 1e3


def test_outputs_are_compared_by_hand_too():
    assert hct.verify.relative_error({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == 1.0
