"""Pictures, with matplotlib (extra ``plot``). No display and no state of pyplot is used."""

from __future__ import annotations

import copy
import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relu_xp import BiasReLU, CReLU, PReLU, ReLU, RReLU
from relu_xp.arrays import to_numpy
from relu_xp.parameters import RELU

if TYPE_CHECKING:
    from relu_xp.activations._base import Layer
    from relu_xp.cli.train import Result

__all__ = ["CURVES", "plot"]

CURVES = ("forward", "gradient", "both")

_POINTS = 33  # of a branch
# Greys: two lines differ by their marker or dashes, never by a colour.
_DARK, _GREY, _LIGHT = "0.15", "0.45", "0.85"
_STYLES: dict[str, dict[str, Any]] = {  # of a line, and of its dots
    "f(x)": {"color": _DARK, "linestyle": "-", "marker": "o"},
    "f'(x)": {"color": _GREY, "linestyle": "--", "marker": "s"},
}


def plot(layer: Layer, ax: Any = None, *, curves: str = "both", xp: Any = np) -> Any:
    """Return the axes with a layer's forward pass, its gradient or both, as the layer computes.

    A dot is filled where the value is taken, and hollow where a branch ends without it.

    Parameters
    ----------
    layer : layer
        Any of this package; it does not change. Of PReLU each channel is drawn, of RReLU
        evaluation, and BiasReLU over the sum of x and its bias.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure, which pyplot does not know.
    curves : {"both", "forward", "gradient"}, optional
    xp : module, optional
        Array API namespace of the library that computes: NumPy by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If `curves` is another word.
    """
    if curves not in CURVES:
        raise ValueError(f"curves must be one of {', '.join(CURVES)}, got {curves!r}")
    if ax is None:
        ax = _new_figure().subplots()
    parameters = getattr(layer, "activation", RELU)
    limits = {"threshold": parameters.threshold}
    if parameters.max_value is not None:
        limits["ceiling"] = parameters.max_value / parameters.positive_slope
    sides = ("right", "left") if len(limits) == 2 else ("center",)
    for (name, limit), side in zip(limits.items(), sides, strict=True):
        ax.axvline(limit, color=_LIGHT, linewidth=2.5, zorder=0)
        style = {"transform": ax.get_xaxis_transform(), "color": _GREY, "fontsize": "small"}
        ax.text(limit, 1.02, f" {name}: {limit:g} ", horizontalalignment=side, **style)
    labels = {"forward": ["f(x)"], "gradient": ["f'(x)"], "both": [*_STYLES]}[curves]
    x = _grid(*limits.values())
    texts = ["{}", "{}, 2nd half"] if isinstance(layer, CReLU) else ["{}"]
    for label in labels:
        for k, y in enumerate(_compute(layer, label, x, xp)):
            text = texts[k].format(label) if k < len(texts) else None
            _draw(ax, x, y, text, 1.0 if k else 1.8, **_STYLES[label])
    _simplify(ax)
    ax.set(xlabel="x + bias" if isinstance(layer, BiasReLU) else "x", ylabel=", ".join(labels))
    ax.set_title(repr(layer), pad=18)
    if len(labels) + len(texts) > 2:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return ax


def _new_figure(width: float = 6.4, height: float = 5.0) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")  # in inches


def layer_figure(layer: Layer, curves: Sequence[str] = CURVES, *, xp: Any = np) -> Any:
    """Return a figure with a picture of a layer for each of `curves`, side by side."""
    figure = _new_figure(4.2 * len(curves), 3.8)
    for axes, one in zip(figure.subplots(1, len(curves), squeeze=False).flat, curves, strict=True):
        plot(layer, axes, curves=one, xp=xp).set_title("")
    figure.suptitle(repr(layer))
    return figure


