"""The advice in the messages about arrays that are refused: it is followed, and has to work."""

from __future__ import annotations

import array
import ctypes
import itertools
import re
import sys
import types

import numpy as np
import pytest
from libraries import LIBRARIES
from operands import X
from table import DTYPES

import relu_xp
from relu_xp import dispatch


def advice_of(call):
    """Return the message of an error, and the expression that it gives as an example, if any."""
    with pytest.raises((TypeError, ValueError)) as refused:
        call()
    message = str(refused.value)
    return message, message.partition("for example ")[2]


def follow(expression, **arguments):
    """Return what an expression makes of arguments, with the modules that are imported."""
    modules = {name: module for name, module in sys.modules.items() if "." not in name}
    return eval(expression, modules | arguments)


# Those that are there: test_libraries.py has a skip for each other one.
MOVED = ("numpy", "torch", "jax", "dask", "array_api_strict")
MOVED = [name for name in MOVED if LIBRARIES[name].reason is None]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("source", "target"), [*itertools.permutations(MOVED, 2)])
def test_advice_to_move_an_array(source, target):
    """Of any dtype and layout; one that autograd records too."""
    LIBRARIES[source].load(), LIBRARIES[target].load()
    x = LIBRARIES[target].array(np.ones((2, 3), np.float32))
    for dtype in LIBRARIES[source].dtypes:
        host = np.linspace(-1, 1, 6).reshape(2, 3)[::-1].astype(DTYPES[dtype])[::-1]
        host.flags.writeable = False
        made = [LIBRARIES[source].array(host)]
        if source == "torch":
            made.append(made[0].clone().requires_grad_())
            if dtype == "float32":  # a tensor that is negated when it is read
                made.append(LIBRARIES[source].module.complex(made[0], -made[0]).conj().imag)
        for dy in made:
            _, pullback = relu_xp.relu_vjp(x)
            _, expression = advice_of(lambda: pullback(dy))  # noqa: B023
            moved = follow(expression, dy=dy)
            for dx in pullback(moved), relu_xp.relu_backward(moved, x):
                assert type(dx) is type(x)
                found = LIBRARIES[target].numpy(dx)
                np.testing.assert_array_equal(found, host.astype(found.dtype))
        layer = relu_xp.PReLU(3)
        layer.params[0] = made[0][0, :]
        _, expression = advice_of(lambda: layer.forward(x))  # noqa: B023
        layer.params[0] = follow(expression, layer=layer)
        assert type(layer.forward(x)) is type(x)


def test_advice_to_move_an_array_to_a_device_or_from_it():
    for source, target, hint in (
        (("cupy", 0), ("cupy", 1), "move it to device 1 first"),
        (("cupy", 0), ("numpy", None), "move it first, for example cupy.asnumpy(dy)"),
        (("numpy", None), ("cupy", 0), "move it first, for example cupy.asarray(dy)"),
        (("cupy", 0), ("other", 0), "move it first, for example other.asarray(cupy.asnumpy(dy))"),
        (
            ("numpy", None),
            ("torch", "cuda:1"),
            "move it first, for example torch.asarray(dy.copy(), device='cuda:1')",
        ),
    ):
        assert dispatch.transfer_hint("dy", source, target, np.dtype(np.float32)) == hint


class Lazy:
    """An array in a file, say, which becomes one of NumPy on request."""

    loaded = False

    def __init__(self, *dtypes):
        if len(dtypes) == 1:
            self.dtype = dtypes[0]
        else:
            self.dtypes = dtypes

    def __array__(self, dtype=None, copy=None):
        self.loaded = True
        return np.array([-1, 2], dtype or np.float32)


F4, I8 = np.dtype(np.float32), np.dtype(np.int64)
HOST = np.array([-1, 2], np.float32)
RECURSIVE = []
RECURSIVE.append(RECURSIVE)


