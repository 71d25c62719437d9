"""Blocks that are alike share their graphs; blocks whose code would do something else do not."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from checks import error, moved
from torch import Tensor, nn
from torch.nn import functional as F

import hc_transform as hct

D = 8


class Block(nn.Module):
    """A residual whose code reads what it is given: a number, a function, an object, a tensor, a module."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.linear = nn.Linear(D, D)
        self.scale, self.act, self.settings, self.offset = 1.0, F.relu, None, None
        for name, value in given.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.linear(self.norm(x)))
        if self.settings is not None:
            h = h * self.settings.factor
        if self.offset is not None:
            h = h + self.offset
        return x + self.scale * h


class Chain(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Settings:
    def __init__(self, factor: float) -> None:
        self.factor = factor


def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


def traces(caplog: pytest.LogCaptureFixture, run: Callable[[], Any]) -> tuple[Any, int]:
    """Return what ``run`` returns, and how many graphs of blocks were traced meanwhile."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hc_transform"):
        result = run()
    return result, sum(record.getMessage().startswith("traced ") for record in caplog.records)


def check_alike(model: nn.Module, converted: nn.Module, x: Tensor) -> None:
    """Compare with the original at the start, and with the graph of the whole model off it."""
    assert error(converted(x), model(x)) < 1e-5
    graph = hct.convert(model, args=(x,), scope="graph")
    assert error(moved(converted)(x), moved(graph)(x)) < 1e-5


def test_a_deep_model_takes_as_many_traces_as_a_shallow_one(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, D)
    counts = {}
    for depth in (2, 12):
        model = Chain([Block() for _ in range(depth)])
        converted, counts[depth] = traces(caplog, lambda: hct.convert(model, args=(x,), scope="blocks"))  # noqa: B023
        assert len(converted.hc_report.converted) == depth
        check_alike(model, converted, x)
    assert counts[12] == counts[2] == 2  # one that hands streams on, and the last


DIFFERENT = {
    "a number": [{"scale": 0.5}, {"scale": 2.0}, {"scale": 0.5}],
    "a function": [{"act": F.relu}, {"act": torch.tanh}, {"act": F.relu}],
    "a partial function": [{"act": partial(scaled, by=2.0)}, {"act": partial(scaled, by=-1.0)}, {}],
    "an object": [{"settings": Settings(2.0)}, {"settings": Settings(3.0)}, {}],
    "a class of module": [{"linear": nn.Identity()}, {}, {"linear": nn.Tanh()}],
    "a closure": [{"act": lambda x: x * 2}, {"act": lambda x: x - 1}, {}],
    "a tensor that is no buffer": [{"offset": torch.ones(D)}, {"offset": torch.full((D,), 2.0)}, {}],
    "a shape": [{"offset": nn.Parameter(torch.ones(D))}, {"offset": nn.Parameter(torch.ones(3, 1))}, {}],
    "a missing bias": [{"linear": nn.Linear(D, D, bias=False)}, {}, {}],
}


@pytest.mark.parametrize("given", DIFFERENT.values(), ids=DIFFERENT)
def test_blocks_that_differ_compute_what_they_did(given: list[dict[str, Any]]) -> None:
    x = torch.randn(2, 3, D)
    model = Chain([Block(**own) for own in given])
    converted = hct.convert(model, args=(x,), scope="blocks")
    assert len(converted.hc_report.converted) == len(given)
    check_alike(model, converted, x)


def test_one_block_is_changed_after_conversion(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, D)
    model = Chain([Block() for _ in range(4)])
    converted = hct.convert(model, args=(x,), scope="blocks")
    for copied in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        model.blocks[1].scale = copied.blocks[1].scale = 3.0
        assert error(copied(x), model(x)) < 1e-5
        model.blocks[2].act = copied.blocks[2].act = torch.sigmoid
        assert error(copied(x), model(x)) < 1e-5
        model.blocks[1].scale, model.blocks[2].act = 1.0, F.relu


def test_blocks_share_graphs_of_new_kinds_of_calls(caplog: pytest.LogCaptureFixture) -> None:
    class Decides(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if x.shape[1] > 4 else y

    model = Chain([Decides() for _ in range(6)])
    x = torch.randn(2, 3, D)
    converted = hct.convert(model, args=(x,), scope="blocks")
    longer = torch.randn(2, 5, D)
    result, count = traces(caplog, lambda: converted(longer))
    assert error(result, model(longer)) < 1e-5
    assert count == 2
    assert traces(caplog, lambda: converted(longer))[1] == 0


def test_stream_embeddings_and_calls_of_one_block_keep_their_places() -> None:
    x = torch.randn(2, 3, D)
    model = Chain([Block() for _ in range(4)])
    converted = hct.convert(model, args=(x,), scope="blocks", stream_embedding=True, readout="learned")
    graph = hct.convert(model, args=(x,), scope="graph", stream_embedding=True, readout="learned")
    assert error(moved(converted)(x), moved(graph)(x)) < 1e-5
    twice = Chain([Block(), Block()])
    twice.blocks.append(twice.blocks[0])
    converted = hct.convert(twice, args=(x,), scope="blocks")
    assert error(converted(x), twice(x)) < 1e-5


def test_objects_are_kept_apart_by_themselves() -> None:
    from hc_transform.capture.configuration import configuration_of

    settings = Settings(1.0)
    one, other = Block(settings=settings), Block(settings=Settings(1.0))
    assert configuration_of(one) != configuration_of(other)
    assert configuration_of(one) == configuration_of(Block(settings=settings))
    assert configuration_of(Block(act=partial(scaled, by=2.0))) == configuration_of(Block(act=partial(scaled, by=2.0)))
    assert configuration_of(Block(scale=3.0)) == configuration_of(Block())  # which graphs know by themselves
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    assert configuration_of(Block(settings=cyclic)) == configuration_of(Block(settings=cyclic))
