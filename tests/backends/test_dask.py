"""Dask arrays: laziness, tasks, chunks of every kind."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from libraries import LIBRARIES, unavailable
from passes import run_all

import relu_xp
from relu_xp.mask import Mask
from relu_xp.parameters import make_parameters

da = pytest.importorskip("dask.array")
sizeof = pytest.importorskip("dask.sizeof").sizeof

MASKS = {"bits": {}, "bytes": {"negative_slope": 0.5, "max_value": 1.0}}
each_mask = pytest.mark.parametrize("params", MASKS.values(), ids=MASKS)
HOST = np.random.default_rng(8).standard_normal((6, 10)).astype(np.float32)


def chunks_of(array):
    """Return the chunks of an array, computed, as they are: Dask copies one that is the whole."""
    return [chunk.compute(scheduler="synchronous") for chunk in array.to_delayed().ravel()]


def test_nothing_is_computed_and_the_kind_is_known():
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
    assert [array.dtype for array in made] == [np.float32] * 3 + [np.float64] * 2
    with pytest.raises(AssertionError, match="computed"):
        made[-1].compute()


@each_mask
def test_a_pass_is_one_task_per_chunk(params):
    """The one that makes a chunk of x, which is used nowhere else, is fused into it."""
    import dask
    from dask.callbacks import Callback

    def tasks(*arrays):
        keys = []
        with Callback(posttask=lambda key, *_: keys.append(key)):
            dask.compute(*arrays, scheduler="synchronous")
        return sum(isinstance(key, tuple) for key in keys)  # others put the chunks together

    x = da.ones((4, 6), chunks=(2, 3), dtype="float32")
    dy = da.zeros((4, 6), chunks=(2, 3))
    assert [tasks(array) for array in (x, *run_all(x, dy, params))] == [4] * 6
    y, pullback = relu_xp.relu_vjp(x, **params)
    assert tasks(y, pullback(dy)) == 4 * 4, "a pair, the residuals, y; and the gradient"


def test_equal_calls_have_equal_names():
    x = da.from_array(HOST, chunks=(3, 5))
    for call in (relu_xp.relu, relu_xp.leaky_relu, lambda x: relu_xp.relu_vjp(x)[1](x)):
        assert call(x).name == call(x).name
    assert relu_xp.relu(x).name != relu_xp.leaky_relu(x).name


def test_between_the_passes_only_masks_are_held():
    """Chunks of y and pairs are gone before the gradient, which waits for the whole of y."""
    from dask.callbacks import Callback

    x = da.ones((64, 1000), chunks=(4, 1000), dtype="float32")
    y, pullback = relu_xp.relu_vjp(x)
    dx = pullback(da.broadcast_to(y.max(), x.shape, chunks=x.chunks))
    held = []

    def after(key, result, dsk, state, worker):
        held.append(sum(map(sizeof, state["cache"].values())))

    with Callback(posttask=after):
        total = dx.sum().compute(scheduler="synchronous")
    assert total == 64_000
    assert max(held) < 5 * 16_000, "more than some chunks and all masks"


@each_mask
def test_saved_bytes_are_known_beforehand(params):
    _, pullback = relu_xp.relu_vjp(da.from_array(HOST, chunks=(2, 6)), **params)
    nbytes = 60 if params else 9  # 3 * (ceil(12 / 8) + ceil(8 / 8))
    assert pullback.saved_nbytes == nbytes
    held = [residuals.data for residuals in chunks_of(pullback._residuals.blocks)]
    assert all(type(mask) is Mask for mask in held)
    assert nbytes <= sum(mask.data.nbytes for mask in held) <= nbytes + 7 * len(held)


@each_mask
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
def test_any_chunks(chunks, of_dy, params):
    lazy = run_all(da.from_array(HOST, chunks=chunks), da.from_array(HOST + 1, of_dy), params)
    for got, wanted in zip(lazy, run_all(HOST, HOST + 1, params), strict=True):
        np.testing.assert_array_equal(got.compute(), wanted)


def test_layouts_of_chunks_are_kept():
    x = da.from_array(HOST, chunks=(3, 10)).map_blocks(np.asfortranarray)
    for array in run_all(x, x, {}):
        assert all(chunk.flags.fnc for chunk in chunks_of(array))


@each_mask
def test_chunks_of_unknown_sizes(params):
    lazy, host = da.from_array(HOST.ravel(), chunks=7), HOST.ravel()
    x, its_host = lazy[lazy > -1], host[host > -1]
    wanted = run_all(its_host, its_host, params)
    for got, expected in zip(run_all(x, x, params), wanted, strict=True):
        np.testing.assert_array_equal(got.compute(), expected)
    _, pullback = relu_xp.relu_vjp(x)
    fewer = lazy.rechunk(60)
    with pytest.raises(ValueError, match="axis 0 has 1 chunks and 9, not all of known"):
        pullback(fewer[fewer > -1])
    for gradient in (pullback, lambda dy: relu_xp.relu_backward(dy, x)):
        with pytest.raises(ValueError, match="a chunk of dy has shape .*, the one of x "):
            gradient(lazy[lazy > 0]).compute()
    rows = da.from_array(HOST, chunks=(3, 5))
    rows = rows[rows[:, 0] > 0]  # the other axis is known
    np.testing.assert_array_equal(
        relu_xp.relu_backward(rows.rechunk({1: 2}), rows), np.maximum(HOST[HOST[:, 0] > 0], 0)
    )


def test_other_chunks_than_were_declared():
    """The parameters are those that the chunk's own dtype holds."""
    x = da.from_array(np.array([-np.inf, 1, -1]), chunks=2)
    x = x.map_blocks(lambda block: block.astype(np.float16), dtype=np.float64)
    for array in run_all(x, x, {"negative_slope": 1e-8}):
        assert array.dtype == np.float64
        computed = array.compute()
        assert computed.dtype == np.float16
        assert (computed[[0, 2]] == 0).all(), "1e-8 is 0 in float16"
    short = da.ones(4, chunks=4).map_blocks(lambda block: block[:2], dtype=float)
    with pytest.raises(ValueError, match=r"a chunk of dy has shape \(4,\), the one of x \(2,\)"):
        relu_xp.relu_backward(da.ones(4, chunks=4), short).compute()
    lists = da.ones(4, chunks=4).map_blocks(lambda block: block.tolist(), meta=np.empty(0))
    with pytest.raises(TypeError, match="relu: a chunk of x must be an array, got list"):
        relu_xp.relu(lists).compute()


