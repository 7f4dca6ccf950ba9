"""What the base class of backends promises beyond the conformance suite."""

from __future__ import annotations

import numpy as np

import relu_xp


def test_results_are_on_the_device_of_x(require):
    strict = require("array_api_strict")
    device = strict.Device("device1")
    x = strict.asarray([-1.0, 2.0], device=device)
    y, pullback = relu_xp.relu_vjp(x)
    results = [y, pullback(x), relu_xp.relu_grad(x), relu_xp.crelu(x, axis=0)]
    results.append(relu_xp.rrelu(x, rng=np.random.default_rng(0)))
    assert {result.device for result in results} == {device}


def test_the_gradient_of_a_weight_is_summed_in_float64(require):
    """In float32 this sum is infinite on the way."""
    strict = require("array_api_strict")
    x, dy, weight = (
        strict.asarray(values, dtype=strict.float32)
        for values in ([-3e38, -3e38, -3e38], [1.0, 1.0, -1.0], [0.5])
    )
    gradient = relu_xp.prelu_vjp(x, weight, axis=0)[1](dy)[1]
    assert gradient.dtype == strict.float32
    assert float(gradient[0]) == np.float32(-3e38)
