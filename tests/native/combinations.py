"""Every function on NumPy arrays of odd sizes, offsets and strides: a digest a line.

``python combinations.py`` is for a module that is compiled with sanitizers: arrays end where their
memory ends, and half of the calls take the way of large arrays. The lines are the same whichever
code serves NumPy arrays. ``python combinations.py FAULT`` does what a sanitizer is to report.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

sys.path.insert(0, str(Path(__file__).parents[1]))

from bits import INTEGERS, drawn

import relu_xp
from relu_xp import kernels
from relu_xp.testing.oracle import DTYPES

SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1023)
SIZES += (1025, 2047, 2049, 4095, 4097, 8193)
ACTIVATIONS = {
    "relu": {},
    "thresholded": {"threshold": -0.5},
    "leaky": {"negative_slope": 0.3},
    "relu6": {"max_value": 6.0},
    "two slopes": {"negative_slope": -0.25, "positive_slope": 1.75, "threshold": 0.25},
    "everything": {"negative_slope": 0.3, "positive_slope": 1.75, "max_value": 3.0},
}
FAULTS = ("address", "undefined")


def at_the_end(x, offset=0):
    """Return a copy of an array that begins at an offset and ends where its memory does."""
    raw = np.empty(offset + x.nbytes, np.uint8)
    raw[offset:] = x.reshape(-1).view(np.uint8)
    return raw[offset:].view(x.dtype).reshape(x.shape)


def spread(x, step):
    """Return a view with a step between elements, whose last one ends where the memory does."""
    if x.size == 0:
        return x
    memory = np.empty((x.size - 1) * abs(step) + 1, x.dtype)
    view = memory[::step]
    view[...] = x
    return view


def in_rows(x, width=3):
    return x[: x.size // width * width].reshape(-1, width)


LAYOUTS = {
    "contiguous": at_the_end,
    "one element in": lambda x: at_the_end(x, x.itemsize),
    "unaligned": lambda x: at_the_end(x, 1),
    "every second": lambda x: spread(x, 2),
    "backwards": lambda x: spread(x, -1),
    "rows": lambda x: at_the_end(in_rows(x)),
    "columns": lambda x: at_the_end(in_rows(x).T.copy()).T,
    "some columns": lambda x: at_the_end(np.repeat(in_rows(x), 2, axis=0).reshape(-1, 6))[:, 1::2],
    "permuted": lambda x: at_the_end(in_rows(x, 6).reshape(-1, 2, 3)).transpose(2, 0, 1),
    "broadcast": lambda x: np.broadcast_to(at_the_end(x[:1]), (x.size,)) if x.size else x,
}


def vjp(function, dy_of, *arguments, **options):
    y, pullback = function(*arguments, **options)
    found = pullback(dy_of(y))
    return [y, *(found if isinstance(found, tuple) else (found,))]


def functions(x, dy, weight):
    """Yield names, and functions that return arrays."""

    def dy_of(y):
        return np.resize(dy, y.shape)

    mask = np.zeros(x.size, np.uint8)
    for name, numbers in ACTIVATIONS.items():
        yield f"relu, {name}", lambda n=numbers: [relu_xp.relu(x, **n)]
        yield f"grad, {name}", lambda n=numbers: [relu_xp.relu_grad(x, **n)]
        yield f"backward, {name}", lambda n=numbers: [relu_xp.relu_backward(dy, x, **n)]
        yield f"vjp, {name}", lambda n=numbers: vjp(relu_xp.relu_vjp, lambda y: dy, x, **n)
    yield "own mask", lambda: [*vjp(relu_xp.relu_vjp, lambda y: dy, x, mask=mask), mask]
    x_copy, dy_copy = x.copy("K"), dy.copy("K")
    yield "in place", lambda: [relu_xp.leaky_relu(x_copy, 0.3, out=x_copy)]
    yield "in place, backward", lambda: [relu_xp.relu_backward(dy_copy, x, out=dy_copy)]
    other = np.empty((*x.shape, 2), x.dtype)[..., 1]
    yield "into every second", lambda: [relu_xp.relu(x, out=other)]
    if x.ndim > 0:
        axis = x.ndim - 1
        yield "prelu", lambda: vjp(relu_xp.prelu_vjp, lambda y: dy, x, weight, axis=axis)
        yield "crelu", lambda: vjp(relu_xp.crelu_vjp, dy_of, x, axis=axis)
    rng = np.random.Generator(np.random.PCG64(1))
    yield "rrelu", lambda: vjp(relu_xp.rrelu_vjp, lambda y: dy, x, rng=rng)
    yield "squared", lambda: vjp(relu_xp.squared_relu_vjp, lambda y: dy, x)


def combinations():
    """Yield names, and functions that return arrays."""
    pairs = list(itertools.product(DTYPES, DTYPES))
    for count, (layout, view) in itertools.product(SIZES, LAYOUTS.items()):
        for number, dtype in enumerate(DTYPES):
            _, dy_dtype = pairs[(5 * number + count) % len(pairs)]
            x = view(drawn(dtype, count, 1))
            dy = view(drawn(dy_dtype, count, 2))
            weight = drawn(dy_dtype, x.shape[-1], 3)
            with np.errstate(invalid="ignore"):  # of ml_dtypes
                weight = np.where(np.isfinite(weight), weight, weight.dtype.type(0.25))
            for name, function in functions(x, dy, weight):
                yield f"{count} {layout} {dtype} {dy_dtype}: {name}", function
        for dtype in INTEGERS:
            x = view(drawn("float64", count, 4).view(np.uint64).astype(dtype))
            yield f"{count} {layout} {dtype}", lambda x=x: [relu_xp.relu(x, max_value=100)]


def checksum(arrays):
    found = 0
    for array in arrays:
        found = zlib.crc32(f"{array.dtype} {array.shape}".encode(), found)
        found = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, found)
    return found


def main():
    before = kernels.cpu.set_limits(0, 0, 0) if kernels.cpu else None
    for number, (name, function) in enumerate(combinations()):
        if kernels.cpu:
            kernels.cpu.set_limits(*((0, 0, 0) if number % 2 else before))
        with np.errstate(all="ignore"):
            print(f"{name} {checksum(function()):08x}")


def commit(fault):
    """Call a kernel with an array that claims more memory than it has."""
    memory = np.zeros(100, np.float32)
    if fault == "address":
        relu_xp.relu(as_strided(memory, (101,), (4,)))
    else:  # a stride times a length overflows
        relu_xp.relu_vjp(as_strided(memory, (2, 4), (4, 1 << 62)))


if __name__ == "__main__":
    assert len(sys.argv) == 1 or sys.argv[1] in FAULTS
    if len(sys.argv) == 1:
        main()
    else:
        commit(sys.argv[1])
