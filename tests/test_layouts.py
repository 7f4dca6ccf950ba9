"""Rules A1 to A4: every shape, stride and overlap; nothing written that was not asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import relu_xp
from relu_xp import backends
from relu_xp import mask as masks
from relu_xp.testing import oracle

MEMBERS = ("relu", "everything", "relu6", "tiny-slope-clipped")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


@st.composite
def views(draw, dtype, shape):
    """Draw an array of a shape with strides of any sign and order, offsets and gaps."""
    ndim = len(shape)
    order = draw(st.permutations(range(ndim)))
    steps = [draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in range(ndim)]
    offsets = [draw(st.integers(0, 2)) for _ in range(ndim)]
    form = oracle.Format(dtype)
    outer = [
        (shape[axis] - 1) * abs(steps[axis]) + 1 + offsets[axis] if shape[axis] else 0
        for axis in order
    ]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    size = int(np.prod(outer, dtype=int))
    drawn = rng.choice(oracle.specials(dtype), size)
    base = drawn.reshape(outer).view(form.dtype)
    base = base.transpose(np.argsort(order)) if ndim else base
    index = []
    for step, offset, length in zip(steps, offsets, shape, strict=True):
        part = slice(offset, offset + (length - 1) * abs(step) + 1, abs(step))
        index.append(part if length else slice(0, 0))
    view = base[(*index, ...)]  # the ellipsis: a 0-d array is to stay one
    return view[(*[slice(None, None, -1 if s < 0 else 1) for s in steps], ...)]


@st.composite
def passes(draw, xp):
    """Draw x and dy: one shape, two layouts, two dtypes; dy also broadcast, or read-only."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    x = draw(views(draw(st.sampled_from(xp.dtypes)), shape))
    if draw(st.booleans()):
        dy = draw(views(draw(st.sampled_from(xp.dtypes)), shape))
    else:
        kept = tuple(1 if draw(st.booleans()) else n for n in shape)
        dy = np.broadcast_to(draw(views(draw(st.sampled_from(xp.dtypes)), kept)), shape)
    assert x.shape == dy.shape == shape
    return x, dy


def bits(x, any_nan=True):
    """Return the bits of an array in C order, every NaN the same one."""
    form = oracle.Format(x.dtype.name)
    patterns = np.ascontiguousarray(x).view(form.unsigned)
    nan = (patterns & (form.sign - 1)) > form.infinity
    return np.where(nan, form.sign - 1, patterns).reshape(x.shape)


def exact(xp, x):
    """Leave out subnormals where the library does."""
    if xp.subnormals:
        return x
    form = oracle.Format(x.dtype.name)
    patterns = x.view(form.unsigned)
    tiny = (patterns & (form.sign - 1)) <= 1 << (form.fraction + (x.dtype.name == "float16") * 14)
    return np.where(tiny, 0, patterns).astype(patterns.dtype).view(x.dtype)


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_every_layout(xp, data):
    x, dy = data.draw(passes(xp))
    x, dy = (exact(xp, np.array(a)) if not xp.subnormals else a for a in (x, dy))
    before = bits(x), bits(dy)
    for member in MEMBERS:
        numbers = oracle.MEMBERS[member]
        forward, backward = expected(member, x, dy)
        y, pullback = relu_xp.relu_vjp(xp.array(x), **numbers)
        results = {
            "y": (y, forward),
            "relu": (relu_xp.relu(xp.array(x), **numbers), forward),
            "pullback": (pullback(xp.array(dy)), backward),
            "backward": (relu_xp.relu_backward(xp.array(dy), xp.array(x), **numbers), backward),
        }
        for name, (result, wanted) in results.items():
            got = xp.numpy(result)
            assert got.shape == x.shape, name
            kept = mask_of_exact(xp, got, wanted)
            np.testing.assert_array_equal(bits(got)[kept], wanted[kept], err_msg=name)
    assert np.array_equal(before[0], bits(x)), "x was written"
    assert np.array_equal(before[1], bits(dy)), "dy was written"


def mask_of_exact(xp, got, wanted):
    form = oracle.Format(got.dtype.name)
    if xp.subnormals:
        return np.ones(got.shape, bool)
    limit = 1 << (form.fraction + (got.dtype.name == "float16") * 14)
    magnitude = wanted & (form.sign - 1)
    return (magnitude == 0) | (magnitude > limit)


