"""Networks as other projects write them by hand: trained with the package, and with their formulas.

Each is trained twice from the same start. All arrays agree after every step, to the bit but for the
sign of a zero: the formulas select and multiply as the package does.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re

import numpy as np
import pytest

import relu_xp


class Formula:
    """The textbook's layer, which keeps its mask."""

    def __init__(self, slope=0.0):
        self.slope = slope

    def forward(self, x):
        self.mask = x <= 0
        return self.backward(x)

    def backward(self, dy):
        dx = dy.copy("K")
        dx[self.mask] = dy[self.mask] * dy.dtype.type(self.slope) if self.slope else 0
        return dx


class Package:
    """A layer of the package, with the arrays of a library."""

    def __init__(self, xp, slope=0.0):
        self.xp = xp
        self.layer = relu_xp.LeakyReLU(slope) if slope else relu_xp.ReLU()

    def forward(self, x):
        return host(self.xp, self.layer.forward(self.xp.array(x)))

    def backward(self, dy):
        return host(self.xp, self.layer.backward(self.xp.array(dy)))

    def __deepcopy__(self, memo):
        again = copy.copy(self)  # the library is a single object
        again.layer = copy.deepcopy(self.layer, memo)
        return again


class Pullback(Package):
    """The function instead, whose gradient may be called again and again."""

    def __init__(self, xp, slope=0.0):
        self.xp, self.slope = xp, slope

    def forward(self, x):
        y, self.pullback = relu_xp.relu_vjp(self.xp.array(x), negative_slope=self.slope)
        return host(self.xp, y)

    def backward(self, dy):
        return host(self.xp, self.pullback(self.xp.array(dy)))


def host(xp, array):
    """Return a NumPy array that may be written: the array itself if it is one."""
    return array if xp.ndarray else np.array(xp.numpy(array))


class Affine:
    """A layer with parameters, which adds up their gradients."""

    def __init__(self, rng, n, m, dtype="f8"):
        self.params = [(rng.standard_normal((n, m)) * (2 / n) ** 0.5).astype(dtype)]
        self.params.append((rng.standard_normal(m) / 8).astype(dtype))
        self.grads = [np.zeros_like(p) for p in self.params]

    def forward(self, x):
        self.x = x
        return x @ self.params[0] + self.params[1]

    def backward(self, dy):
        x = self.x.reshape(-1, self.x.shape[-1])
        self.grads[0] += x.T @ dy.reshape(len(x), -1)
        self.grads[1] += dy.reshape(len(x), -1).sum(0)
        return dy @ self.params[0].T


def forward(layers, x):
    return functools.reduce(lambda x, layer: layer.forward(x), layers, x)


def backward(layers, dy):
    return functools.reduce(lambda dy, layer: layer.backward(dy), reversed(layers), dy)


def update(layers, rate):
    """Change the parameters, and set the gradients to 0; return copies of both."""
    pairs = [zip(x.params, x.grads, strict=True) for x in layers if isinstance(x, Affine)]
    copies = []
    for param, grad in itertools.chain(*pairs):
        copies += param.copy(), grad.copy()
        param -= param.dtype.type(rate) * grad
        grad[...] = 0
    return copies


def check(train, xp, kind):
    """Compare what both trainings yield at each step; the parameters must have changed."""
    steps, history = 10 if xp.name == "dask" else 100, []
    package, formula = train(functools.partial(kind, xp)), train(Formula)
    for step, found, wanted in zip(range(steps), package, formula, strict=False):
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=f"step {step}")
        history.append(found)
    assert len(history) == steps
    assert any(np.max(abs(a - b)) > 1e-3 for a, b in zip(history[0], found, strict=True))


def test_gan(xp):
    """The discriminator sees two batches before it goes back through either."""

    def train(make):
        rng = np.random.default_rng(0)
        generator = [Affine(rng, 4, 16), make(), Affine(rng, 16, 2)]
        body = [Affine(rng, 2, 16), Affine(rng, 16, 1)]

        def discriminate(x):
            layers = [copy.copy(body[0]), make(0.2), copy.copy(body[1])]  # the same parameters
            return layers, 1 / (1 + np.exp(-forward(layers, x)))

        while True:
            real, z = rng.normal(2, 0.5, (32, 2)), rng.standard_normal((32, 4))
            fake = forward(generator, z)
            (on_real, p), (on_fake, q) = discriminate(real), discriminate(fake)
            grads = [backward(on_real, (p - 1) / 32), backward(on_fake, q / 32)]
            params = update(body, 0.1)
            on_fake, q = discriminate(fake)
            grads += [backward(generator, backward(on_fake, (q - 1) / 32))]
            update(body, 0)
            yield [fake, p, q, *grads, *params, *update(generator, 0.1)]

    check(train, xp, Pullback)


