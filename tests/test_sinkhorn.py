"""The Sinkhorn operator against its definition, in forward and backward."""

from __future__ import annotations

import re

import pytest
import torch

from hc_transform import sinkhorn, sinkhorn_error


def by_definition(logits, iterations, eps=0.0):
    """arXiv 2512.24880, eq. 9, in logarithms; with eps as DeepSeek-V4 writes it."""
    if eps == 0:
        log = logits
        for _ in range(iterations):
            log = log - log.logsumexp(-2, keepdim=True)
            log = log - log.logsumexp(-1, keepdim=True)
        return log.exp()
    p = logits.softmax(-2) + eps
    p = p / (p.sum(-1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        p = p / (p.sum(-2, keepdim=True) + eps)
        p = p / (p.sum(-1, keepdim=True) + eps)
    return p


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_definition_and_gradient(n, iterations, eps):
    logits = torch.randn(3, 5, n, n, dtype=torch.float64, requires_grad=True)
    ours, theirs = sinkhorn(logits, iterations, eps), by_definition(logits, iterations, eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, logits, weight), torch.autograd.grad(theirs, logits, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_gradcheck(eps):
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 5, eps), (logits,))


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4, 4)], ids=str)
def test_operator_is_registered_properly(shape):
    torch.library.opcheck(torch.ops.hc_transform.sinkhorn, (torch.randn(shape, requires_grad=True), 20, 0.0))
    torch.library.opcheck(torch.ops.hc_transform.sinkhorn_backward, (torch.randn(shape), torch.randn(shape), 20, 0.0))


def test_non_contiguous_logits():
    logits = torch.randn(4, 4, 6).permute(2, 1, 0)
    assert torch.equal(sinkhorn(logits), sinkhorn(logits.contiguous()))


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_large_logits(scale):
    logits = (scale * torch.randn(2000, 4, 4)).requires_grad_()
    matrix = sinkhorn(logits)
    # The logarithms are as large as the logits, and fp32 rounds them to scale * 6e-8.
    torch.testing.assert_close(matrix.double(), by_definition(logits.double(), 20), rtol=0, atol=scale * 1e-6)
    assert sinkhorn_error(matrix).rows <= 1e-6
    matrix.backward(torch.randn_like(matrix))
    assert logits.grad.isfinite().all()


def test_rows_and_columns_that_vanish():
    """Every sum but the largest would underflow: what takes exponentials first divides 0 by 0."""
    for logits in ([[0.0, 0.0], [-200.0, -210.0]], [[0.0, -200.0], [0.0, -210.0]], [[0.0, -300.0], [-300.0, -300.0]]):
        matrix = torch.tensor(logits)
        torch.testing.assert_close(sinkhorn(matrix).double(), by_definition(matrix.double(), 20), rtol=1e-4, atol=1e-6)


def test_table_of_the_docstring():
    rows = re.findall(r"^ +(\d+) +(\S+e\S+) +(\S+e\S+) +(\S+e\S+)$", sinkhorn.__doc__, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 5, 10, 20, 50, 100]
    torch.manual_seed(0)
    logits = torch.randn(10_000, 4, 4)
    for iterations, *errors in rows:
        for scale, error in zip((1, 4, 8), errors, strict=True):
            measured = sinkhorn_error(sinkhorn(scale * logits, int(iterations))).columns
            assert measured == pytest.approx(float(error), rel=0.1, abs=3e-7)


def test_half_precision_is_computed_in_fp32():
    logits = torch.randn(8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn(logits), sinkhorn(logits.float()))
    assert sinkhorn(logits).dtype == torch.float32


def test_one_call_in_a_compiled_graph():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    logits = torch.randn(3, 4, 4)
    torch.compile(lambda x: sinkhorn(x) * 2, fullgraph=True, backend=backend)(logits)
    assert [n.target for n in graphs[0].graph.nodes].count(torch.ops.hc_transform.sinkhorn.default) == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sinkhorn(torch.zeros(2, 3)), r"square matrices \[\.\.\., n, n\], got shape \(2, 3\)"),
        (lambda: sinkhorn(torch.zeros(2, 2), 0), "at least 1 iteration, got 0"),
    ],
    ids=["not square", "no iteration"],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
