"""The compiled kernels: bad input is refused, every result has the bits of the array-API code."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES

import relu_xp
from relu_xp import checks, dispatch, kernels
from relu_xp.activation import Activation
from relu_xp.backends import doubled
from relu_xp.backends import numpy as reference
from relu_xp.mask import Mask, pack, unpack
from relu_xp.testing import oracle

if kernels.cpu is None:
    pytest.skip(f"compiled kernels: {kernels.reason}", allow_module_level=True)
from relu_xp.backends import native

cpu = kernels.cpu
NEVER = 1 << 62

# From how many bytes on the GIL is released, threads are used, stores go past the caches.
MODES = {
    "plain": (NEVER, NEVER, NEVER),
    "without-gil": (0, NEVER, NEVER),
    "threads": (0, 0, NEVER),
    "stream": (0, NEVER, 0),
    "stream-threads": (0, 0, 0),
}
EXTREMES = ("plain", "stream-threads")

# Beyond those of the oracle: numbers that a dtype can only round to infinity or 0, and all
# combinations of what a kernel is compiled for.
MEMBERS = {
    **oracle.MEMBERS,
    "threshold-infinite": {"threshold": 1e300},
    "threshold-minus-infinite": {"threshold": -1e300},
    "maximum-minus-infinite": {"threshold": -1e301, "max_value": -1e300},
    "maximum-infinite": {"max_value": 1e300, "negative_slope": 1e-60},
    "maximum-rounds-to-zero": {"max_value": 1e-60, "negative_slope": -1e-60},
    "slope-rounds-to-zero": {"positive_slope": 1e-60, "threshold": 1e-60},
    "slopes-infinite": {"positive_slope": 1e300, "negative_slope": -1e300},
} | {
    f"{a:g}-{b:g}-{c}": {"negative_slope": a, "positive_slope": b, "max_value": c}
    for a, b, c in itertools.product((0.0, 0.1, 1e-60), (1.0, 1.5), (None, 2.0))
}
WIDE = ("below-zero", "clipped-leaky")  # masks of bits, where 0 has a 1, and of bytes


@contextlib.contextmanager
def mode(name, threads=3):
    """Send every call, of any size, one way."""
    before, count = cpu.set_limits(*MODES[name]), cpu.get_num_threads()
    cpu.set_num_threads(threads)
    try:
        yield
    finally:
        cpu.set_limits(*before)
        cpu.set_num_threads(count)


def cast(member, x):
    return Activation(**MEMBERS[member]).round_to(x.dtype.name)


@functools.cache
def values(dtype, seed=0):
    """Return the oracle's patterns and 2,000 NaN, of either sign, quiet and signalling."""
    form = oracle.Format(dtype)
    rng = np.random.default_rng(seed)
    nan = rng.integers(0, 1 << form.width, 2000, dtype=form.unsigned, endpoint=False)
    patterns = np.concatenate([oracle.patterns(dtype), nan | form.unsigned.type(form.infinity)])
    rng.shuffle(patterns)
    return patterns.view(form.dtype)


def steps(x):
    """Return the strides that are ever taken."""
    return [s for s, length in zip(x.strides, x.shape, strict=True) if x.size and length > 1]


def bits(x):
    return np.array(x).view(f"u{x.itemsize}")


def compare(passes, x, dy, out=None):
    """See that both backends return the same bits, and write nothing else."""
    before = bits(x), bits(dy)
    calls = zip(passes(reference, x, dy, out), passes(native, x, dy, out), strict=True)
    for (name, wanted), (_, got) in calls:
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        assert passes is variants or steps(got) == steps(wanted), name
        np.testing.assert_array_equal(bits(got), bits(wanted), err_msg=name)
        assert np.array_equal(bits(x), before[0]), name
        assert np.array_equal(bits(dy), before[1]), name


def four_numbers(member):
    """Return a function that goes all ways through a member of the family."""

    def passes(backend, x, dy, out=None):
        def fresh(like):
            return None if out is None else out(like)

        numbers, slopes = cast(member, x), cast(member, dy)
        yield "forward", backend.forward(numbers, x, fresh(x))
        y, saved = backend.forward_saving(numbers, x, fresh(x), None)
        yield "forward_saving", y
        yield "mask", saved.data
        yield "order", np.array(saved.axes or ())
        yield "backward", backend.backward(slopes, dy, saved, fresh(dy))
        yield "from input", backend.backward_from_input(numbers, slopes, dy, x, fresh(dy))
        yield "gradient", backend.gradient(numbers, x, fresh(x))
        mine = x.copy("K")
        yield "in place", backend.forward(numbers, mine, mine)
        mine = x.copy("K")
        yield "saving, in place", backend.forward_saving(numbers, mine, mine, None)[0]
        mine = dy.copy("K")
        yield "backward, in place", backend.backward(slopes, mine, saved, mine)
        mine = dy.copy("K")
        yield "over dy", backend.backward_from_input(numbers, slopes, mine, x, mine)
        if x.dtype == dy.dtype:
            mine = x.copy("K")
            yield "over x", backend.backward_from_input(numbers, slopes, dy, mine, mine)

    return passes


SLOPES = np.array([-0.5, 0.0, 1.0, np.nan, -0.0, 1e-8, -np.inf, 3e4, 0.25, 1e300])


