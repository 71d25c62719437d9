"""Graphs that other tools made: torch.export, decomposed or not, Dynamo, symbolic traces."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from checks import error, moved, seeded
from exported_zoo import NAMES, check
from torch import fx, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

import hc_transform as hct

D = 8


@dataclass
class Output:
    value: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


pytree.register_dataclass(Output)


class PreNorm(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(D), nn.Dropout(dropout)
        self.attn = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.gamma = nn.Parameter(torch.full((D,), 0.7))

    def forward(self, x):
        x = x + self.dropout(self.attn(self.norm(x)))
        return x + self.gamma * self.mlp(self.norm(x))


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.norm, self.dropout = nn.Linear(D, D), nn.LayerNorm(D), nn.Dropout(0.3)

    def forward(self, x):
        return self.dropout(F.gelu(self.norm(x + self.f(x))))


class Basic(nn.Module):
    """A basic block of a ResNet, written over its values."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = (
            nn.Conv2d(D, D, 3, padding=1, bias=False),
            nn.BatchNorm2d(D),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class Downsampled(nn.Module):
    """A projection shortcut between two basic blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.last = Basic(), Basic()
        self.project = nn.Sequential(nn.Conv2d(D, D, 1, 2), nn.BatchNorm2d(D))
        self.branch = nn.Sequential(
            nn.Conv2d(D, D, 3, 2, 1), nn.BatchNorm2d(D), nn.ReLU(), nn.Conv2d(D, D, 3, padding=1)
        )

    def forward(self, x):
        x = self.first(x)
        x = F.relu(self.branch(x) + self.project(x))
        return self.last(x)


class BatchNormed(nn.Module):
    """A batch norm between residuals: it is carried, and its statistics are those of one stream."""

    def __init__(self):
        super().__init__()
        self.f, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, x):
        return self.norm(x + self.f(x))


class Reshaped(nn.Module):
    """Images to tokens and back between the residuals, with sizes of the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.f = nn.Conv2d(D, D, 1), nn.Linear(D, D)

    def forward(self, x):
        b, c, h, w = x.shape
        x = x + self.conv(x)
        x = x.flatten(2).transpose(1, 2).reshape(b, h * w, c) * 0.5
        x = x + self.f(x)
        return x.permute(0, 2, 1).reshape(b, c, h, w)


def stack(block, depth=2, *args):
    torch.manual_seed(0)
    return nn.Sequential(*(block(*args) for _ in range(depth)))


TOKENS, IMAGES = torch.randn(4, 5, D), torch.randn(4, D, 6, 6)
ROWS = torch.randn(6, D)
BLOCKS = {
    "pre-norm": (lambda: stack(PreNorm), TOKENS, 4),
    "pre-norm with dropout": (lambda: stack(PreNorm, 2, 0.2), TOKENS, 4),
    "post-norm": (lambda: stack(PostNorm), TOKENS, 2),
    "basic": (lambda: stack(Basic), IMAGES, 2),
    "batch norm": (lambda: stack(BatchNormed), ROWS, 2),
    "reshaped": (lambda: stack(Reshaped), IMAGES, 4),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True), TOKENS, 2),
}
FORMS = {
    "exported": lambda program: program,
    "functional": lambda program: program.run_decompositions({}),
    "decomposed": lambda program: program.run_decompositions(),
}


def close(a, b, bound=1e-5):
    assert error(a, b) <= bound