def expected(member, x, dy):
    """Return the oracle's y and dx as bits, every NaN the same one."""
    of_x, of_dy = (oracle.members(a.dtype.name)[member] for a in (x, dy))
    forward, backward = [], []
    for one, other in zip(bits_as_they_are(x), bits_as_they_are(dy), strict=True):
        forward.append(of_x.forward(one))
        backward.append(of_dy.backward(of_x.piece(one), other))
    return tuple(
        bits(oracle.Expected(of.form, found).bits.view(of.form.dtype)).reshape(x.shape)
        for of, found in ((of_x, forward), (of_dy, backward))
    )


def bits_as_they_are(x):
    return np.ascontiguousarray(x).view(oracle.Format(x.dtype.name).unsigned).ravel().tolist()


@pytest.mark.parametrize("fortran", [False, True])
def test_large_broadcast_gradients(xp, fortran):
    """The gradient of a sum, over all axes or one, is a broadcast array."""
    x = np.random.default_rng(6).standard_normal((300, 400)).astype(np.float32)
    x = np.asfortranarray(x) if fortran else x
    for small in (np.float32(3), np.arange(400, dtype=np.float32), np.ones((300, 1), np.float32)):
        dy = np.broadcast_to(small, x.shape)
        wanted = np.where(x > 0, dy, np.float32(0))
        np.testing.assert_array_equal(
            xp.numpy(relu_xp.relu_vjp(xp.array(x))[1](xp.array(dy))), wanted
        )
        got = relu_xp.relu_backward(xp.array(dy), xp.array(x))
        np.testing.assert_array_equal(xp.numpy(got), wanted)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1)])
def test_0d_and_empty_arrays_stay_arrays(xp, dtype, shape):
    x = np.full(shape, -2.5, oracle.DTYPES[dtype])
    x += np.arange(x.size).reshape(shape).astype(x.dtype)
    dy = np.ones(shape, x.dtype)
    for numbers in ({}, {"negative_slope": 0.5, "max_value": 1.0}):
        y, pullback = relu_xp.relu_vjp(xp.array(x), **numbers)
        results = [
            y,
            relu_xp.relu(xp.array(x), **numbers),
            relu_xp.relu_grad(xp.array(x), **numbers),
            relu_xp.relu_backward(xp.array(dy), xp.array(x), **numbers),
            pullback(xp.array(dy)),
        ]
        for result in results:  # `numpy` asserts the exact type
            assert xp.numpy(result).shape == shape
            assert xp.numpy(result).dtype == x.dtype


def laid_out(values, order):
    """Return an array with axes in an order of memory, from the slowest to the fastest."""
    return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))


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
]
# What is not dense, made of an array of three axes.
SPARSE = {
    "reversed": lambda a: a[::-1],
    "reversed Fortran": lambda a: np.asfortranarray(a)[:, ::-1],
    "reversed whole": lambda a: a.transpose(2, 0, 1)[::-1, ::-1, ::-1],
    "gaps": lambda a: a[:, ::2],
    "gaps, permuted": lambda a: a.transpose(1, 2, 0)[:, 1:],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "windows": lambda a: np.lib.stride_tricks.sliding_window_view(a, 2, 0),
}


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("shape", [(3, 5, 7), (30, 40, 50)], ids=str)
def test_the_layout_of_x_is_kept(xp, shape):
    host = np.ones(shape, np.float32)
    views = [laid_out(host, order) for order in ORDERS] + [view(host) for view in SPARSE.values()]
    for x in views:
        dy = np.ones(x.shape, x.dtype)
        for numbers in ({}, {"negative_slope": 0.5}):
            y, pullback = relu_xp.relu_vjp(xp.array(x), **numbers)
            of_x = [y, relu_xp.relu(xp.array(x), **numbers), relu_xp.relu_grad(xp.array(x))]
            of_x.append(relu_xp.relu_backward(xp.array(dy), xp.array(x), **numbers))
            assert {a.strides for a in of_x} == {np.empty_like(x).strides}
            assert pullback(xp.array(dy)).strides == dy.strides
            _, pullback = relu_xp.relu_vjp(xp.array(dy), **numbers)
            assert pullback(xp.array(x)).strides == np.empty_like(x).strides


