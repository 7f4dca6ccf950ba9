"""The demo: a small classifier of handwritten digits, on any array library.

The network (64 pixels, two hidden layers of 128 units with this package's `ReLU`, 10 classes) and
its training are written once, in the Python array API standard. Arrays are never written, so that
libraries whose arrays cannot be, JAX's, take part; and nothing waits for a device but once an
epoch, for the loss.

Every random number is drawn with NumPy from one seed: the split into training and test images, the
weights, the order of the images and their shifts. Two runs with one seed are therefore the same to
the last bit on one machine and library, and on different libraries they differ by rounding alone.
"""

from __future__ import annotations

import importlib
import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from relu_xp.dispatch import availability, namespace
from relu_xp.layers import ReLU

__all__ = [
    "EPOCHS",
    "Digits",
    "MissingExtraError",
    "Network",
    "Result",
    "Setting",
    "choose",
    "digits",
    "require_extra",
    "train",
]

EPOCHS = 30

_CLASSES = 10
_SIDE = 8  # pixels
_HIDDEN = (128, 128)
_BATCH = 32
_RATE = 0.1  # the first learning rate; it falls to 0 along a half cosine
_MOMENTUM = 0.9
_TEST_SHARE = 5  # every fifth image of a class is a test image
_STILL = 0.5  # the share of training images left unshifted: a pixel is an eighth of the image


class MissingExtraError(ImportError):
    """A package is missing that an extra of relu-xp brings; the message says which extra."""


@dataclass(frozen=True)
class Setting:
    """Where to compute.

    Attributes
    ----------
    backend : str
        The array library's name.
    namespace : module
        Its array API namespace.
    device : str
        The library's default device, in its own words.
    """

    backend: str
    namespace: Any
    device: str


@dataclass(frozen=True)
class Digits:
    """The digits, split into training and test images, in NumPy.

    Attributes
    ----------
    images : ndarray of float32, shape (9 * n, 64)
        The n training images, pixels from 0 to 1, nine times: shifted by -1, 0 and 1 pixels along
        either axis. Number `n` * k + i is image i with shift k; k = 4 is the image itself.
    targets : ndarray of float32, shape (n, 10)
        1 at the class of each training image, 0 elsewhere.
    test_images : ndarray of float32, shape (m, 64)
    test_labels : ndarray of int32, shape (m,)
    """

    images: npt.NDArray[np.float32]
    targets: npt.NDArray[np.float32]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Result:
    """What a training run came to.

    Attributes
    ----------
    backend : str
        The array library's name.
    device : str
        The device that it computed on, in the library's own words.
    seed : int
    losses : tuple of float
        Mean cross-entropy of the training images, in nats, of each epoch.
    accuracies : tuple of float
        Share of the test images that are recognised, 0 to 1, after each epoch.
    images_per_second : float
        Training images a second, forward, backward and update; without the first epoch, in which
        libraries compile their kernels, if there are others.
    """

    backend: str
    device: str
    seed: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    images_per_second: float


class Network:
    """Dense layers with a `ReLU` between each two.

    Parameters
    ----------
    xp : module
        Array API namespace.
    parameters : list of array
        Weights, shape (inputs, outputs), and biases, shape (outputs,), of each layer in turn.
    """

    def __init__(self, xp: Any, parameters: list[Any]) -> None:
        self.xp = xp
        self.parameters = parameters
        self.activations = [ReLU() for _ in parameters[2::2]]
        self._inputs: list[Any] = []

    def forward(self, x: Any, /, *, training: bool = True) -> Any:
        """Return the logits.

        Parameters
        ----------
        x : array, shape (n, inputs)
        training : bool, optional
            Whether to remember what `backward` needs.

        Returns
        -------
        array, shape (n, outputs)
        """
        inputs = [x]
        y = x @ self.parameters[0] + self.parameters[1]
        for layer, activation in enumerate(self.activations, start=1):
            inputs.append(activation.forward(y, training=training))
            y = inputs[layer] @ self.parameters[2 * layer] + self.parameters[2 * layer + 1]
        if training:
            self._inputs = inputs
        return y

    def backward(self, dy: Any, /) -> list[Any]:
        """Return the gradient of each parameter, in their order.

        Parameters
        ----------
        dy : array, shape (n, outputs)
            Gradient with respect to the logits of the latest `forward`.

        Returns
        -------
        list of array
        """
        gradients: list[Any] = []
        for layer in reversed(range(len(self._inputs))):
            weight_gradient = self.xp.matrix_transpose(self._inputs[layer]) @ dy
            gradients = [weight_gradient, self.xp.sum(dy, axis=0), *gradients]
            if layer:
                weights = self.parameters[2 * layer]
                dx = dy @ self.xp.matrix_transpose(weights)
                dy = self.activations[layer - 1].backward(dx)
        self._inputs = []
        return gradients


