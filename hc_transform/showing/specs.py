"""Models that the command line names, and example inputs for them."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.examples import example_inputs, random_input

Example = tuple[tuple[Any, ...], dict[str, Any]]
KINDS = "torchvision:NAME, timm:NAME, hf:TYPE, package.module:NAME or ./file.py:NAME"
DTYPES = {
    "ids": torch.int64,
    "int": torch.int64,
    "mask": torch.int64,
    "bool": torch.bool,
    "float": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>\w+):)?(?P<shape>\d+(?:x\d+)*)")
# Sizes of a small configuration of transformers, where it has the names.
SMALL: dict[str, Any] = {
    **dict.fromkeys("hidden_size d_model n_embd embed_dim dim embedding_size emb_dim decoder_hidden_size".split(), 32),
    **dict.fromkeys("intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff hidden_dim".split(), 64),
    **dict.fromkeys("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth".split(), 2),
    **dict.fromkeys("num_attention_heads num_heads n_head n_heads".split(), 4),
    **dict.fromkeys("encoder_attention_heads decoder_attention_heads".split(), 4),
    **dict.fromkeys("head_dim d_kv attention_head_dim".split(), 8),
    **dict.fromkeys("vocab_size src_vocab_size tgt_vocab_size".split(), 99),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx".split(), 128),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("pad_token_id bos_token_id eos_token_id".split(), 0),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
}


class UsageError(Exception):
    """What the command line asks for does not exist, or is written otherwise; the message is one line."""


def model_and_inputs(spec: str, inputs: Iterable[str] = ()) -> tuple[nn.Module, Example]:
    """Return the model that ``spec`` names, and example inputs: those given, or else the model's own.

    Raises:
        UsageError: there is no such model, or it carries no inputs and none are given.
    """
    torch.manual_seed(0)
    model, example = load(spec)
    given = list(inputs)
    if given:
        return model, _given(given, model)
    example = example or example_inputs(model)
    if example is None:
        raise UsageError(f"{spec} carries no example input; give its shape with --input 1x3x224x224 or ids:2x16")
    return model, example


def load(spec: str) -> tuple[nn.Module, Example | None]:
    """Return the model of a SPEC with random weights, and example inputs if it names some.

    What a module or file holds is a model, a class, or a function; these are called without arguments, and may return
    a model, or a model and a tuple or a dictionary of inputs.

    Raises:
        UsageError: there is no such model; the message names near ones.
    """
    source, _, name = spec.rpartition(":")
    if not name or not source:
        raise UsageError(f"SPEC is {KINDS}, got {spec!r}")
    makers: dict[str, Callable[[str], tuple[Any, Any]]] = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}
    try:
        made, example = makers[source](name) if source in makers else _own(source, name)
    except ImportError as error:
        raise UsageError(f"{spec}: {error}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{spec} is a {type(made).__name__}, no nn.Module, nor a function that returns one")
    return made, example


def near(name: str, names: Iterable[str]) -> str:
    """Return the end of a message on a name that does not exist."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; near names: {', '.join(found)}" if found else ""


def _torchvision(name: str) -> tuple[Any, Any]:
    models = importlib.import_module("torchvision").models
    if name not in models.list_models():
        raise UsageError(f"torchvision has no model {name!r}{near(name, models.list_models())}")
    model = models.get_model(name, weights=None)
    crop = getattr(models.get_model_weights(name).DEFAULT.transforms(), "crop_size", None)
    if not crop:
        return model, None
    size = tuple(crop) if len(crop) > 1 else (crop[0], crop[0])
    return model, ((random_input((2, 3, *size), model),), {})


def _timm(name: str) -> tuple[Any, Any]:
    timm = importlib.import_module("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"timm has no model {name!r}{near(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False), None


def _hf(name: str) -> tuple[Any, Any]:
    """Return a small model of a type of transformers, or that of a configuration file."""
    transformers = importlib.import_module("transformers")
    if Path(name).exists():
        config = transformers.AutoConfig.from_pretrained(name)
    elif name in transformers.CONFIG_MAPPING:
        config = _small(transformers.CONFIG_MAPPING[name])
    else:
        raise UsageError(f"transformers has no type {name!r}{near(name, transformers.CONFIG_MAPPING.keys())}")
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    model = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)
    if not causal and hasattr(config, "image_size") and not hasattr(config, "vocab_size"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        shape = (2, getattr(config, "num_channels", 3), size, size)
        return model, ((), {"pixel_values": random_input(shape, model)})
    return model, ((), {"input_ids": torch.randint(0, _vocabulary(model), (2, 16))})


def _small(cls: Any) -> Any:
    known = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(SMALL)
    return cls(**{name: value for name, value in SMALL.items() if name in known})


def _own(source: str, name: str) -> tuple[Any, Any]:
    """Return what a module or a file holds under a name, called if it is no model yet."""
    module = _file(Path(source)) if source.endswith(".py") else _module(source)
    if not hasattr(module, name):
        raise UsageError(f"{source} has no {name!r}{near(name, vars(module))}")
    made = getattr(module, name)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(f"{source}:{name} is a {type(made).__name__}, no model, class or function")
        made = made()
    if not isinstance(made, tuple):
        return made, None
    inputs = made[1]
    return made[0], ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})


def _module(source: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(source)


def _file(path: Path) -> Any:
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    made = importlib.util.spec_from_file_location(path.stem, path)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent))
    made.loader.exec_module(module)
    return module


def _given(texts: Iterable[str], model: nn.Module) -> Example:
    """Return example inputs as they are written: ``2x3x32x32``, ``ids:2x16``, ``mask=bool:2x16``."""
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for text in texts:
        found = _INPUT.fullmatch(text)
        if found is None or (found["dtype"] or "float") not in DTYPES:
            raise UsageError(
                f"an input is written 1x3x224x224, ids:2x16 or name=bool:2x16, with {', '.join(DTYPES)}; got {text!r}"
            )
        value = _tensor(found["dtype"], tuple(map(int, found["shape"].split("x"))), model)
        if found["name"]:
            kwargs[found["name"]] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _tensor(dtype: str | None, shape: tuple[int, ...], model: nn.Module) -> torch.Tensor:
    if dtype is None:
        return random_input(shape, model)
    if dtype in ("ids", "int"):
        return torch.randint(0, _vocabulary(model), shape)
    if dtype in ("mask", "bool"):
        return torch.ones(shape, dtype=DTYPES[dtype])
    return torch.randn(shape).to(DTYPES[dtype])


def _vocabulary(model: nn.Module) -> int:
    """Return how many tokens a model has: as its configuration says, or of its first embedding."""
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(known, int):
        return known
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
