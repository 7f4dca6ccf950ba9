"""The demo: what it learns, that it can be repeated, and that every library does the same."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys

import array_api_compat
import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES

from relu_xp import dispatch, training

SHORT = 3  # epochs; the learning rate falls to 0 within however many there are


@functools.cache
def reference_run():
    return training.train("numpy", epochs=SHORT, seed=0)


@pytest.fixture
def short_run(require):
    """A short run on NumPy, which the others are compared with."""
    require("sklearn"), require("tqdm")
    return reference_run()


def numbers(result):
    """What a result holds but for the time, which no two runs share."""
    return dataclasses.replace(result, images_per_second=0.0)


def test_the_same_seed_gives_the_same_numbers(short_run):
    assert numbers(training.train("numpy", epochs=SHORT, seed=0)) == numbers(short_run)


def test_another_seed_gives_others(short_run):
    other = training.train("numpy", epochs=SHORT, seed=1)
    assert all(a != b for a, b in zip(short_run.losses, other.losses, strict=True))
    assert other.accuracies != short_run.accuracies


def test_result(short_run):
    assert (short_run.backend, short_run.device, short_run.seed) == ("numpy", "cpu", 0)
    assert len(short_run.losses) == len(short_run.accuracies) == SHORT
    assert all(type(value) is float for value in short_run.losses + short_run.accuracies)
    assert short_run.losses[0] < math.log(10), "no better than a guess"
    assert short_run.images_per_second > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        short_run.seed = 1


def agrees(result, reference):
    """Assert that a run learnt, and what NumPy's did but for rounding."""
    assert list(result.losses) == sorted(result.losses, reverse=True)
    assert result.losses[0] == pytest.approx(reference.losses[0], rel=0.01)
    np.testing.assert_allclose(result.accuracies, reference.accuracies, atol=0.03)
    assert result.accuracies[-1] > 0.9


@pytest.mark.parametrize("backend", ["array_api_strict", "torch", "jax"])
def test_every_library_learns_the_same(require, short_run, backend):
    require(backend)
    result = training.train(backend, epochs=SHORT, seed=0)
    assert result.backend == backend
    agrees(result, short_run)


@pytest.mark.gpu
def test_cupy_learns_the_same(request, short_run):
    if reason := LIBRARIES["cupy"].load():
        unavailable(request.config, reason, gpu=True)
    agrees(training.train("cupy", epochs=SHORT, seed=0), short_run)
    full = training.train("cupy")
    assert full.accuracies[-1] >= 0.97
    assert full.accuracies[-1] == pytest.approx(training.train("numpy").accuracies[-1], abs=0.02)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_split_is_by_class_and_leaves_nothing_out(require, seed):
    pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    data = training.digits(np.random.default_rng(seed))
    count = len(data.targets)
    assert count + len(data.test_labels) == len(labels) == 1797
    assert len(data.test_labels) == 360
    assert data.images.shape == (9 * count, 64)
    assert data.images.dtype == data.test_images.dtype == data.targets.dtype == np.float32
    share = np.bincount(data.test_labels) / np.bincount(labels)
    np.testing.assert_allclose(share, 0.2, atol=0.01)

    unshifted = data.images[4 * count : 5 * count]
    both = np.concatenate([unshifted, data.test_images]) * 16
    classes = np.concatenate([data.targets.argmax(axis=1), data.test_labels])
    expected = np.concatenate([pixels, labels[:, None]], axis=1)
    found = np.concatenate([both, classes[:, None]], axis=1)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_a_shift_moves_the_image_by_a_pixel(require):
    require("sklearn")
    data = training.digits(np.random.default_rng(0))
    shifts = data.images.reshape(3, 3, -1, 8, 8)
    still = shifts[1, 1]
    np.testing.assert_array_equal(shifts[2, 1][:, :-1], still[:, 1:])
    np.testing.assert_array_equal(shifts[1, 0][:, :, 1:], still[:, :, :-1])
    assert not shifts[2, 1][:, -1].any()
    assert not shifts[1, 0][:, :, 0].any()


