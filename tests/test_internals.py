"""What the package uses of torch that torch does not promise: each name fails by itself when it goes."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

PACKAGE = Path(__file__).parent.parent / "hc_transform"
REGISTRIES = (
    "_parameters _buffers _modules _non_persistent_buffers_set _forward_hooks _forward_hooks_with_kwargs "
    "_forward_pre_hooks _forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks"
).split()
OPERATORS = "_schema _overloadpacket _overloadname".split()


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def dotted(node: ast.AST) -> str | None:
    """Return ``torch.a.b`` as text."""
    if isinstance(node, ast.Name):
        return node.id
    home = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{home}.{node.attr}" if home and isinstance(node, ast.Attribute) else None


def names() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name.startswith("torch."))
            elif isinstance(node, ast.Attribute) and (dotted(node) or "").startswith("torch."):
                yield str(dotted(node))


def resolved(name: str) -> Any:
    """Return what a name stands for; a part that is no attribute is imported."""
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:i]))
        value = getattr(value, part)
    return value


USED = sorted({name for name in names() if private(name) and not name.endswith("__")})


def test_names_are_found():
    assert {"torch._functorch.apis.vmap_impl", "torch.fx.passes.shape_prop._extract_tensor_metadata"} <= {*USED}


@pytest.mark.parametrize("name", USED)
def test_torch_has(name):
    if "triton" in name or "_inductor" in name:
        pytest.importorskip("triton")
    resolved(name)


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_module_has(name):
    assert name in nn.Module().__dict__


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has(name):
    assert hasattr(torch.ops.aten.add.Tensor, name)


def test_tensors_tell_their_memory_and_how_often_it_was_written_into():
    x = torch.zeros(2)
    before = x._version
    x.view(2).add_(1)
    assert x._version == before + 1
    assert x.untyped_storage()._cdata == x[1:].untyped_storage()._cdata != torch.zeros(2).untyped_storage()._cdata


def test_graphs_have_their_calling_convention():
    assert type(fx.Graph()._codegen) is fx.graph.CodeGen
