"""What every benchmark shares: interleaved timing, and the conditions a figure holds under."""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]  # of a table, and of the JSON
Names = dict[str, Any]

_STARTED = time.perf_counter()
_SHORT = 200e-6  # seconds: what takes less is called several times in one timing,
_ENOUGH = 2e-3  # seconds, which is then so long: the first calls find cold caches
_REST = 0.01  # seconds; OpenMP's workers, PyTorch's for one, spin for some 6 ms after a call
_WAITED = 0.03  # of its time: a timing whose threads waited longer for a CPU tells of others' work


Run = Callable[[int], object]  # makes that many calls


def compiled(code: str, names: Names) -> Run:
    """Return a function that runs code, which finds these names, so many times."""
    made: dict[str, Run] = {}
    loop = f"def run(calls, repeat=repeat):\n    for _ in repeat(None, calls):\n        {code}"
    exec(compile(loop, code, "exec"), {**names, "repeat": itertools.repeat}, made)
    return made["run"]


def normal(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """Return random normal numbers, none of them 0 (half are negative), in np.empty's memory."""
    array = np.empty(shape, dtype)
    drawn = np.float64 if array.itemsize == 8 else np.float32
    array[...] = np.random.default_rng(seed).standard_normal(shape, drawn)
    array[array == 0] = 1
    return array


class Spread(NamedTuple):
    """What many rounds say."""

    median: float
    quartiles: tuple[float, float]
    rounds: int
    calm: int  # of them: those where nobody waited for a CPU
    dropped: int

    def cells(self, name: str) -> Row:
        """Return the median under a name, and the rest beside it."""
        return {
            name: self.median,
            f"{name}_quartiles": list(self.quartiles),
            "calm": f"{self.calm}/{self.rounds}",
            "dropped": self.dropped,
        }


class Rounds:
    """Seconds a call, and whether the machine was calm, of every candidate in every round."""

    def __init__(self, names: Iterable[str]) -> None:
        self._timings: dict[str, list[tuple[float, bool]]] = {name: [] for name in names}

    def add(self, name: str, seconds: float, calm: bool) -> None:
        """Note one timing."""
        self._timings[name].append((seconds, calm))

    def __contains__(self, name: str) -> bool:
        return name in self._timings

    def median(self, name: str) -> float:
        """Return a candidate's median, in seconds."""
        return self.spread(lambda seconds: seconds, name).median

    def spread(self, figure: Callable[..., float], *names: str) -> Spread:
        """Return a figure made of the seconds of some candidates in the same round.

        Rounds in which one of them had to wait for a CPU are dropped, unless that left fewer than a
        third: then all count.
        """
        rounds = list(zip(*(self._timings[name] for name in names), strict=True))
        calm = [timings for timings in rounds if all(calm for _, calm in timings)]
        kept = calm if 3 * len(calm) >= len(rounds) else rounds
        figures = [figure(*(seconds for seconds, _ in timings)) for timings in kept]
        lower, median, upper = statistics.quantiles(figures, n=4, method="inclusive")
        return Spread(median, (lower, upper), len(rounds), len(calm), len(rounds) - len(kept))


def alternating(
    runs: Mapping[str, Run], *, seconds: float, rest: bool = True, least: int = 5
) -> Rounds:
    """Time functions in turn, one after the other and then the other way round.

    Parameters
    ----------
    runs : mapping of name to function
        A quick one makes several calls in one timing.
    seconds : float
        How long to go on.
    rest : bool, optional
        Whether to let the threads that the one before has left fall asleep.
    least : int, optional
        Rounds to make even if they take longer.

    Returns
    -------
    Rounds
    """
    calls = {name: _calls(run) for name, run in runs.items()}
    rounds = Rounds(runs)
    order = list(runs)
    done, end = 0, time.perf_counter() + seconds
    while done < least or time.perf_counter() < end:
        for name in order:
            if rest:
                _rest(calls[name] == 1)
            waited = _waited()
            took = _timed(runs[name], calls[name])
            calm = _waited() - waited <= _WAITED * took * calls[name]
            rounds.add(name, took, calm)
        order.reverse()
        done += 1
    return rounds


def _calls(run: Run) -> int:
    """Return how many calls one timing takes, after one that loads what it needs."""
    run(1)
    took = min(_timed(run, 1) for _ in range(3))
    return 1 if took >= _SHORT else int(_ENOUGH / _timed(run, 20)) + 1


def _timed(run: Run, calls: int) -> float:
    start = time.perf_counter()
    run(calls)
    return (time.perf_counter() - start) / calls


def _rest(copying: bool) -> None:
    """Keep this thread, and no other, busy for a while.

    A copy leaves the caches cold, as a training step does. Before a timing of several calls, which
    is about warm ones, it is left out.
    """
    source, target = _elsewhere()
    end = time.perf_counter() + _REST
    while time.perf_counter() < end:
        if copying:
            np.copyto(target, source)


@functools.cache
def _elsewhere() -> tuple[Any, Any]:
    return np.ones(1 << 21), np.ones(1 << 21)  # 16 MiB each


def _waited() -> float:
    """Return the seconds that this process's threads have been ready to run and waited for a CPU.

    From Linux; 0 elsewhere.
    """
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        for line in _lines(str(task)):
            nanoseconds += int(line.split()[1])
    return 1e-9 * nanoseconds


def cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def print_table(rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Print some columns of the rows, with ``row["group"]`` over those that share it."""
    rows = list(rows)
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = {name for name in columns if isinstance(rows[0].get(name), str)}
    lines = [
        "  ".join(
            cell.ljust(width) if name in words else cell.rjust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]
    group = None
    for row, line in zip(rows, lines[1:], strict=True):
        if row["group"] != group:
            group = row["group"]
            print(f"\n{group}\n{lines[0]}")
        print(line)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):  # three digits, and never an exponent
        digits = 2 - math.floor(math.log10(abs(value))) if value else 2
        return f"{value:.{max(digits, 0)}f}"
    return "" if value is None else textwrap.shorten(str(value), 56, placeholder=" ...")


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> Row:
    """Return what is wanted, if anything, and whether a value reaches it."""
    if at_least is not None:
        return {"wanted": f">={at_least}", "limit": at_least, "reached": value >= at_least}
    if at_most is not None:
        return {"wanted": f"<={at_most}", "limit": at_most, "reached": value <= at_most}
    return {}


def progress(text: str) -> None:
    """Say what is being measured, and when."""
    print(f"[{time.perf_counter() - _STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)


def child(code: str, **environment: str) -> Any:
    """Return what a fresh process prints, as JSON."""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(ran.stdout)


@functools.cache
def module(name: str) -> Any:
    """Return a module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def processor(field: str) -> str:
    """Return what Linux says of the first processor; nothing elsewhere."""
    lines = (line for line in _lines("/proc/cpuinfo") if line.startswith(field))
    return next(lines, "").partition(":")[2].strip()


def conditions(*packages: str) -> dict[str, Any]:
    """Return machine, versions and date."""
    versions = {}
    for package in ("numpy", "array-api-compat", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor("model name") or platform.processor(),
        "cpus": cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def rounded(rows: Sequence[Row]) -> list[Row]:
    """Return rows with four digits of each figure, which is more than they tell."""
    found: list[Row] = json.loads(
        json.dumps(rows), parse_float=lambda text: float(f"{float(text):.4g}")
    )
    return found


def save(path: str | Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, if a path was given."""
    if path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")  # a run that is ended leaves the file whole
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(path)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