@pytest.mark.libraries("ndarray")
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_layouts_of_variants(xp, order):
    """As x, as dy; of CReLU in C order, and its gradient as x."""
    x = laid_out(np.random.default_rng(9).standard_normal((3, 5, 7)), order)
    dy = laid_out(np.ones(x.shape), (order[1], order[2], order[0]))
    for y, pullback in (
        relu_xp.prelu_vjp(x, np.full(5, 0.5)),
        relu_xp.rrelu_vjp(x, rng=np.random.default_rng(0)),
        relu_xp.squared_relu_vjp(x),
    ):
        dx = pullback(dy)
        assert y.strides == x.strides
        assert (dx[0] if isinstance(dx, tuple) else dx).strides == dy.strides
    y, pullback = relu_xp.crelu_vjp(x)
    assert y.flags.c_contiguous
    assert pullback(y).strides == x.strides


def check_mask(xp, x, in_order):
    """Compare the masks of an array with what `in_order` makes of which elements are kept.

    And what backward makes of them, whatever the layout of a gradient is.
    """
    gradient = np.random.default_rng(4).standard_normal(x.shape).astype(np.float32)
    gradients = [gradient, np.asfortranarray(gradient), laid_out(gradient, (*range(1, x.ndim), 0))]
    gradients += [np.flip(np.flip(gradient).copy()), np.broadcast_to(gradient[:1], x.shape)]
    for numbers in (
        {},
        {"max_value": 0.5},
        {"threshold": -0.5, "positive_slope": 2.0},
        {"max_value": 0.5, "negative_slope": 0.25},
    ):
        t, b = numbers.get("threshold", 0.0), numbers.get("positive_slope", 1.0)
        a, c = numbers.get("negative_slope", 0.0), numbers.get("max_value", np.inf)
        branches = (x > t) * (1 + (b * x >= c)).astype(np.uint8)
        if a:
            pieces, wanted = 3, in_order(branches)
        else:
            pieces, wanted = 2, np.packbits(in_order(branches == 1), bitorder="little")
        mask = np.full(wanted.size + 20, 0x5A, np.uint8)
        for memory in (None, xp.array(mask)):
            _, pullback = relu_xp.relu_vjp(xp.array(x), mask=memory, **numbers)
            got = xp.numpy(pullback._saved.data)
            np.testing.assert_array_equal(got[: wanted.size], wanted)
            assert wanted.size <= got.size <= wanted.size + 7
            assert pullback.saved_nbytes == got.nbytes
            on_host = masks.Mask(got, pullback._saved.axes)
            found = masks.unpack(on_host, x.shape, pieces)
            np.testing.assert_array_equal(found, branches if pieces == 3 else branches == 1)
            for dy in gradients:
                dx = xp.numpy(pullback(xp.array(dy)))
                factors = np.choose(branches, np.array([a, b, 0], np.float32))
                np.testing.assert_array_equal(dx, np.where(factors == 0, 0, factors * dy))
        assert memory is None or (xp.numpy(memory)[wanted.size + 7 :] == 0x5A).all()


@pytest.mark.libraries("strided")
@pytest.mark.parametrize(("shape", "order"), DENSE, ids=str)
def test_the_mask_counts_in_the_order_of_memory(xp, shape, order):
    values = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    check_mask(xp, laid_out(values, order), lambda keep: keep.transpose(order).ravel())


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("view", SPARSE)
@pytest.mark.parametrize("shape", [(5, 6, 7), (50, 30, 40)], ids=str)
def test_the_mask_of_other_arrays_counts_in_c_order(xp, shape, view):
    x = SPARSE[view](np.random.default_rng(3).standard_normal(shape).astype(np.float32))
    check_mask(xp, x, np.ravel)


@pytest.mark.libraries("strided")
def test_the_mask_of_a_0d_array_is_a_byte(xp):
    for value, wanted in ((-1.0, 0), (2.0, 1)):
        _, pullback = relu_xp.relu_vjp(xp.array(np.array(value)))
        assert xp.numpy(pullback._saved.data)[0] == wanted


