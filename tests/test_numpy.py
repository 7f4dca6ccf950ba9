"""NumPy arrays, by compiled kernels or without: what warns, what flushes, what is summed how."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import relu_xp
from relu_xp import dispatch
from relu_xp.backends import numpy as fallback
from relu_xp.testing import oracle

pytestmark = pytest.mark.libraries("ndarray")


@pytest.fixture
def backend(xp):
    """The module that serves."""
    return dispatch.backend_for("test", "x", np.ones(1))


def results(x, dy, numbers):
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    return {
        "relu": relu_xp.relu(x, **numbers),
        "y": y,
        "relu_grad": relu_xp.relu_grad(x, **numbers),
        "relu_backward": relu_xp.relu_backward(dy, x, **numbers),
        "pullback": pullback(dy),
    }


def expected(dtype, member):
    return {
        "relu": oracle.forward(dtype, member),
        "y": oracle.forward(dtype, member),
        "relu_grad": oracle.gradient(dtype, member),
        "relu_backward": oracle.backward(dtype, dtype, member),
        "pullback": oracle.backward(dtype, dtype, member),
    }


def compare(got, dtype, member):
    form = oracle.Format(dtype)
    for name, wanted in expected(dtype, member).items():
        bits = got[name].view(form.unsigned)
        keep = ~wanted.any_nan
        np.testing.assert_array_equal(bits[keep], wanted.bits[keep], err_msg=name)
        assert np.isnan(got[name][wanted.any_nan].astype(float)).all()


def operands(dtype):
    form = oracle.Format(dtype)
    x = oracle.patterns(dtype).view(form.dtype)
    return x, oracle.gradients(dtype, x.size).view(form.dtype)


@pytest.mark.parametrize("obeys", [True, False])
def test_plain_relu_with_and_without_numpy_maximum(xp, dtype, obeys, monkeypatch):
    if not obeys:
        monkeypatch.setattr(fallback, "_maximum_obeys", lambda dtype: False)
    x, dy = operands(dtype)
    compare(results(x, dy, {}), dtype, "relu")
    for part in (np.s_[::2], np.s_[::-1], np.s_[7:12]):
        form = oracle.Format(dtype)
        np.testing.assert_array_equal(
            relu_xp.relu(x[part]).view(form.unsigned), oracle.forward(dtype, "relu").bits[part]
        )


@pytest.mark.libraries("ndarray", "compiled")
@pytest.mark.parametrize("member", ["relu", "relu6", "thresholded", "negative-ceiling"])
def test_right_under_flush_to_zero(xp, flush_to_zero, dtype, member):
    """F4 where integers are compared, which is everywhere but in a product."""
    x, dy = operands(dtype)
    form = oracle.Format(dtype)
    with flush_to_zero():
        assert np.float32(1e-40) * np.float32(1) == 0, "the processor does not flush"
        got = results(x, dy, oracle.MEMBERS[member])
        long = relu_xp.relu(np.tile(x, 3), **oracle.MEMBERS[member])
    compare(got, dtype, member)
    np.testing.assert_array_equal(
        long.view(form.unsigned), np.tile(oracle.forward(dtype, member).bits, 3)
    )


@pytest.mark.parametrize("member", oracle.MEMBERS)
def test_silent_even_where_numpy_would_raise(xp, dtype, member):
    x, dy = operands(dtype)
    with np.errstate(all="raise"):
        compare(results(x, dy, oracle.MEMBERS[member]), dtype, member)


@pytest.mark.parametrize("its_dtype", oracle.DTYPES)
def test_no_result_is_of_a_wider_dtype(xp, dtype, its_dtype):
    """Nor a scalar: NumPy makes float32 of a bfloat16 array and a number, and scalars of 0-d."""
    for shape in ((2, 3), (), (0, 2)):
        x = np.full(shape, -1.5, oracle.DTYPES[dtype])
        dy = np.full(shape, 2.5, oracle.DTYPES[its_dtype])
        for numbers in oracle.MEMBERS.values():
            found = results(x, dy, numbers)
            assert {type(one) for one in found.values()} == {np.ndarray}
            of_dy = {name: found.pop(name).dtype for name in ("relu_backward", "pullback")}
            assert set(of_dy.values()) == {dy.dtype}
            assert {one.dtype for one in found.values()} == {x.dtype}
        weight = np.full(1, 0.25, x.dtype) if shape else np.array(0.25, x.dtype)
        for y, pullback in (
            relu_xp.prelu_vjp(x, weight, axis=0),
            relu_xp.rrelu_vjp(x, rng=np.random.default_rng(0)),
            relu_xp.squared_relu_vjp(x),
        ):
            dx = pullback(dy)
            dx, *more = dx if isinstance(dx, tuple) else (dx,)
            assert [type(one) for one in (y, dx, *more)] == [np.ndarray] * (2 + len(more))
            assert (y.dtype, dx.dtype) == (x.dtype, dy.dtype)
            assert all(one.dtype == weight.dtype for one in more)


@pytest.fixture
def probe():
    """What NumPy's maximum was found to be is asked anew, and forgotten afterwards."""
    fallback._maximum_obeys.cache_clear()
    yield fallback._maximum_obeys.__wrapped__
    fallback._maximum_obeys.cache_clear()


