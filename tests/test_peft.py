"""Adapters of PEFT on converted models: LoRA for the layers, connections trained and saved with them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checks import error
from models import GPT

import hc_transform as hct

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SCOPES = ["graph", "blocks"]
IDS = torch.randint(3, 65, (2, 12), generator=torch.Generator().manual_seed(0))
HC = ["hyper_connections"]


def llama(seed=0):
    from test_hugging_face import llama as make

    torch.manual_seed(seed)
    return make(num_hidden_layers=2)


def lora(names=("q_proj", "v_proj"), seed=1, **settings):
    torch.manual_seed(seed)
    return peft.LoraConfig(target_modules=list(names), r=2, **settings)


def converted(model=None, **options):
    return hct.convert(model or llama(), kwargs={"input_ids": IDS}, **{"verify": False, "num_streams": 2, **options})


def train(model, steps=10, **settings):
    optimizer = torch.optim.AdamW(settings.get("groups") or [p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_one_name_trains_all_connections_and_changes_what_is_learnt():
    hc = peft.get_peft_model(converted(), lora(modules_to_save=HC))
    trained = {n for n, p in hc.named_parameters() if p.requires_grad and "hyper_connections" in n}
    assert len(trained) == 4 * 6 and error(logits(hc), logits(llama())) <= 1e-5
    before = {n: p.detach().clone() for n, p in hc.named_parameters() if n in trained}
    train(hc, groups=hct.parameter_groups(hc, lr=1e-2, weight_decay=0.1))
    after = dict(hc.named_parameters())
    assert all(not torch.equal(after[n], before[n]) for n in trained if "layers.0.hyper" not in n)
    plain = train(peft.get_peft_model(llama(), lora()))
    assert error(logits(hc), logits(plain)) > 1e-2, "the conversion takes part"
    connection = hc.get_base_model().model.layers[1].hyper_connections.mlp
    assert any(connection.h_post is p for n, p in hc.named_parameters() if n in trained), "the adapter's copy runs"


def test_frozen_connections_warn_once_and_change_nothing():
    hc = peft.get_peft_model(converted(), lora())
    match = r'all connections of .* are frozen while other.*modules_to_save=\["hyper_connections"\]'
    with pytest.warns(UserWarning, match=match) as caught:
        train(hc)
    assert len([w for w in caught if "hct.connection_parameters" in str(w.message)]) == 1
    assert error(logits(hc), logits(train(peft.get_peft_model(llama(), lora())))) <= 1e-3
    with pytest.warns(UserWarning, match=match):
        hct.parameter_groups(hc)


@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_connections_warn_in_either_scope(scope):
    hc = hct.convert(GPT(depth=2).train(), (IDS,), scope=scope, verify=False)
    hc(IDS, IDS)
    for name, parameter in hc.named_parameters():
        parameter.requires_grad_("hyper" not in name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hc.eval()(IDS, IDS)
        with torch.no_grad():
            hc.train()(IDS, IDS)
    with pytest.warns(UserWarning, match="are frozen while other"):
        hc(IDS, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hc(IDS, IDS)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("left", ["one connection", "nothing"])
def test_what_is_frozen_on_purpose_does_not_warn(scope, left):
    hc = hct.convert(GPT(depth=2).train(), (IDS,), scope=scope, verify=False)
    hc.requires_grad_(False)
    if left == "one connection":
        hc.lm_head.requires_grad_(True)
        hc.get_submodule("transformer.h.1.hyper_connections").requires_grad_(True)
        hc.get_submodule("transformer.h.0.mlp").requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hc(IDS, IDS), hc(IDS, IDS)


SECOND = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import hc_transform as hct, transformers
from test_peft import logits
model = hct.from_pretrained(transformers.AutoModelForCausalLM, sys.argv[1]).eval()
torch.save(logits(model), sys.argv[1] + "/out.pt")
"""


