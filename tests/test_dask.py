"""Dask: laziness, tasks, chunks of every kind, worker processes that run short or die."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

import relu_xp
from relu_xp import mask as masks
from relu_xp import training
from relu_xp.activation import Activation, activation_of
from relu_xp.dispatch import LibraryError

NUMBERS = [{}, {"negative_slope": 0.5, "max_value": 1.0}]
HOST = np.random.default_rng(8).standard_normal((6, 10)).astype(np.float32)


@pytest.fixture
def da(require):
    return require("dask.array")


@pytest.fixture
def backend(da):
    from relu_xp.backends import dask

    return dask


@contextlib.contextmanager
def cluster_of_two(**settings):
    """Two worker processes of one thread each, and a client for whom Dask computes on them."""
    import dask
    import distributed

    with (
        dask.config.set({f"distributed.{name}": value for name, value in settings.items()}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit="1GB", dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def cluster(require):
    require("distributed")
    with cluster_of_two() as client:
        yield client


def tasks(*arrays):
    """Count the tasks that computing arrays takes, but for those that put chunks together."""
    import dask
    from dask.callbacks import Callback

    keys = []
    with Callback(posttask=lambda key, *_: keys.append(key)):
        dask.compute(*arrays, scheduler="synchronous")
    return sum(isinstance(key, tuple) for key in keys)


# ---- what a call makes


def test_nothing_is_computed_and_the_kind_is_known(da):
    def never(block):
        raise AssertionError("computed")

    meta = np.empty((0, 0), np.float32)
    x = da.ones((4, 4), chunks=2, dtype="float32").map_blocks(never, meta=meta)
    layer = relu_xp.LeakyReLU(0.5)
    dy = x.astype("float64").rechunk(3)
    made = [relu_xp.relu(x), relu_xp.relu_grad(x), layer(x), relu_xp.relu_backward(dy, x)]
    made.append(layer.backward(dy))
    for array in made:
        assert type(array) is da.Array
        assert (array.shape, array.chunks) == (x.shape, x.chunks)
        assert array.dtype == array._meta.dtype
    assert [array.dtype for array in made] == [np.float32] * 3 + [np.float64] * 2
    with pytest.raises(AssertionError, match="computed"):
        made[-1].compute()


def test_a_pass_is_one_task_a_chunk(da):
    """That of x, of which these have nothing else to do, goes into it."""
    x = da.ones((4, 6), chunks=(2, 3), dtype="float32")
    dy = da.zeros((4, 6), chunks=(2, 3))
    assert tasks(x) == 4
    for numbers in NUMBERS:
        assert tasks(relu_xp.relu(x, **numbers)) == 4
        assert tasks(relu_xp.relu_grad(x, **numbers)) == 4
        assert tasks(relu_xp.relu_backward(dy, x, **numbers)) == 4
        y, pullback = relu_xp.relu_vjp(x, **numbers)
        assert tasks(y) == 4
        assert tasks(pullback(dy)) == 4
        assert tasks(y, pullback(dy)) == 4 * 4, "a pair, the saved state, y; and the gradient"


def test_the_same_call_is_the_same_work(da):
    x = da.from_array(HOST, chunks=(3, 5))
    for call in (relu_xp.relu, relu_xp.leaky_relu, lambda x: relu_xp.relu_vjp(x)[1](x)):
        assert call(x).name == call(x).name
    assert relu_xp.relu(x).name != relu_xp.leaky_relu(x).name


def test_between_the_passes_only_masks_are_held(da):
    """Chunks of y and pairs are gone before the gradient, which waits for the whole of y."""
    from dask.callbacks import Callback

    x = da.ones((64, 1000), chunks=(4, 1000), dtype="float32")
    y, pullback = relu_xp.relu_vjp(x)
    dx = pullback(da.broadcast_to(y.max(), x.shape, chunks=x.chunks))
    held = []

    def after(key, result, dsk, state, worker):
        held.append(sum(getattr(r, "nbytes", 0) for r in flat(state["cache"].values())))

    def flat(values):
        for value in values:
            yield from flat(value) if isinstance(value, tuple) else (value,)

    with Callback(posttask=after):
        total = dx.sum().compute(scheduler="synchronous")
    assert total == 64_000
    assert max(held) < 5 * 16_000, "more than some chunks and all masks"


def test_out_and_mask_are_refused(da):
    x = da.ones(3)
    with pytest.raises(TypeError, match="relu: out cannot be written: its library's arrays are im"):
        relu_xp.relu(x, out=da.zeros(3))
    with pytest.raises(TypeError, match="mask was given, but x is Dask, whose masks the library"):
        relu_xp.relu_vjp(x, mask=da.zeros(1, dtype="uint8"))
    with pytest.raises(TypeError, match="relu_backward: x is Dask, dy is NumPy; .*dask.array.asar"):
        relu_xp.relu_backward(np.ones(3), x)


@pytest.mark.parametrize(("numbers", "nbytes"), [(NUMBERS[0], 9), (NUMBERS[1], 60)])
def test_saved_bytes_are_told_beforehand(da, numbers, nbytes):
    _, pullback = relu_xp.relu_vjp(da.from_array(HOST, chunks=(2, 6)), **numbers)
    assert pullback.saved_nbytes == nbytes  # 3 * (ceil(12 / 8) + ceil(8 / 8)) with two pieces
    held = [saved.data for saved in chunks_of(pullback._saved.blocks)]
    assert all(type(mask) is masks.Mask for mask in held)
    assert nbytes <= sum(mask.data.nbytes for mask in held) <= nbytes + 7 * len(held)


# ---- chunks


def chunks_of(array):
    """Compute the chunks of an array as they are: Dask copies one that is the whole."""
    return [chunk.compute(scheduler="synchronous") for chunk in array.to_delayed().ravel()]


def passes(x, dy, **numbers):
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    back = relu_xp.relu_backward(dy, x, **numbers)
    return [relu_xp.relu(x, **numbers), y, relu_xp.relu_grad(x, **numbers), pullback(dy), back]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("chunks", "of_dy"),
    [
        ((6, 10), (6, 10)),
        ((4, 3), (4, 3)),
        ((4, 3), (1, 10)),
        (((0, 6, 0), (10, 0)), (2, 5)),
        (((2, 4), (7, 3)), ((4, 2), (0, 10))),
    ],
    ids=str,
)
def test_any_cut(da, chunks, of_dy, numbers):
    lazy = passes(da.from_array(HOST, chunks=chunks), da.from_array(HOST + 1, of_dy), **numbers)
    for got, wanted in zip(lazy, passes(HOST, HOST + 1, **numbers), strict=True):
        np.testing.assert_array_equal(got.compute(), wanted)


def test_layouts_of_chunks_are_kept(da):
    x = da.from_array(HOST, chunks=(3, 10)).map_blocks(np.asfortranarray)
    for array in passes(x, x):
        assert all(chunk.flags.fnc for chunk in chunks_of(array))


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_chunks_of_unknown_sizes(da, numbers):
    lazy, host = da.from_array(HOST.ravel(), chunks=7), HOST.ravel()
    x, wanted = lazy[lazy > -1], host[host > -1]
    for got, expected in zip(
        passes(x, x, **numbers), passes(wanted, wanted, **numbers), strict=True
    ):
        np.testing.assert_array_equal(got.compute(), expected)
    _, pullback = relu_xp.relu_vjp(x)
    with pytest.raises(ValueError, match=r"x\.compute_chunk_sizes\(\) before forward"):
        pullback.saved_nbytes  # noqa: B018
    fewer = lazy.rechunk(60)
    with pytest.raises(
        ValueError, match="axis 0 is cut into 1 and into 9 chunks, not all of known"
    ):
        pullback(fewer[fewer > -1])
    for gradient in (pullback, lambda dy: relu_xp.relu_backward(dy, x)):
        with pytest.raises(ValueError, match="a chunk of dy has shape .*, the one of x "):
            gradient(lazy[lazy > 0]).compute()
    rows = da.from_array(HOST, chunks=(3, 5))
    rows = rows[rows[:, 0] > 0]  # the other axis is known
    np.testing.assert_array_equal(
        relu_xp.relu_backward(rows.rechunk({1: 2}), rows), np.maximum(HOST[HOST[:, 0] > 0], 0)
    )


def test_other_chunks_than_were_declared(da):
    """The numbers are those that the chunk's own dtype holds."""
    x = da.from_array(np.array([-np.inf, 1, -1]), chunks=2)
    x = x.map_blocks(lambda block: block.astype(np.float16), dtype=np.float64)
    for array in passes(x, x, negative_slope=1e-8):
        assert array.dtype == np.float64
        computed = array.compute()
        assert computed.dtype == np.float16
        assert (computed[[0, 2]] == 0).all(), "1e-8 is 0 in float16"
    short = da.ones(4, chunks=4).map_blocks(lambda block: block[:2], dtype=float)
    with pytest.raises(ValueError, match=r"a chunk of dy has shape \(4,\), the one of x \(2,\)"):
        relu_xp.relu_backward(da.ones(4, chunks=4), short).compute()
    lists = da.ones(4, chunks=4).map_blocks(lambda block: block.tolist(), meta=np.empty(0))
    with pytest.raises(TypeError, match="relu: chunk must be an array, got list"):
        relu_xp.relu(lists).compute()


