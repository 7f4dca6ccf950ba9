"""NumPy alone: what warns, what flushes, what the accident of numpy.maximum is worth."""

from __future__ import annotations

import numpy as np
import pytest

import relu_xp
from relu_xp.backends import numpy as backend
from relu_xp.testing import oracle


@pytest.fixture(params=["numpy.maximum", "integers"])
def way(request, monkeypatch):
    """Either way of plain ReLU: the fast one, and the one where numpy.maximum is not exact."""
    if request.param == "integers":
        monkeypatch.setattr(backend, "_ZERO", {})
        backend._constants.cache_clear()
        monkeypatch.setattr(backend, "_constants", backend._constants.__wrapped__)


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


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_both_ways_of_plain_relu_agree(way, dtype):
    x, dy = operands(dtype)
    compare(results(x, dy, {}), dtype, "relu")
    for part in (np.s_[::2], np.s_[::-1], np.s_[7:12]):
        form = oracle.Format(dtype)
        np.testing.assert_array_equal(
            relu_xp.relu(x[part]).view(form.unsigned), oracle.forward(dtype, "relu").bits[part]
        )


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("member", ["relu", "relu6", "thresholded", "negative-ceiling"])
def test_right_under_flush_to_zero(way, flush_to_zero, dtype, member):
    """F4 where integers can do it, which is everywhere but in a product."""
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


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("member", oracle.MEMBERS)
def test_silent_even_where_numpy_would_raise(dtype, member):
    x, dy = operands(dtype)
    with np.errstate(all="raise"):
        compare(results(x, dy, oracle.MEMBERS[member]), dtype, member)


def test_numpy_is_asked_whether_its_floats_are_exact(monkeypatch):
    """The probe can say no: to each of the ways in which a maximum may break the table."""
    float32 = np.dtype(np.float32)
    exact = np.maximum
    assert backend._floats_are_exact(float32)  # on the machines that we test on

    def keeps_negative_zero(x, zero):
        return np.where(x >= zero, x, exact(x, zero))

    def quiets_signalling_nan(x, zero):
        with np.errstate(invalid="ignore"):
            return exact(x, zero) + zero

    def swallows_nan(x, zero):
        return np.where(x > zero, x, zero)

    def flushes(x, zero):
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, zero, exact(x, zero))

    def warns(x, zero):
        return exact(np.sqrt(x - x), zero)

    for impostor in (keeps_negative_zero, quiets_signalling_nan, swallows_nan, flushes, warns):
        with monkeypatch.context() as patch:
            patch.setattr(np, "maximum", impostor)
            assert not backend._floats_are_exact(float32), impostor.__name__

    monkeypatch.setattr(np, "less_equal", lambda x, zero: ~np.greater(x, zero))  # of a NaN, too
    assert not backend._floats_are_exact(float32)


@pytest.mark.parametrize("dtype", [np.dtype(c) for c in "bhilqBHILQ"], ids=lambda d: d.char)
def test_integers_go_forward(dtype):
    info = np.iinfo(dtype)
    x = np.array([info.min, 0, 1, 2, 7, info.max], dtype)
    y = relu_xp.relu(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(relu_xp.relu6(x), np.clip(x, 0, 6))
    assert relu_xp.relu6(x).dtype == dtype
    np.testing.assert_array_equal(
        relu_xp.relu(x[2:5], threshold=1, positive_slope=3, negative_slope=2), [2, 6, 21]
    )
    assert relu_xp.relu(x[2:3].reshape(())).shape == ()
    assert relu_xp.relu6(x, out=x) is x
    np.testing.assert_array_equal(x, [0, 0, 1, 2, 6, 6])


def test_integers_need_whole_numbers_in_range():
    x = np.array([1], np.uint8)
    for numbers in ({"negative_slope": 0.01}, {"threshold": -1}, {"max_value": 256}):
        with pytest.raises(ValueError, match="relu: x: .* is not a whole number that uint8 holds"):
            relu_xp.relu(x, **numbers)
    # A threshold that no float holds is still exact.
    big = 2**53 + 1
    x = np.array([big, big + 1], np.int64)
    np.testing.assert_array_equal(relu_xp.relu(x, threshold=big), [0, big + 1])


def test_byte_swapped_arrays_are_refused():
    x = np.ones(3, np.dtype(np.float32).newbyteorder())
    with pytest.raises(TypeError, match=r"relu: x: byte-swapped dtype .* x\.astype\('float32'\)"):
        relu_xp.relu(x)
