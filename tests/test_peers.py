"""Parity with other implementations, in forward and backward, their parameters copied.

Our parameters are computed from theirs inside the autograd graph, so that one comparison of the
gradients of their parameters covers all of ours.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from einops import rearrange, repeat
from torch import nn
from torch.func import functional_call

from hc_transform import (
    FracConnection,
    HyperConnections,
    LearnedReadout,
    MHCConnection,
    get_expand_reduce_stream_functions,
)
from hc_transform.streams.mixing import read, write

BOUND = 1e-5
D = 12


def randomised(module, scale=0.5):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def check_parity(ours, theirs, leaves):
    """Equal outputs, and equal gradients of a weighted sum, relative to the largest value of each."""
    ours, theirs = (tuple(t) if isinstance(t, (tuple, list)) else (t,) for t in (ours, theirs))
    weights = [torch.randn_like(t) for t in theirs]
    ours_and_theirs = [
        (*values, *torch.autograd.grad(values, leaves, weights, retain_graph=True)) for values in (ours, theirs)
    ]
    for a, b in zip(*ours_and_theirs, strict=True):
        assert a.shape == b.shape and b.abs().max() > 0
        assert (a - b).abs().max() <= BOUND * b.abs().max()


def gained(gamma, weight):
    """lucidrains' norm has a gain of 1 + gamma, which is part of the projection after it."""
    return (1 + gamma)[:, None] * weight


def from_dynamic(theirs):
    """``hyper_connections.HyperConnections`` without fractions and views."""
    alpha, beta = theirs.dynamic_alpha_fn, theirs.dynamic_beta_fn
    return {
        "connection.h_pre": theirs.static_alpha[:, 0],
        "connection.h_res": theirs.static_alpha[:, 1:].t(),
        "connection.h_post": theirs.static_beta,
        "connection.projection": gained(theirs.norm.gamma, torch.cat([alpha[:, :1], beta[:, None], alpha[:, 1:]], 1)),
        "connection.scale_alpha": theirs.dynamic_alpha_scale.view(1),
        "connection.scale_beta": theirs.dynamic_beta_scale.view(1),
    }


def from_fractions(theirs, n, m, v):
    """The same with fractions or views. Theirs orders rows (f s), ours (s f)."""
    static = theirs.static_alpha.view(m, n, m, v + n)  # [f1, s, f2, t]
    fn = theirs.dynamic_alpha_fn.view(-1, m, v + n)  # [d, f2, t]
    beta = theirs.dynamic_beta_fn.view(-1, m)
    weights = [fn[..., :v].transpose(1, 2).flatten(1), beta, fn[..., v:].transpose(1, 2).flatten(1)]
    return {
        "connection.h_pre": static[..., :v].permute(3, 2, 1, 0).reshape(v, m, n * m),
        "connection.h_res": static[..., v:].permute(3, 2, 1, 0).reshape(n * m, n * m),
        "connection.h_post": theirs.static_beta[:, None].expand(n * m, m),
        "connection.projection": gained(theirs.norm.gamma, torch.cat(weights, 1)),
        "connection.scale_alpha": theirs.dynamic_alpha_scale.view(1),
        "connection.scale_beta": theirs.dynamic_beta_scale.view(1),
    }


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "no tanh"])
def test_lucidrains(n, tanh):
    peer = pytest.importorskip("hyper_connections")
    branch = nn.Linear(D, D)
    theirs = randomised(peer.HyperConnections(n, dim=D, branch=branch, layer_index=1, tanh=tanh))
    ours = HyperConnections(n, dim=D, branch=branch, layer_index=1, tanh=tanh)
    x = torch.randn(2 * n, 5, D, requires_grad=True)
    check_parity(functional_call(ours, from_dynamic(theirs), (x,)), theirs(x), [x, *theirs.parameters()])


@pytest.mark.parametrize("n, m, v", [(1, 4, 1), (2, 3, 1), (1, 2, 2), (3, 1, 2), (2, 2, 3)])
def test_lucidrains_fractions_and_views(n, m, v):
    peer = pytest.importorskip("hyper_connections")
    theirs = randomised(peer.HyperConnections(n, dim=D, layer_index=1, num_fracs=m, num_input_views=v))
    ours = HyperConnections(n, dim=D, layer_index=1, num_fracs=m, num_input_views=v)
    settings = dict(num_fractions=m, num_views=v, mix_outputs=True, dim=D)
    ours.connection = FracConnection(n, **settings)  # the package weighs every output fraction into every row
    x = torch.randn(2 * n, 5, D, requires_grad=True)
    layer = nn.Linear(D, D)

    def branch(t):
        return layer(t) if v == 1 else layer(t).tanh().prod(0)

    def run(hc):
        branch_input, add_residual = hc(x)
        return branch_input, add_residual(branch(branch_input))

    with nn.utils.stateless._reparametrize_module(ours, from_fractions(theirs, n, m, v)):
        check_parity(run(ours), run(theirs), [x, *theirs.parameters()])


