"""Graphs that other tools make: what their operators are called here, and what their nodes tell of values and code.

==============  ====================================================  ==========================================
dialect         operators                                             parameters
==============  ====================================================  ==========================================
symbolic trace  torch functions, methods, modules                     ``get_attr``, or in modules
torch.export    ``aten`` overloads, decomposed or not                 ``get_attr``, or placeholders "p_", "b_", "c_"
Dynamo          torch functions, methods                              placeholders
==============  ====================================================  ==========================================

The passes know operations by the names of torch's functions. This file alone knows the others: an operator of ATen
has here the name of the function that it does the work of (``_native_batch_norm_legit`` is "batch_norm"), and one that
returns several tensors stands for the first of them, as long as nothing takes another.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen

from ..errors import UnknownDialect
from . import meta
from .source_lines import INTERNAL_FILES, TORCH

RENAMED = {
    "_unsafe_view": "view",
    "_reshape_alias": "view",
    "unsafe_split": "split",
    "unsafe_chunk": "chunk",
    "split_with_sizes": "split",
    "unsafe_split_with_sizes": "split",
    "index": "index_select",
    "lift_fresh": "clone",
    "lift_fresh_copy": "clone",
    "linalg_vector_norm": "vector_norm",
    "_prelu_kernel": "prelu",
    "log_sigmoid": "logsigmoid",
    "convolution": "conv2d",
    "_convolution": "conv2d",
}
FIRST_OUTPUTS = {  # operators of several outputs, of which the first is the value
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "_fused_rms_norm": "rms_norm",
    "native_dropout": "dropout",
    **dict.fromkeys(
        "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training "
        "_batch_norm_with_update _batch_norm_with_update_functional "
        "_batch_norm_no_update".split(),
        "batch_norm",
    ),
}
SYMBOLIC_READS = frozenset(  # what reads sizes, computes with them or asserts about them
    "sym_size sym_numel sym_stride sym_storage_offset sym_constrain_range sym_constrain_range_for_size sym_max sym_min "
    "sym_not sym_ite sym_int sym_float sym_sum sym_sqrt _assert_scalar _functional_assert_scalar "
    "_assert_tensor_metadata _functional_sym_constrain_range _functional_sym_constrain_range_for_size".split()
)
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
LIFTED = ("p_", "b_", "c_")  # torch.export's names of placeholders for parameters, buffers and constants
HELD = (".parameters_", "_parameters_", "_buffers_")  # parts of Dynamo's
STATISTICS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")  # F.batch_norm
ADDING = frozenset("add add_ sub sub_ add_relu".split())
REFUSED = {
    "prims": "decomposed into primitives (torch.ops.prims), which norms and activations are no more to be told from",
    **dict.fromkeys(
        ("quantized", "quantized_decomposed", "_quantized", "torchao"),
        "quantized, and streams of integers can be neither mixed nor trained",
    ),
}


# -- names


def operator_name(target: Any) -> str | None:
    """Return the name of the torch function that an operator of ``torch.ops`` does the work of; None for other targets.

    >>> operator_name(torch.ops.aten.native_layer_norm.default), operator_name(torch.ops.aten.permute_copy.default)
    ('layer_norm', 'permute')
    """
    if not isinstance(target, OPERATORS):
        return None
    own = _own_name(target)
    if _namespace(target) != "aten":
        return own
    if own.endswith("_copy") and hasattr(torch.ops.aten, own.removesuffix("_copy")) and own not in RENAMED:
        own = own.removesuffix("_copy") if own != "_to_copy" else own
    return RENAMED.get(own) or FIRST_OUTPUTS.get(own, own)


def name_of(node: fx.Node) -> str:
    """Return the bare name of a function or method: "add" for ``+``, ``torch.add``, ``.add``, ``aten.add.Tensor``."""
    target: Any = node.target
    name = operator_name(target)
    if isinstance(target, str):
        name = target.rpartition(".")[2]
    elif name is None:
        name = str(getattr(target, "__name__", target))
    return name.strip("_") if name.startswith("__") else name


def _own_name(target: Any) -> str:
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return str(packet.__name__)


def _namespace(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.namespace)
    return str(target._qualified_op_name).partition("::")[0]


def reads_symbols(node: fx.Node) -> bool:
    """Whether ``node`` reads sizes, computes with them or asserts something about them, in the way of torch.export."""
    if node.op != "call_function":
        return False
    name = _own_name(node.target) if isinstance(node.target, OPERATORS) else getattr(node.target, "__name__", "")
    return name in SYMBOLIC_READS and str(getattr(node.target, "__module__", "")).startswith("torch")


def has_several_outputs(node: Any) -> bool:
    """Whether ``node`` is an operator of several outputs that stands for the first of them."""
    return (
        isinstance(node, fx.Node)
        and isinstance(node.target, OPERATORS)
        and _namespace(node.target) == "aten"
        and _own_name(node.target) in FIRST_OUTPUTS
    )


def first_alone(node: fx.Node) -> bool:
    """Whether nothing takes another output of ``node`` than the first."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def takes_first(node: fx.Node) -> bool:
    """Whether ``node`` only takes the one output that is used of an operator that has several."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and has_several_outputs(source) and first_alone(source)


# -- arguments


def overwrites_first(target: Any) -> bool | None:
    """Whether an operator of ``torch.ops`` writes into its first argument; None for other targets."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    arguments = target._schema.arguments
    return bool(arguments and arguments[0].alias_info is not None and arguments[0].alias_info.is_write)


