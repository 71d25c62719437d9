"""The graphs of a block's code, one for each kind of call, traced on first use."""

from __future__ import annotations

import copy
import copyreg
import inspect
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..capture.configuration import configuration_of
from ..capture.kinds import Kinds
from ..capture.trace import bind_inputs, raise_own_error
from ..capture.watch import unwatched
from ..errors import OUT_OF_RESOURCES, DecisionChanged, HCTransformError, TraceError, UnsupportedModel
from ..graphs.operations import is_tensor
from ..models.copies import clone_structure
from ..models.selection import Hints
from ..models.state import state_restored
from ..options import Options
from ..residuals.analysis import analyse_again, log_left_out
from ..residuals.keys import EXPAND, READOUT, added_modules, take_out
from ..residuals.passage import Flow, Passage
from ..residuals.placement import BlockPlan, CallPlan
from ..residuals.planner import Plan, refuse_nonlinear, with_keys_of
from ..residuals.trunks import Trunk, flow_of, regrouped
from ..rewriting.rewrite import rewritten_graph
from ..streams.trunk_value import TrunkValue, enter, hand_on, holds_streams, is_trunk_value, read_out
from .variants import Captures, Variant, adopt_constants, decides_on_training, nothing, run_compiled, run_first

log = logging.getLogger("hc_transform")

RUNNER = "_hc_runner"
BASE = "_hc_base"


class BlockError(TraceError):
    """A block's code has no graph; ``block`` is its path."""

    block = ""


