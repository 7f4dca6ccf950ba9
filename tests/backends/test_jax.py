"""JAX, beyond the conformance suite: transformations, compilation, and float64 switched off."""

from __future__ import annotations

import numpy as np
import pytest
from libraries import LIBRARIES
from table import each_row

import relu_xp
from relu_xp.testing import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy
LIBRARY = LIBRARIES["jax"]

NAMES = ("relu", "clipped-leaky", "thresholded", "falling", "everything")
PRESETS = [reference.PRESETS[name] for name in NAMES]
each_preset = pytest.mark.parametrize("params", PRESETS, ids=NAMES)


@each_preset
def test_every_transformation(params):
    def f(x):
        return relu_xp.relu(x, **params)

    layer = relu_xp.ReLU(**params)

    def both_ways(x, dy):
        y, pullback = relu_xp.relu_vjp(x, **params)
        return y, pullback(dy), layer.forward(x), layer.backward(dy)

    x = jnp.linspace(-8, 8, 32, dtype="float32")
    g = relu_xp.relu_grad(x, **params)
    np.testing.assert_array_equal(jax.jit(f)(x), f(x))
    np.testing.assert_array_equal(jax.vmap(jax.grad(f))(x), g)
    np.testing.assert_array_equal(jax.jvp(f, (x,), (jnp.ones_like(x),))[1], g)
    np.testing.assert_array_equal(jnp.diag(jax.jacfwd(f)(x)), g)
    np.testing.assert_array_equal(jnp.diag(jax.jacrev(jax.jit(f))(x)), g)
    assert not jax.vmap(jax.grad(jax.grad(f)))(x).any()
    hessian = jax.hessian(lambda x: (f(x) ** 2).sum() / 2)(x)
    np.testing.assert_allclose(hessian, jnp.diag(g * g), rtol=1e-6)
    for traced, direct in zip(jax.jit(both_ways)(x, x), both_ways(x, x), strict=True):
        np.testing.assert_array_equal(traced, direct)


@each_row
def test_a_pullback_is_a_pytree(row):
    """It leaves and enters compiled functions, and is compiled once for each structure."""
    x = jnp.asarray(np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3))
    options = {"rng": lambda shape: jnp.full(shape, 0.5, "float32")} if row.draws else {}

    def vjp(x):
        return row.call_vjp(LIBRARY, x, **options)

    y, pullback = vjp(x)
    found, its_pullback = jax.jit(vjp)(x)
    np.testing.assert_array_equal(found, y)
    structure = jax.tree_util.tree_structure(pullback)
    assert jax.tree_util.tree_structure(its_pullback) == structure
    assert jax.tree_util.tree_leaves(pullback)
    wanted = pullback(y)
    apply = jax.jit(lambda pullback, dy: pullback(dy))
    mapped = jax.tree_util.tree_map(lambda leaf: leaf, pullback)
    for each in (pullback, its_pullback, vjp(-x)[1], mapped):
        apply(each, y)
    assert apply._cache_size() == 1
    for result in (apply(its_pullback, y), its_pullback(y), jax.jit(its_pullback)(y)):
        for one, other in zip(*map(jax.tree_util.tree_leaves, (result, wanted)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    assert its_pullback.saved_nbytes == pullback.saved_nbytes
    with pytest.raises(ValueError, match="^pullback: dy has shape"):
        its_pullback(y[:1])


def test_pullbacks_of_other_rules_have_other_structures():
    x, square = jnp.ones((2, 3)), jnp.ones((3, 3))
    pullbacks = [relu_xp.relu_vjp(x), relu_xp.relu_vjp(x, negative_slope=0.5)]
    pullbacks += [relu_xp.crelu_vjp(x), relu_xp.crelu_vjp(x, axis=0), relu_xp.squared_relu_vjp(x)]
    pullbacks += [relu_xp.prelu_vjp(x, jnp.ones(shape)) for shape in ((), (1,), (3,), (2, 3))]
    pullbacks += [relu_xp.bias_relu_vjp(square, x[0], axis=axis) for axis in (0, 1)]
    pullbacks += [relu_xp.bias_relu_vjp(square, x[0].astype("float16"))]
    pullbacks = [pullback for _, pullback in pullbacks]
    assert len(set(map(jax.tree_util.tree_structure, pullbacks))) == len(pullbacks)


def test_a_loop_carries_a_pullback():
    """`jax.lax.scan` and `cond` compare the structures of what they are given."""

    def step(pullback, x):
        y, following = relu_xp.relu_vjp(x)
        return following, pullback(y)

    xs = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4), np.float32))
    _, pullback = relu_xp.relu_vjp(xs[0])
    last, results = jax.lax.scan(step, pullback, xs[1:])
    wanted = relu_xp.relu_backward(relu_xp.relu(xs[1:]), xs[:-1])
    np.testing.assert_array_equal(results, wanted)
    np.testing.assert_array_equal(last(xs[0]), relu_xp.relu_backward(xs[0], xs[4]))
    pullbacks = jax.vmap(lambda x: relu_xp.relu_vjp(x)[1])(xs)
    dxs = jax.vmap(lambda pullback, dy: pullback(dy))(pullbacks, xs)
    np.testing.assert_array_equal(dxs, relu_xp.relu_backward(xs, xs))


