"""Time models side by side: interleaved, in one process, medians with their spread.

On a machine with CUDA everything is measured there. On one without, times and memory are the CPU's, and
kernels and bytes those of the code that Inductor makes for an H100 (:mod:`hc_transform.measuring.cost`) and of
eager code on a GPU (:mod:`hc_transform.measuring.eager`).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..running.graph_model import HyperConnectedModule
from ..running.regional import compile_regions, converted_modules
from .cost import H100_BANDWIDTH, Cost, cost_available, inductor_cost, regional_cost
from .eager import eager_cost

PASSES = {"infer": ("forward",), "train": ("forward", "forward + backward")}


@dataclass(frozen=True)
class Times:
    """Seconds of the repetitions of one pass."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, high = (1e3 * f(self.seconds) for f in (min, max))
        return f"{1e3 * self.median:.2f} ms ({low:.2f} to {high:.2f})"


@dataclass
class Figures:
    """What was measured of one model; None where it could not be.

    ``times`` has a key for each pass, eager and compiled: "forward, compiled". Bytes are of memory.
    """

    times: dict[str, Times] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    compiled_peak_bytes: int | None = None
    compile_seconds: float | None = None
    cost: Cost | None = None
    eager_cost: Cost | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        made = asdict(self)
        made["times"] = {
            name: {"median": t.median, "min": min(t.seconds), "max": max(t.seconds), "seconds": list(t.seconds)}
            for name, t in self.times.items()
        }
        for key, cost in (("cost", self.cost), ("eager_cost", self.eager_cost)):
            if cost is not None:
                graphs = {"forward": cost.forward, "backward": cost.backward}
                made[key] = {
                    name: {"kernels": g.kernels, "library_calls": g.library_calls, "bytes": g.bytes}
                    for name, g in graphs.items()
                }
                made[key]["saved_bytes"] = cost.saved_bytes
        return made


def bench(  # noqa: C901, PLR0913  # one figure after the other; the options of the command line
    models: Mapping[str, nn.Module],
    inputs: Sequence[Any],
    *,
    mode: str = "train",
    repeats: int = 10,
    compiled: bool = True,
    count: bool = True,
    regions: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Figures]:
    """Measure every model on the same inputs.

    Each repetition runs all models one after the other, so that a change of the machine's load meets all.

    Args:
        models: by name; they are on the inputs' device.
        inputs: positional arguments.
        mode: "train" (forward, and forward with backward) or "infer" (forward under ``no_grad``, in eval mode).
        repeats: timed repetitions, after one that is not.
        compiled: measure ``torch.compile``'s code too.
        count: count kernels and bytes of its GPU code too, where that is possible, and of eager code.
        regions: compile converted models in regions; those of ``scope="blocks"``, which run code outside of them, are
            then not counted.
        progress: called with a line now and then; by default lines go to stderr.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in PASSES:
        raise ValueError(f"mode is one of {', '.join(map(repr, PASSES))}; got {mode!r}")
    say = progress or (lambda line: print(line, file=sys.stderr, flush=True))
    figures = {name: Figures() for name in models}
    for name, model in models.items():
        model.train(mode == "train")
        say(f"memory of {name}")
        figures[name].saved_bytes = saved_bytes(model, inputs) if mode == "train" else None
        figures[name].peak_bytes = peak_bytes(model, inputs, mode)
    runs: dict[str, dict[str, nn.Module]] = {"eager": dict(models)}
    if compiled:
        runs["compiled"] = {}
        torch._dynamo.reset()
        for name, model in models.items():
            say(f"compiling {name}")
            runs["compiled"][name], figures[name].compile_seconds = _compile(model, inputs, mode, regions)
            if _device(inputs).type == "cuda":
                figures[name].compiled_peak_bytes = peak_bytes(runs["compiled"][name], inputs, mode)
    for kind, variants in runs.items():
        for what in PASSES[mode]:
            say(f"{what}, {kind}: {repeats} repetitions of {len(variants)} models")
            for name, seconds in _interleaved(variants, inputs, what, mode, repeats).items():
                figures[name].times[f"{what}, {kind}"] = Times(tuple(seconds))
    if count:
        for name, model in models.items():
            say(f"counting kernels of {name}")
            if all(p.device.type == "cpu" for p in model.parameters()):
                on_cpu = [x.cpu() if isinstance(x, Tensor) else x for x in inputs]
                figures[name].cost = _cost(model, on_cpu, mode, regions) if cost_available() else None
                figures[name].eager_cost = _eager_cost(model, on_cpu, mode, say)
    return figures


def table(figures: Mapping[str, Figures], bandwidth: float = H100_BANDWIDTH) -> str:
    """Return a table, one column a model; numbers in brackets are ratios to the first."""
    rows: list[list[str]] = []
    first = next(iter(figures.values()))
    for key in first.times:
        rows.append(
            [
                key,
                *(
                    _with_ratio(str(f.times[key]), f.times[key].median, first.times[key].median)
                    for f in figures.values()
                ),
            ]
        )
    for title, get, show in (
        ("compile time", lambda f: f.compile_seconds, lambda v: f"{v:.1f} s"),
        ("saved for backward, eager", lambda f: f.saved_bytes, _mebibytes),
        ("peak memory, eager", lambda f: f.peak_bytes, _mebibytes),
        ("peak memory, compiled", lambda f: f.compiled_peak_bytes, _mebibytes),
        ("saved for backward, compiled for H100", lambda f: f.cost and f.cost.saved_bytes, _mebibytes),
        ("launches forward, eager on a GPU", lambda f: f.eager_cost and len(f.eager_cost.forward.launches), str),
        ("launches backward, eager on a GPU", lambda f: f.eager_cost and len(f.eager_cost.backward.launches), str),
        ("bytes forward, eager on a GPU", lambda f: f.eager_cost and f.eager_cost.forward.bytes, _mebibytes),
        ("bytes backward, eager on a GPU", lambda f: f.eager_cost and f.eager_cost.backward.bytes, _mebibytes),
        ("kernels forward, H100", lambda f: f.cost and len(f.cost.forward.launches), str),
        ("kernels backward, H100", lambda f: f.cost and len(f.cost.backward.launches), str),
        ("bytes forward, H100", lambda f: f.cost and f.cost.forward.bytes, _mebibytes),
        ("bytes backward, H100", lambda f: f.cost and f.cost.backward.bytes, _mebibytes),
        (
            f"moving them at {bandwidth / 1e12:.2f} TB/s",
            lambda f: f.cost and sum(f.cost.milliseconds(bandwidth)),
            lambda v: f"{v:.3f} ms",
        ),
    ):
        values = [get(f) for f in figures.values()]
        if all(values):
            rows.append([title, *(_with_ratio(show(v), v, values[0]) for v in values)])
    return tabulate(rows, headers=("", *figures), disable_numparse=True)


def _with_ratio(text: str, value: float, first: float) -> str:
    return text if value is first else f"{text} [{value / first:.2f}]"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def saved_bytes(model: nn.Module, inputs: Sequence[Any]) -> int:
    """Return the bytes that a forward pass in eager mode keeps for the backward pass, but for parameters and inputs."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *_tensors(inputs))}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(*inputs)
    assert outputs is not None  # alive until here, so that no address is used twice
    return sum(kept.values())


