"""PReLU, RReLU, CReLU, SquaredReLU: the truth table where it speaks of them, and what is theirs."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest

import relu_xp
from relu_xp import CReLU, PReLU, RReLU, SquaredReLU, dispatch
from relu_xp.testing import oracle
from relu_xp.testing.conformance import array_of

# Members of the oracle's that a negative slope alone describes.
SLOPES = {name: oracle.MEMBERS[name] for name in ("relu", "leaky", "steep", "tiny-slope")}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


def weight_of(xp, slope, dtype="float64"):
    """Return a slope as an array."""
    return xp.array(np.full(1, slope, oracle.DTYPES[dtype]))


def floats(xp, x):
    return xp.numpy(x).astype(np.float64)


# ---- PReLU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6,), 0), ((4, 6), 1), ((6, 4), 0), ((4, 6), -1), ((3, 6, 5), 1), ((2, 3, 4, 6), 3)],
)
def test_prelu_has_a_slope_for_each_channel(xp, shape, axis):
    rng = np.random.default_rng(3)
    slopes = np.array([0.0, 0.25, -1.5, 1.0, 3e-3, 0.5], np.float32)
    host, gradient = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    y, pullback = relu_xp.prelu_vjp(xp.array(host), xp.array(slopes), axis=axis)
    dx, dweight = pullback(xp.array(gradient))
    assert tuple(dweight.shape) == (6,)
    for channel, slope in enumerate(slopes.tolist()):
        part = [slice(None)] * len(shape)
        part[axis] = channel
        part = (*part, ...)
        np.testing.assert_array_equal(
            xp.numpy(y)[part], relu_xp.leaky_relu(host[part], slope), err_msg=str(slope)
        )
        np.testing.assert_array_equal(
            xp.numpy(dx)[part],
            relu_xp.relu_backward(gradient[part], host[part], negative_slope=slope),
        )
        pairs = zip(host[part].flat, gradient[part].flat, strict=True)
        exact = sum(
            (Fraction(float(v)) * Fraction(float(g)) for v, g in pairs if v <= 0), Fraction()
        )
        np.testing.assert_allclose(xp.numpy(dweight)[channel], float(exact), rtol=1e-6)


def test_prelus_weight_gradient_is_summed_in_more_than_16_bits(xp):
    """70,000 times -1 * 1 is beyond float16, and counting in it ends at 2,048."""
    for dtype in xp.dtypes:
        x = array_of(xp, np.full(70_000, -1, oracle.DTYPES[dtype]), dtype)
        for weight in (weight_of(xp, 0.5, "float32"), weight_of(xp, 0.5, dtype)):
            _, pullback = relu_xp.prelu_vjp(x, weight, axis=0)
            _, dweight = pullback(x)
            wide = xp.numpy(weight).dtype
            with np.errstate(over="ignore"):
                expected = np.array(70_000.0).astype(wide)
            assert xp.numpy(dweight).dtype == wide
            assert xp.numpy(dweight)[0] == expected


@pytest.mark.parametrize("channels", [1, 7])
def test_prelus_weight_gradient_is_the_same_every_time(xp, channels):
    """Whatever the threads do: the order of the sum is the array's."""
    rng = np.random.default_rng(4)
    host = rng.standard_normal((300_007, 7)).astype(np.float32)
    gradient = rng.standard_normal(host.shape).astype(np.float32)
    weight = xp.array(np.linspace(0.1, 0.7, channels, dtype=np.float32))
    _, pullback = relu_xp.prelu_vjp(xp.array(host), weight)
    results = [xp.numpy(pullback(xp.array(gradient))[1]).tobytes() for _ in range(3)]
    assert len(set(results)) == 1
    products = np.where(host <= 0, host.astype(np.float64) * gradient, 0)
    exact = products.sum() if channels == 1 else products.sum(0)
    found = np.frombuffer(results[0], np.float32)
    np.testing.assert_allclose(found, exact, rtol=1e-3 if xp.name == "jax" else 1e-6)


def test_prelus_weight_gradient_is_the_same_in_every_layout_of_numpys():
    """Not so the sum of NumPy's own, whose order is that of the memory and of its version."""
    rng = np.random.default_rng(6)
    host, gradient = rng.standard_normal((2, 70, 50, 60))
    layouts = (
        np.ascontiguousarray,
        np.asfortranarray,
        lambda a: a.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    )
    ours, own = set(), set()
    for layout in layouts:
        x, dy = layout(host), layout(gradient)
        found = [
            relu_xp.prelu_vjp(x, np.full(n, 0.5), axis=i)[1](dy)[1] for i, n in enumerate(x.shape)
        ]
        ours.add(tuple(one.tobytes() for one in found))
        own.add(np.sum(np.where(x <= 0, x * dy, 0), (0, 2)).tobytes())
    assert len(ours) == 1
    assert len(own) > 1


def test_of_two_nan_numpys_product_takes_the_same_one():
    """The processor's rule is the first one's; which that is, NumPy's versions do not agree on."""
    first, other = np.array([0x7FC00001, 0xFFC00002], np.uint32).view(np.float32)[:, None]
    x, dy = np.resize(first, (1, 100)), np.resize(other, (1, 100))
    got = relu_xp.squared_relu_vjp(x)[1](dy).view(np.uint32)
    assert (got == 0x7FC00001).all()
    dx, dweight = relu_xp.prelu_vjp(-np.ones_like(x), first)[1](dy)
    assert (dx.view(np.uint32) == 0x7FC00001).all()
    assert dweight.view(np.uint32).tolist() == [0x7FC00000]


