"""Grad modes, autocast, checkpoints and custom autograd functions in code that is traced."""

from __future__ import annotations

import contextlib

import pytest
import torch
from awkward import Residual, chain, check, reasons, rows
from checks import check_preserved, error
from models import Mixing, NoGrad
from torch import nn
from torch.utils.checkpoint import checkpoint

import hc_transform as hct


class Within(nn.Module):
    """A branch that computes a gate inside of a context."""

    def __init__(self, context, add=False):
        super().__init__()
        self.fc, self.gate, self.context, self.add = nn.Linear(8, 8), nn.Linear(8, 8), context, add

    def forward(self, x):
        with self.context():
            gate = self.gate(x)
        h = self.fc(x) * gate.sigmoid()
        return h + gate if self.add else h


class Around(nn.Module):
    """A region around a whole module."""

    def __init__(self, context, inner):
        super().__init__()
        self.context, self.inner = context, inner

    def forward(self, x):
        with self.context():
            return self.inner(x)


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = Mixing()

    @torch.no_grad()
    def forward(self, x):
        return x + self.f(x)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


GRAD_MODES = {"no_grad": torch.no_grad, "set_grad_enabled": lambda: torch.set_grad_enabled(False)}


@pytest.mark.parametrize("add", [False, True], ids=["a leaf", "code that adds"])
@pytest.mark.parametrize("mode", GRAD_MODES)
def test_a_grad_mode_in_a_branch(mode, add):
    hc = check(nn.Sequential(Residual(Within(GRAD_MODES[mode], add)), chain()), (rows(),), 3, trunks=1)
    assert "grad mode" not in str(hc.hc_report)
    assert [r.module for r in hc.hc_report.skipped] == (["0.f"] if add else [])


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_a_grad_mode_around_a_module_with_residuals(mode):
    model = nn.Sequential(nn.Linear(8, 8), Around(GRAD_MODES[mode], chain()), chain())
    hc = check(model, (rows(),), 2)
    assert reasons(hc, "grad mode") == ["1.inner.fs.0", "1.inner.fs.1"]


def test_a_decorated_forward():
    hc = check(nn.Sequential(Decorated(), chain()), (rows(),), 2)
    assert reasons(hc, "grad mode") == ["0"]


ROOTS = {
    "no_grad": (lambda: Around(torch.no_grad, chain()), "grad mode"),
    "inference_mode": (lambda: Around(torch.inference_mode, chain()), "grad mode"),
    "autocast": (lambda: Around(autocast, chain()), "autocast"),
    "decorator": (Decorated, "grad mode"),
}


@pytest.mark.parametrize("kind", ROOTS)
def test_a_region_in_the_root_is_refused_as_a_graph(kind):
    make, reason = ROOTS[kind]
    with pytest.raises(hct.UnsupportedModel, match=f"{reason}.*Convert the submodules that add by themselves"):
        hct.convert(make(), (rows().float(),), scope="graph")


@pytest.mark.parametrize("kind", [kind for kind in ROOTS if kind != "decorator"])
def test_a_region_in_the_root_stays_around_blocks(kind):
    model, x = ROOTS[kind][0](), rows().float()
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 2
    for batch in (x, rows(3).float()):
        ours, theirs = hc(batch), model(batch)
        assert error(ours, theirs) <= 1e-5 and ours.requires_grad == theirs.requires_grad


@pytest.mark.parametrize("outside", [contextlib.nullcontext, torch.no_grad], ids=["with grad", "under no_grad"])
def test_a_grad_mode_is_seen_whatever_mode_the_conversion_runs_in(outside):
    model = nn.Sequential(NoGrad(), chain()).double()
    x = rows()
    with outside():
        hc = hct.convert(model, (x,))
    assert reasons(hc, "grad mode") == ["0.f", "0.g"]
    check_preserved(model, hc, (x,), bound=1e-10, gradient_bound=1e-9)


