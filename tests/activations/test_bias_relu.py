"""A bias and ReLU in one pass: relu(x + bias), its gradients, and the layer's bias."""

from __future__ import annotations

import contextlib
import itertools
import math
import re

import numpy as np
import pytest
from table import CASES, DTYPES

import relu_xp
from relu_xp import BiasReLU
from relu_xp.testing import reference

X = np.array([[-2.0, 1.0, 0.5], [3.0, 0.0, -0.25]], np.float32)
BIAS = np.array([0.5, -0.25, 1.0], np.float32)


# ---- relu(x + bias) and its gradients -----------------------------------------------------------


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_its_mask_is_that_of_the_sum(xp, case):
    """To the byte; the values are tested by the conformance suite."""
    host = np.resize(np.linspace(-2, 2, 17, dtype=np.float32), (7, 11))
    bias = np.linspace(-1, 1, 11, dtype=np.float32)
    x, total = xp.array(host), xp.array(host + bias)
    masks = [relu_xp.empty_mask(x, **case) for _ in range(2)]
    relu_xp.bias_relu_vjp(x, xp.array(bias), mask=masks[0], **case)
    relu_xp.relu_vjp(total, mask=masks[1], **case)
    assert xp.numpy(masks[0]).tobytes() == xp.numpy(masks[1]).tobytes()


SHAPES = [
    ((6,), 0),
    ((5, 6), -1),
    ((5, 6), 0),
    ((5, 6), -2),
    ((3, 6, 5), 1),
    ((2, 6, 3, 4), -3),
    ((2, 3, 4, 6), 3),
    ((7, 1), 1),
    ((1, 7), 1),
    ((0, 3), 1),
    ((0, 3), 0),
    ((3, 0), 1),
    ((2, 0, 3), 2),
    ((0,), 0),
]


@pytest.mark.parametrize(
    ("shape", "axis", "case"),
    [(*pair, case) for pair, case in zip(SHAPES, itertools.cycle(CASES.values()))],
    ids=str,
)
def test_the_bias_goes_along_an_axis(xp, shape, axis, case):
    """And its gradient is summed along all others, which is exact here."""
    rng = np.random.default_rng(3)
    host, gradient = (rng.integers(-8, 9, shape).astype(np.float32) / 8 for _ in range(2))
    n = shape[axis]
    bias = rng.integers(-4, 5, n).astype(np.float32) / 4
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    total = host + np.expand_dims(bias, others)
    wanted, other = relu_xp.relu_vjp(total, **case)
    expected = other(gradient)
    x, b, dy = map(xp.array, (host, bias, gradient))
    y, pullback = relu_xp.bias_relu_vjp(x, b, axis=axis, **case)
    dx, dbias = pullback(dy)
    assert tuple(dbias.shape) == (n,)
    for result, right in (
        (y, wanted),
        (relu_xp.bias_relu(x, b, axis=axis, **case), wanted),
        (dx, expected),
        (dbias, expected.sum(others)),
    ):
        np.testing.assert_array_equal(xp.numpy(result), right)
    if n:
        layer = BiasReLU(n, axis, **case)
        layer.params[0], layer.grads[0] = b, xp.array(np.ones(n, np.float32))
        np.testing.assert_array_equal(xp.numpy(layer(x, training=False)), wanted)
        np.testing.assert_array_equal(xp.numpy(layer(x)), wanted)
        np.testing.assert_array_equal(xp.numpy(layer.backward(dy)), expected)
        np.testing.assert_array_equal(xp.numpy(layer.grads[0]), expected.sum(others))


