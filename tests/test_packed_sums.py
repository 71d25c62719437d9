"""Weighted sums as one product: rounding, gradients, and where eager code keeps to products one by one."""

from __future__ import annotations

import pytest
import torch

import hc_transform as hct
from hc_transform.measuring.eager import eager_cost
from hc_transform.streams import mixing, packed_sums

n, T, D = 4, 6, 64


@pytest.fixture(autouse=True)
def packed(monkeypatch):
    """Take the form of GPUs on a CPU."""
    monkeypatch.setattr(mixing, "UNPACKED_DEVICES", ())


def example(tokens, dtype=torch.bfloat16, axis=-1):
    """Streams, a branch output and coefficients: one for all tokens, or for each."""
    streams = [torch.randn(2, T, D).to(dtype).requires_grad_() for _ in range(n)]
    branch = torch.randn(2, T, D).to(dtype).requires_grad_()
    shape = list(streams[0].shape) if tokens else []
    if tokens:
        shape[axis] = 1
    weights = [torch.randn(shape, requires_grad=True) for _ in range(2 * n + n * n)]
    rows = tuple(tuple(weights[i : i + n]) for i in range(2 * n, len(weights), n))
    coefficients = hct.Coefficients(tuple(weights[:n]), tuple(weights[n : 2 * n]), rows)
    return streams, branch, coefficients, [*streams, branch, *weights]


def run(streams, branch, coefficients, double=False):
    if double:
        streams, branch = [x.double() for x in streams], branch.double()
    return [*hct.write(streams, branch, coefficients), hct.read(streams, coefficients)]


def gradients(outputs, inputs, given):
    return torch.autograd.grad(outputs, inputs, [g.to(y.dtype) for g, y in zip(given, outputs, strict=True)])


def worst(values, exact):
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(values, exact, strict=True)
    )


@pytest.mark.parametrize("tokens", [False, True], ids=["same for all", "of each token"])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_rounded_once(tokens, autocast, monkeypatch):
    *arguments, inputs = example(tokens)
    given = [torch.randn_like(arguments[1]) for _ in range(n + 1)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = run(*arguments)
        found = gradients(outputs, inputs, given)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    monkeypatch.setattr(mixing, "UNPACKED_DEVICES", ("cpu",))
    before = run(*arguments)
    found_before = gradients(before, inputs, given)
    exact = run(*arguments, double=True)
    exact_gradients = gradients(exact, inputs, given)
    assert worst(outputs, exact) <= 1.02 * worst(before, exact)
    assert worst(found, exact_gradients) <= 1.02 * worst(found_before, exact_gradients)


def test_both_orders_of_the_branch_and_parts_without_gradients():
    streams, branch, coefficients, inputs = example(True)
    first, second = (hct.write(streams, branch, coefficients, flag) for flag in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    frozen = [x.detach() for x in streams], branch.detach(), coefficients
    total = sum(y.float().sum() for y in hct.write(*frozen))
    weights = [*coefficients.h_post, *(w for row in coefficients.h_res for w in row)]
    expected = torch.autograd.grad(sum(y.float().sum() for y in first), weights)
    for a, b in zip(torch.autograd.grad(total, weights), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(hct.write(streams, branch, coefficients), first, strict=True))


def test_gradients_of_gradients(monkeypatch):
    *arguments, inputs = example(True)

    def penalty():
        given = torch.autograd.grad(run(*arguments)[0].float().square().sum(), inputs[: n + 1], create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in given), inputs, allow_unused=True)

    found = penalty()
    monkeypatch.setattr(mixing, "UNPACKED_DEVICES", ("cpu",))
    for a, b in zip(found, penalty(), strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_written_streams_may_be_written_into():
    streams, branch, coefficients, inputs = example(False)
    written = hct.write(streams, branch, coefficients)
    expected = [torch.relu(y) for y in written]
    found = [y.relu_() for y in written]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    sum(y.float().sum() for y in found).backward()
    assert all(x.grad is not None for x in inputs[: n + 1])


def test_others_are_summed_one_by_one(monkeypatch):
    monkeypatch.setattr(packed_sums._PackedSums, "apply", None)
    for streams, branch, coefficients, _ in (example(True, torch.float32), example(True, axis=1)):
        assert len(hct.write(streams, branch, coefficients)) == n
    streams, branch, coefficients, _ = example(False)
    turned = [x.detach().transpose(0, 1) for x in streams], branch.detach().transpose(0, 1), coefficients
    assert hct.write(*turned)[0].shape == (T, 2, D)
    assert hct.write(streams, branch.float(), coefficients)[0].dtype == torch.float32
    torch.func.vmap(lambda x: hct.read([x] * n, coefficients))(streams[0].detach())
    monkeypatch.setattr(mixing, "UNPACKED_DEVICES", ("cpu",))
    hct.write(streams, branch, coefficients)


def test_values_are_copied_to_fp32_once():
    streams, branch, coefficients, _ = example(True)
    u = streams[0].numel() * 2
    cost = eager_cost(lambda *xs: hct.write(xs[:n], xs[n], coefficients), *streams, branch)
    copies = (n + 1) * 3 * u
    assert cost.forward.bytes <= copies + (2 * (n + 1) + 2 * n) * u + n * 3 * u + 2 * u, "the product, and rounding"
    assert len(cost.forward.launches) <= 2 * n + 4
