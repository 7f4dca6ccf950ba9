"""The pictures of what was measured; grey, line and marker tell the libraries apart."""

from __future__ import annotations

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
PASSES = ("forward", "forward + mask", "backward", "both")


def draw(rows: Rows, beside: Path) -> Path | None:
    """Draw the time an element takes, against how many there are, of `bench.cpu`'s sweep.

    Parameters
    ----------
    rows : list of dict
        Of that section.
    beside : path
        Where its result is; ``cpu.json`` gives ``cpu-time.png``.

    Returns
    -------
    path or None
        The picture; None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    grid = figure.subplots(1, len(operations), sharex=True, sharey=True, squeeze=False)
    for axes, operation in zip(grid.flat, operations, strict=True):
        for library, style in STYLES.items():
            times = [
                (row["elements"], 1e3 * row[library] / row["elements"])
                for row in rows
                if row["operation"] == operation and library in row
            ]
            if times:
                axes.loglog(*zip(*times, strict=True), markersize=4, **{"label": library, **style})
        axes.set_title(operation)
        axes.set_xlabel("elements, float32")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    grid[0, 0].set_ylabel("ns an element")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    path = beside.with_name(f"{beside.stem}-time.png")
    figure.savefig(path)
    return path


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