@pytest.mark.libraries(
    names=["numpy", "compiled", "dask", "cupy_host", "cupy_host_75", "cupy_host_120", "cupy"]
)
def test_a_bias_and_its_gradient_are_rounded_once(xp, dtype):
    """From float64 to 16 bits, not to float32 between, which would be a tie."""
    form = reference.Format(dtype)
    if form.width > 16:
        return
    half = 2.0 ** -(form.fraction + 1)
    above = float(np.array(1 + 2 * half, form.dtype))
    for far in (2.0**-40, -(2.0**-40)):
        right = above if far > 0 else 1.0
        bias = np.array([1 + half + far, -1 - half - far, 1.0])
        x = xp.array(np.zeros((1, 3), form.dtype))
        y = relu_xp.bias_relu(x, xp.array(bias), negative_slope=0.5)
        assert xp.numpy(y).astype(float).tolist() == [[right, -right / 2, 1]]
        dy = xp.array(np.array([[1 + half, -1 - half, 1e300], [far, -far, 1e-300]]))
        pullback = relu_xp.bias_relu_vjp(dy, xp.array(np.zeros(3, form.dtype)), threshold=-9.0)[1]
        total = xp.numpy(pullback(dy)[1])
        assert total.dtype == form.dtype
        assert total.astype(float).tolist() == [right, -right, math.inf]


def test_a_bias_beyond_the_dtype_of_x_is_infinite_silently(xp):
    bias = xp.array(np.array([1e300, -1e300, 0.5], DTYPES[xp.dtypes[-1]]))
    with np.errstate(all="raise") if xp.ndarray else contextlib.nullcontext():
        y = relu_xp.bias_relu(xp.array(X), bias)
    assert xp.numpy(y).tolist() == [[math.inf, 0, 1], [math.inf, 0, 0.25]]


def test_nan_and_infinity_are_silent(xp, dtype):
    """In x, the bias or both, under `numpy.errstate` too, and in the sum of the gradient."""
    inf, nan = math.inf, math.nan
    host = np.array([[inf, -inf, nan, 1.0], [inf, 2.0, -1.0, nan]], DTYPES[dtype])
    bias = np.array([-inf, -inf, 1.0, nan], DTYPES[dtype])
    with np.errstate(all="raise") if xp.ndarray else contextlib.nullcontext():
        y, pullback = relu_xp.bias_relu_vjp(xp.array(host), xp.array(bias))
        dx, dbias = pullback(xp.array(host))
    y, dx, dbias = (xp.numpy(a).astype(float) for a in (y, dx, dbias))
    np.testing.assert_array_equal(y, [[nan, 0, nan, nan], [nan, 0, 0, nan]])
    np.testing.assert_array_equal(dx, [[inf, 0, nan, 1], [inf, 0, 0, nan]])
    np.testing.assert_array_equal(dbias, [inf, 0, nan, nan])


@pytest.mark.libraries(
    names=[
        "numpy",
        "compiled",
        "compiled_streaming",
        "cupy_host",
        "cupy_host_75",
        "cupy_host_120",
        "cupy",
    ]
)
def test_a_nan_keeps_its_payload(xp, dtype):
    """Of x, else of the bias; quiet in either case."""
    if dtype == "bfloat16":  # whose arithmetic in NumPy has one NaN
        return
    form = reference.Format(dtype)
    quiet, one = 1 << (form.fraction - 1), form.round(1.0)
    of_x, of_bias = form.sign | form.infinity | 3, form.infinity | quiet | 5  # the first signals
    x = np.array([[of_x, one, of_x]] * 40, form.unsigned).view(form.dtype)
    bias = np.array([of_bias, of_bias, one], form.unsigned).view(form.dtype)
    y = xp.numpy(relu_xp.bias_relu(xp.array(x), xp.array(bias)))
    assert (y.view(form.unsigned) == [of_x | quiet, of_bias, of_x | quiet]).all()


# ---- The bias's gradient ------------------------------------------------------------------------


def test_it_is_the_sum_of_dx_as_it_is_rounded(xp):
    """0.1 * dy is rounded to the dtype of dy first, which shows in the sum of many."""
    dy = np.full((4096, 3), 1.0, np.float32)
    x = xp.array(np.full_like(dy, -1))
    dtype = DTYPES[xp.dtypes[-1]]
    _, pullback = relu_xp.bias_relu_vjp(x, xp.array(np.zeros(3, dtype)), negative_slope=0.1)
    dx, dbias = pullback(xp.array(dy))
    wanted = xp.numpy(dx).astype(np.float64).sum(0)
    np.testing.assert_array_equal(xp.numpy(dbias).astype(np.float64), wanted)


