"""The count of eager launches, on functions whose traffic can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from test_cost import D, N, U, chain
from torch import nn

from hc_transform.measuring.bench import bench, table
from hc_transform.measuring.eager import eager_cost


def launches(graph):
    return [(launch.name, launch.bytes) for launch in graph.launches]


def test_every_operator_reads_its_inputs_and_writes_its_outputs():
    x = torch.zeros(16, 64)
    cost = eager_cost(lambda x: (x + 1).sin(), x, training=False)
    assert launches(cost.forward) == [("aten::add", 8192), ("aten::sin", 8192)] and cost.backward.launches == ()
    assert cost.forward.kernels == 0 and cost.forward.library_calls == 2


def test_views_and_allocations_are_no_launches():
    def function(x):
        made = torch.empty_like(x).copy_(x.view(32, 32).t().reshape(16, 64)).zero_()
        return made.unsqueeze(0).expand(3, 16, 64) * x[:, :1]

    cost = eager_cost(function, torch.zeros(16, 64), training=False)
    size = 16 * 64 * 4
    assert launches(cost.forward) == [
        ("aten::clone", 2 * size),
        ("aten::copy_", 2 * size),
        ("aten::zero_", size),
        ("aten::mul", size + 64 + 3 * size),
    ]


def test_backward_and_what_is_saved():
    x, w = torch.zeros(64, 128, requires_grad=True), torch.zeros(128, 256, requires_grad=True)
    cost = eager_cost(lambda x, w: (x.exp() @ w)[:32], x, w)
    small, weight, large = 64 * 128 * 4, 128 * 256 * 4, 64 * 256 * 4
    assert launches(cost.forward) == [("aten::exp", 2 * small), ("aten::mm", small + weight + large)]
    assert cost.backward.bytes == (large + large) + 2 * (small + weight + large) + 3 * small, "zeros and a copy first"
    assert cost.saved_bytes == small


def test_tensors_that_are_shared_stay_so_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    cost = eager_cost(model, torch.zeros(4, 8))
    assert cost.backward.launches[-1].name == "aten::add", "the gradients of both"
    assert model[0].weight.grad is None and model[0].weight.sum() == model[1].weight.sum()


def test_code_that_looks_at_values_is_not_counted():
    class Decides(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(RuntimeError):
        eager_cost(Decides(), torch.zeros(8))
    said = []
    settings = {"mode": "infer", "repeats": 1, "compiled": False, "progress": said.append}
    figures = bench({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}, (torch.zeros(4, 8),), **settings)
    assert figures["a"].to_dict()["eager_cost"]["forward"]["library_calls"] == 1
    assert "launches forward, eager on a GPU" in table(figures)


# Launches forward and backward, traffic forward and backward, and what is saved, of a residual over a plain one.
RECORDED = {"static": (17, 41, 67, 135, 5.1), "dynamic": (49, 108, 124, 224, 5.2), "mhc": (57, 102, 125, 224, 5.2)}


@pytest.mark.parametrize("connection", RECORDED)
def test_recorded_figures(connection):
    x = torch.randn(N, D).bfloat16().requires_grad_()
    short, long, plain, plain_long = (eager_cost(chain(c, n), x) for c in (connection, None) for n in (3, 5))
    figures = [
        (read(long) - read(short) - read(plain_long) + read(plain)) / 2
        for read in (
            lambda cost: len(cost.forward.launches),
            lambda cost: len(cost.backward.launches),
            lambda cost: cost.forward.bytes / U,
            lambda cost: cost.backward.bytes / U,
            lambda cost: cost.saved_bytes / U,
        )
    ]
    print(connection, figures)
    assert all(now <= 1.01 * recorded for now, recorded in zip(figures, RECORDED[connection], strict=True))
