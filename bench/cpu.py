"""A CPU: the compiled kernels against the limit of the memory, PyTorch, and an earlier commit.

``python -m bench.cpu [--quick] [--section NAME ...] [--against FOLDER] [--json FILE] [--pictures]``.
What is compared is interleaved in one process, and a value is the median of the ratios of all
rounds. ``SECTIONS`` has the parts of a run. What is not installed is reported as such.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import measure, pictures
from bench.measure import Names, Row, child, module, progress, verdict

RESULTS = Path(__file__).with_name("results") / "cpu.json"
LIMIT = Path(__file__).with_name("limit.cpp")

# In all code x and dy are inputs, y and dx outputs, mask an array for `mask=`; tx is x's memory as a
# tensor of PyTorch's, and so on; `before` is relu_xp at an earlier commit.
PULLBACK = "pullback(dy, out=dx)"
MASK = "relu_xp.relu_vjp(x, out=y, mask=mask{})"
FORWARD = {  # function: its arguments of `relu_vjp`, its code
    "relu": ({}, "relu_xp.relu(x, out=y)"),
    "leaky_relu": ({"negative_slope": 0.01}, "relu_xp.leaky_relu(x, out=y)"),
    "relu6": ({"max_value": 6.0}, "relu_xp.relu6(x, out=y)"),
}
DTYPES = ("float32", "float16", "float64", "bfloat16")
OPERATIONS = {  # of the limit: ours, PyTorch's, at least of PyTorch's speed
    "forward": ("relu_xp.relu(x, out=y)", "torch.clamp_min(tx, 0, out=ty)", {}),
    "forward with mask": (MASK.format(""), "torch.clamp_min(tx, 0, out=ty)", {}),
    "backward": (
        PULLBACK,
        "aten.threshold_backward.grad_input(tdy, ty, 0, grad_input=tdx)",
        {"float32": 1.4, "float16": 1.7},
    ),
}
LAYER = "layer.forward(x); layer.backward(dy)"
SMALL = (  # elements, ours, times faster than before
    (10, "relu_xp.relu(x)", 1.3),
    (10, LAYER, 1.5),
    (6400, LAYER, 1.4),
)
IMPORT_LIMIT = 25.0  # milliseconds
SWEEP = {  # operation: library: code
    "forward": {
        "relu_xp": "relu_xp.relu(x)",
        "NumPy": "np.maximum(x, 0)",
        "PyTorch": "torch.relu(tx)",
    },
    "backward": {
        "relu_xp": "pullback(dy)",
        "NumPy": "np.where(x > 0, dy, 0)",
        "PyTorch": "aten.threshold_backward(tdy, ty, 0)",
    },
    "both": {
        "relu_xp": LAYER,
        "NumPy": "np.maximum(x, 0); np.where(x > 0, dy, 0)",
        "autograd": "leaf.grad = None; out = torch.relu(leaf); out.backward(tdy)",
    },
}


class Effort(NamedTuple):
    """How much to measure."""

    large: int  # elements
    sizes: tuple[int, ...]  # of the sweep
    seconds: float  # for each candidate
    starts: int  # of processes


FULL = Effort(25_000_000, (10, 100, 1000, 6400, 1 << 16, 1 << 18, 1 << 20, 10_000_000), 0.8, 7)
QUICK = Effort(2_500_000, (10, 6400, 1 << 18), 0.02, 1)


@functools.lru_cache(maxsize=1)
def _arrays(shape: tuple[int, ...], dtype: str) -> Names:
    """Return what code finds, on dense arrays."""
    number = module("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    arrays = {"x": measure.normal(shape, number, 0), "dy": measure.normal(shape, number, 1)}
    arrays |= {name: np.zeros(shape, number) for name in ("y", "dx")}
    arrays["mask"] = np.zeros((arrays["x"].size + 7) // 8 + 8, np.uint8)
    relu_xp.relu(arrays["x"], out=arrays["y"])
    return _names(arrays) | {"pullback": relu_xp.relu_vjp(arrays["x"])[1]}


def _names(arrays: Mapping[str, Any]) -> Names:
    """Return arrays, the same memory as PyTorch's, and the libraries that there are."""
    names: Names = {"np": np, "relu_xp": relu_xp, "layer": relu_xp.ReLU(), **arrays}
    torch = module("torch")
    if torch is None or arrays["x"].dtype.name == "bfloat16":
        return names
    torch.set_num_threads(relu_xp.get_num_threads())
    names |= {f"t{name}": torch.from_numpy(array) for name, array in arrays.items()}
    leaf = names["tx"].detach().requires_grad_()
    return names | {"torch": torch, "aten": torch.ops.aten, "leaf": leaf}