def test_transformer(xp):
    """Arrays that are changed in place after a pass; the gradient of a mean over time."""

    def train(make):
        rng = np.random.default_rng(1)
        blocks = [[Affine(rng, 8, 8, "f4"), make(), Affine(rng, 8, 8, "f4")] for _ in range(2)]
        target = rng.standard_normal(8).astype("f4")
        while True:
            x, drops = rng.standard_normal((4, 6, 8)).astype("f4"), []
            for first, activation, second in blocks:
                h = activation.forward(z := first.forward(x))
                h += x
                z[...] = np.nan
                drops.append(rng.random(h.shape) > 0.2)
                h *= drops[-1]
                x = second.forward(h)
            dx = np.broadcast_to((x.mean(1) - target)[:, None] / np.float32(24), x.shape)
            for first, activation, second in reversed(blocks):
                dh = second.backward(dx)
                dh *= drops.pop()
                dx = dh + first.backward(activation.backward(dh))
            yield [x, dx, *update(itertools.chain(*blocks), 0.01)]

    check(train, xp, Package)


class Convolution(Affine):
    """By a product of matrices: y is channels-last in memory, dx a part of a padded array."""

    def forward(self, x):
        self.shape = n, _, height, width = x.shape
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
        y = super().forward(windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * height * width, -1))
        return y.reshape(n, height, width, -1).transpose(0, 3, 1, 2)

    def backward(self, dy):
        n, channels, height, width = self.shape
        columns = super().backward(dy.transpose(0, 2, 3, 1).reshape(len(self.x), -1))
        columns = columns.reshape(n, height, width, channels, 3, 3).transpose(4, 5, 0, 3, 1, 2)
        dx = np.zeros((n, channels, height + 2, width + 2))
        for i, j in np.ndindex(3, 3):
            dx[:, :, i : i + height, j : j + width] += columns[i, j]
        return dx[:, :, 1:-1, 1:-1]


def test_u_net(xp):
    """Arrays in many layouts, halves of a concatenation, a gradient that is added to in place."""

    def train(make):
        rng = np.random.default_rng(3)
        down, up = [Convolution(rng, 9, 4), make()], [Convolution(rng, 36, 4), make(0.1)]
        last = Convolution(rng, 72, 1)
        while True:
            x = rng.standard_normal((2, 1, 6, 6))
            skip = forward(down, x)
            y = last.forward(np.concatenate([forward(up, skip), skip], 1))
            dy = last.backward((y - x**2) / y.size)
            dskip = backward(up, dy[:, :4])
            dskip += dy[:, 4:]
            yield [skip, y, dy, backward(down, dskip), *update([*down, *up, last], 0.05)]

    check(train, xp, Package)


def test_q_learning(xp):
    """A target network is a copy, made between the passes of the network that learns."""

    def train(make):
        rng = np.random.default_rng(6)
        online = [Affine(rng, 4, 16), make(), Affine(rng, 16, 3)]
        for step in range(100):
            states, following = rng.standard_normal((2, 32, 4))
            q = forward(online, states)
            if step % 7 == 0:
                target = copy.deepcopy(online)
            wanted = states.sum(1) + 0.9 * forward(target, following).max(1)
            error = np.where(np.arange(3) == rng.integers(3, size=(32, 1)), q - wanted[:, None], 0)
            yield [q, wanted, backward(online, error / 32), *update(online, 0.05)]

    check(train, xp, Package)


class SlopeFormula(Formula):
    """A learned slope, for all elements."""

    def __init__(self):
        self.params, self.grads = [np.full(1, 0.25)], [np.zeros(1)]

    def forward(self, x):
        self.x = x
        return np.where(x <= 0, self.params[0] * x, x)

    def backward(self, dy):
        self.grads[0][...] = (dy * self.x)[self.x <= 0].sum()
        return np.where(self.x <= 0, self.params[0] * dy, dy)