def state_after(model, x):
    """Return buffers after one seeded call, and put them back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seeded(model, (x,), {})
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return after


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_program_has_the_residuals_of_the_model(name, training, form):
    make, x, count = BLOCKS[name]
    model = make().train(training)
    converted = hct.convert(model, (x,), scope="graph")
    program = FORMS[form](export(model, (x,)))
    hc = hct.convert(program)
    ours, theirs = ([(r.name, r.trunk) for r in m.hc_report.converted] for m in (hc, converted))
    assert len(ours) == count and [n for n, _ in ours] == [n for n, _ in theirs]
    if form == "exported":
        assert ours == theirs
        assert [r.location for r in hc.hc_report.converted] == [r.location for r in converted.hc_report.converted]
    assert hc.hc_report.max_error <= 1e-6
    close(seeded(hc, (x,), {}), seeded(model, (x,), {}))
    for key, value in state_after(model, x).items():
        torch.testing.assert_close(state_after(hc, x)[key], value)
    if ours == theirs:
        close(seeded(moved(hc, 0.05, seed=3), (x,), {}), seeded(moved(converted, 0.05, seed=3), (x,), {}), 1e-4)
        assert error(seeded(hc, (x,), {}), seeded(model, (x,), {})) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_gradients_and_keys_are_those_of_the_model(form):
    model = stack(PreNorm)
    hc = hct.convert(FORMS[form](export(model, (TOKENS,))))
    added = {key for key in hc.state_dict() if "hyper_connections." in key}
    assert set(hc.state_dict()) - added == set(model.state_dict()) and added
    gradients = []
    for m in (hc, model):
        m.zero_grad()
        m(TOKENS).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in m.named_parameters() if n in model.state_dict()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-4)
    assert any(p.grad.any() for n, p in hc.named_parameters() if n in added)
    hc.load_state_dict(stack(PreNorm).state_dict(), strict=False)


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = stack(PreNorm)
        self.register_buffer("table", torch.randn(D), persistent=False)

    def forward(self, pair, *, scale=None, more):
        a, b = pair
        x = self.blocks(a + b["b"] + self.table)
        if scale is not None:
            x = x * scale
        return {"y": x, "parts": (a, [x + more[0]]), "output": Output(x * 2, (a, x))}


def test_inputs_and_outputs_keep_their_structure():
    model = Structured()
    args = ((TOKENS, {"b": TOKENS * 2}),)
    kwargs = {"more": [TOKENS.clone()], "scale": torch.tensor(2.0)}
    hc = hct.convert(export(model, args, kwargs))
    assert len(hc.hc_report.converted) == 4 and "table" not in hc.state_dict()
    again = hct.convert(export(model, ((TOKENS, {"b": TOKENS.clone(), "c": TOKENS.clone()}),), kwargs), verify=False)
    close(again((TOKENS, {"c": TOKENS, "b": TOKENS * 2}), **kwargs)["y"], model(*args, **kwargs)["y"])
    for given in (kwargs, dict(reversed(kwargs.items()))):
        found, expected = hc(*args, **given), model(*args, **given)
        assert type(found["output"]) is Output and pytree.tree_structure(found) == pytree.tree_structure(expected)
        close(found, expected)
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        hc(TOKENS, TOKENS)
    assert hc.hc_report.max_error <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_dynamic_sizes_stay_dynamic_and_bounded(form):
    model = stack(Reshaped)
    sizes = {0: Dim("batch", min=2, max=16), 2: Dim("height", max=32)}
    program = FORMS[form](export(model, (IMAGES,), dynamic_shapes=(sizes,)))
    hc = hct.convert(program)
    for shape in ((3, D, 6, 6), (7, D, 9, 6)):
        x = torch.randn(shape)
        close(hc(x), model(x))
    with pytest.raises((AssertionError, RuntimeError), match="16|batch|shape"):
        hc(torch.randn(20, D, 6, 6))


class Chosen(nn.Module):
    """The number of rows is a value of the input, which the model states a bound for."""

    def __init__(self):
        super().__init__()
        self.blocks = stack(PreNorm)

    def forward(self, x, count):
        n = count.item()
        torch._check(n >= 2)
        torch._check(n < x.shape[0])
        return self.blocks(x[:n])


def test_assertions_on_sizes_survive():
    model = Chosen()
    program = export(model, (TOKENS, torch.tensor(3)), dynamic_shapes={"x": {0: Dim("rows", min=3)}, "count": None})
    hc = hct.convert(program)
    asserts = [n for n in program.graph.nodes if "assert" in str(n.target)]
    assert len(hc.hc_report.converted) == 4 and asserts
    assert len([n for n in hc.graph.nodes if "assert" in str(n.target)]) >= len(asserts)
    close(hc(TOKENS, torch.tensor(2)), model(TOKENS, torch.tensor(2)))
    with pytest.raises(RuntimeError):
        hc(TOKENS, torch.tensor(1))


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_of_a_program_takes_its_parameters_as_inputs(form):
    model = stack(PreNorm).double()
    program = FORMS[form](export(model, (TOKENS.double(),)))
    findings = hct.find_residuals(program.graph_module)
    assert [r.name for r in findings.residuals] == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    plan = hct.make_plan(program.graph_module, findings, hct.Options(num_streams=3))
    made = hct.rewrite(program.graph_module, plan)
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    flat = [program.state_dict[s.target] if s.target else TOKENS.double() for s in program.graph_signature.input_specs]
    (found,) = made(*flat)
    close(found, model(TOKENS.double()), 1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_of_dynamo_is_rewritten_by_a_backend(dynamic):
    torch._dynamo.reset()
    model, plain, made = stack(PreNorm, 2, 0.2), stack(PreNorm, 2, 0.2), []

    def backend(gm, example_inputs):
        plan = hct.make_plan(gm, hct.find_residuals(gm), hct.Options(num_streams=4))
        made.append((plan, hct.rewrite(gm, plan)))
        return made[-1][1]

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    close(seeded(compiled, (TOKENS,), {}), seeded(plain, (TOKENS,), {}))
    ((plan, rewritten),) = made
    report = plan.report
    expected = hct.convert(plain, (TOKENS,), scope="graph").hc_report
    assert [(r.name, r.location, r.trunk) for r in report.converted] == [
        (r.name, r.location, r.trunk) for r in expected.converted
    ]
    assert len(list(rewritten.parameters())) > 0
    before = seeded(compiled, (TOKENS,), {})
    moved(rewritten, 0.05, seed=3)
    assert error(seeded(compiled, (TOKENS,), {}), before) > 1e-3
    torch._dynamo.reset()


def test_a_batch_norm_of_dynamo_keeps_the_statistics_of_one_stream():
    torch._dynamo.reset()
    model, plain = stack(BatchNormed), stack(BatchNormed)
    rewritten = []

    def backend(gm, example_inputs):
        plan = hct.make_plan(gm, hct.find_residuals(gm), hct.Options(num_streams=4))
        rewritten.append(plan)
        return hct.rewrite(gm, plan)

    close(torch.compile(model, backend=backend, fullgraph=True)(ROWS), plain(ROWS))
    assert len(rewritten[0].trunks) == 1
    for (_, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = stack(PreNorm)

    def forward(self, inputs):
        return {"y": self.blocks(inputs["x"])}


def test_a_symbolic_trace_keeps_its_structure():
    gm = fx.symbolic_trace(Named(), concrete_args={"inputs": {"x": fx.PH}})
    plan = hct.make_plan(gm, hct.find_residuals(gm), hct.Options(num_streams=2, connection="static"))
    assert len(plan.residuals) == 4
    close(hct.rewrite(gm, plan)({"x": TOKENS}), gm({"x": TOKENS}))


def test_a_saved_program_reads_alike(tmp_path):
    program = export(stack(PreNorm), (TOKENS,))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = hct.convert(torch.export.load(tmp_path / "program.pt2"))
    assert loaded.hc_report.residuals == hct.convert(program).hc_report.residuals


def test_a_graph_of_make_fx_is_rewritten():
    from torch.fx.experimental.proxy_tensor import make_fx

    model = stack(PreNorm)
    gm = make_fx(model)(TOKENS)
    plan = hct.make_plan(gm, hct.find_residuals(gm), hct.Options(num_streams=2))
    assert len(plan.residuals) == 4
    close(hct.rewrite(gm, plan)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("form", FORMS)
def test_shortcuts_are_carried(form):
    model = Downsampled().eval()
    hc = hct.convert(FORMS[form](export(model, (IMAGES,))), shortcuts="carry")
    assert [r.trunk for r in hc.hc_report.converted] == [0, 0] and hc.hc_report.max_error <= 1e-6
    close(hc(IMAGES), model(IMAGES))


def test_a_strict_export_reads_alike():
    model = stack(PreNorm)
    reports = [hct.convert(export(model, (TOKENS,), strict=strict)).hc_report for strict in (False, True)]
    assert reports[0].residuals == reports[1].residuals and len(reports[0].converted) == 4


def test_the_module_of_a_program_converts_as_the_program():
    model = stack(PreNorm)
    program = export(model, (TOKENS,))
    hc = hct.convert(program.module(), (TOKENS,))
    assert hc.hc_report.residuals == hct.convert(program).hc_report.residuals
    assert hct.plan(program).report.residuals[0].name == "0.attn"
    unverified = hct.convert(program.module())
    assert unverified.hc_report.max_error is None and "Not verified" in str(unverified.hc_report)
    with pytest.raises(hct.UnsupportedModel, match="converted already"):
        hct.convert(hc, (TOKENS,))


def test_copies_and_compiled_code_are_the_same():
    torch._dynamo.reset()
    hc = moved(hct.convert(export(stack(PreNorm), (TOKENS,))))
    again = copy.deepcopy(hc)
    assert again.hc_report == hc.hc_report
    close(again(TOKENS), hc(TOKENS))
    close(torch.compile(hc, backend="aot_eager", fullgraph=True)(TOKENS), hc(TOKENS))
    close(export(hc, (TOKENS,)).module()(TOKENS), hc(TOKENS))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {"connection": "mhc"},
        {"connection": "frac"},
        {"readout": "learned"},
        {"stream_embedding": True, "num_streams": 2},
        {"init": "mirrored"},
        {"recompute": True},
        {"nested": "all"},
        {"stream_dropout": 0.1},
        {"include": ["1.*"]},
        {"num_streams": 1},
    ],
)
@pytest.mark.parametrize("form", ["exported", "decomposed"])
def test_options_are_those_of_convert(options, form):
    model = stack(PreNorm).eval()
    hc = hct.convert(FORMS[form](export(model, (TOKENS,))), **options)
    expected = hct.convert(model, (TOKENS,), scope="graph", **options).hc_report
    assert [(r.name, r.trunk, r.parameters) for r in hc.hc_report.residuals] == [
        (r.name, r.trunk, r.parameters) for r in expected.residuals
    ]
    assert hc.hc_report.parameters == expected.parameters
    if not options.get("stream_dropout"):
        close(hc(TOKENS), model(TOKENS))


def test_what_needs_python_is_refused():
    program = export(stack(PreNorm), (TOKENS,))
    for options in (
        {"scope": "blocks"},
        {"inplace": True},
        {"share_calls": True},
        {"leaf_modules": ["0"]},
        {"inline_modules": ["0"]},
        {"wrap_functions": [F.gelu]},
    ):
        with pytest.raises(hct.UnsupportedModel, match="before it is exported"):
            hct.convert(program, **options)
    with pytest.raises(hct.TraceError, match="itself fails"):
        hct.convert(program, (TOKENS[:, :2],))
    with pytest.raises(hct.UnsupportedModel, match="unflattened"):
        hct.convert(torch.export.unflatten(program), (TOKENS,))
    with pytest.raises(hct.NothingToConvert):
        hct.convert(export(nn.Linear(D, D), (ROWS,)))


class Overwritten(nn.Module):
    """Writes into a row of the trunk value, which later readers see."""

    def __init__(self):
        super().__init__()
        self.a, self.b = PreNorm(), PreNorm()

    def forward(self, x):
        x = self.a(x)
        x[:, 0] += 1
        return self.b(x)


def test_writes_into_memory_with_several_names_are_seen():
    model = Overwritten()
    program = export(model, (TOKENS,))
    gm = program.module()
    findings = hct.find_residuals(gm)
    assert hct.Reason.SHARED_MEMORY in {s.reason for s in findings.skipped}
    plan = hct.make_plan(gm, findings, hct.Options(num_streams=2))
    assert 0 < len(plan.residuals) < 4
    close(hct.rewrite(gm, plan)(TOKENS), model(TOKENS))
    hc = hct.convert(program)
    assert len(hc.hc_report.converted) == 4
    close(hc(TOKENS), model(TOKENS))


class Accumulating(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = stack(PreNorm)

    def forward(self, x):
        x += self.blocks(x)
        return x.relu()


def test_inputs_that_the_program_overwrites_are_overwritten():
    model = Accumulating()
    ours, theirs = TOKENS.clone(), TOKENS.clone()
    hc = hct.convert(export(model, (TOKENS.clone(),)))
    close(hc(ours), model(theirs))
    close(ours, theirs)


class Regions(nn.Module):
    """Residuals in code that runs under autocast of its own stay what they are, and are listed."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner = PreNorm(), PreNorm()

    def forward(self, x):
        x = self.outer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.inner(x)
        return x


