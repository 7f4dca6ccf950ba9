"""PReLU: its weight, the gradient of that, and the arrays of its layer."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
from table import DTYPES

import relu_xp
from relu_xp import PReLU

X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6,), 0), ((4, 6), 1), ((6, 4), 0), ((4, 6), -1), ((3, 6, 5), 1), ((2, 3, 4, 6), 3)],
)
def test_each_channel_is_a_leaky_relu(xp, shape, axis):
    rng = np.random.default_rng(3)
    slopes = np.array([0.0, 0.25, -1.5, 1.0, 3e-3, 0.5], np.float32)
    host, gradient = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    y, pullback = relu_xp.prelu_vjp(xp.array(host), xp.array(slopes), axis=axis)
    dx, dweight = pullback(xp.array(gradient))
    assert tuple(dweight.shape) == (6,)
    for channel, slope in enumerate(slopes.tolist()):
        part = (*(slice(None),) * (axis % len(shape)), channel, ...)
        x, dy = host[part], gradient[part]
        np.testing.assert_array_equal(xp.numpy(y)[part], relu_xp.leaky_relu(x, slope))
        wanted = relu_xp.relu_backward(dy, x, negative_slope=slope)
        np.testing.assert_array_equal(xp.numpy(dx)[part], wanted)
        terms = (
            Fraction(float(v)) * Fraction(float(g))
            for v, g in zip(x.flat, dy.flat, strict=True)
            if v <= 0
        )
        np.testing.assert_allclose(xp.numpy(dweight)[channel], float(sum(terms)), rtol=1e-6)


def test_weights_of_every_dtype(xp, dtype):
    host = np.array([[-2.0, 3.0, -0.5], [4.0, -1.0, 0.0]], DTYPES[dtype])
    for its_dtype in (xp.dtypes[0], xp.dtypes[-1]):
        weight = np.array([0.0, 1.0, 0.5], DTYPES[its_dtype])
        y, pullback = relu_xp.prelu_vjp(xp.array(host), xp.array(weight))
        dx, dweight = pullback(xp.array(host[::-1].copy()))
        for found, wanted, wanted_dtype in (
            (y, [[0, 3, -0.25], [4, -1, 0]], dtype),
            (dx, [[0, -1, 0], [-2, 3, -0.25]], dtype),
            (dweight, [-8, -3, 0], its_dtype),
        ):
            assert xp.numpy(found).dtype == DTYPES[wanted_dtype]
            np.testing.assert_array_equal(xp.numpy(found).astype(float), wanted)


def test_a_weight_beyond_the_dtype_of_x_is_infinite_silently(xp):
    weight = xp.array(np.full(1, 1e300, DTYPES[xp.dtypes[-1]]))
    y = relu_xp.prelu(xp.array(np.array([-2.0, 3.0], np.float32)), weight, axis=0)
    assert xp.numpy(y).tolist() == [-math.inf, 3]


# ---- The weight's gradient ----------------------------------------------------------------------


def test_it_counts_what_takes_the_slope(xp, dtype):
    """A zero among them, so that an infinite dy shows; NaN and infinity above 0 do not reach it."""
    inf, nan = math.inf, math.nan
    for x, dy, expected in (
        ([-2.0, inf, 0.5, nan], [0.5, nan, inf, 1.0], -1.0),
        ([-2.0, 0.0], [0.5, inf], nan),
        ([-2.0, -0.0], [0.5, nan], nan),
        ([-inf, 1.0], [0.5, 1.0], -inf),
    ):
        x, dy = (xp.array(np.array(values, DTYPES[dtype])) for values in (x, dy))
        for slope in (0.25, 0.0):
            weight = xp.array(np.full(1, slope, DTYPES[dtype]))
            dweight = xp.numpy(relu_xp.prelu_vjp(x, weight, axis=0)[1](dy)[1])
            np.testing.assert_array_equal(dweight.astype(float), [expected])


def test_it_is_summed_in_more_than_16_bits(xp):
    """70,000 times -1 * 1 is beyond float16, and counting in it ends at 2,048."""
    for dtype in xp.dtypes[:2]:
        x = xp.array(np.full(70_000, -1, DTYPES[dtype]))
        for wide in (np.dtype(np.float32), DTYPES[dtype]):
            _, pullback = relu_xp.prelu_vjp(x, xp.array(np.full(1, 0.5, wide)), axis=0)
            dweight = xp.numpy(pullback(x)[1])
            with np.errstate(over="ignore"):
                assert dweight[0] == np.array(70_000.0).astype(wide)
            assert dweight.dtype == wide


def test_it_is_summed_in_float32_where_there_is_no_float64(require):
    jax = require("jax")
    with jax.enable_x64(False):
        x = jax.numpy.asarray([-3.0, 2.0, -0.5])
        dx, dweight = relu_xp.prelu_vjp(x, jax.numpy.asarray([0.5]), axis=0)[1](x)
    assert (dx.dtype, dweight.dtype) == ("float32", "float32")
    assert (dx.tolist(), dweight.tolist()) == ([-1.5, 2, -0.25], [9.25])


@pytest.mark.parametrize("channels", [1, 7])
def test_it_is_the_same_every_time(xp, channels):
    """Whatever the threads do: the order of the sum depends on the array alone."""
    rng = np.random.default_rng(4)
    host, gradient = rng.standard_normal((2, 30_007, 7), np.float32)
    weight = xp.array(np.linspace(0.1, 0.7, channels, dtype=np.float32))
    _, pullback = relu_xp.prelu_vjp(xp.array(host), weight)
    results = [xp.numpy(pullback(xp.array(gradient))[1]).copy() for _ in range(3)]
    assert len({result.tobytes() for result in results}) == 1
    products = np.where(host <= 0, host.astype(np.float64) * gradient, 0)
    exact = products.sum() if channels == 1 else products.sum(0)
    np.testing.assert_allclose(results[0], exact, rtol=1e-3 if xp.name == "jax" else 1e-6)


def test_it_is_the_same_in_every_layout_of_numpys():
    """Not so a sum of NumPy's own, whose order is that of memory, and of its version."""
    host, gradient = np.random.default_rng(6).standard_normal((2, 70, 50, 60))
    ours, own = set(), set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        x, dy = (a.transpose(order).copy().transpose(np.argsort(order)) for a in (host, gradient))
        for axis, n in enumerate(x.shape):
            _, pullback = relu_xp.prelu_vjp(x, np.full(n, 0.5), axis=axis)
            ours.add((axis, pullback(dy)[1].tobytes()))
        own.add(np.sum(np.where(x <= 0, x * dy, 0), (0, 2)).tobytes())
    assert len(ours) == 3
    assert len(own) > 1


