"""The compiled kernels: invalid input raises, every result has the bits of `NumpyBackend`."""

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
from libraries import unavailable

import relu_xp
from relu_xp import kernels, validation
from relu_xp.arrays import concatenated_shape
from relu_xp.backends.numpy import NumpyBackend
from relu_xp.mask import Mask, mask_nbytes, pack, unpack
from relu_xp.parameters import make_parameters
from relu_xp.testing import reference

if kernels.cpu is None:
    pytest.skip(f"compiled kernels: {kernels.reason}", allow_module_level=True)
from relu_xp.backends.compiled import CompiledBackend

cpu = kernels.cpu
numpy_backend, compiled_backend = NumpyBackend(), CompiledBackend()
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

# Beyond those of the reference: parameters that a dtype can only round to infinity or 0, and all
# combinations that a kernel is compiled for.
PRESETS = {
    **reference.PRESETS,
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
TWO_MASKS = ("below-zero", "clipped-leaky")  # of bits, where 0 has a 1, and of bytes
INTEGERS = [np.dtype(code) for code in "bhilqBHILQ"]


@contextlib.contextmanager
def mode(name, threads=3):
    """Run every call, of any size, in one mode."""
    before, count = cpu.set_limits(*MODES[name]), cpu.get_num_threads()
    cpu.set_num_threads(threads)
    try:
        yield
    finally:
        cpu.set_limits(*before)
        cpu.set_num_threads(count)


def cast(dtype, negative_slope=0.0, threshold=0.0, positive_slope=1.0, max_value=None):
    parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
    return parameters.cast(np.dtype(dtype).name)


@functools.cache
def values(dtype, seed=0):
    """Return the reference's patterns and 2,000 NaN, of either sign, quiet and signalling."""
    form = reference.Format(dtype)
    rng = np.random.default_rng(seed)
    nan = rng.integers(0, 1 << form.width, 2000, dtype=form.unsigned, endpoint=False)
    patterns = np.concatenate([reference.patterns(dtype), nan | form.unsigned.type(form.infinity)])
    rng.shuffle(patterns)
    return patterns.view(form.dtype)


def pair(dtype, shape, dy_dtype=None):
    """Return x and dy of a shape."""
    return (np.resize(values(d, seed), shape) for seed, d in enumerate((dtype, dy_dtype or dtype)))


def used_strides(x):
    return [s for s, length in zip(x.strides, x.shape, strict=True) if x.size and length > 1]


def bits(x):
    return np.array(x).view(f"u{x.itemsize}")


def compare(passes, x, dy, out=None):
    """Assert that both backends return the same bits, and do not write to their inputs."""
    before = bits(x), bits(dy)
    calls = zip(
        passes(numpy_backend, x, dy, out), passes(compiled_backend, x, dy, out), strict=True
    )
    for (name, wanted), (_, got) in calls:
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        assert passes is other_activations or used_strides(got) == used_strides(wanted), name
        np.testing.assert_array_equal(bits(got), bits(wanted), err_msg=name)
        assert np.array_equal(bits(x), before[0]), name
        assert np.array_equal(bits(dy), before[1]), name


def preset(name):
    """Return a function that makes all calls with the parameters of a preset."""

    def passes(backend, x, dy, out=None):
        def new(like):
            return None if out is None else out(like)

        params, grad_params = (cast(a.dtype, **PRESETS[name]) for a in (x, dy))
        yield "forward", backend.forward(params, x, new(x))
        y, mask = backend.forward_with_mask(params, x, new(x), None)
        yield "forward_with_mask", y
        yield "mask", mask.data
        yield "axes", np.array(mask.axes or ())
        yield "backward", backend.backward(grad_params, dy, mask, new(dy))
        yield "from input", backend.backward_from_input(params, grad_params, dy, x, new(dy))
        yield "gradient", backend.backward_from_input(params, params, None, x, new(x))
        a = x.copy("K")
        yield "in place", backend.forward(params, a, a)
        a = x.copy("K")
        yield "with mask, in place", backend.forward_with_mask(params, a, a, None)[0]
        a = dy.copy("K")
        yield "backward, in place", backend.backward(grad_params, a, mask, a)
        a = dy.copy("K")
        yield "over dy", backend.backward_from_input(params, grad_params, a, x, a)
        if x.dtype == dy.dtype:
            a = x.copy("K")
            yield "over x", backend.backward_from_input(params, grad_params, dy, a, a)

    return passes


WEIGHTS = np.array([-0.5, 0.0, 1.0, np.nan, -0.0, 1e-8, -np.inf, 3e4, 0.25, 1e300])


def other_activations(backend, x, dy, out=None):
    """Call PReLU with weights of every shape, RReLU, squared ReLU and CReLU."""

    def new(like):
        return None if out is None else out(like)

    for kept in itertools.product((False, True), repeat=x.ndim):
        shape = [length if keep else 1 for keep, length in zip(kept, x.shape, strict=True)]
        with np.errstate(over="ignore"):
            weight = np.resize(WEIGHTS, shape).astype(x.dtype)
        yield "prelu", backend.prelu(x, x, weight, new(x))
        yield "prelu, dy", backend.prelu(dy, x, weight, new(dy))
        yield "weight", backend.prelu_weight_grad(dy, x, weight)
    yield "rrelu", backend.prelu(None, x, weight, new(x))
    yield "rrelu, dy", backend.prelu(dy, None, weight, new(dy))
    a = x.copy("K")
    yield "prelu, in place", backend.prelu(a, a, weight, a)
    yield "squared", backend.squared_relu(x, new(x))
    yield "squared, dy", backend.squared_relu_backward(dy, x, new(dy))
    mask = backend.crelu_mask(x)
    yield "crelu, mask", mask
    for axis in range(x.ndim):
        out_array = np.empty(concatenated_shape(x.shape, axis), x.dtype)
        yield "crelu", backend.crelu(x, axis, out_array)
        twice = np.concatenate([dy, dy[::-1]], axis)
        yield "crelu, dy", backend.crelu_backward(twice, mask, axis, new(dy))
    for axis, name in zip(range(x.ndim), itertools.cycle(["relu", "everything", "below-zero"])):
        yield from biased(name, axis)(backend, x, dy, out)


def biased(name, axis):
    """Return the calls of a bias and ReLU along an axis."""

    def passes(backend, x, dy, out=None):
        def new(like):
            return None if out is None else out(like)

        params, grad_params = (cast(a.dtype, **PRESETS[name]) for a in (x, dy))
        with np.errstate(over="ignore"):
            bias = np.resize(WEIGHTS, 3 * x.shape[axis])[::3].astype(dy.dtype)
        yield "bias", backend.bias_relu(params, x, bias, axis, new(x))
        y, mask = backend.bias_relu_with_mask(params, x, bias, axis, new(x), None)
        yield "bias, with mask", y
        yield "bias, mask", mask.data
        yield "bias, axes", np.array(mask.axes or ())
        for dtype, target in ((x.dtype, new(dy)), (np.dtype(np.float32), None)):
            dx, total = backend.bias_relu_backward(grad_params, dy, mask, axis, dtype, target)
            yield "bias, dx", dx
            yield "bias, sum", total
        a = x.copy("K")
        yield "bias, in place", backend.bias_relu(params, a, bias, axis, a)
        a = x.copy("K")
        yield "bias, in place", backend.bias_relu_with_mask(params, a, bias, axis, a, None)[0]
        a = dy.copy("K")
        yield from zip(
            ("bias, over dy", "bias, sum"),
            backend.bias_relu_backward(grad_params, a, mask, axis, x.dtype, a),
            strict=True,
        )

    return passes


# ---- Bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", EXTREMES)
@pytest.mark.parametrize("dtype", reference.DTYPES)
class TestBits:
    @pytest.mark.parametrize("name", PRESETS)
    def test_presets(self, name, dtype, how):
        with mode(how):
            compare(preset(name), values(dtype, 0), values(dtype, 1))

    def test_other_activations(self, dtype, how):
        with mode(how):
            compare(other_activations, *pair(dtype, (11, 60, 10)))

    @pytest.mark.slow
    def test_around_the_sizes_of_blocks_and_shares(self, dtype, how):
        """64 elements, 512 bytes, 1024, 4096 and the elements that a thread takes at once."""
        edges = (64, 128, 256, 512, 1024, 4096, 3 * 4096, 1 << 17, 3 << 17)
        for number, (edge, more) in enumerate(itertools.product(edges, (-1, 0, 1, 9))):
            x, dy = pair(dtype, edge + more)
            with mode(how):
                compare(preset(TWO_MASKS[number % 2]), x, dy)
                if edge <= 3 * 4096:
                    strided = np.resize(values(dtype, 2), 2 * x.size)[::2]
                    compare(preset(TWO_MASKS[number % 2]), strided, dy)
                    compare(other_activations, strided.reshape(-1, 1), dy.reshape(-1, 1))


@pytest.mark.parametrize("dtypes", list(itertools.permutations(reference.DTYPES, 2)))
def test_two_dtypes_at_once(dtypes):
    x, dy = pair(dtypes[0], 9000, dtypes[1])
    for how in EXTREMES:
        with mode(how):
            for name in ("relu", "clipped-leaky", "everything", "slopes-infinite"):
                compare(preset(name), x, dy)
                compare(preset(name), x[::2], dy[::-2])
            compare(other_activations, x.reshape(9, 100, 10), dy.reshape(9, 100, 10))
    x, dy = pair(dtypes[0], 70_000, dtypes[1])  # beyond all buffers of a thread
    compare(preset("relu"), x, dy)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_payloads_are_among_the_compared_bits(dtype):
    form = reference.Format(dtype)
    y = compiled_backend.forward(cast(form.dtype, 0.01), values(dtype), None)
    magnitude = bits(y) & form.unsigned.type(form.sign - 1)
    assert len(np.unique(magnitude[magnitude > form.infinity])) > 50


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: dtype.char)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_value": 7},
        {"threshold": 3, "negative_slope": 2, "positive_slope": 5, "max_value": 100},
        {"positive_slope": 127, "negative_slope": 127},
        {"negative_slope": -3, "threshold": -4, "positive_slope": -1},
    ],
    ids=lambda params: "-".join(params) or "relu",
)
def test_integers_wrap_around(dtype, params):
    info = np.iinfo(dtype)
    if info.min == 0 and min(params.values(), default=0) < 0:
        with pytest.raises(ValueError, match=dtype.name):
            cast(dtype, **params)
        return
    a, b = params.get("negative_slope", 0), params.get("positive_slope", 1)
    t, c = params.get("threshold", 0), params.get("max_value", info.max)
    few = {info.min, info.min + 1, info.max - 1, info.max, *range(max(info.min, -9), 110)}
    some = sorted({*few, *range(info.min, info.max, info.max // 57)})

    def wrap(value):
        return (value - info.min) % (info.max - info.min + 1) + info.min

    wanted = [wrap(a * x) if x <= t else min(wrap(b * x), c) for x in some]
    record = cast(dtype, **params)
    x, wanted = (np.resize(np.array(one, dtype), 9001) for one in (some, wanted))
    for how in EXTREMES:
        with mode(how):
            for view in (np.s_[:], np.s_[::3], np.s_[::-1], np.s_[:0]):
                got = compiled_backend.forward(record, x[view], None)
                np.testing.assert_array_equal(got, wanted[view])
                assert got.dtype == dtype
            a = x.copy()
            assert compiled_backend.forward(record, a, a) is a
            np.testing.assert_array_equal(a, wanted)
    np.testing.assert_array_equal(numpy_backend.forward(record, x, None), wanted)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float64")])
@pytest.mark.parametrize(
    "shape", [(100_003,), (513, 130), (5, 3, 113, 59), (1030, 17, 61), (2, 70_000), (1, 1), ()]
)
def test_the_shape_alone_decides_the_order_of_additions(shape, dtypes):
    rng = np.random.default_rng(4)
    x, dy = (np.asarray(rng.standard_normal(shape)).astype(dtype) for dtype in dtypes)
    for kept in itertools.product((False, True), repeat=len(shape)):
        form = [length if keep else 1 for keep, length in zip(kept, shape, strict=True)]
        weight = np.zeros(form)
        wanted = numpy_backend.prelu_weight_grad(dy, x, weight)
        terms = np.where(x <= 0, np.float64(x) * dy, 0)
        axes = tuple(axis for axis, length in enumerate(form) if length == 1)
        np.testing.assert_allclose(wanted, terms.sum(axes, keepdims=True), rtol=1e-9, atol=1e-9)
        for order, threads in (("C", 1), ("C", 2), ("F", 3), ("C", 7)):
            with mode("threads", threads):
                arrays = np.array(dy, order=order), np.array(x, order=order)
                got = compiled_backend.prelu_weight_grad(*arrays, weight)
            np.testing.assert_array_equal(bits(got), bits(wanted))


# Lines of several rows, segments of some channels, channels longer than their lanes; with one part,
# and with many.
BIAS_SHAPES = [(3,), (700, 3), (100_003, 2), (513, 130), (300, 5000), (5, 3, 113, 59), (40, 9000)]
BIAS_SHAPES += [(2, 3, 70, 70), (33, 7, 600), (1, 1), (4096, 64), (65, 2, 20, 25), (9, 17_000)]
BIAS_SHAPES += [(3, 300, 200), (1, 5, 60_000)]
# Fewer rows than a line has at most; two rows of one long channel; one element more than lanes;
# one part, almost two; as many parts as there may be.
BIAS_SHAPES += [(7, 42), (7, 1, 250), (3, 5, 129), (63, 9000), (2080, 1024)]


def with_axis(place, axis, array):
    """Return a copy with an axis in another place in memory, the others in C order."""
    return np.moveaxis(np.moveaxis(array, axis, place).copy(), place, axis)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_shape_and_axis_alone_decide_the_order_of_additions(shape, dtype):
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    params = cast(dtype)
    for axis, length in enumerate(shape):
        bias = np.zeros(length)
        _, mask = numpy_backend.bias_relu_with_mask(params, x, bias, axis, None, None)
        arguments = axis, bias.dtype, None
        dx, wanted = numpy_backend.bias_relu_backward(params, dy, mask, *arguments)
        others = tuple(other for other in range(x.ndim) if other != axis)
        exact = dx.astype(np.float64).sum(others)
        np.testing.assert_allclose(wanted, exact, rtol=1e-9, atol=1e-9)
        last, first = (functools.partial(with_axis, place, axis) for place in (-1, 0))
        for layout, layout_of_dy, threads in (
            (np.copy, np.copy, 1),
            (np.copy, np.copy, 2),
            (np.asfortranarray, np.asfortranarray, 3),
            (np.copy, np.asfortranarray, 7),
            (last, last, 1),
            (last, last, 5),
            (last, np.copy, 2),
            (first, first, 1),
            (first, first, 3),
        ):
            with mode("threads", threads):
                a, b = layout(x), layout_of_dy(dy)
                _, mask = compiled_backend.bias_relu_with_mask(params, a, bias, axis, None, None)
                _, got = compiled_backend.bias_relu_backward(params, b, mask, *arguments)
            np.testing.assert_array_equal(bits(got), bits(wanted))


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_the_sum_of_many_rows_is_right(dtype):
    """A million ones, and what a float32 would lose between two numbers that cancel."""
    dy = np.ones((1 << 20, 3), dtype)
    dy[0, 1], dy[-1, 1] = 4096, -4096
    dy[:, 2] = np.resize([0.25, -0.25, 2**-7], len(dy))
    _, pullback = relu_xp.bias_relu_vjp(dy, np.ones(3), threshold=-1e4)
    exact = np.float64(dy).sum(0)
    np.testing.assert_array_equal(pullback(dy)[1], exact)
    assert exact[1] == (1 << 20) - 2


# ---- Layouts -------------------------------------------------------------------------------------


def unaligned(x):
    result = np.frombuffer(bytearray(x.nbytes + 1), np.uint8, offset=1).view(x.dtype)
    result = result.reshape(x.shape)
    result[...] = x
    assert not result.flags.aligned or not x.size
    return result


def permuted(*axes):
    return lambda x: np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))


def part(index):
    """Return a function that copies an array into a part of another one, and returns the part."""

    def view(x):
        found = np.zeros([3 * length + 1 for length in x.shape], x.dtype)[index]
        found = found[tuple(map(slice, x.shape))]
        found[...] = x
        return found

    return view


LAYOUTS = {
    "C": np.copy,
    "Fortran": np.asfortranarray,
    "channels last": permuted(0, 2, 1),
    "permuted": permuted(2, 0, 1),
    "permuted back": permuted(1, 2, 0),
    "reversed": lambda x: x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "negative": lambda x: x[:, ::-1].copy()[:, ::-1],
    "every second": part(np.s_[::2, ::2, ::2]),
    "columns": part(np.s_[:, :, 1:]),
    "mixed": lambda x: part(np.s_[::-3, :, ::2])(x.transpose(1, 0, 2)).transpose(1, 0, 2),
    "unaligned": unaligned,
    "unaligned Fortran": lambda x: unaligned(x.T).T,
}
INPUTS = LAYOUTS | {
    "broadcast": lambda x: np.broadcast_to(x[:1, :, :1], x.shape),
    "one value": lambda x: np.broadcast_to(x[:1, :1, :1], x.shape),
    "windows": lambda x: np.lib.stride_tricks.as_strided(x.copy(), x.shape, [x.itemsize] * 3),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


def new_in(layout):
    return layout and (lambda like: layout(np.zeros(like.shape, like.dtype)))


class TestLayouts:
    @pytest.mark.parametrize("layout", INPUTS)
    @pytest.mark.parametrize("dtype", reference.DTYPES)
    def test_every_pair_and_another_out(self, dtype, layout):
        outs = itertools.cycle([None, *LAYOUTS.values()])
        names = itertools.cycle(["relu", *TWO_MASKS, "everything", "relu6"])
        dy_dtypes = itertools.cycle([dtype, dtype, *reference.DTYPES])
        for shape in (3, 4, 5), (2, 1, 9):
            for other, dy_dtype in zip(INPUTS.values(), dy_dtypes, strict=False):
                x, dy = pair(dtype, shape, dy_dtype)
                x, dy = INPUTS[layout](x), other(dy)
                for out in map(new_in, (next(outs), next(outs))):
                    compare(preset(next(names)), x, dy, out)
                compare(other_activations, x, dy, out)

    @pytest.mark.parametrize("how", EXTREMES)
    @pytest.mark.parametrize("layout", INPUTS)
    def test_large_ones(self, layout, how):
        outs = itertools.cycle([None, *LAYOUTS.values()])
        for dtype, other in itertools.product(reference.DTYPES, ("C", layout, "mixed")):
            x, dy = pair(dtype, (37, 41, 7))  # threads' parts begin within a row
            x, dy, out = INPUTS[layout](x), INPUTS[other](dy), new_in(next(outs))
            with mode(how):
                for name in TWO_MASKS:
                    compare(preset(name), x, dy, out)
                compare(other_activations, x, dy, out)

    @pytest.mark.parametrize("how", EXTREMES)
    def test_odd_shapes(self, how):
        for shape in [(), (1,), (0,), (3, 0, 2), (1,) * 64, (1,) * 31 + (2,) + (1,) * 30 + (3, 1)]:
            for view in (np.copy, functools.partial(np.array, order="F"), np.transpose):
                x, dy = map(view, pair("float32", shape))
                weight = np.zeros((1,) * x.ndim, np.float32)
                with mode(how):
                    for name in TWO_MASKS:
                        compare(preset(name), x, dy)
                    assert compiled_backend.squared_relu(x, None).shape == x.shape
                    assert compiled_backend.crelu_mask(x).dtype == np.uint8
                    assert compiled_backend.prelu(dy, x, weight, None).shape == x.shape
                    compiled_backend.prelu_weight_grad(dy, x, weight)
        unused_strides = (2**62, 4, -(2**61))
        x = values("float32")[:9].copy()
        x = np.lib.stride_tricks.as_strided(x, (1, 9, 1), unused_strides)
        compare(preset("clipped-leaky"), x, x)
        compare(other_activations, x, x)

    def test_an_empty_slice_keeps_its_strides(self):
        x = np.empty((4, 2, 300), np.float32)[:0]
        assert all(x.strides)
        assert relu_xp.prelu(x, np.ones(2, np.float32), out=x) is x
        assert relu_xp.PReLU(2, inplace=True).forward(x) is x


# ---- What is written -----------------------------------------------------------------------------

LINE = 64
GUARD = 0xA5


def guarded(host, offset):
    """Return memory, and in it an array with a host's values, `offset` bytes off a cache line."""
    memory = np.full(2 * LINE + offset + host.nbytes + LINE, GUARD, np.uint8)
    start = -memory.ctypes.data % LINE + LINE + offset
    found = memory[start : start + host.nbytes]
    found[...] = host.view(np.uint8)
    return memory, found.view(host.dtype)


def check_writes(call, out, mask, wanted, wanted_mask, offset):
    """Call with guarded memory for a result and a mask; compare every byte of both."""
    memory, y = guarded(out, offset)
    mask_memory, data = guarded(mask, offset % 7)
    call(y, data)
    assert y.tobytes() == wanted.tobytes()
    assert data.tobytes() == wanted_mask.tobytes()
    for found, its in (memory, y), (mask_memory, data):
        its.view(np.uint8)[...] = GUARD
        assert (found == GUARD).all()


@pytest.mark.slow
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", TWO_MASKS)
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_nothing_is_written_beside_the_output_at_any_size_and_offset(dtype, name, how):
    largest = 300
    x, dy = pair(dtype, largest)
    params = cast(x.dtype, **PRESETS[name])
    y, saved = numpy_backend.forward_with_mask(params, x, None, None)
    dx = numpy_backend.backward(params, dy, saved, None)
    bias = values(dtype, 2)[:largest]
    with_bias, biased_mask = numpy_backend.bias_relu_with_mask(params, x, bias, 0, None, None)
    biased_codes = unpack(biased_mask, x.shape, params.num_branches).copy()
    codes = unpack(saved, x.shape, params.num_branches).copy()

    def forward(x, out, mask):
        compiled_backend.forward_with_mask(params, x, out, mask)

    def backward(dy, out, mask):
        compiled_backend.backward(params, dy, Mask(mask, None), out)

    def forward_bias(x, out, mask):
        compiled_backend.bias_relu_with_mask(params, x, bias[: x.size], 0, out, mask)

    def backward_bias(dy, out, mask):
        arguments = params, dy, Mask(mask, None), 0, dy.dtype, out
        assert compiled_backend.bias_relu_backward(*arguments)[1].size == dy.size

    def in_place(_, out, mask):
        compiled_backend.forward(params, out, out)

    def over_dy(x, out, mask):
        compiled_backend.backward_from_input(params, params, out, x, out)

    none = np.zeros(0, np.uint8)
    with mode(how, 2):
        for size in range(largest + 1):
            one, other, zero = x[:size], dy[:size], np.zeros(size, x.dtype)
            mask = pack(codes[:size], None, params.num_branches)
            other_mask = pack(biased_codes[:size], None, params.num_branches)
            full = np.full_like(mask, 0xFF)
            for lane in {0, size % 32, 5 * size % 32, 31}:
                for call, given, out, before, wanted, after in (
                    (forward, one, zero, full, y, mask),
                    (backward, other, zero, mask, dx, mask),
                    (forward_bias, one, zero, full, with_bias, other_mask),
                    (backward_bias, other, zero, mask, dx, mask),
                    (in_place, None, one, none, y, none),
                    (over_dy, one, other, none, dx, none),
                ):
                    offset = lane * x.itemsize % LINE
                    bound = functools.partial(call, given)
                    check_writes(bound, out, before, wanted[:size], after, offset)


@pytest.mark.parametrize("backend", [numpy_backend, compiled_backend], ids=["numpy", "compiled"])
@pytest.mark.parametrize("name", TWO_MASKS)
def test_the_rest_of_a_mask_is_not_written(backend, name):
    for size, spare in itertools.product((0, 1, 7, 8, 9, 63, 65, 1000), (0, 1, 7, 64)):
        x = values("float32")[:size]
        params = cast(x.dtype, **PRESETS[name])
        needed = mask_nbytes(params, x)
        wanted = numpy_backend.forward_with_mask(params, x, None, None)[1].data
        bias = np.full(size, -0.0, x.dtype)  # which changes no number
        for forward in (
            functools.partial(backend.forward_with_mask, params, x, None),
            functools.partial(backend.bias_relu_with_mask, params, x, bias, 0, None),
        ):
            mask = np.full(needed + spare, GUARD, np.uint8)
            _, saved = forward(mask)
            assert (mask[needed:] == GUARD).all()
            assert np.shares_memory(saved.data, mask) or not needed
            assert mask[:needed].tobytes() == wanted.tobytes() == saved.data.tobytes()


def test_a_mask_is_a_tuple_like_any_other():
    _, mask = compiled_backend.forward_with_mask(cast("f8"), np.ones(3), None, None)
    assert type(mask) is Mask
    assert mask.axes is None
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)


# ---- Invalid input -------------------------------------------------------------------------------

X = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
RECORD, INTEGER, DOUBLE = (cast(dtype).record for dtype in ("f4", "i4", "f8"))
THREE_BRANCHES = cast("f4", 0.5, max_value=1).record
MASK = np.zeros(3, np.uint8)
WEIGHT = np.ones((1, 6), np.float32)
BIAS = np.ones(6, np.float32)
CODES = np.zeros((4, 6), np.uint8)
READ_ONLY = np.frombuffer(bytes(96), np.float32).reshape(4, 6)
ERRORS = (TypeError, ValueError, OverflowError, MemoryError)

# Valid arguments, and which of them may be None.
VALID = {
    "forward": ((RECORD, X, None), {2}),
    "forward_with_mask": ((RECORD, X, None, None), {2, 3}),
    "backward": ((RECORD, X, MASK, None, None), {3, 4}),
    "backward_from_input": ((RECORD, RECORD, X, X, None), {2, 4}),
    "bias_relu": ((RECORD, X, BIAS, 1, None), {4}),
    "bias_relu_with_mask": ((RECORD, X, BIAS, 1, None, None), {4, 5}),
    "bias_relu_backward": ((RECORD, X, MASK, None, 1, X.dtype, None), {3, 5, 6}),
    "prelu": ((X, X, WEIGHT, None), {0, 1, 3}),
    "prelu_weight_grad": ((X, X, (1, 6)), {2}),  # of which NumPy 2.0 makes ()
    "squared_relu": ((X, None), {1}),
    "squared_relu_backward": ((X, X, None), {2}),
    "negated_relu": ((X, None), {1}),
    "crelu_mask": ((X, None), {1}),
    "crelu_backward": ((X, X, CODES, None), {3}),
}
NO_ARGUMENT = (
    [None, 1.0, X.tolist(), "x", b"0123456789", RECORD[:-1], RECORD + b"\0", np.float32(1)]
    + [memoryview(X), np.ndarray, (0,) * 65, (-1, 6), (2**62, 2**62)]
    + [X.astype(dtype) for dtype in ("i4", "?", "F", "O", "g", ">f4", ">f2", "U2", "m8[s]")]
    + [X.astype(np.float16).view(dtype) for dtype in ("V2", [("it", "f2")])]
)
SHAPES = [X[0, 0, ...], X.ravel(), X[:0], X[:, :0], X[1:], X[:1], X[:, :5], X[None]]
SHAPES += [X.reshape((1,) * 62 + X.shape), X.reshape(6, 4)]


def is_matrix(array):
    return isinstance(array, np.ndarray) and array.ndim == 2


def invalid_calls():
    """Yield a function, and arguments of which each is valid by itself."""
    for name, (given, _) in VALID.items():
        # One array of another shape than the others, and `out` of another shape or dtype.
        several = sum(map(is_matrix, given)) > 1
        for at, other in itertools.product(range(len(given)), SHAPES):
            broadcasts = given[at] is WEIGHT and other.shape == X[:1].shape
            if several and is_matrix(given[at]) and not broadcasts:
                yield name, (*given[:at], other, *given[at + 1 :])
        if given[-1] is None and not name.endswith("with_mask"):
            outs = [a.astype(np.uint8) if name == "crelu_mask" else a for a in SHAPES]
            for out in (*outs, READ_ONLY, X.astype("f2"), X.astype("u4")):
                yield name, (*given[:-1], out)
    yield "crelu_mask", (X, CODES.view(np.int8))
    yield "crelu_mask", (X, np.frombuffer(bytes(24), np.uint8).reshape(X.shape))
    yield "crelu_backward", (X, X, CODES.view(np.int8), None)
    yield "crelu_backward", (X, X, X, None)
    yield "crelu_backward", (X, X.astype("f2"), CODES, None)
    yield "squared_relu_backward", (X, X.astype("f8"), None)
    yield "prelu", (X, X, WEIGHT.astype("f8"), None)
    yield "prelu", (None, None, X, X[:1])
    yield "prelu", (X[:1], None, X, None)
    for shape in ((), (6,), (4, 5), (1, 4, 6), (0, 6)):
        yield "prelu_weight_grad", (X, X, shape)

    # No axis, or a bias of another length or dtype.
    for axis in (2, -1, 2**31, 2**70, 1.0, None, "1", (1,), 0):
        yield "bias_relu", (RECORD, X, BIAS, axis, None)
        yield "bias_relu_with_mask", (RECORD, X, BIAS, axis, None, None)
    for axis in (2, -1, 2**31, 2**70, 1.0, None, "1", (1,)):
        yield "bias_relu_backward", (RECORD, X, MASK, None, axis, X.dtype, None)
    for bias in (BIAS[1:], BIAS[:1], BIAS[None], BIAS[0, ...], BIAS.astype("f8"), BIAS.tolist()):
        yield "bias_relu", (RECORD, X, bias, 1, None)
        yield "bias_relu_with_mask", (RECORD, X, bias, 1, None, None)
    yield "bias_relu", (RECORD, X[0, 0, ...], BIAS, 0, None)

    # Parameters of another dtype, and integers where there are only gradients of floats.
    integers = X.astype(np.int32)
    yield "forward", (INTEGER, X, None)
    yield "forward", (RECORD, integers, None)
    yield "forward", (RECORD, X.astype("f8"), None)
    yield "forward", (INTEGER, integers, X)
    yield "forward", (INTEGER, X.astype("u4"), None)
    yield "forward_with_mask", (INTEGER, integers, None, None)
    yield "backward", (INTEGER, integers, MASK, None, None)
    yield "bias_relu", (INTEGER, integers, BIAS.astype("i4"), 1, None)
    yield "backward_from_input", (INTEGER, INTEGER, None, integers, None)
    yield "backward_from_input", (RECORD, INTEGER, integers, X, None)
    yield "backward_from_input", (INTEGER, RECORD, X, integers, None)
    yield "backward_from_input", (RECORD, INTEGER, None, X, None)
    yield "backward_from_input", (RECORD, DOUBLE, None, X, None)

    # Masks too short, not contiguous, of two axes or none, of another dtype, read-only.
    for record, size in ((RECORD, 3), (THREE_BRANCHES, 24)):
        masks = [np.zeros(size - 1, np.uint8), np.zeros(0, np.uint8), np.zeros((), np.uint8)]
        masks += [np.zeros(2 * size, np.uint8)[::2], np.zeros(size, np.uint8)[::-1]]
        masks += [np.broadcast_to(np.uint8(0), (size,)), np.zeros((1, size), np.uint8)]
        masks += [np.zeros(size, dtype) for dtype in (np.int8, bool, np.uint16)]
        for mask in (*masks, bytes(size)):
            yield "backward", (record, X, mask, None, None)
            yield "forward_with_mask", (record, X, None, mask)
            yield "bias_relu_backward", (record, X, mask, None, 1, X.dtype, None)
            yield "bias_relu_with_mask", (record, X, BIAS, 1, None, mask)
        yield "forward_with_mask", (record, X, None, np.frombuffer(bytes(size), np.uint8))
        yield "forward_with_mask", (record, X, READ_ONLY, np.zeros(size, np.uint8))

    # Axes that are no permutation.
    for axes in ((), (0,), (0, 0), (1, 1), (1, 2), (-1, 0), (0, 1, 2), (0, 2**31), (0, 2**70)):
        yield "backward", (RECORD, X, MASK, axes, None)
    for axes in ([1, 0], 1, (0, "1"), (0, 1.0), (0, None), (np.int64(1), np.int64(0))):
        yield "backward", (RECORD, X, MASK, axes, None)
    yield "backward", (RECORD, X[:, 0], MASK, (1,), None)

    # Records of the right length with a dtype or variant that does not exist.
    for at, first in ((32, 12), (33, 5)):
        for value in (first, first + 1, 127, 128, 255):
            record = bytearray(RECORD)
            record[at] = value
            record = bytes(record)
            yield "forward", (record, X, None)
            yield "forward_with_mask", (record, X, None, None)
            yield "backward", (record, X, MASK, None, None)
            yield "backward_from_input", (record, RECORD, X, X, None)
            yield "backward_from_input", (RECORD, record, None, X, None)


class TestInvalidInput:
    def check_raises(self, name, arguments):
        before = [array.tobytes() for array in (X, WEIGHT, MASK, CODES)]
        with pytest.raises(ERRORS, match="."):
            pytest.fail(f"{name} accepts {arguments}: {getattr(cpu, name)(*arguments)}")
        assert before == [array.tobytes() for array in (X, WEIGHT, MASK, CODES)]

    @pytest.mark.parametrize("name", VALID)
    def test_each_argument(self, name):
        arguments, optional = VALID[name]
        getattr(cpu, name)(*arguments)
        for at, value in itertools.product(range(len(arguments)), NO_ARGUMENT):
            if value is not None or at not in optional:
                self.check_raises(name, (*arguments[:at], value, *arguments[at + 1 :]))
        with pytest.raises(TypeError):
            getattr(cpu, name)(*arguments, out=None)
        for count in set(range(9)) - {len(arguments)}:
            self.check_raises(name, (*arguments, *[None] * 9)[:count])

    def test_combinations_of_arguments(self):
        for name, arguments in invalid_calls():
            self.check_raises(name, arguments)

    def test_any_record_raises_or_is_accepted(self):
        rng = np.random.default_rng(0)
        arrays = [X.astype(dtype) for dtype in (*reference.DTYPES.values(), *INTEGERS)]
        accepted = 0
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
                    accepted += 1
        assert accepted > 200

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [("set_num_threads", (n,)) for n in (0, -1, 1025, 2**70, 1.5, "2", None)]
        + [("set_limits", arguments) for arguments in ((1, 2), (1, 2, 2**70), (1, 2, "3"))]
        + [("get_num_threads", (1,)), ("is_valid_out", (X, X)), ("is_valid_out", (X, X, X, X))],
    )
    def test_other_functions(self, name, arguments):
        def state():
            limits = cpu.set_limits(0, 0, 0)
            cpu.set_limits(*limits)
            return limits, cpu.get_num_threads()

        before = state()
        self.check_raises(name, arguments)
        assert state() == before


