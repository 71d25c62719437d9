"""Python state of less usual kinds that traced code reads: changed after conversion, it counts, in copies too."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import connections, error
from torch import Tensor, nn

import hc_transform as hct

D = 8
SCOPES = ["graph", "blocks"]
Space = types.SimpleNamespace


class Block(nn.Module):
    """A residual scaled by what ``reads`` makes of the block."""

    def __init__(self, reads: Callable[[Any], Any], **held: Any) -> None:
        super().__init__()
        self.f, self.reads_scale = nn.Linear(D, D), reads
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.reads_scale(self)


class Gate:
    def __init__(self, k: float) -> None:
        self.k = k

    def scale(self) -> float:
        return self.k


@dataclasses.dataclass(slots=True)
class Slots:
    scale: float = 1.0


class Serving:
    """Serves what an inner dictionary holds, as settings that are read from files do."""

    def __init__(self, **held: float) -> None:
        self.__dict__["_held"] = held

    def __getattr__(self, name: str) -> float:
        try:
            return self.__dict__["_held"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: float) -> None:
        self._held[name] = value


class Delegating(Block):
    """Serves settings as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name == "gain":
            return self.__dict__["held"]["gain"]
        return super().__getattr__(name)


def closure() -> Any:
    value = 1.0

    def read() -> float:
        return value

    def write(new: float) -> None:
        nonlocal value
        value = new

    read.write = write  # type: ignore[attr-defined]
    return read


def by_name(block: Any) -> float:
    return getattr(block.held, "scale", 1.0)


def deep() -> Space:
    return Space(a=Space(b=Space(c=Space(d=Space(scale=1.0)))))


# how the code reads, what the block holds, and the change
CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], Callable[[Any], None]]] = {
    "a bound method": (lambda b: b.held(), lambda: Gate(1.0).scale, lambda b: setattr(b.held.__self__, "k", 5.0)),
    "a closure": (lambda b: b.held(), closure, lambda b: b.held.write(5.0)),
    "a partial's argument": (
        lambda b: b.held(),
        lambda: functools.partial(lambda c: c[0], [1.0]),
        lambda b: b.held.args[0].__setitem__(0, 5.0),
    ),
    "getattr by name": (by_name, lambda: Space(scale=1.0), lambda b: setattr(b.held, "scale", 5.0)),
    "getattr of what is absent": (by_name, Space, lambda b: setattr(b.held, "scale", 5.0)),
    "an attribute that is absent": (
        lambda b: getattr(b, "gain", 1.0),
        Space,
        lambda b: setattr(b, "gain", 5.0),
    ),
    "hasattr": (lambda b: 2.0 if hasattr(b, "gain") else 1.0, Space, lambda b: setattr(b, "gain", 5.0)),
    "a long list": (lambda b: b.held[70], lambda: [1.0] * 80, lambda b: b.held.__setitem__(70, 5.0)),
    "a long dictionary": (
        lambda b: b.held[70],
        lambda: dict.fromkeys(range(80), 1.0),
        lambda b: b.held.__setitem__(70, 5.0),
    ),
    "slots": (lambda b: b.held.scale, Slots, lambda b: setattr(b.held, "scale", 5.0)),
    "an object that serves a dictionary": (
        lambda b: b.held.scale,
        lambda: Serving(scale=1.0),
        lambda b: setattr(b.held, "scale", 5.0),
    ),
    "four objects deep": (lambda b: b.held.a.b.c.d.scale, deep, lambda b: setattr(b.held.a.b.c.d, "scale", 5.0)),
    "an array": (lambda b: float(b.held[0]), lambda: np.ones(3), lambda b: b.held.__setitem__(0, 5.0)),
    "a number of numpy": (lambda b: float(b.held), lambda: np.float32(1), lambda b: setattr(b, "held", np.float32(5))),
    "a deque": (lambda b: b.held[0], lambda: collections.deque([1.0]), lambda b: b.held.__setitem__(0, 5.0)),
    "a list of tensors": (
        lambda b: b.held[0],
        lambda: [torch.ones(())],
        lambda b: setattr(b, "held", [torch.tensor(5.0)]),
    ),
}


