"""Python state that traced code reads or writes: attributes, settings, globals, counters, collections."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import logging
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import error
from torch import nn

import hc_transform as hct

D = 8
SCOPES = ["graph", "blocks"]
SCALE = 1.0
SETTINGS = {"scale": 1.0}
LOG: list = []
COUNT = 0


class Mode(enum.Enum):
    ONE = 1
    HALF = 2


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    inner: object = None

    @property
    def half(self):
        return self.scale / 2


class Block(nn.Module):
    """One residual; ``scale`` says by what its branch is multiplied."""

    class_scale = 1.0

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(D, D)

    def scale(self):
        return 1.0

    def forward(self, x):
        return x + self.scale() * self.f(x)


def stack(block, depth=2):
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(depth)))


def rows(n=3):
    return torch.randn(n, D)


def agree(hc, model, x, bound=1e-5):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    ours = hc(x)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert error(ours, model(x)) <= bound


# -- what is read


class Number(Block):
    number = None

    def __init__(self):
        super().__init__()
        self.number = 1.0

    def scale(self):
        return self.number


class Flag(Block):
    def __init__(self):
        super().__init__()
        self.half = False

    def scale(self):
        return 0.5 if self.half else 1.0


class Text(Block):
    def __init__(self):
        super().__init__()
        self.mode = "one"

    def scale(self):
        return {"one": 1.0, "half": 0.5}[self.mode]


class Enumerated(Block):
    def __init__(self):
        super().__init__()
        self.mode = Mode.ONE

    def scale(self):
        return 1.0 if self.mode is Mode.ONE else 0.5


class Optional(Block):
    def __init__(self):
        super().__init__()
        self.factor = None

    def scale(self):
        return 1.0 if self.factor is None else self.factor


class Listed(Block):
    def __init__(self):
        super().__init__()
        self.factors = [1.0]

    def scale(self):
        return sum(self.factors)


class Mapped(Block):
    def __init__(self):
        super().__init__()
        self.settings = {"scale": 1.0, "other": 2}

    def scale(self):
        return self.settings["scale"]


class Configured(Block):
    def __init__(self):
        super().__init__()
        self.config = Config()

    def scale(self):
        return self.config.scale


class Nested(Block):
    def __init__(self):
        super().__init__()
        self.config = Config(inner=types.SimpleNamespace(scale=1.0))

    def scale(self):
        return self.config.inner.scale


class OfAProperty(Block):
    def __init__(self):
        super().__init__()
        self.config = Config(2.0)

    def scale(self):
        return self.config.half


class OfItsClass(Block):
    def scale(self):
        return self.class_scale


class Dropping(Block):
    def __init__(self):
        super().__init__()
        self.p = 0.5

    def forward(self, x):
        return x + F.dropout(self.f(x), self.p, self.training)


class Activated(Block):
    def __init__(self):
        super().__init__()
        self.act = F.gelu

    def forward(self, x):
        return x + self.act(self.f(x))


class OfAnother(Block):
    """Reads an attribute of a module that stays whole."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.drop.factor = 1.0

    def scale(self):
        return self.drop.factor


def set_on_blocks(change):
    def apply(*models):
        for model in models:
            for module in model.modules():
                if isinstance(module, Block):
                    change(module)

    return apply


