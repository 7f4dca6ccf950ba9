"""Hostile input: whatever comes and whenever, an error leaves all as it was; nothing crashes."""

from __future__ import annotations

import contextlib
import copy
import functools
import mmap
import numbers
import pickle
import re
import signal
import sys
import tempfile
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from unittest import mock

import array_api_compat
import numpy as np
import pytest
from conftest import unavailable
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
from test_layouts import bits, bits_as_they_are

import relu_xp
from relu_xp import functional, layers
from relu_xp.backends import numpy as numpy_backend
from relu_xp.testing import oracle

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


class UnforeseenError(Exception):
    """What nobody expects, and nobody is to swallow."""


# ---- memory -------------------------------------------------------------------------------------


FILL = 0xC5  # of a negative number, which no ReLU leaves as it is


def place(host, order=None, steps=None, offset=0):
    """Return bytes, and in them a view with a host's values: any order, steps and offset."""
    ndim, itemsize = host.ndim, host.dtype.itemsize
    order = range(ndim) if order is None else order
    steps = [1] * ndim if steps is None else steps
    strides, reach = [0] * ndim, itemsize
    for axis in reversed(order):
        strides[axis] = reach * abs(steps[axis])
        reach *= max(1, host.shape[axis] * abs(steps[axis]))
    memory = np.full(reach + offset + itemsize, FILL, np.uint8)
    view = np.ndarray(host.shape, host.dtype, memory, offset, strides)
    view = view[(*(slice(None, None, -1 if step < 0 else 1) for step in steps), ...)]
    view[...] = host
    return memory, view


def untouched_beside(memory, view):
    """Tell whether the bytes that are not the view's are as `place` left them."""
    others = memory.copy()
    start = view.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    inside = np.ndarray(view.shape, f"u{view.itemsize}", others, start, view.strides)
    inside[...] = int.from_bytes([FILL] * view.itemsize, "little")
    return bool((others == FILL).all())


class Operand:
    """An array of a library, what it held at first, and the memory around it."""

    def __init__(self, library, host, **layout):
        self.library = library
        self.memory, view = place(host, **(layout if library.strided else {}))
        self.array = library.array(view)
        self.view = view if library.strided else None
        self.first = self.bytes()

    def bytes(self):
        return np.ascontiguousarray(self.library.numpy(self.array)).tobytes()

    def lock(self):
        self.view.flags.writeable = False

    def check(self, written=False):
        """See that nothing was written, or nothing beside what was to be."""
        if not written:
            assert self.bytes() == self.first, "an array was written"
        if self.view is not None:
            assert untouched_beside(self.memory, self.view), "memory beside it was written"


# ---- a layer's life ------------------------------------------------------------------------------

TAME = np.arange(-24, 25) / 8  # whose products, and few of their sums, are exact in float32


@functools.cache
def member(dtype, **numbers):
    return oracle.Member(oracle.Format(dtype), **numbers)


def patterns(dtype, expected, shape):
    """Return expected bits as an array of a shape, every NaN the same one."""
    form = oracle.Format(dtype)
    return bits(oracle.Expected(form, expected).bits.view(form.dtype)).reshape(shape)


class FourNumbers:
    """The model of a layer: y, dx and what is between them, by the oracle's integers."""

    doubles = False

    def __init__(self, **numbers):
        self.numbers = numbers

    def each(self, x, training):
        """Return the numbers that each element meets."""
        return [self.numbers] * x.size

    def fits(self, x):
        return True

    def forward(self, x, training=True):
        each, name = self.each(x, training), x.dtype.name
        found = [
            member(name, **numbers).forward(b)
            for numbers, b in zip(each, bits_as_they_are(x), strict=True)
        ]
        return patterns(name, found, x.shape)

    def save(self, x):
        each, name = self.each(x, True), x.dtype.name
        elements = zip(each, bits_as_they_are(x), strict=True)
        return [(n, member(name, **n).piece(b)) for n, b in elements], x

    def backward(self, saved, dy):
        pairs, name = zip(saved[0], bits_as_they_are(dy), strict=True), dy.dtype.name
        return patterns(name, [member(name, **n).backward(p, b) for (n, p), b in pairs], dy.shape)


class Parametric(FourNumbers):
    """PReLU along the last axis."""

    def __init__(self, slopes):
        self.slopes = slopes

    def fits(self, x):
        return len(self.slopes) == 1 or x.shape[-1:] == (len(self.slopes),)

    def each(self, x, training):
        slopes = np.ones(x.shape) * (self.slopes[0] if len(self.slopes) == 1 else self.slopes)
        return [{"negative_slope": slope} for slope in slopes.ravel().tolist()]

    def weight_gradient(self, saved, dy):
        x = saved[1].astype(np.float64)
        terms = np.where(x <= 0, x * dy.astype(np.float64), 0)
        axes = tuple(range(x.ndim)) if len(self.slopes) == 1 else tuple(range(x.ndim - 1))
        return terms.sum(axes).reshape(-1).astype(np.float32)


class Random(FourNumbers):
    """RReLU from 0.25 to 0.75, whose rng draws 0, 1/4, 1/2, 3/4, 0, ..."""

    @staticmethod
    def draw(shape):
        return (np.arange(np.prod(shape, dtype=int)) % 4 / 4).astype(np.float32).reshape(shape)

    def each(self, x, training):
        slopes = 0.25 + self.draw(x.shape) / 2 if training else np.full(x.shape, 0.5)
        return [{"negative_slope": slope} for slope in slopes.ravel().tolist()]


class Both(FourNumbers):
    """CReLU along the last axis."""

    doubles = True

    def fits(self, x):
        return x.ndim > 0

    def forward(self, x, training=True):
        one = super().forward
        return np.concatenate([one(x), one(-x)], axis=-1)

    def save(self, x):
        return None, x

    def backward(self, saved, dy):
        x, (first, second) = saved[1], np.split(dy, 2, axis=-1)
        with np.errstate(all="ignore"):
            chosen = np.where(x < 0, -second, np.where(x == 0, np.zeros_like(first), first))
            return bits(np.where(np.isnan(x), first - second, chosen))


class Squared(FourNumbers):
    def forward(self, x, training=True):
        name = x.dtype.name
        form, relu = oracle.Format(name), member(name)
        high = map(relu.forward, bits_as_they_are(x))
        return patterns(name, [form.product(b, b) for b in high], x.shape)

    def save(self, x):
        return None, x

    def backward(self, saved, dy):
        x = saved[1]
        wide = max(np.dtype("f4"), x.dtype, dy.dtype, key=lambda dtype: dtype.itemsize)
        with np.errstate(all="ignore"):
            dx = (x.astype(wide) * 2 * dy.astype(wide)).astype(dy.dtype)
        return bits(np.where(x <= 0, np.zeros_like(dx), dx))


FAMILY = {
    "relu": relu_xp.ReLU,
    "leaky": relu_xp.LeakyReLU,
    "relu6": relu_xp.ReLU6,
    "thresholded": relu_xp.ThresholdedReLU,
    "clipped-leaky": relu_xp.ClippedReLU,
    "everything": relu_xp.ReLU,
    "mirrored": relu_xp.LeakyReLU,
    "negative-ceiling": relu_xp.ThresholdedReLU,
}


def four_numbers(name):
    whole = oracle.MEMBERS[name]
    given = {k: v for k, v in whole.items() if not (name == "relu6" and k == "max_value")}
    if FAMILY[name] is relu_xp.LeakyReLU:
        given.setdefault("negative_slope", 0.0)
    return FAMILY[name](**given), FourNumbers(**whole)


def parametric(slopes):
    layer = relu_xp.PReLU(len(slopes), axis=-1)
    layer.params[0][...] = slopes
    return layer, Parametric(slopes)


LAYERS = {
    **{name: functools.partial(four_numbers, name) for name in FAMILY},
    "prelu": lambda: parametric([0.25]),
    "prelu, channels": lambda: parametric([0.25, 0.0, -1.5]),
    "rrelu": lambda: (relu_xp.RReLU(0.25, 0.75, rng=Random.draw), Random()),
    "crelu": lambda: (relu_xp.CReLU(axis=-1), Both()),
    "squared_relu": lambda: (relu_xp.SquaredReLU(), Squared()),
}

