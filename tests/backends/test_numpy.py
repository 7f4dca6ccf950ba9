"""What NumPy arrays need beyond the conformance suite, with compiled kernels or without."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from operands import CALLS, NOT_WRITABLE, PAIRS, UNUSUAL, contents, is_backward, operands

import relu_xp
from relu_xp.dispatch import backend_for
from relu_xp.testing import reference

pytestmark = pytest.mark.libraries("ndarray")
ARRAYS = [(name, role) for name, role in PAIRS if role not in ("mask", "weight", "bias")]


@pytest.fixture
def backend(xp):
    """The backend under test."""
    return backend_for("test", "x", np.ones(1))


# ---- Layouts and kinds of memory -----------------------------------------------------------------


@pytest.mark.parametrize("kind", UNUSUAL | NOT_WRITABLE)
def test_unusual_arrays(xp, kind):
    """Results are those of fresh arrays with the same values; an out is written, or refused."""
    for name, role in ARRAYS:
        call, given = CALLS[name], operands(name)
        unusual = (UNUSUAL | NOT_WRITABLE)[kind](given[role])
        if unusual.shape != given[role].shape:  # then all arrays have its shape
            if is_backward(name):
                with pytest.raises(ValueError, match="(dy|out) has shape"):
                    call(**given | {role: unusual})
                continue
            given = operands(name, unusual.shape)
        fresh = {r: np.array(unusual if r == role else a) for r, a in given.items()}
        wanted = call(**fresh | {"out": None} if "out" in fresh else fresh)
        given[role], before = unusual, unusual.tobytes()
        inputs = {r: a for r, a in given.items() if r not in (role, "out", "mask")}
        inputs_before = contents(inputs)
        if role == "out" and kind in NOT_WRITABLE:
            with pytest.raises(ValueError, match="out (is read-only|is a broadcast view)"):
                call(**given)
            assert unusual.tobytes() == before
        else:
            result = call(**given)
            if role == "out":
                assert result is unusual
            else:
                assert type(result) is np.ndarray
                assert unusual.tobytes() == before
            np.testing.assert_array_equal(result.view(np.uint32), wanted.view(np.uint32))
        assert contents(inputs) == inputs_before, (name, role)


@pytest.mark.parametrize("dy_dtype", reference.DTYPES)
def test_results_are_arrays_of_the_dtype(xp, dtype, dy_dtype):
    """D2: NumPy makes float32 of bfloat16 and a Python number, and scalars of 0-d arrays."""
    x, dy = np.array(-1.5, reference.DTYPES[dtype]), np.array(2.5, reference.DTYPES[dy_dtype])
    calls = [relu_xp.relu_vjp(x, **preset) for preset in reference.PRESETS.values()]
    calls += [relu_xp.rrelu_vjp(x, rng=np.random.default_rng(0)), relu_xp.squared_relu_vjp(x)]
    y, prelu_pullback = relu_xp.prelu_vjp(x, x, axis=0)
    results = [(y, x), (prelu_pullback(dy)[0], dy), (prelu_pullback(dy)[1], x)]
    for y, pullback in calls:
        results += [(y, x), (pullback(dy), dy)]
    for result, like in results:
        assert (type(result), result.dtype, result.shape) == (np.ndarray, like.dtype, ())


# ---- The processor's modes, and NumPy's ----------------------------------------------------------


def check_bits(dtype, preset):
    """Compare every result with the reference."""
    form, numbers = reference.Format(dtype), reference.PRESETS[preset]
    x = reference.patterns(dtype).view(form.dtype)
    dy = reference.gradients(dtype, x.size).view(form.dtype)
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    forward = reference.forward(dtype, preset)
    backward = reference.backward(dtype, dtype, preset)
    for name, found, expected in (
        ("relu", relu_xp.relu(x, **numbers), forward),
        ("relu_vjp", y, forward),
        ("relu_grad", relu_xp.relu_grad(x, **numbers), reference.gradient(dtype, preset)),
        ("relu_backward", relu_xp.relu_backward(dy, x, **numbers), backward),
        ("pullback", pullback(dy), backward),
    ):
        exact = ~expected.any_nan
        patterns = found.view(form.unsigned)
        np.testing.assert_array_equal(patterns[exact], expected.bits[exact], err_msg=name)
        assert np.isnan(found[~exact].astype(float)).all(), name
    return x, forward.bits


@pytest.mark.parametrize("preset", reference.PRESETS)
def test_no_warning_where_numpy_would_raise(xp, dtype, preset):
    with np.errstate(all="raise"):
        check_bits(dtype, preset)


@pytest.mark.libraries("ndarray", "compiled")
@pytest.mark.parametrize("preset", ["relu", "relu6", "thresholded", "negative-ceiling"])
def test_subnormals_are_kept_where_the_processor_flushes(xp, flush_to_zero, dtype, preset):
    """F4 where the kernels compare bits as integers: everywhere but in a product."""
    with flush_to_zero():
        assert np.float32(1e-40) * np.float32(1) == 0, "the processor does not flush"
        x, expected = check_bits(dtype, preset)
        long = relu_xp.relu(np.tile(x, 3), **reference.PRESETS[preset])
    np.testing.assert_array_equal(long.view(expected.dtype), np.tile(expected, 3))


def test_of_two_nan_a_product_is_the_first(xp):
    """NumPy's versions differ in this. A sum has one NaN for all."""
    weight, other = np.array([0x7FC00001, 0xFFC00002], np.uint32).view(np.float32)[:, None]
    dy = np.resize(other, (1, 100))
    dx, dweight = relu_xp.prelu_vjp(-np.ones_like(dy), weight)[1](dy)
    assert (dx.view(np.uint32) == 0x7FC00001).all()
    assert dweight.view(np.uint32).tolist() == [0x7FC00000]


