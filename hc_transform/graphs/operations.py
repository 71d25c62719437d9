"""What operations of graphs are: their kinds by name, what they make tensors of, what they give."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import fx

from .dialects import size_of, type_of, value_of
from .shape_reads import is_shape_read


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
    CUT = "passes no gradient"
    MIX = "mixes"


IDENTITIES = frozenset(
    "contiguous to _to_copy clone alias float half bfloat16 double type type_as identity requires_grad_".split()
)
RANDOMS = frozenset(
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout bernoulli bernoulli_ stochastic_depth "
    "rand rand_like randn randn_like".split()
)
MOVES = frozenset(
    "view reshape permute transpose transpose_ flatten unflatten squeeze unsqueeze movedim moveaxis swapaxes swapdims "
    "t T mT view_as reshape_as roll flip rot90 expand expand_as repeat tile repeat_interleave pad getitem select "
    "narrow slice chunk split tensor_split unbind cat concat concatenate stack pixel_shuffle pixel_unshuffle "
    "channel_shuffle fold unfold rearrange set_item index_select gather as_strided constant_pad_nd".split()
)
POINTWISES = frozenset(
    "add add_ iadd radd sub sub_ isub subtract rsub mul mul_ imul rmul multiply div div_ truediv itruediv rtruediv "
    "rdiv true_divide divide neg neg_ pow pow_ ipow rpow "
    "square sqrt rsqrt exp exp_ expm1 log log1p log2 abs sin cos tan tanh tanh_ sigmoid sigmoid_ relu relu_ "
    "relu6 gelu silu silu_ mish elu elu_ selu celu leaky_relu leaky_relu_ hardswish hardswish_ hardsigmoid "
    "hardsigmoid_ hardtanh hardtanh_ softplus softsign logsigmoid prelu erf clamp clamp_ clip clamp_min "
    "clamp_max maximum minimum where masked_fill masked_fill_ nan_to_num nan_to_num_ reciprocal sign floor ceil round "
    "trunc addcmul addcmul_ addcdiv addcdiv_ lerp lerp_ "
    "eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or "
    "threshold fill_ copy_ zeros_like ones_like full_like new_empty new_ones new_zeros new_full glu".split()
)
REDUCES = frozenset("mean sum var std var_mean std_mean norm vector_norm amax amin logsumexp".split())
NORMS = frozenset("layer_norm rms_norm group_norm batch_norm instance_norm normalize local_response_norm".split())
LINEAR_POINTWISES = frozenset("add add_ iadd radd sub sub_ isub subtract rsub neg neg_ addcmul addcdiv lerp".split())
PRODUCTS = frozenset("mul mul_ imul rmul multiply".split())
QUOTIENTS = frozenset("div div_ divide truediv itruediv true_divide".split())
FILLED_ALIKE = frozenset(  # tensors that take no more than shape and dtype from another
    "zeros_like ones_like full_like empty_like rand_like randn_like new_empty new_ones new_zeros new_full".split()
)
CUTS = frozenset("detach detach_".split())
HOMES = ("torch", "_operator", "operator", "math", "builtins", "einops", "torchvision.ops")
FACTORIES = frozenset(
    "arange as_tensor asarray bartlett_window blackman_window empty eye full hamming_window hann_window kaiser_window "
    "linspace logspace normal ones rand randint randn randperm scalar_tensor tensor tril_indices triu_indices "
    "zeros".split()
)


# What code may ask about the state of torch, which a graph asks anew on every call.
QUESTIONS = (
    "is_autocast_enabled get_autocast_dtype is_autocast_cpu_enabled get_autocast_gpu_dtype get_autocast_cpu_dtype "
    "get_default_dtype are_deterministic_algorithms_enabled is_deterministic_algorithms_warn_only_enabled "
    "is_inference_mode_enabled"
).split()
ASKED = frozenset({torch._C.is_inference_mode_enabled, *(getattr(torch, n) for n in QUESTIONS if hasattr(torch, n))})


# Constants that code may compare by identity.
TOLD_APART = (enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)


def set_item(x: Any, index: Any, value: Any) -> Any:
    """Assign ``x[index] = value`` and return ``x``, so that a graph sees where ``x`` comes from."""
    x[index] = value
    return x


def set_attribute(x: Any, name: str, value: Any) -> None:
    """Set an attribute of an object that a graph is given."""
    setattr(x, name, value)


def is_constant(value: Any) -> bool:
    """Whether a trace can hold ``value`` as it is."""
    if isinstance(value, (tuple, list)):
        return all(is_constant(v) for v in value)
    plain = value is None or isinstance(value, (bool, int, float, complex, str, *TOLD_APART))
    return plain and type(value).__module__ != "numpy"  # whose numbers no code can name


def has_known_home(node: fx.Node) -> bool:
    """Whether a node's name means what it means in torch: a user's own function of that name may do anything."""
    if node.op != "call_function" or node.target is set_item:
        return True
    target: Any = node.target
    if getattr(target, "__objclass__", None) is torch._C.TensorBase:
        return True
    home = getattr(target, "__module__", None)
    if home is None:
        return type(target) is type(len)
    if home.startswith("torch._ops."):
        return home == "torch._ops.aten"
    return any(home == known or home.startswith(known + ".") for known in HOMES)


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node is given, each as often as it is given."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) if is_tensor(n) else None)
    return found


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is a graph node that stands for a tensor, as far as is known."""
    if not isinstance(node, fx.Node):
        return False
    known = type_of(node)
    return issubclass(known, torch.Tensor) if known is not None else not is_shape_read(node)


def holds_no_mean(node: fx.Node) -> bool:
    """Whether a tensor is of whole numbers or of a mask, such as ``x > 0``: others see that of the readout."""
    value, known = value_of(node), node.meta.get("tensor_meta")
    dtype = value.dtype if isinstance(value, torch.Tensor) else getattr(known, "dtype", None)
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


def shape_of(node: fx.Node) -> torch.Size | None:
    """Return the shape of ``node`` on the example inputs, None where it is not known."""
    meta = node.meta.get("tensor_meta")
    if "val" not in node.meta and meta is not None and hasattr(meta, "shape"):
        return meta.shape
    value = value_of(node)
    return size_of(value) if isinstance(value, torch.Tensor) else None
