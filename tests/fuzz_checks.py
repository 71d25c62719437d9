"""What must hold of a random program's conversion, written without the package's own verification."""

from __future__ import annotations

import copy
import pickle
import random
import re
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_programs import Program, generate
from fuzz_values import (
    Noise,
    Wrong,
    compare,
    difference,
    loss_of,
    read_attribute,
    residuals_that_run,
    same,
    sow,
    state_of,
    write_attribute,
)
from torch import nn

import hc_transform as hct

SCOPES = ("graph", "blocks")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_streams": 2},
    {"num_streams": 3, "connection": "mhc"},
    {"connection": "static", "init": "mirrored"},
    {"connection": "dynamic", "init": "mirrored"},
    {"readout": "learned"},
    {"nested": "all"},
    {"recompute": True},
    {"shortcuts": "carry"},
    {"min_residuals": 2},
    {"include": "half"},
    {"exclude": "half"},
    {"scope": "blocks", "share_calls": True},
    {"scope": "blocks", "inplace": True},
    {"stream_embedding": True},
    {"connection": "mhc-lite", "num_streams": 3},
    {"connection": "kromhc"},
    {"connection": "identity"},
    {"connection": "frac"},
    {"scope": "auto", "stream_dropout": 0.5},
    {"num_streams": 1},
)
CONSTRAINED = ("mhc", "mhc-lite", "kromhc", "identity")  # their start is a sigmoid's, which is not exact


@dataclass
class Outcome:
    """What came of a program.

    Attributes:
        problems: (check, message) of what went wrong.
        refusals: (where, message) of typed errors at conversion.
        refused_calls: the same of calls, attributes, hooks after it.
        converted: residuals converted, by scope.
        counts: how often each check was made.
    """

    seed: int
    problems: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    refused_calls: list[tuple[str, str]] = field(default_factory=list)
    converted: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def check(seed: int) -> Outcome:
    """Convert the program of a seed in every way, and return what came of it."""
    program = generate(seed)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = program.load(directory)
        try:
            return _Checker(program, module).run()
        finally:
            program.unload()


# ---------------------------------------------------------------- connections


def connections(model: nn.Module) -> dict[str, nn.Module]:
    """Return the connections of a converted model by their paths, which both scopes share."""
    return {path: m for path, m in model.named_modules() if isinstance(m, hct.Connection)}


