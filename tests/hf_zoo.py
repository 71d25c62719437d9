"""The Hugging Face zoo: model types of transformers, each converted block by block in a process of its own.

    python tests/hf_zoo.py                               # all, two at a time
    python tests/hf_zoo.py causal_lm:llama "encoder:*"   # some; names may hold * and ?
    python tests/hf_zoo.py --original                    # the models against copies of themselves, unconverted
    python -m pytest -m hf_zoo -n 2                      # the same as tests

Prints a table: residuals found and expected, status, errors, seconds. The expected numbers are counted from
the models' code in hf_counts.py, not by the package.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from checks import wake  # noqa: E402
from hf_cases import CASES, Case  # noqa: E402
from hf_checks import Pair, checks_of  # noqa: E402
from torch import nn  # noqa: E402
from zoo import PROCESSES, Outcome, chosen, in_a_process, run_all  # noqa: E402

import hc_transform as hct  # noqa: E402

LIMIT = 300  # seconds for one model
NOTHING = "nothing to convert"  # no residuals, or hyper-connected already

PROCESSES.set_forkserver_preload(
    ["__main__", "hf_cases", "hf_checks", "transformers.generation.utils", "transformers.models.auto.modeling_auto"]
)


def made(case: Case) -> nn.Module:
    """Return a case's model, ready to be compared: no weights at zero, no stop before the last token."""
    model = wake(case.make()).eval()
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.generation_config.decoder_start_token_id = 2
    return model


def check(case: Case, outcome: Outcome, original: bool) -> None:
    """Convert a model and run every check of it; what fails goes into the outcome."""
    model = made(case)
    outcome.expected = case.expected(model.config)
    pair = Pair(case, model, model, not original)
    start = time.time()
    with torch.no_grad():
        model(**pair.inputs())
    outcome.forward_seconds = time.time() - start
    failures = {}
    if original:
        pair.hc = copy.deepcopy(model)
        outcome.found = outcome.expected or 0
    else:
        start = time.time()
        try:
            pair.hc = hct.convert(model, kwargs=pair.inputs(), scope="blocks", num_streams=2)
        except hct.HCTransformError as refusal:
            if outcome.expected or isinstance(refusal, hct.NotEquivalent):
                raise
            outcome.status, outcome.message = NOTHING, str(refusal)
            return
        finally:
            outcome.convert_seconds = time.time() - start
        report = pair.hc.hc_report
        outcome.found, outcome.error = len(report.converted), report.max_error
        outcome.trunks = len({r.trunk for r in report.converted})
        if outcome.found != outcome.expected:
            failures["count"] = f"{outcome.found} found, {outcome.expected} expected ({case.note})\n{report}"
    for name, one in checks_of(case).items():
        try:
            one(pair)
        except Exception as problem:
            failures[name] = f"{type(problem).__name__}: {problem} ({where(problem)})"[:1500]
    if failures:
        outcome.status = "FAILED: " + ", ".join(failures)
        outcome.message = "\n".join(f"  {name}: {failure}" for name, failure in failures.items())


def where(problem: BaseException) -> str:
    """Return the place in the checks and the last place of an error."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [f for f in frames if Path(f.filename).name in ("hf_checks.py", "hf_zoo.py")]
    return " ... ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in [*ours[-1:], frames[-1]])


def check_one(name: str, original: bool = False) -> Outcome:
    """Check one model in this process; what is wrong becomes the outcome's status."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    outcome = Outcome(name)
    try:
        check(next(case for case in CASES if case.name == name), outcome, original)
    except Exception as problem:
        outcome.status = f"FAILED: {type(problem).__name__}"
        outcome.message = f"{problem} ({where(problem)})"
    return outcome


def run(name: str, limit: float = LIMIT, original: bool = False) -> Outcome:
    """Check one model in a process of its own."""
    return in_a_process(check_one, name, limit, original)


def main() -> int:
    """Run the zoo and return 1 if anything is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one model")
    parser.add_argument("--original", action="store_true", help="check the cases: no conversion")
    parser.add_argument("--here", action="store_true", help="in this process, to debug")
    options = parser.parse_args()

    def one(name: str) -> Outcome:
        return check_one(name, options.original) if options.here else run(name, options.limit, options.original)

    return run_all(one, chosen(CASES, options.names), 1 if options.here else options.jobs)


if __name__ == "__main__":
    sys.exit(main())