def check_change(make: Callable[[], nn.Module], change: Callable[[Any], None], scope: str) -> None:
    """Change a model and what became of it alike; both must agree, and so must a copy that is made then."""
    x = torch.randn(2, D)
    model = make()
    hc = hct.convert(model, (x,), scope=scope)
    with torch.no_grad():
        before = model(x)
        held = {id(m): m for m in (model.get_submodule("0"), hc.get_submodule("0"))}
        objects: set[int] = set()
        for block in held.values():
            if id(block.__dict__.get("held")) not in objects or not isinstance(block.held, (Space, list)):
                objects.add(id(block.__dict__.get("held")))
                change(block)
        assert error(model(x), before) > 1e-3, "the change does something"
        assert error(hc(x), model(x)) < 1e-5
        assert error(copy.deepcopy(hc)(x), model(x)) < 1e-5
        assert len(connections(hc)) == 2


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", CASES)
def test_what_changes_counts(case: str, scope: str) -> None:
    reads, make, change = CASES[case]
    check_change(lambda: nn.Sequential(Block(reads, held=make()), Block(reads, held=make())), change, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_module_serves_by_getattr_counts(scope: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(*(Delegating(lambda b: b.gain, held={"gain": 1.0}) for _ in range(2)))

    check_change(make, lambda b: b.held.update(gain=5.0), scope)


class Biased(nn.Module):
    def __init__(self, bias: Any, register: str) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)
        getattr(self, register)("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + (y if self.bias is None else y + self.bias)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("register", ["register_buffer", "register_parameter"])
@pytest.mark.parametrize("comes", [True, False], ids=["comes", "goes"])
def test_a_tensor_that_comes_or_goes_counts(comes: bool, register: str, scope: str) -> None:
    one = nn.Parameter(torch.ones(D))  # of both, so that the second block reads another's
    was, becomes = (None, one) if comes else (one, None)
    model, x = nn.Sequential(Biased(was, register), Biased(was, register)), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope)
    for m in (model, hc):
        m.get_submodule("1").bias = becomes
    with torch.no_grad():
        assert error(hc(x), model(x)) < 1e-5


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return x + y


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_module_that_is_appended_counts(compiled: bool, scope: str) -> None:
    model, x, new = nn.Sequential(Deep(), Deep()), torch.randn(2, D), nn.Linear(D, D)
    hc = hct.convert(model, (x,), scope=scope)
    for m in (model, hc):
        m.get_submodule("1.layers").append(new)
    with torch.no_grad():
        run = torch.compile(hc, backend="eager") if compiled else hc
        assert error(run(x), model(x)) < 1e-5


class Experts(nn.Module):
    """Decides on values, so that it stays whole, and stores a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if (y > 0).any():
            y = y * 2
        self.loss, self.count = y.square().mean(), int((y > 0).sum())
        return y


class Routed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.f, self.experts, self.name = nn.Linear(D, D), Experts(), name

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        x = x + torch.tanh(self.f(x))
        x = x + self.experts(x)
        return x, getattr(self.experts, self.name) * x.mean()


@pytest.mark.parametrize("scope", ["graph", "auto", "blocks"])
@pytest.mark.parametrize("name", ["loss", "count"])
def test_what_a_whole_module_stores_is_read_anew(name: str, scope: str) -> None:
    model, x, y = Routed(name), torch.randn(9, D), torch.randn(4, D)
    try:
        hc = hct.convert(model, (x,), scope=scope, leaf_modules=["experts"] if scope == "graph" else [])
    except hct.HCTransformError as refusal:
        assert name == "count" and "sets in each call" in str(refusal)
        return
    assert error(hc(y), model(y)) < 1e-5
    model.zero_grad()
    hc(y)[1].backward()
    assert model.experts.f.weight.grad is not None


@functools.cache
def table(length: int) -> Tensor:
    return torch.arange(length).float()[:, None]


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x * table(x.shape[1]))


@pytest.mark.parametrize("scope", SCOPES)
def test_no_traced_value_enters_a_cache_of_the_users(scope: str) -> None:
    table.cache_clear()
    model, x, y = nn.Sequential(Tabled(), Tabled()), torch.randn(2, 5, D), torch.randn(2, 7, D)
    hc = hct.convert(model, (x,), scope=scope)
    assert len(hc.hc_report.converted) == 2
    assert type(table(5)) is Tensor and table(5).tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    with torch.no_grad():
        assert error(hc(y), model(y)) < 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_a_copy_after_a_forward_was_replaced_runs_the_new_one(scope: str) -> None:
    model, x = nn.Sequential(*(Block(lambda b: 1.0) for _ in range(3))), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope)
    for m in (model, hc):
        m.get_submodule("2").forward = lambda x: x * 2
    with torch.no_grad():
        assert error(hc(x), model(x)) < 1e-5
        assert error(copy.deepcopy(hc)(x), model(x)) < 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_a_block_that_is_replaced_is_plain_in_both_scopes(scope: str) -> None:
    model, x, new = nn.Sequential(*(Deep() for _ in range(3))), torch.randn(2, D), Deep()
    hc = hct.convert(model, (x,), scope=scope)
    for m in (model, hc):
        setattr(m, "1", new)
    with torch.no_grad():
        assert error(hc(x), model(x)) < 1e-5
    assert {name.partition(".")[0] for name in connections(hc)} == {"0", "2"}


class Asks(nn.Module):
    def __init__(self, question: str) -> None:
        super().__init__()
        self.f, self.question = nn.Linear(D, D), question

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.question == "autocast" and torch.is_autocast_enabled("cpu"):
            y = y * 5
        if self.question == "dtype" and torch.get_default_dtype() == torch.float64:
            y = y * 5
        if self.question == "inference" and torch.is_inference_mode_enabled():
            y = y * 5
        if self.question == "deterministic" and torch.are_deterministic_algorithms_enabled():
            y = y * 5
        return x + y


@contextlib.contextmanager
def switched(switch: Callable[[Any], None], on: Any, off: Any) -> Any:
    switch(on)
    try:
        yield
    finally:
        switch(off)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dtype": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "inference": torch.inference_mode,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("question", STATES)
def test_the_state_of_torch_is_asked_anew(question: str, scope: str) -> None:
    model, x = nn.Sequential(Asks(question), Asks(question)), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope)
    plain = hc(x)
    with STATES[question]():
        assert error(hc(x), model(x)) < 2e-2
        assert error(hc(x).float(), plain) > 0.1
    assert error(hc(x), model(x)) < 1e-5


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.act, self.part, self.factors, self.pair = nn.Linear(D, D), torch.relu, slice(0, 8), [1.0], (1, "a")

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.f(x)) * self.pair[0]
        for factor in self.factors:
            y = y * factor
        return x + y * y[..., self.part].sum(-1, keepdim=True)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("name", "value"),
    [("act", torch.tanh), ("part", slice(0, 3)), ("factors", [1.0, 3.0]), ("pair", (2, "a"))],
    ids=["function", "slice", "list", "tuple"],
)
def test_compiled_code_notices_it_too(name: str, value: Any, scope: str) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(Held(), Held()), torch.randn(2, D)
    hc = hct.convert(model, (x,), scope=scope)
    compiled = torch.compile(hc, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert error(compiled(x), model(x)) < 1e-5
        for m in (model, hc):
            setattr(m.get_submodule("1"), name, value)
        assert error(hc(x), model(x)) < 1e-5  # once in eager mode, which traces again
        assert error(compiled(x), model(x)) < 1e-5


class AsksForGradMode(nn.Module):
    """Does twice as much with gradients."""

    def __init__(self):
        super().__init__()
        self.blocks, self.last = nn.ModuleList(Plain() for _ in range(2)), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        y = self.last(x)
        return x + (2 * y if torch.is_grad_enabled() else y)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_is_converted_in_the_grad_mode_of_the_caller(scope, recorded):
    torch.manual_seed(0)
    model, x = AsksForGradMode(), torch.randn(2, 8)
    with torch.set_grad_enabled(recorded):
        hc = hct.convert(model, (x,), scope=scope)
    assert "Not verified" not in str(hc.hc_report) and len(hc.hc_report.converted) == 3
    assert ("Without gradients" in str(hc.hc_report)) == recorded
    for called in (False, True):
        with torch.set_grad_enabled(called):
            torch.testing.assert_close(torch.as_tensor(hc(x)), model(x))


class Force(nn.Module):
    """The gradient of an energy, as models of molecules give it."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Plain() for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x):
        x = x.detach().requires_grad_(True)
        h = x
        for block in self.blocks:
            h = block(h)
        energy = self.head(h).sum()
        return energy, torch.autograd.grad(energy, x, create_graph=self.training)[0]


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_within_a_forward(scope):
    torch.manual_seed(0)
    model, x = Force().eval(), torch.randn(2, 8)
    hc = hct.convert(model, (x,), scope=scope)
    assert "fails without gradients" in str(hc.hc_report) and "Not verified" not in str(hc.hc_report)
    torch.testing.assert_close(hc(x), model(x))
    with torch.no_grad(), pytest.raises(hct.TraceError, match="fails on the example inputs"):
        hct.convert(model, (x,), scope=scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_padding_mask_that_torch_decides_on_by_the_grad_mode(scope):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[4], [3]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        hc = hct.convert(model, (x,), {"src_key_padding_mask": mask}, scope=scope)
    assert "Without gradients TransformerEncoder itself gives other outputs" in str(hc.hc_report)
    expected = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(torch.as_tensor(hc(x, src_key_padding_mask=mask)), expected)


def test_out_in_a_forward_that_runs_without_gradients():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x * 1
            torch.add(x, self.f(x), out=x)
            return x.clamp_(-1, 1) + self.g(x)

    torch.manual_seed(0)
    model, x = Overwrites(), torch.randn(2, 8)
    with torch.no_grad():
        for scope in SCOPES:
            hc = hct.convert(model, (x,), scope=scope)
            assert len(hc.hc_report.converted) == 2
            torch.testing.assert_close(torch.as_tensor(hc(x)), model(x))


def squares(block: Any) -> Tensor:
    return 1 + sum(p.pow(2).sum() for p in block.parameters())


def saved(block: Any) -> Tensor:
    return 1 + sum(value.sum() for value in block.state_dict().values())


def named(block: Any) -> Tensor:
    return dict(block.named_parameters())["f.weight"].data.sum()


def by_gradient(block: Any) -> float:
    return 1.0 if block.f.weight.grad is None and all(p.requires_grad for p in block.parameters()) else 2.0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reads", [squares, saved, named, by_gradient])
def test_parameters_that_code_comes_by_otherwise_count(reads: Callable[[Any], Any], scope: str) -> None:
    def change(block: Any) -> None:
        block.f.weight.data = block.f.weight.data * 3
        block.f.weight.grad = torch.ones_like(block.f.weight)

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(reads), Block(reads)), torch.randn(2, D)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for step in (change, lambda block: block.f.requires_grad_(False)):
        before = model(x)
        for block in (*model, hc.get_submodule("0"), hc.get_submodule("1")):
            step(block)
        assert step is not change or error(model(x), before) > 1e-3
        assert error(hc(x), model(x)) < 1e-5


def halve(block: Any) -> float:
    for p in block.parameters():
        p.data *= 0.5
    return 1.0


def clamp(block: Any) -> float:
    for p in block.parameters():
        p.data.clamp_(-0.1, 0.1)
    return 1.0


def replace_data(block: Any) -> float:
    block.f.weight.data = block.f.weight.data * 0.5
    return 1.0


def replace_gradient(block: Any) -> float:
    block.f.weight.grad = torch.ones_like(block.f.weight)
    return 1.0


class Writes(Block):
    """Writes into its parameters when it has used them, which the first call does not show."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.f(x)
        self.reads_scale(self)
        return y


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("writes", [halve, clamp])
def test_what_code_writes_into_parameters_is_written_on_every_call(writes: Callable[[Any], Any], scope: str) -> None:
    model, x = nn.Sequential(Writes(writes), Writes(writes)), torch.randn(2, D)
    reference, hc = copy.deepcopy(model), hct.convert(model, (x,), scope=scope)
    with torch.no_grad():
        for _ in range(3):
            assert error(hc(x), reference(x)) < 1e-5


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("writes, name", [(replace_data, "data"), (replace_gradient, "grad")])
def test_code_that_sets_what_a_graph_would_not_stays_python(
    writes: Callable[[Any], Any], name: str, scope: str
) -> None:
    model = nn.Sequential(Writes(writes), Writes(writes))
    with pytest.raises(hct.NothingToConvert, match=f"its code sets '{name}' of a tensor"):
        hct.convert(model, (torch.randn(2, D),), scope=scope)