@pytest.mark.parametrize(("shape", "axis"), [((30_007, 7), 1), ((9, 7, 3001), 1)], ids=str)
def test_it_is_the_same_every_time(xp, shape, axis):
    """Whatever the threads do: the order of the sum depends on shape and axis alone."""
    rng = np.random.default_rng(4)
    host, gradient = rng.standard_normal((2, *shape), np.float32)
    bias = np.linspace(-1, 1, 7)
    expanded = np.expand_dims(bias, [i for i in range(len(shape)) if i != axis])
    _, pullback = relu_xp.bias_relu_vjp(
        xp.array(host), xp.array(bias.astype(np.float32)), axis=axis
    )
    results = [xp.numpy(pullback(xp.array(gradient))[1]).copy() for _ in range(3)]
    assert len({result.tobytes() for result in results}) == 1
    terms = np.where(host + expanded.astype(np.float32) > 0, gradient.astype(np.float64), 0)
    exact = terms.sum(tuple(i for i in range(len(shape)) if i != axis))
    np.testing.assert_allclose(results[0], exact, rtol=1e-3 if xp.name == "jax" else 1e-6)


# ---- Memory -------------------------------------------------------------------------------------


def test_nothing_that_is_kept_is_the_callers(xp):
    """x, y and the bias may be overwritten between the passes."""
    if not xp.writable:
        return
    x, b, dy = xp.array(X.copy()), xp.array(BIAS.copy()), xp.array(np.ones_like(X))
    y, pullback = relu_xp.bias_relu_vjp(x, b)
    wanted = [xp.numpy(a).copy() for a in pullback(dy)]
    for array in (x, y, b):
        relu_xp.relu(xp.array(np.full(tuple(array.shape), 7, np.float32)), out=array)
    for found, right in zip(pullback(dy), wanted, strict=True):
        np.testing.assert_array_equal(xp.numpy(found), right)
    np.testing.assert_array_equal(xp.numpy(dy), 1)


@pytest.mark.libraries("writable")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_out_may_be_x_and_dy(xp, case):
    host = np.random.default_rng(4).standard_normal((700, 33)).astype(np.float32) * 2
    bias = xp.array(np.linspace(-1, 1, 33, dtype=np.float32))
    wanted, pullback = relu_xp.bias_relu_vjp(xp.array(host.copy()), bias, **case)
    expected = pullback(xp.array(host.copy()))
    for function in (relu_xp.bias_relu, lambda *a, **o: relu_xp.bias_relu_vjp(*a, **o)[0]):
        x = xp.array(host.copy())
        assert function(x, bias, out=x, **case) is x
        np.testing.assert_array_equal(xp.numpy(x), xp.numpy(wanted))
    x, dy = xp.array(host.copy()), xp.array(host.copy())
    _, pullback = relu_xp.bias_relu_vjp(x, bias, out=x, **case)
    dx, dbias = pullback(dy, out=dy)
    assert dx is dy
    for found, right in zip((dx, dbias), expected, strict=True):
        np.testing.assert_array_equal(xp.numpy(found), xp.numpy(right))


@pytest.mark.libraries("strided")
def test_layouts_of_x_the_bias_and_dy(xp):
    """A broadcast x or dy, as the gradient of a sum is, and a bias between other numbers."""
    rng = np.random.default_rng(5)
    base = rng.integers(-8, 9, (8, 12, 10)).astype(np.float32) / 4
    spread = rng.integers(-4, 5, (36, 2)).astype(np.float32) / 4
    for view in (
        lambda a: a[::2, ::2, ::-1],
        lambda a: np.asfortranarray(a)[1:5, 6:],
        lambda a: a.transpose(2, 0, 1)[:4, 1:7],
        lambda a: np.broadcast_to(a[:1, :6], (4, 6, 10)),
        lambda a: np.broadcast_to(a[:4, :1, :1], (4, 6, 10)),
    ):
        for axis in (0, 1, -1):
            host, gradient = view(base), np.broadcast_to(np.float32(2), view(base).shape)
            for bias in (spread[::3, 0], spread[::-2, 1]):
                bias = bias[: host.shape[axis]]
                x, b, dy = map(xp.array, (host, bias, gradient))
                y, pullback = relu_xp.bias_relu_vjp(x, b, axis=axis)
                x, b = xp.array(host.copy()), xp.array(bias.copy())
                wanted, other = relu_xp.bias_relu_vjp(x, b, axis=axis)
                pairs = zip(pullback(dy), other(xp.array(gradient.copy())), strict=True)
                for found, right in [(y, wanted), *pairs]:
                    np.testing.assert_array_equal(xp.numpy(found), xp.numpy(right))
                if xp.ndarray:
                    for result in (y, relu_xp.bias_relu(host, bias, axis=axis)):
                        assert result.strides == relu_xp.relu(host).strides
                    plain = np.moveaxis(np.moveaxis(host, axis, -1) + bias, -1, axis)
                    np.testing.assert_array_equal(y, np.maximum(plain, 0))


