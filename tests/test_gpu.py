"""What only a device can show: streams, graphs, memory, size. ``pytest -m gpu --require-gpu``."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES
from test_cupy_kernels import check_bits, run_all

import relu_xp
from relu_xp.testing import oracle

pytestmark = pytest.mark.gpu

MEMBERS = {"relu": {}, "leaky": {"negative_slope": 0.1}, "three": oracle.MEMBERS["everything"]}


@pytest.fixture
def cupy(request):
    if reason := LIBRARIES["cupy"].load():
        unavailable(request.config, reason, gpu=True)
    import cupy

    yield cupy
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("dy_dtype", oracle.DTYPES)
@pytest.mark.parametrize("x_dtype", oracle.DTYPES)
def test_the_same_bits_as_numpy(cupy, x_dtype, dy_dtype):
    """Every member; 16 bytes at a time, and one element at a time."""
    x = oracle.patterns(x_dtype).view(oracle.DTYPES[x_dtype])
    dy = oracle.gradients(dy_dtype, x.size).view(oracle.DTYPES[dy_dtype])
    apart = [cupy.zeros(2 * a.size, a.dtype)[::2] for a in (x, dy)]
    askew = [cupy.zeros(a.size + 1, a.dtype)[1:] for a in (x, dy)]
    for view, host in zip(apart + askew, (x, dy) * 2, strict=True):
        view[...] = cupy.asarray(host)
    together = [cupy.asarray(x), cupy.asarray(dy)]
    for member, numbers in oracle.MEMBERS.items():
        with np.errstate(all="ignore"):
            wanted = run_all(x, dy, numbers)
        for arrays in (together, apart, askew):
            for got, host in zip(run_all(*arrays, numbers), wanted, strict=True):
                check_bits(cupy.asnumpy(got), host, f"{member} {host.dtype}")


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_tails(cupy, dtype):
    rng = np.random.default_rng(8)
    for size in (*range(34), 255, 256, 257, 511, 513, 1023, 1025, 2047, 4097, 65537, 1 << 20):
        x, dy = (
            rng.choice(oracle.specials(dtype), size).view(oracle.DTYPES[dtype]) for _ in range(2)
        )
        for numbers in MEMBERS.values():
            with np.errstate(all="ignore"):
                wanted = run_all(x, dy, numbers)
            got = run_all(cupy.asarray(x), cupy.asarray(dy), numbers)
            for one, host in zip(got, wanted, strict=True):
                check_bits(cupy.asnumpy(one), host, f"{size} {numbers}")


class Gate:
    """A kernel that keeps a stream busy until it is opened, or for some seconds."""

    SOURCE = """
    extern "C" __global__ void wait(volatile int* gate, long long limit) {
      const long long start = clock64();
      while (gate[0] == 0 && clock64() - start < limit) {}
      gate[1] = gate[0];
    }
    """

    def __init__(self, cupy):
        pinned = cupy.cuda.alloc_pinned_memory(8)
        self._words = np.frombuffer(pinned, np.int32, 2)
        self._words[:] = 0
        self._keep, self._pointer = pinned, pinned.ptr
        self._kernel = cupy.RawKernel(self.SOURCE, "wait")

    def close(self):
        """Let the current stream wait."""
        self._kernel((1,), (1,), (np.uint64(self._pointer), np.int64(10_000_000_000)))

    def open(self):
        self._words[0] = 1

    @property
    def passed(self):
        """Whether the kernel has seen the gate opened, and has not given up before."""
        return self._words[1] == 1


def test_calls_run_on_the_current_stream_and_wait_for_nothing(cupy):
    """With one stream held up, its calls return at once, and another stream's get done."""
    hosts = [np.random.default_rng(n).standard_normal(100_003).astype(np.float32) for n in (1, 2)]
    held, free = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    first, second = map(cupy.asarray, hosts)
    for stream in (held, free):  # to compile, and for memory that the stream has then
        with stream:
            run_all(first, first, {}), run_all(first[::2], first[::2], {})
    cupy.cuda.Device().synchronize()
    gate = Gate(cupy)
    with held:
        gate.close()
        waiting = [*run_all(first, first, {}), *run_all(first[::2], first[::2], {})]
    with free:
        done = run_all(second, second, {})
    free.synchronize()
    assert not held.done, "the stream was waited for, or the kernels ran elsewhere"
    for got, wanted in zip(done, run_all(hosts[1], hosts[1], {}), strict=True):
        check_bits(cupy.asnumpy(got, stream=free), wanted, "free")
    assert not held.done
    gate.open()
    held.synchronize()
    assert gate.passed
    half = hosts[0][::2]
    for got, wanted in zip(
        waiting, [*run_all(hosts[0], hosts[0], {}), *run_all(half, half, {})], strict=True
    ):
        check_bits(cupy.asnumpy(got), wanted, "held")


