"""Subclasses of layers, as other projects write them: their lists, their state."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
from table import NumPy, each_row
from travel import COPIES, each_way, message_of

from relu_xp import PReLU, ReLU

X = np.linspace(-4, 8, 60, dtype=np.float32).reshape(6, 10)


@each_row
def test_a_subclass_may_assign_params_and_grads(row):
    """As the layers of the second textbook do."""

    class Mine(row.layer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.params, self.grads = [*self.params, np.ones(2)], [*self.grads, np.zeros(2)]

    layer = Mine(*row.layer_arguments(10), **row.keywords)
    assert layer.params[-1].tolist() == [1, 1]
    assert len(layer.params) == len(layer.grads) == 1 + row.learns
    y = layer.forward(X)
    layer.backward(y)
    again = copy.copy(layer)
    again.params.append(None)
    assert layer.params[-1] is not None
    assert again.params[-2] is layer.params[-1]
    layer.params, layer.grads = [], []
    assert layer.params == layer.grads == []
    assert len(row.make_layer(NumPy).params) == row.learns, "no list is shared"
    if row.learns:
        with pytest.raises(ValueError, match=r"^forward: layer\.params is empty"):
            layer.forward(X)
    else:
        layer.params.append(1)
        assert row.make_layer(NumPy).params == []
        layer.forward(X)


class Guarded(PReLU):
    """A subclass with a lock, which its state leaves out, and with a slot."""

    __slots__ = ("label",)

    def __init__(self):
        super().__init__(2)
        self.lock, self.label = threading.Lock(), "a"

    def __getstate__(self):
        state = super().__getstate__()
        del state[0]["lock"]
        return state

    def __setstate__(self, state):
        attributes, slots = state
        vars(self).update(attributes)
        self.label, self.lock = slots["label"], threading.Lock()


class Slotted(ReLU):
    __slots__ = ("label",)


class Sequence(list, ReLU):
    pass


class Made(ReLU):
    def __reduce__(self):
        return Made, ()


class Single(ReLU):
    def __reduce__(self):
        return "SINGLE"


SINGLE = Single()


class Frozen(ReLU):
    def __init__(self):
        super().__init__()
        self.frozen = True

    def __setattr__(self, name, value):
        assert name.startswith("_") or not vars(self).get("frozen")
        super().__setattr__(name, value)


@each_way
def test_a_subclass_decides_what_its_state_is(load):
    layer = Guarded()
    y = layer.forward(-np.ones((1, 2)))
    lock, again = layer.lock, load(layer)
    assert layer.lock is lock
    assert (again.label, again.params[0].tolist()) == ("a", [0.25, 0.25])
    assert again.lock is not layer.lock
    if load in COPIES.values():
        assert again.backward(y).tolist() == layer.backward(y).tolist()
    else:
        assert "a pickle of a layer leaves that out" in message_of(again.backward, y)


@each_way
def test_subclasses_of_every_kind(load):
    slotted, sequence = Slotted(), Sequence([1, 2])
    slotted.label = "b"
    assert load(slotted).label == "b"
    assert load(sequence) == [1, 2]
    assert load(Frozen()).frozen
    assert type(load(Made())) is Made
    assert load(SINGLE) is SINGLE
