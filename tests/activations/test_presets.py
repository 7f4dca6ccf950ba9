"""The presets: `relu` with a parameter set, and layers of them."""

from __future__ import annotations

import numpy as np
import pytest
from table import PARAMETERS

import relu_xp
from relu_xp import ClippedReLU, LeakyReLU, ReLU, ReLU6, ThresholdedReLU

# A function, its layer, its own parameter and the default of that (which ReLU6 fixes).
PRESETS = [
    (relu_xp.relu, ReLU, None, None),
    (relu_xp.leaky_relu, LeakyReLU, "negative_slope", 0.01),
    (relu_xp.relu6, ReLU6, "max_value", 6.0),
    (relu_xp.clipped_relu, ClippedReLU, "max_value", 20.0),
    (relu_xp.thresholded_relu, ThresholdedReLU, "threshold", 1.0),
]
each_preset = pytest.mark.parametrize(
    ("function", "layer", "own", "default"), PRESETS, ids=[one[0].__name__ for one in PRESETS]
)
X = np.linspace(-30, 30, 241)


@each_preset
def test_a_preset_is_relu_with_its_default(function, layer, own, default):
    wanted = relu_xp.relu(X, **({own: default} if own else {}))
    np.testing.assert_array_equal(function(X), wanted)
    np.testing.assert_array_equal(layer()(X), wanted)
    assert not layer().inplace


@each_preset
def test_its_own_parameter_is_positional_and_the_others_are_not(function, layer, own, default):
    if own and layer is not ReLU6:
        wanted = relu_xp.relu(X, **{own: 3})
        np.testing.assert_array_equal(function(X, 3), wanted)
        np.testing.assert_array_equal(layer(3)(X), wanted)
        np.testing.assert_array_equal(layer(**{own: 3})(X), wanted)
        arguments = (0.1, 0.2)
    else:
        arguments = (0.1,)
    with pytest.raises(TypeError, match="positional"):
        function(X, *arguments)
    with pytest.raises(TypeError, match="positional"):
        layer(*arguments)


@each_preset
def test_every_other_parameter_may_be_given(function, layer, own, default):
    parameters = dict(zip(PARAMETERS, (0.25, 0.5, 2.0, 6.0), strict=True))
    given = {k: v for k, v in parameters.items() if layer is not ReLU6 or k != "max_value"}
    wanted = np.where(X <= 0.5, 0.25 * X, np.minimum(2 * X, 6))
    out = np.empty_like(X)
    assert function(X, **given, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    made = layer(**given, inplace=True)
    assert made.inplace
    x = X.copy()
    assert made(x) is x
    np.testing.assert_array_equal(x, wanted)
    if layer is ReLU6:
        with pytest.raises(TypeError, match="max_value"):
            layer(max_value=3)


LAYERS = {
    "ReLU()": ReLU(),
    "ReLU(inplace=True)": ReLU(inplace=True),
    "ReLU(negative_slope=0.1, threshold=0.5, positive_slope=2.0, max_value=6.0)": ReLU(
        negative_slope=0.1, threshold=0.5, positive_slope=2.0, max_value=6.0
    ),
    "LeakyReLU(0.01)": LeakyReLU(),
    "LeakyReLU(0.2, max_value=3.0)": LeakyReLU(0.2, max_value=3.0),
    "ReLU6()": ReLU6(),
    "ReLU6(threshold=1.0, inplace=True)": ReLU6(threshold=1, inplace=True),
    "ClippedReLU(20.0)": ClippedReLU(),
    "ClippedReLU(3.0, threshold=-1.0)": ClippedReLU(3, threshold=-1),
    "ThresholdedReLU(1.0)": ThresholdedReLU(),
    "ThresholdedReLU(2.0, positive_slope=0.5)": ThresholdedReLU(2, positive_slope=0.5),
}


@pytest.mark.parametrize("text", LAYERS)
def test_repr_has_what_is_not_default_and_evaluates_back(text):
    layer = LAYERS[text]
    assert repr(layer) == text
    again = eval(text, vars(relu_xp))
    assert type(again) is type(layer)
    assert repr(again) == text
    assert again.inplace == layer.inplace
    np.testing.assert_array_equal(again(X.copy()), layer(X.copy()))


def test_the_textbooks_name():
    assert relu_xp.Relu is ReLU
    layer, dout = relu_xp.Relu(), np.ones((2, 2))
    np.testing.assert_array_equal(
        layer.forward(np.array([[1.0, -0.5], [0.0, 3.0]])), [[1, 0], [0, 3]]
    )
    np.testing.assert_array_equal(layer.backward(dout), [[1, 0], [0, 1]])
