"""What code finds beside its inputs, and what its inputs are: tensors in containers and globals, sentinels, lists."""

from __future__ import annotations

import copy
import enum
import itertools
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import connections, error, moved
from torch import Tensor, nn

import hc_transform as hct

D = 8
SCOPES = ["graph", "blocks"]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONDITION = values(2, 1, D)
TABLE: dict[str, Tensor] = {"condition": values(2, 1, D)}
UNSET = object()


class Held(nn.Module):
    """A residual block whose branch sees what ``reads`` finds."""

    of_class = values(2, 1, D)

    def __init__(self, reads: Callable[[Any], Tensor], **held: Any) -> None:
        super().__init__()
        self.f, self.reads = nn.Linear(D, D), reads
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x + self.reads(self)))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *more, **named)
        return x


def set_global(model: Any, value: Tensor) -> None:
    global CONDITION
    CONDITION = value


def in_blocks(put: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], None]:
    return lambda model, value: [put(block, value) for block in model.blocks] and None


def new(**held: Any) -> dict[str, Any]:
    return {name: make() for name, make in held.items()}


PLACES: dict[str, tuple[Any, Any, Any]] = {
    "global": (lambda b: CONDITION, {}, set_global),
    "dictionary": (lambda b: TABLE["condition"], {}, lambda m, v: TABLE.__setitem__("condition", v)),
    "class": (lambda b: b.of_class, {}, lambda m, v: setattr(Held, "of_class", v)),
    "own_dictionary": (
        lambda b: b.held["c"],
        {"held": lambda: {"c": values(2, 1, D)}},
        in_blocks(lambda b, v: b.held.__setitem__("c", v)),
    ),
    "nested": (
        lambda b: b.held["a"][0]["c"] * 2,
        {"held": lambda: {"a": [{"c": values(2, 1, D)}]}},
        in_blocks(lambda b, v: b.held["a"][0].__setitem__("c", v)),
    ),
    "namespace": (
        lambda b: b.held.c,
        {"held": lambda: types.SimpleNamespace(c=values(2, 1, D))},
        in_blocks(lambda b, v: setattr(b.held, "c", v)),
    ),
    "list": (
        lambda b: b.held[0],
        {"held": lambda: [values(2, 1, D)]},
        in_blocks(lambda b, v: b.held.__setitem__(0, v)),
    ),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("place", PLACES)
def test_tensor_is_read_anew(place: str, scope: str) -> None:
    reads, held, put = PLACES[place]
    torch.manual_seed(0)
    model, x = Stack(Held(reads, **new(**held)), Held(reads, **new(**held))).eval(), values(2, 5, D, seed=1)
    hc = hct.convert(model, args=(x,), scope=scope)
    traced = len(getattr(hc, "_variants", ()))
    for value in (values(2, 1, D, seed=2), values(2, 1, D, seed=3)):
        put(model, value)
        put(hc, value)
        assert error(hc(x), model(x)) <= 1e-5
        assert error(copy.deepcopy(hc)(x), model(x)) <= 1e-5
    assert len(getattr(hc, "_variants", ())) == traced  # another value takes no other graph
    value = values(D, seed=4)
    put(model, value)
    put(hc, value)
    assert error(hc(x), model(x)) <= 1e-5


def test_held_tensor_compiles_and_pickles() -> None:
    reads, held, put = PLACES["own_dictionary"]
    model, x = Stack(Reads(**new(**held))).eval(), values(2, 5, D, seed=1)
    hc = hct.convert(model, args=(x,), scope="graph")
    compiled = torch.compile(hc, backend="eager", fullgraph=True)
    assert error(compiled(x), model(x)) <= 1e-5
    value = values(2, 1, D, seed=2)
    put(model, value)
    put(hc, value)
    assert error(compiled(x), model(x)) <= 1e-5
    assert error(pickle.loads(pickle.dumps(hc))(x), model(x)) <= 1e-5


class Reads(Held):
    def __init__(self, **held: Any) -> None:
        super().__init__(None, **held)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x + self.held["c"]))