class TestIsValidOut:
    @staticmethod
    def arrays(tmp_path):
        memory, owner = np.zeros(64, np.float32), np.zeros(6, np.float32)
        locked = owner.copy()
        locked.flags.writeable = False
        views = [memory[start : start + 6] for start in (0, 1, 5, 6, 7, 12)]
        views += [memory[0:12:2], memory[5::-1], memory[:6].reshape(2, 3)]
        views += [memory[:6].reshape(3, 2).T, memory[20:26].view("i4"), memory[26:38].view("f8")]
        views += [np.zeros(shape, "f4") for shape in (6, (2, 3), (), 0, (0, 3))]
        views += [np.zeros(6), np.zeros(()), np.asfortranarray(np.zeros((2, 3), "f4")), locked]
        views += [np.broadcast_to(np.float32(0), (6,)), owner, owner[:], owner[::-1]]
        return [*views, np.memmap(tmp_path / "memmap", np.float32, "w+", shape=6)]

    def test_every_valid_one_passes_the_whole_check(self, tmp_path):
        passed = 0
        for out, like, other in itertools.product(self.arrays(tmp_path), repeat=3):
            if other.shape == like.shape and compiled_backend.is_valid_out(out, like, other):
                validation.check_out("f", out, like, "x", (like, other), numpy_backend)
                passed += 1
        assert passed > 10
        x = np.zeros((3, 4), np.float32)
        assert compiled_backend.is_valid_out(np.zeros_like(x), x, np.zeros_like(x))
        assert compiled_backend.is_valid_out(x, x, x)

    @pytest.mark.parametrize("out", [None, [1.0], "text", 1.0, np.float32(1), object(), Mask])
    def test_any_object(self, out):
        x = np.zeros(3)
        assert not any(cpu.is_valid_out(*a) for a in ((out, x, x), (x, out, x), (x, x, out)))


