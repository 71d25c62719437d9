"""Calls that do without some residuals: the others keep their connections, and both scopes do the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import error, moved
from torch import Tensor, nn

import hc_transform as hct

D = 8
SCOPES = ("graph", "blocks")


class Block(nn.Module):
    """A residual and what follows it, left out altogether at a lot that is drawn in training mode."""

    def __init__(self, p: float, after: nn.Module | None = None) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))
        self.after = after if after is not None else nn.Identity()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < self.p:
            return x
        return self.after(x + self.f(x))


class Halves(nn.Module):
    """Two residuals, the first of which is left out at a lot that is drawn in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.rand(()).item() < 0.5:
            x = x + self.f(x)
        return x + self.g(x)


class Chain(nn.Module):
    """Blocks in a row."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Recurrent(nn.Module):
    """One block called several times, another in between."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.block = Block(p, nn.LayerNorm(D))
        self.between = Block(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(x)
        x = self.between(x)
        x = self.block(x)
        return self.block(x)


MODELS = {
    "the last": lambda: Chain(Block(0.0, nn.LayerNorm(D)), Block(0.7, nn.LayerNorm(D))),
    "the first": lambda: Chain(Block(0.7, nn.LayerNorm(D)), Block(0.0, nn.LayerNorm(D)), Block(0.0)),
    "any": lambda: Chain(*(Block(0.5, nn.LayerNorm(D)) for _ in range(3))),
    "a part of a block": lambda: Chain(Halves()),
    "parts of blocks": lambda: Chain(Halves(), Halves()),
    "calls of one block": lambda: Recurrent(0.5),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "learned readout": {"readout": "learned"},
    "stream embedding": {"stream_embedding": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_scopes_agree_whatever_is_left_out(kind: str, options: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[kind](), torch.randn(2, 3, D)
    given = OPTIONS[options]
    if kind == "calls of one block" and given:
        pytest.skip("ends of a block that is called several times are of its first call")
    graph, blocks = (
        moved(hct.convert(copy.deepcopy(model).eval(), (x,), scope=scope, **given)).train() for scope in SCOPES
    )
    outputs = set()
    for seed in range(12):
        torch.manual_seed(seed)
        expected = graph(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(torch.as_tensor(blocks(x)), expected, rtol=1e-4, atol=1e-5)
        outputs.add(round(expected.square().mean(0).flatten()[0].item(), 5))
    assert len(outputs) > 1  # lots were drawn


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_the_originals_whatever_is_left_out(kind: str, scope: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[kind](), torch.randn(2, 3, D)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for m in (model, hc):
        m.train()
    for seed in range(12):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(torch.as_tensor(hc(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_call_of_a_shared_block_alone_cannot_be_converted_by_blocks() -> None:
    model, x = Recurrent(0.0).eval(), torch.randn(2, 3, D)
    graph = hct.convert(model, (x,), scope="graph", exclude=["block.f:2"])
    assert {r.name for r in graph.hc_report.converted} == {"block.f", "between", "block.f:3"}
    blocks = hct.convert(model, (x,), scope="blocks", exclude=["block.f:2"])
    assert {r.name for r in blocks.hc_report.converted} == {"between"}
    assert "nothing tells from this one" in str(blocks.hc_report)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(blocks(x)), model(x), rtol=1e-5, atol=1e-6)


class Parallel(nn.Module):
    """Two branches on one value, one of which holds a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(D), nn.Linear(D, D)
        self.inner = Block(0.0)
        self.f = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = self.attn(h) + self.inner(h) + x
        return x + self.f(x)


def test_a_block_chains_its_residuals_as_the_whole_model_does() -> None:
    torch.manual_seed(0)
    model, x = Chain(Parallel(), Parallel()).eval(), torch.randn(2, 3, D)
    outer = [r.name for r in hct.plan(model, (x,), scope="graph").residuals if r.name.endswith(":2")]
    assert len(outer) == 2
    made = [moved(hct.convert(model, (x,), scope=scope, exclude=outer)) for scope in SCOPES]
    assert len({tuple((r.name, r.trunk) for r in m.hc_report.converted) for m in made}) == 1
    with torch.no_grad():
        torch.testing.assert_close(made[0](x), torch.as_tensor(made[1](x)), rtol=1e-4, atol=1e-5)


class Reads(nn.Module):
    """Code between two blocks that streams do not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(0.0) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[2](torch.tanh(x))


@pytest.mark.parametrize("scope", SCOPES)
def test_no_trunk_is_shorter_than_asked_for(scope: str) -> None:
    hc = hct.convert(Reads().eval(), (torch.randn(2, 3, D),), scope=scope, min_residuals=2)
    trunks = [r.trunk for r in hc.hc_report.converted]
    assert all(trunks.count(trunk) >= 2 for trunk in trunks)
    assert len(trunks) == (3 if scope == "graph" else 2)


class OtherSizes(nn.Module):
    """Something that is not linear between two residuals, for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(0.0), Block(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[1] > 4:
            x = torch.tanh(x)
        return self.b(x)


def test_a_mirrored_start_refuses_what_is_not_linear_in_other_calls() -> None:
    hc = hct.convert(OtherSizes().eval(), (torch.randn(2, 3, D),), scope="graph", init="mirrored")
    hc(torch.randn(2, 4, D))
    with pytest.raises(hct.HCTransformError, match="carries a nonlinear operation"):
        hc(torch.randn(2, 5, D))


@pytest.mark.parametrize("first", [False, True], ids=["stream first", "branch first"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (3, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("branch_order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2)], ids=str)
def test_fractions_lie_in_memory_as_a_sum_does(order: Any, branch_order: Any, first: bool) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    def laid(order: Any) -> Tensor:
        sizes = [(2, 4, 6, D)[axis] for axis in order]
        return torch.randn(sizes).permute([order.index(axis) for axis in range(4)])

    x, y = laid(order), laid(branch_order)
    hc = hct.convert(Adds(), (x,), connection="frac", scope="graph")
    connection = hc.get_submodule("hyper_connections.f")
    streams = hct.expand(x, hc.hc_report.converted[0].streams)
    coefficients = connection(streams)
    assert hct.read(streams, coefficients).stride() == x.stride()
    expected = (y + x if first else x + y).stride()
    assert {s.stride() for s in hct.write(streams, y, coefficients, first)} == {expected}


class Within(nn.Module):
    """A residual around two others, the last of which another chain could go on with."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        outer = x
        x = x + self.g(x)
        x = x + self.h(x)
        return outer + x


@pytest.mark.parametrize("scope", SCOPES)
def test_trunks_within_and_around_each_other(scope: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Within(), Within()).eval(), torch.randn(2, 3, D)
    hc = hct.convert(model, (x,), scope=scope, nested="all")
    assert len(hc.hc_report.converted) == 8
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(hc(x)), model(x), rtol=1e-5, atol=1e-6)


class Positioned(nn.Module):
    """Each layer adds what the values were made of to its branch's input: a residual around all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(D, D)
        self.layers = nn.ModuleList(PositionedLayer() for _ in range(3))

    def forward(self, positions: Tensor) -> Tensor:
        x = self.start(positions)
        for layer in self.layers:
            x = layer(x, positions)
        return x


class PositionedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        moved = positions + x
        return x + torch.sigmoid(self.query(moved)) * self.value(x)


@pytest.mark.parametrize("scope", ["graph", "blocks"])
def test_a_branch_reads_its_streams_through_a_residual_that_stays_plain(scope: str) -> None:
    plan = hct.plan(Positioned(), (torch.randn(2, 4, D),), scope=scope)
    adds = {r.name: any(node.name.startswith("add") for node in r.region) for r in plan.residuals}
    assert adds == {"layers.0": False, "layers.0.value": False, "layers.1.value": True, "layers.2.value": True}
    assert {r.name for r in plan.skipped} == {"layers.1", "layers.2"}  # around the others, and no streams


def test_scopes_agree_where_such_a_residual_stays_plain() -> None:
    model, x = Positioned(), torch.randn(2, 4, D)
    graph, blocks = (hct.convert(model, (x,), scope=scope) for scope in ("graph", "blocks"))
    blocks.load_state_dict(moved(graph).state_dict())
    assert error(blocks(x), graph(x)) < 1e-5