def test_lucidrains_channel_first():
    peer = pytest.importorskip("hyper_connections.hyper_connections_channel_first")
    branch = nn.Conv2d(D, D, 3, padding=1)
    theirs = randomised(peer.HyperConnections(4, dim=D, branch=branch, layer_index=2))
    ours = HyperConnections(4, dim=D, branch=branch, layer_index=2, channel_first=True)
    alpha, beta = theirs.dynamic_alpha_fn.weight[..., 0, 0].t(), theirs.dynamic_beta_fn[0].weight[0, :, 0, 0]
    as_dynamic = SimpleNamespace(
        static_alpha=theirs.static_alpha,
        static_beta=theirs.static_beta,
        dynamic_alpha_fn=alpha,
        dynamic_beta_fn=beta,
        norm=SimpleNamespace(gamma=theirs.norm.gamma[:, 0, 0]),
        dynamic_alpha_scale=theirs.dynamic_alpha_scale,
        dynamic_beta_scale=theirs.dynamic_beta_scale,
    )
    x = torch.randn(2 * 4, D, 5, 3, requires_grad=True)
    check_parity(functional_call(ours, from_dynamic(as_dynamic), (x,)), theirs(x), [x, *theirs.parameters()])


def test_channel_first_option_of_lucidrains_main_class_adds_positions_up():
    """Why the class above is compared: in 0.4.11 the option of the main class sums over positions."""
    peer = pytest.importorskip("hyper_connections")
    theirs = peer.HyperConnections(2, dim=D, branch=nn.Identity(), layer_index=0, channel_first=True)
    x = torch.randn(1, D, 5)
    packed = repeat(x, "b ... -> (b s) ...", s=2)
    ours = HyperConnections(2, dim=D, branch=nn.Identity(), layer_index=0, channel_first=True)
    torch.testing.assert_close(ours(packed), 2 * packed)
    assert not torch.allclose(theirs(packed), 2 * packed)
    torch.testing.assert_close(theirs(packed), packed + packed.sum(-1, keepdim=True))


def test_lucidrains_multi_input_streams():
    peer = pytest.importorskip("hyper_connections.hyper_connections_with_multi_input_streams")

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(6, D)

        def forward(self, x, second, *, third):
            return self.a(x).sin() * self.b(second) + self.c(third)

    branch, paths = Branch(), [1, ("third", 6)]
    theirs = randomised(peer.HyperConnections(3, dim=D, branch=branch, layer_index=1, additional_input_paths=paths))
    ours = HyperConnections(3, dim=D, branch=branch, layer_index=1, additional_input_paths=paths)
    alpha, beta = theirs.dynamic_alpha_and_branch_input, theirs.dynamic_beta
    parameters = from_dynamic(
        SimpleNamespace(
            static_alpha=theirs.static_alpha,
            static_beta=theirs.static_beta,
            dynamic_alpha_fn=alpha.proj.weight.t(),
            dynamic_beta_fn=beta.proj.weight[0],
            norm=theirs.norm,
            dynamic_alpha_scale=alpha.scale,
            dynamic_beta_scale=beta.scale,
        )
    )
    for i, (norm, dynamic, static) in enumerate(
        zip(theirs.additional_norms, theirs.additional_to_dynamic_input, theirs.additional_static_input, strict=True)
    ):
        parameters[f"additional_reads.{i}.weight"] = static
        parameters[f"additional_reads.{i}.projection"] = gained(norm.gamma, dynamic.proj.weight.t())
        parameters[f"additional_reads.{i}.scale"] = dynamic.scale.view(1)
    x, second = (torch.randn(2 * 3, 5, D, requires_grad=True) for _ in range(2))
    third = torch.randn(2 * 3, 5, 6, requires_grad=True)
    check_parity(
        functional_call(ours, parameters, (x, second), {"third": third}),
        theirs(x, second, third=third),
        [x, second, third, *theirs.parameters()],
    )


