"""The kernels for NumPy arrays: what they serve, every tail and offset, where they come from."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import importlib
import itertools
import os
import queue
import signal
import sys
import textwrap
import threading
import tracemalloc
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES, serving_numpy
from test_numpy import compare, operands, results

import relu_xp
from relu_xp import checks, mask
from relu_xp.activation import Activation, Rounded
from relu_xp.backends import llvm
from relu_xp.backends import numpy as numpy_backend
from relu_xp.backends.llvm import crew, engine, kernels, runtime
from relu_xp.backends.llvm.loader import loader
from relu_xp.mask import pack, unpack
from relu_xp.testing import oracle

# By its name: that of the package is the loader itself.
loading = importlib.import_module("relu_xp.backends.llvm.loader")

LINE = 64
NEVER = 1 << 62

# From how many bytes on the GIL is released, several threads are used, stores pass the caches by.
FORMS = {
    "plain": (NEVER, NEVER, NEVER),
    "without-gil": (0, NEVER, NEVER),
    "threads": (0, 0, NEVER),
    "stream": (0, NEVER, 0),
    "stream-threads": (0, 0, 0),
}

# Beyond those of the oracle: numbers that a dtype can only round to infinity or 0, and all
# combinations of what a kernel is compiled for.
MEMBERS = {
    **oracle.MEMBERS,
    "knee-at-infinity": {"threshold": 1e300},
    "knee-at-minus-infinity": {"threshold": -1e300},
    "ceiling-at-minus-infinity": {"threshold": -1e301, "max_value": -1e300},
    "ceiling-at-infinity": {"max_value": 1e300, "negative_slope": 1e-60},
    "ceiling-rounds-to-zero": {"max_value": 1e-60, "negative_slope": -1e-60},
    "slope-rounds-to-zero": {"positive_slope": 1e-60, "threshold": 1e-60},
    "slopes-round-to-infinity": {"positive_slope": 1e300, "negative_slope": -1e300},
} | {
    f"{a:g}-{b:g}-{c}": {"negative_slope": a, "positive_slope": b, "max_value": c}
    for a, b, c in itertools.product((0.0, 0.1, 1e-60), (1.0, 1.5), (None, 2.0))
}


@pytest.fixture
def served_by_kernels(request):
    """Kernels serve NumPy arrays."""
    library = LIBRARIES["numpy_llvm"]
    if reason := library.load():
        unavailable(request.config, reason)
    with library.running():
        yield


@contextlib.contextmanager
def calling(form):
    """Let every call, of any size, take one form."""
    words = [runtime.BOARD[f"{name}_bytes"] for name in ("release", "threaded", "stream")]
    before = loader.board[words]
    loader.board[words] = FORMS[form]
    try:
        with mock.patch.object(llvm, "_MANY", 0):
            llvm.forward(rounded("relu", "float32"), np.ones(1, np.float32), None)  # has helpers
            yield
    finally:
        loader.board[words] = before


@contextlib.contextmanager
def counted():
    """List, for every call of a kernel, whether there was one that served."""
    call, served = loader.call, []

    def record(*arguments):
        result = call(*arguments)
        served.append(result is not None)
        return result

    with mock.patch.object(loader, "call", record):
        yield served


def rounded(member, dtype):
    return Rounded(Activation(**MEMBERS[member]), dtype)


def bits(x):
    return x.view(f"u{x.itemsize}")


@functools.cache
def values(dtype, seed=0):
    """Return the oracle's patterns and 2,000 NaN, of either sign, quiet and signalling."""
    form = oracle.Format(dtype)
    rng = np.random.default_rng(seed)
    nan = rng.integers(0, 1 << form.width, 2000, dtype=form.unsigned, endpoint=False)
    patterns = np.concatenate([oracle.patterns(dtype), nan | form.unsigned.type(form.infinity)])
    rng.shuffle(patterns)
    return patterns.view(form.dtype)


def misaligned(x):
    memory = bytearray(x.nbytes + 1)
    result = np.frombuffer(memory, np.uint8, offset=1).view(x.dtype)
    result[...] = x
    assert not result.flags.aligned
    return result


CONTIGUOUS = {
    "1-D": lambda v: v,
    "offset": lambda v: v[3:],
    "C": lambda v: v[:35].reshape(5, 7),
    "Fortran": lambda v: v[:35].reshape(5, 7, order="F"),
    "3-D Fortran": lambda v: v[:30].reshape(2, 3, 5, order="F"),
    "one row": lambda v: v[:9].reshape(1, 9),
    "0-d": lambda v: v[:1].reshape(()),
    "one element": lambda v: v[:1],
    "one element, 3-D": lambda v: v[:1].reshape(1, 1, 1),
    "one element of a strided array": lambda v: v[::5][:1],
    "empty": lambda v: v[:0],
    "empty, 2-D": lambda v: v[:0].reshape(3, 0),
}
OTHERS = {
    "strided": lambda v: v[::2],
    "reversed": lambda v: v[::-1],
    "columns": lambda v: v[:35].reshape(5, 7)[:, :3],
    "3-D transposed": lambda v: v[:30].reshape(2, 3, 5).transpose(1, 0, 2),
    "misaligned": misaligned,
}

# Every way to the kernels; x, dy and out are functions that make a fresh array each time.
USES = {
    "relu": lambda x, dy, n: relu_xp.relu(x(), **n),
    "relu, out": lambda x, dy, n: relu_xp.relu(x(), out=x(), **n),
    "relu, in place": lambda x, dy, n: relu_xp.relu(a := x(), out=a, **n),
    "vjp": lambda x, dy, n: relu_xp.relu_vjp(x(), **n)[0],
    "vjp, out": lambda x, dy, n: relu_xp.relu_vjp(x(), out=x(), **n)[0],
    "vjp, in place": lambda x, dy, n: relu_xp.relu_vjp(a := x(), out=a, **n)[0],
    "pullback": lambda x, dy, n: relu_xp.relu_vjp(x(), **n)[1](dy()),
    "pullback, out": lambda x, dy, n: relu_xp.relu_vjp(x(), **n)[1](dy(), out=dy()),
    "pullback, in place": lambda x, dy, n: relu_xp.relu_vjp(x(), **n)[1](a := dy(), out=a),
    "backward": lambda x, dy, n: relu_xp.relu_backward(dy(), x(), **n),
    "backward, out": lambda x, dy, n: relu_xp.relu_backward(dy(), x(), out=dy(), **n),
    "backward, over dy": lambda x, dy, n: relu_xp.relu_backward(a := dy(), x(), out=a, **n),
    "backward, over x": lambda x, dy, n: relu_xp.relu_backward(dy(), a := x(), out=a, **n),
}


def fresh(layout, dtype, seed):
    return lambda: layout(values(dtype, seed)[:99].copy())


def check_use(use, x, dy, numbers):
    """Do it with kernels and with NumPy alone, and return which calls of kernels served."""
    with counted() as served:
        got = USES[use](x, dy, numbers)
    with serving_numpy("relu_xp.backends.numpy"):
        wanted = USES[use](x, dy, numbers)
    assert (got.shape, got.dtype, steps(got)) == (wanted.shape, wanted.dtype, steps(wanted))
    np.testing.assert_array_equal(bits(got.copy()), bits(wanted.copy()))
    return served


