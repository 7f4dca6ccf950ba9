"""CuPy's kernels of a bias and ReLU: their bits, their sums, and which of them runs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from passes import bias_results, check_bits, fenced

import relu_xp
from relu_xp.testing import reference

cupy_host = pytest.importorskip("cupy_host", exc_type=ImportError)
cupy = pytest.importorskip("cupy")

DTYPES = reference.DTYPES
MASKS = {"bits": {}, "bytes": {"negative_slope": 0.5, "max_value": 3.0}}
ALL_PARAMS = [reference.PRESETS[n] for n in ("relu", "forum", "clipped-leaky", "everything")]
SMALL = [((27, 48), 1), ((7, 5, 79), 1), ((37, 33), 1), ((145, 3, 3), 1)]
each_cupy = pytest.mark.libraries(names=["cupy_host", "cupy_host_75", "cupy_host_120", "cupy"])


def check(xp, x, bias, dy, axis, params, arrays=None):
    """Compare all results with NumPy's; return dbias. Arrays are copies of x, bias and dy."""
    y, mask, dx, free = bias_results(x, bias, dy, axis, params)
    its_x, its_bias, its_dy = arrays or map(xp.array, (x, bias, dy))
    its_y, pullback = relu_xp.bias_relu_vjp(its_x, its_bias, axis=axis, **params)
    plain = relu_xp.bias_relu(its_x, its_bias, axis=axis, **params)
    for got in map(xp.numpy, (plain, its_y)):
        assert np.isnan(got[free]).all()
        check_bits(np.where(free, y, got), y, (x.shape, axis))
    if its_x.flags.c_contiguous:
        check_bits(xp.numpy(pullback._residuals.data), mask, (x.shape, axis))
    got, dbias = map(xp.numpy, pullback(its_dy))
    check_bits(np.ascontiguousarray(got), np.ascontiguousarray(dx), (x.shape, axis))
    others = tuple(i for i in range(x.ndim) if i != axis)
    with np.errstate(all="ignore"):
        right, scale = (one.astype(np.float64).sum(others) for one in (dx, abs(dx)))
        limit = 1e-14 * scale + np.spacing(abs(right).astype(dbias.dtype)).astype(np.float64)
        assert not np.any(np.abs(dbias.astype(np.float64) - right) > limit), (x.shape, axis)
    return dbias


@pytest.mark.slow
@each_cupy
@pytest.mark.parametrize("count", [16, 13])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_pattern_of_16_bits(xp, dtype, axis, count):
    """Of more bits, specials and random ones. Some biases, in each kernel that is vectorized."""
    form = reference.Format(dtype)
    rng = np.random.default_rng(count)
    patterns = reference.patterns(dtype)
    nan = form.infinity | 5
    bias = [0, form.sign, 1, form.sign | 3, form.infinity, form.sign | form.infinity, nan]
    bias += [form.sign | form.infinity | form.infinity >> 1, form.infinity - 1, form.round(-3.0)]
    bias = np.array(bias, form.unsigned)
    bias = np.concatenate([bias, rng.choice(patterns, count - len(bias))])
    shape = (count, len(patterns)) if axis == 0 else (len(patterns), count)
    x = np.broadcast_to(patterns.reshape((-1, 1) if axis else (1, -1)), shape).copy()
    dy = rng.choice(reference.specials(dtype), shape)
    x, bias, dy = (words.view(form.dtype) for words in (x, bias, dy))
    for params in (*MASKS.values(), reference.PRESETS["everything"]):
        check(xp, x, bias, dy, axis, params)


@each_cupy
def test_subnormals_are_added(xp, dtype):
    form = reference.Format(dtype)
    x = np.array([[1, 2, 3, form.sign | 1] * 8], form.unsigned).view(form.dtype)
    for options in ({}, {"order": "F"}):
        its_x = xp.array(np.array(np.repeat(x, 2, 0), **options))
        y = relu_xp.bias_relu(its_x, xp.array(x[0]))
        assert xp.numpy(y).view(form.unsigned).tolist() == [[2, 4, 6, 0] * 8] * 2


