"""A CPU: the compiled kernels against the limit of the memory, PyTorch, and an earlier commit.

README.md, beside this file, says what each section measures.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import activations, baselines, pictures, report
from bench.activations import names_of
from bench.harness import Names, looped, normal, numpy_dtype, runnable, time_runs
from bench.report import Row, compared, judged, progress
from relu_xp import kernels

COMMIT = "9e16654"  # the last one whose kernels were LLVM IR; the targets of SMALL are against it
DTYPES = ("float32", "float16", "float64", "bfloat16")

# In all code x and dy are inputs, y and dx outputs, mask an array for `mask=`; tx is x's memory as
# PyTorch's tensor, and so on.
FUNCTIONS = {"relu": "", "leaky_relu": ", negative_slope=0.01", "relu6": ", max_value=6.0"}
PASSES = {
    "forward": "relu_xp.relu(x, out=y{})",
    "forward with mask": "relu_xp.relu_vjp(x, out=y, mask=mask{})",
    "backward": "pullback(dy, out=dx)",
    "backward from input": "relu_xp.relu_backward(dy, x, out=dx{})",
}
LAYER = "layer.forward(x); layer.backward(dy)"
CLAMP = "torch.clamp_min(tx, 0, out=ty)"
TORCH = {  # PyTorch saves no mask: it keeps y
    "forward": CLAMP,
    "forward with mask": CLAMP,
    "backward": "aten.threshold_backward.grad_input(tdy, ty, 0, grad_input=tdx)",
}
LIMIT = ">=0.95"  # of the limit's speed
BACKWARD = {"float32": ">=1.4", "float16": ">=1.7"}  # times faster than PyTorch
EARLIER = ">=0.96"  # of the earlier commit's speed
SMALL = ((10, "relu_xp.relu(x)", ">=1.3"), (10, LAYER, ">=1.5"), (6400, LAYER, ">=1.4"))
NHWC = (8, 58, 58, 64)
STRIDED = 3_200_000  # elements, of which every second one is taken
VERSIONS = ("x86-64-v3", "x86-64-v4")
IMPORT = "from time import perf_counter; import numpy; start = perf_counter(); import relu_xp"
SWEEP = (
    ("forward", "relu_xp", "relu_xp.relu(x)"),
    ("forward", "NumPy", "np.maximum(x, 0)"),
    ("forward", "PyTorch", "torch.relu(tx)"),
    ("backward", "relu_xp", "pullback(dy)"),
    ("backward", "NumPy", "np.where(x > 0, dy, 0)"),
    ("backward", "PyTorch", "aten.threshold_backward(tdy, ty, 0)"),
    ("both", "relu_xp", LAYER),
    ("both", "NumPy", "np.maximum(x, 0); np.where(x > 0, dy, 0)"),
    ("both", "autograd", "leaf.grad = None; torch.relu(leaf).backward(tdy)"),
)


class Effort(NamedTuple):
    """How much to measure."""

    large: int  # elements
    sizes: tuple[int, ...]  # of the sweep
    seconds: float  # for each candidate
    starts: int  # of a process


FULL = Effort(25_000_000, (10, 100, 1000, 6400, 1 << 16, 1 << 18, 1 << 20, 10_000_000), 1.2, 7)
QUICK = Effort(2_500_000, (10, 6400, 1 << 18), 0.02, 1)


@functools.lru_cache(maxsize=1)
def _arrays(shape: tuple[int, ...], dtype: str) -> Names:
    """Return what code finds, with C-contiguous arrays."""
    x, dy = (normal(shape, numpy_dtype(dtype), seed) for seed in (0, 1))
    y, dx = np.zeros_like(x), np.zeros_like(x)
    mask = np.zeros((x.size + 7) // 8 + 8, np.uint8)
    relu_xp.relu(x, out=y)
    names = names_of({"x": x, "dy": dy, "y": y, "dx": dx, "mask": mask})
    return names | {"pullback": relu_xp.relu_vjp(x, mask=mask)[1], "layer": relu_xp.ReLU()}


def _limit_cases(large: int) -> Iterator[tuple[str, str, Names]]:
    """Yield dtype, pass, and what code finds, with ``limit()`` if its result is that of ours."""
    for dtype, (index, operation) in itertools.product(DTYPES[:2], enumerate(TORCH)):
        progress(f"limit: {dtype}, {operation}")
        names = dict(_arrays((large,), dtype))
        if baselines.limit():
            source, target = ("dy", "dx") if operation == "backward" else ("x", "y")
            addresses = (names[name].ctypes.data for name in (source, target, "mask"))
            sizes = map(ctypes.c_size_t, (names["x"].itemsize, *addresses, large))
            threads = relu_xp.get_num_threads()
            names["limit"] = functools.partial(baselines.limit().run, index, *sizes, threads)
            written = [target, "mask"] if operation == "forward with mask" else [target]
            results = []
            for code in (PASSES[operation].format(""), "limit()"):
                for name in written:
                    names[name].fill(7)
                looped(code, names)(1)
                results.append([names[name].tobytes() for name in written])
            if results[0] != results[1]:
                raise AssertionError(f"the limit's {operation} is not ours")
        yield dtype, operation, names


def limit(effort: Effort) -> Iterator[list[Row]]:
    """Compare with C++ loops that stream past the caches, and with PyTorch."""
    groups: dict[str, list[Row]] = {}
    for dtype, operation, names in _limit_cases(effort.large):
        ours, theirs = PASSES[operation].format(""), TORCH[operation]
        timings = time_runs(runnable((ours, "limit()", theirs), names), 2 * effort.seconds)
        target = BACKWARD[dtype] if operation == "backward" else ""
        for group, numerator, denominator, wanted in (
            ("share of the limit, a C++ loop with streaming stores", "limit()", ours, LIMIT),
            ("PyTorch's share of the same limit", "limit()", theirs, ""),
            ("times faster than PyTorch", theirs, ours, target),
        ):
            row: Row = {"group": group, "case": operation, "dtype": dtype}
            row |= compared(timings, numerator, denominator, wanted)
            groups.setdefault(group, []).append(row)
    yield from groups.values()


def _with(package: Any, names: Names, arguments: str = "") -> Names:
    """Return names in which relu_xp, its layer and its pullback are those of a package."""
    names = {**names, "relu_xp": package, "layer": package.ReLU()}
    return names | {"pullback": eval(f"relu_xp.relu_vjp(x{arguments})[1]", dict(names))}


def _use(package: Any) -> None:
    """Call what the section before does with a package."""
    for dtype, arguments in itertools.product(DTYPES, FUNCTIONS.values()):
        names = {"relu_xp": package, "x": np.ones(1 << 20, numpy_dtype(dtype))}
        eval(f"relu_xp.relu_vjp(x{arguments})[1](x)", names)
        eval(f"relu_xp.relu_backward(x, x{arguments})", names)


def before(effort: Effort, folder: Path | None) -> Iterator[list[Row]]:
    """Compare with the package of an earlier commit, on large and on small arrays."""
    group = "speed over that of "
    if folder is None:
        value = "not measured: no --against FOLDER"
        yield [{"group": f"{group}an earlier commit", "case": "all", "value": value}]
        return
    earlier, commit = baselines.earlier(folder, _use)
    cases = [
        (f"{function}, {operation}", dtype, effort.large, code.format(arguments), arguments)
        for dtype in DTYPES
        for function, arguments in FUNCTIONS.items()
        for operation, code in PASSES.items()
    ]
    cases += [(f"{size}: {code}", "float32", size, code, "") for size, code, _ in SMALL]
    targets = {f"{size}: {code}": target for size, code, target in SMALL if commit == COMMIT}
    for case, dtype, elements, code, arguments in cases:
        progress(f"before: {dtype}, {case}")
        names, theirs = _arrays((elements,), dtype), f"{commit}: {code}"
        runs = {
            code: looped(code, _with(relu_xp, names, arguments)),
            theirs: looped(code, _with(earlier, names, arguments)),
        }
        timings = time_runs(runs, effort.seconds, rest=elements > 1 << 15)
        row: Row = {"group": f"{group}commit {commit}", "case": case, "dtype": dtype}
        yield [row | compared(timings, theirs, code, targets.get(case, EARLIER))]


def layouts(effort: Effort) -> Iterator[list[Row]]:
    """Compare views with dense arrays, and every second element with PyTorch."""
    group = "time of a view seen as NCHW over that of the same memory seen as NHWC"
    dense = _arrays(NHWC, "float32")
    views = {name: dense[name].transpose(0, 3, 1, 2) for name in ("x", "dy", "y", "dx")}
    for function, arguments in FUNCTIONS.items():
        progress(f"layouts: {function}")
        for operation in ("forward", "backward"):
            code = PASSES[operation].format(arguments)
            runs = {
                code: looped(code, _with(relu_xp, dense, arguments)),
                f"NCHW: {code}": looped(code, _with(relu_xp, dense | views, arguments)),
            }
            row: Row = {"group": group, "case": f"{function}, {operation}", "dtype": "float32"}
            timings = time_runs(runs, effort.seconds)
            yield [row | compared(timings, f"NCHW: {code}", code, "<=1.15")]
    x = normal((STRIDED,), np.float32, 0)[::2]
    code, case = PASSES["forward"].format(""), "every second element, forward"
    runs = runnable((code, CLAMP), names_of({"x": x, "y": np.zeros(x.shape, x.dtype)}))
    row = {"group": "times faster than PyTorch", "case": case, "dtype": "float32"}
    yield [row | compared(time_runs(runs, effort.seconds), CLAMP, code, ">=1.0")]


def prelu(effort: Effort) -> Iterator[list[Row]]:
    """Compare PReLU with PyTorch."""
    return activations.prelu(effort.seconds)


def bias(effort: Effort) -> Iterator[list[Row]]:
    """Compare a bias with ReLU with PyTorch."""
    return activations.bias(effort.seconds)


def versions(effort: Effort) -> Iterator[list[Row]]:
    """Compare two instruction sets by their speed over the limit's, in processes of their own."""
    group = f"speed with {VERSIONS[0]} over that with {VERSIONS[1]}"
    if instruction_set() != VERSIONS[1] or not baselines.limit():
        yield [{"group": group, "case": "all", "value": f"not measured: needs {VERSIONS[1]}"}]
        return
    code = f"from bench import cpu; cpu.print_shares({effort.large}, {effort.seconds / 2})"
    ratios: dict[str, list[float]] = {}
    for _ in range(max(1, effort.starts // 3)):
        lower, higher = (_child(code, RELU_XP_CPU=version) for version in VERSIONS)
        for case, share in lower.items():
            ratios.setdefault(case, []).append(share / higher[case])
    for case, values in ratios.items():
        value, (operation, dtype) = statistics.median(values), case.split(", ")
        row: Row = {"group": group, "case": operation, "dtype": dtype, "value": value}
        yield [row | judged(value, ">=0.9")]


def print_shares(large: int, seconds: float) -> None:
    """Print, as JSON, the speed of passes over the limit's."""
    shares = {}
    for dtype, operation, names in _limit_cases(large):
        ours = PASSES[operation].format("")
        timings = time_runs(runnable((ours, "limit()"), names), seconds)
        shares[f"{operation}, {dtype}"] = compared(timings, "limit()", ours)["value"]
    print(json.dumps(shares))


def _child(code: str, **environment: str) -> Any:
    """Return what a fresh process prints, read as JSON."""
    command, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return json.loads(subprocess.check_output(command, env=variables))


def imports(effort: Effort) -> Iterator[list[Row]]:
    """Time what ``import relu_xp`` adds to ``import numpy``."""
    times = []
    for start in range(effort.starts + 1):
        progress(f"import: {start} of {effort.starts}")
        times.append(1e3 * _child(f"{IMPORT}; print(perf_counter() - start)"))
    value = statistics.median(times[1:])  # the first one fills the caches on the disk
    row: Row = {"group": "import relu_xp after import numpy", "case": "milliseconds"}
    yield [row | {"value": value} | judged(value, "<=25.0")]


def sweep(effort: Effort) -> Iterator[list[Row]]:
    """Time forward, backward and both from 10 elements on, fresh results."""
    for operation, elements in itertools.product(("forward", "backward", "both"), effort.sizes):
        progress(f"sweep: {operation}, {elements}")
        codes = {library: code for name, library, code in SWEEP if name == operation}
        runs = runnable(codes.values(), _arrays((elements,), "float32"))
        timings = time_runs(runs, effort.seconds / 2, rest=elements > 1 << 15)
        assert timings  # NumPy is always there
        row: Row = {"group": f"float32, {operation}: microseconds", "operation": operation}
        row |= {"elements": elements, "codes": codes}
        known = {library: code for library, code in codes.items() if code in timings}
        times = {name: timings.microseconds(code).median for name, code in known.items()}
        yield [row | times]


def instruction_set() -> str:
    """Return that of the compiled kernels, or why there are none."""
    return kernels.cpu.instruction_set if kernels.cpu else kernels.reason


COLUMNS = "case dtype wanted value reached us"
SECTIONS: dict[str, tuple[Callable[..., Iterator[list[Row]]], str]] = {
    "limit": (limit, COLUMNS),
    "before": (before, COLUMNS),
    "layouts": (layouts, COLUMNS),
    "prelu": (prelu, COLUMNS),
    "bias": (bias, COLUMNS),
    "versions": (versions, COLUMNS),
    "import": (imports, COLUMNS),
    "sweep": (sweep, "elements relu_xp NumPy PyTorch autograd"),
}


def main() -> None:
    """Measure, print, save and draw."""
    parser = report.command_line("cpu", __doc__)
    only = f"only these of {', '.join(SECTIONS)}; FILE keeps the figures of the others"
    parser.add_argument("--section", nargs="+", choices=SECTIONS, metavar="NAME", help=only)
    against = "a checkout of an earlier commit, for the section before"
    parser.add_argument("--against", type=Path, metavar="FOLDER", help=against)
    draw = "measure nothing, draw what FILE has"
    parser.add_argument("--pictures", action="store_true", help=draw)
    options = parser.parse_args()
    path, result = report.opened(options)
    conditions = report.conditions("torch", "ml_dtypes", "llvmlite", quick=options.quick) | {
        "threads": relu_xp.get_num_threads(),
        "instruction_set": instruction_set(),
    }
    print(textwrap.fill(json.dumps(conditions), 99))
    effort = QUICK if options.quick else FULL
    for name in () if options.pictures else options.section or SECTIONS:
        section, columns = SECTIONS[name]
        batches = section(effort, options.against) if section is before else section(effort)
        rows = report.measure(name, batches, conditions, result, path)
        report.print_table(rows, columns.split())
    if path and "sweep" in result:
        pictures.draw_times(result["sweep"]["rows"], path.with_name(f"{path.stem}-time.png"))


if __name__ == "__main__":
    main()
