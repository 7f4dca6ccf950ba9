"""The tests of a bias and ReLU; `relu_xp.testing.conformance` has them and the others."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest

import relu_xp
from relu_xp.testing import reference
from relu_xp.testing._activations import views
from relu_xp.testing._library import Bits, Library, array_of, check


class _Sum(NamedTuple):
    """Bit patterns of x and of a bias along the last of its two axes, and their sums.

    Attributes
    ----------
    x, bias : ndarray of unsigned integers
    inputs : tuple of ndarray of unsigned integers
        What the sums are computed of, and these, flat.
    total : list of int or None
        The sums, flat.
    """

    x: Bits
    bias: Bits
    inputs: tuple[Bits, ...]
    total: list[int | None]


@functools.cache
def _sums(dtype: str, bias_dtype: str) -> _Sum:
    """Return difficult numbers, among them sums that cancel, or almost."""
    form, its_form = reference.Format(dtype), reference.Format(bias_dtype)
    rng = np.random.default_rng(22)
    bias = rng.permutation(reference.gradients(bias_dtype, 193))
    cast = np.array([form.convert(bits, its_form) for bits in bias.tolist()], form.unsigned)
    x = rng.choice(reference.patterns(dtype, ""), (24, bias.size))
    x[1::3] = rng.choice(reference.specials(dtype), x[1::3].shape)
    x[2::3] = cast ^ form.unsigned.type(form.sign)  # minus the bias
    x[2::3] += rng.integers(-3, 4, x[2::3].shape).astype(form.unsigned)
    flat, casts = x.ravel(), np.tile(cast, len(x))
    total = [form.sum(*pair) for pair in zip(flat.tolist(), casts.tolist(), strict=True)]
    sums = reference.Expected(form, total).bits
    return _Sum(x, bias, (flat, np.tile(bias, len(x)), casts, sums), total)


@functools.cache
def _expected(
    dtype: str, bias_dtype: str, dy_dtype: str, preset: str
) -> tuple[reference.Expected, reference.Expected]:
    """Return what y and dx have to be, which for every library is the same."""
    rules, slopes = (reference.presets(name)[preset] for name in (dtype, dy_dtype))
    total, some = _sums(dtype, bias_dtype).total, reference.ANY_NAN
    values = [some if bits is some else rules.forward(bits) for bits in total]
    branches = [1 if bits is some else rules.branch(bits) for bits in total]
    pairs = zip(branches, reference.gradients(dy_dtype, len(total)).tolist(), strict=True)
    dx = [slopes.backward(*pair) for pair in pairs]
    return reference.Expected(rules.form, values), reference.Expected(slopes.form, dx)


@pytest.mark.parametrize("preset", reference.PRESETS)
def test_bias_relu_obeys_the_table(library: Library, dtype: str, preset: str) -> None:
    """B1, and F1 to G4, N1, D2 for the sum, which is rounded first, as is the bias before it."""
    params = reference.PRESETS[preset]
    backs = library.dtypes[1:] + library.dtypes[:1]
    for index, (other, back) in enumerate(zip(library.dtypes, backs, strict=True)):
        host, bias, inputs, _ = _sums(dtype, other)
        y_expected, dx_expected = _expected(dtype, other, back, preset)
        gradients = reference.gradients(back, host.size)
        x, dy, axis = host, gradients.reshape(host.shape), 1
        if index % 2:
            x, dy, axis = np.ascontiguousarray(x.T), np.ascontiguousarray(dy.T), 0
        x, dy = array_of(library, x, dtype), array_of(library, dy, back)
        its_bias = array_of(library, bias, other)
        y, pullback = relu_xp.bias_relu_vjp(x, its_bias, axis=axis, **params)
        once = relu_xp.bias_relu(x, its_bias, axis=axis, **params)
        for result in (y, once):
            check(library, _flat(library, result, axis), y_expected, *inputs)
        dx = _flat(library, pullback(dy)[0], axis)
        check(library, dx, dx_expected, *inputs, gradients)


def _flat(library: Library, result: Any, axis: int) -> Any:
    """Return a result of x, or of its transpose for an axis of 0, as a 1-D array."""
    found = library.numpy(result)
    return library.array((found if axis else found.T).ravel())


def test_rows_of_bias_relu_by_hand(library: Library, dtype: str) -> None:
    """As a reader would type them, in case the reference has a mistake."""
    inf, nan = np.inf, np.nan
    rows = np.array(
        [
            [-inf, -1.5, -2.0, 1.0, 4.0, inf, -inf, nan, 1.0, -0.0],  # x
            [3.0, 0.5, 2.0, -0.5, 3.0, -inf, -5.0, 1.0, nan, -0.0],  # bias
            [nan, inf, nan, -2.0, 3.0, 5.0, nan, 2.0, 4.0, -inf],  # dy
        ],
        reference.DTYPES[dtype],
    )
    x, bias, dy = map(library.array, rows)
    clipped_leaky: dict[str, Any] = {"negative_slope": 0.5, "max_value": 6.0}
    for params, y_expected, dx_expected in (
        ({}, [0, 0, 0, 0.5, 7, nan, 0, nan, nan, 0], [0, 0, 0, -2, 3, 5, 0, 2, 4, 0]),
        (
            clipped_leaky,
            [-inf, -0.5, 0, 0.5, 6, nan, -inf, nan, nan, -0.0],
            [nan, inf, nan, -2, 0, 5, nan, 2, 4, -inf],
        ),
    ):
        y, pullback = relu_xp.bias_relu_vjp(x, bias, **params)
        wanted = y_expected, dx_expected, dx_expected
        for result, expected in zip((y, *pullback(dy)), wanted, strict=True):
            row, number = library.numpy(result).astype(np.float64), ~np.isnan(expected)
            np.testing.assert_array_equal(row, expected)
            np.testing.assert_array_equal(np.signbit(row)[number], np.signbit(expected)[number])


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_bias_gradient_is_the_sum_along_the_other_axes(
    library: Library, dtype: str, axis: int
) -> None:
    """B2: in shape and dtype of the bias, for a dy of any dtype: exact numbers."""
    shape = (2, 3, 4)
    host = np.resize([-3.0, 2, -1, 0, 5], shape)
    added = np.array([1.0, -2, 0.5, 3])[: shape[axis]]
    gradient = np.resize([1.0, -2, 4, 0.5, -8, 16, 3], shape)
    others = tuple(other for other in range(3) if other != axis % 3)
    total = host + np.expand_dims(added, others)
    dx = np.where(total > 0, gradient, 0)
    for other in library.dtypes:
        for its_dtype in library.dtypes:
            x, bias, dy = (
                library.array(values.astype(reference.DTYPES[name]))
                for values, name in ((host, dtype), (added, its_dtype), (gradient, other))
            )
            y, pullback = relu_xp.bias_relu_vjp(x, bias, axis=axis)
            results = (y, dtype), (pullback(dy)[0], other), (pullback(dy)[1], its_dtype)
            wanted = np.maximum(total, 0), dx, dx.sum(others)
            for (result, name), expected in zip(results, wanted, strict=True):
                found = library.numpy(result)
                assert found.dtype == reference.DTYPES[name]
                np.testing.assert_array_equal(found.astype(np.float64), expected)


def test_bias_gradient_is_summed_in_float64(library: Library, dtype: str) -> None:
    """B2: 5,000 ones stop at 2,048 in float16; what remains where large numbers cancel."""
    form = reference.DTYPES[dtype]
    rows = np.ones((5000, 3), form)
    if "float64" in library.dtypes:
        few = np.array([2.0**15, 2.0**-10, -(2.0**15)])  # float32 has 24 bits
        rows = np.concatenate([rows, np.tile(few, (3, 256)).T.astype(form)])
    x = library.array(rows * form.type(0) + form.type(1))
    for name in library.dtypes:
        bias = library.array(np.zeros(3, reference.DTYPES[name]))
        for dy in (rows, rows[::-1].copy()):
            _, pullback = relu_xp.bias_relu_vjp(x, bias)
            found = library.numpy(pullback(library.array(dy))[1])
            exact = 5000 + 0.25 * ("float64" in library.dtypes)
            np.testing.assert_array_equal(found, np.full(3, exact).astype(found.dtype))


def test_bias_gradient_at_nan_and_infinity(library: Library, dtype: str) -> None:
    """B2: they reach it from live units alone; a sum beyond the bias's range is infinite."""
    inf, nan = np.inf, np.nan
    host = [[1.0, 1, 1, 1, nan, -1, 1], [1, 1, 1, -1, 1, -inf, 1], [-1, 1, 1, 1, 1, 0, -0.5]]
    gradient = [
        [inf, inf, nan, 2, 3, nan, 1.5],
        [1, -inf, 1, nan, 4, inf, 2],
        [-inf, 1, 1, 8, 1, nan, nan],
    ]
    x, dy, bias = (
        library.array(np.array(values, reference.DTYPES[dtype]))
        for values in (host, gradient, [0.0] * 7)
    )
    found = library.numpy(relu_xp.bias_relu_vjp(x, bias)[1](dy)[1]).astype(np.float64)
    np.testing.assert_array_equal(found, [inf, nan, nan, 10, 8, 0, 3.5])
    assert not np.signbit(found[5])
    largest = np.full((4, 2), np.finfo(np.float16).max, np.float16)
    ones = library.array(np.ones((4, 2), np.float32))
    if "float16" in library.dtypes:
        for name, expected in (("float16", inf), ("float32", 4 * 65504.0)):
            bias = library.array(np.zeros(2, name))
            _, (_, total) = _both(ones, bias, library.array(largest))
            assert library.numpy(total).tolist() == [expected] * 2


