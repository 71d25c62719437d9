"""Models through torch.export: each exported program is to have the residuals of the model, and its outputs.

    python tests/exported_zoo.py                        # all
    python tests/exported_zoo.py "torchvision:*"        # some; names may hold * and ?
    python -m pytest -m zoo tests/test_exported.py      # the same as tests

Prints a table: residuals expected (counted from the models' code in zoo_counts.py and hf_counts.py), found in the
model, in the exported program and in the decomposed one; how many have the same name and line in the reports of model
and program; errors of the outputs at the start, and after the connections of both have been moved off it alike.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from checks import error, moved, seeded, wake  # noqa: E402

import hc_transform as hct  # noqa: E402

VISION = """
torchvision:resnet18 torchvision:mobilenet_v3_small torchvision:mnasnet0_5 torchvision:swin_t
torchvision:convnext_tiny torchvision:efficientnet_b0 torchvision:regnet_y_400mf
timm:test_vit timm:convnext_zepto_rms timm:mobilenetv3_small_050 timm:test_mambaout timm:efficientvit_m0
timm:starnet_s050 timm:cait_xxs24_224 timm:convmixer_768_32
""".split()
LANGUAGE = """
causal_lm:llama causal_lm:gpt2 causal_lm:gpt_neox causal_lm:gemma2 causal_lm:opt causal_lm:phi3 causal_lm:qwen3
encoder:bert encoder:deberta-v2 seq2seq:t5
""".split()
NAMES = [*VISION, *LANGUAGE]


@dataclass
class Outcome:
    """What became of one model."""

    name: str
    expected: int | None = None
    model: int = 0
    exported: int = 0
    decomposed: int | None = None
    same: int = 0
    start: float | None = None
    apart: float | None = None
    seconds: float = 0.0
    problem: str = ""

    @property
    def fine(self) -> bool:
        """Whether all is as expected; torch itself cannot decompose every program."""
        counts = {self.expected, self.model, self.exported, self.same}
        counts |= set() if self.decomposed is None else {self.decomposed}
        bounded = self.start is not None and self.start <= 1e-5 and self.apart is not None and self.apart <= 1e-4
        return not self.problem and len(counts) == 1 and bounded


def made(name: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any], int]:
    """Return a model in eval mode, its inputs and the number of its residuals."""
    torch.manual_seed(0)
    if name in VISION:
        from zoo import counter
        from zoo_cases import CASES

        case = next(case for case in CASES if case.name == name)
        model = scaled(wake(case.make()).eval())
        return model, case.inputs(2), {}, case.expected(counter(model))
    from hf_cases import CASES as LANGUAGE_CASES

    found = next(case for case in LANGUAGE_CASES if case.name == name)
    model = scaled(wake(found.make()).eval())
    inputs = found.inputs(2, found.lengths[0])
    cached = getattr(model.config, "use_cache", None) is not None
    return model, (), {**inputs, **({"use_cache": False} if cached else {})}, found.expected(model.config)


def scaled(model: torch.nn.Module) -> torch.nn.Module:
    """Give layer scales that start near zero values that let their branches show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() and parameter.abs().max() < 1e-2:
                parameter.normal_(0.5, 0.1)
    return model


def check(name: str) -> Outcome:
    """Convert a model and what torch.export makes of it, and compare."""
    outcome = Outcome(name)
    start = time.time()
    try:
        model, args, kwargs, outcome.expected = made(name)
        options: dict[str, Any] = {"num_streams": 2, "connection": "static"}
        converted = _converted(model, args, kwargs, options)
        outcome.model = len(converted.hc_report.converted)
        program = torch.export.export(model, args, kwargs)
        hc = hct.convert(program, **options)
        outcome.exported = len(hc.hc_report.converted)
        rows = [{(r.name, r.location) for r in made.hc_report.converted} for made in (converted, hc)]
        outcome.same = len(rows[0] & rows[1])
        results = [hc]
        simpler = _decomposed(program)
        if simpler is not None:
            results.append(hct.convert(simpler, **options))
            outcome.decomposed = len(results[-1].hc_report.converted)
        with torch.no_grad():
            expected = seeded(model, args, kwargs)
            outcome.start = max(error(seeded(m, args, kwargs), expected) for m in results)
            plain, expected = expected, seeded(moved(converted, 0.05, seed=3), args, kwargs)
            assert error(expected, plain) > 1e-4, "moved connections change nothing, so that nothing was compared"
            outcome.apart = max(error(seeded(moved(m, 0.05, seed=3), args, kwargs), expected) for m in results)
        if not outcome.fine:
            outcome.problem = f"{sorted(rows[0] ^ rows[1])[:6]}"
    except Exception as problem:
        last = traceback.extract_tb(problem.__traceback__)[-1]
        outcome.problem = f"{type(problem).__name__}: {str(problem)[:600]} ({last.filename}:{last.lineno})"
    outcome.seconds = time.time() - start
    return outcome


def _decomposed(program: Any) -> Any:
    try:
        return program.run_decompositions()
    except ValueError:  # GPT-2's attention gives a view that torch's own decomposition of expand does not take
        return None


def _converted(model: torch.nn.Module, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    try:
        return hct.convert(model, args, kwargs, scope="graph", **options)
    except (hct.TraceError, hct.UnsupportedModel):
        return hct.convert(model, args, kwargs, scope="blocks", **options)


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a table, and what went wrong."""
    rows = [(*(getattr(o, key) for key in COLUMNS), "ok" if o.fine else "FAILED") for o in outcomes]
    parts = [tabulate(rows, headers=(*COLUMNS, "status"), floatfmt=".1e")]
    parts += [f"{sum(o.fine for o in outcomes)} of {len(outcomes)} as expected"]
    return "\n\n".join([*parts, *(f"{o.name}: {o.problem}" for o in outcomes if not o.fine)])


COLUMNS = ("name", "expected", "model", "exported", "decomposed", "same", "start", "apart", "seconds")


def main() -> int:
    """Check the models and return 1 if anything is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    wanted = parser.parse_args().names
    warnings.simplefilter("ignore")
    outcomes = []
    for name in NAMES:
        if not wanted or any(fnmatch.fnmatch(name, pattern) for pattern in wanted):
            outcomes.append(check(name))
            print(f"{name}: {'ok' if outcomes[-1].fine else outcomes[-1]}", file=sys.stderr, flush=True)
    print(table(outcomes))
    return int(not all(o.fine for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
