"""The benchmark: what it measures on models whose memory can be counted, and its command."""

from __future__ import annotations

import json

import pytest
import torch
from models import Chain
from torch import nn

import hc_transform as hct
from hc_transform.__main__ import main
from hc_transform.measuring.bench import Figures, Times, bench, peak_bytes, saved_bytes, table
from hc_transform.measuring.cost import cost_available


class Double(nn.Module):
    """Saves its input for the backward pass, and what it multiplies."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        return ((x + 1) * self.weight).exp().sum()


def chain():
    return Chain(lambda x, f, i: x + f, 2)


def test_saved_and_peak_memory():
    x = torch.zeros(1000)
    assert saved_bytes(Double(), (x,)) == 2 * 4000, "x + 1 and the result of exp"
    assert peak_bytes(Double(), (x,), "infer") == 2 * 4000, "a product and what it is made from"


def test_models_are_interleaved_and_put_side_by_side():
    order = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.fc = name, nn.Linear(8, 8)

        def forward(self, x):
            order.append(self.name)
            return self.fc(x)

    said = []
    models = {"a": Noted("a"), "b": Noted("b")}
    figures = bench(models, (torch.zeros(2, 8),), repeats=3, compiled=False, count=False, progress=said.append)
    assert "".join(order).endswith("ab" * 8), "two passes of one warm-up and three repetitions"
    assert all(len(f.times["forward + backward, eager"].seconds) == 3 for f in figures.values())
    assert said[-1] == "forward + backward, eager: 3 repetitions of 2 models"
    assert all(m.fc.weight.grad is None for m in models.values())
    with pytest.raises(ValueError, match="mode is one of 'infer', 'train'; got 'both'"):
        bench(models, (), mode="both")


def test_ratios_are_to_the_first():
    times = {"plain": (2e-3, 1e-3, 3e-3), "other": (3e-3, 5e-3, 1e-3)}
    text = table({name: Figures({"forward, eager": Times(seconds)}) for name, seconds in times.items()})
    assert "2.00 ms (1.00 to 3.00)" in text and "3.00 ms (1.00 to 5.00) [1.50]" in text


@pytest.mark.skipif(not cost_available(), reason="needs Triton's compiler")
def test_regions_are_counted_where_they_are_all_of_the_model():
    x = torch.randn(2, 5, 8)
    scopes = "graph", "blocks"
    models = {"plain": chain(), **{scope: hct.convert(chain(), (x,), scope=scope) for scope in scopes}}
    whole, regions = (bench(models, (x,), repeats=1, compiled=False, regions=flag) for flag in (False, True))
    assert whole["plain"].cost.bytes == regions["plain"].cost.bytes
    assert 0 < regions["graph"].cost.bytes < whole["graph"].cost.bytes, "in larger kernels"
    assert whole["blocks"].cost and regions["blocks"].cost is None


@pytest.mark.parametrize("scope", ["graph", "blocks"])
@pytest.mark.slow
def test_compiled_in_regions(scope):
    x = torch.randn(2, 5, 8)
    hc = hct.convert(chain(), (x,), scope=scope)
    figures = bench({"plain": chain(), "converted": hc}, (x,), repeats=2, count=False, regions=True)
    assert figures["converted"].compile_seconds > 0
    assert len(figures["converted"].times["forward + backward, compiled"].seconds) == 2
    assert "_region_settings" not in vars(hc), "the model itself stays eager"


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_command(scope, capsys):
    settings = ["--scope", scope, "--input", "2x5x8", "--no-compile", "--repeats", "2", "--streams", "3"]
    assert main(["bench", "test_bench:chain", "--connection", "static", *settings, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == ["plain", "static, n = 3"]
    for figure in figures.values():
        assert set(figure["times"]) == {"forward, eager", "forward + backward, eager"}
        assert figure["times"]["forward, eager"]["median"] > 0
    if cost_available():
        assert figures["static, n = 3"]["cost"]["forward"]["bytes"] > figures["plain"]["cost"]["forward"]["bytes"]
    assert figures["static, n = 3"]["saved_bytes"] > figures["plain"]["saved_bytes"]
    assert main(["bench", "test_bench:chain", *settings, "--mode", "infer", "--no-count"]) == 0
    printed = capsys.readouterr().out
    assert "dynamic, n = 3" in printed and "backward" not in printed.splitlines()[0]
