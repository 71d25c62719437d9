"""What a model's own forward changes in it: conversion undoes that, and the converted model does it as it would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hc_transform as hct
from hc_transform.models import writes
from hc_transform.streams.hook_readouts import read_outputs

D = 8
WAYS = [{"scope": "graph"}, {"scope": "blocks"}, {"scope": "blocks", "inplace": True}]


class Changing(nn.Module):
    """A branch whose forward does something to its own module in training mode."""

    def __init__(self, change: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.change = change
        self.online, self.target, self.hidden = nn.Linear(D, D), nn.Linear(D, D), [nn.Linear(D, D)]
        self.free, self.done = [nn.Parameter(torch.ones(D)), torch.ones(D)], False

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.change(self, x)
        return self.online(x) * self.free[0] * self.free[1] + self.target(x) + self.hidden[0](x)


class Block(nn.Module):
    def __init__(self, change: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.branch, self.out = Changing(change), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.branch(x))


def initialise(module: Any, x: Tensor) -> None:
    if not module.done:
        module.online.weight.data.copy_(torch.eye(D) * 0.3)
        module.done = True


def average(module: Any, x: Tensor) -> None:
    with torch.no_grad():
        for target in (module.target, module.hidden[0]):
            for p, q in zip(target.parameters(), module.online.parameters(), strict=True):
                p.data.mul_(0.9).add_(q.data, alpha=0.1)


def normalise(module: Any, x: Tensor) -> None:
    module.online.weight.data /= module.online.weight.data.norm()
    for free in module.free:
        free.data.mul_(0.5)


def foreach(module: Any, x: Tensor) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(module.online.parameters()), 0.5)


def set_data(module: Any, x: Tensor) -> None:
    module.online.weight.data = module.online.weight.data * 0.5


def replace(module: Any, x: Tensor) -> None:
    module.online.weight = nn.Parameter(module.online.weight.detach() * 0.5)


def freeze(module: Any, x: Tensor) -> None:
    module.online.requires_grad_(not module.online.weight.requires_grad)


def differentiate(module: Any, x: Tensor) -> None:
    with torch.enable_grad():
        module.online.weight.pow(2).sum().backward()


def accumulate(module: Any, x: Tensor) -> None:
    if module.target.weight.grad is None:
        module.target.weight.grad = torch.ones(D, D)
    module.target.weight.grad.mul_(2)


def add_child(module: Any, x: Tensor) -> None:
    if not hasattr(module, "late"):
        module.late = nn.Linear(D, D)
        module.target.register_buffer("late", x.mean())


def replace_child(module: Any, x: Tensor) -> None:
    module.online = nn.Sequential(module.online, nn.Tanh())


def add_hook(module: Any, x: Tensor) -> None:
    if not module.done:
        module.online.register_forward_hook(lambda module, args, output: output * 1.5)
        module.done = True


CHANGES = [initialise, average, normalise, foreach, set_data, replace, freeze, differentiate, accumulate]
CHANGES += [add_child, replace_child, add_hook]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all that a model holds, without what conversion adds."""
    found: dict[str, Any] = {}
    roots = [("", model), *((f"{p}.hidden", m.hidden[0]) for p, m in model.named_modules() if hasattr(m, "hidden"))]
    modules = [(f"{at}.{path}", m) for at, root in roots for path, m in root.named_modules() if "hyper_" not in path]
    for path, module in modules:
        for kind in ("_parameters", "_buffers", "_modules"):
            found[f"{path} {kind}"] = [(n, id(v)) for n, v in getattr(module, kind).items() if n != "hyper_connections"]
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        found[f"{path} hooks"] = [hook for hook in hooks if hook is not read_outputs]
        own = dict(
            module._parameters, **module._buffers, **{f"free{i}": t for i, t in enumerate(getattr(module, "free", ()))}
        )
        for name, tensor in own.items():
            grad = None if tensor.grad is None else tensor.grad.tolist()
            found[f"{path}.{name}"] = tensor.tolist(), tensor.data_ptr(), tensor.requires_grad, grad
    return found


@pytest.mark.parametrize("way", WAYS, ids=["graph", "blocks", "inplace"])
@pytest.mark.parametrize("change", CHANGES)
def test_conversion_leaves_a_model_as_it_was(change: Callable[[Any, Tensor], None], way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(change), Block(change)), torch.randn(3, D)
    reference, before = copy.deepcopy(model), state_of(model)
    with torch.no_grad():
        hc = hct.convert(model, (x,), **way)
        assert len(hc.hc_report.converted) == 2
        assert state_of(model) == before
        for seed in range(3):
            torch.manual_seed(seed)
            expected = reference(x)
            torch.manual_seed(seed)
            assert torch.equal(hc(x), expected)


def test_a_refusal_leaves_a_model_as_it_was() -> None:
    model, x = nn.Sequential(Changing(average), Changing(add_child)), torch.randn(3, D)
    before = state_of(model)
    with pytest.raises(hct.NothingToConvert):
        hct.convert(model, (x,))
    assert state_of(model) == before


def test_parameters_that_are_not_written_into_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, clone = [], torch.UntypedStorage.clone
    monkeypatch.setattr(torch.UntypedStorage, "clone", lambda storage: copied.append(storage._cdata) or clone(storage))
    model, x = nn.Sequential(Block(initialise), Block(initialise)), torch.randn(3, D)
    hct.convert(model, (x,))
    assert set(copied) == {block.branch.online.weight.untyped_storage()._cdata for block in model}


def test_lazy_modules_are_made_for_good() -> None:
    model, x = nn.Sequential(Block(average), Block(average)), torch.randn(3, D)
    model[0].out = nn.LazyLinear(D)
    hc = hct.convert(model, (x,), scope="blocks")
    assert model[0].out.weight.shape == (D, D) and hc[0].out.weight is model[0].out.weight
    assert torch.equal(hc.eval()(x), model.eval()(x))


def test_operations_are_looked_at_in_the_first_runs_alone(monkeypatch):
    """A run that wrote into no parameter tells of the others: to look at each operation makes small ones slow."""
    entered = []
    plain = writes._SavesBeforeWrites.__enter__
    monkeypatch.setattr(writes._SavesBeforeWrites, "__enter__", lambda self: (entered.append(1), plain(self))[1])
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))).eval()
    with torch.no_grad():
        hct.convert(model, torch.randn(2, 3, 8))
    assert 1 <= len(entered) <= 3
