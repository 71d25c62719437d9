"""What is a residual and what is none, what streams pass through, which level is chosen: on small models and graphs."""

from __future__ import annotations

import operator
import time

import pytest
import torch
import torch.nn.functional as F
from checks import error, moved
from torch import fx, nn

import hc_transform as hct
from hc_transform.capture.kinds import Kinds
from hc_transform.graphs.operations import Kind
from hc_transform.residuals.keys import keys_of
from hc_transform.residuals.spellings import sum_of

D = 8
SCOPES = ["graph", "blocks"]


class Block(nn.Module):
    def __init__(self, how=operator.add, inner=None):
        super().__init__()
        self.f = inner or nn.Linear(D, D)
        self.gate = nn.Parameter(torch.full((D,), 0.5))
        self.how = how

    def forward(self, x):
        return self.how(x, self.f(x))


def scatter(x, y):
    return x.index_add(0, torch.arange(x.shape[0] - 1), y[1:], alpha=2)


def rows_of(y):
    return torch.arange(y.shape[0] - 1)[:, None].expand(-1, D)


SUMS = {
    "sub": lambda x, y: x - y,
    "isub": lambda x, y: operator.isub(x.clone(), y),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=2),
    "rsub": lambda x, y: torch.rsub(y, x),
    "radd": lambda x, y: y + x,
    "add alpha on the skip": lambda x, y: torch.add(y, x, alpha=0.5),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "lerp, the skip last": lambda x, y: y.lerp(x, 0.3),
    "lerp by a tensor": lambda x, y: torch.lerp(x, y, torch.linspace(0, 1, D)),
    "lerp by a gate": lambda x, y: torch.lerp(x, y, torch.sigmoid(x)),
    "addcmul": lambda x, y: torch.addcmul(x, y, torch.ones(D), value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, torch.full((D,), 2.0)),
    "addmm": lambda x, y: torch.addmm(x, y, torch.eye(D), beta=0.5, alpha=2),
    "stack": lambda x, y: torch.stack([x, y]).sum(0),
    "sum of a stack": lambda x, y: torch.sum(torch.stack([y, x], 1), dim=1),
    "builtin sum": lambda x, y: sum([x, y]),
    "aten": lambda x, y: torch.ops.aten.add.Tensor(x, y, alpha=2),
    "packet": lambda x, y: torch.ops.aten.sub(x, y),
    "index_add": scatter,
    "scatter_add": lambda x, y: x.scatter_add(0, rows_of(y), y[1:]),
    "scatter_add in place": lambda x, y: x.clone().scatter_add_(0, rows_of(y), y[1:]),
    "scatter_reduce": lambda x, y: torch.scatter_reduce(x, 0, rows_of(y), y[1:], reduce="sum"),
    "scatter_reduce twice": lambda x, y: x.scatter_reduce(0, 0 * rows_of(y), y[1:], "sum", include_self=True),
    "index_put": lambda x, y: x.index_put((torch.zeros(len(y) - 1, dtype=torch.long),), y[1:], accumulate=True),
    "unbound": lambda x, y: torch.Tensor.scatter_add(x, 0, rows_of(y), y[1:]),
    "addr": lambda x, y: torch.addr(x, y.sum(1), torch.ones(D)),
    "three terms": lambda x, y: torch.stack([x, y, 2 * y]).sum(0),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("spelling", SUMS)
def test_a_residual_in_any_spelling(spelling, scope):
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Block(SUMS[spelling]) for _ in range(3)]), torch.randn(4, D)
    hc = hct.convert(model, (x,), scope=scope, connection="dynamic")  # verified off the start too
    assert len(hc.hc_report.converted) == 3
    assert {r.trunk for r in hc.hc_report.converted} == {0}
    assert error(hc(x), model(x)) < 1e-5
    gradients = [torch.autograd.grad(m(x).square().sum(), m.get_parameter("0.f.weight"))[0] for m in (hc, model)]
    assert error(*gradients) < 1e-5


def straight_through(x, y):
    return x + (y - x).detach()


