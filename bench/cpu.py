"""A CPU: the compiled kernels against the limit of the memory, PyTorch, and an earlier commit.

``python -m bench.cpu [--quick] [--section NAME ...] [--against FOLDER] [--json FILE]``. What is
compared is interleaved in one process; a value is the median of the ratios of all rounds.
``SECTIONS`` has the parts of a run. What cannot be measured is reported as such.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import measure, pictures
from bench.measure import Names, Rounds, Row, child, module, progress, verdict
from relu_xp import kernels

RESULTS = Path(__file__).with_name("results") / "cpu.json"
LIMIT = Path(__file__).with_name("limit.cpp")
COMMIT = "9e16654"  # the last one whose kernels were LLVM IR
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
AUTOGRAD = "leaf.grad = None; torch.relu(leaf).backward(tdy)"
CLAMP = "torch.clamp_min(tx, 0, out=ty)"
TORCH = {  # PyTorch saves no mask: it keeps y
    "forward": CLAMP,
    "forward with mask": CLAMP,
    "backward": "aten.threshold_backward.grad_input(tdy, ty, 0, grad_input=tdx)",
}

SHARE = 0.95  # of the limit's speed, at least
BACKWARD = {"float32": 1.4, "float16": 1.7}  # times faster than PyTorch
BEFORE = 0.96  # of the earlier commit's speed, at least
SMALL = ((10, "relu_xp.relu(x)", 1.3), (10, LAYER, 1.5), (6400, LAYER, 1.4))  # times faster
NHWC, NHWC_LIMIT = (8, 58, 58, 64), 1.15
STRIDED = 3_200_000  # elements, of which every second one is taken
PRELU = (16, 64, 56, 56)
PRELU_CASES = {
    "forward": ("relu_xp.prelu(x, weight)", "functional.prelu(tx, tweight)"),
    "forward and backward": (
        "out, back = relu_xp.prelu_vjp(x, weight); back(dy)",
        "leaf.grad = slopes.grad = None; functional.prelu(leaf, slopes).backward(tdy)",
    ),
}
VERSIONS = ("x86-64-v3", "x86-64-v4")
IMPORT = "from time import perf_counter; import numpy; start = perf_counter(); import relu_xp"
SWEEP = {
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
        "autograd": AUTOGRAD,
    },
}
OPTIONAL = {"torch", "aten", "functional", "limit"}  # names that are not always there


class Effort(NamedTuple):
    """How much to measure."""

    large: int  # elements
    sizes: tuple[int, ...]  # of the sweep
    seconds: float  # for each candidate
    starts: int  # of a process


FULL = Effort(25_000_000, (10, 100, 1000, 6400, 1 << 16, 1 << 18, 1 << 20, 10_000_000), 1.2, 7)
QUICK = Effort(2_500_000, (10, 6400, 1 << 18), 0.02, 1)


def _names(arrays: Mapping[str, Any], beside_torch: bool = True) -> Names:
    """Return what code finds: arrays, the same memory as tensors, and libraries."""
    names: Names = {"np": np, "relu_xp": relu_xp, "layer": relu_xp.ReLU(), **arrays}
    torch = module("torch") if beside_torch else None
    if torch and arrays["x"].dtype.name != "bfloat16":  # which `from_numpy` does not take
        torch.set_num_threads(relu_xp.get_num_threads())
        names |= {f"t{name}": torch.from_numpy(array) for name, array in arrays.items()}
        names |= {"torch": torch, "aten": torch.ops.aten, "functional": torch.nn.functional}
        names["leaf"] = names["tx"].detach().requires_grad_()
    return names


@functools.lru_cache(maxsize=1)
def _arrays(shape: tuple[int, ...], dtype: str, beside_torch: bool = True) -> Names:
    """Return what code finds, with C-contiguous arrays."""
    number = module("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x, dy = (measure.normal(shape, number, seed) for seed in (0, 1))
    y, dx = np.zeros_like(x), np.zeros_like(x)
    mask = np.zeros((x.size + 7) // 8 + 8, np.uint8)
    relu_xp.relu(x, out=y)
    names = _names({"x": x, "dy": dy, "y": y, "dx": dx, "mask": mask}, beside_torch)
    return names | {"pullback": relu_xp.relu_vjp(x, mask=mask)[1]}


def _measured(names: Names, seconds: float, *codes: str, rest: bool = True) -> Rounds | None:
    """Return the rounds of those that can run, at so many seconds each; None of fewer than two."""
    runs = {
        code: measure.compiled(code, names)
        for code in codes
        if all(name in names for name in OPTIONAL.intersection(re.findall(r"\w+", code)))
    }
    if len(runs) < 2:
        return None
    return measure.alternating(runs, seconds=seconds * len(runs), rest=rest)


def _row(
    row: Row,
    rounds: Rounds | None,
    ours: str,
    other: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Return how many times faster ours is than the other; slower, with `at_most`."""
    if rounds is None or not (ours in rounds and other in rounds):
        return row | {"value": "not measured"}
    spread = rounds.spread(truediv, *((other, ours) if at_most is None else (ours, other)))
    row |= spread.cells("value") | verdict(spread.median, at_least=at_least, at_most=at_most)
    times = {code: 1e6 * rounds.median(code) for code in (ours, other)}
    return row | {"ours_us": times[ours], "other_us": times[other], "us": times}


