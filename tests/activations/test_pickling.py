"""What travels: pickles and copies of layers and of pullbacks."""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
from operands import bits
from table import NOTHING_SAVED, NumPy, each_row, x_gradient
from travel import COPIES, PICKLES, each_copy, each_pickle, each_way, message_of, reloaded

import relu_xp
from relu_xp import PReLU, ReLU, dispatch

X = np.linspace(-4, 8, 60, dtype=np.float32).reshape(6, 10)


def arrays_travel(xp, load):
    """Return whether the library's own arrays do, as all do but old or emulated ones."""
    try:
        load(xp.array(np.ones(1, np.float32)))
    except (TypeError, RuntimeError):
        assert xp.name in ("array_api_strict", "cupy_host")
        return False
    return True


class Model:
    """A network as the textbook has it, which collects the arrays of its layers."""

    def __init__(self, layers):
        self.layers = layers
        self.params, self.grads = [], []
        for layer in layers:
            self.params += layer.params
            self.grads += layer.grads


# ---- Pullbacks ----------------------------------------------------------------------------------


@each_row
@each_way
def test_a_pullback_travels(xp, row, load):
    if not arrays_travel(xp, load):
        return
    y, pullback = row.call_vjp(xp, xp.array(X.copy()))
    dy = xp.numpy(y) + np.float32(0.5)
    again = load(pullback)
    assert again.saved_nbytes == pullback.saved_nbytes > 0
    wanted, found = pullback(xp.array(dy)), again(xp.array(dy))
    if row.learns:
        np.testing.assert_array_equal(xp.numpy(found[1]), xp.numpy(wanted[1]))
    wanted, found = xp.numpy(x_gradient(wanted)), xp.numpy(x_gradient(found))
    np.testing.assert_array_equal(bits(found), bits(wanted))
    assert found.dtype == wanted.dtype
    with pytest.raises(ValueError, match="^pullback: dy has shape"):
        again(xp.array(dy[:1]))
    if xp.writable:
        out = xp.array(np.zeros_like(X))
        assert x_gradient(again(xp.array(dy), out=out)) is out


@each_pickle
def test_a_pullback_refers_to_its_backend_by_name(load, monkeypatch):
    """Another machine may have other kernels, and another backend for the library."""
    _, pullback = relu_xp.relu_vjp(X)
    other = type("Other", (dispatch.backend_class("numpy"),), {})
    monkeypatch.setattr(dispatch, "backend_class", lambda name: {"numpy": other}[name])
    again = functools.cache(dispatch.backend_named.__wrapped__)
    again.__name__, again.__qualname__ = "backend_named", "backend_named"
    monkeypatch.setattr(dispatch, "backend_named", again)
    np.testing.assert_array_equal(load(pullback)(X), pullback(X))
    assert type(load(pullback)._backend) is other


@pytest.mark.libraries("ndarray")
def test_a_mask_of_the_callers_travels_once(xp):
    mask = np.zeros(1000, np.uint8)
    y, pullback = relu_xp.relu_vjp(np.ones((80, 100), np.float32), mask=mask)
    pickled = pickle.dumps(pullback)
    assert len(pickled) < 1500
    deep, shallow = pickle.loads(pickled), copy.copy(pullback)
    mask[:] = 0  # the layer's next batch, for example
    assert deep(y).all()
    assert not shallow(y).any()
    beyond = np.zeros(1000 + 4 * y.size, np.uint8)
    _, pullback = relu_xp.relu_vjp(y, mask=beyond)
    assert pullback(y, out=beyond[1000:].view(np.float32).reshape(y.shape)).all()
    with pytest.raises(ValueError, match="^pullback: out overlaps"):
        pullback(y, out=beyond[992:-8].view(np.float32).reshape(y.shape))


# ---- Layers -------------------------------------------------------------------------------------


