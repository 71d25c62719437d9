"""Hooks on what is converted: they see and change the same."""

from __future__ import annotations

import functools

import pytest
import torch
from awkward import chain, check, reasons, rows
from checks import error, weighted
from torch import nn

import hc_transform as hct


class Collector:
    def __init__(self):
        self.seen = []

    def forward(self, module, args, output):
        self.seen.append(output.detach().clone())

    def forward_pre(self, module, args):
        self.seen.append(args[0].detach().clone())

    def full_backward(self, module, grad_input, grad_output):
        self.seen.append(grad_output[0].clone())
        self.seen.append(None if grad_input[0] is None else grad_input[0].clone())

    def full_backward_pre(self, module, grad_output):
        self.seen.append(grad_output[0].clone())


HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]
PLACES = {"branch": "1.fs.0", "layer of a branch": "1.fs.0.fc", "block": "1", "root": ""}


def changing(kind):
    """Return a hook that scales what it is given."""
    return {
        "forward": lambda module, args, output: output * 1.5,
        "forward_pre": lambda module, args: (args[0] * 1.5,),
        "full_backward": lambda module, given, grad: tuple(g if g is None else g * 1.5 for g in given),
        "full_backward_pre": lambda module, grad: (grad[0] * 1.5,),
    }[kind]


NO_GRADIENT = "ignore:Full backward hook is firing when gradients are computed with respect to module outputs"


@pytest.mark.filterwarnings(NO_GRADIENT)  # the original's too: its input needs none
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_change_the_same(kind, place):
    model = nn.Sequential(nn.Linear(8, 8), chain(), chain())
    getattr(model.get_submodule(PLACES[place]), f"register_{kind}_hook")(changing(kind))
    hc = check(model, (rows(),), 2 if place == "block" else 4)
    assert reasons(hc, "hooks") == (["1.fs.0", "1.fs.1"] if place == "block" else [])


@pytest.mark.filterwarnings(NO_GRADIENT)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_see_the_same(kind, place):
    """A closure collects: hooks that are functions are shared with the original."""
    model = nn.Sequential(nn.Linear(8, 8), chain(), chain()).double()
    collector, x = Collector(), rows()
    hook = getattr(collector, kind)
    getattr(model.get_submodule(PLACES[place]), f"register_{kind}_hook")(lambda *args: hook(*args))
    hc = hct.convert(model, (x,))
    collected = []
    for module in (hc, model):
        collector.seen.clear()
        weighted(module(x)).backward()
        collected.append(list(collector.seen))
    assert len(collected[0]) == len(collected[1]) > 0
    for ours, theirs in zip(*collected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


SHARED_HOOKS = {
    "bound method": lambda collector: collector.forward,
    "partial": lambda collector: functools.partial(Collector.forward, collector),
}


@pytest.mark.parametrize("kind", SHARED_HOOKS)
def test_hooks_with_an_object_report_to_it(kind):
    model, collector = chain().double(), Collector()
    model.fs[0].register_forward_hook(SHARED_HOOKS[kind](collector))
    hc = hct.convert(model, (rows(),))
    collector.seen.clear()
    hc(rows())
    assert len(collector.seen) == 1


def test_hooks_removed_from_the_converted_model():
    model = chain().double()
    handle = model.fs[0].register_forward_hook(changing("forward"))
    x = rows()
    hc = hct.convert(model, (x,))
    handle.remove()
    hc.fs[0]._forward_hooks.clear()
    assert error(hc(x), model(x)) <= 1e-10


def test_a_hook_on_a_norm_of_the_trunk_is_called_once():
    model = nn.Sequential(chain(), nn.LayerNorm(8), chain()).double()
    seen, x = [], rows()
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    hc = hct.convert(model, (x,))
    seen.clear()
    hc(x)
    assert seen == [x.shape]
