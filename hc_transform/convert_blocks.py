"""scope="blocks": the model stays itself, and the modules that hold residuals run rewritten graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .additions import CONNECTIONS_NAME, connection_dict, expand_key, make_connections, readout_key
from .block_module import install
from .block_runner import RUNNER, BlockError, BlockRunner, reads_training
from .blocks import BlockPlan, BlocksPlan, container, find_holders, plan_blocks, relative
from .candidates import may_add
from .connections import Connection
from .errors import HCTransformError, NotEquivalent
from .find import find_residuals
from .findings import Residual
from .hints import Hints
from .hooks import read_outputs
from .keys import DROPOUT_KEY, EXPAND, READOUT
from .options import Options
from .planner import Plan, make_plan
from .reference import NamedInputs, ReferenceInterpreter, separate
from .structure import clone_structure
from .tape import Tape, record, tensors_in
from .trace import describe
from .verify import STREAM_TOLERANCES, relative_error, run_like, without_stream_dropout

ATTEMPTS = 20  # blocks of one model that turn out not to be traceable


class CannotHandOn(Exception):
    """The code between blocks fails on streams."""


class CannotConvert(Exception):
    """A block's code cannot be traced."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason


def analyse_blocks(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Options,
    share_calls: bool,
    refused: Mapping[str, str],
    apart: str = "",
    tape: Tape | None = None,
) -> tuple[BlocksPlan, Tape]:
    """Record one run of the model, find its residuals, and plan which modules become blocks.

    Residuals that no block can hold are left out before trunks are chosen, so that those inside of
    their branches have their chance.
    """
    tape = tape or record(model, args, kwargs)
    findings = find_residuals(tape.graph_module)
    holders, homeless = find_holders(findings.residuals, model, refused)
    left = tuple(r for r in findings.residuals if r.add in holders)
    plan = make_plan(tape.graph_module, replace(findings, residuals=left), options)
    plan = replace(plan, skipped=(*plan.skipped, *homeless.values()))
    return plan_blocks(plan, holders, share_calls=share_calls, apart=apart), tape


def convert_blocks(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Options,
    hints: Hints,
    *,
    share_calls: bool,
    inplace: bool,
) -> tuple[nn.Module, BlocksPlan, Tape, dict[str, Any]]:
    """Return the converted model, what was planned, the tape, and the new modules by their keys.

    A block that cannot be traced stays as it is, with the reason in the plan.
    """
    refused = _refused(model, hints)
    tape, apart = None, ""
    for _ in range(ATTEMPTS):
        planned, tape = analyse_blocks(model, args, kwargs, options, share_calls, refused, apart, tape)
        if not planned.plan.residuals:
            return model, planned, tape, {}
        connections = make_connections(planned.plan)
        converted = clone_structure(model)
        try:
            modules = _install(converted, planned, connections, hints)
            _run_once(converted, args, kwargs)
        except CannotConvert as failure:
            refused[failure.path] = failure.reason
            continue
        except CannotHandOn as failure:
            if apart:
                raise HCTransformError(f"the converted {type(model).__name__} fails: {failure}") from failure
            apart = str(failure)
            continue
        if inplace:
            _move_into(model, converted)
            converted = model
        return converted, planned, tape, modules
    raise HCTransformError(
        f"more than {ATTEMPTS} modules of {type(model).__name__} cannot be traced, among them "
        f"{', '.join(list(refused)[:3])}: {next(iter(refused.values()))}"
    )


