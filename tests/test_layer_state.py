"""What a layer saves between its passes: random sequences of calls, valid and invalid.

After any error the arrays, the parameters, what is saved and the next gradient are as before.
"""

from __future__ import annotations

import pickle
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from libraries import LIBRARIES
from operands import bits

import relu_xp
from relu_xp.testing import reference

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:torch")]

EXACT = np.arange(-24, 25) / 8  # their products, and sums of these, are exact in float32


def slopes(shape):
    """Return slopes 0, 1/4, 1/2, 3/4, 0, ... for an RReLU from 0 to 1."""
    return np.resize(np.arange(4, dtype=np.float32) / 4, shape)


def prelu():
    layer = relu_xp.PReLU(3, axis=-1)
    layer.params[0][...] = 0.25, 0.0, -1.5
    return layer


def bias_relu():
    layer = relu_xp.BiasReLU(3, negative_slope=0.25)
    layer.params[0][...] = 0.5, 0.0, -1.5
    return layer


LAYERS = {
    "relu": relu_xp.ReLU,
    "falling": lambda: relu_xp.LeakyReLU(0.5, threshold=-0.5, positive_slope=-2.0),
    "three branches": lambda: relu_xp.ReLU(negative_slope=0.25, threshold=0.5, max_value=1.5),
    "prelu": prelu,
    "bias_relu": bias_relu,
    "rrelu": lambda: relu_xp.RReLU(0.0, 1.0, rng=slopes),
    "crelu": lambda: relu_xp.CReLU(axis=-1),
    "squared_relu": relu_xp.SquaredReLU,
}


MASKED = relu_xp.ReLU, relu_xp.BiasReLU  # whose forward takes a mask