def test_prelus_weight_gradient_counts_what_takes_the_slope(xp, dtype):
    """A zero among them, so that an infinite dy shows; NaN and infinity above 0 do not reach it."""
    inf, nan = math.inf, math.nan
    for x, dy, expected in (
        ([-2.0, 3.0], [0.5, 7.0], -1.0),
        ([-2.0, inf, 0.5, nan], [0.5, nan, inf, 1.0], -1.0),
        ([-2.0, 0.0], [0.5, inf], nan),
        ([-2.0, -0.0], [0.5, nan], nan),
        ([-inf, 1.0], [0.5, 1.0], -inf),
    ):
        x, dy = (xp.array(np.array(values, oracle.DTYPES[dtype])) for values in (x, dy))
        for slope in (0.25, 0.0):
            _, pullback = relu_xp.prelu_vjp(x, weight_of(xp, slope, dtype), axis=0)
            dweight = pullback(dy)[1]
            assert xp.numpy(dweight).dtype == oracle.DTYPES[dtype]
            np.testing.assert_array_equal(floats(xp, dweight), [expected])


def test_prelus_weight_gradient_where_there_is_no_float64(require):
    jax = require("jax")
    with jax.enable_x64(False):
        x = jax.numpy.asarray([-3.0, 2.0, -0.5])
        dx, dweight = relu_xp.prelu_vjp(x, jax.numpy.asarray([0.5]), axis=0)[1](x)
    assert (dx.dtype, dweight.dtype) == ("float32", "float32")
    assert (dx.tolist(), dweight.tolist()) == ([-1.5, 2, -0.25], [9.25])


def test_prelu_of_any_shape(xp):
    for shape in ((), (1,), (0,), (3, 0, 2), (2, 3)):
        x = xp.array(np.full(shape, -2.0, np.float32))
        for weight_shape in ((), (1,)):
            weight = xp.array(np.full(weight_shape, 0.5, np.float32))
            y, pullback = relu_xp.prelu_vjp(x, weight, axis=0)
            dx, dweight = pullback(x)
            assert y.shape == dx.shape == x.shape
            assert tuple(dweight.shape) == weight_shape
            assert (xp.numpy(y) == -1).all()
            assert (xp.numpy(dx) == -1).all()
            assert float(xp.numpy(dweight).sum()) == 4 * math.prod(shape)


@pytest.mark.libraries("strided")
def test_prelu_of_any_layout(xp):
    rng = np.random.default_rng(5)
    base = rng.standard_normal((8, 12, 10)).astype(np.float32)
    slopes = rng.standard_normal(24).astype(np.float32)[::4]
    views = (
        lambda a: a[::2, ::2, ::-1],
        lambda a: a[:4, :6].transpose(0, 1, 2),
        lambda a: np.asfortranarray(a)[1:5, 6:],
        lambda a: a.transpose(2, 0, 1)[:4, 1:7, :10],
    )
    for view in views:
        host = view(base)
        gradient = np.broadcast_to(np.float32(2), host.shape)
        wanted_y, wanted = relu_xp.prelu_vjp(host.copy(), slopes.copy())
        y, pullback = relu_xp.prelu_vjp(xp.array(host), xp.array(slopes))
        dx, dweight = pullback(xp.array(gradient))
        wanted_dx, wanted_dweight = wanted(gradient.copy())
        np.testing.assert_array_equal(xp.numpy(y), wanted_y)
        np.testing.assert_array_equal(xp.numpy(dx), wanted_dx)
        np.testing.assert_allclose(xp.numpy(dweight), wanted_dweight, rtol=1e-6)


def test_prelu_refuses():
    x, weight = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    for bad, error, message in (
        ([0.5], TypeError, r"prelu: weight must be an array, got list; .*numpy\.asarray\(weight\)"),
        (0.5, TypeError, r"prelu: weight must be an array, got float"),
        (np.ones(3, int), TypeError, "prelu: weight has dtype int64, which has no gradient"),
        (np.ones((1, 3)), ValueError, r"prelu: weight has shape \(1, 3\); give one slope, or"),
        (np.ones(2), ValueError, r"weight has 2 slopes, but x has 3 channels along axis 1 \(shape"),
    ):
        with pytest.raises(error, match=message):
            relu_xp.prelu(x, bad)
    with pytest.raises(ValueError, match=r"prelu: x has shape \(2, 3\), and no axis 2"):
        relu_xp.prelu(x, weight, axis=2)
    with pytest.raises(TypeError, match="prelu_vjp: axis must be a whole number, got float"):
        relu_xp.prelu_vjp(x, weight, axis=1.0)
    with pytest.raises(TypeError, match="prelu: x has dtype int64, which has no gradient"):
        relu_xp.prelu(np.ones((2, 3), int), weight)
    with pytest.raises(ValueError, match="prelu: out overlaps an input"):
        relu_xp.prelu(x[:, ::-1], weight, out=x)
    _, pullback = relu_xp.prelu_vjp(x, weight)
    with pytest.raises(ValueError, match=r"pullback: dy has shape \(3,\), forward saw \(2, 3\)"):
        pullback(np.ones(3))
    with pytest.raises(TypeError, match="pullback: out has dtype float64, the result float32"):
        pullback(x, out=np.ones((2, 3)))


def test_a_weight_of_another_library_is_refused(require):
    torch = require("torch")
    with pytest.raises(TypeError, match="prelu: x is NumPy, weight is PyTorch on device cpu; move"):
        relu_xp.prelu(np.ones((1, 1)), torch.ones(1))
    with pytest.raises(TypeError, match=r"forward: x is PyTorch .*layer.params\[0\] is NumPy; mov"):
        PReLU().forward(torch.ones((1, 1)))


