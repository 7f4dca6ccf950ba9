"""Pictures, with matplotlib (extra ``plot``): no display, and no state of pyplot's, is touched.

A picture is drawn in memory, written beside its target and then renamed, so that a file is either
the old one or whole.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from relu_xp.training import MissingExtraError, Result

__all__ = ["FORMATS", "check_file", "learning_curve"]

FORMATS = (".png", ".svg")

_WIDTH, _HEIGHT, _DPI = 6.4, 5.0, 150  # inches, dots an inch
_DARK, _LIGHT = "0.15", "0.85"  # greys: what tells two lines apart is the marker, never a colour


def check_file(file: str | os.PathLike[str]) -> None:
    """Refuse a file that a picture could not be written to, before the work for it is done.

    Parameters
    ----------
    file : path
        Ending in ``.png`` or ``.svg``. What is there already stays as it is.

    Raises
    ------
    ValueError
        If the ending is another one.
    OSError
        If the file cannot be written.
    MissingExtraError
        If matplotlib is not installed.
    """
    _format(file)
    _matplotlib()
    _write(file, None)


def learning_curve(result: Result, file: str | os.PathLike[str]) -> None:
    """Draw loss and test accuracy of a training run by epoch.

    Parameters
    ----------
    result : relu_xp.training.Result
    file : path
        Ending in ``.png`` or ``.svg``; replaced if it is there.

    Raises
    ------
    ValueError, OSError, MissingExtraError
        As `check_file`.
    """
    form = _format(file)
    matplotlib, figure_type, ticker = _matplotlib()
    epochs = range(1, len(result.losses) + 1)
    style: dict[str, Any] = {
        "color": _DARK,
        "linewidth": 1.5,
        "markersize": 4,
        "markevery": max(1, len(epochs) // 30),
    }

    # The same result gives the same file: no date in it, and no random names.
    with matplotlib.rc_context({"svg.hashsalt": "relu-xp"}):
        figure = figure_type(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.set_title(
            f"Digits classifier: {result.backend}, seed {result.seed}, "
            f"test accuracy {result.accuracies[-1]:.1%}"
        )
        upper.semilogy(epochs, result.losses, marker="o", **style)
        upper.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        upper.yaxis.set_major_formatter("{x:g}")
        upper.yaxis.set_minor_locator(ticker.NullLocator())
        upper.set_ylabel("training loss (nats, log scale)")
        lower.plot(epochs, [100 * a for a in result.accuracies], marker="s", **style)
        lower.yaxis.set_major_locator(ticker.MaxNLocator(steps=[1, 2, 5, 10]))
        lower.set_ylabel("test accuracy (%)")
        lower.set_xlabel("epoch")
        lower.xaxis.set_major_locator(
            ticker.MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
        for axes in (upper, lower):
            axes.grid(color=_LIGHT, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        memory = io.BytesIO()
        figure.savefig(memory, format=form, metadata={"Date": None} if form == "svg" else None)
    _write(file, memory.getvalue())


def _format(file: str | os.PathLike[str]) -> str:
    """Return the format that a file's ending asks for."""
    suffix = Path(file).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{os.fspath(file)!r} must end in {' or '.join(FORMATS)}")
    return suffix[1:]


def _matplotlib() -> tuple[Any, Any, Any]:
    """Return matplotlib, its Figure and its ticker module, without pyplot."""
    try:
        import matplotlib
        from matplotlib import ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"a picture needs matplotlib ({error}): pip install matplotlib"
        ) from None
    return matplotlib, Figure, ticker


def _write(file: str | os.PathLike[str], data: bytes | None) -> None:
    """Replace a file by data in one step, or (None) only find out whether that is possible."""
    path = Path(os.path.realpath(file))  # so that a link stays a link
    name = repr(os.fspath(file))
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {name}: it is a directory")
    if path.exists() and not os.access(path, os.W_OK):  # a rename would not ask
        raise PermissionError(f"cannot write {name}: it is read-only")
    beside = path.with_name(f".relu-xp-{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            try:
                stream.write(data or b"")
                stream.flush()
                if data is not None:
                    beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(f"cannot write {name}: {error.strerror}") from None
