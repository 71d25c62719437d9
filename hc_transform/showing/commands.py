"""What the subcommands of the command line do. Each takes the parsed options, prints, and returns the exit status."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..connections import CONNECTIONS
from ..convert import convert, plan
from ..errors import UnsupportedModel
from ..measuring.bench import bench, table
from ..models.copies import clone_structure
from ..text import terminal_width
from .code import fitted
from .difference import diff
from .drawing import FORMATS, draw
from .page import page
from .printout import show
from .specs import Example, UsageError, model_and_inputs, near
from .steps import steps_of
from .within import below

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def show_command(options: argparse.Namespace) -> int:
    """Convert and verify a model, and print what was asked for: the report, the graph, a block before and after."""
    _check_connection(options)
    if options.draw is not None and Path(options.draw).suffix.lower() not in FORMATS:
        raise UsageError(f"--draw writes {' or '.join(FORMATS)}, got {options.draw!r}")
    model, (args, kwargs) = model_and_inputs(options.spec, options.input)
    model.eval()
    chosen = _conversion(options)
    if options.plan:
        print(plan(model, args, kwargs, **chosen).report.text(verbose=options.verbose))
        return 0
    if (options.graph or options.code) and options.scope == "auto":
        chosen["scope"] = "graph"
    hc = convert(clone_structure(model), args, kwargs, **chosen)
    print("\n\n".join(_printouts(model, hc, options)))
    return 0


def _printouts(model: nn.Module, hc: Any, options: argparse.Namespace) -> list[str]:
    """Return what is to be printed: the report where nothing else is asked for; write the files."""
    parts: list[str] = []
    if options.block is not None:
        try:
            below(steps_of(hc), options.block)
        except UnsupportedModel as error:
            raise UsageError(f"--block: {error}") from error
    if options.graph or options.block is not None and not options.diff:
        parts.append(show(hc, options.block))
    if options.diff:
        parts.append(diff(model, hc, _first_block(hc) if options.block is None else options.block))
    if options.code:
        parts.append(hc.print_readable(print_output=False))
    if options.verbose or not parts:
        parts.insert(0, hc.hc_report.text(verbose=options.verbose))
    if options.draw is not None:
        parts.append(f"Drawn into {draw(hc, options.draw)}.")
    if options.html is not None:
        Path(options.html).write_text(page(model, hc))
        parts.append(f"Written to {options.html}.")
    return parts


def list_command(options: argparse.Namespace) -> int:
    """Print the connections, one line each."""
    width = max(map(len, CONNECTIONS)) + 2
    for name, made in CONNECTIONS.items():
        said = (made.__doc__ or "").splitlines()[0]
        print(fitted(f"{name:<{width}}{said}", terminal_width()))
    return 0


def bench_command(options: argparse.Namespace) -> int:
    """Measure a model before and after conversion, and print the table."""
    _check_connection(options)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, (args, kwargs) = model_and_inputs(options.spec, options.input)
    dtype = DTYPES[options.dtype]
    model = model.to(device, dtype)
    inputs = tuple(_moved(x, device, dtype) for x in (*args, *kwargs.values()))
    model.train(options.mode == "train")
    hc = convert(model, inputs, verify=False, **_conversion(options))
    name = f"{options.connection}, n = {hc.hc_report.converted[0].streams}"
    figures = bench(
        {"plain": model, name: hc},
        inputs,
        mode=options.mode,
        repeats=options.repeats,
        compiled=options.compile,
        count=options.count,
        regions=options.regions,
    )
    if options.json:
        print(json.dumps({name: f.to_dict() for name, f in figures.items()}, indent=1))
        return 0
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.spec}, {options.mode}, {options.dtype}, {where}, torch {torch.__version__}\n")
    print(table(figures, options.bandwidth * 1e12))
    return 0


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _check_connection(options: argparse.Namespace) -> None:
    if options.connection not in CONNECTIONS:
        known = near(options.connection, CONNECTIONS) or f"; there are {', '.join(CONNECTIONS)}"
        raise UsageError(f"no connection is called {options.connection!r}{known}")


def _conversion(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of convert that the command line gives."""
    names = ("connection", "init", "readout", "shortcuts", "recompute", "scope", "nested")
    return {
        "num_streams": options.streams,
        "num_fractions": options.fractions,
        **{name: getattr(options, name) for name in names},
    }


def _first_block(hc: Any) -> str:
    """Return the module of the first residual, the one to look at where none is named."""
    module: str = hc.hc_report.converted[0].module
    return module


__all__ = ["Example", "bench_command", "list_command", "show_command"]
