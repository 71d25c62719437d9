"""The command line: what it prints, how it answers mistakes, how fast it helps."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from models import GPT, ConvBlock
from torch import nn

import hc_transform as hct
from hc_transform import __main__ as command_line
from hc_transform.connections.base import INITS
from hc_transform.measuring.cost import H100_BANDWIDTH
from hc_transform.options import NESTED, READOUTS, SHORTCUTS
from hc_transform.request import SCOPES
from hc_transform.showing.specs import UsageError, model_and_inputs

main = command_line.main


def resnet():
    return nn.Sequential(ConvBlock(), ConvBlock())


def gpt():
    return GPT(), (torch.randint(0, 65, (2, 8)),)


def masked():
    return GPT(), {"idx": torch.randint(0, 65, (2, 8)), "targets": torch.randint(0, 65, (2, 8))}


ready = resnet()
number = 7
HERE = "test_command_line"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([f"{HERE}:gpt"], ["6 residuals on 1 trunk converted", "transformer.h.0..2: attn, mlp"]),
        ([f"{HERE}:gpt", "--verbose"], ["transformer.h.2.mlp"]),
        ([f"{HERE}:gpt", "--plan"], ["Plan, nothing is changed yet: 6 residuals"]),
        ([f"{HERE}:gpt", "--graph"], ["transformer.h", "0..2 (3 alike)", "expand   4 streams"]),
        ([f"{HERE}:gpt", "--code"], ["transformer_h_0_attn_write"]),
        ([f"{HERE}:gpt", "--block", "transformer.h.1"], ["x = x + self.attn(self.ln_1(x))", "attn = attn(ln_1)"]),
        (
            [f"{HERE}:gpt", "--diff", "--block", "transformer.h.1"],
            ["44 x = x + self.attn(", " > attn_read"],
        ),
        ([f"{HERE}:masked", "--streams", "2", "--connection", "static"], ["2 streams, connection static"]),
        ([f"{HERE}:resnet", "--input", "2x4x8x8"], ["2 residuals"]),
        ([f"{HERE}:ready", "--input", "2x4x8x8"], ["2 residuals"]),
        ([f"{HERE}:GPT", "--input", "ids:2x16"], ["6 residuals"]),
        ([f"{HERE}:GPT", "--input", "ids:2x8", "--input", "targets=ids:2x8"], ["6 residuals"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_show(arguments, said, capsys):
    assert main(["show", *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in said), printed


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["show", "resnet18"], 2, "SPEC is torchvision:NAME"),
        (["show", "no_such_package:thing"], 2, "No module named 'no_such_package'"),
        (["show", f"{HERE}:resnt"], 2, "has no 'resnt'; near names: resnet"),
        (["show", f"{HERE}:number"], 2, "is a int, no model"),
        (["show", "./no_such_file.py:Model"], 2, "there is no file no_such_file.py"),
        (["show", f"{HERE}:resnet"], 2, "--input 1x3x224x224"),
        (["show", f"{HERE}:resnet", "--input", "3,8"], 2, "an input is written 1x3x224x224"),
        (["show", f"{HERE}:resnet", "--input", "uint9:3x8"], 2, "an input is written 1x3x224x224"),
        (["show", f"{HERE}:gpt", "--connection", "dynmic"], 2, "called 'dynmic'; near names: dynamic"),
        (["show", f"{HERE}:gpt", "--connection", "xyz"], 2, "there are static, dynamic, mhc"),
        (["show", f"{HERE}:gpt", "--streams", "many"], 2, "invalid int value: 'many'"),
        (["show", f"{HERE}:gpt", "--scope", "x"], 2, "invalid choice: 'x'"),
        (["shw", f"{HERE}:gpt"], 2, "invalid choice: 'shw'"),
        (["show"], 2, "the following arguments are required: SPEC"),
        (["show", f"{HERE}:gpt", "--block", "transformer.h.9"], 2, "Near paths that are: transformer.h."),
        (["show", f"{HERE}:gpt", "--draw", "x.jpg"], 2, "--draw writes .svg or .png"),
        (["show", f"{HERE}:resnet", "--input", "1x3x8x8"], 1, "itself fails on the example inputs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, status, said, capsys):
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    "spec, near", [("timm:vit_tiny_patch16_244", "vit_tiny_patch16_224"), ("torchvision:resnet81", "resnet18")]
)
def test_a_misspelt_model_has_near_names(spec, near):
    pytest.importorskip(spec.partition(":")[0])
    with pytest.raises(UsageError, match=f"near names: .*{near}"):
        model_and_inputs(spec)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_a_small_model_of_a_type_of_transformers(name):
    pytest.importorskip("transformers")
    model, (args, kwargs) = model_and_inputs(f"hf:{name}")
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert len(hct.plan(model.eval(), args, kwargs).residuals) == 4


def test_a_misspelt_type_has_near_names():
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="no type 'lama'; near names: .*llama"):
        model_and_inputs("hf:lama")


def test_a_model_in_a_file(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.f = nn.Linear(8, 8)\n\n    def forward(self, x):\n        return x + self.f(x)\n"
    )
    assert main(["show", f"{tmp_path}/net.py:Net", "--input", "2x8", "--draw", f"{tmp_path}/net.svg"]) == 0
    assert "net.py:9" in capsys.readouterr().out and (tmp_path / "net.svg").read_text().startswith("<svg")


def test_list_has_a_line_for_each_connection(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(hct.CONNECTIONS)


def test_debug_raises():
    with pytest.raises(UsageError):
        main(["show", "resnet18", "--debug"])


def test_choices_are_those_of_the_package():
    own = (command_line.INITS, command_line.READOUTS, command_line.SHORTCUTS, command_line.NESTED, command_line.SCOPES)
    assert own == (INITS, READOUTS, SHORTCUTS, NESTED, SCOPES) and command_line.BANDWIDTH == H100_BANDWIDTH / 1e12


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_no_torch(argument):
    code = f"import sys; from hc_transform.__main__ import main; main([{argument!r}]); sys.exit('torch' in sys.modules)"
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and ("hc_transform" in done.stdout or "hc-transform" in done.stdout)
    assert time.time() - start < 5, "a second on an idle machine"


def test_names_are_what_they_were_when_files_of_their_names_are_imported():
    code = (
        "import hc_transform.convert, hc_transform as hct, types; from hc_transform.convert import plan\n"
        "assert callable(hct.convert) and not isinstance(hct.convert, types.ModuleType) and hct.plan is plan\n"
        "assert all(getattr(hct, name) is not None for name in hct.__all__) and set(hct.__all__) <= set(dir(hct))\n"
        "from hc_transform import *\nassert isinstance(CONNECTIONS, dict)\n"
        "try:\n    hct.no_such_name\nexcept AttributeError as error:\n    assert 'no_such_name' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