def test_integers_go_forward(da):
    x = da.from_array(np.arange(-5, 5, dtype=np.int16), chunks=4)
    y = relu_xp.relu(x, max_value=3)
    assert y.compute().tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3, 3]
    assert y.compute().dtype == np.int16
    with pytest.raises(TypeError, match="relu_grad: x has dtype int16, which has no gradient"):
        relu_xp.relu_grad(x)
    with pytest.raises(TypeError, match="relu: x: complex64 has no order"):
        relu_xp.relu(x.astype(np.complex64))
    with pytest.raises(TypeError, match="relu: x: byte-swapped dtype"):
        relu_xp.relu(x.astype(">f4"))


def test_chunks_of_cupy(da, request):
    """CuPy's kernels, and masks in its memory, inside the tasks."""
    from conftest import unavailable
    from libraries import LIBRARIES

    library = LIBRARIES["cupy_host"]
    if reason := library.load():
        unavailable(request.config, reason)
    import cupy

    with library.running():
        kind = library.array(np.empty((0, 0), np.float32))
        x = da.from_array(HOST, chunks=(3, 10)).map_blocks(library.array, meta=kind)
        for lazy, wanted in zip(passes(x, x), passes(HOST, HOST), strict=True):
            assert type(lazy._meta) is cupy.ndarray
            rows = [library.numpy(chunk) for chunk in chunks_of(lazy)]  # asserts what they are
            np.testing.assert_array_equal(np.concatenate(rows), wanted)
        _, pullback = relu_xp.relu_vjp(x)
        assert pullback.saved_nbytes == 2 * 4
        for saved in chunks_of(pullback._saved.blocks):
            assert type(saved.data.data) is cupy.ndarray


