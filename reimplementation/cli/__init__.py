"""The command line: `python -m reimplementation <command>`, one module per command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from reimplementation import __version__

from . import bench, demo, detect, evaluate, export, info, integrations, levels, make_dataset, sweep, train, vit

COMMANDS = (bench, levels, sweep, demo, detect, train, evaluate, make_dataset, vit, export, integrations, info)
EXTRAS = {  # the extra that brings a package
    **dict.fromkeys(("PIL", "matplotlib", "rich"), "demo"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "yaml": "config",
    "scipy": "train",
    "transformers": "transformers",
}
USER_ERROR = 2
INTERRUPTED, READER_GONE = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # as a shell counts programs that a signal ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    What a user can put right is one line on stderr and exit code 2. Warnings are one line each as well. Where nobody
    reads the output to its end, as before `| head -1`, the command stops without a word.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
        sys.stdout.flush()  # here, where a reader that has gone is noticed in time
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"{package} is missing; install it with: pip install 'reimplementation[{EXTRAS[package]}]'")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it exits
        return READER_GONE
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reimplementation",
        description="Fused deformable-sampling ops for multi-camera perception.",
    )
    parser.add_argument("--version", action="version", version=f"reimplementation {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _fail(message: str) -> int:
    _say(message)
    return USER_ERROR


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(str(message))


def _say(message: str) -> None:
    print("reimplementation:", " ".join(message.split()), file=sys.stderr)