def move(found: dict[str, nn.Module]) -> None:
    """Move connections off their start, by numbers that depend on their names and order."""
    with torch.no_grad():
        for name in sorted(found):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            for parameter in found[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def trunks_of(report: hct.Report) -> list[list[str]]:
    """Return the names of residuals by trunk."""
    trunks: dict[Any, list[str]] = {}
    for r in report.converted:
        trunks.setdefault(r.trunk, []).append(r.name)
    return sorted(sorted(names) for names in trunks.values())


# ---------------------------------------------------------------- the checks


class _Checker:
    def __init__(self, program: Program, module: types.ModuleType) -> None:
        self.program, self.module = program, module
        self.random = random.Random(program.seed + 10**6)
        self.outcome = Outcome(program.seed)
        sow(program.seed)
        self.model = module.make()
        self.double = self.random.random() < 0.75
        if self.double:
            self.model.double()
        self.model.train(self.random.random() < 0.2)
        self.exact = self.double and "cast" not in program.features
        self.bound = 1e-9 if self.exact else 1e-5
        self.inputs_after: dict[str, tuple[Any, Any]] = {}  # of the first call

    def run(self) -> Outcome:
        made: dict[str, nn.Module] = {}
        for scope in SCOPES:
            with self.checked(f"convert, {scope}"):
                hc = self.convert(scope=scope, verify=self.random.random() < 0.5)
                if hc is None:
                    continue
                made[scope] = hc
                self.outcome.converted[scope] = len(hc.hc_report.converted)
                with self.checked(f"listed, {scope}"):
                    self.listed(hc.hc_report)
        spares: dict[str, Any] = {scope: None for scope in made}
        for scope, hc in made.items():
            with self.checked(f"deepcopy, {scope}"):
                spares[scope] = copy.deepcopy(hc)
        copies = {scope: self.copied(scope, hc) for scope, hc in made.items()}
        if all(copies.get(scope) is not None for scope in SCOPES):
            with self.checked("graph against blocks"):
                self.both_scopes(copies["graph"], copies["blocks"])  # type: ignore[arg-type]
        for scope, hc in made.items():
            self.alike(scope, hc, spares[scope])
        with self.checked("option"):
            self.option(made)
        for scope, (ours, theirs) in self.inputs_after.items():
            with self.checked(f"inputs overwritten alike, {scope}"):
                compare(ours, theirs, self.bound)
        return self.outcome

    @contextmanager
    def checked(self, what: str) -> Iterator[None]:
        """Write what goes wrong down, under the name of a check."""
        self.outcome.counts[what] += 1
        try:
            yield
        except Wrong as error:
            self.outcome.problems.append((what, str(error)))
        except hct.NotEquivalent as error:
            self.outcome.problems.append((what, f"NotEquivalent: {error}"))
        except hct.HCTransformError as error:
            self.outcome.refused_calls.append((what, f"{type(error).__name__}: {error}"))
        except Exception as error:
            self.outcome.problems.append((what, f"{type(error).__name__}: {error}"))

    def inputs(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        given = self.program.inputs(*args, **kwargs)
        return tuple(t.double() if self.double and t.is_floating_point() else t for t in given)

    def convert(self, model: nn.Module | None = None, **options: Any) -> Any:
        """Return a copy of the model converted, None if that is refused; check what must stay as it was."""
        given, inputs = model or copy.deepcopy(self.model), self.inputs()
        sow(self.program.seed)
        before = state_of(given, self.module, inputs)
        try:
            hc = hct.convert(given, inputs, **options)
        except hct.NotEquivalent:
            raise
        except hct.HCTransformError as error:
            self.outcome.refusals.append((options["scope"], f"{type(error).__name__}: {error}"))
            hc = None
        if not options.get("inplace"):
            after = state_of(given, self.module, inputs)
            changed = [name for name in before if name not in after or not same(before[name], after[name])]
            changed += [name for name in after if name not in before]
            if changed:
                self.outcome.problems.append((f"left as it was, {options['scope']}", ", ".join(changed[:3])))
        return hc

    def listed(self, report: hct.Report) -> None:
        """Check that every residual that ran is converted or listed, at its line."""
        features = self.program.features
        if self.model.training and "draws" in features:
            return
        sow(self.program.seed)
        with torch.no_grad():
            filename = self.module.__file__ or ""
            ran = residuals_that_run(copy.deepcopy(self.model), self.inputs(), self.program.source, filename)
        at = Counter(int(r.location.rsplit(":", 1)[-1]) for r in report.residuals)
        lines = self.program.source.split("\n")
        helpers = {i for i, line in enumerate(lines, 1) if line.endswith("# helper")}
        once = "shared" in features  # one record for all calls of a module is enough
        missing = {n: min(times, 1) if once else times for (n, kind), times in ran.items() if not kind}
        missing = {n: times for n, times in missing.items() if at[n] < times}
        if missing:
            n = min(missing)
            raise Wrong(f"{at[n]} of {missing[n]} listed: {lines[n - 1].strip()}")
        helped = sum(times for (_, kind), times in ran.items() if kind)
        callers = {n for (n, kind) in ran if kind}
        found = sum(at[n] for n in helpers | callers)
        if found < (min(helped, 1) if once else helped):
            raise Wrong(f"{found} of {helped} adds in helpers listed")

    # ------------------------------------------------------------ against the original

    def pair(
        self, scope: str, hc: nn.Module, twin: nn.Module, what: str, inputs: Any, train: bool, seed: int, bound: float
    ) -> bool:
        """Run both on the same inputs and seeds; compare outputs, and buffers afterwards. False if it went wrong."""
        failures = len(self.outcome.problems) + len(self.outcome.refused_calls)
        noise = Noise(twin, inputs, train, seed, self.trains) if not self.exact else None
        with self.checked(f"{what}, {scope}"):
            for m in (hc, twin):
                m.train(train)
            ours, theirs = (tuple(t.clone() for t in inputs) for _ in range(2))
            with torch.set_grad_enabled(train and self.trains):
                sow(seed)
                actual = hc(*ours)
                sow(seed)
                expected = twin(*theirs)
                compare(actual, expected, bound)
                self.inputs_after.setdefault(scope, (ours, theirs))
            if train and self.trains:
                with self.checked(f"gradients, {what}, {scope}"):
                    self.gradients(hc, twin, actual, expected, bound, noise)
            values = hc.state_dict()
            for name, value in twin.named_buffers():
                if name in twin.state_dict():
                    if name not in values:
                        raise Wrong(f"no buffer {name}")
                    differs = (values[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
                    allowed = max(bound, 1e-6) * max(value.double().abs().max().item(), 1e-6) if value.numel() else 0.0
                    if not differs <= allowed and (noise is None or not differs <= noise.of(name)):
                        raise Wrong(f"buffer {re.sub(r'.*[.]', '', name)} differs afterwards")
                    if noise is not None:  # so that it does not add up
                        values[name].copy_(value)
        return failures == len(self.outcome.problems) + len(self.outcome.refused_calls)

    def gradients(
        self, hc: nn.Module, twin: nn.Module, actual: Any, expected: Any, bound: float, noise: Noise | None
    ) -> None:
        losses = [loss_of(value) for value in (actual, expected)]
        if not isinstance(losses[1], torch.Tensor):  # this call does without all that has parameters
            if isinstance(losses[0], torch.Tensor):
                raise Wrong("a gradient where the original has none")
            return
        for m, loss in zip((hc, twin), losses, strict=True):
            m.zero_grad()
            loss.backward()
        ours = dict(hc.named_parameters())
        grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        scale = max((g.abs().max().item() for g in grads.values()), default=0.0)
        floor = 1e-3 if bound < 1e-6 else 1.0  # of fp32, gradients that cancel (a bias before a norm) are rounding
        for name, p in twin.named_parameters():
            if name not in ours:
                raise Wrong(f"no parameter {name}")
            grad = ours[name].grad
            if p.grad is not None and grad is None:
                raise Wrong("no gradient where the original has one")
            if p.grad is None:
                if grad is not None and grad.abs().max() > 0:
                    raise Wrong("a gradient where the original has none")
                continue
            differs, allowed = (grad - p.grad).abs().max(), bound * max(p.grad.abs().max().item(), floor * scale)
            if not differs <= allowed and (noise is None or not differs <= noise.of(name)):
                raise Wrong(f"gradient differs by {difference(grad, p.grad):.0e}")
        for m in (hc, twin):
            m.zero_grad()

    @property
    def trains(self) -> bool:
        """Whether the original itself can be trained: code that overwrites what backward needs cannot."""
        if not hasattr(self, "_trains"):
            probe = copy.deepcopy(self.model).train()
            self._trains = True
            for seed in (1, 2, 3):
                sow(seed)
                try:
                    with torch.enable_grad():
                        loss = loss_of(probe(*(t.clone() for t in self.inputs())))
                        if isinstance(loss, torch.Tensor):
                            loss.backward()
                except RuntimeError:
                    self._trains = False
        return self._trains

    def alike(self, scope: str, hc: nn.Module, spare: nn.Module | None) -> None:
        """Compare a converted model with the original, call after call, then with attributes and hooks changed.

        ``spare`` is a copy of it that has not run.
        """
        twin, bound = copy.deepcopy(self.model), self.bound
        good = self.pair(scope, hc, twin, "eval", self.inputs(), False, 1, bound)
        good &= self.pair(scope, hc, twin, "eval, another size", self.inputs(3, 1), False, 2, bound)
        for seed in (1, 2):
            good &= self.pair(scope, hc, twin, "train", self.inputs(), True, seed, bound)
        good &= self.pair(scope, hc, twin, "train, another size", self.inputs(4, 1), True, 4, bound)
        if "mask" in self.program.features:
            for mask in (True, False):
                good &= self.pair(scope, hc, twin, "eval, mask", self.inputs(mask=mask), False, 5, bound)
        good &= self.pair(scope, hc, twin, "eval after train", self.inputs(), False, 6, bound)
        for change in (self.attributes, self.hook):
            if not good:  # what went wrong before is not counted twice
                if spare is None:
                    return
                twin, hc = copy.deepcopy(self.model), copy.deepcopy(spare)
            good = change(scope, hc, twin)

    def attributes(self, scope: str, hc: nn.Module, twin: nn.Module) -> bool:
        """Change an attribute that code reads, on both, and put it back."""
        good = True
        knobs = self.random.sample(self.program.knobs, min(2, len(self.program.knobs)))
        for name, attribute, value in knobs:
            paths = [p for p, m in twin.named_modules() if name in (kind.__name__ for kind in type(m).__mro__)]
            path = self.random.choice(paths) if paths else ""
            owners = [self.module] if not name else [m.get_submodule(path) for m in (twin, hc)]
            old = read_attribute(owners[0], attribute)
            where = "root attribute" if name and not path else "attribute" if name else "global"
            written = len(self.outcome.problems)
            with self.checked(f"{where} written, {scope}"):
                for owner in owners:
                    write_attribute(owner, attribute, value)
            if len(self.outcome.problems) > written:
                return False
            for train in (False, True):
                good = good and self.pair(scope, hc, twin, f"{where} changed", self.inputs(), train, 7, self.bound)
            for owner in owners:
                write_attribute(owner, attribute, old)
            if not good:  # buffers may have gone apart
                break
            good &= self.pair(scope, hc, twin, f"{where} put back", self.inputs(), False, 8, self.bound)
        return good

    def hook(self, scope: str, hc: nn.Module, twin: nn.Module) -> bool:
        """Add a forward hook to some module, on both: it is called, and what it returns is used, or it is refused."""
        calls: Counter[str] = Counter()
        paths: list[str] = []
        probe = copy.deepcopy(self.model).eval()
        for p, m in probe.named_modules():
            m.register_forward_hook(lambda *_, p=p: paths.append(p) if p else None)
        probe(*self.inputs())
        if not paths:
            return True
        path, changes = self.random.choice(sorted(set(paths))), self.random.random() < 0.5
        handles, good = [], True
        with self.checked(f"hook, {scope}"):

            def hook(key: str) -> Callable[..., Any]:
                def called(module: nn.Module, args: Any, output: Any) -> Any:
                    calls[key] += 1
                    return output * 1.5 if changes and type(output) is torch.Tensor else None

                return called

            for key, m in (("twin", twin), ("hc", hc)):
                handles.append(m.get_submodule(path).register_forward_hook(hook(key)))
            what = "hook that changes the output" if changes else "hook"
            good = self.pair(scope, hc, twin, what, self.inputs(), False, 9, max(self.bound, 1e-7))
            if good and calls["hc"] != calls["twin"]:
                raise Wrong(f"called {calls['hc']} times for {calls['twin']}")
        for handle in handles:
            handle.remove()
        return good

    # ------------------------------------------------------------ against itself

    def copied(self, scope: str, hc: Any) -> Any:
        """Return a deep copy with connections of its own, after comparing it and a pickled one; None if that fails."""
        made = None
        with self.checked(f"deepcopy, {scope}"):
            made = copy.deepcopy(hc).eval()
            made.hc_report = hc.hc_report
            shared = {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in hc.parameters()}
            if shared:
                raise Wrong("shares parameters")
            move(connections(made))
        if made is None:
            return None
        with self.checked(f"pickle, {scope}"), torch.no_grad():
            fresh = copy.deepcopy(made)  # calls may count themselves
            loaded = pickle.loads(pickle.dumps(made))
            for train in (False, True):
                sow(1)
                expected = fresh.train(train)(*self.inputs())
                sow(1)
                compare(loaded.train(train)(*self.inputs()), expected, 1e-6)
        return made

    def both_scopes(self, graph: Any, blocks: Any) -> None:
        """Compare the scopes with equal connections off their start, where they convert the same trunks."""
        if trunks_of(graph.hc_report) != trunks_of(blocks.hc_report):
            self.outcome.counts["scopes convert other trunks"] += 1
            return
        if any("shared by all" in note for note in blocks.hc_report.notes):  # as the report says
            self.outcome.counts["calls share connections in blocks alone"] += 1
            return
        ours, theirs = connections(graph), connections(blocks)
        if set(ours) != set(theirs):
            raise Wrong(f"connections at {sorted(set(ours) ^ set(theirs))} are in one scope alone")
        for name, connection in ours.items():
            theirs[name].load_state_dict(connection.state_dict())
        self.outcome.counts["scopes compared off the start"] += 1
        with torch.no_grad():
            for train, inputs in ((False, self.inputs()), (False, self.inputs(3, 1)), (True, self.inputs())):
                sow(1)
                expected = graph.train(train)(*(t.clone() for t in inputs))
                sow(1)
                actual = blocks.train(train)(*(t.clone() for t in inputs))
                try:
                    compare(actual, expected, 1e-5)
                except Wrong as error:
                    raise Wrong(f"{'train' if train else 'eval'}: {error}") from None

    def option(self, made: dict[str, nn.Module]) -> None:
        """Convert with one more option, and compare with the original."""
        options = dict(OPTIONS[self.program.seed % len(OPTIONS)])
        what = ", ".join(f"{k}={v}" for k, v in options.items() if k != "scope")
        options.setdefault("scope", self.random.choice(SCOPES))
        scope = options["scope"]
        names = [r.name for r in made[scope].hc_report.converted] if scope in made else []
        half = names[::2] if len(names) > 1 else []
        for key in ("include", "exclude"):
            if key in options:
                options[key] = half
                if not half:
                    return
        with self.checked(f"{what}, {scope}"):
            given = copy.deepcopy(self.model)
            hc = self.convert(given, **options, verify=self.random.random() < 0.5)
            if hc is None:
                return
            if options.get("inplace") and hc is not given:
                raise Wrong("another model is returned")
            converted = [r.name for r in hc.hc_report.converted]
            uneven = {s.name for s in hc.hc_report.skipped if s.reason.startswith(hct.Reason.UNEVEN.value)}
            alike = {r.name for r in hc.hc_report.residuals if r.module in half}  # patterns match modules too
            if "include" in options and not set(half) <= set(converted) | uneven <= set(half) | alike:
                raise Wrong(f"converted {len(converted)} for the {len(half)} that were included")
            if "exclude" in options and set(converted) & set(half):
                raise Wrong("converted one that was excluded")
            if "min_residuals" in options and any(len(names) < 2 for names in trunks_of(hc.hc_report)):
                raise Wrong("a trunk shorter than min_residuals")
            if options.get("num_streams") != 1 and "stream_dropout" not in options:
                self.outcome.counts["options with connections"] += bool(connections(hc))
            twin = copy.deepcopy(self.model)
            rounded = options.get("connection") in CONSTRAINED or {"init", "readout"} & set(options)
            bound = 1e-5 if rounded else self.bound
            for train, inputs in ((False, self.inputs()), (True, self.inputs()), (False, self.inputs(3, 1))):
                if train and "stream_dropout" in options:
                    continue
                if not self.pair(scope, hc, twin, what, inputs, train, 10, bound):
                    break
