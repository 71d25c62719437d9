"""Converted models saved and loaded: by the package, by Hugging Face, and checkpoints that do not fit."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import moved
from models import GPT, PostNormBlock, ViT
from torch import nn

import hc_transform as hct
from hc_transform.inputs_record import described_inputs, made_inputs

SCOPES = ["graph", "blocks"]
IDS = torch.randint(0, 65, (2, 8), generator=torch.Generator().manual_seed(0))


def gpt(depth=2, **settings):
    torch.manual_seed(3)
    return GPT(depth=depth, **settings).eval()


def other(depth=2):
    torch.manual_seed(4)
    return GPT(depth=depth).eval()


def converted(scope="blocks", make=gpt, **options):
    return moved(hct.convert(make(), (IDS,), scope=scope, **{"verify": False, **options}))


def same(a, b):
    assert torch.equal(a(IDS)[0], b(IDS)[0])


@pytest.mark.parametrize("given", ["model", "factory"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_saved_model_comes_back_to_the_bit(scope, given, tmp_path):
    hc = converted(scope, connection="mhc", num_streams=3, readout="learned", exclude=["*.0.attn"])
    hct.save(hc, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "hc_transform.json"}
    again = hct.load(other if given == "factory" else other(), tmp_path)
    same(again, hc)
    assert type(again) is type(hc) or scope == "graph"
    assert again.lm_head.weight is again.transformer.wte.weight, "still tied"
    assert [r.name for r in again.hc_report.converted] == [r.name for r in hc.hc_report.converted]
    assert hct.config_of(again) == hct.config_of(hc)


def test_weights_are_plain_torch_without_safetensors(tmp_path, monkeypatch):
    hc = converted()
    find = hct.training.saving.importlib.util.find_spec
    monkeypatch.setattr(
        hct.training.saving.importlib.util, "find_spec", lambda n, *a: None if n == "safetensors" else find(n, *a)
    )
    hct.save(hc, tmp_path)
    assert (tmp_path / "model.pt").exists()
    same(hct.load(other, tmp_path), hc)
    monkeypatch.undo()
    hct.save(hc, tmp_path)
    monkeypatch.setattr(hct.training.saving.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(hct.CheckpointError, match="needs safetensors, which is not installed"):
        hct.load(other, tmp_path)


@pytest.mark.parametrize("wrapper", ["compile", "ddp"])
def test_wrappers_leave_no_trace_in_the_names(wrapper, tmp_path):
    hc = converted()
    if wrapper == "compile":
        hct.save(torch.compile(hc), tmp_path)
    else:
        wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(wrapped)
        wrapped.module = hc
        hct.save(wrapped, tmp_path)
    same(hct.load(other, tmp_path), hc)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_config_is_plain_data_and_converts_another_model_alike(scope):
    hc = converted(scope, connection=functools.partial(hct.MHCConnection, iterations=5), recompute=True)
    config = json.loads(json.dumps(hct.config_of(hc)))
    assert config["scope"] == scope and config["options"]["connection"] == {
        "name": "mhc",
        "settings": {"iterations": 5},
    }
    assert config["inputs"]["args"][0]["tensor"] == {"shape": [2, 8], "dtype": "int64", "values": IDS.tolist()}
    assert config["residuals"][0]["connection"] == "transformer.h.0.hyper_connections.attn"
    again = hct.convert_like(other(), config)
    assert again.get_submodule("transformer.h.1.hyper_connections.mlp").iterations == 5
    assert hct.config_of(again) == config
    assert hct.config_of(copy.deepcopy(hc)) == config


@pytest.mark.parametrize("scope", SCOPES)
def test_a_config_of_a_pickled_model(scope, tmp_path):
    hc = converted(scope)
    torch.save(hc, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert hct.config_of(again) == hct.config_of(hc)
    same(again, hc)


class Own(hct.StaticConnection):
    """Of one's own."""


def test_what_a_file_does_not_hold_is_asked_for(tmp_path):
    hc = converted(connection=Own, leaf_modules=[nn.Dropout, "*.drop"])
    hct.save(hc, tmp_path)
    with pytest.raises(
        hct.CheckpointError, match=r"of one's own for connection, leaf_modules \(Own\).*connection=, leaf"
    ):
        hct.load(other, tmp_path)
    same(hct.load(other, tmp_path, connection=Own, leaf_modules=[nn.Dropout]), hc)