def learning_curve(result: Result) -> Any:
    """Return a figure with training loss and test accuracy by epoch."""
    figure = _new_figure()
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    epochs = range(1, len(result.losses) + 1)
    style = {"color": _DARK, "marker": "o", "markersize": 4}
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.semilogy(epochs, result.losses, **style)
    ticks = LogLocator(subs=(1, 2, 5))
    upper.yaxis.set(major_locator=ticks, minor_locator=NullLocator(), major_formatter="{x:g}")
    upper.set(ylabel="training loss (nats, log scale)")
    lower.plot(epochs, [100 * a for a in result.accuracies], **style)
    lower.set(xlabel="epoch", ylabel="test accuracy (%)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _simplify(upper)
    _simplify(lower)
    reached = f"test accuracy {result.accuracies[-1]:.1%}"
    figure.suptitle(f"Digits classifier: {result.backend}, seed {result.seed}, {reached}")
    return figure


def formulas_chart(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Return a figure with each formula, its findings and its median time as a bar.

    `rows` are those of `relu_xp.cli.formulas.measure`.
    """
    findings = [textwrap.fill("; ".join(row["findings"]) or "right") for row in rows]
    labels = [f"{row['formula']}\n{text}" for row, text in zip(rows, findings, strict=True)]
    lines = 2 + max(label.count("\n") for label in labels)
    figure = _new_figure(9.6, 0.16 * lines * len(rows) + 1)
    axes = figure.subplots()
    times = [1000 * (row["median_s"] or math.nan) for row in rows]
    colors = [_DARK if row["origin"] == "relu_xp" else "0.6" for row in rows]
    bars = axes.barh(range(len(rows)), times, color=colors, tick_label=labels)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    _simplify(axes)
    axes.set(xlabel=f"ms per call, median of {max(len(row['seconds']) for row in rows)}")
    figure.suptitle(title)
    return figure


def _grid(*limits: float) -> Any:
    """Return `_POINTS` points of each branch, with the limits between, and room on either side.

    They stop a millionth short of the limits: the next number may be a subnormal, which not every
    library keeps.
    """
    low, high = min(0.0, *limits), max(0.0, *limits)
    width = high - low or 4.0
    short = 1e-6 * width
    ends = [low - 0.75 * width, *limits, high + 0.75 * width]
    parts = itertools.pairwise(ends)
    branches = [[*np.linspace(a + short, b - short, _POINTS), b] for a, b in parts]
    return np.concatenate(branches)[:-1]


def _compute(layer: Any, label: str, x: Any, xp: Any) -> list[Any]:
    """Return f(x) or f'(x): an array for each channel of PReLU, or half of CReLU."""
    if isinstance(layer, PReLU):
        layers = [ReLU(negative_slope=float(a)) for a in to_numpy(layer.params[0]).flat]
        return [_compute(one, label, x, xp)[0] for one in layers]
    if isinstance(layer, RReLU):  # in evaluation, but with a gradient
        layer = ReLU(negative_slope=layer.activation.negative_slope)
    elif isinstance(layer, BiasReLU):
        layer = ReLU(**layer.activation._asdict())
    elif isinstance(layer, CReLU):
        layer = CReLU()  # along axis 1
    else:
        layer = copy.copy(layer)
        layer.inplace = False
    y = layer.forward(xp.asarray(x[:, None], dtype=xp.float32))
    if label == "f(x)":
        return list(to_numpy(y).T.copy())
    gradients = []
    for row in np.eye(y.shape[1], dtype=np.float32):
        dy = xp.asarray(np.tile(row, (len(x), 1)))
        gradients.append(to_numpy(layer.backward(dy, retain=True))[:, 0].copy())
    return gradients


def _draw(ax: Any, x: Any, y: Any, text: str | None, width: float, **style: Any) -> None:
    """Draw a line for each branch, and dots where one does not continue the one on its left."""
    marker, color = style.pop("marker"), style["color"]
    tolerance = 1e-3 * (np.abs(y).max() or 1.0)
    for k in range(_POINTS, len(x), _POINTS + 1):
        left, value, right = y[k - 1 : k + 2]
        y[k] = math.nan  # the line has a gap
        if abs(left - right) > tolerance:
            hollow = [end for end in (left, right) if abs(end - value) > tolerance]
            for end in (value, *hollow):
                face = "white" if end in hollow else color
                ax.plot([x[k]], [end], marker, color=color, markerfacecolor=face, zorder=3)
    ax.plot(x, y, label=text, linewidth=width, **style)


def _simplify(axes: Any) -> None:
    """Draw a light grid, and no frame above and on the right."""
    axes.grid(color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