def test_chunks_of_cupy(request):
    """CuPy's kernels, and masks in its memory, inside the tasks."""
    library = LIBRARIES["cupy_host"]
    if reason := library.load():
        unavailable(request.config, reason)
    import cupy

    with library.running():
        meta = library.array(np.empty((0, 0), np.float32))
        x = da.from_array(HOST, chunks=(3, 10)).map_blocks(library.array, meta=meta)
        for lazy, wanted in zip(run_all(x, x, {}), run_all(HOST, HOST, {}), strict=True):
            rows = [library.numpy(chunk) for chunk in chunks_of(lazy)]  # asserts what they are
            np.testing.assert_array_equal(np.concatenate(rows), wanted)
        _, pullback = relu_xp.relu_vjp(x)
        assert pullback.saved_nbytes == 2 * 4
        for residuals in chunks_of(pullback._residuals.blocks):
            assert type(residuals.data.data) is cupy.ndarray
        meta = library.array(HOST[0, :0])
        bias = da.from_array(HOST[0], chunks=10).map_blocks(library.array, meta=meta)
        wanted, its_pullback = relu_xp.bias_relu_vjp(HOST, HOST[0])
        y, pullback = relu_xp.bias_relu_vjp(x, bias)
        dx, _ = pullback(x)  # of the bias's gradient CuPy adds the chunks: that needs a device
        for lazy, expected in ((y, wanted), (dx, its_pullback(HOST)[0])):
            rows = [library.numpy(chunk) for chunk in chunks_of(lazy)]
            np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_a_reduced_or_indexed_array():
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