@pytest.mark.libraries("ndarray")
def test_a_bias_that_is_read_only(xp):
    bias = np.broadcast_to(np.float32(-0.5), 3)
    np.testing.assert_array_equal(relu_xp.bias_relu(X, bias), np.maximum(X - 0.5, 0))


# ---- What is refused ----------------------------------------------------------------------------


def calls(x, bias, axis=-1):
    """Return each call with a bias, its name in errors, and that of the bias."""
    layer = BiasReLU(3, axis)
    layer.params[0] = bias
    return [
        (lambda **given: relu_xp.bias_relu(x, bias, axis=axis, **given), "bias_relu", "bias"),
        (
            lambda **given: relu_xp.bias_relu_vjp(x, bias, axis=axis, **given)[0],
            "bias_relu_vjp",
            "bias",
        ),
        (lambda **given: layer.forward(x, **given), "forward", "layer.params[0]"),
        (
            lambda **given: layer.forward(x, training=False, **given),
            "forward",
            "layer.params[0]",
        ),
    ]


@pytest.mark.parametrize(
    ("bias", "shape"),
    [
        (np.ones(()), r"\(\)"),
        (np.float32(1), r"\(\)"),
        (np.ones(1), r"\(1,\)"),
        (np.ones(2), r"\(2,\)"),
        (np.ones(4), r"\(4,\)"),
        (np.ones(0), r"\(0,\)"),
        (np.ones((1, 3)), r"\(1, 3\)"),
        (np.ones((3, 1)), r"\(3, 1\)"),
        (np.ones((2, 3)), r"\(2, 3\)"),
    ],
    ids=repr,
)
def test_a_bias_of_another_shape_is_refused(bias, shape):
    for call, function, name in calls(X, bias):
        with pytest.raises(ValueError, match="has shape") as refused:
            call()
        assert re.fullmatch(
            rf"{function}: {re.escape(name)} has shape {shape}, but x has 3 channels along axis 1 "
            r"\(shape \(2, 3\)\); give a bias of shape \(3,\), or axis=",
            str(refused.value),
        )
    for call, _, _ in calls(X, BIAS):  # as the message says
        np.testing.assert_array_equal(call(), np.maximum(X + BIAS, 0))
    for call, _, _ in calls(X, BIAS[:2], axis=0):
        np.testing.assert_array_equal(call(), np.maximum(X + BIAS[:2, None], 0))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ([1.0, 2.0, 3.0], "{} must be an array, got list; convert it first, for example "),
        (None, "{} must be an array, got NoneType$"),
        (0.5, "{} must be an array, got float; convert it first, for example "),
        (np.arange(3), "{} has dtype int64, which has no gradient; convert it to a floating dtype"),
        (np.ones(3, bool), "{}: unsupported dtype bool; give an array of float16, bfloat16, "),
        (np.ones(3, "g"), "{}: unsupported dtype (longdouble|float128); "),
        (np.ma.ones(3), "{} is a numpy.ma.MaskedArray"),
    ],
    ids=repr,
)
def test_a_bias_that_is_no_floating_array_is_refused(bias, message):
    for call, function, name in calls(X, bias):
        with pytest.raises(TypeError, match=f"^{function}: " + message.format(re.escape(name))):
            call()
    if np.shape(bias):  # as the message says
        right = np.asarray(bias, float)
        for call, _, _ in calls(X, right):
            np.testing.assert_array_equal(call(), np.maximum(X + right, 0))


