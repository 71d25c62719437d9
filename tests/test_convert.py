"""Conversion of small models: how many residuals, and that nothing else changes."""

from __future__ import annotations

import cProfile
import fractions
import operator
import sys
import time

import pytest
import torch
from checks import check_preserved, connections, error
from models import (
    EDSR,
    GPT,
    Chain,
    ConvBlock,
    LucidrainsTransformer,
    Mixing,
    NoResiduals,
    ParallelBlock,
    PostNormBlock,
    SharedBlock,
    Tapped,
    UNet,
)
from torch import nn

import hc_transform as hct


def tokens(batch, length=16):
    return torch.randint(0, 65, (batch, length))


def rows(batch, length=5, dim=8):
    return torch.randn(batch, length, dim)


def images(batch, channels=4, size=8):
    return torch.randn(batch, channels, size, size)


def torch_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


MODELS = {
    "gpt": (lambda: GPT(dropout=0.1), lambda b: (tokens(b), tokens(b)), 6),
    "gpt without targets": (GPT, lambda b: (tokens(b, 10 + b),), 6),
    "lucidrains": (LucidrainsTransformer, lambda b: (rows(b, 4 + b, 16),), 4),
    "parallel attention and mlp": (ParallelBlock, lambda b: (rows(b),), 1),
    "post-norm": (lambda: nn.Sequential(PostNormBlock(), PostNormBlock()), lambda b: (rows(b),), 4),
    "torch encoder, pre-norm": (lambda: torch_encoder(True), lambda b: (rows(b, 3 + b),), 6),
    "torch encoder, post-norm": (lambda: torch_encoder(False), lambda b: (rows(b, 3 + b),), 6),
    "taps": (Tapped, lambda b: (rows(b),), 6),
    "shared block": (SharedBlock, lambda b: (rows(b),), 6),
    "u-net": (UNet, lambda b: (images(b),), 6),
    "edsr": (EDSR, lambda b: (images(b, 3),), 3),
    "resnet, in-place": (lambda: nn.Sequential(ConvBlock(), ConvBlock()), lambda b: (images(b),), 2),
}


@pytest.mark.parametrize("connection", ["static", "dynamic"])
@pytest.mark.parametrize("kind", MODELS)
def test_small_models(kind, connection):
    make, inputs, expected = MODELS[kind]
    model = make()
    hc = hct.convert(model, inputs(2), connection=connection)
    assert len(hc.hc_report.converted) == expected
    assert hc.hc_report.max_error <= 1e-5
    check_preserved(model, hc, inputs(2), others=[inputs(3), inputs(1)] if kind != "resnet, in-place" else [inputs(3)])


SPELLINGS = {
    "x + f": lambda x, f, i: x + f,
    "f + x": lambda x, f, i: f + x,
    "torch.add": lambda x, f, i: torch.add(x, f),
    "torch.add alpha": lambda x, f, i: torch.add(x, f, alpha=0.5),
    "torch.add alpha on the skip": lambda x, f, i: torch.add(f, x, alpha=0.5),
    "x.add": lambda x, f, i: x.add(f),
    "f.add_": lambda x, f, i: f.add_(x),
    "f.add_ alone": lambda x, f, i: (f.add_(x), f)[1],
    "f +=": lambda x, f, i: operator.iadd(f, x),
    "clone +=": lambda x, f, i: operator.iadd(x.clone(), f),
    "three terms": lambda x, f, i: x + f + f.relu(),
    "sum": lambda x, f, i: sum([x, f]),
    "scaled branch": lambda x, f, i: x + 0.1 * f,
    "scaled skip": lambda x, f, i: 0.9 * x + f,
    "both scaled": lambda x, f, i: f * 0.3 + x * 0.7,
    "in place on the branch": lambda x, f, i: f.mul_(0.5).add_(x),
    "dropout on the skip": lambda x, f, i: nn.functional.dropout(x, 0.5, True) + f,
    "dropout on the skip before the branch's": lambda x, f, i: (
        nn.functional.dropout(x, 0.5, True) + nn.functional.dropout(f, 0.5, True)
    ),
    "activation after": lambda x, f, i: torch.relu(x + f),
    "position between": lambda x, f, i: x + f + torch.ones(8),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_the_add(spelling):
    model = Chain(SPELLINGS[spelling])
    hc = hct.convert(model, (rows(2),), connection="dynamic", num_streams=3)
    assert len(hc.hc_report.converted) == 3, str(hc.hc_report)
    assert {r.trunk for r in hc.hc_report.converted} == {0}, "one trunk runs through all"
    check_preserved(model, hc, (rows(2),), others=[(rows(4, 7),)])


def test_adds_that_are_no_residuals():
    x, mask = rows(2), torch.randn(2, 5, 8)
    with pytest.raises(hct.NothingToConvert, match="none of the .* adds in NoResiduals can be converted"):
        hct.convert(NoResiduals(), (x, mask))


def test_no_adds_at_all():
    with pytest.raises(hct.NothingToConvert, match="holds no add of two tensors"):
        hct.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (rows(2),))


