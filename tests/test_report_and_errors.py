"""What users read: the report, the errors, the command line."""

from __future__ import annotations

import json
import operator
import re

import pytest
import torch
from models import GPT, Chain, Mixing, NoGrad
from torch import nn

import hc_transform as hct
from hc_transform.verification import verify


def tokens():
    return torch.randint(0, 65, (2, 8))


def test_report():
    hc = hct.convert(GPT(), (tokens(),), connection="dynamic", num_streams=4)
    report = hc.hc_report
    assert [r.name for r in report.converted[:2]] == ["transformer.h.0.attn", "transformer.h.0.mlp"]
    first = report.converted[0]
    assert re.search(r"models\.py:\d+$", first.location) and first.trunk == 0 and first.connection == "dynamic"
    new = sum(p.numel() for n, p in hc.named_parameters() if "hyper_connections." in n)
    assert report.parameters == new == 6 * (4 + 4 + 16 + 32 * 6 + 2)
    text = str(report)
    assert "An optimizer made before the conversion" in text and "relative error" in text
    assert "6 residuals on 1 trunk converted" in text
    assert json.loads(json.dumps(report.to_dict()))["residuals"][0]["name"] == first.name


def test_the_position_add_is_listed_with_its_reason():
    (skipped,) = hct.plan(GPT(), (tokens(),)).report.skipped
    assert "operands independent" in skipped.reason and skipped.converted is False


def test_plan_changes_nothing():
    model = GPT()
    keys = list(model.state_dict())
    plan = hct.plan(model, (tokens(),), num_streams=2)
    assert len(plan.residuals) == 6 and len(plan.trunks) == 1 and "transformer.h.0..2: attn, mlp" in str(plan)
    assert list(model.state_dict()) == keys


def test_include_and_exclude():
    model, x = GPT(), tokens()
    hc = hct.convert(model, (x,), include=["transformer.h.*"], exclude=["transformer.h.1", "*.h.2.mlp"])
    assert [r.name for r in hc.hc_report.converted] == [
        "transformer.h.0.attn",
        "transformer.h.0.mlp",
        "transformer.h.2.attn",
    ]
    assert {r.reason for r in hc.hc_report.skipped if "exclude" in r.reason} == {
        "excluded (matches an exclude pattern)"
    }
    torch.testing.assert_close(hc.eval()(x)[0], model.eval()(x)[0])


def test_a_pattern_that_matches_nothing():
    with pytest.raises(
        hct.PatternError, match=r"'transformer.h.9.attn' matches no residual. Near names: transformer\.h"
    ):
        hct.convert(GPT(), (tokens(),), include=["transformer.h.9.attn"])