@pytest.mark.slow
@each_cupy
@pytest.mark.parametrize("params", ALL_PARAMS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SMALL, ids=str)
def test_small_arrays(xp, dtype, shape, axis, params):
    """Rows, runs and neither, dense and strided; many subnormals, and sums that are finite."""
    form, rng = reference.Format(dtype), np.random.default_rng(7)
    tiny = rng.integers(0, 1 << form.fraction, 100).astype(form.unsigned)
    few = np.append(rng.uniform(-4, 4, 100), [0.0] * 20).astype(form.dtype).view(form.unsigned)
    tiny = np.append(tiny, tiny ^ form.unsigned.type(form.sign))
    pool = np.concatenate([reference.specials(dtype), tiny, few])
    x = rng.choice(pool, shape).view(form.dtype)
    bias = rng.choice(pool, shape[axis]).view(form.dtype)
    dy = rng.integers(-9, 10, shape).astype(form.dtype)
    check(xp, x, bias, dy, axis, params)
    dy *= np.ones(1, form.unsigned).view(form.dtype)  # subnormals
    check(xp, x, bias, dy, axis, params)
    wide = np.repeat(np.stack([x, dy]), 2, -1)[..., ::2]
    check(xp, x, bias, dy, axis, params, [xp.array(host) for host in (wide[0], bias, wide[1])])


# Rows, runs and neither; tiles and what is left over; one channel; no elements.
SHAPES_OF_AXIS_0 = [(130,), (7, 9), (1, 1), (8, 0)]
SHAPES_OF_AXIS_1 = [(2, 8), (37, 96), (37, 33), (3, 5, 71), (5, 3, 24), (3, 5, 8), (9, 3, 2)]
SHAPES_OF_AXIS_1 += [(64, 3, 13), (4, 2, 2, 16), (3, 1), (66, 1, 16), (0, 8), (8, 0), (3, 0, 8)]
# Elements that x, bias, dy, y, dx and the mask begin behind an aligned address.
STARTS = [(0,) * 6, (1, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0), (0, 0, 2, 0, 1, 0)]
STARTS += [(0, 0, 0, 3, 0, 0), (0, 0, 0, 0, 0, 5)]


@pytest.mark.slow
@each_cupy
@pytest.mark.parametrize("mask", MASKS)
def test_shapes_and_misaligned_views(xp, dtype, mask):
    """Nothing beyond the arrays is written; dbias has the same bits at every address."""
    params, rng = MASKS[mask], np.random.default_rng(7)
    specials = reference.specials(dtype)
    cases = [
        *zip(SHAPES_OF_AXIS_0, itertools.repeat(0)),
        *zip(SHAPES_OF_AXIS_1, itertools.repeat(1)),
    ]
    for shape, axis in cases:
        x = rng.choice(specials, shape).view(DTYPES[dtype])
        bias = rng.choice(specials, shape[axis]).view(DTYPES[dtype])
        dy = rng.standard_normal(shape).astype(DTYPES[dtype])
        y, packed, dx, free = bias_results(x, bias, dy, axis, params)
        first = None
        for starts in STARTS:
            hosts = (x, bias, dy, np.zeros_like(x), np.zeros_like(dy), np.zeros_like(packed))
            memory = [fenced(xp, *pair) for pair in zip(hosts, starts, strict=True)]
            its_x, its_bias, its_dy, out, its_dx, its_mask = (view for view, _ in memory)
            options = {"axis": axis, "out": out, "mask": its_mask, **params}
            pullback = relu_xp.bias_relu_vjp(its_x, its_bias, **options)[1]
            dbias = xp.numpy(pullback(its_dy, out=its_dx)[1])
            first = dbias if first is None else first
            got = xp.numpy(out)
            assert np.isnan(got[free]).all()
            found = (np.where(free, y, got), xp.numpy(its_mask), xp.numpy(its_dx), dbias)
            for one, right in zip(found, (y, packed, dx, first), strict=True):
                check_bits(one, right, (shape, axis, starts))
            assert all((around() == 0x5A).all() for _, around in memory), (shape, starts)


@each_cupy
def test_every_layout_has_the_same_sums(xp):
    """In memory in every order of the axes, and strided; dy in another order than x."""
    rng = np.random.default_rng(3)
    shape = (4, 8, 3, 16)
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    orders = [
        (
            x.transpose(p).copy().transpose(np.argsort(p)),
            dy.transpose(p).copy().transpose(np.argsort(p)),
        )
        for p in itertools.permutations(range(4))
    ]
    wide = np.zeros((2, 4, 8, 3, 32), np.float32)
    wide[..., ::2] = x, dy
    views = [*orders, (x, orders[9][1]), (orders[13][0], dy), tuple(wide[..., ::2])]
    for axis in range(4):
        bias = rng.standard_normal(shape[axis])
        bias = bias.astype(np.float32)
        first = None
        for its_x, its_dy in views:
            arrays = xp.array(its_x), xp.array(bias), xp.array(its_dy)
            dbias = check(xp, x, bias, dy, axis, {}, arrays)
            first = dbias if first is None else first
            check_bits(dbias, first, axis)


