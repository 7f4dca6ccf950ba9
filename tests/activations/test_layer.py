"""A layer: what is saved once and consumed once, and what is written."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from table import NOTHING_SAVED, ROWS, NumPy, each_row, x_gradient

from relu_xp import CReLU, LeakyReLU, PReLU, ReLU


@each_row
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_a_layer_is_its_functions(xp, row, inplace):
    if inplace and not (xp.writable and row.layer is not CReLU):
        return
    host = np.linspace(-4, 8, 60, dtype=np.float32).reshape(6, 10)
    layer = row.make_layer(xp)
    if inplace:
        layer.inplace = True
    wanted, pullback = row.call_vjp(xp, xp.array(host.copy()))
    x = xp.array(host.copy())
    y = layer.forward(x, training=False)
    assert layer.saved_nbytes == 0
    evaluated = row.call(xp, xp.array(host.copy()))
    np.testing.assert_array_equal(xp.numpy(y), xp.numpy(evaluated))
    x = xp.array(host.copy())
    y = layer(x)
    np.testing.assert_array_equal(xp.numpy(y), xp.numpy(wanted))
    assert layer.saved_nbytes == pullback.saved_nbytes > 0
    gradient = np.cos(xp.numpy(wanted))
    expected = pullback(xp.array(gradient.copy()))
    for retain in (True, False):
        dy = xp.array(gradient.copy())
        dx = layer.backward(dy, retain=retain)
        np.testing.assert_array_equal(xp.numpy(dx), xp.numpy(x_gradient(expected)))
        assert (y is x) == (dx is dy) == inplace
    if layer.params:
        np.testing.assert_array_equal(xp.numpy(layer.grads[0]), xp.numpy(expected[1]))
    else:
        assert layer.params == layer.grads == []
    assert layer.saved_nbytes == 0
    with pytest.raises(RuntimeError, match=NOTHING_SAVED):
        layer.backward(dy)


def test_forward_replaces_and_evaluation_leaves_what_is_saved():
    layer, dy = ReLU(), np.ones(2)
    layer.forward(np.array([1.0, -1.0]))
    layer.forward(np.array([-1.0, 1.0]))
    layer.forward(np.array([1.0, -1.0, 5.0]), training=False)
    np.testing.assert_array_equal(layer.backward(dy), [0, 1])


def test_inplace_overwrites_what_it_is_given():
    layer = ReLU(inplace=True)
    x, dy = np.array([-1.0, 2.0, -3.0]), np.array([5.0, 6.0, 7.0])
    assert layer.forward(x) is x
    assert layer.backward(dy, retain=True) is dy
    assert layer.backward(dy, out=dy) is dy
    assert (x.tolist(), dy.tolist()) == ([0, 2, 0], [0, 6, 0])


@each_row
def test_inplace_leaves_no_choice(row):
    if row.layer is CReLU:
        return
    layer, x = row.make_layer(NumPy, 3, inplace=True), np.ones((2, 3), np.float32)
    locked = np.broadcast_to(np.float32(1), (2, 3))
    layer.forward(x)
    for call in (
        layer.backward,
        layer.forward,
        lambda x, **out: layer.forward(x, training=False, **out),
    ):
        with pytest.raises(ValueError, match="^(for|back)ward: out was given, but .*inplace"):
            call(x, out=np.empty((2, 3), np.float32))
        with pytest.raises(ValueError, match="^(for|back)ward: d?[xy], .*overwritten.* read-only"):
            call(locked)
        assert call(x, out=x) is x
        layer.forward(x)
    for bad in (1, None, "no", np.bool_(True)):
        with pytest.raises(TypeError, match=f"^inplace must be .* got {type(bad).__name__}"):
            layer.inplace = bad
        with pytest.raises(TypeError, match="^inplace must be "):
            row.layer(*row.layer_arguments(3), inplace=bad)
    assert layer.inplace is True


def test_out_has_the_dtype_of_dy():
    layer, x = LeakyReLU(0.5), np.array([-1.0, 2.0])
    y, dx = np.empty(2), np.empty(2, np.float32)
    assert layer.forward(x, out=y) is y
    assert layer.backward(x.astype(np.float32), out=dx) is dx
    np.testing.assert_array_equal(y, [-0.5, 2])
    np.testing.assert_array_equal(dx, [-0.5, 2])
    np.testing.assert_array_equal(x, [-1, 2])


def test_nothing_of_the_callers_is_kept_alive():
    layers, references = [row.make_layer(NumPy, 100) for row in ROWS.values()], []
    for layer in layers:
        x = np.ones((10, 100), np.float32)
        references += [weakref.ref(x), weakref.ref(layer.forward(x))]
    del x
    gc.collect()
    assert {reference() for reference in references} == {None}
    assert all(layer.saved_nbytes > 0 for layer in layers)


def test_calling_a_layer_is_its_forward_and_a_subclass_names_itself():
    class Doubled(ReLU):
        def forward(self, x, /, **options):
            return 2 * super().forward(x, **options)

    class Mine(PReLU):
        pass

    np.testing.assert_array_equal(Doubled()(np.array([-1.0, 2.0])), [0, 4])
    assert repr(Doubled(threshold=1)) == "Doubled(threshold=1.0)"
    assert repr(Mine(2, inplace=True)) == "Mine(2, init=0.25, axis=1, inplace=True)"