@each_row
@each_pickle
def test_a_pickled_layer_leaves_behind_what_is_saved(row, load):
    layer = row.make_layer(NumPy)
    layer.note = "a user's own attribute"
    assert "pickle" not in message_of(load(layer).backward, X), "nothing was lost"
    y = layer.forward(X)
    again, nbytes = load(layer), layer.saved_nbytes
    assert repr(again) == repr(layer)
    assert (again.note, again.saved_nbytes) == (layer.note, 0)
    for one, other in zip(again.params + again.grads, layer.params + layer.grads, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.flags.writeable
    for lost in (again, load(again)):
        assert "a pickle of a layer leaves that out" in message_of(lost.backward, y)
    np.testing.assert_array_equal(
        again.forward(X, training=False), layer.forward(X, training=False)
    )
    again.forward(X)
    again.backward(y)
    assert "pickle" not in message_of(again.backward, y), "it was consumed"
    assert layer.saved_nbytes == nbytes > 0
    if not row.draws:
        assert len(pickle.dumps(layer)) < 800, "neither an array of the batch nor a cache"


@each_row
@each_copy
def test_a_copied_layer_keeps_what_is_saved(xp, row, load):
    if not arrays_travel(xp, load):
        return
    layer = row.make_layer(xp)
    y = layer.forward(xp.array(X.copy()))
    dy = xp.numpy(y) + np.float32(0.5)
    again = load(layer)
    assert repr(again) == repr(layer)
    assert again.saved_nbytes == layer.saved_nbytes > 0
    wanted, found = layer.backward(xp.array(dy)), again.backward(xp.array(dy))
    np.testing.assert_array_equal(xp.numpy(found), xp.numpy(wanted))
    for one, other in zip(again.grads, layer.grads, strict=True):
        np.testing.assert_array_equal(xp.numpy(one), xp.numpy(other))
    for each in (layer, again):  # each has consumed its own
        with pytest.raises(RuntimeError, match=NOTHING_SAVED):
            each.backward(xp.array(dy))


def test_a_deep_copy_is_independent():
    layer = ReLU()
    mask = np.zeros(8, np.uint8)
    y = layer.forward(X, mask=mask)
    again, shared = copy.deepcopy(layer), copy.copy(layer)
    mask[:] = 0
    assert again.backward(y).any()
    assert not shared.backward(y).any()


def test_a_layer_that_refers_to_itself_can_be_copied():
    layer = PReLU()
    layer.itself = [layer]
    for load in (copy.deepcopy, *PICKLES.values()):
        again = load(layer)
        assert again.itself[0] is again is not layer
    assert copy.copy(layer).itself[0] is layer


# ---- Arrays that are one ------------------------------------------------------------------------


@pytest.mark.parametrize("load", [*PICKLES.values(), copy.deepcopy], ids=[*PICKLES, "deepcopy"])
def test_arrays_that_were_one_are_one(xp, load):
    if not arrays_travel(xp, load):
        return
    first, second = (PReLU(10) for _ in range(2))
    for layer in (first, second):
        layer.params[0], layer.grads[0] = map(xp.array, (layer.params[0], layer.grads[0]))
    second.params[0] = first.params[0]  # tied
    model = load(Model([first, second, ReLU()]))
    first, second, _ = model.layers
    if xp.gpu and load is not copy.deepcopy:  # see test_arrays_on_a_gpu_become_numpys
        assert first.params[0] is second.params[0]
        assert type(first.params[0]) is np.ndarray
        return
    assert first.params[0] is second.params[0] is model.params[0] is model.params[1]
    assert [id(a) for a in model.grads] == [id(first.grads[0]), id(second.grads[0])]
    assert first.grads[0] is not second.grads[0]
    first.forward(xp.array(-np.ones_like(X)))
    first.backward(xp.array(np.ones_like(X)))
    np.testing.assert_array_equal(xp.numpy(first.grads[0]), np.full(10, -6))
    if xp.writable:
        assert first.grads[0] is model.grads[0], "it was written"
        relu_xp.relu(first.grads[0], out=model.params[0])  # as an optimiser would write it
        assert xp.numpy(second.params[0]).tolist() == [0.0] * 10


@each_pickle
def test_the_textbooks_optimiser_works_after_a_pickle(load):
    layer = load(PReLU(3))
    layer.params[0] -= 0.25
    assert layer.params[0].tolist() == [0.0] * 3
    model = load(Model([PReLU(3)]))
    model.params[0] -= 0.25
    np.testing.assert_array_equal(model.layers[0].forward(-np.ones((1, 3))), np.zeros((1, 3)))


def test_a_list_that_is_shared_stays_shared():
    layer = PReLU()
    params, again = reloaded((layer.params, layer))
    assert again.params is params


class DeviceArray:
    """An array on a GPU, as far as a pickle is concerned: it cannot be pickled itself."""

    def __init__(self, host):
        self.host = host

    def __dlpack_device__(self):
        return 2, 0

    def __array__(self, dtype=None, copy=None):
        raise TypeError("implicit conversion to NumPy is not allowed")

    def to_device(self, device, /, *, stream=None):
        assert device == "cpu"
        return self.host

    def __reduce__(self):
        raise AssertionError("a machine without a GPU could not load it")


@each_pickle
def test_arrays_on_a_gpu_become_numpys(load):
    """One for each of them, which can be written, of the value at that time."""
    layer, tied = PReLU(2), PReLU(2)
    host = np.array([0.5, 0.25], np.float32)
    host.flags.writeable = False
    layer.params[0] = tied.params[0] = DeviceArray(host)
    for value in (0.5, 0.75):
        host.flags.writeable = True
        host[0] = value
        again, its_tied = load((layer, tied))
        assert again.params[0] is its_tied.params[0]
        assert type(again.params[0]) is np.ndarray
        assert again.params[0].tolist() == [value, 0.25]
        again.params[0] -= 1
    assert type(layer.params[0]) is DeviceArray


class Uncopyable:
    """What is saved by a library whose arrays cannot be copied."""

    def __deepcopy__(self, memo):
        raise MemoryError


def test_what_cannot_be_copied_is_shared():
    layer = ReLU()
    layer.forward(X)
    layer._pullback.note = Uncopyable()
    again = copy.deepcopy(layer)
    assert again._pullback is layer._pullback
    np.testing.assert_array_equal(again.backward(X), layer.backward(X))


def test_a_backend_that_has_no_name_is_pickled_itself():
    backend = dispatch.backend_class("numpy")()
    for load in (*PICKLES.values(), *COPIES.values()):
        assert type(load(backend)) is type(backend)
        assert load(dispatch.backend_named("numpy")) is dispatch.backend_named("numpy")