# ---- RReLU --------------------------------------------------------------------------------------


def test_rrelu_in_evaluation_is_leaky_with_the_mean(xp, dtype):
    patterns = oracle.patterns(dtype)
    x = array_of(xp, patterns, dtype)
    mean = 0.25 + (0.75 - 0.25) / 2
    same = np.testing.assert_array_equal
    wanted = relu_xp.leaky_relu(x, mean)
    same(bits(xp, relu_xp.rrelu(x, 0.25, 0.75)), bits(xp, wanted))
    y, pullback = relu_xp.rrelu_vjp(x, 0.25, 0.75)
    same(bits(xp, y), bits(xp, wanted))
    same(bits(xp, pullback(x)), bits(xp, relu_xp.relu_backward(x, x, negative_slope=mean)))
    assert isinstance(pullback, relu_xp.Pullback)


def bits(xp, x):
    host = np.ascontiguousarray(xp.numpy(x))
    return host.view(oracle.Format(host.dtype.name).unsigned)


def test_rrelu_in_training_has_a_slope_for_each_element(xp, dtype):
    """The slopes that the generator gives, in its order; what is above 0 stays what it is."""
    host = np.linspace(-4, 4, 999).astype(oracle.DTYPES[dtype]).reshape(27, 37)
    wide = "float64" if dtype == "float64" else "float32"
    slopes = np.random.default_rng(7).random(host.shape, dtype=wide) * 0.5 + 0.25
    x, rng = xp.array(host), np.random.default_rng(7)
    if xp.name == "dask":  # whose engine draws, from a seed that the generator gives
        backend = dispatch.backend_for("test", "x", x)
        slopes = xp.numpy(backend.uniform(np.random.default_rng(7), 0.25, 0.75, x))
    y, pullback = relu_xp.rrelu_vjp(x, 0.25, 0.75, rng=rng)
    dx = pullback(xp.array(-host))
    again = relu_xp.rrelu(x, 0.25, 0.75, rng=np.random.default_rng(7))
    rounded = slopes.astype(oracle.DTYPES[dtype])
    expected = np.where(host <= 0, rounded * host, host)
    np.testing.assert_array_equal(xp.numpy(y), expected)
    np.testing.assert_array_equal(xp.numpy(again), expected)
    np.testing.assert_array_equal(xp.numpy(dx), -expected)
    other = relu_xp.rrelu(x, 0.25, 0.75, rng=rng)
    assert (xp.numpy(other) != expected).any()


def test_rrelu_takes_a_function_of_a_shape(require):
    jax = require("jax")
    x = jax.numpy.full((3, 4), -1.0, "float32")
    key = jax.random.key(1)

    def rng(shape):
        return jax.random.uniform(key, shape, "float32")

    y = relu_xp.rrelu(x, 1.0, 2.0, rng=rng)
    np.testing.assert_array_equal(y, -(rng((3, 4)) + 1))
    np.testing.assert_array_equal(jax.jit(lambda x: relu_xp.rrelu(x, 1.0, 2.0, rng=rng))(x), y)


def test_rrelu_takes_numpys_generator_where_jax_traces(require):
    jax = require("jax")
    x = jax.numpy.full((3, 4), -1.0, "float32")

    def f(x):
        return relu_xp.rrelu(x, rng=np.random.default_rng(5))

    np.testing.assert_array_equal(jax.jit(f)(x), f(x))


def test_rrelu_refuses():
    x = np.ones(3)
    with pytest.raises(ValueError, match="lower must not be above upper, got lower=0.5, upper=0.2"):
        relu_xp.rrelu(x, 0.5, 0.2)
    with pytest.raises(TypeError, match="^upper must be a real number, got str"):
        relu_xp.rrelu(x, 0.5, "1")
    with pytest.raises(ValueError, match="^lower must be finite, got nan"):
        RReLU(math.nan)
    for bad in (3, "seed", object()):
        with pytest.raises(TypeError, match="^rrelu: rng must draw arrays of random numbers, as"):
            relu_xp.rrelu(x, rng=bad)
    with pytest.raises(ValueError, match=r"what rng drew has shape \(2,\), x has \(3,\)"):
        relu_xp.rrelu(x, rng=lambda shape: np.ones(2))
    with pytest.raises(TypeError, match="rrelu_vjp: x has dtype int64, which has no gradient"):
        relu_xp.rrelu_vjp(np.ones(3, int), rng=np.random.default_rng())


# ---- CReLU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3), 1), ((4, 3), 0), ((2, 3, 4), -1), ((0, 2), 1)]
)
def test_crelu_concatenates_along_an_axis(xp, shape, axis):
    host = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    y, pullback = relu_xp.crelu_vjp(xp.array(host), axis=axis)
    expected = np.concatenate([np.maximum(host, 0), np.maximum(-host, 0)], axis)
    np.testing.assert_array_equal(xp.numpy(y), expected)
    dx = pullback(xp.array(expected))
    np.testing.assert_array_equal(xp.numpy(dx), host)
    assert pullback.saved_nbytes == host.size


