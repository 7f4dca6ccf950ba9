"""What the commands share: types of options, the array library, tables and files."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat

from relu_xp import dispatch

_LABEL_WIDTH, _LINE_WIDTH = 20, 79  # characters


class Library(NamedTuple):
    """An array library: its name, its array API namespace and its default device in words."""

    name: str
    xp: Any
    device: str


def add_backend_option(command: argparse.ArgumentParser) -> None:
    """Add ``--backend``, whose value `choose_library` takes."""
    text = "array library, such as torch (default: cupy if it has a device, else numpy)"
    command.add_argument("--backend", metavar="NAME", help=text)


def choose_library(name: str | None = None) -> Library:
    """Return an array library: by default CuPy where it has a device, else NumPy.

    A ValueError says that it is not available, or what is wrong with a variable of the kernels.
    """
    if name is None:
        name = "cupy" if dispatch.availability("cupy") is None else "numpy"
    xp = dispatch.namespace(name)
    importlib.import_module("relu_xp.kernels")  # reads the environment variables
    device = array_api_compat.device(xp.empty(0))
    if name == "dask":  # the client of a cluster knows more
        scheduler = importlib.import_module("dask").base.get_scheduler()
        device = getattr(scheduler, "__self__", device)
    return Library(name, xp, str(device).strip("<>"))


def import_extra(module: str, distribution: str) -> Any:
    """Return a module, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        advice = f"pip install {distribution}"
        raise ImportError(f"{distribution} is needed ({error}): {advice}") from None


# ---- options: the error of a bad value names the option


def add_integer_option(
    command: argparse.ArgumentParser, option: str, minimum: int, default: int, meaning: str
) -> None:
    """Add an option that takes an integer of at least `minimum`."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    text = f"{meaning} (default: %(default)s)"
    command.add_argument(option, type=integer, default=default, metavar="N", help=text)


def output_file(name: str, picture: bool = False) -> str:
    """Return the name of a file that can be written, which is found out before any long work."""
    try:
        if picture:
            import_extra("matplotlib.figure", "matplotlib")
            if Path(name).suffix.lower() not in (".png", ".svg"):
                raise ValueError(f"{name!r} must end in .png or .svg")
        write_file(name, None)
    except (ImportError, ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


picture_file = functools.partial(output_file, picture=True)


# ---- what is printed and written


def print_table(rows: Mapping[str, str], indent: str = "") -> None:
    """Print labelled values, aligned, and wrapped to the window.

    Lines break between words only: a file's name can be copied. Characters that the terminal's
    encoding lacks are printed as escapes.
    """
    for label, value in rows.items():
        first = f"{indent}{label}".ljust(_LABEL_WIDTH)
        text = textwrap.fill(
            value,
            max(1, min(_LINE_WIDTH, shutil.get_terminal_size().columns - 1)),
            initial_indent=first,
            subsequent_indent=" " * _LABEL_WIDTH,
            break_long_words=False,
            break_on_hyphens=False,
        )
        line = text or first.rstrip()
        try:
            print(line)
        except UnicodeEncodeError:  # nothing was printed
            encoding = sys.stdout.encoding
            print(line.encode(encoding, "backslashreplace").decode(encoding))


def save_picture(figure: Any, file: str) -> None:
    """Write a figure of matplotlib; the same figure gives the same bytes."""
    import matplotlib

    form = Path(file).suffix[1:].lower()
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "relu-xp"}):  # no random names, and no date
        figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else None)
    write_file(file, buffer.getvalue())


def write_file(file: str, data: bytes | None) -> None:
    """Replace a file by data in one step, or (None) only check that this is possible.

    A device or a pipe, ``/dev/stdout`` for example, is written into. The message of an OSError
    names the file, which then stays as it is.
    """
    target = Path(os.path.realpath(file))  # a symbolic link stays one
    temporary = target.parent / f".relu-xp-{os.getpid()}.tmp"
    exists = os.path.exists(file)
    try:
        if exists and not (target.is_file() or target.is_dir()):
            if data is not None:
                Path(file).write_bytes(data)
            return
        if exists:  # replacing a file needs no permission to write it; a directory is refused
            target.open("ab").close()
        temporary.write_bytes(data or b"")
        if data is not None:
            if exists:
                shutil.copymode(target, temporary)
            temporary.replace(target)
    except OSError as error:
        raise type(error)(f"cannot write {file!r}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
