"""Streams and connections against formulas written out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hc_transform import CONNECTIONS, Coefficients, DynamicConnection, StaticConnection
from hc_transform.streams import carry_folded, carry_random, expand, read, readout, write


def paper_step(H, f, norm, Wa, Wb, static_alpha, static_beta, scale_alpha, scale_beta):
    """Algorithm 2 of arXiv 2409.19606, appendix J, on H of shape (B, L, n, D)."""
    normed = norm(H)
    alpha = static_alpha + scale_alpha * torch.tanh(normed @ Wa)  # (B, L, n, n + 1)
    beta = static_beta + scale_beta * torch.tanh(normed @ Wb)  # (B, L, n)
    mixed = alpha.transpose(-1, -2) @ H  # (B, L, n + 1, D)
    branch = f(mixed[..., 0, :])
    return torch.einsum("bld,bln->blnd", branch, beta) + mixed[..., 1:, :]


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def randomised(connection):
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.normal_()
    return connection


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("channels_first", [False, True])
def test_dynamic_is_the_papers_algorithm(n, channels_first):
    D = 6
    connection = randomised(DynamicConnection(n, dim=D, feature_axis=1 if channels_first else -1)).double()
    f = nn.Linear(D, D).double()
    H = torch.randn(2, 5, n, D, dtype=torch.float64, requires_grad=True)
    W = connection.projection
    expected = paper_step(
        H,
        f,
        rms,
        torch.cat([W[:, :1], W[:, 2:]], 1),
        W[:, 1],
        torch.cat([connection.h_pre[:, None], connection.h_res.t()], 1),
        connection.h_post,
        connection.scale_alpha,
        connection.scale_beta,
    )
    streams = [h.transpose(1, 2) if channels_first else h for h in H.unbind(2)]
    coefficients = connection(streams)
    x = read(streams, coefficients)
    y = f(x.transpose(1, 2)).transpose(1, 2) if channels_first else f(x)
    actual = torch.stack([s.transpose(1, 2) if channels_first else s for s in write(streams, y, coefficients)], 2)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    leaves = (H, *connection.parameters())
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, weight, retain_graph=True),
        torch.autograd.grad(expected, leaves, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_direction_of_h_res():
    connection = StaticConnection(2)
    with torch.no_grad():
        connection.h_res.copy_(torch.tensor([[1.0, 10.0], [0.0, 2.0]]))
        connection.h_post.copy_(torch.tensor([0.0, 5.0]))
    streams = (torch.tensor([1.0]), torch.tensor([3.0]))
    first, second = write(streams, torch.tensor([1.0]), connection(streams))
    assert first.item() == 1 * 1 + 10 * 3, "h_res[0, 1] weighs source 1 into target 0"
    assert second.item() == 2 * 3 + 5


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 9),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    init=st.sampled_from(["paper", "mirrored"]),
    variant=st.sampled_from(sorted(CONNECTIONS)),
    index=st.integers(0, 20),
)
def test_starts_are_the_plain_residual(n, shape, dtype, init, variant, index):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    connection = CONNECTIONS[variant](n, dim=shape[-1], init=init, index=index)
    streams = expand(x, n)
    coefficients = connection(streams)
    tolerance = {torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(read(streams, coefficients), x, rtol=tolerance, atol=tolerance)
    written = write(streams, y, coefficients)
    assert all(s.shape == x.shape and s.dtype == dtype for s in written)
    torch.testing.assert_close(readout(written), x + y, rtol=tolerance, atol=tolerance)
    if init == "paper":
        assert all(torch.equal(s, written[0]) for s in written)


def test_coefficients_are_full_precision_under_autocast():
    connection = randomised(DynamicConnection(4, dim=8))
    streams = [torch.randn(2, 3, 8).bfloat16() for _ in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = connection(streams)
        assert all(s.dtype == torch.bfloat16 for s in write(streams, streams[0], coefficients))
        assert read(streams, coefficients).dtype == torch.bfloat16
    expected = connection([s.float() for s in streams])
    for ours, theirs in zip(coefficients.h_pre, expected.h_pre, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_large_inputs_give_finite_coefficients():
    connection = randomised(DynamicConnection(4, dim=8))
    coefficients = connection([torch.full((2, 8), 1e18) for _ in range(4)])
    assert all(torch.isfinite(c).all() for c in (*coefficients.h_pre, *coefficients.h_post))


def test_one_draw_for_all_streams():
    streams = tuple(torch.full((50,), float(i + 1)) for i in range(3))
    torch.manual_seed(3)
    a, b, c = carry_random(nn.functional.dropout, streams, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(a, nn.functional.dropout(streams[0], 0.5, True))
    assert torch.equal(2 * a, b) and torch.equal(3 * a, c)


def test_batch_norm_sees_all_streams_as_one_batch():
    norm, reference = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    streams = [torch.randn(6, 4) for _ in range(3)]
    out = carry_folded(norm, streams)
    torch.testing.assert_close(torch.cat(out), reference(torch.cat(streams)))
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, reference.running_mean)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: StaticConnection(1), "at least 2 streams"),
        (lambda: StaticConnection(2, init="random"), "init is one of paper, mirrored"),
        (lambda: DynamicConnection(2), "needs dim"),
    ],
    ids=["one stream", "unknown start", "no dim"],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_constructors_draw_no_random_numbers():
    state = torch.get_rng_state()
    DynamicConnection(4, dim=8)
    assert torch.equal(state, torch.get_rng_state())


def test_coefficients_are_a_named_tuple():
    assert Coefficients._fields == ("h_pre", "h_post", "h_res")