@each_preset
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_sum_is_rounded_within_a_compiled_function(dtype, params):
    """XLA could compute in float32: threshold, ceiling and slopes would then see another number."""
    rng = np.random.default_rng(5)
    x, dy = (jnp.asarray(3 * rng.standard_normal((64, 500)), dtype) for _ in range(2))
    bias = jnp.asarray(rng.standard_normal(500), dtype)

    def both(x, bias, dy):
        y, pullback = relu_xp.bias_relu_vjp(x, bias, **params)
        return y, *pullback(dy)

    def by_grad(x, bias, dy):
        y, vjp = jax.vjp(lambda *inputs: relu_xp.bias_relu(*inputs, **params), x, bias)
        return y, *vjp(dy)

    y, pullback = relu_xp.relu_vjp(x + bias, **params)  # of an array that JAX has rounded
    dx = pullback(dy)
    exact = np.asarray(dx).astype(np.float64).sum(0)
    for function in (both, by_grad):
        its_y, its_dx, _ = jax.jit(function)(x, bias, dy)
        np.testing.assert_array_equal(its_y, y)
        np.testing.assert_array_equal(its_dx, dx)
    rows = jax.vmap(jax.jit(both), (0, None, 0))(x[:, None], bias, dy[:, None])
    np.testing.assert_array_equal(rows[0][:, 0], y)
    found = jax.jit(both)(x, bias, dy)[2]
    assert found.dtype == bias.dtype
    half = float(jnp.finfo(dtype).eps) / 2  # and float32's errors, where JAX has no float64
    np.testing.assert_allclose(np.asarray(found).astype(np.float64), exact, half, 1e-5)


def test_a_loop_carries_a_pullback_of_a_bias():
    """Its rule compares by axis and dtype."""

    def step(pullback, x):
        y, following = relu_xp.bias_relu_vjp(x, bias, axis=0)
        return following, pullback(y)

    rng = np.random.default_rng(0)
    xs, bias = (jnp.asarray(rng.standard_normal(n), "float32") for n in ((5, 3, 4), 3))
    _, pullback = relu_xp.bias_relu_vjp(xs[0], bias, axis=0)
    last, (dxs, bias_grads) = jax.lax.scan(step, pullback, xs[1:])
    ys = relu_xp.bias_relu(xs, bias, axis=1)
    for i in range(4):
        dx, bias_grad = relu_xp.bias_relu_vjp(xs[i], bias, axis=0)[1](ys[i + 1])
        np.testing.assert_array_equal(dxs[i], dx)
        np.testing.assert_allclose(bias_grads[i], bias_grad, rtol=1e-6)
    np.testing.assert_array_equal(last(xs[0])[0], jnp.where(xs[4] + bias[:, None] > 0, xs[0], 0))


