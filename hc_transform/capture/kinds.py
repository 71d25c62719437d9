"""What kind of operation a node is, as far as streams care."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn

from ..errors import OUT_OF_RESOURCES
from ..graphs.dialects import first_alone, has_several_outputs, is_lifted, name_of, takes_first
from ..graphs.guards import CHECKS
from ..graphs.operations import (
    CUTS,
    FILLED_ALIKE,
    IDENTITIES,
    MOVES,
    NORMS,
    POINTWISES,
    PRODUCTS,
    QUOTIENTS,
    RANDOMS,
    REDUCES,
    Kind,
    has_known_home,
    tensors_of,
)
from ..graphs.shape_reads import is_shape_read
from ..graphs.shared_memory import seen_elsewhere
from ..models.copies import clone_structure, has_hooks
from ..models.state import state_restored
from ..streams.in_place import version_of
from .trace import trace

POINTWISE_MODULES = tuple(
    getattr(nn, name)
    for name in (
        "ELU CELU SELU GELU ReLU ReLU6 LeakyReLU PReLU SiLU Mish Hardswish Hardsigmoid Hardtanh Hardshrink "
        "Softplus Softshrink Softsign Sigmoid LogSigmoid Tanh Tanhshrink Threshold GLU"
    ).split()
)
NORM_MODULES = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
MOVE_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Kinds:
    """The kind of each node of one graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))
        self._of_module: dict[int, Kind] = {}
        self._constant: dict[fx.Node, bool] = {}
        self.shared = seen_elsewhere(graph_module)

    def of(self, node: fx.Node) -> Kind:
        """Return the kind of ``node``; what is not known mixes."""
        if node.target in CHECKS or is_shape_read(node):
            return Kind.SHAPE
        if node in self.shared:
            return Kind.MIX
        if node.op == "call_module":
            return self.of_module(self.modules[str(node.target)])
        if node.op in ("call_function", "call_method"):
            return self._of_name(node, name_of(node))
        return Kind.IDENTITY if node.op == "output" else Kind.MIX

    def _of_name(self, node: fx.Node, name: str) -> Kind:
        if not has_known_home(node) or has_several_outputs(node) and not first_alone(node):
            return Kind.MIX
        if takes_first(node):
            return Kind.IDENTITY
        if name in PRODUCTS | QUOTIENTS:
            scaled = self.scaled_by_constant(node, name)
            return Kind.SCALE if scaled else Kind.POINTWISE
        if name == "getattr" and node.args[1] == "data" or name in CUTS:
            return Kind.CUT
        if name == "getattr" and node.args[1] in ("T", "mT", "H"):
            return Kind.MOVE
        for names, kind in (
            (IDENTITIES, Kind.IDENTITY),
            (RANDOMS, Kind.RANDOM),
            (MOVES, Kind.MOVE),
            (POINTWISES, Kind.POINTWISE),
            (REDUCES, Kind.REDUCE),
            (NORMS, Kind.NORM),
        ):
            if name in names:
                return kind
        return Kind.MIX

    def scaled_by_constant(self, node: fx.Node, name: str) -> bool:
        """Whether a product or quotient scales one value: ``x * x``, ``1 / x`` and ``x // 2`` do not."""
        data = [n for n in tensors_of(node) if not self.is_constant(n)]
        if name in QUOTIENTS and (node.kwargs.get("rounding_mode") or data and data[0] is not _first(node)):
            return False
        return len(data) <= 1

    def is_constant(self, node: fx.Node) -> bool:
        """Whether ``node`` does not depend on the input: a parameter, a number, a view of one."""
        waiting = [node]
        while node not in self._constant:
            current = waiting[-1]
            known = self._constant_by(current)
            if known is None:
                waiting += [n for n in current.all_input_nodes if n not in self._constant]
            else:
                self._constant[current] = known
                waiting.pop()
        return self._constant[node]

    def _constant_by(self, node: fx.Node) -> bool | None:
        """Return :meth:`is_constant` as its operands decide it, None where they are yet to be asked."""
        if node.op == "get_attr" or is_lifted(node) or is_shape_read(node):
            return True
        cheap = node.op in ("call_function", "call_method") and name_of(node) in MOVES | POINTWISES | IDENTITIES
        if not cheap or not has_known_home(node):
            return False
        known = [self._constant.get(n) for n in node.all_input_nodes]
        return False if False in known else None if None in known else True

    def of_module(self, module: nn.Module) -> Kind:
        """Return the kind of a leaf module; the code of one that is not torch's is looked at."""
        if id(module) not in self._of_module:
            self._of_module[id(module)] = self._judge_module(module)
        return self._of_module[id(module)]

    def _judge_module(self, module: nn.Module) -> Kind:
        if any(map(has_hooks, module.modules())):
            return Kind.MIX  # called once a stream, its hooks would be too
        if type(module) is nn.Identity:
            return Kind.IDENTITY
        for classes, kind in (
            (DROPOUT_MODULES, Kind.RANDOM),
            (MOVE_MODULES, Kind.MOVE),
            (POINTWISE_MODULES, Kind.POINTWISE),
            (NORM_MODULES, Kind.NORM),
        ):
            if isinstance(module, classes):
                return kind
        if type(module) is nn.Sequential:
            return _together([self.of_module(child) for child in module])
        if type(module).__module__.startswith("torch.") or any(p.dim() > 1 and _wide(p) for p in module.parameters()):
            return Kind.MIX
        if type(module).__module__.startswith("einops.layers") and type(module).__name__ == "Rearrange":
            return Kind.MOVE
        return self._judge_code(module)

    def _judge_code(self, module: nn.Module) -> Kind:
        """Trace a small module in training mode and judge its operations together."""
        copy = clone_structure(module).train()
        versions = [(buffer, version_of(buffer)) for buffer in copy.buffers()]
        try:
            with state_restored(copy):
                inner = _symbolic(copy)
                counts = any(version_of(buffer) != version for buffer, version in versions)
        except OUT_OF_RESOURCES:
            raise
        except Exception:  # noqa: BLE001  # whatever code raises that is shown what it is not made for
            return Kind.MIX
        if counts or any(isinstance(v, fx.Proxy) for m in copy.modules() for v in m._buffers.values()):
            return Kind.MIX  # it keeps a state, which would change once a stream
        kinds = Kinds(inner)
        kinds.shared = frozenset()  # what its input shares memory with is seen where it is called
        nodes = [n for n in inner.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        found = [kinds.of(n) for n in nodes]
        if Kind.RANDOM in found:  # the mask is what the module makes of ones
            return Kind.RANDOM if _scales_at_random(inner.graph, kinds) else Kind.MIX
        return _together(found)


def _symbolic(module: nn.Module) -> fx.GraphModule:
    """Return a graph of a small module; one that computes with shapes is shown a tensor."""
    try:
        return fx.symbolic_trace(module)
    except OUT_OF_RESOURCES:
        raise
    except Exception:  # noqa: BLE001  # as above
        first = next(iter(inspect.signature(module.forward).parameters))
        return trace(module, {first: torch.randn(2, 3, 4)}, inline=frozenset({""})).graph_module


def _scales_at_random(graph: fx.Graph, kinds: Kinds) -> bool:
    """Whether all that happens to the data is that it is scaled, by constants and random masks."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        sources = [n for n in tensors_of(node) if n in data]
        kind, name = kinds.of(node), name_of(node)
        if node.op == "placeholder":
            data.add(node)
        elif not sources or kind is Kind.SHAPE or name in FILLED_ALIKE:
            continue
        elif node.op == "output" or len(sources) == 1 and kind in (Kind.IDENTITY, Kind.SCALE):
            data.add(node)
        elif len(sources) == 1 and (kind is Kind.RANDOM and "bernoulli" not in name or name in PRODUCTS):
            data.add(node)
        elif len(sources) == 1 and name in QUOTIENTS and _first(node) in data:
            data.add(node)
        else:
            return False
    return all(n in data for n in tensors_of(graph.output_node()))


def _together(kinds: list[Kind]) -> Kind:
    """Return the kind of operations applied one after the other."""
    present = set(kinds) - {Kind.SHAPE, Kind.IDENTITY}
    if Kind.MIX in present or Kind.CUT in present:
        return Kind.MIX
    if Kind.RANDOM in present:  # the mask is what comes of ones, which only scaling leaves as it is
        return Kind.RANDOM if present <= {Kind.RANDOM, Kind.SCALE} else Kind.MIX
    if present & {Kind.NORM, Kind.REDUCE}:
        return Kind.NORM
    for kind in (Kind.POINTWISE, Kind.SCALE, Kind.MOVE):
        if kind in present:
            return kind
    return Kind.IDENTITY


def _wide(parameter: torch.Tensor) -> bool:
    return parameter.numel() > max(parameter.shape)


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")
