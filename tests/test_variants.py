"""Every connection through convert: preserved, compiled, trained; and the options that go with them."""

from __future__ import annotations

import functools

import pytest
import torch
from checks import check_preserved, double, doubled, error, outputs_and_gradients, tensors, wake
from models import GPT, PostNormBlock, ResNet, Tapped, ViT
from test_training import batches
from torch import nn
from torch.nn import functional as F

import hc_transform as hct
from hc_transform.connections.trunk_ends import StreamDropout


def tokens(batch):
    return torch.randint(0, 256, (batch, 16)), torch.randint(0, 256, (batch, 16))


def images(batch):
    return (torch.randn(batch, 1, 8, 8),)


def vectors(batch):
    return (torch.randn(batch, 5, 8),)


MODELS = {
    "gpt": (lambda: GPT(vocabulary=256), tokens),
    "vit": (ViT, images),
    "resnet": (ResNet, images),
    "post-norm": (lambda: nn.Sequential(*(PostNormBlock() for _ in range(3))), vectors),
    "tapped": (Tapped, vectors),
}
NONLINEAR = ("resnet", "post-norm")  # only equal streams pass a norm or activation on the trunk unchanged
# In double precision, but for the biases of sigmoids, which are made in fp32 and give reads that sum to 1 within 1e-7.
BOUNDS = dict(bound=1e-6, gradient_bound=1e-5)


def starts(kind):
    return ("paper",) if kind in NONLINEAR else ("paper", "mirrored")