def out_of_place(target: Any) -> Any:
    """Return the operator that makes a new tensor where ``target``, of ``torch.ops``, overwrites one; None if unknown.

    >>> out_of_place(torch.ops.aten.relu_.default)
    <OpOverload(op='aten.relu', overload='default')>
    """
    namespace = getattr(torch.ops, _namespace(target))
    packet = getattr(namespace, _own_name(target).removesuffix("_"), None)
    overload = target._overloadname or "default"
    return getattr(packet, overload, None) if _own_name(target).endswith("_") else None


def statistics_of(node: fx.Node) -> tuple[Any, Any, Any]:
    """Return (running_var, training, momentum) of a call of a batch or instance norm, in any spelling."""
    names: Iterable[str] = STATISTICS
    if isinstance(node.target, torch._ops.OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    training = next((given[n] for n in ("training", "train", "use_input_stats") if n in given), False)
    return given.get("running_var"), training, given.get("momentum", 0.1)


# -- values


def value_of(node: fx.Node) -> Any:
    """Return the example value of ``node`` in its metadata, None if there is none; of several outputs the first."""
    value = node.meta["val"] if "val" in node.meta else node.meta.get("example_value")
    return value[0] if isinstance(value, (tuple, list)) and value and has_several_outputs(node) else value


def type_of(node: fx.Node) -> type | None:
    """Return the type of what ``node`` stands for, None if that is not known."""
    known = meta.TYPE.of(node)
    value = value_of(node) if known is None else None
    return type(value) if value is not None else known


def size_of(value: torch.Tensor) -> torch.Size:
    """Return the shape of an example value; where it is dynamic, the example's, and -1 where that is not known."""
    return torch.Size(d if isinstance(d, int) else _hint(d) for d in value.shape)


def _hint(size: torch.SymInt) -> int:
    hint = size.node.hint if size.node.has_hint() else None
    return -1 if hint is None else int(hint)


def is_lifted(node: fx.Node) -> bool:
    """Whether ``node`` is an input of its graph that is a parameter, buffer or constant of the model."""
    if node.op != "placeholder":
        return False
    if "example_value" in node.meta:  # of Dynamo
        held = any(part in node.name.lower() for part in HELD) or "_dynamo_static_input_type" in (
            node.meta.get("tensor_dict") or ()
        )
        return held or isinstance(node.meta["example_value"], torch.nn.Parameter)
    if not isinstance(node.meta.get("val"), torch.Tensor) or type(node.graph._codegen) is not fx.graph.CodeGen:
        return False
    return node.name.startswith(LIFTED) and all(n.name.startswith(LIFTED) for n in _placeholders_before(node))


def _placeholders_before(node: fx.Node) -> Iterable[fx.Node]:
    while node.prev.op == "placeholder":
        node = node.prev
        yield node


def inputs_of(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any] | None:
    """Return the inputs of an exported graph by its placeholders' names; None if it takes them as any function does."""
    if not isinstance(gm.graph._codegen, _PyTreeCodeGen):
        return None
    spec = gm.graph._codegen.pytree_info.in_spec
    both = spec.type is tuple and [child.type for child in spec.children()] == [tuple, dict]
    given = (tuple(args), dict(kwargs)) if both else [*args, *kwargs.values()]
    leaves = fx_pytree.tree_flatten_spec(given, spec)  # with dictionaries in the order of the export
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    return dict(zip(names, leaves, strict=True))


# -- the user's code


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that ``node`` was made in, as its metadata says; "" for the root."""
    stack = node.meta.get("nn_module_stack")
    return plain_path(list(stack.values())[-1][0]) if stack else ""


def modules_called(nodes: Iterable[fx.Node]) -> frozenset[str]:
    """Return the paths of all modules that were called while ``nodes`` were made, as their metadata says."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in nodes)
    return frozenset(plain_path(entry[0]) for stack in stacks for entry in stack.values())


def plain_path(path: str) -> str:
    """Return a module's path without the name of the variable that held the model.

    >>> plain_path("L['self']._modules['layers'][0].attn"), plain_path("layers.0.attn"), plain_path("L['self']")
    ('layers.0.attn', 'layers.0.attn', '')
    """
    path = re.sub(r"^[LG]\[(['\"])[^'\"]*\1\](?:\.|(?=\[)|$)", "", path)
    path = re.sub(r"(?:\.?\b_modules)?\[(['\"]?)([^'\"\]]*)\1\]", r".\2", path)
    return path.lstrip(".")


def location(node: fx.Node) -> str | None:
    """Return "file:line" of the user's code that made ``node``, as its stack trace says; None if that is not known."""
    lines = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f"{name}:{line}" for name, line in lines if not name.startswith((*INTERNAL_FILES, *TORCH))]
    return own[-1] if own else None