class BlockRunner:
    """Run a block's code as graphs: one for each kind of call, made when it first occurs.

    Args:
        plan: what the block's calls are to do.
        options: as for the whole model.
        hints: those for modules below the block.
        captures: what the blocks of one model share.
    """

    def __init__(self, plan: BlockPlan, options: Options, hints: Hints, captures: Captures) -> None:
        self.plan = plan
        self.options = options
        self.hints = hints
        self.captures = captures
        calls = {call.step: call for call in reversed(plan.calls)}  # those of one step do the same
        self.calls = tuple(calls[step] for step in sorted(calls))
        self.variants: dict[Any, list[Variant]] = {}
        self.out_of_order = False
        self.ended: Callable[[], Any] = nothing  # what the last call gave, where each has connections of its own

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), {**self.__dict__, "ended": nothing}  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRunner:
        new = copy.copy(self)
        new.ended = nothing
        new.variants = {key: [v.twin() for v in variants] for key, variants in self.variants.items()}
        return new

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph that fits the call."""
        number = 0 if len(self.calls) == 1 else self._number(args, kwargs)
        if _begins_all(self.calls[number]) and any([type(v) is TrunkValue for v in (*args, *kwargs.values())]):
            args, kwargs = read_out((args, kwargs))  # where the code before it changed the value
        if torch.compiler.is_compiling():
            return self._run_compiled(block, number, args, kwargs)
        call = self.calls[number]
        if call.leaves:
            refuse_reentrant(block)
        if block.training:
            self.captures.watch.passed(block, self.plan.path, first=bool(call.begins), last=not call.leaves)
        key = (  # the same for blocks that do the same, so that torch.compile has one piece of code for them
            number,
            block.training,
            self._observed(block),
            _kind(args),
            _kind({k: v for k, v in kwargs.items() if v is not None}),
        )
        variant, result = run_first(self._candidates(key), block, block, args, kwargs)
        own = self.variants.setdefault(key, [])
        if variant is None:
            variant, result = self._captured(block, key, args, kwargs, result)
        if variant not in own:
            own.append(variant)
        result = self._passed_on(block, variant, number, (args, kwargs), result)
        self._mind_order(call, (*args, *kwargs.values()), result)
        if number and number == len(self.calls) - 1 and isinstance(result, torch.Tensor) and not self.plan.shared:
            self.ended = weakref.ref(result)
        return result

    def _mind_order(self, call: CallPlan, given: tuple[Any, ...], result: Any) -> None:
        """Say so where streams that ended in the last block of a trunk begin anew in another of its blocks."""
        for index, own in enumerate(call.trunks):
            if own <= call.begins:  # or has no part in it
                continue
            ended = self.captures.ended.get(index, nothing)()
            if ended is not None and not self.out_of_order and any([value is ended for value in given]):
                self.out_of_order = True
                log.warning(
                    "%s comes after the last block of its trunk, where streams are read out, and not before it as in "
                    "the example inputs: streams begin anew in it",
                    self.plan.path,
                )
            if own.isdisjoint(call.leaves) and isinstance(result, torch.Tensor):
                self.captures.ended[index] = weakref.ref(result)

    def _passed_on(self, block: nn.Module, variant: Variant, number: int, given: Any, result: Any) -> Any:
        """Return what a call gives that may have done without its residuals, and given back what it was given.

        Streams begin and end in it all the same, and it counts for the next block.
        """
        call = self.calls[number]
        if not variant.left_out:
            return result
        inputs = [v for v in pytree.tree_leaves(given, is_leaf=is_trunk_value) if isinstance(v, torch.Tensor)]
        mode = "sum" if self.options.readout == "sum" else "mean"
        ends: dict[str, Any] = added_modules(block)
        begin = next((module for key, module in ends.items() if key.endswith(EXPAND)), None)
        finish = next((module for key, module in ends.items() if key.endswith(READOUT)), None)

        def one(value: Any) -> Any:
            if not any([value is v for v in inputs]):
                return value
            untouched = value.untouched if type(value) is TrunkValue else value
            if not call.leaves and untouched is not None:
                return untouched
            if not call.leaves:
                return finish(value.streams) if finish is not None else value
            if begin is not None and call.step == 0:
                streams = begin(read_out(value))
            elif self.plan.counted:
                streams = enter(value, self.options.num_streams, keep_layout=self.options.keep_layout)
            else:
                return value
            made = hand_on(streams, call.step + 1 if self.plan.counted else 1, mode)
            made.untouched = untouched
            return made

        return pytree.tree_map(one, result, is_leaf=is_trunk_value)

    @torch.compiler.disable  # where compiled code breaks off, it does not compile this
    def _captured(
        self, block: nn.Module, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], change: Any
    ) -> tuple[Variant, Any]:
        """Return a graph for a new kind of call, and what it gives: that of a block alike, else a new one."""
        alike, streams = self._alike(block, key), _streams_of(block, args, kwargs)
        twins = (twin for twin in self.captures.twins(alike) if streams <= _entered(twin.graph))
        variant, result = run_first(twins, block, block, args, kwargs)
        if variant is not None:
            return variant, result
        variant = self._traced(block, key[0], args, kwargs, change)
        self.captures.add(alike, variant)
        return variant, variant.forward(block, *args, **kwargs)

    def _alike(self, block: nn.Module, key: Any) -> Any:
        """Return what is equal for calls of blocks that do the same, as far as can be told without running them."""
        plan, call = self.plan, self.calls[key[0]]
        begins = _begun(call, self.options)
        place = call.step if plan.counted else None
        own = (*plan.keys.items(), *plan.ends.items())
        what = (plan.scopes, plan.counted, own, call.known, call.leaves, begins, call.trunks, place)
        return configuration_of(block), what, key[1:]

    def _traced(
        self, block: nn.Module, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], change: Any
    ) -> Variant:
        try:
            with unwatched():  # the tracer watches the block's code itself; ours need not be
                return self.trace(block, number, args, kwargs, change)
        except OUT_OF_RESOURCES:
            raise
        except Exception as error:
            given: Any = read_out((args, kwargs))
            raise_own_error(original_of(block), *given)
            text = str(error) if isinstance(error, HCTransformError) else f"{type(error).__name__}: {error}"
            failure = BlockError(text)
            failure.block = self.plan.path
            raise failure from error

    def _observed(self, block: nn.Module) -> frozenset[str]:
        """Return the modules in the graph that have forward hooks."""
        return frozenset(path for path in self.plan.scopes if path and block.get_submodule(path)._forward_hooks)

    def _candidates(self, key: Any) -> Iterator[Variant]:
        """Yield the graphs that may fit: those made for such calls, then those that tell at once if they do not."""
        own = list(self.variants.get(key, ()))
        yield from own
        for other, variants in list(self.variants.items()):
            if other[0] == key[0] and other[2] == key[2] and _form(other[3:]) == _form(key[3:]):
                yield from (v for v in variants if v not in own and not v.needs.late)

    def _run_compiled(self, block: nn.Module, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = [variant for key, variants in self.variants.items() if key[0] == number for variant in variants]
        variant, result = run_compiled(own, block, block, args, kwargs)
        if variant is not None:
            return self._passed_on(block, variant, number, (args, kwargs), result)
        raise DecisionChanged(
            f"compiled code cannot trace {self.plan.path} for a new kind of call ({result}): call the model once in "
            "eager mode with inputs like these, in this mode (train or eval), before it is compiled"
        )

    def _number(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return which of several calls this is; the streams know how many blocks they have passed."""
        for value in (*args, *kwargs.values()):
            if type(value) is TrunkValue:
                for number, call in enumerate(self.calls):
                    if call.step >= value.step:  # more, where blocks before it passed their input on
                        return number
                if self.plan.shared:
                    return len(self.calls) - 1
                raise HCTransformError(
                    f"{self.plan.path} is called more often than the {len(self.calls)} times of the example inputs, "
                    "and each call has connections of its own. Convert with share_calls=True."
                )
        ended = None if torch.compiler.is_compiling() else self.ended()
        if ended is not None and any([value is ended for value in (*args, *kwargs.values())]):
            log.warning(
                "%s is called again with what the last of its %d calls gave: streams begin anew, with the connections "
                "of its first call (share_calls=True has one for all)",
                self.plan.path,
                len(self.calls),
            )
        return 0

    def trace(
        self,
        block: nn.Module,
        number: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        change: DecisionChanged | None = None,
    ) -> Variant:
        """Trace the block's own code for a call like this, and rewrite it with the block's connections.

        Raises:
            TraceError: the block has other residuals for these inputs, or cannot be traced.
        """
        original = original_of(block)
        call = self.calls[number]
        given = bind_inputs(original, *read_out((args, kwargs)))
        with state_restored(block):
            analysis = analyse_again(
                original,
                given,
                self.options,
                self.hints,
                self.plan.scopes,
                call.known,
                change,
                self._observed(block),
                loose=True,
                listed=self.plan.listed,
            )
        gm, left_out = analysis.trace.graph_module, analysis.left_out
        plan = replace(analysis.plan, trunks=regrouped(analysis.plan.residuals, call.trunks, Kinds(gm)))
        plan = with_keys_of(plan, self.plan.keys, self.plan.ends)
        leaves = call.leaves
        if leaves.intersection(left_out):  # what is before it in the block hands the streams on
            leaves = leaves | {trunk.residuals[-1].name for trunk in plan.trunks}
            _refuse_end_of_streams(plan, self.plan)
        streams = _streams_of(original, args, kwargs)
        plan = Plan(
            gm, linked(replace(call, leaves=leaves), plan, self.plan, self.options, streams), plan.skipped, self.options
        )
        graph = rewritten_graph(gm, plan)
        adopt_constants(block, graph, gm)
        log.info("traced %s for a call of %d inputs", self.plan.path, len(given))
        log_left_out(self.plan.path, analysis)
        analysis.trace.state.bind(block)  # before anything that it looks up may be replaced
        return Variant(graph, analysis.trace.state, left_out)


