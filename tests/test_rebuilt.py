"""What the zoo does not show of its rebuilt models: layers that are dropped, inputs left out, trunks and verdicts."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import error, outputs_and_gradients, seeded
from rebuilt_audio import Conformer, Whisper
from rebuilt_text import NanoChat, NBeats
from rebuilt_vision import Clip, DinoV2
from torch import nn

import hc_transform as hct
from hc_transform.capture.trace import trace

SCOPES = pytest.mark.parametrize("scope", ["graph", "blocks"])


@SCOPES
def test_layers_are_dropped_as_by_the_original(scope):
    torch.manual_seed(0)
    model, x = Conformer(drop_layers=0.5), (torch.randn(2, 15, 8), torch.tensor([15, 14]))
    hc = hct.convert(model, x, scope=scope, num_streams=2)
    assert len(hc.hc_report.converted) == 12
    kept = set()
    for seed in range(12):
        torch.manual_seed(seed)
        theirs = model(*x)
        kept.add(torch.random.get_rng_state()[:64].sum().item())
        torch.manual_seed(seed)
        assert error(hc(*x), theirs) <= 1e-5
    assert len(kept) > 1, "the same layers were kept every time"


@SCOPES
def test_a_branch_on_a_part_of_the_batch_moves_the_streams(scope):
    """Converted in training or evaluation mode, the connections are trained where the branch sees some samples only."""
    torch.manual_seed(0)
    model, x = DinoV2(drop=0.4), (torch.randn(4, 3, 32, 32),)
    for training in (True, False):
        hc = hct.convert(model.train(training), x, scope=scope, num_streams=2)
        assert len(hc.hc_report.converted) == 6
        assert "leaves residuals out" not in str(hc.hc_report)
        with torch.no_grad():
            for name, parameter in hc.named_parameters():
                if "hyper_connections." in name:
                    parameter.add_(torch.linspace(0.1, 0.2, parameter.numel()).view_as(parameter))
        outputs, gradients = outputs_and_gradients(hc.train(), x, {})
        assert error(outputs, seeded(model.train(), x, {})) > 1e-3
        assert all(n in gradients for n, _ in hc.named_parameters() if "hyper_connections." in n)


def test_sums_into_rows_of_flattened_values_are_of_the_shape_of_the_streams():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x, rows):
            flat = torch.index_add(x.flatten(1), 0, rows, self.f(x[rows]).flatten(1), alpha=2)
            return flat, flat.view_as(x)

    model, inputs = Rows(), {"x": torch.randn(3, 2, 4), "rows": torch.tensor([2, 0])}
    graph = trace(model, inputs).graph_module
    total = next(node for node in graph.graph.nodes if node.target is torch.index_add)
    assert total.meta["tensor_meta"].shape == (3, 2, 4)
    assert error(graph(**inputs), model(**inputs)) == 0
    hc = hct.convert(model, kwargs=inputs)
    other = torch.randn(5, 7, 4), torch.tensor([4, 1, 0])
    assert error(hc(*other), model(*other)) <= 1e-6


@SCOPES
def test_a_residual_that_nothing_reads_is_left_as_it_is(scope):
    x = torch.randn(2, 20), torch.ones(2, 20)
    report = hct.convert(NBeats(), x, scope=scope).hc_report
    assert [r.name for r in report.converted] == [f"blocks.{i}" for i in range(5)]
    assert [r.reason for r in report.skipped if r.name == "blocks.5"] == ["its value reaches no output"]


def test_a_residual_whose_value_is_kept_or_only_measured():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.h = (nn.Linear(4, 4) for _ in range(3))
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            kept = x + self.f(x)
            self.seen.copy_(kept.detach().mean(0))
            measured = x + self.g(x)
            return (x + self.h(x)).view(measured.shape)

    report = hct.convert(Keeps(), (torch.randn(3, 4),), scope="graph").hc_report
    assert [r.name for r in report.converted] == ["f", "h"]
    assert [(r.name, r.reason) for r in report.skipped] == [("g", "its value reaches no output")]


@SCOPES
@pytest.mark.parametrize("both", [True, False])
def test_either_tower_alone(scope, both):
    torch.manual_seed(0)
    model, image, text = Clip().eval(), torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 12))
    hc = hct.convert(model, (image, text) if both else (image,), scope=scope)
    for call in ((image, text), (None, text), (image,)):
        assert error(hc(*call), model(*call)) <= 1e-5


def test_a_trunk_that_is_mixed_with_its_beginning_is_one():
    tokens = torch.randint(1, 50, (2, 12))
    report = hct.convert(NanoChat(), (tokens,), scope="graph").hc_report
    assert {r.trunk for r in report.converted} == {0}
    lines = [r for r in report.skipped if r.location.endswith("rebuilt_text.py")]
    assert not lines and len(report.converted) == 8


@SCOPES
def test_sparse_buffers_and_buffers_out_of_the_state_stay(scope):
    model, inputs = Whisper(), (torch.randn(2, 8, 32), torch.randint(0, 50, (2, 10)))
    hc = hct.convert(model, inputs, scope=scope)
    buffers = dict(hc.named_buffers())
    assert buffers["alignment_heads"].is_sparse and "alignment_heads" not in hc.state_dict()
    assert copy.deepcopy(hc).get_buffer("alignment_heads").is_sparse
    assert (
        error(copy.deepcopy(hc).double()(inputs[0].double(), inputs[1]), model.double()(inputs[0].double(), inputs[1]))
        < 1e-9
    )


@pytest.mark.slow
def test_flex_attention():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="flex_attention",
        use_cache=False,
    )
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 50, (2, 16))
    with torch.no_grad():  # on a CPU flex_attention has no gradient
        hc = hct.convert(model, kwargs={"input_ids": ids})
        assert len(hc.hc_report.converted) == 4 and type(hc).__name__ == "LlamaForCausalLM"
        for tokens in (ids, torch.randint(0, 50, (3, 24))):
            assert error(hc(input_ids=tokens).logits, model(input_ids=tokens).logits) <= 1e-5
