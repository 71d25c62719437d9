"""What must hold of a converted model of transformers, one function a promise; each raises what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from checks import doubled, error, outputs_and_gradients, seeded
from hf_cases import Case
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BOUND = 1e-5  # fp32, relative to the largest value
NEW_TOKENS = 8


@dataclass
class Pair:
    """A model and what became of it: a converted model, or a copy when the cases themselves are checked."""

    case: Case
    model: nn.Module
    hc: nn.Module
    converted: bool

    def inputs(self, batch: int = 2, length: int | None = None) -> dict[str, Any]:
        torch.manual_seed(2)
        return self.case.inputs(batch, length or self.case.lengths[0])

    def compare(self, kwargs: dict[str, Any], bound: float = BOUND) -> None:
        with torch.no_grad():
            found = error(seeded(self.hc, (), kwargs), seeded(self.model, (), kwargs))
        assert found <= bound, f"error {found:.2g}"


def is_connection(key: str) -> bool:
    """Say whether a key of a state_dict belongs to a connection."""
    return "hyper_connections" in key.split(".")


def kept(pair: Pair) -> None:
    """The result is a model of the same class, sharing the parameters; the given one is as it was."""
    assert isinstance(pair.hc, type(pair.model)), type(pair.hc)
    ours = pair.hc.config.to_dict()
    ours.pop("hc_transform", None)  # which from_pretrained reads
    assert ours == pair.model.config.to_dict()
    assert not any(is_connection(key) for key in pair.model.state_dict())
    if pair.converted:
        ours = dict(pair.hc.named_parameters(remove_duplicate=False))
        for name, parameter in pair.model.named_parameters(remove_duplicate=False):
            assert ours[name] is parameter, f"{name} is not shared"


def evaluation(pair: Pair) -> None:
    pair.compare(pair.inputs())


def other_batch(pair: Pair) -> None:
    pair.compare(pair.inputs(batch=3))


def other_length(pair: Pair) -> None:
    pair.compare(pair.inputs(length=pair.case.lengths[1]))


def hidden_states(pair: Pair) -> None:
    """What users collect are ordinary hidden states."""
    pair.compare({**pair.inputs(), "output_hidden_states": True})


def padded(pair: Pair) -> None:
    """A batch padded on the left, as generation takes it."""
    pair.compare(left_padded(pair))


def left_padded(pair: Pair) -> dict[str, Any]:
    """Return inputs whose first row has three padding tokens on the left."""
    inputs = pair.inputs()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["input_ids"][0, :3] = 0
    inputs["attention_mask"][0, :3] = 0
    return inputs


def generation(pair: Pair) -> None:
    """Greedy generation with a cache gives the same tokens, from the same logits."""
    inputs = {name: value for name, value in pair.inputs().items() if not name.startswith("decoder_")}
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    _same_tokens(pair, inputs)
    _same_tokens(pair, bare)


def padded_generation(pair: Pair) -> None:
    _same_tokens(pair, left_padded(pair))


def _same_tokens(pair: Pair, inputs: dict[str, Any]) -> None:
    def generate(model: nn.Module) -> Any:
        torch.manual_seed(3)
        return model.generate(
            **copy.deepcopy(inputs),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )

    ours, theirs = generate(pair.hc), generate(pair.model)
    start = 1 if pair.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    assert theirs.sequences.shape[1] == start + NEW_TOKENS, theirs.sequences.shape
    found = error(ours.logits, theirs.logits)
    assert torch.equal(ours.sequences, theirs.sequences), f"other tokens; error of the logits {found:.2g}"
    assert found <= BOUND, f"error {found:.2g} of the logits"


def state(pair: Pair) -> None:
    """The original's keys are there, and its state loads with only connections missing."""
    assert set(pair.model.state_dict()) <= set(pair.hc.state_dict())
    loaded = pair.hc.load_state_dict(pair.model.state_dict(), strict=False)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    strange = [key for key in loaded.missing_keys if not is_connection(key)]
    assert not strange, strange
    assert loaded.missing_keys or not pair.converted


def deep_copy(pair: Pair) -> None:
    twin = copy.deepcopy(pair.hc)
    assert not {p.data_ptr() for p in pair.hc.parameters()} & {p.data_ptr() for p in twin.parameters() if p.numel()}
    Pair(pair.case, pair.model, twin, pair.converted).compare(pair.inputs())


def training(pair: Pair) -> None:
    """One seeded step in train mode, in double precision: outputs, and every gradient. Leaves the models so."""
    inputs = pair.inputs()
    bound, gradient_bound = BOUND, 1e-3
    if "double" not in (pair.case.skip or {}):
        for model in (pair.model, pair.hc):
            loop_over_experts(model)
        doubled(pair.hc, pair.model)
        inputs = as_double(inputs)
        # Where a model computes in fp32 whatever its dtype, rounding differs by an fp32 unit now and then.
        bound, gradient_bound = (1e-5, 1e-4) if computes_in_float32(pair.model, inputs) else (1e-9, 1e-7)
    for model in (pair.model, pair.hc):
        model.train()
    ours, our_gradients = outputs_and_gradients(pair.hc, (), inputs)
    theirs, their_gradients = outputs_and_gradients(pair.model, (), inputs)
    for model in (pair.model, pair.hc):
        model.eval()
    found = error(ours, theirs)
    assert found <= bound, f"error {found:.2g}"
    their_gradients = {name: gradient for name, gradient in their_gradients.items() if gradient.numel()}
    scale = max(g.abs().max().item() for g in their_gradients.values())
    for name, gradient in their_gradients.items():
        own = max(gradient.abs().max().item(), 1e-3 * scale)
        found = (our_gradients[name] - gradient).abs().max().item() / own
        assert found <= gradient_bound, f"gradient of {name}: error {found:.2g}"
    new = {name for name, _ in pair.hc.named_parameters() if is_connection(name)}
    assert new <= set(our_gradients), f"no gradient: {sorted(new - set(our_gradients))[:3]}"
    assert bool(new) == pair.converted


def loop_over_experts(model: nn.Module) -> None:
    """Let experts run one after the other: the grouped matrix product knows no double precision."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation_internal = "eager"


def as_double(value: Any) -> Any:
    """Return nested inputs in double precision."""
    if isinstance(value, dict):
        return {key: as_double(item) for key, item in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _Float32(TorchDispatchMode):
    """Notes whether any tensor is computed in fp32."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= isinstance(result, torch.Tensor) and result.dtype == torch.float32
        return result


def computes_in_float32(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Say whether a model in double precision computes anything in fp32."""
    with torch.no_grad(), _Float32() as mode:
        model(**inputs)
    return mode.seen


CHECKS: dict[str, Callable[[Pair], None]] = {
    "kept": kept,
    "eval": evaluation,
    "other batch": other_batch,
    "other length": other_length,
    "hidden states": hidden_states,
    "padded": padded,
    "generate": generation,
    "generate padded": padded_generation,
    "state": state,
    "deepcopy": deep_copy,
    "train": training,  # last: it makes both models double
}


def checks_of(case: Case) -> dict[str, Callable[[Pair], None]]:
    """Return the checks that a case takes."""
    left_out = set(case.skip or {})
    if case.kind != "causal_lm":
        left_out.add("padded")
    if not case.generates:
        left_out |= {"generate", "generate padded"}
    if case.kind == "seq2seq":
        left_out.add("generate padded")
    if case.lengths[0] == case.lengths[1]:
        left_out.add("other length")
    return {name: check for name, check in CHECKS.items() if name not in left_out}
