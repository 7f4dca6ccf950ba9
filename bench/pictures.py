"""The picture of `bench.cpu`'s section sweep; grey, line and marker tell the libraries apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import Row

STYLES: dict[str, dict[str, Any]] = {
    "relu_xp": {"color": "0", "marker": "o", "linewidth": 2},
    "NumPy": {"color": "0.5", "marker": "s"},
    "PyTorch": {"color": "0.3", "marker": "^", "linestyle": "--"},
    "autograd": {"color": "0.3", "marker": "v", "linestyle": ":", "label": "PyTorch, autograd"},
}


def draw_times(rows: list[Row], path: Path) -> None:
    """Draw the time per element against the number of elements, if there is matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
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
        axes.set(title=operation, xlabel="elements, float32", axisbelow=True)
        axes.grid(color="0.9")
    grid[0, 0].set_ylabel("ns per element")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    figure.savefig(path)
    print(f"drew {path}")