def test_errors_for_unknown_sizes_say_what_to_do():
    x = da.from_array(HOST, chunks=3)
    ragged = x[x[:, 0] > 0]
    advice = r"x\.compute_chunk_sizes\(\)"
    channels = f"x has an unknown number of channels along axis 0; call {advice} first$"
    with pytest.raises(ValueError, match=f"^rrelu: x has chunks of unknown sizes; call {advice} "):
        relu_xp.rrelu(ragged, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"^prelu: {channels}"):
        relu_xp.prelu(ragged, da.ones(2), axis=0)
    with pytest.raises(ValueError, match=f"^crelu: {channels}"):
        relu_xp.crelu(ragged, axis=0)
    for vjp in (relu_xp.relu_vjp, relu_xp.squared_relu_vjp):
        with pytest.raises(ValueError, match=f"^what is saved .* call {advice} before forward$"):
            vjp(ragged)[1].saved_nbytes  # noqa: B018


def test_what_travels_is_small_and_has_a_size():
    """Equal parameters are cast to one object, where they arrive too."""
    params = make_parameters(0.1, 0.0, 1.0, 6.0).cast("float16")
    assert pickle.loads(pickle.dumps(params)) is params
    assert len(pickle.dumps(params)) < 200
    _, pullback = relu_xp.relu_vjp(da.ones((300, 400), chunks=(300, 200)))
    assert [sizeof(residuals) for residuals in chunks_of(pullback._residuals.blocks)] == [7_500] * 2
    assert sizeof(Mask(np.ones(15_000, np.uint8), (1, 0))) == 15_000


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["prelu", "crelu", "squared_relu"])
def test_other_activations_with_any_chunks(name, axis):
    def vjp(x, *weight):
        options = {} if name == "squared_relu" else {"axis": axis}
        return getattr(relu_xp, f"{name}_vjp")(x, *weight[: name == "prelu"], **options)

    host = HOST.copy()
    host[0, :3] = np.nan, 0.0, -0.0
    weight = np.linspace(-1, 1, host.shape[axis], dtype=np.float32)
    y, pullback = vjp(host, weight)
    dy = np.cos(np.arange(y.size)).reshape(y.shape)
    x = da.from_array(host, chunks=(4, 3))
    lazy_y, lazy_pullback = vjp(x, da.from_array(weight, chunks=2))
    assert (lazy_y.shape, lazy_y.dtype) == (y.shape, y.dtype)
    np.testing.assert_array_equal(lazy_y.compute(), y)
    for chunks in ((4, 3), (5, 7)):
        wanted, got = pullback(dy), lazy_pullback(da.from_array(dy, chunks=chunks))
        if name == "prelu":
            (wanted, wanted_weight), (got, got_weight) = wanted, got
            assert (got_weight.shape, got_weight.dtype) == (weight.shape, weight.dtype)
            np.testing.assert_allclose(got_weight.compute(), wanted_weight, rtol=1e-6)
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(got.compute(), wanted)


def test_weight_gradients_are_summed_in_float64():
    """In float32 the sum of these would stop at 2**24, or be infinite."""
    x = -da.ones((1 << 20, 40), chunks=(1 << 17, 20), dtype="float32")
    _, pullback = relu_xp.prelu_vjp(x, da.ones(1, dtype="float32"))
    assert pullback(x)[1].compute().item() == 40 << 20
    _, pullback = relu_xp.prelu_vjp(x, da.ones(1, dtype="float16"))
    narrow = pullback(x)[1].compute()
    assert (narrow.dtype, narrow.item()) == (np.float16, np.inf)
    large = da.from_array(np.array([[-3e38], [1.0], [1.0]], np.float32), chunks=(1, 1))
    dy = da.from_array(np.array([[3e38], [np.nan], [np.inf]], np.float32), chunks=(1, 1))
    _, pullback = relu_xp.prelu_vjp(large, da.ones(1))
    wide = pullback(dy)[1].compute()
    assert wide.item() == -(float(np.float32(3e38)) ** 2), "beyond float32, and no NaN"


