"""Pictures, with matplotlib (extra ``plot``): no display, and no state of pyplot's, is touched.

A picture is drawn in memory and then written in one step (`relu_xp.files`).
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relu_xp import files, formulas
from relu_xp.activation import Activation
from relu_xp.layers import CReLU, Layer, PReLU, ReLU, RReLU
from relu_xp.training import MissingExtraError, Result

__all__ = [
    "CURVES",
    "FORMATS",
    "check_file",
    "formulas_chart",
    "layer_figures",
    "learning_curve",
    "plot",
]

FORMATS = (".png", ".svg")
CURVES = ("forward", "gradient", "both")

_WIDTH, _HEIGHT, _DPI = 6.4, 5.0, 150  # inches, dots an inch
# Greys: what tells two lines apart is the marker, or the dashes, never a colour.
_DARK, _GREY, _LIGHT = "0.15", "0.45", "0.85"


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
    files.write(file, None)


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
    _, figure_type, ticker = _matplotlib()
    epochs = range(1, len(result.losses) + 1)
    style: dict[str, Any] = {
        "color": _DARK,
        "linewidth": 1.5,
        "markersize": 4,
        "markevery": max(1, len(epochs) // 30),
    }

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
        _plain(axes)
    _save(figure, file)


def formulas_chart(measured: formulas.Measured, file: str | os.PathLike[str]) -> None:
    """Draw the median time of each formula as a bar, and under it where the formula is wrong.

    Parameters
    ----------
    measured : relu_xp.formulas.Measured
    file : path
        Ending in ``.png`` or ``.svg``; replaced if it is there.

    Raises
    ------
    ValueError, OSError, MissingExtraError
        As `check_file`.
    """
    _, figure_type, _ = _matplotlib()
    verdicts = [textwrap.wrap(row.verdict, 84) for row in measured.rows]
    heights = [1.6 + len(lines) for lines in verdicts]  # of bar, lines and gap, in lines of text
    figure = figure_type(figsize=(9.6, 0.17 * sum(heights) + 1), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    factor, unit = formulas.unit([row.median for row in measured.rows if row.median])
    labels = []
    for row, lines, place in zip(
        measured.rows, verdicts, itertools.accumulate(heights, initial=0.0), strict=False
    ):
        ours = row.formula.origin == "relu_xp"
        labels.append((place + 0.5, textwrap.fill(row.formula.text, 40), ours))
        under = place + 0.2
        if row.median is not None:
            bar = axes.barh(place + 0.5, factor * row.median, 0.9, color=_DARK if ours else "0.6")
            axes.bar_label(bar, fmt="%.3g", padding=3, fontsize=8)
            under = place + 1.1
        style = {"fontsize": 8, "color": _GREY, "verticalalignment": "top", "linespacing": 1.1}
        axes.annotate("\n".join(lines), (0, under), (3, 0), textcoords="offset points", **style)
    axes.set_yticks([place for place, _, _ in labels], [text for _, text, _ in labels])
    for tick, (_, _, ours) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set(family="monospace", fontsize=8, fontweight="bold" if ours else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(sum(heights), -0.4)
    axes.margins(x=0.1)
    _plain(axes)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{unit} a call, median of {max(len(row.seconds) for row in measured.rows)}")
    shape = formulas.shape_text(measured.shape)
    figure.suptitle(f"ReLU, as it is written: {measured.backend}, {shape}, {measured.dtype}")
    _save(figure, file)


def plot(layer: Layer, ax: Any = None, *, curves: str = "both", xp: Any = np) -> Any:
    """Draw a layer's forward pass, its gradient, or both, as the layer itself computes them.

    A dot is filled where the value is taken, and hollow where a piece ends without it.

    Parameters
    ----------
    layer : relu_xp.layers.Layer
        Any of this package; what it has saved stays as it is. Of PReLU each channel is drawn, of
        RReLU evaluation, and what training may draw in grey.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure of its own, which pyplot does not know.
    curves : {"both", "forward", "gradient"}, optional
    xp : module, optional
        Array API namespace of the library that is to compute: NumPy by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If `curves` is another word.
    MissingExtraError
        If matplotlib is not installed.
    """
    if curves not in CURVES:
        raise ValueError(f"curves must be one of {', '.join(CURVES)}, got {curves!r}")
    if ax is None:
        _, figure_type, _ = _matplotlib()
        figure = figure_type(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
        ax = figure.subplots()
    numbers = _numbers(layer)
    t, ceiling = numbers.threshold, _ceiling(numbers)
    outputs = _outputs(layer, xp)
    styles = {
        "forward": {"label": "f(x)", "color": _DARK, "linestyle": "-", "marker": "o"},
        "gradient": {"label": "f'(x)", "color": _GREY, "linestyle": "--", "marker": "s"},
    }
    chosen = [curve for curve in styles if curves in (curve, "both")]
    marks = [("knee", t, "center")]
    if ceiling is not None:  # apart, however close they are
        marks = [("knee", t, "right"), ("ceiling", ceiling, "left")]
    for name, place, side in marks:
        ax.axvline(place, color=_LIGHT, linewidth=2.5, zorder=0)
        ax.annotate(
            f"{name}: {place:g}",
            (place, 1),
            ({"center": 0, "right": -3, "left": 3}[side], 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            horizontalalignment=side,
            color=_GREY,
            fontsize="small",
        )
    pieces = list(_pieces(numbers))
    if isinstance(layer, RReLU) and layer.bounds[0] < layer.bounds[1]:
        _draw_bounds(ax, layer, pieces[0], chosen)
    for curve in chosen:
        for number, output in enumerate(outputs):
            style: dict[str, Any] = styles[curve] | {"linewidth": 1.8 if number == 0 else 1.0}
            if number:
                style["label"] = None if isinstance(layer, PReLU) else f"{style['label']}, 2nd half"
            if output.mirrored:
                mirrored = [(-last, -first) for first, last in reversed(pieces)]
                _draw(ax, output.of[curve], mirrored, [False], style)
            else:
                _draw(ax, output.of[curve], pieces, [True, False], style)
    _plain(ax)
    ax.set_xlabel("x")
    ax.set_ylabel(", ".join(styles[curve]["label"] for curve in chosen))
    ax.set_title(repr(layer), pad=18)
    if isinstance(layer, CReLU):  # whose two halves leave no room
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    elif len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(loc="best", frameon=False)
    return ax


def layer_figures(
    layer: Layer, file: str | os.PathLike[str], curves: Sequence[str] = CURVES, *, xp: Any = np
) -> None:
    """Draw figures of a layer side by side into a file: forward, gradient and both by default.

    Parameters
    ----------
    layer, xp
        As for `plot`.
    file : path
        Ending in ``.png`` or ``.svg``; replaced if it is there.
    curves : sequence of str, optional
        One of `CURVES` for each figure.

    Raises
    ------
    ValueError, OSError, MissingExtraError
        As `check_file` and `plot`.
    """
    _, figure_type, _ = _matplotlib()
    size = (_WIDTH if len(curves) == 1 else 4.2 * len(curves), _HEIGHT if len(curves) == 1 else 3.8)
    figure = figure_type(figsize=size, dpi=_DPI, layout="constrained")
    for axes, one in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        plot(layer, axes, curves=one, xp=xp)
        if len(curves) > 1:
            axes.set_title("")
            axes.locator_params(axis="x", nbins=6)
    if len(curves) > 1:
        figure.suptitle(repr(layer))
    _save(figure, file)


def _numbers(layer: Layer) -> Activation:
    """Return four numbers whose knee and ceiling are the layer's."""
    numbers: Activation = getattr(layer, "activation", Activation())
    return numbers


