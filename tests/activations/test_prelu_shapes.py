"""The shapes of PReLU's weight, and where its channels are."""

from __future__ import annotations

import math

import numpy as np
import pytest

import relu_xp
from relu_xp import PReLU

X = np.ones((2, 3), np.float32)

SHAPES = [  # of x, and of a weight that broadcasts to it
    ((2, 6, 3, 4), (6, 1, 1)),
    ((2, 6, 3, 4), (6, 3, 4)),
    ((2, 6, 3, 4), (1, 6, 1, 1)),
    ((2, 6, 3, 4), (2, 6, 3, 4)),
    ((2, 6, 3, 4), (6, 1, 4)),
    ((2, 6, 3, 4), (2, 1, 1, 4)),
    ((2, 6, 3, 4), (1, 1)),
    ((2, 1, 3, 4), (2, 1, 3, 1)),
    ((3, 5), (3, 1)),
    ((0, 3, 2), (3, 2)),
    ((2, 0, 3), (1, 0, 1)),
]


@pytest.mark.parametrize(("shape", "weight_shape"), SHAPES, ids=str)
def test_a_weight_with_several_axes_broadcasts(xp, shape, weight_shape):
    """Keras's shared_axes, Chainer's and ONNX's slopes: f, and the sums of the gradient."""
    rng = np.random.default_rng(8)
    host, gradient = (rng.integers(-8, 8, shape).astype(np.float32) for _ in range(2))
    slopes = rng.integers(-4, 5, weight_shape).astype(np.float32) / 4
    x, weight, dy = map(xp.array, (host, slopes, gradient))
    y, pullback = relu_xp.prelu_vjp(x, weight)
    dx, dweight = pullback(dy)
    wanted = np.where(host > 0, host, slopes * host + 0.0)
    for result in (y, relu_xp.prelu(x, weight)):
        np.testing.assert_array_equal(xp.numpy(result), wanted)
    np.testing.assert_array_equal(xp.numpy(dx), np.where(host > 0, gradient, slopes * gradient))
    terms = np.where(host > 0, 0, host * gradient)
    aligned = (1,) * (len(shape) - len(weight_shape)) + weight_shape
    summed = tuple(axis for axis, length in enumerate(aligned) if length == 1)
    expected = terms.sum(summed, keepdims=True).reshape(weight_shape)
    np.testing.assert_array_equal(xp.numpy(dweight), expected)
    assert tuple(dweight.shape) == weight_shape

    if 0 in weight_shape:
        return
    layer = PReLU(weight_shape)
    assert layer.params[0].shape == layer.grads[0].shape == weight_shape
    assert repr(layer) == f"PReLU({weight_shape}, init=0.25, axis=1)"
    layer.params[0], layer.grads[0] = weight, xp.array(np.zeros_like(slopes))
    np.testing.assert_array_equal(xp.numpy(layer.forward(x)), wanted)
    layer.backward(dy)
    np.testing.assert_array_equal(xp.numpy(layer.grads[0]), expected)


def test_a_weight_with_one_axis_goes_with_the_second_or_else_the_last(xp):
    """With NumPy's broadcasting, which ONNX has, it goes with the last one: axis=-1."""
    host = np.full((2, 3, 4), -2.0, np.float32)
    three, four = (np.arange(n, dtype=np.float32) for n in (3, 4))
    for weight, options, axis in (
        (three, {}, 1),
        (four, {}, 2),
        (four, {"axis": -1}, 2),
        (three, {"axis": 1}, 1),
    ):
        expected = np.moveaxis(np.moveaxis(host, axis, -1) * weight + 0.0, -1, axis)
        y = relu_xp.prelu(xp.array(host), xp.array(weight), **options)
        np.testing.assert_array_equal(xp.numpy(y), expected)
    square = np.full((2, 3, 3), -2.0, np.float32)
    y = xp.numpy(relu_xp.prelu(xp.array(square), xp.array(three)))
    assert y[0, 1].tolist() == [-2] * 3, "the second axis comes first"
    y = relu_xp.prelu(xp.array(host[0, 0]), xp.array(four))
    assert xp.numpy(y).tolist() == [0, -2, -4, -6]
    for axis in (1, 0):
        with pytest.raises(ValueError, match=rf"weight has 4 slopes.* along axis {axis} "):
            relu_xp.prelu(xp.array(host), xp.array(four), axis=axis)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3)], ids=str)
def test_one_slope_is_valid_for_every_shape(xp, shape):
    x = xp.array(np.full(shape, -2.0, np.float32))
    for weight_shape in ((), (1,)):
        weight = xp.array(np.full(weight_shape, 0.5, np.float32))
        y, pullback = relu_xp.prelu_vjp(x, weight, axis=7)  # which is not needed
        dx, dweight = pullback(x)
        assert y.shape == dx.shape == x.shape
        assert tuple(dweight.shape) == weight_shape
        assert (xp.numpy(y) == -1).all()
        assert (xp.numpy(dx) == -1).all()
        assert float(xp.numpy(dweight).sum()) == 4 * math.prod(shape)


def test_a_weight_that_does_not_broadcast_is_refused():
    for shape in ((2,), (2, 2), (1, 2), (1, 2, 3), (1, 1, 1), (3, 3), (0, 3)):
        for call in (relu_xp.prelu, relu_xp.prelu_vjp):
            message = rf"has shape \({', '.join(map(str, shape))}\).* of x, \(2, 3\)"
            if len(shape) == 1:
                message = r"has 2 slopes, but x has 3 channels along axis 1 \(shape \(2, 3\)\)"
            with pytest.raises(ValueError, match=f"^{call.__name__}: weight {message}"):
                call(X, np.ones(shape))
    for axis in (2, -3):
        with pytest.raises(
            ValueError,
            match=rf"^prelu: x has shape \(2, 3\).*no axis {axis}; the last one is axis=-1$",
        ):
            relu_xp.prelu(X, np.ones(3), axis=axis)
    for size in (1, 3):  # also where the axis is not needed
        with pytest.raises(TypeError, match="^prelu_vjp: axis must be "):
            relu_xp.prelu_vjp(X, np.ones(size), axis=1.0)
    layer = PReLU(4)
    for training in (False, True):
        with pytest.raises(ValueError, match=r"^forward: layer\.params\[0\] has 4 slopes.* 3 chan"):
            layer.forward(X, training=training)


def test_lengths_that_are_not_known(require):
    """Dask's, of x or of the weight."""
    da = require("dask.array")
    host = np.full((6, 3), -2.0, np.float32)
    rows, few = (da.from_array(a, chunks=(2, 3)) for a in (host, host[:, :1]))
    unknown, slopes = rows[rows[:, 0] < 0], few[few[:, 0] < 0]
    y = relu_xp.prelu(unknown, da.ones((1, 3), dtype=np.float32))
    np.testing.assert_array_equal(y.compute(), host)
    for x, weight in ((unknown, da.ones((6, 1))), (rows, slopes), (rows, slopes[:, 0])):
        with pytest.raises(ValueError, match=r"unknown|not known"):
            relu_xp.prelu(x, weight)