def captured(stream, step):
    """Return what a function launches as a graph; end the capture even if it fails."""
    stream.begin_capture()
    try:
        step()
    finally:
        graph = stream.end_capture()
    return graph


@pytest.mark.parametrize("layout", ["C", "Fortran", "strided"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_graph_of_both_passes(cupy, member, dtype, layout):
    """Captured once, replayed on new numbers; nothing is allocated, so that nothing is reused."""
    numbers = MEMBERS[member]
    shape = (129, 63)

    def empty():
        if layout == "strided":
            return cupy.zeros((shape[0], 2 * shape[1]), dtype)[:, ::2]
        return cupy.zeros(shape, dtype, order=layout[0])

    x, y, dy, dx, from_input, slope = (empty() for _ in range(6))
    mask = cupy.zeros(x.size, np.uint8)

    def step():
        _, pullback = relu_xp.relu_vjp(x, out=y, mask=mask, **numbers)
        pullback(dy, out=dx)
        relu_xp.relu_backward(dy, x, out=from_input, **numbers)
        relu_xp.relu_grad(x, out=slope, **numbers)

    def allocate(size):
        raise AssertionError(f"{size} bytes were allocated")

    step()  # compiles, which cannot be captured
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(allocate):
        graph = captured(stream, step)
    rng = np.random.default_rng(9)
    for _ in range(3):
        hosts = [rng.choice(oracle.specials(dtype), shape).view(dtype) for _ in range(2)]
        with stream:
            x[...], dy[...] = map(cupy.asarray, hosts)
            graph.launch()
            cupy.full(1 << 20, 0xFF, np.uint8)  # takes memory that is free
            graph.launch()
        stream.synchronize()
        with np.errstate(all="ignore"):
            wanted = run_all(*hosts, numbers)
        for got, host in zip((y, dx, from_input, slope), (wanted[1], *wanted[3:]), strict=True):
            check_bits(cupy.ascontiguousarray(got).get(), host, member)


def test_layers_in_a_graph(cupy):
    """In place, with a mask that outlives the graph."""
    layers = [relu_xp.ReLU(inplace=True), relu_xp.ReLU6(inplace=True)]
    x, dy = cupy.zeros(5000, np.float32), cupy.zeros(5000, np.float32)
    masks = [cupy.zeros(625, np.uint8) for _ in layers]

    def step():
        for layer, mask in zip(layers, masks, strict=True):
            layer.forward(x, mask=mask)
        for layer in reversed(layers):
            layer.backward(dy)

    step()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        graph = captured(stream, step)
    host, gradient = np.random.default_rng(3).standard_normal((2, 5000)).astype(np.float32) * 4
    with stream:
        x[...], dy[...] = cupy.asarray(host), cupy.asarray(gradient)
        graph.launch()
    stream.synchronize()
    np.testing.assert_array_equal(x.get(), np.clip(host, 0, 6))
    wanted = np.where((host > 0) & (host < 6), gradient, np.float32(0))
    np.testing.assert_array_equal(dy.get(), wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_than_two_to_the_31_elements(cupy, dtype):
    """A tile repeated; compared on the device, where it is. Aligned, and one element off."""
    dtype = oracle.DTYPES[dtype]
    tile = 1 << 20
    size = (1 << 31) + 3 * tile + 777
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 2.3 * size * dtype.itemsize:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, too few for two arrays of 2**31 elements")
    host = np.random.default_rng(4).standard_normal(tile).astype(dtype)

    def repeated(target, values):
        values = cupy.asarray(values)
        whole = target.size // values.size * values.size
        target[:whole].reshape(-1, values.size)[...] = values
        target[whole:] = values[: target.size - whole]

    def check(target, values):
        values = cupy.asarray(values)
        whole = target.size // values.size * values.size
        rows = target[:whole].reshape(-1, values.size)
        for row in range(0, len(rows), 256):  # a comparison of all would need as much memory again
            assert bool((rows[row : row + 256] == values).all()), row
        assert bool((target[whole:] == values[: target.size - whole]).all())

    x, y = cupy.empty(size, dtype), cupy.empty(size, dtype)
    repeated(x, host)
    y.fill(7)
    _, pullback = relu_xp.relu_vjp(x, out=y)
    check(y, np.maximum(host, 0))
    check(pullback._saved.data[: size // 8], np.packbits(host > 0, bitorder="little"))
    y.fill(7)
    pullback(x, out=y)
    check(y, np.maximum(host, 0))
    y.fill(7)
    relu_xp.relu_backward(x, x, out=y)
    check(y, np.maximum(host, 0))
    y.fill(7)
    _, pullback = relu_xp.relu_vjp(x[1:], out=y[1:])  # 2**31 and more, misaligned
    assert float(y[0]) == 7
    check(y[1:], np.roll(np.maximum(host, 0), -1))
    keep = np.packbits(np.roll(host, -1) > 0, bitorder="little")
    check(pullback._saved.data[: size // 8 - 1], keep)
    y.fill(7)
    pullback(x[1:], out=y[1:])
    check(y[1:], np.roll(np.maximum(host, 0), -1))


def test_out_of_memory_is_an_error_and_no_more(cupy):
    """A clear error; the layer, the arrays and the next call are as before."""
    layer = relu_xp.LeakyReLU(0.5)
    x = cupy.asarray(np.array([-2.0, 4.0], np.float32))
    layer.forward(x)
    immense = cupy.broadcast_to(x[:1], (1 << 44,))
    for call in (layer.forward, relu_xp.relu, relu_xp.relu_vjp, relu_xp.relu_grad):
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating"):
            call(immense)
    np.testing.assert_array_equal(layer.backward(x).get(), [-1, 4])
    np.testing.assert_array_equal(relu_xp.relu(x).get(), [0, 4])


def test_arrays_of_every_size_class_at_once(cupy):
    """Many calls in flight on one stream, fresh memory each: none writes what another reads."""
    rng = np.random.default_rng(6)
    shapes = [(3,), (64, 100), (1, 7, 31, 5), (1 << 16,), (257, 1025)]
    hosts = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    results = []
    for host, _ in itertools.product(hosts, range(20)):
        layer = relu_xp.ReLU6()
        x = cupy.asarray(host * 5)
        results.append((host, layer.forward(x), layer.backward(x)))
    for host, y, dx in results:
        np.testing.assert_array_equal(y.get(), np.clip(host * 5, 0, 6))
        inside = (host * 5 > 0) & (host * 5 < 6)
        np.testing.assert_array_equal(dx.get(), np.where(inside, host * 5, np.float32(0)))
    assert math.prod(shapes[-1]) == results[-1][1].size


def test_another_device_is_entered_and_left(cupy):
    """The current device stays; an array of a peer is refused, not copied."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")  # tests/test_cupy_kernels.py shows it with devices of its own
    with cupy.cuda.Device(1):
        x = cupy.asarray(np.array([-1.0, 2.0], np.float32))
    assert cupy.cuda.runtime.getDevice() == 0
    y, pullback = relu_xp.relu_vjp(x)
    assert cupy.cuda.runtime.getDevice() == 0
    assert y.device.id == pullback(x).device.id == 1
    np.testing.assert_array_equal(y.get(), [0, 2])
    with pytest.raises(ValueError, match="forward saw CuPy on device 1, dy is CuPy on device 0"):
        pullback(cupy.ones(2, np.float32))
