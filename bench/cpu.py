"""A CPU: relu_xp, PyTorch, JAX, NumPy's spellings and others, interleaved in one process.

``python -m bench.cpu [--quick] [--section NAME ...] [--json FILE] [--pictures]``. ``WAYS`` has what
is timed, ``FIGURES``, ``SMALL`` and ``MEMORY`` what is wanted of it, ``SECTIONS`` the parts of a
run. A library that is not installed is reported as such.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import measure, pictures
from bench.measure import Names, Row, Way, child, module, progress, verdict

RESULTS = Path(__file__).with_name("results") / "cpu.json"

# In all of these x and dy are inputs, y and dx outputs, z and dz copies of the inputs that may be
# overwritten: they are made anew before each call, untimed. tx is x's memory as a tensor of
# PyTorch's, and so on; jx is JAX's copy. `_arrays` makes them and whatever else is named.

# A thread for each CPU copies a part: what the memory can do, and so a ceiling for all the others.
COPIES = (
    Way("copy", "np.copyto(y, x)"),
    Way("copy", "list(pool.map(np.copyto, y_parts, x_parts))"),
)

TORCH_BACKWARD = "aten.threshold_backward.grad_input(tdy, ty, 0, grad_input=tdx)"
TORCH_FORWARD = (  # all that take an output; the fastest counts
    Way("PyTorch", "torch.clamp_min(tx, 0, out=ty)"),
    Way("PyTorch", "aten.relu.out(tx, out=ty)"),
    Way("PyTorch", "aten.threshold.out(tx, 0, 0, out=ty)"),
)

WAYS = {
    "forward": (
        Way("relu_xp", "relu_xp.relu(x)"),
        Way("NumPy", "np.maximum(x, 0)"),
        Way("NumPy", "x * (x > 0)"),
        Way("NumPy", "(abs(x) + x) / 2"),
        Way("NumPy", "abs(x) * (x > 0)"),
        Way("NumPy", "np.where(x > 0, x, 0)"),
        Way("textbook", "mask = x <= 0; out = x.copy(); out[mask] = 0"),
        Way("numexpr", "numexpr.evaluate('where(x > 0, x, 0)')"),
        Way("thinc", "thinc_ops.relu(x)"),
        Way("PyTorch", "torch.relu(tx)"),
        Way("JAX", "jit_relu(jx).block_until_ready()"),
    ),
    "forward, out=": (
        Way("relu_xp", "relu_xp.relu(x, out=y)"),
        Way("NumPy", "np.maximum(x, 0, out=y)"),
        Way("numexpr", "numexpr.evaluate('where(x > 0, x, 0)', out=y)"),
        *TORCH_FORWARD,
    ),
    "forward, in place": (
        Way("relu_xp", "relu_xp.relu(z, out=z)"),
        Way("NumPy", "np.maximum(z, 0, z)"),
        Way("NumPy", "z[z < 0] = 0"),
        Way("thinc", "thinc_ops.relu(z, inplace=True)"),
        Way("PyTorch", "torch.relu_(tz)"),
    ),
    "forward + mask, out=": (  # PyTorch saves nothing: it keeps y
        Way("relu_xp", "relu_xp.relu_vjp(x, out=y)"),
        *TORCH_FORWARD,
    ),
    "backward": (
        Way("relu_xp", "pullback(dy)"),
        Way("NumPy", "np.where(x > 0, dy, 0)", 3),
        Way("NumPy", "dy * (x > 0)", 3),
        Way("PyTorch", "aten.threshold_backward(tdy, ty, 0)", 3),
        Way("JAX", "jit_backward(jx, jdy).block_until_ready()", 3),
    ),
    "backward, out=": (
        Way("relu_xp", "pullback(dy, out=dx)"),
        Way("NumPy", "np.where(x > 0, dy, 0)", 3),
        Way("PyTorch", TORCH_BACKWARD, 3),
    ),
    "backward, in place": (
        Way("relu_xp", "pullback(dz, out=dz)"),
        Way("textbook", "dz[mask] = 0"),
        Way("thinc", "thinc_ops.backprop_relu(dz, y, inplace=True)", 3),
        Way("PyTorch", "aten.threshold_backward.grad_input(tdz, ty, 0, grad_input=tdz)", 3),
    ),
    "backward from x": (Way("relu_xp", "relu_xp.relu_backward(dy, x)", 3),),
    "backward from x, out=": (
        Way("relu_xp", "relu_xp.relu_backward(dy, x, out=dx)", 3),
        Way("NumPy", "np.where(x > 0, dy, 0)", 3),
        Way("PyTorch", "aten.threshold_backward.grad_input(tdy, tx, 0, grad_input=tdx)", 3),
    ),
    "both": (
        Way("relu_xp", "layer.forward(x); layer.backward(dy)", 4),
        Way("NumPy", "np.maximum(x, 0); np.where(x > 0, dy, 0)", 5),
        Way("textbook", "m = x <= 0; out = x.copy(); out[m] = 0; dz[m] = 0", 4),
        Way("PyTorch", "out = torch.relu(tx); aten.threshold_backward(tdy, out, 0)", 5),
        Way("autograd", "leaf.grad = None; out = torch.relu(leaf); out.backward(tdy)", 5),
        Way("JAX", "jax.block_until_ready(jit_both(jx, jdy))", 4),
    ),
    "both, out=": (
        Way("relu_xp", "layer.forward(x, out=y); layer.backward(dy, out=dx)", 4),
        Way("NumPy", "np.maximum(x, 0, out=y); np.where(x > 0, dy, 0)", 5),
        *(Way("PyTorch", f"{way.code}; {TORCH_BACKWARD}", 5) for way in TORCH_FORWARD),
    ),
    "both, in place": (
        Way("relu_xp", "inplace.forward(z); inplace.backward(dz)", 4),
        Way(
            "PyTorch",
            "torch.relu_(tz); aten.threshold_backward.grad_input(tdz, tz, 0, grad_input=tdz)",
            5,
        ),
    ),
    "leaky forward, out=": (
        Way("relu_xp", "relu_xp.leaky_relu(x, out=y)"),
        Way("PyTorch", "aten.leaky_relu.out(tx, 0.01, out=ty)"),
    ),
    "leaky backward, out=": (
        Way("relu_xp", "leaky_pullback(dy, out=dx)"),
        Way(
            "PyTorch",
            "aten.leaky_relu_backward.grad_input(tdy, tx, 0.01, False, grad_input=tdx)",
            3,
        ),
    ),
}

FORUM = {
    "forward": ("forward", "forward, out=", "forward, in place"),
    "backward": ("backward", "backward, in place", "backward from x", "backward from x, out="),
    "forward + backward": ("both", "both, in place"),
}


class Figure(NamedTuple):
    """How many times faster than another library an operation is to be, per dtype."""

    operation: str
    wanted: Mapping[str, float | None]
    against: str = "PyTorch"


DTYPES = ("float32", "float64", "float16", "bfloat16")


def _each(*wanted: float | None) -> dict[str, float | None]:
    return dict(zip(DTYPES, wanted, strict=False))  # those left away are not measured


FIGURES = (
    Figure("forward, out=", _each(1.55, 1.55, 1.5, 1.6)),
    Figure("forward + mask, out=", _each(1.25, 1.25, 1.25, 1.25)),
    Figure("backward, out=", _each(1.9, 2.0, 2.0, 2.1)),
    Figure("both, out=", _each(1.7, 1.7, 1.7, 1.8)),
    Figure("leaky forward, out=", _each(1.5, 1.5, 1.4, None)),
    Figure("leaky backward, out=", _each(1.9, 1.9, 1.8, None)),
    Figure("backward from x, out=", _each(1.4, 1.4, 1.4, None)),
    Figure("both", _each(1.25), "autograd"),
    Figure("both, in place", _each(1.15)),
    Figure("forward, in place", _each(1.0)),
)

NUMPY_FIGURES = (  # of relu_xp without its compiled kernels
    Figure("backward, out=", _each(5.0), "NumPy"),
    Figure("backward from x, out=", _each(5.0), "NumPy"),
    Figure("forward, out=", _each(None), "NumPy"),
)

SWEEP = ("forward", "backward", "both", "forward, out=", "backward, out=", "both, out=")
SIZES = (10, 100, 1000, 6400, 10_000, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
LARGE_SIZES = (4_000_000, 16_000_000, 100_000_000)
SWEEP_LIMIT = 1.3
SWEEP_RIVALS = ("NumPy", "PyTorch", "autograd")
SWEEP_LIBRARIES = ("relu_xp", *SWEEP_RIVALS, "JAX")
ONE_THREAD = 1 << 15  # elements; with so few, no library leaves threads spinning


def _microseconds(ours: float, theirs: float = 0.0) -> float:
    return 1e6 * (ours - theirs)


# Case, shape, operation, libraries, what is made of their seconds, what is wanted at most.
LAYERS = ("relu_xp", "autograd")
SMALL: tuple[
    tuple[str, tuple[int, ...], str, tuple[str, ...], Callable[..., float], float], ...
] = (
    ("relu less np.maximum, us", (10,), "forward", ("relu_xp", "NumPy"), _microseconds, 0.15),
    ("layer, us", (10,), "both", ("relu_xp",), _microseconds, 4.0),
    ("relu / torch.relu", (64, 100), "forward", ("relu_xp", "PyTorch"), truediv, 1.0),
    ("layer / autograd", (64, 100), "both", LAYERS, truediv, 0.3),
)

# Case, ours, PyTorch's, what is wanted at most of their ratio. The inputs are there before and
# after; `hidden` is a tensor that autograd lets one overwrite, being no leaf.
MEMORY: tuple[tuple[str, Way, Way, float | None], ...] = (
    (
        "fresh, y let go before backward",
        Way("relu_xp", "layer.forward(x); layer.backward(dy)"),
        Way("PyTorch", "torch.relu(leaf).backward(tdy)"),
        0.5,
    ),
    (
        "fresh, y kept",
        Way("relu_xp", "out = layer.forward(x); layer.backward(dy)"),
        Way("PyTorch", "out = torch.relu(leaf); out.backward(tdy)"),
        None,
    ),
    (
        "in place",
        Way("relu_xp", "inplace.forward(z); inplace.backward(dz)"),
        Way("PyTorch", "torch.relu_(hidden).backward(tdy)"),
        0.5,
    ),
)

COLD_START = {  # library: imports, what its arrays take, the first call
    "relu_xp": ("import relu_xp, numpy", "", "relu_xp.relu(x, out=y)"),
    "PyTorch": (
        "import torch",
        "tx, ty = torch.from_numpy(x), torch.from_numpy(y)",
        "torch.clamp_min(tx, 0, out=ty)",
    ),
}


def _torch_names(torch: Any, arrays: Names) -> Names:
    torch.set_num_threads(measure.cpus())
    names = {}
    for name in ("x", "dy", "y", "dx", "z", "dz"):
        array = arrays[name]
        if array.dtype.name == "bfloat16":
            names[f"t{name}"] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            names[f"t{name}"] = torch.from_numpy(array)
    leaf = names["tx"].detach().requires_grad_()
    return names | {"torch": torch, "aten": torch.ops.aten, "leaf": leaf}


def _jax_names(jax: Any, arrays: Names) -> Names:
    jax.config.update("jax_enable_x64", True)

    def both(x: Any, dy: Any) -> tuple[Any, Any]:
        y, pullback = jax.vjp(jax.nn.relu, x)
        return y, pullback(dy)[0]

    return {
        "jax": jax,
        "jx": jax.numpy.asarray(arrays["x"]),
        "jdy": jax.numpy.asarray(arrays["dy"]),
        "jit_relu": jax.jit(jax.nn.relu),
        "jit_backward": jax.jit(lambda x, dy: both(x, dy)[1]),
        "jit_both": jax.jit(both),
    }


def _numexpr_names(numexpr: Any, arrays: Names) -> Names:
    numexpr.set_num_threads(measure.cpus())
    return {"numexpr": numexpr}


def _thinc_names(thinc: Any, arrays: Names) -> Names:
    return {"thinc_ops": thinc.NumpyOps()}


REFILLED = {"z": ("z", "x"), "tz": ("z", "x"), "dz": ("dz", "dy"), "tdz": ("dz", "dy")}

LIBRARIES = {
    "PyTorch": ("torch", _torch_names),
    "autograd": ("torch", _torch_names),
    "JAX": ("jax", _jax_names),
    "numexpr": ("numexpr", _numexpr_names),
    "thinc": ("thinc.api", _thinc_names),
}


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(measure.cpus())


def _installed(way: Way) -> bool:
    return way.library not in LIBRARIES or module(LIBRARIES[way.library][0]) is not None


def _libraries(*ways: Way) -> frozenset[str]:
    return frozenset(LIBRARIES).intersection(way.library for way in ways)


@functools.lru_cache(maxsize=1)
def _arrays(shape: tuple[int, ...], dtype: str, libraries: frozenset[str]) -> Names:
    """Return what the ways find."""
    number = module("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x, dy = measure.normal(shape, number, 0), measure.normal(shape, number, 1)
    y, dx, z, dz = (np.empty(shape, number) for _ in range(4))
    names: Names = {"np": np, "relu_xp": relu_xp}
    names |= {"x": x, "dy": dy, "y": relu_xp.relu(x, out=y), "dx": dx, "z": z, "dz": dz}
    names |= {"layer": relu_xp.ReLU(), "inplace": relu_xp.ReLU(inplace=True)}
    names |= {"pullback": relu_xp.relu_vjp(x)[1], "mask": x <= 0}
    names |= {"leaky_pullback": relu_xp.relu_vjp(x, negative_slope=0.01)[1]}
    names |= {"pool": _pool(), "x_parts": np.array_split(x.reshape(-1), measure.cpus())}
    names |= {"y_parts": np.array_split(y.reshape(-1), measure.cpus())}
    for library in libraries:
        name, more_names = LIBRARIES[library]
        names |= more_names(module(name), names)
    return names


def _measured(
    ways: Iterable[Way], shape: tuple[int, ...], dtype: str, seconds: float, rest: bool = True
) -> measure.Rounds:
    """Return the rounds of some ways, by code, at so many seconds for each of them."""
    ways = [way for way in dict.fromkeys(ways) if _installed(way)]
    names = _arrays(shape, dtype, _libraries(*ways))
    candidates = {way.code: measure.compiled(way, names, REFILLED) for way in ways}
    return measure.alternating(candidates, seconds=seconds * len(candidates), rest=rest)


def _fastest(rounds: measure.Rounds, ways: Iterable[Way]) -> Way:
    return min(ways, key=lambda way: rounds.median(way.code))


def _share(way: Way, rounds: measure.Rounds) -> float:
    """Return a way's bytes a second over those of the fastest copy."""
    copy = _fastest(rounds, COPIES)
    return way.arrays / copy.arrays * rounds.median(copy.code) / rounds.median(way.code)


