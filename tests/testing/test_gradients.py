"""check_gradient: right gradients pass, wrong ones fail, and the message names the element."""

from __future__ import annotations

import numpy as np
import pytest
from libraries import LIBRARIES

import relu_xp
from relu_xp import dispatch
from relu_xp.backends.base import Backend
from relu_xp.testing import check_gradient, reference

LAYERS = [
    relu_xp.ReLU(),
    relu_xp.LeakyReLU(-2.0),
    relu_xp.ReLU6(),
    relu_xp.ClippedReLU(3.0, negative_slope=0.25, threshold=-1.0),
    relu_xp.ThresholdedReLU(0.3),
    relu_xp.ReLU(threshold=-2.0, max_value=0.0),
    relu_xp.ReLU(negative_slope=0.1, threshold=0.25, positive_slope=2.0, max_value=1.5),
]
# Every threshold and ceiling of those, their neighbours, and numbers far from all.
KINKS = [-3, -2, -1, -1e-7, -0.0, 0, 1e-9, 1e-4, 0.25, 0.3, 0.75, 1, 3, 6, 6.00001, 20, 100]


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("name", [n for n in dispatch.LIBRARIES if LIBRARIES[n].reason is None])
def test_every_layer_passes(name, dtype, require):
    xp = dispatch.namespace(name)
    kind = reference.DTYPES[dtype] if name in ("numpy", "dask") else getattr(xp, dtype, None)
    if kind is None:
        assert name in ("array_api_strict", "cupy")
        assert dtype in ("float16", "bfloat16")
        return
    if name == "jax":
        require("jax").config.update("jax_enable_x64", True)
    numbers = KINKS[4:9] if name == "dask" else KINKS  # Dask is slow
    x = xp.astype(xp.asarray(np.array(numbers, np.float32)), kind)
    for layer in LAYERS:
        check_gradient(layer, x)
        assert layer.saved_nbytes == 0, "the caller's layer was used"


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (relu_xp.relu, (), {"negative_slope": 3.0, "max_value": 6}),
        (relu_xp.relu_vjp, (), {"threshold": 0.3}),
        (relu_xp.leaky_relu, (0.2,), {}),
        (relu_xp.relu6, (), {"negative_slope": 0.1}),
        (relu_xp.clipped_relu, (), {"max_value": 3}),
        (relu_xp.thresholded_relu, (), {}),
        (relu_xp.prelu, (np.linspace(-1.0, 1.0, 17),), {}),
        (relu_xp.bias_relu, (np.zeros(17),), {}),
        (relu_xp.bias_relu_vjp, (np.full(1, 0.5),), {"axis": 0, "max_value": 6.5}),
        (relu_xp.rrelu_vjp, (), {"rng": np.random.default_rng(3)}),
        (relu_xp.crelu, (), {}),
        (relu_xp.squared_relu, (), {}),
        (lambda x, **options: relu_xp.relu_vjp(x, **options), (), {"max_value": 3}),
    ],
)
def test_every_function_passes(function, arguments, options):
    for dtype in ("float32", "float64"):
        x = np.array(KINKS, dtype).reshape(1, 17)
        check_gradient(function, x, *arguments, **options)
        dy = np.cos(np.arange(34.0)).reshape(1, 34).astype(dtype)
        check_gradient(
            function, x, *arguments, dy=dy[:, : 17 + 17 * (function is relu_xp.crelu)], **options
        )


