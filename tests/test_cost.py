"""The cost instrument on functions whose traffic can be counted by hand, and recorded figures of each connection."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from torch import nn

import hc_transform as hct
from hc_transform.measuring.cost import cost_available, inductor_cost, regional_cost
from hc_transform.measuring.registers import registers_of
from hc_transform.running import regions

pytestmark = pytest.mark.skipif(not cost_available(), reason="needs Triton's compiler")

N, D = 8192, 1024
U = 2 * N * D  # bytes of one bf16 stream


def launches(graph):
    return [(launch.bytes, launch.library) for launch in graph.launches]


def test_a_pointwise_function_reads_and_writes_once():
    cost = inductor_cost(lambda x: (x + 1).sin() * 2, torch.zeros(1024), training=False)
    assert launches(cost.forward) == [(2 * 4096, False)] and cost.backward.launches == ()
    assert cost.milliseconds(8192e3)[0] == 1.0


def test_views_and_broadcasts_count_what_is_touched():
    for function, inputs, size in (
        (lambda x: x[:256] * 2, (torch.zeros(1024),), 2 * 256 * 4),
        (lambda x, y: x * y, (torch.zeros(64, 32), torch.zeros(32)), (2 * 64 * 32 + 32) * 4),
        (lambda i, t: nn.functional.embedding(i, t), (torch.zeros(16).long(), torch.zeros(99, 32)), 16 * (8 + 2 * 128)),
        (lambda x: x.add_(1), (torch.zeros(1024),), 2 * 4096),
        (lambda x: x / x.sum(-1, keepdim=True), (torch.zeros(512, 256),), 2 * 512 * 256 * 4),
    ):
        cost = inductor_cost(function, *inputs, training=False)
        assert launches(cost.forward) == [(size, False)]


def test_matrix_products_and_what_is_saved():
    x, w = torch.zeros(64, 128, requires_grad=True), torch.zeros(128, 256, requires_grad=True)
    cost = inductor_cost(lambda x, w: nn.functional.gelu((x * 2) @ w).softmax(-1), x, w)
    small, weight, large = 64 * 128 * 4, 128 * 256 * 4, 64 * 256 * 4
    product = small + weight + large
    assert launches(cost.forward) == [(2 * small, False), (product, True), (2 * large, False)]
    assert sorted(launches(cost.backward)) == sorted(
        [(4 * large, False), (product, True), (product, True), (2 * small, False)]
    )
    assert cost.saved_bytes == small + 2 * large, "the factors of the products, and both ends of the softmax"
    for graph in (cost.forward, cost.backward):
        assert graph.kernels == len(re.findall(r"^\s+triton_\w+\.run\(", graph.code, re.MULTILINE))


def test_an_operator_counts_its_inputs_and_outputs():
    logits = torch.zeros(64, 4, 4, requires_grad=True)
    cost = inductor_cost(lambda x: hct.sinkhorn(x * 2) + 1, logits)
    size = 64 * 16 * 4
    assert [b for b, library in launches(cost.forward) if library] == [2 * size]
    assert [b for b, library in launches(cost.backward) if library] == [3 * size]


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.RMSNorm(D), nn.Linear(D, D)

    def forward(self, x):
        return self.fc(self.norm(x))


class Chain(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.fs = nn.ModuleList(Branch() for _ in range(depth))

    def forward(self, x):
        for f in self.fs:
            x = x + f(x)
        return x


def chain(connection, depth=2):
    """A chain of residuals as it is (None) or converted; bf16, four streams."""
    model = Chain(depth).bfloat16()
    if connection is None:
        return model
    x = torch.randn(4, D).bfloat16()
    return hct.convert(model, (x,), connection=connection, num_streams=4, verify=False)


def measured(connection):
    x = torch.randn(N, D).bfloat16().requires_grad_()
    cost = inductor_cost(chain(connection), x)
    graphs = cost.forward, cost.backward
    return (
        *(len(g.launches) for g in graphs),
        *(round(g.bytes / U, 1) for g in graphs),
        round(cost.saved_bytes / U, 1),
    )


def test_one_region_costs_what_the_whole_does():
    x = torch.randn(N, D).bfloat16().requires_grad_()
    one = chain("static", 1)
    whole, pieces = (count(one, x) for count in (inductor_cost, regional_cost))
    assert launches(pieces.forward) == launches(whole.forward) and pieces.saved_bytes == whole.saved_bytes


# Traffic forward and backward and saved activations of a region of one residual, in units of one stream.
REGIONS = {"static": (13.2, 27.6, 7.0), "dynamic": (13.5, 35.9, 7.1)}


@pytest.mark.parametrize("connection", REGIONS)
def test_a_region_writes_the_streams_and_reads_them_in_one_kernel(connection, monkeypatch):
    """What a region takes from the one before is read from memory again, and kept as it would be in one graph."""
    monkeypatch.setattr(regions, "MAX_PERIOD", 1)
    monkeypatch.setattr(regions, "SLACK", 1.0)
    x = torch.randn(N, D).bfloat16().requires_grad_()
    short, long = (regional_cost(chain(connection, depth), x) for depth in (5, 7))
    figures = [
        (many - few) / 2 / U
        for few, many in (
            (short.forward.bytes, long.forward.bytes),
            (short.backward.bytes, long.backward.bytes),
            (short.saved_bytes, long.saved_bytes),
        )
    ]
    print(connection, figures)
    assert all(now <= 1.01 * recorded for now, recorded in zip(figures, REGIONS[connection], strict=True))
    inference = regional_cost(chain(connection, 5), x, training=False)
    assert inference.backward.launches == () and 0 < inference.forward.bytes < short.forward.bytes


# Launches forward and backward, traffic forward and backward and saved activations in units of one stream.
RECORDED = {
    "None": (5, 11, 13.3, 20.6, 3.0),
    "static": (7, 17, 21.3, 41.8, 10.0),
    "dynamic": (9, 28, 21.5, 56.3, 10.2),
    "mhc": (13, 35, 29.7, 64.6, 10.3),
    "kromhc": (10, 20, 21.4, 58.0, 10.1),
    "mhc-lite": (16, 76, 31.2, 65.2, 10.3),
    "identity": (10, 19, 21.4, 48.9, 10.1),
}


@pytest.mark.parametrize("connection", [None, "static", "dynamic", "mhc", "kromhc", "mhc-lite", "identity"], ids=str)
def test_recorded_figures(connection):
    figures = measured(connection)
    print(connection, figures)
    for now, recorded in zip(figures, RECORDED[str(connection)], strict=True):
        assert now <= 1.05 * recorded, f"{figures} was {RECORDED[str(connection)]}"


def test_registers_and_spills():
    """A kernel that holds 16 rows of 1024 numbers in the threads of one warp cannot keep them in registers."""
    weight = torch.zeros(16, 1024)

    def mixed(x):
        rows = [(x * w).softmax(-1) for w in weight.unbind(0)]
        return sum(row.sum(-1, keepdim=True) * row for row in rows)

    graph = inductor_cost(mixed, torch.zeros(64, 1024), training=False).forward
    few, many = (max(k.spilled_bytes for k in registers_of(graph, warps)) for warps in (1, 8))
    assert few > 0 and few > many
    assert all(0 < kernel.registers <= 255 and kernel.warps == 4 for kernel in registers_of(graph, 4))


# Traffic of a chain of 3 residuals on top of the plain one, compiled with hct.inductor, u a residual.
TUNED = {"static": 16.8, "dynamic": 21.1, "mhc": 37.1, "identity": 21.9}


SLOW = [pytest.param(c, marks=pytest.mark.slow) for c in TUNED if c != "dynamic"]


@pytest.mark.parametrize("connection", ["dynamic", *SLOW])
def test_set_for_streams_kernels_are_larger_and_spill_nothing(connection):
    """Inductor takes one warp for a row of 1024 features, whose largest kernels then spill."""
    x = torch.randn(N, D).bfloat16().requires_grad_()
    plain, cost = inductor_cost(chain(None, 3), x), inductor_cost(chain(connection, 3), x, tuned=True)
    figure = (cost.bytes - plain.bytes) / 3 / U
    kernels = [kernel for graph in (cost.forward, cost.backward) for kernel in registers_of(graph)]
    print(connection, figure, max(kernel.registers for kernel in kernels))
    assert figure <= 1.01 * TUNED[connection]
    assert max(kernel.spilled_bytes for kernel in kernels) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc", "identity"])
def test_time_on_a_gpu(connection, record_property):
    """The time of a training step, printed; kernels that move so few bytes take at most three times as long."""
    from hc_transform.measuring.bench import bench

    models = {name: chain(c).cuda() for name, c in (("plain", None), (connection, connection))}
    x = torch.randn(N, D, device="cuda").bfloat16().requires_grad_()
    figures = bench(models, (x,), repeats=20, count=False)
    times = {name: f.times["forward + backward, compiled"].median for name, f in figures.items()}
    record_property("seconds", json.dumps(times))
    print(os.linesep, connection, times)
    estimate = sum(inductor_cost(chain(connection), x.cpu()).milliseconds()) / 1e3
    assert times[connection] - times["plain"] <= 3 * estimate
