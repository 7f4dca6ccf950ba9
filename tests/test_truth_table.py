"""Rules F1 to G4, N1, D1, D2: every backend against an oracle on integers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

import relu_xp

MEMBERS = list(oracle.MEMBERS)


def check(xp, result, expected, dtype, *inputs):
    """Compare bits, wherever the library's own operations can be right."""
    form = oracle.Format(dtype)
    got = xp.numpy(result)
    assert got.dtype == form.dtype
    bits = got.view(form.unsigned)
    wrong = bits != expected.bits
    any_nan = expected.any_nan if xp.payloads else is_nan(form, expected.bits)
    wrong[any_nan] = ~is_nan(form, bits[any_nan])
    if not xp.subnormals:
        for patterns in (*inputs, expected.bits):
            wrong &= ~tiny(patterns)
    assert not wrong.any(), (
        f"{wrong.sum()} wrong; x, dy, ...: {[hex(i[wrong][0]) for i in inputs]}, "
        f"got {bits[wrong][0]:#x}, expected {expected.bits[wrong][0]:#x}"
    )


def is_nan(form, bits):
    return (bits & (form.sign - 1)) > form.infinity


def tiny(patterns):
    """Tell what may be flushed: subnormals, and the smallest normal, which may be a rounded one."""
    dtype = {2: "bfloat16", 4: "float32", 8: "float64"}[patterns.itemsize]  # the widest exponents
    form = oracle.Format(dtype)
    magnitude = patterns & (form.sign - 1)
    return (magnitude > 0) & (magnitude <= 1 << form.fraction)


def array_of(xp, patterns, dtype):
    return xp.array(patterns.view(oracle.DTYPES[dtype]))


@pytest.mark.parametrize("member", MEMBERS)
def test_forward(xp, dtype, member):
    patterns = oracle.patterns(dtype)
    y = relu_xp.relu(array_of(xp, patterns, dtype), **oracle.MEMBERS[member])
    check(xp, y, oracle.forward(dtype, member), dtype, patterns)


@pytest.mark.parametrize("member", MEMBERS)
def test_grad(xp, dtype, member):
    patterns = oracle.patterns(dtype)
    g = relu_xp.relu_grad(array_of(xp, patterns, dtype), **oracle.MEMBERS[member])
    check(xp, g, oracle.gradient(dtype, member), dtype, patterns)


@pytest.mark.parametrize("member", MEMBERS)
def test_backward_from_input(xp, dtype, member):
    patterns = oracle.patterns(dtype)
    for other in xp.dtypes:
        gradients = oracle.gradients(other, patterns.size)
        dx = relu_xp.relu_backward(
            array_of(xp, gradients, other),
            array_of(xp, patterns, dtype),
            **oracle.MEMBERS[member],
        )
        check(xp, dx, oracle.backward(dtype, other, member), other, gradients, patterns)


@pytest.mark.parametrize("member", MEMBERS)
def test_vjp(xp, dtype, member):
    patterns = oracle.patterns(dtype)
    y, pullback = relu_xp.relu_vjp(array_of(xp, patterns, dtype), **oracle.MEMBERS[member])
    check(xp, y, oracle.forward(dtype, member), dtype, patterns)
    for other in xp.dtypes:
        gradients = oracle.gradients(other, patterns.size)
        dx = pullback(array_of(xp, gradients, other))
        check(xp, dx, oracle.backward(dtype, other, member), other, gradients, patterns)


def test_rows_by_hand(xp, dtype):
    """The table's rows as a reader would type them, in case the oracle shares a mistake."""
    numpy_dtype = oracle.DTYPES[dtype]
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -1.5, -0.0, 0.0, 0.5, 6.0, 7.0, inf, nan], numpy_dtype)
    dy = np.array([nan, inf, -inf, nan, -2.0, 3.0, nan, 1.0, 5.0], numpy_dtype)

    def rows(result):
        return [float(v) for v in xp.numpy(result)]

    def same(result, expected):
        np.testing.assert_array_equal(rows(result), expected)
        np.testing.assert_array_equal(np.signbit(rows(result))[:8], np.signbit(expected)[:8])

    same(relu_xp.relu(xp.array(x)), [0, 0, 0, 0, 0.5, 6, 7, inf, nan])
    same(relu_xp.relu6(xp.array(x)), [0, 0, 0, 0, 0.5, 6, 6, 6, nan])
    same(relu_xp.leaky_relu(xp.array(x), 0.5), [-inf, -0.75, -0.0, 0, 0.5, 6, 7, inf, nan])
    same(relu_xp.thresholded_relu(xp.array(x), 0.5), [0, 0, 0, 0, 0, 6, 7, inf, nan])
    same(relu_xp.clipped_relu(xp.array(x), 0.25), [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25, nan])
    same(relu_xp.relu_grad(xp.array(x)), [0, 0, 0, 0, 1, 1, 1, 1, 1])
    same(relu_xp.relu_grad(xp.array(x), max_value=6), [0, 0, 0, 0, 1, 0, 0, 0, 1])
    same(relu_xp.relu_backward(xp.array(dy), xp.array(x)), [0, 0, 0, 0, -2, 3, nan, 1, 5])


def test_a_long_array_agrees_with_a_short_one(xp, dtype):
    """Blocks, tails and vector loops: the same bits at every length and place."""
    short = oracle.specials(dtype)
    for member in ("relu", "everything"):
        numbers = oracle.MEMBERS[member]
        y = xp.numpy(relu_xp.relu(array_of(xp, short, dtype), **numbers))
        long = np.tile(short, -(-150_001 // short.size))[:150_001]
        z, pullback = relu_xp.relu_vjp(array_of(xp, long, dtype), **numbers)
        dy = oracle.gradients(dtype, long.size)
        dx = xp.numpy(pullback(array_of(xp, dy, dtype)))
        again = xp.numpy(
            relu_xp.relu_backward(array_of(xp, dy, dtype), array_of(xp, long, dtype), **numbers)
        )
        np.testing.assert_array_equal(
            canonical(xp.numpy(z), numbers), np.resize(canonical(y, numbers), long.size)
        )
        np.testing.assert_array_equal(canonical(dx, numbers), canonical(again, numbers))


def canonical(x, numbers):
    """Return the bits of an array; every NaN the same one, where a product may have made it."""
    form = oracle.Format(x.dtype.name)
    bits = x.view(form.unsigned)
    if not numbers:
        return bits
    return np.where(is_nan(form, bits), form.sign - 1, bits)