class Layer:
    """A textbook's layer, with the backward pass that it is given."""

    def __init__(self, backward, forward=lambda x: np.maximum(x, 0)):
        self.functions = forward, backward

    def forward(self, x):
        self.x = x
        return self.functions[0](x)

    def backward(self, dy):
        return self.functions[1](dy, self.x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("backward", "element"),
    [
        (lambda dy, x: dy * (x >= 0), r"x\[4\] = -0 is .*, expected 0 at the kink"),
        (lambda dy, x: dy * np.heaviside(x, 0.5), r"x\[4\] = -0 is .*, expected 0 at the kink"),
        (lambda dy, x: dy * (x != 0), r"x\[0\] = -3 is .*, expected 0 by differences"),
        (lambda dy, x: dy, r"x\[0\] = -3 is "),
        (lambda dy, x: dy * (x > 0) / 2, r"x\[6\] = \S+ is .*, expected .* by differences"),
        (lambda dy, x: dy * (x > 0) * 1.02, r"x\[6\] = \S+ is .*, expected .* by differences"),
        (lambda dy, x: dy * (x > 0) * (x < 6), r"x\[13\] = 6 is -?0, expected .* by differences"),
        (lambda dy, x: np.where(x > 0, np.nan, 0), r"x\[6\] = \S+ is nan, expected"),
        (lambda dy, x: (dy * (x > 0))[:-1], r"x has shape \(16,\), expected \(17,\)"),
    ],
)
def test_a_wrong_layer_fails(backward, element, dtype):
    x = np.array([-3, -2, -1, -0.5, -0.0, 0, 0.01, 0.1, 0.25, 0.3, 0.75, 1, 3, 6, 7, 20, 100])
    check_gradient(Layer(lambda dy, x: dy * (x > 0)), x.astype(dtype))
    message = f"^check_gradient: .*Layer.* with respect to {element}"
    with pytest.raises(AssertionError, match=message):
        check_gradient(Layer(backward), x.astype(dtype))


@pytest.mark.parametrize(
    ("layer", "x", "backward", "message"),
    [
        (relu_xp.ReLU6(), 6.0, lambda self, dy: dy, "at the kink"),
        (relu_xp.LeakyReLU(3.0, threshold=0.5), 0.5, lambda self, dy: dy, "at the kink"),
        (relu_xp.ReLU6(), 1e-9, lambda self, dy: 1.5 * dy, r"1e-09 is \S+, .* by differences"),
    ],
)
def test_a_wrong_layer_of_ours_fails(monkeypatch, layer, x, backward, message):
    """Also where the differences cannot decide: at a ceiling, and below a steeper slope."""
    check_gradient(layer, np.array([x]))
    monkeypatch.setattr(type(layer), "backward", backward)
    with pytest.raises(AssertionError, match=message):
        check_gradient(layer, np.array([x]))


BIASES = [
    {},
    {"negative_slope": 0.25},
    {"threshold": 0.25, "negative_slope": 0.125, "positive_slope": 2.0, "max_value": 1.5},
    {"threshold": -2.0, "max_value": 0.0},
    {"threshold": 100.0},
]


@pytest.mark.libraries(names=[name for name in LIBRARIES if not name.startswith("cupy_host")])
@pytest.mark.parametrize("options", BIASES, ids=str)
def test_a_bias_passes(xp, dtype, options):
    """Also where x + bias lies on a kink, where x does, and where a whole channel lies on one."""
    kink = options.get("threshold", 0.0)
    bias = np.array([0.5, -1.25, 0.0, -100.0])
    sums = np.array([[kink, kink, kink, kink], [kink, 0.75, -1, 3], [kink, kink, 1e-4, 0]])
    for shape, axis in (((3, 1, 4), -1), ((4, 3), 0)):
        host = (sums - bias if axis else (sums - bias).T).reshape(shape)
        x = xp.array(host.astype(reference.DTYPES[dtype]))
        for its_dtype in {dtype, "float32"}:
            b = xp.array(bias.astype(reference.DTYPES[its_dtype]))
            check_gradient(relu_xp.bias_relu, x, b, axis=axis, **options)
            if xp.name == "dask":
                return  # it is slow
            layer = relu_xp.BiasReLU(4, axis, **options)
            layer.params[0] = b
            check_gradient(layer, x)
            assert layer.params[0] is b
            assert xp.numpy(b).tolist() == bias.tolist()


