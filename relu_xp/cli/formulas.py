"""``relu-xp formulas``: time common formulas of ReLU, and list their wrong results."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import re
import statistics
import time
from typing import Any

import array_api_compat
import numpy as np

from relu_xp import get_num_threads, plotting
from relu_xp.cli import _findings, _shared, info
from relu_xp.parameters import FLOATING

SUMMARY = "time common formulas of ReLU, and list their wrong results"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what can be chosen about the array, the timings and the files."""
    _shared.add_backend_option(command)
    text = "of the array (default: 5000x5000)"
    command.add_argument("--shape", type=_shape, default=(5000, 5000), metavar="MxN", help=text)
    text = f"{', '.join(FLOATING)} (default: float64, or float32 where the library has no other)"
    command.add_argument("--dtype", choices=FLOATING, metavar="NAME", help=text)
    _shared.add_integer_option(command, "--repeats", 1, 7, "how often each formula is timed")
    _shared.add_integer_option(command, "--seed", 0, 0, "seed for the numbers in the array")
    text = "write machine, versions, all times and findings to a file"
    command.add_argument("--json", type=_shared.output_file, metavar="FILE", help=text)
    text = "draw times and findings into a .png or .svg file"
    command.add_argument("--plot", type=_shared.picture_file, metavar="FILE", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write the files."""
    library = _shared.choose_library(arguments.backend)
    dtype = choose_dtype(library, arguments.dtype)
    used = {"backend": library.name, "device": library.device}
    array = f"{'x'.join(map(str, arguments.shape))}, {dtype}"
    _shared.print_table(used | {"array": array})
    print(flush=True)  # before the progress bar, also where stdout is a file
    rows = measure(library, arguments.shape, dtype, arguments.repeats, arguments.seed)
    _shared.print_table({"      ms    x ours": "formula", "": "where it is wrong"})
    print()
    for row in rows:
        label = f"{'-':>8}  {'-':>8}"
        if row["median_s"] is not None:
            label = f"{1000 * row['median_s']:>8.3g}  {row['times_ours']:>8.2f}"
        findings = "; ".join(row["findings"]) or "right"
        _shared.print_table({label: row["formula"], "": findings})

    if arguments.json is not None:
        machine = {
            "processor": info.processor(),
            "cpus": os.cpu_count(),
            "threads": get_num_threads(),
            "system": platform.platform(),
        }
        if library.name == "cupy":
            machine |= info.gpus()
        record = used | {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "versions": info.versions(),
            "shape": arguments.shape,
            "dtype": dtype,
            "seed": arguments.seed,
            "formulas": rows,
        }
        text = json.dumps(record, indent=2, allow_nan=False)
        _shared.write_file(arguments.json, f"{text}\n".encode())
        _shared.print_table({"times and findings": arguments.json})
    if arguments.plot is not None:
        title = f"ReLU formulas: {library.name}, {array}"
        _shared.save_picture(plotting.formulas_chart(rows, title), arguments.plot)
        _shared.print_table({"figure": arguments.plot})


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape, such as 5000x5000 or 1000")
    return tuple(map(int, text.split("x")))


def choose_dtype(library: _shared.Library, name: str | None = None) -> str:
    """Return the name of a dtype of the library: by default float64, or float32 without it."""
    for one in ("float64", "float32") if name is None else (name,):
        if _findings.dtype_of(library.xp, one) is not None:
            return one
    advice = ": pip install ml-dtypes" if (library.name, name) == ("numpy", "bfloat16") else ""
    raise ValueError(f"{library.name} has no {name} here{advice}")


def measure(
    library: _shared.Library, shape: tuple[int, ...], dtype: str, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Return a record per formula, as in the JSON file, on an array uniform between -0.5 and 0.5.

    The formulas take turns, the device is waited for, and a formula that writes its input gets a
    fresh copy each time, made before the clock starts.
    """
    xp = library.xp
    formulas = _findings.FORMULAS
    found = {one: _findings.where_wrong(one, xp, dtype) for one in formulas}
    seconds: dict[_findings.Formula, list[float]] = {one: [] for one in formulas}
    running = [one for one in formulas if not "".join(found[one]).startswith("cannot run")]
    turns = [one for number in range(1 + repeats) for one in running[:: (-1) ** number]]
    try:
        host = np.random.default_rng(seed).random(shape) - 0.5
        x = _wait(xp.asarray(host, dtype=_findings.dtype_of(xp, dtype)))
        with _progress(turns, library.name) as bar:
            for one in bar:
                fresh = _wait(xp.asarray(x, copy=True)) if "writes x" in found[one] else x
                start = time.perf_counter()
                y = _wait(one.run(xp, fresh))
                seconds[one].append(time.perf_counter() - start)
                del y, fresh  # the next call may need their memory
    except (MemoryError, RuntimeError) as error:  # PyTorch and JAX raise the latter
        what = f"{'x'.join(map(str, shape))} of {dtype}"
        raise MemoryError(f"cannot time {what}: {_findings.in_short(error)}") from error
    medians = {one: statistics.median(seconds[one][1:]) for one in running}  # the first may compile
    ours = medians[formulas[-1]]
    return [
        {
            "formula": one.text,
            "origin": one.origin,
            "median_s": medians.get(one),
            "times_ours": medians[one] / ours if one in medians else None,
            "seconds": seconds[one][1:],
            "findings": found[one],
        }
        for one in formulas
    ]


def _progress(turns: list[Any], title: str) -> Any:
    """Return the turns with a progress bar, or without one where tqdm is missing."""
    try:
        return _shared.import_extra("tqdm", "tqdm").tqdm(turns, desc=title, unit="timing")
    except ImportError:
        return contextlib.nullcontext(turns)


def _wait(y: Any) -> Any:
    """Return an array once its values are computed."""
    if array_api_compat.is_dask_array(y):
        return y.persist()
    if array_api_compat.is_jax_array(y):
        return y.block_until_ready()
    if array_api_compat.is_cupy_array(y):
        importlib.import_module("cupy").cuda.get_current_stream().synchronize()
    elif array_api_compat.is_torch_array(y) and y.is_cuda:
        importlib.import_module("torch").cuda.synchronize(y.device)
    return y