def test_crelu_refuses():
    x = np.ones((2, 3))
    for bad in (np.ones(()), np.ones(3)):
        with pytest.raises(ValueError, match="crelu: x has shape .*, and no axis 1"):
            relu_xp.crelu(bad)
    with pytest.raises(ValueError, match=r"crelu: out has shape \(2, 3\), the result has \(2, 6\)"):
        relu_xp.crelu(x, out=x)
    both = np.ones((2, 6))
    with pytest.raises(ValueError, match="crelu: out overlaps an input"):
        relu_xp.crelu(both[:, :3], out=both)
    with pytest.raises(ValueError, match="CReLU cannot work in place: y is longer than x"):
        CReLU().inplace = True
    _, pullback = relu_xp.crelu_vjp(x)
    with pytest.raises(ValueError, match=r"pullback: dy has shape \(2, 3\), forward saw \(2, 6\)"):
        pullback(x)
    with pytest.raises(
        ValueError, match=r"pullback: out has shape \(2, 6\), the result has \(2, 3"
    ):
        pullback(both, out=both)


# ---- SquaredReLU --------------------------------------------------------------------------------


def test_squared_relu_with_another_dtype(xp):
    """Gradients are multiplied in the wider dtype, and rounded to their own."""
    narrow, wide = (oracle.DTYPES[dtype] for dtype in (xp.dtypes[0], xp.dtypes[-1]))
    x, dy = np.array([300.0, -1, 2], wide), np.array([200.0, 3, 4], narrow)
    _, pullback = relu_xp.squared_relu_vjp(xp.array(x))
    dx = xp.numpy(pullback(xp.array(dy)))
    assert dx.dtype == narrow
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(dx, np.array([120_000, 0, 16]).astype(narrow))
    _, pullback = relu_xp.squared_relu_vjp(xp.array(x.astype(narrow)))
    np.testing.assert_array_equal(xp.numpy(pullback(xp.array(dy.astype(wide)))), [120_000, 0, 16])


def test_squared_relus_gradient_is_multiplied_in_the_wider_dtype():
    """In float32 one of these would be 0, the other infinite."""
    for x, dy, expected in (
        (np.array([1e-60]), np.array([1e30], np.float32), np.float32(2e-30)),
        (np.array([1e-30], np.float32), np.array([1e60]), 2 * float(np.float32(1e-30)) * 1e60),
    ):
        _, pullback = relu_xp.squared_relu_vjp(x)
        np.testing.assert_allclose(pullback(dy), [expected], rtol=1e-6)
        assert pullback(dy).dtype == dy.dtype


# ---- All of them --------------------------------------------------------------------------------

VARIANTS = {
    "prelu": lambda xp, x, **options: relu_xp.prelu_vjp(
        x, xp.array(np.array([0.25], np.float32)), **options
    ),
    "rrelu": lambda xp, x, **options: relu_xp.rrelu_vjp(x, rng=np.random.default_rng(2), **options),
    "crelu": lambda xp, x, **options: relu_xp.crelu_vjp(x, **options),
    "squared_relu": lambda xp, x, **options: relu_xp.squared_relu_vjp(x, **options),
}


def test_the_bytes_that_a_variant_holds(xp, dtype):
    """x and the slopes; a slope an element in float32 at least; a byte an element; x."""
    host = np.ones((2, 3), oracle.DTYPES[dtype])
    x = xp.array(host)
    wide = np.zeros(3, oracle.DTYPES[xp.dtypes[-1]])
    for weight in (wide, wide[:1], wide.astype(host.dtype)):
        _, pullback = relu_xp.prelu_vjp(x, xp.array(weight.copy()))
        assert pullback.saved_nbytes == host.nbytes + weight.nbytes
    _, pullback = relu_xp.rrelu_vjp(x, rng=np.random.default_rng(0))
    assert pullback.saved_nbytes == 6 * (8 if dtype == "float64" else 4)
    assert relu_xp.crelu_vjp(x)[1].saved_nbytes == 6
    assert relu_xp.squared_relu_vjp(x)[1].saved_nbytes == host.nbytes


@pytest.mark.libraries("writable")
@pytest.mark.parametrize("name", ["prelu", "rrelu", "crelu", "squared_relu"])
def test_out_is_what_is_returned(xp, name):
    """Of a function, its vjp and its layer, training or not."""
    host = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
    x, weight = xp.array(host), xp.array(np.full(1, 0.25, np.float32))
    layer = {
        "prelu": PReLU,
        "rrelu": lambda: RReLU(0.25, 0.25),
        "crelu": CReLU,
        "squared_relu": SquaredReLU,
    }[name]()
    if name == "prelu":
        layer.params[0] = weight
    more = {"prelu": (weight,), "rrelu": (0.25, 0.25)}.get(name, ())
    wanted = {
        "crelu": np.concatenate([np.maximum(host, 0), np.maximum(-host, 0)], 1),
        "squared_relu": np.maximum(host, 0) ** 2,
    }.get(name, np.where(host > 0, host, host / 4))
    function, vjp = (getattr(relu_xp, f"{name}{end}") for end in ("", "_vjp"))
    calls = [
        lambda out: function(x, *more, out=out),
        lambda out: vjp(x, *more, out=out)[0],
        lambda out: layer.forward(x, out=out),
        lambda out: layer.forward(x, out=out, training=False),
    ]
    if name == "rrelu":
        rng = np.random.default_rng(0)
        calls.append(lambda out: function(x, *more, rng=rng, out=out))
        calls.append(lambda out: vjp(x, *more, rng=rng, out=out)[0])
    for call in calls:
        out = xp.array(np.full_like(wanted, 77))
        assert call(out) is out
        np.testing.assert_array_equal(xp.numpy(out), wanted)


