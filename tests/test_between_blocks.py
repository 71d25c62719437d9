"""scope="blocks": what Python code between blocks does with a value that is held as streams."""

from __future__ import annotations

import operator
import types
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from checks import moved
from torch import nn
from torch.utils.checkpoint import checkpoint

import hc_transform as hct
from hc_transform.streams.trunk_value import TrunkValue, enter, read_out

N, D = 3, 6


class Block(nn.Module):
    def __init__(self, dim=D):
        super().__init__()
        self.f = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.f(x)


class Stack(nn.Module):
    """Does ``between`` after each block, while ``active``."""

    def __init__(self, between=None, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.between, self.active = between, False

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if self.active:
                x = self.between(x)
        return x


def converted(between, **options):
    """A model whose code between the blocks does nothing at conversion, and the converted one; both then do it."""
    model = Stack(between)
    hc = hct.convert(model, (torch.randn(2, D),), scope="blocks", num_streams=N, **options)
    assert len(hc.hc_report.converted) == 3 and {r.trunk for r in hc.hc_report.converted} == {0}
    model.active = hc.active = True
    return model, hc


def trunk_value(grad=False):
    streams = tuple(torch.randn(2, D, dtype=torch.float64, requires_grad=grad) for _ in range(N))
    return TrunkValue(tuple(s * 1 for s in streams)), streams


def _iadd(x):
    x += 2.0
    return x


def _imul(x):
    x *= 0.5
    return x


def _ipow(x):
    x **= 2
    return x


def _fill(x):
    x[...] = 1.5
    return x


def _fill_part(x):
    x[:, 1:3] = torch.ones(2, dtype=x.dtype) * 3
    return x


def _returned(function):
    def call(x):
        function(x)
        return x

    call.__name__ = function.__name__
    return call


def _named(name, function):
    function.__name__ = name
    return function


MASK = torch.arange(D) % 2 == 0
CARRIED = [  # what each of these does to a value it does to each stream
    _iadd, _imul, _ipow, _fill, _fill_part,
    _named("mul_", lambda x: x.mul_(0.5)),
    _named("add_ of a tensor", lambda x: x.add_(torch.ones(D, dtype=x.dtype), alpha=2)),
    _named("relu_", lambda x: F.relu_(x)),
    _named("torch.relu_", lambda x: torch.relu_(x)),
    _named("relu inplace", lambda x: F.relu(x, inplace=True)),
    _named("relu inplace by place", lambda x: F.relu(x, True)),
    _named("ReLU module", lambda x: nn.ReLU(inplace=True)(x)),
    _named("leaky_relu by place", lambda x: F.leaky_relu(x, 0.1, True)),
    _named("out", lambda x: torch.add(x, 2.0, out=x)),
    _named("out of mul", lambda x: torch.mul(input=x, other=3.0, out=x)),
    _named("clamp_", lambda x: x.clamp_(-0.3, 0.3)),
    _named("masked_fill_", lambda x: x.masked_fill_(MASK, 0.0)),
    _named("masked setitem", _returned(lambda x: operator.setitem(x, (..., MASK), 0.0))),
    _named("zero_", _returned(lambda x: x.zero_())),
    _named("copy_", _returned(lambda x: x.copy_(torch.ones(D)))),
    _named("detach_", _returned(lambda x: x.detach_())),
    _named("of what is contiguous", lambda x: x.contiguous().mul_(2)),
    _named("unsqueeze_", lambda x: x.unsqueeze_(0)),
]  # fmt: skip
MOVED = [  # these move the readout, and all streams with it
    _named("cumsum_", lambda x: x.cumsum_(-1)),
    _named("softmax out", lambda x: torch.cumsum(x * 1, -1, out=x)),
    _named("index_add_", lambda x: x.index_add_(1, torch.tensor([0, 1]), torch.ones(2, 2, dtype=x.dtype))),
    _named("normalize out", lambda x: F.normalize(x, out=x)),
]
VIEWS = [  # writes into views of the readout: as those above
    _named("slice", _returned(lambda x: x[:, 0].mul_(2))),
    _named("view", _returned(lambda x: x.view(-1).add_(1))),
    _named("transpose", _returned(lambda x: x.t()[0].zero_())),
    _named("detached", _returned(lambda x: x.detach().mul_(2))),
    _named("chunk", _returned(lambda x: x.chunk(2, -1)[1].mul_(2))),
]
ids = [f.__name__.strip("_") for f in CARRIED]


@pytest.mark.parametrize("write", CARRIED, ids=ids)
def test_writes_go_to_each_stream_as_to_a_value(write):
    value, leaves = trunk_value(grad=not write.__name__.startswith("out"))  # of out= torch has no gradients
    plain = [(leaf.detach().clone().requires_grad_(leaf.requires_grad)) for leaf in leaves]
    expected = [write(leaf * 1) for leaf in plain]
    assert write(value) is value
    for ours, theirs in zip(enter(value, N), expected, strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad
    assert torch.allclose(read_out(value), sum(expected) / N)
    weights = [torch.rand_like(s) for s in expected]
    if expected[0].requires_grad:
        sum((s * w).sum() for s, w in zip(value.streams, weights, strict=True)).backward()
        sum((s * w).sum() for s, w in zip(expected, weights, strict=True)).backward()
        for ours, theirs in zip(leaves, plain, strict=True):
            assert torch.allclose(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("write", MOVED + VIEWS, ids=[f.__name__ for f in MOVED + VIEWS])
def test_other_writes_move_all_streams_alike(write, mode):
    if write in MOVED:
        value, leaves = trunk_value()
    else:
        value, leaves = trunk_value(grad=write.__name__ not in ("detached", "chunk"))
    value.reduction = mode
    before = [s.detach().clone() for s in value.streams]
    expected = write((sum(before) / (N if mode == "mean" else 1)).clone())
    write(value)
    moves = [(s - b).detach() for s, b in zip(enter(value, N), before, strict=True)]
    assert torch.allclose(moves[0], moves[1]) and torch.allclose(moves[1], moves[2]) and moves[0].abs().max() > 0.01
    assert torch.allclose(read_out(value), expected)
    if leaves[0].requires_grad:
        value.streams[0].sum().backward()
        assert leaves[1].grad is not None, "what was written was made from the readout of all streams"


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("write", CARRIED[:-1] + MOVED + VIEWS, ids=lambda f: f.__name__.strip("_"))
def test_no_write_between_blocks_is_lost(write, mode):
    if mode == "grad" and ("out" in write.__name__ or write.__name__ == "chunk"):
        pytest.skip("torch has no gradients of it")
    model, hc = converted(write)
    x = torch.randn(2, D)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context():
        ours, theirs = hc(x), model(x)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if mode == "grad" and theirs.requires_grad:
        ours.sum().backward(), theirs.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(hc.get_parameter(name).grad, parameter.grad, atol=1e-5), name


PAST_DYNAMO = "_fill _fill_part relu_ torch.relu_ masked setitem"
IN_GRAPH = [f for f in CARRIED[:-1] + MOVED if f.__name__ not in PAST_DYNAMO]


@pytest.mark.parametrize("write", IN_GRAPH, ids=lambda f: f.__name__.strip("_"))
def test_compiled_code_writes_as_eager_code_does(write):
    _, hc = converted(write, connection="static")
    moved(hc, 0.3)
    x = torch.randn(2, D)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = hc(x)
        actual = torch.compile(hc, backend="aot_eager", fullgraph=True)(x)
    assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize(
    "write", [f for f in CARRIED[:-1] if f not in IN_GRAPH] + VIEWS, ids=lambda f: f.__name__.strip("_")
)
def test_what_compiled_code_cannot_write_is_an_error(write):
    _, hc = converted(write, connection="static")
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="cannot write into a value between two converted blocks"),
    ):
        torch.compile(hc, backend="aot_eager", fullgraph=True)(torch.randn(2, D))


# -- reading


READS = {
    "eq": lambda x: x == x.mean(),
    "ne": lambda x: x != 0,
    "lt": lambda x: x < 0,
    "reflected": lambda x: 1 - 2 / x + 3**x,
    "and": lambda x: (x > 0) & (x < 1),
    "or xor invert": lambda x: ~((x > 0) | (x < 1) ^ (x < 0)),
    "abs": abs,
    "neg pos": lambda x: -x + (+x),
    "floordiv mod": lambda x: x // 2 + x % 3,
    "matmul": lambda x: x @ x.T,
    "float": lambda x: float(x[0, 0]) + float(x.sum()),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool(x.sum()),
    "complex": lambda x: complex(x.sum()),
    "index": lambda x: [0, 1, 2][x.sum().long() % 3],
    "contains": lambda x: 123.0 in x,
    "format": lambda x: f"{x.sum():.3f}",
    "iteration": lambda x: [row.sum().item() for row in x],
    "tolist": lambda x: sum(x.flatten().tolist()),
    "numpy": lambda x: x.detach().numpy().sum().item(),
    "size": lambda x: (x.shape, x.size(0), x.ndim, x.dim(), len(x), x.numel(), x.dtype, x.device),
    "method": lambda x: x.median(),
    "mode": lambda x: x.mode(-1).values,
    "function": lambda x: F.layer_norm(x, (D,)),
    "keyword": lambda x: torch.softmax(input=x, dim=-1),
    "list of them": lambda x: torch.cat([x, x]),
    "einsum": lambda x: torch.einsum("bd,cd->bc", x, x),
}


@pytest.mark.parametrize("read", READS)
def test_whoever_looks_sees_the_readout(read):
    value, leaves = trunk_value()
    ours, theirs = read_out(READS[read](value)), READS[read](sum(leaves) / N)
    assert type(ours) is type(theirs)
    close = torch.allclose(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert close or ours == pytest.approx(theirs)


def test_a_trunk_value_is_one_key_and_keeps_its_attributes():
    value, _ = trunk_value()
    assert {value: 1}[value] == 1 and value in {value} and hash(value) == hash(value)
    value.note = "kept"
    assert value.note == "kept" and "3 streams" in repr(value)


REFUSED = {
    "data": lambda x: setattr(x, "data", torch.zeros(2, D)),
    "grad": lambda x: setattr(x, "grad", torch.zeros(2, D)),
    "requires_grad": lambda x: setattr(x, "requires_grad", True),
    "retain_grad": lambda x: x.retain_grad(),
    "register_hook": lambda x: x.register_hook(print),
    "set_": lambda x: x.set_(torch.zeros(2, D)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_stream_would_see_is_refused(what):
    value, _ = trunk_value(grad=True)
    with pytest.raises(hct.UnsupportedModel, match=f"{what} of a value between two converted blocks is not possible: "):
        REFUSED[what](value)


class Checking(Stack):
    def forward(self, x):
        for layer in self.layers:
            out = layer(x)
            x = out if isinstance(out, torch.Tensor) else out[0]
        return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_it_is_a_tensor(compiled):
    model, x = Checking(), torch.randn(1, 3, D)
    hc = moved(hct.convert(model, (x,), scope="blocks", num_streams=N, connection="static"), 0.3)
    with torch.no_grad():
        expected = Stack.forward(hc, x)
        actual = torch.compile(hc, backend="aot_eager", fullgraph=True)(x) if compiled else hc(x)
    assert torch.allclose(actual, read_out(expected), atol=1e-6)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_custom_functions_give_each_stream_its_gradient(compiled, reduction):
    def run(a, b):
        return Doubled.apply(TrunkValue((a * 1, b * 1), 1, reduction)).sum()

    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    torch._dynamo.reset()
    function = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    value = function(a, b)
    value.backward()
    share = 0.5 if reduction == "mean" else 1.0
    assert torch.allclose(value, 2 * share * (a + b).sum())
    assert torch.equal(a.grad, torch.full((3,), 2 * share)) and torch.equal(b.grad, a.grad)


class Checkpointed(Stack):
    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_compiled_checkpoints_keep_the_streams():
    x = torch.randn(2, D)
    hc = moved(hct.convert(Checkpointed(), (x,), scope="blocks", num_streams=N, connection="static"), 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(hc, backend="aot_eager", fullgraph=True)
    outputs = []
    for run in (hc, compiled, lambda x: read_out(Stack.forward(hc, x))):
        hc.zero_grad()
        value = run(x)
        value.sum().backward()
        outputs.append((value, [p.grad.clone() for p in hc.parameters()]))
    for value, gradients in outputs[:2]:
        assert torch.allclose(value, outputs[2][0], atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, outputs[2][1], strict=True))


def test_streams_between_compiled_blocks_cost_nothing():
    x, graphs = torch.randn(2, D), []
    hc = hct.convert(Stack(), (x,), scope="blocks", num_streams=N, connection="static")

    def count(gm, inputs):
        graphs.append([n for n in gm.graph.nodes if n.op == "call_function"])
        return gm

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(hc, backend=aot_autograd(fw_compiler=count), fullgraph=True)(x)
    names = {str(node.target) for node in graphs[0]}
    assert not {name for name in names if "full" in name or "empty" in name or "expand" in name or "alias" in name}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sums_and_multiples_are_those_of_each_stream(compiled):
    position = torch.randn(D)
    _, hc = converted(lambda x: position - 2 * x.add(position) / 3)
    moved(hc)
    x = torch.randn(2, D)
    with torch.no_grad():
        streams = None
        for layer in hc.layers:
            made = layer(x if streams is None else TrunkValue(streams))
            streams = made.streams if type(made) is TrunkValue else (made,)
            streams = tuple(position - 2 * (s + position) / 3 for s in streams)
        expected = sum(streams) / len(streams)
        torch._dynamo.reset()
        actual = torch.compile(hc, backend="aot_eager", fullgraph=True)(x) if compiled else hc(x)
    torch.testing.assert_close(read_out(actual), expected)


def test_a_block_compiled_by_itself_takes_and_gives_streams():
    x = torch.randn(2, D)
    hc = moved(hct.convert(Stack(), (x,), scope="blocks", num_streams=N, connection="static"), 0.3)
    expected = hc(x).detach()
    torch._dynamo.reset()
    for layer in hc.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    value = hc(x)
    value.sum().backward()
    assert torch.allclose(value, expected, atol=1e-6) and all(p.grad is not None for p in hc.parameters())


def test_fake_tensors_and_the_meta_device():
    from torch._subclasses import FakeTensorMode

    with torch.device("meta"):
        hc = hct.convert(Stack(), (torch.randn(2, D),), scope="blocks")
        assert hc(torch.randn(4, D)).shape == (4, D)
    hc = hct.convert(Stack(), (torch.randn(2, D),), scope="blocks")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert hc(torch.randn(4, D)).shape == (4, D)


# -- outputs


@dataclass
class Output:
    states: list


class Slotted:
    __slots__ = ("states", "note")

    def __init__(self, states):
        self.states, self.note = states, self


@pytest.mark.parametrize(
    "make", [Output, Slotted, lambda s: types.SimpleNamespace(states=s), lambda s: [{"a": Output(s)}]]
)
@pytest.mark.parametrize("verify", [True, False])
def test_objects_are_given_readouts(make, verify):
    class Model(Stack):
        def forward(self, x):
            states = [x]
            for layer in self.layers:
                states.append(layer(states[-1]))
            return make(states)

    x, model = torch.randn(2, D), Model()
    hc = hct.convert(model, (x,), scope="blocks", verify=verify)
    ours, theirs = hc(x), model(x)
    if isinstance(ours, list):
        ours, theirs = ours[0]["a"], theirs[0]["a"]
    assert [type(t) for t in ours.states] == [torch.Tensor] * 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.states, theirs.states, strict=True))


# -- hooks


def hooked():
    return hct.convert(Stack(), (torch.randn(2, D),), scope="blocks", num_streams=N, connection="static")


HOOKS = {
    "forward": lambda m, log: m.register_forward_hook(lambda m, a, o: log.append((a[0], o))),
    "forward with keywords": lambda m, log: m.register_forward_hook(
        lambda m, a, k, o: log.append((a[0], o)), with_kwargs=True
    ),
    "forward always": lambda m, log: m.register_forward_hook(lambda m, a, o: log.append((a[0], o)), always_call=True),
    "forward first": lambda m, log: m.register_forward_hook(lambda m, a, o: log.append((a[0], o)), prepend=True),
    "pre": lambda m, log: m.register_forward_pre_hook(lambda m, a: log.append(a)),
    "pre with keywords": lambda m, log: m.register_forward_pre_hook(lambda m, a, k: log.append(a), with_kwargs=True),
    "pre first": lambda m, log: m.register_forward_pre_hook(lambda m, a: log.append(a), prepend=True),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_registered_later_see_readouts(hook):
    hc, x, log = moved(hooked(), 0.3), torch.randn(2, D), []
    handle = HOOKS[hook](hc.layers[1], log)
    value = hc(x)
    states = [x]
    for layer in hc.layers:
        states.append(layer(states[-1]))
    assert len(log) == 2
    for seen, expected in zip(log[0], (read_out(states[1]), read_out(states[2])), strict=False):
        assert type(seen) is torch.Tensor and torch.equal(seen, expected)
    handle.remove()
    assert torch.equal(hc(x), value) and len(log) == 2


def test_what_a_hook_writes_in_place_moves_the_streams():
    hc, x = moved(hooked(), 0.3), torch.randn(2, D)
    with torch.no_grad():
        with hc.layers[0].register_forward_hook(lambda m, a, o: o + 0.5):
            expected = hc(x)
        with hc.layers[0].register_forward_hook(lambda m, a, o: (o.add_(0.5), None)[1]):
            assert torch.allclose(hc(x), expected, atol=1e-6)


BACKWARD = ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook")


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_hooks_are_refused_where_streams_go_on(name):
    hc = hooked()
    with pytest.raises(hct.UnsupportedModel, match="gradients of n streams"):
        getattr(hc.layers[0], name)(lambda *a: None)
    getattr(hc.layers[2], name)(lambda *a: None)


class OfADict(nn.Module):
    """A block that takes a dict and reads an entry of it twice."""

    def __init__(self, how):
        super().__init__()
        self.f, self.how = nn.Linear(8, 8), how

    def forward(self, d):
        return self.how(d, self.f)


HOW = {
    "entry": lambda d, f: {"x": d["x"] + f(d["x"]), "n": d["n"]},
    "update": lambda d, f: dict(d, x=d["x"] + f(d["x"])),
    "unpacked": lambda d, f: {**d, "x": d["x"] + f(d["x"])},
    "get": lambda d, f: {**d, "x": d.get("x") + f(d.get("x"))},
}


class OfDicts(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.blocks = nn.ModuleList(OfADict(how) for _ in range(3))

    def forward(self, x):
        d = {"x": x, "n": 0}
        for block in self.blocks:
            d = block(d)
        return d["x"]


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_an_entry_of_a_dict_is_read_twice(how):
    torch.manual_seed(0)
    model, x = OfDicts(how), torch.randn(2, 8)
    graph, blocks = (hct.convert(model, (x,), scope=scope) for scope in ("graph", "blocks"))
    assert len(graph.hc_report.converted) == len(blocks.hc_report.converted) == 3
    assert len({r.trunk for r in blocks.hc_report.converted}) == 1
    moved(graph, 0.1)
    blocks.load_state_dict(graph.state_dict())
    torch.testing.assert_close(graph(x), blocks(x))