# ---- What is refused ----------------------------------------------------------------------------


def test_an_out_shares_no_memory_with_the_weight():
    memory = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match="^prelu: out overlaps an input"):
        relu_xp.prelu(X, memory[1], out=memory[1:3])
    assert (memory == 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_parameters": 0}, ValueError, "^num_parameters must be at least 1, got 0"),
        ({"num_parameters": -1}, ValueError, "^num_parameters must be at least 1, got -1"),
        ({"num_parameters": 1.5}, TypeError, "^num_parameters must be .* float"),
        ({"num_parameters": True}, TypeError, "^num_parameters must be .* bool"),
        ({"num_parameters": (3, 0)}, ValueError, r"^num_parameters must be at .* got \(3, 0\)"),
        ({"num_parameters": (3, 1.0)}, TypeError, "^num_parameters must be .* float"),
        ({"num_parameters": "3"}, TypeError, "^num_parameters must be .* str"),
        ({"axis": None}, TypeError, "^axis must be .* NoneType"),
        ({"init": "1"}, TypeError, "^init must be a real number, got str"),
        ({"init": math.inf}, ValueError, "^init must be finite"),
        ({"init": 1e300}, ValueError, "^init must be finite in float32"),
        ({"dtype": np.int32}, TypeError, "^dtype must be a floating dtype, got .*int32"),
        ({"xp": "torch"}, TypeError, "^xp must be an array library, .* got str"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        PReLU(**arguments)


def test_a_weight_of_another_library_is_refused(require):
    x = require("array_api_strict").ones((2, 3))
    with pytest.raises(TypeError, match=r"^forward: x is array_api_strict.*layer\.params\[0\] is"):
        PReLU().forward(x)


# ---- The layer's arrays -------------------------------------------------------------------------


def test_what_a_layer_is_made_of():
    layer = PReLU()
    assert repr(layer) == "PReLU(1, init=0.25, axis=1)"
    assert repr(PReLU(2, -0.5, 0, inplace=True)) == "PReLU(2, init=-0.5, axis=0, inplace=True)"
    assert layer.params[0].dtype == layer.grads[0].dtype == np.float32
    assert (layer.params[0].tolist(), layer.grads[0].tolist()) == ([0.25], [0])
    for shape in ((), (64, 1, 1), [64, 1, 1]):
        assert PReLU(shape).params[0].shape == PReLU(shape).grads[0].shape == tuple(shape)
    assert repr(PReLU((3,))) == repr(PReLU(3))


@pytest.mark.libraries("writable")
def test_an_optimiser_of_the_textbook_learns_the_slope(xp):
    """Deep Learning from Scratch 2: lists that are collected once, arrays that are updated."""
    layer = PReLU(2, init=0.9)
    layer.params[0], layer.grads[0] = xp.array(layer.params[0]), xp.array(layer.grads[0])
    params, grads = [*layer.params], [*layer.grads]
    host = np.array([[-1.0, -2.0], [3.0, -1.0]], np.float32)
    target = relu_xp.prelu(host, np.array([0.25, 0.5], np.float32))
    for _ in range(60):
        y = layer.forward(xp.array(host))
        layer.backward(xp.array((xp.numpy(y) - target) / 4))
        assert grads[0] is layer.grads[0]
        updated = xp.numpy(params[0]) - np.float32(0.5) * xp.numpy(grads[0])
        relu_xp.relu(xp.array(updated), out=params[0])  # which is positive: a copy
    assert params[0] is layer.params[0]
    np.testing.assert_allclose(xp.numpy(layer.params[0]), [0.25, 0.5], atol=1e-3)


def test_where_arrays_cannot_be_written_the_gradient_is_another(require):
    jnp = require("jax").numpy
    layer = PReLU(xp=jnp)
    before = layer.grads[0]
    layer.forward(jnp.asarray([[-2.0, 1.0]]))
    layer.backward(jnp.ones((1, 2)))
    assert (float(layer.grads[0][0]), float(before[0])) == (-2, 0)


def test_the_gradient_buffer_may_be_dy_or_out():
    layer, x = PReLU(3, axis=0, dtype=np.float64), np.array([-1.0, -2.0, 3.0])
    layer.forward(x)
    mine = layer.grads[0]
    mine[:] = 1
    assert layer.backward(mine, retain=True).tolist() == [0.25, 0.25, 1]
    assert mine.tolist() == [1, 1, 1]
    assert layer.grads[0].tolist() == [-1, -2, 0]
    out = layer.grads[0]
    assert layer.backward(np.ones(3), out=out) is out
    assert out.tolist() == [0.25, 0.25, 1]
    assert layer.grads[0].tolist() == [-1, -2, 0]


@pytest.mark.parametrize("kind", range(7))
def test_a_gradient_buffer_that_cannot_be_used_is_replaced(kind):
    memory = np.zeros(6, np.float32)
    buffer, out = [
        (np.zeros(3), None),
        (np.zeros(2, np.float32), None),
        (np.zeros((3, 1), np.float32), None),
        ([0.0] * 3, None),
        (np.broadcast_to(np.float32(0), 3), None),
        (memory[:3], memory[1:4]),
        (memory[2:5], memory[1:4]),
    ][kind]
    layer = PReLU(3, axis=0)
    layer.forward(np.array([-1.0, -2.0, 3.0], np.float32))
    layer.grads[0] = buffer
    assert layer.backward(np.ones(3, np.float32), out=out).tolist() == [0.25, 0.25, 1]
    assert layer.grads[0] is not buffer
    assert layer.grads[0].dtype == np.float32
    assert layer.grads[0].tolist() == [-1, -2, 0]


def test_the_buffer_follows_a_weight_that_is_replaced(xp):
    """Before the first gradient, so that an optimiser may collect the lists; a gradient stays."""
    layer = PReLU(2)
    weight = xp.array(np.ones(3, np.float32))
    layer.params[0] = weight
    (buffer,) = layer.grads
    assert tuple(buffer.shape) == (3,)
    assert layer.grads[0] is buffer
    x = xp.array(np.full((1, 3), -2.0, np.float32))
    layer.backward(layer.forward(x))
    assert (layer.grads[0] is buffer) == xp.writable
    layer.params[0] = xp.array(np.ones(3))  # as a step of weight decay may make it: float64
    assert xp.numpy(layer.grads[0]).tolist() == [4, 4, 4]
    layer = PReLU()
    layer.grads = ()
    layer.params[0] = np.float64(0.5)  # a scalar
    layer.backward(layer.forward(np.array([-2.0, 1.0])))
    assert (layer.grads[0].shape, float(layer.grads[0])) == ((), 2)
    for params in ([], ["no array"]):
        layer = PReLU()
        layer.params = params
        assert layer.grads[0].tolist() == [0]


def test_a_refused_gradient_leaves_the_buffer():
    layer = PReLU()
    layer.forward(-X)
    for dy, out in ((X[:1], None), (X, X[:1]), ([1.0], None)):
        with pytest.raises((TypeError, ValueError), match="^backward: "):
            layer.backward(dy, out=out)
    assert layer.grads[0].tolist() == [0]
    layer.backward(X)
    assert layer.grads[0].tolist() == [-6]


def test_a_copy_shares_arrays_and_a_deep_copy_does_not():
    layer, shared = PReLU(3), [1]
    layer.note = shared
    again = copy.copy(layer)
    assert again.params[0] is layer.params[0]
    again.params[0] = np.ones(1)
    assert layer.params[0].tolist() == [0.25] * 3
    again, note = copy.deepcopy((layer, shared))
    again.params[0][0] = 7
    assert layer.params[0][0] == 0.25
    assert again.note is note is not shared
