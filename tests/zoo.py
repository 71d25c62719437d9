"""The zoo: models that people use, each converted and checked in a process of its own.

    python tests/zoo.py                               # all, two at a time
    python tests/zoo.py timm:beit_base_patch16_224    # some; names may hold * and ?
    python -m pytest -m zoo -n 2                      # the same as tests

Prints a table: residuals found and expected, status, errors, seconds. The expected numbers are counted
from the models' code and configuration in zoo_counts.py, not by the package.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from checks import check_preserved, double, doubled, error, rounds_in_float32, seeded, wake  # noqa: E402
from zoo_cases import CASES, Case  # noqa: E402

import hc_transform as hct  # noqa: E402

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "torch", "zoo_cases", "hc_transform.convert"])
LIMIT = 600  # seconds for one model
MISSING = "package missing"
FINE = ("ok", "nothing to convert", "refused as expected", MISSING)
LARGE = 80_000_000  # parameters above which double precision takes too much memory


@dataclass
class Outcome:
    """What became of one model."""

    name: str
    status: str = "ok"
    found: int = 0
    expected: int | None = None
    trunks: int = 0
    error: float | None = None
    convert_seconds: float = 0.0
    forward_seconds: float = 0.0
    seconds: float = 0.0
    message: str = ""


def check(case: Case) -> Outcome:
    """Convert one model and check what conversion promises; raises what is wrong."""
    outcome = Outcome(case.name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = wake(case.make()).eval()
        except ImportError as missing:
            outcome.status, outcome.message = MISSING, str(missing)
            return outcome
    outcome.expected = case.expected(counter(model))
    x = case.inputs(2)
    start = time.time()
    with torch.no_grad():
        seeded(model, x, {})
    outcome.forward_seconds = time.time() - start
    start = time.time()
    try:
        hc = _converted(model, x, case.options)
    except hct.NothingToConvert as nothing:
        outcome.convert_seconds = time.time() - start
        outcome.message = str(nothing)
        assert outcome.expected == 0, f"{outcome.expected} residuals expected: {nothing}"
        outcome.status = "nothing to convert"
        return outcome
    except hct.UnsupportedModel as refusal:
        assert case.refused is not None and case.refused in str(refusal), str(refusal)
        outcome.status, outcome.message = "refused as expected", str(refusal)
        return outcome
    assert case.refused is None, "it was to be refused"
    outcome.convert_seconds = time.time() - start
    outcome.found = len(hc.hc_report.converted)
    outcome.trunks = len({r.trunk for r in hc.hc_report.converted})
    outcome.error = hc.hc_report.max_error
    assert outcome.found == outcome.expected, f"{outcome.found} found, {outcome.expected} expected\n{hc.hc_report}"
    others = [case.inputs(3)]
    if case.other_size is not None:
        others += [inputs for inputs in [case.other_size()] if _runs(model, inputs)]
    for inputs in others:  # in fp32, as users run it
        with torch.no_grad():
            assert error(seeded(hc, inputs, {}), seeded(model, inputs, {})) <= 1e-5, [t.shape for t in inputs]
    large = sum(p.numel() for p in model.parameters()) > LARGE
    if (
        large or not case.in_double or not _runs(copy.deepcopy(model).double(), double(x))
    ):  # some make fp32 tensors themselves
        check_preserved(model, hc, x, bound=1e-5, gradient_bound=1e-2)
        outcome.message = "gradients compared in fp32"
        return outcome
    doubled(hc, model)
    bounds = {"bound": case.bound, "gradient_bound": case.gradient_bound}
    if rounds_in_float32(model, double(x)):  # memory that lies otherwise is summed in another order
        bounds = {"bound": 1e-5, "gradient_bound": 1e-4}
    check_preserved(model, hc, double(x), **bounds)
    return outcome


def _converted(model: nn.Module, x, options) -> nn.Module:
    """Convert as one graph where there is one: scope="auto" takes blocks for models with methods of their own."""
    try:
        return hct.convert(model, x, **{"scope": "graph", **options})
    except hct.NothingToConvert:
        raise
    except (hct.TraceError, hct.UnsupportedModel):
        return hct.convert(model, x, **options)


def counter(model: nn.Module):
    """Return ``c(class_name, predicate)``: the number of such modules in the model."""

    def count(name, predicate=None):
        return sum(type(m).__name__ == name and (predicate is None or bool(predicate(m))) for m in model.modules())

    return count


def _runs(model: nn.Module, inputs) -> bool:
    try:
        with torch.no_grad():
            seeded(model, inputs, {})
    except Exception:
        return False
    return True


def run(name: str, limit: float = LIMIT) -> Outcome:
    """Check one model in a process of its own."""
    return in_a_process(check_one, name, limit)


def in_a_process(one: Callable[..., Outcome], name: str, limit: float, *args: Any) -> Outcome:
    """Call ``one(name, *args)`` in a process of its own, forked from one that has imported what takes long."""
    start = time.time()
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_send, args=(theirs, one, name, *args))
    process.start()
    theirs.close()
    try:
        outcome = ours.recv() if ours.poll(limit) else Outcome(name, status="TIMEOUT", message=f"more than {limit} s")
    except EOFError:
        process.join()
        outcome = Outcome(name, status="CRASH", message=f"exit code {process.exitcode}")
    process.kill()
    process.join()
    outcome.seconds = time.time() - start
    return outcome


def _send(connection: Connection, one: Callable[..., Outcome], *args: Any) -> None:
    connection.send(one(*args))


def check_one(name: str) -> Outcome:
    """Check one model in this process; what is wrong becomes the outcome's status."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = next(case for case in CASES if case.name == name)
    try:
        return check(case)
    except Exception as problem:
        line = problem.__traceback__.tb_next.tb_lineno if problem.__traceback__.tb_next else 0
        return Outcome(name, status=f"FAILED: {type(problem).__name__}", message=f"{problem} (check: line {line})")


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes as a table, with totals and what went wrong."""
    outcomes = sorted(outcomes, key=lambda o: o.name)
    rows = [
        (o.name, o.found, o.expected, o.trunks, o.status, o.error, o.convert_seconds, o.forward_seconds, o.seconds)
        for o in outcomes
    ]
    headers = ("model", "found", "expected", "trunks", "status", "error", "convert s", "forward s", "all s")
    good = sum(o.status in FINE for o in outcomes)
    parts = [tabulate(rows, headers=headers, floatfmt=".2g"), f"{good} of {len(outcomes)} as expected"]
    parts += [f"{o.name}: {o.status}\n{o.message}" for o in outcomes if o.status not in FINE]
    return "\n\n".join(parts)


def chosen(cases: Iterable[Any], patterns: list[str]) -> Iterator[str]:
    """Yield the names of cases that match a pattern."""
    for case in cases:
        if not patterns or any(fnmatch.fnmatch(case.name, p) for p in patterns):
            yield case.name


def run_all(one: Callable[[str], Outcome], names: Iterable[str], jobs: int) -> int:
    """Check every name and print a table; return 1 if anything is not as expected."""
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(jobs) as pool:
        for o in pool.map(one, names):
            outcomes.append(o)
            print(f"{o.name}: {o.found} {o.status} {o.seconds:.0f} s", file=sys.stderr, flush=True)
    print(table(outcomes))
    return int(any(o.status not in FINE for o in outcomes))


def main() -> int:
    """Run the zoo and return 1 if anything is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one model")
    options = parser.parse_args()
    return run_all(lambda name: run(name, options.limit), chosen(CASES, options.names), options.jobs)


if __name__ == "__main__":
    sys.exit(main())
