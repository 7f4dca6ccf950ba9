"""The four parameters: which numbers are valid, and what they are in the dtype of an array."""

from __future__ import annotations

import math
import numbers
import pickle
import re
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from operands import WEIGHT, X, bits, raises, raising

import relu_xp
from relu_xp import parameters
from relu_xp.testing import reference

NAMES = "negative_slope", "threshold", "positive_slope", "max_value"


def number(base=numbers.Real, **attributes):
    """Return an instance of a new class of numbers, whose other methods raise."""
    abstract = dict.fromkeys(getattr(base, "__abstractmethods__", ()), raises)
    attributes = {"__hash__": lambda self: 3} | attributes
    return type("Number", (base,), abstract | attributes)()


def rational(**attributes):
    return number(numbers.Rational, **attributes)


NOT_REAL = {
    "every method raises": number(),
    "hash raises": number(__hash__=raises, __float__=raises),
    "no hash": number(__hash__=None),
    "equality raises": number(__hash__=lambda self: hash(0.5), __eq__=raises),
    "float is text": number(float, __float__=lambda self: "0.5"),
    "class raises": number(object, __class__=property(raises)),
    "class is another": number(object, __class__=float),
    "denominator raises": rational(),
    "numerator is text": rational(denominator=1, numerator="5"),
    "numerator is a float": rational(denominator=1, numerator=5.5),
    **{repr(one): one for one in (Decimal("0.1"), "0.5", b"1", 0.5j, np.array(0.5j), [0.5], True)},
    **{repr(one): one for one in (np.bool_(True), np.array(True), np.ones(1), object)},
}
NOT_FINITE = {
    "float is NaN": number(__float__=lambda self: math.nan),
    "float overflows": number(__float__=raising(OverflowError)),
    "no text": number(__float__=lambda self: math.inf, __str__=raises, __format__=raises),
    "numerator is huge": rational(denominator=1, numerator=10**400),
    "huge": 10**400,
    "too long for text": -(10**5000),
    "huge fraction": Fraction(10**400, 3),
    "NaN": math.nan,
    "-inf": np.float32("-inf"),
}
TAKES_NUMBER = {
    "relu": lambda n: relu_xp.relu(X, negative_slope=n),
    "relu_vjp": lambda n: relu_xp.relu_vjp(X, threshold=n),
    "relu_backward": lambda n: relu_xp.relu_backward(X, X, positive_slope=n),
    "relu_grad": lambda n: relu_xp.relu_grad(X, max_value=n),
    "leaky_relu": lambda n: relu_xp.leaky_relu(X, n),
    "ReLU6": lambda n: relu_xp.ReLU6(threshold=n),
    "rrelu": lambda n: relu_xp.rrelu(X, n, 1.0),
    "RReLU": lambda n: relu_xp.RReLU(0.0, n),
    "PReLU": lambda n: relu_xp.PReLU(1, n),
    "bias_relu": lambda n: relu_xp.bias_relu(X, WEIGHT, threshold=n),
    "bias_relu_vjp": lambda n: relu_xp.bias_relu_vjp(X, WEIGHT, max_value=n),
    "BiasReLU": lambda n: relu_xp.BiasReLU(6, positive_slope=n),
    "empty_mask": lambda n: relu_xp.empty_mask(X, negative_slope=n),
}


@pytest.mark.parametrize("kind", NOT_REAL | NOT_FINITE)
def test_invalid_numbers(kind):
    error, reason = (TypeError, "real number") if kind in NOT_REAL else (ValueError, "finite")
    for call in TAKES_NUMBER.values():
        with pytest.raises(error) as refused:
            call((NOT_REAL | NOT_FINITE)[kind])
        name = "|".join([*NAMES, "lower", "upper", "init"])
        assert re.match(f"({name}) must be .*{reason}", str(refused.value))
    np.testing.assert_array_equal(relu_xp.relu(X), np.maximum(X, 0))


def test_a_number_that_is_a_0d_array(require):
    """As `numpy.load` reads each number of a file; of other libraries there is advice."""
    x, slope = np.array([-2.0, 3.0]), np.array(0.5, np.float32)
    assert relu_xp.leaky_relu(x, slope).tolist() == [-1, 3]
    assert relu_xp.ClippedReLU(np.array(2)).forward(x).tolist() == [0, 2]
    assert relu_xp.RReLU(slope, slope).bounds == (0.5, 0.5)
    strict = require("array_api_strict").asarray(0.5)
    with pytest.raises(TypeError, match=r"got Array; give float\(negative_slope\)$"):
        relu_xp.leaky_relu(x, strict)
    assert relu_xp.leaky_relu(x, float(strict)).tolist() == [-1, 3]


