"""The Hugging Face zoo, as tests: ``python -m pytest -m hf_zoo -n 2``; ``python tests/hf_zoo.py`` prints a table."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from hf_cases import CASES  # noqa: E402
from hf_zoo import run  # noqa: E402
from zoo import FINE  # noqa: E402


@pytest.mark.hf_zoo
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_hf_zoo(name):
    outcome = run(name)
    assert outcome.status in FINE, f"{outcome.status}\n{outcome.message}"