def _renamed(code: str, ending: str) -> str:
    """Return code whose variables have another ending."""
    return re.sub(r"\b(relu_xp|layer|pullback|x|dy|y|dx)\b", rf"\1_{ending}", code)


def _limit_rounds(
    large: int, seconds: float, *, beside_torch: bool
) -> Iterator[tuple[str, str, Rounds | None]]:
    """Yield dtype, pass and rounds: of ours, of the limit, of PyTorch."""
    for dtype, operation in itertools.product(DTYPES[:2], TORCH):
        progress(f"limit: {dtype}, {operation}")
        names = dict(_arrays((large,), dtype, beside_torch))
        ours = PASSES[operation].format("")
        if _limit():
            source, target = ("dy", "dx") if operation == "backward" else ("x", "y")
            arrays = (names[name].ctypes.data for name in (source, target, "mask"))
            index, itemsize = list(TORCH).index(operation), names["x"].itemsize
            sizes = map(ctypes.c_size_t, (itemsize, *arrays, large))
            names["limit"] = functools.partial(_limit().run, index, *sizes)
            written = [target, "mask"] if operation == "forward with mask" else [target]
            results = []
            for code in (ours, "limit()"):
                for name in written:
                    names[name].fill(7)
                measure.compiled(code, names)(1)
                results.append(b"".join(names[name].tobytes() for name in written))
            if results[0] != results[1]:
                raise AssertionError(f"the limit's {operation} is not ours")
        others = (TORCH[operation],) if beside_torch else ()
        yield dtype, operation, _measured(names, seconds, ours, "limit()", *others)


