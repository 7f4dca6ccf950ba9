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

import asyncio
import concurrent.futures
import contextlib
import importlib
import importlib.util
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from relu_xp.dispatch import LibraryError, availability, namespace
from relu_xp.layers import ReLU

__all__ = [
    "EPOCHS",
    "Digits",
    "MissingExtraError",
    "Network",
    "Result",
    "Setting",
    "choose",
    "connected",
    "digits",
    "require_extra",
    "train",
]

EPOCHS = 30

_CLASSES = 10
_SIDE = 8  # pixels
_HIDDEN = (128, 128)
_BATCH = 32
_CHUNKS = 2  # that Dask cuts a batch into, a power of two; four take twice as long on two workers
_RATE = 0.1  # the first learning rate; it falls to 0 along a half cosine
_MOMENTUM = 0.9
_PATIENCE = 3  # seconds for a scheduler to answer
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
        The library's default device, in its own words; for Dask, who computes.
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
        As `Setting` has it.
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
    if backend == "dask":
        device = _workers()
    else:
        device = str(array_api_compat.device(xp.empty(0))).strip("<>")
    return Setting(backend, xp, device)


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator[None]:
    """Let Dask compute on the workers of a scheduler; what it would do otherwise, it does after.

    Parameters
    ----------
    scheduler : str
        Its address, for example ``"tcp://127.0.0.1:8786"``.

    Raises
    ------
    relu_xp.dispatch.LibraryError
        If Dask cannot be had, no scheduler answers within some seconds, it has no workers, or one
        of those has no relu_xp.
    MissingExtraError
        If distributed is not installed.
    """
    namespace("dask")
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise MissingExtraError(
            f"a scheduler needs distributed ({error}): pip install distributed"
        ) from None
    with contextlib.ExitStack() as stack:
        try:
            with concurrent.futures.ThreadPoolExecutor(1) as thread:  # here a loop may be running
                thread.submit(asyncio.run, _ask(distributed, scheduler)).result()
            client = stack.enter_context(distributed.Client(scheduler, timeout=_PATIENCE))
        except (OSError, TypeError, ValueError) as error:
            reason = (
                f"no scheduler answers at {scheduler!r}: {str(error) or 'something else listens'}"
            )
            raise LibraryError("dask", f"not available: {reason}") from None
        found = client.run(importlib.util.find_spec, "relu_xp")
        if not found:
            raise LibraryError(
                "dask", f"not available: the scheduler at {scheduler} has no workers"
            )
        for worker, spec in found.items():
            if spec is None:
                reason = f"relu_xp is not installed for the worker at {worker}"
                raise LibraryError("dask", f"not available: {reason}")
        yield


async def _ask(distributed: Any, scheduler: str) -> None:
    """Ask a scheduler who it is: a client waits for ever for what listens and is none."""
    async with distributed.rpc(scheduler, timeout=_PATIENCE) as remote:
        await asyncio.wait_for(remote.identity(), _PATIENCE + 1)


def _workers() -> str:
    """Say who computes for Dask: the workers of the current client, or this process."""
    dask = importlib.import_module("dask")
    client = getattr(dask.base.get_scheduler(), "__self__", None)
    if client is None:
        name = dask.config.get("scheduler", None) or "threads"
        return f"this machine, scheduler {name!r}, {dask.system.CPU_COUNT} CPUs"
    threads = client.nthreads()
    workers, working = (
        f"{count} {name}{'s' * (count != 1)}"
        for count, name in ((len(threads), "worker"), (sum(threads.values()), "thread"))
    )
    return f"{workers} at {client.scheduler.address}, {working}"


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
        An array library's name, as for `choose`. With ``"dask"`` the network's arrays are NumPy's:
        the chunks of a batch go to Dask's current scheduler (a `distributed.Client`, say), the
        parameters and their update stay here, so that a worker that is lost takes nothing away.
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
    xp, gradient = setting.namespace, _gradient
    if setting.backend == "dask":  # its workers have the chunks; parameters and update stay here
        xp, gradient = namespace("numpy"), _gradient_of_chunks
    _, tqdm = require_extra()

    rng = np.random.default_rng(seed)
    data = digits(rng)
    images, targets = xp.asarray(data.images), xp.asarray(data.targets)
    test_images, test_labels = xp.asarray(data.test_images), xp.asarray(data.test_labels)
    parameters = [xp.asarray(parameter) for parameter in _initial(rng)]
    velocities = [xp.zeros_like(parameter) for parameter in parameters]
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
                loss, *gradients = gradient(parameters, x, target)
                velocities = [
                    _MOMENTUM * velocity + gradient
                    for velocity, gradient in zip(velocities, gradients, strict=True)
                ]
                parameters = [
                    parameter - rate * velocity
                    for parameter, velocity in zip(parameters, velocities, strict=True)
                ]
                total = total + loss
            losses.append(float(total) / steps)  # waits for the device
            seconds.append(time.perf_counter() - start)

            logits = Network(xp, parameters).forward(test_images, training=False)
            guesses = xp.argmax(logits, axis=1)
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


def _gradient(parameters: list[Any], x: Any, target: Any) -> list[Any]:
    """Return the mean cross-entropy of a batch, and its gradient by each parameter."""
    xp = array_api_compat.array_namespace(x)
    network = Network(xp, parameters)
    loss, dy = _cross_entropy(xp, network.forward(x), target)
    return [loss, *network.backward(dy)]


def _gradient_of_chunks(parameters: list[Any], x: Any, target: Any) -> list[Any]:
    """Return the same of NumPy arrays, each chunk of the batch by a task of Dask.

    The tree in which they are summed is the same on any number of workers. All that the tasks need
    travels with them, so that any worker can take the place of another.
    """
    dask = importlib.import_module("dask")
    shared = dask.delayed(parameters, traverse=False, pure=False)
    chunks = zip(np.split(x, _CHUNKS), np.split(target, _CHUNKS), strict=True)
    sums = [dask.delayed(_gradient, pure=False)(shared, *chunk) for chunk in chunks]
    while len(sums) > 1:
        pairs = zip(sums[::2], sums[1::2], strict=True)
        sums = [dask.delayed(_add, pure=False)(*pair) for pair in pairs]
    return [total / _CHUNKS for total in sums[0].compute()]


def _add(left: list[Any], right: list[Any]) -> list[Any]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _cross_entropy(xp: Any, logits: Any, target: Any) -> tuple[Any, Any]:
    """Return the mean cross-entropy of a softmax, shape (), and its gradient by the logits."""
    shifted = logits - xp.max(logits, axis=1, keepdims=True)  # no exponential overflows
    exponentials = xp.exp(shifted)
    sums = xp.sum(exponentials, axis=1, keepdims=True)
    loss = xp.sum(target * (xp.log(sums) - shifted)) / logits.shape[0]
    return loss, (exponentials / sums - target) / logits.shape[0]
