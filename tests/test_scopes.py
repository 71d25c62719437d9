"""One model, one meaning: a graph and blocks with the same connections, off their start, give the same outputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import connections, doubled, error, moved, seeded
from fuzz_checks import trunks_of
from models import EDSR, ESRGAN, GPT, LucidrainsTransformer, ResNet, SharedBlock, Tapped, UNet, ViT
from torch import nn
from zoo import counter
from zoo_cases import CASES

import hc_transform as hct

SMALL = {
    "GPT": (lambda: GPT(depth=3), lambda: (torch.randint(0, 65, (2, 8)),)),
    "transformer of lucidrains": (LucidrainsTransformer, lambda: (torch.randn(2, 4, 16),)),
    "tapped": (Tapped, lambda: (torch.randn(2, 5, 8),)),
    "EDSR": (EDSR, lambda: (torch.randn(2, 3, 8, 8),)),
    "ESRGAN": (ESRGAN, lambda: (torch.randn(2, 3, 8, 8),)),
    "UNet": (UNet, lambda: (torch.randn(2, 4, 8, 8),)),
    "ResNet": (ResNet, lambda: (torch.randn(2, 1, 8, 8),)),
    "ViT": (ViT, lambda: (torch.randn(2, 1, 8, 8),)),
    "shared block": (SharedBlock, lambda: (torch.randn(2, 5, 8),)),
    "post-norm encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3, enable_nested_tensor=False
        ),
        lambda: (torch.randn(2, 5, 16),),
    ),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 6, 16)),
    ),
}
ZOO = {case.name: case for case in CASES if case.name.startswith(("x_transformers:", "vit_pytorch:"))}


def check(model, x, strictly=False, **options):
    """Compare the two scopes off the start; skip where blocks cut trunks that the graph does not. Return both."""
    model.eval()
    options = {"connection": "dynamic", **options}
    graph, blocks = (hct.convert(copy.deepcopy(model), x, scope=s, **options) for s in ("graph", "blocks"))
    names = [sorted(r.name for r in hc.hc_report.converted) for hc in (graph, blocks)]
    if strictly:
        assert trunks_of(graph.hc_report) == trunks_of(blocks.hc_report)
    if trunks_of(graph.hc_report) != trunks_of(blocks.hc_report):
        pytest.skip(f"other trunks: {len(names[0])} residuals as a graph, {len(names[1])} by blocks")
    blocks.load_state_dict(moved(graph).state_dict())  # strictly: connections have one name in both
    with torch.no_grad():
        assert error(seeded(graph, x, {}), seeded(model, x, {})) > 1e-4, "the connections do something"
        assert error(seeded(blocks, x, {}), seeded(graph, x, {})) <= 1e-5
    return graph, blocks


@pytest.mark.parametrize("name", SMALL)
def test_scopes_agree_off_the_start(name):
    torch.manual_seed(0)
    make, inputs = SMALL[name]
    check(make(), inputs())


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_blocks_around_a_part_of_a_trunk_carry_its_streams(scope):
    hc = hct.convert(ESRGAN(depth=3), (torch.randn(2, 3, 8, 8),), scope=scope)
    assert [(r.name, r.trunk) for r in hc.hc_report.converted] == [
        (f"body.{i}.rdb{j}", 0) for i in range(3) for j in (1, 2, 3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_scopes_agree_on_the_models_of_packages(name):
    torch.manual_seed(0)
    case = ZOO[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = case.make()
    except ImportError as missing:
        pytest.skip(str(missing))
    if case.expected(counter(model)) == 0 or case.refused is not None:
        pytest.skip("nothing to convert as one graph")
    x = case.inputs(2)
    if case.in_double:
        doubled(model)
        x = tuple(t.double() if t.is_floating_point() else t for t in x)
    check(model, x)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, context):
        key = self.key(context)
        return (self.query(x) @ key.transpose(1, 2)).softmax(-1) @ key


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attends()

    def forward(self, x):
        return self.attention(x, x) + x


class Exchange(nn.Module):
    """The first row of each of two streams attends to the other's rest, as in CrossViT (arXiv 2103.14899)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Attends(), Attends()

    def forward(self, a, b):
        (first_a, rest_a), (first_b, rest_b) = ((x[:, :1], x[:, 1:]) for x in (a, b))
        first_a, first_b = self.a(first_a, rest_b) + first_a, self.b(first_b, rest_a) + first_b
        return torch.cat((first_a, rest_a), 1), torch.cat((first_b, rest_b), 1)


class CrossViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Encoder(), Encoder(), Exchange()]) for _ in range(2))

    def forward(self, a, b):
        for of_a, of_b, exchange in self.layers:
            a, b = exchange(of_a(a), of_b(b))
        return a, b


