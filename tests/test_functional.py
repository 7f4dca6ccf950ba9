"""The functions as a user meets them: the seeds by name, the keywords, every refusal."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import sys
from fractions import Fraction

import numpy as np
import pytest

import relu_xp
from relu_xp import activation as activations
from relu_xp import checks
from relu_xp.activation import Activation, Rounded, activation_of, limits
from relu_xp.testing import oracle


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


@pytest.mark.parametrize(
    "name", ["relu", "leaky_relu", "relu6", "clipped_relu", "thresholded_relu"]
)
def test_every_number_of_a_preset_may_be_given(name):
    x = np.linspace(-3, 9, 49)
    numbers = {"threshold": 0.5, "negative_slope": 0.25, "positive_slope": 2.0, "max_value": 6.0}
    given = {key: n for key, n in numbers.items() if name != "relu6" or key != "max_value"}
    wanted = np.where(x <= 0.5, 0.25 * x, np.minimum(2 * x, 6))
    out = np.empty_like(x)
    assert getattr(relu_xp, name)(x, **given, out=out) is out
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("name", [n for n in relu_xp.__all__ if n.islower() and "threads" not in n])
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


@pytest.mark.parametrize("negative_slope", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("positive_slope", [1.0, 2.0, -1.0])
def test_slopes_that_are_special_as_the_other_one(xp, negative_slope, positive_slope):
    """0 and 1 choose how a backend computes: each only for the slope that it speaks of."""
    host = np.array([-3.0, -0.5, 0.25, 4.0] * 5, np.float32)
    slope = np.where(host <= 0, np.float32(negative_slope), np.float32(positive_slope))
    numbers = {"negative_slope": negative_slope, "positive_slope": positive_slope}
    x, dy = xp.array(host), xp.array(host[::-1].copy())
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    for found, expected in (
        (y, host * slope),
        (relu_xp.relu(x, **numbers), host * slope),
        (relu_xp.relu_grad(x, **numbers), slope),
        (pullback(dy), host[::-1] * slope),
        (relu_xp.relu_backward(dy, x, **numbers), host[::-1] * slope),
    ):
        np.testing.assert_array_equal(xp.numpy(found), expected)


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


def test_what_is_noted_is_no_part_of_an_activation():
    activation = Activation(threshold=0.5)
    checks.serving("f", "x", np.ones(2), activation, floating=False)
    assert activation.rounded
    assert activation.served
    assert activation == Activation(threshold=0.5)
    assert hash(activation) == hash(Activation(threshold=0.5))
    assert activation != Activation(threshold=1.5)
    assert repr(activation) == (
        "Activation(threshold=0.5, negative_slope=0.0, positive_slope=1.0, max_value=None)"
    )
    for name in ("rounded", "served"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            Activation(**{name: {}})


@pytest.mark.parametrize("name", ["threshold", "negative_slope", "positive_slope", "max_value"])
def test_numbers_of_any_kind_become_floats(name):
    for value in (Fraction(3, 2), np.float32(1.5), 1.5, np.int8(3), 3):
        number = getattr(Activation(**{"max_value": 50, name: value}), name)
        assert type(number) is float
        assert number == value


def test_one_number_may_be_two_arguments():
    x, half = np.array([-1.0, 0.25, 2.0]), 0.5
    y = relu_xp.relu(x, negative_slope=half, threshold=half)
    np.testing.assert_array_equal(y, [-0.5, 0.125, 2])


def test_an_activation_of_its_own_for_each_compilation(monkeypatch):
    """`torch.compile` could make no use of what is noted in one that is shared."""
    numbers = 0.125, -0.25, 3.0, 4.0
    shared = activation_of(*numbers)
    monkeypatch.setattr(activations, "compiles", lambda: True)
    assert activation_of(*numbers) is shared
    monkeypatch.setattr(activations, "compiling", lambda: True)
    assert activation_of(*numbers) == shared
    assert activation_of(*numbers) is not shared
    assert activations.rounded(*numbers, "float16").activation == shared
    assert activations.rounded(*numbers, "float16").dtype_name == "float16"


def test_what_serves_is_asked_once_for_an_activation_and_a_dtype(monkeypatch):
    activation, x = Activation(0.5, 0.25, 2.0, 4.0), np.ones(2, np.float32)
    backend, numbers = checks.serving("f", "x", x, activation, floating=False)
    monkeypatch.setattr(checks, "backend_for", None)
    assert checks.serving("f", "x", x, activation, floating=False) == (backend, numbers)
    with pytest.raises(TypeError, match="not callable"):
        checks.serving("f", "x", x.astype(np.float64), activation, floating=False)


def test_nothing_is_noted_while_a_compiler_traces(monkeypatch):
    for module in (activations, checks):
        monkeypatch.setattr(module, "compiling", lambda: True)
    monkeypatch.setattr(activations, "compiles", lambda: True)
    activation = Activation(0.5, 0.25, 2.0, 4.0)
    for dtype in (np.float32, np.float16):
        _, numbers = checks.serving("f", "x", np.ones(2, dtype), activation, floating=False)
        assert numbers.activation == activation
        assert numbers.dtype_name == np.dtype(dtype).name
    assert activation.served == {}


# ---- The numbers as a dtype holds them ----------------------------------------------------------


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_rounded_numbers_are_the_dtypes(dtype):
    """Ties to even, subnormals, the last number before infinity: as integers round them."""
    form = oracle.Format(dtype)
    smallest, largest = limits(dtype)
    assert form.value(form.round(smallest)) == 1
    assert form.round(largest) == form.infinity - 1
    last_place = largest - number_of(form, form.infinity - 2)
    values = [0.0, 1.0, 1 / 3, 65504.0, 1e-8, 3e-5, 1e5, 1e-40, 1e39, smallest, largest]
    values += [smallest * factor for factor in (0.25, 0.5, 0.75, 1.5, 2.5, 1023.5)]
    values += [number_of(form, form.round(1.0) + i) for i in range(3)]
    values += [1 + (values[-1] - values[-2]) * factor for factor in (0.5, 1.5, 2.5, 0.501, 1.499)]
    if dtype != "float64":
        values += [largest + last_place * factor for factor in (0.25, 0.499, 0.5, 0.75, 1.0, 5.0)]
        values += [largest * 1.5, largest * 2, largest * 4]
    for value in values:
        for number in (value, -value):
            numbers = Activation(threshold=number).round_to(dtype)
            bits = form.round(number)
            bits *= bits != form.sign  # there is one zero
            assert numbers.threshold_bits == bits, number
            assert numbers.bits(numbers.threshold) == bits, number
            assert type(numbers.threshold) is float


def number_of(form, bits):
    return float(np.array(bits, form.unsigned).view(form.dtype))


@pytest.mark.parametrize(
    ("width", "precision", "code", "max_exponent"),
    [(16, 11, "e", 16), (16, 8, "f", 128), (32, 24, "f", 128), (64, 53, "d", 1024)],
)
def test_a_format_is_what_it_is_made_of(width, precision, code, max_exponent):
    form = activations._Format(width, precision, code)
    assert (form.width, form.precision, form.code) == (width, precision, code)
    assert form.max_exponent == max_exponent
    assert form.bits(form.round(-1.0)) >> (precision - 1) == (1 << (width - precision)) | (
        max_exponent - 1
    )


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_rounded_numbers_say_what_they_are(dtype):
    form = oracle.Format(dtype)
    numbers = Activation(0.5, 0.25, 2.0, 4.0).round_to(dtype)
    assert numbers.dtype_name == dtype
    assert numbers.floating
    assert numbers.width == form.width
    assert numbers.infinity_bits == form.infinity
    assert numbers.ceiling_bits == form.round(4.0)
    assert Activation(-2.0, max_value=0.0).round_to(dtype).ceiling_bits == form.sign
    for b, mirrored in ((2.0, False), (0.5, False), (5e-324, False), (-1.0, True)):
        assert Activation(positive_slope=b).round_to(dtype).mirrored is mirrored
    assert Activation().round_to(dtype).plain
    for one in ({"threshold": 1.0}, {"negative_slope": 1.0}, {"positive_slope": 2.0}):
        assert not Activation(**one).round_to(dtype).plain
    assert not Activation(max_value=1.0).round_to(dtype).plain
    order = [numbers.order(form.round(value)) for value in (-2.0, -1.0, 0.0, 1.0)]
    assert order == sorted(set(order))
    assert numbers.order(form.sign) == -1
    assert numbers.order(0) == 0
    assert numbers.order(form.infinity + 1) > numbers.order(form.infinity)
    assert numbers.order(form.sign | form.infinity) == -1 - form.infinity


def test_rounded_numbers_travel_as_the_same_object():
    activation = activation_of(2.0, 1.0, 3.0, 4.0)
    for dtype in ("float16", "int8"):
        numbers = activation.round_to(dtype)
        assert pickle.loads(pickle.dumps(numbers)) is numbers
        assert numbers.activation is activation
        assert numbers is activation.round_to(dtype)
        assert numbers is not Rounded(activation, dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_an_integer_dtype_takes_the_whole_of_its_range(dtype):
    low, high = (int(end) for end in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    numbers = Activation(threshold=high).round_to(dtype)
    assert numbers.threshold == high
    assert numbers.width == int(dtype.strip("uint"))
    assert not numbers.floating
    assert Activation(threshold=low).round_to(dtype).threshold == low
    for beyond in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"^threshold={beyond}.* is not a whole number that"):
            Activation(threshold=beyond).round_to(dtype)


# ---- What each refusal says, in full ------------------------------------------------------------

X = np.ones((2, 3), np.float32)
READ_ONLY = np.broadcast_to(np.float32(1), (2, 3))
MEMORY = np.zeros(40, np.float32)
FIT = "give an array that shares no memory with it"


def after_forward(layer):
    layer.forward(X)
    return layer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # The numbers.
        (
            lambda: relu_xp.relu(X, threshold="1"),
            TypeError,
            "threshold must be a real number, got str",
        ),
        (
            lambda: relu_xp.relu(X, max_value=10**400),
            ValueError,
            "max_value must be finite, got one beyond the range of float64",
        ),
        (
            lambda: relu_xp.relu(X, negative_slope=math.nan),
            ValueError,
            "negative_slope must be finite, got nan",
        ),
        (
            lambda: relu_xp.relu(X, positive_slope=0),
            ValueError,
            "positive_slope must not be 0: nothing would pass above the threshold",
        ),
        (
            lambda: relu_xp.relu(X, positive_slope=-1, max_value=1),
            ValueError,
            "max_value needs positive_slope > 0 and max_value > positive_slope*threshold, "
            "got max_value=1.0, positive_slope=-1.0, threshold=0.0",
        ),
        (
            lambda: relu_xp.relu(np.ones(3, np.uint8), threshold=0.5),
            ValueError,
            "relu: x: threshold=0.5 is not a whole number that uint8 holds; "
            "convert the array to a floating dtype first",
        ),
        (
            lambda: relu_xp.rrelu(X, 0.5, 0.25),
            ValueError,
            "lower must not be above upper, got lower=0.5, upper=0.25",
        ),
        (
            lambda: relu_xp.rrelu(X, -1.5e308, 1.5e308),
            ValueError,
            "upper - lower must be finite, got lower=-1.5e+308, upper=1.5e+308",
        ),
        # Arrays and their dtypes.
        (
            lambda: relu_xp.relu([1.0]),
            TypeError,
            "relu: x must be an array, got list; convert it first, for example numpy.asarray(x)",
        ),
        (
            lambda: relu_xp.relu_backward(X, np.float32(1)),
            TypeError,
            "relu_backward: x must be an array, got the NumPy scalar float32; "
            "convert it first, for example numpy.asarray(x)",
        ),
        (
            lambda: relu_xp.relu(np.ma.ones(3)),
            TypeError,
            "relu: x is a numpy.ma.MaskedArray, whose own rules (a mask, a shape) would be lost; "
            "convert it first, for example numpy.asarray(x)",
        ),
        (
            lambda: relu_xp.relu(np.ones(3, np.complex64)),
            TypeError,
            "relu: x: complex64 has no order; relu takes real floating or integer arrays "
            "(float16, bfloat16, float32, float64, int8 to int64, uint8 to uint64)",
        ),
        (
            lambda: relu_xp.relu_vjp(np.ones(3, bool)),
            TypeError,
            "relu_vjp: x: bool is not supported; relu takes real floating or integer arrays "
            "(float16, bfloat16, float32, float64, int8 to int64, uint8 to uint64)",
        ),
        (
            lambda: relu_xp.relu(X.astype(">f4")),
            TypeError,
            "relu: x: byte-swapped dtype >f4 is not supported; "
            "convert it first, for example x.astype('float32')",
        ),
        (
            lambda: relu_xp.relu_grad(np.ones(3, np.int64)),
            TypeError,
            "relu_grad: x has dtype int64, which has no gradient; "
            "convert it to a floating dtype first",
        ),
        # What does not fit.
        (
            lambda: relu_xp.relu_backward(X[0], X),
            ValueError,
            "relu_backward: dy has shape (3,), x is (2, 3)",
        ),
        (
            lambda: relu_xp.relu_vjp(X)[1](X[0]),
            ValueError,
            "pullback: dy has shape (3,), forward saw (2, 3)",
        ),
        (lambda: relu_xp.relu(X, out=X[0]), ValueError, "relu: out has shape (3,), x is (2, 3)"),
        (
            lambda: relu_xp.relu_backward(X, X, out=X[0]),
            ValueError,
            "relu_backward: out has shape (3,), dy is (2, 3)",
        ),
        (
            lambda: relu_xp.crelu(X, out=X.copy()),
            ValueError,
            "crelu: out has shape (2, 3), the result has (2, 6)",
        ),
        (
            lambda: relu_xp.relu(X, out=np.zeros((2, 3))),
            TypeError,
            "relu: out has dtype float64, the result float32; give an array of that dtype",
        ),
        (
            lambda: relu_xp.relu(X, out=READ_ONLY),
            ValueError,
            "relu: out is read-only; give an array that may be written",
        ),
        (
            lambda: relu_xp.relu(READ_ONLY, out=READ_ONLY),
            ValueError,
            "relu: x, which is to be overwritten, is read-only; give an array that may be written",
        ),
        (
            lambda: relu_xp.relu(MEMORY[:8], out=MEMORY[4:12]),
            ValueError,
            f"relu: out overlaps an input without being the same view; {FIT}",
        ),
        (
            lambda: relu_xp.relu(
                X[:, :2], out=np.lib.stride_tricks.as_strided(MEMORY, (2, 2), (4, 4))
            ),
            ValueError,
            "relu: out is a broadcast view, whose elements share memory; give an array",
        ),
        # A mask of the caller's.
        (
            lambda: relu_xp.relu_vjp(X, mask=np.zeros(9, np.int8)),
            TypeError,
            "relu_vjp: mask has dtype int8; give an array of uint8",
        ),
        (
            lambda: relu_xp.relu_vjp(X, mask=np.zeros((2, 9), np.uint8)),
            ValueError,
            "relu_vjp: mask has shape (2, 9) and strides (9, 1); "
            "give a contiguous array with one axis",
        ),
        (
            lambda: relu_xp.relu_vjp(X, mask=np.zeros(0, np.uint8)),
            ValueError,
            "relu_vjp: mask has 0 bytes, x needs 1",
        ),
        (
            lambda: relu_xp.relu_vjp(MEMORY, mask=MEMORY.view(np.uint8)[:5]),
            ValueError,
            f"relu_vjp: mask overlaps an input without being the same view; {FIT}",
        ),
        # The variants.
        (
            lambda: relu_xp.prelu(X, np.ones((1, 3))),
            ValueError,
            "prelu: weight has shape (1, 3); give one slope, or an array with one axis, that of "
            "the channels",
        ),
        (
            lambda: relu_xp.prelu_vjp(X, np.ones(2)),
            ValueError,
            "prelu_vjp: weight has 2 slopes, but x has 3 channels along axis 1 (shape (2, 3))",
        ),
        (
            lambda: relu_xp.prelu(X, np.ones(3), axis=-3),
            ValueError,
            "prelu: x has shape (2, 3), and no axis -3",
        ),
        (
            lambda: relu_xp.crelu(X, axis=1.0),
            TypeError,
            "crelu: axis must be a whole number, got float",
        ),
        (
            lambda: relu_xp.rrelu(X, rng=3),
            TypeError,
            "rrelu: rng must draw arrays of random numbers, as numpy.random.default_rng() does, "
            "got int ('int' object has no attribute 'random')",
        ),
        (
            lambda: relu_xp.rrelu_vjp(X, rng=lambda shape: np.ones(2)),
            ValueError,
            "rrelu_vjp: what rng drew has shape (2,), x has (2, 3)",
        ),
        (
            lambda: relu_xp.rrelu(X, rng=lambda shape: np.arange(1 / 0)),
            ZeroDivisionError,
            "division by zero",
        ),
        (
            lambda: relu_xp.prelu(X, np.ones((1, 1))),
            ValueError,
            "prelu: weight has shape (1, 1); give one slope, or an array with one axis, that of "
            "the channels",
        ),
        (
            lambda: relu_xp.rrelu(X, rng=lambda shape: np.ones(shape, complex)),
            TypeError,
            "rrelu: what rng drew: complex128 has no order; relu takes real floating or integer "
            "arrays (float16, bfloat16, float32, float64, int8 to int64, uint8 to uint64)",
        ),
        # The layers.
        (
            lambda: relu_xp.ReLU().backward(X),
            RuntimeError,
            "backward: nothing is saved; call forward(x) first (with training=True), once for "
            "each backward. backward(dy, retain=True) keeps it for another call; "
            "relu_xp.relu_vjp serves a layer that is used twice in one pass",
        ),
        (
            lambda: relu_xp.ReLU(inplace=True).forward(X, out=X.copy()),
            ValueError,
            "forward: out was given, but a layer with inplace=True writes into its argument; "
            "leave out= away, or make the layer without inplace",
        ),
        (
            lambda: relu_xp.SquaredReLU(inplace=1),
            TypeError,
            "inplace must be True or False, got int",
        ),
        (
            lambda: setattr(relu_xp.CReLU(), "inplace", True),
            ValueError,
            "CReLU cannot work in place: y is longer than x",
        ),
        (
            lambda: relu_xp.PReLU(0),
            ValueError,
            "num_parameters must be at least 1, got 0",
        ),
        (
            lambda: relu_xp.PReLU(1.5),
            TypeError,
            "num_parameters must be a whole number, got float",
        ),
        (lambda: relu_xp.PReLU(init="1"), TypeError, "init must be a real number, got str"),
        (lambda: relu_xp.PReLU(axis="1"), TypeError, "axis must be a whole number, got str"),
        (
            lambda: relu_xp.PReLU(xp="numpy"),
            TypeError,
            "xp must be an array library, such as the module cupy, got str",
        ),
        (
            lambda: relu_xp.PReLU(init=1e300, dtype="float32"),
            ValueError,
            "init must be finite in float32, got 1e+300",
        ),
        (
            lambda: relu_xp.PReLU(dtype="int32"),
            TypeError,
            "PReLU: the weight has dtype int32, which has no gradient; "
            "convert it to a floating dtype first",
        ),
        (
            lambda: relu_xp.PReLU(4).forward(X),
            ValueError,
            "forward: layer.params[0] has 4 slopes, but x has 3 channels along axis 1 "
            "(shape (2, 3))",
        ),
        (
            lambda: relu_xp.PReLU(4).forward(X, training=False),
            ValueError,
            "forward: layer.params[0] has 4 slopes, but x has 3 channels along axis 1 "
            "(shape (2, 3))",
        ),
        (lambda: relu_xp.CReLU("0"), TypeError, "axis must be a whole number, got str"),
    ],
)
def test_a_refusal_names_the_argument_what_came_and_what_to_do(call, error, message):
    with pytest.raises(error) as refused:
        call()
    assert type(refused.value) is error
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("variant", "draws"),
    [
        ("prelu", False),
        ("crelu", False),
        ("squared_relu", False),
        ("rrelu", True),
        ("rrelu", False),
    ],
)
def test_a_refusal_names_the_function_that_was_called(variant, draws):
    """Each of a variant's two functions and its layer, at every argument that it checks."""
    rng = np.random.default_rng(0)
    make = {
        "prelu": relu_xp.PReLU,
        "crelu": relu_xp.CReLU,
        "squared_relu": relu_xp.SquaredReLU,
        "rrelu": lambda: relu_xp.RReLU(rng=rng),
    }[variant]
    weight = (np.ones(1, np.float32),) * (variant == "prelu")
    options = {"rng": rng} if draws else {}
    bad = np.ones((2, 3), np.int32)

    def check(name, argument, function, *arguments, **options):
        with pytest.raises((TypeError, ValueError)) as refused:
            function(*arguments, **options)
        assert re.match(f"{name}: {argument}:? ", str(refused.value))
        if argument == "out":
            longer = "the result has (2, 6)" if variant == "crelu" else "x is (2, 3)"
            shorter = "the result has (2, 3)" if variant == "crelu" else "dy is (2, 3)"
            wanted = shorter if name in ("backward", "pullback") else longer
            assert str(refused.value) == f"{name}: out has shape (3,), {wanted}"

    short = X[0].copy()
    for name in (variant, f"{variant}_vjp"):
        function = getattr(relu_xp, name)
        check(name, "x", function, bad, *weight, **options)
        check(name, "x", function, [1.0], *weight, **options)
        check(name, "out", function, X, *weight, **options, out=short)
        if weight:
            check(name, "weight", function, X, [1.0])
            check(name, "weight", function, X, np.ones(1, np.int32))
    for training in (False, True):
        check("forward", "x", make().forward, [1.0], training=training)
        check("forward", "out", make().forward, X, training=training, out=short)
        if variant != "crelu":
            layer = make()
            layer.inplace = True
            message = "^forward: x, which is to be overwritten, is read-only"
            with pytest.raises(ValueError, match=message):
                layer.forward(READ_ONLY, training=training)
    layer = make()
    y = layer.forward(X)
    check("backward", "dy", layer.backward, [1.0])
    check("backward", "out", layer.backward, y, out=short)
    *_, pullback = getattr(relu_xp, f"{variant}_vjp")(X, *weight, **options)
    check("pullback", "dy", pullback, [1.0])
    check("pullback", "out", pullback, y, out=short)


