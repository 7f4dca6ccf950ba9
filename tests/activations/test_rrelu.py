"""RReLU: who draws its slopes, between which bounds, and what of that is kept."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from libraries import LIBRARIES
from table import DTYPES

import relu_xp
from relu_xp import RReLU

X = -np.ones((2, 3), np.float32)


def rng(seed=7):
    return np.random.default_rng(seed)


def test_in_evaluation_it_is_leaky_with_the_mean(xp):
    host = np.linspace(-4, 4, 99).astype(DTYPES[xp.dtypes[0]])
    x, mean = xp.array(host), 0.25 + (0.625 - 0.25) / 2
    y, pullback = relu_xp.rrelu_vjp(x, 0.25, 0.625)
    wanted = xp.numpy(relu_xp.leaky_relu(x, mean))
    for found in (y, relu_xp.rrelu(x, 0.25, 0.625), RReLU(0.25, 0.625)(x, training=False)):
        np.testing.assert_array_equal(xp.numpy(found), wanted)
    wanted = xp.numpy(relu_xp.relu_backward(x, x, negative_slope=mean))
    np.testing.assert_array_equal(xp.numpy(pullback(x)), wanted)
    assert isinstance(pullback, relu_xp.Pullback)


def test_in_training_each_element_has_a_slope(xp, dtype):
    """The slopes that the generator gives, in its order; what is above 0 stays what it is."""
    host = np.linspace(-4, 4, 999).astype(DTYPES[dtype]).reshape(27, 37)
    x = xp.array(host)
    y, pullback = relu_xp.rrelu_vjp(x, 0.25, 0.75, rng=rng())
    found = xp.numpy(y)
    if xp.name != "dask":  # whose engine draws, from a seed that the generator gives
        wide = "float64" if dtype == "float64" else "float32"
        slopes = (rng().random(host.shape, dtype=wide) * 0.5 + 0.25).astype(host.dtype)
        np.testing.assert_array_equal(found, np.where(host <= 0, slopes * host, host))
    else:
        low = host < 0
        slopes = found[low].astype(float) / host[low].astype(float)
        assert 0.24 < slopes.min() < 0.3 < 0.7 < slopes.max() < 0.76
        np.testing.assert_array_equal(found[~low], host[~low])
    np.testing.assert_array_equal(xp.numpy(pullback(xp.array(-host))), -found)
    generator = rng()
    again = relu_xp.rrelu(x, 0.25, 0.75, rng=generator)
    other = relu_xp.rrelu(x, 0.25, 0.75, rng=generator)
    np.testing.assert_array_equal(xp.numpy(again), found)
    assert (xp.numpy(other) != found).any()
    layer = RReLU(0.25, 0.75, rng=rng())
    np.testing.assert_array_equal(xp.numpy(layer(x)), found)
    np.testing.assert_array_equal(xp.numpy(layer.backward(xp.array(-host))), -found)


def test_the_gradient_is_that_of_x_also_where_y_overwrites_it():
    x = np.array([-2.0, 3.0, -1.0])
    y, pullback = relu_xp.rrelu_vjp(x, -0.75, -0.5, rng=lambda shape: np.zeros(shape), out=x)
    assert y is x
    assert (y.tolist(), pullback(np.ones(3)).tolist()) == ([1.5, 3, 0.75], [-0.75, 1, -0.75])


# cupy_host has this package's kernels only: the arithmetic of CuPy needs a device.
@pytest.mark.libraries(names=[name for name in LIBRARIES if not name.startswith("cupy_host")])
def test_a_function_of_a_shape_draws_in_the_library_of_x(xp):
    host = np.linspace(-2, 1, 12, dtype=np.float32).reshape(3, 4)
    random = np.linspace(0, 0.75, 12, dtype=np.float32).reshape(3, 4)

    def draw(shape):
        assert shape == (3, 4)
        return xp.array(random.copy())

    y = relu_xp.rrelu(xp.array(host), 1.0, 2.0, rng=draw)
    np.testing.assert_array_equal(xp.numpy(y), np.where(host <= 0, (random + 1) * host, host))


def test_bounds_are_real_numbers_of_any_kind():
    for bounds in ((np.float64(0.1), np.float64(0.3)), (Fraction(1, 8), Fraction(1, 3)), (0, 1)):
        _, pullback = relu_xp.rrelu_vjp(X, *bounds, rng=rng())
        assert pullback(X).dtype == np.float32
        assert pullback.saved_nbytes == 4 * X.size
    _, pullback = relu_xp.rrelu_vjp(X, rng=rng().random)
    assert pullback.saved_nbytes == 8 * X.size, "what a function returns is kept as it is"
    with np.errstate(all="raise"):
        relu_xp.rrelu(X, 0.0, 1e-40, rng=rng())


@pytest.mark.parametrize(
    ("bounds", "error", "match"),
    [
        ((0.5, 0.2), ValueError, r"^lower .*upper, got lower=0\.5, upper=0\.2$"),
        ((0.5, "1"), TypeError, "^upper must be a real number, got str"),
        ((math.nan,), ValueError, "^lower must be finite, got nan"),
        ((-1.7e308, 1.7e308), ValueError, r"^upper - lower must be finite, got lower=-1\.7e\+308"),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds, error, match):
    for call in (
        lambda: relu_xp.rrelu(X, *bounds),
        lambda: relu_xp.rrelu_vjp(X, *bounds, rng=rng()),
        lambda: RReLU(*bounds),
    ):
        with pytest.raises(error, match=match):
            call()


def test_integers_have_none_even_where_the_mean_is_one():
    x = np.ones(2, int)
    for name, call in (
        ("rrelu", lambda: relu_xp.rrelu(x, 0, 2)),
        ("rrelu_vjp", lambda: relu_xp.rrelu_vjp(x, 0, 2)),
        ("forward", lambda: RReLU(0, 2).forward(x, training=False)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: x has dtype int64"):
            call()


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (3, TypeError, "rng must .* int"),
        ("seed", TypeError, "rng must .* str"),
        (lambda shape: np.ones(2), ValueError, r"rng .*\(2,\).*\(2, 3\)"),
        (lambda shape: np.ones(shape, complex), TypeError, "rng .*complex128"),
        (lambda shape: [0.5], TypeError, "rng "),
        (lambda shape: None, TypeError, "rng "),
    ],
    ids=["int", "str", "shape", "complex", "list", "None"],
)
def test_an_rng_that_does_not_draw_is_refused_and_nothing_changed(bad, error, match):
    out, layer = np.full_like(X, 7), RReLU(rng=rng())
    layer.forward(X)
    nbytes, layer.rng = layer.saved_nbytes, bad
    for name, call in (
        ("rrelu", lambda: relu_xp.rrelu(X, rng=bad, out=out)),
        ("rrelu_vjp", lambda: relu_xp.rrelu_vjp(X, rng=bad, out=out)),
        ("forward", lambda: layer.forward(X, out=out)),
    ):
        with pytest.raises(error, match=f"^{name}: .*{match}"):
            call()
    assert (out == 7).all()
    assert layer.saved_nbytes == nbytes
    assert layer.backward(X).shape == X.shape


def test_what_an_rng_raises_is_raised_and_slopes_of_another_library_are_refused(require):
    with pytest.raises(ZeroDivisionError, match="^division by zero$"):
        relu_xp.rrelu(X, rng=lambda shape: np.arange(1 / 0))
    there = require("array_api_strict").ones((2, 3))
    with pytest.raises(TypeError, match=r"^rrelu: x is NumPy, .*rng .*is array_api_strict"):
        relu_xp.rrelu(X, rng=lambda shape: there)


def test_what_a_layer_is_made_of():
    generator = rng()
    layer = RReLU(rng=generator)
    assert layer.bounds == (1 / 8, 1 / 3)
    assert layer.rng is generator
    assert repr(RReLU(0.25, 0.5, inplace=True)) == "RReLU(0.25, 0.5, inplace=True)"
    one, other = RReLU(), RReLU()
    assert (one(X) != other(X)).any(), "each is seeded freshly"
