"""A GPU: relu_xp, PyTorch, CuPy's formulas and others.

Times are the device's, between two events, over arrays that take turns: when one is used again,
more than the L2 cache holds has passed since. Where a call takes the host longer than the device,
the host's time is what is seen; the section ``graphs`` excludes it. README.md, beside this file,
says what each section measures.
"""

from __future__ import annotations

import collections
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import gpu_cases, report
from bench.gpu_cases import CHANNELS, COPY, DTYPES, OTHERS, OURS, PASSES, SLOPE, TARGET_SIZE, Case
from bench.gpu_device import Device, missing
from bench.harness import Names, Run, Timings, free_names, interleave, looped, normal, numpy_dtype
from bench.report import Row, judged, progress

HOST_SHAPES = ((4096,), (64, 64))
HOST_CALLS = 100  # in a timing; more would fill the device's queue, for which the host waits
GRAPH_SIZES = (1 << 12, 1 << 20)
SAMPLE = 1 << 16  # elements at either end that are compared with NumPy's
RANDOM = 1 << 22  # random numbers; larger arrays repeat them


class Effort(NamedTuple):
    """How much to measure."""

    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]  # elements
    rounds: int
    sample: float  # seconds that a timing takes at least, about


FULL = Effort(DTYPES[::-1], tuple(1 << k for k in (28, 27, 24, 20, 16, 12)), 20, 2e-3)
QUICK = Effort(("float32", "bfloat16"), (1 << 20, 1 << 16, 1 << 12), 3, 5e-4)


