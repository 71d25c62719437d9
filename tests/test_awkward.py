"""Models with code that is awkward to trace: unchanged behaviour, or a reason."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import operator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checks import check_preserved, error, outputs_and_gradients, seeded, weighted
from models import Chain, ConvBlock, Mixing
from torch import nn
from torch.utils.checkpoint import checkpoint

import hc_transform as hct


def rows(batch=2, length=5, dim=8):
    return torch.randn(batch, length, dim, dtype=torch.float64)


def images(batch=2, channels=4, size=8):
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def plus(x, f, i):
    return x + f


def chain(depth=2):
    return Chain(plus, depth)


def check(model, args, count, *, others=None, trunks=None, **options):
    """Convert in double precision and check that nothing changes; return the converted model."""
    model.double()
    hc = hct.convert(model, args, num_streams=3, **options)
    assert len(hc.hc_report.converted) == count, str(hc.hc_report)
    if trunks is not None:
        assert len({r.trunk for r in hc.hc_report.converted}) == trunks, str(hc.hc_report)
    others = [tuple(torch.cat([a, a[:1]]) for a in args)] if others is None else others
    check_preserved(model, hc, args, others=others, bound=1e-10, gradient_bound=1e-9)
    return hc


def reasons(hc, part):
    """Return the names of what was skipped for a reason that holds ``part``, each once."""
    return list(dict.fromkeys(r.name for r in hc.hc_report.skipped if part in r.reason))


def twins(model, args, **options):
    """Return a model and a converted copy that share nothing."""
    model.double()
    return model, hct.convert(copy.deepcopy(model), args, num_streams=3, **options)


def check_state(model, hc):
    ours = hc.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


# -- in-place operations


class Still(nn.Module):
    """A branch whose backward pass does not need its input, so that the trunk may be overwritten."""

    def __init__(self, dim=8):
        super().__init__()
        self.register_buffer("mix", torch.randn(dim, dim) / dim)
        self.scale = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return self.scale * (x @ self.mix)


class Overwriting(nn.Module):
    def __init__(self, combine, depth=3):
        super().__init__()
        self.stem, self.fs, self.combine = nn.Linear(8, 8), nn.ModuleList(Still() for _ in range(depth)), combine

    def forward(self, x):
        x = self.stem(x)
        for f in self.fs:
            x = self.combine(x, f)
        return x


def alone(x, change):
    """Apply ``change`` for its effect and return ``x``."""
    change(x)
    return x


IN_PLACE = {
    "x += f": lambda x, f: operator.iadd(x, f(x)),
    "x.add_": lambda x, f: x.add_(f(x)),
    "x.add_ alpha": lambda x, f: x.add_(f(x), alpha=0.5),
    "x.add_ alone": lambda x, f: alone(x, lambda x: x.add_(f(x))),
    "f.add_": lambda x, f: f(x).add_(x),
    "relu_": lambda x, f: (x + f(x)).relu_(),
    "relu_ alone": lambda x, f: alone(x + f(x), lambda x: x.relu_()),
    "F.relu": lambda x, f: F.relu(x + f(x), inplace=True),
    "mul_": lambda x, f: (x + f(x)).mul_(0.5),
    "*=": lambda x, f: operator.imul(x + f(x), 0.5),
    "F.dropout": lambda x, f: F.dropout(x + f(x), 0.5, True, inplace=True),
    "skip scaled": lambda x, f: f(x) + x.mul_(0.5),
    "branch scaled": lambda x, f: x + f(x).mul_(0.5),
    "relu_ before the branch": lambda x, f: x + f(F.relu(x, inplace=True)),
    "item set": lambda x, f: alone(x + f(x), lambda x: operator.setitem(x, (slice(None), 0), 1.0)),
    "slice +=": lambda x, f: alone(x + f(x), lambda x: operator.setitem(x, 0, operator.iadd(x[0], 1.0))),
}


@pytest.mark.parametrize("shortcuts", ["break", "carry"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_place_on_the_trunk(kind, shortcuts):
    check(Overwriting(IN_PLACE[kind]), (rows(),), 3, shortcuts=shortcuts)


# Their own backward pass fails.
UNTRAINABLE = {
    "x += f, F.relu": lambda x, f: F.relu(operator.iadd(x, f(x)), inplace=True),
    "chunk": lambda x, f: alone(x + f(x), lambda x: x.chunk(2, -1)[0].mul_(0.5)),
}


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_in_place_where_the_model_itself_cannot_be_trained(kind):
    model = Overwriting(UNTRAINABLE[kind]).double()
    with pytest.raises(RuntimeError, match="modified by an inplace operation|is being modified inplace"):
        outputs_and_gradients(model, (rows(),), {})
    x = rows()
    hc = hct.convert(model, (x,), num_streams=3)
    assert len(hc.hc_report.converted) == 3
    with torch.no_grad():
        for batch in (x, rows(3)):
            assert error(hc(batch), model(batch)) <= 1e-10


VIEWS = {
    "view": lambda x, f: alone(x + f(x), lambda x: x.view(-1).mul_(0.5)),
    "slice": lambda x, f: alone(x + f(x), lambda x: x[:, :1].mul_(0.5)),
    "same tensor": lambda x, f: alone(x + f(x), lambda x: x.contiguous().mul_(0.5)),
    "data": lambda x, f: alone(x + f(x), lambda x: x.data.mul_(0.5)),
    "skip that is x itself": lambda x, f: (lambda h: x.contiguous().mul_(0.5) + h)(f(x)),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_in_place_on_a_view_of_the_trunk(kind):
    check(Overwriting(VIEWS[kind]), (rows(),), 3)


def overwriting_branch():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


def test_a_branch_that_overwrites_the_skip_in_view():
    """The skip is then what the activation makes of it, to which the rest of the branch is added."""
    check(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(overwriting_branch()), ConvBlock()), (images(),), 2, trunks=1)


class Whole(nn.Module):
    """A branch whose code is not looked into."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(x, inplace=True))


