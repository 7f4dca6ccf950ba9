"""CReLU: two halves along an axis, and a gradient of the shape of x."""

from __future__ import annotations

import numpy as np
import pytest

import relu_xp
from relu_xp import CReLU

X = np.ones((2, 3))


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3), 1), ((4, 3), 0), ((2, 3, 4), -1), ((0, 2), 1)]
)
def test_it_concatenates_along_an_axis(xp, shape, axis):
    host = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    y, pullback = relu_xp.crelu_vjp(xp.array(host), axis=axis)
    expected = np.concatenate([np.maximum(host, 0), np.maximum(-host, 0)], axis)
    np.testing.assert_array_equal(xp.numpy(y), expected)
    np.testing.assert_array_equal(xp.numpy(relu_xp.crelu(xp.array(host), axis=axis)), expected)
    np.testing.assert_array_equal(xp.numpy(CReLU(axis)(xp.array(host))), expected)
    np.testing.assert_array_equal(xp.numpy(pullback(xp.array(expected))), host)


def test_x_needs_the_axis():
    for x, axis in ((np.ones(()), 1), (np.ones(3), 1), (X, 2), (X, -3), (X, 2**63 - 1)):
        for call in (relu_xp.crelu, relu_xp.crelu_vjp):
            with pytest.raises(
                ValueError, match=f"^{call.__name__}: x has shape .* no axis {axis}"
            ):
                call(x, axis=axis)
        with pytest.raises(ValueError, match=f"^forward: x has shape .* no axis {axis}"):
            CReLU(axis).forward(x)


def test_shapes_are_those_of_either_pass():
    with pytest.raises(ValueError, match=r"^crelu: out has shape \(2, 3\), .*\(2, 6\)$"):
        relu_xp.crelu(X, out=X)
    y = np.ones((2, 6))
    with pytest.raises(ValueError, match="^crelu: out overlaps an input"):
        relu_xp.crelu(y[:, :3], out=y)
    _, pullback = relu_xp.crelu_vjp(X)
    with pytest.raises(ValueError, match=r"^pullback: out has shape \(2, 6\), .*\(2, 3\)$"):
        pullback(y, out=y)


def test_it_cannot_work_in_place():
    layer = CReLU()
    with pytest.raises(ValueError, match="^CReLU .*in place"):
        layer.inplace = True
    layer.inplace = False
    assert repr(layer) == "CReLU(axis=1)"