def variants(backend, x, dy, out=None):
    """Go through PReLU with slopes of every shape, RReLU, squared ReLU and CReLU."""

    def fresh(like):
        return None if out is None else out(like)

    for kept in itertools.product((False, True), repeat=x.ndim):
        shape = [length if keep else 1 for keep, length in zip(kept, x.shape, strict=True)]
        with np.errstate(over="ignore"):
            slopes = np.resize(SLOPES, shape).astype(x.dtype)
        yield "prelu", backend.sloped(x, x, slopes, fresh(x))
        yield "prelu, dy", backend.sloped(dy, x, slopes, fresh(dy))
        yield "slopes", backend.slopes_gradient(dy, x, slopes, None)
    yield "rrelu", backend.sloped(None, x, slopes, fresh(x))
    yield "rrelu, dy", backend.sloped(dy, None, slopes, fresh(dy))
    mine = x.copy("K")
    yield "prelu, in place", backend.sloped(mine, mine, slopes, mine)
    yield "squared", backend.squared(x, fresh(x))
    yield "squared, dy", backend.backward_squared(dy, x, fresh(dy))
    branches = backend.pieces_of_both(x)
    yield "crelu, branches", branches
    for axis in range(x.ndim):
        both = np.empty(doubled(x.shape, axis), x.dtype)
        yield "crelu", backend.both(x, axis, both)
        half = np.concatenate([dy, dy[::-1]], axis)
        yield "crelu, dy", backend.backward_both(half, branches, axis, fresh(dy))


# ---- Bits ----------------------------------------------------------------------------------------


class TestBits:
    @pytest.mark.parametrize("how", EXTREMES)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    @pytest.mark.parametrize("member", MEMBERS)
    def test_every_member(self, member, dtype, how):
        with mode(how):
            compare(four_numbers(member), values(dtype, 0), values(dtype, 1))

    @pytest.mark.parametrize("how", EXTREMES)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_every_variant(self, dtype, how):
        x, dy = (np.resize(values(dtype, seed), (11, 60, 10)) for seed in (0, 1))
        with mode(how):
            compare(variants, x, dy)

    def test_payloads_are_among_them(self):
        for dtype in oracle.DTYPES:
            form = oracle.Format(dtype)
            y = native.forward(cast("leaky", values(dtype)), values(dtype), None)
            magnitude = bits(y) & form.unsigned.type(form.sign - 1)
            assert len(np.unique(magnitude[magnitude > form.infinity])) > 50

    @pytest.mark.parametrize("dtypes", list(itertools.permutations(oracle.DTYPES, 2)))
    def test_two_dtypes_at_once(self, dtypes):
        count = 9000  # more than two stages of elements
        x, dy = (np.resize(values(name, seed), count) for seed, name in enumerate(dtypes))
        for how in EXTREMES:
            with mode(how):
                for member in ("relu", "clipped-leaky", "everything", "slopes-infinite"):
                    compare(four_numbers(member), x, dy)
                    compare(four_numbers(member), x[::2], dy[::-2])
                compare(variants, x.reshape(9, 100, 10), dy.reshape(9, 100, 10))

    @pytest.mark.parametrize("how", EXTREMES)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_around_the_sizes_of_blocks_stages_and_shares(self, dtype, how):
        """64 elements, 512 bytes, 1024, 4096 and what a thread takes at once."""
        edges = (64, 128, 256, 512, 1024, 4096, 3 * 4096, 1 << 17, 3 << 17)
        for number, (edge, more) in enumerate(itertools.product(edges, (-1, 0, 1, 9))):
            x, dy = (np.resize(values(dtype, seed), edge + more) for seed in (0, 1))
            with mode(how):
                compare(four_numbers(WIDE[number % 2]), x, dy)
                if edge <= 3 * 4096:
                    one = np.resize(values(dtype, 2), 2 * x.size)[::2]
                    compare(four_numbers(WIDE[number % 2]), one, dy)
                    compare(variants, one.reshape(-1, 1), dy.reshape(-1, 1))

    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    @pytest.mark.parametrize("member", ["relu", "relu6", "thresholded", "negative-ceiling"])
    def test_selection_keeps_subnormals_under_flush_to_zero(self, member, dtype, flush_to_zero):
        form, numbers = oracle.Format(dtype), oracle.MEMBERS[member]
        x = oracle.patterns(dtype).view(form.dtype)
        dy = oracle.gradients(dtype, x.size).view(form.dtype)
        wanted = {
            "relu": oracle.forward(dtype, member),
            "y": oracle.forward(dtype, member),
            "relu_grad": oracle.gradient(dtype, member),
            "relu_backward": oracle.backward(dtype, dtype, member),
            "pullback": oracle.backward(dtype, dtype, member),
        }
        for how in EXTREMES:
            with LIBRARIES["native"].running(), mode(how), flush_to_zero():
                assert np.float32(1e-40) * np.float32(1) == 0, "the processor does not flush"
                y, pullback = relu_xp.relu_vjp(x, **numbers)
                got = {
                    "relu": relu_xp.relu(x, **numbers),
                    "y": y,
                    "relu_grad": relu_xp.relu_grad(x, **numbers),
                    "relu_backward": relu_xp.relu_backward(dy, x, **numbers),
                    "pullback": pullback(dy),
                }
            for name, expected in wanted.items():
                keep = ~expected.any_nan
                found = got[name].view(form.unsigned)
                np.testing.assert_array_equal(found[keep], expected.bits[keep], err_msg=name)