@functools.cache
def _limit() -> Any:
    """Return ``limit.cpp``, compiled; None without AVX-512 or a compiler that can do it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or "avx512bw" not in measure.processor("flags"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        options = "-O2 -std=c++17 -march=x86-64-v4 -shared -fPIC -pthread -o"
        command = [*compiler.split(), str(LIMIT), *options.split(), str(library)]
        if subprocess.run(command, check=False).returncode:
            return None
        loaded = ctypes.CDLL(str(library))
    loaded.start(relu_xp.get_num_threads())
    return loaded


def limit(effort: Effort) -> list[Row]:
    """Compare with C++ loops that stream past the caches, and with PyTorch."""
    rows: list[Row] = []
    seconds = 2 * effort.seconds
    for dtype, operation, rounds in _limit_rounds(effort.large, seconds, beside_torch=True):
        ours, theirs = PASSES[operation].format(""), TORCH[operation]
        wanted = BACKWARD[dtype] if operation == "backward" else None
        for group, codes, at_least in (
            ("share of the limit, a C++ loop with streaming stores", (ours, "limit()"), SHARE),
            ("PyTorch's share of the same limit", (theirs, "limit()"), None),
            ("times faster than PyTorch", (ours, theirs), wanted),
        ):
            row = {"group": group, "case": operation, "dtype": dtype}
            rows.append(_row(row, rounds, *codes, at_least=at_least))
    return sorted(rows, key=lambda row: str(row["group"]))


def before(effort: Effort, folder: Path | None) -> list[Row]:
    """Compare with the kernels of an earlier commit, on large and on small arrays."""
    group = f"speed over that of commit {COMMIT}"
    if folder is None:
        return [{"group": group, "case": "all", "value": "not measured: no --against FOLDER"}]
    earlier = _earlier(folder)
    rows = []
    for dtype, (function, arguments) in itertools.product(DTYPES, FUNCTIONS.items()):
        names = _arrays((effort.large,), dtype) | {"relu_xp_before": earlier}
        for name in ("x", "dy", "y", "dx"):
            names[f"{name}_before"] = names[name]
        for name in ("relu_xp", "relu_xp_before"):
            ending = name.removeprefix("relu_xp")
            names[f"pullback{ending}"] = eval(f"{name}.relu_vjp(x{arguments})[1]", names)
        for operation, code in PASSES.items():
            progress(f"before: {dtype}, {function}, {operation}")
            ours = code.format(arguments)
            other = _renamed(ours, "before")
            row = {"group": group, "case": f"{function}, {operation}", "dtype": dtype}
            rounds = _measured(names, effort.seconds, ours, other)
            rows.append(_row(row, rounds, ours, other, at_least=BEFORE))
    for elements, ours, wanted in SMALL:
        names = _arrays((elements,), "float32")
        names = names | {"relu_xp_before": earlier, "layer_before": earlier.ReLU()}
        names |= {"x_before": names["x"], "dy_before": names["dy"]}
        other = _renamed(ours, "before")
        row = {"group": group, "case": f"{elements}: {ours}", "dtype": "float32"}
        rounds = _measured(names, effort.seconds, ours, other, rest=False)
        rows.append(_row(row, rounds, ours, other, at_least=wanted))
    return rows


@functools.cache
def _earlier(folder: Path) -> Any:
    """Import the package of another folder, beside the one that has its name."""

    def taken() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] == "relu_xp"]
        return {name: sys.modules.pop(name) for name in names}

    ours = taken()
    sys.path.insert(0, str(folder.resolve()))
    try:
        package = importlib.import_module("relu_xp")
        if Path(package.__file__ or "").resolve().parents[1] != folder.resolve():
            raise ImportError(f"relu_xp came from {package.__file__}, not from {folder}")
        if not (module("llvmlite") and module("ml_dtypes")):
            raise ImportError("--against needs llvmlite and ml_dtypes")
        progress("before: compiling")
        package.warmup()
        # What it imports when it is first needed must be there before the names are ours again.
        for dtype, arguments in itertools.product(DTYPES, FUNCTIONS.values()):
            number = module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
            names = {"x": np.ones(1 << 20, number), "relu_xp": package}
            eval(f"relu_xp.relu_vjp(x{arguments})[1](x)", names)
            eval(f"relu_xp.relu_backward(x, x{arguments})", names)
    finally:
        sys.path.remove(str(folder.resolve()))
        taken()
        sys.modules.update(ours)
    return package


def layouts(effort: Effort) -> list[Row]:
    """Compare views with arrays that are dense in C order."""
    rows = []
    group = "time of a view seen as NCHW over that of the same memory seen as NHWC"
    for function, arguments in FUNCTIONS.items():
        progress(f"layouts: {function}")
        names = dict(_arrays(NHWC, "float32"))
        for name in ("x", "dy", "y", "dx"):
            names[f"{name}_view"] = names[name].transpose(0, 3, 1, 2)
        for ending in ("", "_view"):
            names[f"pullback{ending}"] = eval(f"relu_xp.relu_vjp(x{ending}{arguments})[1]", names)
        for operation in ("forward", "backward"):
            other = PASSES[operation].format(arguments)
            ours = _renamed(other, "view").replace("relu_xp_view", "relu_xp")
            row = {"group": group, "case": f"{function}, {operation}", "dtype": "float32"}
            rounds = _measured(names, effort.seconds, ours, other)
            rows.append(_row(row, rounds, ours, other, at_most=NHWC_LIMIT))
    x = measure.normal((STRIDED,), np.float32, 0)[::2]
    names = _names({"x": x, "y": np.zeros(x.shape, x.dtype)})
    ours = PASSES["forward"].format("")
    row = {"group": "times faster than PyTorch", "case": "every second element, forward"}
    rounds = _measured(names, effort.seconds, ours, CLAMP)
    rows.append(_row(row | {"dtype": "float32"}, rounds, ours, CLAMP, at_least=1.0))
    return rows


def prelu(effort: Effort) -> list[Row]:
    """Compare PReLU, and its gradients by both arguments, with PyTorch."""
    x, dy = (measure.normal(PRELU, np.float32, seed) for seed in (0, 1))
    names = _names({"x": x, "dy": dy, "weight": np.full(PRELU[1], 0.25, np.float32)})
    if "torch" in names:
        names["slopes"] = names["tweight"].detach().requires_grad_()
    rows = []
    for case, codes in PRELU_CASES.items():
        progress(f"prelu: {case}")
        row = {"group": f"PReLU, {'x'.join(map(str, PRELU))}: times faster than PyTorch"}
        row |= {"case": case, "dtype": "float32"}
        rows.append(_row(row, _measured(names, 2 * effort.seconds, *codes), *codes, at_least=1.1))
    return rows


def versions(effort: Effort) -> list[Row]:
    """Compare two instruction sets by their speed over the limit's, in processes of their own."""
    group = f"speed with {VERSIONS[0]} over that with {VERSIONS[1]}"
    if instruction_set() != VERSIONS[1] or not _limit():
        return [{"group": group, "case": "all", "value": f"not measured: needs {VERSIONS[1]}"}]
    code = f"from bench import cpu; print(cpu.shares({effort.large}, {effort.seconds / 2}))"
    ratios: dict[str, list[float]] = {}
    for _ in range(max(1, effort.starts // 3)):
        lower, higher = (child(code, RELU_XP_CPU=version) for version in VERSIONS)
        for case, share in lower.items():
            ratios.setdefault(case, []).append(share / higher[case])
    rows = []
    for case, values in ratios.items():
        value = statistics.median(values)
        row = {"group": group, "case": case.rpartition(" ")[0], "dtype": case.rpartition(" ")[2]}
        rows.append(row | {"value": value} | verdict(value, at_least=0.9))
    return rows


def shares(large: int, seconds: float) -> str:
    """Return, as JSON, the speed of passes over the limit's."""
    found = {}
    for dtype, operation, rounds in _limit_rounds(large, seconds, beside_torch=False):
        if rounds:
            ours = PASSES[operation].format("")
            found[f"{operation} {dtype}"] = rounds.spread(truediv, "limit()", ours).median
    return json.dumps(found)


def imports(effort: Effort) -> list[Row]:
    """Time what ``import relu_xp`` adds to ``import numpy``."""
    times = []
    for start in range(effort.starts + 1):
        progress(f"import: {start} of {effort.starts}")
        times.append(1e3 * child(f"{IMPORT}; print(perf_counter() - start)"))
    value = statistics.median(times[1:])  # the first one fills the caches on the disk
    row = {"group": "import relu_xp after import numpy", "case": "milliseconds", "value": value}
    return [row | verdict(value, at_most=25.0)]


def sweep(effort: Effort) -> list[Row]:
    """Time forward, backward and both from 10 elements on, fresh results."""
    rows = []
    for (operation, ways), elements in itertools.product(SWEEP.items(), effort.sizes):
        progress(f"sweep: {operation}, {elements}")
        row: Row = {"group": f"float32, {operation}: microseconds", "operation": operation}
        row |= {"elements": elements}
        names = _arrays((elements,), "float32")
        rounds = _measured(names, effort.seconds / 2, *ways.values(), rest=elements > 1 << 15)
        assert rounds  # NumPy is always there
        known = {library: code for library, code in ways.items() if code in rounds}
        row |= {library: 1e6 * rounds.median(code) for library, code in known.items()}
        rows.append(row | {"codes": known})
    return rows


def instruction_set() -> str:
    """Return that of the compiled kernels, or why there are none."""
    return kernels.cpu.instruction_set if kernels.cpu else kernels.reason


COLUMNS = "case dtype wanted value reached ours_us other_us calm"
SECTIONS: dict[str, tuple[Callable[..., list[Row]], str]] = {
    "limit": (limit, COLUMNS),
    "before": (before, COLUMNS),
    "layouts": (layouts, COLUMNS),
    "prelu": (prelu, COLUMNS),
    "versions": (versions, COLUMNS),
    "import": (imports, COLUMNS),
    "sweep": (sweep, "elements relu_xp NumPy PyTorch autograd"),
}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller and shorter; writes nothing without --json"
    )
    parser.add_argument(
        "--section",
        nargs="+",
        choices=SECTIONS,
        metavar="NAME",
        help=f"only these of {', '.join(SECTIONS)}; the others' figures in FILE stay",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help=f"a checkout of commit {COMMIT}, for the section before; needs llvmlite",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to; default: bench/results/cpu.json"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="measure nothing, draw what FILE has"
    )
    options = parser.parse_args()

    path = options.json or (None if options.quick and not options.pictures else RESULTS)
    result: dict[str, Any] = {}
    if (options.section or options.pictures) and path and path.exists():
        result = json.loads(path.read_text())
    conditions = measure.conditions("torch", "ml_dtypes", "llvmlite") | {
        "threads": relu_xp.get_num_threads(),
        "instruction_set": instruction_set(),
        "quick": options.quick,
    }
    told = [f"{name} {it}" for name, it in conditions["versions"].items()]
    told = [f"{name}: {it}" for name, it in conditions.items() if name != "versions"] + told
    print(textwrap.fill(", ".join(told), 99))
    effort = QUICK if options.quick else FULL
    for name in () if options.pictures else options.section or SECTIONS:
        section, columns = SECTIONS[name]
        rows = section(effort, options.against) if section is before else section(effort)
        measure.print_table(rows, columns.split())
        result[name] = {"conditions": conditions, "rows": measure.rounded(rows)}
        measure.save(path, result)  # each, lest a later one's failure lose it
    if path and "sweep" in result:
        print(pictures.draw(result["sweep"]["rows"], path) or "no picture: needs matplotlib")


if __name__ == "__main__":
    main()
