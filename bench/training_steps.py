"""One training step of a multilayer perceptron, as users of each library write it.

A step is the forward pass, the mean cross-entropy of the softmax, the backward pass, and stochastic
gradient descent with momentum. A class is made from the initial weights, of shape (inputs,
outputs), and one batch; biases begin as 0. Its `step` learns from the batch and returns the loss
before that; `products` multiplies what `step` multiplies, and does nothing else.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import relu_xp
from bench.report import cpus

RATE, MOMENTUM = 0.05, 0.9
THREADS = 2
_PART = 1 << 17  # parameters whose update stays in the caches


class BiasRelu:
    """Bias and ReLU by relu_xp: a pass forward and a pass back, both in place."""

    def forward(self, x: Any, bias: Any) -> Any:
        """Return ``relu(x + bias)``."""
        y, self._pullback = relu_xp.bias_relu_vjp(x, bias, out=x)
        return y

    def backward(self, dy: Any) -> tuple[Any, Any]:
        """Return the gradients for x and for the bias."""
        dx, dbias = self._pullback(dy, out=dy)
        return dx, dbias


class Textbook:
    """Bias and ReLU of "Deep Learning from Scratch" (K. Saitoh, 2016)."""

    def forward(self, x: Any, bias: Any) -> Any:
        """Return ``relu(x + bias)``."""
        x = x + bias
        self._mask = x <= 0
        out = x.copy()
        out[self._mask] = 0
        return out

    def backward(self, dy: Any) -> tuple[Any, Any]:
        """Return the gradients for x and for the bias."""
        dy[self._mask] = 0
        return dy, dy.sum(axis=0)


class ArrayStep:
    """NumPy or CuPy, without autograd. Nothing large is allocated after the first step.

    The parameters are views of one array, so that an update is three operations for all of them; on
    NumPy for each of their parts, of which two threads take half each. Gradients have the learning
    rate, which is constant, as a factor: that saves the update a pass.
    """

    def __init__(
        self, weights: Sequence[Any], x: Any, labels: Any, layer: type[Any] = BiasRelu, xp: Any = np
    ) -> None:
        self._xp, count = xp, len(x)
        self._labels = xp.arange(count), xp.asarray(labels)
        shapes = [shape for w in weights for shape in (w.shape, w.shape[1:])]
        size = sum(math.prod(shape) for shape in shapes)
        flat = [xp.zeros(size, xp.float32) for _ in range(3)]  # velocities, gradients, values
        self._gradients, self._values = (list(_views(array, shapes)) for array in flat[1:])
        for value, w in zip(self._values[::2], weights, strict=True):
            value[...] = xp.asarray(w)
        step = _PART if xp is np else size
        cuts = [slice(start, start + step) for start in range(0, size, step)]
        parts = [[array[cut] for array in flat] for cut in cuts]
        self._halves = parts[: len(parts) // THREADS], parts[len(parts) // THREADS :]
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        widths = [w.shape[1] for w in weights]
        self._y = [xp.empty((count, width), xp.float32) for width in widths]
        self._dy = [xp.empty((count, width), xp.float32) for width in widths]
        self._inputs = [xp.asarray(x), *self._y[:-1]]
        self._layers = [layer() for _ in weights[1:]]

    def _forward_product(self, k: int) -> Any:
        return self._xp.matmul(self._inputs[k], self._values[2 * k], out=self._y[k])

    def _backward_products(self, k: int, dy: Any) -> Any:
        self._xp.matmul(self._inputs[k].T, dy, out=self._gradients[2 * k])
        if k:
            dy = self._xp.matmul(dy, self._values[2 * k].T, out=self._dy[k - 1])
        return dy

    def products(self) -> None:
        """Compute the matrix products of a step."""
        for k in range(len(self._y)):
            self._forward_product(k)
        for k in reversed(range(len(self._y))):
            self._backward_products(k, self._dy[k])

    def step(self) -> Any:
        """Learn from the batch; return the loss before that."""
        for k, layer in enumerate(self._layers):
            y = self._forward_product(k)
            self._inputs[k + 1] = layer.forward(y, self._values[2 * k + 1])
        last = len(self._layers)
        logits = self._forward_product(last)
        logits += self._values[-1]
        loss, dy = self._cross_entropy(logits)
        self._xp.sum(dy, axis=0, out=self._gradients[-1])
        for k in range(last, 0, -1):
            dy = self._backward_products(k, dy)
            dy, self._gradients[2 * k - 1][...] = self._layers[k - 1].backward(dy)
        self._backward_products(0, dy)
        first, second = self._halves
        other = self._pool.submit(_update, first) if first else None
        _update(second)
        if other is not None:
            other.result()
        return loss

    def _cross_entropy(self, logits: Any) -> tuple[Any, Any]:
        """Return the loss, and its gradient for the logits times the learning rate."""
        xp, dy = self._xp, self._dy[-1]
        logits -= logits.max(axis=1, keepdims=True)
        xp.exp(logits, out=dy)
        sums = dy.sum(axis=1, keepdims=True)
        loss = (xp.log(sums).sum() - logits[self._labels].sum()) / len(dy)
        dy /= sums
        dy[self._labels] -= 1
        dy *= RATE / len(dy)
        return loss, dy

    def parameters(self) -> list[Any]:
        """Return weights and biases in turn."""
        return [v.get() if hasattr(v, "get") else v for v in self._values]  # CuPy's to NumPy's


def _views(flat: Any, shapes: Sequence[tuple[int, ...]]) -> Iterator[Any]:
    start = 0
    for shape in shapes:
        end = start + math.prod(shape)
        yield flat[start:end].reshape(shape)
        start = end


def _update(parts: Sequence[Sequence[Any]]) -> None:
    for velocity, gradient, value in parts:
        velocity *= MOMENTUM
        velocity += gradient
        value -= velocity


class TorchStep:
    """PyTorch, with autograd and its own optimiser; `options` are those of `torch.optim.SGD`.

    With `compiled`, `torch.compile` makes one function of forward pass and loss, and so one of
    their backward pass. The optimiser stays outside: compiled with them, a step takes longer.
    """

    def __init__(
        self,
        weights: Sequence[Any],
        x: Any,
        labels: Any,
        device: str = "cpu",
        compiled: bool = False,
        **options: bool,
    ) -> None:
        torch = self._torch = importlib.import_module("torch")
        torch.set_num_threads(THREADS)
        self._x, self._labels = (torch.asarray(array).to(device) for array in (x, labels))
        # As those of torch.nn.Linear: a weight has the shape (outputs, inputs).
        self._weights = [torch.asarray(w.T.copy()).to(device) for w in weights]
        self._biases = [torch.zeros(len(w), device=device) for w in self._weights]
        learned = [*self._weights, *self._biases]
        for array in learned:
            array.requires_grad_()
        self._optimizer = torch.optim.SGD(learned, RATE, MOMENTUM, **options)
        self._loss = torch.compile(self._forward, dynamic=False) if compiled else self._forward

    def _forward(self, x: Any) -> Any:
        functional, last = self._torch.nn.functional, len(self._weights) - 1
        for k, (w, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            x = functional.linear(x, w, bias)
            if k < last:
                x = functional.relu(x)
        return functional.cross_entropy(x, self._labels)

    def step(self) -> Any:
        """Learn from the batch; return the loss before that."""
        self._optimizer.zero_grad()
        loss = self._loss(self._x)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    @functools.cached_property
    def _operands(self) -> list[Any]:
        """Return x, the weights, y, dy, the weights' gradients and dx of all layers."""
        empty, found, x = self._torch.empty_like, [], self._x
        for w in self._weights:
            y = x.new_ones(len(x), len(w))
            found.append((x, w.detach(), y, y.clone(), empty(w), empty(x)))
            x = y
        return found

    def products(self) -> None:
        """Compute the matrix products of a step."""
        mm = self._torch.mm
        for x, w, y, *_ in self._operands:
            mm(x, w.t(), out=y)
        for k, (x, w, _, dy, dw, dx) in reversed(list(enumerate(self._operands))):
            mm(dy.t(), x, out=dw)
            if k:
                mm(dy, w, out=dx)

    def parameters(self) -> list[Any]:
        """Return weights and biases in turn."""
        pairs = zip(self._weights, self._biases, strict=True)
        return [p.detach().cpu().numpy() for w, bias in pairs for p in (w.t(), bias)]