def test_a_branch_that_overwrites_the_skip_out_of_view():
    hc = check(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(Whole()), ConvBlock()), (images(),), 1)
    assert reasons(hc, "overwritten in place by its own branch") == ["1"]


def test_only_branches_that_overwrite_the_skip():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Residual(Whole()))
    with pytest.raises(hct.NothingToConvert, match="overwritten in place by its own branch"):
        hct.convert(model.double(), (images(),))


class Stage(nn.Module):
    """A bottleneck of a ResNet's stage: projection shortcut, in-place add and activation."""

    def __init__(self, inside, outside, stride=1, shortcut="conv", norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), norm(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), norm(outside)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or inside != outside:
            pool = [nn.AvgPool2d(stride)] if shortcut == "pool" else []
            conv = nn.Conv2d(inside, outside, 1, 1 if pool else stride, bias=False)
            self.downsample = nn.Sequential(*pool, conv, norm(outside))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def group_norm(channels):
    return nn.GroupNorm(2, channels)


def stages(shortcut="conv", norm=nn.BatchNorm2d):
    make = functools.partial(Stage, shortcut=shortcut, norm=norm)
    return nn.Sequential(make(4, 4), make(4, 4), make(4, 6, 2), make(6, 6), make(6, 8, 2), make(8, 8))