def test_a_bias_passes_where_numbers_are_rounded():
    """The bias, the sum and the terms of the bias's gradient, each of which moves a kink."""
    bias = np.array([0.7])
    rounded = bias.astype(np.float32)
    assert bias > rounded
    check_gradient(relu_xp.bias_relu, -rounded, bias)
    x, bias = np.array([0.01], np.float16), np.array([100.0], np.float32)
    assert x + bias.astype(np.float16) == 100
    check_gradient(relu_xp.bias_relu, x, bias, threshold=100.0)
    x, dy = np.zeros((2, 1), np.float16), np.array([[1000], [-999]], np.float16)
    check_gradient(relu_xp.bias_relu, x, np.zeros(1, np.float16), dy=dy, negative_slope=0.1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda dy, dx, db: (dx + dy * (dx == 0), db),
            r"x\[0, 0\] = 0.5 .*, expected 0 at the kink",
        ),
        (lambda dy, dx, db: (dx, db + dy.sum(0)), r"2\[0\] = -0.5 is .*, expected 0 at the kink"),
        (lambda dy, dx, db: (dx, db * 1.01), r"2\[1\] = 1 is .* by differences"),
        (lambda dy, dx, db: (dx, db[:1]), r"argument 2 has shape \(1,\), expected \(2,\)"),
    ],
)
def test_a_wrong_gradient_of_a_bias_fails(monkeypatch, fault, message):
    def backward(self, params, dy, *rest, right=Backend.bias_relu_backward):
        return fault(dy, *right(self, params, dy, *rest))

    x, bias = np.array([[0.5, 2.0], [0.5, -3.0]]), np.array([-0.5, 1.0])
    check_gradient(relu_xp.bias_relu, x, bias)
    for kind in (Backend, type(dispatch.backend_named("numpy"))):
        monkeypatch.setattr(kind, "bias_relu_backward", backward)
    with pytest.raises(AssertionError, match=message):
        check_gradient(relu_xp.bias_relu, x, bias)


def test_a_layer_with_a_narrow_array_passes():
    """Where the differences are taken in float32, the array is replaced, not written."""
    for layer in (relu_xp.PReLU(3, dtype=np.float16), relu_xp.BiasReLU(3, dtype=np.float16)):
        check_gradient(layer, np.array([[0.1, -0.3, 2.0], [1.0, 0.7, -0.9]], np.float16))


class Network:
    """Two dense layers, a leaky ReLU between them, and a curved function at the end."""

    def __init__(self, xp=np, factor=1.0):
        rng = np.random.default_rng(0)
        shapes = ((5, 7), (7,), (7, 3))
        self.params = [xp.asarray(rng.standard_normal(shape)) for shape in shapes]
        self.activation = relu_xp.LeakyReLU()
        self.factor = factor

    def forward(self, x):
        w, b, v = self.params
        self.x, self.h = x, self.activation.forward(x @ w + b)
        self.y = self.h @ v
        return self.y / (1 + self.y**2)

    def backward(self, dy):
        w, _, v = self.params
        dy = dy * (1 - self.y**2) / (1 + self.y**2) ** 2
        dh = self.activation.backward(dy @ v.T)
        self.grads = [self.x.T @ dh, self.factor * dh.sum(0), self.h.T @ dy]
        return dh @ w.T


def test_a_network_passes_with_its_parameters():
    x, network = np.random.default_rng(1).standard_normal((4, 5)), Network()
    before = [p.copy() for p in network.params]
    check_gradient(network, x)
    np.testing.assert_equal(network.params, before)
    with pytest.raises(AssertionError, match=r"respect to params\[1\]\[0\] = .* by differences"):
        check_gradient(Network(factor=1.01), x)
    network.params.pop()
    network.forward, network.backward = (lambda x: x), (lambda dy: dy)
    with pytest.raises(AssertionError, match=r"1 gradients, expected one for each of x, params\[0"):
        check_gradient(network, x)