class Effort(NamedTuple):
    """How much to measure."""

    side: int  # of the forum's square
    large: int  # elements
    sizes: tuple[int, ...]
    seconds: float  # for each candidate
    starts: int  # of a process


FULL = Effort(5000, 25_000_000, SIZES + LARGE_SIZES, 1.6, 7)
QUICK = Effort(1581, 2_500_000, SIZES[::2] + SIZES[-1:], 0.06, 1)


def forum(effort: Effort) -> list[Row]:
    """Time every spelling there is."""
    rows = []
    shape = (effort.side, effort.side)
    for dtype, (title, operations) in itertools.product(("float64", "float32"), FORUM.items()):
        group = f"{effort.side} x {effort.side} {dtype}, {title}"
        progress(f"forum: {group}")
        ways = dict.fromkeys(way for operation in operations for way in WAYS[operation])
        ways |= dict.fromkeys(COPIES)
        rounds = _measured(ways, shape, dtype, effort.seconds)
        for way in ways:
            row: Row = {"group": group, "library": way.library, "code": way.code}
            if _installed(way):
                time_taken = rounds.spread(lambda seconds: 1e3 * seconds, way.code)
                row |= time_taken.cells("ms") | {"share": _share(way, rounds)}
            else:
                row["ms"] = "not installed"
            rows.append(row)
    return rows


