"""Buffers and other state that a forward changes."""

from __future__ import annotations

import copy

import pytest
import torch
from awkward import VIEWS, Overwriting, Residual, chain, check, check_state, images, reasons, rows, stages, twins
from checks import error
from models import Mixing
from torch import nn

import hc_transform as hct


class Counting(nn.Module):
    """A branch, or a block, that counts its calls and keeps an average of what it sees."""

    def __init__(self, update, block=False):
        super().__init__()
        self.fc, self.update, self.block = nn.Linear(8, 8), update, block
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        self.update(self, x)
        return x + self.fc(x) if self.block else self.fc(x)


def in_place(module, x):
    module.steps.add_(1)
    module.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))


def in_place_operators(module, x):
    module.steps += 1
    module.average *= 0.9
    module.average += 0.1 * x.detach().mean((0, 1))


def in_place_no_grad(module, x):
    with torch.no_grad():
        module.steps += 1
        module.average.lerp_(x.mean((0, 1)), 0.1)


def copied(module, x):
    module.steps.copy_(module.steps + 1)
    module.average.copy_(0.9 * module.average + 0.1 * x.detach().mean((0, 1)))


def assigned(module, x):
    module.steps = module.steps + 1
    module.average = 0.9 * module.average + 0.1 * x.detach().mean((0, 1))


def sliced(module, x):
    module.steps[...] = module.steps + 1
    module.average[:4] = x.detach().mean((0, 1))[:4]


def while_training(module, x):
    if module.training:
        module.steps += 1
        module.average.lerp_(x.detach().mean((0, 1)), 0.1)


UPDATES = {
    f.__name__.replace("_", " "): f
    for f in (in_place, in_place_operators, in_place_no_grad, copied, assigned, sliced, while_training)
}


@pytest.mark.parametrize("place", ["branch", "block", "root"])
@pytest.mark.parametrize("update", UPDATES)
def test_buffers_that_a_forward_changes(update, place):
    counting = Counting(UPDATES[update], place != "branch")
    model = {"branch": lambda: nn.Sequential(Residual(counting), chain()), "root": lambda: counting}.get(
        place, lambda: nn.Sequential(counting, chain())
    )()
    model.double()
    calls = [rows(), rows(3), rows()]
    if place == "root" and update == "in place no grad":
        with pytest.raises(hct.UnsupportedModel, match="grad mode"):
            hct.convert(model, (calls[0],))
        return
    model, hc = twins(model, (calls[0],))
    check_state(model, hc)
    for training in (True, False):
        for x in calls:
            assert error(hc.train(training)(x), model.train(training)(x)) <= 1e-10
            check_state(model, hc)


@pytest.mark.parametrize("place", ["branch", "block"])
@pytest.mark.parametrize("update", UPDATES)
def test_conversion_leaves_the_buffers_of_the_original(update, place):
    counting = Counting(UPDATES[update], place == "block")
    model = nn.Sequential(counting if place == "block" else Residual(counting), chain()).double()
    model(rows())
    state = copy.deepcopy(model.state_dict())
    hct.convert(model, (rows(),))
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key


class Keeping(nn.Module):
    """A block that stores what it computes on itself."""

    def __init__(self, keep):
        super().__init__()
        self.f, self.keep, self.kept = Mixing(), keep, None

    def forward(self, x):
        h = self.f(x)
        self.keep(self, h)
        return x + h


def kept(module, h):
    module.kept = h.detach().square().mean()


def collected(module, h):
    module.kept = [*(module.kept or [])[-1:], h.detach()]


def summed(module, h):
    module.kept = h.detach().mean() if module.kept is None else 0.5 * module.kept + h.detach().mean()


@pytest.mark.parametrize("place", ["block", "root"])
def test_a_tensor_stored_on_a_module(place):
    model = Keeping(kept) if place == "root" else nn.Sequential(Keeping(kept), chain())
    hc = check(model, (rows(),), 1 if place == "root" else 3)
    for x in (rows(), rows(3)):
        hc(x), model(x)
        ours, theirs = (m.get_submodule("" if place == "root" else "0").kept for m in (hc, model))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keep, reason", [(collected, "keeps a state"), (summed, "keeps a state")])
def test_a_state_kept_on_a_module(keep, reason):
    model = nn.Sequential(Keeping(keep), chain()).double()
    model, hc = twins(model, (rows(),))
    assert reasons(hc, f"{reason} in its attribute 'kept'") == ["0"]
    for m in (model, hc):
        m.get_submodule("0").kept = None
    for x in (rows(), rows(), rows()):
        assert error(hc(x), model(x)) <= 1e-10
        for ours, theirs in zip(
            *(torch.utils._pytree.tree_leaves(m.get_submodule("0").kept) for m in (hc, model)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(hct.UnsupportedModel, match=reason):
        hct.convert(Keeping(keep).double(), (rows(),))


COMPILED = {
    "stored on the root": lambda: Keeping(kept),
    "assigned buffers": lambda: Counting(assigned, True),
    "augmented buffers": lambda: Counting(in_place_operators, True),
    "written through a view": lambda: Overwriting(VIEWS["slice"]),
    "batch norm on the trunk": lambda: nn.Sequential(chain(1), nn.BatchNorm1d(5), chain(1)),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_what_changes_the_state_compiles(kind):
    model = COMPILED[kind]()
    model, hc = twins(model, (rows(),))
    compiled = torch.compile(hc, fullgraph=True, backend="aot_eager")
    for x in (rows(), rows()):
        assert error(compiled(x), model(x)) <= 1e-10
        check_state(model, hc)
    if isinstance(model, Keeping):
        torch.testing.assert_close(hc.kept, model.kept)


class CountingActivation(nn.Module):
    """A small module that a trunk may carry."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return torch.tanh(x)


class Levelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.ones(()))

    def forward(self, x):
        self.level.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        return x / self.level


CARRIED = {
    "counting activation": (CountingActivation, rows),
    "running level": (Levelled, rows),
    "batch norm": (lambda: nn.BatchNorm2d(4), images),
    "instance norm": (lambda: nn.InstanceNorm2d(4, track_running_stats=True, affine=True), images),
}


def carrying(kind):
    make, inputs = CARRIED[kind]
    block = (lambda: Residual(Mixing())) if inputs is rows else (lambda: Residual(nn.Conv2d(4, 4, 3, padding=1)))
    return nn.Sequential(block(), make(), block()).double(), inputs


@pytest.mark.parametrize("kind", CARRIED)
def test_buffers_of_what_the_trunk_carries(kind):
    model, inputs = carrying(kind)
    model, hc = twins(model, (inputs(),))
    for x in (inputs(), inputs(3)):
        assert error(hc(x), model(x)) <= 1e-10
        check_state(model, hc)


@pytest.mark.parametrize("kind", CARRIED)
def test_conversion_leaves_the_buffers_of_what_the_trunk_carries(kind):
    model, inputs = carrying(kind)
    state = copy.deepcopy(model.state_dict())
    hct.convert(model, (inputs(),))
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_buffers_of_a_carried_projection_shortcut():
    model, hc = twins(stages(), (images(),), shortcuts="carry")
    for x in (images(), images(3)):
        assert error(hc(x), model(x)) <= 1e-10
        check_state(model, hc)