def test_of_two_nan_a_sum_has_that_of_x(xp, dtype):
    """Quiet, as a product leaves it: in bfloat16 without a payload. In dbias one stands for all."""
    form = reference.Format(dtype)
    quiet = 1 << (form.fraction - 1)
    payloads = [form.infinity | bits for bits in (1, quiet, quiet | 3, 5)]
    nan = np.array([bits | sign for sign in (0, form.sign) for bits in payloads], form.unsigned)
    numbers = np.array([0.0, -2.0, np.inf, -np.inf], form.dtype).view(form.unsigned)
    bias = np.concatenate([nan, numbers])
    for axis in (0, 1):
        x, added = np.meshgrid(bias, bias, indexing="ij" if axis else "xy")
        is_nan = reference.is_nan(form, x) | reference.is_nan(form, added)
        first = np.where(reference.is_nan(form, x), x, added) | form.unsigned.type(quiet)
        if dtype == "bfloat16":
            first &= form.unsigned.type(form.sign | form.infinity | quiet)
        arrays = x.view(form.dtype), bias.view(form.dtype)
        with np.errstate(all="raise"):
            y, pullback = relu_xp.bias_relu_vjp(*arrays, axis=axis)
            once = relu_xp.bias_relu(*arrays, axis=axis)
            _, total = pullback(arrays[0])
        for result in (y, once):
            assert (result.view(form.unsigned)[is_nan] == first[is_nan]).all()
        found = total.view(form.unsigned)
        assert set(found[np.isnan(total)].tolist()) == {form.infinity | quiet}


def test_the_gradient_of_squared_relu_is_rounded_twice(xp):
    """To float32, then to float16; rounded from float64 some would differ."""
    rng = np.random.default_rng(12)
    x = (rng.random(100_000) + 0.5).astype(np.float32)
    dy = (rng.random(x.size) + 0.5).astype(np.float16)
    twice = (2 * x * dy.astype(np.float32)).astype(np.float16)
    assert ((2 * x * dy.astype(np.float64)).astype(np.float16) != twice).any()
    np.testing.assert_array_equal(relu_xp.squared_relu_vjp(x)[1](dy), twice)


# ---- The order of sums ---------------------------------------------------------------------------


def sum_in_order(rows):
    """Return the sum of each row: 1,024 neighbours at a time side by side, then by halves."""
    side, sums = 1024, []
    for values in rows.tolist():
        if len(values) > 2 * side:
            multiple = len(values) // side * side
            lines = [values[i : i + side] for i in range(0, multiple, side)]
            total = lines[0]
            for line in lines[1:]:
                total = [a + b for a, b in zip(total, line, strict=True)]
            for place, value in enumerate(values[multiple:]):
                total[place] += value
            values = total
        while len(values) > 1:
            half = len(values) // 2
            added = [a + b for a, b in zip(values[:half], values[-half:], strict=True)]
            values = added + values[half : len(values) - half]
        sums.append(values[0])
    return np.array(sums)


def weight_grad(backend, terms, shape):
    return backend.prelu_weight_grad(np.ones_like(terms), terms, np.zeros(shape))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 1024, 2047, 2048, 2049, 3072, 3073, 5000])
def test_the_gradient_of_a_weight_has_an_order_of_its_own(backend, length):
    """The same bits with every version of NumPy."""
    rows = -np.abs(np.random.default_rng(length).standard_normal((5, length)))
    columns = np.ascontiguousarray(rows.T)
    wanted, in_turn = sum_in_order(rows), functools.reduce(np.add, columns)
    assert length < 100 or (wanted != in_turn).any()
    for terms, shape, expected in (
        (rows, (5, 1), wanted),
        (rows[..., None], (5, 1, 1), wanted),
        (columns, (1, 5), in_turn),
        (columns, (1, 1), sum_in_order(in_turn[None])),
        (rows, (5, length), rows),
    ):
        found = weight_grad(backend, terms, shape)
        np.testing.assert_array_equal(found, expected.reshape(shape))


def test_parts_of_the_gradient_of_a_weight_are_added_in_turn(backend):
    """Each has as many rows of the first axis as 65,536 elements take."""
    terms = -np.abs(np.random.default_rng(0).standard_normal((200, 1000)))
    for axes, shape in (((0,), (1, 1000)), ((0, 1), (1, 1))):
        total = np.zeros(shape)
        for start in range(0, 200, 65):
            sums = functools.reduce(np.add, terms[start : start + 65])[None]
            total += sums if axes == (0,) else sum_in_order(sums)[None]
        found = weight_grad(backend, terms, shape)
        np.testing.assert_array_equal(found, total)
        assert (found != terms.sum(axes, keepdims=True)).any()


@pytest.mark.parametrize("pair", [(3e38, -np.inf), (np.inf, -np.inf), (3e38, 3e38), (np.nan, 1)])
def test_a_sum_of_infinities_does_not_warn(xp, pair):
    """Within a part of the sum, and where parts are added."""
    for count in (4, 1 << 17):
        dy = np.repeat(np.array(pair, np.float32), count)
        x = np.full(dy.size, -3e38, np.float32)
        _, pullback = relu_xp.prelu_vjp(x, np.full(1, 0.5, np.float32), axis=0)
        with np.errstate(all="ignore"):
            expected = (x.astype(np.float64) * dy).sum().astype(np.float32)
        with np.errstate(all="raise"):
            found = pullback(dy)[1]
        np.testing.assert_array_equal(found, [expected])


def test_ones_times_a_weight_are_the_weight(backend):
    weight = np.array([0.0, -0.5, 1.0, 3.0], np.float32)
    factors = backend.prelu(None, None, weight, None)
    assert factors.dtype == np.float32
    np.testing.assert_array_equal(factors, weight)