def test_a_bias_of_another_library_or_device_is_refused(require):
    strict = require("array_api_strict")
    there = strict.asarray(BIAS.copy())
    for call, function, name in calls(X, there):
        where = re.escape(name)
        words = rf"x is NumPy, {where} is array_api_strict.*numpy\.asarray\({where}\)$"
        with pytest.raises(TypeError, match=f"^{function}: {words}"):
            call()
    elsewhere = strict.asarray(BIAS.copy(), device=strict.Device("device1"))
    for call, function, name in calls(strict.asarray(X.copy()), elsewhere):
        words = f"x is .*CPU_DEVICE.*, {re.escape(name)} is .*device1"
        with pytest.raises(ValueError, match=f"^{function}: {words}"):
            call()


def test_x_needs_the_axis():
    for x, axis in ((np.ones(()), -1), (np.ones(3), 1), (X, 2), (X, -3), (X, 2**63 - 1)):
        for call, function, _ in calls(x, BIAS, axis):
            last = "; the last one is axis=-1" * (x.ndim > 0)
            shape = re.escape(str(x.shape))
            with pytest.raises(
                ValueError, match=f"^{function}: x has shape {shape}, and no axis {axis}{last}$"
            ):
                call()
    for axis in (1.0, "1", None, True):
        for call in (relu_xp.bias_relu, relu_xp.bias_relu_vjp):
            with pytest.raises(TypeError, match=f"^{call.__name__}: axis must be an integer, got "):
                call(X, BIAS, axis=axis)


@pytest.mark.libraries("strided")
def test_an_out_or_a_mask_over_an_input_is_refused(xp):
    """Over x, the bias, and each other; nothing is written then."""
    memory = xp.array(np.linspace(-1, 1, 40, dtype=np.float32))
    before = xp.numpy(memory).copy()
    x, b, out = memory[:12].reshape(3, 4), memory[14:18], memory[20:32].reshape(3, 4)
    bytes_of = memory.view(np.uint8)
    for call, function, _ in calls(x, b):
        for bad in (memory[1:13], memory[11:23], memory[4:16], memory[6:18], memory[17:29]):
            with pytest.raises(ValueError, match=f"^{function}: out overlaps an input"):
                call(out=bad.reshape(3, 4))
    for call, function, _ in calls(x, b)[1:3]:
        for start in (0, 47, 56, 71, 80, 127):
            with pytest.raises(ValueError, match=f"^{function}: mask overlaps an input"):
                call(out=out, mask=bytes_of[start : start + 2])
        with pytest.raises(ValueError, match=f"^{function}: mask has 1 bytes, x needs 2"):
            call(mask=xp.array(np.zeros(1, np.uint8)))
        with pytest.raises(TypeError, match=f"^{function}: mask has dtype int8; give .* uint8"):
            call(mask=xp.array(np.zeros(2, np.int8)))
    assert xp.numpy(memory).tobytes() == before.tobytes()
    _, pullback = relu_xp.bias_relu_vjp(x, b, out=out, mask=bytes_of[72:80])
    with pytest.raises(ValueError, match="^pullback: out overlaps an input"):
        pullback(out, out=memory[18:30].reshape(3, 4))
    np.testing.assert_array_equal(
        xp.numpy(pullback(out)[0]), np.maximum(before[:12].reshape(3, 4) + before[14:18], 0)
    )
    dy = xp.array(np.ones((3, 4), np.float32))
    wanted = xp.numpy(pullback(dy)[0]).copy()
    dx, _ = pullback(dy, out=memory[19:31].reshape(3, 4))  # over what is not used of the mask
    np.testing.assert_array_equal(xp.numpy(dx), wanted)


@pytest.mark.libraries("strided")
def test_an_out_over_a_bias_of_more_bytes_is_refused(xp):
    """Anywhere in its memory, which is longer than that of `out`."""
    bias = xp.array(np.linspace(-1, 1, 4))
    before, parts = xp.numpy(bias).copy(), bias.view(np.float16)
    x = xp.array(np.ones(4, np.float16))
    for start in (0, 4, 8, 12):
        for call, function, _ in calls(x, bias):
            with pytest.raises(ValueError, match=f"^{function}: out overlaps an input"):
                call(out=parts[start : start + 4])
    assert xp.numpy(bias).tobytes() == before.tobytes()


