"""Streams and connections against formulas written out here."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from checks import outputs_and_gradients
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import Chain
from torch import nn

import hc_transform as hct
from hc_transform import CONNECTIONS, Coefficients, DynamicConnection, FracConnection, StaticConnection
from hc_transform.connections import base
from hc_transform.connections.constrained import prime_factors
from hc_transform.connections.projection import project
from hc_transform.streams.carried import carry_folded, carry_random
from hc_transform.streams.mixing import (
    PackedCoefficients,
    distribute,
    entries,
    expand,
    mix,
    read,
    read_recomputed,
    readout,
    write,
    write_recomputed,
)

EXACT = ("mhc-lite", "kromhc")


def make(variant, n, dim=8, **settings):
    if variant == "frac":
        settings.setdefault("num_fractions", 2 if dim % 2 == 0 else 1)
    return CONNECTIONS[variant](n, dim=dim, **settings)


def supported(variant, n):
    if variant == "mhc-lite":
        return n <= 6
    return variant != "kromhc" or prime_factors(n)[-1] <= 5


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


def by_hand(connection, streams):
    """mHC, arXiv 2512.24880, eq. 7 and 8, on streams of shape (..., D): h_pre, h_post and logits of h_res."""
    flat = rms(torch.cat(streams, -1))
    projected = flat @ connection.projection.flatten(0, 1)
    n = connection.num_streams
    pre, post, res = projected[..., :n], projected[..., n : 2 * n], projected[..., 2 * n :]
    h_pre = torch.sigmoid(connection.scale_pre * pre + connection.bias_pre)
    h_post = 2 * torch.sigmoid(connection.scale_post * post + connection.bias_post)
    return h_pre, h_post, connection.scale_res * res + connection.bias_res if res.shape[-1] else res


def mhc(logits, n):
    m = logits.unflatten(-1, (n, n)).exp()
    for _ in range(20):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def mhc_lite(logits, n):
    weights = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    h_res = torch.zeros(*logits.shape[:-1], n, n, dtype=logits.dtype)
    for k, permutation in enumerate(itertools.permutations(range(n))):
        for i, j in enumerate(permutation):
            h_res[..., i, j] += weights[..., k]
    return h_res


def kromhc(logits, n):
    factors, parts = {2: [2], 4: [2, 2], 6: [2, 3]}[n], []
    for factor in factors:
        parts.append(mhc_lite(logits[..., : math.factorial(factor)], factor))
        logits = logits[..., math.factorial(factor) :]
    flat = [part.flatten(0, -3) for part in parts]
    products = [functools.reduce(torch.kron, matrices) for matrices in zip(*flat, strict=True)]
    return torch.stack(products).view(*logits.shape[:-1], n, n)


@pytest.mark.parametrize("n", [2, 4, 6])
@pytest.mark.parametrize(
    "variant, manifold",
    [("mhc", mhc), ("mhc-lite", mhc_lite), ("kromhc", kromhc), ("identity", lambda logits, n: torch.eye(n))],
    ids=["mhc", "mhc-lite", "kromhc", "identity"],
)
@pytest.mark.parametrize("channels_first", [False, True])
def test_constrained_variants_are_their_formulas(variant, manifold, n, channels_first):
    axis = 1 if channels_first else -1
    connection = randomised(make(variant, n, 5, feature_axis=axis)).double()
    streams = [torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(n)]
    h_pre, h_post, logits = by_hand(connection, streams)
    h_res = manifold(logits, n).double().expand(2, 3, n, n)
    given = [s.transpose(1, 2) for s in streams] if channels_first else streams
    c = connection(given)

    def plain(weight):
        return weight.squeeze(axis)

    torch.testing.assert_close(torch.stack([plain(w) for w in c.h_pre], -1), h_pre)
    torch.testing.assert_close(torch.stack([plain(w) for w in c.h_post], -1), h_post)
    if variant == "identity":
        assert c.h_res is None
    else:
        rows = [torch.stack([plain(w) for w in row], -1) for row in c.h_res]
        torch.testing.assert_close(torch.stack(rows, -2), h_res)
    y = torch.randn_like(given[0])
    expected = torch.einsum("...ij,j...d->i...d", h_res, torch.stack(streams))
    expected = expected + torch.einsum("...i,...d->i...d", h_post, y.transpose(1, 2) if channels_first else y)
    actual = torch.stack([s.transpose(1, 2) if channels_first else s for s in write(given, y, c)])
    torch.testing.assert_close(actual, expected)


class CirculantConnection(hct.ConstrainedConnection):
    """A connection of one's own: h_res[i, j] = c[(j - i) mod n], c the softmax of n logits of the token."""

    def starting_logits(self):
        """Return what gives the diagonal 0.9."""
        n = self.num_streams
        return torch.eye(n)[0] * math.log(9 * (n - 1))

    def manifold(self, logits):
        """Return row i as row 0 moved i places on."""
        c = torch.softmax(logits, -1)
        return torch.stack([c.roll(i, -1) for i in range(self.num_streams)], -2)