@pytest.mark.libraries("ndarray")
def test_textbook_trainer(xp):
    """Lists of parameters that are made once; tied slopes, clipping, momentum, a checkpoint."""

    def train(make):
        rng = np.random.default_rng(8)
        layers = [Affine(rng, 4, 16), make(), Affine(rng, 16, 16), make(), Affine(rng, 16, 1)]
        layers[3].params[0] = layers[1].params[0]
        params = [*itertools.chain(*(layer.params for layer in layers))]
        grads = [*itertools.chain(*(layer.grads for layer in layers))]
        momenta = [np.zeros_like(p) for p in params]
        (tied,) = (i for i in range(3, len(params)) if params[i] is params[2])
        for step in range(100):
            x = rng.standard_normal((32, 4))
            backward(layers, (forward(layers, x) - abs(x).sum(1, keepdims=True)) / 32)
            grads[2] += grads[tied]
            rate = min(1, 1 / np.sqrt(sum((g * g).sum() for g in grads)))
            for i in set(range(len(params))) - {tied}:
                grads[i] *= rate
                momenta[i] += grads[i] - 0.1 * momenta[i]
                params[i] -= 0.01 * momenta[i]
                grads[i][...] = 0
                if step == 50:
                    params[i][...] = params[i].astype("f2")
            yield [p.copy() for p in params]

    package, formula = train(lambda: relu_xp.PReLU(dtype="f8")), train(SlopeFormula)
    for found, wanted in zip(package, formula, strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, 1e-6, 1e-9)
    assert abs(found[2] - 0.25) > 0.01


def test_onnx_clip(xp):
    """An interpreter gets read-only arrays, and bounds that are 0-d arrays."""
    x, bound = np.arange(-40, 40, dtype="f4").reshape(8, 10), np.array(6, "f4")
    x = np.frombuffer(x.tobytes(), x.dtype)
    y = relu_xp.clipped_relu(xp.array(x), max_value=bound)
    np.testing.assert_array_equal(xp.numpy(y), np.clip(x, 0, bound))


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("make", [relu_xp.ReLU, relu_xp.RReLU, relu_xp.SquaredReLU])
def test_the_gradient_of_a_sum_has_the_layout_of_x(xp, make):
    """It is the same row again and again: its strides are no layout that a result could have."""
    layer, row = make(), np.ones(5, np.float32)
    layer.forward(xp.array(np.ones((3, 5), np.float32)))
    dy = xp.array(np.broadcast_to(row, (3, 5)))
    assert layer.backward(dy).strides == (20, 4)


@pytest.mark.libraries("ndarray")
def test_gradients_are_collected_after_a_weight_was_converted(xp):
    """As the docstring advises; an optimiser that has the list of before would not see them."""
    layer = relu_xp.PReLU()
    layer.params[0] = layer.params[0].astype(np.float64)
    grads = [*layer.grads]
    layer.backward(layer.forward(np.array([-2.0, 1.0])))
    assert grads[0].tolist() == [1.0]


@pytest.mark.parametrize("function", [relu_xp.relu_grad, relu_xp.squared_relu_vjp])
def test_every_dtype_that_a_message_offers_is_accepted(function):
    with pytest.raises(TypeError, match="float32") as error:
        function(np.array([True]))
    for name in re.findall(r"\b(?:float|int|uint)\d+", str(error.value)):
        function(np.ones(1, name))


def test_a_layer_of_another_project():
    """Attributes that its base class sets, and lists that it appends to."""

    class Base:
        def __init__(self, activation):
            self.activation = activation

    class Scaled(relu_xp.ReLU, Base):
        def __init__(self):
            relu_xp.ReLU.__init__(self)
            Base.__init__(self, "relu")
            self.params.append(np.ones(1))

    layer = Scaled()
    assert (layer.activation, layer.params) == ("relu", [np.ones(1)])
    assert layer.forward(np.array([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_a_layer_is_copied_after_it_was_traced(require):
    """What it has saved can neither be used nor copied; its parameters can."""
    jax = require("jax")
    layer = relu_xp.LeakyReLU(0.25)
    jax.jit(layer.forward)(jax.numpy.ones(3))
    again = copy.deepcopy(layer)
    assert again.backward(again.forward(jax.numpy.asarray([-4.0, 2.0]))).tolist() == [-0.25, 2.0]