# -- whole graphs


def regions_of(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.GraphModule]]:
    """Return the calls that run a graph within the graph (autocast, checkpointing, branches), with those graphs."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            names = (str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
            held = (getattr(gm, name, None) for name in names)
            found += [(node, region) for region in held if isinstance(region, fx.GraphModule)]
    return found


def is_complete(gm: fx.GraphModule) -> bool:
    """Whether a graph is one of torch.export or Dynamo: all operations of a model on tensors, with example values."""
    return isinstance(gm.graph._codegen, _PyTreeCodeGen) or any(
        "val" in node.meta or "example_value" in node.meta for node in gm.graph.nodes
    )


def refuse_unknown(gm: fx.GraphModule, found: bool) -> None:
    """Raise UnknownDialect if a graph's sums are written in operators that are not known, so that none would be seen.

    Args:
        gm: the graph.
        found: whether sums of tensors are seen in it.
    """
    unknown: Counter[str] = Counter()
    known = False
    first: dict[str, str] = {}
    for node in gm.graph.nodes:
        family = _family(node)
        if family == "":
            known = known or not reads_symbols(node)
        elif family is not None:
            unknown[family] += 1
            first.setdefault(family, str(node.target))
            if family in REFUSED and (family != "prims" or _own_name(node.target) in ADDING):
                raise UnknownDialect(f"the graph is {REFUSED[family]} ({node.target}, {node.name}). {UNKNOWN_HINT}")
    if unknown and not (known and found):
        family, count = unknown.most_common(1)[0]
        raise UnknownDialect(
            f"no add is seen in the graph, and {count} of its operations are operators of {family!r} ({first[family]}"
            f"{' and others' if count > 1 else ''}), which are not known here: they may hold the model's residuals. "
            f"{UNKNOWN_HINT}"
        )


UNKNOWN_HINT = (
    "Take the graph of an earlier step, of torch.export.export (with or without run_decompositions), of Dynamo or of "
    "torch.fx.symbolic_trace."
)


def _family(node: fx.Node) -> str | None:
    """Return the unknown kind of operators that a call is of, "" for a known one, None where no operator is called."""
    if node.op in ("call_method", "call_module"):
        return "" if not node.name.startswith("_guards_fn") else None
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    if isinstance(node.target, OPERATORS):
        namespace = _namespace(node.target)
        return "" if namespace == "aten" else namespace
    if hasattr(node.target, "_schema"):  # an operator, but not of torch.ops: another tool's
        return type(node.target).__module__.partition(".")[0] + "." + type(node.target).__name__
    return ""


def module_of(node: fx.Node) -> str:
    """Return the path of the module whose code made ``node``."""
    return meta.MODULE.of(node) if meta.MODULE.known(node) else module_path(node)


def location_of(node: fx.Node) -> str:
    """Return "file:line" of the user's code that made ``node``."""
    return meta.LOCATION.of(node) or location(node) or "unknown location"
