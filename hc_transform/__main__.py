"""The command line: ``python -m hc_transform show SPEC`` and ``python -m hc_transform bench SPEC``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .connections import CONNECTIONS
from .connections.base import INITS
from .convert import convert
from .errors import HCTransformError
from .measuring.cost import H100_BANDWIDTH
from .models.examples import example_inputs, random_input
from .options import READOUTS, SHORTCUTS
from .request import SCOPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 for an error that was printed."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except HCTransformError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def show(options: argparse.Namespace) -> int:
    """Convert and verify the model of ``options.spec``, and print the report."""
    model, example = _model_and_inputs(options)
    model.eval()
    hc = convert(model, example, **_conversion(options))
    print(hc.hc_report)
    if options.graph:
        print(f"\n{hc.graph}")
    if options.code:
        print(f"\n{hc.print_readable(print_output=False)}")
    return 0


def benchmark(options: argparse.Namespace) -> int:
    """Measure the model of ``options.spec`` before and after conversion, and print the table."""
    from .measuring.bench import bench, table

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, example = _model_and_inputs(options)
    dtype = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[options.dtype])
    model = model.to(device, dtype)
    inputs = tuple(_moved(x, device, dtype) for x in example)
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


def _model_and_inputs(options: argparse.Namespace) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the model that the command line names, and example inputs of the shape it gives or of the model's own."""
    torch.manual_seed(0)
    model, example = load(options.spec)
    if options.input is not None:
        return model, (random_input(options.input, model),)
    if example is not None:
        return model, example
    found = example_inputs(model)
    if found is None:
        raise SpecError(f"{options.spec} carries no example input; give its shape with --input 1x3x224x224")
    return model, tuple(found[1].values()) if found[1] else found[0]


def _conversion(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of convert that the command line gives."""
    return dict(
        num_streams=options.streams,
        num_fractions=options.fractions,
        connection=options.connection,
        init=options.init,
        readout=options.readout,
        shortcuts=options.shortcuts,
        recompute=options.recompute,
        scope=options.scope,
    )


class SpecError(Exception):
    """The model that the command line names could not be made."""


def load(spec: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """Return the model of ``torchvision:NAME``, ``timm:NAME`` or ``package.module:callable``, and example inputs.

    A callable returns a model, or a model and a tuple of inputs. Weights are random.
    """
    source, _, name = spec.partition(":")
    if not name:
        raise SpecError(f"SPEC is torchvision:NAME, timm:NAME or package.module:callable, got {spec!r}")
    try:
        if source == "torchvision":
            return _load_torchvision(name)
        if source == "timm":
            return importlib.import_module("timm").create_model(name, pretrained=False), None
        sys.path.insert(0, "")
        made = getattr(importlib.import_module(source), name)()
    except ImportError as error:
        raise SpecError(f"{spec}: {error}") from error
    except (AttributeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{spec}: {error}") from error
    return (made[0], tuple(made[1])) if isinstance(made, tuple) else (made, None)


def _load_torchvision(name: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    models = importlib.import_module("torchvision").models
    model = models.get_model(name, weights=None)
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    crop = getattr(transforms, "crop_size", None)
    if not crop:
        return model, None
    size = tuple(crop) if len(crop) > 1 else (crop[0], crop[0])
    return model, (random_input((2, 3, *size), model),)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is written 1x3x224x224, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hc_transform", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("show", help="convert a model, verify it and print what was done")
    _add_conversion(command)
    command.add_argument("--graph", action="store_true", help="print the rewritten graph")
    command.add_argument("--code", action="store_true", help="print the rewritten graph as Python code")
    command.set_defaults(run=show)
    command = commands.add_parser("bench", help="time a model and its conversion side by side")
    _add_conversion(command)
    command.add_argument("--mode", choices=("train", "infer"), default="train")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    command.add_argument("--device", help="where to run (default: CUDA where there is one, else the CPU)")
    command.add_argument("--repeats", type=int, default=10, metavar="R", help="timed repetitions (default 10)")
    command.add_argument("--no-compile", dest="compile", action="store_false", help="eager mode alone")
    command.add_argument("--regions", action="store_true", help="compile the converted model in regions")
    command.add_argument("--no-count", dest="count", action="store_false", help="leave out kernels and bytes of a GPU")
    command.add_argument(
        "--bandwidth", type=float, default=H100_BANDWIDTH / 1e12, metavar="TB/S", help="of the GPU that is estimated"
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    command.set_defaults(run=benchmark)
    return parser


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("spec", metavar="SPEC", help="torchvision:NAME, timm:NAME or package.module:callable")
    command.add_argument("--streams", type=int, metavar="N", help="number of streams (default 4, or 1 for frac)")
    command.add_argument("--fractions", type=int, metavar="M", help="fractions of each stream, for frac (default 4)")
    command.add_argument("--readout", choices=READOUTS, default="mean")
    command.add_argument("--connection", choices=tuple(CONNECTIONS), default="dynamic")
    command.add_argument("--init", choices=INITS, default="paper")
    command.add_argument("--shortcuts", choices=SHORTCUTS, default="break")
    command.add_argument("--recompute", action="store_true", help="recompute reads and writes in the backward pass")
    command.add_argument("--scope", choices=SCOPES, default="auto")
    command.add_argument("--input", type=_shape, metavar="SHAPE", help="shape of the example input, 1x3x224x224")


if __name__ == "__main__":
    sys.exit(main())