@pytest.mark.parametrize("order", [*ORDERS, "channels_last"], ids=str)
def test_the_mask_of_tensors_counts_in_the_order_of_memory(require, order):
    torch = require("torch")
    if order == "channels_last":
        x = torch.randn(2, 5, 3, 7).to(memory_format=torch.channels_last)
        order = (0, 2, 3, 1)
    else:
        x = torch.from_numpy(laid_out(np.random.default_rng(3).standard_normal((3, 5, 7)), order))
    y, pullback = relu_xp.relu_vjp(x, negative_slope=0.5)
    keep = (x > 0).numpy()
    packed = np.packbits(keep.transpose(order), bitorder="little")
    np.testing.assert_array_equal(pullback._saved.data[: packed.size], packed)
    assert y.stride() == x.stride()
    for dy in (x, x.contiguous()):
        dx = pullback(dy)
        assert torch.equal(dx, torch.where(x > 0, dy, dy * 0.5))
        assert dx.stride() == dy.stride()


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 3), (9,), (61, 67)])
@pytest.mark.parametrize("numbers", [{}, {"negative_slope": 0.5, "max_value": 2.0}], ids=str)
def test_a_mask_in_memory_of_the_callers(xp, numbers, shape, fortran):
    """Filled, read, filled anew; as long as need be or longer, and nothing behind it written."""
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    x = np.array(x, order="F" if fortran else "C")
    dy = np.array(x + 1, order="F" if fortran else "C")
    needed = x.size if numbers else -(-x.size // 8)
    y, pullback = relu_xp.relu_vjp(xp.array(x), **numbers)
    wanted = xp.numpy(y), xp.numpy(pullback(xp.array(dy)))
    for spare in (0, 3, 200):
        memory = np.full(needed + spare, 0x5A, np.uint8)
        mask = xp.array(memory)
        for values in (np.asarray(-x), x):  # the second pass takes what the first has left
            y, again = relu_xp.relu_vjp(xp.array(values), mask=mask, **numbers)
        np.testing.assert_array_equal(xp.numpy(y), wanted[0])
        np.testing.assert_array_equal(xp.numpy(again(xp.array(dy))), wanted[1])
        got = xp.numpy(mask)
        bytes_of_pullback = xp.numpy(pullback._saved.data)
        np.testing.assert_array_equal(got[:needed], bytes_of_pullback[:needed])
        assert needed <= again.saved_nbytes <= needed + min(spare, 7)
        assert (got[again.saved_nbytes :] == 0x5A).all()
        layer = relu_xp.ReLU(**numbers)
        assert layer(xp.array(x), mask=mask) is not None
        np.testing.assert_array_equal(xp.numpy(layer.backward(xp.array(dy))), wanted[1])


@pytest.mark.libraries("strided")
def test_a_mask_that_does_not_fit_is_refused(xp):
    host = np.arange(-40.0, 40.0, dtype=np.float32)
    memory = xp.array(host.copy())
    x, out = memory[:40], memory[40:]
    bytes_of_it = memory.view(np.uint8)
    for mask, error, message in (
        (xp.array(np.zeros(4, np.uint8)), ValueError, "mask has 4 bytes, x needs 5"),
        (xp.array(np.zeros(40, np.int8)), TypeError, "mask has dtype int8; give an array of uint8"),
        (xp.array(np.zeros((5, 8), np.uint8)), ValueError, r"mask has shape \(5, 8\) and strides"),
        (xp.array(np.zeros(40, np.uint8)[::2]), ValueError, r"mask has shape \(20,\) and strides"),
        (bytes_of_it[:5], ValueError, "mask overlaps an input"),
        (bytes_of_it[160:165], ValueError, "mask overlaps an input"),
        ([0] * 5, TypeError, "mask must be an array, got list"),
    ):
        with pytest.raises(error, match=f"relu_vjp: {message}"):
            relu_xp.relu_vjp(x, out=out, mask=mask)
        with pytest.raises(error, match=f"forward: {message}"):
            relu_xp.ReLU().forward(x, out=out, mask=mask)
    np.testing.assert_array_equal(xp.numpy(memory), host)
    one = memory[:1]  # whose bytes begin where it does, with strides that are never taken
    with pytest.raises(ValueError, match="relu_vjp: mask overlaps an input"):
        relu_xp.relu_vjp(one, mask=one.view(np.uint8)[:1])


@pytest.mark.libraries("strided")
def test_a_gradient_over_the_mask_that_it_is_made_of_is_refused(xp):
    """A mask of the caller's is memory that an out may overlap, as ours is not."""
    memory = xp.array(np.zeros(64, np.float32))
    x = xp.array(np.arange(-32.0, 32.0, dtype=np.float32))
    mask = memory.view(np.uint8)[8:16]
    _, pullback = relu_xp.relu_vjp(x, mask=mask)
    before = xp.numpy(mask).copy()
    with pytest.raises(ValueError, match="pullback: out overlaps an input without being the same"):
        pullback(x, out=memory)
    layer = relu_xp.ReLU(inplace=True)
    layer.forward(xp.array(np.arange(-32.0, 32.0, dtype=np.float32)), mask=mask)
    with pytest.raises(ValueError, match="backward: dy, which is to be overwritten, overlaps"):
        layer.backward(memory)
    np.testing.assert_array_equal(xp.numpy(mask), before)
    np.testing.assert_array_equal(xp.numpy(pullback(x)), np.maximum(xp.numpy(x), 0))


def test_a_mask_where_there_is_none_is_refused(require):
    x = require("array_api_strict").ones(3)
    with pytest.raises(TypeError, match="relu_vjp: mask was given, but x is array_api_strict"):
        relu_xp.relu_vjp(x, mask=np.zeros(1, np.uint8))
    with pytest.raises(TypeError, match="relu_vjp: x is NumPy, mask is PyTorch"):
        relu_xp.relu_vjp(np.ones(3), mask=require("torch").zeros(1))


def test_a_mask_that_is_read_only_is_refused():
    mask = np.zeros(1, np.uint8)
    mask.flags.writeable = False
    with pytest.raises(ValueError, match="relu_vjp: mask is read-only"):
        relu_xp.relu_vjp(np.ones(3), mask=mask)


def test_the_mask_is_ours_alone(xp):
    """A3: overwriting x and y between forward and backward changes nothing."""
    x = np.array([-1.0, 2.0, 0.0, 5.0], np.float32)
    for numbers in ({}, {"negative_slope": 0.5, "max_value": 3.0}):
        mine = xp.array(x.copy())
        y, pullback = relu_xp.relu_vjp(mine, **numbers)
        if xp.name != "jax":  # its arrays cannot be written
            overwrite(xp, mine)
            overwrite(xp, y)
        dy = xp.array(np.ones(4, np.float32))
        wanted = [0.5, 1, 0.5, 0] if numbers else [0, 1, 0, 1]
        np.testing.assert_array_equal(xp.numpy(pullback(dy)), np.array(wanted, np.float32))


def overwrite(xp, x):
    if xp.name == "cupy_host":
        import ctypes

        ctypes.memset(x.data.ptr, 0xFF, x.nbytes)
    else:
        x[...] = -7.0


@pytest.mark.libraries("writable")
# With the last ones f(x) lies in another piece than x: a mask made too late would show.
@pytest.mark.parametrize(
    "numbers",
    [{}, {"negative_slope": 0.5, "max_value": 2.0}, {"threshold": 0.5, "positive_slope": 0.5}],
    ids=["relu", "three-pieces", "threshold"],
)
@pytest.mark.parametrize("size", [5, 200_003])
def test_out_is_written_and_returned(xp, numbers, size):
    rng = np.random.default_rng(4)
    host = rng.standard_normal(size).astype(np.float32) * 2
    gradient = rng.standard_normal(size).astype(np.float32)
    y = xp.numpy(relu_xp.relu(xp.array(host), **numbers)).copy()
    g = xp.numpy(relu_xp.relu_grad(xp.array(host), **numbers)).copy()
    dx = xp.numpy(relu_xp.relu_backward(xp.array(gradient), xp.array(host), **numbers)).copy()

    def fresh():
        return xp.array(np.full_like(host, 77.0))

    def check(result, out, wanted):
        assert result is out
        np.testing.assert_array_equal(xp.numpy(out), wanted)

    out = fresh()
    check(relu_xp.relu(xp.array(host), **numbers, out=out), out, y)
    out = fresh()
    check(relu_xp.relu_grad(xp.array(host), **numbers, out=out), out, g)
    out = fresh()
    result, pullback = relu_xp.relu_vjp(xp.array(host), **numbers, out=out)
    check(result, out, y)
    out = fresh()
    check(pullback(xp.array(gradient), out=out), out, dx)
    # ... and each argument may be its own out.
    x = xp.array(host.copy())
    check(relu_xp.relu(x, **numbers, out=x), x, y)
    x = xp.array(host.copy())
    check(relu_xp.relu_grad(x, **numbers, out=x), x, g)
    x = xp.array(host.copy())
    result, pullback = relu_xp.relu_vjp(x, **numbers, out=x)
    check(result, x, y)
    dy = xp.array(gradient.copy())
    check(pullback(dy, out=dy), dy, dx)
    dy = xp.array(gradient.copy())
    check(relu_xp.relu_backward(dy, xp.array(host), **numbers, out=dy), dy, dx)
    x = xp.array(host.copy())
    check(relu_xp.relu_backward(xp.array(gradient), x, **numbers, out=x), x, dx)


@pytest.mark.libraries("strided")
def test_a_strided_out(xp):
    host = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    for x in (host, host.T, host[::2, ::-1], np.asfortranarray(host)):
        memory = np.full((x.shape[0] * 2, x.shape[1]), 7, np.float32)
        target = memory[::2]
        mine = xp.array(target)
        assert relu_xp.relu(xp.array(x), negative_slope=0.5, out=mine) is mine
        wanted = np.where(x > 0, x, x * np.float32(0.5))
        np.testing.assert_array_equal(xp.numpy(mine), wanted)
        result, pullback = relu_xp.relu_vjp(xp.array(x), out=mine)
        np.testing.assert_array_equal(xp.numpy(result), np.maximum(x, 0))
        np.testing.assert_array_equal(xp.numpy(pullback(xp.array(x), out=mine)), np.maximum(x, 0))
        assert xp.name == "cupy" or (memory[1::2] == 7).all(), "written outside of out"


@pytest.mark.libraries("writable")
def test_outs_of_another_kind_are_refused(xp):
    host = np.arange(-4.0, 4.0, dtype=np.float32)
    x = xp.array(host)
    with pytest.raises(ValueError, match=r"relu: out has shape \(3,\), x is \(8,\)"):
        relu_xp.relu(x, out=xp.array(host[:3].copy()))
    with pytest.raises(TypeError, match=r"relu: out has dtype .*float64, the result .*float32"):
        relu_xp.relu(x, out=xp.array(host.astype(np.float64)))
    with pytest.raises(TypeError, match="relu: out must be an array, got list"):
        relu_xp.relu(x, out=[1.0] * 8)
    np.testing.assert_array_equal(xp.numpy(x), host)


@pytest.mark.libraries("strided")
def test_outs_that_overlap_are_refused(xp):
    host = np.arange(-4.0, 4.0, dtype=np.float32)
    memory = xp.array(np.arange(-8.0, 8.0, dtype=np.float32))
    for x, out in ((memory[:8], memory[4:12]), (memory[:8], memory[:8][::-1])):
        with pytest.raises(ValueError, match="relu: out overlaps an input without being the"):
            relu_xp.relu(x, out=out)
        with pytest.raises(ValueError, match="relu_backward: out overlaps an input"):
            relu_xp.relu_backward(xp.array(host), x, out=out)
        with pytest.raises(ValueError, match="relu_backward: out overlaps an input"):
            relu_xp.relu_backward(x, xp.array(host), out=out)
    broadcast = xp.array(np.lib.stride_tricks.as_strided(host, (8,), (0,)))
    with pytest.raises(ValueError, match="relu: out is a broadcast view"):
        relu_xp.relu(xp.array(host), out=broadcast)
    windows = xp.array(np.lib.stride_tricks.as_strided(host, (6, 3), (4, 4)))
    with pytest.raises(ValueError, match="relu: out is a broadcast view"):
        relu_xp.relu(xp.array(np.zeros((6, 3), np.float32)), out=windows)


# Disjoint parts of an array of shape (8, 12): x, dy and an out.
DISJOINT = {
    "channels": (np.s_[:, :4], np.s_[:, 4:8], np.s_[:, 8:]),
    "rows": (np.s_[2::3, :], np.s_[1:7:3, :], np.s_[:6:3, :]),
    "columns": (np.s_[:, ::3], np.s_[:, 1::3], np.s_[:, 2::3]),
    "both": (np.s_[::2, ::2], np.s_[1::2, 1::2], np.s_[::2, 1::2]),
}


@pytest.mark.libraries("writable")
@pytest.mark.parametrize("parts", DISJOINT.values(), ids=DISJOINT)
def test_an_out_between_the_elements_of_an_input(xp, parts):
    """A4: what shares no memory is accepted, and nothing else is written."""
    host = np.random.default_rng(7).standard_normal((8, 12)).astype(np.float32)
    of_x, of_dy, of_out = parts
    numbers = {"negative_slope": 0.5, "max_value": 1.0}
    x, dy = (xp.array(host[part].copy()) for part in (of_x, of_dy))
    _, pullback = relu_xp.relu_vjp(x, **numbers)

    def check(call, wanted):
        memory = xp.array(host.copy())
        out = memory[of_out]
        result = call(memory[of_x], memory[of_dy], out)
        assert (result[0] if isinstance(result, tuple) else result) is out
        expected = host.copy()
        expected[of_out] = xp.numpy(wanted)
        np.testing.assert_array_equal(xp.numpy(memory), expected)

    check(lambda x, dy, out: relu_xp.relu(x, **numbers, out=out), relu_xp.relu(x, **numbers))
    check(lambda x, dy, out: relu_xp.relu(x, out=out), relu_xp.relu(x))
    check(lambda x, dy, out: relu_xp.relu_vjp(x, **numbers, out=out), relu_xp.relu(x, **numbers))
    check(
        lambda x, dy, out: relu_xp.relu_grad(x, **numbers, out=out), relu_xp.relu_grad(x, **numbers)
    )
    check(lambda x, dy, out: pullback(dy, out=out), pullback(dy))
    check(
        lambda x, dy, out: relu_xp.relu_backward(dy, x, **numbers, out=out),
        relu_xp.relu_backward(dy, x, **numbers),
    )
    check(lambda x, dy, out: relu_xp.squared_relu(x, out=out), relu_xp.squared_relu(x))


def test_the_imaginary_part_as_an_out(require):
    z = np.array([-1 + 5j, 2 - 7j])
    assert relu_xp.relu(z.real, out=z.imag).tolist() == [0, 2]
    assert z.tolist() == [-1 + 0j, 2 + 2j]
    z = require("torch").tensor([-1 + 5j, 2 - 7j])
    assert relu_xp.relu(z.real, out=z.imag).tolist() == [0, 2]
    assert z.tolist() == [-1 + 0j, 2 + 2j]


@pytest.mark.libraries("writable")
@pytest.mark.parametrize(
    ("of_x", "of_out"),
    [
        (np.s_[:5], np.s_[4:9]),
        (np.s_[0:20:2], np.s_[18:38:2]),
        (np.s_[0:7:3], np.s_[2:11:4]),
        (np.s_[0:16:5], np.s_[:13:4]),  # the first of both, and no other
    ],
    ids=str,
)
def test_one_shared_element_is_refused(xp, of_x, of_out):
    host = np.arange(-20.0, 20.0, dtype=np.float32)
    memory = xp.array(host.copy())
    x, out = memory[of_x], memory[of_out]
    fresh = xp.array(host[of_x].copy())
    for call in (
        lambda: relu_xp.relu(x, out=out),
        lambda: relu_xp.relu_vjp(x, out=out),
        lambda: relu_xp.relu_grad(x, out=out),
        lambda: relu_xp.relu_backward(fresh, x, out=out),
        lambda: relu_xp.relu_backward(x, fresh, out=out),
        lambda: relu_xp.relu_vjp(fresh)[1](x, out=out),
    ):
        with pytest.raises(ValueError, match="out overlaps an input without being the same"):
            call()
    np.testing.assert_array_equal(xp.numpy(memory), host)


def test_an_out_of_which_it_would_take_long_to_find_out_is_refused(monkeypatch):
    memory = np.arange(-35.0, 35.0)
    x = np.lib.stride_tricks.as_strided(memory, (2, 3, 2), (17 * 8, 8, 7 * 8))
    out = np.lib.stride_tricks.as_strided(memory[5:], (2, 3, 2), (9 * 8, 16 * 8, 15 * 8))
    assert relu_xp.relu(x, out=out) is out
    monkeypatch.setattr(backends, "_MAX_WORK", 1)
    with pytest.raises(ValueError, match="relu: out overlaps an input without being the same"):
        relu_xp.relu(x, out=out)


@pytest.mark.libraries("strided")
def test_a_mask_between_the_elements_of_an_input(xp):
    host = np.random.default_rng(8).standard_normal((4, 64)).astype(np.float32)
    memory = xp.array(host)
    mask = memory[1].view(np.uint8)[8:24]
    y, pullback = relu_xp.relu_vjp(memory[::2], mask=mask)
    np.testing.assert_array_equal(xp.numpy(mask), np.packbits(host[::2] > 0, bitorder="little"))
    np.testing.assert_array_equal(xp.numpy(pullback(y)), np.maximum(host[::2], 0))


@pytest.mark.parametrize("library", ["jax.numpy", "dask.array"])
def test_outs_of_immutable_arrays_are_refused(require, library):
    x = require(library).ones(3)
    for call in (relu_xp.relu, relu_xp.relu_grad, relu_xp.relu_vjp):
        with pytest.raises(TypeError, match="x, which is to be overwritten, cannot be written"):
            call(x, out=x)
    with pytest.raises(TypeError, match="forward: x, which is to be overwritten, cannot"):
        relu_xp.ReLU(inplace=True).forward(x)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "requires_grad"])