class MaxPooled(nn.Module):
    """Residuals of one width with pooling between them, in place of a projection."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.pool = ConvBlock(), ConvBlock(), nn.MaxPool2d(2)

    def forward(self, x):
        return self.b(self.pool(self.a(x)))


class PooledShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = ConvBlock(), ConvBlock()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x):
        x = self.a(x)
        x = F.avg_pool2d(x, 2) + self.conv2(F.relu(self.conv1(x)))
        return self.b(x)


SHORTCUTS = {
    "projections": (stages, 4),
    "projections, group norm": (lambda: stages(norm=group_norm), 4),
    "pooling and projection": (lambda: stages("pool"), 4),
    "pooling": (PooledShortcut, 2),
}


@pytest.mark.parametrize("kind", SHORTCUTS)
def test_projection_shortcuts(kind):
    make, count = SHORTCUTS[kind]
    broken = check(make(), (images(),), count, trunks=3 if count == 4 else 2, others=[(images(3),)])
    assert len(reasons(broken, "projection shortcut: both")) == (2 if count == 4 else 1)
    assert "Streams do not pass" in str(broken.hc_report) and "begin anew on trunk" in str(broken.hc_report)
    carried = check(make(), (images(),), count, trunks=1, others=[(images(3),)], shortcuts="carry")
    assert len(reasons(carried, "projection shortcut, carried")) == (2 if count == 4 else 1)


@pytest.mark.parametrize("shortcuts", ["break", "carry"])
@pytest.mark.parametrize("excluded", ["1", "3"])
def test_an_excluded_residual_in_place_in_the_middle_of_a_trunk(excluded, shortcuts):
    hc = check(stages(), (images(),), 3, others=[(images(3),)], shortcuts=shortcuts, exclude=[excluded])
    assert reasons(hc, "matches an exclude pattern") == [excluded]


@pytest.mark.parametrize("shortcuts, count, short", [("break", 2, ["3", "5"]), ("carry", 4, [])])
def test_trunks_shorter_than_min_residuals(shortcuts, count, short):
    hc = check(stages(), (images(),), count, others=[(images(3),)], shortcuts=shortcuts, min_residuals=2)
    assert reasons(hc, "fewer residuals than min_residuals") == short


def test_max_pooling_between_residuals_ends_the_trunk():
    hc = check(MaxPooled(), (images(),), 2, trunks=2, shortcuts="carry")
    assert "Streams do not pass pool (test_awkward.py" in str(hc.hc_report)


# -- grad mode, autocast, checkpoints, custom functions


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


class NoGradRoot(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = Mixing(), Mixing()

    def forward(self, x):
        with torch.no_grad():
            x = x + self.f(x)
        return x + self.g(x)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


GRAD_MODES = {"no_grad": torch.no_grad, "set_grad_enabled": lambda: torch.set_grad_enabled(False)}


@pytest.mark.parametrize("add", [False, True], ids=["a leaf", "code that adds"])
@pytest.mark.parametrize("mode", GRAD_MODES)
def test_a_grad_mode_in_a_branch(mode, add):
    hc = check(nn.Sequential(Residual(Within(GRAD_MODES[mode], add)), chain()), (rows(),), 3, trunks=1)
    assert reasons(hc, "grad mode") == (["0.f"] if add else [])


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_a_grad_mode_around_a_module_with_residuals(mode):
    model = nn.Sequential(nn.Linear(8, 8), Around(GRAD_MODES[mode], chain()), chain())
    hc = check(model, (rows(),), 2)
    assert "1" in reasons(hc, "grad mode")


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
    model = nn.Sequential(NoGradRoot(), chain()).double()
    x = rows()
    with outside():
        hc = hct.convert(model, (x,))
    assert reasons(hc, "grad mode") == ["0"]
    check_preserved(model, hc, (x,), bound=1e-10, gradient_bound=1e-9)


def test_a_grad_mode_in_the_root_is_refused_under_no_grad():
    with torch.no_grad(), pytest.raises(hct.UnsupportedModel, match="grad mode"):
        hct.convert(NoGradRoot().double(), (rows(),))


class Negated(nn.Module):
    """Code with a region, then residuals, then a decision on an optional input."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = NoGradRoot(), chain()

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
    assert reasons(hc, "autocast") == (["0.f"] if add else [])
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
    assert reasons(hc, "checkpointing") == (["0.f"] if add else [])


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
    assert "0" in reasons(hc, "checkpointing")


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


# -- hooks


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
    assert reasons(hc, "hooks") == (["1"] if place == "block" else [])


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


# -- parametrizations, scripts


def parametrized(wrap):
    return lambda: nn.Sequential(nn.LayerNorm(8), wrap(nn.Linear(8, 8)), nn.GELU(), wrap(nn.Linear(8, 8)))


def orthogonal(layer):
    return nn.utils.parametrizations.orthogonal(layer)


