"""The module that holds the connections of a block."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError


class ConnectionDict(nn.Module):
    """The connections of one module by name, ``block.hyper_connections``, with what else conversion added to it.

    It is no ``nn.ModuleDict``, so that PEFT trains and saves it by name: ``modules_to_save=["hyper_connections"]``.

    Raises:
        CheckpointError: on ``load_state_dict(strict=True)``, where the checkpoint has none of these connections, or
            others.
    """

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def keys(self) -> Iterable[str]:
        """Return the names."""
        return self._modules.keys()

    def values(self) -> Iterable[Any]:
        """Return the modules."""
        return self._modules.values()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Return the modules with their names."""
        return self._modules.items()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        given = {
            key: value.shape
            for key, value in state_dict.items()
            if key.startswith(prefix) and isinstance(value, Tensor)
        }
        own = {prefix + name: tensor.shape for name, tensor in self.state_dict().items()}
        if own and given != own and _is_strict():
            raise CheckpointError(_mismatch(prefix.rstrip("."), own, given))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


def _is_strict() -> bool:
    """Whether what calls is ``load_state_dict(strict=True)``; modules are told True whatever was asked for."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back
    return False


def _mismatch(path: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if not given:
        return (
            f"the checkpoint has no connections for {path}, so it was not saved from this conversion. If it is the "
            "original model's, load it before convert, or with strict=False, which leaves the connections where they "
            "are; a folder of hct.save is loaded by hct.load(original, folder)"
        )
    differ = sorted(key for key in {**own, **given} if own.get(key) != given.get(key))
    shown = "; ".join(f"{key}: {_shape(own.get(key))} here, {_shape(given.get(key))} there" for key in differ[:2])
    return (
        f"the checkpoint has other connections for {path} than this model ({shown}): convert with the options it was "
        "made with (hct.config_of(model) tells them, hct.convert_like(original, config) takes them), or load with "
        "hct.load(original, folder)"
    )


def _shape(shape: Any) -> str:
    return "none" if shape is None else str(list(shape))
