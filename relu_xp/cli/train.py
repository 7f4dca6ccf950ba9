"""``relu-xp train``: a small classifier of handwritten digits, on any array library.

The network has 64 pixels, two hidden layers of 128 units with `relu_xp.bias_relu`, and 10 classes.
All is the Python array API standard, which has ``+=`` for every library; but on NumPy, CuPy and
PyTorch the parameters are views of one array, and so are their gradients, which `matmul` writes
there. An update is then four operations. The loss is read from the device once per epoch.

Every random number is drawn with NumPy from one seed. Two runs with one seed give the same bits on
one machine and library; different libraries differ by rounding alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from relu_xp import bias_relu, bias_relu_vjp, plotting
from relu_xp.cli import _shared
from relu_xp.dispatch import namespace

SUMMARY = "train a small classifier of digits"

EPOCHS = 30

_CLASSES, _SIDE, _HIDDEN = 10, 8, (128, 128)  # an image has 8 by 8 pixels
_BATCH = 32
_CHUNKS = 2  # of a batch on Dask; four take twice as long on two workers
_RATE, _MOMENTUM = 0.1, 0.9  # the first learning rate; it falls to 0 along a half cosine
_TIMEOUT = 3  # seconds for a scheduler to answer


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what can be chosen about a run."""
    _shared.add_backend_option(command)
    _shared.add_integer_option(command, "--epochs", 1, EPOCHS, "passes over the training images")
    _shared.add_integer_option(command, "--seed", 0, 0, "seed for all random numbers")
    text = "with --backend dask: scheduler of the workers, such as tcp://127.0.0.1:8786"
    command.add_argument("--scheduler", metavar="URL", help=f"{text} (default: this process)")
    text = "draw the learning curve into a .png or .svg file"
    command.add_argument("--plot", type=_shared.picture_file, metavar="FILE", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Train, print the result and draw the learning curve."""
    if arguments.scheduler is not None and arguments.backend != "dask":
        arguments.parser.error("argument --scheduler: only with --backend dask")
    with connected(arguments.scheduler) if arguments.scheduler else contextlib.nullcontext():
        library = _shared.choose_library(arguments.backend)
        used = {"backend": library.name, "device": library.device, "seed": str(arguments.seed)}
        _shared.print_table(used)
        sys.stdout.flush()  # before the progress bar, also where stdout is a file
        result = train(library.name, arguments.epochs, arguments.seed)
    reached = {
        "loss": f"{result.losses[-1]:.4f}",
        "test accuracy": f"{100 * result.accuracies[-1]:.2f} %",
        "images a second": f"{result.images_per_second:,.0f}",
    }
    _shared.print_table(reached)
    if arguments.plot is not None:
        _shared.save_picture(plotting.learning_curve(result), arguments.plot)
        _shared.print_table({"learning curve": arguments.plot})


@dataclass(frozen=True)
class Result:
    """The result of a training run."""

    backend: str
    device: str
    seed: int
    losses: tuple[float, ...]  # mean cross-entropy of the training images by epoch, in nats
    accuracies: tuple[float, ...]  # share of the test images that are recognised, by epoch
    images_per_second: float  # without the first epoch, in which libraries compile, if possible


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator[None]:
    """Let Dask compute on the workers of the scheduler at an address, such as tcp://host:8786.

    A ValueError says that none answers, that it has no workers, or that one lacks relu_xp.
    """
    distributed = _shared.import_extra("distributed", "distributed")

    async def identify() -> None:  # a client waits forever for a server that is no scheduler
        async with asyncio.timeout(_TIMEOUT), distributed.rpc(scheduler) as remote:
            await remote.identity()

    try:
        asyncio.run(identify())
    except Exception as error:  # of any class, from whatever listens
        reason = str(error) or f"nothing within {_TIMEOUT} s"
        raise ValueError(f"no scheduler answers at {scheduler!r}: {reason}") from None
    with distributed.Client(scheduler, timeout=_TIMEOUT) as client:
        specs = client.run(importlib.util.find_spec, "relu_xp")
        if not specs or None in specs.values():
            raise ValueError(f"the scheduler at {scheduler} has no workers, or one without relu_xp")
        yield


def digits(rng: np.random.Generator) -> tuple[Any, Any, Any, Any]:
    """Return scikit-learn's 1,797 handwritten digits, a fifth of each class as test images.

    The result is ``images, targets, test_images, test_labels``. The n training images are there
    nine times: row n * k + i is image i with shift k, by -1, 0 and 1 pixels along either axis, so
    k = 4 is the image itself. The n targets are 1 at the image's class.
    """
    datasets = _shared.import_extra("sklearn.datasets", "scikit-learn")
    pixels, labels = datasets.load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, _SIDE, _SIDE) / 16).astype(np.float32)

    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, and shuffled within
    is_test = np.arange(len(labels)) % 5 == 0
    training, test = order[~is_test], order[is_test]

    padded = np.pad(pixels[training], ((0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, i : i + _SIDE, j : j + _SIDE] for i in range(3) for j in range(3)]
    return (
        np.concatenate(shifted).reshape(-1, _SIDE * _SIDE),
        np.eye(_CLASSES, dtype=np.float32)[labels[training]],
        pixels[test].reshape(-1, _SIDE * _SIDE),
        labels[test].astype(np.int32),
    )


def train(backend: str | None = None, epochs: int = EPOCHS, seed: int = 0) -> Result:
    """Train with stochastic gradient descent and momentum, and return what was reached.

    On Dask the arrays are NumPy's: the chunks of a batch go to Dask's current scheduler, the
    parameters and their update stay here, so that nothing is lost with a worker.
    """
    library = _shared.choose_library(backend)
    xp: Any = library.xp
    gradient: Any = _gradient
    if library.name == "dask":
        xp, gradient = namespace("numpy"), _gradient_of_chunks
    tqdm = _shared.import_extra("tqdm", "tqdm").tqdm

    rng = np.random.default_rng(seed)
    images, targets, test_images, test_labels = map(xp.asarray, digits(rng))
    count = targets.shape[0]
    parameters: list[Any] = []
    for inputs, outputs in itertools.pairwise((_SIDE * _SIDE, *_HIDDEN, _CLASSES)):
        weights = rng.standard_normal((inputs, outputs)) * math.sqrt(2 / inputs)  # He et al., 2015
        parameters += map(xp.asarray, (weights.astype(np.float32), np.zeros(outputs, np.float32)))
    learned, gradients = parameters, None
    if library.name in ("numpy", "cupy", "torch"):  # with views, and an `out` of matmul
        learned = [xp.concat([xp.reshape(parameter, (-1,)) for parameter in parameters])]
        gradients = [xp.zeros_like(learned[0])]
        parameters, out = (_views(flat[0], parameters) for flat in (learned, gradients))
        gradient = functools.partial(_gradient, out=out)
    velocities = [xp.zeros_like(array) for array in learned]
    steps = count // _BATCH  # whole batches: JAX would compile for another shape
    losses: list[float] = []
    accuracies: list[float] = []
    seconds: list[float] = []

    with tqdm(range(epochs), desc=library.name, unit="epoch") as bar:
        for epoch in bar:
            start = time.perf_counter()
            chosen = rng.permutation(count)[: steps * _BATCH].astype(np.int32)
            shifts = rng.integers(0, 9, len(chosen), dtype=np.int32)
            shifts[rng.random(len(chosen)) < 0.5] = 4  # none: a pixel is an eighth of the image
            rows = chosen + count * shifts
            epoch_images = xp.take(images, xp.asarray(rows), axis=0)
            epoch_targets = xp.take(targets, xp.asarray(chosen), axis=0)
            batches = zip(
                xp.unstack(xp.reshape(epoch_images, (steps, _BATCH, -1))),
                xp.unstack(xp.reshape(epoch_targets, (steps, _BATCH, -1))),
                strict=True,
            )
            total = xp.zeros((), dtype=images.dtype)
            for step, (x, target) in enumerate(batches):
                rate = _RATE * (1 + math.cos(math.pi * (epoch + step / steps) / epochs)) / 2
                loss, *found = gradient(parameters, x, target)
                for k, array in enumerate(gradients or found):
                    velocities[k] *= _MOMENTUM
                    velocities[k] += array
                    learned[k] -= rate * velocities[k]
                total += loss
            losses.append(float(total) / steps)  # waits for the device
            seconds.append(time.perf_counter() - start)

            y = test_images
            for k in range(0, len(parameters) - 2, 2):
                y = bias_relu(y @ parameters[k], parameters[k + 1])
            logits = y @ parameters[-2] + parameters[-1]
            hits = xp.argmax(logits, axis=1) == test_labels
            accuracies.append(int(xp.sum(xp.astype(hits, xp.int32))) / test_labels.shape[0])
            reached = f"loss {losses[-1]:.4f}, test accuracy {accuracies[-1]:.1%}"
            bar.set_postfix_str(reached, refresh=False)

    timed = seconds[1:] or seconds
    speed = len(timed) * steps * _BATCH / sum(timed)
    return Result(library.name, library.device, seed, tuple(losses), tuple(accuracies), speed)


def _views(flat: Any, arrays: list[Any]) -> list[Any]:
    """Return the parts of an array, each in the shape of another one."""
    ends = itertools.accumulate(math.prod(array.shape) for array in arrays)
    parts = zip(ends, arrays, strict=True)
    return [flat[end - math.prod(a.shape) : end].reshape(a.shape) for end, a in parts]


def _gradient(parameters: list[Any], x: Any, target: Any, out: Any = None) -> list[Any]:
    """Return the mean cross-entropy of a batch, and its gradient for each parameter.

    The parameters are weights, shape (inputs, outputs), and biases of each dense layer in turn. If
    `out` is given, arrays like them, it gets the gradients.
    """
    xp = array_api_compat.array_namespace(x)
    inputs, pullbacks = [x], list[Any]()
    for k in range(0, len(parameters) - 2, 2):
        y, pullback = bias_relu_vjp(inputs[-1] @ parameters[k], parameters[k + 1])
        inputs, pullbacks = [*inputs, y], [*pullbacks, pullback]
    logits = inputs[-1] @ parameters[-2] + parameters[-1]
    shifted = logits - xp.max(logits, axis=1, keepdims=True)  # no exponential overflows
    exponentials = xp.exp(shifted)
    sums = xp.sum(exponentials, axis=1, keepdims=True)
    loss = xp.sum(target * (xp.log(sums) - shifted)) / x.shape[0]
    dy = (exponentials / sums - target) / x.shape[0]
    db = xp.sum(dy, axis=0)
    gradients: list[Any] = []
    for k in reversed(range(len(inputs))):
        if out is None:
            dw = inputs[k].T @ dy
        else:
            dw = xp.matmul(inputs[k].T, dy, out=out[2 * k])
            out[2 * k + 1][...] = db
        gradients = [dw, db, *gradients]
        if k:
            dy, db = pullbacks[k - 1](dy @ parameters[2 * k].T)
    return [loss, *gradients]


def _gradient_of_chunks(parameters: list[Any], x: Any, target: Any) -> list[Any]:
    """Return the same for NumPy arrays, each chunk of the batch as a task of Dask.

    The chunks are added in this process, in order, so that the bits do not depend on the workers.
    Tasks hold all that they need: any worker can repeat the task of another.
    """
    import dask

    shared = dask.delayed(parameters, traverse=False, pure=False)
    chunks = zip(np.split(x, _CHUNKS), np.split(target, _CHUNKS), strict=True)
    gradients = dask.compute(*(dask.delayed(_gradient, pure=False)(shared, *c) for c in chunks))
    return [sum(parts) / _CHUNKS for parts in zip(*gradients, strict=True)]
