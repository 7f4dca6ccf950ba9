"""The tests of the truth table; `relu_xp.testing.conformance` has them and the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import relu_xp
from relu_xp.testing import reference
from relu_xp.testing._library import Bits, Library, array_of, check


@pytest.mark.parametrize("preset", reference.PRESETS)
def test_relu_obeys_the_table(library: Library, dtype: str, preset: str) -> None:
    """F1 to F4, G1 to G4, N1, D2: f(x), f'(x), and f'(x) * dy from the input and from the mask."""
    params, patterns = reference.PRESETS[preset], reference.patterns(dtype)
    x = array_of(library, patterns, dtype)
    check(library, relu_xp.relu(x, **params), reference.forward(dtype, preset), patterns)
    check(library, relu_xp.relu_grad(x, **params), reference.gradient(dtype, preset), patterns)
    for other in library.dtypes:
        some, dy, gradients, expected = _backward(library, dtype, other, preset)
        y, pullback = relu_xp.relu_vjp(some, **params)
        if other == dtype:
            check(library, y, reference.forward(dtype, preset), patterns)
        for dx in (pullback(dy), pullback(dy), relu_xp.relu_backward(dy, some, **params)):
            check(library, dx, expected, *gradients)


def _backward(
    library: Library, dtype: str, other: str, preset: str
) -> tuple[Any, Any, tuple[Bits, Bits], reference.Expected]:
    """Return x and dy, arrays of any bit patterns, these patterns, and the gradient expected."""
    patterns = reference.patterns(dtype, other)
    gradients = reference.gradients(other, patterns.size)
    x, dy = array_of(library, patterns, dtype), array_of(library, gradients, other)
    return x, dy, (gradients, patterns), reference.backward(dtype, other, preset)


@pytest.mark.parametrize("preset", ["relu", "leaky", "steep", "tiny-slope"])
def test_prelu_obeys_the_table(library: Library, dtype: str, preset: str) -> None:
    """PReLU is the leaky ReLU of its slope; a slope of 0 gives exactly +0, and slopes are cast."""
    slope = reference.PRESETS[preset].get("negative_slope", 0.0)
    weight = library.array(np.full(1, slope, reference.DTYPES[library.dtypes[-1]]))
    for other in library.dtypes:
        x, dy, gradients, expected = _backward(library, dtype, other, preset)
        y, pullback = relu_xp.prelu_vjp(x, weight, axis=0)
        check(library, pullback(dy)[0], expected, *gradients)
        if other == dtype:
            for result in (y, relu_xp.prelu(x, weight, axis=0)):
                check(library, result, reference.forward(dtype, preset), gradients[1])


def test_prelu_weight_gradient_sums_what_is_not_above_0(library: Library, dtype: str) -> None:
    """A NaN or infinity above 0, of x or of dy, does not reach it."""
    x = np.array([[np.nan, np.inf, 3.0, -2.0, -0.0, 1.0]], reference.DTYPES[dtype])
    dy = np.array([[np.nan, np.nan, np.inf, 0.5, 7.0, -np.inf]], reference.DTYPES[dtype])
    for slope in (0.25, 0.0):
        weight = library.array(np.full(1, slope, reference.DTYPES[library.dtypes[-1]]))
        dx, weight_grad = relu_xp.prelu_vjp(library.array(x), weight)[1](library.array(dy))
        assert library.numpy(weight_grad).tolist() == [-1.0]
        expected = [[np.nan, np.nan, np.inf, 0.5 * slope, 7.0 * slope, -np.inf]]
        np.testing.assert_array_equal(library.numpy(dx).astype(np.float64), expected)


@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (1, 3, 1), (2, 3, 4), (2, 1, 4)], ids=str)
def test_prelu_weight_broadcasts(library: Library, dtype: str, shape: tuple[int, ...]) -> None:
    """A weight of any shape that broadcasts to x, and its gradient in that shape: exact numbers."""
    host, gradient = (np.resize(few, (2, 3, 4)) for few in ([-3.0, 2, -1, 0, 5], [1.0, -2, 4]))
    slopes = np.resize([-0.5, 0.25, 1, 0], shape)
    arrays = (array.astype(reference.DTYPES[dtype]) for array in (host, gradient, slopes))
    x, dy, weight = map(library.array, arrays)
    y, pullback = relu_xp.prelu_vjp(x, weight)
    dx, weight_grad = pullback(dy)
    terms = np.where(host > 0, 0, host * gradient)
    aligned = (1,) * (3 - len(shape)) + shape
    summed = tuple(axis for axis, length in enumerate(aligned) if length == 1)
    for result, expected in (
        (y, np.where(host > 0, host, slopes * host)),
        (dx, np.where(host > 0, gradient, slopes * gradient)),
        (weight_grad, terms.sum(summed, keepdims=True).reshape(shape)),
    ):
        found = library.numpy(result)
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found.astype(np.float64), expected)


@pytest.mark.parametrize("preset", ["relu", "leaky"])
def test_rrelu_obeys_the_table(library: Library, dtype: str, preset: str) -> None:
    """RReLU with equal bounds is leaky ReLU, in evaluation and in training."""
    x, dy, gradients, expected = _backward(library, dtype, dtype, preset)
    slope = reference.PRESETS[preset].get("negative_slope", 0.0)
    for rng in (None, np.random.default_rng(0)):
        if rng is not None and dtype != "float64":  # it draws in float32
            slope = float(np.float32(slope))
        y, pullback = relu_xp.rrelu_vjp(x, slope, slope, rng=rng)
        for result in (y, relu_xp.rrelu(x, slope, slope, rng=rng)):
            check(library, result, reference.forward(dtype, preset), gradients[1])
        check(library, pullback(dy), expected, *gradients)


def test_crelu_obeys_the_table(library: Library, dtype: str) -> None:
    """ReLU of x and of -x; the gradient of the first, minus that of the second."""
    form, patterns, relu = reference.Format(dtype), reference.patterns(dtype), _relu(dtype)
    opposite = patterns ^ form.unsigned.type(form.sign)
    x, pair = array_of(library, patterns, dtype), np.concatenate([patterns, opposite])
    y, pullback = relu_xp.crelu_vjp(x, axis=0)
    expected = reference.Expected(form, map(relu.forward, pair.tolist()))
    for result in (y, relu_xp.crelu(x, axis=0)):
        check(library, result, expected, np.tile(patterns, 2))
    above, below = np.split(np.array(list(map(relu.branch, pair.tolist()))), 2)
    for other in library.dtypes:
        its_form, dy = reference.Format(other), reference.gradients(other, 2 * patterns.size)
        first, second = np.split(dy, 2)
        minus = second ^ its_form.unsigned.type(its_form.sign)
        bits = np.where(below, minus, np.where(above, first, 0)).tolist()
        # A library's negation may change a NaN. Where x is NaN: see the next test.
        any_nan = (above & below) | (below & reference.is_nan(its_form, minus))
        expected = reference.Expected(
            its_form,
            [reference.ANY_NAN if nan else b for nan, b in zip(any_nan, bits, strict=True)],
        )
        dx = library.numpy(pullback(array_of(library, dy, other))).copy()
        dx[reference.is_nan(form, patterns)] = np.nan
        check(library, library.array(dx), expected, first, second, patterns)


def _relu(dtype: str) -> reference.Preset:
    return reference.presets(dtype)["relu"]


def test_crelu_gradient_at_nan_is_the_difference(library: Library, dtype: str) -> None:
    """And +0 at both zeros."""
    x = library.array(np.array([np.nan, -np.nan, 2, -2, 0, -0.0], reference.DTYPES[dtype]))
    dy = [5, -1, 5, 5, np.nan, 5, 1.5, 3, 1.5, 1.5, 1, np.inf]
    _, pullback = relu_xp.crelu_vjp(x, axis=0)
    dx = library.numpy(pullback(library.array(np.array(dy, reference.DTYPES[dtype]))))
    np.testing.assert_array_equal(dx.astype(np.float64), [3.5, -4, 5, -1.5, 0, 0])
    assert not np.signbit(dx[4:]).any()


def test_squared_relu_obeys_the_table(library: Library, dtype: str) -> None:
    """x*x and 2*x*dy above 0, rounded once, +0 elsewhere."""
    form, patterns = reference.Format(dtype), reference.patterns(dtype)
    x, dy = array_of(library, patterns, dtype), reference.gradients(dtype, patterns.size)
    above = map(_relu(dtype).branch, patterns.tolist())
    pairs = list(zip(above, patterns.tolist(), dy.tolist(), strict=True))
    squares = [form.product(bits, bits) if up else 0 for up, bits, _ in pairs]
    y, pullback = relu_xp.squared_relu_vjp(x)
    for result in (y, relu_xp.squared_relu(x)):
        check(library, result, reference.Expected(form, squares), patterns)
    expected = [_twice_product(form, bits, back) if up else 0 for up, bits, back in pairs]
    dx = pullback(array_of(library, dy, dtype))
    check(library, dx, reference.Expected(form, expected), dy, patterns)


def _twice_product(form: reference.Format, x: int, dy: int) -> int | None:
    """Return the bits of 2*x*dy for an x above 0; but 2*x may overflow, except in float16."""
    value, other = form.value(x), form.value(dy)
    finite = form.infinity not in (x, dy & (form.sign - 1))
    if value is not None and other is not None and finite and form.name == "float16":
        return form.encode((x ^ dy) & form.sign, 2 * abs(value * other), form.unit_shift)
    if value is not None and x != form.infinity:
        x = form.encode(0, 2 * value, 0)
    return form.product(x, dy)


def test_rows_by_hand(library: Library, dtype: str) -> None:
    """The rows of the table as a reader would type them, in case the reference has a mistake."""
    inf, nan = np.inf, np.nan
    host = np.array([-inf, -1.5, -0.0, 0.0, 0.5, 6.0, 7.0, inf, nan], reference.DTYPES[dtype])
    gradient = np.array([nan, inf, -inf, nan, -2.0, 3.0, nan, 1.0, 5.0], reference.DTYPES[dtype])
    x, dy = library.array(host), library.array(gradient)
    for result, expected in (
        (relu_xp.relu(x), [0, 0, 0, 0, 0.5, 6, 7, inf, nan]),
        (relu_xp.relu6(x), [0, 0, 0, 0, 0.5, 6, 6, 6, nan]),
        (relu_xp.leaky_relu(x, 0.5), [-inf, -0.75, -0.0, 0, 0.5, 6, 7, inf, nan]),
        (relu_xp.thresholded_relu(x, 0.5), [0, 0, 0, 0, 0, 6, 7, inf, nan]),
        (relu_xp.clipped_relu(x, 0.25), [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25, nan]),
        (relu_xp.relu_grad(x), [0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (relu_xp.relu_grad(x, max_value=6), [0, 0, 0, 0, 1, 0, 0, 0, 1]),
        (relu_xp.relu_backward(dy, x), [0, 0, 0, 0, -2, 3, nan, 1, 5]),
    ):
        row = library.numpy(result).astype(np.float64)
        np.testing.assert_array_equal(row, expected)
        np.testing.assert_array_equal(np.signbit(row)[:8], np.signbit(expected)[:8])


@pytest.mark.parametrize("preset", ["relu", "everything"])
def test_a_long_array_agrees_with_a_short_one(library: Library, dtype: str, preset: str) -> None:
    """Blocks, tails and vector loops give the same bits at every length and place."""
    params, form = reference.PRESETS[preset], reference.Format(dtype)
    short = reference.specials(dtype)
    long = np.resize(short, 150_001)
    x = array_of(library, long, dtype)
    dy = array_of(library, reference.gradients(dtype, long.size), dtype)
    y = relu_xp.relu(array_of(library, short, dtype), **params)
    z, pullback = relu_xp.relu_vjp(x, **params)

    def bits(result: Any) -> Bits:
        """Return the bits; every NaN the same one, where a product may have made it."""
        found = library.numpy(result).view(form.unsigned)
        return np.where(reference.is_nan(form, found), form.sign - 1, found) if params else found

    np.testing.assert_array_equal(bits(z), np.resize(bits(y), long.size))
    np.testing.assert_array_equal(bits(pullback(dy)), bits(relu_xp.relu_backward(dy, x, **params)))