def _ceiling(numbers: Activation) -> float | None:
    """Return where the ceiling is reached."""
    return None if numbers.max_value is None else numbers.max_value / numbers.positive_slope


def _pieces(numbers: Activation) -> Iterator[tuple[float, float]]:
    """Yield where each piece begins and ends, with room on either side of all.

    A piece that does not have its end stops a millionth short: the next number may be a subnormal,
    which not every library keeps.
    """
    t, ceiling = numbers.threshold, _ceiling(numbers)
    places = [0.0, t] + ([] if ceiling is None else [ceiling])
    width = max(places) - min(places) or 4.0
    low, high, short = min(places) - 0.75 * width, max(places) + 0.75 * width, 1e-6 * width
    yield low, t
    if ceiling is None:
        yield t + short, high
    else:
        yield t + short, ceiling - short
        yield ceiling + short, high


class _Output(NamedTuple):
    """One of the numbers that a layer makes of an element, and its gradient."""

    of: dict[str, Callable[[list[float]], list[float]]]  # by the curve's name, on lists
    mirrored: bool  # the knee is of the piece on its right


def _outputs(layer: Layer, xp: Any) -> list[_Output]:
    """Return what a layer computes by way of a library's arrays, a channel of PReLU's each."""
    columns = count = 1
    if isinstance(layer, PReLU):
        slopes = [float(slope) for slope in layer.params[0]]
        columns = count = len(slopes)
        layer = PReLU(count, xp=xp)
        layer.params[0] = xp.asarray(slopes, dtype=xp.float32)
    elif isinstance(layer, RReLU):
        layer = ReLU(negative_slope=layer.activation.negative_slope)  # what it is in evaluation
    elif isinstance(layer, CReLU):
        layer, count = CReLU(), 2
    else:
        layer = copy.copy(layer)  # with the numbers, without what was saved
        layer.inplace = False

    def array(x: list[float]) -> Any:
        return xp.asarray([[value] * columns for value in x], dtype=xp.float32)

    def forward(x: list[float], output: int) -> list[float]:
        y = layer.forward(array(x), training=False)
        return [float(y[k, output]) for k in range(len(x))]

    def gradient(x: list[float], output: int) -> list[float]:
        layer.forward(array(x))
        row = [float(k == output) for k in range(count)]
        dx = layer.backward(xp.asarray([row] * len(x), dtype=xp.float32))
        return [float(dx[k, output % columns]) for k in range(len(x))]

    return [
        _Output(
            {
                "forward": functools.partial(forward, output=output),
                "gradient": functools.partial(gradient, output=output),
            },
            mirrored=output >= columns,
        )
        for output in range(count)
    ]


