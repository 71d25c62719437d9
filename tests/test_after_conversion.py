"""What happens to a converted model afterwards: hooks, modules and forwards replaced, wrappers; and other threads."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from checks import error
from models import GPT
from torch import nn

import hc_transform as hct

D = 8
SCOPES = ["graph", "blocks"]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.lin(x))


class Block(nn.Module):
    """A residual around a module with a residual of its own, which is part of the graph with nested='all'."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(D, D)
        self.inner = Inner()

    def forward(self, x):
        return self.inner(x + self.f(x))


def stack(depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).eval()


def rows(n=4):
    return torch.randn(n, D)


def agree(hc, model, x):
    assert error(hc(x), model(x)) <= 1e-5


PLACES = ["0", "1.inner", "1.f"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("path", PLACES)
def test_a_forward_hook_added_later_is_called(path, scope):
    model, x, seen = stack(), rows(), []
    hc = hct.convert(model, (x,), scope=scope)
    names = {n for n, _ in hc.named_parameters()}
    handle = hc.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    agree(hc, model, x)
    plain = []
    twin = copy.deepcopy(model)
    twin.get_submodule(path).register_forward_hook(lambda m, args, out: plain.append((args[0], out)))
    twin(x)
    assert len(seen) == 1 and all(error(a, b) <= 1e-5 for a, b in zip(seen[0], plain[0], strict=True))
    handle.remove()
    agree(hc, model, x)
    assert len(seen) == 1 and {n for n, _ in hc.named_parameters()} == names
    assert len(hc.hc_report.converted) == 6


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("kind", ["pre", "backward", "output"])
def test_other_hooks_take_effect_or_are_refused(kind, path, scope):
    model, x, calls = stack(), rows().requires_grad_(), []
    hc, twin = hct.convert(model, (x,), scope=scope), copy.deepcopy(model)
    refused = False
    for m in (hc, twin):
        module = m.get_submodule(path)
        try:
            if kind == "pre":
                module.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
            elif kind == "backward":
                module.register_full_backward_hook(lambda *_: calls.append(1))
            else:
                module.register_forward_hook(lambda m, args, out: out * 1.5)
            result = m(x)
            result.sum().backward()
        except hct.HCTransformError as refusal:
            assert m is hc and ("hook" in str(refusal)), refusal
            refused = True
            continue
        if m is hc:
            ours = result
        else:
            assert refused or error(ours, result) <= 1e-5
    if kind == "backward":
        assert len(calls) == (1 if refused else 2)


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_module_replaced_later_is_run(scope):
    model, x = stack(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for m in (model, hc):
        m.get_submodule("1").inner = Zero()
    agree(hc, model, x)
    for m in (model, hc):
        m.get_submodule("1").f = nn.Identity()
    agree(hc, model, x)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("path", ["2", "1.inner"])
def test_a_forward_replaced_later_is_run_or_refused(path, scope):
    model, x = stack(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    for m in (model, hc):
        m.get_submodule(path).forward = lambda x: x * 3
    try:
        agree(hc, model, x)
    except hct.HCTransformError as refusal:
        assert "forward" in str(refusal)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_forward_of_a_class_replaced_later_is_run(scope, monkeypatch):
    model, x = stack(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    monkeypatch.setattr(Inner, "forward", lambda self, x: x + 2 * torch.tanh(self.lin(x)))
    agree(hc, model, x)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_checkpoint_wrapper_takes_effect_or_is_refused(scope):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, x = stack(), rows()
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    apply_activation_checkpointing(hc, check_fn=lambda m: type(m).__name__ == "Block")
    try:
        ours = hc(x)
    except hct.HCTransformError as refusal:
        assert scope == "graph" and "checkpoint" in str(refusal)
        return
    assert error(ours, model(x)) <= 1e-5
    ours.sum().backward()


@pytest.mark.parametrize("scope", SCOPES)
def test_new_modules_follow_the_mode(scope):
    hc = hct.convert(stack(), (rows(),), scope=scope, stream_dropout=0.5)
    assert not any(m.training for m in hc.modules())
    assert all(m.training for m in hc.train().modules())


@pytest.mark.parametrize("scope", SCOPES)
def test_conversion_in_inference_mode_gives_parameters_that_train(scope):
    model, x = stack(), rows()
    with torch.inference_mode():
        hc = hct.convert(model, (x.clone(),), scope=scope)
    hc(x).sum().backward()
    assert not any(p.is_inference() for p in hc.parameters())


# -- threads


@pytest.fixture
def _switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


class Served(nn.Module):
    """Does in another thread what conversion patches."""

    def __init__(self):
        super().__init__()
        self.blocks, self.drop = nn.Sequential(Block(), Block()), nn.Dropout()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks(x)
        x = torch.utils.checkpoint.checkpoint(self.blocks, x.float(), use_reentrant=False)
        assert isinstance(x, torch.Tensor) and self.training and callable(self.drop)
        return self.drop(x + torch.arange(D)) + torch.finfo(x.dtype).eps


@pytest.mark.usefixtures("_switching_often")
@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="torch.fx has one flag for all threads, which compiled code minds"
)
@pytest.mark.parametrize("scope", SCOPES)
def test_models_in_other_threads_run_on_undisturbed(scope):
    stop, failed, calls = threading.Event(), [], [0]
    served, x = Served().train(), rows()
    compiled = torch.compile(stack(1), backend="eager")
    compiled(x)

    def serve():
        while not stop.is_set():
            try:
                served(x), compiled(x)
                calls[0] += 1
            except BaseException as e:
                failed.append(repr(e))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(5):
            hct.convert(stack(4), (rows(),), scope=scope)
    finally:
        stop.set()
        thread.join()
    assert calls[0] and not failed, set(failed)


@pytest.mark.usefixtures("_switching_often")
def test_conversions_in_two_threads_at_once():
    failed = []

    def convert(seed):
        try:
            for scope in SCOPES:
                torch.manual_seed(seed)
                model, x = nn.Sequential(Block(), nn.Dropout(0.5), Block()).train(), rows()
                hc = hct.convert(model, (x,), scope=scope)
                assert len(hc.hc_report.converted) == 4
                agree(hc.eval(), model.eval(), x)
                agree(hc, model, rows(7))
        except BaseException as e:
            failed.append(repr(e))

    threads = [threading.Thread(target=convert, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_is_patched_is_put_back_after_a_failure():
    import builtins

    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("on purpose") if isinstance(x, torch.fx.Proxy) else RuntimeError("in any case")

    before = (isinstance, callable, torch.zeros, torch.autocast.__enter__, nn.Module.__setattr__, nn.Module.__call__)
    with pytest.raises(hct.TraceError):
        hct.convert(Fails(), (rows(),), scope="graph")
    with pytest.raises(hct.HCTransformError):
        hct.plan(Fails())
    after = (
        builtins.isinstance,
        builtins.callable,
        torch.zeros,
        torch.autocast.__enter__,
        nn.Module.__setattr__,
        nn.Module.__call__,
    )
    assert before == after
    assert "training" not in vars(nn.Module) or not isinstance(vars(nn.Module)["training"], property)
    assert "__getattribute__" not in vars(nn.Module)


@pytest.mark.parametrize("scope", SCOPES)
def test_guards_on_python_state_cost_little(scope):
    """A call looks a few values up: microseconds a block, where a block takes hundreds."""
    import timeit

    model, x = GPT(depth=4), torch.randint(0, 65, (2, 8))
    hc = hct.convert(model, (x,), scope=scope)
    hc(x)
    if scope == "graph":
        states = [(hc._main.state, hc._holder)]
    else:
        runners = [(m, m.__dict__["_hc_runner"]) for m in hc.modules() if "_hc_runner" in m.__dict__]
        states = [(v.state, m) for m, r in runners for vs in r.variants.values() for v in vs]
    seconds = (
        min(timeit.repeat(lambda: [state.change(holder) for state, holder in states], number=200, repeat=5))
        / 200
        / len(model.transformer.h)
    )
    print(f"\n{1e6 * seconds:.2f} us a block")
    assert seconds < 5e-5


class Carries(nn.Module):
    """Residuals with a module between them that each stream goes through, and a draw that comes late."""

    def __init__(self, between, p=0.0):
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.f, self.g = (nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(2))
        self.between = between
        self.p = p

    def forward(self, x):
        x = self.stem(x)
        x = self.between(x + self.f(x))
        if self.training and torch.rand(()).item() < self.p:
            return x
        return x + self.g(x)


BETWEEN = {
    "layer norm": lambda: nn.LayerNorm(D),
    "dropout": lambda: nn.Dropout(0.5),
    "batch norm": lambda: nn.BatchNorm1d(D),
    "activation": lambda: nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("changes", [False, True], ids=["looks", "changes"])
@pytest.mark.parametrize("before", [False, True], ids=["hook", "pre-hook"])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_hook_on_a_carried_module_sees_the_value_once(scope, between, before, changes):
    torch.manual_seed(0)
    model, x = Carries(BETWEEN[between]()), torch.randn(6, D)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope)
    seen = []

    def hook(module, args, *output):
        value = output[0] if output else args[0]
        seen.append(value.detach().clone())
        return value * 1.5 if changes else None

    outputs = []
    for m in (model, hc):
        part = m.get_submodule("between")
        register = part.register_forward_pre_hook if before else part.register_forward_hook
        register(hook)
        torch.manual_seed(1)
        outputs.append(m(x))
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_hook_on_a_part_of_a_carried_module_is_refused(scope):
    model, x = Carries(nn.Sequential(nn.LayerNorm(D), nn.ReLU())), torch.randn(6, D)
    hc = hct.convert(model, (x,), scope=scope, leaf_modules=["between"])
    calls = []
    hc.get_submodule("between.0").register_forward_hook(lambda *_: calls.append(1))
    try:
        hc(x)
    except hct.UnsupportedModel as refused:
        assert "has a forward hook" in str(refused)
    else:
        assert len(calls) == 1


@pytest.mark.parametrize("path", ["stem", "f", "f.0", "between"])
@pytest.mark.parametrize("scope", SCOPES)
def test_hooks_are_called_once_where_a_late_draw_picks_the_graph(scope, path):
    torch.manual_seed(0)
    model, x = Carries(nn.LayerNorm(D), p=0.5), torch.randn(6, D)
    hc = hct.convert(copy.deepcopy(model), (x,), scope=scope, nested="all")
    for seed in range(4):
        torch.manual_seed(seed)
        hc(x)  # both graphs are there
    seen = {}
    for m in (model, hc):
        seen[m] = []
        m.get_submodule(path).register_forward_hook(lambda *args, m=m: seen[m].append(args[2].detach()))
    for seed in range(8):
        for m in (model, hc):
            torch.manual_seed(seed)
            seen[m].append(m(x))
    assert len(seen[model]) == len(seen[hc]) == 16
    for ours, theirs in zip(seen[hc], seen[model], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
