"""Squared ReLU: where dtypes differ, and whose NaN a product takes."""

from __future__ import annotations

import numpy as np
from table import DTYPES

import relu_xp


def test_gradients_of_another_dtype_are_rounded_to_their_own(xp):
    narrow, wide = (DTYPES[dtype] for dtype in (xp.dtypes[0], xp.dtypes[-1]))
    x, dy = np.array([300.0, -1, 2], wide), np.array([200.0, 3, 4], narrow)
    _, pullback = relu_xp.squared_relu_vjp(xp.array(x))
    dx = xp.numpy(pullback(xp.array(dy)))
    assert dx.dtype == narrow
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(dx, np.array([120_000, 0, 16]).astype(narrow))
    _, pullback = relu_xp.squared_relu_vjp(xp.array(x.astype(narrow)))
    np.testing.assert_array_equal(xp.numpy(pullback(xp.array(dy.astype(wide)))), [120_000, 0, 16])


def test_the_gradient_is_multiplied_in_the_wider_dtype():
    """In float32 one of these would be 0, the other infinite."""
    for x, dy, expected in (
        (np.array([1e-60]), np.array([1e30], np.float32), np.float32(2e-30)),
        (np.array([1e-30], np.float32), np.array([1e60]), 2 * float(np.float32(1e-30)) * 1e60),
    ):
        _, pullback = relu_xp.squared_relu_vjp(x)
        np.testing.assert_allclose(pullback(dy), [expected], rtol=1e-6)
        assert pullback(dy).dtype == dy.dtype


def test_of_two_nan_the_product_takes_the_first():
    """As the processor does; NumPy's versions do not agree on which is the first."""
    first, other = np.array([0x7FC00001, 0xFFC00002], np.uint32).view(np.float32)[:, None]
    x, dy = np.resize(first, (1, 100)), np.resize(other, (1, 100))
    dx = relu_xp.squared_relu_vjp(x)[1](dy)
    assert (dx.view(np.uint32) == 0x7FC00001).all()
    dx, dweight = relu_xp.prelu_vjp(-np.ones_like(x), first)[1](dy)
    assert (dx.view(np.uint32) == 0x7FC00001).all()
    assert dweight.view(np.uint32).tolist() == [0x7FC00000]