PARAMETRIZED = {
    "weight norm": parametrized(nn.utils.parametrizations.weight_norm),
    "spectral norm": parametrized(nn.utils.parametrizations.spectral_norm),
    "orthogonal": parametrized(orthogonal),
    "old weight norm": parametrized(nn.utils.weight_norm),
    "old spectral norm": parametrized(nn.utils.spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_layers(kind):
    torch.manual_seed(0)
    make = PARAMETRIZED[kind]
    model = nn.Sequential(Residual(make()), Residual(make())).double()
    x = rows()
    model(x)
    state = copy.deepcopy(model.state_dict())
    hc = hct.convert(model, (x,), num_streams=3)
    assert len(hc.hc_report.converted) == 2
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key
    ours, our_gradients = outputs_and_gradients(hc, (x,), {})
    theirs, their_gradients = outputs_and_gradients(model, (x,), {})
    assert error(ours, theirs) <= 1e-10
    assert set(their_gradients) <= set(our_gradients)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-9, atol=1e-9)
    for module in (model, hc):
        module.eval()
    assert error(hc(rows(3)[:1] + x), model(rows(3)[:1] * 0 + x)) >= 0
    assert error(hc(x[:1]), model(x[:1])) <= 1e-10


class Gained(nn.Module):
    """A block with a parametrized parameter of its own."""

    def __init__(self):
        super().__init__()
        self.f, self.gain = Mixing(), nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x + self.gain * self.f(x)


class Positive(nn.Module):
    def forward(self, x):
        return x.exp()


def test_a_parametrized_block():
    """Its parameter is computed on each call, as a module of its own."""
    model = nn.Sequential(Gained(), chain())
    nn.utils.parametrize.register_parametrization(model[0], "gain", Positive())
    hc = check(model, (rows(),), 3, trunks=1)
    before = hc(x := rows())
    with torch.no_grad():
        hc.get_parameter("0.parametrizations.gain.original").add_(1.0)
    assert not torch.equal(hc(x), before) and error(hc(x), model(x)) <= 1e-10


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(torch.relu(self.fc(x) + 1.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_branches():
    model = nn.Sequential(*(Residual(torch.jit.script(Scriptable())) for _ in range(2))).double()
    x = rows()
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 2
    for mode in (True, False):
        for module in (model, hc):
            module.train(mode)
        assert error(seeded(hc, (x,), {}), seeded(model, (x,), {})) <= 1e-10
        assert error(seeded(hc, (x[:1],), {}), seeded(model, (x[:1],), {})) <= 1e-10
    for module in (model, hc):
        module.train()
    (_, ours), (_, theirs) = (outputs_and_gradients(module, (x,), {}) for module in (hc, model))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_function_in_a_block():
    @torch.jit.script
    def gelu(x):
        return x * torch.sigmoid(1.702 * x)

    model = Chain(lambda x, f, i: x + gelu(f), 2).double()
    x = rows()
    hc = hct.convert(model, (x,))
    assert error(hc(x), model(x)) <= 1e-10 and error(hc(x[:1]), model(x[:1])) <= 1e-10


# -- buffers


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


# -- tied weights, modules called several times


class Tied(nn.Module):
    """Two branches with one weight, an embedding and a head with another."""

    def __init__(self):
        super().__init__()
        self.embed, self.fs, self.head = nn.Embedding(7, 8), nn.ModuleList(Mixing() for _ in range(3)), nn.Linear(8, 7)
        self.head.weight = self.embed.weight
        self.fs[2].fc.weight = self.fs[0].fc.weight

    def forward(self, i):
        x = self.embed(i)
        for f in self.fs:
            x = x + f(x)
        return self.head(x)


def test_tied_weights():
    hc = check(Tied(), (torch.randint(0, 7, (2, 5)),), 3, trunks=1)
    assert hc.head.weight is hc.embed.weight and hc.fs[2].fc.weight is hc.fs[0].fc.weight
    hc.to(torch.float32)
    assert hc.head.weight is hc.embed.weight and hc.fs[2].fc.weight is hc.fs[0].fc.weight
    twin = copy.deepcopy(hc)
    assert twin.head.weight is twin.embed.weight and twin.head.weight is not hc.head.weight


class SharedBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.norms = Mixing(), nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x):
        for norm in self.norms:
            x = x + self.f(norm(x))
        return x


class TwoNames(nn.Module):
    """One block registered under two names."""

    def __init__(self):
        super().__init__()
        self.a = Residual(Mixing())
        self.b = self.a
        self.blocks = nn.ModuleList([self.a, Residual(Mixing()), self.a])

    def forward(self, x):
        x = self.b(self.a(x))
        for block in self.blocks:
            x = block(x)
        return x


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(Residual(Mixing()), nn.LayerNorm(8))

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = chain()

    def forward(self, a, b):
        return self.encoder(a) - self.encoder(b)


SHARED = {
    "block called three times": (Repeated, 1, 3),
    "branch of two residuals": (SharedBranch, 1, 2),
    "block under two names": (TwoNames, 1, 5),
    "encoder of two inputs": (Siamese, 2, 4),
}


@pytest.mark.parametrize("kind", SHARED)
def test_modules_called_several_times(kind):
    make, inputs, count = SHARED[kind]
    hc = check(make(), tuple(rows() for _ in range(inputs)), count, trunks=inputs)
    names = [r.name for r in hc.hc_report.converted]
    assert len(set(names)) == count


# -- decisions on values


class Deciding(nn.Module):
    """Decides on the values of its input: in a branch, or around its own residual."""

    def __init__(self, decide, block=False):
        super().__init__()
        self.f, self.decide, self.block = Mixing(), decide, block

    def forward(self, x):
        h = self.f(x) if self.decide(x) else -2 * self.f(x)
        return x + h if self.block else h


DECISIONS = {
    "sum > 0": lambda x: x.sum() > 0,
    "item": lambda x: x.sum().item() > 0,
    "float": lambda x: float(x.sum()) > 0,
    "tolist": lambda x: x.sum((1, 2)).tolist()[0] > 0,
    "any": lambda x: (x.sum() > 0).any(),
    "equal": lambda x: not torch.equal(x, -x.abs()),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")  # the model does
@pytest.mark.parametrize("place", ["branch", "block"])
@pytest.mark.parametrize("kind", DECISIONS)
def test_decisions_on_values(kind, place):
    deciding = Deciding(DECISIONS[kind], place == "block")
    model = nn.Sequential(deciding if place == "block" else Residual(deciding), chain())
    positive, negative = rows().abs(), -rows().abs()
    whole = kind == "float" and place == "block"  # Python has to have it as a number
    hc = check(model, (positive,), 2 if whole else 3, others=[(negative,), (positive,)])
    assert reasons(hc, "of a tensor") == (["0"] if whole else [])


class LayerDrop(nn.Module):
    """A stack of blocks that draws whether to leave one out; with p=0 it never does."""

    def __init__(self, p=0.0):
        super().__init__()
        self.blocks, self.p = nn.ModuleList(Residual(Mixing()) for _ in range(3)), p

    def forward(self, x):
        for block in self.blocks:
            if not (self.training and torch.rand(1).item() <= self.p):
                x = block(x)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_a_stack_that_decides_on_values_is_looked_into(training):
    check(nn.Sequential(LayerDrop(), nn.Linear(8, 8)).train(training), (rows(),), 3, trunks=1)


@pytest.mark.parametrize("kind", DECISIONS)
def test_decisions_on_values_in_the_root(kind):
    model = Deciding(DECISIONS[kind], True).double()
    positive, negative = rows().abs(), -rows().abs()
    try:
        hc = hct.convert(model, (positive,))
    except hct.HCTransformError as refusal:
        assert "of a tensor" in str(refusal)
        return
    for x in (positive, negative, positive, 2 * positive, 2 * negative):
        assert error(hc(x), model(x)) <= 1e-10


# -- outputs and inputs


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    states: tuple = ()
    loss: torch.Tensor | None = None


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict):
    """A dataclass that is a mapping of its fields that are not None, as in diffusers and transformers."""

    hidden: torch.Tensor = None
    states: tuple | None = None
    loss: torch.Tensor | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def to_tuple(self):
        return tuple(self[key] for key in self)


class Returning(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.fs, self.pack = nn.ModuleList(Mixing() for _ in range(2)), pack

    def forward(self, x):
        states = []
        for f in self.fs:
            x = x + f(x)
            states.append(x)
        return self.pack(x, tuple(states))


OUTPUTS = {
    "dict": lambda x, states: {"hidden": x, "states": states},
    "OrderedDict": lambda x, states: collections.OrderedDict(hidden=x, states=states),
    "nested": lambda x, states: {"a": [x, (x.mean(), {"b": states})], "n": 1, "none": None},
    "namedtuple": lambda x, states: Pair(x, states[0]),
    "namedtuple with a default": lambda x, states: Pair(x),
    "list": lambda x, states: [x, *states],
    "dataclass": lambda x, states: Output(x, states),
    "dataclass, by keyword": lambda x, states: Output(hidden=x, loss=x.mean()),
    "dataclass inside a dict": lambda x, states: {"out": Output(x, states)},
    "mapping dataclass": lambda x, states: ModelOutput(x, states),
    "mapping dataclass, by keyword": lambda x, states: ModelOutput(hidden=x, loss=x.mean()),
    "mapping dataclass, to_tuple": lambda x, states: ModelOutput(hidden=x, states=states).to_tuple(),
}


def opened(value):
    """Return an output as types and plain containers."""
    if dataclasses.is_dataclass(value):
        fields = [opened(getattr(value, field.name)) for field in dataclasses.fields(value)]
        return [type(value).__name__, *fields, opened(dict(value)) if isinstance(value, dict) else None]
    if isinstance(value, dict):
        return {"type": type(value).__name__, **{key: opened(v) for key, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *map(opened, value)]
    return value


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(kind):
    model = Returning(OUTPUTS[kind]).double()
    x = rows()
    hc = hct.convert(model, (x,))
    assert len(hc.hc_report.converted) == 2
    for batch in (x, x[:1], rows(3)):
        ours, theirs = opened(hc(batch)), opened(model(batch))
        assert str(torch.utils._pytree.tree_structure(ours)) == str(torch.utils._pytree.tree_structure(theirs))
        assert error(ours, theirs) <= 1e-10
    gradients = []
    for module in (hc, model):
        model.zero_grad()
        weighted(opened(module(x))).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Reading(nn.Module):
    """Residuals on what ``unpack`` takes from one nested argument."""

    def __init__(self, unpack):
        super().__init__()
        self.f, self.g, self.unpack = Mixing(), Mixing(), unpack

    def forward(self, batch):
        x, extra = self.unpack(batch)
        x = x + self.f(x)
        return x + self.g(x + (0 if extra is None else extra))


def by_star(batch):
    def unpacked(x, extra=None):
        return x, extra

    return unpacked(**batch) if isinstance(batch, dict) else unpacked(*batch)


INPUTS = {
    "dict, item": (lambda b: (b["x"], b["extra"]), dict),
    "dict, get": (lambda b: (b.get("x"), b.get("extra")), dict),
    "dict, in": (lambda b: (b["x"], b["extra"] if "extra" in b else None), dict),
    "dict, values": (lambda b: tuple(b.values()), dict),
    "dict, items": (lambda b: [v for k, v in b.items()], dict),
    "dict, keys": (lambda b: [b[k] for k in b.keys()], dict),
    "dict, iteration": (lambda b: [b[k] for k in b], dict),
    "dict, comprehension": (lambda b: list({k: 1 * v for k, v in b.items()}.values()), dict),
    "dict, **": (by_star, dict),
    "list": (lambda b: (b[0], b[1]), list),
    "list, unpacked": (lambda b: [2 * t for t in b], list),
    "list, sum": (lambda b: (sum(b), torch.stack(list(b)).mean(0)), list),
    "list, *": (by_star, list),
    "list, enumerate and zip": (lambda b: [i * t * u for (i, t), u in zip(enumerate(b, 1), b, strict=True)], list),
    "tuple": (lambda b: b, tuple),
    "tuple, last": (lambda b: (b[0], b[-1]), tuple),
    "tuple, slices": (lambda b: (b[:1][0], b[1:][0]), tuple),
    "namedtuple": (lambda b: (b.first, b.second), Pair._make),
    "namedtuple, unpacked": (lambda b: b, Pair._make),
    "dataclass": (lambda b: (b.hidden, b.loss), lambda v: Output(v[0], loss=v[1])),
    "nested": (lambda b: (b["a"][0], b["a"][1]["b"]), lambda v: {"a": [v[0], {"b": v[1]}]}),
}


def packed(pack, *values):
    return dict(zip(("x", "extra"), values, strict=False)) if pack is dict else pack(values)


@pytest.mark.parametrize("kind", INPUTS)
def test_nested_inputs(kind):
    unpack, pack = INPUTS[kind]
    args = (packed(pack, rows(), rows()),)
    check(Reading(unpack), args, 2, others=[(packed(pack, rows(3), rows(3)),)])


OPTIONAL = [kind for kind in INPUTS if kind not in ("list, unpacked", "list, sum", "list, enumerate and zip")]


@pytest.mark.parametrize("first", ["None first", "given first"])
@pytest.mark.parametrize("kind", [k for k in OPTIONAL if "comprehension" not in k])
def test_none_within_nested_inputs(kind, first):
    unpack, pack = INPUTS[kind]
    model = Reading(unpack).double()
    without, given = (packed(pack, rows(), None),), (packed(pack, rows(), rows()),)
    order = [without, given] if first == "None first" else [given, without]
    hc = hct.convert(model, order[0])
    for args in (*order, *order):
        assert error(hc(*args), model(*args)) <= 1e-10


SHORTER = {
    "dict, get": (lambda b: (b.get("x"), b.get("extra")), dict),
    "dict, in": (lambda b: (b["x"], b["extra"] if "extra" in b else None), dict),
    "dict, **": (by_star, dict),
    "list, len": (lambda b: (b[0], b[1] if len(b) > 1 else None), list),
    "list, *": (by_star, list),
    "tuple, slice": (lambda b: (b[0], sum(b[1:])), tuple),
}


@pytest.mark.parametrize("first", ["left out first", "given first"])
@pytest.mark.parametrize("kind", SHORTER)
def test_items_of_nested_inputs_left_out(kind, first):
    unpack, pack = SHORTER[kind]
    model = Reading(unpack).double()
    without, given = (packed(pack, rows()),), (packed(pack, rows(), rows()),)
    order = [without, given] if first == "left out first" else [given, without]
    hc = hct.convert(model, order[0])
    for args in (*order, *order):
        assert error(hc(*args), model(*args)) <= 1e-10


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = Mixing(), Mixing()

    def forward(self, x, mask=None, *, scale=None):
        if mask is not None:
            x = x * mask
        x = x + self.f(x)
        if scale is not None:
            x = x * scale
        return x + self.g(x)


CALLS = [{}, {"mask": rows()}, {"scale": 0.5}, {"scale": rows()}, {"mask": rows(), "scale": 2}, {"scale": 0.25}]


@pytest.mark.parametrize("first", range(len(CALLS)), ids=lambda i: ", ".join(CALLS[i]) or "none")
def test_optional_arguments(first):
    model = Optional().double()
    x = rows()
    hc = hct.convert(model, (x,), CALLS[first])
    for kwargs in (*CALLS, *reversed(CALLS)):
        assert error(hc(x, **kwargs), model(x, **kwargs)) <= 1e-10


class Variadic(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = Mixing(), Mixing()

    def forward(self, x, *more, **named):
        for other in more:
            x = x * other.tanh()
        x = x + self.f(x)
        scale = named.pop("scale", None)
        if scale is not None:
            x = x * scale
        for value in named.values():
            x = x * value.sigmoid()
        return x + self.g(x)


VARIADIC = {
    "none": ((), {}),
    "one": ((rows(),), {}),
    "two": ((rows(), rows()), {}),
    "scale": ((), {"scale": rows()}),
    "gates": ((), {"a": rows(), "b": rows()}),
    "a gate and scale": ((), {"a": rows(), "scale": rows()}),
    "all": ((rows(),), {"scale": rows(), "a": rows()}),
}


@pytest.mark.parametrize("kind", VARIADIC)
def test_args_and_kwargs(kind):
    args, kwargs = VARIADIC[kind]
    model = Variadic().double()
    hc = hct.convert(model, (rows(), *args), kwargs)
    assert len(hc.hc_report.converted) == 2
    check_preserved(model, hc, (rows(), *args), kwargs, bound=1e-10, gradient_bound=1e-9)


VARIADIC_CHANGES = [("none", "one"), ("one", "none"), ("one", "two"), ("two", "one"), ("none", "scale")]
VARIADIC_CHANGES += [
    ("scale", "none"),
    ("scale", "a gate and scale"),
    ("scale", "gates"),
    ("a gate and scale", "scale"),
]


@pytest.mark.parametrize("first, second", VARIADIC_CHANGES, ids=lambda v: v)
def test_args_and_kwargs_of_another_number(first, second):
    model, x = Variadic().double(), rows()
    hc = hct.convert(model, (x, *VARIADIC[first][0]), VARIADIC[first][1])
    for kind in (second, first, second):
        args, kwargs = VARIADIC[kind]
        assert error(hc(x, *args, **kwargs), model(x, *args, **kwargs)) <= 1e-10


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.ModuleDict({"f": Mixing(), "norm": nn.LayerNorm(8)}) for name in "abc"})
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(8)) for _ in range(3))
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.rand(8)) for name in "abc"})

    def forward(self, x, order=("a", "b", "c")):
        for (name, layer), scale in zip(self.layers.items(), self.scales, strict=True):
            if name in order:
                x = x + scale * layer["f"](layer["norm"](x)) * self.gates[name]
        return x