def circulant(logits, n):
    c = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.stack([torch.stack([c[..., (j - i) % n] for j in range(n)], -1) for i in range(n)], -2)


@pytest.mark.parametrize("scope", ["graph", "blocks"])
@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["tensors", "numbers"])
def test_a_connection_of_ones_own(scope, devices, monkeypatch):
    """It is verified, trained and compiled as those of the package are."""
    monkeypatch.setattr(base, "PACKED_DEVICES", devices)
    model, x = Chain(lambda x, f, i: x + f, 2), torch.randn(2, 5, 8)
    hc = hct.convert(model, (x,), connection=CirculantConnection, num_streams=3, scope=scope)
    assert hc.hc_report.max_error <= 1e-5 and len(hc.hc_report.converted) == 2
    optimizer = torch.optim.SGD(hc.parameters(), 0.1)
    hc(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    connections = [m for m in hc.modules() if isinstance(m, CirculantConnection)]
    assert len(connections) == len(hc.hc_report.converted)
    streams = [torch.randn(4, 5, connections[0].dim) for _ in range(3)]
    for connection in (connections[0], randomised(connections[-1])):
        h_pre, h_post, logits = by_hand(connection, streams)
        h_res = circulant(logits, 3)
        assert max(hct.sinkhorn_error(h_res)) <= 1e-6
        torch._dynamo.reset()
        for made in (connection(streams), torch.compile(connection, fullgraph=True, backend="aot_eager")(streams)):
            rows = torch.stack([torch.cat(row, -1) for row in made.h_res], -2)
            torch.testing.assert_close(torch.cat(made.h_pre, -1), h_pre)
            torch.testing.assert_close(torch.cat(made.h_post, -1), h_post)
            torch.testing.assert_close(rows, h_res)
    expected = outputs_and_gradients(hc, (x,), {})
    torch._dynamo.reset()
    y, gradients = outputs_and_gradients(torch.compile(hc, fullgraph=True), (x,), {})
    torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-4)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(
    "variant, n, settings",
    [
        *((variant, n, {}) for variant in sorted(set(CONNECTIONS) - {"frac"}) for n in (2, 3, 4)),
        ("kromhc", 6, {}),
        ("frac", 1, {"num_fractions": 4}),
        ("frac", 2, {"num_fractions": 2, "mix_outputs": True}),
        ("frac", 2, {"num_fractions": 2, "num_views": 2, "tanh": False}),
    ],
    ids=str,
)
def test_numbers_of_a_token_are_those_of_tensors(variant, n, settings, axis):
    connection = randomised(make(variant, n, 8, feature_axis=axis, **settings)).double()
    streams = [torch.randn((2, 3, 8) if axis == -1 else (2, 8, 3), dtype=torch.float64) for _ in range(n)]
    own, buffers = connection._parameters, connection._buffers
    tensors = (*own.values(), *buffers.values(), *streams)
    made = connection.assembled(*connection._unrolled(connection._settings(), tuple(own), tuple(buffers), *tensors))
    for a, b in zip(_tensors(made), _tensors(connection(streams)), strict=True):
        torch.testing.assert_close(a.expand_as(b) if b.dim() else a, b.expand_as(a), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n, m", [(1, 2), (1, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("channels_first", [False, True])
def test_frac_is_its_formula(n, m, channels_first):
    """arXiv 2503.14125: fractions as hidden vectors of their own; each fraction is written to by its own."""
    d, k = 3, n * m
    connection = randomised(
        FracConnection(n, dim=m * d, num_fractions=m, feature_axis=1 if channels_first else -1)
    ).double()
    H = torch.randn(2, 5, k, d, dtype=torch.float64)  # row s * m + f
    W, scale = connection.projection, connection.scale_alpha
    dynamic = torch.tanh(rms(H) @ W)  # (..., k, m + 1 + k)
    h_pre = connection.h_pre[0].t() + scale * dynamic[..., :m]  # (..., k, m): source, input fraction
    h_res = connection.h_res.t() + scale * dynamic[..., m + 1 :]  # (..., k, k): source, target
    h_post = connection.h_post + connection.scale_beta * dynamic[..., m]  # (..., k)
    streams = [s.flatten(-2) for s in H.unflatten(2, (n, m)).unbind(2)]
    given = [s.transpose(1, 2) for s in streams] if channels_first else streams
    c = connection(given)
    x = read(given, c)
    y = torch.randn(2, 5, m, d, dtype=torch.float64)
    flat = y.flatten(-2)
    written = write(given, flat.transpose(1, 2) if channels_first else flat, c)
    actual = [s.transpose(1, 2) if channels_first else s for s in (x, *written)]
    torch.testing.assert_close(actual[0].unflatten(-1, (m, d)), torch.einsum("...kf,...kd->...fd", h_pre, H))
    expected = torch.einsum("...kj,...kd->...jd", h_res, H) + h_post[..., None] * y.repeat(1, 1, n, 1)
    torch.testing.assert_close(torch.stack(actual[1:], 2).unflatten(-1, (m, d)).flatten(2, 3), expected)


@pytest.mark.parametrize("variant", ["mhc", *EXACT])
@pytest.mark.parametrize("n", [2, 4, 6])
def test_h_res_is_doubly_stochastic(variant, n):
    connection = randomised(make(variant, n))
    c = connection([torch.randn(50, 8) for _ in range(n)])
    h_res = torch.stack([torch.stack(row, -1) for row in c.h_res], -2).squeeze(-3)
    error = hct.sinkhorn_error(h_res)
    assert (h_res >= 0).all() and error.rows <= 1e-6
    if variant in EXACT:
        assert error.columns <= 1e-6


@pytest.mark.parametrize("variant", sorted(set(CONNECTIONS) - {"identity"}))
def test_h_res_weighs_source_j_into_target_i(variant):
    """A cycle of three streams: a doubly stochastic matrix of two is symmetric."""
    cycle = torch.eye(3)[[1, 2, 0]]
    connection = make(variant, 3, 4) if variant != "frac" else make(variant, 3, 4, num_fractions=1)
    with torch.no_grad():
        if variant in ("static", "dynamic", "frac"):
            connection.h_res.copy_(cycle)
        elif variant == "mhc":
            connection.bias_res.copy_(40 * cycle.flatten())
        else:
            place = list(itertools.permutations(range(3))).index((1, 2, 0))
            connection.bias_res.copy_(40 * torch.eye(6)[place])
    streams = tuple(torch.full((4,), float(i)) for i in range(3))
    mixed = torch.stack(mix(streams, connection(streams)))
    torch.testing.assert_close(mixed[:, 0], torch.tensor([1.0, 2.0, 0.0]))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    init=st.sampled_from(["paper", "mirrored"]),
    variant=st.sampled_from(sorted(CONNECTIONS)),
    index=st.integers(0, 20),
    separate=st.booleans(),
)
def test_starts_are_the_plain_residual(n, shape, dtype, init, variant, index, separate):
    assume(n >= CONNECTIONS[variant].min_streams and supported(variant, n))
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    connection = make(variant, n, shape[-1], init=init, index=index)
    streams = expand(x, n)
    if separate and init == "mirrored":  # the mean of any streams is what is kept
        noise = torch.randn(n, *shape, generator=generator).to(dtype)
        streams = tuple(x + noise[i] - noise.mean(0) for i in range(n))
    coefficients = connection(streams)
    tolerance = {torch.bfloat16: 1e-1}.get(dtype, 1e-5)
    torch.testing.assert_close(read(streams, coefficients), x, rtol=tolerance, atol=tolerance)
    written = write(streams, y, coefficients)
    assert all(s.shape == x.shape and s.dtype == dtype for s in written)
    torch.testing.assert_close(readout(written), x + y, rtol=tolerance, atol=tolerance)
    if init == "paper":
        for stream in written:
            ulp = {torch.bfloat16: 2**-7}.get(dtype, 1e-6)  # rows of h_res sum to 1 up to fp32 rounding
            sums = 1e-5 if variant == "mhc-lite" else 1e-6  # of up to 720 weights
            torch.testing.assert_close(stream, written[0], rtol=ulp, atol=sums)
    parts = zip(mix(streams, coefficients), distribute(y, coefficients), written, strict=True)
    for mixed, given_out, both in parts:
        torch.testing.assert_close(mixed + given_out, both, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("variant", CONNECTIONS)
def test_coefficients_are_full_precision_under_autocast(variant):
    connection = randomised(make(variant, 4))
    streams = [torch.randn(2, 3, 8).bfloat16() for _ in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = connection(streams)
        assert all(s.dtype == torch.bfloat16 for s in write(streams, streams[0], coefficients))
        assert read(streams, coefficients).dtype == torch.bfloat16
    expected = connection([s.float() for s in streams])
    for ours, theirs in zip(_tensors(coefficients), _tensors(expected), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def _tensors(coefficients):
    return [t for t in torch.utils._pytree.tree_leaves(tuple(coefficients)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("variant", CONNECTIONS)
@pytest.mark.parametrize("size", [1e18, 1e-30, 0.0])
def test_coefficients_are_finite_for_large_and_small_inputs(variant, size):
    connection = randomised(make(variant, 4))
    streams = [(size * torch.randn(2, 8)).requires_grad_() for _ in range(4)]
    coefficients = _tensors(connection(streams))
    assert all(torch.isfinite(c).all() for c in coefficients)
    loss = sum(c.square().sum() for c in coefficients)
    for gradient in torch.autograd.grad(loss, list(connection.parameters()), allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


@pytest.mark.parametrize("variant", CONNECTIONS)
def test_recomputing_saves_streams_only(variant):
    def saved(recompute):
        connection = randomised(make(variant, 4, 64, recompute=recompute))
        streams = [torch.randn(64, 64).bfloat16().requires_grad_() for _ in range(4)]
        sizes = {}

        def pack(t):
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            c = connection(streams)
            x = (read_recomputed if recompute else read)(streams, c)
            written = (write_recomputed if recompute else write)(streams, x.sin(), c)
        loss = sum(s.float().square().sum() for s in written)
        gradients = torch.autograd.grad(loss, [*streams, *connection.parameters()])
        return sum(sizes.values()), gradients

    torch.manual_seed(5)
    plain, expected = saved(False)
    torch.manual_seed(5)
    less, actual = saved(True)
    assert less == 6 * 64 * 64 * 2 < plain, "the streams, and what the branch is given and gives"
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", CONNECTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_memory_format_is_kept(variant, layout):
    """It decides in which order dropout in the branch draws its mask, and how fast convolutions are."""
    connection = randomised(make(variant, 4, feature_axis=1))
    streams = [torch.randn(2, 8, 3, 5).contiguous(memory_format=layout) for _ in range(4)]
    coefficients = connection(streams)
    branch_input = read(streams, coefficients)
    for tensor in (branch_input, *write(streams, branch_input, coefficients)):
        assert tensor.stride() == streams[0].stride()
    other = branch_input.contiguous(memory_format=torch.contiguous_format)
    if variant != "frac":  # whose streams are put together from parts
        assert write(streams, other, coefficients)[0].stride() == streams[0].stride()
        assert write(streams, other, coefficients, branch_first=True)[0].stride() == other.stride()


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


LAYOUTS = {
    "tokens": ((2, 3, 5), -1, lambda x: x),
    "channels first": ((2, 5, 3, 4), 1, lambda x: x),
    "channels last in memory": ((2, 5, 3, 4), 1, lambda x: x.to(memory_format=torch.channels_last)),
    "not contiguous": ((3, 2, 5), -1, lambda x: x.transpose(0, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_token", [False, True], ids=["one matrix", "a matrix for each token"])
@pytest.mark.parametrize("branch_first", [False, True], ids=["stream first", "branch first"])
def test_many_streams_are_mixed_by_matrix_products(layout, per_token, branch_first):
    """The same numbers, gradients, dtype and memory format as entry by entry, with far fewer operations."""
    n = 9
    shape, axis, laid = LAYOUTS[layout]
    torch.manual_seed(0)
    *streams, y = (laid(torch.randn(shape, dtype=torch.float64)) for _ in range(n + 1))
    tokens = [size for i, size in enumerate(y.shape) if i != axis % y.dim()] if per_token else []
    pre, post = (torch.randn(*tokens, n, dtype=torch.float64) for _ in range(2))
    matrix = torch.randn(*tokens, n, n, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*streams, y, post, matrix)]
    ours = PackedCoefficients(entries(pre, axis), entries(post, axis), matrix, axis)
    reference = Coefficients(ours.h_pre, ours.h_post, ours.h_res)
    for function in (lambda c: write(streams, y, c, branch_first), lambda c: mix(streams, c)):
        results = []
        for coefficients in (ours, reference):
            written = function(coefficients)
            weights = [torch.arange(t.numel(), dtype=t.dtype).view(t.shape).sin() for t in written]
            total = sum((w * t).sum() for w, t in zip(weights, written, strict=True))
            results.append((written, torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)))
        for a, b in zip(*(r[0] for r in results), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for a, b in zip(*(r[1] for r in results), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(write(streams, y, ours, branch_first), write(streams, y, reference, branch_first), strict=True):
        assert a.stride() == b.stride()


def test_many_streams_take_few_operations():
    hc = DynamicConnection(16, dim=8)
    streams = tuple(torch.randn(2, 3, 8) for _ in range(16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        write(streams, streams[0], hc(streams))
    names = [event.name for event in profile.events()]
    assert sum(name == "aten::mul" for name in names) < 16 * 16 / 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: StaticConnection(0), "joins at least 1 streams"),
        (lambda: hct.MHCConnection(1, dim=4), "MHCConnection joins at least 2 streams, got num_streams=1"),
        (lambda: StaticConnection(2, init="random"), "init is one of paper, mirrored"),
        (lambda: DynamicConnection(2), "needs dim"),
        (lambda: hct.MHCLiteConnection(7, dim=4), "5,040 for num_streams=7, at most 720.*'kromhc' or 'mhc'"),
        (lambda: hct.KromHCConnection(14, dim=4), "5,040 for 7, at most 720"),
        (lambda: FracConnection(1, dim=10, num_fractions=4), "size 10 cannot be cut into num_fractions=4"),
    ],
    ids=["no stream", "one stream", "unknown start", "no dim", "mhc-lite", "kromhc", "fractions"],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_constructors_draw_no_random_numbers():
    state = torch.get_rng_state()
    for variant in CONNECTIONS:
        make(variant, 4)
    hct.LearnedReadout(4, 8), hct.StreamEmbedding(4, 8)
    assert torch.equal(state, torch.get_rng_state())


def test_coefficients_are_a_named_tuple():
    assert Coefficients._fields == ("h_pre", "h_post", "h_res")


@pytest.mark.parametrize(
    "axis, order",
    [(1, (0, 1, 2, 3)), (1, (0, 2, 3, 1)), (-1, (0, 1, 2, 3)), (-1, (0, 3, 1, 2))],
    ids=["channels first", "channels first, last in memory", "channels last", "channels last, first in memory"],
)
def test_projections_keep_no_copies(axis, order):
    """The backward pass keeps the stream itself; ``order`` is that of its axes in memory."""
    shape = [2, 6, 4, 8]
    x = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(4)]).requires_grad_()
    weight = torch.randn(shape[axis], 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()), lambda t: t):
        projected = project(x, weight, axis)
    assert set(kept) == {x.data_ptr(), weight.data_ptr()}
    torch.testing.assert_close(projected, x.movedim(axis, -1) @ weight)


def test_streams_of_tokens_are_in_order_in_memory():
    tokens = torch.randn(2, 8, 5).transpose(1, 2)
    streams = expand(tokens, 3)
    assert all(stream.is_contiguous() and torch.equal(stream, tokens) for stream in streams)
    for x in (torch.randn(2, 5, 8), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        assert all(stream is x for stream in expand(x, 3))
