"""bench.training: every candidate learns the same, and what is made of the times."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    names = ("harness", "training", "training_steps")
    return Namespace(**{name: importlib.import_module(f"bench.{name}") for name in names})


@pytest.fixture
def case(bench):
    return bench.training.Case((6, 8, 7, 5), 9, eager=">=1.5", compiled=">=1.2", rest=">=1.3")


def problem(dtype):
    """Return weights, images and labels."""
    rng = np.random.default_rng(1)  # no image for which all units of a layer are dead: a kink
    weights = [rng.standard_normal(shape).astype(dtype) for shape in ((6, 8), (8, 7), (7, 5))]
    return weights, rng.standard_normal((9, 6)).astype(dtype), rng.integers(0, 5, 9)


def loss(parameters, x, labels):
    """Return the mean cross-entropy in float64."""
    *hidden, weights, biases = parameters
    for k in range(0, len(hidden), 2):
        x = np.maximum(x @ hidden[k] + hidden[k + 1], 0)
    logits = x @ weights + biases
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), labels])


def test_a_step_descends_along_the_gradient_of_the_loss(bench):
    """By central differences in float64, and the momentum of the second step."""
    weights, x, labels = problem(np.float64)
    step = bench.training_steps.ArrayStep([w.astype(np.float32) for w in weights], x, labels)
    values = [np.array(value, np.float64) for value in step.parameters()]
    velocities = [np.zeros_like(value) for value in values]
    for _ in range(2):
        assert step.step() == pytest.approx(loss(values, x, labels), rel=1e-5)
        gradients = []
        for value in values:
            gradients.append(np.empty_like(value))
            for index, number in np.ndenumerate(value):
                losses = []
                for value[index] in (number - 1e-6, number + 1e-6):
                    losses.append(loss(values, x, labels))
                value[index] = number
                gradients[-1][index] = (losses[1] - losses[0]) / 2e-6
        for value, velocity, gradient in zip(values, velocities, gradients, strict=True):
            velocity[...] = bench.training_steps.MOMENTUM * velocity + gradient
            value -= bench.training_steps.RATE * velocity
    for found, value in zip(step.parameters(), values, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [8, 1 << 20])
def test_every_candidate_learns_the_same(bench, case, monkeypatch, require, part):
    """But that torch.compile is not called: it takes seconds."""
    monkeypatch.setattr(require("torch"), "compile", lambda function, **options: function)
    require("jax")
    monkeypatch.setattr(bench.training_steps, "_PART", part)
    runs, notes = bench.training._ready(bench.training.Processor(), case)
    assert notes == {}
    assert len(runs) == 9  # seven candidates, and the products of two
    for run in runs.values():
        run(2)


class Recorder:
    """NumPy, whose products are recorded."""

    def __init__(self):
        self.products = []

    def matmul(self, x, y, out):
        self.products.append((x.shape, x.strides, y.shape, y.strides, out.ctypes.data))
        return np.matmul(x, y, out=out)

    def __getattr__(self, name):
        return getattr(np, name)


def test_the_products_of_arrays_are_those_of_a_step(bench, case):
    step = bench.training_steps.ArrayStep(*case.problem(), xp=(xp := Recorder()))
    step.step()
    count = len(xp.products)
    assert count == 3 * 3 - 1  # no gradient for the images
    step.products()
    assert xp.products[:count] == xp.products[count:]


def test_the_products_of_pytorch_are_those_of_a_step(bench, case, require):
    require("torch")
    counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode
    step, counts = bench.training_steps.TorchStep(*case.problem()), []
    for function in (step.step, step.products):
        with counter(display=False) as counted:
            function()
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] > 0


class Graphs:
    """A device whose graphs are calls, or do nothing."""

    graphs = ("relu_xp",)
    synchronize = staticmethod(lambda: None)

    def __init__(self, bench, works=True):
        self.candidates = lambda: {"relu_xp": bench.training_steps.ArrayStep}
        self.captured = lambda library, run: run if works else lambda calls: None


def test_what_a_graph_computes_is_compared(bench, case):
    runs, notes = bench.training._ready(Graphs(bench), case)
    assert list(runs)[-1] == "relu_xp, CUDA graph"
    assert notes == {}
    runs, notes = bench.training._ready(Graphs(bench, works=False), case)
    assert "relu_xp, CUDA graph" not in runs
    assert notes["relu_xp, CUDA graph"].startswith("ArithmeticError")


def test_the_candidates_of_a_device(bench, case, monkeypatch, require):
    """With NumPy for CuPy, and PyTorch's CPU for its device."""
    monkeypatch.setattr(require("torch"), "compile", lambda function, **options: function)
    original, devices = bench.training_steps.TorchStep, []

    def step(*problem, device, **options):
        devices.append(device)
        return original(*problem, **options)

    monkeypatch.setattr(bench.training, "TorchStep", step)
    device = object.__new__(bench.training.Accelerator)
    device.xp, device.synchronize = np, lambda: None
    device.captured = lambda library, run: run
    runs, notes = bench.training._ready(device, case)
    assert notes == {}
    assert set(devices) == {"cuda"}
    graphs = [name for name in runs if name.endswith(", CUDA graph")]
    assert graphs == [f"{name}, CUDA graph" for name in device.graphs]


