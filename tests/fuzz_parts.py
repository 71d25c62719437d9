"""Fragments that random programs are made of: classes and functions of a branch, and ways to write an add."""

from __future__ import annotations

from dataclasses import dataclass

HEADER = """\
import enum
import functools
import math
import operator
import random
import types
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

D = 8
"""

# Names used in a program bring their fragment with them, in this order.
FRAGMENTS = {
    "SCALE": "SCALE = 0.5",
    "Mode": 'class Mode(enum.Enum):\n    SOFT = "soft"\n    HARD = "hard"',
    "Config": '@dataclass\nclass Config:\n    scale: float = 0.5\n    act: str = "gelu"\n    double: bool = True',
    "Output": "@dataclass\nclass Output:\n    value: object\n    taps: object = None",
    "Named": 'Named = namedtuple("Named", ["value", "taps"])',
    "add": "def add(x, y):\n    return x + y  # helper",
    "add_scaled": "def add_scaled(x, y, scale=0.5):\n    x = x + scale * y  # helper\n    return x",
    "Add": "class Add(nn.Module):\n    def forward(self, x, y):\n        return x + y  # helper",
    "RMSNorm": """\
class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))""",
    "Swish": "class Swish(nn.Module):\n    def forward(self, x):\n        return x * torch.sigmoid(x)",
    "Attention": """\
class Attention(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            weights = weights.masked_fill(mask[:, None, None, :] == 0, -1e4)
        return self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))""",
    "Gated": """\
class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.value, self.gate = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.value(x) * torch.sigmoid(self.gate(x))""",
    "TokenMixer": """\
class TokenMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)""",
    "SqueezeExcite": """\
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(D, D, 3, padding=1), nn.Linear(D, D)

    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]""",
    "ConvBN": """\
class ConvBN(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(D, D, 3, stride, padding=1, bias=False), nn.BatchNorm2d(D)

    def forward(self, x):
        return self.bn(self.conv(x))""",
    "InnerDense": """\
class InnerDense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = self.a(x)
        return x + self.b(torch.tanh(x))  # residual""",
    "InnerConv": """\
class InnerConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(D, D, 1), nn.Conv2d(D, D, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.a(x))
        return x + self.b(x)  # residual""",
    "Downsample": """\
class Downsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.shortcut = ConvBN(2), nn.Conv2d(D, D, 1, 2)

    def forward(self, x):
        return self.f(x) + self.shortcut(x)""",
}
NEEDS = {"Downsample": ("ConvBN",)}

DENSE = (
    "nn.Linear(D, D)",
    "nn.Linear(D, D, bias=False)",
    "nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))",
    "nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * D, D))",
    "nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, D))",
    "nn.Sequential(RMSNorm(), nn.Linear(D, D), Swish())",
    "Gated()",
    "InnerDense()",
)
BRANCHES = {
    "flat": (*DENSE, "nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, D))"),
    "tokens": (*DENSE, "Attention()", "TokenMixer()"),
    "image": (
        "nn.Conv2d(D, D, 3, padding=1)",
        "nn.Conv2d(D, D, 3, padding=1, groups=D)",
        "nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU(), nn.Conv2d(D, D, 3, padding=1))",
        "nn.Sequential(ConvBN(), nn.ReLU(inplace=True), ConvBN())",
        "ConvBN()",
        "SqueezeExcite()",
        "InnerConv()",
    ),
}
NORMS = {
    "flat": ("nn.LayerNorm(D)", "nn.RMSNorm(D, eps=1e-6)", "RMSNorm()", "nn.BatchNorm1d(D)"),
    "tokens": ("nn.LayerNorm(D)", "nn.RMSNorm(D, eps=1e-6)", "RMSNorm()", "nn.LayerNorm(D)"),
    "image": ("nn.GroupNorm(2, D)", "nn.BatchNorm2d(D)", "nn.InstanceNorm2d(D, affine=True)"),
}
ACTIVATIONS = ("F.gelu(x)", "F.silu(x)", "x * torch.sigmoid(x)", "torch.tanh(x)", "F.leaky_relu(x, 0.1)", "Swish()(x)")


@dataclass(frozen=True)
class Spelling:
    """A way to add a branch ``{y}`` to ``x``, and the names it needs.

    Attributes:
        code: statements; the last holds the add.
        weight: how often it is taken.
        helper: whether the add is made in another function.
        overwrites: whether it writes into x.
    """

    code: str
    weight: int = 1
    helper: bool = False
    overwrites: bool = False


SPELLINGS = (
    Spelling("x = x + {y}", 12),
    Spelling("x = {y} + x", 4),
    Spelling("x = torch.add(x, {y})", 2),
    Spelling("x = torch.add({y}, x)"),
    Spelling("x = torch.add(x, {y}, alpha=0.5)", 2),
    Spelling("x = torch.add({y}, x, alpha=0.75)"),
    Spelling("x = x.add({y})", 2),
    Spelling("x = x.add({y}, alpha=-0.5)"),
    Spelling("x = operator.add(x, {y})"),
    Spelling("x = x - {y}", 2),
    Spelling("x = torch.sub(x, {y}, alpha=0.5)"),
    Spelling("x = torch.rsub({y}, x)"),
    Spelling("x = torch.lerp(x, {y}, 0.5)"),
    Spelling("x = torch.addcmul(x, {y}, torch.ones_like(x), value=0.5)"),
    Spelling("x = torch.stack([x, {y}]).sum(0)"),
    Spelling("x = torch.stack((x, {y})).sum(dim=0)"),
    Spelling("x = sum([x, {y}])"),
    Spelling("x = functools.reduce(operator.add, [x, {y}])"),
    Spelling("x = torch.ops.aten.add.Tensor(x, {y})"),
    Spelling("x = torch.Tensor.add(x, {y})"),
    Spelling("x = x.__add__({y})"),
    Spelling("x += {y}", 2, overwrites=True),
    Spelling("x = x.add_({y})", overwrites=True),
    Spelling("x.add_({y})", overwrites=True),
    Spelling("y = {y}\ny += x\nx = y", 2),
    Spelling("y = {y}\ny.add_(x)\nx = y"),
    Spelling("x = {y}.add_(x)"),
    Spelling("x = (x + {y}) / 2**0.5"),
    Spelling("x = (x + {y}).mul_(0.8)"),
    Spelling("x = 0.5 * x + {y}"),
    Spelling("skip = x\nx = {y}\nx = skip + x"),
    Spelling("shortcut, x = x, {y}\nx = shortcut.add(x)"),
    Spelling("x = add(x, {y})", 3, helper=True),
    Spelling("x = add({y}, x)", helper=True),
    Spelling("x = add_scaled(x, {y})", 2, helper=True),
    Spelling("x = add_scaled(x, {y}, scale=1.5)", helper=True),
)
