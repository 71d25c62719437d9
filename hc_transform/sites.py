"""Where the connections of a converted model are, in either scope and under any wrapper."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .connections import Connection
from .errors import NotConverted
from .residuals.keys import keys_of, relative
from .residuals.records import Record
from .residuals.report import Report
from .running.block_runner import RUNNER, BlockRunner
from .running.graph_model import HyperConnectedModule


@dataclass(frozen=True)
class Site:
    """One residual of a converted model.

    Attributes:
        record: of the report: its name, its trunk, the line of its add.
        path: of its connection, below the model that was asked about.
        connection: that runs; several residuals may share it.
        call: which of the calls of the connection is this residual's, from 0.
    """

    record: Record
    path: str
    connection: Connection
    call: int = 0

    @property
    def name(self) -> str:
        """The residual's name."""
        return self.record.name


def converted_models(model: nn.Module) -> dict[str, nn.Module]:
    """Return the converted models in ``model`` by path, which is one in most cases.

    Raises:
        NotConverted: there is none.
    """
    roots = {path: module for path, module in model.named_modules() if "hc_report" in module.__dict__}
    if not roots:
        raise NotConverted(
            f"{type(model).__name__} holds no converted model: give what hct.convert returned, or a wrapper of it"
        )
    return roots


def report_in(model: nn.Module) -> Report:
    """Return the report of a converted model."""
    return model.__dict__["hc_report"]


def sites_of(model: nn.Module) -> list[Site]:
    """Return the sites of the converted models in ``model``, in order of execution.

    Raises:
        NotConverted: there are none.
    """
    sites: list[Site] = []
    for root, module in converted_models(model).items():
        paths = dict(_paths(module))
        seen: dict[int, int] = {}
        for record in report_in(module).converted:
            if record.name not in paths:  # its module was replaced
                continue
            connection: Any = operator.attrgetter(paths[record.name])(module)  # through a wrapper's, PEFT's, too
            call = seen[id(connection)] = seen.get(id(connection), -1) + 1
            sites.append(Site(record, _joined(root, paths[record.name]), connection, call))
    return sites


def _paths(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of each residual with the path of its connection."""
    if isinstance(model, HyperConnectedModule):
        yield from model.keys_by_name.items()
        return
    if isinstance(model, fx.GraphModule):  # of an exported program
        yield from keys_of((r.name, r.module) for r in report_in(model).converted).items()
        return
    for path, block in model.named_modules():
        runner: BlockRunner | None = block.__dict__.get(RUNNER)
        if runner is None:
            continue
        plan = runner.plan
        for call in plan.calls:
            own = plan.calls[0] if plan.shared else call
            for name, keyed in zip(call.residuals, own.residuals, strict=False):
                yield name, _joined(path, plan.keys[relative(keyed, plan.path)])


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of ``torch.compile`` and DDP, which prefix the names of its parameters."""
    while True:
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))
