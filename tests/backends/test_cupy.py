"""CuPy's kernels: their bits, and which of them runs. Without a device they run on the CPU."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
from passes import check_bits, fenced, run_all
from ptx_operations import PtxError

import relu_xp
from relu_xp.testing import reference

cupy_host = pytest.importorskip("cupy_host", exc_type=ImportError)
cupy = pytest.importorskip("cupy")

DTYPES = reference.DTYPES
MASKS = {"bits": {}, "bytes": {"negative_slope": 0.5, "max_value": 3.0}}
each_cupy = pytest.mark.libraries(names=["cupy_host", "cupy_host_75", "cupy_host_120", "cupy"])
each_mask = pytest.mark.parametrize("params", MASKS.values(), ids=MASKS)

# Products, and parameters that a dtype rounds to 0, to infinity or to a subnormal. Where infinity
# is multiplied by 0, each processor has a NaN of its own.
PRODUCTS = {name: reference.PRESETS[name] for name in ("leaky", "falling", "everything")} | {
    "threshold overflows": {"threshold": 1e300, "negative_slope": 1e-40},
    "threshold below all": {"threshold": -1e300, "positive_slope": 2.0, "max_value": 1e-40},
    "subnormal ceiling": {
        "threshold": -1.0,
        "negative_slope": 0.5,
        "positive_slope": 2.0,
        "max_value": 1e-40,
    },
    "ceiling overflows": {"threshold": -1e-40, "max_value": 1e300, "negative_slope": -1.0},
}
INFINITY_TIMES_0 = {
    "nearly one": reference.PRESETS["nearly-one"],
    "slope to zero": {"positive_slope": 1e-320},
    "slopes overflow": {"positive_slope": -1e300, "negative_slope": 1e300, "threshold": 1e-6},
}


@pytest.mark.slow
@each_cupy
@pytest.mark.parametrize("dy_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_products_have_the_bits_of_numpys(xp, x_dtype, dy_dtype):
    """All patterns of 16 bits, or specials and random ones."""
    x = reference.patterns(x_dtype).view(DTYPES[x_dtype])
    dy = reference.gradients(dy_dtype, x.size).view(DTYPES[dy_dtype])
    contiguous = [xp.array(host) for host in (x, dy)]
    strided = [xp.array(np.repeat(host, 2))[::2] for host in (x, dy)]
    for name, params in (PRODUCTS | INFINITY_TIMES_0).items():
        with np.errstate(all="ignore"):
            wanted = run_all(x, dy, params)
            for arrays in (contiguous, strided)[: 1 + (name == "everything")]:
                for got, host in zip(run_all(*arrays, params), wanted, strict=True):
                    check_bits(xp.numpy(got), host, name, any_nan=name in INFINITY_TIMES_0)


@pytest.mark.slow
@each_cupy
def test_tails_and_misaligned_views(xp, dtype):
    """0 to 33 elements, and sizes around whole tiles, at each start within 16 bytes."""
    from relu_xp.backends import cupy_kernels

    itemsize = DTYPES[dtype].itemsize
    tile = 32 * cupy_kernels._CHUNKS * (16 // itemsize)
    around = itertools.product((1, 2, 5), (-9, -1, 0, 1, 8, 31, 33))
    sizes = [*range(34), *(k * tile + rest for k, rest in around)]
    rng = np.random.default_rng(7)
    hosts = rng.choice(reference.specials(dtype), (2, max(sizes))).view(DTYPES[dtype])

    def check(size, params, start, mask_start):
        its_x, its_dy = hosts[:, :size]
        its_mask = np.zeros(size if params else -(-size // 8), np.uint8)
        with np.errstate(all="ignore"):
            relu_xp.relu_vjp(its_x, mask=its_mask, **params)
            wanted = run_all(its_x, its_dy, params)
        memory = [fenced(xp, host, start) for host in (its_x, its_dy, *[np.zeros_like(its_x)] * 5)]
        memory.append(fenced(xp, np.zeros_like(its_mask), mask_start))
        x, dy, *outs, mask = (view for view, _ in memory)
        forward, y, gradient, dx, from_input = outs
        cupy_host.launches.clear()
        relu_xp.relu(x, out=forward, **params)
        relu_xp.relu_vjp(x, out=y, mask=mask, **params)[1](dy, out=dx)
        relu_xp.relu_grad(x, out=gradient, **params)
        relu_xp.relu_backward(dy, x, out=from_input, **params)
        for got, host in zip((*outs, mask), (*wanted, its_mask), strict=True):
            check_bits(xp.numpy(got), host, (size, start, mask_start))
        assert all((around() == 0x5A).all() for _, around in memory), (size, start, mask_start)
        for name, _ in cupy_host.launches if size else ():  # none on a device
            has_mask = "bits" in name or "bytes" in name
            aligned = start * itemsize % 16 == 0 and not (has_mask and mask_start)
            assert name.endswith("vectorized" if aligned else "strided")

    for size, params in itertools.product(sizes, MASKS.values()):
        starts = [(0, 0)]
        if size in (0, 7, 33, tile + 33):
            starts = itertools.product(range(16 // itemsize + 1), (0, 1, 8))
        for start, mask_start in starts:
            check(size, params, start, mask_start)


@each_cupy
def test_a_slope_that_is_nan_is_the_result(xp, dtype):
    """Sign and payload, also of a NaN that is multiplied; above 0 nothing is multiplied."""
    from relu_xp.backends.cupy import CupyBackend

    form = reference.Format(dtype)
    nan = form.sign | form.infinity | (form.infinity >> 1 & ~form.infinity) | 3
    quiet = form.infinity | form.infinity >> 1 | 1
    one = form.round(1.0)
    words = np.array([form.sign | one, one, quiet, form.sign | form.infinity, 0], form.unsigned)
    x = xp.array(words.view(form.dtype))
    slopes = xp.array(np.full(5, nan, form.unsigned).view(form.dtype))
    for values, its_x, wanted in (
        (x, x, [nan, one, quiet, nan, nan]),
        (None, x, [nan, one, one, nan, nan]),
        (x, None, [nan] * 5),
    ):
        got = xp.numpy(CupyBackend().prelu(values, its_x, slopes, None))
        assert got.view(form.unsigned).tolist() == wanted


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (
            "if (i != 3) y[i] = __ballot_sync(0xff, 1);",
            "its mask names a thread that does not arrive",
        ),
        ("*(double2*)&y[1] = {0.0, 0.0};", "not aligned to 16 bytes"),
        ("y[i + 1] = x[i];", "a store outside of the arrays"),
        ("y[i / 2] = x[i];", "two threads touch what one of them writes"),
    ],
)
def test_what_stops_a_device_stops_the_host(launches, operation, message):
    kernel = cupy.ElementwiseKernel("raw T x", "raw T y", operation, "kernel")
    x, y = (cupy_host.array(np.arange(8, dtype=np.int32)) for _ in range(2))
    with pytest.raises(PtxError, match=message):
        cupy_host.HostKernel(kernel)(x, y, size=8)


def layouts():
    """Return arrays in several layouts, and which kernel is to run on each."""
    host = np.arange(6 * 8, dtype=np.float32).reshape(6, 8) - 20
    wide, tall, flat = (np.zeros(shape, np.float32) for shape in ((6, 16), (12, 8), 49))
    return {
        "C": (host, "vectorized"),
        "Fortran": (np.asfortranarray(host), "vectorized"),
        "NHWC": (host.reshape(2, 3, 2, 4).transpose(0, 3, 1, 2), "vectorized"),
        "columns": (wide[:, ::2], "strided"),
        "rows": (tall[::2], "strided"),
        "reversed": (host.copy()[::-1], "strided"),
        "part of rows": (wide[:, :8], "strided"),
        "misaligned": (flat[1:].reshape(6, 8), "strided"),
        "broadcast": (np.broadcast_to(host[0], (6, 8)), "strided"),
    }


@each_mask
@pytest.mark.parametrize("layout", layouts())
def test_the_layout_chooses_the_kernel(launches, layout, params):
    """One launch a call. An aligned dense array always takes the fast kernel, others never."""
    host, form = layouts()[layout]
    alike = np.ones_like(host if form == "vectorized" else host.copy("C"))
    otherwise = np.ones(host.shape, np.float32, order="F" if alike.flags.c_contiguous else "C")
    x, alike, otherwise = map(cupy_host.array, (host, alike, otherwise))

    def check(wanted, function, *arrays, **options):
        launches.clear()
        result = function(*arrays, **options)
        assert [name for name, _ in launches] == [f"relu_xp_{wanted}"]
        return result

    kind, ac, a = ("bytes", "_ac", "_a") if params else ("bits", "", "")
    check(f"forward{ac}_{form}", relu_xp.relu, x, **params)
    check(f"forward_{form}", relu_xp.relu, x, negative_slope=1e-60)  # which is 0 in float32
    check(f"gradient{ac}_{form}", relu_xp.relu_grad, x, **params)
    check(f"forward{ac}_strided", relu_xp.relu, x, **params, out=otherwise)
    _, pullback = check(f"forward_{kind}{ac}_{form}", relu_xp.relu_vjp, x, **params)
    for dy, its_form in ((alike, "vectorized"), (otherwise, "strided"), (x, form)):
        check(f"backward_{kind}{a}_{its_form}", pullback, dy)
        both = "vectorized" if form == its_form == "vectorized" else "strided"
        check(f"backward_from_input{ac}_{both}", relu_xp.relu_backward, dy, x, **params)


def test_axes_of_any_order_and_of_length_1(launches):
    host = np.ones((3, 1, 2, 8), np.float32)
    dense = [host.transpose(axes) for axes in itertools.permutations(range(4))]
    for x in map(cupy_host.array, (*dense, host[:1, :, :1, :1], host[0, 0, 0, :1])):
        launches.clear()
        relu_xp.relu_vjp(x)[1](x)
        assert [name.rpartition("_")[2] for name, _ in launches] == ["vectorized"] * 2
    x = cupy_host.array(np.array(3.0, np.float32))
    assert relu_xp.relu_vjp(x)[1](x).shape == ()
    assert launches[-1][0].endswith("strided")


def test_integers(launches):
    """Products wrap around, as NumPy's do."""
    for dtype in map(np.dtype, "bhiqBHIQ"):
        info = np.iinfo(dtype)
        host = np.array([info.min, 0, 1, 2, 7, info.max], dtype)
        for params in ({}, {"max_value": 6}, {"threshold": 1, "negative_slope": 3}):
            got = cupy_host.to_numpy(relu_xp.relu(cupy_host.array(host), **params))
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, relu_xp.relu(host, **params))