class Masked(nn.Module):
    """Inputs by name, of many kinds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x, *, mask=None, scale=1.0, parts=(), other=None):
        x = self.layer(x, src_key_padding_mask=mask)
        return x * scale + parts[0] + parts[1]["a"]


def test_inputs_are_made_again_by_name_and_kind():
    torch.manual_seed(0)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[:, -3:] = True
    parts = (torch.randn(2, 40, 8), {"a": torch.randn(8)})
    kwargs = {"mask": mask, "scale": 0.5, "parts": parts}
    model = Masked()
    hc = hct.convert(model, (torch.randn(2, 40, 8),), kwargs)
    again = hct.convert_like(model, hct.config_of(hc))
    assert "Verified on the example inputs" in str(again.hc_report)
    inputs = hct.config_of(hc)["inputs"]
    assert inputs["kwargs"]["mask"] == {"tensor": {"shape": [2, 40], "dtype": "bool", "range": [0, 1]}}
    assert hct.config_of(again)["inputs"]["kwargs"]["scale"] == {"value": 0.5}


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_inputs_of_rare_dtypes(dtype):
    value = (torch.arange(100) % 2).to(dtype)
    recorded = json.loads(json.dumps(described_inputs(((value, value[:5], torch.float16, {"a": [None]}), {}))))
    made, few, kind, nested = made_inputs(recorded, nn.Linear(1, 1))[0]
    assert made.dtype == few.dtype == dtype and made.shape == value.shape and few.shape == (5,)
    assert kind is torch.float16 and nested == {"a": [None]}
    if not (dtype.is_floating_point or dtype.is_complex):
        assert few.tolist() == value[:5].tolist() and 0 <= int(made.int().min()) <= int(made.int().max()) <= 1


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_tensors_of_other_layouts_are_not_kept(kind):
    x = (
        torch.eye(3).to_sparse()
        if kind == "sparse"
        else torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)
    )
    assert set(described_inputs(((x,), {}))["args"][0]) == {"other"}


def test_an_input_that_is_not_kept_is_asked_for():
    class Odd:
        pass

    model = Masked()
    x = torch.randn(2, 5, 8)
    given = {"parts": (x, {"a": x}), "other": Odd()}
    config = hct.config_of(hct.convert(model, (x,), given, verify=False))
    with pytest.raises(hct.HCTransformError, match=r"was a test_saving\..*Odd, which is not kept.*give example inputs"):
        hct.convert_like(model, config)
    hct.convert_like(model, config, (x,), given, verify=False)


def test_another_model_is_refused_with_what_differs(tmp_path):
    hc = converted()
    hct.save(hc, tmp_path)
    with pytest.raises(
        hct.CheckpointError, match=r"4 residuals were saved and 2 are found; not found: transformer\.h\.1"
    ):
        hct.load(lambda: gpt(depth=1), tmp_path)
    wide = r"transformer\.h\.0\.attn has parameters .*\[64, 6\].*, and .*\[32, 6\].* was saved"
    with pytest.raises(hct.CheckpointError, match=wide):
        hct.load(lambda: gpt(dim=64), tmp_path)


def test_folders_that_are_not_whole_are_refused(tmp_path):
    with pytest.raises(hct.CheckpointError, match=r"there is no hc_transform.json in .*hct.from_pretrained"):
        hct.load(gpt, tmp_path)
    hct.save(converted(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(hct.CheckpointError, match="model.safetensors is not there"):
        hct.load(gpt, tmp_path)
    config = json.loads((tmp_path / "hc_transform.json").read_text())
    with pytest.raises(hct.CheckpointError, match=r"format 99, and this hc_transform .* reads 1"):
        hct.convert_like(gpt(), {**config, "format": 99})
    with pytest.raises(hct.NotConverted, match="GPT holds no converted model"):
        hct.save(gpt(), tmp_path)


def test_another_dtype_is_cast_with_a_warning(tmp_path):
    hct.save(converted().double(), tmp_path)
    with pytest.warns(UserWarning, match=r"tensors of .* are cast to the model's dtype.*float64 there, float32 here"):
        hct.load(gpt, tmp_path)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_checkpoint_without_connections_meets_a_converted_model(scope):
    hc = converted(scope)
    match = r"has no connections for transformer\.h\.0\.hyper_connections.*load it before convert, or with strict=False"
    with pytest.raises(hct.CheckpointError, match=match) as caught:
        hc.load_state_dict(gpt().state_dict())
    assert isinstance(caught.value, RuntimeError), "as torch's own"
    result = hc.load_state_dict(gpt().state_dict(), strict=False)
    assert len(result.missing_keys) == 24 and not result.unexpected_keys


def test_a_checkpoint_of_other_connections_is_refused_in_one_sentence():
    match = r"other connections for transformer\.h\.0\.hyper_connections .*bias_p\w+: none here, \[4\] there.*config_of"
    with pytest.raises(hct.CheckpointError, match=match):
        converted(connection="static").load_state_dict(converted(connection="mhc").state_dict())


SECOND = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import hc_transform as hct
from test_saving import other, IDS
torch.save(hct.load(other, sys.argv[1])(IDS)[0].detach(), sys.argv[1] + "/out.pt")
"""


def test_a_fresh_process_loads_to_the_bit(tmp_path):
    hc = converted(connection="mhc-lite")
    hct.save(hc, tmp_path)
    subprocess.run([sys.executable, "-c", SECOND, str(tmp_path), str(Path(__file__).parent)], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), hc(IDS)[0])


@pytest.mark.parametrize("scope", SCOPES)
def test_other_kinds_of_models_come_back(scope, tmp_path):
    x = torch.randn(2, 1, 8, 8)
    for i, make in enumerate((ViT, lambda: nn.Sequential(PostNormBlock(), PostNormBlock()))):
        inputs = x if i == 0 else torch.randn(2, 5, 8)
        hc = moved(hct.convert(make().eval(), (inputs,), scope=scope, verify=False))
        hct.save(hc, tmp_path / str(i))
        again = hct.load(lambda: make().eval(), tmp_path / str(i))  # noqa: B023
        assert torch.equal(again(inputs), hc(inputs))
