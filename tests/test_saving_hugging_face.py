"""Converted models of Hugging Face saved by ``save_pretrained`` and loaded again."""

from __future__ import annotations

import json

import pytest
import torch
from checks import moved

import hc_transform as hct

transformers = pytest.importorskip("transformers")
from test_hugging_face import llama  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IDS = torch.randint(0, 65, (2, 8), generator=torch.Generator().manual_seed(0))


def test_from_pretrained_gives_the_converted_model_back(tmp_path):
    hc = moved(hct.convert(llama(), kwargs={"input_ids": IDS}, connection="mhc", num_streams=2))
    hc.save_pretrained(tmp_path, max_shard_size="60kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "config.json").read_text())["hc_transform"] == hct.config_of(hc)
    again = hct.from_pretrained(AutoModelForCausalLM, tmp_path)
    assert type(again) is type(hc)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, hc(IDS).logits)
    assert torch.equal(again.generate(IDS, max_new_tokens=3), hc.generate(IDS, max_new_tokens=3))
    again.save_pretrained(tmp_path / "once_more")
    with torch.no_grad():
        assert torch.equal(
            hct.from_pretrained(AutoModelForCausalLM, tmp_path / "once_more")(IDS).logits, hc(IDS).logits
        )


def test_layers_that_have_other_names_in_files(tmp_path):
    """transformers 5 calls ``vit.encoder.layer.0`` of a file ``vit.layers.0``."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    model, image = transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 16, 16)
    hc = moved(hct.convert(model, kwargs={"pixel_values": image}, verify=False))
    for i in range(2):
        hc.save_pretrained(tmp_path / str(i))
        again = hct.from_pretrained(transformers.AutoModelForImageClassification, tmp_path / str(i))
        with torch.no_grad():
            assert torch.equal(again(image).logits, hc(image).logits)
        hc = again


def test_the_original_keeps_its_config():
    model = llama()
    hct.convert(model, kwargs={"input_ids": IDS})
    assert "hc_transform" not in model.config.to_dict()


def test_an_original_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(hct.CheckpointError, match="has no 'hc_transform'.*convert it with hct.convert"):
        hct.from_pretrained(AutoModelForCausalLM, tmp_path)


def test_lost_connections_are_noticed(tmp_path):
    from safetensors.torch import load_file, save_file

    hct.convert(llama(), kwargs={"input_ids": IDS}).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name: t for name, t in load_file(path).items() if "layers.1.hyper" not in name}
    save_file(state, path, {"format": "pt"})
    with pytest.raises(hct.CheckpointError, match=r"do not fit.*missing \['model.layers.1.hyper_connections"):
        hct.from_pretrained(AutoModelForCausalLM, tmp_path)
