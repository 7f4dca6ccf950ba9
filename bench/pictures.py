"""The pictures of what was measured; grey, line and marker tell the libraries apart."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]

STYLES: dict[str, dict[str, Any]] = {
    "relu_xp": {"color": "0", "marker": "o", "linewidth": 2},
    "NumPy": {"color": "0.5", "marker": "s"},
    "CuPy": {"color": "0.5", "marker": "s"},
    "PyTorch": {"color": "0.3", "marker": "^", "linestyle": "--"},
    "autograd": {"color": "0.3", "marker": "v", "linestyle": ":", "label": "PyTorch, autograd"},
    "JAX": {"color": "0.6", "marker": "D", "linestyle": "-."},
    "copy": {"color": "0.75", "linewidth": 3, "zorder": 1},
}
PANELS = (
    ("forward", "backward", "both"),
    ("forward, out=", "backward, out=", "both, out="),
)
PASSES = ("forward", "forward + mask", "backward", "both")


def draw(result: Mapping[str, Any], beside: Path) -> list[Path]:
    """Draw what there is of `bench.cpu`'s sweep and of the forum's spellings.

    Parameters
    ----------
    result : mapping
        What it saves.
    beside : path
        Where that is; ``cpu.json`` gives ``cpu-time.png`` and ``cpu-bandwidth.png``.

    Returns
    -------
    list of path
        The pictures; none without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError:
        return []
    drawn = []
    for section, name, picture in (
        ("sweep", "time", _time),
        ("forum", "bandwidth", _bandwidth),
    ):
        if section in result:
            figure = Figure(layout="constrained", dpi=120)
            picture(figure, result[section]["rows"])
            drawn.append(beside.with_name(f"{beside.stem}-{name}.png"))
            figure.savefig(drawn[-1])
    return drawn


def draw_passes(rows: Rows, path: Path) -> bool:
    """Draw the bandwidth of `bench.gpu`'s passes against the number of elements.

    The bytes are those that relu_xp moves, whoever computes it: what is twice as high takes half
    the time.

    Parameters
    ----------
    rows : list of dict
        Of its section ``passes``.
    path : path
        Where to.

    Returns
    -------
    bool
        Whether there is matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in rows if "us" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    needed = {  # kilobytes
        (row["dtype"], row["pass"], row["elements"]): row["GB/s"] * row["us"]
        for row in rows
        if row["library"] in ("relu_xp", "copy")
    }
    figure = Figure(figsize=(11, 9), layout="constrained", dpi=120)
    grid = figure.subplots(len(PASSES), len(dtypes), sharex=True, sharey=True, squeeze=False)
    for (i, j), axes in np.ndenumerate(grid):
        for library, style in STYLES.items():
            place = dtypes[j], "copy" if library == "copy" else PASSES[i]
            fastest: dict[int, float] = {}  # of a library's ways, in microseconds
            for row in rows:
                if (row["library"], row["dtype"], row["pass"]) == (library, *place):
                    elements = row["elements"]
                    fastest[elements] = min(row["us"], fastest.get(elements, row["us"]))
            sizes = [size for size in sorted(fastest) if (*place, size) in needed]
            if sizes:
                bandwidths = [needed[*place, size] / fastest[size] for size in sizes]
                form = {"label": library, "markersize": 4, "zorder": 2, **style}
                axes.plot(sizes, bandwidths, **form)
        axes.set_xscale("log", base=2)
        axes.set_title(f"{PASSES[i]}, {dtypes[j]}", size=9)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    for axes in grid[-1]:
        axes.set_xlabel("elements")
    for axes in grid[:, 0]:
        axes.set_ylabel("GB/s")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=max(len(lines), 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _time(figure: Any, rows: Rows) -> None:
    """Draw the time an element takes, against how many there are."""
    figure.set_size_inches(10, 6.5)
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, operation in zip(grid.flat, sum(PANELS, ()), strict=True):
        chosen = [row for row in rows if row["operation"] == operation]
        for library, style in STYLES.items():
            times = [
                (row["elements"], 1e3 * row[library] / row["elements"])
                for row in chosen
                if library in row
            ]
            if times:
                axes.loglog(*zip(*times, strict=True), markersize=4, **{"label": library, **style})
        axes.set_title(operation if "," in operation else f"{operation}, fresh")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    for axes in grid[1]:
        axes.set_xlabel("elements, float32")
    for axes in grid[:, 0]:
        axes.set_ylabel("ns an element")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))


def _bandwidth(figure: Any, rows: Rows) -> None:
    """Draw each spelling's share of the copy's bandwidth."""
    groups: dict[str, dict[str, Rows]] = {}  # by operation, by dtype
    for row in rows:
        size_and_dtype, _, operation = row["group"].partition(", ")
        if "share" in row:
            groups.setdefault(operation, {}).setdefault(size_and_dtype, []).append(row)
    heights = [max(map(len, by_dtype.values())) + 2 for by_dtype in groups.values()]
    figure.set_size_inches(9, 0.21 * sum(heights) + 1)
    grid = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes, (operation, by_dtype) in zip(grid.flat, groups.items(), strict=True):
        for place, (dtype, chosen) in enumerate(by_dtype.items()):
            positions = [index + 0.4 * place - 0.2 for index in range(len(chosen))]
            shares = [row["share"] for row in chosen]
            axes.barh(positions, shares, 0.4, color=("0.25", "0.7")[place % 2], label=dtype)
        chosen = next(iter(by_dtype.values()))
        axes.set_yticks(range(len(chosen)), _labels(chosen), family="monospace", size=7)
        for row, label in zip(chosen, axes.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if row["library"] == "relu_xp" else "normal")
        axes.set_ylim(len(chosen) - 0.4, -0.6)
        axes.axvline(1, color="0", linewidth=0.8)
        axes.set_title(operation)
    grid[-1, 0].set_xlabel("bytes a second, over the fastest copy's")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))


def _labels(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [textwrap.shorten(row["code"], 62, placeholder=" ...") for row in rows]
