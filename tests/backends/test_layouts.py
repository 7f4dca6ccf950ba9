"""Rule A1: every layout of x and dy; and the order of the mask, in memory of the caller's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from table import CASES, DTYPES, OTHERS, ROWS, x_gradient

import relu_xp


def same(xp, found, wanted):
    """Raise AssertionError unless a result has these values, and signs of zero."""
    one, other = (np.asarray(a, np.float64) for a in (xp.numpy(found), wanted))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(np.signbit(one) & (one == 0), np.signbit(other) & (other == 0))


def laid_out(values, order):
    """Return an array with axes in an order of memory, from the slowest to the fastest."""
    return values.transpose(order).copy().transpose(np.argsort(order).tolist())


# ---- A1: every layout ---------------------------------------------------------------------------

VALUES = [-np.inf, -3.5, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 2.0, 7.0, np.inf, np.nan]


@st.composite
def views(draw, dtypes, shape):
    """Draw an array of a shape with strides of any sign and order, offsets and gaps."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in shape]
    outer = [n * abs(step) + draw(st.integers(0, 2)) for n, step in zip(shape, steps, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    base = laid_out(rng.choice(VALUES, outer).astype(DTYPES[draw(st.sampled_from(dtypes))]), order)
    parts = [
        slice(m - n * abs(step), None, abs(step))
        for n, step, m in zip(shape, steps, outer, strict=True)
    ]
    flips = [slice(None, None, -1 if step < 0 else 1) for step in steps]
    return base[(*parts, ...)][(*flips, ...)]  # the ellipsis: a 0-d array stays an array


@pytest.mark.libraries("writable")
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_layout(xp, data):
    """One shape, two layouts, two dtypes; dy is also broadcast, as the gradient of a sum is."""
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    kept = tuple(1 if data.draw(st.sampled_from([False, False, True])) else n for n in shape)
    x = data.draw(views(xp.dtypes, shape))
    dy = np.broadcast_to(data.draw(views(xp.dtypes, kept)), shape)
    before = x.tobytes(), dy.tobytes()
    out = xp.array(data.draw(views((x.dtype.name,), shape))) if xp.strided else None
    case = data.draw(st.sampled_from(list(CASES.values())))
    flat_x, flat_dy = xp.array(x.flatten()), xp.array(dy.flatten())
    forward = xp.numpy(relu_xp.relu(flat_x, **case)).reshape(shape)
    backward = xp.numpy(relu_xp.relu_backward(flat_dy, flat_x, **case)).reshape(shape)
    y, pullback = relu_xp.relu_vjp(xp.array(x), **case)
    for found, wanted in (
        (y, forward),
        (relu_xp.relu(xp.array(x), **case), forward),
        (pullback(xp.array(dy)), backward),
        (relu_xp.relu_backward(xp.array(dy), xp.array(x), **case), backward),
    ):
        same(xp, found, wanted)
    y, pullback = relu_xp.relu_vjp(xp.array(x), **case, out=out)
    assert out is None or y is out
    same(xp, y, forward)
    same(xp, pullback(xp.array(dy)), backward)
    assert before == (x.tobytes(), dy.tobytes())


ORDERS = list(itertools.permutations(range(3)))
# Shapes, and the order of their axes in memory.
DENSE = [
    *(((3, 5, 7), order) for order in ORDERS),
    *(((4, 1, 9), order) for order in ORDERS),
    ((2, 5, 3, 7), (0, 2, 3, 1)),  # NHWC, seen as NCHW
    ((1, 2, 1, 3, 5), (4, 0, 1, 3, 2)),
    ((300, 401), (1, 0)),
    ((70, 30, 40), (1, 2, 0)),
    ((0, 3, 2), (2, 0, 1)),
    ((9,), (0,)),
    ((), ()),
]
# What is not dense, made of an array of three axes.
SPARSE = {
    "reversed": lambda a: a[::-1],
    "reversed Fortran": lambda a: np.asfortranarray(a)[:, ::-1],
    "reversed along all axes": lambda a: a.transpose(2, 0, 1)[::-1, ::-1, ::-1],
    "gaps": lambda a: a[:, ::2],
    "gaps, permuted": lambda a: a.transpose(1, 2, 0)[:, 1:],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "windows": lambda a: sliding_window_view(a, 2, 0),
}


def strides_like(x):
    """Return the strides of a result: those of a broadcast view are no layout."""
    is_broadcast = any(s == 0 and n > 1 for s, n in zip(x.strides, x.shape, strict=True))
    return (np.empty(x.shape, x.dtype) if is_broadcast else np.empty_like(x)).strides


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("name", ["relu", "prelu", "bias_relu", "rrelu", "squared_relu", "crelu"])
def test_a_broadcast_gradient_is_in_the_layout_of_x(xp, name):
    """It is that of a sum or a mean; a result in the order of its strides would be transposed."""
    for order in ORDERS:
        x = laid_out(np.ones((3, 5, 7), np.float32), order)
        y, pullback = ROWS[name].call_vjp(xp, xp.array(x))
        for axis in range(3):
            row = np.ones(y.shape, np.float32).sum(axis, keepdims=True)
            dx = x_gradient(pullback(xp.array(np.broadcast_to(row, y.shape))))
            assert dx.strides == x.strides
    rows = xp.array(np.broadcast_to(np.ones((1, 5, 7), np.float32), (3, 5, 7)))
    if name != "crelu":
        assert x_gradient(ROWS[name].call_vjp(xp, rows)[1](rows)).strides == (140, 28, 4)
    if name == "relu":
        dx = relu_xp.relu_backward(xp.array(np.broadcast_to(row, x.shape)), xp.array(x))
        assert dx.strides == x.strides


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("shape", [(3, 5, 7), (30, 40, 50)], ids=str)
def test_the_layout_of_x_is_kept(xp, shape):
    host = np.ones(shape, np.float32)
    for x in [laid_out(host, order) for order in ORDERS] + [view(host) for view in SPARSE.values()]:
        dy = np.ones(x.shape, x.dtype)
        for case in ({}, {"negative_slope": 0.5}):
            y, pullback = relu_xp.relu_vjp(xp.array(x), **case)
            results = [y, relu_xp.relu(xp.array(x), **case), relu_xp.relu_grad(xp.array(x))]
            results.append(relu_xp.relu_backward(xp.array(dy), xp.array(x), **case))
            assert {a.strides for a in results} == {strides_like(x)}
            assert pullback(xp.array(dy)).strides == dy.strides
            _, pullback = relu_xp.relu_vjp(xp.array(dy), **case)
            assert pullback(xp.array(x)).strides == strides_like(x)


@pytest.mark.libraries("ndarray")
@pytest.mark.parametrize("name", OTHERS)
def test_the_layouts_of_other_functions(xp, name):
    """As x, as dy; of CReLU in C order, and its gradient as x."""
    for order in ORDERS:
        x = laid_out(np.ones((3, 5, 7)), order)
        y, pullback = ROWS[name].call_vjp(xp, x)
        dy = laid_out(np.ones(y.shape), (order[1], order[2], order[0]))
        dx = x_gradient(pullback(dy))
        assert y.strides == (np.ones(y.shape) if name == "crelu" else x).strides
        assert dx.strides == (x if name == "crelu" else dy).strides


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_of_every_layout(xp, name):
    rng = np.random.default_rng(5)
    base = rng.standard_normal((8, 12, 10)).astype(np.float32)
    slopes = rng.standard_normal(24).astype(np.float32)[::4]
    for view in (
        lambda a: a[::2, ::2, ::-1],
        lambda a: np.asfortranarray(a)[1:5, 6:],
        lambda a: a.transpose(2, 0, 1)[:4, 1:7, :10],
    ):
        host = view(base)
        if name == "prelu":
            (y, pullback), (wanted, other) = (
                relu_xp.prelu_vjp(xp.array(x), xp.array(weight))
                for x, weight in ((host, slopes), (host.copy(), slopes.copy()))
            )
        else:
            (y, pullback), (wanted, other) = (
                ROWS[name].call_vjp(xp, xp.array(x)) for x in (host, host.copy())
            )
        same(xp, y, xp.numpy(wanted))
        gradient = np.broadcast_to(np.float32(2), wanted.shape)
        found, expected = pullback(xp.array(gradient)), other(xp.array(gradient.copy()))
        same(xp, x_gradient(found), xp.numpy(x_gradient(expected)))
        if ROWS[name].learns:
            np.testing.assert_allclose(xp.numpy(found[1]), xp.numpy(expected[1]), rtol=1e-6)


def test_tensors_of_every_dense_layout(require):
    torch = require("torch")
    values = np.random.default_rng(3).standard_normal((3, 5, 7), np.float32)
    tensors = [torch.from_numpy(laid_out(values, order)) for order in ORDERS]
    tensors.append(torch.randn(2, 5, 3, 7).to(memory_format=torch.channels_last))
    for x in tensors:
        y, pullback = relu_xp.relu_vjp(x, negative_slope=0.5)
        assert y.stride() == x.stride()
        for dy in (x, x.contiguous()):
            dx = pullback(dy)
            assert torch.equal(dx, torch.where(x > 0, dy, dy * 0.5))
            assert dx.stride() == dy.stride()


@pytest.mark.libraries("ndarray")
def test_memory_of_every_kind(xp, tmp_path):
    """Read-only, mapped from a file, unaligned; an axis of length 1 may have any stride."""
    host = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 5))
    unaligned = np.zeros(61, np.uint8)[1:].view(np.float32).reshape(3, 5)
    mapped[:] = unaligned[:] = host
    locked = host.copy()
    locked.flags.writeable = False
    for x in (mapped, unaligned, locked):
        for case in CASES.values():
            y, pullback = relu_xp.relu_vjp(x, **case)
            wanted, other = relu_xp.relu_vjp(host, **case)
            results = [y, relu_xp.relu(x, **case), pullback(x), relu_xp.relu_backward(x, x, **case)]
            assert {type(result) for result in results} == {np.ndarray}
            for result, expected in zip(results, [wanted] * 2 + [other(host)] * 2, strict=True):
                np.testing.assert_array_equal(result, expected)
    for x in (mapped, unaligned, host[:1]):
        wanted, out = np.maximum(x, 0), x[::2] if len(x) == 1 else x
        assert relu_xp.relu(x, out=out) is out
        np.testing.assert_array_equal(x, wanted)