def test_an_infinite_ceiling_is_none():
    with pytest.raises(ValueError, match=r"^max_value must be finite, got inf; omit it"):
        relu_xp.relu(X, max_value=np.inf)
    for options in ({"max_value": -np.inf}, {"threshold": np.inf}, {"max_value": np.nan}):
        with pytest.raises(ValueError, match="must be finite, got (-?inf|nan)$"):
            relu_xp.relu(X, **options)


def test_numbers_of_any_type():
    half = {"__float__": lambda self: 0.5}
    for value in (
        number(**half, __hash__=lambda self: hash(2.0), __eq__=raises),
        number(**half, __hash__=raises),
        number(float, **half),
        rational(denominator=2, **half),
        Fraction(1, 2),
        Fraction(10**400, 2 * 10**400),
        np.float16(0.5),
        np.longdouble(0.5),
    ):
        got = relu_xp.relu(X, negative_slope=value)
        np.testing.assert_array_equal(got, np.where(X > 0, X, X / 2))
    for name in NAMES:
        for value in (1, 1.0, np.float32(1), np.int8(1), Fraction(1)):
            y = relu_xp.relu(X, **{"max_value": 5, name: value})
            np.testing.assert_array_equal(y, relu_xp.relu(X, **{"max_value": 5, name: 1.0}))
    np.testing.assert_array_equal(relu_xp.relu(X, max_value=10**300), np.maximum(X, 0))


def test_a_bool_is_invalid_even_after_its_equal_was_seen():
    relu_xp.relu(X, positive_slope=1)
    with pytest.raises(TypeError, match="^positive_slope must be a real number, got bool$"):
        relu_xp.relu(X, positive_slope=True)