def test_nested_residuals_are_listed():
    report = hct.convert(EDSR(), (images(2, 3),)).hc_report
    assert [r.reason.split(":")[0] for r in report.skipped] == ["nested"]
    assert "models.py" in report.skipped[0].location


def test_nested_all_converts_every_one():
    model = EDSR()
    hc = hct.convert(model, (images(2, 3),), nested="all")
    assert len(hc.hc_report.converted) == 4
    check_preserved(model, hc, (images(2, 3),))


def test_shapes_that_differ_are_listed():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = Mixing()

        def forward(self, x):
            return x + self.f(x).mean(1, keepdim=True)

    with pytest.raises(hct.NothingToConvert, match="shapes differ"):
        hct.convert(Broadcast(), (rows(2),))


@pytest.mark.parametrize("num_streams", [2, 3, 5, 8])
@pytest.mark.parametrize("init", ["paper", "mirrored"])
def test_number_of_streams(num_streams, init):
    model = GPT()
    hc = hct.convert(model, (tokens(2),), num_streams=num_streams, init=init)
    check_preserved(model, hc, (tokens(2),), others=[(tokens(3, 7),)])


def test_one_stream_is_the_plain_residual():
    model = GPT()
    hc = hct.convert(model, (tokens(2),), num_streams=1)
    assert set(hc.state_dict()) == set(model.state_dict())
    assert error(hc(tokens(2))[0], hc(tokens(2))[0]) >= 0
    assert all("num_streams is 1" in r.reason for r in hc.hc_report.skipped if r.reason.startswith("left plain"))
    x = tokens(2)
    assert torch.equal(hc(x)[0], model(x)[0])


def test_sum_readout_multiplies_by_the_number_of_streams():
    model = nn.Sequential(Chain(lambda x, f, i: x + f, 2))
    x = rows(2)
    hc = hct.convert(model, (x,), num_streams=4, readout="sum")
    torch.testing.assert_close(hc(x), 4 * model(x))


def test_mirrored_start_is_refused_across_a_norm():
    model = nn.Sequential(PostNormBlock(), PostNormBlock())
    with pytest.raises(hct.UnsupportedModel, match=r"carries a nonlinear operation: .*norm1.*models\.py"):
        hct.convert(model, (rows(2),), init="mirrored")


def test_the_original_stays_usable_and_unchanged():
    model = GPT()
    keys, x = list(model.state_dict()), tokens(2)
    before, modules = model(x)[0], list(model.modules())
    hc = hct.convert(model, (x,))
    assert list(model.state_dict()) == keys and list(model.modules()) == modules
    assert torch.equal(model(x)[0], before)
    hc.eval()
    assert model.training and model.transformer.h[0].training
    shared = dict(hc.named_parameters())
    assert all(shared[name] is parameter for name, parameter in model.named_parameters())


def test_a_trained_model_and_batch_norm_statistics():
    model = nn.Sequential(ConvBlock(), ConvBlock())
    hc = hct.convert(model, (images(4),))
    x = images(4)
    model.train()(x)
    ours = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    reference = nn.Sequential(ConvBlock(), ConvBlock()).train()
    reference.load_state_dict(model.state_dict())
    reference(x)
    hc.train()(x)
    for key, value in ours.items():
        assert torch.equal(hc.state_dict()[key], reference.state_dict()[key])
        assert value.shape == hc.state_dict()[key].shape


def test_moves_casts_and_pickles(tmp_path):
    model = GPT().eval()
    hc = hct.convert(model, (tokens(2),)).eval()
    x = tokens(3)
    torch.save(hc, tmp_path / "hc.pt")
    loaded = torch.load(tmp_path / "hc.pt", weights_only=False)
    assert torch.equal(loaded(x)[0], hc(x)[0])
    assert loaded(x, x)[1] is not None, "a loaded model can trace itself again"
    hc.double()
    assert hc(x)[0].dtype == torch.float64
    hc.to(torch.bfloat16)
    assert hc(x)[0].dtype == torch.bfloat16