# ---- The mask: its order, and memory of the caller's --------------------------------------------


def check_mask(xp, x, in_order):
    """Compare the masks of an array with what `in_order` makes of its branches.

    And what backward makes of them, whatever the layout of a gradient is.
    """
    gradient = np.random.default_rng(4).standard_normal(x.shape, np.float32)
    gradients = [gradient]
    if x.ndim:
        gradients += [np.asfortranarray(gradient), np.flip(np.flip(gradient).copy())]
        gradients += [laid_out(gradient, (*range(1, x.ndim), 0))]
        gradients += [np.broadcast_to(gradient[:1], x.shape)]
    for case in CASES.values():
        t, b = case.get("threshold", 0.0), case.get("positive_slope", 1.0)
        a, c = case.get("negative_slope", 0.0), case.get("max_value", np.inf)
        branches = (x > t) * (1 + (b * x >= c)).astype(np.uint8)
        wanted = in_order(branches)
        if not ("max_value" in case and a):
            wanted = np.packbits(wanted == 1, bitorder="little")
        mask = xp.array(np.full(wanted.size + 20, 0x5A, np.uint8))
        for values in (np.asarray(-x), x):  # the second pass overwrites what the first has left
            _, masked = relu_xp.relu_vjp(xp.array(values), mask=mask, **case)
        got = xp.numpy(mask)
        np.testing.assert_array_equal(got[: wanted.size], wanted)
        assert wanted.size <= masked.saved_nbytes <= wanted.size + 7
        assert (got[masked.saved_nbytes :] == 0x5A).all(), "written behind the mask"
        _, pullback = relu_xp.relu_vjp(xp.array(x), **case)
        factors = np.choose(branches, np.array([a, b, 0], np.float32))
        for dy in gradients:
            expected = np.where(factors == 0, 0, factors * dy)
            for call in (pullback, masked):
                np.testing.assert_array_equal(xp.numpy(call(xp.array(dy))), expected)


