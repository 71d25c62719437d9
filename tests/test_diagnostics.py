"""What is seen of a converted model on a batch: figures against those computed by hand, and nothing disturbed."""

from __future__ import annotations

import copy
import json
import math
import time

import pytest
import torch
from checks import moved
from models import GPT, ResNet, SharedBlock, UNet, ViT
from torch import nn

import hc_transform as hct
from hc_transform.running.block_module import block_graphs

SCOPES = ["graph", "blocks"]
IDS = torch.randint(0, 65, (2, 8), generator=torch.Generator().manual_seed(0))


def converted(scope="graph", depth=2, **options):
    torch.manual_seed(0)
    model = GPT(depth=depth).eval()
    return hct.convert(model, (IDS, IDS), scope=scope, **{"verify": False, **options})


def connection(hc, path):
    return hc.get_submodule(f"transformer.h.{path}")


@pytest.mark.parametrize("scope", SCOPES)
def test_figures_of_static_weights_are_those_of_the_weights(scope):
    hc = moved(converted(scope, connection="static"))
    found = hct.diagnose(hc, IDS, IDS)
    assert [s.name for s in found.sites] == [f"transformer.h.{i}.{k}" for i in (0, 1) for k in ("attn", "mlp")]
    product = torch.eye(4)
    for site in found.sites:
        layer, _, kind = site.name.rpartition(".")
        own = hc.get_submodule(f"{layer}.hyper_connections.{kind}")
        assert torch.equal(site.h_pre, own.h_pre[None]) and torch.equal(site.h_post, own.h_post[:, None])
        assert torch.equal(site.h_res, own.h_res) and not site.h_res_spread.any() and not site.h_pre_spread.any()
        shares = own.h_pre.abs() / own.h_pre.abs().sum()
        assert site.read_entropy == pytest.approx(-(shares * shares.log()).sum().item() / math.log(4), rel=1e-5)
        assert site.mixing_share == pytest.approx(1 - own.h_res.trace().item() / 4, abs=1e-6)
        assert site.row_error == pytest.approx((own.h_res.sum(1) - 1).abs().max().item(), rel=1e-5)
        assert site.column_error == pytest.approx((own.h_res.sum(0) - 1).abs().max().item(), rel=1e-5)
        product = own.h_res @ product
        assert site.gain_forward == pytest.approx(product.sum(1).abs().max().item(), rel=1e-5)
    (trunk,) = found.trunks
    assert trunk.sites == 4 and not trunk.by_means
    assert trunk.gain_forward == pytest.approx(product.sum(1).abs().max().item(), rel=1e-5)
    assert trunk.gain_backward == pytest.approx(product.sum(0).abs().max().item(), rel=1e-5)
    assert found.loss == pytest.approx(hc(IDS, IDS)[1].item(), rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_streams_lie_as_the_tensors_say(scope):
    hc = moved(converted(scope, connection="dynamic"))
    streams = {}
    target = connection(hc, "1.hyper_connections.mlp")
    handle = target.register_forward_pre_hook(lambda m, args: streams.update(x=torch.stack(args[0]).detach().double()))
    hc(IDS, IDS)
    handle.remove()
    x = streams["x"].flatten(1)
    site = hct.diagnose(hc, IDS, IDS).sites[-1]
    assert site.spread == pytest.approx((x.std(0).mean() / x.mean(0).abs().mean()).item(), rel=1e-3)
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    assert torch.allclose(site.similarity.double(), cosines, atol=1e-5)
    assert site.cosine == pytest.approx(((cosines.sum() - 4) / 12).item(), rel=1e-5)
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    assert site.directions == pytest.approx((values.sum() ** 2 / values.square().sum()).item(), rel=1e-3)
    shares = torch.linalg.svdvals(x).square()
    shares = shares / shares.sum()
    assert site.effective_streams == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-3)


@pytest.mark.parametrize("kind", [*hct.CONNECTIONS])
def test_the_start_of_every_connection(kind):
    found = hct.diagnose(converted(connection=kind), IDS, IDS)
    for site in found.sites:
        assert site.spread < 1e-6 and site.directions == 0
        assert site.cosine == pytest.approx(1) and site.effective_streams == pytest.approx(1, abs=1e-4)
        kept = {"mhc": 0.1, "mhc-lite": 0.1, "kromhc": 0.1}.get(kind, 0.0)
        assert site.mixing_share == pytest.approx(kept, abs=0.03) and site.row_error < 1e-5
        assert site.h_res.shape == (4, 4) and site.gradient is None and site.ablation is None
    assert found.trunks[0].gain_forward == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "mhc", "frac"])
