"""Invalid arrays: the error names the argument, nothing is written, and the next call works."""

from __future__ import annotations

import re

import numpy as np
import pytest
from operands import (
    CALLS,
    INVALID,
    PAIRS,
    UnexpectedError,
    Wrapper,
    X,
    contents,
    is_backward,
    operand,
    operands,
    raising,
    wrapper,
)

import relu_xp


def works_again():
    np.testing.assert_array_equal(relu_xp.relu(X), np.maximum(X, 0))


def error_of(about, call, *arguments, **options):
    """Return the error of a call, a TypeError or ValueError."""
    try:
        call(*arguments, **options)
    except (TypeError, ValueError) as error:
        return error
    return pytest.fail(f"{about} is accepted")


@pytest.mark.libraries("ndarray")
@pytest.mark.parametrize("kind", INVALID)
def test_no_plain_array(xp, kind):
    """As any argument of any call."""
    for name, role in PAIRS:
        given = operands(name)
        given[role] = INVALID[kind](given[role])
        inside = given[role].host if issubclass(type(given[role]), Wrapper) else X
        before = contents(given), inside.tobytes()
        error = error_of((name, role), CALLS[name], **given)
        assert type(error) is TypeError, (name, role)
        assert re.search(rf": {role}\b", str(error)), (name, role)
        assert (contents(given), inside.tobytes()) == before, (name, role)
        CALLS[name](**operands(name))
    works_again()


@pytest.mark.libraries("ndarray")
@pytest.mark.parametrize("name", [name for name, role in PAIRS if role == "dy"])
def test_a_gradient_of_another_shape_or_without_gradient(xp, name):
    for make, error, word in (
        (lambda dy: np.zeros((*dy.shape, 2), dy.dtype), ValueError, "shape"),
        (lambda dy: np.zeros(dy.shape[1:], dy.dtype), ValueError, "shape"),
        (lambda dy: dy.astype(np.int32), TypeError, "dtype"),
    ):
        given = operands(name)
        given["dy"], before = make(given["dy"]), contents(given)
        with pytest.raises(error, match=f": dy has {word}"):
            CALLS[name](**given)
        assert {**contents(given), "dy": before["dy"]} == before


@pytest.mark.parametrize("name", ["relu_vjp", "relu_backward"])
@pytest.mark.parametrize("attribute", ["dtype", "shape", "device", "__dlpack__"])
def test_an_array_of_another_library_whose_attribute_raises(require, name, attribute):
    """A dtype that raises is reported; after any other error nothing is written."""
    strict = require("array_api_strict")
    for error in (UnexpectedError("no"), KeyError("no"), UnicodeDecodeError("", b"", 0, 1, "")):
        given, role = operands(name), next(iter(operands(name)))
        attributes = {"shape": (2,), "dtype": strict.float32, attribute: property(raising(error))}
        attributes["__array_namespace__"] = lambda self, api_version=None: strict
        before = contents(given)
        with pytest.raises(Exception, match=".") as raised:
            CALLS[name](**given | {role: type("Array", (), attributes)()})
        if attribute == "dtype":
            assert type(raised.value) in (TypeError, ValueError)
            assert f": {role}: " in str(raised.value)
        assert contents(given) == before


@pytest.mark.libraries("ndarray")
@pytest.mark.parametrize("strides", [(4, 4), (2**62, 2**61), (-(2**62), 4), (0, 0)])
def test_empty_arrays_are_not_accessed(xp, strides):
    """Whatever their strides, and whatever address they have."""
    interface = {"version": 3, "typestr": "<f4", "data": (64, False), "shape": (0, 6)}
    empty = np.asarray(type("Nowhere", (), {"__array_interface__": interface})())
    x = np.lib.stride_tricks.as_strided(empty, (0, 6), strides)
    for name, call in CALLS.items():
        if is_backward(name) and name != "relu_backward":
            continue  # these have seen another shape
        given = operands(name, (0, 6))
        given = {role: a if role in ("mask", "weight", "bias") else x for role, a in given.items()}
        for out in {"out": x}, {"out": None}:
            result = call(**given | (out if "out" in given else {}))
            assert result.shape in ((0, 6), (0, 12))
    layer = relu_xp.LeakyReLU(0.5, max_value=1)
    layer.forward(x)
    assert layer.backward(x, out=x) is x


def test_messages():
    """A few errors word for word: the function, the argument, what came and what to do."""
    for call, message in (
        (
            lambda: relu_xp.relu([1.0]),
            "relu: x must be an array, got list; convert it first, for example numpy.asarray(x)",
        ),
        (
            lambda: relu_xp.relu(np.ma.ones(3)),
            "relu: x is a numpy.ma.MaskedArray, whose own rules (a mask, a shape) would be lost; "
            "convert it first, for example numpy.asarray(x)",
        ),
        (lambda: relu_xp.relu_backward(X[0], X), "relu_backward: dy has shape (6,), x is (4, 6)"),
        (
            lambda: relu_xp.relu(X.astype(">f4")),
            "relu: x: byte-swapped dtype >f4 is not supported; "
            "convert it first, by its method astype('float32')",
        ),
        (
            lambda: relu_xp.relu(np.array(["a"], ">U1")),
            "relu: x: byte-swapped dtype >U1 is not supported",
        ),
        (
            lambda: relu_xp.relu_grad(X > 0),
            "relu_grad: x: unsupported dtype bool; "
            "give an array of float16, bfloat16, float32, float64",
        ),
        (
            lambda: relu_xp.relu(X > 0),
            "relu: x: unsupported dtype bool; give an array of "
            "float16, bfloat16, float32, float64, int8 to int64, uint8 to uint64",
        ),
        (
            lambda: relu_xp.relu(X, out=operand("relu", "out").astype(float)),
            "relu: out has dtype float64, the result float32; give an array of that dtype",
        ),
    ):
        assert str(error_of(message, call)) == message


def test_the_cause_of_a_refusal():
    """The error of the object itself where there is one, else none."""
    for namespace in (None, 3, RuntimeError("no"), AttributeError("no")):
        cause = error_of("a wrapper", relu_xp.relu, wrapper(namespace)(X)).__cause__
        assert cause is namespace if isinstance(namespace, Exception) else cause is not None
    assert error_of("a list", relu_xp.relu, [1.0]).__cause__ is None
