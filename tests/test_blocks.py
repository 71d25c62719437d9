"""scope="blocks": the model stays itself, blocks run graphs, streams travel between them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from checks import error, weighted
from torch import nn
from torch.utils.checkpoint import checkpoint

import hc_transform as hct
from hc_transform.capture.tape import record
from hc_transform.residuals.placement import find_holders, plan_blocks
from hc_transform.streams.trunk_value import TrunkValue, read_out

N = 3


class Block(nn.Module):
    """Two residuals, with a flag and a mask that are only passed on to the first branch."""

    def __init__(self, dim=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Masked(dim), nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(0.2))

    def forward(self, x, mask=None, scale=1.0, return_weights=False):
        a, weights = self.attention(self.norm1(x), mask=mask, scale=scale)
        x = x + a
        x = x + self.mlp(self.norm2(x))
        return (x, weights) if return_weights else x


class Masked(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, mask=None, scale=1.0):
        weights = self.linear(x) * scale
        return (weights if mask is None else weights * mask), weights


class Stack(nn.Module):
    """Its forward decides on values, so that there is no graph of it."""

    def __init__(self, blocks, head=True):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 5) if head else nn.Identity()

    def forward(self, x, mask=None, hidden=False):
        x = self.embed(x)
        kept = []
        for block in self.blocks:
            x = block(x, mask=mask)
            kept.append(x)
        y = self.head(x)
        return {"y": y, "hidden": tuple(kept)} if hidden else y


def stack(depth=3):
    torch.manual_seed(0)
    return Stack([Block() for _ in range(depth)]).eval()


def x(batch=2, length=4):
    return torch.randn(batch, length, 8)


def converted(model, *args, **options):
    options = {"num_streams": N, "scope": "blocks", **options}
    return hct.convert(model, args or (x(),), **options)


def apart(hc):
    """Move all coefficients off their start, so that the streams differ."""
    with torch.no_grad():
        for name, parameter in hc.named_parameters():
            if "hyper_connections" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return hc


@pytest.mark.parametrize("connection", ["static", "dynamic", "mhc", "frac"])
def test_the_model_stays_itself_and_computes_the_same(connection):
    model = stack()
    hc = converted(model, connection=connection, num_streams=1 if connection == "frac" else N)
    assert type(hc) is Stack and isinstance(hc.blocks[0], Block) and type(hc.blocks[0]).__name__ == "Block"
    assert type(model.blocks[0]) is Block, "the given model is not changed"
    assert [r.name for r in hc.hc_report.converted][:3] == ["blocks.0.attention", "blocks.0.mlp", "blocks.1.attention"]
    assert {r.trunk for r in hc.hc_report.converted} == {0}
    assert set(model.state_dict()) < set(hc.state_dict())
    keys = hc.load_state_dict(model.state_dict(), strict=False)
    assert not keys.unexpected_keys and all("hyper_connections." in key for key in keys.missing_keys)
    with torch.no_grad():
        for inputs in (x(), x(3, 6)):
            assert error(hc(inputs), model(inputs)) <= 1e-5


def test_gradients_and_dropout_are_as_before():
    model = stack()
    hc = converted(model)
    model.train(), hc.train()
    inputs = x()
    outputs = []
    for module in (model, hc):
        module.zero_grad()
        torch.manual_seed(1)
        outputs.append(module(inputs))
        weighted(outputs[-1]).backward()
        if module is model:
            theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert error(outputs[1], outputs[0]) <= 1e-6
    ours = {n: p.grad for n, p in hc.named_parameters()}
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp_min(1e-3), name
    assert all(g is not None for n, g in ours.items()), [n for n, g in ours.items() if g is None]


def by_hand(hc, inputs, moved=None):
    """The stack with its streams in a list, from the formulas: X' = h_res X + h_post f(h_pre X).

    ``moved`` adds a number to every stream before the block of that index.
    """
    value = hc.embed(inputs)
    streams = [value] * N
    for index, block in enumerate(hc.blocks):
        streams = [s + (moved or {}).get(index - 1, 0) for s in streams]
        for key, branch in (
            ("attention", lambda v, block=block: block.attention(block.norm1(v))[0]),
            ("mlp", lambda v, block=block: block.mlp(block.norm2(v))),
        ):
            c = block.hyper_connections[key]
            y = branch(sum(c.h_pre[i] * streams[i] for i in range(N)))
            streams = [sum(c.h_res[i, j] * streams[j] for j in range(N)) + c.h_post[i] * y for i in range(N)]
    return hc.head(sum(streams) / N)


def test_separated_streams_travel_through_the_python_between_blocks():
    hc = apart(converted(stack(), connection="static"))
    inputs = x()
    with torch.no_grad():
        assert error(hc(inputs), by_hand(hc, inputs)) <= 1e-5


def test_graph_and_blocks_compute_the_same_with_separated_streams():
    model = stack()
    blocks = apart(converted(model, connection="static"))
    graph = hct.convert(model, (x(),), num_streams=N, connection="static", scope="graph")
    graph.load_state_dict(blocks.state_dict())
    with torch.no_grad():
        inputs = x()
        assert error(blocks(inputs), graph(inputs)) <= 1e-6


def test_hidden_states_are_ordinary_tensors():
    model = stack()
    hc = converted(model)
    inputs = x()
    with torch.no_grad():
        ours, theirs = hc(inputs, hidden=True), model(inputs, hidden=True)
    assert all(type(t) is torch.Tensor for t in ours["hidden"])
    assert error(ours, theirs) <= 1e-5


def test_hooks_see_readouts_and_what_they_change_moves_the_streams():
    model = stack()
    hc = apart(converted(model, connection="static"))
    inputs, seen = x(), []
    with torch.no_grad():
        handle = hc.blocks[1].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        plain = hc(inputs)
        handle.remove()
        hidden = hc(inputs, hidden=True)["hidden"]
        assert type(seen[0][0]) is torch.Tensor and type(seen[0][1]) is torch.Tensor
        assert torch.equal(seen[0][0], hidden[0]) and torch.equal(seen[0][1], hidden[1])
        with hc.blocks[1].register_forward_hook(lambda module, args, output: output + 0.5):
            steered = hc(inputs)
        moved = by_hand(hc, inputs, moved={1: 0.5})
        assert error(steered, moved) <= 1e-5
        with hc.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.0,)):
            assert error(hc(inputs), plain) <= 1e-5


def test_hooks_from_before_the_conversion_stay():
    model, seen = stack(), []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    hc = converted(model)
    seen.clear()
    hc(x())
    assert len(seen) == 1 and type(seen[0]) is torch.Tensor


def test_a_backward_hook_on_a_block_is_refused_with_the_reason():
    hc = converted(stack())
    with pytest.raises(hct.UnsupportedModel, match="gradients of n streams"):
        hc.blocks[0].register_full_backward_hook(lambda *a: None)
    hc.blocks[2].register_full_backward_hook(lambda *a: None)  # it hands no streams on


def test_compiled_code_takes_inputs_that_are_only_passed_on():
    model = stack()
    hc = converted(model)
    mask, inputs = torch.rand(2, 4, 8), x()
    compiled = torch.compile(hc, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert error(compiled(inputs, mask), model(inputs, mask)) <= 1e-5, "converted without a mask"
        assert error(hc(inputs, mask), model(inputs, mask)) <= 1e-5
    with pytest.raises(Exception, match="call the model once in eager mode"):
        torch.compile(hc.blocks[0], backend="eager", fullgraph=True)(inputs, return_weights=True)
    torch._dynamo.reset()


def test_inputs_that_decide_are_traced_again_with_the_same_connections():
    model = stack()
    hc = apart(converted(model))
    block, plain = hc.blocks[2], model.blocks[2]
    before = set(dict(block.named_parameters()))
    assert len(hct.block_graphs(hc)["blocks.2"]) == 1
    given = torch.randn(2, 4, 8)
    with torch.no_grad():
        tensor, both = block(given), block(given, return_weights=True)
    assert torch.equal(tensor, both[0]) and set(dict(block.named_parameters())) == before
    assert type(plain) is Block and len(hct.block_graphs(hc)["blocks.2"]) == 2


class Changing(Stack):
    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if i == 1:
                x = torch.tanh(x + self.position(x))
            x = block(x)
        return x

    def position(self, x):
        return torch.arange(x.shape[1], dtype=x.dtype)[:, None]


def test_a_trunk_is_cut_where_the_code_between_blocks_changes_it():
    model = Changing([Block() for _ in range(3)]).eval()
    hc = converted(model)
    assert [r.trunk for r in hc.hc_report.converted] == [0, 0, 1, 1, 1, 1]
    assert "changes the value between blocks" in str(hc.hc_report) and "test_blocks.py" in str(hc.hc_report)
    inputs = x()
    with torch.no_grad():
        assert error(hc(inputs), model(inputs)) <= 1e-5


class Looping(nn.Module):
    def __init__(self, times=3):
        super().__init__()
        self.block, self.times = Block(), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return x


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_a_block_called_several_times(share):
    model = Looping().eval()
    hc = converted(model, share_calls=share)
    assert len(hc.hc_report.converted) == 6
    assert ("shared by all" if share else "one set of connections for each") in str(hc.hc_report)
    assert len(hc.block.hyper_connections) == (2 if share else 6)
    apart(hc)
    weighted(hc(x())).backward()
    assert all(p.grad is not None for p in hc.parameters())


def test_a_block_called_once_more_than_in_the_example(caplog):
    hc = converted(Looping().eval())
    hc.times = 4
    inputs = x()
    with torch.no_grad():  # the fourth call is given the readout and begins anew
        assert error(hc(inputs), read_out(Looping.forward(hc, inputs))) == 0
    assert "called again with what the last of its 3 calls gave" in caplog.text


class Skipping(Stack):
    """Leaves out layers at random while training."""

    left_out = ()

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if i not in self.left_out:
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("left_out", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_layers_may_be_left_out(left_out):
    model = Skipping([Block() for _ in range(3)]).eval()
    hc = converted(model)
    model.left_out = hc.left_out = left_out
    inputs = x()
    with torch.no_grad():
        assert error(hc(inputs), model(inputs)) <= 1e-5


class Checkpointing(Stack):
    reentrant = False

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def test_checkpoints_around_blocks():
    model = Checkpointing([Block() for _ in range(3)]).eval()
    hc = apart(converted(model))
    plain = copy.deepcopy(hc)
    plain.forward = lambda x: Skipping.forward(plain, x)
    plain.left_out = ()
    inputs = x()
    for module in (hc, plain):
        weighted(module(inputs)).backward()
    for (name, a), b in zip(hc.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name
    hc.train()
    hc.reentrant = True
    with pytest.raises(hct.UnsupportedModel, match="use_reentrant=False"):
        hc(inputs.requires_grad_())


def test_copies_and_pickles():
    hc = apart(converted(stack()))
    inputs = x()
    twin = copy.deepcopy(hc)
    buffer = io.BytesIO()
    torch.save(hc, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for other in (twin, loaded, pickle.loads(pickle.dumps(hc))):
            assert torch.equal(other(inputs), hc(inputs))
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in hc.parameters()}
    twin.blocks[0].hyper_connections["mlp"].h_pre.data += 1
    with torch.no_grad():
        assert not torch.equal(twin(inputs), hc(inputs))


def test_in_place_changes_the_given_model():
    model, inputs = stack(), x()
    with torch.no_grad():
        before = model(inputs)
        assert converted(model, inplace=True) is model
        assert error(model(inputs), before) <= 1e-5
    assert "hyper_connections" in dict(model.blocks[0].named_children()) and model.hc_report.converted
    with pytest.raises(ValueError, match="scope='blocks'"):
        hct.convert(stack(), (x(),), scope="graph", inplace=True)


class Deciding(Stack):
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) if self.count(x) else x

    def count(self, x):
        import collections

        return collections.Counter(x.flatten().tolist()).most_common(1)[0][1] > 0


def test_auto_takes_blocks_where_the_model_is_no_one_graph():
    model = Deciding([Block() for _ in range(2)]).eval()
    with pytest.raises(hct.HCTransformError):
        hct.convert(model, (x(),), scope="graph")
    hc = hct.convert(model, (x(),))
    assert type(hc) is Deciding and len(hc.hc_report.converted) == 4
    assert "Scope blocks, because" in str(hc.hc_report)
    assert isinstance(hct.convert(stack(), (x(),)), hct.HyperConnectedModule)


def test_a_block_that_cannot_be_traced_stays_as_it_is():
    class Odd(Block):
        def forward(self, x, mask=None):
            if x.sum().item() > 1e9:
                return x
            with torch.autocast("cpu", enabled=False):
                return x + self.mlp(x)

    model = Stack([Block(), Odd(), Block()]).eval()
    hc = converted(model)
    assert [r.name for r in hc.hc_report.converted] == [
        "blocks.0.attention", "blocks.0.mlp", "blocks.2.attention", "blocks.2.mlp",
    ]  # fmt: skip
    (left,) = [r for r in hc.hc_report.skipped if r.name.startswith("blocks.1")]
    assert "stayed whole" in left.reason
    with torch.no_grad():
        inputs = x()
        assert error(hc(inputs), model(inputs)) <= 1e-5


def test_blocks_need_example_inputs():
    with pytest.raises(hct.TraceError, match="example inputs"):
        hct.convert(stack(), scope="blocks")


def test_models_with_hyper_connections_are_refused():
    class ToyHyperConnection(nn.Linear):
        pass

    model = nn.Sequential(Block(), ToyHyperConnection(8, 8))
    with pytest.raises(hct.UnsupportedModel, match="hyper-connections already"):
        hct.convert(model, (x(),))


@pytest.mark.parametrize(
    "option", [{"stream_embedding": True}, {"stream_dropout": 0.5}, {"readout": "learned"}], ids=str
)
def test_ends_of_trunks(option):
    model = stack()
    hc = converted(model, **option)
    inputs = x()
    with torch.no_grad():
        assert error(hc(inputs), model(inputs)) <= 1e-5
    weighted(hc.train()(inputs)).backward()
    assert all(p.grad is not None for p in hc.parameters())


def test_residuals_can_be_chosen():
    hc = converted(stack(), exclude=["blocks.1.*"])
    assert [r.name.split(".")[1] for r in hc.hc_report.converted] == ["0", "0", "2", "2"]
    plan = hct.plan(stack(), (x(),), scope="blocks", include=["*mlp"])
    assert [r.name for r in plan.residuals] == [f"blocks.{i}.mlp" for i in range(3)]


# -- the parts


def test_a_trunk_value_stands_for_its_readout():
    streams = tuple(torch.randn(2, 3) for _ in range(N))
    value, mean = TrunkValue(streams), sum(streams) / N
    for made, expected in (
        (value + 1, mean + 1),
        (1 - value, 1 - mean),
        (torch.cat([value, value]), torch.cat([mean, mean])),
        (nn.functional.layer_norm(value, (3,)), nn.functional.layer_norm(mean, (3,))),
        (value[:, 1:], mean[:, 1:]),
        (value.transpose(0, 1), mean.t()),
        (read_out({"a": [value]})["a"][0], mean),
    ):
        assert torch.allclose(made, expected)
    assert value.shape == (2, 3) and value.dtype == torch.float32 and value.dim() == 2 and len(value) == 2
    assert isinstance(value, torch.Tensor)
    leaves, spec = torch.utils._pytree.tree_flatten([value])
    again = torch.utils._pytree.tree_unflatten(leaves, spec)[0]
    assert len(leaves) == N and again.step == value.step
    assert torch.equal(value.to(torch.float64).streams[1], streams[1].double())


def test_a_tape_repeats_the_run():
    model = stack()
    inputs = x()
    tape = record(model, (inputs,), {})
    interpreter = torch.fx.Interpreter(tape.graph_module)
    with torch.no_grad():
        assert torch.equal(interpreter.run(*tape.inputs)[0], model(inputs))
    assert not tape.reads_values
    assert record(Deciding([Block()]).eval(), (inputs,), {}).reads_values


def test_blocks_are_the_outermost_modules_that_hold_a_residual():
    model = stack()
    tape = record(model, (x(),), {})
    plan = hct.make_plan(tape.graph_module, hct.find_residuals(tape.graph_module), hct.Options(num_streams=N))
    planned = plan_blocks(plan, find_holders(plan.residuals, model, {})[0])
    assert [b.path for b in planned.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [sorted(c.leaves) for b in planned.blocks for c in b.calls] == [["mlp"], ["mlp"], []]
    assert [c.step for b in planned.blocks for c in b.calls] == [0, 1, 2]


class Attending(nn.Module):
    """Takes what it attends to as an argument of its own, as encoders with pooled queries do."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, query, key):
        return query + torch.tanh(self.query(query)) * self.key(key)


class AttendingStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attending() for _ in range(3))

    def forward(self, x, other=None):
        for block in self.blocks:
            x = block(x, x if other is None else other)
        return x


def test_a_value_given_twice_is_read_once():
    model = AttendingStack().eval()
    hc = converted(model, connection="static")  # verified with separated streams
    inputs = x()
    with torch.no_grad():
        assert error(hc(inputs, x()), hc(inputs)) > 1e-3
        assert error(hc(inputs), model(inputs)) <= 1e-5
    block = apart(hc).blocks[0]
    coefficients = next(iter(block.hyper_connections.values()))
    with torch.no_grad():
        out = read_out(block(inputs, inputs))
        read = coefficients.h_pre.sum() * inputs
        y = torch.tanh(block.query(read)) * block.key(read)
        expected = sum(coefficients.h_res[i].sum() * inputs + coefficients.h_post[i] * y for i in range(N)) / N
        assert error(out, expected) <= 1e-5


class Around(nn.Module):
    """One residual of its own around a stack that holds six."""

    def __init__(self, depth):
        super().__init__()
        self.position = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        x = x + self.position(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_stack_of_blocks_stays_in_parts():
    hc = converted(Around(3).eval())
    assert [b for b, m in hc.named_modules() if "_hc_runner" in m.__dict__] == [f"blocks.{i}" for i in range(3)]
    (left,) = [r for r in hc.hc_report.skipped if "around a stack" in r.reason]
    assert left.location.rsplit("/", 1)[-1].startswith("test_blocks.py")
    single = converted(Around(1).eval())
    assert len(single.hc_report.converted) == 3 and "_hc_runner" in single.__dict__, "no stack: the root is the block"
