"""Printouts and drawings: what stands in them, and that they fit the terminal."""

from __future__ import annotations

import functools
import re
import runpy
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from models import EDSR, ESRGAN, GPT, Chain, ResNet, SharedBlock, Tapped, UNet, ViT
from torch import nn

import hc_transform as hct
from hc_transform.folding import Node, fold
from hc_transform.residuals.records import Record, rows_of
from hc_transform.showing.page import page
from hc_transform.text import counted, percent, shortened, sized, table


class Projected(nn.Module):
    """Stages of residual blocks; the first of each has a projection shortcut."""

    def __init__(self, widths=(4, 8)):
        super().__init__()
        self.stages = nn.ModuleList()
        before = widths[0]
        for width in widths:
            self.stages.append(nn.Sequential(ProjectedBlock(before, width), *(ProjectedBlock(width) for _ in range(3))))
            before = width

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


class ProjectedBlock(nn.Module):
    def __init__(self, before, after=None):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(before, before, 3, padding=1),
            nn.Conv2d(before, after or before, 3, padding=1),
        )
        self.shortcut = nn.Identity() if after in (None, before) else nn.Conv2d(before, after, 1)

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


IMAGE = torch.randn(2, 4, 8, 8)
MODELS = {
    "gpt": (lambda: GPT(depth=12), torch.randint(0, 65, (2, 8)), {}),
    "vit": (ViT, torch.randn(2, 1, 8, 8), {}),
    "resnet": (ResNet, torch.randn(2, 1, 8, 8), {}),
    "carried shortcuts": (Projected, IMAGE, {"shortcuts": "carry"}),
    "unet": (UNet, IMAGE, {}),
    "nested": (EDSR, torch.randn(2, 3, 8, 8), {"nested": "all"}),
    "nested in nested": (ESRGAN, torch.randn(2, 3, 8, 8), {"nested": "all"}),
    "tapped": (Tapped, torch.randn(2, 5, 8), {}),
    "shared": (SharedBlock, torch.randn(2, 5, 8), {}),
    "embedded": (ViT, torch.randn(2, 1, 8, 8), {"stream_embedding": True, "readout": "learned", "stream_dropout": 0.1}),
}
SCOPES = ("graph", "blocks")


@functools.cache
def convert(name, scope="graph"):
    make, x, own = MODELS[name]
    model = make().eval()
    if scope == "blocks" and name.startswith("nested"):
        pytest.skip("a residual around the blocks stays as it was")
    return model, hct.convert(model, (x,), scope=scope, verify=False, **own)


