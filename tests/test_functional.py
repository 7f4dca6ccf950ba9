"""The functions as a user meets them: the seeds by name, the keywords, every refusal."""

from __future__ import annotations

import inspect
import sys
from fractions import Fraction

import numpy as np
import pytest

import relu_xp
from relu_xp.activation import Activation, activation_of


def test_the_forum_by_name():
    """dReLU(x) is relu_grad; relu_backward(dout, cache) is relu_backward(dy, x)."""
    x = np.array([-2.0, 0.0, 0.5, 1.0, 3.0])
    np.testing.assert_array_equal(relu_xp.relu_grad(x), [0, 0, 1, 1, 1])
    dout, cache = np.array([1.0, 2, 3, 4, 5]), x
    np.testing.assert_array_equal(relu_xp.relu_backward(dout, cache), [0, 0, 3, 4, 5])
    t0, a0, a1 = 0.5, 0.1, 2.0
    y = relu_xp.relu(x, threshold=t0, negative_slope=a0, positive_slope=a1)
    np.testing.assert_array_equal(y, [-0.2, 0, 0.05, 2, 6])
    forum = a0 * x * (x < t0) + a1 * x * (x > t0)
    assert forum[2] == 0, "at x == t0 the forum's expression gives 0"
    assert y[2] == a0 * t0, "at x == t0 ours is the lower piece"


def test_presets_are_relu_with_one_number_set():
    x = np.linspace(-30, 30, 121)
    same = np.testing.assert_array_equal
    same(relu_xp.leaky_relu(x), relu_xp.relu(x, negative_slope=0.01))
    same(relu_xp.leaky_relu(x, 0.2), relu_xp.relu(x, negative_slope=0.2))
    same(relu_xp.relu6(x), relu_xp.relu(x, max_value=6))
    same(relu_xp.clipped_relu(x), relu_xp.relu(x, max_value=20))
    same(relu_xp.clipped_relu(x, 3), relu_xp.relu(x, max_value=3))
    same(relu_xp.thresholded_relu(x), relu_xp.relu(x, threshold=1))
    same(relu_xp.thresholded_relu(x, 2), relu_xp.relu(x, threshold=2))
    same(
        relu_xp.thresholded_relu(x, 2, negative_slope=0.5, positive_slope=3, max_value=9),
        relu_xp.relu(x, threshold=2, negative_slope=0.5, positive_slope=3, max_value=9),
    )


@pytest.mark.parametrize("name", [n for n in relu_xp.__all__ if n.islower() and n != "warmup"])
def test_arrays_are_positional_only_and_options_keyword_only(name):
    numbers = {"negative_slope", "threshold", "positive_slope", "max_value"}
    own = {
        "leaky_relu": {"negative_slope"},
        "clipped_relu": {"max_value"},
        "thresholded_relu": {"threshold"},
        "rrelu": {"lower", "upper"},
        "rrelu_vjp": {"lower", "upper"},
    }.get(name, set())
    options = {
        "relu6": numbers - {"max_value"},
        "relu_vjp": numbers | {"mask"},
        "prelu": {"axis"},
        "rrelu": {"rng", *own},
        "crelu": {"axis"},
        "squared_relu": set(),
    }
    expected = options.get(name, options.get(name.removesuffix("_vjp"), numbers)) | {"out"}
    parameters = inspect.signature(getattr(relu_xp, name)).parameters
    for parameter in parameters.values():
        if parameter.name in ("x", "dy", "weight"):
            assert parameter.kind is parameter.POSITIONAL_ONLY
        elif parameter.name in own:
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        else:
            assert parameter.kind is parameter.KEYWORD_ONLY
    assert expected == set(parameters) - {"x", "dy", "weight"}