@each_cupy
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((100_003, 3), 1),
        ((3, 50_021), 0),
        ((20_000, 8), 1),
        ((16, 2, 63, 65), 1),
        ((70_000,), 0),
        ((40, 3, 16, 24), 1),
        ((2, 3, 5, 7, 8), 2),
        ((8, 64, 100), 2),
        ((300_000, 1), 1),
    ],
)
def test_sums_are_complete(xp, shape, axis):
    """Integers, whose sum is exact: an element that is missing, or counted twice, shows."""
    rng = np.random.default_rng(1)
    x = rng.integers(-9, 9, shape).astype(np.float16)
    dy = rng.integers(-999, 999, shape).astype(np.float16)
    bias = np.zeros(shape[axis])
    others = tuple(i for i in range(len(shape)) if i != axis)
    right = np.where(x > 0, dy.astype(np.float64), 0).sum(others)
    for options in ({"order": "C"}, {"order": "F"}):
        arrays = [xp.array(np.array(host, **options)) for host in (x, dy)]
        dbias = relu_xp.bias_relu_vjp(arrays[0], xp.array(bias), axis=axis)[1](arrays[1])[1]
        assert dbias.dtype == np.float64
        assert xp.numpy(dbias).tolist() == right.tolist()


@each_cupy
def test_sums_are_of_float64_and_rounded_once(xp, dtype):
    rng = np.random.default_rng(2)
    x = np.ones((5000, 3), np.float32)
    dy = rng.standard_normal((5000, 3)).astype(np.float32)
    dy[:2, 0] = 3e38, -3e38  # beyond float16, and beyond float32 in the sum of many
    dy[:4, 1] = 1e30, 1.0, -1e30, 2.0
    bias = np.zeros(3, DTYPES[dtype])
    pullback = relu_xp.bias_relu_vjp(xp.array(x), xp.array(bias))[1]
    dbias = xp.numpy(pullback(xp.array(dy))[1])
    right = np.array([math.fsum(column.tolist()) for column in dy.T])
    assert dbias.dtype == bias.dtype
    scale = np.finfo(np.float64).eps * np.abs(dy.astype(np.float64)).sum(0)
    rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 0}[dtype]
    assert (np.abs(dbias.astype(np.float64) - right) <= 8 * scale + rounding * abs(right)).all()


@each_cupy
def test_a_total_is_rounded_once(xp, dtype):
    """Halfway between two numbers and beside it: not to float32 first."""
    half = 2.0 ** -(reference.Format(dtype).fraction + 1)
    dy = np.ones((2, 3))
    dy[1] = half * np.array([1 - 2.0**-20, 1, 1 + 2.0**-20])
    bias = xp.array(np.zeros(3, DTYPES[dtype]))
    pullback = relu_xp.bias_relu_vjp(xp.array(np.ones((2, 3))), bias)[1]
    assert xp.numpy(pullback(xp.array(dy))[1]).tolist() == [1, 1, 1 + 2 * half]


@each_cupy
def test_a_nan_stays_in_its_channel(xp):
    dy = np.ones((300, 8), np.float32)
    dy[17, 2], dy[3, 5], dy[4, 6] = np.nan, np.inf, np.nan
    x = np.ones_like(dy)
    x[4, 6] = -1.0  # G3: a dead unit's gradient is 0 whatever dy is
    pullback = relu_xp.bias_relu_vjp(xp.array(x), xp.array(np.zeros(8, np.float32)))[1]
    dbias = xp.numpy(pullback(xp.array(dy))[1])
    np.testing.assert_array_equal(dbias, [300, 300, np.nan, 300, 300, np.inf, 299, 300])


@each_cupy
def test_a_bias_of_another_dtype_is_rounded_first(xp):
    x = np.array([[2048.0, 1.0, -1.0, 0.0]], np.float16)
    bias = np.array([1 + 2.0**-11 - 2.0**-40, 2.0**-11 + 2.0**-22, 1.0, 1e-30])
    for given in (bias, np.repeat(bias, 2)[::2]):
        y = relu_xp.bias_relu(xp.array(x), xp.array(given))
        check_bits(xp.numpy(y), np.maximum(x + bias.astype(np.float16), 0), "rounded")
    narrow = np.repeat(bias.astype(np.float16), 2)[::2]  # strided
    check_bits(xp.numpy(relu_xp.bias_relu(xp.array(x), xp.array(narrow))), xp.numpy(y), "strided")