def test_a_network_of_jax_passes(require):
    """Its parameters cannot be written, only replaced."""
    require("jax").config.update("jax_enable_x64", True)
    jnp = require("jax.numpy")
    check_gradient(Network(jnp), jnp.asarray(np.random.default_rng(1).standard_normal((2, 5))))


def test_arrays_among_the_arguments_are_differentiated_too():
    def vjp(x, weight, factor=1.0):
        return relu_xp.prelu(x, weight), lambda dy: (
            relu_xp.prelu_vjp(x, weight)[1](dy)[0],
            factor * relu_xp.prelu_vjp(x, weight)[1](dy)[1],
        )

    x, weight = np.array([[0.0, 1, -2], [3, -1, 0]]), np.array([0.2, 2, -0.3])
    check_gradient(vjp, x, weight, 1.0)
    with pytest.raises(AssertionError, match=r"respect to argument 2\[1\] = 2 is"):
        check_gradient(vjp, x, weight, factor=0.5)
    with pytest.raises(AssertionError, match="2 gradients, expected one for each of x$"):
        check_gradient(lambda x: vjp(x, weight), x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_curved_functions(dtype):
    x = np.concatenate([np.random.default_rng(2).standard_normal(200), KINKS[3:7]]).astype(dtype)
    check_gradient(Layer(lambda dy, x: 3 * dy * x * x, lambda x: x**3), x)
    with pytest.raises(AssertionError, match="by differences"):
        check_gradient(Layer(lambda dy, x: 3.1 * dy * x * x, lambda x: x**3), x)


def test_nothing_of_the_callers_is_changed():
    x, dy, layer, rng = np.array(KINKS), np.ones(17), relu_xp.RReLU(), np.random.default_rng(3)
    layer.inplace, state = True, rng.bit_generator.state
    check_gradient(layer, x, dy=dy)
    check_gradient(relu_xp.rrelu_vjp, x, rng=rng)
    np.testing.assert_array_equal(x, KINKS)
    np.testing.assert_array_equal(dy, np.ones(17))
    assert rng.bit_generator.state == state


def narrow(x):
    return np.float32(1) / (x.dtype == np.float16) * x


@pytest.mark.parametrize(
    ("function", "x", "options", "error", "message"),
    [
        *(
            (f, np.ones(2), {}, TypeError, "is neither a layer")
            for f in (3, abs, relu_xp.relu_grad)
        ),
        (relu_xp.ReLU(), [1.0], {}, TypeError, "x must be an array, got list; convert it first"),
        (relu_xp.ReLU(), np.ones(2, int), {}, TypeError, "dtype int64, which has no gradient"),
        (relu_xp.ReLU(), np.array([np.inf]), {}, ValueError, "x must be finite"),
        (relu_xp.ReLU(), np.ones(0), {}, ValueError, "x is empty"),
        (relu_xp.ReLU(), np.ones(2), {"threshold": 1}, TypeError, "a layer takes x alone; give"),
        (relu_xp.ReLU(), np.ones(2), {"dy": np.ones(3)}, ValueError, r"shape \(3,\), y has \(2,\)"),
        (relu_xp.ReLU(), np.ones(2), {"dy": [1.0]}, TypeError, "dy must be an array, got list"),
        (relu_xp.relu_vjp, np.ones(2), {"out": np.ones(2)}, TypeError, "is called without out="),
        (relu_xp.relu_vjp, np.ones(2), {"mask": np.ones(2)}, TypeError, "called without mask="),
        (Layer(lambda dy, x: dy, narrow), np.ones(2, "f2"), {}, TypeError, "x is float16, so that"),
        (
            Layer(lambda dy, x: dy, lambda x: abs(x) + abs(x[::-1])),
            np.zeros(2),
            {},
            ValueError,
            "all",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(function, x, options, error, message):
    with np.errstate(all="raise"), pytest.raises(error, match=f"check_gradient: .*{message}"):
        check_gradient(function, x, **options)
