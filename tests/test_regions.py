"""Regional compilation: where a graph is cut, what is shared, and that the results stay the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from checks import error, wake
from models import GPT, ResNet, ViT
from torch import nn
from torch._dynamo.testing import CompileCounter

import hc_transform as hct
from hc_transform.running.regions import region_of, repeating_parts


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Linear(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.a(x) * self.b(x).sigmoid())


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


STACKS = {
    "one kind": (lambda: [Linear() for _ in range(8)], 3),
    "two kinds in turn": (lambda: [block for _ in range(6) for block in (Linear(), Gated())], 3),
    "two halves": (lambda: [*(Linear() for _ in range(8)), *(Gated() for _ in range(8))], 4),
    "sizes differ": (lambda: [Linear(8 + i) for i in range(4)], 1),
    "one block": (lambda: [Linear()], 1),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def compiled_pieces(hc, *inputs, **settings):
    """Run ``hc`` in regions and return its output and the number of pieces that a compiler was given."""
    counter = CompileCounter()
    output = hct.compile_regions(hc, backend=counter, **settings)(*inputs)
    return output, counter.frame_count


def same_in_regions(hc, *inputs, **settings):
    """Compare output and gradients before and after ``hc`` is compiled in regions; return the output before."""
    parameters = list(hc.parameters())
    reference = first(hc(*inputs))
    expected = torch.autograd.grad(reference.float().square().mean(), parameters)
    output = first(hct.compile_regions(hc, **settings)(*inputs))
    assert error(output, reference) <= 1e-5
    for a, b in zip(torch.autograd.grad(output.float().square().mean(), parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    return reference


@pytest.mark.parametrize(("blocks", "pieces"), STACKS.values(), ids=STACKS.keys())
def test_equal_regions_are_compiled_once(blocks, pieces):
    x = torch.randn(2, 5, 8)
    hc = hct.convert(wake(Stack(*blocks())), (x,), connection="dynamic", scope="graph").eval()
    reference = hc(x)
    output, count = compiled_pieces(hc, x, fullgraph=True)
    assert error(output, reference) <= 1e-6
    assert count == pieces
    _, again = compiled_pieces(hc, torch.randn(2, 5, 8))
    assert again == pieces, "settings given anew replace those before"


@pytest.mark.parametrize("connection", ["dynamic", "static"])
def test_parts_are_the_nodes_in_their_order_and_begin_with_writes(connection):
    x = torch.randn(2, 5, 8)
    hc = hct.convert(Stack(*(Linear() for _ in range(6))), (x,), connection=connection, scope="graph")
    nodes = [node for node in hc.graph.nodes if node.op not in ("placeholder", "output")]
    parts = repeating_parts(nodes, hc)
    assert [node for part in parts for node in part] == nodes
    assert all(part[0].target is hct.write for part in parts[1:])
    regions = [region_of(part, hc) for part in parts]
    assert len({region.kind(hc) for region in regions}) == 3
    given = [[node.name.rpartition("_")[2] for node in region.outputs] for region in regions[:-1]]
    handed_on = ["write", "coefficients", "fc"] if connection == "dynamic" else ["write", "fc"]  # else made there again
    assert given == [handed_on] * (len(parts) - 1)
    assert all(region.graph.lint() is None for region in regions)


@pytest.mark.parametrize("scope", ["graph", "blocks"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (GPT, (torch.randint(0, 65, (2, 16)), torch.randint(0, 65, (2, 16)))),
        (ViT, (torch.randn(2, 1, 8, 8),)),
        (ResNet, (torch.randn(2, 1, 8, 8),)),
    ],
    ids=["gpt", "vit", "resnet"],
)
def test_whole_models(model, inputs, scope):
    hc = hct.convert(wake(model()), inputs, connection="mhc", scope=scope).eval()
    with torch.no_grad():
        for parameter in hc.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    reference = same_in_regions(hc, *inputs, backend="aot_eager")
    with torch.no_grad():
        assert error(first(hc(*inputs)), reference) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc"])
def test_inductor(connection):
    tokens = torch.randint(0, 65, (2, 16))
    hc = hct.convert(wake(GPT()), (tokens, tokens), connection=connection, scope="graph").eval()
    same_in_regions(hc, tokens, tokens, fullgraph=True)


def test_modes_and_random_draws_are_those_of_eager_mode():
    x = torch.randn(2, 5, 8)
    hc = hct.convert(wake(Stack(*(Gated() for _ in range(6)))), (x,), scope="graph").train()
    regional = hct.compile_regions(copy.deepcopy(hc), backend="eager")
    for training in (True, False, True):
        outputs = []
        for model in (hc, regional):
            torch.manual_seed(1)
            outputs.append(model.train(training)(x))
        assert torch.equal(*outputs)


def test_state_copies_and_pickles():
    x = torch.randn(2, 5, 8)
    hc = hct.convert(wake(Stack(*(Linear() for _ in range(6)))), (x,), scope="graph").eval()
    keys, reference = list(hc.state_dict()), hc(x)
    hct.compile_regions(hc, backend="eager")
    assert list(hc.state_dict()) == keys
    for other in (copy.deepcopy(hc), pickle.loads(pickle.dumps(hc))):
        assert error(other(x), reference) <= 1e-6
        with torch.no_grad():
            other.head.bias += 1
        assert error(other(x), reference + 1) <= 1e-6, "the copy runs on its own modules"
    hc.head = nn.Linear(8, 4)
    assert hc(x).shape == (2, 5, 4), "modules are looked up at each call"


def test_compilers_and_exporters_see_the_whole_model():
    x = torch.randn(2, 5, 8)
    hc = hct.convert(wake(Stack(*(Linear() for _ in range(6)))), (x,), scope="graph").eval()
    reference = hc(x)
    hct.compile_regions(hc, backend="eager")
    counter = CompileCounter()
    assert error(torch.compile(hc, backend=counter, fullgraph=True)(x), reference) <= 1e-6
    assert counter.frame_count == 1
    assert error(torch.export.export(hc, (x,)).module()(x), reference) <= 1e-6


class Padded(nn.Module):
    """Decides on the size of its input."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(*(Linear() for _ in range(6)))

    def forward(self, x, mask=None):
        if x.shape[1] % 2:
            x = nn.functional.pad(x, (0, 0, 0, 1))
        if mask is not None:
            x = x * mask
        return self.stack(x)


def test_a_decision_that_changes_is_traced_again_and_compiled():
    x, odd = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    model = wake(Padded())
    hc = hct.convert(model, (x,), scope="graph").eval()
    counter = CompileCounter()
    hct.compile_regions(hc, backend=counter, fullgraph=True)
    hc(x)
    before = counter.frame_count
    assert error(hc(odd), model.eval()(odd)) <= 1e-5
    assert error(hc(x, mask=odd[:, :4]), model(x, odd[:, :4])) <= 1e-5
    assert counter.frame_count > before


def test_converted_parts_of_a_larger_model():
    x = torch.randn(2, 5, 8)
    whole = nn.Sequential(nn.Linear(8, 8), hct.convert(Stack(*(Linear() for _ in range(6))), (x,), scope="graph"))
    reference = whole(x)
    output, count = compiled_pieces(whole, x)
    assert error(output, reference) <= 1e-6 and count == 3


def test_a_model_that_was_not_converted_is_refused():
    with pytest.raises(hct.UnsupportedModel, match="Stack has no converted module to compile. Convert it with"):
        hct.compile_regions(Stack(Linear()))
