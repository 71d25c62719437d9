"""Functions that assert; pytest, which rewrites the asserts of test files, leaves these as they are."""

import torch


def message(x):
    assert x.sum() > 0, "the sum is to be positive"


def made_message(x):
    assert x.sum() > 0, f"bad: {tuple(x.shape)}"


def negated(x):
    assert not torch.isnan(x).any(), "the sum is a number"


def both(x):
    assert x.sum() > 0 and x.isfinite().all(), "the sum and its terms"


def number(x):
    assert x.sum().item() > 0, "the sum is to be positive"


def on_shape(x):
    assert x.shape[0] < 6, f"the sum is over {len(x)} rows"


ASSERTS = (message, made_message, negated, both, number, on_shape)
