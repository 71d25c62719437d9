"""scope="blocks": what Python code between blocks does with a value that is held as streams."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hc_transform as hct
from hc_transform.carrier import TrunkValue, enter, read_out

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


def apart(hc):
    """Move all coefficients off their start, so that the streams differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in hc.named_parameters():
            if "hyper_connections" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return hc


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
    apart(hc)
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
        pytest.raises(Exception, match="cannot write into a value between two converted blocks|single memory location"),
    ):
        torch.compile(hc, backend="aot_eager", fullgraph=True)(torch.randn(2, D))
