"""CuPy's kernels beside NumPy's, on numbers and in layouts that are short, and find many faults."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from passes import check_bits, run_all

import relu_xp
from relu_xp.backends.numpy import NumpyBackend
from relu_xp.testing import reference

pytest.importorskip("cupy_host", exc_type=ImportError)
cupy_backend = pytest.importorskip("relu_xp.backends.cupy")
pytestmark = pytest.mark.slow

DTYPES = reference.DTYPES
# Several warps, the last one not full. The last axis is, or is not, as long as a power of 2, of
# which CuPy makes a shift.
SHAPES = [(41, 16), (33, 37)]
WEIGHT_SHAPES = [(1, 1, 1), (1, 5, 1), (1, 1, 16), (48, 5, 1)]
PRESETS = [reference.PRESETS[name] for name in ("relu", "forum", "clipped-leaky", "everything")]
each_cupy = pytest.mark.libraries(names=["cupy_host", "cupy_host_75", "cupy_host_120", "cupy"])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def numbers(dtype, shape, seed):
    """Return specials, subnormals and random patterns: a NumPy array that is strided."""
    form, rng = reference.Format(dtype), np.random.default_rng(seed)
    tiny = rng.integers(0, 1 << form.fraction, 500).astype(form.unsigned)
    tiny |= rng.choice(np.array([0, form.sign], form.unsigned), 500)
    pool = [*3 * [reference.specials(dtype)], tiny, rng.choice(reference.patterns(dtype), 300)]
    words = rng.choice(np.concatenate(pool), (*shape[:-1], 2 * shape[-1]))
    return words.view(form.dtype)[..., ::2]


def check(xp, hosts, function):
    """Compare what a method of the backends gives for arrays, dense and strided."""
    hosts = [None if host is None else np.asarray(host) for host in hosts]
    dense = [None if host is None else host.copy() for host in hosts]
    with np.errstate(all="ignore"):
        wanted = function(NumpyBackend(), *dense)
        for arrays in (dense, hosts):
            arrays = [None if host is None else xp.array(host) for host in arrays]
            got = xp.numpy(function(cupy_backend.CupyBackend(), *arrays))
            check_bits(got, wanted, function, any_nan=wanted.dtype != np.uint8)


@each_cupy
@each_shape
def test_a_weight_of_every_dtype(xp, dtype, shape):
    """It is rounded once: from float64 to 16 bits not by way of float32."""
    x, dy = (numbers(dtype, shape, seed) for seed in (1, 2))
    half = 2.0 ** -(reference.Format(dtype).fraction + 1)
    ulp = float(ml_dtypes.finfo(DTYPES[dtype]).smallest_subnormal)
    large = -float(ml_dtypes.finfo(DTYPES[dtype]).max) / 4
    for its_dtype in DTYPES:
        weight = numbers(its_dtype, shape, 3).copy()
        tiny = float(ml_dtypes.finfo(weight.dtype).smallest_subnormal)
        near = 1 + half + np.array([-1, 0, 1, 2]) * 2.0**-40  # halfway between two numbers
        near = [*near, 1, tiny, -tiny, *(ulp * np.array([0.5, 1.5, 2.5]))]
        weight[:, : len(near)] = np.array(near).astype(weight.dtype)
        for values in (x, dy):
            values[::2, : len(near)], values[1::2, : len(near)] = -1.0, large
        weight = np.repeat(weight, 2, -1)[:, ::2]
        for values, its_x in ((x, x), (dy, x), (x, None), (None, x)):
            check(xp, (values, its_x, weight), lambda one, *arrays: one.prelu(*arrays, None))


@each_cupy
@each_shape
def test_other_activations(xp, dtype, shape):
    x, dy = (numbers(dtype, shape, seed) for seed in (4, 5))
    check(xp, (x,), lambda one, x: one.squared_relu(x, None))
    check(xp, (x,), lambda one, x: one.crelu(x, 1, None))
    check(xp, (x,), lambda one, x: one.crelu_mask(x))
    check(xp, (x,), lambda one, x: one.copy(x))
    mask = np.random.default_rng(6).integers(0, 4, x.shape).astype(np.uint8)
    twice = np.repeat(dy, 2, 1)[:, ::-1]
    check(xp, (twice, mask), lambda one, dy, mask: one.crelu_backward(dy, mask, 1, None))
    for its_dtype in DTYPES:
        its_x = numbers(its_dtype, shape, 7)
        check(xp, (dy, its_x), lambda one, dy, x: one.squared_relu_backward(dy, x, None))


@each_cupy
@pytest.mark.parametrize("params", PRESETS, ids=str)
@each_shape
def test_relu(xp, dtype, shape, params):
    """In both layouts, and with a dy of another dtype than x."""
    x = numbers(dtype, shape, 8)
    for its_dtype in DTYPES:
        dy = numbers(its_dtype, shape, 9)
        for arrays in ((x, dy), (x.copy(), dy.copy())):
            with np.errstate(all="ignore"):
                wanted = run_all(*arrays, params)
                found = run_all(*map(xp.array, arrays), params)
            for got, right in zip(found, wanted, strict=True):
                check_bits(xp.numpy(got), right, params)


@each_cupy
@pytest.mark.parametrize("kind", ["int8", "uint16", "int32", "uint64"])
@each_shape
def test_integers(xp, kind, shape):
    x = np.random.default_rng(13).integers(0, 256, (shape[0], 2 * shape[1])).astype(kind)[:, ::2]
    params = {"threshold": 2, "negative_slope": 3, "positive_slope": 5, "max_value": 90}
    for arrays in (x, x.copy(), x.T):
        got = xp.numpy(relu_xp.relu(xp.array(arrays), **params))
        np.testing.assert_array_equal(got, relu_xp.relu(arrays, **params))


@each_cupy
def test_neighbours_of_thresholds_and_ceilings(xp, dtype):
    """Of numbers whose last bit is 0 or 1, and of both signs; behind them in memory all bits."""
    form, rng = reference.Format(dtype), np.random.default_rng(10)
    tiny = float(ml_dtypes.finfo(form.dtype).tiny) * 0.7
    every = form.unsigned.type(-1 % (1 << form.width))
    for number in rng.uniform(0.1, 3.9, 4):
        pairs = (-number, number), (number, 2 * number), (-2 * number, -number), (-number, tiny)
        for t, c in pairs:
            words = [form.round(one) + step for one in (t, c / 1.5) for step in range(-3, 4)]
            words = np.array([*words, form.infinity] * 40, form.unsigned)
            x = np.stack([np.full_like(words, every), words], 1).ravel().view(form.dtype)
            params = {"threshold": t, "negative_slope": 0.5, "positive_slope": 1.5}
            for its_params in (params, params | {"max_value": c}):
                with np.errstate(all="ignore"):
                    wanted = run_all(x, x, its_params)
                    for host in (x, np.repeat(x, 2)[::2]):
                        found = run_all(xp.array(host), xp.array(host), its_params)
                        for got, right in zip(found, wanted, strict=True):
                            check_bits(xp.numpy(got), right, its_params)


@each_cupy
def test_a_bias_of_every_dtype(xp, dtype):
    """It is rounded once, as a weight is."""
    x = np.full((2, 333), -0.0, DTYPES[dtype])
    for its_dtype in DTYPES:
        bias = numbers(its_dtype, (333,), 12)
        with np.errstate(all="ignore"):
            rounded = bias.astype(x.dtype)
            wanted = np.broadcast_to(np.where(rounded <= 0, 0, rounded), x.shape)
        for host in (bias, bias.copy()):
            got = xp.numpy(relu_xp.bias_relu(xp.array(x), xp.array(host)))
            check_bits(got, wanted.astype(x.dtype), its_dtype, any_nan=True)


@each_cupy
@pytest.mark.parametrize("weight_shape", WEIGHT_SHAPES, ids=str)
def test_a_weights_gradient_is_complete(xp, dtype, weight_shape):
    """Integers, whose sum is exact, in several blocks of threads; dense and strided."""
    rng = np.random.default_rng(11)
    x, dy = rng.integers(-9, 10, (2, 48, 5, 16)).astype(DTYPES[dtype])
    tiny = ml_dtypes.finfo(x.dtype).smallest_subnormal
    weight = np.zeros(weight_shape, np.float64)
    axes = tuple(axis for axis, length in enumerate(weight_shape) if length == 1)
    for factors in ((1, 1), (tiny, 1), (1, tiny)):
        strided = [(host * x.dtype.type(n)) for host, n in zip((dy, x), factors, strict=True)]
        strided = [np.repeat(host, 2, -1)[..., ::2] for host in strided]
        terms = np.where(x <= 0, strided[1].astype(np.float64) * strided[0].astype(np.float64), 0)
        for hosts in (strided, [host.copy() for host in strided]):
            got = cupy_backend.CupyBackend().prelu_weight_grad(*map(xp.array, (*hosts, weight)))
            assert xp.numpy(got).tolist() == terms.sum(axes, keepdims=True).tolist()
