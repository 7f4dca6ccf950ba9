"""ReLU with its four parameters: the branches by hand, and what a dtype makes of a parameter.

tests/test_parameters.py has what a parameter may be.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

import relu_xp

HUGE = sys.float_info.max


def test_the_branches_by_hand():
    """The threshold itself belongs to the lower branch; at the ceiling the gradient is 0."""
    x = np.array([-2.0, 0.5, 1.0, 3.0, 4.0])
    parameters = {"threshold": 0.5, "negative_slope": 0.5, "positive_slope": 2.0, "max_value": 6.0}
    y, pullback = relu_xp.relu_vjp(x, **parameters)
    dy = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    for found, wanted in (
        (y, [-1, 0.25, 2, 6, 6]),
        (relu_xp.relu(x, **parameters), [-1, 0.25, 2, 6, 6]),
        (relu_xp.relu_grad(x, **parameters), [0.5, 0.5, 2, 0, 0]),
        (pullback(dy), [0.5, 1, 6, 0, 0]),
        (relu_xp.relu_backward(dy, x, **parameters), [0.5, 1, 6, 0, 0]),
    ):
        np.testing.assert_array_equal(found, wanted)


def test_slopes_of_0_and_1(xp):
    """0 and 1 choose how a backend computes: each only for its own slope."""
    host = np.array([-3.0, -0.5, 0.25, 4.0] * 5, np.float32)
    x, dy = xp.array(host), xp.array(host[::-1].copy())
    for negative_slope in (0.0, 1.0, 2.0, -1.0):
        for positive_slope in (1.0, 2.0, -1.0):
            slope = np.where(host <= 0, np.float32(negative_slope), np.float32(positive_slope))
            parameters = {"negative_slope": negative_slope, "positive_slope": positive_slope}
            y, pullback = relu_xp.relu_vjp(x, **parameters)
            for found, expected in (
                (y, host * slope),
                (relu_xp.relu(x, **parameters), host * slope),
                (relu_xp.relu_grad(x, **parameters), slope),
                (pullback(dy), host[::-1] * slope),
                (relu_xp.relu_backward(dy, x, **parameters), host[::-1] * slope),
            ):
                np.testing.assert_array_equal(xp.numpy(found), expected)


def test_one_number_may_be_two_arguments():
    x, half = np.array([-1.0, 0.25, 2.0]), 0.5
    y = relu_xp.relu(x, negative_slope=half, threshold=half)
    np.testing.assert_array_equal(y, [-0.5, 0.125, 2])


def test_zero_has_no_sign():
    assert repr(relu_xp.ReLU(threshold=-0.0, negative_slope=-0.0)) == "ReLU()"
    assert repr(relu_xp.LeakyReLU(-0.0)) == "LeakyReLU(0.0)"
    y = relu_xp.relu(np.array([-0.0, 5.0]), threshold=-1.0, max_value=-0.0)
    assert not np.signbit(y[1])


def test_a_threshold_is_rounded_to_the_dtype_of_x():
    """1.0001 is 1 in float16, so that 1 is not above it."""
    x, dy = np.array([1.0, 1.001], np.float16), np.ones(2)
    np.testing.assert_array_equal(relu_xp.thresholded_relu(x, 1.0001), [0, x[1]])
    np.testing.assert_array_equal(relu_xp.relu_backward(dy, x, threshold=1.0001), [0, 1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_parameters_beyond_the_dtype_are_infinite(dtype):
    x = np.array([-3.0, 2.0, np.nan], dtype)
    np.testing.assert_array_equal(relu_xp.relu(x, max_value=HUGE), [0, 2, np.nan])
    np.testing.assert_array_equal(relu_xp.relu(x, threshold=HUGE), [0, 0, np.nan])
    np.testing.assert_array_equal(relu_xp.relu(x, threshold=-HUGE), x)


def test_a_large_integer_is_rounded_once():
    """2**60 + 2**36 + 1 is above the middle of two float32: by way of float64 it would be on it."""
    x = np.array([1e30], np.float32)
    assert int(relu_xp.relu(x, max_value=2**60 + 2**36 + 1)[0]) == 2**60 + 2**37
    assert int(relu_xp.relu(x, max_value=2**60 + 2**36)[0]) == 2**60
    assert int(relu_xp.relu(x, max_value=2**60 - 1)[0]) == 2**60
    big = 2**53 + 1
    integers = np.array([big, big + 1])
    assert relu_xp.relu(integers, threshold=big).tolist() == [0, big + 1]
