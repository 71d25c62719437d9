"""The backend that sets Inductor for streams: results, what it changes for others, and a torch with other internals."""

from __future__ import annotations

import logging

import pytest
import torch
from checks import error, wake
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import hc_transform as hct
from hc_transform.running import inductor


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.norm(x))


@pytest.fixture
def hc():
    torch._dynamo.reset()
    inductor._choices.cache_clear()
    yield hct.convert(wake(nn.Sequential(*(Block() for _ in range(2)))), (torch.randn(2, 8),), scope="graph").eval()
    inductor._choices.cache_clear()
    torch._dynamo.reset()


def same(compiled, hc):
    x = torch.randn(3, 8)
    expected = hc(x)
    output = compiled(x)
    assert error(output, expected) <= 1e-5
    gradients = [torch.autograd.grad(y.square().mean(), list(hc.parameters())) for y in (output, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_backend_compiles_and_leaves_others_as_they_were(hc):
    from torch._inductor import config
    from torch._inductor.virtualized import V

    same(torch.compile(hc, backend=hct.inductor, fullgraph=True), hc)
    assert config.max_fusion_size == 64 and config.inductor_choices_class is None
    assert type(V.choices).__name__ == "InductorChoices"


def test_options_of_the_user_go_first(hc, monkeypatch):
    from torch._inductor import compile_fx

    given = []

    def compiled(gm, inputs, inner_compile, config_patches):
        given.append(config_patches)
        return gm

    monkeypatch.setattr(compile_fx, "compile_fx", compiled)
    torch.compile(hc, backend=hct.inductor, options={"max_fusion_size": 7})(torch.randn(3, 8))
    torch._dynamo.reset()
    torch.compile(hc, backend=hct.inductor)(torch.randn(3, 8))
    assert [patches["max_fusion_size"] for patches in given] == [7, inductor.MAX_FUSION_SIZE]


def test_regions_take_it_unless_another_is_given(hc, monkeypatch):
    given = []
    monkeypatch.setattr(hct.HyperConnectedModule, "compile_regions", lambda self, **settings: given.append(settings))
    hct.compile_regions(hc)
    hct.compile_regions(hc, backend="eager", dynamic=True)
    assert given == [{"backend": hct.inductor}, {"backend": "eager", "dynamic": True}]


def test_another_torch_compiles_as_it_does(hc, monkeypatch, caplog):
    from torch._inductor.choices import InductorChoices

    monkeypatch.delattr(InductorChoices, "triton_kernel_kwargs")
    with caplog.at_level(logging.WARNING, "hc_transform"):
        assert inductor.settings() == {"max_fusion_size": inductor.MAX_FUSION_SIZE}
        counter = CompileCounterWithBackend(hct.inductor)
        same(torch.compile(hc, backend=counter), hc)
    assert "kernels keep Inductor's warps" in caplog.text and counter.frame_count == 1