def figures(effort: Effort) -> list[Row]:
    """Compare with PyTorch, in the arrays of a large network."""
    return [
        _faster(figure, effort, dtype, "PyTorch")
        for dtype in DTYPES
        for figure in FIGURES
        if dtype in figure.wanted
    ]


def numpy_alone(effort: Effort) -> list[Row]:
    """Compare with NumPy, where the compiled kernels are switched off."""
    progress("numpy: in a process of its own")
    code = f"import json; from bench import cpu; rows = cpu.without_kernels(cpu.{effort})"
    rows: list[Row] = child(f"{code}; print(json.dumps(rows))", RELU_XP_JIT="0")
    return rows


def without_kernels(effort: Effort) -> list[Row]:
    """Do `numpy_alone`'s work."""
    return [
        _faster(figure, effort, "float32", "NumPy, without compiled kernels")
        for figure in NUMPY_FIGURES
    ]


def _faster(figure: Figure, effort: Effort, dtype: str, against: str) -> Row:
    """Return how many times faster than the fastest of another library's ways ours is."""
    group = f"{effort.large} {dtype}: times faster than {against}"
    progress(f"{group}: {figure.operation}")
    row: Row = {"group": group, "dtype": dtype, "operation": figure.operation}
    ours, *theirs = WAYS[figure.operation]
    theirs = [way for way in theirs if way.library == figure.against]
    if not all(map(_installed, theirs)) or (dtype == "bfloat16" and not module("ml_dtypes")):
        return row | {"against": "not installed"}
    rounds = _measured((ours, *theirs, *COPIES), (effort.large,), dtype, effort.seconds)
    best = _fastest(rounds, theirs)
    faster = rounds.spread(truediv, best.code, ours.code)
    row |= verdict(faster.median, at_least=figure.wanted[dtype]) | faster.cells("faster")
    row |= {"ours_ms": 1e3 * rounds.median(ours.code), "share": _share(ours, rounds)}
    row |= {"their_ms": 1e3 * rounds.median(best.code), "their_share": _share(best, rounds)}
    row |= {"ours": ours.code, "theirs": best.code}
    function = re.findall(r"(?:np|torch|aten)\.(\w+)", best.code)[0]
    return row | {"against": "autograd" if best.library == "autograd" else function}