def test_a_mask_where_there_is_none(require):
    strict = require("array_api_strict")
    x, bias, mask = strict.ones((2, 3)), strict.ones(3), np.zeros(1, np.uint8)
    with pytest.raises(TypeError, match="^bias_relu_vjp: mask was given, but x is array_api_stri"):
        relu_xp.bias_relu_vjp(x, bias, mask=mask)
    relu_xp.bias_relu_vjp(x, bias)


def test_lengths_that_are_not_known(require):
    """Dask's: of another axis than that of the bias it may be so."""
    da = require("dask.array")
    rows = da.from_array(X, chunks=(1, 3))
    unknown = rows[rows[:, 0] < 0]
    y = relu_xp.bias_relu(unknown, da.from_array(BIAS))
    np.testing.assert_array_equal(y.compute(), np.maximum(X[:1] + BIAS, 0))
    with pytest.raises(ValueError, match=r"^bias_relu: .*axis 0; call x.compute_chunk_sizes\(\)"):
        relu_xp.bias_relu(unknown, da.ones(1), axis=0)
    unknown.compute_chunk_sizes()
    y = relu_xp.bias_relu(unknown, da.ones(1, dtype=np.float32), axis=0)
    np.testing.assert_array_equal(y.compute(), np.maximum(X[:1] + 1, 0))
    bias = da.from_array(np.append(BIAS, 9))
    bias = bias[bias < 9]
    for call, function, name in calls(rows, bias):
        advice = re.escape(f"{name} has an unknown length; call {name}.compute_chunk_sizes() first")
        with pytest.raises(ValueError, match=f"^{function}: {advice}$"):
            call()
    bias.compute_chunk_sizes()
    y = relu_xp.bias_relu(rows, bias.astype(np.float32))
    np.testing.assert_array_equal(y.compute(), np.maximum(X + BIAS, 0))