def _refuse_end_of_streams(plan: Plan, block: BlockPlan) -> None:
    """Raise TraceError if a call without residuals does something to the value that it hands on."""
    given = [value for value in plan.graph_module.graph.output_node().all_input_nodes if value.op == "placeholder"]
    if not plan.trunks and not given:
        raise TraceError(
            f"for these inputs {block.path} has none of its residuals, and changes the value that it is given, so that "
            "the streams would end there. Leave its residuals out with exclude=[...]."
        )


def _begins_all(call: CallPlan) -> bool:
    """Whether every trunk of a call begins in it."""
    return all(own <= call.begins for own in call.trunks)


def _begun(call: CallPlan, options: Options) -> frozenset[str]:
    """Return the names on trunks that a graph begins by itself; a call in which all begin is given no streams."""
    return call.begins if options.stream_embedding or not _begins_all(call) else frozenset()


def linked(
    call: CallPlan, plan: Plan, block: BlockPlan, options: Options, streams: Collection[str] = ()
) -> tuple[Trunk, ...]:
    """Return a block's trunks with the inputs that they begin with, and the outputs that go on as streams.

    Args:
        call: what the graph is for.
        plan: of the block's graph.
        block: whose graph it is.
        options: of the whole model.
        streams: names of the inputs that come as streams; where two inputs are added up, those go on.

    Raises:
        TraceError: a trunk that goes on in another block does not reach the block's output.
    """
    kinds = Kinds(plan.graph_module)
    passage = Passage(kinds, adds=[r.add for r in plan.residuals])
    flow = Flow(passage, [])
    for node in plan.graph_module.graph.nodes:
        given_as = _input_of(node)
        if given_as is not None:
            flow.lengths[node] = int(given_as.lstrip("*") in streams)
    output = plan.graph_module.graph.output_node()
    trunks = []
    for trunk in plan.trunks:
        carried = dict(trunk.carried)
        first, last = trunk.residuals[0], trunk.residuals[-1]
        entry: fx.Node | None = None
        given = flow.trunk_value(first.skip)
        if given is not None and first.name not in _begun(call, options):
            entry = given
            carried.update(flow.way_to(first.skip))
        exits = []
        if last.name in call.leaves:
            after = flow_of(trunk.residuals, passage)
            for value in output.all_input_nodes:
                if is_tensor(value) and after.trunk_value(value) is last.add:
                    exits.append(value)
                    carried.update(after.way_to(value))
            if not exits:
                raise TraceError(f"the trunk of {block.path}.{last.name} does not reach the output of {block.path}")
        passed = call.step + 1 if block.counted else 1
        refuse_nonlinear([replace(trunk, carried=carried)], kinds, options)
        trunks.append(replace(trunk, carried=carried, entry=entry, exits=tuple(exits), steps=passed))
    return tuple(trunks)


