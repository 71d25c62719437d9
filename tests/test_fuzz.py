"""Random programs are converted, and compared with themselves.

    python tests/test_fuzz.py --seeds 0:2000 [--jobs 2]     a table of what went wrong, by message

``python tests/fuzz_programs.py SEED`` prints a program. A hundred run with the other tests, twenty of them for the
counts, and two thousand with ``-m fuzz``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from fuzz_checks import Outcome, check
from fuzz_programs import generate
from tabulate import tabulate

CHUNK, FEW, MANY = 10, 100, 2000
CONVERTED = 0.85  # of programs in some scope: what is refused is not checked


def _chunk(start: int) -> None:
    outcomes = [check(seed) for seed in range(start, start + CHUNK)]
    wrong = [f"seed {o.seed}: {what}: {message}" for o in outcomes for what, message in o.problems]
    assert not wrong, "\n".join(wrong)
    converted = sum(any(o.converted.values()) for o in outcomes)
    assert converted >= (CONVERTED - 0.15) * CHUNK, [o.refusals for o in outcomes]  # of so few


@pytest.mark.parametrize("start", range(0, FEW, CHUNK))
def test_a_hundred_programs(start: int) -> None:
    _chunk(start)


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(FEW, MANY, CHUNK))
def test_two_thousand_programs(start: int) -> None:
    _chunk(start)


def test_most_programs_convert_and_checks_are_made() -> None:
    outcomes = [check(seed) for seed in range(10**6, 10**6 + 20)]
    assert sum(any(o.converted.values()) for o in outcomes) >= CONVERTED * len(outcomes)
    assert sum(sum(o.converted.values()) for o in outcomes) >= 4 * len(outcomes)
    counts = sum((o.counts for o in outcomes), Counter())
    assert counts["scopes compared off the start"] >= 0.5 * len(outcomes)
    assert len({feature for o in outcomes for feature in generate(o.seed).features}) > 40


def test_a_seed_gives_one_program() -> None:
    assert [generate(seed) for seed in range(20)] == [generate(seed) for seed in range(20)]
    assert len({generate(seed).source for seed in range(200)}) > 190


# ---------------------------------------------------------------- many, with a table


def group_of(message: str) -> str:
    """Return a message without what differs from program to program."""
    message = re.sub(r"/\S*/fuzz_program_\d+\.py:\d+", "FILE", " ".join(message.split()))
    message = re.sub(r"(those that were converted): .*", r"\1", message)
    message = re.sub(r"attribute \S*\.(\w+)(, attribute \S*)*", r"attribute \1", message)
    if " listed: " in message:
        message = re.sub(r"self\.\w+", "f", message)
        while re.search(r"\([^()]+\)", message):
            message = re.sub(r"\([^()]+\)", "", message)
    message = re.sub(r"\b(Block|Stage|fuzz_program_)\d+\b", r"\1*", message)
    message = re.sub(r"'[^']*'|\d+(\.\d+)?(e[+-]?\d+)?", "*", message)
    return message[:110]


def run(seeds: Sequence[int], jobs: int = 1) -> list[Outcome]:
    """Check the programs of ``seeds``."""
    if jobs == 1:
        return [check(seed) for seed in seeds]
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(check, seeds, chunksize=4))


def typical(seeds: Sequence[int], outcomes: Sequence[Outcome]) -> str:
    """Return the two features that these programs have more often than others."""
    here = Counter(f for seed in seeds for f in generate(seed).features)
    everywhere = Counter(f for o in outcomes for f in generate(o.seed).features)
    excess = {f: times / len(seeds) - everywhere[f] / len(outcomes) for f, times in here.items()}
    return ", ".join(sorted(excess, key=lambda f: -excess[f])[:2]) if len(seeds) > 1 else ""


def table(outcomes: Sequence[Outcome]) -> str:
    """Return tables of what went wrong and of what was refused."""
    parts = []
    for title, kind in (("wrong", "problems"), ("refused", "refusals"), ("refused later", "refused_calls")):
        groups: dict[tuple[str, str], list[int]] = {}
        for o in outcomes:
            for what, message in getattr(o, kind):
                seeds = groups.setdefault((what, group_of(message)), [])
                if o.seed not in seeds:
                    seeds.append(o.seed)
        rows = [(len(s), *key, " ".join(map(str, s[:6])), typical(s, outcomes)) for key, s in groups.items()]
        if rows:
            headers = ("programs", title, "message", "seeds", "typical")
            parts.append(tabulate(sorted(rows, key=lambda r: -r[0]), headers=headers))
    total = len(outcomes)
    some = sum(any(o.converted.values()) for o in outcomes)
    good = sum(not o.problems for o in outcomes)
    counts: Counter[str] = sum((o.counts for o in outcomes), Counter())
    parts.append(
        f"{total} programs: {good} without fault; {some} ({some / total:.0%}) convert in some scope, graph "
        f"{sum('graph' in o.converted for o in outcomes)}, blocks {sum('blocks' in o.converted for o in outcomes)}; "
        f"{sum(sum(o.converted.values()) for o in outcomes)} residuals converted; {sum(counts.values())} checks, "
        f"{counts['scopes compared off the start']} programs compared between scopes off the start."
    )
    return "\n\n".join(parts)


def main() -> None:
    """Run a range of seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:100", help="START:END, or one seed")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    start, _, end = given.seeds.partition(":")
    seeds = range(int(start), int(end) if end else int(start) + 1)
    torch.set_num_threads(1)
    began = time.perf_counter()
    outcomes = run(seeds, given.jobs)
    print(table(outcomes))
    print(f"{time.perf_counter() - began:.1f} s")
    sys.exit(any(o.problems for o in outcomes))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
