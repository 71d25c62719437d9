"""bf16 against the same model in double precision: a converted model loses no more than the plain one.

python -m pytest tests/test_bfloat16.py -s     # prints the errors
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from checks import connections, wake
from models import GPT

import hc_transform as hct
from hc_transform.connections import base
from hc_transform.connections.per_token import sum_of_halves
from hc_transform.connections.projection import EPS, project_normed
from hc_transform.measuring.bench import saved_bytes
from hc_transform.streams import mixing
from hc_transform.verification.reference import separate

FORMS = ("eager", "packed", "numbers")  # as it runs in eager mode, there on a GPU, and compiled for GPUs


def errors(model, x, form, monkeypatch):
    """Return the relative errors, in the norm of all together, of the outputs and of two groups of gradients."""
    monkeypatch.setattr(base, "PACKED_DEVICES", ())
    torch._dynamo.reset()
    exact = copy.deepcopy(model).double()
    monkeypatch.setattr(mixing, "UNPACKED_DEVICES", () if form == "packed" else ("cpu",))
    run = model if form in ("eager", "packed") else torch.compile(model, backend="aot_eager", fullgraph=True)
    made = []
    for module, owner in ((run, model), (exact, exact)):
        outputs, loss = module(x, x)
        loss.backward()
        groups = {"model": [], "connections": []}
        for name, parameter in owner.named_parameters():
            groups["connections" if "hyper_connections" in name else "model"].append(parameter.grad)
        made.append([[outputs], *groups.values()])
        owner.zero_grad()
    return [relative(*pair) for pair in zip(*made, strict=True)]


def relative(tensors, references):
    if not references:
        return 0.0
    a, b = (torch.cat([t.detach().double().flatten() for t in group]) for group in (tensors, references))
    return ((a - b).norm() / b.norm()).item()


def made(connection):
    torch.manual_seed(0)
    model = wake(GPT(vocabulary=256, dim=64, depth=2)).bfloat16()
    x = torch.randint(0, 256, (4, 32))
    if connection is None:
        return model, x
    hc = hct.convert(model, (x, x), connection=connection)
    for module in connections(hc).values():
        separate(module)
    return hc, x


@functools.cache
def plain():
    with pytest.MonkeyPatch.context() as patch:
        return errors(*made(None), "eager", patch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_errors_are_those_of_the_plain_model(connection, form, monkeypatch):
    outputs, gradients, own = errors(*made(connection), form, monkeypatch)
    reference = plain()
    print(
        f"\n{connection:9} {form:8} outputs {outputs:.1e} ({reference[0]:.1e} plain), gradients {gradients:.1e} "
        f"({reference[1]:.1e}), of connections {own:.1e}"
    )
    assert outputs <= 1.5 * reference[0] and gradients <= 1.5 * reference[1]
    assert own <= 5 * reference[1], "sums of products of what has errors of its own"


def test_products_of_two_halves():
    """What replaces fp32 products of bf16 streams on CUDA: the weights as the sum of two bf16 numbers."""
    torch.manual_seed(0)
    x, y = torch.randn(512, 64).bfloat16(), torch.randn(64, 30)
    exact = x.double() @ y.double()
    scale = x.double().abs() @ y.double().abs()  # of each sum
    seen = []

    def product(halves):
        seen.append(halves)
        return x.float() @ halves.float()  # bf16 products are exact in fp32

    halves = sum_of_halves(product, y)
    assert seen[0].dtype == torch.bfloat16 and seen[0].shape == (64, 60)
    assert ((halves - exact).abs() / scale).max() <= 2e-5
    assert ((x.float() @ y.bfloat16().float() - exact).abs() / scale).max() > 2e-4, "one half would not do"


@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_half_precision_keeps_half_as_much(connection):
    """No copy in fp32 of a stream is kept for the backward pass: only coefficients are in fp32."""
    x = torch.randint(0, 65, (2, 16))
    saved = []
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(dim=512, depth=2).to(dtype)
        hc = hct.convert(model, (x, x), connection=connection, verify=False).train()
        saved.append(saved_bytes(hc, (x, x)) - saved_bytes(model.train(), (x, x)))
    assert saved[1] <= 0.6 * saved[0]


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 16), (2, 3, 4, 16)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_projections_of_halves(shape, axis, transposed):
    """The backward passes that keep bf16 are those of copies in fp32, twice over."""
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16()
    x = x.mT.contiguous().mT if transposed else x
    weight = torch.randn(shape[axis], 5)

    def gradients(values, function):
        values = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in values]
        result = function(*values)
        first = torch.autograd.grad(result.square().sum(), values, create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), values)
        return result, *first, *second

    def exact(x, weight):
        x = x.double().movedim(axis, -1)
        return x @ weight.double() * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)

    ours = gradients((x, weight), lambda x, weight: project_normed(x, weight, axis))
    theirs = gradients((x.double(), weight.double()), exact)
    for a, b in zip(ours, theirs, strict=True):
        rounding = 2e-2 if a.dtype == torch.bfloat16 else 1e-2  # the second gradients come from rounded first ones
        assert (a.double() - b).norm() <= rounding * b.norm()
    assert ours[0].dtype == torch.float32 and relative([ours[0]], [theirs[0]]) <= 1e-6


def test_per_sample_gradients_of_halves():
    x, weight = torch.randn(3, 4, 16).bfloat16(), torch.randn(16, 5)
    loss = torch.func.grad(lambda weight, x: project_normed(x, weight, -1).square().sum())
    each = torch.func.vmap(loss, in_dims=(None, 0))(weight, x)
    torch.testing.assert_close(each, torch.stack([loss(weight, sample) for sample in x]))