def test_what_dask_reduced_is_an_array(da):
    """Its own reductions and indexing make NumPy scalars of 0-d chunks."""
    x = da.from_array(HOST, chunks=3)
    assert relu_xp.relu(x.sum()).compute() == max(HOST.sum(dtype=np.float32), 0)
    assert relu_xp.relu_grad(x[0, 0]).compute() == float(HOST[0, 0] > 0)
    _, pullback = relu_xp.relu_vjp(abs(x).sum())
    assert pullback(x.mean()).compute() == x.mean().compute()
    assert relu_xp.relu_backward(x.mean(), abs(x).sum()).compute() == x.mean().compute()
    assert relu_xp.squared_relu(da.ones(3).sum()).compute() == 9
    assert relu_xp.prelu(-da.ones(3).sum(), da.ones(()) / 2).compute() == -1.5
    slope = relu_xp.rrelu(-da.ones(3).sum(), 0.5, 0.5, rng=np.random.default_rng(0))
    assert slope.compute() == -1.5


def test_variants_of_unknown_sizes_say_what_to_do(da):
    x = da.from_array(HOST, chunks=3)
    ragged = x[x[:, 0] > 0]
    advice = r"compute_chunk_sizes\(\)"
    with pytest.raises(ValueError, match=f"^rrelu: x has chunks of unknown sizes.*{advice}"):
        relu_xp.rrelu(ragged, rng=np.random.default_rng(0))
    channels = f"x has an unknown number of channels along axis 0; call x.{advice} first$"
    with pytest.raises(ValueError, match=f"^prelu: {channels}"):
        relu_xp.prelu(ragged, da.ones(2), axis=0)
    with pytest.raises(ValueError, match=f"^crelu: {channels}"):
        relu_xp.crelu(ragged, axis=0)
    layer = relu_xp.SquaredReLU()
    layer.forward(ragged)
    message = "what is saved for chunks of unknown sizes is not known before it is computed; call x"
    with pytest.raises(ValueError, match=f"^{message}.{advice} before forward$"):
        layer.saved_nbytes  # noqa: B018


