"""Settings of all tests."""

from __future__ import annotations

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as there are cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Let reports have their sentences on one line each, so that tests find them."""
    monkeypatch.setenv("COLUMNS", "1000")