def choose(backend: str | None = None) -> Setting:
    """Find an array library by name.

    Parameters
    ----------
    backend : str, optional
        For example ``"torch"``. By default ``"cupy"`` where CuPy has a device, else ``"numpy"``.

    Returns
    -------
    Setting

    Raises
    ------
    relu_xp.dispatch.LibraryError
        A ValueError: the library is not installed, does not work on this machine, or is not an
        array library.
    """
    if backend is None:
        backend = "cupy" if availability("cupy") is None else "numpy"
    xp = namespace(backend)
    device = str(array_api_compat.device(xp.empty(0))).strip("<>")
    return Setting(backend, xp, device)


def require_extra() -> tuple[Any, Any]:
    """Import what the extra ``demo`` brings.

    Returns
    -------
    load_digits, tqdm
        scikit-learn's function and tqdm's class.

    Raises
    ------
    MissingExtraError
    """
    try:
        from sklearn.datasets import load_digits
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError(
            f"training needs scikit-learn and tqdm ({error}): pip install scikit-learn tqdm"
        ) from None
    return load_digits, tqdm


def digits(rng: np.random.Generator) -> Digits:
    """Load scikit-learn's 1,797 handwritten digits and split them, a fifth of each class to test.

    Parameters
    ----------
    rng : numpy.random.Generator
        Chooses the test images.

    Returns
    -------
    Digits

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    load_digits, _ = require_extra()
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, _SIDE, _SIDE) / 16).astype(np.float32)

    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, and shuffled within
    is_test = np.arange(len(labels)) % _TEST_SHARE == 0
    training, test = order[~is_test], order[is_test]

    padded = np.pad(pixels[training], ((0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, i : i + _SIDE, j : j + _SIDE] for i in range(3) for j in range(3)]
    return Digits(
        images=np.concatenate(shifted).reshape(-1, _SIDE * _SIDE),
        targets=np.eye(_CLASSES, dtype=np.float32)[labels[training]],
        test_images=pixels[test].reshape(-1, _SIDE * _SIDE),
        test_labels=labels[test].astype(np.int32),
    )


def train(
    backend: str | None = None,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """Train the classifier with stochastic gradient descent and momentum.

    Parameters
    ----------
    backend : str, optional
        An array library's name, as for `choose`.
    epochs : int, optional
        How often each training image is seen, at least 1.
    seed : int, optional
        Of all random numbers, at least 0.
    progress : bool, optional
        Whether to show a progress bar on stderr.

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        If `epochs` or `seed` is too small, or the library cannot be had
        (`relu_xp.dispatch.LibraryError`).
    MissingExtraError
        If scikit-learn or tqdm is not installed.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    setting = choose(backend)
    xp = setting.namespace
    _, tqdm = require_extra()

    rng = np.random.default_rng(seed)
    data = digits(rng)
    images, targets = xp.asarray(data.images), xp.asarray(data.targets)
    test_images, test_labels = xp.asarray(data.test_images), xp.asarray(data.test_labels)
    network = Network(xp, [xp.asarray(parameter) for parameter in _initial(rng)])
    velocities = [xp.zeros_like(parameter) for parameter in network.parameters]
    steps = len(data.targets) // _BATCH  # whole batches: JAX would compile for another shape
    losses: list[float] = []
    accuracies: list[float] = []
    seconds: list[float] = []

    with tqdm(total=epochs, desc=setting.backend, unit="epoch", disable=not progress) as bar:
        for epoch in range(epochs):
            start = time.perf_counter()
            chosen = rng.permutation(len(data.targets))[: steps * _BATCH].astype(np.int32)
            numbers = chosen + len(data.targets) * _shifts(rng, len(chosen))
            epoch_images = xp.take(images, xp.asarray(numbers), axis=0)
            epoch_targets = xp.take(targets, xp.asarray(chosen), axis=0)
            batches = zip(
                xp.unstack(xp.reshape(epoch_images, (steps, _BATCH, -1))),
                xp.unstack(xp.reshape(epoch_targets, (steps, _BATCH, -1))),
                strict=True,
            )
            total = xp.zeros((), dtype=images.dtype)
            for step, (x, target) in enumerate(batches):
                share = (epoch + step / steps) / epochs
                rate = _RATE * (1 + math.cos(math.pi * share)) / 2
                loss, dy = _cross_entropy(xp, network.forward(x), target)
                gradients = network.backward(dy)
                velocities = [
                    _MOMENTUM * velocity + gradient
                    for velocity, gradient in zip(velocities, gradients, strict=True)
                ]
                network.parameters = [
                    parameter - rate * velocity
                    for parameter, velocity in zip(network.parameters, velocities, strict=True)
                ]
                total = total + loss
            losses.append(float(total) / steps)  # waits for the device
            count = len(network.parameters)
            settled = _settled([*network.parameters, *velocities])
            network.parameters, velocities = settled[:count], settled[count:]
            seconds.append(time.perf_counter() - start)

            guesses = xp.argmax(network.forward(test_images, training=False), axis=1)
            hits = xp.sum(xp.astype(guesses == test_labels, xp.int32))
            accuracies.append(int(hits) / len(data.test_labels))
            bar.set_postfix_str(
                f"loss {losses[-1]:.4f}, test accuracy {accuracies[-1]:.1%}", refresh=False
            )
            bar.update()

    timed = seconds[1:] or seconds
    return Result(
        backend=setting.backend,
        device=setting.device,
        seed=seed,
        losses=tuple(losses),
        accuracies=tuple(accuracies),
        images_per_second=len(timed) * steps * _BATCH / sum(timed),
    )