def test_without_example_inputs():
    model = nn.Sequential(ConvBlock(), ConvBlock())
    hc = hct.convert(model)
    assert len(hc.hc_report.converted) == 2
    assert "Not verified" in str(hc.hc_report)
    check_preserved(model, hc, (images(2),))


def test_example_inputs_that_the_model_carries():
    model = nn.Sequential(ConvBlock())
    model.example_input_array = images(2)
    assert hct.convert(model).hc_report.max_error is not None


def test_two_passes_by_hand():
    model = Chain(lambda x, f, i: x + f)
    gm = torch.fx.symbolic_trace(model)
    findings = hct.find_residuals(gm)
    assert len(findings.residuals) == 3
    plan = hct.make_plan(gm, findings, hct.Options(num_streams=2, connection="static"))
    rewritten = hct.rewrite(gm, plan)
    x = rows(2)
    torch.testing.assert_close(rewritten(x), model(x))
    assert not hasattr(gm, "hyper_connections")


class CarriesBatchNorm(nn.Module):
    """A batch norm and stochastic depth on the trunk, between residuals."""

    def __init__(self):
        super().__init__()
        self.f, self.g, self.h = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout2d(0.5)

    def forward(self, x):
        x = self.norm(x + self.f(x))
        x = self.drop(x + self.g(x))
        return x + self.h(x)


def test_batch_norm_and_dropout_on_the_trunk():
    model = CarriesBatchNorm()
    hc = hct.convert(model.train(), (images(4),))
    assert {r.trunk for r in hc.hc_report.converted} == {0} and len(hc.hc_report.converted) == 3
    check_preserved(model, hc, (images(4),), gradient_bound=1e-3)  # batch statistics over n times as many values


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.block, self.reentrant = ConvBlock(inplace=False), reentrant

    def forward(self, x):
        x = x + 1
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused_or_stays_whole(reentrant):
    with pytest.raises(hct.UnsupportedModel, match="activation checkpointing"):
        hct.convert(Checkpointed(reentrant), (images(2),), scope="graph")
    hc = hct.convert(nn.Sequential(Checkpointed(reentrant), ConvBlock()), (images(2),))
    assert [r.name for r in hc.hc_report.converted] == ["1"]
    assert [r.name for r in hc.hc_report.skipped if "checkpointing" in r.reason] == ["0.block"]


def test_features_of_a_branch_that_permutes_its_input():
    """The image is wider than it has channels; the linear layer says which of the two are features."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(Attention(), Attention())
    hc = hct.convert(model, (torch.randn(2, 6, 9, 9),), connection="dynamic")
    assert [(c.dim, c.feature_axis) for c in connections(hc).values()] == [(6, 1)] * 2
    x = torch.randn(2, 6, 12, 7)
    torch.testing.assert_close(hc(x), model(x))


def test_a_plain_tensor_on_the_root():
    class Positioned(Chain):
        def __init__(self):
            super().__init__(lambda x, f, i: x + f)
            self.positions = torch.randn(5, 8)

        def forward(self, x):
            return super().forward(x + self.positions)

    model, x = Positioned(), torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,))
    check_preserved(model, hc, (x,))


def profile_in_c():
    profiler = cProfile.Profile()
    return profiler.enable, profiler.disable, lambda: len(profiler.getstats())


def profile_in_python():
    calls = []
    return lambda: sys.setprofile(lambda *call: calls.append(call[1])), lambda: sys.setprofile(None), lambda: len(calls)


@pytest.mark.parametrize("profiler", [profile_in_c, profile_in_python])
def test_a_profiler_goes_on_after_conversion(profiler):
    """Conversion has a profile function of its own in the meantime."""
    start, stop, seen = profiler()
    start()
    try:
        hct.convert(nn.Sequential(PreNormBlock()), (torch.randn(2, 8),), scope="blocks")
        before = seen()
        fractions.Fraction("1/3")
    finally:
        stop()
    assert seen() > before


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_seconds_of_conversion_grow_with_the_number_of_blocks(scope):
    def seconds(depth):
        model = nn.Sequential(*(PreNormBlock() for _ in range(depth)))
        start = time.process_time()
        hc = hct.convert(model, (torch.randn(2, 8),), scope=scope)
        assert len(hc.hc_report.converted) == depth
        return time.process_time() - start

    seconds(2)
    assert seconds(800) < 8 * min(seconds(200) for _ in range(2))


class PreNormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.f(x)