def test_overlap_is_seen_in_pytorch_too(require, kind):
    torch = require("torch")
    memory = torch.arange(-8.0, 8.0)
    x = memory
    if kind == "bfloat16":
        x = memory = memory.bfloat16()
    elif kind == "requires_grad":
        x = memory.requires_grad_()
        memory = memory.detach()
    before = memory.clone()
    with pytest.raises(ValueError, match="relu: out overlaps an input without being the same"):
        relu_xp.relu(x[:8], out=memory[4:12])
    with pytest.raises(ValueError, match="relu: out is a broadcast view"):
        relu_xp.relu(x[:8], out=memory[:1].expand(8))
    assert torch.equal(memory, before)
    assert relu_xp.relu(memory[:8], out=memory[:8]).sum() == 0
    assert memory[:8].sum() == 0


def test_a_leaf_of_pytorch_cannot_be_its_own_out(require):
    x = require("torch").tensor([-1.0, 2.0], requires_grad=True)
    with pytest.raises(ValueError, match="relu: x, which is to be overwritten, .* is a leaf that"):
        relu_xp.relu(x, out=x)
    assert x.tolist() == [-1, 2]


def test_what_only_writing_shows_to_be_read_only_is_refused(require):
    """Where a library does not tell."""
    strict = require("array_api_strict")
    host = np.ones(3)
    host.flags.writeable = False
    out = strict.asarray(host, copy=False)
    message = "out cannot be written: assignment destination is read-only$"
    with pytest.raises(ValueError, match=message) as refused:
        relu_xp.relu(strict.ones(3), out=out)
    assert isinstance(refused.value.__cause__, ValueError)