LEFT = {
    "f(x) - x": (lambda x, y: y - x, "subtracted"),
    "centring": (lambda x, y: F.linear(x - x.mean(-1, keepdim=True), torch.eye(D)), "shapes differ"),
    "a filter": (lambda x, y: x - F.avg_pool1d(x, 3, 1, 1), "without weights"),
    "straight through": (straight_through, "no gradient"),
    "data": (lambda x, y: x + y.data, "no gradient"),
    "one node in two roles": (lambda x, y: torch.addcmul(x, x, y), "factor of the branch"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_no_residual_is_listed_with_its_reason(what):
    how, reason = LEFT[what]
    report = hct.plan(nn.Sequential(Block(how), Block()), (torch.randn(4, D),)).report
    assert [r.name for r in report.converted] == ["1"]
    assert any(reason in r.reason for r in report.skipped), report


def test_terms_of_a_hand_built_graph():
    graph = fx.Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    scales = {
        "subtract": (graph.call_function(torch.subtract, (x, y)), [1, -1]),
        "addmm": (graph.call_function(torch.addmm, (x, y, z), {"beta": 3}), [3, 1]),
        "method": (graph.call_method("sub_", (x, y), {"alpha": 2}), [1, -2]),
    }
    for node, expected in scales.values():
        assert [t.scale for t in sum_of(node).terms] == expected
    assert sum_of(graph.call_function(operator.add, (x, x))) is None
    assert sum_of(graph.call_method("scatter_reduce", (x, 0, z, y, "mean"))) is None
    assert sum_of(graph.call_method("scatter_reduce", (x, 0, z, y, "sum"), {"include_self": False})) is None
    assert sum_of(graph.call_method("scatter", (x, 0, z, y))) is None
    assert sum_of(graph.call_method("index_put", (x, (z,), y))) is None
    assert sum_of(graph.call_function(operator.add, (x, 1))) is None


def relu(x):  # a user's own
    return x


KINDS = {
    "x * 2": (lambda x: (operator.mul, (x, 2)), Kind.SCALE),
    "x / 2": (lambda x: (operator.truediv, (x, 2)), Kind.SCALE),
    "2 / x": (lambda x: (operator.truediv, (2, x)), Kind.POINTWISE),
    "x * x": (lambda x: (operator.mul, (x, x)), Kind.POINTWISE),
    "x / x": (lambda x: (operator.truediv, (x, x)), Kind.POINTWISE),
    "torch's relu": (lambda x: (F.relu, (x,)), Kind.POINTWISE),
    "a user's relu": (lambda x: (relu, (x,)), Kind.MIX),
    "aten's relu": (lambda x: (torch.ops.aten.relu.default, (x,)), Kind.POINTWISE),
    "detach": (lambda x: (torch.detach, (x,)), Kind.CUT),
}


@pytest.mark.parametrize("what", KINDS)
def test_kinds_of_operations(what):
    graph = fx.Graph()
    make, kind = KINDS[what]
    node = graph.call_function(*make(graph.placeholder("x")))
    graph.output(node)
    assert Kinds(fx.GraphModule(nn.Module(), graph)).of(node) is kind


class OneOver(Block):
    def forward(self, x):
        return 1 / x + self.f(x)


def test_one_over_the_trunk_is_not_linear():
    model, x = nn.Sequential(Block(), OneOver(), Block()), torch.randn(4, D)
    with pytest.raises(hct.UnsupportedModel, match="nonlinear operation: truediv"):
        hct.convert(model, (x,), scope="graph", init="mirrored", connection="static")
    hc = hct.convert(model, (x,), scope="graph", init="paper", connection="static")
    assert [r.name for r in hc.hc_report.converted] == ["0", "2"]


class Dropped(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return F.dropout(self.act(x), 0.5, self.training)


@pytest.mark.parametrize(
    "act, kind",
    [(F.relu, Kind.MIX), (lambda x: x.flatten(0), Kind.MIX), (lambda x: x * 2, Kind.RANDOM), (torch.detach, Kind.MIX)],
    ids=["relu", "reshape", "scale", "detach"],
)
def test_dropout_beside_something_else_in_a_module(act, kind):
    module = Dropped(act)
    assert Kinds(fx.GraphModule(nn.Module(), fx.Graph())).of_module(module) is kind


class PostNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.f, self.norm = nn.Linear(D, D), norm

    def forward(self, x):
        return self.norm(x + self.f(x))


class Written(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.ones(D)), how

    def forward(self, x):
        return self.how(x, self.weight)


def layer_norm(x, weight):
    x = x - x.mean(-1, keepdim=True)
    return weight * x / (x.pow(2).mean(-1).unsqueeze(-1) + 1e-5).sqrt()


WRITTEN = {
    "rms norm": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), nn.RMSNorm(D, eps=1e-6)),
    "layer norm": (layer_norm, nn.LayerNorm(D)),
    "silu": (lambda x, w: x * torch.sigmoid(x), nn.SiLU()),
    "silu in place": (lambda x, w: x.mul_(torch.sigmoid(x)), nn.SiLU()),
    "leaky relu": (lambda x, w: torch.where(x > 0, x, 0.1 * x), nn.LeakyReLU(0.1)),
    "twice": (lambda x, w: x + x, Written(lambda x, w: 2 * x)),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("what", WRITTEN)
def test_an_operation_written_out_is_carried_as_one(what, scope):
    x, results = torch.randn(4, D), []
    for norm in (Written(WRITTEN[what][0]), WRITTEN[what][1]):
        torch.manual_seed(0)
        model = nn.Sequential(*[PostNorm(norm) for _ in range(3)])
        hc = hct.convert(model, (x,), scope=scope, connection="static", init="paper")
        assert {r.trunk for r in hc.hc_report.converted} == {0}
        results.append(moved(hc, seed=3)(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what, refused", [("rms norm", True), ("silu", True), ("twice", False)])
def test_a_mirrored_start_across_what_is_written_out(what, refused):
    model = nn.Sequential(*[PostNorm(Written(WRITTEN[what][0])) for _ in range(2)])
    settings = {"args": (torch.randn(4, D),), "scope": "graph", "init": "mirrored", "connection": "static"}
    if refused:
        with pytest.raises(hct.UnsupportedModel, match="nonlinear"):
            hct.convert(model, **settings)
    else:
        assert len(hct.convert(model, **settings).hc_report.converted) == 2


class Mixed(nn.Module):
    """Adds the embeddings to the stream in front of every layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, x0):
        x = 0.1 * x0 + 0.9 * x
        x = x + torch.tanh(self.a(x))
        return x + torch.tanh(self.b(x))


class Layers(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(Mixed() for _ in range(depth))

    def forward(self, x):
        x = x0 = torch.tanh(x)
        for layer in self.layers:
            x = layer(x, x0)
        return x


def test_the_embeddings_mixed_into_each_layer_are_carried_alike_in_both_scopes():
    x, results = torch.randn(4, D), []
    for scope in SCOPES:
        torch.manual_seed(0)
        hc = hct.convert(Layers(), (x,), scope=scope, connection="static")
        assert [(len(hc.hc_report.converted), {r.trunk for r in hc.hc_report.converted})] == [(8, {0})]
        results.append(moved(hc, seed=3)(x))
    torch.testing.assert_close(*results)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = (x + self.f(x)).mean(1, keepdim=True)
        return x + self.g(x)


def test_a_reduction_alone_is_a_boundary():
    plan = hct.plan(Pooled(), (torch.randn(2, 3, D),))
    assert [len(t.residuals) for t in plan.trunks] == [1, 1]


class Around(nn.Module):
    """A residual around something, scaled, perhaps with a layer at its end."""

    def __init__(self, *body, end=None):
        super().__init__()
        self.body, self.end = nn.Sequential(*body), end

    def forward(self, x):
        y = self.body(x) * 0.2
        return x + (y if self.end is None else self.end(y))


class Resized(nn.Module):
    """Residuals of another width, which no stream of x goes through."""

    def __init__(self, depth=1, beside=False):
        super().__init__()
        self.up, self.down, self.beside = nn.Linear(D, 5), nn.Linear(5, D), beside
        self.f = nn.ModuleList(nn.Linear(5, 5) for _ in range(depth))

    def forward(self, x):
        start = y = self.up(x)
        for f in self.f:
            y = y + f(y)
        return self.down(y * start.sigmoid() if self.beside else y)


def blocks(n):
    return [Block() for _ in range(n)]


# model, length of each trunk of its graph
LEVELS = {
    "groups of blocks": (lambda: nn.Sequential(*[Around(*blocks(3)) for _ in range(3)]), [9]),
    "groups that end in a layer": (
        lambda: nn.Sequential(*[Around(*blocks(3), end=nn.Linear(D, D)) for _ in range(3)]),
        [3, 3, 3],
    ),
    "three levels": (lambda: Around(*[Around(*blocks(2)) for _ in range(3)], end=nn.Linear(D, D)), [6]),
    "a global skip": (lambda: Around(*[Resized() for _ in range(4)]), [1, 1, 1, 1]),
    "one inside each": (lambda: nn.Sequential(*[Around(Resized()) for _ in range(4)]), [4]),
    "blocks after a group": (lambda: nn.Sequential(Around(*blocks(4)), *blocks(2)), [6]),
    "a narrower stream inside each": (lambda: nn.Sequential(*[Around(Resized(2)) for _ in range(3)]), [2, 2, 2]),
    "a narrower stream beside a gate in each": (
        lambda: nn.Sequential(*[Around(Resized(2, beside=True)) for _ in range(3)]),
        [3],
    ),
    "two inside every other": (
        lambda: nn.Sequential(*[m for _ in range(3) for m in (Around(Resized(), Resized()), Block())]),
        [6],
    ),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("what", LEVELS)
def test_the_level_that_is_chosen(what, scope):
    make, lengths = LEVELS[what]
    model, x = make(), torch.randn(4, D)
    hc = hct.convert(model, (x,), scope=scope, connection="static")
    trunks = [r.trunk for r in hc.hc_report.converted]
    assert len(trunks) == sum(lengths), hc.hc_report
    if scope == "graph":  # code between blocks cuts trunks
        assert [trunks.count(t) for t in sorted(set(trunks))] == lengths
    assert error(hc(x), model(x)) < 1e-5


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, q, k):
        return torch.softmax(self.q(q) @ self.k(k).transpose(1, 2), -1) @ k


class TwoWay(nn.Module):
    """Two streams that read each other in turn, with positions added whenever one is read."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.back = Cross(), nn.Linear(D, D), Cross()
        self.norm = nn.LayerNorm(D)

    def forward(self, q, k, positions):
        q = q + self.attn(q + positions, k)
        q = self.norm(q + self.mlp(q))
        return q, k + self.back(k, q + positions)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([TwoWay(), TwoWay()])
        self.last = Cross()

    def forward(self, q, k, positions):
        for layer in self.layers:
            q, k = layer(q, k, positions)
        return q + self.last(q + positions, k + 0.1)


def test_two_streams_that_read_each_other_do_not_nest():
    example = (torch.randn(1, 3, D), torch.randn(1, 6, D), torch.randn(1, 3, D))
    hc = hct.convert(Decoder(), example, scope="graph")
    names = {r.name for r in hc.hc_report.converted}
    assert names == {f"layers.{i}.{m}" for i in range(2) for m in ("attn", "mlp", "back")} | {"last"}


class SameKey(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        for name in (first, second):
            parent, _, last = name.rpartition(".")
            owner = self
            if parent:
                setattr(self, parent, nn.Module())
                owner = getattr(self, parent)
            owner.add_module(last, Block())
        self.order = (first, second)

    def forward(self, x):
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("names", [("enc.a", "enc_a"), ("enc", "enc_expand"), ("stream_dropout", "enc")])
def test_every_residual_has_connections_of_its_own(names, scope):
    x = torch.randn(4, D)
    settings = {"connection": "static", "readout": "learned", "stream_embedding": True, "stream_dropout": 0.1}
    hc = hct.convert(SameKey(*names), (x,), scope=scope, **settings)
    own = {id(p): p.numel() for name, p in hc.named_parameters() if "hyper_connections" in name}
    assert sum(own.values()) == hc.hc_report.parameters == 2 * 24 + 4 * D + (4 * 4 * D + 4 + 1)


def test_keys_are_those_of_names_where_they_are_free():
    at = "a.hyper_connections."
    assert keys_of([("a.b", "a"), ("c", "")]) == {"a.b": f"{at}b", "c": "hyper_connections.c"}
    assert keys_of([("a", "a"), ("a:2", "a")]) == {"a": f"{at}residual", "a:2": f"{at}residual_2"}
    same = [(name, "a") for name in ("a.b.c", "a.b_c", "a.b-c", "a.pop", "a.training", "a.stream_dropout")]
    assert len(set(keys_of(same).values())) == len(same)


def test_a_thousand_residuals_are_found_and_planned_in_seconds():
    class Traced(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Linear)

    model = nn.Sequential(*blocks(1000))
    gm = fx.GraphModule(model, Traced().trace(model))
    start = time.process_time()
    plan = hct.make_plan(gm, hct.find_residuals(gm), hct.Options(connection="static"))
    assert [len(t.residuals) for t in plan.trunks] == [1000]
    assert time.process_time() - start < 10


# -- values without features


class ScoreLayer(nn.Module):
    """Attention whose scores are added to those of the layer before (RealFormer, arXiv 2012.11747)."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, before):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scale * (q @ k.mT)
        if before is not None:
            scores = scores + before
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), scores


class Scores(nn.Module):
    """Layers that hand scores on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(ScoreLayer() for _ in range(3))

    def forward(self, x):
        scores = None
        for layer in self.layers:
            x, scores = layer(x, scores)
        return x


class Fourier(nn.Module):
    """x + FFT(x), without weights, then x + f(x) (FNet, arXiv 2105.03824)."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x):
        x = x + torch.fft.fft2(x).real
        return x + self.f(x)


@pytest.mark.parametrize("scope", SCOPES)
def test_sums_of_attention_scores_have_no_features_and_stay(scope):
    torch.manual_seed(0)
    model, x = Scores(), torch.randn(2, 5, 16)
    hc = hct.convert(model, x, scope=scope)
    assert len(hc.hc_report.converted) == 3
    assert len(hc.hc_report.skipped) == 2
    if scope == "graph":
        assert {r.reason for r in hc.hc_report.skipped} == {hct.Reason.NO_FEATURES.value}
    longer = torch.randn(2, 7, 16)
    assert error(hc(longer), model(longer)) < 1e-5
    asked = hct.convert(model, x, scope="graph", feature_axis=1)  # the heads: somebody knows better
    assert len(asked.hc_report.converted) == 5


def test_a_branch_without_weights_has_features():
    hc = hct.convert(Fourier(), torch.randn(2, 5, 16))
    assert len(hc.hc_report.converted) == 2


# -- masks made of a trunk value

MASKS = {
    "x * (x > 0)": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "not": lambda x: x * ~(x > 0),
    "rows that are not empty": lambda x: x * (x.abs().sum(-1, keepdim=True) > 0),
    "to float": lambda x: x * (x > 0).float(),
}


class Masked(nn.Module):
    """x + f(x), masked by itself; the mask of the last value is returned too."""

    def __init__(self, mask):
        super().__init__()
        self.blocks, self.mask = nn.ModuleList(Block() for _ in range(3)), mask

    def forward(self, x):
        for block in self.blocks:
            x = self.mask(x + block.f(x))
        return x, x > 0


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_of_a_trunk_value_is_one_of_each_stream_and_of_the_readout_for_others(mask):
    torch.manual_seed(0)
    model, x = Masked(MASKS[mask]), torch.randn(4, D)
    hc = hct.convert(model, (x,), scope="graph")  # verified off the start too
    assert {r.trunk for r in hc.hc_report.converted} == {0}
    ours, theirs = hc(x), model(x)
    assert error(ours[0], theirs[0]) < 1e-5
    assert torch.equal(ours[1], theirs[1])
    moved(hc)
    out, kept = hc(x)
    assert torch.equal(kept, out > 0)