READS = {
    "number": (Number, lambda m: setattr(m, "number", 0.25)),
    "whole number": (Number, lambda m: setattr(m, "number", 2)),
    "flag": (Flag, lambda m: setattr(m, "half", True)),
    "string": (Text, lambda m: setattr(m, "mode", "half")),
    "enum": (Enumerated, lambda m: setattr(m, "mode", Mode.HALF)),
    "None": (Optional, lambda m: setattr(m, "factor", 0.5)),
    "list": (Listed, lambda m: m.factors.append(0.5)),
    "entry of a list": (Listed, lambda m: m.factors.__setitem__(0, 0.5)),
    "dict": (Mapped, lambda m: m.settings.update(scale=0.5)),
    "another dict": (Mapped, lambda m: setattr(m, "settings", {"scale": 0.5})),
    "config": (Configured, lambda m: setattr(m.config, "scale", 0.5)),
    "another config": (Configured, lambda m: setattr(m, "config", Config(0.5))),
    "config in a config": (Nested, lambda m: setattr(m.config.inner, "scale", 0.5)),
    "property of a config": (OfAProperty, lambda m: setattr(m.config, "scale", 0.5)),
    "attribute of the class": (OfItsClass, lambda m: setattr(m, "class_scale", 0.5)),
    "probability": (Dropping, lambda m: setattr(m, "p", 0.1)),
    "function": (Activated, lambda m: setattr(m, "act", F.relu)),
    "attribute of a leaf": (OfAnother, lambda m: setattr(m.drop, "factor", 0.5)),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", READS)
def test_what_is_read_may_change(kind, scope):
    block, change = READS[kind]
    model, x = stack(block).train(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    twin = pickle.loads(pickle.dumps(hc))
    agree(hc, model, x)
    before = model(x)
    set_on_blocks(change)(model, hc, twin)
    assert kind == "probability" or error(model(x), before) > 1e-3, "the change has an effect"
    agree(hc, model, x)
    agree(twin, model, x)
    agree(copy.deepcopy(hc), model, x)
    assert {n for n, _ in hc.named_parameters() if "hyper_connections" in n}


@pytest.mark.parametrize(
    "kind, scope",
    [("number", "graph"), ("enum", "graph"), ("config", "graph"), ("number", "blocks"), ("None", "blocks")],
)
def test_compiled_code_minds_what_is_read(kind, scope):
    torch._dynamo.reset()
    block, change = READS[kind]
    model, x = stack(block).eval(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    fast = torch.compile(hc, fullgraph=True, backend="eager")
    agree(fast, model, x)
    set_on_blocks(change)(model, hc)
    with pytest.raises(Exception, match="eager mode"):
        fast(x)
    agree(hc, model, x)
    torch._dynamo.reset()
    agree(torch.compile(hc, fullgraph=True, backend="eager"), model, x)


class OfAGlobal(Block):
    def scale(self):
        return SCALE * SETTINGS["scale"]


@pytest.mark.parametrize("scope", SCOPES)
def test_globals_may_change(scope, monkeypatch):
    model, x = stack(OfAGlobal).eval(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    agree(hc, model, x)
    monkeypatch.setitem(globals(), "SCALE", 0.5)
    agree(hc, model, x)
    monkeypatch.setitem(SETTINGS, "scale", 0.25)
    agree(hc, model, x)


def test_attributes_of_a_graph_model_are_those_of_the_original():
    model, x = Number().eval(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope="graph")
    for value in (0.25, 0.5):
        model.number = hc.number = value
        agree(hc, model, x)
        assert hc.number == value


def test_a_value_set_back_needs_no_new_graph():
    model, x = stack(Number).eval(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope="graph")
    for value in (0.5, 1.0, 0.5, 1.0):
        for block in (*model, hc.get_submodule("0"), hc.get_submodule("1")):
            block.number = value
        agree(hc, model, x)
    assert len(hc._variants) == 1


class Method(nn.Module):
    """Reads its mode in a method that its parent calls."""

    def apply_to(self, x):
        return x * 2 if self.training else x


class CallsAMethod(Block):
    def __init__(self):
        super().__init__()
        self.noise = Method()

    def forward(self, x):
        return x + self.noise.apply_to(self.f(x))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_mode_counts_wherever_it_is_read(scope):
    model, x = stack(CallsAMethod).eval(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for mode in (False, True, False):
        agree(hc.train(mode), model.train(mode), x)
    for m in (model, hc):
        m.get_submodule("1.noise").train()
    agree(hc, model, x)


# -- what is written


class Counter(Block):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def scale(self):
        self.calls += 1
        return 0.5 if self.calls < 4 else 1.0


class Collector(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def scale(self):
        self.seen.append(1)
        return 1.0 / len(self.seen)


class InADeque(Collector):
    def __init__(self):
        super().__init__()
        self.seen = collections.deque(maxlen=4)


class InADict(Block):
    def __init__(self):
        super().__init__()
        self.stats = {"calls": 0}

    def scale(self):
        self.stats["calls"] += 1
        return 1.0 / self.stats["calls"]


class InAnObject(Block):
    def __init__(self):
        super().__init__()
        self.stats = types.SimpleNamespace(calls=0)

    def scale(self):
        self.stats.calls += 1
        return 1.0 / self.stats.calls


class InAGlobal(Block):
    def scale(self):
        global COUNT
        COUNT += 1
        return 1.0 / COUNT


class InAGlobalList(Block):
    def scale(self):
        LOG.append(1)
        return 1.0 / len(LOG)


class InTheClass(Block):
    total = 0

    def scale(self):
        type(self).total += 1
        return 1.0 / type(self).total


class InTheClassByName(Block):
    def scale(self):
        InTheClassByName.made = getattr(InTheClassByName, "made", 0) + 1
        return 1.0 / InTheClassByName.made


class OfTheLeaf(Block):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.drop.calls = 0

    def scale(self):
        self.drop.calls += 1
        return 1.0 / self.drop.calls


WRITES = [
    Counter, Collector, InADeque, InADict, InAnObject, InAGlobal, InAGlobalList, InTheClass, InTheClassByName,
    OfTheLeaf,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_globals():
    reset()


def reset():
    global COUNT
    COUNT = 0
    LOG.clear()
    InTheClass.total = 0
    if hasattr(InTheClassByName, "made"):
        del InTheClassByName.made


def outputs(model, x, calls=6):
    reset()
    return [model(x) for _ in range(calls)]


@pytest.mark.parametrize("scope", ["auto", *SCOPES])
@pytest.mark.parametrize("block", WRITES, ids=lambda b: b.__name__)
def test_code_that_keeps_a_state_stays_python(block, scope):
    model, x = nn.Sequential(block(), Block(), Block()).eval(), rows()
    before = pickle.dumps({path: module.__dict__.get("stats") for path, module in model.named_modules()})
    hc = hct.convert(model, (x,), scope=scope)
    assert pickle.dumps({path: m.__dict__.get("stats") for path, m in model.named_modules()}) == before
    assert COUNT == 0 and not LOG and InTheClass.total == 0 and not hasattr(InTheClassByName, "made")
    assert [r.name for r in hc.hc_report.converted] == ["1", "2"]
    (left,) = [r for r in hc.hc_report.skipped if r.name == "0"]
    assert "which a graph would not" in left.reason or "may read" in left.reason
    theirs = outputs(copy.deepcopy(model), x)
    assert max(error(a, b) for a, b in zip(outputs(hc, x), theirs, strict=True)) <= 1e-5


class Sized(nn.Module):
    """Tells its blocks the size of the image, as Swin's stages do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Told() for _ in range(2))
        self.size = None

    def forward(self, x):
        self.size = (x.shape[1], x.shape[2])
        for block in self.blocks:
            block.height = x.shape[1]
            x = block(x)
        return x


class Told(Block):
    height = None

    def scale(self):
        return 1.0 / self.height


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_stored_before_it_is_read_is_stored_again(scope):
    model = Sized().eval()
    hc = hct.convert(copy.deepcopy(model), (torch.randn(2, 4, D),), scope=scope)
    assert len(hc.hc_report.converted) == 2
    for height in (4, 6, 4):
        x = torch.randn(2, height, D)
        agree(hc, model, x)
        assert hc.get_submodule("blocks.1").height == height


class ColdCache(Block):
    """Fills a table on its first call and remembers that it has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(16, D), persistent=False)
        self.filled = 0

    def forward(self, x):
        if len(x) > self.filled:
            self.table[: len(x)] = 0.1 * torch.arange(len(x))[:, None]
            self.filled = len(x)
        return x + self.f(x + self.table[: len(x)])


@pytest.mark.parametrize("scope", ["auto", *SCOPES])
def test_a_cold_cache_is_put_back_whole(scope):
    model, x = nn.Sequential(ColdCache(), Block()), rows(4)
    right = copy.deepcopy(model)(x)
    hc = hct.convert(model, (x,), scope=scope)
    assert model[0].filled == 0 and not model[0].table.any()
    assert error(hc(x), right) <= 1e-5 and error(model(x), right) <= 1e-5
    longer = rows(6)
    assert error(hc(longer), model(longer)) <= 1e-5


# -- draws


class Draws(Block):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        y = self.f(x)
        return x + (y * 0.0 if self.training and self.draw() < 0.5 else y)


class OwnGenerator(Draws):
    def __init__(self):
        super().__init__(None)
        self.generator = random.Random(0)

    def forward(self, x):
        return x + self.f(x) * (1 if self.generator.random() < 0.5 else 2)


class NumpyGenerator(OwnGenerator):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)


class TorchGenerator(OwnGenerator):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + self.f(x) * torch.rand(1, generator=self.generator)


DRAWS = {
    "random": lambda: Draws(random.random),
    "random by its module": lambda: Draws(lambda: random.random()),
    "uniform": lambda: Draws(lambda: random.uniform(0, 1)),
    "numpy": lambda: Draws(np.random.rand),
    "numpy by its module": lambda: Draws(lambda: np.random.uniform()),
    "torch": lambda: Draws(lambda: torch.rand(1).item()),
    "torch as a tensor": lambda: Draws(lambda: torch.rand(())),
    "own generator": OwnGenerator,
    "numpy generator": NumpyGenerator,
    "torch generator": TorchGenerator,
}


@pytest.mark.parametrize("scope", ["auto", *SCOPES])
@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_made_anew_on_every_call(kind, scope):
    model, x = nn.Sequential(DRAWS[kind](), DRAWS[kind]()).eval(), rows()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    hc = hct.convert(model, (x,), scope=scope)  # a deep copy of np.random.rand would have a generator of its own
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist()) and torch.equal(
        states[2], torch.get_rng_state()
    )
    assert len(hc.hc_report.converted) == 2
    for _ in range(2):
        for m in (model, hc):
            torch.manual_seed(2), random.seed(2), np.random.seed(2)
            m.train()
            m.results = [m(x) for _ in range(12)]
        assert max(error(a, b) for a, b in zip(hc.results, model.results, strict=True)) <= 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_two_graphs_for_a_decision_of_two_ways(scope):
    model, x = nn.Sequential(Draws(random.random)).train(), rows()
    hc = hct.convert(model, (x,), scope=scope)
    dropped = sum(torch.equal(hc(x), x) for _ in range(200))
    assert 60 < dropped < 140
    if scope == "graph":
        assert len(hc._all_variants()) <= 3, "two ways in training mode, one in eval mode"
    else:
        assert sum(len(graphs) for graphs in hct.block_graphs(hc).values()) <= 3


class LeavesItselfOut(Block):
    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return x + self.f(x)


class Rows(Block):
    """Adds to half of the rows in training mode."""

    def forward(self, x):
        if not self.training:
            return x + self.f(x)
        rows = torch.randperm(len(x))[: len(x) // 2]
        return torch.index_add(x, 0, rows, self.f(x[rows]), alpha=2.0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("scope", ["auto", *SCOPES])
@pytest.mark.parametrize("block", [LeavesItselfOut, Rows], ids=lambda b: b.__name__)
def test_layers_that_leave_themselves_out_are_all_converted(block, scope, training, caplog):
    caplog.set_level(logging.ERROR)
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = nn.Sequential(*(block() for _ in range(3))).train(training), rows(4)
        hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
        assert len(hc.hc_report.converted) == 3, str(hc.hc_report)
        for mode in (training, not training, training):
            for _ in range(4):
                agree(hc.train(mode), model.train(mode), x)


@pytest.mark.parametrize("scope", SCOPES)
def test_statistics_count_a_call_once(scope):
    class Norms(Block):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, x):
            y = self.norm(self.f(x))
            return x + (y if len(x) % 2 else 2 * y)

    model = stack(Norms).train()
    hc = hct.convert(copy.deepcopy(model), (rows(4),), scope=scope)
    for n in (4, 5, 4, 6, 7):
        x = rows(n)
        agree(hc, model, x)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(hc.get_buffer(name), buffer)


ACTIVATION = nn.LeakyReLU(0.1)


class Held(nn.Module):
    """Code that reads modules which no module registers, and dictionaries."""

    def __init__(self):
        super().__init__()
        self.norm, self.f = nn.LayerNorm(8), nn.Linear(8, 8)
        self.acts = [nn.Identity(), nn.LeakyReLU(0.1)]
        self.weights = {"a": 1, "b": 2}

    def forward(self, x):
        h = self.f(self.norm(x))
        for act in self.acts:
            h = act(h)
        for key in sorted(self.weights):
            h = h * self.weights[key]
        return x + ACTIVATION(h)


def _entry(block):
    block.acts[0] = nn.Tanh()


def _setting(block):
    block.acts[1].negative_slope = 0.9


def _longer(block):
    block.acts.append(nn.Tanh())


def _another_dictionary(block):
    block.weights = {"a": 3, "b": 2}


def _another_entry(block):
    block.weights["b"] = 5


@pytest.mark.parametrize("change", [_entry, _setting, _longer, _another_dictionary, _another_entry])
@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_what_lists_and_dictionaries_hold_may_change(scope, change):
    torch.manual_seed(0)
    model, x = nn.Sequential(Held(), Held()).eval(), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    with torch.no_grad():
        before = model(x)
        for m in (model, hc):
            for path in ("0", "1"):
                change(m.get_submodule(path))
        assert not torch.allclose(model(x), before)
        torch.testing.assert_close(torch.as_tensor(hc(x)), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_what_stays_the_same_is_not_traced_again(scope, caplog):
    class Functions(Held):
        def __init__(self):
            super().__init__()
            self.functions = (torch.tanh, F.relu, len)
            self.table = {"act": F.silu, "rows": [F.gelu]}

        def forward(self, x):
            return super().forward(x) + self.table["rows"][0](self.table["act"](self.functions[0](x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(Functions(), Functions()).eval(), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for converted in (hc, copy.deepcopy(hc)):
        converted(x)
        with caplog.at_level(logging.INFO, "hc_transform"):
            caplog.clear()
            converted(x)
            assert not [r for r in caplog.records if "traced" in r.getMessage()]


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_a_global_module_may_change(scope, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(Held(), Held()).eval(), torch.randn(2, 3, 8)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    with torch.no_grad():
        before = model(x)
        monkeypatch.setattr(ACTIVATION, "negative_slope", 0.9)
        assert not torch.allclose(model(x), before)
        torch.testing.assert_close(torch.as_tensor(hc(x)), model(x), rtol=1e-5, atol=1e-6)
        monkeypatch.setattr(sys.modules[__name__], "ACTIVATION", nn.Tanh())
        torch.testing.assert_close(torch.as_tensor(hc(x)), model(x), rtol=1e-5, atol=1e-6)


step = 0


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_an_attribute_is_no_global_of_its_name(scope, caplog, monkeypatch):
    class Stepping(Held):
        def __init__(self):
            super().__init__()
            self.step = 2

        def forward(self, x):
            return super().forward(x) + self.step

    model, x = nn.Sequential(Stepping(), Stepping()).eval(), torch.randn(2, 3, 8)
    hc = hct.convert(model, (x,), scope=scope)
    hc(x)
    with caplog.at_level(logging.INFO, "hc_transform"):
        for value in range(3):
            monkeypatch.setattr(sys.modules[__name__], "step", value)
            hc(x)
    assert not [r for r in caplog.records if "traced" in r.getMessage()]
