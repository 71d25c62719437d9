"""One model, one meaning: a graph and blocks with the same connections, off their start, give the same outputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import doubled, error, moved, seeded
from fuzz_checks import trunks_of
from models import EDSR, ESRGAN, GPT, LucidrainsTransformer, ResNet, SharedBlock, Tapped, UNet, ViT
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
        lambda: torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3, enable_nested_tensor=False
        ),
        lambda: (torch.randn(2, 5, 16),),
    ),
    "decoder": (
        lambda: torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 6, 16)),
    ),
}
ZOO = {case.name: case for case in CASES if case.name.startswith(("x_transformers:", "vit_pytorch:"))}


def check(model, x):
    """Compare the two scopes off the start; skip where blocks cut trunks that the graph does not."""
    model.eval()
    graph, blocks = (hct.convert(copy.deepcopy(model), x, scope=s, connection="dynamic") for s in ("graph", "blocks"))
    names = [sorted(r.name for r in hc.hc_report.converted) for hc in (graph, blocks)]
    if trunks_of(graph.hc_report) != trunks_of(blocks.hc_report):
        pytest.skip(f"other trunks: {len(names[0])} residuals as a graph, {len(names[1])} by blocks")
    blocks.load_state_dict(moved(graph).state_dict())  # strictly: connections have one name in both
    with torch.no_grad():
        assert error(seeded(graph, x, {}), seeded(model, x, {})) > 1e-4, "the connections do something"
        assert error(seeded(blocks, x, {}), seeded(graph, x, {})) <= 1e-5


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


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, context):
        key = self.key(context)
        return (self.query(x) @ key.transpose(1, 2)).softmax(-1) @ key


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attends()

    def forward(self, x):
        return self.attention(x, x) + x


class Exchange(torch.nn.Module):
    """The first row of each of two streams attends to the other's rest, as in CrossViT (arXiv 2103.14899)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Attends(), Attends()

    def forward(self, a, b):
        (first_a, rest_a), (first_b, rest_b) = ((x[:, :1], x[:, 1:]) for x in (a, b))
        first_a, first_b = self.a(first_a, rest_b) + first_a, self.b(first_b, rest_a) + first_b
        return torch.cat((first_a, rest_a), 1), torch.cat((first_b, rest_b), 1)


class CrossViT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleList([Encoder(), Encoder(), Exchange()]) for _ in range(2))

    def forward(self, a, b):
        for of_a, of_b, exchange in self.layers:
            a, b = exchange(of_a(a), of_b(b))
        return a, b


def test_streams_that_a_block_cuts_are_cut_one_by_one():
    torch.manual_seed(0)
    model, x = CrossViT(), (torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    check(model, x)
    assert len(hct.convert(model, x, scope="blocks").hc_report.converted) == 8