@pytest.mark.parametrize(
    "name",
    ["relu", "leaky_relu", "relu6", "clipped_relu", "thresholded_relu", "relu_grad", "relu_vjp"],
)
def test_a_function_of_the_family_names_itself(name):
    function = getattr(relu_xp, name)
    for call, argument in (
        (lambda: function([1.0]), "x"),
        (lambda: function(X, out=[1.0]), "out"),
        (lambda: function(X, out=X[0]), "out"),
    ):
        with pytest.raises((TypeError, ValueError)) as refused:
            call()
        assert str(refused.value).startswith(f"{name}: {argument} ")


def test_a_refusal_tells_how_to_move_an_array(require):
    strict = require("array_api_strict")
    there = strict.ones((2, 3), dtype=strict.float32)
    place = f"array_api_strict on device {there.device}"
    to_numpy = "move it first, for example numpy.asarray"
    to_strict = "move it first, for example array_api_strict.asarray"
    for call, message in (
        (
            lambda: relu_xp.relu_backward(there, X),
            f"relu_backward: x is NumPy, dy is {place}; {to_numpy}(dy)",
        ),
        (
            lambda: relu_xp.relu_backward(X, there),
            f"relu_backward: x is {place}, dy is NumPy; {to_strict}(dy)",
        ),
        (
            lambda: relu_xp.relu_vjp(X)[1](there),
            f"pullback: forward saw NumPy, dy is {place}; {to_numpy}(dy)",
        ),
        (lambda: relu_xp.relu(X, out=there), f"relu: x is NumPy, out is {place}; {to_numpy}(out)"),
        (
            lambda: relu_xp.crelu(X, out=there),
            f"crelu: x is NumPy, out is {place}; {to_numpy}(out)",
        ),
        (
            lambda: relu_xp.relu_backward(X, X, out=there),
            f"relu_backward: dy is NumPy, out is {place}; {to_numpy}(out)",
        ),
        (
            lambda: relu_xp.relu_vjp(X, mask=there),
            f"relu_vjp: x is NumPy, mask is {place}; {to_numpy}(mask)",
        ),
        (
            lambda: relu_xp.prelu(X, there[0, :]),
            f"prelu: x is NumPy, weight is {place}; {to_numpy}(weight)",
        ),
        (
            lambda: after_forward(relu_xp.PReLU()).backward(there),
            f"backward: forward saw NumPy, dy is {place}; {to_numpy}(dy)",
        ),
    ):
        with pytest.raises(TypeError) as refused:
            call()
        assert str(refused.value) == message
    message = f"^rrelu: x is NumPy, what rng drew is {re.escape(place)}; {to_numpy}"
    with pytest.raises(TypeError, match=message):
        relu_xp.rrelu(X, rng=lambda shape: there)
    with pytest.raises(TypeError) as refused:
        relu_xp.relu_vjp(there, mask=np.zeros(1, np.uint8))
    assert str(refused.value) == (
        f"relu_vjp: mask was given, but x is {place}, whose masks the library makes itself; "
        "leave mask= away"
    )