@pytest.mark.libraries("strided")
@pytest.mark.parametrize(("shape", "order"), DENSE, ids=str)
def test_the_mask_of_a_dense_array_is_in_the_order_of_memory(xp, shape, order):
    values = np.random.default_rng(3).standard_normal(shape, np.float32)
    check_mask(xp, laid_out(values, order), lambda a: a.transpose(order).ravel())


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("view", SPARSE)
@pytest.mark.parametrize("shape", [(5, 6, 7), (50, 30, 40)], ids=str)
def test_the_mask_of_any_other_array_is_in_c_order(xp, shape, view):
    x = SPARSE[view](np.random.default_rng(3).standard_normal(shape, np.float32))
    check_mask(xp, x, np.ravel)


@pytest.mark.libraries("strided")
def test_a_mask_that_cannot_be_used_is_refused(xp):
    host = np.arange(-40.0, 40.0, dtype=np.float32)
    memory = xp.array(host.copy())
    x, out, memory_bytes = memory[:40], memory[40:], memory.view(np.uint8)
    for mask, error, word in (
        (xp.array(np.zeros(4, np.uint8)), ValueError, "4 bytes"),
        (xp.array(np.zeros(40, np.int8)), TypeError, "int8"),
        (xp.array(np.zeros((5, 8), np.uint8)), ValueError, r"shape \(5, 8\)"),
        (xp.array(np.zeros(40, np.uint8)[::2]), ValueError, "strides"),
        (memory_bytes[:5], ValueError, "overlaps"),
        (memory_bytes[160:165], ValueError, "overlaps"),
        ([0] * 5, TypeError, "list"),
    ):
        with pytest.raises(error, match=f"^relu_vjp: mask .*{word}"):
            relu_xp.relu_vjp(x, out=out, mask=mask)
        with pytest.raises(error, match=f"^forward: mask .*{word}"):
            relu_xp.ReLU().forward(x, out=out, mask=mask)
    np.testing.assert_array_equal(xp.numpy(memory), host)
    one = memory[:1]  # whose bytes begin where it does, with strides that are never taken
    with pytest.raises(ValueError, match="^relu_vjp: mask overlaps an input"):
        relu_xp.relu_vjp(one, mask=one.view(np.uint8)[:1])


