"""A NumPy scalar, which each reduction makes, is taken as the 0-d array that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from table import DTYPES, NumPy, each_row, x_gradient

import relu_xp

pytestmark = pytest.mark.libraries("ndarray")


NEED_AN_AXIS = ("crelu", "bias_relu")


def check(result, wanted):
    """Check a result by that for 0-d arrays."""
    assert type(result) is np.ndarray
    assert (result.shape, result.dtype) == ((), wanted.dtype)
    assert result.tobytes() == wanted.tobytes()


@each_row
def test_every_function_and_layer_takes_a_scalar(xp, dtype, row):
    if row.name in NEED_AN_AXIS:
        with pytest.raises(ValueError, match=rf"^{row.name}: x has shape \(\), and no axis -?1$"):
            row.call(xp, np.float32(1))
        return
    for value in (-3.0, 0.5, 7.0, np.nan):
        x, dy = DTYPES[dtype].type(value), DTYPES[dtype].type(1.5)
        array, gradient = np.asarray(x), np.asarray(dy)
        check(row.call(xp, x), row.call(xp, array))
        check(row.call(xp, x, out=np.empty((), x.dtype)), row.call(xp, array))
        (y, pullback), (wanted, its_pullback) = row.call_vjp(xp, x), row.call_vjp(xp, array)
        check(y, wanted)
        check(x_gradient(pullback(dy)), x_gradient(its_pullback(gradient)))
        layer, its_layer = row.make_layer(xp), row.make_layer(xp)
        check(layer(x), its_layer(array))
        check(layer.backward(dy), its_layer.backward(gradient))
        check(layer(x, training=False), its_layer(array, training=False))
        if row.name == "relu":
            check(relu_xp.relu_grad(x), relu_xp.relu_grad(array))
            check(relu_xp.relu_backward(dy, x), relu_xp.relu_backward(gradient, array))


def test_device_neutral_code_works():
    """The line of the first user who needed it."""
    x = np.array([1.0, 2.0])
    check(relu_xp.relu(np.sum(x * x) - 3.0), np.asarray(2.0))
    _, pullback = relu_xp.relu_vjp(np.sum(x))
    check(pullback(np.float64(2)), np.asarray(2.0))


def test_a_weight_may_be_a_scalar(xp):
    x = np.array([[-2.0, 3.0]])
    y, pullback = relu_xp.prelu_vjp(x, np.float32(0.5))
    assert y.tolist() == [[-1, 3]]
    dx, weight_grad = pullback(x)
    assert dx.tolist() == [[-1, 3]]
    check(weight_grad, np.asarray(np.float32(4)))


def test_integers_as_arrays(xp):
    check(relu_xp.relu(np.int16(-5)), np.asarray(np.int16(0)))
    check(relu_xp.leaky_relu(np.uint8(5), 2), np.asarray(np.uint8(5)))
    with pytest.raises(TypeError, match="^relu_vjp: x has dtype int64, which has no gradient"):
        relu_xp.relu_vjp(np.int64(1))


@pytest.mark.parametrize(
    "x",
    [
        np.bool_(True),
        np.complex64(1),
        np.str_("1"),
        np.bytes_(b"1"),
        np.datetime64("2026-01-01"),
        np.longdouble(1),
        np.void(b"12"),
        np.zeros(1, [("a", "f4")])[0],
    ],
    ids=lambda x: type(x).__name__,
)
@each_row
def test_other_scalars_are_refused_as_their_arrays(row, x):
    for bad in (x, np.asarray(x)):
        with pytest.raises(TypeError, match=f"^{row.name}: x: .*dtype"):
            row.call(NumPy, bad)
        _, pullback = row.call_vjp(NumPy, np.ones((2, 3)))
        with pytest.raises(TypeError, match="^pullback: dy: .*dtype"):
            pullback(bad)


@each_row
def test_a_scalar_cannot_be_written(row):
    x = np.float32(1)
    for out in (np.float32(0), x):
        with pytest.raises(TypeError, match=f"^{row.name}: out must be an array, .*float32"):
            row.call(NumPy, np.ones((2, 3), np.float32), out=out)
    if row.name == "relu":
        with pytest.raises(TypeError, match="^relu_vjp: mask must be an array, got .*uint8"):
            relu_xp.relu_vjp(np.ones(3), mask=np.uint8(0))
    if row.name in NEED_AN_AXIS:
        return
    layer = row.make_layer(NumPy, inplace=True)
    for training in (True, False):
        with pytest.raises(TypeError, match="^forward: a NumPy scalar cannot be overwritten"):
            layer.forward(x, training=training)
    y = layer.forward(np.asarray(x))  # as the message says
    with pytest.raises(TypeError, match="^backward: a NumPy scalar cannot be overwritten"):
        layer.backward(x)
    assert layer.backward(y) is y
