"""The command line, ``relu-xp`` and ``python -m relu_xp``: a module per command.

A command's module has `SUMMARY`, `add_options(parser)` and `run(arguments)`.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from relu_xp import __version__
from relu_xp.cli import formulas, info, plot, train

__all__ = ["main"]

_COMMANDS = {"info": info, "plot": plot, "train": train, "formulas": formulas}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 130 after Ctrl-C.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Raises
    ------
    SystemExit
        With code 2 after an error, which is one line on stderr; with 0 after ``--help`` and
        ``--version``.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, or a program without a console
            setattr(sys, name, io.StringIO())
    parser = _Parser(prog="relu-xp", description="One ReLU layer for every array library.")
    parser.set_defaults(run=lambda _: parser.print_help(), parser=parser)
    parser.add_argument("--version", action="version", version=f"relu-xp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in _COMMANDS.items():
        summary = f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}."
        command = commands.add_parser(name, help=module.SUMMARY, description=summary)
        module.add_options(command)
        command.set_defaults(run=module.run, parser=command)
    try:
        return _run(parser.parse_args(argv))
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python flushes stdout again at exit, which must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{arguments.parser.prog}: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as in shells
    except BrokenPipeError:
        pass  # the reader, for example `head`, has stopped
    except (argparse.ArgumentTypeError, ValueError, OSError, ImportError, MemoryError) as error:
        arguments.parser.error(str(error))
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