def peak_bytes(model: nn.Module, inputs: Sequence[Any], mode: str) -> int:
    """Return the most memory that one step takes at a time, above what there is before it."""
    what = PASSES[mode][-1]
    if _device(inputs).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(model, inputs, what, mode)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _PeakMemory() as memory:
        _step(model, inputs, what, mode)
    return memory.peak


class _PeakMemory(TorchDispatchMode):
    """Follow the memory of all tensors made by operators in eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen | old:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def _cost(model: nn.Module, inputs: Sequence[Any], mode: str, regions: bool) -> Cost | None:
    if not regions or not _is_converted(model):
        return inductor_cost(model, *inputs, training=mode == "train")
    if isinstance(model, HyperConnectedModule):
        return regional_cost(model, *inputs, training=mode == "train")
    return None


def _eager_cost(model: nn.Module, inputs: Sequence[Any], mode: str, say: Callable[[str], None]) -> Cost | None:
    try:
        return eager_cost(model, *inputs, training=mode == "train")
    except RuntimeError as error:  # code that looks at values, of which there are none
        say(f"not counted in eager mode: {error}")
        return None


def _is_converted(model: nn.Module) -> bool:
    return any(True for _ in converted_modules(model))


def _compile(model: Any, inputs: Sequence[Any], mode: str, regions: bool) -> tuple[Any, float]:
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        if regions and _is_converted(model):
            compiled: Any = compile_regions(copy.deepcopy(model), dynamic=False)
        else:
            compiled = torch.compile(model, dynamic=False)
        start = time.perf_counter()
        _step(compiled, inputs, PASSES[mode][-1], mode)
        return compiled, time.perf_counter() - start


def _interleaved(
    models: Mapping[str, nn.Module], inputs: Sequence[Any], what: str, mode: str, repeats: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            took = _timed(model, inputs, what, mode)
            if repeat:
                seconds[name].append(took)
    return seconds


def _timed(model: nn.Module, inputs: Sequence[Any], what: str, mode: str) -> float:
    cuda = _device(inputs).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    _step(model, inputs, what, mode)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _step(model: nn.Module, inputs: Sequence[Any], what: str, mode: str) -> None:
    with torch.set_grad_enabled(mode == "train"):
        outputs = model(*inputs)
    if what != "forward":
        loss: Any = sum(t.float().mean() for t in _tensors(outputs) if t.is_floating_point())
        loss.backward()
        model.zero_grad(set_to_none=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    leaves = pytree.tree_leaves(dict(value) if isinstance(value, dict) else value)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _device(inputs: Sequence[Any]) -> torch.device:
    return next((t.device for t in _tensors(inputs)), torch.device("cpu"))
