"""Look at models, and at what converting them gives and costs.

SPEC is torchvision:NAME, timm:NAME, hf:TYPE (a small model of a type of transformers, or hf:./config.json),
package.module:NAME or ./file.py:NAME (a model, a class, or a function that returns a model, or a model and inputs).

    hc-transform list
    hc-transform show timm:vit_tiny_patch16_224
    hc-transform show timm:vit_tiny_patch16_224 --graph
    hc-transform show hf:llama --diff --block model.layers.0
    hc-transform show ./net.py:Net --input 2x3x32x32 --draw net.svg
    hc-transform report hf:gpt2 --html gpt2.html
    hc-transform bench timm:deit_small_patch16_224 --connection static --dtype bf16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

# As in options.py, request.py and connections/base.py, which take seconds to import.
READOUTS = ("mean", "sum", "learned")
SHORTCUTS = ("break", "carry")
NESTED = ("largest", "all")
SCOPES = ("graph", "blocks", "auto")
INITS = ("paper", "mirrored")
BANDWIDTH = 3.35  # TB/s, of an H100

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print a mistake and where to read more, and exit."""
        self.exit(USAGE, f"{self.prog}: error: {message} (--help tells more)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a failure, 2 for a mistake in what was asked for.

    Either is printed as one line; ``--debug`` raises it.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as exit:
        return int(exit.code or 0)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads it has read enough
        sys.stderr.close()
        return 0
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        if options.debug:
            raise
        usage = type(error).__name__ in ("UsageError", "PatternError")
        name = "error" if type(error).__name__ == "UsageError" else type(error).__name__
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE if usage else FAILURE


def _run(options: argparse.Namespace) -> int:
    """Run a subcommand. What takes long to import is imported here, so that --help does not."""
    from .showing import commands

    run = {"show": commands.show_command, "list": commands.list_command, "bench": commands.bench_command}
    status: int = run[options.run](options)
    return status


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"hc_transform {version('hc_transform')}, torch {version('torch')}"
    except PackageNotFoundError:
        return "hc_transform, not installed"


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="hc-transform", description=__doc__, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    command = commands.add_parser("show", help="convert a model, verify it and print what was done")
    _add_conversion(command)
    _add_printouts(command)
    command.set_defaults(run="show", verbose=False)
    command = commands.add_parser("report", help="the same, with --html as a page")
    _add_conversion(command)
    _add_printouts(command)
    command.set_defaults(run="show")
    command = commands.add_parser("list", help="list the connections, one line each")
    command.add_argument("--debug", action="store_true", help="raise errors")
    command.set_defaults(run="list")
    command = commands.add_parser("bench", help="time a model and its conversion side by side")
    _add_conversion(command)
    _add_measurement(command)
    command.set_defaults(run="bench")
    return parser


def _add_printouts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plan", action="store_true", help="only say what would be converted")
    command.add_argument("--verbose", action="store_true", help="the report with a line for every add")
    command.add_argument("--graph", action="store_true", help="print the rewritten graph (of scope graph)")
    command.add_argument("--diff", action="store_true", help="print a block before and after, side by side")
    command.add_argument("--block", metavar="PATH", help="the module that is printed, blocks.0")
    command.add_argument("--code", action="store_true", help="print the rewritten graph as Python code")
    command.add_argument("--draw", metavar="FILE", help="draw the trunks into an .svg or .png")
    command.add_argument("--html", metavar="FILE", help="write all of it as one page")


def _add_measurement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mode", choices=("train", "infer"), default="train")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    command.add_argument("--device", help="where to run (default: CUDA where there is one, else the CPU)")
    command.add_argument("--repeats", type=int, default=10, metavar="R", help="timed repetitions (default 10)")
    command.add_argument("--no-compile", dest="compile", action="store_false", help="eager mode alone")
    command.add_argument("--regions", action="store_true", help="compile the converted model in regions")
    command.add_argument("--no-count", dest="count", action="store_false", help="leave out kernels and bytes of a GPU")
    command.add_argument(
        "--bandwidth", type=float, default=BANDWIDTH, metavar="TB/S", help="of the GPU that is estimated"
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("spec", metavar="SPEC", help="the model; see hc-transform --help")
    command.add_argument("--streams", type=int, metavar="N", help="number of streams (default 4, or 1 for frac)")
    command.add_argument("--fractions", type=int, metavar="M", help="fractions of each stream, for frac (default 4)")
    command.add_argument("--connection", default="dynamic", metavar="NAME", help="see hc-transform list")
    command.add_argument("--readout", choices=READOUTS, default="mean")
    command.add_argument("--init", choices=INITS, default="paper")
    command.add_argument("--shortcuts", choices=SHORTCUTS, default="break")
    command.add_argument("--nested", choices=NESTED, default="largest")
    command.add_argument("--recompute", action="store_true", help="recompute reads and writes in the backward pass")
    command.add_argument("--scope", choices=SCOPES, default="auto")
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="an example input, 1x3x224x224, ids:2x16 (tokens) or name=bool:2x16; several are given one by one",
    )
    command.add_argument("--debug", action="store_true", help="raise errors")


if __name__ == "__main__":
    sys.exit(main())