# ---- numbers, masks and backends on their way


def test_numbers_find_themselves_again():
    numbers = activation_of(0.1, 0.0, 1.0, 6.0).round_to("float16")
    again = pickle.loads(pickle.dumps(numbers))
    assert again is numbers
    assert again.activation is activation_of(0.1, 0.0, 1.0, 6.0)
    assert len(pickle.dumps(numbers)) < 200
    fresh = Activation(negative_slope=0.3)
    assert fresh.round_to("float32") is fresh.round_to("float32")
    assert fresh.round_to("float64") is not fresh.round_to("float32")


def test_a_mask_travels_and_tells_its_size(require, da, backend):
    sizeof = require("dask.sizeof").sizeof
    _, pullback = relu_xp.relu_vjp(da.ones((300, 400), chunks=(300, 200)))
    assert [sizeof(saved) for saved in chunks_of(pullback._saved.blocks)] == [7_500] * 2
    _, pullback = relu_xp.relu_vjp(np.asfortranarray(np.ones((300, 400), np.float32)))
    mask = pullback._saved
    again = pickle.loads(pickle.dumps(mask))
    assert type(again) is type(mask)
    assert again.axes == mask.axes == (1, 0)
    np.testing.assert_array_equal(again.data, mask.data)
    assert sizeof(mask) == mask.data.nbytes == 15_000


# ---- what members need that four numbers do not describe, called as it is


def above(x, high, low):
    return np.where(~(x <= 0), high, low)


class Plain:
    """What a backend of the chunks does, as NumPy says it."""

    @staticmethod
    def dtype_name(dtype):
        return dtype.name

    @staticmethod
    def sloped(values, x, slopes, out):
        if values is None:
            values = np.ones((slopes if x is None else x).shape, slopes.dtype)
        low = np.where(slopes == 0, 0, slopes.astype(values.dtype) * values)
        return low if x is None else above(x, values, low)

    @staticmethod
    def slopes_gradient(dy, x, slopes, out):
        axes = tuple(axis for axis, length in enumerate(slopes.shape) if length == 1)
        products = above(x, 0, x.astype("f8") * dy)
        return products.sum(axis=axes, keepdims=True).astype(slopes.dtype)

    @staticmethod
    def squared(x, out):
        return np.maximum(x, 0) ** 2

    @staticmethod
    def backward_squared(dy, x, out):
        return above(x, 2 * x * dy, 0)

    @staticmethod
    def both(x, axis, out):
        return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis)

    @staticmethod
    def pieces_of_both(x):
        return (~(x <= 0) + 2 * ~(x >= 0)).astype(np.uint8)

    @staticmethod
    def backward_both(dy, pieces, axis, out):
        one, other = np.split(dy, 2, axis)
        return np.where(pieces & 1, one, 0) - np.where(pieces & 2, other, 0)