@pytest.mark.parametrize(
    "bad",
    [[1.0, 2.0], (1.0,), 1.0, 3, True, None, "x", np.float32(1), np.int64(1), {1.0}, object()],
    ids=lambda bad: type(bad).__name__,
)
def test_what_is_no_array_is_refused(bad):
    kind = "the NumPy scalar " * isinstance(bad, np.generic) + type(bad).__name__
    message = rf"must be an array, got {kind}; convert it first, for example numpy\.asarray\("
    with pytest.raises(TypeError, match=rf"^relu: x {message}x\)$"):
        relu_xp.relu(bad)
    with pytest.raises(TypeError, match=rf"^leaky_relu: x {message}"):
        relu_xp.leaky_relu(bad)
    with pytest.raises(TypeError, match=rf"^relu_backward: dy {message}dy\)$"):
        relu_xp.relu_backward(bad, np.ones(2))
    with pytest.raises(TypeError, match=rf"^pullback: dy {message}"):
        relu_xp.relu_vjp(np.ones(2))[1](bad)
    with pytest.raises(TypeError, match=rf"^forward: x {message}"):
        relu_xp.ReLU().forward(bad)


def test_subclasses_with_rules_of_their_own_are_refused():
    masked = np.ma.masked_array([1.0, -2.0], [True, False])
    with pytest.raises(TypeError, match=r"relu: x is a numpy\.ma\..*MaskedArray.*numpy\.asarray"):
        relu_xp.relu(masked)
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0]])
    with pytest.raises(TypeError, match=r"relu: x is a numpy\.matrix"):
        relu_xp.relu(matrix)
    with pytest.raises(TypeError, match="relu: out is a numpy.ma"):
        relu_xp.relu(np.ones(2), out=masked)


@pytest.mark.parametrize(
    ("dtype", "flaw"),
    [
        (np.complex64, "complex64 has no order; relu takes real floating or integer arrays"),
        (bool, "bool is not supported; relu takes real floating or integer arrays"),
        (object, "object is not supported"),
        (np.longdouble, "longdouble|float128 is not supported"),
        ("U3", "str96 is not supported"),
        ("M8[s]", "is not supported"),
        ([("a", "f4")], "is not supported"),
    ],
    ids=str,
)
def test_dtypes_without_order_are_refused(dtype, flaw):
    x = np.zeros(2, dtype)
    for call in (relu_xp.relu, relu_xp.relu_grad, relu_xp.relu_vjp, relu_xp.relu6):
        with pytest.raises(TypeError, match=f"^{call.__name__}: x: .*({flaw})"):
            call(x)
    with pytest.raises(TypeError, match="^relu_backward: dy: "):
        relu_xp.relu_backward(x, np.ones(2))