class JaxStep:
    """JAX, the whole step under `jit`, with its arrays donated to it."""

    def __init__(self, weights: Sequence[Any], x: Any, labels: Any) -> None:
        if cpus() > THREADS:  # XLA, which starts with JAX, would have a thread for each
            os.environ.setdefault("NPROC", str(THREADS))
        jax, jnp = map(importlib.import_module, ("jax", "jax.numpy"))
        self._batch = jnp.asarray(x), jnp.asarray(labels)
        self._values = [(jnp.asarray(w), jnp.zeros(w.shape[1], jnp.float32)) for w in weights]
        self._velocities = jax.tree.map(jnp.zeros_like, self._values)

        def loss(values: Any, x: Any, labels: Any) -> Any:
            *hidden, (w, bias) = values
            for weight, b in hidden:
                x = jax.nn.relu(x @ weight + b)
            scores = jax.nn.log_softmax(x @ w + bias)
            return -jnp.take_along_axis(scores, labels[:, None], axis=1).mean()

        def step(values: Any, velocities: Any, x: Any, labels: Any) -> Any:
            found, gradients = jax.value_and_grad(loss)(values, x, labels)
            velocities = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocities, gradients)
            values = jax.tree.map(lambda p, v: p - RATE * v, values, velocities)
            return values, velocities, found

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def step(self) -> Any:
        """Learn from the batch; return the loss before that."""
        result = self._step(self._values, self._velocities, *self._batch)
        self._values, self._velocities, loss = result
        return loss

    def parameters(self) -> list[Any]:
        """Return weights and biases in turn."""
        return [np.asarray(array) for pair in self._values for array in pair]
