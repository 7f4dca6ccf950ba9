"""NumPy alone: what warns, what flushes, what the accident of numpy.maximum is worth."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from libraries import serving_numpy

import relu_xp
from relu_xp.backends import numpy as backend
from relu_xp.testing import oracle


@pytest.fixture(autouse=True)
def alone():
    """Let NumPy serve by itself, also where there are kernels."""
    with serving_numpy("relu_xp.backends.numpy"):
        yield


@pytest.fixture(params=["numpy.maximum", "integers"])
def way(request, monkeypatch):
    """Either way of plain ReLU: the fast one, and the one where numpy.maximum is not exact."""
    if request.param == "integers":
        monkeypatch.setattr(backend, "_ZERO", {})
        backend._constants.cache_clear()
        monkeypatch.setattr(backend, "_constants", backend._constants.__wrapped__)


def results(x, dy, numbers):
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    return {
        "relu": relu_xp.relu(x, **numbers),
        "y": y,
        "relu_grad": relu_xp.relu_grad(x, **numbers),
        "relu_backward": relu_xp.relu_backward(dy, x, **numbers),
        "pullback": pullback(dy),
    }


def expected(dtype, member):
    return {
        "relu": oracle.forward(dtype, member),
        "y": oracle.forward(dtype, member),
        "relu_grad": oracle.gradient(dtype, member),
        "relu_backward": oracle.backward(dtype, dtype, member),
        "pullback": oracle.backward(dtype, dtype, member),
    }


def compare(got, dtype, member):
    form = oracle.Format(dtype)
    for name, wanted in expected(dtype, member).items():
        bits = got[name].view(form.unsigned)
        keep = ~wanted.any_nan
        np.testing.assert_array_equal(bits[keep], wanted.bits[keep], err_msg=name)
        assert np.isnan(got[name][wanted.any_nan].astype(float)).all()


def operands(dtype):
    form = oracle.Format(dtype)
    x = oracle.patterns(dtype).view(form.dtype)
    return x, oracle.gradients(dtype, x.size).view(form.dtype)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_both_ways_of_plain_relu_agree(way, dtype):
    x, dy = operands(dtype)
    compare(results(x, dy, {}), dtype, "relu")
    for part in (np.s_[::2], np.s_[::-1], np.s_[7:12]):
        form = oracle.Format(dtype)
        np.testing.assert_array_equal(
            relu_xp.relu(x[part]).view(form.unsigned), oracle.forward(dtype, "relu").bits[part]
        )


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("member", ["relu", "relu6", "thresholded", "negative-ceiling"])
def test_right_under_flush_to_zero(way, flush_to_zero, dtype, member):
    """F4 where integers can do it, which is everywhere but in a product."""
    x, dy = operands(dtype)
    form = oracle.Format(dtype)
    with flush_to_zero():
        assert np.float32(1e-40) * np.float32(1) == 0, "the processor does not flush"
        got = results(x, dy, oracle.MEMBERS[member])
        long = relu_xp.relu(np.tile(x, 3), **oracle.MEMBERS[member])
    compare(got, dtype, member)
    np.testing.assert_array_equal(
        long.view(form.unsigned), np.tile(oracle.forward(dtype, member).bits, 3)
    )


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("member", oracle.MEMBERS)
def test_silent_even_where_numpy_would_raise(dtype, member):
    x, dy = operands(dtype)
    with np.errstate(all="raise"):
        compare(results(x, dy, oracle.MEMBERS[member]), dtype, member)


def test_numpy_is_asked_whether_its_floats_are_exact(monkeypatch):
    """The probe can say no: to each of the ways in which a maximum may break the table."""
    float32 = np.dtype(np.float32)
    exact = np.maximum
    assert backend._floats_are_exact(float32)  # on the machines that we test on

    def keeps_negative_zero(x, zero):
        return np.where(x >= zero, x, exact(x, zero))

    def quiets_signalling_nan(x, zero):
        with np.errstate(invalid="ignore"):
            return exact(x, zero) + zero

    def swallows_nan(x, zero):
        return np.where(x > zero, x, zero)

    def flushes(x, zero):
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, zero, exact(x, zero))

    def forgets_payloads(x, zero):
        quiet = np.isnan(x) & ((x.view(np.uint32) & 1 << 22) != 0)
        return np.where(quiet, np.copysign(np.float32(np.nan), x), exact(x, zero))

    def warns(x, zero):
        return exact(np.sqrt(x - x), zero)

    def only_where(condition):
        def impostor(x, zero):
            return keeps_negative_zero(x, zero) if condition(x) else exact(x, zero)

        return impostor

    layouts = (
        only_where(lambda x: x.size > 100 and x.strides == (4,)),
        only_where(lambda x: x.size < 10 and x.strides == (4,)),
        only_where(lambda x: x.strides[0] < 0),
        only_where(lambda x: x.strides[0] > 4),
    )
    impostors = keeps_negative_zero, quiets_signalling_nan, swallows_nan, forgets_payloads
    for impostor in (*impostors, flushes, warns, *layouts):
        with monkeypatch.context() as patch:
            patch.setattr(np, "maximum", impostor)
            assert not backend._floats_are_exact(float32), impostor.__name__

    monkeypatch.setattr(np, "less_equal", lambda x, zero: ~np.greater(x, zero))  # of a NaN, too
    assert not backend._floats_are_exact(float32)


def test_a_maximum_that_is_not_exact_is_not_used(python):
    """Nor a comparison: what is asked when the package is imported decides."""
    script = """
        import numpy as np

        exact = np.maximum

        def keeps_negative_zero(x, zero, out=None):
            y = exact(x, zero, out=out)
            return np.copyto(y, -0.0, where=y == 0) or y

        np.maximum = keeps_negative_zero
        import relu_xp

        for dtype in (np.float32, np.float64):
            for shape in ((3,), (1000, 3)):
                x = np.broadcast_to(np.array([-0.0, -1, 2], dtype), shape).copy()
                assert np.signbit(np.maximum(x, 0)).any()
                for y in (relu_xp.relu(x), relu_xp.relu_vjp(x)[0]):
                    assert not np.signbit(y).any()
    """
    python(script, RELU_XP_JIT=0)


@pytest.mark.parametrize("dtype", [np.dtype(c) for c in "bhilqBHILQ"], ids=lambda d: d.char)
def test_integers_go_forward(dtype):
    info = np.iinfo(dtype)
    x = np.array([info.min, 0, 1, 2, 7, info.max], dtype)
    y = relu_xp.relu(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(relu_xp.relu6(x), np.clip(x, 0, 6))
    assert relu_xp.relu6(x).dtype == dtype
    np.testing.assert_array_equal(
        relu_xp.relu(x[2:5], threshold=1, positive_slope=3, negative_slope=2), [2, 6, 21]
    )
    assert relu_xp.relu(x[2:3].reshape(())).shape == ()
    assert relu_xp.relu6(x, out=x) is x
    np.testing.assert_array_equal(x, [0, 0, 1, 2, 6, 6])


def test_integers_need_whole_numbers_in_range():
    x = np.array([1], np.uint8)
    for numbers in ({"negative_slope": 0.01}, {"threshold": -1}, {"max_value": 256}):
        with pytest.raises(ValueError, match="relu: x: .* is not a whole number that uint8 holds"):
            relu_xp.relu(x, **numbers)
    # A threshold that no float holds is still exact.
    big = 2**53 + 1
    x = np.array([big, big + 1], np.int64)
    np.testing.assert_array_equal(relu_xp.relu(x, threshold=big), [0, big + 1])


def test_byte_swapped_arrays_are_refused():
    x = np.ones(3, np.dtype(np.float32).newbyteorder())
    with pytest.raises(TypeError, match=r"relu: x: byte-swapped dtype .* x\.astype\('float32'\)"):
        relu_xp.relu(x)


# ---- Blocks, parts and threads ------------------------------------------------------------------


@pytest.fixture
def cut(monkeypatch):
    """Return a function that makes blocks small, and says from how many elements threads work."""
    calls = []

    def cut(block, threaded):
        monkeypatch.setattr(backend, "_BLOCK", block)
        monkeypatch.setattr(backend, "_THREADED", threaded)
        return calls

    run = backend.threads.run

    def counting(function, parts):
        parts = list(parts)
        calls.append(len(parts))
        run(function, parts)

    monkeypatch.setattr(backend.threads, "run", counting)
    return cut


def blocks_of(fortran, *arrays):
    """Return what `_each_block` calls a function with, in order."""
    parts = []
    backend._each_block(lambda *part: parts.append(part), fortran, *arrays)
    return sorted(parts, key=lambda part: part[0].start if part[0] else 0)


@pytest.mark.parametrize("threaded", [1 << 60, 41, 40, 0])
@pytest.mark.parametrize("size", [17, 24, 40])
def test_a_block_is_a_slice_of_every_array(cut, size, threaded):
    calls = cut(16, threaded)
    x, y = np.arange(size), np.arange(size) + 0.5
    one = np.broadcast_to(np.float32(7), (size,))
    parts = blocks_of(False, x, y, one)
    slices = [slice(start, min(start + 16, size)) for start in range(0, size, 16)]
    assert [part[0] for part in parts] == slices
    for part, xs, ys, ones in parts:
        assert xs.tolist() == list(range(part.start, part.stop))
        assert np.shares_memory(xs, x)
        assert np.array_equal(ys, xs + 0.5)
        assert ones.tolist() == [7] * xs.size
    assert calls == [len(slices)] * (size >= threaded)


def test_blocks_are_of_the_order_that_the_arrays_have(cut):
    cut(16, 1 << 60)
    x = np.arange(42.0).reshape(6, 7)
    one = np.broadcast_to(np.float64(7), x.shape)
    for fortran, array in ((False, x), (True, np.asfortranarray(x))):
        parts = blocks_of(fortran, array, one)
        assert len(parts) == 3
        flat = np.concatenate([xs for _, xs, _ in parts])
        np.testing.assert_array_equal(flat, x.ravel("F" if fortran else "C"))
        # What has another order goes whole, and all that goes with it.
        other = np.array(x, order="C" if fortran else "F")
        for arrays in ((array, x[:, ::-1]), (x[:, ::-1], array), (array, other)):
            ((part, *whole),) = blocks_of(fortran, *arrays)
            assert part is None
            assert all(a is b for a, b in zip(whole, arrays, strict=True))
    ((part, same),) = blocks_of(False, x[:2, :8])
    assert part is None
    assert same.shape == (2, 7)


def test_what_is_small_goes_whole(cut):
    cut(16, 1 << 60)
    for shape in ((16,), (4, 4), (0,), (1,)):
        x, y = np.zeros(shape), np.zeros(shape)
        ((part, *arrays),) = blocks_of(False, x, y)
        assert part is None
        assert arrays[0] is x
        assert arrays[1] is y
    x = np.zeros(())
    ((part, array),) = blocks_of(False, x)
    assert part is None
    assert array.shape == (1,)
    assert np.shares_memory(array, x)


@pytest.mark.parametrize("threaded", [1 << 60, 61, 60, 0])
def test_a_part_is_some_rows_of_every_array(cut, threaded):
    calls = cut(16, threaded)
    x = np.arange(60).reshape(10, 6)
    row, column = x[:1], x[:, :1]
    parts = []
    backend._each_part(lambda *arrays: parts.append(arrays), x, row, column)
    parts.sort(key=lambda part: part[0][0, 0])
    assert [len(xs) for xs, _, _ in parts] == [2] * 5, "as many rows as a block takes, not more"
    np.testing.assert_array_equal(np.concatenate([xs for xs, _, _ in parts]), x)
    np.testing.assert_array_equal(np.concatenate([columns for *_, columns in parts]), column)
    assert all(rows.shape == (1, 6) for _, rows, _ in parts)
    assert calls == [5] * (threaded <= 60)


def test_parts_of_every_shape(cut):
    cut(16, 1 << 60)
    for shape, lengths in (
        ((), [1]),
        ((3, 40), [1, 1, 1]),  # a row is longer than a block
        ((16,), [16]),
        ((17,), [16, 1]),
        ((0, 5), []),
        ((4, 0), [4]),
        ((1, 5), [1]),
    ):
        x = np.zeros(shape)
        parts = backend._parts(x, x)
        assert [len(xs) for xs, _ in parts] == lengths, shape
        assert all(xs.ndim for xs, _ in parts)


@pytest.mark.parametrize("threaded", [1 << 60, 0])
@pytest.mark.parametrize("block", [8, 64])
def test_however_an_array_is_cut_the_result_is_the_same(cut, block, threaded):
    rng = np.random.default_rng(11)
    base, gradient = rng.standard_normal((2, 26, 14)).astype(np.float32) * 2
    views = (
        lambda a: a,
        np.asfortranarray,
        lambda a: a[::2, ::-1],
        lambda a: a.ravel()[: 5 * block],
        lambda a: np.broadcast_to(a[:1, :1], a.shape),
        lambda a: np.broadcast_to(a[:, :1], a.shape),
        lambda a: a.reshape(13, 2, 14).transpose(2, 0, 1),
    )

    def everything(x, dy):
        found = []
        for member in ("relu", "leaky", "relu6", "clipped-leaky", "everything"):
            found += results(x, dy, oracle.MEMBERS[member]).values()
        weight = np.linspace(0, 1, x.shape[0], dtype=np.float32)
        for slopes in (weight, weight[1:2]):
            y, pullback = relu_xp.prelu_vjp(x, slopes, axis=0)
            found += [y, *pullback(dy)]
        y, pullback = relu_xp.rrelu_vjp(x, rng=np.random.default_rng(1))
        found += [y, pullback(dy)]
        y, pullback = relu_xp.crelu_vjp(x, axis=0)
        found += [y, pullback(np.concatenate([dy, dy[::-1]]))]
        y, pullback = relu_xp.squared_relu_vjp(x)
        return [*found, y, pullback(dy)]

    for view in views:
        for its_gradient in (view(gradient), view(gradient).copy(), view(base)):
            x = view(base)
            wanted = everything(x, its_gradient)
            cut(block, threaded)
            got = everything(x, its_gradient)
            for one, other in zip(got, wanted, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_allclose(one, other, rtol=1e-6 if one.ndim == 1 else 0)
            cut(1 << 16, 1 << 20)


def test_arrays_in_fortran_order_are_cut_too(cut):
    x = np.asfortranarray(np.linspace(-1, 1, 60, dtype=np.float32).reshape(6, 10))
    calls = cut(16, 0)
    _, pullback = relu_xp.relu_vjp(x, negative_slope=0.5)
    relu_xp.relu(x)
    relu_xp.relu(x, negative_slope=0.5)
    relu_xp.relu_backward(x, x)
    pullback(x)
    assert calls == [4] * 5


def test_a_sum_of_infinities_is_silent(cut):
    """In whatever parts they lie."""
    cut(4, 1 << 60)
    weight = np.full(1, 0.5, np.float32)
    for dy in ([3e38, -np.inf], [np.inf, -np.inf], [3e38, 3e38], [np.nan, 1]):
        dy = np.repeat(np.array(dy, np.float32), 4)
        x = np.full(8, -3e38, np.float32)
        _, pullback = relu_xp.prelu_vjp(x, weight, axis=0)
        with np.errstate(all="ignore"):
            expected = (x.astype(np.float64) * dy).sum().astype(np.float32)
        with np.errstate(all="raise"):
            found = pullback(dy)[1]
        np.testing.assert_array_equal(found, [expected])


def test_slopes_alone_are_themselves():
    slopes = np.array([0.0, -0.5, 1.0, 3.0], np.float32)
    factors = backend.sloped(None, None, slopes, None)
    assert factors.dtype == np.float32
    np.testing.assert_array_equal(factors, slopes)


def test_squared_relus_gradient_is_rounded_twice():
    """To float32, and from there to float16: from float64 some would be others."""
    rng = np.random.default_rng(12)
    x = (rng.random(100_000) + 0.5).astype(np.float32)
    dy = (rng.random(x.size) + 0.5).astype(np.float16)
    twice = (2 * x * dy.astype(np.float32)).astype(np.float16)
    once = (2 * x * dy.astype(np.float64)).astype(np.float16)
    assert (once != twice).any()
    np.testing.assert_array_equal(relu_xp.squared_relu_vjp(x)[1](dy), twice)


def in_our_order(rows):
    """Return the sum of each row, added as `_sum` says: one element of a row at a time."""
    row, sums = backend._ROW, []
    for values in rows.tolist():
        if len(values) > 2 * row:
            whole = len(values) // row * row
            lines = [values[i : i + row] for i in range(0, whole, row)]
            total = lines[0]
            for line in lines[1:]:
                total = [a + b for a, b in zip(total, line, strict=True)]
            for place, value in enumerate(values[whole:]):
                total[place] += value
            values = total
        while len(values) > 1:
            half = len(values) // 2
            added = [a + b for a, b in zip(values[:half], values[-half:], strict=True)]
            values = added + values[half : len(values) - half]
        sums.append(values[0])
    return np.array(sums)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 1024, 2047, 2048, 2049, 3072, 3073, 5000])
def test_neighbours_are_summed_in_an_order_of_our_own(length):
    """The same with every NumPy, whose own order is another."""
    rows = np.random.default_rng(length).standard_normal((5, length))
    wanted = in_our_order(rows)
    np.testing.assert_array_equal(backend._sum(rows.copy(), (1,)).ravel(), wanted)
    one = backend._sum(rows.copy()[..., None], (1, 2))
    assert one.shape == (5, 1, 1)
    np.testing.assert_array_equal(one.ravel(), wanted)
    columns = np.ascontiguousarray(rows.T)
    in_turn = functools.reduce(np.add, columns)
    np.testing.assert_array_equal(backend._sum(columns.copy(), (0,))[0], in_turn)
    assert length < 100 or (wanted != in_turn).any()
    both = backend._sum(columns.copy(), (0, 1))
    np.testing.assert_array_equal(both.ravel(), in_our_order(in_turn[None]))
    assert backend._sum(np.zeros((5, length)), ()).shape == (5, length)