def _refused(model: nn.Module, hints: Hints) -> dict[str, str]:
    """Return the modules that cannot become blocks, before anything is tried."""
    refused: dict[str, str] = {}
    chosen = hints.chosen("leaf_modules", model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            refused[path] = "it is scripted"
        elif "forward" in module.__dict__ and may_add(module):
            refused[path] = "its forward is set on the instance, in place of its class's"
        elif any(path == leaf or path.startswith(leaf + ".") for leaf in chosen):
            refused[path] = "leaf_modules names it"
    return refused


def _install(
    model: nn.Module, planned: BlocksPlan, connections: Mapping[str, Connection], hints: Hints
) -> dict[str, Any]:
    """Make the blocks of ``model`` run graphs; return the new modules by the keys they have on the tape."""
    by_key: dict[str, Any] = {}
    ends = connection_dict({}, planned.plan)
    keys = {r.name: r.key for r in planned.plan.residuals}
    for block in planned.blocks:
        module = model.get_submodule(block.path)
        own: dict[str, nn.Module] = {}
        own_keys = block.keys
        for i, call in enumerate(block.calls):
            for j, (name, _) in enumerate(call.residuals):
                if block.shared and i:
                    by_key[keys[name]] = by_key[keys[block.calls[0].residuals[j][0]]]
                else:
                    own[own_keys[relative(name, block.path)]] = by_key[keys[name]] = connections[name]
        _add_ends(own, block, planned.plan, ends, by_key)
        within = replace(hints, leaf_modules=(), inline_modules=())  # which name paths of the whole model
        install(module, BlockRunner(block, planned.plan.options, within), nn.ModuleDict(own))
    for owner in _owners(planned):
        model.get_submodule(owner).register_forward_hook(read_outputs)
    return by_key


def _add_ends(
    own: dict[str, nn.Module], block: BlockPlan, plan: Plan, ends: nn.ModuleDict, by_key: dict[str, Any]
) -> None:
    """Give a block the stream embedding and the readout of the trunks that begin and end in it, and dropout."""
    names = {name for call in block.calls for name, _ in call.residuals}
    for trunk in plan.trunks:
        first, last = trunk.residuals[0], trunk.residuals[-1]
        if first.name in names and expand_key(trunk) in ends:
            own[_end_key(first, block, EXPAND)] = by_key[expand_key(trunk)] = ends[expand_key(trunk)]
        if last.name in names and readout_key(trunk) in ends:
            local = next(r for r in trunk.residuals if r.name in names)
            own[_end_key(local, block, READOUT)] = by_key[readout_key(trunk)] = ends[readout_key(trunk)]
    if DROPOUT_KEY in ends:
        own[DROPOUT_KEY] = ends[DROPOUT_KEY]


def _end_key(residual: Residual, block: BlockPlan, end: str) -> str:
    return block.keys[relative(residual.name, block.path)] + end


def _owners(planned: BlocksPlan) -> list[str]:
    """Return the modules whose code hands streams from one block to another."""
    owners = []
    for trunk in planned.plan.trunks:
        stacks = [container((r.add,)) for r in trunk.residuals]
        common = container([r.add for r in trunk.residuals])
        if len({stack for stack in stacks}) > 1 and common[-1].path not in owners:
            owners.append(common[-1].path)
    blocks = {block.path for block in planned.blocks}
    return [path for path in owners if not any(path == b or path.startswith(b + ".") for b in blocks if b or not path)]


def _run_once(converted: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model, so that its blocks are traced; in the other mode too where code decides on that."""
    _traced_run(converted, args, kwargs)
    if any(reads_training(module) for module in converted.modules() if RUNNER in module.__dict__):
        modes = [(module, module.training) for module in converted.modules()]
        converted.train(not converted.training)
        try:
            _traced_run(converted, args, kwargs)
        finally:
            for module, mode in modes:
                module.training = mode


def _traced_run(converted: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        run_like(converted, args, kwargs)
    except BlockError as error:
        raise CannotConvert(error.block, str(error)) from error
    except Exception as error:
        raise CannotHandOn(describe(error)) from error


def _move_into(model: nn.Module, converted: nn.Module) -> None:
    """Give the given model's own modules what the converted copies hold."""
    for path, module in list(model.named_modules()):
        other = converted.get_submodule(path)
        if type(other) is not type(module):
            module.__class__ = type(other)
            module.__dict__[RUNNER] = other.__dict__[RUNNER]
            module.add_module(CONNECTIONS_NAME, other.get_submodule(CONNECTIONS_NAME))
            for registry in ("_forward_hooks", "_forward_pre_hooks"):
                module.__dict__[registry] = other.__dict__[registry]
            for name, buffer in other._buffers.items():
                if name not in module._buffers:
                    module.register_buffer(name, buffer, persistent=False)
        elif read_outputs in other._forward_hooks.values():
            module.register_forward_hook(read_outputs)


def verify_blocks(
    original: nn.Module,
    converted: nn.Module,
    planned: BlocksPlan,
    tape: Tape,
    modules: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    bound_of: Any,
) -> tuple[float, str | None]:
    """Return the largest relative error of the outputs, and a note where less than usual was compared.

    Raises:
        NotEquivalent: as for :func:`hc_transform.verify.verify`. With all coefficients moved off
            their start the outputs are compared to those of the tape, interpreted with stacked streams.
    """
    expected = run_like(original, args, kwargs)
    options = planned.plan.options
    with without_stream_dropout(converted):
        error = relative_error(run_like(converted, args, kwargs), expected)
        bound = bound_of(expected)
        if not error <= bound and options.readout != "sum":
            raise NotEquivalent(
                f"the converted {type(original).__name__} differs from the original by {error:.1e} (relative; at most "
                f"{bound:.0e} was expected). Leave residuals out with exclude=[...], keep modules whole with "
                "leaf_modules=[...], or report the model."
            )
        if options.readout == "learned" or options.nested == "all":
            return error, None
        apart, note = _separated_error(converted, planned, tape, modules, args, kwargs)
    if note is None and not apart[0] <= apart[1]:
        raise NotEquivalent(
            f"with separated streams the converted {type(original).__name__} differs from its reference by "
            f"{apart[0]:.1e} (relative; at most {apart[1]:.0e} was expected). Leave residuals out with exclude=[...], "
            "or report the model."
        )
    return error, note


def _separated_error(
    converted: nn.Module,
    planned: BlocksPlan,
    tape: Tape,
    modules: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[float, float], str | None]:
    """Return the error with separated streams and its bound, or why it cannot be told."""
    unique = nn.ModuleList({id(m): m for m in modules.values()}.values())
    start = {name: value.clone() for name, value in unique.state_dict().items()}
    plain = NamedInputs(tape.graph_module)
    try:
        separate(unique)
        actual = tensors_in(run_like(converted, args, kwargs))
        reference = ReferenceInterpreter(planned.plan, dict(modules))
        expected = run_like(tape.graph_module, (), tape.named_inputs, reference.run_on)
    except Exception as failure:
        return (0.0, 0.0), f"Streams were not compared one by one: repeating the recorded run fails ({failure})"[:300]
    finally:
        unique.load_state_dict(start)
    dtype = next((t.dtype for t in actual if t.is_floating_point()), torch.float32)
    error, bound = relative_error(actual, list(expected)), STREAM_TOLERANCES.get(dtype, float("inf"))
    if error <= bound:
        return (error, bound), None
    if tape.reads_values:
        return (0.0, 0.0), (
            "Streams were not compared one by one: the model decides on values of tensors, which other streams change."
        )
    outputs = tensors_in(run_like(converted, args, kwargs))
    repeated = run_like(tape.graph_module, (), tape.named_inputs, plain.run_on)
    if not relative_error(outputs, list(repeated)) <= bound:
        return (0.0, 0.0), "Streams were not compared one by one: the recorded run gives other outputs when repeated."
    return (error, bound), None