@pytest.mark.parametrize("shape", [(1, 10), (6, 1), (1, 1), (6, 10)], ids=str)
def test_slopes(backend, da, shape):
    slopes = np.random.default_rng(9).random(shape).astype(np.float32)
    slopes[0, 0] = 0
    gradient = (HOST + 1).astype(np.float64)
    x, dy = da.from_array(HOST, chunks=(4, 3)), da.from_array(gradient, chunks=(6, 5))
    given = da.from_array(slopes, chunks=2)
    full = da.from_array(np.broadcast_to(slopes, HOST.shape), chunks=4)
    for arguments, host in (
        ((x, x, given), (HOST, HOST, slopes)),
        ((dy, x, given), (gradient, HOST, slopes)),
        ((None, x, given), (None, HOST, slopes)),
        ((dy, None, full), (gradient, None, slopes)),
        ((None, None, given), (None, None, slopes)),
    ):
        got, wanted = backend.sloped(*arguments, None), Plain.sloped(*host, None)
        like = next(a for a in (arguments[1], arguments[0], given) if a is not None)
        assert (got.shape, got.chunks, got.dtype) == (wanted.shape, like.chunks, wanted.dtype)
        computed = got.compute()
        assert computed.dtype == wanted.dtype
        np.testing.assert_array_equal(computed, wanted)
        assert not np.signbit(computed[:1, :1]).any(), "+0, or above"
    got = backend.slopes_gradient(dy, x, given, None)
    wanted = Plain.slopes_gradient(gradient, HOST, slopes, None)
    assert (got.shape, got.dtype) == (slopes.shape, slopes.dtype)
    computed = got.compute()
    assert (computed.shape, computed.dtype) == (slopes.shape, slopes.dtype)
    np.testing.assert_allclose(computed, wanted, rtol=1e-6)
    ragged = x[x[:, 0] > 0]
    short = dy[x[:, 0] > 0.5].rechunk({1: 5})
    with pytest.raises(ValueError, match="a chunk of dy has shape "):
        backend.sloped(short, ragged, da.ones((1, 1)), None).compute()


def test_slopes_are_summed_in_float64(backend, da):
    """In float32 the sum of these would stop at 2**24, or be infinite."""
    x = -da.ones((1 << 20, 40), chunks=(1 << 17, 20), dtype="float32")
    total = backend.slopes_gradient(x, x, da.ones((1, 1), dtype="float32"), None).compute()
    assert total.item() == 40 << 20
    large = da.from_array(np.array([[-3e38], [1.0], [1.0]], np.float32), chunks=(1, 1))
    gradient = da.from_array(np.array([[3e38], [np.nan], [np.inf]], np.float32), chunks=(1, 1))
    narrow = backend.slopes_gradient(x, x, da.ones((1, 1), dtype="float16"), None).compute()
    assert (narrow.dtype, narrow.item()) == (np.float16, np.inf)
    scalar = da.from_array(np.array(-2.0))
    assert type(backend.slopes_gradient(scalar, scalar, scalar, None).compute()) is np.ndarray
    wide = backend.slopes_gradient(gradient, large, da.ones((1, 1)), None)
    assert wide.compute().item() == -(float(np.float32(3e38)) ** 2), "beyond float32, and no NaN"


def test_squares(backend, da):
    x, dy = da.from_array(HOST, chunks=(4, 3)), da.from_array(HOST + 1, chunks=(6, 5))
    np.testing.assert_array_equal(backend.squared(x, None).compute(), Plain.squared(HOST, None))
    got = backend.backward_squared(dy, x, None)
    np.testing.assert_array_equal(got.compute(), Plain.backward_squared(HOST + 1, HOST, None))


@pytest.mark.parametrize("axis", [0, 1])
def test_both(backend, da, axis):
    host = HOST.copy()
    host[0, :3] = np.nan, 0.0, -0.0
    x = da.from_array(host, chunks=(4, 3))
    y, pieces = backend.both(x, axis, None), backend.pieces_of_both(x)
    wanted = Plain.both(host, axis, None)
    assert y.shape == wanted.shape
    assert y.chunks[1 - axis] == x.chunks[1 - axis], "the batch is left as it is cut"
    np.testing.assert_array_equal(y.compute(), wanted)
    assert pieces.dtype == pieces._meta.dtype == np.uint8
    np.testing.assert_array_equal(pieces.compute(), Plain.pieces_of_both(host))
    gradient = np.arange(wanted.size, dtype=np.float64).reshape(wanted.shape)
    for dy in (da.from_array(gradient, chunks=(5, 7)), da.from_array(gradient, chunks=y.chunks)):
        dx = backend.backward_both(dy, pieces, axis, None)
        assert (dx.shape, dx.dtype) == (host.shape, np.float64)
        expected = Plain.backward_both(gradient, Plain.pieces_of_both(host), axis, None)
        np.testing.assert_array_equal(dx.compute(), expected)


