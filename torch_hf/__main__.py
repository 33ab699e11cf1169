"""``python -m torch_hf``: look at a closure before the first step, draw a run after the last."""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

from torch import nn

from torch_hf import __version__
from torch_hf.diagnostics.diagnose import Diagnosis, diagnose
from torch_hf.plotting.draw import plot_training
from torch_hf.tracking import read_csv

#: Exit codes: all is well; a step would fail; the command could not be carried out.
OK, NO, USAGE = 0, 1, 2

CONTRACT = """\
FACTORY is a function without arguments. It returns one of

  (model, inputs, ...)   a torch.nn.Module and what it is called with
  (closure, params)      a training closure, as optimizer.step takes it, and the
                         parameters that it trains (a list, or the module)

For instance, in train.py:

  def probe():
      model = make_model()
      inputs, targets = next(iter(make_loader()))
      return lambda: criterion(model(inputs), targets), model.parameters()

  python -m torch_hf diagnose train:probe
"""
EXIT_CODES = "exit codes: 0 a step would go well, 1 it would fail, 2 the command is at fault"


class Usage(Exception):
    """The command cannot be carried out as it was given; the message says what to type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Those of the command line, less the program; by default ``sys.argv``'s.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except Usage as error:
        print(f"torch_hf {args.command}: {error}", file=sys.stderr)
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_hf", description="Hessian-free optimization for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"torch_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "diagnose",
        help="say whether a step would go well, and what is in the way",
        description="Says whether a step of HFOptimizer would go well, and what is in the way.",
        epilog=f"{CONTRACT}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("target", metavar="MODULE:FACTORY", help="what to look at; see below")
    command.add_argument("--curvature", choices=("ggn", "hessian"), default="ggn")
    command.set_defaults(run=_diagnose)

    command = commands.add_parser(
        "plot",
        help="draw a run from the CSV file that CSVLogger wrote",
        description="Draws a run from the CSV file that torch_hf.tracking.CSVLogger wrote.",
        epilog="exit codes: 0 the picture is written, 2 it is not",
    )
    command.add_argument("csv", type=Path, metavar="RUN.CSV", help="the file")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the picture, .png, .svg or .pdf; by default RUN.png beside the CSV file",
    )
    command.add_argument("--score", help="draw the columns train_SCORE and test_SCORE")
    command.add_argument("--title", default="", help="written above the panels")
    command.set_defaults(run=_plot)
    return parser


# --- diagnose -------------------------------------------------------------------------------


def _diagnose(args: argparse.Namespace) -> int:
    returned = _call(_factory(args.target), args.target)
    look = _question(returned, args.target)
    try:
        with _exits(f"what {args.target}() returned"):
            found = look(args.curvature)
    except Usage:
        raise
    except Exception as error:  # the closure or the model failed: so would a step
        if not _raised_here(error):
            traceback.print_exc()
        print(f"A step would fail: {type(error).__name__}: {error}")
        return NO
    print(found)
    return OK if found.ok else NO


def _factory(target: str) -> Callable[[], Any]:
    """The function that a command line names."""
    name, _, attribute = target.partition(":")
    if not name or not attribute:
        _fail(f"{target!r} does not name a factory: write MODULE:FACTORY, such as train:probe.")
    if name.endswith(".py") or "/" in name or "\\" in name:
        module = Path(name).with_suffix("").as_posix().strip("./").replace("/", ".")
        _fail(f"{name!r} is a file: write the module's name, {module}:{attribute}.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with _exits(repr(name)):
            found: Any = importlib.import_module(name)
    except Usage:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]:
            _fail(
                f"There is no module {error.name!r} in {Path.cwd()} or among the installed "
                "packages. Run the command in the folder where it lies."
            )
        traceback.print_exc()
        _fail(f"{name!r} cannot be imported; the error is above.")
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(found).items() if isinstance(v, FunctionType)]
            _fail(f"{name!r} has no {attribute!r}. It has {', '.join(names) or 'no functions'}.")
        found = getattr(found, part)
    if not callable(found):
        _fail(f"{target} is a {type(found).__name__}, not a function.\n\n{CONTRACT}")
    return found  # type: ignore[no-any-return]


def _call(factory: Callable[[], Any], target: str) -> Any:
    try:
        with _exits(f"{target}()"):
            return factory()
    except Usage:
        raise
    except Exception:
        traceback.print_exc()
        _fail(f"{target}() raised the error above. It is called without arguments.")


@contextmanager
def _exits(what: str) -> Iterator[None]:
    """Code that ends the program has shown nothing, whatever exit code it gave."""
    try:
        yield
    except SystemExit as error:
        _fail(
            f"{what} called sys.exit({'' if error.code is None else repr(error.code)}), so there "
            "was nothing to look at. Name a function that returns, and keep a script's own "
            'commands under if __name__ == "__main__".'
        )


def _question(returned: Any, target: str) -> Callable[[str], Diagnosis]:
    """What a factory returned, as a call of ``diagnose``."""
    if isinstance(returned, tuple) and len(returned) >= 2:
        first, second, *_ = returned
        if isinstance(first, nn.Module) and not isinstance(second, nn.Module):
            return lambda curvature: diagnose(*returned, curvature=curvature)
        if callable(first) and not isinstance(first, nn.Module) and len(returned) == 2:
            params = second.parameters() if isinstance(second, nn.Module) else second
            if isinstance(params, Iterable):
                listed = list(params)
                return lambda curvature: diagnose(closure=first, params=listed, curvature=curvature)
    _fail(f"{target}() returned {_said(returned)}.\n\n{CONTRACT}")


def _said(value: Any) -> str:
    """A value's type in words, with those of its items."""
    name = type(value).__name__
    if isinstance(value, tuple):
        return f"a tuple ({', '.join(type(item).__name__ for item in value)})"
    return "None" if value is None else f"a {name}"


def _raised_here(error: BaseException) -> bool:
    """Whether this package raised it, so that its message says all."""
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__"))
    # these run the closure's own operations
    return name.startswith("torch_hf.") and name not in (
        "torch_hf.capture.capture",
        "torch_hf.capture.convolution",
        "torch_hf.capture.normalization",
    )


# --- plot -----------------------------------------------------------------------------------


def _plot(args: argparse.Namespace) -> int:
    output = args.output or args.csv.with_suffix(".png")
    try:
        score = args.score or _score(read_csv(args.csv))
        if args.score and not any(c.endswith(f"_{args.score}") for c in read_csv(args.csv)):
            _fail(f"{args.csv} has no column train_{args.score} or test_{args.score}.")
        plot_training(args.csv, output, score=score, title=args.title)
    except FileNotFoundError:
        _fail(f"There is no file {args.csv}.")
    except UnicodeDecodeError:
        _fail(f"{args.csv} is not a text file; expected one written by CSVLogger.")
    except (OSError, ValueError, ImportError, csv.Error) as error:
        _fail(str(error))
    print(output)
    return OK


def _score(columns: Iterable[str]) -> str:
    """The first score that has a column, accuracy before others."""
    found = [
        column.partition("_")[2]
        for column in columns
        if column.startswith(("train_", "test_")) and not column.endswith("_loss")
    ]
    return "accuracy" if "accuracy" in found or not found else found[0]


def _fail(message: str) -> NoReturn:
    raise Usage(message)


if __name__ == "__main__":
    sys.exit(main())