# ---- Memory and the GIL --------------------------------------------------------------------------


@pytest.mark.slow
class TestMemory:
    @staticmethod
    def growth(function, calls=2000):
        """Return how many more bytes are allocated after many calls."""
        found = []
        gc.freeze()  # what other tests have left takes seconds to look through
        tracemalloc.start()
        for number in (100, calls):
            for _ in range(number):
                function()
            gc.collect()
            found.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        gc.unfreeze()
        return found[1] - found[0]

    @pytest.mark.parametrize("view", [np.s_[:], np.s_[:, ::-1]], ids=["contiguous", "strided"])
    @pytest.mark.parametrize("name", VALID)
    def test_calls_leak_no_references(self, name, view):
        own = {id(a): a[view].copy("K") if a.ndim == 2 else a.copy() for a in (X, WEIGHT, CODES)}
        arguments = [own.get(id(a), a) for a in VALID[name][0]]
        arguments = [a[view] if is_matrix(a) else a for a in arguments]
        function = getattr(cpu, name)
        out = np.zeros_like(X, np.uint8 if name == "crelu_mask" else None)
        kept = [a for a in arguments if a is not None] + [out, X.dtype, CODES.dtype, None]

        def valid():
            function(*arguments)
            if arguments[-1] is None:
                new = (out, MASK.copy()) if name.endswith("with_mask") else (out,)
                function(*arguments[: -len(new)], *new)

        def invalid():
            *others, _ = arguments
            for bad in ((*others, X[1:]), (*others, READ_ONLY), (None, *arguments[1:]), others):
                with contextlib.suppress(*ERRORS):
                    function(*bad)

        for call in valid, invalid:
            before = [sys.getrefcount(a) for a in kept]
            assert self.growth(call) < 5_000
            after = [sys.getrefcount(a) for a in kept]
            # Others hold some of them, too: a leak would be of 2,000.
            assert all(abs(a - b) < 500 for a, b in zip(after, before, strict=True))

    def test_the_check_can_fail(self):
        kept = []
        assert self.growth(lambda: kept.append(cpu.forward(RECORD, X, None))) > 5_000

    @pytest.mark.slow
    def test_a_process_of_many_calls_does_not_grow(self, request, python):
        """In pages: no allocator of Python's counts all memory, and the heap first settles."""
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

    @pytest.mark.slow
    def test_a_call_without_memory_raises_and_later_ones_succeed(self, request, python):
        if sys.platform != "linux":
            unavailable(request.config, "the memory of a process is limited as on Linux")
        script = """
            import resource
            import numpy as np
            import relu_xp

            x = np.zeros((1 << 13, 1 << 13), np.float32)
            small = np.array([-1, 2], np.float32)
            y, pullback = relu_xp.relu_vjp(x, out=x)
            weight = np.zeros(1 << 13, np.float32)
            calls = [
                lambda: relu_xp.relu(x),
                lambda: relu_xp.relu_vjp(x),
                lambda: relu_xp.relu_vjp(x, out=x, max_value=1.0, negative_slope=0.5),
                lambda: pullback(x),
                lambda: relu_xp.relu_backward(x, x),
                lambda: relu_xp.relu_grad(x.T),
                lambda: relu_xp.prelu(x, weight),
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
    """Another thread runs during a call only if the call releases the GIL: none is asked to."""

    @pytest.fixture(autouse=True)
    def no_switches(self):
        before = sys.getswitchinterval()
        sys.setswitchinterval(1000)
        yield
        sys.setswitchinterval(before)

    @staticmethod
    def runs_another_thread(x, calls):
        lock, ran = threading.Lock(), []
        lock.acquire()

        def other():
            with lock:
                ran.append(1)

        thread = threading.Thread(target=other)
        thread.start()
        lock.release()
        for _ in range(calls):
            cpu.forward(RECORD, x, x)
            if ran:
                break
        found = bool(ran)
        thread.join()
        return found

    def test_large_calls_release_it(self):
        assert self.runs_another_thread(np.zeros(1 << 22, np.float32), 1000)

    @pytest.mark.skipif(
        not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no GIL"
    )
    def test_small_calls_keep_it(self):
        assert not self.runs_another_thread(np.zeros(64, np.float32), 200_000)


# ---- Which kernels are used ----------------------------------------------------------------------

TESTS = Path(__file__).parents[1]
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
    wanted = "layouts", "prelu", "crelu", "squared_relu", "sums", "bias", "integers"
    for name, (function, *arguments) in bits.groups().items():
        if name.endswith((*wanted, "by float16 vjp")):
            print(name, bits.digest(function(*arguments)))
"""


@pytest.mark.skipif(cpu.instruction_set == "baseline", reason="there is one instruction set")
class TestInstructionSet:
    @pytest.mark.slow
    def test_every_level_has_the_same_bits(self, python):
        wanted = (TESTS / "digests.txt").read_text().splitlines()
        name, *digests = python(DIGESTS, TESTS, timeout=300).splitlines()
        assert len(digests) > 30
        assert set(digests) <= set(wanted)
        for level in LEVELS:
            found, *others = python(DIGESTS, TESTS, timeout=300, RELU_XP_CPU=level).splitlines()
            if level > name:
                message = f"RELU_XP_CPU asks for {level}, which this processor does not have; "
                assert found.startswith(f"ValueError {message}")
            else:
                assert (found, others) == (level, digests)

    @pytest.mark.parametrize("level", ["x86-64-v1", "x86-64-v5", "avx2", "X86-64-V3", "x86-64-v3 "])
    def test_an_unknown_level_raises(self, python, level):
        levels = "x86-64-v2, x86-64-v3 or x86-64-v4"
        message = f"ValueError RELU_XP_CPU must be {levels}, got '{level}'\n"
        assert python(DIGESTS, TESTS, RELU_XP_CPU=level) == message