def test_a_number_is_what_its_numerator_says():
    class Liar(Fraction):
        def __float__(self):
            return 5.0

    x = np.array([2.0, 4.0])
    assert relu_xp.relu(x, threshold=Liar(3)).tolist() == [0, 4]
    message = "^threshold must be finite, got one beyond the range of float64$"
    with pytest.raises(ValueError, match=message):
        relu_xp.relu(x, threshold=Liar(10**400))


def test_a_refusal_has_the_error_of_what_was_asked_for_its_cause():
    class Broken(Fraction):
        @property
        def denominator(self):
            raise LookupError

        def __index__(self):
            raise LookupError

    with pytest.raises(TypeError, match="^threshold must be a real number, got Broken$") as refused:
        relu_xp.relu(np.ones(2), threshold=Broken(1))
    assert type(refused.value.__cause__) is LookupError
    with pytest.raises(TypeError, match="axis must be a whole number, got Broken$") as refused:
        relu_xp.crelu(np.ones((2, 2)), axis=Broken(1))
    assert type(refused.value.__cause__) is LookupError


@pytest.mark.parametrize("axis", [2**63 - 1, -(2**63) + 1])
def test_an_axis_has_64_bits_at_most(axis):
    x = np.ones((2, 2))
    with pytest.raises(ValueError, match=rf"^crelu: x has shape \(2, 2\), and no axis {axis}$"):
        relu_xp.crelu(x, axis=axis)
    message = "^crelu: axis must be a whole number of 64 bits at most, got a larger one$"
    with pytest.raises(ValueError, match=message):
        relu_xp.crelu(x, axis=2 * axis)
