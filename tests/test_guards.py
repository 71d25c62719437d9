"""Decisions taken while tracing: checked on every call, traced again or refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import error
from models import GPT, LucidrainsTransformer, Mixing
from torch import nn

import hc_transform as hct


class Padded(nn.Module):
    """Pads to a multiple of 4 if needed, as window attention does."""

    def __init__(self):
        super().__init__()
        self.conv, self.f, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        height = x.shape[2]
        if height % 4:
            x = F.pad(x, (0, 0, 0, 4 - height % 4))
        x = x + self.f(x)
        return x[:, :, :height]


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = Mixing(), Mixing()

    def forward(self, x, scale=False, extra=None):
        x = x + self.f(x)
        if scale:
            x = 2 * x
        if extra is not None:
            x = x + self.g(extra)
        if self.training:
            return x, x.mean()
        return x


def test_a_mask_given_later():
    model = LucidrainsTransformer()
    x = torch.randn(2, 4, 16)
    hc = hct.convert(model, (x,))
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    assert error(hc(x, mask=mask), model(x, mask=mask)) <= 1e-5
    assert error(hc(x), model(x)) <= 1e-5
    assert error(hc(x, mask), model(x)) > 1e-3


def test_targets_given_later_and_left_out():
    model = GPT()
    x = torch.randint(0, 65, (2, 8))
    hc = hct.convert(model, (x,))
    assert hc(x)[1] is None
    assert error(hc(x, x), model(x, x)) <= 1e-5
    assert error(hc(x, targets=x), model(x, x)) <= 1e-5
    assert hc(x)[1] is None
    other = hct.convert(model, (x, x))
    assert other(x)[1] is None


def test_an_assert_of_the_model_still_holds():
    hc = hct.convert(GPT(block_size=32), (torch.randint(0, 65, (2, 8)),))
    with pytest.raises(AssertionError, match="Cannot forward sequence of length 33"):
        hc(torch.randint(0, 65, (2, 33)))


def test_a_padding_decision():
    model = Padded().train()
    x, odd = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 7, 8)
    hc = hct.convert(model, (x,))
    twin = Padded().train()
    twin.load_state_dict(model.state_dict())
    for image in (x, odd, x, odd):
        assert error(hc(image), twin(image)) <= 1e-5
    for key, value in twin.state_dict().items():
        assert torch.equal(hc.state_dict()[key], value), "statistics count each call once"
    assert len(hc._variants) == 1


@pytest.mark.parametrize("training", [True, False])
def test_flags_and_modes(training):
    model = Flagged().train(training)
    x = torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,))
    for mode in (training, not training, training):
        model.train(mode), hc.train(mode)
        assert error(hc(x), model(x)) <= 1e-5
        assert error(hc(x, True), model(x, True)) <= 1e-5
        assert error(hc(x, scale=True, extra=x), model(x, True, x)) <= 1e-5


def test_other_residuals_are_refused_by_name():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = Mixing(), Mixing()

        def forward(self, x, deep=False):
            x = x + self.f(x)
            return x + self.g(x) if deep else x

    x = torch.randn(2, 5, 8)
    hc = hct.convert(Grows(), (x,))
    with pytest.raises(hct.TraceError, match=r"other residuals .*\bg\b.*input 'deep' was False"):
        hc(x, deep=True)


def test_compiled_code_switches_mode():
    model = Flagged().train()
    x = torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,))
    compiled = torch.compile(hc, fullgraph=True, backend="eager")
    for mode in (True, False, True):
        model.train(mode), hc.train(mode)
        assert error(compiled(x), model(x)) <= 1e-5


def test_compiled_code_refuses_by_name():
    hc = hct.convert(Flagged().eval(), (torch.randn(2, 5, 8),))
    compiled = torch.compile(hc, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="input 'scale' was False"):
        compiled(torch.randn(2, 5, 8), scale=True)


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

    def scaled(self, x, scale=1.0):
        return x * scale

    def forward(self, x, options=dict(), more=[]):  # noqa: B006, B008
        x = x + self.f(self.scaled(x, **options))
        for y in more:
            x = x * y
        return x + self.g(x)


def test_containers_as_defaults():
    model, x = Options(), torch.randn(2, 8)
    hc = hct.convert(model, (x,))
    for args in ((x,), (x, {"scale": 0.5}), (x, {}, [x, x]), (x,)):
        torch.testing.assert_close(hc(*args), model(*args))


class ReadsItsDtype(nn.Module):
    def __init__(self, explicit):
        super().__init__()
        self.f, self.g, self.explicit = Mixing(), Mixing(), explicit

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, x):
        if self.explicit:
            x = x.to(torch.float32).to(x.dtype)
        else:
            x = x.to(self.dtype)
        x = x + self.f(x)
        return x + self.g(x)


@pytest.mark.parametrize("explicit", [True, False])
def test_a_dtype_read_from_the_parameters(explicit):
    model, x = ReadsItsDtype(explicit), torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,), scope="graph")
    model.double(), hc.double()
    assert error(hc(x.double()), model(x.double())) <= 1e-10
    assert len(hc._variants) == (0 if explicit else 1), "only what was read from the parameters is checked"