def _input_of(node: fx.Node) -> str | None:
    """Return the input that a tensor is, by itself or in a tuple; None if it is computed."""
    if not is_tensor(node):
        return None
    while node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        source: Any = node.args[0]
        if is_tensor(source):
            return None  # a part of a tensor is computed, as streams are cut
        node = source
    return str(node.target) if node.op == "placeholder" else None


def _streams_of(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """Return the names of a block's inputs that come as streams."""
    return frozenset(name for name, value in bind_inputs(block, args, kwargs).items() if holds_streams(value))


def _entered(graph: fx.Graph) -> frozenset[str]:
    """Return the names of the inputs that a block's graph takes streams from."""
    entries = (_input_of(node.args[0]) for node in graph.nodes if node.target is enter)  # type: ignore[arg-type]
    return frozenset(name.lstrip("*") for name in entries if name is not None)


def original_of(block: nn.Module) -> nn.Module:
    """Return a structural copy of a converted block as it was: its class, without connections and hooks."""
    base: Any = getattr(type(block), BASE)
    shell = base.__new__(base)
    shell.__dict__.update(block.__dict__)
    for name, value in block.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            shell.__dict__[name] = OrderedDict()
    del shell.__dict__[RUNNER]
    copied = clone_structure(shell)
    take_out(copied)
    for module in copied.modules():
        module._forward_hooks = OrderedDict()  # they would see what is evaluated while tracing
        # Hugging Face's layers checkpoint in ``forward``; ours is wrapped in that too
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    return copied


def reads_training(block: nn.Module) -> bool:
    """Whether a graph of a converted block decides on a ``training`` flag."""
    runner: BlockRunner = block.__dict__[RUNNER]
    return any(decides_on_training(v.graph) for variants in runner.variants.values() for v in variants)


def refuse_reentrant(block: nn.Module) -> None:
    """Raise if the call is inside a reentrant checkpoint, which passes no gradient to streams."""
    if torch.is_grad_enabled() or not block.training:
        return
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _REENTRANT:
            raise UnsupportedModel(
                "activation checkpointing with use_reentrant=True hands no gradient to the streams between blocks: "
                'use use_reentrant=False (gradient_checkpointing_kwargs={"use_reentrant": False} in Hugging Face)'
            )
        frame = frame.f_back


_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__


def _kind(value: Any) -> Any:
    """Return what graphs may differ by: which inputs are there, of which types."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, torch.Tensor) or is_trunk_value(value):
        return value.dtype, value.ndim
    if isinstance(value, (tuple, list)):
        return type(value), *map(_kind, value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return type(value), *((key, _kind(v)) for key, v in value.items())
    return type(value)


def _form(kind: Any) -> Any:
    """Return what is left of a kind without the dtypes and dimensions of tensors."""
    if not isinstance(kind, tuple):
        return kind
    return torch.Tensor if kind and isinstance(kind[0], torch.dtype) else tuple(map(_form, kind))