class Conditioned(Stack):
    """Its forward sets what its blocks read."""

    def __init__(self) -> None:
        shared = types.SimpleNamespace(c=None)
        super().__init__(*(Held(lambda b: b.held.c, held=shared) for _ in range(2)))
        self.shared = shared

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        self.shared.c = c
        return super().forward(x)


def test_condition_that_a_parent_sets() -> None:
    model, x = Conditioned().eval(), values(2, 5, D)
    hc = hct.convert(model, args=(x, values(2, 1, D, seed=1)))
    for seed in (2, 3):
        c = values(2, 1, D, seed=seed)
        assert error(hc(x, c), model(x, c)) <= 1e-5


def test_parameter_in_a_dictionary_gets_its_gradient() -> None:
    model, x = Stack(Held(lambda b: b.held["w"], held={"w": nn.Parameter(values(D))})), values(2, 5, D)
    hc = hct.convert(model, args=(x,), scope="blocks")
    hc(x).sum().backward()
    assert hc.blocks[0].held["w"].grad is not None


class Logged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor, log: Any = None) -> Tensor:
        x = x + torch.tanh(self.f(x))
        if isinstance(log, list):
            log.append(x)
        elif log is not None:
            log.last = x
        return x


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("given", [False, True], ids=["none", "given"])
def test_writes_into_inputs(scope: str, given: bool) -> None:
    model, x = Stack(Logged(), Logged()).eval(), values(2, 3, D)
    for make, held in ((list, lambda log: log), (types.SimpleNamespace, lambda log: [log.last])):
        hc = hct.convert(model, args=(x, make()) if given else (x,), scope=scope)
        ours, theirs = make(), make()
        hc(x, ours)
        model(x, theirs)
        assert error(held(ours), held(theirs)) <= 1e-5


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, states: Any) -> Tensor:
        states[0] = self.f(x)
        x = x + states[0]
        return x + self.g(x)


@pytest.mark.parametrize("scope", SCOPES)
def test_branch_passes_through_a_list_of_the_caller(scope: str) -> None:
    model, x = Sums().eval(), values(2, 3, D)
    hc = hct.convert(model, args=(x, [x]), scope=scope)
    assert [r.name for r in hc.hc_report.converted] == ["f", "g"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleDict({name: nn.Linear(D, D) for name in ("attn", "mlp", "conv")})
        self.order = ["attn", "mlp", "conv", "mlp"]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = x + torch.tanh(self.l[name](x))
        return x


@pytest.mark.parametrize("scope", SCOPES)
def test_layers_in_another_order_keep_their_connections(scope: str) -> None:
    x = values(2, 3, D)
    hc = hct.convert(Layers().eval(), args=(x,), scope=scope)
    moved(hc)
    hc.order = ["mlp", "attn"]
    hc(x).square().sum().backward()
    used = {n.split(".")[1] for n, p in hc.named_parameters() if n.endswith("h_post") and p.grad is not None}
    assert used == {"l_mlp", "l_attn"}
    hc.order = ["attn", "mlp", "conv", "mlp", "conv"]
    with pytest.raises(hct.TraceError, match="conv:2"):
        hc(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = h + torch.tanh(self.f(h + x[:, t]))
        return h


@pytest.mark.parametrize("scope", SCOPES)
def test_fewer_steps_beside_adds_that_are_none(scope: str) -> None:
    model = Recurrent().eval()
    hc = hct.convert(model, args=(values(2, 3, D),), scope=scope)
    assert error(hc(values(2, 2, D)), model(values(2, 2, D))) <= 1e-5


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.f(h))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.times = Cell(), 3

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.cell(x)
        return x


def test_block_called_more_often_than_at_conversion_says_so(caplog: pytest.LogCaptureFixture) -> None:
    hc = hct.convert(Repeated(), args=(values(2, D),), scope="blocks")
    hc(values(2, D))
    assert "called again" not in caplog.text
    hc.times = 4
    hc(values(2, D))
    assert "called again with what the last of its 3 calls gave" in caplog.text


class WithInput(nn.Module):
    def __init__(self, as_dictionary: bool) -> None:
        super().__init__()
        self.norm, self.as_dictionary = nn.LayerNorm(D), as_dictionary

    def forward(self, x: Tensor) -> Any:
        return {"h": self.norm(x), "r": x} if self.as_dictionary else (self.norm(x), x)


class PreNorm(nn.Module):
    def __init__(self, as_dictionary: bool) -> None:
        super().__init__()
        self.norm, self.f = WithInput(as_dictionary), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(x)
        h, r = found.values() if isinstance(found, dict) else found
        return r + self.f(h)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["tuple", "dictionary"])
