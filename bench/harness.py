"""The harness of every benchmark: candidates that take turns in one process, and their ratios."""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Names = dict[str, Any]  # what the code of a candidate finds
Run = Callable[[int], object]  # makes that many calls
Timer = Callable[[], float]  # makes one timing; seconds per call

_SHORT = 200e-6  # seconds; a call that takes less is repeated within one timing
_REPEATED = 2e-3  # seconds that such a timing takes, so that its first, uncached calls do not count
_REST = 0.01  # seconds; the threads of OpenMP, which PyTorch has, spin some 6 ms after a call
_REST_AT_MOST = 0.3  # seconds; those of OpenBLAS, which NumPy has, spin about 100 ms


def free_names(code: str) -> set[str]:
    """Return the names that code reads and does not define."""
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    stored = {node.id for node in found if isinstance(node.ctx, ast.Store)}
    return {node.id for node in found} - stored


def looped(code: str, names: Names, sets: Sequence[Names] = ({},)) -> Run:
    """Return a function that runs a line of code so many times, each with the next set of names."""
    varying = sorted(free_names(code) & set(sets[0]))
    cycle = itertools.cycle([tuple([one[name] for name in varying]) for one in sets])
    target = f"{', '.join(varying)}," if varying else "_"
    loop = f"def run(calls):\n    for {target} in islice(cycle, calls):\n        {code}"
    namespace = {**names, "cycle": cycle, "islice": itertools.islice}
    exec(compile(loop, code, "exec"), namespace)
    run: Run = namespace["run"]
    return run


def runnable(codes: Iterable[str], names: Names) -> dict[str, Run]:
    """Return the codes whose names are all there, as functions."""
    return {code: looped(code, names) for code in codes if free_names(code) <= set(names)}


class Spread(NamedTuple):
    """A figure's median over all rounds, and its quartiles."""

    median: float
    quartiles: tuple[float, float]

    def cells(self, name: str) -> dict[str, Any]:
        """Return the cells of a row: the median under a name, and the quartiles beside it."""
        return {name: self.median, f"{name}_quartiles": list(self.quartiles)}


class Timings(dict[str, list[float]]):
    """The seconds per call of every candidate, a number for each round."""

    def ratio(self, numerator: str, denominator: str) -> Spread:
        """Return the spread of the time of one candidate over that of another in the same round."""
        pairs = zip(self[numerator], self[denominator], strict=True)
        return _spread([one / other for one, other in pairs])

    def microseconds(self, name: str) -> Spread:
        """Return the spread of the time per call of a candidate."""
        return _spread([1e6 * seconds for seconds in self[name]])


def _spread(figures: Sequence[float]) -> Spread:
    lower, median, upper = statistics.quantiles(figures, n=4, method="inclusive")
    return Spread(median, (lower, upper))


def interleave(timers: Mapping[str, Timer], *, seconds: float = 0.0, rounds: int = 5) -> Timings:
    """Return what timers measure when they take turns, in every other round in reverse order.

    They go on for so many seconds, and for so many rounds even if that takes longer. One more round
    comes first and does not count: it finds cold caches and slow clocks.
    """
    timings, order = Timings({name: [] for name in timers}), list(timers)
    number, end = 0, time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while number <= rounds or time.perf_counter() < end:
            for name in order:
                measured = timers[name]()
                if number:
                    timings[name].append(measured)
            order.reverse()
            number += 1
    finally:
        gc.enable()
    return timings


def time_runs(runs: Mapping[str, Run], seconds: float, *, rest: bool = True) -> Timings | None:
    """Return the wall-clock timings of functions at so many seconds each; None for fewer than two.

    With `rest`, each timing first waits until the threads of the previous one sleep.
    """
    if len(runs) < 2:
        return None
    timers = {name: _wall_clock(run, rest) for name, run in runs.items()}
    return interleave(timers, seconds=seconds * len(runs))


def _wall_clock(run: Run, rest: bool) -> Timer:
    run(1)  # loads what it needs
    calls = 1
    if min(_seconds(run, 1) for _ in range(3)) < _SHORT:
        calls = int(_REPEATED / _seconds(run, 20)) + 1

    def timer() -> float:
        if rest:
            _rest(copying=calls == 1)
        return _seconds(run, calls)

    return timer


def warm_seconds(run: Run, calls: int) -> float:
    """Return the seconds per call of several in a row, after one that warms the caches.

    It first waits until other threads of this process sleep.
    """
    end = time.perf_counter() + _REST_AT_MOST
    share = 2.0
    while share > 1.2 and time.perf_counter() < end:
        start = time.perf_counter(), time.process_time()
        _rest(copying=False)
        share = (time.process_time() - start[1]) / (time.perf_counter() - start[0])
    run(1)
    return _seconds(run, calls)


def _seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    run(calls)
    return (time.perf_counter() - start) / calls


def _rest(copying: bool) -> None:
    """Keep this thread, and no other, busy for a while.

    A copy leaves the caches cold, as a training step does. Before a timing of several calls, which
    is about warm caches, it is omitted.
    """
    source, target = _other_arrays()
    end = time.perf_counter() + _REST
    while time.perf_counter() < end:
        if copying:
            np.copyto(target, source)


@functools.cache
def _other_arrays() -> tuple[Any, Any]:
    return np.ones(1 << 21), np.ones(1 << 21)  # 16 MiB each


def normal(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """Return normally distributed numbers without a 0, in memory of `numpy.empty`."""
    array = np.empty(shape, dtype)
    sampled = np.float64 if array.itemsize == 8 else np.float32
    array[...] = np.random.default_rng(seed).standard_normal(shape, sampled)
    array[array == 0] = 1
    return array


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of a name; bfloat16 is that of ml_dtypes."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


@functools.cache
def module(name: str) -> Any:
    """Return a module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