@each_mask
@pytest.mark.parametrize("order", "CF")
def test_given_memory_nothing_is_allocated(launches, order, params):
    x, dy, y, dx = (cupy_host.array(np.ones((40, 50), np.float32, order=order)) for _ in range(4))
    mask = cupy_host.array(np.zeros(2000, np.uint8))

    def allocate(size):
        raise AssertionError(f"{size} bytes were allocated")

    with cupy.cuda.using_allocator(allocate):
        _, pullback = relu_xp.relu_vjp(x, out=y, mask=mask, **params)
        pullback(dy, out=dx)
        relu_xp.relu_backward(dy, x, out=dx, **params)
        relu_xp.relu_grad(x, out=dx, **params)
        relu_xp.relu(x[::2], out=y[::2])
        with pytest.raises(AssertionError, match="were allocated"):
            relu_xp.relu_vjp(x, out=y)
        layer = relu_xp.ReLU(inplace=True, **params)
        layer.forward(x, mask=mask)
        layer.backward(dy)


def test_out_of_memory_leaves_all_as_it_was(launches):
    """CuPy's own error; what was saved before is still there, and the next call works."""

    def allocate(size):
        raise cupy.cuda.memory.OutOfMemoryError(size, 0)

    x, y = (cupy_host.array(np.array([-2.0, n], np.float32)) for n in (4, 5))
    layer = relu_xp.LeakyReLU(0.5)
    layer.forward(x)
    for options in ({}, {"out": y}):  # for the result, and for the mask
        error = pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating")
        with cupy.cuda.using_allocator(allocate), error:
            layer.forward(x, **options)
    assert cupy_host.to_numpy(y).tolist() == [-2, 5]
    assert cupy_host.to_numpy(layer.backward(x)).tolist() == [-1, 4]