def sweep(effort: Effort) -> list[Row]:
    """Time forward, backward and both from 10 elements on."""
    rows = []
    for elements, operation in itertools.product(effort.sizes, SWEEP):
        progress(f"sweep: {elements} elements, {operation}")
        ways = {library: _first(operation, library) for library in SWEEP_LIBRARIES}
        shown = {name: way for name, way in ways.items() if way and _installed(way)}
        shown["copy"] = COPIES[0]
        rest = elements > ONE_THREAD
        rounds = _measured(shown.values(), (elements,), "float32", effort.seconds / 4, rest)
        best = _fastest(rounds, [shown[name] for name in SWEEP_RIVALS if name in shown])
        ratio = rounds.spread(truediv, shown["relu_xp"].code, best.code)
        row: Row = {"group": f"float32, {operation}: microseconds", "operation": operation}
        row |= {"elements": elements, "best": best.code}
        row |= {name: 1e6 * rounds.median(way.code) for name, way in shown.items()}
        row |= ratio.cells("ratio") | verdict(ratio.median, at_most=SWEEP_LIMIT)
        rows.append(row)
    return sorted(rows, key=lambda row: SWEEP.index(row["operation"]))


def _first(operation: str, library: str) -> Way | None:
    return next((way for way in WAYS[operation] if way.library == library), None)