class Machine(RuleBasedStateMachine):
    """Calls of one layer with arrays of the library `home`, sometimes of another.

    The model of a pass is a new layer that gets contiguous NumPy arrays.
    """

    home = other = None

    @initialize(name=st.sampled_from(sorted(LAYERS)))
    def begin(self, name):
        self.make, self.layer, self.inplace = LAYERS[name], LAYERS[name](), False
        self.saved, self.nbytes = None, 0  # the model of the latest forward pass; the shape of dy
        for arrays in (self.layer.params, self.layer.grads):
            arrays[:] = [self.home.array(array.copy()) for array in arrays]
        self.parameters = self.bytes_of_parameters()

    def bytes_of_parameters(self):
        return [self.home.numpy(a).tobytes() for a in (*self.layer.params, *self.layer.grads)]

    @invariant()
    def nothing_else_changed(self):
        if hasattr(self, "layer"):
            assert self.layer.saved_nbytes == self.nbytes
            assert self.layer.inplace == self.inplace
            assert self.bytes_of_parameters() == self.parameters

    def operand(self, data, shape):
        """Return an array of any layout and floating dtype, and the same values in NumPy."""
        dtype = data.draw(st.sampled_from(self.home.dtypes))
        rng = np.random.default_rng(data.draw(st.integers(0, 999)))
        size = int(np.prod(shape))
        host = rng.choice(EXACT, size).astype(reference.DTYPES[dtype])
        if not self.layer.params and self.home.subnormals and data.draw(st.booleans()):
            host = rng.choice(reference.specials(dtype), size).view(host.dtype)
        host = view = host.reshape(shape)
        if self.home.strided:
            order = data.draw(st.permutations(range(len(shape))))
            steps = [data.draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in shape]
            outer = np.ones([shape[axis] * abs(steps[axis]) for axis in order], host.dtype)
            index = (*(slice(None, None, step) for step in steps), ...)
            view = outer.transpose(np.argsort(order))[index]
            view[...] = host
        return self.home.array(view), host

    def is_equal(self, array, host):
        return self.home.numpy(array).tobytes() == host.tobytes()

    def call(self, data, function, given, host, wanted, **options):
        """Call a layer, perhaps with an out, and compare the result with that of the model."""
        target = given if self.inplace else None
        if self.home.writable and not self.inplace:
            choices = [None, self.home.array(np.ones_like(wanted))]
            choices += [given] * (host.shape == wanted.shape)
            target = choices[data.draw(st.integers(0, len(choices) - 1))]
            options |= {} if target is None else {"out": target}
        result = function(given, **options)
        assert target is None or result is target
        assert target is given or self.is_equal(given, host), "the input was written"
        found = self.home.numpy(result)
        np.testing.assert_array_equal(bits(found), bits(wanted))
        assert found.dtype == wanted.dtype

    @rule(
        data=st.data(), training=st.booleans(), shape=st.sampled_from([(2, 3), (0, 3), (4, 2, 3)])
    )
    def forward(self, data, training, shape):
        x, host = self.operand(data, shape)
        model, options = self.make(), {}
        wanted = model.forward(host.copy(), training=training)
        self.mask = None  # the caller keeps it alive
        if training and isinstance(self.layer, MASKED) and self.home.strided:
            self.mask = self.home.array(np.zeros(host.size + 7, np.uint8))
            options = data.draw(st.sampled_from([{}, {"mask": self.mask}]))
        self.call(data, self.layer.forward, x, host, wanted, training=training, **options)
        if training:
            self.saved, self.nbytes = (model, wanted.shape), self.layer.saved_nbytes

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), retain=st.booleans())
    def backward(self, data, retain):
        model, shape = self.saved
        dy, host = self.operand(data, shape)
        wanted = model.backward(host.copy(), retain=True)
        self.call(data, self.layer.backward, dy, host, wanted, retain=retain)
        for found, expected in zip(self.layer.grads, model.grads, strict=True):
            np.testing.assert_array_equal(self.home.numpy(found), expected)
        self.parameters = self.bytes_of_parameters()
        if not retain:
            self.saved, self.nbytes = None, 0

    @rule(on=st.sampled_from([True, False, None, 1, "yes", np.bool_(True)]))
    def set_inplace(self, on):
        if type(on) is not bool or (on and isinstance(self.layer, relu_xp.CReLU)):
            with pytest.raises((TypeError, ValueError), match="inplace must|cannot work in place"):
                self.layer.inplace = on
        elif self.home.writable:
            self.layer.inplace = self.inplace = on
        assert ("inplace=True" in repr(self.layer)) == self.inplace

    @rule()
    def pickle(self):
        """What is saved does not get into a pickle."""
        if not self.layer.params or self.home.ndarray:
            text, self.layer = repr(self.layer), pickle.loads(pickle.dumps(self.layer))
            assert repr(self.layer) == text
            self.saved, self.nbytes = None, 0

    @precondition(lambda self: not self.saved)
    @rule(retain=st.booleans())
    def backward_too_early(self, retain):
        with pytest.raises(RuntimeError, match="^backward: nothing is saved"):
            self.layer.backward(self.home.array(np.ones((2, 3), np.float32)), retain=retain)

    @rule(data=st.data(), is_backward=st.booleans())
    def invalid(self, data, is_backward):
        if is_backward and not self.saved:
            return
        given, host = self.operand(data, self.saved[1] if is_backward else (2, 3))
        longer, integers = (self.home.array(np.ones(*a)) for a in ([(7, 7)], [host.shape, "i4"]))
        foreign = self.other.array(np.ones(host.shape, np.float32))
        invalid = [(host.tolist(), None), (None, None), (integers, None)]
        invalid += [(longer, None), (foreign, None)] * is_backward
        invalid += [(given, out) for out in (foreign, [1.0], longer, integers)]
        memory = np.resize(host, host.size + 1)
        if self.home.ndarray and host.size > 1 and not isinstance(self.layer, relu_xp.CReLU):
            first, last = (memory[part].reshape(host.shape) for part in (np.s_[:-1], np.s_[1:]))
            broadcast = np.broadcast_to(memory[:1], host.shape)  # which is read-only, too
            invalid += [(first, last), (first, broadcast), (broadcast, broadcast)]
        array, out = invalid[data.draw(st.integers(0, len(invalid) - 1))]
        options = {} if out is None else {"out": out}
        if isinstance(self.layer, MASKED) and not is_backward and data.draw(st.booleans()):
            array, options = given, {"mask": self.home.array(np.zeros(9, np.int8))}
        with pytest.raises((TypeError, ValueError), match="^(for|back)ward: "):
            (self.layer.backward if is_backward else self.layer.forward)(array, **options)
        assert bits(memory).tolist() == bits(np.resize(host, memory.size)).tolist()
        np.testing.assert_array_equal(self.other.numpy(foreign), 1)


def run(name, examples, **options):
    home = LIBRARIES[name]
    other = LIBRARIES["array_api_strict" if home.ndarray else "numpy"]
    for library in (home, other):
        if reason := library.load():
            pytest.skip(reason)
    machine = type("Machine", (Machine,), {"home": home, "other": other})
    options |= {"suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
    options |= {"deadline": None, "max_examples": examples, "stateful_step_count": 30}
    with home.running():
        run_state_machine_as_test(machine, settings=settings(**options))


@pytest.mark.parametrize(
    ("name", "examples"),
    [("numpy", 100), ("compiled", 100), ("compiled_streaming", 40), ("torch", 20), ("jax", 20)],
)
def test_any_sequence_of_calls(name, examples):
    run(name, examples)


def forgets_when_it_refuses(layer, dy, backward=relu_xp.ReLU.backward, **options):
    try:
        return backward(layer, dy, **options)
    except (TypeError, ValueError):
        backward(layer, layer.forward(np.ones(2)))
        raise


def test_the_machine_finds_a_fault():
    errors = AssertionError, RuntimeError, pytest.fail.Exception
    with (
        mock.patch.object(relu_xp.ReLU, "backward", forgets_when_it_refuses),
        pytest.raises(errors),
    ):
        run("numpy", 300, phases=[Phase.generate], database=None, derandomize=True)