def test_a_mask_is_refused_where_it_is_read_only_or_of_no_use(require):
    mask = np.zeros(1, np.uint8)
    with pytest.raises(TypeError, match="^relu_vjp: mask was given, but x is array_api_strict"):
        relu_xp.relu_vjp(require("array_api_strict").ones(3), mask=mask)
    mask.flags.writeable = False
    with pytest.raises(ValueError, match="^relu_vjp: mask is read-only"):
        relu_xp.relu_vjp(np.ones(3), mask=mask)


@pytest.mark.libraries("strided")
def test_a_gradient_over_the_mask_that_it_is_made_of_is_refused(xp):
    """A mask of the caller's is memory that an out may overlap."""
    memory, values = xp.array(np.zeros(64, np.float32)), np.arange(-32.0, 32.0, dtype=np.float32)
    x, mask = xp.array(values), memory.view(np.uint8)[8:16]
    _, pullback = relu_xp.relu_vjp(x, mask=mask)
    before = xp.numpy(mask).copy()
    with pytest.raises(ValueError, match="^pullback: out overlaps an input"):
        pullback(x, out=memory)
    layer = relu_xp.ReLU(inplace=True)
    layer.forward(xp.array(values.copy()), mask=mask)
    with pytest.raises(ValueError, match="^backward: dy, .*overwritten, overlaps"):
        layer.backward(memory)
    np.testing.assert_array_equal(xp.numpy(mask), before)
    np.testing.assert_array_equal(xp.numpy(pullback(x)), np.maximum(values, 0))


@pytest.mark.libraries("strided")
def test_a_mask_between_the_elements_of_an_input(xp):
    host = np.random.default_rng(8).standard_normal((4, 64)).astype(np.float32)
    memory = xp.array(host)
    mask = memory[1].view(np.uint8)[8:24]
    y, pullback = relu_xp.relu_vjp(memory[::2], mask=mask)
    np.testing.assert_array_equal(xp.numpy(mask), np.packbits(host[::2] > 0, bitorder="little"))
    np.testing.assert_array_equal(xp.numpy(pullback(y)), np.maximum(host[::2], 0))