def test_streams_that_a_block_cuts_are_cut_one_by_one():
    torch.manual_seed(0)
    model, x = CrossViT(), (torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    check(model, x)
    assert len(hct.convert(model, x, scope="blocks").hc_report.converted) == 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Layers(nn.Module):
    """Does ``between`` to the value before each layer but the first, and returns what ``taken`` makes of all values."""

    def __init__(self, between=lambda self, x: x, depth=4, taken=lambda values: values[-1]):
        super().__init__()
        self.layers, self.pos = nn.ModuleList(Layer() for _ in range(depth)), nn.Parameter(torch.randn(5, 8))
        self.between, self.taken = between, taken

    def forward(self, x):
        values = []
        for layer in self.layers:
            x = layer(self.between(self, x) if values else x)
            values.append(x)
        return self.taken(values)


def _times(self, x):
    x *= self.pos
    return x


BETWEEN = {
    "sum": lambda self, x: x + self.pos,
    "reflected difference": lambda self, x: self.pos - x,
    "function": lambda self, x: torch.add(x, self.pos, alpha=2),
    "quotient": lambda self, x: 2 * (x / 3 + 1),
    "method": lambda self, x: x.mul(self.pos).sub(0.5),
    "in place": _times,
    "mask": lambda self, x: x.masked_fill(self.pos > 0, 0.5),
    "chosen": lambda self, x: torch.where(self.pos > 0, torch.zeros_like(x), x),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_sums_and_multiples_between_blocks_end_no_trunk(between):
    torch.manual_seed(0)
    _, blocks = check(Layers(BETWEEN[between]), (torch.randn(2, 5, 8),), strictly=True)
    assert {r.trunk for r in blocks.hc_report.converted} == {0}


def test_two_trunk_values_between_blocks_end_their_trunk():
    class Crossing(Layers):
        def forward(self, x):
            first = self.layers[0](x)
            second = self.layers[1](first)
            return self.layers[3](self.layers[2](second + first))

    torch.manual_seed(0)
    model, x = Crossing(), (torch.randn(2, 5, 8),)
    report = str(hct.convert(model, x, scope="blocks").hc_report)
    assert "before layers.2" in report and "Not verified" not in report


@pytest.mark.parametrize("excluded", [["layers.1"], ["layers.1", "layers.2"], ["layers.0", "layers.3"]], ids=str)
def test_an_excluded_block_ends_no_trunk(excluded):
    torch.manual_seed(0)
    _, blocks = check(Layers(), (torch.randn(2, 5, 8),), strictly=True, exclude=excluded)
    assert {r.trunk for r in blocks.hc_report.converted} == {0}


class Around(nn.Module):
    """Blocks of its own trunk, in a branch of a larger one, as in the Transformer2DModel of diffusers."""

    def __init__(self, depth):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(Layer(), Layer()) for _ in range(depth))

    def forward(self, x):
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        return self.last(h) + x


@pytest.mark.parametrize("depth", [1, 2])
def test_a_sum_around_blocks_ends_no_trunk_around_it(depth):
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(5) for m in (Layer(), Around(depth))))
    _, blocks = check(model, (torch.randn(2, 5, 8),), strictly=True)
    assert len({r.trunk for r in blocks.hc_report.converted}) == 6


TAKEN = {"all values": lambda values: values, "the one before": lambda values: values[-2]}


@pytest.mark.parametrize("taken", TAKEN)
def test_learned_readouts_weigh_streams_at_the_end_of_their_trunk(taken):
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 8),)
    graph, _ = check(Layers(taken=TAKEN[taken]), x, strictly=True, readout="learned")
    assert "Not verified" not in str(graph.hc_report)


class Siamese(nn.Module):
    def __init__(self, tower, times=1):
        super().__init__()
        self.tower, self.times = tower, times

    def forward(self, a, b):
        for _ in range(self.times):
            a = self.tower(a)
        for _ in range(self.times):
            b = self.tower(b)
        return a, b


@pytest.mark.parametrize(
    ("make", "times", "count"),
    [(lambda: Layers(depth=2), 1, 2), (Layer, 1, 1), (Layer, 3, 3)],
    ids=["tower", "block", "recurrent block"],
)
@pytest.mark.parametrize("options", [{}, {"readout": "learned", "stream_embedding": True}], ids=["plain", "ends"])
def test_calls_on_two_trunks_share_their_connections(make, times, count, options):
    torch.manual_seed(0)
    model = Siamese(make(), times)
    x = (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    for hc in check(model, x, strictly=True, **options):
        found = connections(hc)
        assert len([m for m in found.values() if isinstance(m, hct.Connection)]) == count
        assert len(hc.hc_report.converted) == 2 * count
        assert hc.hc_report.parameters == sum(p.numel() for m in found.values() for p in m.parameters())