def test_residuals_in_regions_are_listed():
    program = export(Regions(), (TOKENS,))
    hc = hct.convert(program)
    inside = [r for r in hc.hc_report.skipped if hct.Reason.OPAQUE.value in r.reason]
    assert len(hc.hc_report.converted) == 2
    assert [r.name for r in inside] == ["inner.attn", "inner.mlp"] and all(
        "test_exported.py" in r.location for r in inside
    )


# -- unknown dialects


@torch.library.custom_op("hct_test::block", mutates_args=())
def custom_block(x: torch.Tensor) -> torch.Tensor:
    return x + x.roll(1)


@custom_block.register_fake
def _(x):
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self, mixed):
        super().__init__()
        self.f = nn.Linear(D, D) if mixed else None

    def forward(self, x):
        x = torch.ops.hct_test.block.default(torch.ops.hct_test.block.default(x))
        return x if self.f is None else x + self.f(x)


def test_custom_operators_alone_are_an_unknown_dialect():
    with pytest.raises(hct.UnknownDialect, match="hct_test::block|hct_test.block"):
        hct.convert(export(Custom(False), (ROWS,)))
    assert len(hct.convert(export(Custom(True), (ROWS,))).hc_report.converted) == 1


def test_primitives_are_an_unknown_dialect():
    from torch._refs import add, mul, tanh
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x, w):
        return add(x, tanh(mul(x, w)))

    primitive = make_fx(function, decomposition_table={torch.ops.aten.add.Tensor: add})(ROWS, ROWS)
    assert any("prims" in str(n.target) for n in primitive.graph.nodes)
    with pytest.raises(hct.UnknownDialect, match="primitives") as refused:
        hct.find_residuals(primitive)
    assert "torch.export" in str(refused.value)


