"""Load converted models that ``save_pretrained`` of Hugging Face wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import HF_KEY
from ..errors import CheckpointError
from ..residuals.keys import CONNECTIONS_NAME
from .saving import CONFIG_FILE, Folder, convert_like, load, with_adapter

ADAPTER = "adapter_config.json"
CONVERSIONS = "_weight_conversions"  # attribute of a model of transformers: how names in its files differ
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def from_pretrained(
    auto_class: Any,
    folder: Folder,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    choices: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Return the converted Hugging Face model that its ``save_pretrained`` wrote.

    ``config.json`` says under "hc_transform" how it was converted. The folder of a PEFT adapter gives its base,
    converted, with the adapter: one that :func:`hc_transform.save` made, or whose base was saved converted.

    Args:
        auto_class: a class of transformers with ``from_pretrained``, the one whose model was converted.
        folder: given to ``save_pretrained``, or a name on the hub.
        args, kwargs: example inputs; by default they are made of the recorded shapes and dtypes.
        choices: further arguments of :func:`hc_transform.convert`.
        settings: for ``auto_class.from_pretrained``.

    Raises:
        CheckpointError: the folder holds no converted model, or another one than its config says.
    """
    if (Path(folder) / ADAPTER).exists():
        return _adapted(auto_class, Path(folder), args, kwargs, choices or {}, settings)
    model = _without_connections(auto_class, folder, settings)
    config = getattr(model.config, HF_KEY, None)
    if config is None:
        raise CheckpointError(
            f"config.json of {folder} has no {HF_KEY!r}, so that it was not saved by a converted model: load it with "
            f"{auto_class.__name__}.from_pretrained, and convert it with hct.convert"
        )
    converted = convert_like(model, config, args, kwargs, **{"inplace": True, **(choices or {})})
    state = _as_named_in(converted, _connections_in(folder, settings))
    result = converted.load_state_dict(state, strict=False)
    lost = [name for name in result.missing_keys if f"{CONNECTIONS_NAME}." in name]
    if lost or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} has {len(state)} tensors of connections that do not fit the converted {type(model).__name__}: "
            f"missing {lost[:2]}, unexpected {result.unexpected_keys[:2]}. Load it with the class that was saved"
        )
    return converted


def _adapted(
    auto_class: Any,
    folder: Path,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    choices: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Any:
    adapter = json.loads((folder / ADAPTER).read_text())
    base = adapter.get("base_model_name_or_path")
    if base and _is_converted(base):
        return with_adapter(from_pretrained(auto_class, base, args, kwargs, choices, **settings), folder)
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{folder} is an adapter without {CONFIG_FILE}: if its base is a converted model, save it with "
            "hct.save(peft_model, folder), which says how the base was converted; else load it with peft"
        )
    if not base:
        raise CheckpointError(f"{folder}/{ADAPTER} does not name its base model: use hct.load(base_model, folder)")
    return load(lambda: auto_class.from_pretrained(base, **settings), folder, args, kwargs, **choices)


def _is_converted(base: str) -> bool:
    """Whether the model that an adapter names as its base was saved by a converted one."""
    from transformers import PreTrainedConfig

    return HF_KEY in PreTrainedConfig.get_config_dict(base)[0]


def _without_connections(auto_class: Any, folder: Folder, settings: Mapping[str, Any]) -> Any:
    """Load the original; that the file holds connections too is no news."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = auto_class.from_pretrained(folder, output_loading_info=True, **settings)
    finally:
        logging.set_verbosity(verbosity)
    wrong = [name for name in found["unexpected_keys"] if f"{CONNECTIONS_NAME}." not in name]
    if found["missing_keys"] or wrong or found.get("mismatched_keys"):
        logging.get_logger("transformers").warning(
            "%s: missing %s, unexpected %s", folder, sorted(found["missing_keys"]), sorted(wrong)
        )
    return model


def _connections_in(folder: Folder, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of connections in the files of ``folder``."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for path in _files(str(folder), settings):
        with safe_open(path, framework="pt") as file:
            tensors.update({n: file.get_tensor(n) for n in file.keys() if f"{CONNECTIONS_NAME}." in n})  # noqa: SIM118
    return tensors


def _as_named_in(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file under the names that they have in ``model``; transformers renames some layers."""
    own = [name for name in model.state_dict() if f"{CONNECTIONS_NAME}." in name]
    if state.keys() == {*own}:
        return state
    for names in _names_in_files(model, own):
        if state.keys() == {*names.values()}:
            return {name: state[names[name]] for name in own}
    return state


def _names_in_files(model: Any, own: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield by which names ``save_pretrained`` writes tensors: as the model was loaded, and as one made anew."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5, which renames nothing
        return
    held = model.__dict__.get(CONVERSIONS)
    try:
        for conversions in (held, None):
            model.__dict__[CONVERSIONS] = conversions
            marks = {name: torch.tensor(number) for number, name in enumerate(own)}
            written = revert_weight_conversion(model, marks)
            yield {own[int(mark)]: name for name, mark in written.items()}
    finally:
        model.__dict__[CONVERSIONS] = held


def _files(folder: str, settings: Mapping[str, Any]) -> list[str]:
    from transformers.utils.hub import cached_file

    given = {k: v for k, v in settings.items() if k in ("revision", "subfolder", "cache_dir", "token")}

    def found(name: str) -> str | None:
        path: str | None = cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **given)
        return path

    index = found(INDEX)
    names = [WEIGHTS] if index is None else sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    paths = [path for path in map(found, names) if path is not None]
    if not paths:
        raise CheckpointError(f"{folder} has no {WEIGHTS}: save it with save_pretrained, as safetensors")
    return paths
