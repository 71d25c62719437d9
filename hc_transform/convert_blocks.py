"""scope="blocks": the model stays itself, and the modules that hold residuals run rewritten graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .capture.add_bytecode import may_add
from .capture.trace import describe
from .connections import Connection
from .errors import NEVER_HIDDEN, OUT_OF_RESOURCES, HCTransformError
from .graphs import meta
from .models.copies import clone_structure, compiled_from, in_other_mode
from .models.selection import Hints
from .options import Options
from .request import OPTIMIZER_NOTE, Example, Request
from .residuals.findings import Reason, Residual
from .residuals.keys import DROPOUT_KEY, EXPAND, READOUT, added_modules, relative
from .residuals.observation import Observation
from .residuals.placement import BlockPlan, BlocksPlan, container, find_holders, in_some_calls, plan_blocks
from .residuals.planner import Plan, choose, selected
from .residuals.report import has_nothing, nothing_to_convert, report_of
from .residuals.trunks import Trunk, as_skipped
from .rewriting.new_modules import expand_key, make_connections, make_ends, other_parameters, readout_key
from .running.block_module import install
from .running.block_runner import RUNNER, BlockError, BlockRunner, reads_training
from .running.variants import Captures
from .streams.hook_readouts import read_outputs
from .verification.verify import Seen, run_like, verify

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
    observed: Observation,
    options: Options,
    share_calls: bool,
    refused: Mapping[str, str],
    apart: str = "",
) -> BlocksPlan:
    """Plan which modules become blocks.

    Residuals that no block can hold are left out before trunks are chosen, so that those inside of
    their branches have their chance.
    """
    findings = observed.findings
    holders, homeless = find_holders(findings.residuals, model, refused)
    held = [r for r in findings.residuals if r.add in holders]
    chosen, excluded = selected(held, options)
    while True:
        wanted = replace(findings, residuals=tuple(chosen))
        plan = choose(observed.graph_module, wanted, replace(options, include=(), exclude=()))
        uneven = in_some_calls(plan, held, holders)
        if not uneven:
            break
        excluded += [as_skipped(r, Reason.UNEVEN) for r in uneven]
        chosen = [r for r in chosen if r not in uneven]
    options = replace(options, keep_layout=observed.asks_layout)
    plan = replace(plan, skipped=(*plan.skipped, *excluded, *homeless.values(), *observed.hidden), options=options)
    return plan_blocks(plan, holders, findings, share_calls=share_calls, apart=apart, refused=refused)


def _with_graphs(
    model: nn.Module, example: Example, observed: Observation, request: Request
) -> tuple[nn.Module, BlocksPlan, dict[str, Any]]:
    """Return the converted model, what was planned, and the new modules by their keys.

    A block that cannot be traced stays as it is, with the reason in the plan.
    """
    args, kwargs = example
    refused = _refused(model, observed)
    apart = ""
    for _ in range(ATTEMPTS):
        planned = analyse_blocks(model, observed, request.options, request.share_calls, refused, apart)
        if not planned.plan.residuals:
            return clone_structure(model), planned, {}
        connections = make_connections(planned.plan)
        converted = clone_structure(model)
        try:
            modules = _install(converted, planned, connections, request.hints)
            _traced_run(converted, args, kwargs)
            note = _run_in_other_mode(model, converted, args, kwargs)
        except CannotConvert as failure:
            refused[failure.path] = failure.reason
            continue
        except CannotHandOn as failure:
            if apart:
                raise HCTransformError(f"the converted {type(model).__name__} fails: {failure}") from failure
            apart = str(failure)
            continue
        return converted, replace(planned, notes=(*planned.notes, *note)), modules
    raise HCTransformError(
        f"more than {ATTEMPTS} modules of {type(model).__name__} cannot be traced, among them "
        f"{', '.join(list(refused)[:3])}: {next(iter(refused.values()))}"
    )


def convert_blocks(
    model: nn.Module, example: Example, observed: Observation, request: Request, why: str = ""
) -> tuple[nn.Module, Plan]:
    """Return the model with graphs in its blocks, and its plan.

    Args:
        model: the original.
        example: inputs to run it on.
        observed: what is seen of it.
        request: what it is to become.
        why: why this scope was chosen; "" if it was asked for.
    """
    converted, planned, modules = _with_graphs(model, example, observed, request)
    plan = planned.plan
    if has_nothing(plan):
        raise nothing_to_convert(model, plan)
    notes, error = [], None
    tape = observed.tape
    if request.verify and tape is not None:
        seen = Seen(plan, tape.graph_module, tape.named_inputs, modules, tape)
        found = verify(model, converted, seen, *example, expected=observed.ran)
        error = found.error
        notes.append(found.note)
    reason = f"because {why.rstrip('.')}" if why else "as asked"
    notes.append(f"Scope blocks, {reason}. {len(planned.blocks)} modules run graphs; the rest is Python as before.")
    notes += [f"Streams are read out and begin anew {cut}." for cut in planned.cuts]
    notes += [*planned.notes, OPTIMIZER_NOTE]
    connections = {r.name: modules[r.key] for r in plan.residuals}
    others = other_parameters(modules.values(), connections)
    report = report_of(plan, connections, error, tuple(notes), others)
    if request.inplace:
        move_into(model, converted)
        converted = model
    converted.__dict__["hc_report"] = report
    return converted, plan


def _refused(model: nn.Module, observed: Observation) -> dict[str, str]:
    """Return the modules that cannot become blocks, before anything is tried."""
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            refused[path] = "it is scripted"
        elif "forward" in module.__dict__ and compiled_from(module) is None and may_add(module):
            refused[path] = "its forward is set on the instance, in place of its class's"
        elif (why := observed.stays_whole(path)) is not None:
            refused[path] = why
    return refused


def _install(
    model: nn.Module, planned: BlocksPlan, connections: Mapping[str, Connection], hints: Hints
) -> dict[str, Any]:
    """Make the blocks of ``model`` run graphs; return the new modules by the keys they have on the tape."""
    by_key: dict[str, Any] = {}
    captures = Captures()
    ends = make_ends(planned.plan)
    keys = {r.name: r.key for r in planned.plan.residuals}
    for block in planned.blocks:
        module = model.get_submodule(block.path)
        own: dict[str, nn.Module] = {}
        for i, call in enumerate(block.calls):
            for j, name in enumerate(call.residuals):
                if block.shared and i:
                    by_key[keys[name]] = by_key[keys[block.calls[0].residuals[j]]]
                else:
                    own[block.keys[relative(name, block.path)]] = by_key[keys[name]] = connections[name]
        _add_ends(own, block, planned.plan, ends, by_key)
        within = replace(hints, leaf_modules=(), inline_modules=())  # which name paths of the whole model
        install(module, BlockRunner(block, planned.plan.options, within, captures), own)
    for owner in _owners(planned):
        model.get_submodule(owner).register_forward_hook(read_outputs)
    return by_key


def _add_ends(
    own: dict[str, nn.Module], block: BlockPlan, plan: Plan, ends: Mapping[str, Any], by_key: dict[str, Any]
) -> None:
    """Give a block the stream embedding and the readout of the trunks that begin and end in it, and dropout."""
    names = {name for call in block.calls for name in call.residuals}
    for trunk in plan.trunks:
        first, last = trunk.residuals[0], trunk.residuals[-1]
        if first.name in names and expand_key(trunk) in ends:
            own[_end_key(first, block, EXPAND)] = by_key[expand_key(trunk)] = ends[expand_key(trunk)]
        if last.name in names and readout_key(trunk) in ends:
            own[_end_key(last, block, READOUT)] = by_key[readout_key(trunk)] = ends[readout_key(trunk)]
    if DROPOUT_KEY in ends:
        own[DROPOUT_KEY] = ends[DROPOUT_KEY]


def _end_key(residual: Residual, block: BlockPlan, end: str) -> str:
    call = next(call for call in block.calls if residual.name in call.residuals)
    own = block.calls[0] if block.shared else call
    return block.keys[relative(own.residuals[call.residuals.index(residual.name)], block.path)] + end


def _owners(planned: BlocksPlan) -> list[str]:
    """Return the modules whose code hands streams from one block to another, and those of no other trunk."""
    owners: dict[str, Trunk] = {}
    within: dict[str, set[int]] = {}  # the trunks that go through a module and come out of it
    for trunk in planned.plan.trunks:
        adds = [r.add for r in trunk.residuals]
        common = container(adds)
        if len({container((add,)) for add in adds}) > 1:
            owners.setdefault(common[-1].path, trunk)
            for call in (c for node in (*adds, *trunk.carried) for c in meta.CALLS.of(node)[len(common) :]):
                within.setdefault(call.path, set()).add(trunk.index)
    blocks = {block.path for block in planned.blocks}
    return [
        path
        for path, trunk in owners.items()
        if within.get(path, set()) <= {trunk.index}
        and not any(path == b or path.startswith(b + ".") for b in blocks if b or not path)
    ]


def _run_in_other_mode(
    model: nn.Module, converted: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """Run the blocks in the other mode too, where code decides on that, for compiled code cannot trace them then.

    Returns:
        What is to be said of a mode in which a block cannot be traced.

    Raises:
        CannotHandOn: the code between blocks fails on streams in that mode, as it does not on plain values.
    """
    if not any(reads_training(module) for module in converted.modules() if RUNNER in module.__dict__):
        return []
    try:
        with in_other_mode(converted):
            _traced_run(converted, args, kwargs)
    except CannotConvert as failure:
        mode = "eval" if converted.training else "training"
        return [f"In {mode} mode calls of {failure.path or 'the model'} are refused: {failure.reason}"]
    except CannotHandOn:
        try:
            with in_other_mode(copy := clone_structure(model)):
                run_like(copy, args, kwargs)
        except NEVER_HIDDEN:
            raise
        except Exception:  # noqa: BLE001  # whatever the user's code raises
            return []  # the model itself does not run on these inputs then
        raise
    return []


def _traced_run(converted: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        run_like(converted, args, kwargs)
    except BlockError as error:
        raise CannotConvert(error.block, str(error)) from error
    except OUT_OF_RESOURCES:
        raise
    except Exception as error:
        raise CannotHandOn(describe(error)) from error


def move_into(model: nn.Module, converted: nn.Module) -> None:
    """Give the given model's own modules what the converted copies hold."""
    for path, module in list(model.named_modules()):
        other = converted.get_submodule(path)
        if type(other) is not type(module):
            for name, buffer in other._buffers.items():
                if name not in module._buffers:  # a constant of a graph
                    module.register_buffer(name, buffer, persistent=False)
            install(module, other.__dict__[RUNNER], added_modules(other))
        if read_outputs in other._forward_hooks.values():
            module.register_forward_hook(read_outputs)
