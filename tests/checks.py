"""What must hold for every converted model, written without the package's own verification."""

from __future__ import annotations

import copy

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def tensors(value):
    if isinstance(value, dict):
        value = dict(value)
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def error(actual, expected):
    """Largest error relative to the largest value, over all tensors of two nested outputs."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        assert torch.isfinite(e).all()
        worst = max(worst, ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-12)).item())
    return worst


def wake(model):
    """Give weights that start at zero (heads, gates) values, so that nothing hides behind them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def connections(model):
    """Return the modules that conversion added, by path."""
    found = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "hyper_connections":
            found.update({f"{path}.{name}": child for name, child in module.named_children()})
    return found


def connection_parameters(model):
    return [parameter for module in connections(model).values() for parameter in module.parameters()]


def moved(model, size=0.2, seed=1):
    """Move the parameters that conversion added off their start, in order, so that streams differ; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hyper_connections" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def weighted(outputs):
    """A loss that no gradient vanishes under."""
    return sum(
        (t * torch.linspace(0.5, 1.5, t.numel()).view_as(t)).sum() for t in tensors(outputs) if t.is_floating_point()
    )


def seeded(model, args, kwargs):
    torch.manual_seed(1)
    return model(*args, **kwargs)


def outputs_and_gradients(model, args, kwargs):
    """One seeded training step: outputs, and the gradient of every parameter by name. State is put back."""
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    outputs = model(*args, **kwargs)
    model.zero_grad()
    weighted(outputs).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=True) if p.grad is not None}
    model.zero_grad()
    model.load_state_dict(state)
    return outputs, gradients


def doubled(*modules):
    """Make modules that share parameters double precision, where rounding hides nothing."""
    for module in modules:
        module.double()


def double(inputs):
    """Return inputs in double precision."""
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


class _Float32(TorchFunctionMode):
    """Notes whether anything that depends on parameters is computed in fp32."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen |= result.dtype == torch.float32 and result.requires_grad
        return result


def rounds_in_float32(model, args):
    """Say whether a model in double precision computes what it learns from in fp32, as some norms do."""
    with torch.enable_grad(), _Float32() as mode:
        seeded(model, args, {})
    return mode.seen


def check_preserved(model, hc, args, kwargs=None, *, others=(), bound=1e-5, gradient_bound=1e-5):
    """Check everything that conversion promises to preserve; ``others`` are further inputs."""
    kwargs = kwargs or {}
    for module in (model, hc):
        module.eval()
    with torch.no_grad():
        for inputs in ((args, kwargs), *((other, {}) for other in others)):
            assert error(seeded(hc, *inputs), seeded(model, *inputs)) <= bound
    for module in (model, hc):
        module.train()
    ours, our_gradients = outputs_and_gradients(hc, args, kwargs)
    theirs, their_gradients = outputs_and_gradients(model, args, kwargs)
    assert error(ours, theirs) <= bound
    scale = max(g.abs().max().item() for g in their_gradients.values())
    for name, gradient in their_gradients.items():
        own = max(gradient.abs().max().item(), 1e-3 * scale)
        assert (our_gradients[name] - gradient).abs().max().item() <= gradient_bound * own, name
    new = [n for n, _ in hc.named_parameters() if "hyper_connections." in n]
    assert new and not set(new) - set(our_gradients), "a connection parameter without a gradient"
    assert set(model.state_dict()) <= set(hc.state_dict())
    loaded = hc.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all("hyper_connections." in key for key in loaded.missing_keys)
    twin = copy.deepcopy(hc)
    for module in (model, hc, twin):
        module.eval()
    with torch.no_grad():
        assert not {p.data_ptr() for p in hc.parameters()} & {p.data_ptr() for p in twin.parameters()}
        assert error(seeded(twin, args, kwargs), seeded(model, args, kwargs)) <= bound