def test_lucidrains_mhc_where_it_is_the_papers():
    """mHCv2 norms and projects each stream by itself, with one projection for all.

    The paper norms the flattened streams and projects all of them together. For streams of equal
    RMS the first is the second with a block-diagonal projection, so the parameters' gradients agree
    (the streams' do not: the norms differ around that point). Its Sinkhorn ends with the other axis,
    which makes no difference once it has converged.
    """
    peer = pytest.importorskip("hyper_connections.mHCv2")
    n = 4
    branch = nn.Linear(D, D)
    theirs = randomised(peer.mHC(n, dim=D, branch=branch, layer_index=1, sinkhorn_iters=60))
    fn = theirs.dynamic_alpha_fn[0] * (1 + theirs.norm.gamma)[:, None]  # (D, 1 + n)
    beta = theirs.dynamic_beta_fn[:, 0] * (1 + theirs.norm.gamma)
    own = torch.eye(n)
    projection = torch.cat(
        [
            torch.einsum("d,sk->sdk", fn[:, 0], own),
            torch.einsum("d,sk->sdk", beta, own),
            torch.einsum("dt,sk->sdtk", fn[:, 1:], own).flatten(2),  # [target, source]
        ],
        -1,
    )
    parameters = {
        "connection.projection": projection,
        "connection.bias_pre": theirs.static_alpha[:, 0],
        "connection.bias_post": theirs.static_beta.view(n),
        "connection.bias_res": theirs.static_alpha[:, 1:].t().flatten(),
        "connection.scale_pre": theirs.pre_branch_scale,
        "connection.scale_post": theirs.h_post_scale.view(1),
        "connection.scale_res": theirs.residual_scale,
    }
    ours = HyperConnections(n, dim=D, branch=branch, connection="mhc", iterations=60)
    x = torch.randn(2, 5, n, D)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    packed = functional_call(ours, parameters, (rearrange(x, "b t s d -> (b s) t d"),))
    check_parity(rearrange(packed, "(b s) t d -> b t s d", s=n), theirs(x), list(theirs.parameters()))


def deepseek(name, **more):
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = SimpleNamespace(hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=D, **more)
    module = getattr(modeling, name)(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_deepseek_v4_connection():
    """Theirs returns h_res as [source, target]; the rows of our [target, source] are normalised last in both."""
    n = 4
    theirs = deepseek("DeepseekV4HyperConnection")
    x = torch.randn(2, 5, n, D, requires_grad=True)
    layer = nn.Linear(D, D)
    post, comb, collapsed = theirs(x)
    y = layer(collapsed)
    expected = post[..., None] * y[..., None, :] + comb.transpose(-1, -2) @ x
    fn = rearrange(theirs.fn, "k (s d) -> s d k", s=n)
    pre, post_fn, res = fn.split([n, n, n * n], -1)
    bias_pre, bias_post, bias_res = theirs.base.split([n, n, n * n])
    parameters = {
        "projection": torch.cat([pre, post_fn, rearrange(res, "s d (i j) -> s d (j i)", i=n)], -1),
        "bias_pre": bias_pre,
        "bias_post": bias_post,
        "bias_res": bias_res.view(n, n).t().flatten(),
        **{f"scale_{name}": theirs.scale[i : i + 1] for i, name in enumerate(("pre", "post", "res"))},
    }
    ours = MHCConnection(n, dim=D, eps=1e-6, norm_eps=1e-6)
    streams = x.unbind(2)
    coefficients = functional_call(ours, parameters, (streams,))
    branch_input = read(streams, coefficients)
    actual = torch.stack(write(streams, layer(branch_input), coefficients), 2)
    check_parity((branch_input, actual), (collapsed, expected), [x, *theirs.parameters()])


def test_deepseek_v4_head():
    theirs = deepseek("DeepseekV4HyperHead")
    x = torch.randn(2, 5, 4, D, requires_grad=True)
    ours = LearnedReadout(4, D, eps=1e-6, norm_eps=1e-6)
    parameters = {
        "projection": rearrange(theirs.hc_fn, "k (s d) -> s d k", s=4),
        "scale": theirs.hc_scale,
        "bias": theirs.hc_base,
    }
    check_parity(functional_call(ours, parameters, (x.unbind(2),)), theirs(x), [x, *theirs.parameters()])


@pytest.mark.parametrize("embed", [False, True], ids=["plain", "embedded"])
def test_lucidrains_expand_and_reduce(embed):
    peer = pytest.importorskip("hyper_connections")
    settings = dict(add_stream_embed=embed, dim=D)
    expand_theirs, reduce_theirs = peer.get_expand_reduce_stream_functions(3, **settings)
    expand_ours, reduce_ours = get_expand_reduce_stream_functions(3, reduction="sum", **settings)
    if embed:
        with torch.no_grad():
            expand_theirs.stream_embed.normal_()
            expand_ours.embedding.copy_(expand_theirs.stream_embed)
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(expand_ours(x), expand_theirs(x))
    torch.testing.assert_close(reduce_ours(expand_ours(x)), reduce_theirs(expand_theirs(x)))