def test_norm_that_returns_its_input_too(kind: str, scope: str) -> None:
    model, x = Stack(*(PreNorm(kind == "dictionary") for _ in range(3))).eval(), values(2, 3, D)
    hc = hct.convert(model, args=(x,), scope=scope)
    assert len(hc.hc_report.converted) == 3


class Latents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents, self.q = nn.Parameter(values(4, D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(len(x), -1, -1)
        return z + nn.functional.scaled_dot_product_attention(self.q(z), x, x)


@pytest.mark.parametrize("scope", SCOPES)
def test_learnt_queries_are_a_skip(scope: str) -> None:
    model, x = Latents(), values(2, 5, D)
    hc = hct.convert(model, args=(x,), scope=scope)
    assert len(hc.hc_report.converted) == 1 and error(hc(x), model(x)) <= 1e-5


def test_parameter_alone_is_no_skip() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.f, self.g = nn.Parameter(values(5, D)), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.g(x)
            return x + (self.table + self.f(self.table))

    hc = hct.convert(Table(), args=(values(2, 5, D),))
    assert [r.name for r in hc.hc_report.converted] == ["g"]


class Mode(enum.Enum):
    A = 1
    B = 2


class Plain:
    pass


class Other:
    pass


DECISIONS: dict[str, tuple[Any, list[Any]]] = {
    "enum": (lambda o: o is Mode.A, [Mode.B, Mode.A]),
    "enum_in_a_set": (lambda o: o in {Mode.A}, [Mode.B, Mode.A]),
    "enum_as_a_key": (lambda o: {Mode.A: True, Mode.B: False}[o], [Mode.B, Mode.A]),
    "sentinel": (lambda o: o is UNSET, [UNSET, None, 3]),
    "function": (lambda o: o is torch.nn.functional.gelu, [torch.nn.functional.silu, torch.nn.functional.gelu]),
    "class": (lambda o: o is Plain, [Other, Plain]),
    "isinstance": (lambda o: isinstance(o, Plain), [Other(), Plain()]),
    "type": (lambda o: type(o) is Plain, [Other(), Plain()]),
    "hasattr": (lambda o: hasattr(o, "t"), [types.SimpleNamespace(), types.SimpleNamespace(t=1)]),
    "getattr": (
        lambda o: getattr(o, "t", False),
        [types.SimpleNamespace(), types.SimpleNamespace(t=True), types.SimpleNamespace(t=False)],
    ),
    "dtype": (lambda o: o is torch.float32, [torch.float64, torch.float32]),
    "true": (lambda o: o is True, [False, True]),
    "size": (lambda o: o[0] == 2, [torch.Size([2, 3]), torch.Size([1, 3])]),
}


class Decides(nn.Module):
    def __init__(self, decide: Callable[[Any], Any]) -> None:
        super().__init__()
        self.f, self.decide = nn.Linear(D, D), decide

    def forward(self, x: Tensor, o: Any = UNSET) -> Tensor:
        return x + self.f(x) * (1 if self.decide(o) else 2)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", DECISIONS)
def test_decision_on_what_an_input_is(kind: str, scope: str) -> None:
    decide, given = DECISIONS[kind]
    model, x = Stack(Decides(decide), Decides(decide)).eval(), values(2, 3, D)
    hc = hct.convert(model, args=(x, given[0]), scope=scope)
    for value in (*given, given[0]):
        assert error(hc(x, value), model(x, value)) <= 1e-5


def test_default_that_is_a_sentinel() -> None:
    model, x = Decides(lambda o: o is UNSET).eval(), values(2, 3, D)
    hc = hct.convert(model, args=(x,), scope="graph")
    assert error(hc(x), model(x)) <= 1e-5
    assert error(hc(x, None), model(x, None)) <= 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_attribute_that_is_a_sentinel_or_a_class(scope: str) -> None:
    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.o, self.k = nn.Linear(D, D), UNSET, Plain

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * (1 if self.o is UNSET else 2) * (3 if self.k is Plain else 4)

    model, x = Attribute().eval(), values(2, 3, D)
    hc = hct.convert(model, args=(x,), scope=scope)
    for name, value in (("o", None), ("k", Other), ("o", UNSET)):
        setattr(model, name, value)
        setattr(hc, name, value)
        assert error(hc(x), model(x)) <= 1e-5


def test_plain_tensor_of_other_dimensions_in_a_graph() -> None:
    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.o = nn.Linear(D, D), values(1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * (2 if self.o.ndim == 2 else 1)

    model, x = Attribute().eval(), values(2, 3, D)
    hc = hct.convert(model, args=(x,), scope="graph")
    for value in (values(1), values(1, 1)):
        model.o = hc.o = value
        assert error(hc(x), model(x)) <= 1e-5


@pytest.mark.parametrize("first", [0, None], ids=["number", "none"])
def test_optional_number_comes_and_goes(first: int | None) -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(D, D)
            self.register_buffer("k", values(16, D))

        def forward(self, x: Tensor, at: int | None = None) -> Tensor:
            c = 0 if at is None else self.k[: at + 2].mean(0)
            return x + self.f(x + c)

    model, x = Offset().eval(), values(2, 3, D)
    hc = hct.convert(model, args=(x, first), scope="blocks")
    for at in (0, 1, None, 3):
        assert error(hc(x, at), model(x, at)) <= 1e-5


class FrozenNorm(Stack):
    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


@pytest.mark.parametrize("scope", [*SCOPES, "auto"])
def test_train_that_the_class_overrides(scope: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.f(x))

    model, x = FrozenNorm(Block(), Block()).eval(), values(4, D)
    hc = hct.convert(model, args=(x,), scope=scope)
    for made in (hc, copy.deepcopy(hc)):
        assert made.train() is made and made.training
        assert not any(m.training for m in made.modules() if isinstance(m, nn.BatchNorm1d))
        assert all(c.training for c in connections(made).values())
    assert error(hc(x), model.train()(x)) <= 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_loading_that_the_class_overrides(scope: str) -> None:
    class Versioned(Stack):
        _version = 2

        def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            assert metadata["version"] == 2
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    model, x = Versioned(Cell(), Cell()), values(2, D)
    hc = hct.convert(model, args=(x,), scope=scope)
    for made in (hc, copy.deepcopy(hc)):
        made.load_state_dict(hc.state_dict())
        made.load_state_dict(model.state_dict(), strict=False)


def test_call_that_the_class_overrides_keeps_the_model() -> None:
    class Doubled(Stack):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model, x = Doubled(Cell(), Cell()), values(2, D)
    hc = hct.convert(model, args=(x,))
    assert isinstance(hc, Doubled) and error(hc(x), model(x)) <= 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_requires_grad_on_the_trunk(scope: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.f(x)).contiguous().requires_grad_()

    model, x = Stack(Block(), Block()), values(2, D)
    hc = hct.convert(model, args=(x,), scope=scope)
    assert error(hc(x), model(x)) <= 1e-5


class Energy(nn.Module):
    """Turns gradients on for itself, as models of forces do."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.g = Cell(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = self.cell(x)
            return x + torch.tanh(self.g(x))


def test_gradients_turned_on() -> None:
    model, x = Energy(), values(2, D)
    with pytest.raises(hct.UnsupportedModel, match="grad mode"):
        hct.convert(model, args=(x,), scope="graph")
    hc = hct.convert(model, args=(x,))
    with torch.no_grad():
        assert hc(x).requires_grad


class Cycles(nn.Module):
    """Two modules by turns: the streams go on from the second cycle's last call alone, as in hierarchical reasoning."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = (nn.Sequential(Cell(), Cell(), Cell()) for _ in range(2))
        self.start = nn.Parameter(values(D))

    def forward(self, x: Tensor) -> Tensor:
        high, low = x, self.start.expand_as(x)
        for _ in range(2):
            for _ in range(3):
                low = self.low(low + high)
            high = self.high(high + low)
        return high


def test_calls_that_end_unlike_others_at_their_place() -> None:
    model, x = Cycles(), values(2, D)
    hc = hct.convert(model, args=(x,), scope="blocks")
    assert error(hc(x), model(x)) <= 1e-5
    moved(hc)
    hc(x).square().sum().backward()
    assert all(p.grad is not None for n, p in hc.named_parameters() if n.endswith("h_post"))


@pytest.mark.parametrize("scope", SCOPES)
def test_block_that_takes_from_an_iterator_stays_python(scope: str) -> None:
    class Takes(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.scales = itertools.cycle([1.0, 2.0, 3.0])

        def forward(self, h: Tensor) -> Tensor:
            return h + torch.tanh(self.f(h)) * next(self.scales)

    model, x = Stack(Takes(), Cell()).eval(), values(2, D)
    hc = hct.convert(model, args=(x,), scope=scope)
    model = copy.deepcopy(model)
    assert [r.name for r in hc.hc_report.converted] == ["blocks.1"]
    assert all(error(hc(x), model(x)) <= 1e-5 for _ in range(4))


@pytest.mark.parametrize("part", [slice(2), slice(1, None)], ids=["last", "first"])
def test_layers_removed_from_a_graph(part: slice) -> None:
    model, x = Stack(Cell(), Cell(), Cell()).eval(), values(2, D)
    hc = hct.convert(model, args=(x,), scope="graph")
    model = copy.deepcopy(model)
    model.blocks, hc.blocks = model.blocks[part], hc.blocks[part]
    assert error(hc(x), model(x)) <= 1e-5


def test_set_and_numpy_number_as_inputs() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList(Cell() for _ in range(3))

        def forward(self, x: Tensor, skip: set[int], scale: Any) -> Tensor:
            skipped = [False] * 3
            for i in skip:
                skipped[i] = True
            for cell, out in zip(self.cells, skipped, strict=True):
                x = x if out else cell(x)
            return x * float(scale)

    model, x = Skips().eval(), values(2, D)
    hc = hct.convert(model, args=(x, set(), np.float32(0.5)), scope="graph")
    for given in ((set(), np.float32(0.5)), ({1}, np.float32(0.5)), ({0, 2}, np.float64(2.0))):
        assert error(hc(x, *given), model(x, *given)) <= 1e-5


class Reversible(Stack):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for block in reversed(self.blocks) if self.training else self.blocks:
            x = block(x)
        return x


def test_blocks_in_another_order_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Reversible(Cell(), Cell(), Cell()).eval(), values(2, D)
    hc = hct.convert(model, args=(x,), scope="blocks")
    hc(hc(x))
    assert "begin anew" not in caplog.text
    hc.train()
    assert error(hc(x), model.train()(x)) <= 1e-5
    assert "blocks.1 comes after the last block of its trunk" in caplog.text


def test_write_that_is_lost_is_not_equivalent(monkeypatch: pytest.MonkeyPatch) -> None:
    from hc_transform import convert_graph

    verify = convert_graph.verify

    def without_the_write(original: nn.Module, converted: Any, *args: Any, **kwargs: Any) -> Any:
        for node in [n for n in converted.graph.nodes if n.target == "append"]:
            converted.graph.erase_node(node)
        converted.recompile()
        return verify(original, converted, *args, **kwargs)

    x = values(2, D)
    assert hct.convert(Logged(), args=(x, []), scope="graph").hc_report.max_error <= 1e-5
    monkeypatch.setattr(convert_graph, "verify", without_the_write)
    with pytest.raises(hct.NotEquivalent, match="writes something else into its inputs"):
        hct.convert(Logged(), args=(x, []), scope="graph")