def small(effort: Effort) -> list[Row]:
    """Time calls of small arrays."""
    rows = []
    for case, shape, operation, libraries, figure, limit in SMALL:
        progress(f"small: {case}")
        row: Row = {"group": "small arrays, float32", "case": case, "elements": math.prod(shape)}
        ways = [way for library in libraries if (way := _first(operation, library))]
        if all(map(_installed, ways)):
            rounds = _measured(ways, shape, "float32", effort.seconds, rest=False)
            value = rounds.spread(figure, *(way.code for way in ways))
            row |= value.cells("value") | verdict(value.median, at_most=limit)
            row |= {"us": {way.code: 1e6 * rounds.median(way.code) for way in ways}}
        else:
            row["value"] = "not installed"
        rows.append(row)
    return rows


def memory(effort: Effort) -> list[Row]:
    """Compare what a round trip allocates, each in a fresh process."""
    group = f"{effort.large} float32, MB: growth of the peak in a round trip"
    x = measure.normal((effort.large,), np.float32, 0)
    layer = relu_xp.ReLU()
    layer.forward(x)
    rows = [_grew("held until backward; x itself", layer.saved_nbytes, x.nbytes, 1 / 32)]
    for case, *ways, limit in MEMORY:
        progress(f"memory: {case}")
        if all(map(_installed, ways)):
            code = "from bench import cpu; print(cpu.grown(cpu.{}, {}))"
            # glibc is to give each array pages of its own: what it keeps would hide what is new.
            ours, theirs = (
                child(code.format(way, x.size), MALLOC_MMAP_THRESHOLD_="65536") for way in ways
            )
            rows.append(_grew(case, ours, theirs, limit))
        else:
            rows.append({"case": case, "PyTorch": "not installed"})
    return [{"group": group} | row for row in rows]