# What forward and backward are given instead: how it is made of what is lawful, and who has it.
# The first letter says of which argument: x (or dy), out, the mask.
WRONG = {
    "a list": lambda m, a: (m.host(a).tolist(), None),
    "None": lambda m, a: (None, None),
    "a number": lambda m, a: (1.0, None),
    "integers": lambda m, a: (m.home.array(np.ones(a.shape, np.int32)), None),
    "bool": lambda m, a: (m.home.array(np.ones(a.shape, bool)), None),
    "a masked array": lambda m, a: (np.ma.masked_array(m.host(a)), None),
    "bytes swapped": lambda m, a: (np.ones(a.shape, ">f8"), None),
    "complex": lambda m, a: (m.home.array(np.ones(a.shape, np.complex64)), None),
    "out, a list": lambda m, a: (a, [1.0]),
    "out, of another shape": lambda m, a: (a, m.home.array(np.ones((7, 7), m.host(a).dtype))),
    "out, of another dtype": lambda m, a: (a, m.home.array(np.ones(a.shape, np.int32))),
    "out, of another library": lambda m, a: (a, m.other.array(np.ones(a.shape, np.float32))),
}


class Life(RuleBasedStateMachine):
    """A layer's life among the arrays of one library, its home, and sometimes of another one.

    After any error all is as before; a layer's next gradient, too.
    """

    home = other = None

    def host(self, array):
        return self.home.numpy(array)

    @initialize(name=st.sampled_from(sorted(LAYERS)))
    def begin(self, name):
        self.layer, self.model = LAYERS[name]()
        self.library = LIBRARIES["numpy"]  # where the parameters lie
        self.saved = None
        self.nbytes = 0
        self.text, self.inplace = repr(self.layer), False
        self.move_parameters(self.home)

    def move_parameters(self, library):
        for arrays in (self.layer.params, self.layer.grads):
            for i, array in enumerate(arrays):
                arrays[i] = library.array(self.library.numpy(array).copy())
        self.library = library
        self.note()

    def note(self):
        self.parameters = self.bytes_of_parameters()

    def bytes_of_parameters(self):
        arrays = *self.layer.params, *self.layer.grads
        return [self.library.numpy(array).tobytes() for array in arrays]

    @invariant()
    def is_as_before(self):
        if hasattr(self, "layer"):
            assert self.layer.saved_nbytes == self.nbytes
            assert repr(self.layer) == self.text
            assert self.layer.inplace == self.inplace
            assert self.bytes_of_parameters() == self.parameters

    # What is lawful, against the model.

    def values(self, data, shape):
        dtype = data.draw(st.sampled_from(self.home.dtypes))
        form, rng = oracle.Format(dtype), np.random.default_rng(data.draw(st.integers(0, 999)))
        size = np.prod(shape, dtype=int)
        tame = isinstance(self.model, Parametric) or not self.home.subnormals
        if tame or data.draw(st.booleans()):
            return rng.choice(TAME, size).reshape(shape).astype(form.dtype)
        return rng.choice(oracle.specials(dtype), size).reshape(shape).view(form.dtype)

    def shape(self, data):
        if self.home.name == "jax":  # which compiles for each
            return data.draw(st.sampled_from([(2, 3), (0,), ()]))
        return tuple(data.draw(st.lists(st.sampled_from([3, 1, 2, 0, 3]), max_size=3)))

    def operand(self, data, host):
        layout = {
            "order": data.draw(st.permutations(range(host.ndim))),
            "steps": [data.draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in host.shape],
            "offset": data.draw(st.sampled_from([0, 0, host.dtype.itemsize, 1])),
        }
        return Operand(self.home, host, **layout)

    def call(self, function, operand, out, options):
        """Call what is lawful: it returns what it was to write, and writes nothing else."""
        result = function(operand.array, **options)
        target = operand if self.inplace else out
        if target is not None:
            assert result is target.array
        for one in (operand, out):
            if one is not None:
                one.check(written=one is target)
        return self.home.numpy(result)

    def out(self, data, shape, dtype, given):
        """Draw an out: none, what is given itself, or another array."""
        if self.inplace or not self.home.writable:
            return None
        choice = data.draw(st.sampled_from(["none", "itself", "another"]))
        if choice == "itself" and given.array.shape == shape:
            return given
        return None if choice == "none" else self.operand(data, np.ones(shape, dtype))

    @rule(data=st.data(), training=st.booleans())
    def forward(self, data, training):
        host = self.values(data, self.shape(data))
        wanted = self.model.forward(host, training) if self.model.fits(host) else None
        x = self.operand(data, host)
        if wanted is None:
            with pytest.raises(ValueError, match=r"^forward: "):
                self.layer.forward(x.array, training=training)
            x.check()
            return
        out = self.out(data, wanted.shape, host.dtype, x)
        options = {} if out is None else {"out": out.array}
        mask = None
        four = type(self.model) is FourNumbers
        if training and four and self.home.strided and data.draw(st.booleans()):
            spare = data.draw(st.sampled_from([0, 7, 64]))
            mask = Operand(self.home, np.full(host.size + spare, FILL, np.uint8))
            options["mask"] = mask.array
        y = self.call(self.layer.forward, x, out, {"training": training, **options})
        np.testing.assert_array_equal(bits(y), wanted)
        assert y.dtype == host.dtype
        if training:
            self.saved = self.model.save(host), wanted.shape
            self.nbytes = self.layer.saved_nbytes
            self.mask = mask  # which the caller is to keep alive, and does

    @precondition(lambda self: self.saved is not None)
    @rule(data=st.data(), retain=st.booleans())
    def backward(self, data, retain):
        saved, shape = self.saved
        host = self.values(data, shape)
        wanted = self.model.backward(saved, host)
        dy = self.operand(data, host)
        out = self.out(data, wanted.shape, host.dtype, dy)
        options = {} if out is None else {"out": out.array}
        dx = self.call(self.layer.backward, dy, out, {"retain": retain, **options})
        np.testing.assert_array_equal(bits(dx), wanted)
        assert dx.dtype == host.dtype
        if isinstance(self.model, Parametric):
            found = self.library.numpy(self.layer.grads[0])
            np.testing.assert_array_equal(found, self.model.weight_gradient(saved, host))
            self.note()
        if not retain:
            self.saved, self.nbytes = None, 0

    @rule(on=st.booleans())
    def set_inplace(self, on):
        on = on and self.home.writable
        if on and self.model.doubles:
            with pytest.raises(ValueError, match="CReLU cannot work in place"):
                self.layer.inplace = on
            return
        self.layer.inplace = self.inplace = on
        self.text = repr(self.layer)
        assert ("inplace=True" in self.text) == on

    @rule(bad=st.sampled_from([None, 1, "yes", np.bool_(True), [True]]))
    def set_inplace_wrongly(self, bad):
        with pytest.raises(TypeError, match="inplace must be True or False"):
            self.layer.inplace = bad

    @rule(
        how=st.sampled_from([copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]),
        go_on=st.booleans(),
    )
    def copied(self, how, go_on):
        again = how(self.layer)
        assert repr(again) == self.text
        assert again.saved_nbytes == 0
        with pytest.raises(RuntimeError, match="^backward: nothing is saved"):
            again.backward(self.home.array(np.ones(2, np.float32)))
        if go_on:
            self.layer, self.saved, self.nbytes = again, None, 0
            parameters = [*again.params, *again.grads]
            if parameters and type(parameters[0]) is np.ndarray:  # out of a pickle
                self.library = LIBRARIES["numpy"]
                self.move_parameters(self.home)

    # What is not.

    def refused(self, function, operands, arguments, options, errors=(TypeError, ValueError)):
        with pytest.raises(errors) as raised:
            function(*arguments, **options)
        for operand in operands:
            operand.check()
        return raised.value

    @precondition(lambda self: self.saved is None)
    @rule(retain=st.booleans())
    def backward_too_early(self, retain):
        dy = Operand(self.home, np.ones(3, np.float32))
        error = self.refused(
            self.layer.backward, [dy], [dy.array], {"retain": retain}, RuntimeError
        )
        assert str(error).startswith("backward: nothing is saved")

    @rule(data=st.data(), wrong=st.sampled_from(sorted(WRONG)), backward=st.booleans())
    def given_what_is_wrong(self, data, wrong, backward):
        if wrong == "complex" and self.home.name == "array_api_strict":
            wrong = "bool"
        if backward and self.saved is None:
            return
        shape = self.saved[1] if backward else (2, 3)
        good = self.operand(data, self.values(data, shape))
        array, out = WRONG[wrong](self, good.array)
        others = [a for a in (array, out) if type(a) is np.ndarray]
        before = [a.tobytes() for a in others]
        options = {} if out is None else {"out": out}
        function = self.layer.backward if backward else self.layer.forward
        error = self.refused(function, [good], [array], options)
        assert ("backward" if backward else "forward") in str(error)
        assert [a.tobytes() for a in others] == before

    @precondition(lambda self: self.saved is not None)
    @rule(data=st.data())
    def gradient_of_another_shape(self, data):
        dy = self.operand(data, self.values(data, (*self.saved[1], 2)))
        error = self.refused(self.layer.backward, [dy], [dy.array], {})
        assert "dy has shape" in str(error)

    @rule(data=st.data(), backward=st.booleans())
    def library_changes(self, data, backward):
        """Another library's x is welcome, unless the weight lies elsewhere; its dy is not."""
        if backward and self.saved is not None:
            dy = Operand(self.other, np.ones(self.saved[1], np.float32))
            error = self.refused(self.layer.backward, [dy], [dy.array], {})
            assert "forward saw" in str(error)
        elif not backward and self.layer.params:
            x = Operand(self.other, np.ones((2, 3), np.float32))
            error = self.refused(self.layer.forward, [x], [x.array], {})
            assert "layer.params[0]" in str(error)
        elif not backward and self.other.writable >= self.inplace:
            host = np.linspace(-1, 2, 6, dtype=np.float32).reshape(2, 3)
            y = self.other.numpy(self.layer.forward(self.other.array(host.copy()), training=False))
            np.testing.assert_array_equal(bits(y), self.model.forward(host, False))

    @precondition(lambda self: self.home.strided)
    @rule(
        data=st.data(), backward=st.booleans(), how=st.sampled_from(["locked", "overlap", "self"])
    )
    def what_cannot_be_written(self, data, backward, how):
        if backward and self.saved is None:
            return
        shape = self.saved[1] if backward else (2, 3)
        host = self.values(data, shape)
        if host.size < 2 or self.model.doubles:
            return
        function = self.layer.backward if backward else self.layer.forward
        first, options = self.operand(data, host), {}
        operands = [first]
        if how == "locked" and self.inplace:
            first.lock()
            first.array = first.view
        elif how == "locked":
            out = Operand(self.home, host)
            out.lock()
            out.array = out.view
            operands.append(out)
            options = {"out": out.array}
        else:
            memory = Operand(self.home, np.resize(host, host.size + 1))
            operands = [memory]
            first = mock.Mock(array=memory.array[1:].reshape(shape))
            options = {"out": memory.array[:-1].reshape(shape)}
            if how == "self":
                options = {"out": np.broadcast_to(memory.array[:1], shape)}
        error = self.refused(function, operands, [first.array], options)
        assert any(
            text in str(error)
            for text in ("is read-only", "overlaps an input", "is a broadcast view", "inplace=True")
        )

    @precondition(lambda self: type(self.model) is FourNumbers and self.home.strided)
    @precondition(lambda self: not self.inplace)
    @rule(data=st.data())
    def mask_that_does_not_fit(self, data):
        x = self.operand(data, self.values(data, (5, 4)))
        for memory in (np.zeros(2, np.uint8), np.zeros(20, np.int8), np.zeros((1, 20), np.uint8)):
            mask = Operand(self.home, memory)
            error = self.refused(self.layer.forward, [x, mask], [x.array], {"mask": mask.array})
            assert str(error).startswith("forward: mask has ")

    @precondition(lambda self: isinstance(self.model, Random))
    @rule(data=st.data(), kind=st.sampled_from(["raises", "few", "list", "none", "interrupted"]))
    def rng_fails(self, data, kind):
        def rng(shape):
            if kind in ("raises", "interrupted"):
                raise UnforeseenError if kind == "raises" else KeyboardInterrupt
            return {"few": Random.draw((1, *shape)), "list": [0.5], "none": None}[kind]

        x = self.operand(data, self.values(data, (2, 3)))
        before, self.layer.rng = self.layer.rng, rng
        errors = {"raises": UnforeseenError, "interrupted": KeyboardInterrupt}
        self.refused(
            self.layer.forward, [x], [x.array], {}, errors.get(kind, (TypeError, ValueError))
        )
        self.layer.rng = before