@each_mask
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("chunks", "of_bias", "of_dy"),
    [
        ((6, 10, 4), 10, (6, 10, 4)),
        ((4, 3, 2), 3, (4, 3, 2)),
        ((4, 3, 4), 1, (1, 10, 3)),
        (((0, 6, 0), (10, 0), (1, 3)), 2, (2, 5, 4)),
    ],
    ids=str,
)
def test_bias_relu_of_any_chunks(chunks, of_bias, of_dy, axis, params):
    """Those of y and dx are those of x; exact numbers have one sum in any order."""
    rng = np.random.default_rng(9)
    host, gradient = (rng.integers(-8, 9, (6, 10, 4)).astype(np.float32) / 4 for _ in range(2))
    added = np.linspace(-1, 1, host.shape[axis], dtype=np.float16)
    x, dy = da.from_array(host, chunks=chunks), da.from_array(gradient, chunks=of_dy)
    bias = da.from_array(added, chunks=of_bias)
    y, pullback = relu_xp.bias_relu_vjp(x, bias, axis=axis, **params)
    its_y, its_pullback = relu_xp.bias_relu_vjp(host, added, axis=axis, **params)
    dx, bias_grad = pullback(dy)
    once = relu_xp.bias_relu(x, bias, axis=axis, **params)
    assert y.chunks == dx.chunks == once.chunks == x.chunks
    assert bias_grad.chunks == (x.chunks[axis],)
    wanted = its_y, its_y, *its_pullback(gradient)
    for lazy, expected in zip((y, once, dx, bias_grad), wanted, strict=True):
        found = lazy.compute()
        assert lazy.dtype == found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert type(bias_grad._meta) is np.ndarray
    assert pullback.saved_nbytes == relu_xp.relu_vjp(x, **params)[1].saved_nbytes


def test_a_pass_of_bias_relu_is_one_task_per_chunk():
    """The one of the gradient also makes the chunk's sums."""
    import dask
    from dask.callbacks import Callback

    def passes(*arrays):
        names = []
        with Callback(posttask=lambda key, *_: names.append(str(key))):
            dask.compute(*arrays, scheduler="synchronous", optimize_graph=False)
        return sorted(name.split("-")[1] for name in names if "relu-bias_relu" in name)

    x, bias = da.ones((4, 6), chunks=(2, 3), dtype="float32"), da.ones(6, chunks=6)
    y, pullback = relu_xp.bias_relu_vjp(x, bias)
    assert passes(relu_xp.bias_relu(x, bias)) == ["bias_relu"] * 4
    assert passes(y) == ["bias_relu_with_mask"] * 4
    assert passes(*pullback(x)) == ["bias_relu_backward"] * 4 + ["bias_relu_with_mask"] * 4


def test_bias_gradients_are_summed_in_float64():
    """Within chunks and of all chunks: in float32 these would stop at 2**24, or cancel."""
    x = da.ones((1 << 20, 40), chunks=(1 << 17, 20), dtype="float32")
    for dtype in ("float32", "float64"):
        _, pullback = relu_xp.bias_relu_vjp(x.rechunk({1: 40}), da.zeros(40, dtype=dtype))
        assert (pullback(x * 33)[1].compute() == 33 << 20).all()
    _, pullback = relu_xp.bias_relu_vjp(x, da.zeros(40, dtype="float16"))
    narrow = pullback(x)[1].compute()
    assert narrow.dtype == np.float16
    assert (narrow == np.inf).all()
    few = np.array([[2.0**30], [1.0], [-(2.0**30)]], np.float32)
    _, pullback = relu_xp.bias_relu_vjp(da.ones((3, 1), chunks=1), da.zeros(1, dtype="float32"))
    assert pullback(da.from_array(few, chunks=1))[1].compute() == 1


@pytest.mark.parametrize("chunks", [1, 2])
def test_sums_that_are_not_finite_warn_of_nothing(chunks):
    """One NaN stands for all, whichever chunk it comes from."""
    dy = np.array([[np.inf, np.nan, -np.nan, np.inf], [-np.inf, 1, 1, 1]], np.float32)
    x, bias = da.ones((2, 4), chunks=chunks), da.zeros(4, dtype="float32")
    found = relu_xp.bias_relu_vjp(x, bias)[1](da.from_array(dy, chunks=chunks))[1].compute()
    assert found.view(np.uint32).tolist() == [0x7FC00000] * 3 + [0x7F800000]
    weight = da.zeros(4, dtype="float32")
    found = relu_xp.prelu_vjp(-x, weight)[1](da.from_array(dy, chunks=chunks))[1].compute()
    assert found.view(np.uint32).tolist() == [0x7FC00000] * 3 + [0xFF800000]


