"""Squared ReLU: where dtypes differ, and whose NaN a product takes."""

from __future__ import annotations

import numpy as np
import pytest
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


@pytest.mark.libraries(
    names=["numpy", "compiled", "dask", "cupy_host", "cupy_host_75", "cupy_host_120", "cupy"]
)
def test_float64_is_rounded_once_to_16_bits(xp, dtype):
    """The gradient, and PReLU's weight: not to float32 between, which would be a tie."""
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype)
    if half is None:
        return
    wide = xp.array(np.array([1 + half + 2.0**-40]))
    one = np.ones(1, DTYPES[dtype])
    for result in (
        relu_xp.squared_relu_vjp(wide)[1](xp.array((one / 2).astype(one.dtype))),
        relu_xp.prelu_vjp(xp.array(-one), wide)[1](xp.array(one))[0],
    ):
        got = xp.numpy(result)
        assert got.dtype == one.dtype
        assert got.tolist() == [1 + 2 * half]


def test_of_two_nan_the_product_takes_the_first():
    """As the processor does; NumPy's versions do not agree on which is the first."""
    first, other = np.array([0x7FC00001, 0xFFC00002], np.uint32).view(np.float32)[:, None]
    x, dy = np.resize(first, (1, 100)), np.resize(other, (1, 100))
    dx = relu_xp.squared_relu_vjp(x)[1](dy)
    assert (dx.view(np.uint32) == 0x7FC00001).all()
    dx, dweight = relu_xp.prelu_vjp(-np.ones_like(x), first)[1](dy)
    assert (dx.view(np.uint32) == 0x7FC00001).all()
    assert dweight.view(np.uint32).tolist() == [0x7FC00000]
