"""``relu-xp train``: what is learned, that it can be repeated, and that every library agrees."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from relu_xp import dispatch, plotting
from relu_xp.cli import main, train

EPOCHS = 3  # the learning rate falls to 0 within however many there are


@pytest.fixture(autouse=True)
def extra(require):
    require("sklearn"), require("tqdm")


@pytest.fixture(scope="module")
def reference():
    """A short run on NumPy, which the others are compared with."""
    return train.train("numpy", epochs=EPOCHS)


def without_time(result):
    return dataclasses.replace(result, images_per_second=0.0)


def test_the_same_seed_gives_the_same_bits_and_another_others():
    result, again, other = (train.train("numpy", 1, seed) for seed in (4, 4, 5))
    assert without_time(again) == without_time(result)
    assert other.losses != result.losses
    assert (result.backend, result.device, result.seed) == ("numpy", "cpu", 4)
    assert len(result.losses) == len(result.accuracies) == 1
    assert result.losses[0] < math.log(10), "no better than a guess"
    assert result.images_per_second > 0


CUPY = pytest.param("cupy", marks=pytest.mark.gpu)
JAX = pytest.param("jax", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["array_api_strict", "torch", "jax", "dask", CUPY])
def test_every_library_learns_the_same(require, reference, backend):
    """The same as NumPy but for rounding."""
    require(backend)
    result = train.train(backend, epochs=EPOCHS)
    assert result.backend == backend
    assert list(result.losses) == sorted(result.losses, reverse=True)
    assert result.losses[0] == pytest.approx(reference.losses[0], rel=0.01)
    np.testing.assert_allclose(result.accuracies, reference.accuracies, atol=0.03)
    assert result.accuracies[-1] > 0.9


# ---- the images


def load(seed):
    return train.digits(np.random.default_rng(seed))


def test_the_split_is_by_class_and_omits_nothing(require):
    pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    images, targets, test_images, test_labels = load(7)
    assert images.dtype == test_images.dtype == targets.dtype == np.float32
    share = np.bincount(test_labels) / np.bincount(labels)
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    both = np.concatenate([images.reshape(9, -1, 64)[4], test_images]) * 16
    found = np.column_stack([both, [*targets.argmax(axis=1), *test_labels]])
    expected = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
    assert not np.array_equal(load(4)[2], test_images)


def test_a_shift_moves_the_image_by_a_pixel():
    shifts = load(0)[0].reshape(3, 3, -1, 8, 8)
    np.testing.assert_array_equal(shifts[2, 1][:, :-1], shifts[1, 1][:, 1:])
    np.testing.assert_array_equal(shifts[1, 0][:, :, 1:], shifts[1, 1][:, :, :-1])


# ---- the gradient


def problem(dtype):
    rng = np.random.default_rng(0)
    parameters = []
    for inputs, outputs in ((5, 7), (7, 6), (6, 4)):
        parameters += [rng.standard_normal((inputs, outputs)), rng.standard_normal(outputs)]
    x = rng.standard_normal((8, 5)).astype(dtype)
    target = np.eye(4, dtype=dtype)[rng.integers(0, 4, 8)]
    return [parameter.astype(dtype) for parameter in parameters], x, target


def test_gradients_are_those_of_the_loss():
    """Central differences in float64, along a random direction."""
    parameters, x, target = problem(np.float64)
    _, *gradients = train._gradient(parameters, x, target)
    for k, gradient in enumerate(gradients):
        assert gradient.shape == parameters[k].shape
        step = 1e-6 * np.random.default_rng(k).standard_normal(gradient.shape)
        losses = []
        for value in (parameters[k] - step, parameters[k] + step):
            moved = [*parameters[:k], value, *parameters[k + 1 :]]
            losses.append(train._gradient(moved, x, target)[0])
        assert losses[1] - losses[0] == pytest.approx(2 * np.sum(gradient * step), rel=1e-5)


@pytest.mark.parametrize("backend", ["numpy", "array_api_strict", "torch", JAX])
def test_the_dtype_is_kept_and_large_logits_do_not_overflow(require, backend):
    require(backend)
    xp = dispatch.namespace(backend)
    parameters, x, target = problem(np.float32)
    parameters[-1] *= 1e4
    parameters = [xp.asarray(parameter) for parameter in parameters]
    for array in train._gradient(parameters, xp.asarray(x), xp.asarray(target)):
        assert array.dtype == xp.float32
        assert xp.all(xp.isfinite(array))


def test_gradients_in_given_arrays():
    parameters, x, target = problem(np.float32)
    fresh = train._gradient(parameters, x, target)
    flat = np.full(sum(parameter.size for parameter in parameters), np.nan, np.float32)
    written = train._gradient(parameters, x, target, train._views(flat, parameters))
    np.testing.assert_array_equal(flat, np.concatenate([array.ravel() for array in fresh[1:]]))
    for ours, array in zip(written, fresh, strict=True):
        np.testing.assert_array_equal(ours, array)


# ---- the command


@pytest.mark.slow
def test_the_default_run_recognises_97_percent(capsys):
    assert main(["train", "--backend", "numpy"]) == 0
    out, err = capsys.readouterr()
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert float(lines["test accuracy"].removesuffix(" %")) >= 97
    assert float(lines["loss"]) < 0.1
    assert "30/30" in err, "no progress bar"
    assert "test accuracy 9" in err


def test_what_is_printed(quick, capsys):
    assert main(["train", "--backend", "numpy", "--epochs", "2", "--seed", "5"]) == 0
    assert quick == [("numpy", 2, 5)]
    assert capsys.readouterr().out.splitlines() == [
        "backend             numpy",
        "device              cpu",
        "seed                5",
        "loss                0.5000",
        "test accuracy       97.50 %",
        "images a second     12,346",
    ]


def test_the_curve_of_one_epoch(require):
    require("matplotlib")
    figure = plotting.learning_curve(train.Result("numpy", "cpu", 0, (2.0,), (0.5,), 1.0))
    figure.draw_without_rendering()
    low, high = figure.axes[1].get_xlim()
    assert [tick for tick in figure.axes[1].get_xticks() if low <= tick <= high] == [1]