def scipy_sparse(kind, dtype=np.float32):
    return lambda require: getattr(require("scipy.sparse"), kind)(np.array([[-1, 2]], dtype))


def jax_sparse(require):
    jax_array = require("jax.numpy").asarray(HOST)
    return require("jax.experimental.sparse").BCOO.fromdense(jax_array)


CONVERTED = {
    "list": ([-1.0, 2.0], "numpy.asarray(x)"),
    "list of integers": ([-1, 2], "numpy.asarray(x, float)"),
    "list of arrays": ([HOST, HOST], "numpy.asarray(x)"),
    "tuple of scalars": (tuple(HOST), "numpy.asarray(x)"),
    "number": (2.0, "numpy.asarray(x)"),
    "integer": (2, "numpy.asarray(x, float)"),
    "range": (range(-1, 2), "numpy.asarray(x, float)"),
    "array.array": (array.array("d", [-1, 2]), "numpy.asarray(x)"),
    "memoryview": (memoryview(HOST), "numpy.asarray(x)"),
    "ctypes": ((ctypes.c_float * 2)(-1, 2), "numpy.asarray(x)"),
    "masked array": (np.ma.masked_array(HOST, HOST > 0), "numpy.asarray(x)"),
    "matrix": (HOST.view(np.matrix), "numpy.asarray(x)"),
    "Series, DataArray, h5py.Dataset": (Lazy(F4), "numpy.asarray(x)"),
    "of integers": (Lazy(I8), "numpy.asarray(x, float)"),
    "DataFrame": (Lazy(F4, I8), "numpy.asarray(x, float)"),
    "csr_array": (scipy_sparse("csr_array"), "x.toarray()"),
    "lil_matrix": (scipy_sparse("lil_matrix"), "x.toarray()"),
    "BCOO": (jax_sparse, "x.todense()"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_advice_to_convert_what_is_no_array(require, name):
    """It is followed, and works for a gradient too."""
    x, wanted = CONVERTED[name]
    if isinstance(x, types.FunctionType):
        x = x(require)
    _, expression = advice_of(lambda: relu_xp.relu_backward(x, HOST))
    assert expression == wanted.replace("x", "dy")
    _, expression = advice_of(lambda: relu_xp.relu(x))
    assert expression == wanted
    assert not getattr(x, "loaded", False)
    converted = follow(expression, x=x)
    relu_xp.relu(converted, threshold=0.5)
    relu_xp.relu_grad(converted)


IN_A_LIST = Lazy(F4)
WITHOUT_ADVICE = {
    **{type(x).__name__: x for x in (None, "a", b"a", {}, {1.0}, object(), True, 1j, 10**30)},
    **{
        str(x): x for x in ([], [None], ["a"], [True], [1.0, None], [1.0, "a"], [[1.0], [1.0, 2.0]])
    },
    "generator": (i for i in (1.0, 2.0)),
    "list of itself": RECURSIVE,
    "list of arrays to be loaded": [IN_A_LIST],
    "memory in another byte order": memoryview(HOST.astype(F4.newbyteorder())),
    "masked objects": np.ma.masked_array([None, 1.0]),
    "masked, another byte order": np.ma.masked_array(HOST.astype(F4.newbyteorder())),
    "complex matrix": np.array([1j]).view(np.matrix),
    "records": np.rec.array([(1.0, 2)]),
    "Series of text": Lazy("string[python]"),
    "DataFrame with objects": Lazy(F4, np.dtype(object)),
    "empty DataFrame": Lazy(),
    "xarray.Dataset, whose dtypes are a mapping": Lazy("one", "two"),
    "class": Lazy,
    "bool csr_array": scipy_sparse("csr_array", bool),
    "csr_array itself": lambda require: require("scipy.sparse").csr_array,
}


@pytest.mark.parametrize("name", WITHOUT_ADVICE)
def test_no_advice_where_there_is_none(require, name):
    x = WITHOUT_ADVICE[name]
    if isinstance(x, types.FunctionType):
        x = x(require)
    message, _ = advice_of(lambda: relu_xp.relu(x))
    assert ";" not in message
    assert not IN_A_LIST.loaded


def test_advice_about_what_is_no_argument(require):
    """What a caller's function returned has no name, and is "it"."""
    torch = require("torch")
    for returned, wanted in (
        (torch.full((2,), 0.5), "it.numpy(force=True)"),
        (np.ma.masked_array([0.5, 0.5]), "numpy.asarray(it)"),
    ):
        _, expression = advice_of(lambda: relu_xp.rrelu(HOST, rng=lambda shape: returned))  # noqa: B023
        assert expression == wanted
        slopes = follow(expression, it=returned)
        relu_xp.rrelu(HOST, rng=lambda shape: slopes)  # noqa: B023


def test_advice_about_out():
    """No result is lost in a copy."""
    y, zero = np.zeros_like(X), np.array(-1, np.float32)
    for out in (y,), [y]:
        message, _ = advice_of(lambda: relu_xp.relu(X, out=out))  # noqa: B023
        assert message.endswith("; pass the array itself, out=y instead of out=(y,)")
    assert relu_xp.relu(X, out=y) is y
    _, expression = advice_of(lambda: relu_xp.relu(zero, out=np.float32(7)))
    out = follow(expression)
    assert relu_xp.relu(zero, out=out) is out
    matrix = np.full(X.shape, 7, np.float32).view(np.matrix)
    _, expression = advice_of(lambda: relu_xp.relu(X, out=matrix))
    out = follow(expression, out=matrix)
    assert relu_xp.relu(X, out=out) is out
    np.testing.assert_array_equal(matrix, np.maximum(X, 0))
    for out in ((y, y), (), [1.0], 1.0, True, memoryview(y), np.str_("a"), "a", {}):
        message, _ = advice_of(lambda: relu_xp.relu(X, out=out))  # noqa: B023
        assert message.endswith("; give an array like the result")


def test_advice_about_a_mask():
    mask = np.zeros(3, np.uint8)
    for given, advice in (
        ((mask,), "; pass the array itself, mask=y instead of mask=(y,)"),
        (bytearray(3), "; give a contiguous array of uint8 with one axis"),
        (np.uint8(0), "; give a contiguous array of uint8 with one axis"),
        (mask.view(np.int8), "; give an array of uint8"),
        (np.zeros(6, np.uint8)[::2], "; give a contiguous array with one axis"),
        (np.broadcast_to(mask, 3), "is read-only; give an array that may be written"),
    ):
        message, _ = advice_of(lambda: relu_xp.relu_vjp(X, mask=given))  # noqa: B023
        assert message.endswith(advice)
    relu_xp.relu_vjp(X, mask=mask)
    assert mask.tolist() == np.packbits(X > 0, bitorder="little").tolist()


@pytest.mark.parametrize("name", MOVED)
def test_advice_about_an_out_of_another_library(require, name):
    """An array of the right one, or none where the library writes no arrays."""
    library = LIBRARIES[name]
    library.load()
    strict = require("array_api_strict")
    x, y = library.array(X), library.array(np.zeros_like(X))
    others = [np.zeros_like(X), strict.asarray(np.zeros_like(X))]
    others = [out for out in others if type(out) is not type(x)]
    if library.writable:
        words = "; give an array of (NumPy|PyTorch on device cpu|array_api_strict on .*)$"
        assert relu_xp.relu(x, out=y) is y
    else:
        words = "^relu: out cannot be written.*immutable; omit out= or inplace=$"
        others += [(y,), [1.0], library.array(np.zeros(X.shape, np.int32)), y[0, :]]
    for out in others:
        message, _ = advice_of(lambda: relu_xp.relu(x, out=out))  # noqa: B023
        assert re.search(words, message)