def test_module_dicts_and_loops():
    hc = check(Loops(), (rows(),), 3, trunks=1)
    assert [r.name for r in hc.hc_report.converted] == [f"layers.{name}.f" for name in "abc"] or len(
        {r.name for r in hc.hc_report.converted}
    ) == 3


# -- randomness on the trunk


class DropPath(nn.Module):
    """As in timm: one draw for each sample."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = 1 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class ScaledNoise(nn.Module):
    def forward(self, x):
        return x * (1 + 0.1 * torch.randn_like(x)) if self.training else x


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class FunctionalPath(nn.Module):
    """Stochastic depth of a whole residual, decided by a draw for each sample."""

    def __init__(self):
        super().__init__()
        self.f = Mixing()

    def forward(self, x):
        h = self.f(x)
        if self.training:
            h = h * (torch.rand(x.shape[0], 1, 1, dtype=x.dtype) > 0.5) / 0.5
        return x + h


RANDOM = {
    "F.dropout": FunctionalDropout,
    "nn.Dropout": lambda: nn.Dropout(0.5),
    "nn.Dropout, in place": lambda: nn.Dropout(0.5, inplace=True),
    "nn.AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "nn.FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5),
    "drop path": DropPath,
    "drop path that never drops": lambda: DropPath(0.0),
    "drop path of the branch": FunctionalPath,
    "nn.RReLU": nn.RReLU,
    "additive noise": Noise,
    "multiplicative noise": ScaledNoise,
    "activation and dropout": lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
    "dropout and activation": lambda: nn.Sequential(nn.Dropout(0.5), nn.Tanh()),
    "scale and dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Identity()),
    "norm and dropout": lambda: nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", RANDOM)
def test_randomness_on_the_trunk(kind, training):
    model = nn.Sequential(chain(1), RANDOM[kind](), chain(1)).train(training)
    check(model, (rows(),), 3 if kind == "drop path of the branch" else 2)


class OnTheTrunk(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.fs, self.change = nn.ModuleList(Mixing() for _ in range(3)), change

    def forward(self, x):
        for f in self.fs:
            x = self.change(self, x + f(x))
        return x


def sampled(module, x):
    if not module.training:
        return x
    return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.5) / 0.5


INLINE_RANDOM = {
    "F.dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "F.dropout, keywords": lambda m, x: F.dropout(input=x, p=0.5, training=m.training),
    "F.dropout1d": lambda m, x: F.dropout1d(x, 0.5, m.training),
    "F.alpha_dropout": lambda m, x: F.alpha_dropout(x, 0.5, m.training),
    "F.rrelu": lambda m, x: F.rrelu(x, training=m.training),
    "rand mask": sampled,
    "randn_like": lambda m, x: x + 0.1 * torch.randn_like(x),
    "bernoulli mask": lambda m, x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "F.gumbel_softmax": lambda m, x: F.gumbel_softmax(x, dim=-1),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", INLINE_RANDOM)
def test_randomness_in_code_on_the_trunk(kind, training):
    check(OnTheTrunk(INLINE_RANDOM[kind]).train(training), (rows(),), 3)