def test_bias_relu_of_chunks_of_unknown_sizes():
    """Along another axis than the bias's; along it the sizes must be known."""
    lazy = da.from_array(HOST, chunks=(2, 5))
    x, its_host = lazy[lazy[:, 0] > 0], HOST[HOST[:, 0] > 0]
    added = np.linspace(-1, 1, 10, dtype=np.float32)
    y, pullback = relu_xp.bias_relu_vjp(x, da.from_array(added, chunks=4))
    dx, bias_grad = pullback(x)
    its_y, its_pullback = relu_xp.bias_relu_vjp(its_host, added)
    np.testing.assert_array_equal(y.compute(), its_y)
    np.testing.assert_array_equal(dx.compute(), its_pullback(its_host)[0])
    np.testing.assert_allclose(bias_grad.compute(), its_pullback(its_host)[1], rtol=1e-6)
    with pytest.raises(ValueError, match="unknown number of channels along axis 0; call x.compute"):
        relu_xp.bias_relu(x, da.ones(3), axis=0)
    short = da.ones((4, 6), chunks=3).map_blocks(lambda block: block[:, :1], dtype=float)
    for call in (relu_xp.bias_relu, lambda x, bias: relu_xp.bias_relu_vjp(x, bias)[0]):
        with pytest.raises(
            ValueError, match=r"bias has shape \(3,\), the one of x \(., 1\), along"
        ):
            call(short, da.ones(6)).compute()


def test_nothing_of_a_bias_is_computed():
    """The kind of each result is known; between the passes only masks are held."""
    from dask.callbacks import Callback

    def never(block):
        raise AssertionError("computed")

    meta = np.empty((0, 0), np.float32)
    x = da.ones((4, 4), chunks=2, dtype="float32").map_blocks(never, meta=meta)
    y, pullback = relu_xp.bias_relu_vjp(x, x[0])
    dx, bias_grad = pullback(x.astype("float64"))
    assert [z.dtype for z in (y, dx, bias_grad)] == [np.float32, np.float64, np.float32]
    with pytest.raises(AssertionError, match="computed"):
        bias_grad.compute()
    x = da.ones((64, 1000), chunks=(4, 1000), dtype="float32")
    y, pullback = relu_xp.bias_relu_vjp(x, da.zeros(1000, dtype="float32"))
    dx, bias_grad = pullback(da.broadcast_to(y.max(), x.shape, chunks=x.chunks))
    held = []

    def after(key, result, dsk, state, worker):
        held.append(sum(map(sizeof, state["cache"].values())))

    with Callback(posttask=after):
        total = (dx.sum() + bias_grad.sum()).compute(scheduler="synchronous")
    assert total == 128_000
    assert max(held) < 5 * 16_000 + 16 * 8_000, "more than some chunks, all masks and all sums"


@pytest.mark.parametrize(("dtype", "wanted"), [("f2", "f4"), ("f4", "f4"), ("f8", "f8")])
def test_random_slopes(dtype, wanted):
    """They differ between the chunks, and are the gradient of an x of -1."""
    x = -da.ones((100, 200), chunks=(30, 200), dtype=dtype)
    dy = da.ones_like(x, dtype=wanted)
    for rng in (np.random.default_rng(3), da.random.default_rng(3), np.random.random_sample):
        found = relu_xp.rrelu_vjp(x, 2.0, 4.0, rng=rng)[1](dy)
        assert (found.chunks, found.dtype) == (x.chunks, wanted)
        values = found.compute()
        assert values.mean() == pytest.approx(3, abs=0.02)
        assert not np.array_equal(values[:30], values[30:60])


def test_a_weight_may_have_chunks_of_another_library():
    """As a PReLU layer's, which are NumPy's by default: the backend of x computes."""
    jnp = pytest.importorskip("jax.numpy")
    x = da.from_array(jnp.asarray(HOST), chunks=5, asarray=False)
    weight = da.from_array(np.linspace(0, 1, 10, dtype=np.float32), chunks=5)
    y = relu_xp.prelu(x, weight).compute()
    np.testing.assert_array_equal(y, relu_xp.prelu(HOST, weight.compute()))
