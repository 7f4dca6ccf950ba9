"""What only a device can show: streams, graphs, memory, size. ``pytest -m gpu --require-gpu``."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from libraries import LIBRARIES, unavailable
from passes import check_bits, run_all

import relu_xp
from relu_xp.testing import reference

pytest.importorskip("cupy", exc_type=ImportError)
pytestmark = pytest.mark.gpu

PRESETS = {"relu": {}, "leaky": {"negative_slope": 0.1}, "three": reference.PRESETS["everything"]}


@pytest.fixture
def cupy(request):
    if reason := LIBRARIES["cupy"].load():
        unavailable(request.config, reason, gpu=True)
    import cupy

    yield cupy
    cupy.get_default_memory_pool().free_all_blocks()


WAIT = """
extern "C" __global__ void wait(volatile int* gate, long long limit) {
  const long long start = clock64();
  while (gate[0] == 0 && clock64() - start < limit) {}
  gate[1] = gate[0];
}
"""


def hold_up(cupy):
    """Let the current stream wait until the first of the two words returned is set.

    The second one then shows that the kernel has seen it, and not given up after some seconds.
    """
    pinned = cupy.cuda.alloc_pinned_memory(8)
    words = np.frombuffer(pinned, np.int32, 2)
    words[:] = 0
    kernel = cupy.RawKernel(WAIT, "wait")
    kernel((1,), (1,), (np.uint64(pinned.ptr), np.int64(10_000_000_000)))
    return words


def test_calls_run_on_the_current_stream_and_wait_for_nothing(cupy):
    """With one stream held up, its calls return at once, and those of another are completed."""

    def calls(x):
        rows, bias = x[:100_000].reshape(100, 1000), x[:1000]
        y, pullback = relu_xp.bias_relu_vjp(rows, bias)
        dx, _ = pullback(rows)
        return [*run_all(x, x, {}), *run_all(x[::2], x[::2], {}), y, dx]

    hosts = [np.random.default_rng(n).standard_normal(100_003).astype(np.float32) for n in (1, 2)]
    held, free = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    first, second = map(cupy.asarray, hosts)
    for stream in (held, free):  # to compile, and for memory that the stream has then
        with stream:
            calls(first)
    cupy.cuda.Device().synchronize()
    with held:
        gate = hold_up(cupy)
        waiting = calls(first)
    with free:
        done = calls(second)
    free.synchronize()
    assert not held.done, "the stream was waited for, or the kernels ran elsewhere"
    for got, wanted in zip(done, calls(hosts[1]), strict=True):
        check_bits(cupy.asnumpy(got, stream=free), wanted, "free")
    assert not held.done
    gate[0] = 1
    held.synchronize()
    assert gate[1] == 1
    for got, wanted in zip(waiting, calls(hosts[0]), strict=True):
        check_bits(cupy.asnumpy(got), wanted, "held")


@pytest.mark.parametrize("layout", ["C", "Fortran", "strided"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_graph_of_both_passes(cupy, preset, dtype, layout):
    """Captured once, replayed on new values; nothing is allocated, so that nothing is reused."""
    params, shape = PRESETS[preset], (129, 63)
    layer = relu_xp.ReLU(**params)

    def empty():
        if layout == "strided":
            return cupy.zeros((shape[0], 2 * shape[1]), dtype)[:, ::2]
        return cupy.zeros(shape, dtype, order=layout[0])

    x, y, dy, dx, from_input, slope = (empty() for _ in range(6))
    mask = cupy.zeros(x.size, np.uint8)

    def step():
        layer.forward(x, out=y, mask=mask)
        layer.backward(dy, out=dx)
        relu_xp.relu_backward(dy, x, out=from_input, **params)
        relu_xp.relu_grad(x, out=slope, **params)

    def allocate(size):
        raise AssertionError(f"{size} bytes were allocated")

    step()  # compiles, which cannot be captured
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(allocate):
        stream.begin_capture()
        try:
            step()
        finally:  # end the capture even if it fails
            graph = stream.end_capture()
    rng = np.random.default_rng(9)
    for _ in range(3):
        hosts = [rng.choice(reference.specials(dtype), shape).view(dtype) for _ in range(2)]
        with stream:
            x[...], dy[...] = map(cupy.asarray, hosts)
            graph.launch()
            cupy.full(1 << 20, 0xFF, np.uint8)  # takes memory that is free
            graph.launch()
        stream.synchronize()
        with np.errstate(all="ignore"):
            wanted = run_all(*hosts, params)[1:]
        for got, host in zip((y, slope, dx, from_input), wanted, strict=True):
            check_bits(cupy.ascontiguousarray(got).get(), host, preset)


@pytest.mark.parametrize("shape", [(300, 64), (300, 63), (3, 5, 7, 9)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_graph_of_a_bias(cupy, dtype, shape):
    """Its sums are allocated: of a pool that is kept as long as the graph."""
    layout = {"shape": shape, "dtype": dtype}
    x, y, dy, dx = (cupy.zeros(**layout) for _ in range(4))
    bias, mask = cupy.zeros(shape[1], dtype), cupy.zeros(x.size, np.uint8)

    def step():
        pullback = relu_xp.bias_relu_vjp(x, bias, axis=1, out=y, mask=mask)[1]
        return pullback(dy, out=dx)[1]

    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        step()  # compiles, and fills the pool
        stream.synchronize()
        stream.begin_capture()
        try:
            dbias = step()
        finally:
            graph = stream.end_capture()
    rng = np.random.default_rng(9)
    for _ in range(3):
        hosts = [rng.integers(-9, 9, a.shape).astype(dtype) for a in (x, bias, dy)]
        with stream:
            x[...], bias[...], dy[...] = map(cupy.asarray, hosts)
            graph.launch()
            cupy.full(1 << 20, 0xFF, np.uint8)  # takes memory that is free
            graph.launch()
        stream.synchronize()
        wanted, pullback = relu_xp.bias_relu_vjp(*hosts[:2], axis=1)
        for got, host in zip((y, dx, dbias), (wanted, *pullback(hosts[2])), strict=True):
            check_bits(got.get(), host, shape)


@pytest.mark.parametrize("channels", [1024, 1023])
def test_a_bias_of_more_than_two_to_the_32_elements(cupy, channels):
    """Rows that repeat; integers, whose sums are exact. With vectors, and without."""
    tile = 1 << 10
    rows = tile * -(-((1 << 32) + 5) // (tile * channels))
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 4.5 * rows * channels:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, too few for two arrays of 2**32 elements")
    rng = np.random.default_rng(5)
    host = rng.integers(-9, 9, (tile, channels)).astype(np.float16)
    host_bias = rng.integers(-9, 9, channels).astype(np.float64)
    right, pullback = relu_xp.bias_relu_vjp(host, host_bias)
    right_dx, right_dbias = pullback(host)
    x, y = (cupy.empty((rows, channels), np.float16) for _ in range(2))
    x.reshape(-1, tile, channels)[...] = cupy.asarray(host)

    def check(wanted):
        wanted = cupy.asarray(wanted)
        for part in y.reshape(-1, tile, channels):
            assert bool((part == wanted).all())

    _, pullback = relu_xp.bias_relu_vjp(x, cupy.asarray(host_bias), out=y)
    check(right)
    dbias = pullback(x, out=y)[1]
    check(right_dx)
    assert dbias.get().tolist() == (rows // tile * right_dbias).tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_than_two_to_the_31_elements(cupy, dtype):
    """A tile repeated; compared on the device, where it is. Aligned, and one element off."""
    dtype = reference.DTYPES[dtype]
    tile = 1 << 20
    size = (1 << 31) + 3 * tile + 777
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 2.3 * size * dtype.itemsize:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, too few for two arrays of 2**31 elements")
    host = np.random.default_rng(4).standard_normal(tile).astype(dtype)

    def split(target, values):
        """Return the rows of an array that `values` repeat in, the rest, and its values."""
        values = cupy.asarray(values)
        whole = target.size // values.size * values.size
        rows, rest = target[:whole].reshape(-1, values.size), target[whole:]
        return values, rows, rest, values[: rest.size]

    def check(target, values):
        values, rows, rest, its_values = split(target, values)
        for row in range(0, len(rows), 256):  # a comparison of all would need as much memory again
            assert bool((rows[row : row + 256] == values).all()), row
        assert bool((rest == its_values).all())

    x, y = cupy.empty(size, dtype), cupy.empty(size, dtype)
    values, rows, rest, its_values = split(x, host)
    rows[...], rest[...] = values, its_values
    for start in (0, 1):  # with 2**31 elements and more, aligned and misaligned
        its_x, its_y = x[start:], y[start:]
        shifted = np.roll(host, -start)
        y.fill(7)
        _, pullback = relu_xp.relu_vjp(its_x, out=its_y)
        check(its_y, np.maximum(shifted, 0))
        assert start == 0 or float(y[0]) == 7
        keep = np.packbits(shifted > 0, bitorder="little")
        check(pullback._residuals.data[: size // 8 - start], keep)
        for call in (pullback, functools.partial(relu_xp.relu_backward, its_x)):
            y.fill(7)
            call(its_x, out=its_y)
            check(its_y, np.maximum(shifted, 0))


def test_arrays_of_every_size_class_at_once(cupy):
    """Many calls in flight on one stream, fresh memory each: none writes what another reads."""
    rng = np.random.default_rng(6)
    shapes = [(3,), (64, 100), (1, 7, 31, 5), (1 << 16,), (257, 1025)]
    hosts = [rng.standard_normal(shape).astype(np.float32) * 5 for shape in shapes]
    results = []
    for host in 20 * hosts:
        layer = relu_xp.ReLU6()
        x = cupy.asarray(host)
        results.append((host, layer.forward(x), layer.backward(x)))
    for host, y, dx in results:
        np.testing.assert_array_equal(y.get(), np.clip(host, 0, 6))
        inside = (host > 0) & (host < 6)
        np.testing.assert_array_equal(dx.get(), np.where(inside, host, np.float32(0)))


def test_another_device_is_entered_and_left(cupy):
    """The current device stays; an array of a peer is refused, not copied."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")  # test_cupy.py shows it with devices of its own
    with cupy.cuda.Device(1):
        x = cupy.asarray(np.array([-1.0, 2.0], np.float32))
    assert cupy.cuda.runtime.getDevice() == 0
    y, pullback = relu_xp.relu_vjp(x)
    assert cupy.cuda.runtime.getDevice() == 0
    assert y.device.id == pullback(x).device.id == 1
    np.testing.assert_array_equal(y.get(), [0, 2])
    with pytest.raises(ValueError, match="forward saw CuPy on device 1, dy is CuPy on device 0"):
        pullback(cupy.ones(2, np.float32))