# ---- The layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_features": 0}, ValueError, "^num_features must be at least 1, got 0$"),
        ({"num_features": -1}, ValueError, "^num_features must be at least 1, got -1$"),
        ({"num_features": 1.5}, TypeError, "^num_features must be an integer, got float$"),
        ({"num_features": True}, TypeError, "^num_features must be .* bool"),
        ({"num_features": (3,)}, TypeError, "^num_features must be .* tuple"),
        ({"axis": None}, TypeError, "^axis must be .* NoneType"),
        ({"negative_slope": "1"}, TypeError, "^negative_slope must be a real number, got str"),
        ({"positive_slope": 0}, ValueError, "^positive_slope must not be 0"),
        ({"dtype": np.int32}, TypeError, "^dtype must be a floating dtype, got .*int32"),
        ({"xp": "torch"}, TypeError, "^xp must be an array library, .* got str"),
        ({"inplace": 1}, TypeError, "^inplace must be True or False, got int"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        BiasReLU(**{"num_features": 3, **arguments})


def test_what_a_layer_is_made_of():
    layer = BiasReLU(64)
    assert repr(layer) == "BiasReLU(64)"
    assert repr(BiasReLU(64, axis=1, negative_slope=0.1)) == (
        "BiasReLU(64, axis=1, negative_slope=0.1)"
    )
    everything = {
        "negative_slope": 0.1,
        "threshold": 0.5,
        "positive_slope": 2.0,
        "max_value": 6.0,
        "inplace": True,
    }
    text = ", ".join(f"{name}={value}" for name, value in everything.items())
    layer = BiasReLU(3, 0, **everything)
    assert repr(layer) == f"BiasReLU(3, axis=0, {text})"
    assert repr(eval(repr(layer))) == repr(layer)
    assert layer.activation == relu_xp.ReLU(**everything).activation
    for dtype in (np.float16, np.float64):
        layer = BiasReLU(3, dtype=dtype)
        for arrays in (layer.params, layer.grads):
            assert [(a.tolist(), a.dtype) for a in arrays] == [([0, 0, 0], dtype)]
    assert BiasReLU(3).params[0].dtype == np.float32


@pytest.mark.libraries("writable")
def test_an_optimiser_of_the_textbook_learns_the_bias(xp):
    """Lists that are collected once, arrays that are updated."""
    layer = BiasReLU(2)
    layer.params[0], layer.grads[0] = xp.array(layer.params[0]), xp.array(layer.grads[0])
    params, grads = [*layer.params], [*layer.grads]
    host = np.array([[1.0, -2.0], [3.0, 1.0]], np.float32)
    target = relu_xp.bias_relu(host, np.array([0.25, 0.5], np.float32))
    for _ in range(60):
        y = layer.forward(xp.array(host))
        layer.backward(xp.array((xp.numpy(y) - target) / 4))
        assert grads[0] is layer.grads[0]
        updated = xp.numpy(params[0]) - np.float32(0.5) * xp.numpy(grads[0])
        relu_xp.relu(xp.array(updated), out=params[0])  # which is positive: a copy
    assert params[0] is layer.params[0]
    np.testing.assert_allclose(xp.numpy(layer.params[0]), [0.25, 0.5], atol=1e-3)


@pytest.mark.libraries("strided")
def test_a_layer_keeps_its_mask_where_it_is_told(xp):
    """Without training it is not written."""
    layer = BiasReLU(3)
    layer.params[0] = xp.array(BIAS)
    x, mask = xp.array(X), xp.array(np.full(1, 0x5A, np.uint8))
    layer.forward(x, training=False, mask=mask)
    assert xp.numpy(mask).tolist() == [0x5A]
    y = layer.forward(x, mask=mask)
    keep = X + BIAS > 0
    assert xp.numpy(mask).tolist() == np.packbits(keep, bitorder="little").tolist()
    for retain in (True, False):
        dx = layer.backward(y, retain=retain)
        np.testing.assert_array_equal(xp.numpy(dx), np.where(keep, X + BIAS, 0))
        expected = np.where(keep, X + BIAS, 0).sum(0)
        np.testing.assert_array_equal(xp.numpy(layer.grads[0]), expected)


def test_a_refused_gradient_leaves_the_buffer():
    layer = BiasReLU(3)
    layer.forward(X)
    for dy, out in ((X[:1], None), (X, X[:1]), ([1.0], None)):
        with pytest.raises((TypeError, ValueError), match="^backward: "):
            layer.backward(dy, out=out)
    assert layer.grads[0].tolist() == [0, 0, 0]
    layer.backward(np.ones_like(X))
    assert layer.grads[0].tolist() == [1, 1, 1]


@pytest.mark.libraries("strided")
def test_a_gradient_is_not_stored_within_dy_or_dx(xp):
    """Which are longer than the bias; the layer then makes a new array for it."""
    layer = BiasReLU(4)
    layer.params[0] = xp.array(np.zeros(4, np.float32))
    x = xp.array(np.ones((3, 4), np.float32))
    for row in range(3):
        dy, out = (xp.array(np.full((3, 4), 2, np.float32)) for _ in range(2))
        for within in (dy, out):
            layer.grads[0] = buffer = within[row]
            layer.forward(x)
            dx = layer.backward(dy, out=out)
            assert layer.grads[0] is not buffer
            assert xp.numpy(layer.grads[0]).tolist() == [6] * 4
            assert (xp.numpy(dx) == 2).all()
            assert (xp.numpy(dy) == 2).all()


def test_a_list_of_gradients_may_be_a_callers_and_have_more_arrays():
    layer = BiasReLU(3)
    grads, other = [*layer.grads], np.ones(1)
    grads.append(other)
    layer.grads = grads
    layer.forward(X)
    layer.backward(np.ones_like(X))
    assert layer.grads is grads
    assert grads[0].tolist() == [1, 1, 1]
    assert grads[1] is other


def test_a_layer_without_its_bias_is_refused():
    layer = BiasReLU(3)
    layer.params = []
    for training in (True, False):
        with pytest.raises(
            ValueError, match=r"^forward: layer\.params is empty; its first array is BiasReLU's"
        ):
            layer.forward(X, training=training)
    layer.params = [BIAS]  # as the message says
    np.testing.assert_array_equal(layer.forward(X), np.maximum(X + BIAS, 0))


def test_a_subclass_with_a_property_for_its_arrays():
    class Mine(BiasReLU):
        @property
        def params(self):
            return [BIAS]

    np.testing.assert_array_equal(Mine(3).forward(X), np.maximum(X + BIAS, 0))