def _initial(rng: np.random.Generator) -> list[npt.NDArray[np.float32]]:
    """Draw the network's parameters, with the variance that suits ReLU (He et al., 2015)."""
    sizes = (_SIDE * _SIDE, *_HIDDEN, _CLASSES)
    parameters = []
    for inputs, outputs in itertools.pairwise(sizes):
        weights = rng.standard_normal((inputs, outputs)) * math.sqrt(2 / inputs)
        parameters += [weights.astype(np.float32), np.zeros(outputs, np.float32)]
    return parameters


def _shifts(rng: np.random.Generator, count: int) -> npt.NDArray[np.int32]:
    """Draw a shift for each training image, as `Digits.images` counts them."""
    shifts = rng.integers(0, 9, count, dtype=np.int32)
    return np.where(rng.random(count) < _STILL, np.int32(4), shifts)


def _settled(arrays: list[Any]) -> list[Any]:
    """Return arrays whose values are there: Dask would compute every earlier epoch once more."""
    if array_api_compat.is_dask_array(arrays[0]):
        return list(importlib.import_module("dask").persist(*arrays))
    return arrays


def _cross_entropy(xp: Any, logits: Any, target: Any) -> tuple[Any, Any]:
    """Return the mean cross-entropy of a softmax, shape (), and its gradient by the logits."""
    shifted = logits - xp.max(logits, axis=1, keepdims=True)  # no exponential overflows
    exponentials = xp.exp(shifted)
    sums = xp.sum(exponentials, axis=1, keepdims=True)
    loss = xp.sum(target * (xp.log(sums) - shifted)) / logits.shape[0]
    return loss, (exponentials / sums - target) / logits.shape[0]