def steps(x):
    """Return the strides that are ever taken."""
    return [s for s, length in zip(x.strides, x.shape, strict=True) if x.size and length > 1]


@pytest.mark.usefixtures("served_by_kernels")
class TestServed:
    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("layout", CONTIGUOUS)
    def test_contiguous_arrays_by_kernels(self, layout, use):
        layout = CONTIGUOUS[layout]
        for dtype, member in itertools.product(oracle.DTYPES, ("relu", "clipped-leaky")):
            x, dy = fresh(layout, dtype, 0), fresh(layout, dtype, 1)
            served = check_use(use, x, dy, MEMBERS[member])
            assert served == [True] * (2 if "pullback" in use else 1), (dtype, member)

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("layout", OTHERS)
    def test_other_arrays_by_numpy(self, layout, use):
        layout = OTHERS[layout]
        for dtype, member in itertools.product(oracle.DTYPES, ("relu", "clipped-leaky")):
            x, dy = fresh(layout, dtype, 0), fresh(layout, dtype, 1)
            assert not any(check_use(use, x, dy, MEMBERS[member])), (dtype, member)

    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_two_layouts_by_numpy(self, dtype):
        c, fortran = (fresh(CONTIGUOUS[order], dtype, 0) for order in ("C", "Fortran"))
        odd = fresh(lambda v: misaligned(v[:35]).reshape(5, 7), dtype, 1)
        one = fresh(lambda v: np.broadcast_to(v[:1], (5, 7)), dtype, 0)
        for x, other in ((c, fortran), (fortran, c), (c, odd), (odd, c), (fortran, odd)):
            with counted() as served:
                relu_xp.relu(x(), out=other())
                relu_xp.relu_vjp(x(), out=other())
                relu_xp.relu_backward(other(), x())
                relu_xp.relu_backward(other(), x(), out=x())
                relu_xp.relu_backward(x(), x(), out=other())
            assert not any(served)
            check_use("backward", x, other, {})
        for x, other in ((c, fortran), (fortran, c), (c, odd), (fortran, odd), (c, one)):
            _, pullback = relu_xp.relu_vjp(x())
            with counted() as served:
                pullback(other())
                pullback(other(), out=x())
                pullback(x(), out=odd())
            assert not any(served)
            check_use("pullback", x, other, {})

    def test_broadcast_arrays_by_numpy(self):
        x, dy = np.ones((5, 7), np.float32), np.broadcast_to(np.float32(3), (5, 7))
        _, pullback = relu_xp.relu_vjp(x)
        with counted() as served:
            relu_xp.relu(dy)
            relu_xp.relu_vjp(dy)
            pullback(dy)
            relu_xp.relu_backward(dy, x)
            relu_xp.relu_backward(x, dy)
        assert not any(served)

    def test_two_dtypes_at_once_by_numpy(self):
        for of_x, of_dy in itertools.permutations(oracle.DTYPES, 2):
            x, dy = (fresh(CONTIGUOUS["C"], dtype, 0) for dtype in (of_x, of_dy))
            assert not any(check_use("backward", x, dy, {}))
            assert check_use("pullback", x, dy, {}) == [True, True]

    def test_integers_by_numpy(self):
        for dtype in "bhilqBHILQ":
            with counted() as served:
                y = relu_xp.relu(np.arange(100).astype(dtype))
            np.testing.assert_array_equal(y, np.arange(100))
            assert not any(served)

    def test_a_memmap_by_kernels(self, tmp_path):
        x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(9, 5))
        x[...] = values("float32")[:45].reshape(9, 5)
        with counted() as served:
            y = relu_xp.relu(x)
            relu_xp.relu_backward(y, x, out=x)
        assert served == [True, True]
        assert type(y) is np.ndarray
        np.testing.assert_array_equal(bits(y), bits(numpy_backend.forward(*plain(x), None)))

    def test_a_read_only_array_by_kernels(self):
        x = values("float32")[:99].copy()
        x.flags.writeable = False
        with counted() as served:
            y = relu_xp.relu(x)
        assert served == [True]
        assert y.flags.writeable


def plain(x):
    return rounded("relu", x.dtype.name), np.asarray(x)


# The functions of a backend, with and without `out`; saved is another backend's, or its own.
DIRECT = {
    "forward": lambda b, n, x, dy, m: b.forward(n, x, None),
    "forward, out": lambda b, n, x, dy, m: b.forward(n, x, np.empty_like(x)),
    "forward, in place": lambda b, n, x, dy, m: b.forward(n, x, x),
    "saving": lambda b, n, x, dy, m: b.forward_saving(n, x, None, None)[0],
    "saving, in place": lambda b, n, x, dy, m: b.forward_saving(n, x, x, None)[0],
    "pieces": lambda b, n, x, dy, m: unpack(b.forward_saving(n, x, None, None)[1]),
    "backward": lambda b, n, x, dy, m: b.backward(n, dy, m, None),
    "backward, in place": lambda b, n, x, dy, m: b.backward(n, dy, m, dy),
    "from input": lambda b, n, x, dy, m: b.backward_from_input(n, n, dy, x, None),
    "from input, over dy": lambda b, n, x, dy, m: b.backward_from_input(n, n, dy, x, dy),
    "from input, over x": lambda b, n, x, dy, m: b.backward_from_input(n, n, dy, x, x),
}


@pytest.mark.usefixtures("served_by_kernels")
class TestBits:
    """The kernels' results are those of NumPy alone, bit for bit, payloads of NaN included."""

    @pytest.mark.parametrize("form", ["plain", "stream-threads"])
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    @pytest.mark.parametrize("member", MEMBERS)
    def test_same_as_numpys(self, member, dtype, form):
        numbers = rounded(member, dtype)
        x, dy = values(dtype, 0), values(dtype, 1)
        saved = numpy_backend.forward_saving(numbers, x, None, None)[1]
        for name, call in DIRECT.items():
            wanted = call(numpy_backend, numbers, x.copy(), dy.copy(), saved)
            with calling(form), counted() as served:
                got = call(llvm, numbers, x.copy(), dy.copy(), saved)
            assert served == [True], name
            np.testing.assert_array_equal(bits(got), bits(wanted), err_msg=name)

    def test_payloads_are_among_them(self):
        for dtype in oracle.DTYPES:
            form = oracle.Format(dtype)
            numbers = rounded("leaky", dtype)
            x = values(dtype)
            magnitude = bits(llvm.forward(numbers, x, None)) & form.unsigned.type(form.sign - 1)
            assert len(np.unique(magnitude[magnitude > form.infinity])) > 50

    def test_every_kernel_that_an_activation_can_ask_for_is_among_them(self):
        asked = {kernels.structure_of(rounded(m, d)) for m in MEMBERS for d in oracle.DTYPES}
        assert asked <= set(kernels.structures())
        for dtype in oracle.DTYPES:
            found = {s[1:4] for s in asked if s.dtype_name == dtype}
            assert found == set(itertools.product((False, True), repeat=3))


