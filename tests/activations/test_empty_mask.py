"""empty_mask: an array for `mask`, of the right size, library and device."""

from __future__ import annotations

import numpy as np
import pytest
from table import CASES, DTYPES

import relu_xp

SHAPES = [
    ((), 1, 1),
    ((0, 3), 0, 0),
    ((7,), 1, 7),
    ((8,), 1, 8),
    ((3, 3), 2, 9),
    ((40, 25), 125, 1000),
]


@pytest.mark.libraries("strided")
@pytest.mark.parametrize(("shape", "bits", "nbytes"), SHAPES, ids=str)
def test_its_size(xp, shape, bits, nbytes):
    """One bit an element, or a byte with three branches; the dtype of x does not matter."""
    for dtype in (xp.dtypes[0], xp.dtypes[-1]):
        x = xp.array(np.ones(shape, DTYPES[dtype]))
        for case in CASES.values():
            mask = relu_xp.empty_mask(x, **case)
            assert type(mask) is type(x)
            wanted = nbytes if case == CASES["three branches"] else bits
            assert (mask.shape, mask.dtype) == ((wanted,), np.uint8)


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_forward_pass_takes_it(xp, case):
    """In any layout, for functions and layers; a mask that is one byte shorter is refused."""
    host = np.random.default_rng(2).standard_normal((6, 9)).astype(np.float32)
    bias = xp.array(np.zeros(9, np.float32))
    layer = relu_xp.BiasReLU(9, **case)
    layer.params[0] = bias
    relu = relu_xp.ReLU(**case)
    for view in (host, host.T.copy().T, np.repeat(host, 2, 1)[:, ::2]):
        x = xp.array(view)
        mask = relu_xp.empty_mask(x, **case)
        wanted, pullback = relu_xp.relu_vjp(x, **case)
        for forward in (
            lambda x, mask: relu_xp.relu_vjp(x, mask=mask, **case),
            lambda x, mask: relu_xp.bias_relu_vjp(x, bias, mask=mask, **case),
            lambda x, mask: (relu(x, mask=mask), relu.backward),
            lambda x, mask: (layer(x, mask=mask), layer.backward),
        ):
            y, backward = forward(x, mask)
            dx = backward(x)
            dx = dx[0] if isinstance(dx, tuple) else dx
            np.testing.assert_array_equal(xp.numpy(y), xp.numpy(wanted))
            np.testing.assert_array_equal(xp.numpy(dx), xp.numpy(pullback(x)))
            with pytest.raises(ValueError, match=": mask has "):
                forward(x, mask[1:])
    assert relu_xp.empty_mask(x, **layer.activation._asdict()).shape == mask.shape


def test_it_is_like_x_where_that_is_a_scalar_or_read_only():
    for x in (np.float32(1), np.broadcast_to(np.float32(1), 5)):
        mask = relu_xp.empty_mask(x)
        assert mask.shape == (1,)
        relu_xp.relu_vjp(x, mask=mask)


@pytest.mark.libraries(names=["array_api_strict", "torch", "jax", "dask"])
def test_libraries_that_take_no_mask(xp):
    """As the message says, the argument is omitted."""
    x = xp.array(np.ones(3, np.float32))
    message = "^empty_mask: x is .*, whose masks the library makes itself; omit mask=$"
    with pytest.raises(TypeError, match=message):
        relu_xp.empty_mask(x)
    relu_xp.relu_vjp(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x must be an array, got list"),
        (np.arange(3), "x has dtype int64, which has no gradient"),
        (np.ones(3, bool), "x: unsupported dtype bool"),
        (np.ma.ones(3), "x is a numpy.ma.MaskedArray"),
    ],
)
def test_what_has_no_mask(x, message):
    with pytest.raises(TypeError, match=f"^empty_mask: {message}"):
        relu_xp.empty_mask(x)