def test_numbers_that_do_not_go_together():
    for given, message in (
        ({"positive_slope": 0}, "positive_slope must not be 0"),
        ({"max_value": 0}, "max_value needs .*max_value=.*threshold="),
        ({"max_value": 1, "threshold": 1}, "max_value needs"),
        ({"max_value": 1, "threshold": 0.5, "positive_slope": 2}, "max_value needs"),
        ({"max_value": 1, "positive_slope": -1}, "max_value needs"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            relu_xp.relu(X, **given)
        with pytest.raises(ValueError, match=f"^{message}"):
            relu_xp.ReLU(**given)


class Wrong(Fraction):
    """A fraction whose float is another number, and whose index raises."""

    def __float__(self):
        return 5.0

    def __index__(self):
        raise LookupError


def test_a_rational_is_its_numerator():
    assert relu_xp.relu(np.array([2.0, 4.0]), threshold=Wrong(3)).tolist() == [0, 4]
    with pytest.raises(ValueError, match="^threshold must be finite"):
        relu_xp.relu(X, threshold=Wrong(10**400))


def test_the_error_of_a_number_is_the_cause():
    for call in (
        lambda: relu_xp.relu(X, threshold=rational(denominator=property(raising(LookupError)))),
        lambda: relu_xp.crelu(X, axis=Wrong(1)),
    ):
        with pytest.raises(TypeError, match="(threshold|axis) must be ") as refused:
            call()
        assert type(refused.value.__cause__) is LookupError


@pytest.mark.parametrize(
    "axis",
    [1.0, "1", None, True, 2**63, -(10**5000), number(object, __index__=raises)],
    ids=lambda axis: type(axis).__name__,
)
def test_an_axis_is_an_integer_of_64_bits(axis):
    calls = [
        lambda: relu_xp.crelu(X, axis=axis),
        lambda: relu_xp.CReLU(axis),
        lambda: relu_xp.PReLU(axis=axis),
        lambda: relu_xp.PReLU(axis),
        lambda: relu_xp.PReLU((2, axis)),
        lambda: relu_xp.bias_relu(X, WEIGHT, axis=axis),
        lambda: relu_xp.BiasReLU(6, axis),
        lambda: relu_xp.BiasReLU(axis),
    ]
    if axis is not None:
        calls += [lambda: relu_xp.prelu(X, WEIGHT, axis=axis)]
    for call in calls:
        error = ValueError if type(axis) is int else TypeError
        with pytest.raises(error, match="(axis|num_parameters|num_features) must be "):
            call()
    with pytest.raises(ValueError, match="^crelu: x has shape .*, and no axis"):
        relu_xp.crelu(X, axis=2**63 - 1)


# ---- Cast to the dtype of the array --------------------------------------------------------------


CASTS = 0.0, 1.0, 1 / 3, 65504.0, 1e-8, 3e-5, 1e5, 1e-40, 1e39, 2**60 + 2**36 + 1, 2**60 - 1


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_a_threshold_is_rounded_once_and_to_even(dtype):
    """N1: between two numbers, at the middle of them, among subnormals and before infinity."""
    form = reference.Format(dtype)

    def value(pattern):
        return float(np.array(pattern, form.unsigned).view(form.dtype))

    values = [*CASTS, sys.float_info.max]
    for pattern in (1, 2, 5, form.round(1.0), form.round(1.0) + 1, form.infinity - 2):
        low, high = value(pattern), value(pattern + 1)
        values += [low + (high - low) * part for part in (0.25, 0.499, 0.5, 0.501, 0.75, 1)]
    largest = value(form.infinity - 1)
    if dtype != "float64":
        step = largest - value(form.infinity - 2)
        values += [largest + step * part for part in (0.25, 0.499, 0.5, 0.75, 1, 5)]
    for threshold in values:
        exact = form.round(threshold)
        patterns = [exact, exact + 1] if exact < form.infinity else [exact]
        x = np.array(patterns, form.unsigned).view(form.dtype)
        y = relu_xp.relu(x, threshold=threshold)
        np.testing.assert_array_equal(bits(y), [0, *patterns[1:]], err_msg=str(threshold))
        patterns = [form.sign | exact, (form.sign | exact) - 1] if exact else [form.sign]
        x = np.array(patterns, form.unsigned).view(form.dtype)
        y = relu_xp.relu(x, threshold=-threshold)
        np.testing.assert_array_equal(bits(y), [0, *patterns[1:]], err_msg=str(-threshold))


@pytest.mark.libraries("ndarray")
@pytest.mark.parametrize("kind", "bhilqBHILQ")
def test_integers(xp, kind):
    """D1: parameters in the whole range of a dtype, exactly; none beyond it."""
    low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    x = np.array([low, 0, 1, 2, 7, high], kind)
    for given, expected in (
        ({}, np.maximum(x, 0)),
        ({"max_value": 6}, np.clip(x, 0, 6)),
        ({"threshold": high}, np.zeros(6)),
        ({"threshold": low}, np.where(x > low, x, 0)),
        ({"threshold": Fraction(high - 1)}, np.where(x == high, x, 0)),
    ):
        y = relu_xp.relu(x, **given)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, expected)
    slopes = {"threshold": 1, "positive_slope": 3, "negative_slope": 2}
    np.testing.assert_array_equal(relu_xp.relu(x[2:5], **slopes), [2, 6, 21])
    for name, value in (
        *(("threshold", low - 1), ("threshold", high + 1)),
        *(("max_value", high + 1), ("negative_slope", 0.5)),
    ):
        with pytest.raises(ValueError, match=f"^relu: x: {name}=.*{x.dtype}"):
            relu_xp.relu(x, **{name: value})


def test_equal_parameters_are_equal_whatever_was_cached():
    first = relu_xp.LeakyReLU(0.77).activation
    parameters._cached.cache_clear()
    again = relu_xp.LeakyReLU(0.77).activation
    assert first == again == pickle.loads(pickle.dumps(first)) != relu_xp.ReLU().activation
    assert {first: 1}[again] == 1


def test_alternating_parameters_and_dtypes_are_not_confused():
    """The latest lookup is used again for the same parameters and dtype only."""
    for _ in range(2):
        for dtype in (np.float32, np.float16, np.float64):
            x = np.array([-2.0, 3.0], dtype)
            assert relu_xp.relu(x).tolist() == [0, 3]
            assert relu_xp.leaky_relu(x, 0.5).tolist() == [-1, 3]
            assert relu_xp.relu_backward(x.astype(np.float64), x, max_value=1.0).tolist() == [0, 0]
        assert relu_xp.relu(np.array([-2, 3])).tolist() == [0, 3]
        with pytest.raises(TypeError, match=r"^relu_grad: x .*int64"):
            relu_xp.relu_grad(np.array([-2, 3]))