@pytest.mark.parametrize(("dtype", "wanted"), [("f2", "f4"), ("f4", "f4"), ("f8", "f8")])
def test_uniform(backend, da, dtype, wanted):
    x = da.zeros((100, 200), chunks=(30, 200), dtype=dtype)
    first = backend.uniform(np.random.default_rng(3), 0.25, 0.75, x)
    assert (first.chunks, first.dtype) == (x.chunks, wanted)
    values = first.compute()
    assert values.dtype == wanted
    assert values.min() >= 0.25
    assert values.max() <= 0.75
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert not np.array_equal(values[:30], values[30:60])
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(backend.uniform(rng, 0.25, 0.75, x).compute(), values)
    assert not np.array_equal(backend.uniform(rng, 0.25, 0.75, x).compute(), values)
    for other in (da.random.default_rng(3), lambda shape: np.full(shape, 0.5, wanted)):
        drawn = backend.uniform(other, 2.0, 4.0, x)
        assert (drawn.chunks, drawn.dtype) == (x.chunks, wanted)
        assert drawn.mean().compute() == pytest.approx(3, abs=0.02)


def test_a_copy_is_the_array_itself(backend, da):
    x = da.ones(3)
    assert backend.copy(x) is x


# ---- processes


def make_block(block_info=None):
    return np.resize(np.arange(-2, 3, dtype=np.float32), block_info[None]["chunk-shape"])


def limits(dask_worker):
    manager = dask_worker.memory_manager
    thresholds = manager.memory_target_fraction, manager.memory_spill_fraction
    return manager.memory_limit, thresholds, dask_worker.nanny is not None