def test_a_grad_mode_in_the_root_is_refused_under_no_grad():
    with torch.no_grad(), pytest.raises(hct.UnsupportedModel, match="grad mode"):
        hct.convert(NoGrad().double(), (rows(),))


class Negated(nn.Module):
    """Code with a region, then residuals, then a decision on an optional input."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = NoGrad(), chain()

    def forward(self, x, negate=False):
        x = self.rest(self.first(x))
        return -x if negate else x


def test_a_grad_mode_is_seen_when_a_call_without_grad_traces_again():
    model = Negated().double()
    x = rows()
    hc = hct.convert(model, (x,))
    with torch.no_grad():
        assert error(hc(x, negate=True), model(x, negate=True)) <= 1e-10


@pytest.mark.parametrize("add", [False, True], ids=["a leaf", "code that adds"])
def test_autocast_in_a_branch(add):
    model = nn.Sequential(Residual(Within(autocast, add)), chain())
    x = rows().float()
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 3
    assert [r.module for r in hc.hc_report.skipped] == (["0.f"] if add else [])
    check_preserved(model, hc, (x,), others=[(rows(3).float(),)], gradient_bound=1e-2)


class WithoutAutocast(nn.Module):
    """A block that leaves autocast for its own code."""

    def __init__(self):
        super().__init__()
        self.f = Mixing()

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return x + self.f(x.float())


def test_a_region_without_autocast_called_under_autocast():
    model = nn.Sequential(WithoutAutocast(), chain()).eval()
    x = rows().float()
    hc = hct.convert(model, (x,))
    assert reasons(hc, "autocast") == ["0"]
    with autocast(), torch.no_grad():
        assert error(hc(x), model(x)) <= 1e-5


class Checkpointed(nn.Module):
    def __init__(self, inner, add=False):
        super().__init__()
        self.inner, self.add = inner, add

    def forward(self, x):
        h = checkpoint(self.inner, x, use_reentrant=False)
        return h + h.mean() if self.add else h


@pytest.mark.parametrize("add", [False, True], ids=["a leaf", "code that adds"])
def test_checkpointing_in_a_branch(add):
    hc = check(nn.Sequential(Residual(Checkpointed(Mixing(), add)), chain()), (rows(),), 3, trunks=1)
    assert [r.module for r in hc.hc_report.skipped] == (["0.f"] if add else [])


class CheckpointedRoot(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(Mixing()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x


def test_checkpointing_around_a_block():
    hc = check(nn.Sequential(Checkpointed(chain()), chain()), (rows(),), 2)
    assert reasons(hc, "checkpointing") == ["0.inner.fs.0", "0.inner.fs.1"]


def test_checkpointing_in_the_root_is_refused_as_a_graph():
    x = rows().float()
    with pytest.raises(hct.HCTransformError, match="activation checkpointing"):
        hct.convert(CheckpointedRoot().train(), (x,), scope="graph")
    hc = hct.convert(CheckpointedRoot().eval(), (x,), scope="graph")
    assert "In training mode calls are refused" in str(hc.hc_report)
    with pytest.raises(hct.HCTransformError, match="activation checkpointing"):
        hc.train()(x)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.factor * grad, None


class Function(nn.Module):
    def __init__(self, add=False):
        super().__init__()
        self.fc, self.add = nn.Linear(8, 8), add

    def forward(self, x):
        h = Tripled.apply(self.fc(x), 0.5)
        return h + h.mean() if self.add else h


@pytest.mark.parametrize("add", [False, True], ids=["a leaf", "code that adds"])
def test_a_custom_autograd_function_in_a_branch(add):
    check(nn.Sequential(Residual(Function(add)), chain()), (rows(),), 3, trunks=1)


class Tripling(nn.Module):
    def forward(self, x):
        return Tripled.apply(x, 0.5)


def test_a_custom_autograd_function_on_the_trunk():
    check(nn.Sequential(chain(), Tripling(), chain()), (rows(),), 4)