def test_length_one_axes_have_no_stride():
    x = np.array([[-1.0, 2.0]])
    assert relu_xp.relu(x, out=x[::2]).tolist() == [[0, 2]]
    assert x.tolist() == [[0, 2]]


def test_read_only_arrays():
    x = np.array([-1.0, 2.0])
    x.flags.writeable = False
    np.testing.assert_array_equal(relu_xp.relu(x), [0, 2])
    _, pullback = relu_xp.relu_vjp(x)
    np.testing.assert_array_equal(pullback(x), [0, 2])
    with pytest.raises(ValueError, match="relu: out is read-only"):
        relu_xp.relu(np.ones(2), out=x)
    np.testing.assert_array_equal(x, [-1, 2])


def test_memory_maps_are_arrays(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 5))
    x[:] = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)
    for numbers in ({}, {"negative_slope": 0.5}):
        y, pullback = relu_xp.relu_vjp(x, **numbers)
        results = [y, relu_xp.relu(x, **numbers), pullback(x), relu_xp.relu_backward(x, x)]
        assert [type(result) for result in results] == [np.ndarray] * 4
    np.testing.assert_array_equal(relu_xp.relu(x), np.maximum(x, 0))
    assert relu_xp.relu(x, out=x) is x
    assert x.min() == 0


