"""Parameters after conversion: groups for optimisers, what is frozen, starts given again."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import GPT, ViT
from torch import nn

import hc_transform as hct
from hc_transform.connections.starts import MadeIn
from hc_transform.connections.trunk_ends import LearnedReadout, StreamEmbedding

SCOPES = ["graph", "blocks"]
IDS = torch.randint(0, 65, (2, 8), generator=torch.Generator().manual_seed(0))
KINDS = [*hct.CONNECTIONS]


def converted(scope="graph", **options):
    torch.manual_seed(0)
    return hct.convert(GPT(depth=2), (IDS,), scope=scope, **{"verify": False, **options})


def decay_only(model, groups, steps=50):
    """Return how far parameters move in AdamW steps of zero gradients: what weight decay does alone."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}


@pytest.mark.parametrize("scope", SCOPES)
def test_fifty_steps_of_decay_leave_connections_unmoved(scope):
    hc = converted(scope)
    moved = decay_only(hc, hct.parameter_groups(hc, lr=0.1, weight_decay=0.1))
    names = hct.connection_parameters(hc)
    assert names and not any(moved[name] for name in names)
    assert moved["transformer.h.0.mlp.fc.weight"] > 0 and not moved["transformer.h.0.ln_1.weight"]
    moved = decay_only(hc, hc.parameters())
    assert moved["transformer.h.0.hyper_connections.attn.h_res"] > 0.3, "as without groups"


@pytest.mark.parametrize("scope", SCOPES)
def test_groups_hold_every_trained_parameter_once_with_its_rate(scope):
    hc = converted(scope)
    hc.get_submodule("transformer.wpe").weight.requires_grad_(False)
    groups = hct.parameter_groups(hc, 1e-3, 0.1, connection_lr=1e-2, connection_weight_decay=0.05)
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {
        "decay": (1e-3, 0.1),
        "no_decay": (1e-3, 0.0),
        "connection_projections": (1e-2, 0.05),
        "connections": (1e-2, 0.0),
    }
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in hc.parameters() if p.requires_grad)
    ends = {n.rpartition(".")[2] for n, p in hc.named_parameters() for q in groups[2]["params"] if p is q}
    assert ends == {"projection"}


def test_rates_that_are_not_given_are_left_to_the_optimiser():
    hc = converted()
    optimizer = torch.optim.SGD(hct.parameter_groups(hc), lr=0.3, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.3, 0.2)] + [(0.3, 0.0)] * 3


@pytest.mark.parametrize("name", ["lr", "weight_decay", "connection_lr", "connection_weight_decay"])
def test_negative_rates_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name} is at least 0, got -1"):
        hct.parameter_groups(converted(), **{name: -1})


class Kept(ViT):
    def no_weight_decay(self):
        return {"pos", "cls"}


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Kept(depth=2)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("outer", [False, True], ids=["model", "part"])
def test_what_a_model_does_not_want_decayed_is_not(scope, outer):
    model, x = (Outer() if outer else Kept(depth=2)), torch.randn(2, 1, 8, 8)
    hc = hct.convert(model, (x,), scope=scope, verify=False)
    kept = {id(p) for name, p in hc.named_parameters() if name.rpartition(".")[2] in ("pos", "cls")}
    groups = {group["name"]: {id(p) for p in group["params"]} for group in hct.parameter_groups(hc, weight_decay=0.1)}
    if outer and scope == "graph":
        pytest.skip("a graph knows the methods of its root alone")
    assert len(kept) == 2 and kept <= groups["no_decay"] and len(groups["decay"]) > 2


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "compiled"])
def test_freezing_the_base_leaves_connections_alone_in_training(scope, wrapped):
    hc = converted(scope, readout="learned", stream_embedding=True)
    model = torch.compile(hc) if wrapped else hc
    assert hct.freeze_base(model) is model
    trained = {n for n, p in hc.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in hc.named_parameters() if "hyper_connections" in n}
    assert {id(p) for p in hct.connection_parameters(model).values()} == {
        id(p) for p in hc.parameters() if p.requires_grad
    }
    hc(IDS, IDS)[1].backward()
    assert {n for n, p in hc.named_parameters() if p.grad is not None} == trained


