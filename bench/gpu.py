"""A GPU: relu_xp, PyTorch, CuPy's spellings and others, interleaved in one process.

``python -m bench.gpu [--quick] [--tune] [--json FILE] [--plot FILE] [--pictures]``. ``PASSES`` has
what is timed, ``TARGETS`` what is wanted of it, ``SECTIONS`` the parts of a run. Without a CUDA
device it says so, and writes nothing.

Times are the device's, between two events, over arrays that take turns: when one is used again,
more than the L2 holds has passed since. Where a call takes the host longer than the device, that is
what is seen; the section ``graphs`` leaves it out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import measure, pictures
from bench.measure import Names, Rounds, Row, module, progress, verdict
from relu_xp.activation import Activation

RESULTS = Path(__file__).with_name("results") / "gpu.json"

Run = Callable[[int], object]  # makes that many calls

DTYPES = ("float16", "bfloat16", "float32", "float64")
SLOPE = 0.01
SMALL_SHAPES = ((4096,), (64, 64))
GRAPH_SIZES = (1 << 12, 1 << 20)
SAMPLE = 1 << 16  # elements at either end that are compared with NumPy's
DRAWN = 1 << 22  # random numbers; larger arrays repeat them
BATCH = 100  # calls of which the host's time is taken before the device may catch up


class Way(NamedTuple):
    """One way to do it, as Python text: what is shown is what ran."""

    library: str
    code: str
    arrays: int = 2  # that must be read or written; temporaries are not counted
    masks: int = 0  # likewise, of a bit an element

    def nbytes(self, dtype: str, elements: int) -> float:
        """Return the bytes that must be moved."""
        return elements * (self.arrays * _number(dtype).itemsize + self.masks / 8)


class Pass(NamedTuple):
    """What is to be done, and the ways to do it, ours first."""

    ways: tuple[Way, ...] = ()
    outputs: str = ""  # a way is to write those of them that it names
    slope: float = 0.0


# In all of these x and dy are inputs, y and dx outputs; y is relu(x) from the start. tx is x's
# memory as a tensor of PyTorch's, and so on; the pullbacks keep their mask in `mask`. `_sets` and
# `_shared` make these names.

COPY = Way("copy", "copy(dx, x)")
TORCH_BACKWARD = "aten.threshold_backward.grad_input(tdy, ty, 0, grad_input=tdx)"
TORCH_FORWARD = (  # all that take an output; the fastest counts
    Way("PyTorch", "torch.clamp_min(tx, 0, out=ty)"),
    Way("PyTorch", "aten.relu.out(tx, out=ty)"),
    Way("PyTorch", "aten.threshold.out(tx, 0, 0, out=ty)"),
)
AUTOGRAD = "leaf.grad = None; out = torch.relu(leaf); out.backward(tdy)"

PASSES = {
    "copy": Pass((COPY,)),
    "forward": Pass(
        (
            Way("relu_xp", "relu_xp.relu(x, out=y)"),
            Way("CuPy", "cupy.maximum(x, 0, out=y)"),
            *TORCH_FORWARD,
            Way("Chainer", "chainer_forward(x, y)"),
            Way("thinc", "thinc_forward(x, y)"),
        ),
        "y",
    ),
    "forward + mask": Pass(  # PyTorch saves nothing: it keeps y
        (Way("relu_xp", "relu_xp.relu_vjp(x, out=y, mask=mask)", 2, 1), *TORCH_FORWARD), "y mask"
    ),
    "backward": Pass(
        (
            Way("relu_xp", "pullback(dy, out=dx)", 2, 1),
            Way("CuPy", "dy * (x > 0)", 3),
            Way("CuPy", "cupy.multiply(dy, x > 0, out=dx)", 3),
            Way("CuPy", "cupy.where(x > 0, dy, 0)", 3),
            Way("PyTorch", TORCH_BACKWARD, 3),
            Way("Chainer", "chainer_backward(y, dy, dx)", 3),
            Way("thinc", "thinc_backward(x, dy, dx)", 3),
        ),
        "dx",
    ),
    "both": Pass(
        (
            Way("relu_xp", "relu_xp.relu_vjp(x, out=y, mask=mask)[1](dy, out=dx)", 4, 2),
            Way("relu_xp", "layer.forward(x); layer.backward(dy)", 4, 2),
            Way("CuPy", "cupy.maximum(x, 0, out=y); dy * (x > 0)", 5),
            *(Way("PyTorch", f"{way.code}; {TORCH_BACKWARD}", 5) for way in TORCH_FORWARD),
            Way("autograd", AUTOGRAD, 5),
            Way("compiled", AUTOGRAD.replace("torch.relu", "compiled_relu"), 5),
            Way("Chainer", "chainer_forward(x, y); chainer_backward(y, dy, dx)", 5),
        ),
        "y mask dx",
    ),
    "backward from x": Pass(
        (
            Way("relu_xp", "relu_xp.relu_backward(dy, x, out=dx)", 3),
            Way("PyTorch", TORCH_BACKWARD.replace("ty", "tx"), 3),
        ),
        "dx",
    ),
    "leaky forward": Pass(
        (
            Way("relu_xp", f"relu_xp.leaky_relu(x, {SLOPE}, out=y)"),
            Way("CuPy", f"cupy.where(x > 0, x, {SLOPE} * x)"),
            Way("PyTorch", f"aten.leaky_relu.out(tx, {SLOPE}, out=ty)"),
        ),
        "y",
        SLOPE,
    ),
    "leaky backward": Pass(
        (
            Way("relu_xp", "leaky_pullback(dy, out=dx)", 2, 1),
            Way("CuPy", f"cupy.where(x > 0, dy, {SLOPE} * dy)", 3),
            Way(
                "PyTorch",
                f"aten.leaky_relu_backward.grad_input(tdy, tx, {SLOPE}, False, grad_input=tdx)",
                3,
            ),
        ),
        "dx",
        SLOPE,
    ),
}
TORCH = ("PyTorch", "autograd", "compiled")
RIVALS = (*TORCH, "CuPy", "Chainer", "thinc")

HOST = (
    Way("relu_xp", "relu_xp.relu(x)"),
    Way("relu_xp", "relu_xp.relu(x, out=y)"),
    Way("relu_xp", "relu_xp.relu_vjp(x)"),
    Way("relu_xp", "relu_xp.relu_vjp(x, out=y, mask=mask)"),
    Way("relu_xp", "pullback(dy)"),
    Way("relu_xp", "pullback(dy, out=dx)"),
    Way("relu_xp", "layer.forward(x); layer.backward(dy)"),
    Way("CuPy", "cupy.maximum(x, 0)"),
    Way("CuPy", "cupy.maximum(x, 0, out=y)"),
    Way("CuPy", "dy * (x > 0)"),
    Way("PyTorch", "torch.relu(tx)"),
    Way("autograd", AUTOGRAD),
)
HOST_PAIRS = {  # the first is to take no longer
    "relu_xp.relu(x)": "cupy.maximum(x, 0)",
    "relu_xp.relu(x, out=y)": "cupy.maximum(x, 0, out=y)",
}

STEPS = (PASSES["both"].ways[0], Way("PyTorch", f"{TORCH_FORWARD[0].code}; {TORCH_BACKWARD}"))

CHUNKS = (1, 2, 4, 8)  # of 16 bytes, a thread
TUNED = {  # passes of relu_xp.backends.cupy: operands, outputs, arrays and masks that are moved
    "forward": ("x, y", "y", 2, 0),
    "forward_bits": ("x, y, mask", "y mask", 2, 1),
    "backward_bits": ("dy, mask, dx", "dx", 2, 1),
}


class Target(NamedTuple):
    """What our first way of a pass is to reach, at 2^27 elements."""

    title: str
    passed: str
    cell: str  # of the way's row
    wanted: float  # at least
    dtypes: tuple[str, ...] = DTYPES


TARGET_SIZE = 1 << 27
TARGETS = (
    Target("forward: share of the copy", "forward", "share", 0.95),
    Target("backward: over threshold_backward", "backward", "over_PyTorch", 1.4),
    Target("both: over PyTorch", "both", "over_PyTorch", 1.2),
    Target("both: over maximum, dy * (x > 0)", "both", "over_CuPy", 2.5, DTYPES[:2]),
    Target("both: over maximum, dy * (x > 0)", "both", "over_CuPy", 1.6, ("float32",)),
)


class Effort(NamedTuple):
    """How much to measure."""

    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]  # elements
    rounds: int
    sample: float  # seconds that a timing takes at least, about
    host_calls: int  # in a timing of the host


FULL = Effort(DTYPES[::-1], tuple(1 << k for k in (28, 27, 24, 20, 16, 12)), 20, 2e-3, 2000)
QUICK = Effort(("float32", "bfloat16"), (1 << 20, 1 << 16, 1 << 12), 3, 5e-4, 200)


class Card:
    """The device, and all that it takes one to do; the tests have another, made of NumPy."""

    def __init__(self) -> None:
        self.xp = module("cupy")
        self._runtime = self.xp.cuda.runtime
        self.properties = self._runtime.getDeviceProperties(self._runtime.getDevice())
        self.l2 = self.properties["l2CacheSize"]
        torch = module("torch")
        self.torch: Any = torch if torch and torch.cuda.is_available() else None
        self.full = (MemoryError, *((torch.cuda.OutOfMemoryError,) if self.torch else ()))
        self._start, self._end = self.xp.cuda.Event(), self.xp.cuda.Event()
        self._side = self.xp.cuda.Stream(non_blocking=True)

    def conditions(self) -> dict[str, Any]:
        """Return what a figure depends on: bytes, kHz, and CUDA's numbers for its versions."""
        name = self.properties["name"]
        attributes = (
            "major minor multiProcessorCount clockRate memoryClockRate memoryBusWidth "
            "totalGlobalMem l2CacheSize"
        )
        return {
            "device": name.decode() if isinstance(name, bytes) else name,
            "attributes": {key: self.properties.get(key) for key in attributes.split()},
            "driver": self._runtime.driverGetVersion(),
            "runtime": self._runtime.runtimeGetVersion(),
        }

    def free(self) -> int:
        """Return the bytes that are free, when the pools have given back what they keep."""
        gc.collect()
        self.xp.get_default_memory_pool().free_all_blocks()
        if self.torch:
            self.torch.cuda.empty_cache()
        free: int = self._runtime.memGetInfo()[0]
        return free

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array with cudaMemcpyAsync."""
        target.data.copy_from_device_async(source.data, source.nbytes)

    def poison(self, array: Any) -> None:
        """Fill an array with bits of 1, which are NaN."""
        array.data.memset_async(0xFF, array.nbytes)

    def numpy(self, array: Any) -> Any:
        """Return a copy for NumPy."""
        return self.xp.asnumpy(array)

    def synchronize(self) -> None:
        """Wait for the device, and hear of what went wrong."""
        self._runtime.deviceSynchronize()

    def seconds(self, run: Run, calls: int) -> float:
        """Return the device's seconds a call, of several in a row."""
        run(1)  # meanwhile the host gets ahead: the device is not to wait for the first call
        self._start.record()
        run(calls)
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self.xp.cuda.get_elapsed_time(self._start, self._end)
        return 1e-3 * milliseconds / calls

    def host_seconds(self, run: Run, calls: int) -> float:
        """Return the host's seconds a call, in batches: a full queue would make it wait."""
        took = 0.0
        for _ in range(calls // BATCH):
            self.synchronize()
            start = time.perf_counter()
            run(BATCH)
            took += time.perf_counter() - start
        return took / (calls // BATCH * BATCH)

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run both libraries on a stream that can be captured."""
        self.synchronize()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._side)
            if self.torch:
                stream = self.torch.cuda.ExternalStream(self._side.ptr)
                stack.enter_context(self.torch.cuda.stream(stream))
            yield
        self.synchronize()

    def captured(self, library: str, run: Run) -> Run:
        """Return a call as a CUDA graph that is replayed."""
        if library in TORCH:
            graph = self.torch.cuda.CUDAGraph()
            with self.torch.cuda.graph(graph):
                run(1)
            replay = graph.replay
        else:
            self._side.begin_capture()
            try:
                run(1)
            finally:  # also where the call failed: the stream is needed again
                graph = self._side.end_capture()
            replay = graph.launch

        def replays(calls: int) -> None:
            for _ in itertools.repeat(None, calls):
                replay()

        return replays

    def compiled_relu(self) -> Any:
        """Return PyTorch's relu, compiled for the one shape and dtype that it will see."""
        torch = self.torch

        @functools.cache
        def compiled() -> Any:  # at the first call, which may be refused
            torch.compiler.reset()  # it gives up when it has seen eight
            return torch.compile(lambda x: torch.relu(x), dynamic=False)

        return lambda x: compiled()(x)

    def kernels(self, dtype: str) -> Names:
        """Return kernels in the manner of other projects."""
        # Chainer's relu_bwd (chainer/functions/activation/relu.py), from the saved output. Its
        # forward is cupy.maximum; here it is a kernel likewise.
        elementwise = self.xp.ElementwiseKernel
        backward = "gx = y > 0 ? gy : (T)0"
        names = {
            "chainer_forward": elementwise("T x", "T y", "y = max(x, (T)0)", "relu_fwd"),
            "chainer_backward": elementwise("T y, T gy", "T gx", backward, "relu_bwd"),
        }
        # thinc's relu is X * (X > 0), and its gradient dY * (Y > 0); here each is a kernel as it
        # has them for clipped_linear (thinc/backends/_custom_kernels.py): a grid-stride loop, an
        # element at a time, in 128 blocks of 128 threads.
        for name, arrays, statement in (
            ("forward", "const T* x, T* y", "y[i] = x[i] * T(x[i] > T(0))"),
            ("backward", "const T* x, const T* dy, T* dx", "dx[i] = dy[i] * T(x[i] > T(0))"),
        ):
            source = _source(dtype, "", arrays, f"{_STRIDE.format('n')} {statement};")
            names[f"thinc_{name}"] = self.raw(source, blocks=128)
        return names

    def raw(self, source: str, blocks: int, threads: int = 0) -> Callable[..., None]:
        """Return a kernel of `_source`, to be called with its arrays."""
        kernel = self.xp.RawKernel(source, "run")

        def launch(*arrays: Any) -> None:
            numbers = np.uint64(arrays[0].size), np.uint64(threads)
            kernel((blocks,), (BLOCK,), (*arrays, *numbers))

        return launch


BLOCK = 128  # threads, as CuPy launches an ElementwiseKernel
_STRIDE = (
    "for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;"
    " i < {}; i += blockDim.x * (unsigned long long)gridDim.x)"
)


def _source(dtype: str, preamble: str, arrays: str, body: str) -> str:
    """Return CUDA C++ with a kernel ``run``, whose T is a dtype."""
    headers = [f"#include <cupy/{name}.cuh>" for name in ("carray", "float16", "bfloat16")]
    number = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    parameters = f"{arrays}, unsigned long long n, unsigned long long threads"
    kernel = f'extern "C" __global__ void run({parameters}) {{\n{body}\n}}\n'
    return "\n".join([*headers, preamble, f"typedef {number} T;", kernel])


def raw_source(name: str, dtype: str) -> str:
    """Return a RawKernel: plain ReLU, vectorized, of one of `relu_xp.backends.cupy.PASSES`."""
    backend = module("relu_xp.backends.cupy")
    kind, _, inputs, outputs = backend.PASSES[name]
    types = {"T": "T*", "uint8": "unsigned char*"}
    operands = [declared.split() for declared in inputs + outputs]
    arrays = ", ".join(f"{types[kind]} {operand}" for kind, operand in operands)
    given = ", ".join(operand for _, operand in operands)
    made = kind.format("Activation<T, false, false, false, false>")
    loop = f"{_STRIDE.format('threads')} vectorized<{backend._CHUNKS}>(pass, i, threads, n);"
    fields = f"{{{{T(), T(), T(), T()}}, {given}}}"
    body = f"using namespace relu_xp;\nconst {made} pass = {fields};\n{loop}"
    return _source(dtype, backend._PREAMBLE, arrays, body)


def _number(dtype: str) -> np.dtype[Any]:
    return np.dtype(module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)


def _count(card: Any, dtype: str, elements: int) -> int:
    """Return how many sets have four times what the L2 holds: a pass touches half or more."""
    count: int = math.ceil(4 * card.l2 / (4 * _number(dtype).itemsize * elements))
    return count


def _sets(card: Any, dtype: str, shape: tuple[int, ...], count: int = 1) -> list[Names]:
    """Return what the ways find, as often as asked for: in memory of its own each."""
    number, elements = _number(dtype), math.prod(shape)
    total, mask_bytes = count * elements, -(-elements // 8)
    pools = {name: card.xp.empty(total, number) for name in ("x", "dy", "y", "dx")}
    for seed, name in enumerate(("x", "dy")):
        drawn = card.xp.asarray(measure.normal((min(total, DRAWN),), number, seed))
        for start in range(0, total, DRAWN):
            pools[name][start : start + DRAWN] = drawn[: total - start]
    card.poison(pools["dx"])
    if card.torch:
        for name, pool in list(pools.items()):
            tensor = card.torch.from_dlpack(pool.view(np.int16) if dtype == "bfloat16" else pool)
            pools[f"t{name}"] = tensor.view(getattr(card.torch, dtype))
    masks = card.xp.empty(count * mask_bytes, np.uint8)
    sets = []
    for k in range(count):
        part = slice(k * elements, (k + 1) * elements)
        names = {name: pool[part].reshape(shape) for name, pool in pools.items()}
        names["mask"] = masks[k * mask_bytes : (k + 1) * mask_bytes]
        x, kept = names["x"], {"out": names["y"], "mask": names["mask"]}
        names["leaky_pullback"] = relu_xp.relu_vjp(x, negative_slope=SLOPE, **kept)[1]
        names["pullback"] = relu_xp.relu_vjp(x, **kept)[1]  # which has the same mask
        if card.torch:
            names["leaf"] = names["tx"].detach().requires_grad_()
        sets.append(names)
    return sets


def _shared(card: Any, dtype: str) -> Names:
    """Return what the ways find beside a set."""
    names: Names = {"relu_xp": relu_xp, "layer": relu_xp.ReLU(), "cupy": card.xp, "copy": card.copy}
    if card.torch:
        names |= {"torch": card.torch, "aten": card.torch.ops.aten}
        names |= {"compiled_relu": card.compiled_relu()}
    names |= card.kernels(dtype)
    return names


def _lacking(card: Any, dtype: str, elements: int) -> str | None:
    """Return why sets of a dtype and size cannot be, if so."""
    if dtype == "bfloat16" and not module("ml_dtypes"):
        return "not measured: ml_dtypes is not installed"
    itemsize = _number(dtype).itemsize
    # A set has four arrays, a mask and a leaf's gradient; a call makes some more that are fresh.
    needed = elements * (_count(card, dtype, elements) * (5 * itemsize + 1 / 8) + 6 * itemsize)
    free = card.free()
    if needed > 0.9 * free:
        return f"not measured: needs {1e-9 * needed:.3g} GB, {1e-9 * free:.3g} GB are free"
    return None


@functools.cache
def _used(code: str) -> frozenset[str]:
    return frozenset(compile(code, code, "exec").co_names)


def looped(code: str, sets: Sequence[Names], shared: Names) -> Run:
    """Return a function that makes so many calls, each with the set after the last one's."""
    names = [name for name in sets[0] if name in _used(code)]
    cycle = itertools.cycle([tuple([one[name] for name in names]) for one in sets])
    made = shared | {"sets": cycle, "islice": itertools.islice}
    loop = f"def run(calls):\n    for {', '.join(names)}, in islice(sets, calls):\n        {code}"
    exec(compile(loop, code, "exec"), made)
    run: Run = made["run"]
    return run


def _check(card: Any, way: Way, passed: Pass, run: Run, arrays: Names) -> None:
    """Make a first call, and compare either end of what it wrote with what NumPy makes of it."""
    written = [name for name in passed.outputs.split() if {name, f"t{name}"} & _used(way.code)]
    for name in written:
        card.poison(arrays[name])
    run(1)
    card.synchronize()
    for end in (slice(None, SAMPLE), slice(-SAMPLE, None)) if written else ():
        x, dy = (card.numpy(arrays[name].reshape(-1)[end]) for name in ("x", "dy"))
        slope = x.dtype.type(passed.slope)
        right = {"y": np.where(x > 0, x, slope * x), "dx": np.where(x > 0, dy, slope * dy)}
        right["mask"] = np.packbits(x > 0, bitorder="little")
        for name in written:
            flat, size = arrays[name].reshape(-1), right[name].size
            got = card.numpy(flat[-size:] if end.start else flat[:size])
            if not _same(got, right[name], exact=way.library == "relu_xp"):
                raise ArithmeticError(f"{name} is not what NumPy makes of it")


def _same(got: Any, right: Any, exact: bool) -> bool:
    if exact:
        return np.array_equal(got, right)
    # PyTorch's slope of float16 has more bits; a product may be subnormal there.
    return np.allclose(got.astype(np.float64), right.astype(np.float64), rtol=0.01, atol=1e-6)


def _ready(
    card: Any, ways: Mapping[Way, Pass], sets: Sequence[Names], shared: Names
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the ways that work, as functions, and why the others do not; both by code."""
    runs, notes = {}, {}
    for way, passed in ways.items():
        if way.library in TORCH and not card.torch:
            notes[way.code] = "not measured: there is no PyTorch with CUDA"
            continue
        run = looped(way.code, sets, shared)
        try:
            _check(card, way, passed, run, sets[0])
        except Exception as error:
            notes[way.code] = _reason(error)
        else:
            runs[way.code] = run
    return runs, notes


def _reason(error: Exception) -> str:
    what = "not supported" if isinstance(error, TypeError) else "not measured"
    line = next(iter(str(error).strip().splitlines()), "")
    return textwrap.shorten(f"{what}: {type(error).__name__}: {line}", 200)


def _interleaved(names: Iterable[str], timed: Callable[[str], float], rounds: int) -> Rounds:
    """Time candidates in turn, one after the other and then the other way round."""
    order = list(names)
    times = Rounds(order)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for name in order:
                seconds = timed(name)
                if number:  # the first round is for the clocks, which come up from idle
                    times.add(name, seconds, True)
            order.reverse()
    finally:
        gc.enable()
    return times


def _rounds(card: Any, runs: Mapping[str, Run], effort: Effort) -> Rounds:
    """Time the device."""
    calls = dict.fromkeys(runs, 3)
    for _, (name, run) in itertools.product(range(2), runs.items()):
        calls[name] = math.ceil(effort.sample / card.seconds(run, calls[name]))
    return _interleaved(runs, lambda name: card.seconds(runs[name], calls[name]), effort.rounds)


def _microseconds(rounds: Rounds, code: str) -> Row:
    spread = rounds.spread(lambda seconds: 1e6 * seconds, code)
    return {"us": spread.median, "us_quartiles": list(spread.quartiles)}


def _bandwidth(rounds: Rounds, way: Way, dtype: str, elements: int) -> Row:
    """Return a way's time, its bytes a second, and their share of the copy's."""
    nbytes, copied = (one.nbytes(dtype, elements) for one in (way, COPY))
    share = rounds.spread(lambda copy, own: nbytes / copied * copy / own, COPY.code, way.code)
    gigabytes = 1e-9 * nbytes / rounds.median(way.code)
    return _microseconds(rounds, way.code) | {"GB/s": gigabytes, "share": share.median}


def passes(card: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time every pass, dtype and size."""
    for dtype, elements in itertools.product(effort.dtypes, effort.sizes):
        progress(f"passes: {dtype}, {_power(elements)} elements")
        yield _passes(card, effort, dtype, elements)


def _passes(card: Any, effort: Effort, dtype: str, elements: int) -> list[Row]:
    ways: dict[Way, Pass] = {}
    for passed in PASSES.values():
        ways = dict.fromkeys(passed.ways, passed) | ways
    runs: dict[str, Run] = {}
    rounds, count = Rounds(runs), 0
    if lacking := _lacking(card, dtype, elements):
        notes = dict.fromkeys((way.code for way in ways), lacking)
    else:
        count = _count(card, dtype, elements)
        try:
            sets = _sets(card, dtype, (elements,), count)
            runs, notes = _ready(card, ways, sets, _shared(card, dtype))
            rounds = _rounds(card, runs, effort)
        except card.full as error:
            runs, notes = {}, dict.fromkeys((way.code for way in ways), _reason(error))
    rows = []
    for name, passed in PASSES.items():
        fastest = {}
        for library in RIVALS:
            if theirs := [w.code for w in passed.ways if w.library == library and w.code in runs]:
                fastest[library] = min(theirs, key=rounds.median)
        for way in passed.ways:
            row: Row = {"dtype": dtype, "elements": elements, "sets": count, "pass": name}
            row |= {"library": way.library, "code": way.code}
            if way.code in runs:
                row |= _bandwidth(rounds, way, dtype, elements)
                for library, code in fastest.items():  # so many times faster
                    row[f"over_{library}"] = rounds.spread(truediv, code, way.code).median
            else:
                row["note"] = notes[way.code]
            rows.append(row)
    return rows


def host(card: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time what a call of a small array costs the host."""
    for shape in SMALL_SHAPES:
        progress(f"host: {shape}")
        yield _host(card, effort, shape)


def _host(card: Any, effort: Effort, shape: tuple[int, ...]) -> list[Row]:
    ways = dict.fromkeys(HOST, Pass())
    runs, notes = _ready(card, ways, _sets(card, "float32", shape), _shared(card, "float32"))
    calls = effort.host_calls
    rounds = _interleaved(runs, lambda name: card.host_seconds(runs[name], calls), effort.rounds)
    rows = []
    for way in HOST:
        row: Row = {"shape": " x ".join(map(str, shape)), "library": way.library, "code": way.code}
        row |= _microseconds(rounds, way.code) if way.code in runs else {"note": notes[way.code]}
        rival = HOST_PAIRS.get(way.code)
        if rival in runs and way.code in runs:
            ratio = rounds.spread(truediv, way.code, rival).median
            row |= {"against": rival, "ratio": ratio} | verdict(ratio, at_most=1.0)
        rows.append(row)
    return rows


def graphs(card: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time a step's replay as a CUDA graph beside the same step, called; both in the L2."""
    for elements in GRAPH_SIZES:
        progress(f"graphs: {_power(elements)} elements")
        sets = _sets(card, "float32", (elements,))
        with card.side_stream():
            rows = _graphs(card, effort, elements, sets)
        yield rows


def _graphs(card: Any, effort: Effort, elements: int, sets: Sequence[Names]) -> list[Row]:
    both = PASSES["both"]
    ways = dict.fromkeys(STEPS, both)
    runs, notes = _ready(card, ways, sets, _shared(card, "float32"))
    replays = {}
    for way in ways:
        if way.code in runs:
            try:
                replay = card.captured(way.library, runs[way.code])
                _check(card, way, both, replay, sets[0])
            except Exception as error:
                notes[way.code] = _reason(error)
            else:
                replays[f"replay: {way.code}"] = replay
    rounds = _rounds(card, runs | replays, effort)
    rows = []
    for way in ways:
        row: Row = {"elements": elements, "library": way.library, "code": way.code}
        if way.code in notes:
            row["note"] = notes[way.code]
        else:
            codes = way.code, f"replay: {way.code}"
            row["call_us"], row["replay_us"] = (1e6 * rounds.median(code) for code in codes)
            row["faster"] = rounds.spread(truediv, *codes).median
        rows.append(row)
    return rows


def tune(card: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time plain ReLU by how much a thread moves, and as a RawKernel; only with ``--tune``."""
    for dtype in ("float32", "float16", "float64"):
        progress(f"tune: {dtype}")
        yield _tune(card, effort, dtype, _target_size(effort.sizes))


def _tune(card: Any, effort: Effort, dtype: str, elements: int) -> list[Row]:
    named: Row = {"dtype": dtype, "elements": elements}
    if lacking := _lacking(card, dtype, elements):
        return [named | {"pass": "all", "kernel": "all", "note": lacking}]
    backend = module("relu_xp.backends.cupy")
    shared, ways, titles = {"copy": card.copy}, {COPY: Pass()}, {}
    for name, (operands, outputs, *moved) in TUNED.items():
        tile = _launcher(name, dtype, backend._CHUNKS)._tile
        threads = elements - elements // tile * (tile - backend._WARP)  # as `_Launcher.run` has it
        candidates = [
            (f"{chunks} a thread", functools.partial(_launcher(name, dtype, chunks).run, None))
            for chunks in CHUNKS
        ]
        for title, blocks in (
            ("raw", -(-threads // BLOCK)),
            ("raw, resident", 16 * card.properties["multiProcessorCount"]),
        ):
            candidates.append((title, card.raw(raw_source(name, dtype), blocks, threads)))
        for number, (title, function) in enumerate(candidates):
            shared[f"{name}_{number}"] = function
            way = Way("relu_xp", f"{name}_{number}({operands})", *moved)
            ways[way], titles[way] = Pass(outputs=outputs), (name, title)
    sets = _sets(card, dtype, (elements,), _count(card, dtype, elements))
    runs, notes = _ready(card, ways, sets, shared)
    rounds = _rounds(card, runs, effort)
    rows = []
    for way, (name, title) in titles.items():
        row = named | {"pass": name, "kernel": title}
        if way.code in runs:
            row |= _bandwidth(rounds, way, dtype, elements)
        else:
            row["note"] = notes[way.code]
        rows.append(row)
    return rows


def _launcher(name: str, dtype: str, chunks: int) -> Any:
    """Return plain ReLU's pass, made for so many chunks a thread."""
    backend = module("relu_xp.backends.cupy")
    numbers = Activation().round_to(dtype)
    before = backend._CHUNKS
    try:
        backend._CHUNKS = chunks
        backend.kernel.cache_clear()
        return backend._Launcher(name, numbers, numbers)
    finally:
        backend._CHUNKS = before
        backend.kernel.cache_clear()


def targets(rows: Sequence[Row]) -> list[Row]:
    """Return what is wanted of the passes, and whether they reach it."""
    size = _target_size(row["elements"] for row in rows)
    judged = []
    for target, row in itertools.product(TARGETS, rows):
        place = size, target.passed, PASSES[target.passed].ways[0].code
        if (row["elements"], row["pass"], row["code"]) == place and row["dtype"] in target.dtypes:
            named: Row = {"target": target.title, "dtype": row["dtype"], "elements": size}
            named["value"] = value = row.get(target.cell)
            judged.append(named | verdict(value or 0.0, at_least=target.wanted))
    return judged


def _target_size(sizes: Iterable[int]) -> int:
    sizes = set(sizes)
    return TARGET_SIZE if TARGET_SIZE in sizes else max(sizes)


def _power(elements: int) -> str:
    return f"2^{elements.bit_length() - 1}"


def report(result: Mapping[str, Any]) -> None:
    """Print short tables of what there is; the JSON has the rest."""
    for name, table in TABLES.items():
        if name in result and result[name]["rows"]:
            group, columns, lines = table(result[name]["rows"])
            measure.print_table([{"group": group} | line for line in lines], columns)
    rows = itertools.chain.from_iterable(section["rows"] for section in result.values())
    notes = collections.Counter(row["note"] for row in rows if "note" in row)
    for note, count in notes.most_common(8):
        print(f"{count} times {note}")


Table = tuple[str, list[str], list[Row]]  # title, columns, lines


def _pivoted(rows: Iterable[Row], by: str, cells: Callable[[Row], Row]) -> list[Row]:
    """Return a line for all rows that have the same in the columns `by`."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = {column: row[column] for column in by.split()}
        line = lines.setdefault(tuple(key.values()), key)
        line |= cells(row)
    return list(lines.values())


def _passes_table(rows: list[Row]) -> Table:
    size = _target_size(row["elements"] for row in rows)
    ours = {name: passed.ways[0].code for name, passed in PASSES.items()}

    def cells(row: Row) -> Row:
        if row["pass"] == "copy":
            return {_power(row["elements"]): row.get("GB/s", "-")}
        over = {library: row.get(f"over_{library}") for library in RIVALS}
        return {_power(row["elements"]): row.get("share", "-")} | (
            over if row["elements"] == size else {}
        )

    first = [row for row in rows if row["code"] == ours[row["pass"]]]
    powers = [_power(elements) for elements in sorted({row["elements"] for row in rows})]
    title = f"GB/s of the copy, shares of that; how many times faster at {_power(size)} elements"
    columns = ["dtype", "pass", *powers, *RIVALS]
    return title, columns, _pivoted(first, "dtype pass", cells)


def _host_table(rows: list[Row]) -> Table:
    def cells(row: Row) -> Row:
        ratio = {f"{row['shape']}: ratio": _judged(row, "ratio")} if "ratio" in row else {}
        return {row["shape"]: row.get("us", "-")} | ratio

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    columns = ["code", *shapes, "against", *(f"{shape}: ratio" for shape in shapes)]
    lines = _pivoted(rows, "code", lambda row: cells(row) | {"against": row.get("against", "")})
    return "the host's microseconds a call; wanted: no more than CuPy's", columns, lines


def _graphs_table(rows: list[Row]) -> Table:
    columns = ["elements", "library", "call_us", "replay_us", "faster", "note"]
    return "a step of float32, called and as a CUDA graph", columns, rows


def _tune_table(rows: list[Row]) -> Table:
    lines = _pivoted(rows, "dtype pass", lambda row: {row["kernel"]: row.get("share", "-")})
    columns = list(dict.fromkeys(itertools.chain.from_iterable(lines)))
    return "share of the copy's bandwidth", columns, lines


def _targets_table(rows: list[Row]) -> Table:
    lines = _pivoted(rows, "target wanted", lambda row: {row["dtype"]: _judged(row, "value")})
    title = f"wanted, {_power(rows[0]['elements'])} elements"
    return title, ["target", "wanted", *DTYPES], lines


def _judged(row: Row, cell: str) -> str:
    if row[cell] is None:
        return "not measured"
    return f"{row[cell]:.2f} {'' if row['reached'] else 'not '}reached"


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "passes": _passes_table,
    "host": _host_table,
    "graphs": _graphs_table,
    "tune": _tune_table,
    "targets": _targets_table,
}
SECTIONS: dict[str, Callable[[Any, Effort], Iterator[list[Row]]]] = {
    "passes": passes,
    "host": host,
    "graphs": graphs,
    "tune": tune,
}


def missing() -> str | None:
    """Return why there is no device."""
    cupy = module("cupy")
    if cupy is None:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # of the driver, or for want of CUDA's libraries
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None if count else "none is visible"


def measured(card: Any, names: Iterable[str], effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield what sections have measured so far; the targets, too, that the passes have."""
    conditions = measure.conditions("torch", "ml_dtypes") | card.conditions()
    conditions["versions"] |= {"cupy": card.xp.__version__, "relu_xp": relu_xp.__version__}
    conditions |= {"quick": effort == QUICK, "settings": effort._asdict()}
    for name in names:
        rows: list[Row] = []
        for more in SECTIONS[name](card, effort):
            rows += measure.rounded(more)
            tables = {name: rows} | ({"targets": targets(rows)} if name == "passes" else {})
            yield {name: {"conditions": conditions, "rows": rows} for name, rows in tables.items()}


def main() -> None:
    """Measure, print, save and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller and shorter; writes nothing without --json"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="compare ways to launch our kernels, and nothing else; other figures in FILE stay",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to; default: bench/results/gpu.json"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="the picture; default: beside the JSON"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="measure nothing, draw what FILE has"
    )
    options = parser.parse_args()

    path = options.json or (None if options.quick and not options.pictures else RESULTS)
    reason = None if options.pictures else missing()
    if reason:
        print(f"bench.gpu: nothing is measured, there is no CUDA device: {reason}")
        return
    result: dict[str, Any] = {}
    if (options.tune or options.pictures) and path and path.exists():
        result = json.loads(path.read_text())
    if not options.pictures:
        names = ("tune",) if options.tune else ("passes", "host", "graphs")
        for part in measured(Card(), names, QUICK if options.quick else FULL):
            result |= part
            measure.save(path, result)  # each, lest a later one's failure lose it
    report(result)
    picture = options.plot or (path and path.with_name(f"{path.stem}-bandwidth.png"))
    rows = result.get("passes", {"rows": ()})["rows"]
    if picture and any("us" in row for row in rows):
        drawn = pictures.draw_passes(rows, picture)
        progress(f"drew {picture}" if drawn else "no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
