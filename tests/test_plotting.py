"""The pictures of a layer: what they show is what the layer computes."""

from __future__ import annotations

import numpy as np
import pytest

import relu_xp
from relu_xp import dispatch, plotting

pytest.importorskip("matplotlib")

LAYERS = [name for name in relu_xp.__all__ if hasattr(getattr(relu_xp, name), "forward")]


def lines(axes):
    """Return the curves as lists of points, and the dots as {(x, y): filled}."""
    drawn = [line for line in axes.lines if line.get_transform() == axes.transData]
    curves = [line.get_xydata() for line in drawn if len(line.get_xydata()) > 1]
    dots = {}
    for line in drawn:
        if len(line.get_xydata()) == 1:
            x, y = line.get_xydata()[0]
            dots[round(float(x), 4), round(float(y), 4)] = line.get_markerfacecolor() != "white"
    return [points[~np.isnan(points[:, 1])] for points in curves], dots


@pytest.mark.parametrize(
    ("curves", "dots"),
    [
        ("forward", {(1, 0.5): True, (1, 2): False}),  # a jump at the threshold alone
        ("gradient", {(1, 0.5): True, (1, 2): False, (4, 2): False, (4, 0): True}),
    ],
)
def test_what_is_drawn_is_what_the_layer_computes(curves, dots):
    parameters = {"negative_slope": 0.5, "threshold": 1.0, "positive_slope": 2.0, "max_value": 8.0}
    drawn, found = lines(plotting.plot(relu_xp.ReLU(**parameters), curves=curves))
    function = relu_xp.relu if curves == "forward" else relu_xp.relu_grad
    assert [len(points) for points in drawn] == [99]
    for points in drawn:
        expected = function(points[:, 0].astype(np.float32), **parameters)
        np.testing.assert_allclose(points[:, 1], expected, rtol=1e-6)
    assert found == dots


def test_prelu_has_a_line_for_each_channel():
    layer = relu_xp.PReLU(2)
    layer.params[0][:] = [0.0, -0.5]
    curves, dots = lines(plotting.plot(layer, curves="gradient"))
    assert [set(points[:, 1]) for points in curves] == [{0, 1}, {-0.5, 1}]
    assert dots == {(0, 0): True, (0, -0.5): True, (0, 1): False}
    assert layer.params[0].tolist() == [0, -0.5]


def test_a_bias_is_drawn_over_the_sum():
    layer = relu_xp.BiasReLU(2, negative_slope=0.5, max_value=4.0, inplace=True)
    layer.params[0][:] = [1.0, -2.0]
    axes = plotting.plot(layer)
    assert axes.get_xlabel() == "x + bias"
    assert axes.get_title() == "BiasReLU(2, negative_slope=0.5, max_value=4.0, inplace=True)"
    expected = plotting.plot(relu_xp.ReLU(negative_slope=0.5, max_value=4.0))
    (curves, dots), (wanted, its_dots) = lines(axes), lines(expected)
    np.testing.assert_equal(curves, wanted)
    assert dots == its_dots
    assert layer.params[0].tolist() == [1, -2]


def test_rrelu_is_drawn_in_evaluation():
    layer = relu_xp.RReLU(0.25, 0.75)
    state = layer.rng.bit_generator.state
    (curve,), _ = lines(plotting.plot(layer, curves="gradient"))
    assert set(curve[:, 1]) == {0.5, 1}
    assert layer.rng.bit_generator.state == state


def test_the_halves_of_crelu_are_mirrored():
    axes = plotting.plot(relu_xp.CReLU(axis=3), curves="gradient")
    curves, dots = lines(axes)
    assert [set(points[:, 1]) for points in curves] == [{0, 1}, {-1, 0}]
    assert dots == {(0, 0): True, (0, 1): False, (0, -1): False}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["f'(x)", "f'(x), 2nd half"]


def test_both_curves_differ_without_colour():
    axes = plotting.plot(relu_xp.ReLU())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "f(x), f'(x)")
    assert axes.get_title() == "ReLU()"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["f(x)", "f'(x)"]
    styles = {line.get_label(): line.get_linestyle() for line in axes.lines}
    assert styles["f(x)"] != styles["f'(x)"]
    assert all(0 <= float(line.get_color()) <= 1 for line in axes.lines), "greys"
    assert lines(axes)[1] == {(0, 0): True, (0, 1): False}
    assert [text.get_text() for text in axes.texts] == [" threshold: 0 "]


def test_the_layer_is_as_before_and_the_axes_are_the_callers():
    from matplotlib.figure import Figure

    layer = relu_xp.ReLU(inplace=True)
    layer.forward(np.array([-1.0, 2.0]))
    axes = Figure().subplots()
    assert plotting.plot(layer, axes, curves="gradient") is axes
    assert layer.inplace
    assert layer.backward(np.ones(2)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="^curves must be one of forward, gradient, both, got 'f'"):
        plotting.plot(layer, curves="f")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", ["array_api_strict", "torch", "jax"])
def test_every_library_draws_the_same(require, backend, layer):
    require(backend)
    layer = getattr(relu_xp, layer)(*[1] * (layer == "BiasReLU"))
    expected = lines(plotting.plot(layer))
    curves, dots = lines(plotting.plot(layer, xp=dispatch.namespace(backend)))
    assert dots == expected[1]
    for got, wanted in zip(curves, expected[0], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