def lines(text):
    return [line.strip() for line in text.splitlines()]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_everything_fits_the_terminal(name, scope, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    model, hc = convert(name, scope)
    block = hc.hc_report.converted[0].module
    texts = [str(hc.hc_report), hc.hc_report.text(verbose=True), hct.show(hc), hct.show(hc, block)]
    texts += [hct.diff(model, hc, block, before=before) for before in ("python", "graph")]
    for text in texts:
        assert max(map(len, text.splitlines())) <= columns
        assert not re.search(r"[ \t]$", text, re.MULTILINE)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_fits_the_terminal(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    make, x, own = MODELS[name]
    text = str(hct.plan(make().eval(), (x,), **own))
    assert text.startswith("Plan, nothing is changed yet: ") and max(map(len, text.splitlines())) <= 80
    assert "would be converted" in " ".join(text.split())


# -- the graph


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_blocks_are_shown_once(scope):
    _, hc = convert("gpt", scope)
    shown = lines(hct.show(hc, width=80))
    assert "0..11 (12 alike)" in shown
    start = shown.index("0..11 (12 alike)")
    assert shown[start - 2 : start] == ["transformer.h", "expand   4 streams"]
    roles = [line.split()[0] for line in shown[start + 1 : start + 8]]
    assert roles == ["read", "branch", "write", "read", "branch", "write", "readout"]
    assert "branch   ln_1, attn" in re.sub(r" +models.py:\d+", "", "\n".join(shown))


def test_lines_name_the_code():
    _, hc = convert("gpt")
    text = hct.show(hc, width=80)
    for what in ("read     attn", "branch   ln_2, mlp"):
        line = next(line for line in text.splitlines() if what in line)
        assert len(line) == 80 and re.search(r"models\.py:\d+$", line)


def test_what_is_carried_is_marked():
    _, hc = convert("resnet")
    assert any(line.startswith("carried  relu") for line in lines(hct.show(hc, width=80)))


def test_a_value_that_others_take_is_read_out():
    _, hc = convert("tapped")
    assert lines(hct.show(hc, width=80)).count("readout  mean") == 2, "of two equal blocks, and at the end"


def test_nested_residuals_are_indented():
    _, hc = convert("nested")
    text = hct.show(hc, width=80).splitlines()
    depths = [len(line) - len(line.lstrip()) for line in text if line.lstrip().startswith("read ")]
    assert depths[0] == 0 and set(depths[1:]) == {2}


def test_a_printout_is_a_string_that_is_shown_as_it_is():
    _, hc = convert("gpt")
    shown = hct.show(hc)
    assert isinstance(shown, str) and repr(shown) == str(shown) and shown._repr_html_().startswith("<pre>GPT: 24 ")


def test_a_block_shows_code_and_operations():
    _, hc = convert("gpt")
    shown = lines(hct.show(hc, "transformer.h.3", width=100))
    assert shown[0] == "transformer.h.3" and re.fullmatch(r"models\.py:\d+  x = x \+ self\.attn\(.*", shown[1])
    assert "read          attn_read = read(streams, attn_coefficients)" in shown
    assert "branch        attn = attn(ln_1)" in shown


@pytest.mark.parametrize("scope", SCOPES)
def test_a_block_that_is_not_there(scope):
    model, hc = convert("gpt", scope)
    for show in (lambda: hct.show(hc, "transformer.h.77"), lambda: hct.diff(model, hc, "transformer.h.77")):
        with pytest.raises(hct.UnsupportedModel, match=r"'transformer.h.77' .*Near paths that are: .*transformer\.h\."):
            show()


def test_models_that_are_not_converted():
    for show in (hct.show, lambda model: hct.draw(model, "never.svg"), lambda model: hct.diff(model, model)):
        with pytest.raises(hct.UnsupportedModel, match="GPT runs no rewritten graph"):
            show(GPT())


def test_a_rewritten_graph_is_shown_without_a_report():
    gm = torch.fx.symbolic_trace(nn.Sequential(Chain(lambda x, f, i: x + f, 2)))
    plan = hct.make_plan(gm, hct.find_residuals(gm), hct.Options(num_streams=2, connection="static"))
    assert "expand   2 streams" in hct.show(hct.rewrite(gm, plan))


# -- before and after


@pytest.mark.parametrize("scope", SCOPES)
def test_the_code_stands_beside_what_runs(scope):
    model, hc = convert("gpt", scope)
    shown = hct.diff(model, hc, "transformer.h.3", width=160).splitlines()
    left = next(line for line in shown if "x = x + self.mlp(self.ln_2(x))" in line)
    assert " > mlp_coefficients = hyper_connections.mlp(attn_write)" in left
    right = [line.partition(" > ")[2] or line.partition(" | ")[2] for line in shown]
    assert "ln_2 = ln_2(mlp_read)" in right and "mlp_write = write(attn_write, mlp, mlp_coefficients)" in right
    assert sum(" > " in line for line in shown) >= 6


@pytest.mark.parametrize("scope", SCOPES)
def test_the_graph_before_is_that_of_the_model(scope):
    model, hc = convert("gpt", scope)
    shown = hct.diff(model, hc, "transformer.h.3", before="graph", width=160).splitlines()[1:]
    before = [re.split(r" [>|] ", line)[0].strip() for line in shown]
    code = [line for line in before if line and not line.startswith(("x", "return"))]
    assert code == [
        "ln_1 = ln_1(x)",
        "attn = attn(ln_1)",
        "attn_add = x + attn",
        "ln_2 = ln_2(attn_add)",
        "mlp = mlp(ln_2)",
        "mlp_add = attn_add + mlp",
    ]


def test_before_is_python_or_graph():
    model, hc = convert("gpt")
    with pytest.raises(ValueError, match="before is one of 'python', 'graph'; got 'x'"):
        hct.diff(model, hc, "transformer.h.0", before="x")


# -- drawings


def svg_texts(path):
    root = ElementTree.fromstring(path.read_text())
    return [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")], root


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_drawing_is_one_screen(name, scope, tmp_path):
    _, hc = convert(name, scope)
    path = hct.draw(hc, tmp_path / "model.svg")
    texts, root = svg_texts(path)
    width, height = (float(root.get(side)) for side in ("width", "height"))
    assert width <= 1920 and height <= 1080
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(element.get("x", 0)) + float(element.get("width")) <= width + 1
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        inside = 0 <= float(element.get("y")) <= height
        assert inside and (element.get("text-anchor") == "end" or float(element.get("x")) >= 0)
    assert any(text.startswith("expand to 4 streams") for text in texts) and "readout" in texts


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_blocks_are_drawn_once(scope, tmp_path):
    _, hc = convert("gpt", scope)
    texts, root = svg_texts(hct.draw(hc, tmp_path / "gpt.svg"))
    assert texts.count("attn") == 1 and "transformer.h.0..11" in texts and "x 12" in texts
    dots = [circle for circle in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(dots) == 2 * 4, "two reads of four streams"


def test_carried_shortcuts_lie_across_the_streams(tmp_path):
    _, hc = convert("carried shortcuts")
    texts, _ = svg_texts(hct.draw(hc, tmp_path / "model.svg"))
    assert texts.count("expand to 4 streams") == 1, "one trunk through both stages"


def test_a_drawing_is_the_same_each_time(tmp_path):
    first, second = (
        hct.draw(hct.convert(UNet(), (IMAGE,), verify=False, scope="graph"), tmp_path / f"{i}.svg").read_text()
        for i in range(2)
    )
    assert first == second and 'class="skip"' in first, "a long skip"


@pytest.mark.skipif(torch.__version__ < "2.14", reason="another torch has other operations in an encoder")
def test_the_picture_of_the_readme_is_what_is_drawn(tmp_path):
    examples = Path(__file__).parent.parent / "examples"
    drawn = runpy.run_path(str(examples / "draw_encoder.py"))["main"](tmp_path)
    assert drawn.read_text() == (examples / "encoder.svg").read_text(), "python examples/draw_encoder.py"


def test_lines_that_became_nothing_are_left_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    hc = hct.convert(layer, (torch.randn(2, 5, 8),), scope="graph", verify=False)
    shown = hct.diff(layer, hc, width=100)
    assert re.search(r"\.\.\. \d+ lines", shown) and len(shown.splitlines()) < 50


def test_other_kinds_of_files(tmp_path, monkeypatch):
    _, hc = convert("resnet")
    with pytest.raises(ValueError, match=r"draw writes \.svg or \.png, got 'x\.pdf'"):
        hct.draw(hc, tmp_path / "x.pdf")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "cairosvg", None)
    with pytest.raises(ModuleNotFoundError, match=r"takes cairosvg .*an \.svg takes nothing"):
        hct.draw(hc, tmp_path / "x.png")


# -- the report


def test_equal_blocks_share_a_line():
    _, hc = convert("gpt")
    text = hc.hc_report.text(width=80)
    assert "transformer.h.0..11: attn, mlp    24  models.py:44, 45   5,232" in text
    assert "transformer.h.11.mlp" in hc.hc_report.text(verbose=True)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("carried shortcuts", {"shortcuts": "break"}, 'shortcuts="carry" takes the streams through'),
        ("nested", {"nested": "largest"}, 'nested="all" converts every one'),
        ("resnet", {"min_residuals": 3, "exclude": ["blocks.0"]}, "excluded (matches an exclude pattern)"),
    ],
)
def test_reasons_come_with_remedies(name, options, said):
    make, x, own = MODELS[name]
    try:
        report = hct.plan(make().eval(), (x,), **{**own, **options}).report
    except hct.NothingToConvert:
        report = hct.plan(make().eval(), (x,), exclude=options["exclude"]).report
    assert said in str(report)


@pytest.mark.parametrize("count, said", [(1, "1 residual on 1 trunk"), (2, "2 residuals on 1 trunk")])
def test_singular_and_plural(count, said):
    model = Chain(lambda x, f, i: x + f, count)
    report = str(hct.plan(model, (torch.randn(2, 5, 8),)).report)
    assert said in report and ("1 trunk holds one residual alone" in report) is (count == 1)


@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc", "mhc-lite", "kromhc", "identity", "frac"])
def test_a_plan_counts_what_is_made(connection):
    model, x = GPT(), torch.randint(0, 65, (2, 8))
    planned, made = hct.plan(model, (x,), connection=connection).report, hct.convert(model, (x,), connection=connection)
    assert planned.parameters == made.hc_report.parameters and planned.is_plan and not made.hc_report.is_plan
    assert made.hc_report.base_parameters == sum(p.numel() for p in model.parameters())
    assert (planned.estimate is None) is (connection == "frac")


def test_the_estimate_is_the_formula_of_its_docstring():
    report = hct.plan(GPT(depth=2), (torch.randint(0, 65, (2, 8)),), num_streams=8, connection="static").report
    u, n = 2 * 8 * 32 * 4, 8
    assert report.estimate.traffic_bytes == round(4 * u * (6.8 + 13.8) * (5 * n - 3) / 17)
    assert report.estimate.saved_bytes == round(4 * u * 4.9 * n / 4)
    assert (report.estimate.tokens, report.estimate.per) == (16, "token")


def test_html_of_report_plan_and_model():
    model, hc = convert("gpt")
    planned = hct.plan(model, (torch.randint(0, 65, (2, 8)),))
    for shown in (hc.hc_report, planned, hc):
        text = shown._repr_html_()
        assert "transformer.h.0..11: attn, mlp" in text and "operands independent" in text
        ElementTree.fromstring(f"<div>{text}</div>")


def test_a_converted_model_prints_equal_blocks_once():
    _, hc = convert("gpt")
    text = str(hc)
    assert "(0-11): 12 x Block(" in text and text.count("CausalSelfAttention") == 1
    assert text.endswith("connection dynamic.") and len(text.splitlines()) < 40


def test_a_page_holds_everything():
    model, hc = convert("gpt")
    text = page(model, hc)
    for said in ("<svg", 'id="adds"', "24 residuals on 1 trunk", "x = x + self.attn(self.ln_1(x))", 'data-kind="left"'):
        assert said in text
    assert not re.search(r"(src|href)=", text), "nothing is fetched"


# -- parts


def test_blocks_that_take_turns_are_folded():
    entries = [(f"layers.{i}", "global" if i % 3 == 2 else "local") for i in range(9)]
    (node,) = fold(entries)
    assert [part.path for part in node.content] == ["0,3,6", "1,4,7", "2,5,8"]
    assert fold([("a.0", 1), ("a.2", 1)]) == (Node("a", 1, (Node("0", 1, (1,)), Node("2", 1, (1,)))),), "one is missing"


def test_calls_of_a_module_are_counted():
    records = [Record(name, "block", "a.py:1", True, trunk=0, parameters=5) for name in ("block.f", "block.f:2")]
    (row,) = rows_of(records)
    assert str(row) == "block.f (2 calls)" and (row.count, row.parameters) == (2, 10)


def test_numbers():
    assert counted(1, "add") == "1 add" and counted(1_000, "add") == "1,000 adds"
    assert [percent(p, 1_000_000) for p in (0, 26, 3_400, 123_456)] == ["0 %", "0.0026 %", "0.34 %", "12 %"]
    assert [sized(n) for n in (0, 999, 1_000, 99_960, 2.5e9)] == ["0 B", "999 B", "1.0 kB", "100 kB", "2.5 GB"]
    assert shortened("abcdefghij", 7) == "ab...ij" and shortened("abc", 7) == "abc"
    assert max(map(len, table([["a" * 90, "b" * 60]], ["x", "y"], 50).splitlines())) == 50