@each_preset
def test_the_gradient_is_that_of_the_numpy_backend(params):
    """Also at infinities; dead units have +0, whatever comes back."""
    host = np.array([-np.inf, -2.0, -0.0, 0.0, 1.0, 3.0, np.inf], np.float32)
    x, dy = jnp.asarray(host), jnp.linspace(1, 2, 7, dtype="float32")
    expected = relu_xp.relu_backward(np.asarray(dy), host, **params)
    dead = relu_xp.relu_grad(host, **params) == 0
    wild = jnp.asarray([np.nan, np.inf, -2.0, -np.inf, 2.0, np.nan, -np.inf], "float32")

    def f(x):
        return relu_xp.relu(x, **params)

    for function in (f, jax.jit(f), jax.vmap(f)):
        y, vjp = jax.vjp(function, x)
        np.testing.assert_array_equal(y, relu_xp.relu(host, **params))
        np.testing.assert_array_equal(vjp(dy)[0], expected)
        assert not np.asarray(vjp(wild)[0]).view(np.uint32)[dead].any()


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("prelu", [0.25]),
        ("prelu", [0.0]),
        ("bias_relu", [0.5, 0.75, -1.0, -2.0, 0.0]),
        ("crelu", None),
        ("squared_relu", None),
    ],
    ids=str,
)
def test_other_activations_have_the_gradients_of_the_numpy_backend(name, weight):
    """Also by a weight of 0, which must learn from there."""
    inputs = [np.array([[-2.0, -0.5, 0.0, 1.0, np.inf]], np.float32)]
    inputs += [] if weight is None else [np.array(weight, np.float32)]
    expected, pullback = getattr(relu_xp, f"{name}_vjp")(*inputs)
    dy = np.cos(np.arange(expected.size, dtype=np.float32)).reshape(expected.shape)
    y, vjp = jax.vjp(jax.jit(getattr(relu_xp, name)), *map(jnp.asarray, inputs))
    np.testing.assert_array_equal(y, expected)
    gradients = pullback(dy) if weight else (pullback(dy),)
    for one, other in zip(vjp(jnp.asarray(dy)), gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_rrelu_draws_with_a_function_of_a_shape_or_with_numpys_generator():
    x, key = jnp.full((3, 4), -1.0, "float32"), jax.random.key(1)

    def rng(shape):
        return jax.random.uniform(key, shape, "float32")

    y = relu_xp.rrelu(x, 1.0, 2.0, rng=rng)
    np.testing.assert_array_equal(y, -(rng((3, 4)) + 1))
    np.testing.assert_array_equal(jax.jit(lambda x: relu_xp.rrelu(x, 1.0, 2.0, rng=rng))(x), y)

    def f(x):
        return relu_xp.rrelu(x, rng=np.random.default_rng(5))

    np.testing.assert_array_equal(jax.jit(f)(x), f(x))


def test_a_new_slope_compiles_nothing(monkeypatch):
    from relu_xp.backends import jax as module
    from relu_xp.backends.base import Backend

    class Counted(Backend):
        traces = 0

        def branch_codes(self, params, x):
            self.traces += 1
            return super().branch_codes(params, x)

    base = Counted()
    monkeypatch.setattr(module, "_base", base)
    x = jnp.ones((2, 3), "float32")
    for function in (
        relu_xp.relu_vjp,
        lambda x, **params: relu_xp.relu_backward(x, x, **params),
        lambda x, **params: relu_xp.bias_relu_vjp(x, x[0], **params)[1](x),
    ):
        base.traces = 0
        for number in range(2, 12):
            function(x, negative_slope=1 / number, threshold=1 / number, max_value=number)
        assert base.traces == 1


def test_float64_may_be_absent_or_present():
    """By default JAX has none, and sums in float32."""
    params = {"negative_slope": 0.1, "threshold": 0.3, "max_value": 1.7}
    host, weight = np.linspace(-2, 2, 8, dtype=np.float32)[None], np.array([0.3], np.float32)
    with jax.enable_x64(False):
        x, slope = jnp.asarray(host), jnp.asarray(weight)
        y, (dx, weight_grad) = relu_xp.relu(x, **params), relu_xp.prelu_vjp(x, slope)[1](x)
        assert {one.dtype.name for one in (y, dx, weight_grad)} == {"float32"}
        np.testing.assert_array_equal(y, relu_xp.relu(host, **params))
        expected = relu_xp.prelu_vjp(host, weight)[1](host)[1]
        np.testing.assert_allclose(weight_grad, expected, rtol=1e-6)
        bias_grad = relu_xp.bias_relu_vjp(x, x[0])[1](x)[1]
        assert bias_grad.dtype == "float32"
        np.testing.assert_array_equal(bias_grad, np.maximum(host[0], 0))
    with jax.enable_x64(True):
        x = jnp.asarray([2**62, -1], "int64")
        assert relu_xp.clipped_relu(x, 2**61).tolist() == [2**61, 0]
        assert relu_xp.relu(x.astype("float64"), **params).dtype == "float64"
