"""Training on two processes (gloo) against one: the same losses, in DDP and FSDP2.

Both processes run all cases one after the other, for starting them takes the longest.
"""

from __future__ import annotations

import copy
import os
import traceback
from pathlib import Path

import pytest
import torch
from checks import moved
from models import GPT
from torch import nn

import hc_transform as hct

RANKS = 2
STEPS = 4
CASES = {}
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")


def case(function):
    CASES[function.__name__] = function
    return function


def batch(rows=4):
    ids = torch.randint(0, 65, (STEPS, rows, 9), generator=torch.Generator().manual_seed(0))
    return ids[..., :-1].contiguous(), ids[..., 1:].contiguous()


def model(scope="blocks", dtype=torch.float32, connection="dynamic"):
    torch.manual_seed(0)
    x, y = batch()
    gpt = GPT(depth=2).to(dtype)
    return moved(hct.convert(gpt, (x[0], y[0]), scope=scope, verify=False, connection=connection), 0.05)


def trained(hc, rank=0, ranks=1, steps=range(STEPS), optimizer=None):
    """Train on the rows of this rank; return the losses of the whole batch."""
    x, y = batch()
    mine = slice(rank * len(x[0]) // ranks, (rank + 1) * len(x[0]) // ranks)
    optimizer = optimizer or torch.optim.AdamW(hct.parameter_groups(hc, lr=1e-2, weight_decay=0.1))
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = hc(x[step, mine], y[step, mine])[1]
        loss.backward()
        optimizer.step()
        loss = loss.detach().float()
        if ranks > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / ranks)
    return losses


def sharded(hc, **settings):
    """Shard by block, each connection by itself: it keeps its dtype."""
    from torch.distributed.fsdp import fully_shard

    for block in hc.transformer.h:
        for connection in block.hyper_connections.values():
            fully_shard(connection)
        fully_shard(block, **settings)
    return fully_shard(hc, **settings)


@case
def ddp_graph(rank, folder):
    return trained(nn.parallel.DistributedDataParallel(model("graph")), rank, RANKS)


@case
def ddp_blocks(rank, folder):
    return trained(nn.parallel.DistributedDataParallel(model("blocks")), rank, RANKS)


@case
def ddp_mhc(rank, folder):
    return trained(nn.parallel.DistributedDataParallel(model(connection="mhc")), rank, RANKS)


@case
def fsdp_by_block(rank, folder):
    from torch.distributed.fsdp import fully_shard

    hc = model()
    for block in hc.transformer.h:
        fully_shard(block)
    fully_shard(hc)
    assert len(hct.connection_parameters(hc)) == 24
    return trained(hc, rank, RANKS)


@case
def fsdp_with_connections_apart(rank, folder):
    return trained(sharded(model()), rank, RANKS)


@case
def fsdp_bfloat16(rank, folder):
    hc = model(dtype=torch.bfloat16)
    sharded(hc)
    kinds = {(p.dtype, "hyper" in n) for n, p in hc.named_parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    return trained(hc, rank, RANKS)


@case
def fsdp_from_meta(rank, folder):
    hc = model()
    state = hc.state_dict()
    with torch.device("meta"):
        gpt, ids = GPT(depth=2), torch.zeros(4, 8, dtype=torch.long)
    empty = sharded(hct.convert(gpt, (ids, ids), scope="blocks"))
    empty.to_empty(device="cpu")
    for module in empty.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = {n: p.full_tensor() for n, p in hct.connection_parameters(empty).items()}
    start = model()
    for module in start.modules():
        if isinstance(module, hct.Connection):
            module.reset_parameters()
    assert all(torch.equal(fresh[n], p) for n, p in hct.connection_parameters(start).items())
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    empty.lm_head.weight = empty.transformer.wte.weight  # to_empty unties
    set_model_state_dict(empty, state, options=StateDictOptions(full_state_dict=True))
    return trained(empty, rank, RANKS)


@case
def fsdp_saved_whole(rank, folder):
    hc = sharded(model())
    losses = trained(hc, rank, RANKS, range(2))
    hct.save(hc, folder / "whole")
    return losses


@case
def distributed_checkpoint(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    hc = sharded(model())
    optimizer = torch.optim.AdamW(hct.parameter_groups(hc, lr=1e-2, weight_decay=0.1))
    losses = trained(hc, rank, RANKS, range(2), optimizer)
    weights, moments = get_state_dict(hc, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "dcp")
    return losses


def run(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(Path(folder) / "port").read_text())
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = {}
    for name, function in CASES.items():
        try:
            found[name] = function(rank, Path(folder))
        except Exception:
            found[name] = traceback.format_exc()
        torch.distributed.barrier()
    torch.save(found, Path(folder) / f"found{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    import socket

    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(RANKS)], folder


def losses_of(found, name):
    ranks = [results[name] for results in found[0]]
    for rank in ranks:
        assert not isinstance(rank, str), rank
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.parametrize("name", ["ddp_graph", "ddp_blocks", "fsdp_by_block", "fsdp_with_connections_apart"])
def test_losses_are_those_of_one_process(found, name):
    """Sums over rows are rounded in another order: fp32, four steps."""
    expected = trained(model())
    assert expected[0] - expected[-1] > 0.1
    assert losses_of(found, name) == pytest.approx(expected, rel=1e-5)


def test_a_constrained_connection(found):
    assert losses_of(found, "ddp_mhc") == pytest.approx(trained(model(connection="mhc")), rel=1e-5)


def test_a_bfloat16_model_with_connections_in_fp32(found):
    assert losses_of(found, "fsdp_bfloat16") == pytest.approx(trained(model(dtype=torch.bfloat16)), rel=2e-2)


def test_a_model_made_on_meta(found):
    assert losses_of(found, "fsdp_from_meta") == pytest.approx(trained(model()), rel=1e-5)


def test_shards_saved_as_a_whole_go_on_in_one_process(found):
    expected = trained(model(), steps=range(3))
    assert losses_of(found, "fsdp_saved_whole") == pytest.approx(expected[:2], rel=1e-5)
    again = hct.load(GPT(depth=2), found[1] / "whole")
    assert trained(again, steps=[2]) == pytest.approx(expected[2:], rel=1e-5)


def test_two_ranks_resumed_on_one(found):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    expected = trained(model())
    assert losses_of(found, "distributed_checkpoint") == pytest.approx(expected[:2], rel=1e-5)
    hc = model()
    optimizer = torch.optim.AdamW(hct.parameter_groups(hc, lr=1e-2, weight_decay=0.1))
    weights, moments = get_state_dict(hc, optimizer)
    state = {"model": copy.deepcopy(weights), "optimizer": moments}
    dcp.load(state, checkpoint_id=found[1] / "dcp", no_dist=True)
    set_state_dict(hc, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert trained(hc, steps=range(2, STEPS), optimizer=optimizer) == pytest.approx(expected[2:], rel=1e-5)