def _single(target, *more):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = ROWS
    node = graph.call_function(target, (x, *(x if m is None else m for m in more)))
    node.meta["val"] = ROWS
    graph.output((node,))
    return fx.GraphModule({}, graph)


def test_quantized_operators_are_an_unknown_dialect():
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    with pytest.raises(hct.UnknownDialect, match="quantized"):
        hct.find_residuals(
            _single(torch.ops.quantized_decomposed.quantize_per_tensor.default, 0.1, 0, -128, 127, torch.int8)
        )
    with pytest.raises(hct.UnknownDialect, match="quantized"):
        hct.find_residuals(_single(torch.ops.quantized.add, None, 0.1, 0))


def test_operators_of_another_tool_are_an_unknown_dialect():
    class EdgeOperator:
        _schema = torch.ops.aten.add.Tensor._schema
        __name__ = "aten.add.Tensor"

        def __call__(self, x, y):
            return x + y

    with pytest.raises(hct.UnknownDialect, match="EdgeOperator"):
        hct.find_residuals(_single(EdgeOperator(), None))


# -- models of other packages


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_exported_zoo(name):
    pytest.importorskip(
        name.partition(":")[0] if ":" in name and name.startswith(("torchvision", "timm")) else "transformers"
    )
    outcome = check(name)
    assert outcome.fine, outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torchvision:resnet18", "causal_lm:llama"])
def test_a_sample_of_the_exported_zoo(name):
    pytest.importorskip("torchvision" if name.startswith("torchvision") else "transformers")
    outcome = check(name)
    assert outcome.fine, outcome