def _grew(case: str, ours: int, theirs: int, limit: float | None) -> Row:
    row: Row = {"case": case, "relu_xp": 1e-6 * ours, "PyTorch": 1e-6 * theirs}
    return row | {"ratio": ours / theirs} | verdict(ours / theirs, at_most=limit)


def grown(way: Way, size: int) -> int:
    """Return by how much a way makes memory grow, after a smaller run that loads what it needs."""
    growth = 0
    for elements in (1_000_000, size):
        names = _arrays((elements,), "float32", _libraries(way))
        if "leaf" in names:
            names["hidden"] = names["leaf"].clone()
        candidate = measure.compiled(way, names, REFILLED)
        if candidate.refill:
            candidate.refill()
        growth = measure.peak_growth(functools.partial(candidate.run, 1))
    return growth


def cold_start(effort: Effort) -> list[Row]:
    """Time a fresh process up to the end of its first call."""
    script = """
from time import perf_counter
started = perf_counter()
{}
imported = perf_counter()
import numpy
x = numpy.random.default_rng(0).standard_normal({}, numpy.float32)
y = numpy.ones_like(x)
{}
begun = perf_counter()
{}
print([imported - started, perf_counter() - begun])
"""
    group = f"cold start, {effort.large} float32: seconds"
    seconds: dict[str, list[tuple[float, float]]] = {library: [] for library in COLD_START}
    for start in range(effort.starts + 1):
        progress(f"coldstart: {start} of {effort.starts}")
        for library, (imports, arrays, call) in COLD_START.items():
            if _installed(Way(library, call)):
                took = child(script.format(imports, effort.large, arrays, call))
                if start:  # the first one fills the caches on the disk
                    seconds[library].append(took)
    rows: list[Row] = []
    for library, (_, _, call) in COLD_START.items():
        row: Row = {"group": group, "library": library, "call": call}
        for name, times in (
            ("import", [imported for imported, _ in seconds[library]]),
            ("first_call", [first for _, first in seconds[library]]),
            ("sum", [imported + first for imported, first in seconds[library]]),
        ):
            row[name] = statistics.median(times) if times else "not installed"
        rows.append(row)
    return rows


PACKAGES = ("torch", "jax", "numexpr", "thinc", "ml_dtypes", "llvmlite")


class Section(NamedTuple):
    """A part of the run, and the columns of its table."""

    run: Callable[[Effort], list[Row]]
    columns: str


FASTER = "operation wanted faster reached ours_ms their_ms share against calm"
SECTIONS = {
    "forum": Section(forum, "library code ms share calm"),
    "figures": Section(figures, FASTER),
    "sweep": Section(
        sweep, "elements relu_xp NumPy PyTorch autograd JAX copy ratio wanted reached calm"
    ),
    "small": Section(small, "case elements wanted value reached calm"),
    "memory": Section(memory, "case relu_xp PyTorch ratio wanted reached"),
    "coldstart": Section(cold_start, "library call import first_call sum"),
    "numpy": Section(numpy_alone, FASTER),
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
    relu_xp.warmup()  # the cold start is a section of its own
    conditions = measure.conditions(*PACKAGES)
    versions = ", ".join(f"{package} {it}" for package, it in conditions["versions"].items())
    print(textwrap.fill(f"{conditions['processor']}, {conditions['cpus']} CPUs; {versions}", 99))
    for name in () if options.pictures else options.section or SECTIONS:
        section = SECTIONS[name]
        rows = section.run(QUICK if options.quick else FULL)
        measure.print_table(rows, section.columns.split())
        result[name] = {
            "conditions": conditions | {"quick": options.quick},
            "rows": measure.rounded(rows),
        }
        measure.save(path, result)  # each, lest a later one's failure lose it
    if path:
        print(*(pictures.draw(result, path) or ("no pictures: matplotlib is not installed",)))


if __name__ == "__main__":
    main()