def test_numpy_is_asked_whether_its_maximum_is_exact(probe, monkeypatch):
    """The probe can say no: to each of the ways in which a maximum may break the table."""
    float32 = np.dtype(np.float32)
    exact = np.maximum
    assert probe(float32)  # on the machines that we test on
    assert probe(np.dtype(np.uint8))
    assert not probe(np.dtype(np.float16))

    def keeps_negative_zero(x, zero):
        return np.where(x >= zero, x, exact(x, zero))

    def quiets_signalling_nan(x, zero):
        with np.errstate(invalid="ignore"):
            return exact(x, zero) + zero

    def swallows_nan(x, zero):
        return np.where(x > zero, x, zero)

    def flushes(x, zero):
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, zero, exact(x, zero))

    def forgets_payloads(x, zero):
        quiet = np.isnan(x) & ((x.view(np.uint32) & 1 << 22) != 0)
        return np.where(quiet, np.copysign(np.float32(np.nan), x), exact(x, zero))

    def warns(x, zero):
        return exact(np.sqrt(x - x), zero)

    def only_where(condition):
        def impostor(x, zero):
            return keeps_negative_zero(x, zero) if condition(x) else exact(x, zero)

        return impostor

    layouts = (
        only_where(lambda x: x.size > 100 and x.strides == (4,)),
        only_where(lambda x: x.size < 10 and x.strides == (4,)),
        only_where(lambda x: x.strides[0] < 0),
        only_where(lambda x: x.strides[0] > 4),
    )
    impostors = keeps_negative_zero, quiets_signalling_nan, swallows_nan, forgets_payloads
    for impostor in (*impostors, flushes, warns, *layouts):
        with monkeypatch.context() as patch:
            patch.setattr(np, "maximum", impostor)
            assert not probe(float32), impostor.__name__


@pytest.mark.parametrize("exact", [True, False])
def test_a_maximum_that_is_not_exact_is_not_used(probe, monkeypatch, exact):
    """One that is, is."""
    maximum, sizes = np.maximum, []

    def recorded(x, zero, out=None):
        sizes.append(x.size)
        y = maximum(x, zero, out=out)
        return y if exact else np.copyto(y, -0.0, where=y == 0) or y

    monkeypatch.setattr(np, "maximum", recorded)
    for dtype in ("float32", "float64"):
        numbers = relu_xp.ReLU().activation.round_to(dtype)
        for shape in ((3,), (1000, 3)):
            x = np.broadcast_to(np.array([-0.0, -1, 2], dtype), shape).copy()
            for y in (
                fallback.forward(numbers, x, None),
                fallback.forward(numbers, x, np.empty_like(x)),
                fallback.forward_saving(numbers, x, None, None)[0],
            ):
                assert not np.signbit(y).any()
    assert ({3, 3000} <= set(sizes)) == exact


@pytest.mark.parametrize("kind", [np.dtype(c) for c in "bhilqBHILQ"], ids=lambda d: d.char)
def test_integers_go_forward(xp, kind):
    info = np.iinfo(kind)
    x = np.array([info.min, 0, 1, 2, 7, info.max], kind)
    y = relu_xp.relu(x)
    assert y.dtype == kind
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(relu_xp.relu6(x), np.clip(x, 0, 6))
    assert relu_xp.relu6(x).dtype == kind
    np.testing.assert_array_equal(
        relu_xp.relu(x[2:5], threshold=1, positive_slope=3, negative_slope=2), [2, 6, 21]
    )
    assert relu_xp.relu(x[2:3].reshape(())).shape == ()
    assert relu_xp.relu6(x, out=x) is x
    np.testing.assert_array_equal(x, [0, 0, 1, 2, 6, 6])


def test_integers_need_whole_numbers_in_range(xp):
    x = np.array([1], np.uint8)
    for numbers in ({"negative_slope": 0.01}, {"threshold": -1}, {"max_value": 256}):
        with pytest.raises(ValueError, match="relu: x: .* is not a whole number that uint8 holds"):
            relu_xp.relu(x, **numbers)
    # A threshold that no float holds is still exact.
    big = 2**53 + 1
    x = np.array([big, big + 1], np.int64)
    np.testing.assert_array_equal(relu_xp.relu(x, threshold=big), [0, big + 1])