def room(nbytes):
    """Return so many bytes from a multiple of 64 on, to be guarded."""
    memory = np.empty(nbytes + LINE, np.uint8)
    start = -memory.__array_interface__["data"][0] % LINE
    return memory[start : start + nbytes]


GUARD = 0xA5


class Bench:
    """Runs one member's kernels over parts of guarded memory, against NumPy's results."""

    def __init__(self, dtype, member, most):
        self.numbers = rounded(member, dtype)
        self.dtype = oracle.DTYPES[dtype]
        self.itemsize = self.dtype.itemsize
        repeats = -(-most // values(dtype).size)
        self.x, self.dy = (np.tile(values(dtype, seed), repeats)[:most] for seed in (0, 1))
        y, saved = numpy_backend.forward_saving(self.numbers, self.x, None, None)
        dx = numpy_backend.backward(self.numbers, self.dy, saved, None)
        self.pieces = unpack(saved).copy()
        self.wanted = {"forward": y, "forward_saving": y, "backward": dx, "backward_from_input": dx}
        self.inputs = {}
        self.mask_lengths = {}
        self.out = room(2 * LINE + most * self.itemsize + LINE)
        self.guarded = np.full_like(self.out, GUARD)
        self.mask = room(2 * LINE + most + LINE)
        self.guarded_mask = np.full_like(self.mask, GUARD)
        llvm.forward(self.numbers, self.x[:1], None)
        member = llvm._member(self.numbers)
        assert member.ready
        self.records = {kind: getattr(member, kind) for kind in kernels.KINDS}

    def input(self, name, offset, size):
        """Return the first elements of an input, so many elements off a multiple of 64 bytes."""
        if (name, offset) not in self.inputs:
            array = getattr(self, name)
            memory = room((offset + array.size) * self.itemsize).view(self.dtype)[offset:]
            memory[...] = array
            self.inputs[name, offset] = memory
        return self.inputs[name, offset][:size]

    def mask_length(self, size):
        """Return the bytes of the mask that the backend gives to the kernels."""
        if size not in self.mask_lengths:
            saved = llvm.forward_saving(self.numbers, self.x[:size], None, None)[1]
            self.mask_lengths[size] = saved.data.size
        return self.mask_lengths[size]

    def check(self, kind, size, out_offset, in_offset, mask_offset, in_place=False):
        start = LINE + out_offset * self.itemsize
        part = slice(start, start + size * self.itemsize)
        self.out[...] = GUARD
        out = self.out[part].view(self.dtype)
        x = self.input("x", in_offset, size)
        given = x if kind.startswith("forward") else self.input("dy", in_offset, size)
        if in_place:
            out[...] = given
            given = out
        self.mask[...] = GUARD
        pieces = 3 if self.numbers.pieces == 3 else 2
        packed = pack(self.pieces[:size], False, pieces)
        length = self.mask_length(size)
        mask_part = slice(LINE + mask_offset, LINE + mask_offset + length)
        other = self.mask[mask_part]
        if kind == "backward":
            other[...] = 0
            other[: packed.size] = packed
        arguments = {"forward": (), "backward_from_input": (x,)}.get(kind, (other,))
        assert loader.call(self.records[kind], size, out, given, *arguments) is out

        self.guarded[...] = GUARD
        self.guarded[part] = self.wanted[kind][:size].view(np.uint8)
        self.guarded_mask[...] = GUARD
        if kind in ("backward", "forward_saving"):
            self.guarded_mask[mask_part] = 0
            self.guarded_mask[mask_part][: packed.size] = packed
        about = (kind, size, out_offset, in_offset, mask_offset, in_place)
        assert np.array_equal(self.out, self.guarded), about
        assert np.array_equal(self.mask, self.guarded_mask), about


WIDE = ("below-zero", "clipped-leaky")  # a mask of a bit an element, where 0 has a 1; and a byte


@pytest.mark.usefixtures("served_by_kernels")
class TestTailsAndAlignment:
    @pytest.mark.parametrize("form", ["plain", "stream-threads"])
    @pytest.mark.parametrize("member", WIDE)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_every_small_size_and_offset(self, dtype, member, form):
        bench = Bench(dtype, member, 200)
        lanes = LINE // bench.itemsize
        with calling(form):
            for size, offset in itertools.product(range(201), range(lanes)):
                other = (3 * offset + size) % lanes
                kind = kernels.KINDS[(offset + size // 3) % 4]
                bench.check(kind, size, offset, other, (offset + size) % 8)
                bench.check(kind, size, offset, other, size % 8, in_place=True)

    @pytest.mark.parametrize("kind", kernels.KINDS)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_around_a_line_and_its_multiples(self, dtype, form, kind):
        for member in WIDE:
            bench = Bench(dtype, member, 200)
            lanes = LINE // bench.itemsize
            sizes = {lines * lanes + more for lines in (0, 1, 2, 3) for more in (0, 1, lanes - 1)}
            with calling(form):
                for size, offset in itertools.product(sorted(sizes), range(lanes)):
                    bench.check(kind, size, offset, (5 * offset) % lanes, offset % 8)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("member", WIDE)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_around_the_size_of_a_block(self, dtype, member, form):
        sizes = [4096 * k + d for k in (1, 2, 3, 17) for d in (-1, 0, 1, 9)]
        sizes += [(1 << 17) * k + d for k in (1, 2) for d in (-1, 0, 1, 33)]
        bench = Bench(dtype, member, max(sizes))
        lanes = LINE // bench.itemsize
        with calling(form):
            for number, (size, kind) in enumerate(itertools.product(sizes, kernels.KINDS)):
                for offset in (number % lanes, (lanes - 1) * (number % 3 == 0)):
                    bench.check(kind, size, offset, number * 7 % lanes, number % 8)
                bench.check(kind, size, number % lanes, 0, 0, in_place=True)

    @pytest.mark.parametrize("form", ["threads", "stream-threads"])
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_blocks_of_the_largest_size(self, dtype, form):
        size = (1 << 17) * (8 * int(loader.board[runtime.BOARD["threads"]]) + 1) + 3
        if size > 1 << 25:
            size = (1 << 25) + 3
        bench = Bench(dtype, "relu", size)
        with calling(form):
            for kind in kernels.KINDS:
                bench.check(kind, size, 1, 2, 3)

    def test_the_check_sees_what_is_written_beside_and_what_is_not_written(self):
        bench = Bench("float32", "relu", 200)
        call = loader.call

        def longer(record, size, *arrays):
            return call(record, size + 1, *arrays)

        def shorter(record, size, *arrays):
            return call(record, size - 1, *arrays)

        with calling("plain"):
            for impostor in (longer, shorter):
                for kind in kernels.KINDS:
                    with mock.patch.object(loader, "call", impostor), pytest.raises(AssertionError):
                        bench.check(kind, 100, 0, 0, 0)
            wrong = mock.patch.object(bench, "pieces", 1 - bench.pieces)
            with wrong, pytest.raises(AssertionError):
                bench.check("forward_saving", 100, 0, 0, 0)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    @pytest.mark.parametrize("member", WIDE)
    def test_masks_are_packed_and_padded_with_zeros(self, member, dtype, form):
        numbers = rounded(member, dtype)
        large = 8 * mask._LARGE  # memory that is used again, and full of ones
        for size in (*range(201), 4095, 4097, large + 5, large + 5, large + 32):
            x = np.resize(values(dtype), size)
            with calling(form):
                ones = llvm.forward_saving(rounded("relu", dtype), np.ones_like(x), None, None)[1]
                del ones
                data = llvm.forward_saving(numbers, x, None, None)[1].data
            packed = numpy_backend.forward_saving(numbers, x, None, None)[1].data
            assert 0 <= data.size - packed.size <= 7
            assert np.array_equal(data[: packed.size], packed), size
            assert not data[packed.size :].any(), size


# Everything lies flush against a page that cannot be touched, before it or after it.
PAGES = """
    import ctypes, itertools, mmap, sys
    import ml_dtypes, numpy as np
    from relu_xp.activation import FLOATING, Activation, Rounded
    from relu_xp.backends import llvm
    from relu_xp.backends import numpy as alone
    from relu_xp.backends.llvm import kernels, runtime
    from relu_xp.backends.llvm.loader import loader
    from relu_xp.mask import Mask

    protect = ctypes.CDLL(None, use_errno=True).mprotect

    def page():
        memory = np.frombuffer(mmap.mmap(-1, 3 * mmap.PAGESIZE), np.uint8)
        start = memory.__array_interface__["data"][0]
        for number in (0, 2):
            at = ctypes.c_void_p(start + number * mmap.PAGESIZE)
            assert protect(at, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        return memory[mmap.PAGESIZE : 2 * mmap.PAGESIZE]

    def place(memory, array):
        data = array.view(np.uint8)
        part = memory[len(memory) - len(data) :] if at_end else memory[: len(data)]
        part[...] = data
        return part.view(array.dtype)

    beyond = int(sys.argv[1])
    pages = [page() for _ in range(4)]
    rng = np.random.default_rng(5)
    words = [runtime.BOARD[f"{name}_bytes"] for name in ("release", "threaded", "stream")]
    llvm._MANY = 0
    choices = itertools.product((0, 0.1, 1e-60), (1, 1.5), (None, 0.75), FLOATING)
    every = {}
    for low, high, ceiling, dtype in choices:
        numbers = Activation(negative_slope=low, positive_slope=high, max_value=ceiling)
        numbers = Rounded(numbers, dtype)
        every[kernels.structure_of(numbers)] = numbers
    never = {s for s in kernels.structures() if s.three and not s.low and "64" in s.dtype_name}
    assert set(every) == set(kernels.structures()) - never  # where a slope is not rounded to 0
    for structure, numbers in every.items():
        dtype = structure.dtype_name
        if not loader.engine().serves(structure):
            continue
        loader.make(structure)
        llvm.forward(numbers, np.ones(1, dtype), None)
        member = llvm._member(numbers)
        assert member.ready
        for size in (*range(1 + 4 * 64 // np.dtype(dtype).itemsize), 199, 200):
            x, dy = rng.standard_normal((2, size)).astype(dtype)
            y, saved = alone.forward_saving(numbers, x, None, None)
            dx = alone.backward(numbers, dy, saved, None)
            data = llvm.forward_saving(numbers, x, None, None)[1].data
            calls = {
                "forward": (y, x),
                "forward_saving": (y, x, data),
                "backward": (dx, dy, data),
                "backward_from_input": (dx, dy, x),
            }
            for at_end, stream in itertools.product((False, True), repeat=2):
                loader.board[words] = 0 if stream else 1 << 62
                for kind, (wanted, *given) in calls.items():
                    out, *placed = map(place, pages, (np.zeros_like(wanted), *given))
                    if kind == "forward_saving":
                        placed[1][...] = 0
                    loader.call(getattr(member, kind), size + beyond, out, *placed)
                    assert out.tobytes() == wanted.tobytes(), (dtype, kind, size)
                    if kind == "forward_saving":
                        assert placed[1].tobytes() == data.tobytes()
                # A mask that NumPy made has no byte that it does not need.
                out, given, short = map(place, pages, (np.zeros_like(dx), dy, saved.data))
                short = Mask(short, saved.shape, saved.fortran, saved.pieces)
                assert llvm.backward(numbers, given, short, out) is out
                assert out.tobytes() == dx.tobytes(), (dtype, size)
"""


class TestPages:
    @pytest.fixture(autouse=True)
    def pages(self, request, require):
        require("llvmlite")
        if sys.platform != "linux":
            unavailable(request.config, "mprotect is called as on Linux")

    def test_nothing_is_touched_beyond_the_arrays(self, python):
        python(PAGES, 0)

    def test_the_check_sees_one_element_more(self, python):
        python(PAGES, 1, status=-signal.SIGSEGV)


SHAPES = {
    "1-D": lambda v, n: v[:n],
    "C": lambda v, n: v[: 3 * n].reshape(n, 3),
    "Fortran": lambda v, n: v[: 3 * n].reshape(n, 3, order="F"),
}


@pytest.mark.usefixtures("served_by_kernels")
class TestMasksCrossOver:
    """A mask that one backend made is read by the other."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("member", WIDE)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_every_size(self, dtype, member, shape):
        shape = SHAPES[shape]
        makers = {"numpy": numpy_backend, "llvm": llvm}
        for size, of_x in itertools.product(range(1, 101), oracle.DTYPES):
            x = shape(values(of_x, 0), size)
            dy = shape(values(dtype, size % 2), size)
            saving, slopes = rounded(member, of_x), rounded(member, dtype)
            saved = {name: b.forward_saving(saving, x, None, None)[1] for name, b in makers.items()}
            wanted = numpy_backend.backward(slopes, dy, saved["numpy"], None)
            np.testing.assert_array_equal(unpack(saved["llvm"]), unpack(saved["numpy"]))
            with counted() as served:
                results = {
                    "NumPy's": llvm.backward(slopes, dy, saved["numpy"], None),
                    "NumPy's, out": llvm.backward(slopes, dy, saved["numpy"], np.empty_like(dy)),
                    "kernels', other": numpy_backend.backward(slopes, dy, saved["llvm"], None),
                    "kernels'": llvm.backward(slopes, dy, saved["llvm"], None),
                }
            assert served == [True, True, True]
            for name, dx in results.items():
                np.testing.assert_array_equal(bits(dx), bits(wanted), err_msg=f"{name} {size}")

    def test_a_gradient_in_the_other_order(self):
        for member, orders in itertools.product(WIDE, itertools.permutations("CF")):
            x, dy = (values("float32")[:35].reshape(5, 7, order=order) for order in orders)
            numbers = rounded(member, "float32")
            saved = {b: b.forward_saving(numbers, x, None, None)[1] for b in (llvm, numpy_backend)}
            assert {mask.fortran for mask in saved.values()} == {orders[0] == "F"}
            got = [b.backward(numbers, dy, m, None) for b in saved for m in saved.values()]
            for dx in got:
                np.testing.assert_array_equal(bits(dx), bits(got[-1]))

    @pytest.mark.parametrize("form", FORMS)
    def test_large_ones(self, form):
        for member, dtype in itertools.product(WIDE, oracle.DTYPES):
            numbers = rounded(member, dtype)
            for size in (40_000, 40_001, 40_030):
                x, dy = (np.resize(values(dtype, seed), size) for seed in (0, 1))
                alone = numpy_backend.forward_saving(numbers, x, None, None)[1]
                wanted = numpy_backend.backward(numbers, dy, alone, None)
                with calling(form):
                    ours = llvm.forward_saving(numbers, x, None, None)[1]
                    got = [llvm.backward(numbers, dy, m, None) for m in (alone, ours)]
                got.append(numpy_backend.backward(numbers, dy, ours, None))
                for dx in got:
                    np.testing.assert_array_equal(bits(dx), bits(wanted))


@pytest.mark.usefixtures("served_by_kernels")
@pytest.mark.parametrize("form", ["plain", "stream-threads"])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("member", ["relu", "relu6", "thresholded", "negative-ceiling"])
def test_right_under_flush_to_zero(member, dtype, form, flush_to_zero):
    x, dy = operands(dtype)
    numbers = oracle.MEMBERS[member]
    with calling(form), counted() as served, flush_to_zero():
        assert np.float32(1e-40) * np.float32(1) == 0, "the processor does not flush"
        got = results(x, dy, numbers)
        long = relu_xp.relu(np.tile(x, 3), **numbers)
    assert served.count(True) == 5  # all but relu_grad, whose dy is one element broadcast
    compare(got, dtype, member)
    wanted = np.tile(oracle.forward(dtype, member).bits, 3)
    np.testing.assert_array_equal(bits(long), wanted)


# Counts what LLVM compiles, or forbids it; makes one structure or all.
COMPILE = """
    import sys
    import llvmlite.binding
    import numpy as np
    import relu_xp
    from relu_xp.backends.llvm import kernels, runtime
    from relu_xp.backends.llvm.loader import loader

    compiled = 0
    emit = llvmlite.binding.TargetMachine.emit_object

    def counting(machine, module):
        global compiled
        compiled += 1
        if "never" in sys.argv:
            raise AssertionError("compiled")
        return emit(machine, module)

    llvmlite.binding.TargetMachine.emit_object = counting
    if "all" in sys.argv:
        relu_xp.warmup()
    else:
        loader.make(kernels.Structure("float32"))
    x = np.array([-1.0, -0.0, 2.0, np.nan], np.float32)
    np.testing.assert_array_equal(relu_xp.relu(x), [0, 0, 2, np.nan])
    served = False
    if loader.failure is None:
        call = loader.call

        def check(*arguments):
            global served
            result = call(*arguments)
            served = result is not None
            return result

        loader.call = check
        np.testing.assert_array_equal(relu_xp.relu(x), [0, 0, 2, np.nan])
    print(compiled, len(loader.addresses), served, loader.failure)
"""
ONE = "2 1 True None\n"  # the runtime and a structure were compiled
READ = "0 1 True None\n"  # from the disk


class TestDiskCache:
    @pytest.fixture(autouse=True)
    def cache(self, require, tmp_path):
        require("llvmlite")
        self.root = tmp_path / "cache"
        self.folder = self.root / "relu_xp"

    def files(self):
        return sorted(self.folder.iterdir())

    def compile(self, python, *arguments, **variables):
        return python(COMPILE, *arguments, **{"XDG_CACHE_HOME": self.root} | variables)

    def test_warmup_writes_all_and_the_next_process_compiles_nothing(self, python):
        compiled, count, *rest = self.compile(python, "all").split()
        assert rest == ["True", "None"]
        served = list(filter(loader.engine().serves, kernels.structures()))
        assert int(count) == len(served)
        files = self.files()
        texts = set(map(kernels.source, served))  # some of both 16-bit floats are the same
        assert int(compiled) == len(files) == len(texts) + 1
        assert {file.suffix for file in files} == {".o"}
        before = [file.read_bytes() for file in files]
        assert self.compile(python, "all", "never") == f"0 {count} True None\n"
        assert [file.read_bytes() for file in self.files()] == before

    def test_the_check_of_compiling_can_fail(self, python):
        assert self.compile(python, "never") == "1 0 False compiled\n"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[:20],
            lambda content: content[: len(content) // 2],
            lambda content: content[:-1],
            lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
            lambda content: bytes([content[0] ^ 1]) + content[1:],
        ],
        ids=["empty", "20", "half", "one-less", "code", "checksum"],
    )
    def test_a_damaged_file_is_replaced(self, python, damage):
        assert self.compile(python) == ONE
        before = {file: file.read_bytes() for file in self.files()}
        for file, content in before.items():
            file.write_bytes(damage(content))
            assert file.read_bytes() != content
        assert self.compile(python) == ONE
        assert self.files() == list(before)
        assert self.compile(python, "never") == READ

    def test_only_the_damaged_one_is_compiled_again(self, python):
        assert self.compile(python) == ONE
        self.files()[0].write_bytes(b"")
        assert self.compile(python) == "1 1 True None\n"

    def test_a_file_in_place_of_the_folder(self, python):
        self.root.mkdir()
        self.folder.write_text("in the way")
        assert self.compile(python) == ONE
        assert self.folder.read_text() == "in the way"
        self.root = self.folder
        assert self.compile(python) == ONE

    def test_folders_in_place_of_the_files(self, python):
        assert self.compile(python) == ONE
        files = self.files()
        for file in files:
            file.unlink()
            file.mkdir()
        assert self.compile(python) == ONE
        assert self.files() == files
        assert all(file.is_dir() for file in files)

    def test_a_folder_that_cannot_be_written(self, request, python):
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o500)
        try:
            if os.geteuid() or sys.platform == "linux":
                powerless = """
                    import ctypes, os
                    if os.geteuid() == 0:  # who may write anywhere, unless it gives that up
                        version, none = (ctypes.c_uint * 2)(0x20080522), (ctypes.c_uint * 6)()
                        assert ctypes.CDLL(None).capset(version, none) == 0
                    try:
                        open(os.path.join(os.environ["XDG_CACHE_HOME"], "relu_xp", "x"), "w")
                    except PermissionError:
                        pass
                    else:
                        raise AssertionError("it can be written")
                """
                script = textwrap.dedent(powerless) + textwrap.dedent(COMPILE)
                assert python(script, XDG_CACHE_HOME=self.root) == ONE
                assert self.files() == []
            else:
                unavailable(request.config, "the superuser writes anywhere")
        finally:
            self.folder.chmod(0o700)

    def test_without_a_home(self, python):
        """As in a container whose user has no name."""
        nobody = """
            import pwd
            def getpwuid(uid):
                raise KeyError(f"uid not found: {uid}")
            pwd.getpwuid = getpwuid
        """
        script = textwrap.dedent(nobody) + textwrap.dedent(COMPILE)
        assert python(script, XDG_CACHE_HOME=None, HOME=None) == ONE

    def test_in_the_home_folder_where_nothing_else_is_said(self, request, python, tmp_path):
        if sys.platform in ("win32", "darwin"):
            unavailable(request.config, "the folder is another on this system")
        for variable in (None, ""):
            python(COMPILE, XDG_CACHE_HOME=variable, HOME=tmp_path)
        self.folder = tmp_path / ".cache" / "relu_xp"
        assert len(self.files()) == 2

    def test_two_processes_at_once(self, python):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            printed = list(pool.map(lambda _: self.compile(python), range(2)))
        assert all(line.endswith("1 True None\n") for line in printed)
        assert len(self.files()) == 2
        assert self.compile(python, "never") == READ


# Begins as a user does, and then asks what has happened.
FRESH = """
    import sys, threading, time
    import numpy as np
    import relu_xp

    x = np.array([-1.0, 0.0, 2.0], np.float32)
    large = np.linspace(-1, 1, 1 << 20, dtype=np.float32)

    def right():
        assert relu_xp.relu(x).tolist() == [0, 0, 2]
        y, pullback = relu_xp.relu_vjp(x)
        assert y.tolist() == [0, 0, 2]
        assert pullback(x).tolist() == [0, 0, 2]
        assert relu_xp.relu_backward(x, x).tolist() == [0, 0, 2]

    def serving():
        from relu_xp import dispatch
        return dispatch.backend_for("f", "x", x).__name__.rpartition(".")[2]

    def work():
        for _ in range(4):
            np.testing.assert_array_equal(relu_xp.relu(large), np.maximum(large, 0))

    def wait_for(what):
        for _ in range(3000):
            if what():
                return
            time.sleep(0.01)
        raise AssertionError("nothing in 30 s")

    def by_kernel():
        from relu_xp.backends.llvm.loader import loader
        call, served = loader.call, []

        def check(*arguments):
            result = call(*arguments)
            served.append(result is not None)
            return result

        loader.call = check
        right()
        loader.call = call
        assert len(served) in (0, 4)
        return any(served) and all(served)

    def compiling():
        return "relu_xp-compiler" in [thread.name for thread in threading.enumerate()]

    def no_trace():
        assert "llvmlite" not in sys.modules
        assert not compiling()
"""


def fresh_process(script):
    return textwrap.dedent(FRESH) + textwrap.dedent(script)


class TestNothingWaits:
    @pytest.fixture(autouse=True)
    def cache(self, require, tmp_path, monkeypatch):
        require("llvmlite")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_small_calls_load_no_compiler(self, python):
        script = """
            right()
            assert serving() == "llvm"
            no_trace()
            from relu_xp.backends import llvm
            for _ in range(llvm._WORTH // llvm._CALL - 10):
                relu_xp.relu(x)
            no_trace()
            assert not by_kernel()
            for _ in range(10):
                relu_xp.relu(x)
            wait_for(by_kernel)
            assert "llvmlite" in sys.modules
        """
        python(fresh_process(script))

    def test_a_thread_of_its_own_compiles_and_ends(self, python):
        script = """
            import relu_xp.backends.llvm
            from relu_xp.backends.llvm import kernels, runtime
            from relu_xp.backends.llvm.loader import loader
            make, go, names = loader.make, threading.Event(), []

            def slow(structure):
                names.append(threading.current_thread().name)
                assert go.wait(30)
                make(structure)

            loader.make = slow
            right()
            assert names == []
            work()
            wait_for(lambda: names)
            for _ in range(100):
                right()
            relu_xp.relu(large)
            assert not by_kernel()
            assert compiling()
            assert "llvmlite" not in sys.modules
            go.set()
            wait_for(by_kernel)
            assert set(names) == {"relu_xp-compiler"}, names
            wait_for(lambda: not compiling())
            assert list(loader.addresses) == [kernels.Structure("float32")]
            assert loader.failure is None
            relu_xp.relu(large.astype(np.float64))  # another structure, another thread
            wait_for(lambda: len(loader.addresses) == 2)
            wait_for(lambda: not compiling())
            work()
        """
        python(fresh_process(script))

    def test_warmup_makes_all_at_once(self, python):
        script = """
            relu_xp.warmup()
            from relu_xp.backends.llvm import kernels, runtime
            from relu_xp.backends.llvm.loader import loader
            made = [s for s in kernels.structures() if loader.engine().serves(s)]
            assert list(loader.addresses) == made
            assert not compiling()
            assert by_kernel()
            assert relu_xp.warmup() is None
        """
        python(fresh_process(script))

    def test_the_environment_can_switch_them_off(self, python):
        script = """
            relu_xp.warmup()
            right()
            work()
            assert serving() == "numpy"
            no_trace()
        """
        python(fresh_process(script), RELU_XP_JIT=0)
        with_kernels = "work()\nwait_for(lambda: not compiling())\nno_trace()"
        python(fresh_process(with_kernels), RELU_XP_JIT=1, status=1, stderr=".*AssertionError\n")

    @pytest.mark.parametrize(
        "absent",
        [
            "sys.modules['llvmlite'] = None",
            "sys.modules['llvmlite.binding'] = None",
            """
            import types
            from relu_xp import dispatch
            dispatch.PathFinder = types.SimpleNamespace(find_spec=lambda name: None)
            sys.modules["llvmlite"] = None
            """,
        ],
        ids=["blocked", "broken", "not-found"],
    )
    @pytest.mark.parametrize("warm", [False, True])
    def test_llvmlite_may_be_missing(self, python, absent, warm):
        script = """
            right()
            if warm:
                relu_xp.warmup()
            work()
            right()
            if serving() == "llvm":
                from relu_xp.backends.llvm.loader import loader
                wait_for(lambda: loader.failure)
                assert isinstance(loader.failure, ImportError)
                wait_for(lambda: not compiling())
                assert not by_kernel()
            assert None in (sys.modules.get(n, 0) for n in ("llvmlite", "llvmlite.binding"))
            work()
            right()
        """
        absent = f"warm = {warm}\n{textwrap.dedent(absent)}\n"
        python(textwrap.dedent(FRESH) + absent + textwrap.dedent(script))

    def test_a_python_without_the_gil_is_left_to_numpy(self, python):
        script = """
            import sysconfig
            from relu_xp.backends.llvm.loader import loader
            known = sysconfig.get_config_var
            sysconfig.get_config_var = lambda name: name == "Py_GIL_DISABLED" or known(name)
            right()
            relu_xp.warmup()
            work()
            right()
            reason = "the kernels are not for a Python without the GIL"
            assert str(loader.failure) == reason
            assert loader.describe() == f"not compiled: {reason}"
            assert not loader.addresses
        """
        python(fresh_process(script))

    @pytest.mark.parametrize("warm", [False, True])
    def test_an_engine_that_fails_leaves_numpy_serving(self, python, warm):
        script = """
            import relu_xp.backends.llvm
            module = sys.modules["relu_xp.backends.llvm.loader"]
            loader, tried = module.loader, []

            def broken():
                tried.append(threading.current_thread().name)
                raise RuntimeError("no engine")

            module.Engine = broken
            if warm:
                relu_xp.warmup()
            work()
            wait_for(lambda: loader.failure)
            assert str(loader.failure) == "no engine"
            wait_for(lambda: not compiling())
            for dtype in (np.float32, np.float64, np.float16):
                large = large.astype(dtype)
                work()
            assert not compiling()
            assert not by_kernel()
            assert len(tried) == 1, tried
            assert not loader.addresses
            relu_xp.warmup()
        """
        python(f"warm = {warm}\n" + fresh_process(script))

    def test_a_kernel_that_fails_leaves_the_others(self, python):
        script = """
            import relu_xp.backends.llvm
            from relu_xp.backends.llvm import kernels, runtime
            from relu_xp.backends.llvm.loader import loader
            loader.make(kernels.Structure("float32"))
            engine = loader.engine()

            def broken(text, names):
                raise RuntimeError("no code")

            engine.addresses = broken
            work()
            for _ in range(3):
                relu_xp.relu(large, negative_slope=0.5)
            wait_for(lambda: loader.failure)
            assert str(loader.failure) == "no code"
            assert relu_xp.relu(x, negative_slope=0.5).tolist() == [-0.5, 0, 2]
            assert by_kernel()
        """
        python(fresh_process(script))


@pytest.mark.usefixtures("served_by_kernels")
class TestMemory:
    def growth(self, function, calls=20_000):
        """Return how many bytes more there are after many calls."""
        for _ in range(100):
            function()
        gc.collect()
        tracemalloc.start()
        try:
            function()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(calls):
                function()
            gc.collect()
            return tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("layout", ["C", "strided"])
    def test_calls_keep_nothing(self, use, layout):
        layout = (CONTIGUOUS | OTHERS)[layout]
        x, dy, out = (fresh(layout, "float32", seed)() for seed in (0, 1, 2))
        _, pullback = relu_xp.relu_vjp(x)
        arrays = x, dy, out
        function = {
            "relu": lambda: relu_xp.relu(x),
            "relu, out": lambda: relu_xp.relu(x, out=out),
            "relu, in place": lambda: relu_xp.relu(x, out=x),
            "vjp": lambda: relu_xp.relu_vjp(x),
            "vjp, out": lambda: relu_xp.relu_vjp(x, out=out),
            "vjp, in place": lambda: relu_xp.relu_vjp(x, out=x),
            "pullback": lambda: pullback(dy),
            "pullback, out": lambda: pullback(dy, out=out),
            "pullback, in place": lambda: pullback(dy, out=dy),
            "backward": lambda: relu_xp.relu_backward(dy, x),
            "backward, out": lambda: relu_xp.relu_backward(dy, x, out=out),
            "backward, over dy": lambda: relu_xp.relu_backward(dy, x, out=dy),
            "backward, over x": lambda: relu_xp.relu_backward(dy, x, out=x),
        }[use]
        with counted() as served:
            function()
        assert all(served) == (layout is CONTIGUOUS["C"])
        before = [sys.getrefcount(array) for array in (*arrays, pullback._saved.data)]
        assert self.growth(function, 20_000 if all(served) else 2000) < 10_000
        assert [sys.getrefcount(array) for array in (*arrays, pullback._saved.data)] == before

    def test_the_check_can_fail(self):
        x, kept = values("float32")[:35], []
        assert self.growth(lambda: kept.append(relu_xp.relu(x)), 2000) > 10_000
        assert self.growth(lambda: kept.append(object()), 2000) > 10_000

    def test_without_memory_an_error_and_then_on(self, request, python):
        if sys.platform != "linux":
            unavailable(request.config, "there is no limit of memory but on Linux")
        script = """
            import resource
            import numpy as np
            import relu_xp
            from relu_xp.backends import numpy as alone
            from relu_xp.backends.llvm.loader import loader

            relu_xp.warmup()
            x = np.zeros(1 << 26, np.float32)
            small = np.array([-1, 2], np.float32)
            y, pullback = relu_xp.relu_vjp(x, out=x)
            calls = {
                "relu": lambda: relu_xp.relu(x),
                "relu_vjp": lambda: relu_xp.relu_vjp(x),
                "pullback": lambda: pullback(x),
                "relu_backward": lambda: relu_xp.relu_backward(x, x),
            }

            def never(*arguments):
                raise AssertionError("NumPy")

            for name in ("forward", "forward_saving", "backward", "backward_from_input"):
                setattr(alone, name, never)
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[0])
            limit = pages * resource.getpagesize() + (1 << 26)
            most = resource.getrlimit(resource.RLIMIT_AS)[1]
            for name, call in calls.items():
                resource.setrlimit(resource.RLIMIT_AS, (limit, most))
                for _ in range(3):
                    try:
                        call()
                    except MemoryError:
                        pass
                    else:
                        raise AssertionError(f"{name} had memory")
                    assert relu_xp.relu(small).tolist() == [0, 2]
                    assert relu_xp.relu_vjp(small)[1](small).tolist() == [0, 2]
                    relu_xp.relu(x, out=x)
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                call()
        """
        python(script)


@pytest.mark.usefixtures("served_by_kernels")
class TestFits:
    @pytest.fixture(params=[numpy_backend, llvm], ids=["numpy", "llvm"])
    def fits(self, request):
        return request.param.fits

    @staticmethod
    def arrays(tmp_path):
        memory = np.zeros(64, np.float32)
        locked = np.zeros(6, np.float32)
        locked.flags.writeable = False
        owner = np.zeros(6, np.float32)
        return [
            owner,
            owner[:],
            owner[::-1],
            *(memory[start : start + 6] for start in (0, 1, 5, 6, 7, 12)),
            memory[0:12:2],
            memory[5::-1],
            memory[:6].reshape(2, 3),
            memory[:6].reshape(3, 2).T,
            memory[20:26].view(np.int32),
            memory[26:38].view(np.float64),
            np.zeros(6, np.float32),
            np.zeros(6, np.float64),
            np.zeros((2, 3), np.float32),
            np.asfortranarray(np.zeros((2, 3), np.float32)),
            np.zeros(()),
            np.zeros((), np.float32),
            np.zeros(0, np.float32),
            np.zeros((0, 3), np.float32),
            np.broadcast_to(np.float32(0), (6,)),
            locked,
            np.memmap(tmp_path / "memmap", np.float32, "w+", shape=6),
        ]

    def test_what_surely_fits_is_lawful(self, fits, tmp_path):
        """Whatever it lets pass, the whole check does too; what there is to pass, it lets."""
        passed = 0
        arrays = self.arrays(tmp_path)
        for out, like, other in itertools.product(arrays, repeat=3):
            if other.shape == like.shape and fits(out, like, other):
                checks.check_out("f", out, like, "x", (like, other), numpy_backend)
                passed += 1
        assert passed > 10
        fresh = np.zeros((3, 4), np.float32)
        assert fits(np.zeros_like(fresh), fresh, np.zeros_like(fresh))
        assert fits(fresh, fresh, fresh)

    @pytest.mark.parametrize("out", [None, [1.0], "text", 1.0, np.float32(1), object()])
    def test_it_may_be_anything(self, fits, out):
        assert not fits(out, np.zeros(3), np.zeros(3))


def test_the_memory_of_a_mask_is_not_lent_again_while_a_part_of_it_is_held():
    size = mask._LARGE
    part = mask.buffer(size)[3:9]
    assert not np.shares_memory(part, mask.buffer(size))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_code_that_others_may_have_written_is_not_run(tmp_path):
    file = tmp_path / "relu_xp" / "code.o"
    engine._write(file, b"code")
    assert engine._read(file) == b"code"
    for path in (file, file.parent):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        assert engine._read(file) is None
        path.chmod(mode)
    assert engine._read(file) == b"code"


def test_a_relative_cache_folder_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert engine.cache_folder().is_absolute()


def test_no_two_words_of_the_board_share_a_place_nor_two_that_are_written_a_line():
    assert len(set(runtime.BOARD.values())) == len(runtime.BOARD)
    written = ("busy", "published", "open", "active", "stop", "taken", "asleep")
    lines = [runtime.BOARD[name] // 8 for name in written]
    assert len(set(lines)) == len(lines)
    read = set(runtime.BOARD) - {*written, "bell"}
    assert not set(lines) & {runtime.BOARD[name] // 8 for name in read}
    assert max(runtime.BOARD.values()) - runtime.BOARD["taken"] < runtime.THREAD_BYTES // 8


class TestCrew:
    """Helpers that do nothing but wait for the bell."""

    @pytest.fixture
    def crew(self):
        with mock.patch.object(crew.threads, "count", return_value=3):
            board = crew.new_board({"none": id(None)})
        self.board, self.come, bell = board, queue.SimpleQueue(), threading.Event()

        def help(number):
            self.come.put(number)
            assert bell.wait(20)

        made = crew.Crew(board, help, bell.set)
        yield made
        made.dismiss()

    def word(self, name):
        return self.board[runtime.BOARD[name]]

    def comers(self, number):
        return {self.come.get(timeout=20) for _ in range(number)}

    def test_they_come_once_and_end_when_they_are_dismissed(self, crew):
        assert (self.word("none"), self.word("threads"), self.word("bell")) == (id(None), 3, 0)
        crew.muster()
        crew.muster()
        assert self.comers(2) == {1, 2}
        first = list(crew._helpers)
        assert all(helper.is_alive() and helper.daemon for helper in first)
        crew.dismiss()
        assert not any(helper.is_alive() for helper in first)
        assert self.word("stop") == 1
        crew.muster()
        assert self.come.empty()

    def test_where_no_thread_can_be_started_there_are_fewer(self, crew, monkeypatch):
        def start(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        crew.muster()
        monkeypatch.undo()
        crew.muster()
        assert crew._helpers == []
        assert self.come.empty()

    def test_a_process_that_was_forked_begins_anew(self, crew):
        crew.muster()
        assert self.comers(2) == {1, 2}
        gone = list(crew._helpers)
        for word in ("busy", "open", "active"):
            self.board[runtime.BOARD[word]] = 1
        self.board[crew_word(2, "asleep")] = 1
        crew._forget()  # as in the child, where these threads are not
        assert [self.word(word) for word in ("busy", "open", "active")] == [0, 0, 0]
        assert self.board[crew_word(2, "asleep")] == 0
        crew.muster()
        assert self.comers(2) == {1, 2}
        assert not {helper.ident for helper in gone} & {helper.ident for helper in crew._helpers}


crew_word = crew._word


class TestEngine:
    @pytest.mark.parametrize(
        ("module", "stand_in", "message"),
        [
            ("sys", {"implementation": types.SimpleNamespace(name="pypy")}, "for 64-bit CPython"),
            ("platform", {"machine": lambda: "RISCV64"}, "processor architecture 'riscv64'"),
            ("sysconfig", {"get_config_var": lambda name: 1}, "not for a Python without the GIL"),
        ],
    )
    def test_what_it_does_not_know_it_refuses(self, monkeypatch, module, stand_in, message):
        monkeypatch.setattr(engine, module, types.SimpleNamespace(**stand_in))
        with pytest.raises(RuntimeError, match=message):
            engine.Engine()

    @pytest.mark.parametrize("field", ["class", "data", "axes", "flags"])
    def test_arrays_that_lie_otherwise_in_memory_are_refused(self, monkeypatch, field):
        moved = {**runtime.FIELDS, field: runtime.FIELDS["dtype"]}
        monkeypatch.setattr(runtime, "FIELDS", moved)
        with pytest.raises(RuntimeError, match="lie in memory in an unknown way"):
            engine.Engine()

    def test_what_was_compiled_is_kept_and_read_again(self, require, monkeypatch, tmp_path):
        require("llvmlite")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        made, text = engine.Engine(), kernels.source(kernels.Structure("float32"))
        assert not made.is_kept(text)
        compiled = made.addresses(text, kernels.NAMES)
        assert made.is_kept(text)
        with mock.patch.object(made._llvm, "parse_assembly", wraps=made._llvm.parse_assembly) as it:
            read = made.addresses(text, kernels.NAMES)
        assert [call.args for call in it.call_args_list] == [("",)], "it was compiled again"
        assert set(read) == set(compiled) == set(kernels.NAMES)
        assert all(read.values())
        assert not set(read.values()) & set(compiled.values())
        (file,) = (tmp_path / "relu_xp").iterdir()
        file.write_bytes(file.read_bytes()[:-1])
        assert not made.is_kept(text)
        assert all(made.addresses(text, kernels.NAMES).values())
        assert made.is_kept(text)

    @pytest.mark.parametrize(
        ("system", "variables", "folder"),
        [
            ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
            ("win32", {}, "~/AppData/Local"),
            ("darwin", {"XDG_CACHE_HOME": "/elsewhere"}, "~/Library/Caches"),
            ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere"),
            ("linux", {}, "~/.cache"),
        ],
    )
    def test_the_folder_is_the_systems(self, monkeypatch, system, variables, folder):
        monkeypatch.setattr(engine, "sys", types.SimpleNamespace(platform=system))
        for name in ("LOCALAPPDATA", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert engine.cache_folder() == Path(folder).expanduser() / "relu_xp"


class TestLoader:
    def test_an_engine_that_fails_is_told_of_and_asked_no_more(self, monkeypatch):
        tries = []

        def fail():
            tries.append(1)
            raise RuntimeError("no such machine")

        monkeypatch.setattr(loading, "Engine", fail)
        made, structure = loading.Loader(), kernels.Structure("float32")
        assert made.describe() == "not compiled: no such machine"
        made.make_all()
        assert len(tries) == 2
        assert str(made.failure) == "no such machine"
        made.request(structure)
        assert made._thread is None
        x = np.ones(3, np.float32)
        made.muster()
        assert made.call(None, 3, None, x) is None
        assert not made.fits(x, x, x, 12)
        assert made.addresses == {}

    def test_a_kernel_that_is_asked_for_is_made_by_a_thread_that_ends(self, require, monkeypatch):
        require("llvmlite")
        made, structure = loading.Loader(), kernels.Structure("float32")
        made._engine = loader.engine()
        made.request(structure)
        made.request(structure)
        thread = made._thread
        if thread is not None:  # else it has done so already
            thread.join(20)
        assert set(made.addresses) == {structure}
        assert (made._thread, made._asked, made.failure) == (None, [], None)

    def test_what_fails_to_compile_leaves_the_reason(self, require, monkeypatch):
        require("llvmlite")
        made = loading.Loader()
        made._engine = loader.engine()
        monkeypatch.setattr(kernels, "source", lambda structure: "nonsense")
        assert made.describe().startswith("not compiled: ")
        assert made.addresses == {}
