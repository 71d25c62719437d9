"""In-place operations on the trunk and on views of it, shortcuts, min_residuals: unchanged, or a reason."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from awkward import VIEWS, Overwriting, Residual, alone, check, group_norm, images, reasons, rows, stages
from checks import error, outputs_and_gradients
from models import ConvBlock
from torch import nn

import hc_transform as hct

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


@pytest.mark.parametrize("kind", VIEWS)
def test_in_place_on_a_view_of_the_trunk(kind):
    check(Overwriting(VIEWS[kind]), (rows(),), 3)


def overwriting_branch():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))


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
    assert "Streams do not pass pool (test_in_place.py" in str(hc.hc_report)