def test_both_scopes_say_the_same(kind):
    ours, theirs = (hct.diagnose(moved(converted(s, connection=kind)), IDS, IDS).scalars() for s in SCOPES)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5) for name in ours)


def test_a_product_is_made_for_each_token():
    hc = moved(converted(connection="dynamic"), 2.0)
    made = []
    for module in hc.modules():
        if isinstance(module, hct.Connection):
            module.register_forward_hook(lambda m, args, out: made.append(m.coefficients(args[0])[2].detach()))
    (trunk,) = hct.diagnose(hc, IDS, IDS).trunks
    product = torch.eye(4)
    for res in made:
        product = res @ product
    assert product.shape == (2, 8, 4, 4)
    assert trunk.gain_forward == pytest.approx(product.sum(-1).abs().amax(-1).mean().item(), rel=1e-4)
    assert trunk.gain_backward == pytest.approx(product.sum(-2).abs().amax(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_is_left_behind(scope):
    torch.manual_seed(0)
    model = GPT(depth=2, dropout=0.1).train()
    hc = hct.convert(model, (IDS, IDS), scope=scope, verify=False)
    hc.transformer.h[1].eval()
    hc(IDS, IDS)[1].backward()
    hct.diagnose(hc, IDS, IDS)
    modes = [m.training for m in hc.modules()]
    state, grads = copy.deepcopy(hc.state_dict()), [p.grad.clone() for p in hc.parameters()]
    graphs = len(hc._all_variants()) if scope == "graph" else [len(g) for g in block_graphs(hc).values()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = hct.diagnose(hc, IDS, IDS, ablate=True)
    assert torch.equal(torch.rand(1), expected) and [m.training for m in hc.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(state.values(), hc.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, hc.parameters(), strict=True))
    assert not any(m._forward_hooks for m in hc.modules() if isinstance(m, hct.Connection))
    assert graphs == (len(hc._all_variants()) if scope == "graph" else [len(g) for g in block_graphs(hc).values()])
    own = connection(hc, "1.hyper_connections.mlp")
    norm = torch.stack([p.grad.norm() for p in own.parameters()]).norm().item()
    assert found.sites[-1].gradient == pytest.approx(norm, rel=1e-5) and found.sites[-1].gradient > 0


@pytest.mark.parametrize("scope", SCOPES)
def test_ablation_is_the_loss_with_one_connection_at_its_start(scope):
    hc = moved(converted(scope, connection="mhc"))
    found = hct.diagnose(hc, IDS, IDS, ablate=True)
    other = copy.deepcopy(hc)
    connection(other, "1.hyper_connections.attn").reset_parameters()
    change = (other(IDS, IDS)[1] - hc(IDS, IDS)[1]).item()
    assert found.sites[2].ablation == pytest.approx(change, rel=1e-3, abs=1e-6) and abs(change) > 1e-5
    assert all(s.ablation == 0 for s in hct.diagnose(converted(scope), IDS, IDS, ablate=True).sites)


def test_a_loss_is_asked_for_or_given():
    model, x = ViT(depth=2), torch.randn(2, 1, 8, 8)
    hc = hct.convert(model, (x,), verify=False)
    assert hct.diagnose(hc, x).loss is None
    with pytest.raises(hct.HCTransformError, match="needs a loss, and the output holds none"):
        hct.diagnose(hc, x, ablate=True)
    found = hct.diagnose(hc, x, ablate=True, loss=lambda output: output.square().mean())
    assert found.loss == pytest.approx(hc(x).square().mean().item(), rel=1e-5)


def test_a_compiled_model_is_run_eagerly():
    hc = moved(converted("graph"))
    expected = hct.diagnose(hc, IDS, IDS).scalars()
    calls = []

    def backend(gm, inputs):
        calls.append(1)
        return gm.forward

    compiled = torch.compile(hc, backend=backend)
    assert hct.diagnose(compiled, IDS, IDS).scalars() == expected and not calls


@pytest.mark.parametrize("scope", SCOPES)
def test_channels_first_shared_and_pooled_trunks(scope):
    image = torch.randn(2, 1, 8, 8)
    hc = moved(hct.convert(ResNet(depth=2).eval(), (image,), scope=scope, verify=False))
    site = hct.diagnose(hc, image).sites[1]
    assert site.h_pre.shape == (1, 4) and site.h_pre_spread.any()
    x = torch.randn(2, 5, 8)
    hc = moved(hct.convert(SharedBlock().eval(), (x,), scope=scope, verify=False))
    found = hct.diagnose(hc, x)
    assert len(found.sites) == len(hc.hc_report.converted) and not found.not_called
    assert found.trunks[0].sites == len(found.sites)


def test_trunks_of_several_resolutions():
    x = torch.randn(1, 1, 16, 16)
    try:
        hc = hct.convert(UNet().eval(), (x,), scope="graph", verify=False)
    except hct.HCTransformError:
        x = torch.randn(1, 4, 16, 16)
        hc = hct.convert(UNet().eval(), (x,), scope="graph", verify=False)
    found = hct.diagnose(moved(hc), x)
    assert len(found.trunks) == len({r.trunk for r in hc.hc_report.converted})


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_blocks_share_a_line_and_others_have_their_own(scope):
    hc = converted(scope, depth=6)
    lines = str(hct.diagnose(hc, IDS, IDS)).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["transformer.h.[0-5].attn", "transformer.h.[0-5].mlp"]
    assert lines[0].split()[:2] == ["residual", "trunk"] and "gradient" not in lines[0]
    with torch.no_grad():
        connection(hc, "3.hyper_connections.attn").h_res[0, 1] = 0.5
    text = str(hct.diagnose(hc, IDS, IDS))
    assert "transformer.h.3.attn" in text and "transformer.h.[0-2].attn" in text


def test_plain_data_is_ready_for_json():
    found = hct.diagnose(moved(converted()), IDS, IDS)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["sites"][0]["h_res"] == found.sites[0].h_res.tolist() and data["trunks"][0]["sites"] == 4
    scalars = found.scalars()
    assert scalars["transformer.h.1.mlp/mixing_share"] == found.sites[-1].mixing_share
    assert scalars["trunk 0/gain_forward"] == found.trunks[0].gain_forward


def test_a_picture(tmp_path):
    found = hct.diagnose(moved(converted(connection="mhc")), IDS, IDS)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(hct.HCTransformError, match="a picture needs matplotlib: pip install matplotlib"):
            found.plot(tmp_path / "found.png")
    else:
        found.plot(tmp_path / "found.png")
        assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
        hct.diagnose(converted(connection="frac"), IDS, IDS).plot(tmp_path / "found.svg")


def test_a_plain_model_is_refused():
    with pytest.raises(hct.NotConverted, match="GPT holds no converted model"):
        hct.diagnose(GPT(), IDS)
    hc = converted(num_streams=1, connection="static")
    with pytest.raises(hct.NotConverted, match="no residual of GPT was converted"):
        hct.diagnose(hc, IDS)


def test_part_of_a_larger_model():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = converted("graph"), converted("blocks")

        def forward(self, ids):
            return self.a(ids)[0] + self.b(ids)[0]

    pair = Pair()
    assert len(hct.diagnose(pair, IDS).sites) == 8


@pytest.mark.slow
def test_once_in_a_hundred_steps_costs_little():
    """Prints what ``diagnose`` takes, in training steps."""
    torch.manual_seed(0)
    model, ids = GPT(vocabulary=256, dim=256, depth=6, block_size=256), torch.randint(0, 256, (4, 256))
    hc = hct.convert(model, (ids, ids), scope="blocks", verify=False)
    optimizer = torch.optim.AdamW(hct.parameter_groups(hc, lr=1e-4))

    def step():
        optimizer.zero_grad()
        hc(ids, ids)[1].backward()
        optimizer.step()

    def seconds(call, times):
        call()
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    ratio = seconds(lambda: hct.diagnose(hc, ids, ids), 3) / seconds(step, 3)
    print(f"diagnose takes {ratio:.2f} training steps")
    assert ratio < 5, "at most 5 % of a hundred steps"
