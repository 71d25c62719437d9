"""Code that runs and once was refused without need: modules made in forward, functions of functions, asserts."""

from __future__ import annotations

import copy
import functools
import types

import numpy as np
import pytest
import torch
from asserting import ASSERTS, on_shape
from checks import error, moved, outputs_and_gradients
from einops.layers.torch import Rearrange
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import hc_transform as hct

SCOPES = ("graph", "blocks")
D = 8


class Block(nn.Module):
    """x + how(self, f(x))."""

    def __init__(self, how):
        super().__init__()
        self.f, self.how = nn.Linear(D, D), how

    def forward(self, x):
        return x + self.how(self, self.f(x))


def stack(how, depth=2):
    return nn.Sequential(*(Block(how) for _ in range(depth)))


def x_of(*shape):
    return torch.randn(*(shape or (4, D)))


def check(how, x, scope, model=None):
    """Convert a stack of blocks and compare outputs and gradients, for other batches too; return the result."""
    model = model or stack(how)
    hc = hct.convert(model, x, scope=scope)
    assert len(hc.hc_report.converted) == 2, str(hc.hc_report)
    for inputs in (x, torch.cat([x, x[:1]])):
        ours, our_gradients = outputs_and_gradients(hc, (inputs,), {})
        theirs, their_gradients = outputs_and_gradients(model, (inputs,), {})
        assert error(ours, theirs) < 1e-5
        for name, gradient in their_gradients.items():
            assert (our_gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    return hc


# -- modules that are made in forward

MADE = {
    "activation": lambda block, y: nn.ReLU()(y),
    "sequence": lambda block, y: nn.Sequential(nn.Tanh(), nn.Softmax(-1))(y),
    "einops": lambda block, y: Rearrange("b (h d) -> b h d", h=2)(y).flatten(1),
    "norm": lambda block, y: nn.LayerNorm(D, elementwise_affine=False)(y),
    "loss": lambda block, y: y * nn.MSELoss()(y, torch.zeros_like(y)),
    "loss-with-weights": lambda block, y: y * nn.BCEWithLogitsLoss(pos_weight=torch.ones(D))(y, y.detach().sigmoid()),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", MADE.values(), ids=MADE)
def test_modules_made_in_forward_are_part_of_its_code(how, scope):
    check(how, x_of(), scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_module_with_weights_that_is_no_submodule_is_named(scope):
    outside = nn.Linear(D, D)
    with pytest.raises(hct.NothingToConvert, match="calls a Linear that is no submodule of the model"):
        hct.convert(stack(lambda block, y: outside(y)), x_of(), scope=scope)


# -- torch.vmap


def _closing(block, x):
    k = block.f(x).mean(0)
    return torch.vmap(lambda q, scale: q * k * scale, in_dims=(0, None))(x, block.f.bias)


MAPPED = {
    "module": lambda block, x: torch.vmap(block.f)(x),
    "lambda": lambda block, x: torch.func.vmap(lambda t: block.f(t).relu(), in_dims=1, out_dims=1)(x),
    "nested": lambda block, x: torch.vmap(torch.vmap(block.f))(x),
    "tuple": lambda block, x: torch.vmap(lambda t: (block.f(t), t))(x)[0],
    "shape": lambda block, x: torch.vmap(lambda t: block.f(t) / t.shape[0])(x),
    "dropout": lambda block, x: torch.vmap(lambda t: torch.dropout(block.f(t), 0.2, block.training), randomness="same")(
        x
    ),
    "chunks": lambda block, x: torch.vmap(block.f, chunk_size=2)(x),
    "closure": _closing,
}


class Mapped(Block):
    def forward(self, x):
        return x + self.how(self, x)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", MAPPED.values(), ids=MAPPED)
def test_vmap_in_a_branch(how, scope):
    model, x = nn.Sequential(Mapped(how), Mapped(how)), x_of(4, 3, D)
    hc = check(how, x, scope, model).eval()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(hc, backend="eager", fullgraph=True)(x), hc(x))


@pytest.mark.parametrize("scope", SCOPES)
def test_what_vmap_runs_uses_the_weights_of_the_model_that_it_is_in(scope):
    model, x = nn.Sequential(Mapped(MAPPED["lambda"]), Mapped(MAPPED["lambda"])), x_of(4, 3, D)
    hc = hct.convert(model, x, scope=scope)
    twin = copy.deepcopy(hc).double()
    with torch.no_grad():
        twin.get_submodule("0.f").weight.zero_()
        model[0].f.weight.mul_(2)
    assert error(twin(x.double()), nn.Sequential(Zeroed(model[0]), model[1]).double()(x.double())) < 1e-6
    model.float()
    assert error(hc(x), model(x)) < 1e-5


class Zeroed(nn.Module):
    """A block as it is with weights of zero."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)
        nn.init.zeros_(self.block.f.weight)

    def forward(self, x):
        return self.block(x)


# -- what is compiled within the model


def doubled(y):
    return 2 * y.relu()


def attend(y):
    return flex_attention(*3 * (y[:, None],))[:, 0]


compiled = torch.compile(doubled, backend="eager")
compiled_attention = torch.compile(flex_attention, backend="eager")


class Attending(Block):
    """FlexAttention called where the residual is added."""

    def forward(self, x):
        q = self.f(x)[:, None]
        return x + self.how(q, q, q)[:, 0]


COMPILED = {
    "a-global": lambda block, y: compiled(y),
    "flex-attention": lambda block, y: attend(y),
    "compiled-flex-attention": lambda block, y: compiled_attention(*3 * (y[:, None],))[:, 0],
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", COMPILED.values(), ids=COMPILED)
def test_compiled_functions_in_a_branch(how, scope):
    model, x = stack(how).eval(), x_of(2, 16, D)
    with torch.no_grad():
        hc = hct.convert(model, x, scope=scope)
        assert len(hc.hc_report.converted) == 2, str(hc.hc_report)
        assert error(hc(x), model(x)) < 1e-5
        assert error(hc(x[:1]), model(x[:1])) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", [flex_attention, compiled_attention], ids=["flex", "compiled-flex"])
def test_a_compiled_function_that_the_model_holds_stays_one_call(how, scope):
    model, x = nn.Sequential(Attending(how), Attending(how)).eval(), x_of(2, 16, D)
    with torch.no_grad():
        hc = hct.convert(model, x, scope=scope)
        graph = hc.graph if scope == "graph" else hct.block_graphs(hc)["0"][0]
        calls = [n for n in graph.nodes if n.op == "call_function" and getattr(n.target, "function", None) is how]
        assert len(calls) == (2 if scope == "graph" else 1), graph
        assert error(hc(x), model(x)) < 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_a_block_that_is_compiled_is_looked_into(scope):
    model, x = stack(lambda block, y: y.relu(), depth=3), x_of()
    model[1] = torch.compile(model[1], backend="eager")
    hc = hct.convert(model, x, scope=scope)
    assert [r.name for r in hc.hc_report.converted] == ["0", "1._orig_mod", "2"]
    assert set(model.state_dict()) <= set(hc.state_dict())
    assert error(hc(x), model(x)) < 1e-5
    torch._dynamo.reset()
    assert error(torch.compile(hc, backend="eager", fullgraph=True)(x), model(x)) < 1e-5


# -- asserts


class Asserting(Block):
    def forward(self, x):
        self.how(x)
        return x + self.f(x)


def asserting(how):
    model = nn.Sequential(Asserting(how), Asserting(how))
    for block in model:
        nn.init.zeros_(block.f.weight)
        nn.init.ones_(block.f.bias)
    return model


@pytest.mark.parametrize("scope", (*SCOPES, "auto"))
@pytest.mark.parametrize("how", ASSERTS, ids=lambda f: f.__name__.replace("_", "-"))
def test_a_failed_assert_stays_the_error_of_the_model(how, scope):
    hc = hct.convert(asserting(how), torch.ones(4, D), scope=scope)
    assert len(hc.hc_report.converted) == 2
    wrong = torch.ones(9, D) if how is on_shape else torch.full((4, D), float("nan"))
    for _ in range(2):
        with pytest.raises(AssertionError, match="sum"):
            hc(wrong)
        assert error(hc(torch.ones(5, D)), hc(torch.ones(5, D))) == 0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", ASSERTS, ids=lambda f: f.__name__.replace("_", "-"))
def test_asserts_on_values_compile(how, scope):
    hc, x = hct.convert(asserting(how), torch.ones(4, D), scope=scope), torch.ones(4, D)
    torch._dynamo.reset()
    assert error(torch.compile(hc, backend="eager", fullgraph=True)(x), hc(x)) < 1e-6


# -- decisions on layout and gradients


class OnLayout(Block):
    def forward(self, x, y):
        x = x + self.f(x)
        return x * 1.5 if y.is_contiguous() else x


class OnGradient(Block):
    def forward(self, x):
        x = x + self.f(x)
        return x * 1.5 if self.how(x) else x


@pytest.mark.parametrize("scope", SCOPES)
def test_decisions_on_layout(scope):
    model, x = OnLayout(None), x_of(D, D)
    hc = hct.convert(model, (x, x), scope=scope)
    for y in (x, x.t(), x):
        assert error(hc(x, y), model(x, y)) < 1e-5


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("stated", [True, False], ids=["grad-mode", "requires-grad"])
def test_decisions_on_gradients(stated, scope):
    model, x = OnGradient(lambda x: torch.is_grad_enabled() if stated else x.requires_grad), x_of()
    hc = hct.convert(model, x, scope=scope)
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            assert error(hc(x), model(x)) < 1e-5
            torch._dynamo.reset()
            assert error(torch.compile(hc, backend="eager", fullgraph=True)(x), model(x)) < 1e-5


# -- forwards that are set on instances


def _wrapper(module):
    old = module.forward

    @functools.wraps(old)
    def forward(x):
        return old(x)

    return forward


REPLACED = {
    "wrapper": _wrapper,
    "partial": lambda module: functools.partial(type(module).forward, module),
    "method": lambda module: types.MethodType(type(module).forward, module),
}


@pytest.mark.parametrize("how", REPLACED.values(), ids=REPLACED)
def test_a_forward_set_on_the_instance(how):
    model, x = stack(lambda block, y: y.relu() if block.training else y.tanh()), x_of()
    for block in model:
        block.forward = how(block)
    hc = check(None, x, "auto", model)
    assert error(hc.train()(x), model.train()(x)) < 1e-5
    assert error(hc.eval()(x), model.eval()(x)) < 1e-5
    with torch.no_grad():
        model[0].f.weight.mul_(2)
    assert error(hc(x), model(x)) < 1e-5
    with pytest.raises(hct.NothingToConvert, match="set on the instance"):
        hct.convert(model, x, scope="blocks")


# -- which scope


class Asked(nn.Sequential):
    def features(self, x):
        return self[0](x)


class Propertied(nn.Sequential):
    @property
    def width(self):
        return D


class Private(nn.Sequential):
    def _init_weights(self):
        pass


@pytest.mark.parametrize(
    ("cls", "stays"),
    [(Asked, True), (Propertied, True), (Private, False), (nn.Sequential, False)],
    ids=["method", "property", "private", "forward-alone"],
)
def test_a_model_that_is_more_than_its_forward_stays_itself(cls, stays):
    model, x = cls(Block(lambda block, y: y), Block(lambda block, y: y)), x_of()
    hc = hct.convert(model, x)
    assert isinstance(hc, cls) is stays
    assert len(hc.hc_report.converted) == len(hct.plan(model, x).residuals) == 2
    assert ("has features" in str(hc.hc_report)) is (cls is Asked)
    assert not isinstance(hct.convert(model, x, scope="graph"), cls)


class Decides(nn.Sequential):
    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        return types.MappingProxyType({"out": super().forward(x)})


def test_plan_falls_back_to_blocks_as_convert_does():
    model, x = Decides(Block(lambda block, y: y), Block(lambda block, y: y)), x_of()
    names = [r.name for r in hct.convert(model, x).hc_report.converted]
    assert [r.name for r in hct.plan(model, x).residuals] == names == ["0", "1"]
    with pytest.raises(hct.HCTransformError):
        hct.plan(model, x, scope="graph")


class Lazy(dict):
    """Loads what it is asked for, as libraries' registries do."""

    def values(self, *args):
        raise AssertionError("loaded")

    items = __getitem__ = get = copy = values


REGISTRY = Lazy(a=1)


class Registered(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if "a" in REGISTRY else x


@pytest.mark.parametrize("scope", SCOPES)
def test_dictionaries_that_load_what_they_are_asked_for_are_not_asked(scope):
    model, x = Registered(Block(lambda block, y: y), Block(lambda block, y: y)), x_of()
    hc = hct.convert(model, x, scope=scope)
    assert error(hc(x), model(x)) < 1e-5


# -- habits of calling


class Named(nn.Sequential):
    def forward(self, x=None, scale=None):
        return super().forward(x)


CALLS = {
    "mapping-as-args": (lambda: hct.convert(named(), {"x": x_of()}), "kwargs="),
    "tensor-as-kwargs": (lambda: hct.convert(named(), kwargs=x_of()), "args="),
    "class-in-include": (lambda: hct.convert(named(), x_of(), include=[Block]), "patterns"),
    "module-in-leaf-modules": (lambda: hct.convert(named(), x_of(), leaf_modules=[nn.ReLU()]), "classes or patterns"),
}


def named():
    return Named(Block(lambda block, y: y), Block(lambda block, y: y))


@pytest.mark.parametrize(("call", "says"), CALLS.values(), ids=CALLS)
def test_calls_that_cannot_be_meant_say_what_to_do(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_default_device_is_not_to_be_meta_alone():
    model, x = named(), x_of()
    with torch.device("meta"), pytest.raises(hct.UnsupportedModel, match="device"):
        hct.convert(model, x)


# -- decisions on how a value lies in memory

LAYOUTS = {
    "contiguous": lambda x: 2.0 if x.is_contiguous() else 0.5,
    "stride": lambda x: float(x.stride(-1) % 3 + 1),
}


class ScaledByLayout(nn.Module):
    """x + s f(x), or f(x) + x, where s goes by the layout of x."""

    def __init__(self, scale, branch_first):
        super().__init__()
        self.f, self.scale, self.branch_first = nn.Linear(D, D), scale, branch_first

    def forward(self, x):
        y = self.scale(x) * self.f(x)
        return y.mT.contiguous().mT + x if self.branch_first else x + y


class Transposed(nn.Module):
    """Blocks on tokens as an embedding of patches leaves them."""

    def __init__(self, *settings):
        super().__init__()
        self.blocks = nn.Sequential(*(ScaledByLayout(*settings) for _ in range(3)))

    def forward(self, x):
        return self.blocks(x.mT)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("connection", ["dynamic", "mhc"])
@pytest.mark.parametrize("branch_first", [False, True], ids=["skip first", "branch first"])
@pytest.mark.parametrize("scale", LAYOUTS.values(), ids=LAYOUTS)
def test_a_decision_on_the_layout_of_a_trunk_value_sees_that_of_the_original(scale, branch_first, connection, scope):
    model, x = Transposed(scale, branch_first), torch.randn(2, D, 5)
    hc = hct.convert(model, x, scope=scope, connection=connection)
    for inputs in (x, torch.randn(3, D, 7), torch.randn(2, 5, D).mT):
        assert error(hc(inputs), model(inputs)) < 1e-5


# -- objects within objects as outputs


class Layer:
    """Keys of one layer, as in a cache of transformers."""

    def __init__(self):
        self.keys = None


class Cache:
    """A list of layers."""

    def __init__(self, depth):
        self.layers = [Layer() for _ in range(depth)]


class Ring:
    """Holds itself."""

    def __init__(self):
        self.own, self.value = self, None


class WithCache(nn.Module):
    """Blocks whose inputs go into an object, which is returned."""

    def __init__(self, make):
        super().__init__()
        self.blocks, self.make = stack(lambda block, y: y), make

    def forward(self, x):
        cache, kept = self.make(), []
        for block in self.blocks:
            kept.append(x)
            x = block(x)
        if isinstance(cache, Cache):
            for layer, value in zip(cache.layers, kept, strict=True):
                layer.keys = value
        else:
            cache.value = x
        return x, cache


@pytest.mark.parametrize("scope", SCOPES)
def test_values_in_an_object_within_an_object_are_those_of_the_call(scope):
    model, x = WithCache(lambda: Cache(2)), x_of()
    hc = hct.convert(model, x, scope=scope)
    for inputs in (x, x_of(2, D)):
        cache, expected = hc(inputs)[1], model(inputs)[1]
        assert type(cache) is Cache
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            assert type(layer) is Layer
            assert error(layer.keys, other.keys) < 1e-5


def test_an_object_that_holds_itself_and_a_traced_value_is_refused_as_a_graph():
    with pytest.raises(hct.HCTransformError):
        hct.convert(WithCache(Ring), x_of(), scope="graph")
    assert len(hct.convert(WithCache(Ring), x_of(), scope="auto").hc_report.converted) == 2


# -- scripted and traced modules in a branch


def _traced(module):
    return torch.jit.trace(module, torch.randn(4, D))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("compiled", [torch.jit.script, _traced], ids=["scripted", "traced"])
def test_a_scripted_module_in_a_branch_is_called_as_it_is(compiled, scope):
    model = stack(lambda block, y: y)
    for block in model:
        block.f = compiled(block.f)
    check(None, x_of(), scope, model)


# -- flags in buffers, numbers of numpy, operations that give back what they are given


class Flagged(nn.Module):
    """Asks a buffer for its truth, as code that is set up by its first call does."""

    def __init__(self, asks):
        super().__init__()
        self.f, self.asks = nn.Linear(8, 8), asks
        self.register_buffer("ready", torch.tensor(True))

    def forward(self, x):
        return x + self.f(x) if self.asks(self.ready) else x - self.f(x)


ASKS = {
    "truth": lambda b: True if b else False,
    "not": lambda b: not (not b),
    "bool": bool,
    "text": lambda b: "True" in f"{b}",
    "any": lambda b: b.any(),
}


@pytest.mark.parametrize("scope", ["graph", "blocks"])
@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_buffers_are_asked_for_their_truth(asks, scope):
    model, x = Flagged(asks), torch.randn(2, 8)
    hc = hct.convert(model, (x,), scope=scope)
    assert len(hc.hc_report.converted) == 1
    torch.testing.assert_close(hc(x), model(x))
    if asks is not ASKS["text"]:  # what a text says of a tensor is not asked again
        hc.ready.fill_(False)  # which the copy shares
        assert not model.ready
        torch.testing.assert_close(hc(x), model(x))


class Numbers(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.f, self.scale = nn.Linear(8, 8), scale

    def forward(self, x):
        return x + self.f(x) * self.scale(x)


SCALES = {
    "float64": lambda x: np.float64(0.5),
    "float32": lambda x: np.float32(3),
    "root": lambda x: 1 / np.sqrt(8),
    "root of a size": lambda x: np.sqrt(x.shape[-1]),
    "product of a shape": lambda x: float(np.prod(x.shape)),
    "entry of an array": lambda x: np.linspace(0.1, 0.9, 3)[1],
}


@pytest.mark.parametrize("scope", ["graph", "blocks"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_numbers_of_numpy(scale, scope):
    model = Numbers(scale)
    hc = hct.convert(model, (torch.randn(2, 8),), scope=scope)
    for size in (2, 5):
        x = torch.randn(size, 8)
        torch.testing.assert_close(hc(x), model(x))


class GivenBack(nn.Module):
    """Hands a value to one reader as it is and to another through what does nothing to it, as LoRA's layers do."""

    def __init__(self, through):
        super().__init__()
        self.a, self.b, self.through = nn.Linear(8, 8), nn.Linear(8, 8), through

    def forward(self, x):
        return self.b(x) + self.a(self.through(x))


class AroundGivenBack(nn.Module):
    def __init__(self, through):
        super().__init__()
        self.q = GivenBack(through)

    def forward(self, x):
        return x + self.q(x)


THROUGH = {
    "to": lambda x: x.to(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
    "as_tensor": torch.as_tensor,
    "view": lambda x: x.view(x.shape),
}


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_what_gives_back_its_operand_is_that_operand(through):
    torch.manual_seed(0)
    model, x = nn.Sequential(*[AroundGivenBack(through) for _ in range(3)]), torch.randn(2, 8)
    graph, blocks = (hct.convert(model, (x,), scope=scope) for scope in ("graph", "blocks"))
    assert [r.name for r in blocks.hc_report.converted] == [r.name for r in graph.hc_report.converted]
    assert len({r.trunk for r in blocks.hc_report.converted}) == 1 and len(blocks.hc_report.converted) == 3
    moved(graph, 0.1)
    blocks.load_state_dict(graph.state_dict())
    torch.testing.assert_close(graph(x), blocks(x))