def test_unaligned_arrays():
    memory = np.zeros(4 * 10 + 1, np.uint8)
    x = memory[1:].view(np.float32)
    assert not x.flags.aligned
    x[:] = np.linspace(-1, 1, 10)
    y, pullback = relu_xp.relu_vjp(x, negative_slope=0.5)
    np.testing.assert_array_equal(y, np.where(x > 0, x, x * np.float32(0.5)))
    np.testing.assert_array_equal(relu_xp.relu(x), np.maximum(x, 0))
    np.testing.assert_array_equal(pullback(x), y)


# ---- Exact overlap ------------------------------------------------------------------------------


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("strides", [(3, 2), (2, 3), (-3, 2), (5, 1)], ids=str)
def test_an_out_whose_own_elements_interlock(xp, strides):
    """Rows begin within the span of others, but no two elements share memory."""
    shape = (2, 3) if strides != (2, 3) else (3, 2)
    host = np.arange(-6.0, 6.0, dtype=np.float32)
    start = host[3:] if strides[0] < 0 else host
    x = -np.arange(6.0, dtype=np.float32).reshape(shape) + 2
    view = np.lib.stride_tricks.as_strided(start, shape, [4 * stride for stride in strides])
    out = xp.array(view)
    assert relu_xp.relu(xp.array(x), out=out) is out
    np.testing.assert_array_equal(xp.numpy(out), np.maximum(x, 0))
    overlapping = np.lib.stride_tricks.as_strided(host, (2, 3), (8, 4))
    with pytest.raises(ValueError, match="relu: out is a broadcast view"):
        relu_xp.relu(xp.array(np.ones((2, 3), np.float32)), out=xp.array(overlapping))