def test_byte_swapped_arrays_are_refused(xp):
    x = np.ones(3, np.dtype(np.float32).newbyteorder())
    with pytest.raises(TypeError, match=r"relu: x: byte-swapped dtype .* x\.astype\('float32'\)"):
        relu_xp.relu(x)


def test_a_sum_of_infinities_is_silent(xp, monkeypatch):
    """In whatever parts they lie."""
    monkeypatch.setattr(fallback, "_PART", 4)
    weight = np.full(1, 0.5, np.float32)
    for dy in ([3e38, -np.inf], [np.inf, -np.inf], [3e38, 3e38], [np.nan, 1]):
        dy = np.repeat(np.array(dy, np.float32), 4)
        x = np.full(8, -3e38, np.float32)
        _, pullback = relu_xp.prelu_vjp(x, weight, axis=0)
        with np.errstate(all="ignore"):
            expected = (x.astype(np.float64) * dy).sum().astype(np.float32)
        with np.errstate(all="raise"):
            found = pullback(dy)[1]
        np.testing.assert_array_equal(found, [expected])


def test_slopes_alone_are_themselves(backend):
    slopes = np.array([0.0, -0.5, 1.0, 3.0], np.float32)
    factors = backend.sloped(None, None, slopes, None)
    assert factors.dtype == np.float32
    np.testing.assert_array_equal(factors, slopes)


def test_squared_relus_gradient_is_rounded_twice(xp):
    """To float32, and from there to float16: from float64 some would be others."""
    rng = np.random.default_rng(12)
    x = (rng.random(100_000) + 0.5).astype(np.float32)
    dy = (rng.random(x.size) + 0.5).astype(np.float16)
    twice = (2 * x * dy.astype(np.float32)).astype(np.float16)
    once = (2 * x * dy.astype(np.float64)).astype(np.float16)
    assert (once != twice).any()
    np.testing.assert_array_equal(relu_xp.squared_relu_vjp(x)[1](dy), twice)


def in_our_order(rows):
    """Return the sum of each row: 1,024 neighbours at a time side by side, and those by halves."""
    row, sums = 1024, []
    for values in rows.tolist():
        if len(values) > 2 * row:
            whole = len(values) // row * row
            lines = [values[i : i + row] for i in range(0, whole, row)]
            total = lines[0]
            for line in lines[1:]:
                total = [a + b for a, b in zip(total, line, strict=True)]
            for place, value in enumerate(values[whole:]):
                total[place] += value
            values = total
        while len(values) > 1:
            half = len(values) // 2
            added = [a + b for a, b in zip(values[:half], values[-half:], strict=True)]
            values = added + values[half : len(values) - half]
        sums.append(values[0])
    return np.array(sums)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 1024, 2047, 2048, 2049, 3072, 3073, 5000])
def test_the_slopes_gradient_is_summed_in_an_order_of_our_own(backend, length):
    """The same with every NumPy, whose own order is another."""
    rows = -np.abs(np.random.default_rng(length).standard_normal((5, length)))

    def found(terms, *shape):
        total = backend.slopes_gradient(np.ones_like(terms), terms, np.zeros(shape), None)
        assert total.shape == shape
        return total.ravel()

    wanted = in_our_order(rows)
    np.testing.assert_array_equal(found(rows, 5, 1), wanted)
    np.testing.assert_array_equal(found(rows[..., None], 5, 1, 1), wanted)
    columns = np.ascontiguousarray(rows.T)
    in_turn = functools.reduce(np.add, columns)
    np.testing.assert_array_equal(found(columns, 1, 5), in_turn)
    assert length < 100 or (wanted != in_turn).any()
    np.testing.assert_array_equal(found(columns, 1, 1), in_our_order(in_turn[None]))
    np.testing.assert_array_equal(found(rows, 5, length), rows.ravel())


def test_parts_of_the_slopes_gradient_are_added_in_turn(backend):
    """As many rows of the first axis as 65,536 elements take."""
    terms = -np.abs(np.random.default_rng(0).standard_normal((200, 1000)))
    parts = [terms[start : start + 65] for start in range(0, 200, 65)]
    for axes, shape in (((0,), (1, 1000)), ((0, 1), (1, 1))):
        total = np.zeros(shape)
        for part in parts:
            sums = functools.reduce(np.add, part)[None]
            total += sums if axes == (0,) else in_our_order(sums)[None]
        found = backend.slopes_gradient(np.ones_like(terms), terms, np.zeros(shape), None)
        np.testing.assert_array_equal(found, total)
        assert (found != terms.sum(axes, keepdims=True)).any()