def test_the_split_depends_on_the_seed_alone(require):
    require("sklearn")
    first, again, other = (training.digits(np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.test_images, again.test_images)
    assert not np.array_equal(first.test_images, other.test_images)


def small_problem(dtype):
    rng = np.random.default_rng(0)
    sizes = (5, 7, 6, 4)
    parameters = []
    for inputs, outputs in itertools.pairwise(sizes):
        parameters += [rng.standard_normal((inputs, outputs)), rng.standard_normal(outputs)]
    x = rng.standard_normal((8, 5)).astype(dtype)
    target = np.eye(4, dtype=dtype)[rng.integers(0, 4, 8)]
    return [parameter.astype(dtype) for parameter in parameters], x, target


def test_gradients_are_those_of_the_loss():
    """Central differences, in float64; a step across a knee would show as a large difference."""
    parameters, x, target = small_problem(np.float64)
    network = training.Network(np, parameters)

    def loss():
        return training._cross_entropy(np, network.forward(x, training=False), target)[0]

    _, dy = training._cross_entropy(np, network.forward(x), target)
    gradients = network.backward(dy)
    step = 1e-6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.shape == parameter.shape
        for index in np.ndindex(parameter.shape):
            value = parameter[index]
            parameter[index] = value + step
            above = loss()
            parameter[index] = value - step
            slope = (above - loss()) / (2 * step)
            parameter[index] = value
            assert slope == pytest.approx(gradient[index], abs=1e-7)


@pytest.mark.parametrize("backend", ["numpy", "array_api_strict", "torch", "jax"])
def test_the_dtype_is_kept(require, backend):
    require(backend)
    xp = dispatch.namespace(backend)
    parameters, x, target = small_problem(np.float32)
    network = training.Network(xp, [xp.asarray(parameter) for parameter in parameters])
    loss, dy = training._cross_entropy(xp, network.forward(xp.asarray(x)), xp.asarray(target))
    for array in (loss, dy, *network.backward(dy)):
        assert array.dtype == xp.float32


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0], [-1e4, 1e4]], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        loss, dy = training._cross_entropy(np, logits, np.eye(2, dtype=np.float32))
    assert loss == 0
    np.testing.assert_array_equal(dy, 0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"backend": "json"}, "backend 'json' is not an array API library"),
        ({"backend": "no_such"}, "backend 'no_such' is not installed; there is numpy"),
        ({"backend": ""}, "backend '' is not installed"),
        ({"backend": "../numpy"}, "backend '../numpy' is not installed"),
    ],
)
def test_refusals(keywords, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        training.train(**keywords)


class Broken:
    """A library that imports and then does not work."""

    def __init__(self, name, error):
        self.name, self.error = name, error

    def asarray(self, x):
        raise self.error


def test_a_library_that_does_not_work_says_why_in_one_line(monkeypatch):
    page = RuntimeError("\n=====\n  no driver: install one\n\nand read the manual\n=====")
    monkeypatch.setitem(sys.modules, "broken", Broken("broken", page))
    with pytest.raises(dispatch.LibraryError) as caught:
        training.choose("broken")
    assert str(caught.value) == "backend 'broken' is not available: no driver: install one"
    assert caught.value.reason == "not available: no driver: install one"


def test_the_first_cause_is_told(monkeypatch):
    wrapper = ImportError("could not import; see the manual")
    wrapper.__cause__ = OSError("libcuda.so.1 is missing")
    monkeypatch.setitem(sys.modules, "broken", Broken("broken", wrapper))
    assert dispatch.availability("broken") == "not available: libcuda.so.1 is missing"


def test_by_default_cupy_where_it_works_else_numpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", Broken("cupy", RuntimeError("no device")))
    assert training.choose().backend == "numpy"
    working = Broken("cupy", None)
    working.asarray = np.asarray  # stands for a CuPy with a device
    monkeypatch.setitem(sys.modules, "cupy", working)
    assert training.choose().backend == "cupy"


def test_choose(require):
    setting = training.choose("numpy")
    assert setting.namespace is array_api_compat.array_namespace(np.zeros(1))
    assert setting.device == "cpu"
    require("torch")
    assert training.choose("torch").device == "cpu"


@pytest.mark.parametrize("library", ["numpy", "array_api_strict", "torch", "jax", "dask"])
def test_serving_names_the_module_that_then_serves(require, library):
    require(library)
    x = dispatch.namespace(library).asarray([1.0])
    assert dispatch.module_of(library) == dispatch.backend_for("test", "x", x).__name__


def test_serving_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert dispatch.module_of("cupy") == "relu_xp.backends.cupy"
    assert dispatch.module_of("nobody_knows") == "relu_xp.backends.generic"
