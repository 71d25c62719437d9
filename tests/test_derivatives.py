"""Forward mode, torch.func and double backward: through the connections, and through converted models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import hc_transform as hct
from hc_transform import sinkhorn

CONNECTIONS = ["static", "dynamic", "mhc", "mhc-lite", "kromhc", "identity", "frac"]
D = 4


def iterated(logits, iterations=20, eps=0.0):
    """Sinkhorn-Knopp as plain operations."""
    p = torch.softmax(logits, -2) + eps
    p = p / (p.sum(-1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        p = p / (p.sum(-2, keepdim=True) + eps)
        p = p / (p.sum(-1, keepdim=True) + eps)
    return p


def loss(function):
    return lambda x: (function(x) ** 3).sum()


def forward_mode(function, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent


def double_backward(function, x, v):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(function)(x), x, create_graph=True)
    return torch.autograd.grad((first * v).sum(), x)[0]


TRANSFORMS = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "forward mode": forward_mode,
    "grad": lambda f, x, v: grad(loss(f))(x),
    "vjp": lambda f, x, v: vjp(loss(f), x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "hessian": lambda f, x, v: hessian(loss(f))(x),
    "vmap": lambda f, x, v: vmap(f)(torch.stack([x, v])),
    "vmap of grad": lambda f, x, v: vmap(grad(loss(f)))(torch.stack([x, v])),
    "grad of grad": lambda f, x, v: grad(lambda x: (grad(loss(f))(x) * v).sum())(x),
    "double backward": double_backward,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_sinkhorn(transform, eps):
    x, v = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    ours = TRANSFORMS[transform](lambda x: sinkhorn(x, 7, eps), x, v)
    theirs = TRANSFORMS[transform](lambda x: iterated(x, 7, eps), x, v)
    assert ours.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_gradients_of_gradients_check_numerically():
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 5), (logits,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: sinkhorn(x, 5), (logits,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(D, D), nn.Tanh())

    def forward(self, x):
        return x + self.f(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def converted(connection, scope="graph", **options):
    streams = {} if connection == "frac" else {"num_streams": 2}
    hc = hct.convert(Stack(), (torch.randn(2, D),), connection=connection, scope=scope, **streams, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in hc.named_parameters():
            if "hyper_connections" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return hc.double()


@pytest.fixture
def plain_sinkhorn(monkeypatch):
    """Put the plain operations in place of the operator, so that torch alone differentiates."""

    def use():
        monkeypatch.setattr("hc_transform.connections.constrained.sinkhorn", iterated)

    return use


@pytest.mark.parametrize("scope", ["graph", "blocks"])
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_converted_models(connection, scope, plain_sinkhorn):
    hc = converted(connection, scope)
    x, v = torch.randn(2, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    ours = {name: transform(hc, x, v) for name, transform in TRANSFORMS.items()}
    plain_sinkhorn()
    by_numbers = (hc(x + 1e-6 * v) - hc(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(ours["jvp"], by_numbers, rtol=1e-6, atol=1e-7)
    for name, transform in TRANSFORMS.items():
        torch.testing.assert_close(ours[name], transform(hc, x, v), rtol=1e-9, atol=1e-11, msg=name)
    gradient = torch.autograd.grad(loss(hc)(leaf := x.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(ours["grad"], gradient, rtol=1e-9, atol=1e-11)
    jacobian = torch.autograd.functional.jacobian(hc, x)
    for name in ("jacrev", "jacfwd"):
        torch.testing.assert_close(ours[name], jacobian, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("connection", ["dynamic", "mhc", "frac"])
def test_gradients_of_each_sample(connection):
    hc = converted(connection)
    parameters = {name: p.detach() for name, p in hc.named_parameters()}
    xs = torch.randn(3, 2, D, dtype=torch.float64)

    def one(parameters, x):
        return loss(lambda x: functional_call(hc, parameters, (x,)))(x)

    together = vmap(grad(one), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        hc.zero_grad()
        loss(hc)(x).backward()
        for name, parameter in hc.named_parameters():
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scope", ["graph", "blocks"])
@pytest.mark.parametrize("connection", ["dynamic", "mhc"])
def test_recomputed_coefficients(connection, scope):
    kept, again = (converted(connection, scope, recompute=recompute) for recompute in (False, True))
    again.load_state_dict(kept.state_dict())
    x, v = torch.randn(2, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    for name, transform in TRANSFORMS.items():
        torch.testing.assert_close(transform(again, x, v), transform(kept, x, v), rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("connection", ["dynamic", "mhc"])
def test_half_precision(connection):
    hc = converted(connection).bfloat16()
    x, v = torch.randn(2, D).bfloat16(), torch.randn(2, D).bfloat16()
    exact = jvp(hc.float(), (x.float(),), (v.float(),))[1]
    for name in ("jvp", "forward mode"):
        tangent = TRANSFORMS[name](hc.bfloat16(), x, v).float()
        assert (tangent - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norm_on_the_trunk(training):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Block(), Block()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    model = Model().train(training)
    hc = hct.convert(model, (torch.randn(5, D),), num_streams=2, connection="static").double()
    model.double(), hc.train(training)
    x, v = torch.randn(5, D, dtype=torch.float64), torch.randn(5, D, dtype=torch.float64)
    for name in ("jvp", "forward mode", "double backward", "jacrev", "hessian"):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            theirs = TRANSFORMS[name](model, x, v)
        except RuntimeError as error:  # torch's own batch norm, which writes into its statistics
            model.load_state_dict(state)
            with pytest.raises(RuntimeError, match=str(error)[:40].replace("(", ".").replace(")", ".")):
                TRANSFORMS[name](hc, x, v)
            continue
        model.load_state_dict(state)
        torch.testing.assert_close(TRANSFORMS[name](hc, x, v), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("connection", ["dynamic", "mhc"])
def test_a_transform_in_compiled_code(connection):
    hc = converted(connection)
    x, v = torch.randn(2, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    torch._dynamo.reset()
    for name in ("jvp", "grad", "vmap"):
        compiled = torch.compile(lambda x, v, t=TRANSFORMS[name]: t(hc, x, v), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, v), TRANSFORMS[name](hc, x, v), rtol=1e-9, atol=1e-11)
