"""Training a tiny GPT on the source of Python's standard library, with and without conversion."""

from __future__ import annotations

import copy
import sysconfig
from pathlib import Path

import torch
from models import GPT

import hc_transform as hct

STEPS = 200


def batches(steps, batch=8, length=32):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = torch.tensor(list(b"".join(f.read_bytes() for f in files)), dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (batch,), generator=generator)
        rows = torch.stack([text[s : s + length + 1] for s in starts])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for x, y in batches(STEPS):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def spread(hc, x, y):
    """How far the streams are apart after the last residual, relative to their mean."""
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name.endswith("_write"):
                found["last"] = value
            return value

    with torch.no_grad():
        Recorder(hc).run(x, y)
    streams = torch.stack(found["last"])
    return (streams.std(0).mean() / streams.mean(0).abs().mean()).item()


def test_training_from_the_same_start():
    model = GPT(vocabulary=256, block_size=32, dim=64, depth=3)
    x, y = next(iter(batches(1)))
    hc = hct.convert(copy.deepcopy(model), (x, y), connection="dynamic", num_streams=4)
    new = {n: p.detach().clone() for n, p in hc.named_parameters() if "hyper_connections." in n}
    assert spread(hc, x, y) < 1e-6
    plain, ours = train(model), train(hc)
    print(f"plain {plain[0]:.4f} -> {plain[-1]:.4f}, converted {ours[0]:.4f} -> {ours[-1]:.4f}", spread(hc, x, y))
    assert abs(plain[0] - ours[0]) <= 1e-5 * plain[0]
    for losses in (plain, ours):
        assert sum(losses[-10:]) / 10 < 0.6 * losses[0]
    assert spread(hc, x, y) > 1e-2, "the streams separate"
    after = dict(hc.named_parameters())
    assert all(not torch.equal(after[name], before) for name, before in new.items()), "every parameter has moved"