def layouts():
    """Return arrays, an axis, and the names of the kernels that run forward and back."""
    base = np.ones((4, 8, 3, 16), np.float32)
    wide = np.ones((6, 32), np.float32)
    flat = np.ones(6 * 16 + 1, np.float32)
    one, two = ["bias_backward_bits_vectorized"], ["backward_bits_vectorized", "channel_sums"]
    dense, strided = ["bias_backward_bits_strided"], ["backward_bits_strided", "channel_sums"]
    return {
        "last axis": (base, 3, "row_vectorized", one),
        "channels": (base, 1, "runs_vectorized", one),
        "channels last": (base.transpose(0, 3, 1, 2), 1, "row_vectorized", one),
        "first axis": (base, 0, "runs_vectorized", one),
        "odd length": (base[0, 0].T.copy(), 1, "any_vectorized", dense),
        "short runs": (base.reshape(64, 12, 2), 1, "any_vectorized", dense),
        "Fortran": (np.asfortranarray(base[0, :, 0]), 1, "runs_vectorized", dense),
        "axes apart": (np.asfortranarray(base), 1, "runs_vectorized", two),
        "misaligned": (flat[1:].reshape(6, 16), 1, "any_strided", dense),
        "columns": (wide[:, ::2], 1, "any_strided", strided),
    }


@pytest.mark.parametrize("layout", layouts())
def test_the_layout_chooses_the_kernel(launches, layout):
    """One launch forward; backward one, and one more for the sums, where arrays are dense."""
    x, axis, forward, backward = layouts()[layout]
    bias = cupy_host.array(np.ones(x.shape[axis], np.float32))
    x = cupy_host.array(x)
    _, pullback = relu_xp.bias_relu_vjp(x, bias, axis=axis)
    assert [name for name, _ in launches] == [f"relu_xp_bias_forward_bits_{forward}"]
    launches.clear()
    pullback(x)
    names = [name.removeprefix("relu_xp_") for name, _ in launches]
    assert names == [*backward, "add_up"]


@pytest.mark.parametrize("params", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("order", "CF")
def test_given_memory_nothing_is_allocated(launches, order, params):
    """But for the bias's gradient, and the sums that it is made of."""
    x, dy, y, dx = (cupy_host.array(np.ones((40, 64), np.float32, order=order)) for _ in range(4))
    bias = cupy_host.array(np.ones(64, np.float32))
    mask = cupy_host.array(np.zeros(40 * 64, np.uint8))
    sizes = []

    def allocate(size):
        sizes.append(size)
        return cupy_host.allocate(size)

    with cupy.cuda.using_allocator(allocate):
        _, pullback = relu_xp.bias_relu_vjp(x, bias, out=y, mask=mask, **params)
        relu_xp.bias_relu(x, bias, out=x, **params)
        assert not sizes
        pullback(dy, out=dx)
    assert sizes == [40 * 64, 4 * 64]  # float64, one for 8 elements


def test_an_out_that_overlaps_the_bias_is_refused(launches):
    memory = np.ones(80, np.float32)
    x = cupy_host.array(np.ones((8, 8), np.float32))
    for start, shape in ((0, (8, 8)), (63, (8, 8)), (70, (8, 8))):
        out = cupy_host.array(memory[:64].reshape(shape))
        bias = cupy_host.array(memory[start : start + 8])
        if start < 64:
            with pytest.raises(ValueError, match="overlaps an input"):
                relu_xp.bias_relu(x, bias, out=out)
        else:
            assert relu_xp.bias_relu(x, bias, out=out) is out


@pytest.mark.parametrize(
    ("shape", "first", "last"),
    [
        ((10**8, 10), 1, 1),
        ((10, 10**7), 1, 1),
        ((4096, 4096), 1, 1),
        ((32, 64, 56, 56), 1, 1),
        ((10**9,), 0, -1),
        ((2, 3, 10**8), 1, 1),
        ((1 << 20, 1), 1, 1),
        ((3, 1 << 25), 0, 0),
        ((1 << 16, 3, 2, 50), 1, 1),
        ((64, 1000, 7, 7), 1, 1),
        ((100, 30_000, 16), 1, 1),
    ],
)
def test_how_large_arrays_are_summed(shape, first, last):
    """Enough threads for a large device, terms dealt evenly, little memory."""
    from relu_xp.backends.cupy_sums import channel_sums

    sums = channel_sums(shape, first, last)
    size, count = math.prod(shape), sums.rows * sums.columns
    assert sums.outer * sums.channels * sums.inner == size
    assert 1 <= sums.rows <= sums.outer
    assert 1 <= sums.columns <= sums.inner
    made = sums.channels * count
    assert made <= max(1 << 18, sums.channels)
    assert made >= min(size // 16, 1 << 16)
    longest = -(-sums.outer // sums.rows) * -(-sums.inner // sums.columns)
    assert longest <= 1.6 * sums.outer * sums.inner / count
    axes = tuple(range(len(shape)))[::-1]
    assert channel_sums(shape, first, last, axes)[:5] == sums[:5]  # in any order of axes
    if sums.inner % 8 == 0 and count >= 8:
        assert sums.columns % 8 == 0  # so that the vectorized kernel can take it
