"""What kind of operation a node is, as far as streams care."""

from __future__ import annotations

import enum
import inspect
from typing import Any

import torch
from torch import fx, nn

from .aliases import version_of
from .guards import CHECKS
from .reads import is_shape_read
from .state import state_restored
from .structure import clone_structure, has_hooks


class Kind(enum.Enum):
    """Kinds of operations, from harmless to opaque."""

    SHAPE = "reads shapes"
    IDENTITY = "passes its input through"
    SCALE = "scales by a constant or a parameter"
    RANDOM = "scales by a random mask"
    MOVE = "moves elements"
    POINTWISE = "acts on each element"
    REDUCE = "reduces an axis"
    NORM = "normalises"
    MIX = "mixes"


IDENTITIES = frozenset("contiguous to clone float half bfloat16 double type type_as identity requires_grad_".split())
RANDOMS = frozenset(
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout bernoulli bernoulli_ stochastic_depth drop_path "
    "rand rand_like randn randn_like".split()
)
MOVES = frozenset(
    "view reshape permute transpose transpose_ flatten unflatten squeeze unsqueeze movedim moveaxis swapaxes swapdims "
    "t T mT view_as reshape_as roll flip rot90 expand expand_as repeat tile repeat_interleave pad getitem select "
    "narrow chunk split tensor_split unbind cat concat concatenate stack pixel_shuffle pixel_unshuffle channel_shuffle "
    "fold unfold rearrange set_item index_select gather as_strided constant_pad_nd".split()
)
POINTWISES = frozenset(
    "add add_ iadd radd sub sub_ isub rsub mul mul_ imul multiply div div_ truediv itruediv true_divide neg neg_ pow "
    "pow_ ipow square sqrt rsqrt exp exp_ expm1 log log1p log2 abs sin cos tan tanh tanh_ sigmoid sigmoid_ relu relu_ "
    "relu6 gelu silu silu_ mish elu elu_ selu celu leaky_relu leaky_relu_ hardswish hardswish_ hardsigmoid "
    "hardsigmoid_ hardtanh hardtanh_ softplus softsign logsigmoid prelu erf clamp clamp_ clip clamp_min "
    "clamp_max maximum minimum where masked_fill masked_fill_ nan_to_num nan_to_num_ reciprocal sign floor ceil round "
    "trunc addcmul addcmul_ addcdiv lerp eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or "
    "threshold fill_ copy_ zeros_like ones_like full_like new_empty new_ones new_zeros new_full glu detach_".split()
)
REDUCES = frozenset("mean sum var std var_mean std_mean norm vector_norm amax amin logsumexp".split())
NORMS = frozenset("layer_norm rms_norm group_norm batch_norm instance_norm normalize local_response_norm".split())
LINEAR_POINTWISES = frozenset("add add_ iadd radd sub sub_ isub".split())

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

    def of(self, node: fx.Node) -> Kind:
        """Return the kind of ``node``; what is not known mixes."""
        if node.target in CHECKS or is_shape_read(node):
            return Kind.SHAPE
        if node.op == "call_module":
            return self.of_module(self.modules[str(node.target)])
        if node.op in ("call_function", "call_method"):
            return self._of_name(node, name_of(node))
        return Kind.IDENTITY if node.op == "output" else Kind.MIX

    def _of_name(self, node: fx.Node, name: str) -> Kind:
        if name in ("mul", "mul_", "imul", "multiply", "div", "div_", "truediv", "itruediv", "true_divide"):
            data = [n for n in node.all_input_nodes if not self.is_constant(n)]
            return Kind.SCALE if len(data) <= 1 else Kind.POINTWISE
        if name == "getattr" and node.args[1] in ("T", "mT", "H", "data"):
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

    def is_constant(self, node: fx.Node) -> bool:
        """Whether ``node`` does not depend on the input: a parameter, a number, a view of one."""
        if node.op == "get_attr":
            return True
        if is_shape_read(node):
            return True
        cheap = node.op in ("call_function", "call_method") and name_of(node) in MOVES | POINTWISES | IDENTITIES
        return cheap and all(self.is_constant(n) for n in node.all_input_nodes)

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
        except Exception:
            return Kind.MIX
        if counts or any(isinstance(v, fx.Proxy) for m in copy.modules() for v in m._buffers.values()):
            return Kind.MIX  # it keeps a state, which would change once a stream
        kinds = Kinds(inner)
        nodes = [n for n in inner.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        together = _together([kinds.of(n) for n in nodes])
        if together is Kind.RANDOM and _adds_noise(inner.graph, kinds):
            return Kind.MIX  # noise that is added is no mask
        return together


def _symbolic(module: nn.Module) -> fx.GraphModule:
    """Return a graph of a small module; one that computes with shapes is shown a tensor."""
    try:
        return fx.symbolic_trace(module)
    except Exception:
        from .trace import trace  # which needs kinds itself

        first = next(iter(inspect.signature(module.forward).parameters))
        return trace(module, {first: torch.randn(2, 3, 4)}, inline=frozenset({""})).graph_module


def _adds_noise(graph: fx.Graph, kinds: Kinds) -> bool:
    """Whether something random is added to data."""
    random: set[fx.Node] = set()
    data: set[fx.Node] = set()
    for node in graph.nodes:
        kind, sources = kinds.of(node), set(node.all_input_nodes)
        if node.op == "placeholder" or kind is not Kind.SHAPE and sources & data:
            data.add(node)
        if kind is Kind.RANDOM or sources & random:
            random.add(node)
        if name_of(node) in LINEAR_POINTWISES and sources & random and sources & data - random:
            return True
    return False


def _together(kinds: list[Kind]) -> Kind:
    """Return the kind of operations applied one after the other."""
    present = set(kinds) - {Kind.SHAPE, Kind.IDENTITY}
    if Kind.MIX in present:
        return Kind.MIX
    if present & {Kind.NORM, Kind.REDUCE}:
        return Kind.NORM if Kind.RANDOM not in present else Kind.MIX
    if Kind.RANDOM in present:
        return Kind.RANDOM
    for kind in (Kind.POINTWISE, Kind.SCALE, Kind.MOVE):
        if kind in present:
            return kind
    return Kind.IDENTITY


def _wide(parameter: torch.Tensor) -> bool:
    return parameter.numel() > max(parameter.shape)


def name_of(node: fx.Node) -> str:
    """Return the bare name of a function or method: "add" for ``+``, ``torch.add`` and ``.add``."""
    if isinstance(node.target, str):
        return node.target.rpartition(".")[2].strip("_") if node.target.startswith("__") else node.target
    return str(getattr(node.target, "__name__", node.target))


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is a graph node that stands for a tensor, as far as is known."""
    if not isinstance(node, fx.Node):
        return False
    known = node.meta.get("hc_type")
    return issubclass(known, torch.Tensor) if known is not None else not is_shape_read(node)


def shape_of(node: fx.Node) -> torch.Size | None:
    """Return the shape of ``node`` on the example inputs, None where it is not known."""
    meta = node.meta.get("tensor_meta")
    if meta is not None and hasattr(meta, "shape"):
        return meta.shape
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None