def _both(x: Any, bias: Any, dy: Any, **options: Any) -> tuple[Any, tuple[Any, Any]]:
    """Return y and both gradients."""
    y, pullback = relu_xp.bias_relu_vjp(x, bias, **options)
    return y, pullback(dy)


@pytest.mark.parametrize("axis", [0, 1])
def test_bias_gradient_has_the_same_bits_again(library: Library, dtype: str, axis: int) -> None:
    """B2: of the same numbers, by the same pullback and by another."""
    rng = np.random.default_rng(3)
    form = reference.DTYPES[dtype]
    x, dy = (library.array(rng.standard_normal((301, 257)).astype(form)) for _ in range(2))
    bias = library.array(rng.standard_normal((301, 257)[axis]).astype(form))
    _, pullback = relu_xp.bias_relu_vjp(x, bias, axis=axis)
    totals = [p(dy)[1] for p in (pullback, pullback, relu_xp.bias_relu_vjp(x, bias, axis=axis)[1])]
    assert len({library.numpy(total).tobytes() for total in totals}) == 1


@pytest.mark.parametrize("params", [{}, {"negative_slope": 0.5, "max_value": 2.0}], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_bias_relu_of_every_layout(
    library: Library, dtype: str, axis: int, params: dict[str, Any]
) -> None:
    """A1: that of the sum; x, bias and dy in different layouts, broadcast ones too."""
    rng = np.random.default_rng(7)
    form = reference.DTYPES[dtype]
    hosts = [(4 * rng.standard_normal((24, 24))).round().astype(form) / 4 for _ in range(3)]
    of_x, of_dy, of_bias = (list(views(library.array(host), host)) for host in hosts)
    shifted = of_dy[1:] + of_dy[:1]
    for (x, seen), (dy, back), (row, added) in zip(of_x, shifted, of_bias, strict=True):
        total = seen + (added[0] if axis else added[:1].T)
        flat, flat_dy = library.array(total.ravel()), library.array(back.ravel())
        expected, its_pullback = relu_xp.relu_vjp(flat, **params)
        y, (dx, bias_grad) = _both(x, row[0, :], dy, axis=axis, **params)
        wanted = library.numpy(its_pullback(flat_dy)).reshape(12, 12)
        once = relu_xp.bias_relu(x, row[0, :], axis=axis, **params)
        for result in (y, once):
            np.testing.assert_array_equal(library.numpy(result).ravel(), library.numpy(expected))
        np.testing.assert_array_equal(library.numpy(dx), wanted)
        exact = wanted.astype(np.float64).sum(1 - axis)
        np.testing.assert_array_equal(library.numpy(bias_grad), exact.astype(form))