def _sets(device: Any, dtype: str, shape: tuple[int, ...], count: int = 1) -> list[Names]:
    """Return the arrays that the cases find, as often as asked for: in memory of its own each."""
    number, elements = numpy_dtype(dtype), math.prod(shape)
    total, mask_bytes = count * elements, -(-elements // 8)
    device.free()
    pools = {name: device.xp.empty(total, number) for name in ("x", "dy", "y", "dx")}
    for seed, name in enumerate(("x", "dy")):
        random = device.xp.asarray(normal((min(total, RANDOM),), number, seed))
        for start in range(0, total, RANDOM):
            pools[name][start : start + RANDOM] = random[: total - start]
    pools["dx"].view(np.uint8).fill(0xFF)  # NaN
    channels = min(CHANNELS, elements)
    pools["bias"] = device.xp.asarray(normal((channels,), number, 2))
    if device.torch:
        for name, pool in list(pools.items()):
            tensor = device.torch.from_dlpack(pool.view(np.int16) if dtype == "bfloat16" else pool)
            pools[f"t{name}"] = tensor.view(getattr(device.torch, dtype))
    biases: Names = {name: pools.pop(name) for name in ("bias", "tbias") if name in pools}
    masks = device.xp.empty(count * mask_bytes, np.uint8)
    sets = []
    for k in range(count):
        part = slice(k * elements, (k + 1) * elements)
        names = {name: pool[part].reshape(shape) for name, pool in pools.items()}
        names |= {f"rows_{name}": array.reshape(-1, channels) for name, array in names.items()}
        names |= biases
        names["mask"] = masks[k * mask_bytes : (k + 1) * mask_bytes]
        rows = {"out": names["rows_y"], "mask": names["mask"]}
        names["bias_pullback"] = relu_xp.bias_relu_vjp(names["rows_x"], names["bias"], **rows)[1]
        x, kept = names["x"], {"out": names["y"], "mask": names["mask"]}
        names["leaky_pullback"] = relu_xp.relu_vjp(x, negative_slope=SLOPE, **kept)[1]
        names["pullback"] = relu_xp.relu_vjp(x, **kept)[1]  # which has the same mask
        if device.torch:
            names["leaf"] = names["tx"].detach().requires_grad_()
        sets.append(names)
    return sets


def _check(device: Any, case: Case, run: Run, arrays: Names) -> None:
    """Make a first call, and compare either end of what it wrote with what NumPy computes."""
    outputs = case.outputs.split()
    for name in outputs:
        arrays[name].view(np.uint8).fill(0xFF)  # NaN
    run(1)
    device.synchronize()
    exact = case.library == "relu_xp"  # PyTorch's slope of float16 has more bits, for one
    for end in (slice(None, SAMPLE), slice(-SAMPLE, None)) if outputs else ():
        x, dy = (device.numpy(arrays[name].reshape(-1)[end]) for name in ("x", "dy"))
        if "bias" in case.name:  # either end has whole rows
            x = (x.reshape(-1, arrays["bias"].size) + device.numpy(arrays["bias"])).reshape(-1)
        slope = x.dtype.type(SLOPE if "leaky" in case.name else 0)
        right = {"y": np.where(x > 0, x, slope * x), "dx": np.where(x > 0, dy, slope * dy)}
        right["mask"] = np.packbits(x > 0, bitorder="little")
        for name in outputs:
            flat, size = arrays[name].reshape(-1), right[name].size
            found = device.numpy(flat[-size:] if end.start else flat[:size])
            pair = (array.astype(np.float64) for array in (found, right[name]))
            if not np.allclose(*pair, *((0, 0) if exact else (0.01, 1e-6))):
                raise ArithmeticError(f"{name} is not what NumPy computes")


def _ready(
    device: Any, cases: Iterable[Case], sets: Sequence[Names]
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the cases that work, as functions, and why the others do not; both by code."""
    names = {"relu_xp": relu_xp, "layer": relu_xp.ReLU(), **device.names()}
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    for case in cases:
        try:
            if not free_names(case.code) <= {*names, *sets[0]}:
                raise ImportError("there is no PyTorch with CUDA")
            run = looped(case.code, names, sets)
            _check(device, case, run, sets[0])
        except Exception as error:
            notes[case.code] = _note(error)
        else:
            runs[case.code] = run
    return runs, notes


def _note(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return textwrap.shorten(f"not measured: {type(error).__name__}: {line}", 200)


def _timings(device: Any, runs: Mapping[str, Run], effort: Effort) -> Timings:
    """Return the device's times of functions."""
    calls = dict.fromkeys(runs, 3)
    for _, (name, run) in itertools.product(range(2), runs.items()):
        calls[name] = math.ceil(effort.sample / device.seconds(run, calls[name]))
    timers = {name: partial(device.seconds, run, calls[name]) for name, run in runs.items()}
    return interleave(timers, rounds=effort.rounds)


def _cells(case: Case, timings: Timings, notes: Mapping[str, str]) -> Row:
    """Return the cells of every row: the case, its time, or why there is none."""
    row: Row = {"library": case.library, "code": case.code}
    if case.code in notes:
        return row | {"note": notes[case.code]}
    return row | timings.microseconds(case.code).cells("us")


def _passes(
    device: Any, effort: Effort, dtype: str, elements: int
) -> tuple[Timings, dict[str, str]]:
    """Return the device's times of all passes, and why some were not measured."""
    try:
        # Together four times what the L2 holds, of which a pass touches half or more.
        count = math.ceil(device.l2 / (numpy_dtype(dtype).itemsize * elements))
        sets = _sets(device, dtype, (elements,), count)
        runs, notes = _ready(device, {case.code: case for case in PASSES}.values(), sets)
        return _timings(device, runs, effort), notes
    except (ImportError, *device.full) as error:
        return Timings(), {case.code: _note(error) for case in PASSES}


def passes(device: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time every pass, dtype and size."""
    for dtype, elements in itertools.product(effort.dtypes, effort.sizes):
        progress(f"passes: {dtype}, {elements} elements")
        timings, notes = _passes(device, effort, dtype, elements)
        rows = []
        for case in PASSES:
            row: Row = {"dtype": dtype, "elements": elements, "pass": case.name}
            row |= _cells(case, timings, notes)
            if case.code in timings:
                nbytes, copied = (one.nbytes(dtype, elements) for one in (case, COPY))
                row["GB/s"] = 1e-3 * nbytes / row["us"]
                row["share"] = nbytes / copied * timings.ratio(COPY.code, case.code).median
                for other in PASSES:
                    if other.name == case.name and other.code in timings:
                        ratio = timings.ratio(other.code, case.code).median
                        key = f"over_{other.library}"  # of a library its fastest case counts
                        row[key] = min(ratio, row.get(key, ratio))
            rows.append(row)
        yield rows


def host(device: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time what a call of a small array costs the host."""
    for shape in HOST_SHAPES:
        progress(f"host: {shape}")
        runs, notes = _ready(device, gpu_cases.HOST, _sets(device, "float32", shape))
        timers = {c: partial(device.host_seconds, run, HOST_CALLS) for c, run in runs.items()}
        timings = interleave(timers, rounds=5 * effort.rounds)
        rows = []
        for case in gpu_cases.HOST:
            row: Row = {"shape": "x".join(map(str, shape))} | _cells(case, timings, notes)
            other = gpu_cases.HOST_PAIRS.get(case.code, "")
            if other in timings and case.code in timings:
                ratio = timings.ratio(case.code, other).median
                row |= {"against": other, "ratio": ratio} | judged(ratio, "<=1.0")
            rows.append(row)
        yield rows


def graphs(device: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time a step's replay as a CUDA graph beside the same step, called; both in the L2 cache."""
    for elements in GRAPH_SIZES:
        progress(f"graphs: {elements} elements")
        sets = _sets(device, "float32", (elements,))
        with device.side_stream():
            runs, notes = _ready(device, gpu_cases.GRAPHS, sets)
            for case in [case for case in gpu_cases.GRAPHS if case.code in runs]:
                try:
                    replay = device.captured(case.library, runs[case.code])
                    _check(device, case, replay, sets[0])
                except Exception as error:
                    notes[case.code] = _note(error)
                else:
                    runs[f"replay: {case.code}"] = replay
            timings = _timings(device, runs, effort)
        rows = []
        for case in gpu_cases.GRAPHS:
            row: Row = {"elements": elements} | _cells(case, timings, notes)
            if (replayed := f"replay: {case.code}") in timings:
                row["replay_us"] = timings.microseconds(replayed).median
                row["faster"] = timings.ratio(case.code, replayed).median
            rows.append(row)
        yield rows


def _ours(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of our first case of each pass, of the size that targets are about."""
    sizes = {row["elements"] for row in rows}
    size = TARGET_SIZE if TARGET_SIZE in sizes else max(sizes)
    return [row for row in rows if (row["code"], row["elements"]) == (OURS[row["pass"]], size)]


def targets(rows: Sequence[Row]) -> list[Row]:
    """Return the targets, and whether the rows of the section passes reach them."""
    found = []
    for (name, ratio, wanted, dtypes), row in itertools.product(gpu_cases.TARGETS, _ours(rows)):
        if row["pass"] == name and row["dtype"] in dtypes:
            line = {"pass": name, "ratio": ratio} | {k: row[k] for k in ("dtype", "elements")}
            value = row.get(ratio)
            line["value"] = "not measured" if value is None else value
            found.append(line | judged(value or 0.0, wanted))
    return found


def show(result: Row) -> None:
    """Print short tables of what there is; the JSON has the rest."""
    sections = {name: section["rows"] for name, section in result.items() if section["rows"]}
    for name, columns in COLUMNS.items():
        if rows := sections.get(name):
            chosen = _ours(rows) if name == "passes" else rows
            report.print_table([{"group": name, **row} for row in chosen], columns.split())
    found = (row["note"] for rows in sections.values() for row in rows if "note" in row)
    for note, count in collections.Counter(found).most_common(8):
        print(f"{count} times {note}")


COLUMNS = {
    "passes": " ".join(
        ["dtype pass elements us GB/s share", *(f"over_{library}" for library in OTHERS)]
    ),
    "host": "shape code us against ratio wanted reached",
    "graphs": "elements library us replay_us faster",
    "targets": "pass ratio dtype elements value wanted reached",
}
SECTIONS = {"passes": passes, "host": host, "graphs": graphs}


def main() -> None:
    """Measure, print and save."""
    options = report.command_line("gpu", __doc__).parse_args()
    if reason := missing():
        print(f"bench.gpu: nothing is measured, there is no CUDA device: {reason}")
        return
    path, result = report.opened(options)
    device, effort = Device(), QUICK if options.quick else FULL
    conditions = report.conditions("torch", "ml_dtypes", quick=options.quick)
    conditions["versions"]["cupy"] = device.xp.__version__
    conditions |= device.conditions() | {"settings": effort._asdict()}
    for name, section in SECTIONS.items():
        rows = report.measure(name, section(device, effort), conditions, result, path)
        if section is passes:
            report.measure("targets", [targets(rows)], conditions, result, path)
    show(result)


if __name__ == "__main__":
    main()
