"""Functions that write into their input: which input, and how what is written reaches each stream of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.compiler import assume_constant_result

# Each element by itself, so that streams go through as one value would: functions, and methods with "_" at the end.
POINTWISE = frozenset(
    "add sub subtract mul multiply div divide true_divide floor_divide remainder fmod neg negative pow square sqrt "
    "rsqrt exp exp2 expm1 log log1p log2 log10 abs absolute sin cos tan tanh sinh cosh atan sigmoid relu relu6 silu "
    "mish elu selu celu leaky_relu hardswish hardsigmoid hardtanh threshold erf clamp clip clamp_min clamp_max "
    "masked_fill nan_to_num reciprocal sign floor ceil round trunc addcmul addcdiv lerp fill zero copy float_power "
    "xlogy hypot maximum minimum detach iadd isub imul itruediv idiv ipow ifloordiv imod setitem".split()
)
RESHAPED = frozenset("unsqueeze squeeze t transpose swapaxes swapdims".split())
DROPOUTS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout".split())
INPLACE_AT = {  # where functions of torch.nn.functional take inplace as a position
    **dict.fromkeys("relu relu6 silu mish hardswish hardsigmoid selu".split(), 1),
    **dict.fromkeys("elu celu leaky_relu".split(), 2),
    **dict.fromkeys("hardtanh threshold dropout alpha_dropout dropout1d dropout2d dropout3d".split(), 3),
}
AUGMENTED = frozenset("iadd isub imul itruediv idiv ipow ifloordiv imod iand ior ixor ilshift irshift".split())
ENGINES = ("torch.distributed.", "accelerate.")  # they take tensors apart and put them together again
REFUSED = {
    "register_hook": "gradients flow through its streams. Register the hook on a module within a branch",
    "register_post_accumulate_grad_hook": "gradients flow through its streams",
    "retain_grad": "gradients flow through its streams. Keep the gradient of a module's output within a branch",
    "requires_grad_": "its streams come from the block before. Detach the block's input in its place",
    "set_": "its streams would keep their memory. Make a new tensor",
    "resize_": "its streams would keep their size. Make a new tensor",
    "setting data": "its streams would keep theirs. Write its elements, x[...] = value, or make a new tensor",
    "setting grad": "gradients flow through its streams",
    "setting requires_grad": "its streams come from the block before. Detach the block's input in its place",
}


class Write(NamedTuple):
    """What a call writes into.

    Attributes:
        target: the argument.
        carried: whether the call does to each stream what it does to a value.
        random: whether it scales by a random mask, one for all streams.
        returns: whether it returns its target.
    """

    target: Any
    carried: bool
    random: bool
    returns: bool


@assume_constant_result
def name_of(func: Any) -> str:
    """Return the name of a function, or of the attribute that is read or ("setting ...") written."""
    name: str = getattr(func, "__name__", "")
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return {"__get__": attribute, "__set__": f"setting {attribute}"}.get(name, name)


def write_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Write | None:
    """Return what a call of the function of this name writes into, as far as names and arguments tell."""
    bare = name.strip("_")
    place = INPLACE_AT.get(bare)
    inplace = kwargs.get("inplace") or place is not None and len(args) > place and args[place] is True
    method = name.endswith("_") and not name.endswith("__") or bare in AUGMENTED or name == "__setitem__"
    if kwargs.get("out") is not None:
        target = kwargs["out"]
    elif (method or inplace) and args:
        target = args[0]
    elif (method or inplace) and "input" in kwargs:
        target = kwargs["input"]
    else:
        return None
    return Write(target, bare in POINTWISE or bare in RESHAPED, bare in DROPOUTS, name != "__setitem__")


def refusal(name: str) -> str:
    """Return why what a function does to a trunk value could not reach its streams; "" if it can."""
    return (
        f"{name} of a value between two converted blocks is not possible: {REFUSED[name]}." if name in REFUSED else ""
    )


def of_engine(hook: Any) -> bool:
    """Whether a hook belongs to an engine that shards or moves tensors, and is to see the streams themselves."""
    owner = type(getattr(hook, "__self__", hook)).__module__ or ""
    home = getattr(hook, "__module__", None) or ""
    return f"{owner}.".startswith(ENGINES) or f"{home}.".startswith(ENGINES)


def has_own_hooks(module: Any) -> bool:
    """Whether hooks that a user registered, and no engine, are called when ``module`` is."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return not all([of_engine(hook) for hook in hooks])


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return -1 if tensor.is_inference() else tensor._version
