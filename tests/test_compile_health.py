"""What a compiler needs of a converted model: few compilations, no host synchronisation, export."""

from __future__ import annotations

import os

import pytest
import torch
from checks import connection_parameters, error, wake
from models import GPT, Chain, ViT
from torch import fx, nn
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import aot_module_simplified

import hc_transform as hct
from hc_transform.connections import base

# Compiled code for GPUs makes coefficients as single numbers of a token, that for CPUs packed.
FORMS = pytest.mark.parametrize("packed_devices", [(), ("cpu",)], ids=["numbers", "packed"])

HOST = ("_local_scalar_dense", "nonzero", "masked_select", "aten.item", "aten.unique", "bincount")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Stack(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.sin()


def graphs_of(model, inputs):
    """Return the graphs of operators, forward and backward, that a compiler is given."""
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm.graph)
        return gm.forward

    def backend(gm, example_inputs):
        return aot_module_simplified(gm, example_inputs, fw_compiler=keep, bw_compiler=keep)

    outputs = torch.compile(model, fullgraph=True, backend=backend)(*inputs)
    if outputs.requires_grad:
        outputs.sum().backward()
    return graphs


@FORMS
@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_nothing_waits_for_the_host(connection, packed_devices, monkeypatch):
    """CUDA graphs replay what was launched: no operator may look at a value or have a size that depends on one."""
    monkeypatch.setattr(base, "PACKED_DEVICES", packed_devices)
    x = torch.randn(2, 5, 8)
    hc = hct.convert(wake(Chain(lambda x, f, i: x + f, 2)), (x,), connection=connection).train()
    graphs = graphs_of(hc, (x,))
    assert len(graphs) == 2
    for graph in graphs:
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert targets and not [t for t in targets if any(name in t for name in HOST)]
        assert not [n for n in graph.nodes if isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat))]


@FORMS
@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_compiled_gradients_are_those_of_eager_mode(connection, packed_devices, monkeypatch):
    """The numbers of a compiled model are made one by one, with backward passes of their own."""
    monkeypatch.setattr(base, "PACKED_DEVICES", packed_devices)
    model = Chain(lambda x, f, i: x + f, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    hc = hct.convert(model, (x,), connection=connection).train()
    with torch.no_grad():
        for parameter in connection_parameters(hc):
            parameter.add_(0.3 * torch.randn_like(parameter))
    parameters = list(hc.parameters())
    weight = torch.randn_like(x)
    ours = torch.compile(hc, fullgraph=True, backend="aot_eager")(x)
    theirs = hc(x)
    assert error(ours, theirs) <= 1e-12
    for a, b in zip(
        torch.autograd.grad(ours, parameters, weight), torch.autograd.grad(theirs, parameters, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@FORMS
@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc"])
def test_inference_leaves_out_what_training_needs(connection, packed_devices, monkeypatch):
    monkeypatch.setattr(base, "PACKED_DEVICES", packed_devices)
    x = torch.randn(2, 5, 8)
    hc = hct.convert(wake(Chain(lambda x, f, i: x + f)), (x,), connection=connection).eval()
    with torch.no_grad():
        (graph,) = graphs_of(hc, (x,))
    targets = [str(node.target) for node in graph.nodes]
    assert not [t for t in targets if "clone" in t]
    assert len([t for t in targets if "by_feature" in t]) <= 3, "once a residual"
    (result,) = graph.output_node().args[0]
    assert result.meta["val"].shape == x.shape, "nothing is kept for a backward pass"


def test_new_lengths_and_batches_do_not_compile_again():
    hc = hct.convert(wake(GPT()), (torch.zeros(2, 16).long(), torch.zeros(2, 16).long()), connection="static").train()
    counter = CompileCounter()
    compiled = torch.compile(hc, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((2, 16), (3, 16), (3, 20), (5, 11)):
        x = torch.randint(0, 65, (batch, length))
        assert error(compiled(x, x), hc(x, x)) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc"])
def test_blocks_share_compiled_code(connection):
    """Regional compilation: the first block is given a tensor, the last one gives one, all others are alike."""
    x = torch.randn(2, 5, 8)
    hc = hct.convert(wake(Stack(6)), (x,), connection=connection, scope="blocks").train()
    reference = hc(x)
    counter = CompileCounter()
    for block in hc.blocks:
        block.compile(backend=counter, fullgraph=True)
    assert error(hc(x), reference) <= 1e-6
    assert counter.frame_count == 3


@FORMS
@pytest.mark.parametrize("connection", hct.CONNECTIONS)
def test_export(connection, packed_devices, monkeypatch):
    """An exported program holds nothing but operators of torch, so that it can be loaded where this package is not."""
    monkeypatch.setattr(base, "PACKED_DEVICES", packed_devices)
    x = torch.randn(2, 1, 8, 8)
    model = wake(ViT()).eval()
    hc = hct.convert(model, (x,), connection=connection).eval()
    exported = torch.export.export(hc, (x,))
    assert error(exported.module()(x), model(x)) <= 1e-5
    graphs = [module.graph for module in exported.graph_module.modules() if isinstance(module, fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert "aten.add.Tensor" in targets and not [target for target in targets if target.startswith("hc_transform")]


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc"])
def test_package(connection, tmp_path):
    x = torch.randn(2, 1, 8, 8)
    model = wake(ViT()).eval()
    hc = hct.convert(model, (x,), connection=connection).eval()
    with torch.no_grad():
        exported = torch.export.export(hc, (x,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        assert error(torch._inductor.aoti_load_package(path)(x), model(x)) <= 1e-5


def processor_seconds():
    """Return the time of this process and those it started: other work on the machine does not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def seconds_to_compile(model, x):
    """Return the processor time of compiling forward and backward, caches cold, compilers started before."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache(), config.patch(compile_threads=1):
        start = processor_seconds()
        model(x).sum().backward()
        return processor_seconds() - start


@pytest.mark.slow
@pytest.mark.parametrize("depth", [12, 24])
def test_compile_time(depth):
    """Forward and backward of a ViT on the CPU: how much longer compiling the converted model takes.

    In regions it is at most 2.5 times the plain model as a whole. As a whole it is more: of a plain
    model's equal blocks the compiler does most of the work once.
    """
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 32, 32)
    small = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1)
    seconds_to_compile(torch.compile(small, fullgraph=True), x)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=depth)
    plain = seconds_to_compile(torch.compile(model, fullgraph=True), x)
    ratios = {}
    for connection in ("static", "dynamic", "mhc"):
        for scope in ("graph", "blocks"):
            hc = hct.convert(model, (x,), connection=connection, scope=scope, verify=False).train()
            hc(x)
            if scope == "graph":
                ratios[connection, "whole"] = seconds_to_compile(torch.compile(hc, fullgraph=True), x) / plain
            hct.compile_regions(hc, fullgraph=True)
            ratios[connection, f"regions, {scope}"] = seconds_to_compile(hc, x) / plain
    print(f"{depth} blocks, plain {plain:.1f} s; {', '.join(f'{c} {s} {r:.2f}' for (c, s), r in ratios.items())}")
    for (_, how), ratio in ratios.items():
        assert ratio <= (6 if how == "whole" else 2.5)