def peak_memory():
    """Return the most bytes of this process that were in memory, without its parent's."""
    with open("/proc/self/status") as status:
        (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
    return 1024 * int(peak)


def test_a_cluster_computes_the_same(cluster, da):
    host = np.random.default_rng(1).standard_normal((60, 50)).astype(np.float32)
    for numbers in (*NUMBERS, {"threshold": 0.25, "positive_slope": 2.0}):
        x, dy = da.from_array(host, chunks=(16, 25)), da.from_array(host + 1, chunks=(60, 10))
        lazy = cluster.gather(cluster.compute(passes(x, dy, **numbers)))
        for got, wanted in zip(lazy, passes(host, host + 1, **numbers), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_four_gigabytes_through_two_workers_of_one(require, da):
    """The gradient needs the whole of y, 4 GB, before it can begin. What is held by then: masks.

    Nothing is spilled to disk or paused, and a worker beyond its limit is killed for good.
    """
    dask = require("dask")
    require("distributed")
    memory = {f"worker.memory.{name}": False for name in ("target", "spill", "pause")}
    memory["worker.memory.terminate"] = 0.95
    with cluster_of_two(**memory, **{"scheduler.allowed-failures": 0}) as client:
        for limit, thresholds, has_nanny in client.run(limits).values():
            assert (limit, thresholds, has_nanny) == (10**9, (False, False), True)
        rows, columns = 250_000, 4_000
        meta = np.empty((0, 0), np.float32)
        chunks = ((1000,) * (rows // 1000), (columns,))
        x = da.map_blocks(make_block, chunks=chunks, dtype=np.float32, meta=meta)
        assert x.nbytes == 4 * 10**9
        y, pullback = relu_xp.relu_vjp(x)
        assert pullback.saved_nbytes == x.nbytes // 32
        dx = pullback(da.broadcast_to(y.max(), x.shape, chunks=x.chunks))
        results = dask.compute(y.sum(dtype="f8"), dx.sum(dtype="f8"))
        assert results == (rows * columns * 3 / 5, 2 * rows * columns * 2 / 5)
        assert max(client.run(peak_memory).values()) < 10**9


# ---- training

# What older versions of Dask warn of is what is wanted here: the cluster's client is not asked.
elsewhere = pytest.mark.filterwarnings("ignore:Running on a single-machine scheduler:UserWarning")


def numbers_of(result):
    return dataclasses.replace(result, images_per_second=0.0)


@pytest.fixture(scope="module")
def undisturbed(require, cluster):
    require("sklearn"), require("tqdm")
    return training.train("dask", epochs=2, seed=1)


def test_a_cluster_learns_what_numpy_does(cluster, undisturbed):
    reference = training.train("numpy", epochs=2, seed=1)
    assert undisturbed.losses == pytest.approx(reference.losses, rel=1e-4)
    assert undisturbed.accuracies == pytest.approx(reference.accuracies, abs=0.01)
    address = cluster.scheduler.address
    assert undisturbed.device == f"2 workers at {address}, 2 threads"


@elsewhere
def test_threads_learn_the_same_to_the_bit(require, undisturbed):
    """The sums do not depend on who computes them."""
    dask = require("dask")
    with dask.config.set(scheduler="threads"):
        result = training.train("dask", epochs=2, seed=1)
    assert result.device == f"this machine, scheduler 'threads', {dask.system.CPU_COUNT} CPUs"
    assert numbers_of(result) == dataclasses.replace(numbers_of(undisturbed), device=result.device)


def test_a_worker_that_is_killed_takes_nothing_away(cluster, undisturbed, monkeypatch):
    workers = cluster.run(os.getpid)
    victim = next(iter(workers.values()))
    steps = []
    gradient = training._gradient_of_chunks

    def interrupted(*arguments):
        steps.append(None)
        if len(steps) == 50:
            os.kill(victim, signal.SIGKILL)
        return gradient(*arguments)

    monkeypatch.setattr(training, "_gradient_of_chunks", interrupted)
    result = training.train("dask", epochs=2, seed=1)
    assert len(steps) == 88
    assert victim not in cluster.run(os.getpid).values()
    assert numbers_of(result) == dataclasses.replace(numbers_of(undisturbed), device=result.device)
    cluster.wait_for_workers(2, timeout=60)


@elsewhere
@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_chunks_of_a_batch_have_its_gradient(da, monkeypatch, chunks):
    monkeypatch.setattr(training, "_CHUNKS", chunks)
    rng = np.random.default_rng(0)
    parameters = training._initial(rng)
    x = rng.random((32, 64), np.float32)
    target = np.eye(10, dtype=np.float32)[rng.integers(0, 10, 32)]
    whole = training._gradient(parameters, x, target)
    import dask

    with dask.config.set(scheduler="synchronous"):
        summed = training._gradient_of_chunks(parameters, x, target)
    for got, wanted in zip(summed, whole, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-P", "-m", "relu_xp", "train", "--backend", "dask", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_line_on_a_cluster(require, cluster):
    require("sklearn"), require("tqdm")
    address = cluster.scheduler.address
    result = command("--epochs", "1", "--scheduler", address)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        "backend             dask",
        f"device              2 workers at {address}, 2 threads",
    ]


@pytest.mark.parametrize("case", ["nobody", "something else", "no address"])
def test_a_scheduler_that_does_not_answer_is_one_line(require, case):
    require("distributed"), require("sklearn"), require("tqdm")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        if case == "nobody":
            listening.close()
        reason = {
            "nobody": "Timed out trying to connect",
            "something else": "something else listens",
            "no address": "missing port number",
        }[case]
        result = command("--scheduler", "nonsense" if case == "no address" else address)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    start = "relu-xp train: error: backend 'dask' is not available: no scheduler answers at "
    assert result.stderr.startswith(start)
    assert reason in result.stderr


def test_workers_that_cannot_serve_are_refused(require):
    distributed = require("distributed")
    with distributed.LocalCluster(
        n_workers=0, dashboard_address=":0", processes=False, protocol="tcp"
    ) as cluster:
        address = cluster.scheduler_address
        with (
            pytest.raises(LibraryError, match=f"the scheduler at {address} has no workers"),
            training.connected(address),
        ):
            pass


def test_a_scheduler_is_asked_inside_a_running_loop_too(require):
    require("distributed")

    async def notebook():
        with training.connected("tcp://127.0.0.1:1"):
            pass

    with pytest.raises(LibraryError, match="no scheduler answers at"):
        asyncio.run(notebook())