def test_everything_excluded():
    with pytest.raises(hct.NothingToConvert, match="6 x excluded"):
        hct.convert(GPT(), (tokens(),), exclude=["*"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_streams": 0}, "num_streams"),
        ({"connection": "magic"}, "connection is one of 'static', 'dynamic'"),
        ({"init": "x"}, "init is one of"),
        ({"readout": "x"}, "readout is one of"),
        ({"nested": "x"}, "nested is one of"),
        ({"scope": "x"}, "scope is one of"),
        ({"include": "blocks.*"}, "lists? of patterns"),
    ],
    ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else "",
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        hct.convert(GPT(), (tokens(),), **options)


WRAPPED = {
    "converted": (lambda m: hct.convert(m, (tokens(),)), "converted already"),
    "compiled": (torch.compile, "wrapped by torch.compile"),
    "DataParallel": (nn.DataParallel, "wrapped by DataParallel"),
    "no module": (lambda m: m.forward, "takes an nn.Module, got method"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_refusals(kind):
    wrap, message = WRAPPED[kind]
    with pytest.raises(hct.UnsupportedModel, match=message):
        hct.convert(wrap(GPT()), (tokens(),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_refused():
    with pytest.raises(hct.UnsupportedModel, match="wrapped by torch.jit"):
        hct.convert(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), (torch.randn(1, 2),))


def test_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(hct.UnsupportedModel, match="wrapped by DistributedDataParallel"):
            hct.convert(nn.parallel.DistributedDataParallel(GPT()), (tokens(),))
    finally:
        torch.distributed.destroy_process_group()


def test_inputs_that_do_not_fit():
    with pytest.raises(hct.TraceError, match=r"do not fit GPT\.forward\(idx, targets=None\)"):
        hct.convert(GPT(), (tokens(), tokens(), tokens()))
    with pytest.raises(hct.TraceError, match="itself fails on the example inputs"):
        hct.convert(GPT(), (torch.randn(2, 3),))


def test_a_feature_size_that_cannot_be_known():
    model = Chain(lambda x, f, i: x + f.softmax(-1))
    model.fs = nn.ModuleList([nn.Softmax(-1)])
    with pytest.raises(hct.UnsupportedModel, match=r"fs\.0 .*needs dim, the size of the feature axis.*args="):
        hct.convert(model, connection="dynamic")


def test_hooks_keep_a_module_whole():
    model = GPT(depth=2)
    calls = []
    model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    hc = hct.convert(model, (tokens(),))
    assert [r.name for r in hc.hc_report.converted] == ["transformer.h.1.attn", "transformer.h.1.mlp"]
    opaque = [r for r in hc.hc_report.skipped if "hooks" in r.reason]
    assert [r.name for r in opaque] == ["transformer.h.0.attn", "transformer.h.0.mlp"]
    before = len(calls)
    hc(tokens())
    assert len(calls) == before + 1


def test_hooks_of_the_root_stay():
    model, calls = GPT(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    hc = hct.convert(model, (tokens(),))
    before = len(calls)
    hc(tokens())
    assert len(calls) == before + 1


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = Mixing()

    def forward(self, x):
        x = x + self.f(x)
        return x if int(x.sum()) > 0 else -x


@pytest.mark.parametrize(
    "inner, reason, names",
    [(NoGrad, "grad mode", {"0.f", "0.g"}), (DataDependent, "values of a tensor", {"0"})],
    ids=["no_grad", "data dependent"],
)
def test_code_that_no_graph_can_hold_stays_whole(inner, reason, names):
    model = nn.Sequential(inner(), Chain(lambda x, f, i: x + f))
    x = torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 3
    assert {r.name for r in hc.hc_report.skipped if reason in r.reason} == names
    ours, theirs = hc(x), model(x)
    torch.testing.assert_close(ours, theirs)
    parameter = next(model[0].parameters())
    (a,) = torch.autograd.grad(ours.sum(), parameter, allow_unused=True)
    (b,) = torch.autograd.grad(theirs.sum(), parameter, allow_unused=True)
    assert (a is None) == (b is None) and (a is None or torch.allclose(a, b))


def test_no_grad_in_the_root_is_refused():
    with pytest.raises(hct.UnsupportedModel, match=r"NoGrad\.forward cannot be held in one graph"):
        hct.convert(NoGrad(), (torch.randn(2, 5, 8),))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_custom_autograd_functions_keep_their_backward():
    model = Chain(lambda x, f, i: x + Doubled.apply(f), 2)
    x = torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,))
    hc(x).sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def _swap_streams(gm):
    """Let the last write take the streams of the first read."""
    expands = [n for n in gm.graph.nodes if n.name.endswith("_expand")]
    last = [n for n in gm.graph.nodes if n.name.endswith("_write")][-1]
    last.args = (expands[0], *last.args[1:])


def _drop_branch(gm):
    """Write the branch's input in place of its output."""
    write = [n for n in gm.graph.nodes if n.name.endswith("_write")][1]
    read = [n for n in gm.graph.nodes if n.name.endswith("_read")][1]
    write.args = (write.args[0], read, write.args[2])


def _swap_within(gm):
    """Let a write see two of its streams exchanged: equal at the start, wrong as soon as they differ."""
    write = [n for n in gm.graph.nodes if n.name.endswith("_write")][1]
    with gm.graph.inserting_before(write):
        items = [gm.graph.call_function(operator.getitem, (write.args[0], i)) for i in (1, 0, 2, 3)]
    write.args = (tuple(items), *write.args[1:])


MUTATIONS = {
    "a swapped stream": _swap_streams,
    "a dropped branch": _drop_branch,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("zero_head", [False, True])
def test_verify_catches_a_wrong_rewrite(mutation, zero_head):
    model = nn.Sequential(Chain(lambda x, f, i: x + f), nn.Linear(8, 3))
    if zero_head:
        nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    x = torch.randn(2, 5, 8)
    plan = hct.plan(model, (x,), connection="static")
    gm = hct.rewrite(plan.graph_module, plan)
    assert verify.verify(model, gm, plan, (x,), {}).error <= 1e-5
    MUTATIONS[mutation](gm)
    gm.graph.lint()
    gm.recompile()
    with pytest.raises(
        hct.NotEquivalent, match=r"first difference, .*e.*, is after the residual 0\.fs\.[12] \(.*test_report"
    ):
        verify.verify(model, gm, plan, (x,), {})


@pytest.mark.parametrize("scope", ["graph", "blocks", "auto"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RecursionError])
def test_no_memory_is_no_reason_to_leave_a_module_whole(scope, error):
    class Fails(nn.Module):
        """Runs out of memory while it is traced, and only then."""

        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            if hasattr(x, "hc_value"):
                raise error("no memory left")
            return x + self.f(x)

    model, x = nn.Sequential(Fails(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), torch.randn(2, 3, 8)
    with pytest.raises(error, match="no memory left"):
        hct.convert(model, (x,), scope=scope)


def test_passes_tell_their_seconds_and_nodes(caplog):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with caplog.at_level("DEBUG", logger="hc_transform"):
        hct.convert(model, (torch.randn(2, 3, 8),), scope="graph")
    said = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    for name in ("record", "find_residuals", "choose", "trace", "plan_again", "rewritten_graph"):
        assert any(re.fullmatch(rf"{name}: \d+\.\d+ s, \d+( -> \d+)? nodes", text) for text in said), (name, said)