@pytest.mark.parametrize("slope", [0, 0.1])
def test_integers_have_no_gradient(slope):
    x, y = np.arange(3, dtype=np.int16), np.ones(3)
    layer = relu_xp.ReLU(negative_slope=slope)
    for name, call in (
        ("relu_grad", lambda: relu_xp.relu_grad(x, negative_slope=slope)),
        ("relu_vjp", lambda: relu_xp.relu_vjp(x, negative_slope=slope)),
        ("forward", lambda: layer.forward(x)),
        ("relu_backward", lambda: relu_xp.relu_backward(y, x, negative_slope=slope)),
        ("relu_backward", lambda: relu_xp.relu_backward(x, y, negative_slope=slope)),
        ("pullback", lambda: relu_xp.relu_vjp(y, negative_slope=slope)[1](x)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: d?[xy] has dtype int16, which has no grad"):
            call()
    np.testing.assert_array_equal(relu_xp.ReLU().forward(x - 1, training=False), [0, 0, 1])


@pytest.mark.parametrize("name", ["negative_slope", "threshold", "positive_slope", "max_value"])
def test_numbers_are_checked(name):
    x = np.ones(2)
    for value in (True, "1", 1j, [1.0], np.ones(1), np.bool_(True), b"1"):
        with pytest.raises(TypeError, match=f"^{name} must be a real number, got "):
            relu_xp.relu(x, **{name: value})
        with pytest.raises(TypeError, match=f"^{name} must be a real number, got "):
            relu_xp.ReLU(**{name: value})
    for value in (np.nan, np.inf, -np.inf, 10**400, 10**5000, np.float32(np.inf)):
        with pytest.raises(ValueError, match=f"^{name} must be finite, got "):
            relu_xp.relu(x, **{name: value})
    for value in (1, 1.0, np.float32(1), np.int8(1), Fraction(1)):
        relu_xp.relu(x, **{"max_value": 5, name: value})
    if name != "max_value":
        with pytest.raises(TypeError, match=f"^{name} must be a real number, got NoneType"):
            relu_xp.relu(x, **{name: None})


def test_a_bool_is_refused_even_after_its_equal_was_seen():
    relu_xp.relu(np.ones(2), positive_slope=1, negative_slope=0)
    with pytest.raises(TypeError, match="positive_slope must be a real number, got bool"):
        relu_xp.relu(np.ones(2), positive_slope=True)


def test_impossible_numbers_are_refused():
    x = np.ones(2)
    with pytest.raises(ValueError, match="positive_slope must not be 0"):
        relu_xp.relu(x, positive_slope=0)
    for numbers in (
        {"max_value": 0},
        {"max_value": 1, "threshold": 1},
        {"max_value": 1, "threshold": 0.5, "positive_slope": 2},
        {"max_value": 1, "positive_slope": -1},
    ):
        with pytest.raises(ValueError, match="max_value needs .*, got max_value=.*threshold="):
            relu_xp.relu(x, **numbers)


def test_numbers_are_rounded_to_the_dtype_first():
    """N1: float16 with a slope of 1e-8 at -inf is NaN or 0, depending on the order."""
    x = np.array([-np.inf, -1], np.float16)
    y = relu_xp.leaky_relu(x, 1e-8)
    np.testing.assert_array_equal(y, [0, 0])
    assert not np.signbit(y).any()
    dy = np.array([np.inf, 1], np.float16)
    np.testing.assert_array_equal(relu_xp.relu_backward(dy, x, negative_slope=1e-8), [0, 0])
    wide = relu_xp.relu_backward(dy.astype(np.float32), x, negative_slope=1e-8)
    np.testing.assert_array_equal(wide, np.array([np.inf, 1e-8], np.float32))
    # A threshold of 1.0001 is 1 in float16, so that 1 is not above it, and 1.0005 is 1.001.
    x = np.array([1.0, 1.001], np.float16)
    np.testing.assert_array_equal(relu_xp.thresholded_relu(x, 1.0001), [0, x[1]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_beyond_the_dtype_are_infinite(dtype):
    x = np.array([-3.0, 2.0, np.inf, np.nan], dtype)
    huge = sys.float_info.max
    np.testing.assert_array_equal(relu_xp.relu(x, max_value=huge)[[0, 1, 3]], [0, 2, np.nan])
    np.testing.assert_array_equal(relu_xp.relu(x, threshold=huge)[[0, 1, 3]], [0, 0, np.nan])
    np.testing.assert_array_equal(relu_xp.relu(x, threshold=-huge)[[0, 1, 3]], x[[0, 1, 3]])


def test_integers_are_rounded_once():
    """2**60 + 2**36 + 1 is above the middle of two float32: by way of float64 it would be on it."""
    x = np.array([1e30], np.float32)
    y = relu_xp.relu(x, max_value=2**60 + 2**36 + 1)
    assert int(y[0]) == 2**60 + 2**37
    assert int(relu_xp.relu(x, max_value=2**60 + 2**36)[0]) == 2**60
    assert int(relu_xp.relu(x, max_value=2**60 - 1)[0]) == 2**60
    big = 2**53 + 1
    integers = np.array([big, big + 1])
    assert relu_xp.relu(integers, threshold=Fraction(big)).tolist() == [0, big + 1]


def test_the_gradient_keeps_the_dtype_of_dy():
    x = np.array([-1, 2], np.float16)
    for dtype in (np.float16, np.float32, np.float64):
        dy = np.ones(2, dtype)
        assert relu_xp.relu_backward(dy, x).dtype == dtype
        assert relu_xp.relu_vjp(x)[1](dy).dtype == dtype
        assert relu_xp.relu_vjp(x, negative_slope=0.1)[1](dy).dtype == dtype


def test_a_pullback_is_called_any_number_of_times():
    x, dy = np.array([-1.0, 2.0]), np.array([3.0, 4.0])
    _, pullback = relu_xp.relu_vjp(x)
    assert pullback.saved_nbytes == 1
    for _ in range(3):
        np.testing.assert_array_equal(pullback(dy), [0, 4])
    np.testing.assert_array_equal(dy, [3, 4])


def test_what_does_not_fit_is_refused():
    x = np.ones((64, 100), np.float32)
    _, pullback = relu_xp.relu_vjp(x)
    with pytest.raises(ValueError, match=r"^pullback: dy has shape \(64, 10\), forward saw"):
        pullback(np.ones((64, 10), np.float32))
    with pytest.raises(ValueError, match=r"relu_backward: dy has shape \(100,\), x is \(64, 100\)"):
        relu_xp.relu_backward(np.ones(100), x)


def test_two_libraries_are_refused(require):
    torch = require("torch")
    x = np.ones(2)
    message = r"forward saw NumPy, dy is PyTorch on device cpu; move it first, for example "
    with pytest.raises(TypeError, match=f"^pullback: {message}numpy.asarray\\(dy\\)$"):
        relu_xp.relu_vjp(x)[1](torch.ones(2))
    with pytest.raises(TypeError, match=r"^relu_backward: x is PyTorch.*, dy is NumPy; .*torch"):
        relu_xp.relu_backward(x, torch.ones(2))
    with pytest.raises(TypeError, match="^relu: x is NumPy, out is PyTorch on device cpu"):
        relu_xp.relu(x, out=torch.ones(2))


def test_two_devices_are_refused(require):
    torch = require("torch")
    _, pullback = relu_xp.relu_vjp(torch.ones(2))
    with pytest.raises(ValueError, match="PyTorch on device cpu, dy is PyTorch on device meta"):
        pullback(torch.ones(2, device="meta"))


def test_two_libraries_of_the_generic_backend_are_refused(require):
    torch, jnp = require("torch"), require("jax").numpy
    with pytest.raises(TypeError, match=r"saw PyTorch on device cpu, dy is JAX; .*torch\.as"):
        relu_xp.relu_vjp(torch.ones(2))[1](jnp.ones(2))


def test_gradient_by_finite_differences():
    rng = np.random.default_rng(5)
    x, h = rng.uniform(-3, 3, 2000), 1e-6
    for numbers in (
        {},
        {"negative_slope": 0.1},
        {"max_value": 2.0, "negative_slope": -0.2},
        {"threshold": 0.5, "negative_slope": 0.1, "positive_slope": 2.0, "max_value": 4.0},
        {"positive_slope": -1.5},
    ):
        t, b = numbers.get("threshold", 0.0), numbers.get("positive_slope", 1.0)
        c = numbers.get("max_value", np.inf)
        away = (abs(x - t) > 2 * h) & (abs(b * x - c) > 2 * h * abs(b))
        slope = (relu_xp.relu(x + h, **numbers) - relu_xp.relu(x - h, **numbers)) / (2 * h)
        np.testing.assert_allclose(relu_xp.relu_grad(x, **numbers)[away], slope[away], atol=1e-8)
        dy = rng.standard_normal(x.size)
        np.testing.assert_allclose(
            relu_xp.relu_vjp(x, **numbers)[1](dy)[away], (slope * dy)[away], atol=1e-8
        )


def test_an_activation_is_built_once_and_frozen():
    first = activation_of(0.1, 0.0, 1.0, 6.0)
    assert activation_of(0.1, 0.0, 1.0, 6.0) is first
    assert first == Activation(0.0, 0.1, 1.0, 6.0)
    with pytest.raises(AttributeError):
        first.threshold = 1.0
    assert str(Activation(threshold=-0.0).threshold) == "0.0"
    assert Activation(threshold=2**53 + 1).threshold == 2**53 + 1