CASES = [(kind, name, init) for kind in MODELS for name in hct.CONNECTIONS for init in starts(kind)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind, connection, init", CASES, ids=["-".join(case) for case in CASES])
def test_preserved(kind, connection, init):
    make, inputs = MODELS[kind]
    model = wake(make())
    hc = hct.convert(model, inputs(2), connection=connection, init=init)
    assert hc.hc_report.max_error <= 1e-5
    doubled(hc, model)
    check_preserved(model, hc, double(inputs(2)), others=[double(inputs(3))], **BOUNDS)


@pytest.mark.parametrize("kind", ["gpt", "resnet", "post-norm", "tapped"])
@pytest.mark.parametrize(
    "options",
    [
        dict(readout="learned"),
        dict(stream_embedding=True),
        dict(recompute=True),
        dict(connection="frac", num_streams=3, num_fractions=2),
        dict(num_streams=9),
        dict(connection="mhc", num_streams=10, recompute=True),
        dict(connection="mhc", readout="learned", stream_embedding=True, recompute=True),
        dict(connection=functools.partial(hct.MHCConnection, iterations=5)),
    ],
    ids=[
        "learned readout",
        "stream embedding",
        "recompute",
        "3 streams of 2 fractions",
        "9 streams",
        "10 streams",
        "all",
        "partial",
    ],
)
def test_options_are_preserved(kind, options):
    make, inputs = MODELS[kind]
    model = wake(make())
    hc = hct.convert(model, inputs(2), **options)
    doubled(hc, model)
    check_preserved(model, hc, double(inputs(2)), others=[double(inputs(3))], **BOUNDS)


def test_dropout_on_streams():
    model, x = wake(MODELS["vit"][0]()), images(2)
    hc = hct.convert(model, x, stream_dropout=0.5)
    assert hc.hc_report.max_error <= 1e-5, "verified without it"
    dropouts = [n for n in hc.graph.nodes if n.target == "hyper_connections.stream_dropout"]
    assert len(dropouts) == len(hc.hc_report.converted)
    assert [m.p for m in hc.modules() if isinstance(m, StreamDropout)] == [0.5]
    assert error(hc.train()(*x), model.train()(*x)) > 0.1
    assert error(hc.eval()(*x), model.eval()(*x)) <= 1e-5


def test_a_sum_is_n_times_the_original():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True, batch_first=True), vectors(2)
    hc = hct.convert(model, x, readout="sum", num_streams=3)
    torch.testing.assert_close(hc(*x), 3 * model(*x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt", "vit", "resnet"])
@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_compiles_in_one_graph(kind, connection):
    make, inputs = MODELS[kind]
    x = inputs(2)
    hc = hct.convert(wake(make()), x, connection=connection, recompute=connection in ("mhc", "frac")).train()
    with torch.no_grad():  # off the start, so that no two streams are equal
        for name, parameter in hc.named_parameters():
            if "hyper_connections." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    compiled = torch.compile(hc, fullgraph=True, backend="aot_eager")
    ours, our_gradients = outputs_and_gradients(compiled, x, {})
    theirs, their_gradients = outputs_and_gradients(hc, x, {})
    assert error(ours, theirs) <= 1e-5
    scale = max(g.abs().max() for g in their_gradients.values())
    for name, gradient in their_gradients.items():
        assert (our_gradients[f"_orig_mod.{name}"] - gradient).abs().max() <= 1e-4 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_inductor(connection):
    x = tokens(2)
    hc = hct.convert(wake(GPT(vocabulary=256)), x, connection=connection).train()
    compiled = torch.compile(hc, fullgraph=True, backend="inductor")
    ours, our_gradients = outputs_and_gradients(compiled, x, {})
    theirs, their_gradients = outputs_and_gradients(hc, x, {})
    assert error(ours, theirs) <= 1e-4
    scale = max(g.abs().max() for g in their_gradients.values())
    for name, gradient in their_gradients.items():
        assert (our_gradients[f"_orig_mod.{name}"] - gradient).abs().max() <= 1e-3 * scale, name


def digits(steps):
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        yield x[rows], y[rows]


@pytest.mark.parametrize("kind", ["gpt", "vit", "resnet"])
@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_trains_on_real_data(kind, connection):
    model = GPT(vocabulary=256) if kind == "gpt" else MODELS[kind][0]()
    steps = list(batches(100)) if kind == "gpt" else list(digits(100))
    hc = hct.convert(model, steps[0] if kind == "gpt" else steps[0][:1], connection=connection)
    optimizer = torch.optim.AdamW(hc.parameters(), lr=1e-2)
    losses = []
    for x, y in steps:
        loss = hc(x, y)[1] if kind == "gpt" else F.cross_entropy(hc(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in hc.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]


@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_bfloat16_streams_under_autocast(connection):
    model, x = wake(MODELS["vit"][0]()), images(2)
    hc = hct.convert(model.bfloat16(), (x[0].bfloat16(),), connection=connection)
    found = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name.endswith(("_expand", "_read", "_write", "_readout")):
                found.extend((n.name, t.dtype) for t in tensors(value))
            return value

    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            Recorder(hc).run(x[0].bfloat16())
    assert found and {dtype for _, dtype in found} == {torch.bfloat16}, found
    hct_parameters = [p for n, p in hc.named_parameters() if "hyper_connections." in n]
    assert {p.dtype for p in hct_parameters} == {torch.float32}


class OwnConnection(hct.Connection):
    """A connection as a user writes one: reads stream 0, writes to all, leaves them as they are."""

    def coefficients(self, streams):
        n = self.num_streams
        return torch.eye(n)[0], torch.ones(n), None


def test_a_connection_of_ones_own():
    model, x = wake(MODELS["vit"][0]()), images(2)
    hc = hct.convert(model, x, connection=OwnConnection, num_streams=2)
    assert error(hc(*x), model(*x)) <= 1e-5
    assert {r.connection for r in hc.hc_report.converted} == {"OwnConnection"}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(connection="mch"), "connection is one of 'static', 'dynamic', 'mhc'.*or makes a Connection; got 'mch'"),
        (dict(connection="mhc-lite", num_streams=8), "40,320 for num_streams=8"),
        (dict(num_fractions=2), "num_fractions=2 needs connection='frac', got 'dynamic'"),
        (dict(connection="frac", num_fractions=0), "whole number of at least 1"),
        (dict(stream_dropout=1.5), "stream_dropout is a probability below 1, got 1.5"),
        (dict(readout="max"), "readout is one of 'mean', 'sum', 'learned'"),
    ],
    ids=["name", "permutations", "fractions elsewhere", "no fraction", "dropout", "readout"],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        hct.convert(ViT(), images(2), **options)


def test_fractions_that_do_not_divide_name_the_residual():
    with pytest.raises(
        hct.UnsupportedModel, match=r"blocks\.0\.self_attn \(.*size 16 cannot be cut into num_fractions=5"
    ):
        hct.convert(ViT(), images(2), connection="frac", num_fractions=5)


def test_defaults_of_frac():
    hc = hct.convert(ViT(), images(2), connection="frac")
    assert {r.streams for r in hc.hc_report.converted} == {1}
    assert "num_fractions=4" in str(hc.blocks[0].hyper_connections)


def test_one_stream_of_one_fraction_is_the_plain_model():
    model, x = ViT().eval(), images(2)
    for options in (dict(num_streams=1), dict(connection="frac", num_fractions=1)):
        hc = hct.convert(model, x, **options)
        assert not hc.hc_report.converted and torch.equal(hc(*x), model(*x))


def test_report_counts_readouts_and_embeddings():
    hc = hct.convert(ViT(), images(2), connection="static", readout="learned", stream_embedding=True, num_streams=2)
    embedding, head = 2 * 16, 2 * 16 * 2 + 1 + 2
    assert hc.hc_report.other_parameters == embedding + head
    new = sum(p.numel() for n, p in hc.named_parameters() if "hyper_connections." in n)
    assert hc.hc_report.parameters == new
    assert f"{embedding + head} of them in readouts and embeddings" in str(hc.hc_report)


def test_a_learned_readout_of_another_layout_is_refused():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(8, 8), nn.Linear(5, 5)

        def forward(self, x, whole=False):
            x = x + self.f(x)
            x = x.transpose(1, 2)
            return x + self.g(x) if whole else x

    hc = hct.convert(Turning(), (*vectors(2), True), readout="learned", scope="graph")
    with pytest.raises(hct.UnsupportedModel, match="readout='learned' weighs features.*Use readout='mean'"):
        hc(*vectors(2))