def _compared(
    row: Row,
    names: Names,
    seconds: float,
    ours: str,
    other: str,
    *references: str,
    rest: bool = True,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Measure, and return a row with how many times faster ours is than the other.

    With `at_most`, the value is the time that ours takes of the other's.
    """
    progress(", ".join(str(cell) for cell in row.values()))
    codes = (ours, other, *references)
    runs = {code: measure.compiled(code, names) for code in codes if _known(code, names)}
    if ours not in runs or other not in runs:
        return row | {"value": "not installed"}
    rounds = measure.alternating(runs, seconds=seconds * len(runs), rest=rest)
    pair = (other, ours) if at_most is None else (ours, other)
    spread = rounds.spread(lambda of, over: of / over, *pair)
    row |= spread.cells("value") | verdict(spread.median, at_least=at_least, at_most=at_most)
    times = {code: 1e6 * rounds.median(code) for code in runs}
    return row | {"ours_us": times[ours], "other_us": times[other], "us": times}


def _known(code: str, names: Names) -> bool:
    return all(name in names for name in compile(code, code, "exec").co_names if name in OPTIONAL)


OPTIONAL = {"torch", "aten", "leaf", "before", "pullback_before", "limit"}


def _limit(operation: str, names: Names) -> Callable[[], object]:
    """Return a function that computes an operation of plain ReLU at the limit of the memory."""
    source, target = ("dy", "dx") if operation == "backward" else ("x", "y")
    x, out, mask = names[source], names[target], names["mask"]
    return functools.partial(
        _limit_library().run,
        list(OPERATIONS).index(operation),
        *(ctypes.c_size_t(x.itemsize), *(ctypes.c_void_p(a.ctypes.data) for a in (x, out, mask))),
        ctypes.c_size_t(x.size),
    )


@functools.cache
def _limit_library() -> Any:
    """Compile and load ``limit.cpp``; None where it cannot be."""
    compilers = map(shutil.which, (os.environ.get("CXX") or "g++", "c++"))
    compiler = next(filter(None, compilers), None)
    if not (compiler and measure.has_avx512()):
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        command = [compiler, "-O3", "-std=c++17", "-march=x86-64-v4", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, str(LIMIT), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.start(relu_xp.get_num_threads())
    return loaded


def limit(effort: Effort) -> list[Row]:
    """Compare with C++ loops that stream, and with PyTorch."""
    rows, torch_rows = [], []
    for dtype, (operation, codes) in itertools.product(DTYPES[:2], OPERATIONS.items()):
        ours, torch_code, wanted = codes
        names = dict(_arrays((effort.large,), dtype))
        if _limit_library():
            names["limit"] = _limit(operation, names)
            _check_limit(ours, names, "dx" if operation == "backward" else "y")
        row: Row = {"group": "share of the speed of a C++ loop", "case": operation, "dtype": dtype}
        seconds = 2 * effort.seconds
        rows.append(
            _compared(row, names, seconds, ours, "limit()", torch_code, at_least=0.95)
        )
        row = row | {"group": "times faster than PyTorch"}
        torch_rows.append(
            _compared(row, names, seconds, ours, torch_code, at_least=wanted.get(dtype))
        )
    return rows + torch_rows


def _check_limit(ours: str, names: Names, out: str) -> None:
    """Raise unless the limit's results are ours."""
    results = []
    for code in (ours, "limit()"):
        names[out].fill(7)
        measure.compiled(code, names)(1)
        results.append(names[out].copy())
    if not np.array_equal(*results):
        raise AssertionError(f"{ours} and the limit differ")


def instruction_sets(effort: Effort) -> list[Row]:
    """Compare x86-64-v3 with v4: their shares of the limit, each in processes of its own."""
    versions = ("x86-64-v3", "x86-64-v4")
    row: Row = {"group": "speed of x86-64-v3 over that of x86-64-v4"}
    if not measure.has_avx512() or relu_xp_kernels() is None:
        return [row | {"case": "all", "value": "not installed"}]
    code = f"import json; from bench import cpu; rows = cpu.limit(cpu.{effort._replace(seconds=effort.seconds / 3)})"
