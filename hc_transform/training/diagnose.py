"""Look into a converted model while it runs on a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..connections import Connection
from ..errors import HCTransformError, NotConverted
from ..sites import Site, sites_of, unwrapped
from .diagnosis import Diagnosis, SiteDiagnosis, TrunkDiagnosis
from .site_statistics import gain, matrices_of, mixing_share, read_entropy, stream_statistics, sum_error

Loss = Callable[[Any], Tensor]


def diagnose(model: nn.Module, *batch: Any, loss: Loss | None = None, ablate: bool = False, **named: Any) -> Diagnosis:
    """Return what the connections of a converted model do on a batch.

    One forward pass in eval mode, without gradients, in eager code (compiled models too), which leaves modes, gradients
    and random generators as they were. The streams are those that each residual is given.

    Args:
        model: a converted model in either scope, or a wrapper of one.
        batch, named: the arguments of the model.
        loss: a function from the model's output to the loss; by default ``output.loss``, an output that is one number,
            or the one number in a tuple.
        ablate: also give the change of the loss when each connection by itself is set to its start; one more forward
            pass for each.

    Raises:
        NotConverted: the model has no converted residuals.
        HCTransformError: ``ablate`` is asked for and there is no loss.

    >>> import torch, hc_transform as hct
    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> x = torch.randn(2, 5, 8)
    >>> found = hct.diagnose(hct.convert(block, args=(x,)), x)
    >>> [(site.name, site.mixing_share, round(site.cosine, 5)) for site in found.sites]
    [('self_attn', 0.0, 1.0), ('linear1', 0.0, 1.0)]
    >>> found.trunks[0].gain_forward
    1.0
    """
    model = unwrapped(model)
    sites = sites_of(model)
    if not sites:
        raise NotConverted(f"no residual of {type(model).__name__} was converted, so there is nothing to look into")
    with _undisturbed(model):
        recorder = _Recorder(sites)
        with recorder.attached():
            output = model(*batch, **named)
        value = _loss_of(output, loss)
        if ablate and value is None:
            raise HCTransformError(
                "ablate=True needs a loss, and the output holds none: give targets, as labels=ids, or a function of "
                "the output with loss="
            )
        ablations: dict[int, float] = {}
        if ablate:
            for connection in {id(site.connection): site.connection for site in sites}.values():
                with _at_start(connection):
                    ablations[id(connection)] = _number(_loss_of(model(*batch, **named), loss)) - _number(value)
    return recorder.diagnosis(None if value is None else _number(value), ablations)


class _Recorder:
    """Take down what connections make, as they are called."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites: dict[int, list[Site]] = {}
        for site in sites:
            self.sites.setdefault(id(site.connection), []).append(site)
        self.order = sites
        self.calls: dict[int, int] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.composites: dict[int, Tensor] = {}
        self.by_means: set[int] = set()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        connections = {id(site.connection): site.connection for site in self.order}.values()
        handles = [connection.register_forward_hook(self._called) for connection in connections]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, connection: nn.Module, args: Any, coefficients: Any) -> None:
        call = self.calls[id(connection)] = self.calls.get(id(connection), -1) + 1
        own = self.sites[id(connection)]
        if call >= len(own):
            return  # a call more than in the example
        site, streams = own[call], args[0]
        pre, post, res = matrices_of(coefficients)
        lie = stream_statistics(streams)
        product = self._compose(site.record.trunk or 0, res)
        self.found[site.name] = {
            **_moments("h_pre", pre),
            **_moments("h_post", post),
            **_moments("h_res", res),
            "read_entropy": read_entropy(pre),
            "mixing_share": mixing_share(res),
            "row_error": sum_error(res, -1),
            "column_error": sum_error(res, -2),
            "spread": lie.spread,
            "cosine": lie.cosine,
            "directions": lie.directions,
            "effective_streams": lie.effective,
            "similarity": lie.similarity,
            "gain_forward": gain(product, -1),
            "gain_backward": gain(product, -2),
        }

    def _compose(self, trunk: int, res: Tensor) -> Tensor:
        """Return h_res times the product of its trunk so far, for each token where the sites see the same ones."""
        before = self.composites.get(trunk)
        if before is not None:
            if 1 < len(before) != len(res) > 1:
                self.by_means.add(trunk)
                before, res = before.mean(0, keepdim=True), res.mean(0, keepdim=True)
            res = res @ before.to(res.device)
        self.composites[trunk] = res
        return res

    def diagnosis(self, loss: float | None, ablations: dict[int, float]) -> Diagnosis:
        sites = tuple(
            SiteDiagnosis(
                name=site.name,
                trunk=site.record.trunk or 0,
                gradient=_gradient(site.connection),
                ablation=ablations.get(id(site.connection)),
                **self.found[site.name],
            )
            for site in self.order
            if site.name in self.found
        )
        trunks = tuple(
            TrunkDiagnosis(
                index,
                sum(site.trunk == index for site in sites),
                gain(composite, -1),
                gain(composite, -2),
                index in self.by_means,
            )
            for index, composite in self.composites.items()
        )
        return Diagnosis(sites, trunks, loss, tuple(s.name for s in self.order if s.name not in self.found))


def _moments(name: str, weights: Tensor) -> dict[str, Tensor]:
    return {name: weights.mean(0).cpu(), f"{name}_spread": weights.std(0, correction=0).cpu()}


def _gradient(connection: Connection) -> float | None:
    gradients = [p.grad for p in connection.parameters() if p.grad is not None]
    return _number(torch.stack([_whole(g).float().norm() for g in gradients]).norm()) if gradients else None


def _loss_of(output: Any, loss: Loss | None) -> Tensor | None:
    if loss is not None:
        return loss(output)
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own.mean()
    parts = output if isinstance(output, (tuple, list)) else (output,)
    numbers = [part for part in parts if isinstance(part, Tensor) and part.numel() == 1 and part.is_floating_point()]
    return numbers[0] if len(numbers) == 1 else None


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _number(value: Any) -> float:
    return float(_whole(value))


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and eager code without gradients; leave modes and random generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _at_start(connection: Connection) -> Iterator[None]:
    """Have a connection at its start."""
    held = [(parameter, parameter.detach().clone()) for parameter in connection.parameters()]
    connection.reset_parameters()
    try:
        yield
    finally:
        for parameter, value in held:
            parameter.copy_(value)