INTEGERS = [np.dtype(code) for code in "bhilqBHILQ"]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: dtype.char)
@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"max_value": 7},
        {"threshold": 3, "negative_slope": 2, "positive_slope": 5, "max_value": 100},
        {"positive_slope": 127, "negative_slope": 127},
        {"negative_slope": -3, "threshold": -4, "positive_slope": -1},
    ],
    ids=lambda numbers: "-".join(numbers) or "relu",
)
def test_integers_wrap_around(dtype, numbers):
    info = np.iinfo(dtype)
    if info.min == 0 and min(numbers.values(), default=0) < 0:
        with pytest.raises(ValueError, match="is not a whole number that"):
            Activation(**numbers).round_to(dtype.name)
        return
    a, b = numbers.get("negative_slope", 0), numbers.get("positive_slope", 1)
    t, c = numbers.get("threshold", 0), numbers.get("max_value", info.max)
    few = {info.min, info.min + 1, info.max - 1, info.max, *range(max(info.min, -9), 110)}
    some = sorted({*few, *range(info.min, info.max, info.max // 57)})

    def wrapped(value):
        return (value - info.min) % (info.max - info.min + 1) + info.min

    wanted = [wrapped(a * x) if x <= t else min(wrapped(b * x), c) for x in some]
    rounded = Activation(**numbers).round_to(dtype.name)
    x, wanted = (np.resize(np.array(one, dtype), 9001) for one in (some, wanted))
    for how in EXTREMES:
        with mode(how):
            for view in (np.s_[:], np.s_[::3], np.s_[::-1], np.s_[:0]):
                got = native.forward(rounded, x[view], None)
                np.testing.assert_array_equal(got, wanted[view])
                assert got.dtype == dtype
            mine = x.copy()
            assert native.forward(rounded, mine, mine) is mine
            np.testing.assert_array_equal(mine, wanted)
    np.testing.assert_array_equal(reference.forward(rounded, x, None), wanted)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float64")])
@pytest.mark.parametrize(
    "shape", [(100_003,), (513, 130), (5, 3, 113, 59), (1030, 17, 61), (2, 70_000), (1, 1), ()]
)
def test_slopes_gradient_is_summed_in_an_order_that_the_shape_decides(shape, dtypes):
    rng = np.random.default_rng(4)
    x, dy = (np.asarray(rng.standard_normal(shape)).astype(dtype) for dtype in dtypes)
    for kept in itertools.product((False, True), repeat=len(shape)):
        form = [length if keep else 1 for keep, length in zip(kept, shape, strict=True)]
        slopes = np.zeros(form)
        wanted = reference.slopes_gradient(dy, x, slopes, None)
        terms = np.where(x <= 0, np.float64(x) * dy, 0)
        axes = tuple(axis for axis, length in enumerate(form) if length == 1)
        np.testing.assert_allclose(wanted, terms.sum(axes, keepdims=True), rtol=1e-9, atol=1e-9)
        for order, threads in (("C", 1), ("C", 2), ("F", 3), ("C", 7)):
            one, other = (np.array(a, order=order) for a in (x, dy))
            with mode("threads", threads):
                got = native.slopes_gradient(other, one, slopes, None)
            np.testing.assert_array_equal(bits(got), bits(wanted))


# ---- Layouts -------------------------------------------------------------------------------------


def unaligned(x):
    result = np.frombuffer(bytearray(x.nbytes + 1), np.uint8, offset=1).view(x.dtype)
    result = result.reshape(x.shape)
    result[...] = x
    assert not result.flags.aligned or not x.size
    return result


def permuted(*axes):
    def view(x):
        return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))

    return view


def within(index):
    """Return a function that copies an array into a part of another one, and returns the part."""

    def view(x):
        part = np.zeros([3 * length + 1 for length in x.shape], x.dtype)[index]
        part = part[tuple(map(slice, x.shape))]
        part[...] = x
        return part

    return view


LAYOUTS = {
    "C": np.copy,
    "Fortran": np.asfortranarray,
    "channels last": permuted(0, 2, 1),
    "permuted": permuted(2, 0, 1),
    "permuted back": permuted(1, 2, 0),
    "reversed": lambda x: x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "negative": lambda x: x[:, ::-1].copy()[:, ::-1],
    "every second": within(np.s_[::2, ::2, ::2]),
    "columns": within(np.s_[:, :, 1:]),
    "mixed": lambda x: within(np.s_[::-3, :, ::2])(x.transpose(1, 0, 2)).transpose(1, 0, 2),
    "unaligned": unaligned,
    "unaligned Fortran": lambda x: unaligned(x.T).T,
}
INPUTS = LAYOUTS | {
    "broadcast": lambda x: np.broadcast_to(x[:1, :, :1], x.shape),
    "one value": lambda x: np.broadcast_to(x[:1, :1, :1], x.shape),
    "windows": lambda x: np.lib.stride_tricks.as_strided(x.copy(), x.shape, [x.itemsize] * 3),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


class TestLayouts:
    @pytest.mark.parametrize("layout", INPUTS)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_every_pair_and_another_out(self, dtype, layout):
        outs = itertools.cycle([None, *LAYOUTS.values()])
        members = itertools.cycle(["relu", *WIDE, "everything", "relu6"])
        kinds = itertools.cycle([dtype, dtype, *oracle.DTYPES])
        for shape in (3, 4, 5), (2, 1, 9):
            size = int(np.prod(shape))
            x = INPUTS[layout](values(dtype, 0)[:size].reshape(shape))
            for other, kind in zip(INPUTS.values(), kinds, strict=False):
                dy = other(values(kind, 1)[:size].reshape(shape))
                for make in next(outs), next(outs):
                    out = make and (lambda like, make=make: make(np.zeros(like.shape, like.dtype)))
                    compare(four_numbers(next(members)), x, dy, out)
                compare(variants, x, dy, out)

    @pytest.mark.parametrize("how", EXTREMES)
    @pytest.mark.parametrize("layout", INPUTS)
    def test_large_ones(self, layout, how):
        shape = (37, 41, 7)  # several stages, and parts that begin within a row
        outs = itertools.cycle([None, *LAYOUTS.values()])
        for dtype, other in itertools.product(oracle.DTYPES, ("C", layout, "mixed")):
            size = int(np.prod(shape))
            x, dy = (np.resize(values(dtype, seed), size).reshape(shape) for seed in (0, 1))
            make = next(outs)
            out = make and (lambda like, make=make: make(np.zeros(like.shape, like.dtype)))
            with mode(how):
                for member in WIDE:
                    compare(four_numbers(member), INPUTS[layout](x), INPUTS[other](dy), out)
                compare(variants, INPUTS[layout](x), INPUTS[other](dy), out)

    @pytest.mark.parametrize("how", EXTREMES)
    def test_odd_shapes(self, how):
        for shape in [(), (1,), (0,), (3, 0, 2), (1,) * 64, (1,) * 31 + (2,) + (1,) * 30 + (3, 1)]:
            x, dy = (np.resize(values("float32", seed), shape) for seed in (0, 1))
            for view in (np.copy, functools.partial(np.array, order="F"), np.transpose):
                with mode(how):
                    for member in WIDE:
                        compare(four_numbers(member), view(x), view(dy))
                    assert native.squared(view(x), None).shape == view(x).shape
                    assert native.pieces_of_both(view(x)).dtype == np.uint8
                    slopes = np.zeros((1,) * x.ndim, np.float32)
                    assert native.sloped(view(dy), view(x), slopes, None).shape == view(x).shape
                    native.slopes_gradient(view(dy), view(x), slopes, None)
        strides = (2**62, 4, -(2**61))  # which are never taken
        x = np.lib.stride_tricks.as_strided(values("float32")[:9].copy(), (1, 9, 1), strides)
        compare(four_numbers("clipped-leaky"), x, x)
        compare(variants, x, x)


# ---- What is written -----------------------------------------------------------------------------

LINE = 64
GUARD = 0xA5


def guarded(host, offset):
    """Return memory, and in it an array with a host's values, so many bytes off a cache line."""
    memory = np.full(2 * LINE + offset + host.nbytes + LINE, GUARD, np.uint8)
    start = -memory.ctypes.data % LINE + LINE + offset
    part = memory[start : start + host.nbytes]
    part[...] = host.view(np.uint8)
    return memory, part.view(host.dtype)


class TestWhatIsWritten:
    @staticmethod
    def check(call, out, mask, wanted, wanted_mask, offset):
        """Call with guarded memory for a result and a mask; see every byte of both."""
        memory, y = guarded(out, offset)
        its_memory, data = guarded(mask, offset % 7)
        call(y, data)
        assert y.tobytes() == wanted.tobytes()
        assert data.tobytes() == wanted_mask.tobytes()
        for found, part in (memory, y), (its_memory, data):
            part.view(np.uint8)[...] = GUARD
            assert (found == GUARD).all()

    @pytest.mark.parametrize("how", MODES)
    @pytest.mark.parametrize("member", WIDE)
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    def test_nothing_beside_it_at_every_size_and_offset(self, dtype, member, how):
        most = 300
        x, dy = values(dtype, 0)[:most], values(dtype, 1)[:most]
        numbers = cast(member, x)
        y, saved = reference.forward_saving(numbers, x, None, None)
        dx = reference.backward(numbers, dy, saved, None)
        branches = unpack(saved, x.shape, numbers.pieces).copy()

        def saving(x, out, mask):
            native.forward_saving(numbers, x, out, mask)

        def backward(dy, out, mask):
            native.backward(numbers, dy, Mask(mask, None), out)

        def in_place(_, out, mask):
            native.forward(numbers, out, out)

        def over_dy(x, out, mask):
            native.backward_from_input(numbers, numbers, out, x, out)

        none = np.zeros(0, np.uint8)
        with mode(how, 2):
            for size in range(most + 1):
                one, other, zero = x[:size], dy[:size], np.zeros(size, x.dtype)
                mask = pack(branches[:size], None, numbers.pieces)
                full = np.full_like(mask, 0xFF)
                for lane in {0, size % 32, 5 * size % 32, 31}:
                    for call, given, out, before, wanted, after in (
                        (saving, one, zero, full, y, mask),
                        (backward, other, zero, mask, dx, mask),
                        (in_place, None, one, none, y, none),
                        (over_dy, one, other, none, dx, none),
                    ):
                        offset = lane * x.itemsize % LINE
                        bound = functools.partial(call, given)
                        self.check(bound, out, before, wanted[:size], after, offset)

    @pytest.mark.parametrize("backend", [reference, native], ids=["numpy", "native"])
    @pytest.mark.parametrize("member", WIDE)
    def test_the_rest_of_a_mask_is_left_as_it_is(self, backend, member):
        for size, spare in itertools.product((0, 1, 7, 8, 9, 63, 65, 1000), (0, 1, 7, 64)):
            x = values("float32")[:size]
            numbers = cast(member, x)
            needed = backend.mask_nbytes(numbers, x)
            mask = np.full(needed + spare, GUARD, np.uint8)
            _, saved = backend.forward_saving(numbers, x, None, mask)
            assert (mask[needed:] == GUARD).all()
            assert np.shares_memory(saved.data, mask) or not needed
            wanted = reference.forward_saving(numbers, x, None, None)[1].data
            assert mask[:needed].tobytes() == wanted.tobytes()


# ---- Bad input -----------------------------------------------------------------------------------

X = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
RECORD = Activation().round_to("float32").record
BYTES = Activation(negative_slope=0.5, max_value=1).round_to("float32").record
INTEGER = Activation().round_to("int32").record
DOUBLE = Activation().round_to("float64").record
MASK = np.zeros(3, np.uint8)
SLOPE = np.ones((1, 6), np.float32)
BRANCHES = np.zeros((4, 6), np.uint8)

# Valid arguments, and which of them may be None.
VALID = {
    "forward": ((RECORD, X, None), {2}),
    "forward_with_mask": ((RECORD, X, None, None), {2, 3}),
    "backward": ((RECORD, X, MASK, None, None), {3, 4}),
    "backward_from_input": ((RECORD, RECORD, X, X, None), {2, 4}),
    "prelu": ((X, X, SLOPE, None), {0, 1, 3}),
    "slopes_gradient": ((X, X, (1, 6)), {2}),  # of which NumPy 2.0 makes ()
    "squared_relu": ((X, None), {1}),
    "squared_relu_backward": ((X, X, None), {2}),
    "negated_relu": ((X, None), {1}),
    "crelu_branches": ((X, None), {1}),
    "crelu_backward": ((X, X, BRANCHES, None), {3}),
}

NOT_ARRAYS = {
    "None": None,
    "a number": 1.0,
    "a list": X.tolist(),
    "text": "x",
    "bytes": b"0123456789",
    "a record too short": RECORD[:-1],
    "a record too long": RECORD + b"\0",
    "a scalar": np.float32(1),
    "memory": memoryview(X),
    "a class": np.ndarray,
    "too many axes": (0,) * 65,
    "negative lengths": (-1, 6),
    "huge lengths": (2**62, 2**62),
    "int": X.astype(np.int32),
    "bool": X > 0,
    "complex": X.astype(np.complex64),
    "object": X.astype(object),
    "longdouble": X.astype(np.longdouble),
    "swapped": X.astype(np.dtype(np.float32).newbyteorder()),
    "swapped halves": X.astype(np.dtype(np.float16).newbyteorder()),
    "two raw bytes": X.astype(np.float16).view("V2"),
    "a structure": X.astype(np.float16).view([("it", "f2")]),
    "text array": X.astype("U2"),
    "time": X.astype("m8[s]"),
}
SHAPES = {
    "0-d": X[0, 0, ...],
    "1-D": X.ravel(),
    "empty": X[:0],
    "empty columns": X[:, :0],
    "fewer rows": X[1:],
    "one row": X[:1],
    "fewer columns": X[:, :5],
    "3-D": X[None],
    "64 axes": X.reshape((1,) * 62 + X.shape),
    "no array": X.reshape(6, 4),
}
READ_ONLY = np.frombuffer(bytes(96), np.float32).reshape(4, 6)

REFUSAL = (TypeError, ValueError, OverflowError, MemoryError)


def is_matrix(array):
    return isinstance(array, np.ndarray) and array.ndim == 2


def wrong_arguments():
    """Yield what else is wrong: a function, and arguments that do not go together."""
    for name, (given, _) in VALID.items():
        # Each of several arrays of another shape than the others, and `out`.
        several = sum(map(is_matrix, given)) > 1
        for at, shape in itertools.product(range(len(given)), SHAPES.values()):
            fits = given[at] is SLOPE and shape is SHAPES["one row"]
            if several and is_matrix(given[at]) and not fits:
                yield name, (*given[:at], shape, *given[at + 1 :])
        if given[-1] is None and name != "forward_with_mask":
            shapes = [a.astype(np.uint8) if "branches" in name else a for a in SHAPES.values()]
            for out in (*shapes, READ_ONLY, X.astype("f2"), X.astype("u4")):
                yield name, (*given[:-1], out)
    yield "crelu_branches", (X, BRANCHES.view(np.int8))
    yield "crelu_branches", (X, np.frombuffer(bytes(24), np.uint8).reshape(X.shape))
    yield "crelu_backward", (X, X, BRANCHES.view(np.int8), None)
    yield "crelu_backward", (X, X, X, None)
    yield "crelu_backward", (X, X.astype("f2"), BRANCHES, None)
    yield "squared_relu_backward", (X, X.astype("f8"), None)
    yield "prelu", (X, X, SLOPE.astype("f8"), None)
    yield "prelu", (None, None, X, X[:1])
    yield "prelu", (X[:1], None, X, None)
    for shape in ((), (6,), (4, 5), (1, 4, 6), (0, 6)):
        yield "slopes_gradient", (X, X, shape)

    # Numbers of another dtype, and integers where there are only gradients of floats.
    whole = X.astype(np.int32)
    yield "forward", (INTEGER, X, None)
    yield "forward", (RECORD, whole, None)
    yield "forward", (RECORD, X.astype("f8"), None)
    yield "forward", (INTEGER, whole, X)
    yield "forward", (INTEGER, X.astype("u4"), None)
    yield "forward_with_mask", (INTEGER, whole, None, None)
    yield "backward", (INTEGER, whole, MASK, None, None)
    yield "backward_from_input", (INTEGER, INTEGER, None, whole, None)
    yield "backward_from_input", (RECORD, INTEGER, whole, X, None)
    yield "backward_from_input", (INTEGER, RECORD, X, whole, None)
    yield "backward_from_input", (RECORD, INTEGER, None, X, None)
    yield "backward_from_input", (RECORD, DOUBLE, None, X, None)

    # Masks too short, not contiguous, of two axes or none, of another dtype, read-only.
    for record, size in ((RECORD, 3), (BYTES, 24)):
        for mask in (
            np.zeros(size - 1, np.uint8),
            np.zeros(0, np.uint8),
            np.zeros(2 * size, np.uint8)[::2],
            np.zeros(size, np.uint8)[::-1],
            np.broadcast_to(np.uint8(0), (size,)),
            np.zeros((1, size), np.uint8),
            np.zeros((), np.uint8),
            np.zeros(size, np.int8),
            np.zeros(size, bool),
            np.zeros(size, np.uint16),
            bytes(size),
        ):
            yield "backward", (record, X, mask, None, None)
            yield "forward_with_mask", (record, X, None, mask)
        yield "forward_with_mask", (record, X, None, np.frombuffer(bytes(size), np.uint8))
        yield "forward_with_mask", (record, X, READ_ONLY, np.zeros(size, np.uint8))

    # Axes that are no permutation.
    for axes in ((), (0,), (0, 0), (1, 1), (1, 2), (-1, 0), (0, 1, 2), (0, 2**31), (0, 2**70)):
        yield "backward", (RECORD, X, MASK, axes, None)
    for axes in ([1, 0], 1, (0, "1"), (0, 1.0), (0, None), (np.int64(1), np.int64(0))):
        yield "backward", (RECORD, X, MASK, axes, None)
    yield "backward", (RECORD, X[:, 0], MASK, (1,), None)


def wrong_records():
    """Yield records of the right length whose dtype or variant there is not."""
    for at, first in ((32, 12), (33, 5)):
        for value in (first, first + 1, 127, 128, 255):
            record = bytearray(RECORD)
            record[at] = value
            yield bytes(record)


class TestBadInput:
    def refused(self, name, arguments):
        before = [array.tobytes() for array in (X, SLOPE, MASK, BRANCHES)]
        with pytest.raises(REFUSAL, match="."):
            pytest.fail(f"{name} takes {arguments}: {getattr(cpu, name)(*arguments)}")
        assert before == [array.tobytes() for array in (X, SLOPE, MASK, BRANCHES)]

    @pytest.mark.parametrize("name", VALID)
    def test_arguments_of_no_use(self, name):
        arguments, optional = VALID[name]
        getattr(cpu, name)(*arguments)
        for at, (kind, value) in itertools.product(range(len(arguments)), NOT_ARRAYS.items()):
            if kind != "None" or at not in optional:
                self.refused(name, (*arguments[:at], value, *arguments[at + 1 :]))
        with pytest.raises(TypeError):
            getattr(cpu, name)(*arguments, out=None)
        for count in set(range(9)) - {len(arguments)}:
            self.refused(name, (*arguments, *[None] * 9)[:count])

    def test_arguments_that_do_not_go_together(self):
        for name, arguments in wrong_arguments():
            self.refused(name, arguments)

    def test_records_with_a_field_that_is_wrong(self):
        for record in wrong_records():
            self.refused("forward", (record, X, None))
            self.refused("forward_with_mask", (record, X, None, None))
            self.refused("backward", (record, X, MASK, None, None))
            self.refused("backward_from_input", (record, RECORD, X, X, None))
            self.refused("backward_from_input", (RECORD, record, None, X, None))

    def test_any_record_is_refused_or_taken(self):
        rng = np.random.default_rng(0)
        arrays = [X.astype(dtype) for dtype in (*oracle.DTYPES.values(), *INTEGERS)]
        taken = 0
        for number in range(4000):
            record = bytearray(rng.bytes(40))
            record[32:34] = rng.integers(0, 12), rng.integers(0, 5)
            record, x = bytes(record), arrays[number % len(arrays)]
            mask = np.zeros(24, np.uint8)
            for name, arguments in (
                ("forward", (record, x, None)),
                ("forward_with_mask", (record, x, None, mask)),
                ("backward", (record, x, mask, None, None)),
                ("backward_from_input", (record, record, None, x, None)),
            ):
                with contextlib.suppress(TypeError):
                    getattr(cpu, name)(*arguments)
                    taken += 1
        assert taken > 200

    @pytest.mark.parametrize(
        "call",
        [
            lambda: cpu.set_num_threads(0),
            lambda: cpu.set_num_threads(-1),
            lambda: cpu.set_num_threads(1025),
            lambda: cpu.set_num_threads(2**70),
            lambda: cpu.set_num_threads(1.5),
            lambda: cpu.set_num_threads("2"),
            lambda: cpu.set_num_threads(None),
            lambda: cpu.set_limits(1, 2),
            lambda: cpu.set_limits(1, 2, 2**70),
            lambda: cpu.set_limits(1, 2, "3"),
            lambda: cpu.get_num_threads(1),
            lambda: cpu.fits(X, X),
            lambda: cpu.fits(X, X, X, X),
        ],
    )
    def test_other_functions(self, call):
        before = cpu.get_num_threads(), limits()
        with pytest.raises(REFUSAL):
            call()
        assert (cpu.get_num_threads(), limits()) == before


def limits():
    before = cpu.set_limits(0, 0, 0)
    cpu.set_limits(*before)
    return before


class TestFits:
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

    def test_what_fits_passes_the_whole_check(self, tmp_path):
        passed = 0
        for out, like, other in itertools.product(self.arrays(tmp_path), repeat=3):
            if other.shape == like.shape and native.fits(out, like, other):
                checks.check_out("f", out, like, "x", (like, other), reference)
                passed += 1
        assert passed > 10
        fresh = np.zeros((3, 4), np.float32)
        assert native.fits(np.zeros_like(fresh), fresh, np.zeros_like(fresh))
        assert native.fits(fresh, fresh, fresh)

    @pytest.mark.parametrize("out", [None, [1.0], "text", 1.0, np.float32(1), object(), Mask])
    def test_it_may_be_anything(self, out):
        x = np.zeros(3)
        assert not native.fits(out, x, x)
        assert not cpu.fits(x, out, x)
        assert not cpu.fits(x, x, out)


# ---- Memory and the GIL --------------------------------------------------------------------------


class TestMemory:
    @staticmethod
    def growth(function, calls=10_000):
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

    @pytest.mark.parametrize("view", [np.s_[:], np.s_[:, ::-1]], ids=["contiguous", "strided"])
    @pytest.mark.parametrize("name", VALID)
    def test_calls_keep_nothing(self, name, view):
        own = {id(a): a[view].copy("K") if a.ndim == 2 else a.copy() for a in (X, SLOPE, BRANCHES)}
        arguments = [own.get(id(a), a) for a in VALID[name][0]]
        arguments = [a[view] if isinstance(a, np.ndarray) and a.ndim == 2 else a for a in arguments]
        function = getattr(cpu, name)
        out = np.zeros_like(X, np.uint8 if "branches" in name else None)
        kept = [a for a in arguments if a is not None] + [out, X.dtype, BRANCHES.dtype, None]

        def valid():
            function(*arguments)
            if arguments[-1] is None:
                fresh = (out, MASK.copy()) if name == "forward_with_mask" else (out,)
                function(*arguments[: -len(fresh)], *fresh)

        def wrong():
            *others, _ = arguments
            for bad in ((*others, X[1:]), (*others, READ_ONLY), (None, *arguments[1:]), others):
                with contextlib.suppress(*REFUSAL):
                    function(*bad)

        for call in valid, wrong:
            gc.collect()
            before = [sys.getrefcount(a) for a in kept]
            assert self.growth(call) < 5_000
            after = [sys.getrefcount(a) for a in kept]
            # Others hold some of them, too: a leak would be of 10,000.
            assert all(abs(a - b) < 1000 for a, b in zip(after, before, strict=True))

    def test_the_check_can_fail(self):
        kept = []
        assert self.growth(lambda: kept.append(cpu.forward(RECORD, X, None)), 2000) > 5_000

    def test_a_process_of_many_calls_does_not_grow(self, request, python):
        """Pages, which hold what no allocator of Python's counts; the heap first has to settle."""
        if sys.platform != "linux":
            unavailable(request.config, "the pages of a process are counted as on Linux")
        script = """
            import os, sys
            import numpy as np
            import relu_xp
            from relu_xp.kernels import cpu

            cpu.set_limits(0, 0, 0)
            cpu.set_num_threads(3)
            x, dy = np.random.default_rng(0).standard_normal((2, 20, 300), np.float32)
            layers = [relu_xp.ReLU(), relu_xp.ReLU(max_value=1.0, negative_slope=0.5),
                      relu_xp.PReLU(300), relu_xp.RReLU(), relu_xp.CReLU(), relu_xp.SquaredReLU()]
            kept = []

            def many(number):
                for _ in range(number):
                    for layer in layers:
                        layer.backward(layer.forward(x))
                        layer.backward(layer.forward(x[:, ::2] if layer is not layers[2] else x))
                    relu_xp.relu(x, out=dy)
                    relu_xp.relu_grad(x)
                    for bad in (x[1:], x.astype(complex), None):
                        try:
                            relu_xp.relu_backward(bad, x)
                        except (TypeError, ValueError):
                            pass
                    if "leak" in sys.argv:
                        kept.append(bytes(1024))

            def pages():
                with open("/proc/self/statm") as file:
                    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

            many(300)
            grown = []
            while len(grown) < 4 and not (grown and grown[-1] < 1 << 18):
                before = pages()
                many(700)
                grown.append(pages() - before)
            print(grown[-1])
        """
        assert int(python(script, timeout=200)) < 1 << 18
        assert int(python(script, "leak", timeout=200)) > 1 << 18

    def test_without_memory_an_error_and_then_on(self, request, python):
        if sys.platform != "linux":
            unavailable(request.config, "there is no limit of memory but on Linux")
        script = """
            import resource
            import numpy as np
            import relu_xp

            x = np.zeros((1 << 13, 1 << 13), np.float32)
            small = np.array([-1, 2], np.float32)
            y, pullback = relu_xp.relu_vjp(x, out=x)
            slopes = np.zeros(1 << 13, np.float32)
            calls = [
                lambda: relu_xp.relu(x),
                lambda: relu_xp.relu_vjp(x),
                lambda: relu_xp.relu_vjp(x, out=x, max_value=1.0, negative_slope=0.5),
                lambda: pullback(x),
                lambda: relu_xp.relu_backward(x, x),
                lambda: relu_xp.relu_grad(x.T),
                lambda: relu_xp.prelu(x, slopes),
                lambda: relu_xp.crelu(x),
                lambda: relu_xp.squared_relu(x),
            ]
            relu_xp.relu(x, out=x)  # threads have their stacks
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[0])
            limit = pages * resource.getpagesize() + (1 << 25)
            most = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))
            for number, call in enumerate(calls):
                for _ in range(3):
                    try:
                        call()
                    except MemoryError:
                        pass
                    else:
                        raise AssertionError(f"call {number} had memory")
                    assert relu_xp.relu(small).tolist() == [0, 2]
                    assert relu_xp.relu_vjp(small)[1](small).tolist() == [0, 2]
                    relu_xp.relu(x, out=x)
        """
        python(script)


class TestGil:
    """Another thread gets the GIL only when a call releases it: it is not to be asked for."""

    @pytest.fixture(autouse=True)
    def no_switches(self):
        before = sys.getswitchinterval()
        sys.setswitchinterval(1000)
        yield
        sys.setswitchinterval(before)

    @staticmethod
    def ran_meanwhile(x, calls):
        go, ran = threading.Lock(), []
        go.acquire()

        def other():
            with go:
                ran.append(1)

        thread = threading.Thread(target=other)
        thread.start()
        go.release()
        numbers = Activation().round_to("float32")
        for _ in range(calls):
            native.forward(numbers, x, x)
            if ran:
                break
        found = bool(ran)
        thread.join()
        return found

    def test_large_calls_release_it(self):
        assert self.ran_meanwhile(np.zeros(1 << 22, np.float32), 1000)

    @pytest.mark.skipif(
        not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no GIL"
    )
    def test_small_calls_keep_it(self):
        assert not self.ran_meanwhile(np.zeros(64, np.float32), 200_000)


# ---- Which kernels serve -------------------------------------------------------------------------

TESTS = Path(__file__).parent
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")

# Prints the instruction set, and digests of every dtype; or the error of the first call.
DIGESTS = """
    import sys
    import numpy as np
    import relu_xp
    assert not [name for name in sys.modules if name.startswith("relu_xp.kernels")]
    try:
        relu_xp.relu(np.ones(3))
    except ValueError as error:
        sys.exit(print("ValueError", error))
    sys.path.insert(0, sys.argv[1])
    import bits
    from relu_xp import kernels
    print(kernels.cpu.instruction_set)
    wanted = "layouts", "prelu", "crelu", "squared_relu", "sums", "integers", "by float16 vjp"
    for name, (function, *arguments) in bits.groups().items():
        if name.endswith(wanted):
            print(name, bits.digest(function(*arguments)))
"""


class TestInstructionSet:
    @pytest.fixture(autouse=True)
    def x86(self):
        if cpu.instruction_set == "baseline":
            pytest.skip("not an x86 processor: there is one instruction set")

    def test_every_level_has_the_same_bits(self, python):
        wanted = (TESTS / "digests.txt").read_text().splitlines()
        name, *digests = python(DIGESTS, TESTS, timeout=300).splitlines()
        assert len(digests) > 30
        assert set(digests) <= set(wanted)
        for level in LEVELS:
            found, *others = python(DIGESTS, TESTS, timeout=300, RELU_XP_CPU=level).splitlines()
            if level > name:
                said = f"RELU_XP_CPU asks for {level}, which this processor does not have; "
                assert found.startswith(f"ValueError {said}")
            else:
                assert (found, others) == (level, digests)

    @pytest.mark.parametrize("level", ["x86-64-v1", "x86-64-v5", "avx2", "X86-64-V3", "x86-64-v3 "])
    def test_what_is_no_level_is_refused(self, python, level):
        said = python(DIGESTS, TESTS, RELU_XP_CPU=level)
        levels = "x86-64-v2, x86-64-v3 or x86-64-v4"
        assert said == f"ValueError RELU_XP_CPU must be {levels}, got '{level}'\n"

    def test_other_libraries_do_not_ask_for_it(self, python, require):
        require("array_api_strict")
        script = """
            import array_api_strict, sys
            import relu_xp
            print(relu_xp.relu(array_api_strict.asarray([-1.0, 2.0])))
            assert "relu_xp.kernels" not in sys.modules
        """
        assert "2" in python(script, RELU_XP_CPU="nonsense", RELU_XP_NUM_THREADS="nonsense")


class TestWithout:
    SCRIPT = """
        import importlib.abc, sys
        import numpy as np
        import relu_xp

        assert not [name for name in sys.modules if name.startswith("relu_xp.kernels")]
        HIDE
        x = np.array([-1.0, -0.0, 2.0, np.nan], np.float32)
        np.testing.assert_array_equal(relu_xp.relu(x), [0, 0, 2, np.nan])
        np.testing.assert_array_equal(relu_xp.relu_vjp(x)[1](x), [0, 0, 2, np.nan])
        from relu_xp import dispatch, kernels
        print(dispatch.BACKENDS[np.ndarray].__name__, kernels.reason, sep="; ")
        if kernels.cpu is None:
            assert dispatch.module_of("numpy") == "relu_xp.backends.numpy"
            assert "relu_xp.backends.native" not in sys.modules
            assert relu_xp.get_num_threads() == 1
            relu_xp.set_num_threads(2)
            assert relu_xp.get_num_threads() == 1
    """

    def test_the_module_is_loaded_by_the_first_array(self, python):
        assert python(self.SCRIPT.replace("HIDE", "")) == "relu_xp.backends.native; \n"
        assert dispatch.module_of("numpy") == "relu_xp.backends.native"

    def test_the_environment_can_switch_it_off(self, python):
        script = self.SCRIPT.replace("HIDE", "")
        said = "relu_xp.backends.numpy; switched off by RELU_XP_NATIVE=0\n"
        assert python(script, RELU_XP_NATIVE=0) == said
        assert python(script, RELU_XP_NATIVE=1) == "relu_xp.backends.native; \n"

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            ("ModuleNotFoundError", "not compiled: no C++ compiler when"),
            ("ImportError", "not loaded: undefined symbol"),
        ],
    )
    def test_a_module_that_cannot_be_had_is_told_of(self, python, error, reason):
        hide = f"""
        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "relu_xp.kernels._cpu":
                    raise {error}("undefined symbol")

        sys.meta_path.insert(0, Finder())
        """
        said = python(self.SCRIPT.replace("HIDE", hide.strip()))
        assert said.startswith(f"relu_xp.backends.numpy; {reason}")


def test_an_empty_slice_keeps_its_strides_and_is_left_alone():
    x = np.empty((4, 2, 300), np.float32)[:0]
    assert all(x.strides)
    assert relu_xp.prelu(x, np.ones(2, np.float32), out=x) is x
    assert relu_xp.PReLU(2, inplace=True).forward(x) is x


def test_a_mask_is_a_tuple_like_any_other():
    _, pullback = relu_xp.relu_vjp(np.ones(3))
    saved = pullback._saved
    assert type(saved) is Mask
    assert saved.axes is None
    with pytest.raises(TypeError, match="unhashable"):
        hash(saved)


def test_more_processors_than_threads_are_possible(python):
    script = """
        import os
        os.sched_getaffinity = lambda _: set(range(5000))
        import numpy, relu_xp
        relu_xp.relu(numpy.ones(3))
        print(relu_xp.get_num_threads())
    """
    assert int(python(script)) <= 1024