def gradient_of(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", VARIANTS)
def test_a_large_array_agrees_with_small_ones(xp, name):
    """Parts and threads: the same bits at every place."""
    host = np.random.default_rng(13).standard_normal((40, 70_001)).astype(np.float32)
    if name == "rrelu":
        return  # draws by size
    y, pullback = VARIANTS[name](xp, xp.array(host))
    dx = xp.numpy(gradient_of(pullback(y)))
    y = xp.numpy(y)
    for row in (0, 1, 39):
        part, its_pullback = VARIANTS[name](xp, xp.array(host[row : row + 1]))
        np.testing.assert_array_equal(xp.numpy(part)[0], y[row])
        np.testing.assert_array_equal(xp.numpy(gradient_of(its_pullback(part)))[0], dx[row])


@pytest.mark.parametrize("function", ["prelu", "crelu", "squared_relu"])
def test_integers_have_no_variant(function):
    x = np.ones((1, 1), int)
    more = (np.ones(1),) if function == "prelu" else ()
    for name in (function, f"{function}_vjp"):
        with pytest.raises(TypeError, match=f"^{name}: x has dtype int64, which has no gradient"):
            getattr(relu_xp, name)(x, *more)
        with pytest.raises(TypeError, match=f"^{name}: x must be an array, got list"):
            getattr(relu_xp, name)([[1.0]], *more)


def test_the_slopes_of_a_backend(xp, dtype):
    """What `Backend.sloped` is asked for, and slopes that are fewer than x, or of another dtype."""
    host = np.array([[-2.0, 3.0, -0.5], [4.0, -1.0, 0.0]], oracle.DTYPES[dtype])
    x, dy = xp.array(host), xp.array(host[::-1].copy())
    backend = dispatch.backend_for("test", "x", x)
    for its_dtype in xp.dtypes:
        row = np.array([[0.0, 1.0, 0.5]], oracle.DTYPES[its_dtype])
        slopes, full = xp.array(row), xp.array(np.broadcast_to(row, host.shape).copy())
        for arguments, expected in (
            ((x, x, slopes), [[0, 3, -0.25], [4, -1, 0]]),
            ((dy, x, slopes), [[0, -1, 0], [-2, 3, -0.25]]),
            ((dy, None, full), [[0, -1, 0], [0, 3, -0.25]]),
            ((None, x, slopes), [[0, 1, 0.5], [1, 1, 0.5]]),
            ((None, x, full), [[0, 1, 0.5], [1, 1, 0.5]]),
        ):
            found = xp.numpy(backend.sloped(*arguments, None))
            np.testing.assert_array_equal(found.astype(float), expected)
            assert found.dtype == oracle.DTYPES[its_dtype if arguments[0] is None else dtype]


def test_the_pieces_that_crelu_keeps_are_bytes(xp, dtype):
    x = xp.array(np.array([-1.0, -0.0, 0.0, 2.0, math.nan], oracle.DTYPES[dtype]))
    pieces = xp.numpy(dispatch.backend_for("test", "x", x).pieces_of_both(x))
    assert pieces.dtype == np.uint8
    assert pieces.tolist() == [2, 0, 0, 1, 3]


def test_a_weight_beyond_the_dtype_of_x_is_infinite_silently(xp):
    weight = weight_of(xp, 1e300, xp.dtypes[-1])
    x = xp.array(np.array([-2.0, 3.0], np.float32))
    assert floats(xp, relu_xp.prelu(x, weight, axis=0)).tolist() == [-math.inf, 3]


# ---- Layers -------------------------------------------------------------------------------------

LAYERS = [
    PReLU(),
    PReLU(10, init=0.1),
    PReLU(6, -0.5, 0, inplace=True),
    RReLU(),
    RReLU(0.1, 0.9, inplace=True),
    CReLU(),
    CReLU(axis=-2),
    SquaredReLU(),
    SquaredReLU(inplace=True),
]


def test_rrelu_takes_no_integers_either():
    """The mean of its bounds may be a whole number."""
    for bounds in ((), (0, 2)):
        for name in ("rrelu", "rrelu_vjp"):
            with pytest.raises(TypeError, match=f"^{name}: x has dtype int64, which has no grad"):
                getattr(relu_xp, name)(np.ones(2, int), *bounds)
        with pytest.raises(TypeError, match="^forward: x has dtype int64, which has no gradient"):
            RReLU(*bounds).forward(np.ones(2, int), training=False)


def test_repr_has_the_name_of_a_class_of_the_users():
    class Mine(PReLU):
        pass

    assert repr(Mine(2, inplace=True)) == "Mine(2, init=0.25, axis=1, inplace=True)"


def test_prelus_axis_is_a_whole_number_also_where_none_is_needed():
    with pytest.raises(TypeError, match="^prelu: axis must be a whole number, got str"):
        relu_xp.prelu(np.ones((2, 2)), np.ones(1), axis="1")
    assert relu_xp.prelu(np.array(-2.0), np.array([0.5]), axis=7) == -1


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_repr_evaluates_back(layer):
    again = eval(repr(layer), vars(relu_xp))
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert again.inplace == layer.inplace


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_layer_is_its_functions(xp, layer):
    layer = copy.deepcopy(layer)
    if layer.inplace and not xp.writable:
        layer.inplace = False
    if layer.params:
        layer.params[0] = xp.array(layer.params[0])
        layer.grads[0] = xp.array(layer.grads[0])
    host = np.linspace(-4, 4, 60, dtype=np.float32).reshape(6, 10)
    for training in (False, True):
        x = xp.array(host.copy())
        seed = copy.deepcopy(getattr(layer, "rng", None))
        if isinstance(layer, PReLU):
            axis = 0 if layer.params[0].shape[0] == 6 else 1
            wanted, pullback = relu_xp.prelu_vjp(xp.array(host), layer.params[0], axis=axis)
        elif isinstance(layer, RReLU):
            rng = seed if training else None
            wanted, pullback = relu_xp.rrelu_vjp(xp.array(host), *layer.bounds, rng=rng)
        elif isinstance(layer, CReLU):
            axis = 1 if layer.forward(x, training=False).shape[1] == 20 else 0
            wanted, pullback = relu_xp.crelu_vjp(xp.array(host), axis=axis)
        else:
            wanted, pullback = relu_xp.squared_relu_vjp(xp.array(host))
        y = layer(x, training=training)
        np.testing.assert_array_equal(xp.numpy(y), xp.numpy(wanted))
        assert (y is x) == layer.inplace
        assert (layer.saved_nbytes > 0) == training
    gradient = np.cos(np.arange(math.prod(wanted.shape), dtype=np.float32)).reshape(wanted.shape)
    dy = xp.array(gradient.copy())
    dx = layer.backward(dy, retain=True)
    expected = pullback(xp.array(gradient))
    np.testing.assert_array_equal(xp.numpy(dx), xp.numpy(gradient_of(expected)))
    assert (dx is dy) == layer.inplace
    if layer.params:
        np.testing.assert_array_equal(xp.numpy(layer.grads[0]), xp.numpy(expected[1]))
    layer.backward(xp.array(gradient))
    assert layer.saved_nbytes == 0
    with pytest.raises(RuntimeError, match="backward: nothing is saved"):
        layer.backward(dy)


@pytest.mark.libraries("writable")
def test_an_optimiser_of_the_textbook_learns_prelus_slope(xp):
    """Deep Learning from Scratch 2: lists that are collected once, arrays that are updated."""

    class SGD:
        lr = 0.5

        def update(self, params, grads):
            for i in range(len(params)):
                step(params[i], self.lr, grads[i])

    def step(param, rate, grad):  # param -= rate * grad, where no kernel but ours can run
        host = xp.numpy(param) - np.float32(rate) * xp.numpy(grad)
        positive = xp.array(np.maximum(host, 0))
        relu_xp.relu(positive, out=param)

    layer = PReLU(2, init=0.9)
    layer.params[0], layer.grads[0] = xp.array(layer.params[0]), xp.array(layer.grads[0])
    params, grads = [], []
    params += layer.params
    grads += layer.grads
    assert params[0] is layer.params[0]
    assert grads[0] is layer.grads[0]
    host = np.array([[-1.0, -2.0], [3.0, -1.0]], np.float32)
    target = relu_xp.prelu(host, np.array([0.25, 0.5], np.float32))
    for _ in range(60):
        y = layer.forward(xp.array(host))
        layer.backward(xp.array((xp.numpy(y) - target) / 4))
        assert grads[0] is layer.grads[0]
        SGD().update(params, grads)
    np.testing.assert_allclose(xp.numpy(layer.params[0]), [0.25, 0.5], atol=1e-3)


def test_where_arrays_cannot_be_written_the_gradient_is_another(require):
    jnp = require("jax").numpy
    layer = PReLU(xp=jnp)
    before = layer.grads[0]
    layer.forward(jnp.asarray([[-2.0, 1.0]]))
    layer.backward(jnp.ones((1, 2)))
    assert float(layer.grads[0][0]) == -2
    assert float(before[0]) == 0


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_what_is_saved_does_not_travel(layer):
    layer = copy.deepcopy(layer)
    layer.forward(np.full((6, 10), -1.0))
    assert layer.saved_nbytes > 0
    layer.note = "a user's own attribute"
    for again in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.saved_nbytes == 0
        assert repr(again) == repr(layer)
        assert again.note == layer.note
        for one, other in zip(again.params + again.grads, layer.params + layer.grads, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_deep_copy_learns_alone_and_a_pickle_needs_no_library(require):
    torch = require("torch")
    layer = PReLU(3, xp=torch, dtype=torch.float64)
    again = copy.deepcopy(layer)
    again.params[0][0] = 7
    assert layer.params[0][0] == 0.25
    assert type(again.params[0]) is torch.Tensor
    assert copy.copy(layer).params[0] is layer.params[0]
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(loaded.params[0]) is np.ndarray
    assert loaded.params[0].dtype == np.float64


def test_a_deep_copy_of_several_things_keeps_what_they_share():
    layer, shared = PReLU(), [1]
    layer.note = shared
    again, note = copy.deepcopy((layer, shared))
    assert again.note is note
    assert note is not shared


def test_what_a_layer_is_made_of_by_default():
    assert RReLU().bounds == (1 / 8, 1 / 3)
    rng = np.random.default_rng(0)
    assert RReLU(rng=rng).rng is rng
    layer = PReLU()
    assert repr(layer) == "PReLU(1, init=0.25, axis=1)"
    assert layer.params[0].dtype == layer.grads[0].dtype == np.float32
    assert layer.grads[0].tolist() == [0]
    assert repr(CReLU()) == "CReLU(axis=1)"
    assert repr(RReLU(0.25, 0.5, inplace=True)) == "RReLU(0.25, 0.5, inplace=True)"
    assert repr(SquaredReLU(inplace=True)) == "SquaredReLU(inplace=True)"
    assert repr(PReLU(2, inplace=True)) == "PReLU(2, init=0.25, axis=1, inplace=True)"


def test_layers_refuse():
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"num_parameters must be at least 1, got {bad}"):
            PReLU(bad)
    for bad in (1.5, True, None):
        with pytest.raises(TypeError, match="num_parameters must be a whole number, got"):
            PReLU(bad)
        with pytest.raises(TypeError, match="axis must be a whole number, got"):
            CReLU(bad)
    with pytest.raises(ValueError, match="init must be finite, got inf"):
        PReLU(init=math.inf)
    layer, x = PReLU(3), np.ones((2, 4), np.float32)
    with pytest.raises(
        ValueError, match=r"^forward: layer.params\[0\] has 3 slopes, but x has 4 chan"
    ):
        layer.forward(x)
    layer = PReLU()
    layer.forward(x)
    with pytest.raises(ValueError, match=r"^backward: dy has shape \(2, 3\), forward saw \(2, 4\)"):
        layer.backward(x[:, :3])
    np.testing.assert_array_equal(layer.backward(x), x)


def test_layers_without_parameters_have_empty_lists():
    for layer in (relu_xp.ReLU(), RReLU(), CReLU(), SquaredReLU()):
        assert layer.params == layer.grads == []


# ---- What a review found ------------------------------------------------------------------------


def test_rrelus_bounds_are_numbers_of_any_kind():
    x = np.array([-1.0, 2.0], np.float32)
    for bounds in ((np.float64(0.1), np.float64(0.3)), (Fraction(1, 8), Fraction(1, 3)), (0, 1)):
        _, pullback = relu_xp.rrelu_vjp(x, *bounds, rng=np.random.default_rng(0))
        assert pullback(x).dtype == np.float32
        assert pullback.saved_nbytes == 8
    _, pullback = relu_xp.rrelu_vjp(x, rng=np.random.default_rng(0).random)
    assert pullback.saved_nbytes == 16, "a function's numbers are kept as they are"
    with pytest.raises(ValueError, match=r"upper - lower must be finite, got lower=-1\.7e\+308"):
        relu_xp.rrelu(x, -1.7e308, 1.7e308, rng=np.random.default_rng(0))
    with np.errstate(all="raise"):
        relu_xp.rrelu(x, 0.0, 1e-40, rng=np.random.default_rng(0))


def test_a_layer_of_pytorch_keeps_no_graph(require):
    """Neither its gradients nor what it saves, although x and dy are tracked."""
    torch = require("torch")
    x, dy = (torch.ones((2, 3), requires_grad=True) * -1 for _ in range(2))
    for layer in (PReLU(3, xp=torch), SquaredReLU(), CReLU(), RReLU()):
        y = layer.forward(x)
        dx = layer.backward(torch.cat([dy, dy], 1) if y.shape[1] == 6 else dy.detach())
        assert y.requires_grad
        assert dx.requires_grad == (y.shape[1] == 6)
        for array in layer.params + layer.grads:
            assert not array.requires_grad
    layer = PReLU(3, xp=torch)
    for _ in range(2):
        layer.forward(x)
        layer.backward(dy)
        assert layer.grads[0].grad_fn is None
    assert layer.grads[0].tolist() == [2, 2, 2]


def test_a_refused_gradient_leaves_the_layer_as_it_was(require):
    torch = require("torch")
    layer = PReLU(xp=torch, inplace=True)
    layer.forward(torch.tensor([[-1.0, 2.0]]))
    with pytest.raises(ValueError, match="^backward: dy, which is to be overwritten, .* is a leaf"):
        layer.backward(torch.ones((1, 2), requires_grad=True))
    assert layer.grads[0].tolist() == [0]
    assert layer.backward(torch.ones((1, 2))).tolist() == [[0.25, 1]]


def test_the_gradient_buffer_may_be_an_argument():
    layer, x = PReLU(3, axis=0, dtype=np.float64), np.array([-1.0, -2.0, 3.0])
    layer.forward(x)
    mine = layer.grads[0]
    mine[:] = 1
    assert layer.backward(mine).tolist() == [0.25, 0.25, 1]
    assert mine.tolist() == [1, 1, 1]
    assert layer.grads[0].tolist() == [-1, -2, 0]
    layer.forward(x)
    out = layer.grads[0]
    assert layer.backward(np.ones(3), out=out) is out
    assert out.tolist() == [0.25, 0.25, 1]
    assert layer.grads[0].tolist() == [-1, -2, 0]


def test_a_gradient_buffer_that_does_not_fit_is_another():
    x = np.array([-1.0, -2.0, 3.0], np.float32)
    memory = np.zeros(6, np.float32)
    for buffer, out in (
        (np.zeros(3), None),
        (np.zeros(2, np.float32), None),
        (np.zeros((3, 1), np.float32), None),
        ([0.0] * 3, None),
        (np.broadcast_to(np.float32(0), 3), None),
        (memory[:3], memory[1:4]),
        (memory[2:5], memory[1:4]),
    ):
        layer = PReLU(3, axis=0)
        layer.forward(x)
        layer.grads[0] = buffer
        dx = layer.backward(np.ones(3, np.float32), out=out)
        assert dx.tolist() == [0.25, 0.25, 1]
        assert layer.grads[0] is not buffer
        assert layer.grads[0].dtype == np.float32
        assert layer.grads[0].tolist() == [-1, -2, 0]


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_a_weight_of_any_library_becomes_a_pickle(require, library):
    xp = require(library)
    layer = PReLU(2, 0.5, xp=xp)
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(loaded.params[0]) is np.ndarray
    assert loaded.params[0].tolist() == [0.5, 0.5]
    if library == "torch":
        layer.params[0].requires_grad_()
        assert pickle.loads(pickle.dumps(layer)).params[0].tolist() == [0.5, 0.5]
        narrow = pickle.loads(pickle.dumps(PReLU(xp=xp, dtype=xp.bfloat16)))
        assert narrow.params[0].dtype == np.float32


def test_a_copy_has_lists_of_its_own():
    layer = PReLU()
    again = copy.copy(layer)
    again.params[0] = np.ones(1)
    assert layer.params[0].tolist() == [0.25]


def test_a_weight_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="^init must be finite in float32, got 1e\\+300$"):
        PReLU(init=1e300)
    with pytest.raises(TypeError, match="PReLU: the weight has dtype int32, which has no gradient"):
        PReLU(dtype=np.int32)
    with pytest.raises(TypeError, match="xp must be an array library, such as .* cupy, got str"):
        PReLU(xp="torch")


