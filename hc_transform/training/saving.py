"""Save and load converted models: weights, and a small JSON that says how the original was converted."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import choices_of, config_of, residuals_of
from ..convert import convert
from ..errors import CheckpointError
from ..inputs_record import made_inputs
from ..sites import unwrapped

log = logging.getLogger("hc_transform")

CONFIG_FILE = "hc_transform.json"
SAFE, PLAIN = "model.safetensors", "model.pt"
Folder = str | os.PathLike[str]


def save(model: nn.Module, folder: Folder) -> None:
    """Save a converted model: its weights and ``hc_transform.json``, for :func:`load`.

    Weights go to ``model.safetensors`` where safetensors is installed and all of the state are tensors, else to
    ``model.pt``. Tensors of several names are written once. Of a PEFT model the adapter is saved, as by its
    ``save_pretrained``, and of a model in shards (FSDP2, DTensor) the whole, by rank 0; every rank has to call it.

    Args:
        model: a converted model in either scope, or a wrapper (DDP, ``torch.compile``, PEFT) of one.
        folder: made if it is not there.

    Raises:
        NotConverted: the model holds no converted model.
    """
    model, folder = unwrapped(model), Path(folder)
    config = config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_adapter(model):
        adapter: Any = model
        adapter.save_pretrained(folder)
        _write_json({**config, "weights": "adapter"}, folder / CONFIG_FILE)
        return
    state = {name: _whole(value) for name, value in model.state_dict().items()}
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    kept, tied = _without_ties(state)
    name = SAFE if _may_be_safe(kept) else PLAIN
    _write_weights(kept, folder / name)
    _write_json({**config, "weights": name, "tied": tied}, folder / CONFIG_FILE)


def load(
    original: nn.Module | Callable[[], nn.Module],
    folder: Folder,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **choices: Any,
) -> Any:
    """Return the converted model that :func:`save` wrote.

    Args:
        original: the model as it was before conversion, whose weights need not be the trained ones, or what makes it.
        folder: given to :func:`save`.
        args, kwargs: example inputs; by default they are made of the recorded shapes and dtypes.
        choices: further arguments of :func:`hc_transform.convert`, in place of the recorded ones.

    Raises:
        CheckpointError: the folder, the original and the recorded residuals do not fit one another.

    >>> import tempfile, torch, hc_transform as hct
    >>> make = lambda: torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    >>> x, folder = torch.randn(2, 5, 8), tempfile.mkdtemp()
    >>> hc = hct.convert(make(), args=(x,))
    >>> hct.save(hc, folder)
    >>> torch.equal(hct.load(make, folder)(x), hc(x))
    True
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG_FILE)
    made = original if isinstance(original, nn.Module) else original()
    converted = convert_like(made, config, args, kwargs, **choices)
    if config.get("weights") == "adapter":
        return with_adapter(converted, folder)
    state = _read_weights(folder / config["weights"])
    state.update({name: state[kept] for name, kept in config["tied"].items()})
    own = converted.state_dict()
    others = [name for name in own.keys() & state.keys() if _kind(own[name]) != _kind(state[name])]
    if others:
        first = min(others)
        warnings.warn(
            f"{len(others)} tensors of {folder} are cast to the model's dtype, among them {first}: "
            f"{_kind(state[first])} there, {_kind(own[first])} here. Make the original in the dtype that was saved to "
            "load it to the bit.",
            UserWarning,
            stacklevel=2,
        )
    try:
        converted.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {folder} do not fit the converted {type(made).__name__}: {error}"
        ) from error
    return converted


def convert_like(
    model: nn.Module,
    config: Mapping[str, Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **choices: Any,
) -> Any:
    """Convert a model as another one was, and check that it has the same residuals and connections.

    Args:
        model: the original.
        config: of :func:`hc_transform.config_of`.
        args, kwargs: example inputs; by default they are made of the recorded shapes and dtypes.
        choices: further arguments of :func:`hc_transform.convert`, in place of the recorded ones; so is given what a
            config does not hold: a connection of one's own, functions and classes in hints.

    Raises:
        CheckpointError: the model has other residuals, or the config needs what is not given.
    """
    options = choices_of(config, choices)
    if not len(args) and kwargs is None and config["inputs"] is not None:
        args, kwargs = made_inputs(config["inputs"], model)
    converted = convert(model, args, kwargs, **options)
    expected, found = config["residuals"], residuals_of(converted)
    if expected != found:
        raise CheckpointError(_other_residuals(type(model).__name__, expected, found))
    return converted


def _other_residuals(name: str, expected: Sequence[Any], found: Sequence[Any]) -> str:
    there, here = ({r["name"]: r for r in residuals} for residuals in (expected, found))
    lost, new = [n for n in there if n not in here], [n for n in here if n not in there]
    parts = [f"{len(expected)} residuals were saved and {len(found)} are found"]
    for text, names in (("not found", lost), ("new", new)):
        if names:
            parts.append(f"{text}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    other = next((n for n in there if n in here and there[n] != here[n]), None)
    if other is not None:
        keys = [key for key in there[other] if there[other][key] != here[other].get(key)]
        parts.append(f"{other} has {keys[0]} {here[other].get(keys[0])}, and {there[other][keys[0]]} was saved")
    return (
        f"{name} is not the model that was converted: {'; '.join(parts)}. Make it with the configuration that it had, "
        "and give example inputs with args= and kwargs= if those recorded do not fit"
    )


def with_adapter(converted: nn.Module, folder: Path) -> Any:
    """Return a converted model with the adapter of PEFT that is in ``folder``."""
    from peft import PeftModel

    return PeftModel.from_pretrained(converted, str(folder))


def _is_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "save_pretrained") and hasattr(model, "get_base_model")


def _whole(value: Any) -> Any:
    """Return a tensor of all ranks' shards, or the value."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _without_ties(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each tensor under the first of its names, and the others with that name."""
    kept: dict[str, Any] = {}
    names: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel():
            place = value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
            if place in names:
                tied[name] = names[place]
                continue
            names[place] = name
        kept[name] = value
    return kept, tied


def _may_be_safe(state: Mapping[str, Any]) -> bool:
    plain = all(isinstance(value, Tensor) and value.layout is torch.strided for value in state.values())
    return plain and importlib.util.find_spec("safetensors") is not None


def _write_weights(state: Mapping[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    if path.name == SAFE:
        from safetensors.torch import save_file

        save_file({name: value.contiguous().clone() for name, value in state.items()}, part)
    else:
        torch.save(dict(state), part)
    os.replace(part, path)


def _read_weights(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} is not there: the folder is not whole, save the model again")
    if path.name != SAFE:
        plain: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return plain
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(f"{path} needs safetensors, which is not installed: pip install safetensors")
    from safetensors.torch import load_file

    return dict(load_file(path))


def _write_json(config: Mapping[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(config, indent=1) + "\n")
    os.replace(part, path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}, so it holds no model that hct.save wrote: one that Hugging "
            "Face's save_pretrained wrote is loaded by hct.from_pretrained(auto_class, folder), weights of an original "
            "before hct.convert"
        )
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _kind(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