def _draw_bounds(ax: Any, layer: RReLU, piece: tuple[float, float], chosen: list[str]) -> None:
    """Shade what RReLU may draw in training."""
    lower, upper = layer.bounds
    for curve in chosen:
        ends = [1.0, 1.0] if curve == "gradient" else piece
        ax.fill_between(
            piece,
            [lower * end for end in ends],
            [upper * end for end in ends],
            color=_LIGHT,
            linewidth=0,
            zorder=0.5,
            label="in training" if curve == chosen[0] else None,
        )


def _draw(
    ax: Any,
    function: Callable[[list[float]], list[float]],
    pieces: list[tuple[float, float]],
    left_has_it: list[bool],
    style: dict[str, Any],
) -> None:
    """Draw a function, and dots where one piece does not go on where the last has ended.

    `left_has_it` tells for each such place whether it is of the piece on its left.
    """
    ends = []
    for number, (first, last) in enumerate(pieces):
        x = [first, *np.linspace(first, last, 33).tolist()[1:-1], last]
        y = function(x)
        line = {key: style[key] for key in ("color", "linestyle", "linewidth")}
        ax.plot(x, y, **line, label=style["label"] if number == 0 else None)
        ends.append(((x[0], y[0]), (x[-1], y[-1])))
    extent = max(abs(y) for piece in ends for _, y in piece) or 1.0
    for number, ((_, left), (right, _)) in enumerate(itertools.pairwise(ends)):
        if math.isclose(left[1], right[1], rel_tol=0, abs_tol=1e-3 * extent):
            continue
        for (x0, y0), filled in ((left, left_has_it[number]), (right, not left_has_it[number])):
            ax.plot(
                [x0],
                [y0],
                marker=style["marker"],
                markersize=6,
                color=style["color"],
                markerfacecolor=style["color"] if filled else "white",
                zorder=3,
            )


def _plain(axes: Any) -> None:
    axes.grid(color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, file: str | os.PathLike[str]) -> None:
    form = _format(file)
    matplotlib, _, _ = _matplotlib()
    memory = io.BytesIO()
    # The same figure gives the same file: no date in it, and no random names.
    with matplotlib.rc_context({"svg.hashsalt": "relu-xp"}):
        figure.savefig(memory, format=form, metadata={"Date": None} if form == "svg" else None)
    files.write(file, memory.getvalue())


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