def test_wrong_and_absent_candidates_are_noted(bench, case, monkeypatch):
    class Wrong(bench.training_steps.Textbook):
        def backward(self, dy):
            return dy, dy.sum(axis=0)

    def absent(*problem):
        raise ModuleNotFoundError("No module named 'jax'\nat all")

    device = Graphs(bench)
    candidates = {"wrong": lambda *it: bench.training_steps.ArrayStep(*it, layer=Wrong)}
    device.candidates = lambda: {**candidates, "JAX, jit": absent}
    runs, notes = bench.training._ready(device, case)
    assert runs == {}
    assert notes["wrong"].startswith("ArithmeticError: losses and parameters are not those")
    assert notes["JAX, jit"] == "ModuleNotFoundError: No module named 'jax'"


def test_figures(bench, case):
    seconds = {
        "relu_xp": 4e-6,
        "PyTorch": 9e-6,
        "torch.compile": 4.4e-6,
        "matrix products of relu_xp": 3e-6,
        "matrix products of PyTorch": 6e-6,
    }
    device = Namespace(seconds=lambda run, calls: seconds[run])
    runs = {name: name for name in seconds}
    timings = bench.training._timings(device, runs, bench.training.Effort((case,), 1e-5, 0, 2))
    rows = bench.training._rows(case, timings, {"JAX, jit": "ImportError: none"})
    found = {row["candidate"]: row for row in rows}
    assert found["JAX, jit"]["note"] == "ImportError: none"
    assert found["PyTorch"]["value"] == pytest.approx(9 / 4)
    assert found["PyTorch"]["reached"]
    assert not found["torch.compile"]["reached"]
    assert found["matrix products of PyTorch"]["share"] == pytest.approx(6 / 9)
    rest = found["PyTorch, without its matrix products"]
    assert (rest["us"], rest["value"], rest["share"]) == pytest.approx((3, 3, 3 / 9))
    assert (rest["wanted"], rest["reached"]) == (">=1.3", True)
    assert "torch.compile, without its matrix products" not in found


def test_a_run_is_saved_and_keeps_the_figures_of_the_other_device(
    bench, case, monkeypatch, tmp_path, capsys
):
    path = tmp_path / "training.json"
    path.write_text('{"gpu": 1}')
    monkeypatch.setattr(bench.training, "QUICK", bench.training.Effort((case,), 1e-4, 0, 2))
    make = {"relu_xp": bench.training_steps.ArrayStep}
    monkeypatch.setattr(bench.training.Processor, "candidates", lambda self: make)
    monkeypatch.setattr(sys, "argv", ["training", "--quick", "--json", str(path)])
    bench.training.main()
    result = json.loads(path.read_text())
    assert result["gpu"] == 1
    conditions, rows = result["cpu"]["conditions"], result["cpu"]["rows"]
    assert conditions["threads"] == 2
    assert {"date", "processor", "versions", "instruction_set"} <= set(conditions)
    assert [row["candidate"] for row in rows] == [
        "relu_xp",
        "matrix products of relu_xp",
        "relu_xp, without its matrix products",
    ]
    assert "6-8-7-5, batch of 9: a step" in capsys.readouterr().out


def test_without_a_device_nothing_is_measured(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "training.json"
    monkeypatch.setattr(bench.training, "missing", lambda: "none is visible")
    monkeypatch.setattr(sys, "argv", ["training", "--device", "gpu", "--json", str(path)])
    bench.training.main()
    assert "there is no CUDA device: none is visible" in capsys.readouterr().out
    assert not path.exists()