def test_an_adapter_in_a_fresh_process_is_equal_to_the_bit(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    hc = train(peft.get_peft_model(converted(base), lora(modules_to_save=HC)))
    hct.save(hc, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    run = [sys.executable, "-W", "ignore", "-c", SECOND, str(tmp_path / "adapter"), str(Path(__file__).parent)]
    subprocess.run(run, check=True)
    assert torch.equal(torch.load(tmp_path / "adapter" / "out.pt", weights_only=True), logits(hc))


def test_an_adapter_is_put_on_a_model_that_is_given(tmp_path):
    hc = train(peft.get_peft_model(converted(), lora(modules_to_save=HC)), steps=3)
    hct.save(hc, tmp_path)
    assert torch.equal(logits(hct.load(llama, tmp_path).eval()), logits(hc))


def test_an_adapter_of_a_base_that_was_saved_converted(tmp_path):
    auto = transformers.AutoModelForCausalLM
    train(converted(), steps=2).save_pretrained(tmp_path / "base")
    base = hct.from_pretrained(auto, tmp_path / "base", choices={"verify": False})
    hc = train(peft.get_peft_model(base, lora(modules_to_save=HC)), steps=2)
    hc.save_pretrained(tmp_path / "adapter")
    again = hct.from_pretrained(auto, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(hc))
    with again.disable_adapter(), hc.disable_adapter():
        assert torch.equal(logits(again), logits(hc))


def test_an_adapter_that_does_not_say_how_its_base_was_converted(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(converted(base), lora(modules_to_save=HC)).save_pretrained(tmp_path)
    with pytest.raises(hct.CheckpointError, match=r"is an adapter without hc_transform.json.*hct.save\(peft_model"):
        hct.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)


def test_merged_adapters_are_a_converted_model(tmp_path):
    hc = train(peft.get_peft_model(converted(), lora(modules_to_save=HC)), steps=3)
    expected = logits(hc)
    merged = hc.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM" and error(logits(merged), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(hct.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)), logits(merged))


def test_a_frozen_base_leaves_the_adapters_connections():
    hc = peft.get_peft_model(converted(), lora(modules_to_save=HC))
    trained = {n for n, p in hct.freeze_base(hc).named_parameters() if p.requires_grad}
    assert len(trained) == 24 and all("hyper_connections.modules_to_save.default" in n for n in trained)


def test_disabled_adapters_give_the_start():
    hc = train(peft.get_peft_model(converted(), lora(modules_to_save=HC)), steps=3)
    with hc.disable_adapter():
        assert error(logits(hc), logits(llama())) <= 1e-5
    assert error(logits(hc), logits(llama())) > 1e-3


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_conversion_after_wrapping(inplace):
    wrapped = peft.get_peft_model(llama(), lora())
    hc = converted(wrapped, inplace=inplace)
    assert type(hc) is type(wrapped) and len(hc.hc_report.converted) == 4
    trained = {n for n, p in hc.named_parameters() if p.requires_grad}
    assert all(n in trained for n in hct.connection_parameters(hc)) and any("lora_A" in n for n in trained)
    assert error(logits(hc), logits(llama())) <= 1e-5
    train(hc, steps=3, groups=hct.parameter_groups(hc))
    assert error(logits(hc), logits(llama())) > 1e-3


def test_a_graph_takes_adapters_too():
    hc = hct.convert(GPT(depth=2).eval(), (IDS,), scope="graph", verify=False)
    adapted = peft.get_peft_model(hc, lora(["qkv", "fc"], modules_to_save=HC))
    adapted.train()
    adapted(IDS, IDS)[1].backward()
    grads = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert any("lora_A" in n for n in grads) and sum("hyper_connections.modules_to_save" in n for n in grads) == 24


def test_a_shorter_call_is_traced_with_the_adapters_connections():
    """A kind of call that is traced after PEFT has wrapped the connections finds them."""
    hc = hct.convert(GPT(depth=2).eval(), (IDS,), scope="graph", verify=False)
    adapted = peft.get_peft_model(hc, lora(["qkv", "fc"], modules_to_save=HC))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        with_targets, alone = adapted(IDS, IDS)[0][:, -1:], adapted(IDS)[0]
    assert error(with_targets, alone) <= 1e-5