def test_another_library_and_another_device_are_refused(launches):
    host = np.ones(3, np.float32)
    here, there = (cupy_host.array(host.copy(), device) for device in (0, 1))
    mask = cupy_host.array(np.zeros(1, np.uint8), device=1)
    pullback, of_numpy = (relu_xp.relu_vjp(x)[1] for x in (here, host))
    on_0 = "forward saw CuPy on device 0, dy is"
    advice = r"move it first, for example cupy\.asarray\(dy\)"
    for call, error, message in (
        (lambda: pullback(host), TypeError, f"pullback: {on_0} NumPy; {advice}$"),
        (lambda: pullback(there), ValueError, f"pullback: {on_0} CuPy on device 1; "),
        (lambda: of_numpy(here), TypeError, r".*CuPy on device 0; .* cupy\.asnumpy\(dy\)$"),
        (lambda: relu_xp.relu_vjp(here, out=there), ValueError, ".* device 0, out is CuPy on dev"),
        (lambda: relu_xp.relu_vjp(here, mask=mask), ValueError, ".* device 0, mask is CuPy on d"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()


def test_kernels_run_on_the_device_of_the_array(launches):
    """Another device is entered for the launch, the current one is not entered again."""
    host = np.array([-1.0, 2.0], np.float32)
    with mock.patch.object(cupy.cuda, "Device") as device:
        relu_xp.relu(cupy_host.array(host))
        device.assert_not_called()
        relu_xp.relu(cupy_host.array(host, device=1), out=cupy_host.array(host.copy(), device=1))
        device.assert_called_once_with(1)
        device.return_value.__enter__.assert_called_once()
        device.return_value.__exit__.assert_called_once()


def test_two_imports_of_one_memory_overlap(launches):
    """CuPy knows no owner of DLPack and bare pointers, and takes two starts for two memories."""
    host = np.zeros(9, np.float32)
    x, out = cupy_host.array(host[:8]), cupy_host.array(host[1:])
    assert not cupy.may_share_memory(x, out)
    mask = cupy_host.array(host.view(np.uint8)[5:13])
    backwards = cupy_host.array(host[:0:-1])
    for call in (
        lambda: relu_xp.relu(x, out=out),
        lambda: relu_xp.relu(x, out=backwards),
        lambda: relu_xp.relu_backward(out, x, out=out),
        lambda: relu_xp.relu_vjp(x, mask=mask),
    ):
        with pytest.raises(ValueError, match="overlaps an input"):
            call()
    apart = cupy_host.array(np.zeros(8, np.float32))
    assert relu_xp.relu(x, out=apart) is apart
