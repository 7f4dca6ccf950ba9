"""The layers: one saved mask, consumed once; numbers that travel; the textbook's session."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

import relu_xp
from relu_xp import ClippedReLU, LeakyReLU, ReLU, ReLU6, ThresholdedReLU
from relu_xp.activation import Activation

LAYERS = [
    ReLU(),
    ReLU(inplace=True),
    ReLU(negative_slope=0.1, threshold=0.5, positive_slope=2.0, max_value=6.0),
    LeakyReLU(),
    LeakyReLU(0.2, max_value=3.0),
    ReLU6(),
    ReLU6(negative_slope=0.1, inplace=True),
    ClippedReLU(),
    ClippedReLU(3.0, threshold=-1.0),
    ThresholdedReLU(),
    ThresholdedReLU(2.0, positive_slope=0.5),
]


def test_the_textbook_session():
    from relu_xp import Relu

    assert Relu is ReLU
    layer = Relu()
    x = np.array([[1.0, -0.5], [0.0, 3.0]])
    np.testing.assert_array_equal(layer.forward(x), [[1, 0], [0, 3]])
    dout = np.ones((2, 2))
    np.testing.assert_array_equal(layer.backward(dout), [[1, 0], [0, 1]])
    np.testing.assert_array_equal(dout, np.ones((2, 2)))
    np.testing.assert_array_equal(x, [[1, -0.5], [0, 3]])


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_layer_is_its_functions(xp, layer):
    host = np.linspace(-4, 8, 240, dtype=np.float32).reshape(12, 20)
    gradient = np.cos(host)
    a = layer.activation
    numbers = {
        "threshold": a.threshold,
        "negative_slope": a.negative_slope,
        "positive_slope": a.positive_slope,
        "max_value": a.max_value,
    }
    layer = copy.copy(layer)
    if layer.inplace and not xp.writable:
        layer.inplace = False
    x, dy = xp.array(host.copy()), xp.array(gradient.copy())
    y = layer(x)
    assert layer.saved_nbytes > 0
    dx = layer.backward(dy)
    assert layer.saved_nbytes == 0
    assert (y is x) == (dx is dy) == layer.inplace
    np.testing.assert_array_equal(xp.numpy(y), xp.numpy(relu_xp.relu(xp.array(host), **numbers)))
    np.testing.assert_array_equal(
        xp.numpy(dx),
        xp.numpy(relu_xp.relu_backward(xp.array(gradient), xp.array(host), **numbers)),
    )


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_repr_evaluates_back(layer):
    again = eval(repr(layer), vars(relu_xp))
    assert type(again) is type(layer)
    assert again.activation == layer.activation
    assert again.inplace == layer.inplace
    assert repr(again) == repr(layer)


def test_repr_says_what_is_not_default():
    assert repr(ReLU()) == "ReLU()"
    assert repr(ReLU(negative_slope=0.1, inplace=True)) == "ReLU(negative_slope=0.1, inplace=True)"
    assert repr(LeakyReLU()) == "LeakyReLU(0.01)"
    assert repr(ReLU6(threshold=1)) == "ReLU6(threshold=1.0)"


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_the_numbers_travel_the_mask_does_not(layer):
    layer = copy.copy(layer)
    layer.note = "a user's own attribute"
    layer.forward(np.array([-1.0, 2.0]))
    copies = [copy.copy(layer), copy.deepcopy(layer)]
    copies += [pickle.loads(pickle.dumps(layer, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for again in copies:
        assert repr(again) == repr(layer)
        assert again.note == layer.note
        assert again.saved_nbytes == 0
        with pytest.raises(RuntimeError, match="backward: nothing is saved"):
            again.backward(np.ones(2))
    assert layer.saved_nbytes == 1 + (layer.activation.max_value is not None) * (
        layer.activation.negative_slope != 0
    )
    layer.backward(np.ones(2))
    assert len(pickle.dumps(layer)) < 500, "what is kept for speed does not travel"


def test_forward_replaces_and_backward_consumes():
    layer, dy = ReLU(), np.ones(2)
    with pytest.raises(RuntimeError, match=r"forward\(x\) first.*retain=True.*relu_vjp"):
        layer.backward(dy)
    layer.forward(np.array([1.0, -1.0]))
    layer.forward(np.array([-1.0, 1.0]))
    np.testing.assert_array_equal(layer.backward(dy, retain=True), [0, 1])
    np.testing.assert_array_equal(layer.backward(dy), [0, 1])
    with pytest.raises(RuntimeError, match="backward: nothing is saved"):
        layer.backward(dy)


def test_evaluation_saves_nothing_and_forgets_nothing():
    layer = ReLU()
    layer.forward(np.array([1.0, -1.0]), training=False)
    assert layer.saved_nbytes == 0
    layer.forward(np.array([1.0, -1.0]))
    layer.forward(np.array([-1.0, 1.0, 5.0]), training=False)
    np.testing.assert_array_equal(layer.backward(np.ones(2)), [1, 0])


def test_what_is_refused_leaves_the_mask(require):
    layer, x = ReLU(), np.array([1.0, -1.0])
    layer.forward(x)
    for bad in ([1.0, 1.0], np.ones(3), np.ones(2, int), np.ones(2, complex), None):
        with pytest.raises((TypeError, ValueError), match="^backward: dy"):
            layer.backward(bad)
        with pytest.raises((TypeError, ValueError), match="^forward: x|^forward: out"):
            layer.forward(bad if np.shape(bad) != (3,) else x, out=np.ones(7))
    with pytest.raises(ValueError, match=r"backward: dy has shape \(64, 10\), forward saw \(2,\)$"):
        layer.backward(np.ones((64, 10)))
    with pytest.raises(ValueError, match="^backward: out is"):
        layer.backward(np.ones(2), out=np.broadcast_to(1.0, 2))
    np.testing.assert_array_equal(layer.backward(np.ones(2)), [1, 0])


def test_inplace_overwrites_what_it_is_given():
    layer = ReLU(inplace=True)
    x, dy = np.array([-1.0, 2.0, -3.0]), np.array([5.0, 6.0, 7.0])
    assert layer.forward(x) is x
    np.testing.assert_array_equal(x, [0, 2, 0])
    assert layer.backward(dy, retain=True) is dy
    np.testing.assert_array_equal(dy, [0, 6, 0])
    with pytest.raises(ValueError, match="^backward: dy, which is to be overwritten, is read-only"):
        layer.backward(np.broadcast_to(1.0, 3))
    with pytest.raises(ValueError, match="^(for|back)ward: out was given, but a layer"):
        layer.backward(dy, out=np.empty(3))
    assert layer.backward(dy, out=dy) is dy
    with pytest.raises(ValueError, match="^(for|back)ward: out was given, but a layer"):
        layer.forward(x, out=np.empty(3))
    with pytest.raises(TypeError, match="inplace must be True or False, got int"):
        ReLU(inplace=1)
    with pytest.raises(TypeError, match="inplace must be True or False, got str"):
        layer.inplace = "no"


def test_out():
    layer, x = LeakyReLU(0.5), np.array([-1.0, 2.0])
    y, dx = np.empty(2), np.empty(2)
    assert layer.forward(x, out=y) is y
    assert layer.backward(x, out=dx) is dx
    np.testing.assert_array_equal(y, [-0.5, 2])
    np.testing.assert_array_equal(dx, [-0.5, 2])
    np.testing.assert_array_equal(x, [-1, 2])


def test_nothing_of_the_callers_is_kept_alive():
    layer, x = ReLU(), np.ones(1000)
    y = layer.forward(x)
    refs = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert layer.saved_nbytes == 125


def test_own_numbers_are_positional_others_are_not():
    assert LeakyReLU(0.3).activation.negative_slope == 0.3
    assert ClippedReLU(7).activation.max_value == 7
    assert ThresholdedReLU(2).activation.threshold == 2
    for cls in (ReLU, ReLU6):
        with pytest.raises(TypeError, match="positional"):
            cls(0.1)
    for cls in (LeakyReLU, ClippedReLU, ThresholdedReLU):
        with pytest.raises(TypeError, match="positional"):
            cls(0.1, 0.2)


def test_the_numbers_of_a_layer_made_without_any():
    numbers = {
        ReLU: (0, 0, 1, None),
        LeakyReLU: (0, 0.01, 1, None),
        ReLU6: (0, 0, 1, 6),
        ClippedReLU: (0, 0, 1, 20),
        ThresholdedReLU: (1, 0, 1, None),
    }
    for cls, wanted in numbers.items():
        assert cls().activation == Activation(*wanted)
        assert not cls().inplace


@pytest.mark.parametrize("cls", [ReLU, LeakyReLU, ReLU6, ClippedReLU, ThresholdedReLU])
def test_every_number_of_a_layer_may_be_given(cls):
    numbers = {"threshold": 0.5, "negative_slope": 0.25, "positive_slope": 2.0, "max_value": 6.0}
    given = {name: n for name, n in numbers.items() if cls is not ReLU6 or name != "max_value"}
    layer = cls(**given, inplace=True)
    assert layer.activation == Activation(**numbers)
    assert layer.inplace


@pytest.mark.parametrize("training", [False, True])
def test_out_and_its_refusals_whether_training_or_not(training):
    layer, x, out = ReLU(negative_slope=0.5), np.array([-1.0, 2.0]), np.empty(2)
    assert layer.forward(x, out=out, training=training) is out
    assert out.tolist() == [-0.5, 2]
    with pytest.raises(TypeError, match="^forward: x must be an array"):
        layer.forward([1.0], training=training)
    for inplace in (ReLU(inplace=True), relu_xp.SquaredReLU(inplace=True)):
        with pytest.raises(ValueError, match="^forward: out was given, but a layer with inplace"):
            inplace.forward(x, out=out, training=training)
        mine = x.copy()
        assert inplace.forward(mine, out=mine, training=training) is mine


def test_calling_a_layer_is_its_forward():
    class Louder(ReLU):
        def forward(self, x, /, **options):
            return 2 * super().forward(x, **options)

    np.testing.assert_array_equal(Louder()(np.array([-1.0, 2.0])), [0, 4])


def test_a_copy_shares_the_numbers():
    layer = LeakyReLU(0.123)
    assert copy.deepcopy(layer).activation is layer.activation
    assert pickle.loads(pickle.dumps(layer)).activation is layer.activation