def test_new_slopes_compile_nothing_on_jax(require):
    jnp = require("jax.numpy")
    from relu_xp.backends import jax as backend

    x = jnp.ones((2, 3))
    relu_xp.leaky_relu(x, 0.5)
    compiled = backend._run._cache_size()
    for slope in range(2, 50):
        relu_xp.leaky_relu(x, 1 / slope)
    assert backend._run._cache_size() == compiled


# ---- Tracing ------------------------------------------------------------------------------------


class TestTracing:
    x = np.array([[np.nan, -2.0, -0.5, 0.0, 1.0, np.inf]], np.float32)
    dy = np.linspace(1, 2, 6, dtype=np.float32).reshape(1, 6)

    @pytest.mark.parametrize("slope", [0.25, 0.0])
    def test_torch(self, require, slope):
        """Also where the slope is 0: it is to learn from there."""
        torch = require("torch")
        x = torch.from_numpy(self.x.copy()).requires_grad_()
        weight = torch.tensor([slope], requires_grad=True)
        relu_xp.prelu(x, weight).backward(torch.from_numpy(self.dy))
        _, pullback = relu_xp.prelu_vjp(self.x, np.array([slope], np.float32))
        dx, dweight = pullback(self.dy)
        np.testing.assert_array_equal(x.grad.numpy(), dx)
        np.testing.assert_allclose(weight.grad.numpy(), dweight, rtol=1e-6)

    def test_torch_follows_what_comes_with_a_pullback_too(self, require):
        torch = require("torch")
        grads = []
        for y_of in (relu_xp.prelu, lambda x, weight: relu_xp.prelu_vjp(x, weight)[0]):
            x = torch.tensor([[-2.0, 3.0]], requires_grad=True)
            weight = torch.tensor([0.25], requires_grad=True)
            y_of(x, weight).sum().backward()
            grads.append([x.grad.tolist(), weight.grad.tolist()])
        assert grads == [[[[0.25, 1.0]], [-2.0]]] * 2

    @pytest.mark.parametrize("slope", [0.25, 0.0])
    def test_jax(self, require, slope):
        jax = require("jax")
        x, dy = jax.numpy.asarray(self.x), jax.numpy.asarray(self.dy)
        weight = jax.numpy.asarray([slope], "float32")
        y, vjp = jax.vjp(jax.jit(relu_xp.prelu), x, weight)
        dx, dweight = vjp(dy)
        wanted, pullback = relu_xp.prelu_vjp(self.x, np.array([slope], np.float32))
        wanted_dx, wanted_dweight = pullback(self.dy)
        np.testing.assert_array_equal(y, wanted)
        np.testing.assert_array_equal(dx, wanted_dx)
        np.testing.assert_allclose(dweight, wanted_dweight, rtol=1e-6)

    def test_a_slope_of_0_learns_nothing_from_minus_infinity(self, require):
        """Where x is not finite, automatic differentiation sees +0 in its place."""
        torch = require("torch")
        x, weight = torch.tensor([-math.inf, -2.0]), torch.tensor([0.0], requires_grad=True)
        y = relu_xp.prelu(x, weight, axis=0)
        assert y.tolist() == [0, 0]
        assert not torch.signbit(y).any()
        y.sum().backward()
        assert weight.grad.tolist() == [-2]

    @pytest.mark.filterwarnings("ignore")  # of PyTorch's own compiler
    def test_torch_compile(self, require):
        torch = require("torch")

        def f(x, weight):
            y = relu_xp.prelu(x, weight), relu_xp.crelu(x), relu_xp.squared_relu(x)
            return sum(part.sum() for part in y) + relu_xp.rrelu(x).sum()

        gradients = []
        for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            x = torch.from_numpy(self.x[:, 1:-1].copy()).requires_grad_()
            weight = torch.tensor([0.25], requires_grad=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Dynamo detected a call to a .functools.lru_cache")
                function(x, weight).backward()
            gradients.append((x.grad.numpy(), weight.grad.numpy()))
        for eager, compiled in zip(*gradients, strict=True):
            np.testing.assert_allclose(compiled, eager, rtol=1e-6)

    @pytest.mark.parametrize("name", ["crelu", "squared_relu"])
    def test_others(self, require, name):
        torch, jax = require("torch"), require("jax")
        function, vjp = getattr(relu_xp, name), getattr(relu_xp, f"{name}_vjp")
        host = self.x[:, 1:]
        wanted, pullback = vjp(host)
        dy = np.cos(np.arange(wanted.size, dtype=np.float32)).reshape(wanted.shape)
        wanted_dx = pullback(dy)
        x = torch.from_numpy(host.copy()).requires_grad_()
        function(x).backward(torch.from_numpy(dy))
        np.testing.assert_allclose(x.grad.numpy(), wanted_dx, rtol=1e-6)
        y, jax_vjp = jax.vjp(jax.jit(function), jax.numpy.asarray(host))
        np.testing.assert_array_equal(y, wanted)
        np.testing.assert_allclose(jax_vjp(jax.numpy.asarray(dy))[0], wanted_dx, rtol=1e-6)