LIVES = {"numpy": 120, "native": 120, "native_streaming": 40}  # of a library
ELSEWHERE = ("array_api_strict", "torch", "jax")


def live(library, examples, **options):
    """Let layers live, as a library's; fail where one does not keep to the model."""
    other = LIBRARIES["array_api_strict" if library.name in LIVES else "numpy"]
    machine = type("Life", (Life,), {"home": library, "other": other})
    run_state_machine_as_test(
        machine,
        settings=settings(
            deadline=None,
            max_examples=examples,
            report_multiple_bugs=False,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


@pytest.fixture
def home(request):
    library = LIBRARIES[request.param]
    if reason := library.load() or LIBRARIES["array_api_strict"].load():
        unavailable(request.config, reason)
    with library.running(), LIBRARIES["array_api_strict"].running():
        yield library


@pytest.mark.parametrize("home", [*LIVES, *ELSEWHERE], indirect=True)
def test_a_layers_life(home):
    live(home, LIVES.get(home.name, 20))


def consumed_too_early(layer, dy, out, backward=relu_xp.ReLU._gradient):
    pullback, layer._pullback = layer._pullback, None
    dx = backward(mock.Mock(_pullback=pullback), dy, out)
    layer._pullback = pullback
    return dx


def written_for_nothing(function, activation, x, out):
    y = functional.forward(function, activation, x, out)
    if x.size:
        x[(0,) * x.ndim] = 7
    return y


FAULTS = {
    "a refused dy costs the mask": (relu_xp.ReLU, "_gradient", consumed_too_early),
    "x is written": (layers, "forward", written_for_nothing),
    "any out is taken": (numpy_backend, "check_out", lambda out, inputs: None),
    "the mask travels": (layers.Layer, "__getstate__", lambda layer: layer.__dict__.copy()),
    "inplace can be anything": (
        layers.Layer,
        "inplace",
        property(lambda layer: layer._inplace, lambda layer, on: setattr(layer, "_inplace", on)),
    ),
}


# Of a gradient that is not there any more, or what cannot be pickled, the package or pickle tells.
CAUGHT = (Exception, pytest.fail.Exception)


@pytest.mark.parametrize("home", ["numpy"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(home, fault):
    with mock.patch.object(*FAULTS[fault]), pytest.raises(CAUGHT):
        live(home, 300, phases=[Phase.generate], database=None, derandomize=True)


# ---- arrays that lie ----------------------------------------------------------------------------

BACKENDS = ("numpy", "native")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Either backend for NumPy arrays."""
    library = LIBRARIES[request.param]
    if reason := library.load():
        unavailable(request.config, reason)
    with library.running():
        yield


def halfway(shape):
    return np.full(shape, 0.5, np.float32)


def backward(layer):
    """Return a function that goes back through a layer, or pullback, that has seen `SEEN`."""

    def use(dy, out):
        return layer().backward(dy, out=out)

    return use


def seen(layer):
    layer.forward(SEEN.copy())
    return layer


def back(vjp):
    """Return a function that goes back from what a function has seen."""

    def use(dy, out):
        dx = vjp(SEEN.copy())[1](dy, out=out)
        return dx[0] if type(dx) is tuple else dx

    return use


# Every function, and a layer of every class; the names of the arguments are those of its messages.
SEEN = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
SLOPES_OF_SEEN = np.linspace(-1, 1, 6, dtype=np.float32)
FUNCTIONS = {
    "relu": lambda x, out: relu_xp.relu(x, out=out),
    "relu, slopes": lambda x, out: relu_xp.relu(x, negative_slope=0.5, max_value=2, out=out),
    "leaky_relu": lambda x, out: relu_xp.leaky_relu(x, out=out),
    "relu6": lambda x, out: relu_xp.relu6(x, out=out),
    "clipped_relu": lambda x, out: relu_xp.clipped_relu(x, 1.5, out=out),
    "thresholded_relu": lambda x, out: relu_xp.thresholded_relu(x, out=out),
    "relu_grad": lambda x, out: relu_xp.relu_grad(x, out=out),
    "relu_backward": lambda dy, x, out: relu_xp.relu_backward(dy, x, out=out),
    "relu_vjp": lambda x, out, mask: relu_xp.relu_vjp(x, out=out, mask=mask)[0],
    "pullback": back(relu_xp.relu_vjp),
    "prelu": lambda x, weight, out: relu_xp.prelu(x, weight, axis=-1, out=out),
    "prelu_vjp": lambda x, weight, out: relu_xp.prelu_vjp(x, weight, axis=-1, out=out)[0],
    "prelu_vjp, pullback": back(lambda x: relu_xp.prelu_vjp(x, SLOPES_OF_SEEN, axis=-1)),
    "rrelu": lambda x, out: relu_xp.rrelu(x, rng=halfway, out=out),
    "rrelu, mean": lambda x, out: relu_xp.rrelu(x, out=out),
    "rrelu_vjp": lambda x, out: relu_xp.rrelu_vjp(x, rng=halfway, out=out)[0],
    "rrelu_vjp, pullback": back(lambda x: relu_xp.rrelu_vjp(x, rng=halfway)),
    "crelu": lambda x: relu_xp.crelu(x, axis=-1),
    "crelu_vjp": lambda x: relu_xp.crelu_vjp(x, axis=-1)[0],
    "crelu_vjp, pullback": lambda dy, out: relu_xp.crelu_vjp(SEEN[:, :3].copy())[1](dy, out=out),
    "squared_relu": lambda x, out: relu_xp.squared_relu(x, out=out),
    "squared_relu_vjp": lambda x, out: relu_xp.squared_relu_vjp(x, out=out)[0],
    "squared_relu_vjp, pullback": back(relu_xp.squared_relu_vjp),
    "ReLU": lambda x, out, mask: relu_xp.ReLU().forward(x, out=out, mask=mask),
    "ReLU, evaluation": lambda x, out: relu_xp.ReLU().forward(x, training=False, out=out),
    "ReLU, backward": backward(lambda: seen(relu_xp.ReLU())),
    "LeakyReLU": lambda x, out: relu_xp.LeakyReLU()(x, out=out),
    "ReLU6": lambda x, out: relu_xp.ReLU6()(x, out=out),
    "ClippedReLU": lambda x, out: relu_xp.ClippedReLU(1.0)(x, out=out),
    "ThresholdedReLU": lambda x, out: relu_xp.ThresholdedReLU()(x, out=out),
    "PReLU": lambda x, out: relu_xp.PReLU()(x, out=out),
    "PReLU, backward": backward(lambda: seen(relu_xp.PReLU())),
    "RReLU": lambda x, out: relu_xp.RReLU(rng=halfway)(x, out=out),
    "RReLU, backward": backward(lambda: seen(relu_xp.RReLU(rng=halfway))),
    "CReLU": lambda x: relu_xp.CReLU(axis=-1)(x),
    "SquaredReLU": lambda x, out: relu_xp.SquaredReLU()(x, out=out),
    "SquaredReLU, backward": backward(lambda: seen(relu_xp.SquaredReLU())),
}
KEPT_SHAPE = "crelu_vjp, pullback"  # whose out is of another shape than dy


def roles(function):
    """Return which arrays a function takes."""
    return function.__code__.co_varnames[: function.__code__.co_argcount]


PAIRS = [(name, role) for name, function in FUNCTIONS.items() for role in roles(function)]


def host_of(name, role, shape=SEEN.shape):
    """Return what an argument lawfully is."""
    size = int(np.prod(shape))
    if role == "mask":
        return np.zeros(-(-size // 8), np.uint8)
    if role == "weight":
        return np.linspace(-1, 1, shape[-1], dtype=np.float32)
    if role == "out" and name == KEPT_SHAPE:
        return np.zeros((4, 3), np.float32)
    start = 1 if role == "dy" else -2
    return np.linspace(start, 2.5, size, dtype=np.float32).reshape(shape)


def operands_of(name, shape=SEEN.shape):
    return {role: host_of(name, role, shape) for role in roles(FUNCTIONS[name])}


def field(host):
    """A field of a structured array: strided, and misaligned."""
    records = np.zeros(host.shape, [("head", "u1"), ("it", host.dtype), ("tail", "u2")])
    records["it"] = host
    return records["it"]


def record_field(host):
    records = np.rec.array(np.zeros(host.shape, [("it", host.dtype), ("tail", "u8")]))
    records["it"] = host
    return records["it"]


def misaligned(host):
    return place(host, offset=1)[1]


def locked(host):
    view = host.copy()
    view.flags.writeable = False
    return view


def far_apart(host):
    """Rows more than 2**31 bytes apart, the last one first, in memory that is hardly there."""
    step = (1 << 31) + 4096
    with tempfile.TemporaryFile() as file:  # with holes
        file.truncate(step * len(host))
        memory = mmap.mmap(file.fileno(), 0)
    view = np.ndarray(host.shape, host.dtype, memory, 0, (step, *host.strides[1:]))[::-1]
    view[...] = host
    return view


def absurd_strides(host):
    """A stride that is never taken: the axis has one element."""
    one = np.expand_dims(host.copy(), 1)
    strides = (one.strides[0], 2**62, *one.strides[2:])
    return np.lib.stride_tricks.as_strided(one, one.shape, strides)


def many_axes(host):
    return host.copy().reshape((1,) * (64 - host.ndim) + host.shape)


def odd_dtype(host):
    """The same floats, that have fields as well."""
    fields = {"low": (np.uint16, 0), "high": (np.uint16, 2)}
    return host.copy().view(np.dtype((np.float32, fields)))


def windows(host):
    """Rows that overlap, all within the host's memory."""
    strides = (host.itemsize, 2 * host.itemsize)
    return np.lib.stride_tricks.as_strided(host, host.shape, strides)


LAWFUL = {
    "field": field,
    "record-field": record_field,
    "misaligned": misaligned,
    "strided": lambda host: place(host, steps=[2, -3][: host.ndim])[1],
    "Fortran": np.asfortranarray,
    "far-apart": far_apart,
    "absurd-strides": absurd_strides,
    "64-axes": many_axes,
    "noted": lambda host: host.astype(np.dtype("f4", metadata={"note": 1})),
    "transposed-twice": lambda host: host.T.copy().T,
    "buffer": lambda host: np.frombuffer(bytearray(host.tobytes()), "f4").reshape(host.shape),
}
LOCKED = {  # which cannot be an out
    "read-only": locked,
    "bytes": lambda host: np.frombuffer(host.tobytes(), np.float32).reshape(host.shape),
    "broadcast": lambda host: np.broadcast_to(host.ravel()[:1], host.shape),
    "windows": windows,
}
ARRAYS = [role for role in PAIRS if role[1] not in ("mask", "weight")]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", LAWFUL | LOCKED)
def test_strange_arrays_are_right(kind):
    """As the same values in a fresh array are; a strange out is written, or refused."""
    for name, role in ARRAYS:
        check_strange(name, role, kind)


def check_strange(name, role, kind):
    function, given = FUNCTIONS[name], operands_of(name)
    strange = (LAWFUL | LOCKED)[kind](given[role])
    if strange.shape != given[role].shape:  # then all are of that shape
        if "pullback" in name or "backward" in name:
            with pytest.raises(ValueError, match="(dy|out) has shape"):
                function(**given | {role: strange})
            return
        given = operands_of(name, strange.shape)
    plain = {r: np.array(strange if r == role else a) for r, a in given.items()}
    wanted = function(**plain | {"out": None} if "out" in plain else plain).astype(np.float32)
    others = {r: a.tobytes() for r, a in given.items() if r not in (role, "out", "mask")}
    given[role] = strange
    if role == "out" and kind in LOCKED:
        before = strange.tobytes()
        with pytest.raises(ValueError, match="out (is read-only|is a broadcast view)"):
            function(**given)
        assert strange.tobytes() == before
    else:
        before = strange.tobytes()
        got = function(**given)
        np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))
        assert type(got) is np.ndarray
        if role == "out":
            assert got is strange
        else:
            assert strange.tobytes() == before
    assert {r: given[r].tobytes() for r in others} == others


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mode", ["r", "r+", "c", "w+"])
def test_memory_maps(mode, tmp_path):
    for number, (name, role) in enumerate(ARRAYS):
        check_memory_map(name, role, mode, tmp_path / str(number))


def check_memory_map(name, role, mode, file):
    function, given = FUNCTIONS[name], operands_of(name)
    wanted = function(**given | {"out": None} if "out" in given else given)
    host = given[role]
    host.tofile(file)
    given[role] = mapped = np.memmap(file, host.dtype, mode, shape=host.shape)
    if mode == "w+":
        mapped[...] = host
    if (role, mode) == ("out", "r"):
        with pytest.raises(ValueError, match="out is read-only"):
            function(**given)
    else:
        got = function(**given)
        np.testing.assert_array_equal(got, wanted)
        assert got is mapped if role == "out" else type(got) is np.ndarray
    mapped.flush()
    written = role == "out" and mode in ("r+", "w+")
    assert file.read_bytes() == (wanted if written else host).tobytes()


def raising(error, *names):
    """Return a ``__getattribute__`` that raises for some names, or all."""

    def get(self, name):
        if name in names or not names:
            raise error
        return object.__getattribute__(self, name)

    return get


def subclass(base=np.ndarray, **members):
    return lambda host: host.copy().view(type("Liar", (base,), members))


def raises(error):
    def method(*arguments, **options):
        raise error

    return method


class Coat:
    """A NumPy array in a coat, that says it is NumPy's."""

    namespace = np

    def __init__(self, host):
        self.host = host.copy()

    def __getattr__(self, name):
        if name == "host":
            raise AttributeError
        return getattr(self.host, name)

    def __array_namespace__(self, api_version=None):
        if isinstance(self.namespace, BaseException):
            raise self.namespace
        return self.namespace


class Bytes(bytes):
    """Bytes that say they are NumPy's, and lie in memory as the fields of an array would."""

    dtype, shape, size, ndim, nbytes = np.dtype("f4"), SEEN.shape, SEEN.size, 2, SEEN.nbytes
    flags = SEEN.flags

    def __array_namespace__(self, api_version=None):
        return np


FLAGS = Bytes(b"\0" * 32 + (0x503).to_bytes(4, "little") + b"\0" * 60)


def coat(namespace, **members):
    return type("Liar", (Coat,), {"namespace": namespace, **members})


def liar(**members):
    return lambda host: type("Liar", (), {"shape": host.shape, "dtype": host.dtype, **members})()


def void(host):
    """Four bytes whose dtype's name is that of a float."""
    return host.astype("f4").view(np.dtype((type("float", (np.void,), {}), 4)))


REFUSED = {
    "subclass": subclass(),
    "subclass, finalize": subclass(
        __array_finalize__=lambda self, of: (
            None if type(of) is np.ndarray else raises(UnforeseenError)()
        )
    ),
    "subclass, ufunc": subclass(__array_ufunc__=raises(UnforeseenError)),
    "subclass, no ufunc": subclass(__array_ufunc__=None),
    "subclass, function": subclass(__array_function__=raises(UnforeseenError)),
    "subclass, namespace": subclass(__array_namespace__=raises(UnforeseenError)),
    "subclass, attributes": subclass(__getattribute__=raises(UnforeseenError)),
    "subclass, shape": subclass(shape=(1 << 40,)),
    "subclass, size": subclass(size=1 << 40, nbytes=1 << 42),
    "subclass, dtype": subclass(dtype=np.dtype("f8")),
    "subclass, dtype raises": subclass(
        dtype=property(raises(UnicodeDecodeError("", b"", 0, 1, "")))
    ),
    "subclass, flags": subclass(flags=SEEN.flags),
    "subclass, length": subclass(__len__=raises(UnforeseenError)),
    "subclass of memmap": lambda host: host.view(type("Liar", (np.memmap,), {})),
    "masked": lambda host: np.ma.masked_array(host.copy(), host > 0),
    "masked, nothing": lambda host: np.ma.masked_array(host.copy()),
    "matrix": lambda host: host.copy().view(np.matrix),
    "recarray": lambda host: np.rec.array(np.zeros(host.shape, [("it", "f4")])),
    "chararray": lambda host: np.zeros(host.shape, "S4").view(np.char.chararray),
    "structured": lambda host: np.zeros(host.shape, [("it", "f4")]),
    "void": void,
    "swapped": lambda host: host.astype(np.dtype("f4").newbyteorder()),
    "object": lambda host: host.astype(object),
    "complex": lambda host: host.astype(np.complex64),
    "bool": lambda host: host.astype(bool),
    "text": lambda host: host.astype("U4"),
    "strings": lambda host: host.astype("S4").astype(np.dtypes.StringDType()),
    "time": lambda host: host.astype("m8[s]"),
    "longdouble": lambda host: host.astype(np.longdouble),
    "list": lambda host: host.tolist(),
    "tuple": lambda host: tuple(host.tolist()),
    "number": lambda host: 1.0,
    "numpy scalar": lambda host: np.float32(1),
    "bytes": lambda host: host.tobytes(),
    "memoryview": lambda host: memoryview(host.copy()),
    "buffer": lambda host: bytearray(host.tobytes()),
    "range": lambda host: range(host.size),
    "object()": lambda host: object(),
    "class": lambda host: np.ndarray,
    "module": lambda host: np,
    "iterator": lambda host: iter(host),
    "NotImplemented": lambda host: NotImplemented,
    "in a coat": Coat,
    "bytes in a coat": lambda host: FLAGS,
    "namespace None": coat(None),
    "namespace a number": coat(3),
    "namespace raises": coat(UnforeseenError()),
    "namespace has no attribute": coat(AttributeError()),
    "namespace recurses": coat(RecursionError()),
    "namespace without name": coat(object()),
    "namespace a class": coat(type("numpy", (), {"__getattr__": raises(UnforeseenError)})()),
    "everything raises": liar(__getattribute__=raises(UnforeseenError)),
    "its class raises": liar(__class__=property(raises(UnforeseenError))),
    "its class is another": liar(__class__=np.ndarray, __array_priority__=1e9),
    "dlpack raises": liar(
        __dlpack__=raises(UnforeseenError), __dlpack_device__=raises(UnforeseenError)
    ),
    "array raises": liar(__array__=raises(UnforeseenError)),
    "interface lies": liar(
        __array_interface__={
            "version": 3,
            "typestr": "<f4",
            "data": (16, False),
            "shape": (1 << 40,),
        }
    ),
    "struct lies": liar(__array_struct__=object()),
    "truth raises": liar(
        __bool__=raises(UnforeseenError),
        __len__=raises(UnforeseenError),
        __eq__=raises(UnforeseenError),
    ),
    "repr raises": liar(
        __repr__=raises(UnforeseenError),
        __str__=raises(UnforeseenError),
        __format__=raises(UnforeseenError),
    ),
}


def refusal(about, function, *arguments, **options):
    """Call what is to be refused, and return what is said."""
    try:
        function(*arguments, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return pytest.fail(f"{about}: nothing is refused")


class EqualToAll(type):
    """Classes that pass for any other, in a dictionary too."""

    __hash__ = lambda self: hash(np.ndarray)  # noqa: E731
    __eq__ = lambda self, other: True  # noqa: E731


class Unhashable(type):
    __hash__ = None


class Unasked(type):
    __hash__ = raises(UnforeseenError)


# Classes of a class that lies: they are no arrays, but how a call fails is not promised.
IMPOSTORS = {
    "equal to all": lambda host: EqualToAll("Liar", (Coat,), {})(host),
    "equal to all, bytes": lambda host: EqualToAll("Liar", (Bytes,), {})(FLAGS),
    "equal to all, of ndarray": lambda host: host.view(EqualToAll("Liar", (np.ndarray,), {})),
    "unhashable": lambda host: Unhashable("Liar", (Coat,), {})(host),
    "hash raises": lambda host: Unasked("Liar", (Coat,), {})(host),
}


def snapshot(given):
    return {
        role: np.asarray(array).tobytes() if type(array) is np.ndarray else None
        for role, array in given.items()
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_array_is_refused(kind):
    """By name, with nothing written, and the next call is as good as ever."""
    for name, role in PAIRS:
        function, good = FUNCTIONS[name], operands_of(name)
        given = good | {role: REFUSED[kind](good[role])}
        held = given[role].host if issubclass(type(given[role]), Coat) else np.zeros(0)
        before = snapshot(given), held.tobytes()
        assert re.search(rf": {role}\b", refusal((name, role), function, **given))
        assert (snapshot(given), held.tobytes()) == before, (name, role)
        function(**good)
    np.testing.assert_array_equal(relu_xp.relu(SEEN), np.maximum(SEEN, 0))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", IMPOSTORS)
def test_classes_that_lie_do_no_harm(kind):
    """An error or, of the bytes that NumPy makes of them, a result; no array's memory is read."""
    for name, role in PAIRS:
        good = operands_of(name)
        given = good | {role: IMPOSTORS[kind](good[role])}
        before = snapshot(good)
        with contextlib.suppress(
            AttributeError, IndexError, TypeError, ValueError, UnforeseenError
        ):
            FUNCTIONS[name](**given)
        assert snapshot(good) == before or "out" in good
    assert type(SEEN) is np.ndarray
    np.testing.assert_array_equal(relu_xp.relu(SEEN), np.maximum(SEEN, 0))


def test_what_claims_to_be_of_a_library(xp):
    """It may pass, as arrays of a library that is new do, or fail; it is not written, nor is x."""
    real = xp.array(SEEN.copy())
    make = coat(array_api_compat.array_namespace(real))
    for use in (
        lambda liar: relu_xp.relu(liar),
        lambda liar: relu_xp.relu_vjp(liar, negative_slope=0.5),
        lambda liar: relu_xp.relu(real, out=liar),
        lambda liar: relu_xp.relu_backward(liar, real),
        lambda liar: relu_xp.relu_backward(real, liar),
        lambda liar: relu_xp.squared_relu(liar),
    ):
        liar = make(SEEN)
        with contextlib.suppress(Exception):
            use(liar)
        np.testing.assert_array_equal(liar.host, SEEN)
        np.testing.assert_array_equal(xp.numpy(real), SEEN)


@pytest.mark.usefixtures("backend")
def test_empty_arrays_are_not_touched():
    """Whatever their strides, and wherever they are said to lie."""

    nowhere = {"version": 3, "typestr": "<f4", "data": (64, False), "shape": (0, 6)}
    empty = np.asarray(liar(__array_interface__=nowhere)(SEEN))
    for strides in ((4, 4), (2**62, 2**61), (-(2**62), 4), (0, 0)):
        x = np.lib.stride_tricks.as_strided(empty, (0, 6), strides)
        for name, function in FUNCTIONS.items():
            given = dict.fromkeys(roles(function), x)
            for role in {"mask", "weight"} & set(given):
                given[role] = host_of(name, role)
            if "pullback" in name or "backward" in name:
                continue
            for out in {"out": x}, {"out": None}:
                result = function(**given | (out if "out" in given else {}))
                assert result.shape in ((0, 6), (0, 12))
        layer = relu_xp.LeakyReLU(0.5, max_value=1)
        layer.forward(x)
        assert layer.backward(x, out=x) is x


class Strict:
    """What says that it is an array of array_api_strict."""

    def __init__(self, **members):
        self.members = {"shape": (2,), "dtype": None} | members

    def __getattr__(self, name):
        if name == "members" or name not in self.members:
            raise AttributeError(name)
        found = self.members[name]
        if isinstance(found, BaseException):
            raise found
        return found

    def __array_namespace__(self, api_version=None):
        import array_api_strict

        return array_api_strict


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("name", "role"), [("relu_vjp", "x"), ("relu_backward", "dy")])
@pytest.mark.parametrize("lie", ["dtype", "shape", "device", "__dlpack__", "nothing"])
@pytest.mark.parametrize(
    "error", [UnforeseenError("no"), KeyError("no"), UnicodeDecodeError("", b"", 0, 1, "")]
)
def test_an_array_of_another_library_that_lies(require, name, role, lie, error):
    """What it raises when it is asked for its dtype is told; else it may pass, nothing written."""
    float32 = require("array_api_strict").float32
    given = operands_of(name)
    before = snapshot(given)
    liar = Strict(dtype=float32) if lie == "nothing" else Strict(**{"dtype": float32, lie: error})
    told = (TypeError, ValueError) if lie == "dtype" else Exception
    with pytest.raises(told, match=".") as raised:
        FUNCTIONS[name](**given | {role: liar})
    if lie == "dtype":
        assert f": {role}: " in str(raised.value)
    assert snapshot(given) == before


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_is_not_swallowed(error):
    """Wherever it comes, the layer and the arrays are as before."""
    layer = relu_xp.ReLU()
    layer.forward(SEEN)
    nbytes = layer.saved_nbytes
    for make in (
        coat(error()),
        subclass(__getattribute__=raises(error)),
        subclass(dtype=property(raises(error))),
        liar(__getattribute__=raises(error)),
    ):
        for name in ("relu", "relu_backward", "relu_vjp", "prelu", "crelu", "squared_relu"):
            given = operands_of(name)
            before = snapshot(given)
            role = next(iter(given))
            with contextlib.suppress(TypeError), pytest.raises(error):
                FUNCTIONS[name](**given | {role: make(given[role])})
            assert snapshot(given) == before
        for function in (layer.forward, layer.backward):
            with contextlib.suppress(TypeError), pytest.raises(error):
                function(make(SEEN))
            assert layer.saved_nbytes == nbytes
    with pytest.raises(error):
        relu_xp.relu(coat(error())(SEEN))
    with pytest.raises(error):
        relu_xp.relu(liar(__getattribute__=raises(error))(SEEN))
    with pytest.raises(error):
        relu_xp.relu(SEEN, negative_slope=number(__float__=raises(error)))
    np.testing.assert_array_equal(layer.backward(SEEN), np.maximum(SEEN, 0))


# ---- numbers that lie ---------------------------------------------------------------------------


def number(base=numbers.Real, **members):
    """Return a number of somebody's class."""
    missing = getattr(base, "__abstractmethods__", ())
    members = {"__hash__": lambda self: 3} | members
    kind = type("Number", (base,), {name: raises(UnforeseenError) for name in missing} | members)
    return kind()


LYING_NUMBERS = {
    "all raises": number(),
    "hash raises": number(__hash__=raises(UnforeseenError), __float__=raises(UnforeseenError)),
    "no hash": number(__hash__=None),
    "eq raises": number(__hash__=lambda self: hash(0.5), __eq__=raises(UnforeseenError)),
    "float is text": number(float, __float__=lambda self: "0.5"),
    "float raises": number(float, __float__=raises(UnforeseenError)),
    "float is NaN": number(__float__=lambda self: float("nan")),
    "float overflows": number(__float__=raises(OverflowError)),
    "class raises": number(object, __class__=property(raises(UnforeseenError))),
    "class is another": number(object, __class__=float),
    "text": number(
        __float__=lambda self: float("inf"),
        __str__=raises(UnforeseenError),
        __format__=raises(UnforeseenError),
    ),
    "denominator raises": number(numbers.Rational),
    "numerator is text": number(numbers.Rational, denominator=1, numerator="5"),
    "numerator is a float": number(numbers.Rational, denominator=1, numerator=5.5),
    "numerator is huge": number(numbers.Rational, denominator=1, numerator=10**400),
    "huge": 10**400,
    "beyond text": -(10**5000),
    "huge fraction": Fraction(10**400, 3),
    "decimal": Decimal("0.1"),
    "text of a number": "0.5",
    "complex": 0.5j,
    "array": np.array(0.5),
    "list": [0.5],
    "bool": True,
    "numpy bool": np.bool_(True),
    "NaN": float("nan"),
    "-inf": np.float32("-inf"),
    "object": object(),
}
TAKES_NUMBER = {
    "relu": lambda n: relu_xp.relu(SEEN, negative_slope=n),
    "threshold": lambda n: relu_xp.relu_vjp(SEEN, threshold=n),
    "positive_slope": lambda n: relu_xp.relu_backward(SEEN, SEEN, positive_slope=n),
    "max_value": lambda n: relu_xp.relu_grad(SEEN, max_value=n),
    "leaky_relu": lambda n: relu_xp.leaky_relu(SEEN, n),
    "LeakyReLU": lambda n: relu_xp.LeakyReLU(n),
    "ReLU6": lambda n: relu_xp.ReLU6(threshold=n),
    "rrelu": lambda n: relu_xp.rrelu(SEEN, n, 1.0),
    "RReLU": lambda n: relu_xp.RReLU(0.0, n),
    "PReLU": lambda n: relu_xp.PReLU(1, n),
}
NAMES = "threshold|negative_slope|positive_slope|max_value|lower|upper|init"


@pytest.mark.parametrize("kind", LYING_NUMBERS)
def test_numbers_that_lie(kind):
    for name, function in TAKES_NUMBER.items():
        message = refusal(name, function, LYING_NUMBERS[kind])
        assert re.match(f"({NAMES}) must be (a real number|finite)", message)
    np.testing.assert_array_equal(relu_xp.relu(SEEN), np.maximum(SEEN, 0))


def test_strange_numbers_that_are_numbers():
    half = number(
        __float__=lambda self: 0.5, __hash__=lambda self: hash(2.0), __eq__=raises(UnforeseenError)
    )
    for value in (
        half,
        number(__float__=lambda self: 0.5, __hash__=raises(UnforeseenError)),
        number(float, __float__=lambda self: 0.5),
        number(numbers.Rational, denominator=2, __float__=lambda self: 0.5),
        Fraction(1, 2),
        Fraction(10**400, 2 * 10**400),
        np.float16(0.5),
        np.longdouble(0.5),
    ):
        got = relu_xp.relu(SEEN, negative_slope=value)
        np.testing.assert_array_equal(got, np.where(SEEN > 0, SEEN, SEEN / 2))
    assert relu_xp.relu(SEEN, max_value=10**300).tolist() == np.maximum(SEEN, 0).tolist()
    assert relu_xp.relu(np.array([-3]), threshold=-(2**62)).tolist() == [-3]


@pytest.mark.parametrize(
    "axis",
    [1.0, "1", None, True, 10**30, -(10**5000), number(object, __index__=raises(UnforeseenError))],
    ids=lambda axis: type(axis).__name__,
)
def test_an_axis_that_is_none(axis):
    for function in (
        lambda: relu_xp.crelu(SEEN, axis=axis),
        lambda: relu_xp.prelu(SEEN, SLOPES_OF_SEEN, axis=axis),
        lambda: relu_xp.CReLU(axis),
        lambda: relu_xp.PReLU(axis=axis),
        lambda: relu_xp.PReLU(axis),
    ):
        with pytest.raises((TypeError, ValueError), match="(axis|num_parameters) must be a whole"):
            function()


# ---- a call within a call -----------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
def test_an_rng_that_calls_its_layer():
    """The outer call ends last, and is what backward goes back from."""
    layer, calls = relu_xp.RReLU(0.25, 0.75), []

    def rng(shape):
        calls.append(shape)
        if len(calls) == 1:
            layer.forward(np.full((3, 2), -1, np.float32))
            np.testing.assert_array_equal(layer.backward(np.ones((3, 2), np.float32)), 0.5)
            with pytest.raises(RuntimeError):
                layer.backward(np.ones((3, 2), np.float32))
            layer.forward(np.ones((7,), np.float32), training=False)
            layer.forward(np.ones((7,), np.float32))
        return halfway(shape)

    layer.rng = rng
    x = SEEN.copy()
    y = layer.forward(x)
    np.testing.assert_array_equal(y, np.where(x > 0, x, x / 2))
    np.testing.assert_array_equal(layer.backward(x), y)
    assert calls == [SEEN.shape, (3, 2), (7,)]
    np.testing.assert_array_equal(x, SEEN)


@pytest.mark.usefixtures("backend")
def test_an_rng_that_tampers_with_what_it_was_called_for():
    """Memory stays whole, whatever it does to x and out: no more is promised."""
    for tamper in (
        lambda a: setattr(a, "shape", (24,)),
        lambda a: setattr(a, "dtype", np.dtype("f8")),
        lambda a: setattr(a.flags, "writeable", False),
        lambda a: a.resize((0,), refcheck=False),
        lambda a: a.fill(np.nan),
    ):
        for which in (0, 1):
            arrays = np.array(SEEN), np.zeros_like(SEEN)

            def rng(shape, tamper=tamper, array=arrays[which]):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    tamper(array)
                return halfway(shape)

            with contextlib.suppress(TypeError, ValueError, IndexError):
                relu_xp.rrelu(arrays[0], rng=rng, out=arrays[1])
            np.testing.assert_array_equal(relu_xp.relu(SEEN), np.maximum(SEEN, 0))


@pytest.mark.usefixtures("backend")
def test_a_namespace_that_calls_the_layer():
    layer = relu_xp.ReLU()
    layer.forward(SEEN)

    class Caller(Coat):
        def __array_namespace__(self, api_version=None):
            layer.forward(-SEEN)
            raise UnforeseenError

    for use in (
        lambda: layer.forward(Caller(SEEN)),
        lambda: layer.forward(SEEN.copy(), out=Caller(SEEN)),
        lambda: layer.forward(SEEN.copy(), mask=Caller(SEEN)),
        lambda: layer.backward(Caller(SEEN)),
    ):
        layer.forward(SEEN)
        with pytest.raises(TypeError, match="must be an array, got Caller"):
            use()
        np.testing.assert_array_equal(layer.backward(SEEN), np.where(SEEN < 0, SEEN, 0))


# ---- the process --------------------------------------------------------------------------------

TESTS = Path(__file__).parent

# Through the public functions, with every array flush against a page that cannot be touched.
PAGES = """
    import contextlib, ctypes, itertools, mmap, sys
    import numpy as np

    tests, name, beyond = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.insert(0, tests)
    import relu_xp
    from libraries import LIBRARIES, serving_numpy
    from relu_xp.testing import oracle

    protect = ctypes.CDLL(None, use_errno=True).mprotect

    class Room:
        def __init__(self, pages):
            self.map = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
            memory = np.frombuffer(self.map, np.uint8)
            start = memory.__array_interface__["data"][0]
            for number in (0, pages + 1):
                at = ctypes.c_void_p(start + number * mmap.PAGESIZE)
                assert protect(at, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
            self.memory = memory[mmap.PAGESIZE : (pages + 1) * mmap.PAGESIZE]

        def place(self, host, at_end):
            data = host.view(np.uint8)
            start = len(self.memory) - len(data) if at_end else 0
            part = self.memory[start : start + len(data)]
            part[...] = data
            return part.view(host.dtype)

    LAYOUTS = {
        "contiguous": lambda a: a,
        "reversed": lambda a: a[::-1],
        "strided": lambda a: a[::2] if len(a) % 2 else a[1::2],
        "Fortran": lambda a: a.reshape(len(a) // 3, 3, order="F"),
        "columns": lambda a: a.reshape(len(a) // 3, 3)[:, ::-2],
    }
    MEMBERS = {}, {"threshold": -0.5}, {"negative_slope": 0.1, "max_value": 0.75}

    def halfway(shape):
        return np.full(shape, 0.5, np.float32)

    def uses(numbers, dtype):
        slope = np.full(1, 0.25, dtype)
        vjp = lambda x, dy, out, mask: relu_xp.relu_vjp(x, out=out, mask=mask, **numbers)
        yield "relu", lambda x, dy, out, mask: relu_xp.relu(x, out=out, **numbers)
        yield "in place", lambda x, dy, out, mask: relu_xp.relu(x, out=x, **numbers)
        yield "vjp", lambda *a: vjp(*a)[0]
        yield "pullback", lambda x, dy, out, mask: vjp(x, dy, x, mask)[1](dy, out=out)
        yield "over dy", lambda x, dy, out, mask: vjp(x, dy, out, mask)[1](dy, out=dy)
        yield "backward", lambda x, dy, out, mask: relu_xp.relu_backward(dy, x, out=out, **numbers)
        yield "over x", lambda x, dy, out, mask: relu_xp.relu_backward(dy, x, out=x, **numbers)
        yield "grad", lambda x, dy, out, mask: relu_xp.relu_grad(x, out=out, **numbers)
        if numbers or compiled:
            return
        yield "squared", lambda x, dy, out, mask: relu_xp.squared_relu(x, out=out)
        yield "rrelu", lambda x, dy, out, mask: relu_xp.rrelu(x, rng=halfway, out=out)
        yield "squared, dy", lambda x, dy, out, mask: relu_xp.squared_relu_vjp(x)[1](dy, out=out)
        yield "prelu", lambda x, dy, out, mask: relu_xp.prelu(x, slope, axis=0, out=out)
        row = lambda dy: dy if dy.ndim == 1 else dy[:, 0]
        yield "slopes", lambda x, dy, out, mask: relu_xp.prelu(x, row(dy), axis=0, out=out)
        yield "their gradient", lambda x, dy, out, mask: relu_xp.prelu_vjp(
            x, np.zeros(len(x)), axis=0
        )[1](dy, out=out)[1]
        integers = lambda a: None if a is None else a.view(f"i{a.itemsize}")
        yield "integers", lambda x, dy, out, mask: relu_xp.relu(integers(x), out=integers(out))
        yield "pieces", lambda x, dy, out, mask: relu_xp.crelu_vjp(x, axis=0)[1](
            np.concatenate([dy, dy]), out=out
        )

    def check(dtype, size, rooms, layouts):
        ends = (True,) if beyond else (False, True)
        for numbers, layout, at_end in itertools.product(MEMBERS, layouts, ends):
            rng = np.random.default_rng(size)
            hosts = [host.astype(dtype) for host in rng.standard_normal((3, size))]
            with serving_numpy("relu_xp.backends.numpy"):
                plain = [LAYOUTS[layout](host) for host in hosts]
                wanted = {
                    use: function(*(host.copy("K") for host in plain), None).tobytes()
                    for use, function in uses(numbers, dtype)
                }
            for use, function in uses(numbers, dtype):
                placed = (room.place(host, at_end) for room, host in zip(rooms, hosts))
                views = [LAYOUTS[layout](array) for array in placed]
                count = views[0].size if len(numbers) > 1 else -(-views[0].size // 8)
                mask = rooms[3].place(np.zeros(count, np.uint8), at_end)
                if beyond:
                    longer = np.lib.stride_tricks.as_strided
                    views = [longer(view, (size + 1,), view.strides) for view in views]
                    mask = np.zeros(size + 1, np.uint8)
                got = function(*map(library.array, views), library.array(mask))
                about = dtype, size, numbers, layout, at_end, use
                assert library.numpy(got).tobytes() == wanted[use], about

    library = LIBRARIES[name]
    reason = library.load()
    assert reason is None, reason
    few, many = [Room(1) for _ in range(4)], [Room(80) for _ in range(4)]
    compiled = name == "cupy_host"  # with g++, each dtype and layout anew
    for dtype in [np.dtype("float32")] if compiled else oracle.DTYPES.values():
        with library.running():
            for size in (*range(3 * beyond, 21), 33, 36, 48, 51, 63, 64, 65, 66, 129):
                whole = size and size % 3 == 0 and not beyond
                layouts = ["contiguous", "columns"] if compiled else LAYOUTS
                check(dtype, size, few, layouts if whole else ["contiguous"])
            if not compiled:
                check(dtype, 30_003, many, LAYOUTS)
"""


class TestPages:
    @pytest.fixture(params=["numpy", "native", "native_streaming", "cupy_host"])
    def library(self, request):
        if sys.platform != "linux":
            unavailable(request.config, "mprotect is called as on Linux")
        if reason := LIBRARIES[request.param].load():
            unavailable(request.config, reason)
        return request.param

    def test_nothing_is_touched_beyond_the_arrays(self, python, library):
        python(PAGES, TESTS, library, 0, timeout=300)

    def test_the_check_sees_one_element_more(self, python, library):
        python(PAGES, TESTS, library, 1, status=-signal.SIGSEGV)


# Anything may be refused, and nothing may crash.
FUZZ = """
    import random, sys, warnings
    import numpy as np

    tests, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.insert(0, tests)
    import relu_xp
    from libraries import LIBRARIES
    from relu_xp.testing import oracle
    from test_hostile import FUNCTIONS, LAWFUL, LOCKED, LYING_NUMBERS, REFUSED, TAKES_NUMBER
    from test_hostile import IMPOSTORS, UnforeseenError, host_of, roles

    draw = random.Random(name)
    views = [make for name, make in (LAWFUL | LOCKED).items() if name != "far-apart"]
    strange = [*views, *REFUSED.values(), *IMPOSTORS.values()]
    shapes = [(4, 6), (4, 6), (), (1,), (0, 3), (3, 0), (7,), (2, 3, 4), (70, 33), (9000,)]
    dtypes = [*oracle.DTYPES.values(), *map(np.dtype, "bhilqBHILQ?Fe"), np.dtype(">f4")]
    layers = [
        relu_xp.ReLU(), relu_xp.LeakyReLU(0.5, max_value=2), relu_xp.PReLU(), relu_xp.CReLU(),
        relu_xp.RReLU(), relu_xp.SquaredReLU(), relu_xp.ReLU(inplace=True),
    ]
    done = refused = 0

    def one(role, name, shape):
        if role == "mask":
            size = draw.choice([0, 1, 3, int(np.prod(shape)), 9000])
            array = np.zeros(size, draw.choice("BBBbHf"))
        else:
            array = host_of(name, role, shape or (1,)).reshape(-1)[:max(1, int(np.prod(shape)))]
            array = np.resize(array, shape)
        if draw.random() < 0.3:
            array = array.astype(draw.choice(dtypes))
        return draw.choice(strange)(array) if draw.random() < 0.3 else array

    def arguments(name, names):
        shape = draw.choice(shapes)
        other = draw.choice(shapes)
        given = {r: one(r, name, draw.choices([shape, other], [9, 1])[0]) for r in names}
        if draw.random() < 0.2:  # overlapping, or the very same
            taken = draw.choice(list(given))
            given["out" if "out" in given else taken] = draw.choice([
                lambda: given[taken], lambda: given[taken][1:], lambda: given[taken][::-1],
                lambda: given[taken].view(np.uint8), lambda: given[taken].T,
            ])()
        return given

    def layer_call():
        layer = draw.choice(layers)
        given = arguments("relu_vjp", ["x", "out", "mask"])
        options = {k: v for k, v in given.items() if k != "x" and draw.random() < 0.4}
        if draw.random() < 0.5:
            options.pop("mask", None)
            return layer.backward(given["x"], retain=draw.random() < 0.7, **options)
        return layer.forward(given["x"], **options)

    def function_call():
        name = draw.choice(list(FUNCTIONS))
        names = roles(FUNCTIONS[name])
        return FUNCTIONS[name](**arguments(name, names))

    def number_call():
        return draw.choice(list(TAKES_NUMBER.values()))(draw.choice(list(LYING_NUMBERS.values())))

    warnings.simplefilter("ignore")
    library = LIBRARIES[name]
    assert library.load() is None
    with library.running():
        for _ in range(calls):
            call = draw.choices([function_call, layer_call, number_call], [6, 5, 1])[0]
            try:
                call()
                done += 1
            except (UnforeseenError, ArithmeticError, AttributeError, LookupError, TypeError,
                    ValueError, RuntimeError, MemoryError):
                refused += 1
        x = np.array([-1, 0, 2, np.nan], np.float32)
        np.testing.assert_array_equal(relu_xp.relu(x), [0, 0, 2, np.nan])
        np.testing.assert_array_equal(relu_xp.relu_vjp(x)[1](x), [0, 0, 2, np.nan])
    print(done, refused)
"""


@pytest.mark.parametrize("name", LIVES)
def test_no_call_crashes(request, python, name):
    if reason := LIBRARIES[name].load():
        unavailable(request.config, reason)
    done, refused = map(int, python(FUZZ, TESTS, name, 4000, timeout=300).split())
    assert done > 400
    assert refused > 400