def test_the_layer_by_hand_has_connections_too():
    layer = hct.HyperConnections(4, dim=8, branch=nn.Linear(8, 8), additional_input_paths=["mask"])
    names = hct.connection_parameters(layer)
    assert {name.partition(".")[0] for name in names} == {"connection", "additional_reads"}
    groups = {group["name"]: len(group["params"]) for group in hct.parameter_groups(layer)}
    assert groups == {"decay": 1, "no_decay": 1, "connection_projections": 2, "connections": 7}


@pytest.mark.parametrize("call", [hct.connection_parameters, hct.freeze_base, hct.parameter_groups])
def test_a_model_without_connections_is_refused(call):
    with pytest.raises(hct.NotConverted, match=r"GPT has no hyper-connections: convert it first"):
        call(GPT(depth=1))


def test_groups_of_frozen_connections_warn():
    hc = converted()
    for parameter in hct.connection_parameters(hc).values():
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match=r'all connections of GPT are frozen.*modules_to_save=\["hyper_connections"\]'):
        assert [group["name"] for group in hct.parameter_groups(hc)] == ["decay", "no_decay"]


def tensors(module):
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]) and value.dtype == expected[name].dtype, name


def added(kind):
    if kind == "readout":
        return LearnedReadout(4, 8)
    return StreamEmbedding(4, 8) if kind == "embedding" else hct.CONNECTIONS[kind](4, dim=8, index=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "readout", "embedding"])
def test_every_connection_gives_its_start_again(kind, dtype):
    with MadeIn(dtype):
        made = added(kind).to(dtype)
    start = copy.deepcopy(tensors(made))
    with torch.no_grad():
        for tensor in tensors(made).values():
            tensor.fill_(7.0)
    made.reset_parameters()
    same(tensors(made), start)
    made.to("meta").to_empty(device="cpu")
    made.reset_parameters()
    same(tensors(made), start)


@pytest.mark.parametrize("scope", SCOPES)
def test_connections_of_a_model_made_on_meta_get_their_start(scope):
    torch.manual_seed(0)
    model, image = ViT(depth=2), torch.randn(2, 1, 8, 8)
    options = {"scope": scope, "connection": "mhc-lite", "readout": "learned"}
    expected = hct.convert(model, (image,), **options)
    with torch.device("meta"):
        meta = ViT(depth=2)
    hc = hct.convert(meta, (image.to("meta"),), **options)
    assert all(p.is_meta for p in hc.parameters())
    hc.to_empty(device="cpu")
    for module in hc.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    hc.load_state_dict(model.state_dict(), strict=False)
    same(tensors(hc), tensors(expected))
    assert torch.equal(hc(image), expected(image))


class Drawn(hct.StaticConnection):
    """A connection of one's own, with a module and settings, which says nothing of its start."""

    def __init__(self, num_streams, *, size=3, **settings):
        super().__init__(num_streams, **settings)
        self.extra = nn.Parameter(torch.full((size,), 2.0))


def test_connections_of_ones_own_are_reset_with_their_settings():
    hc = converted(connection=functools.partial(Drawn, size=5))
    made = hc.get_submodule("transformer.h.1.hyper_connections.mlp")
    with torch.no_grad():
        made.extra.zero_(), made.h_pre.zero_()
    made.reset_parameters()
    assert made.extra.tolist() == [2.0] * 5 and made.h_pre.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_a_copy_and_a_pickle_know_their_start(tmp_path):
    made = hct.MHCConnection(4, dim=8, index=2)
    torch.save(made, tmp_path / "connection.pt")
    for other in (copy.deepcopy(made), torch.load(tmp_path / "connection.pt", weights_only=False)):
        with torch.no_grad():
            other.bias_pre.zero_()
        other.reset_parameters()
        same(other.state_dict(), made.state_dict())
