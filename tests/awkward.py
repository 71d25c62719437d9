"""What the tests of code that is awkward to trace share."""

from __future__ import annotations

import copy
import functools

import torch
from checks import check_preserved
from models import Chain
from torch import nn

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


class Still(nn.Module):
    """A branch whose backward pass does not need its input, so that the trunk may be overwritten."""

    def __init__(self, dim=8):
        super().__init__()
        self.register_buffer("mix", torch.randn(dim, dim) / dim)
        self.scale = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return self.scale * (x @ self.mix)


class Residual(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


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


VIEWS = {
    "view": lambda x, f: alone(x + f(x), lambda x: x.view(-1).mul_(0.5)),
    "slice": lambda x, f: alone(x + f(x), lambda x: x[:, :1].mul_(0.5)),
    "same tensor": lambda x, f: alone(x + f(x), lambda x: x.contiguous().mul_(0.5)),
    "data": lambda x, f: alone(x + f(x), lambda x: x.data.mul_(0.5)),
    "skip that is x itself": lambda x, f: (lambda h: x.contiguous().mul_(0.5) + h)(f(x)),
}


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
