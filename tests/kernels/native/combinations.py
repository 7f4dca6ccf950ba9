"""Every function on NumPy arrays of odd sizes, offsets and strides: a checksum a line.

``python combinations.py`` is for a module that is compiled with sanitizers: arrays end where their
memory ends, and every second call runs the code for large arrays. Every backend of NumPy arrays
prints the same lines. ``python combinations.py FAULT`` does what a sanitizer must report.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

sys.path.insert(0, str(Path(__file__).parents[2]))

from bits import INTEGERS, mixed

import relu_xp
from relu_xp import kernels
from relu_xp.testing.reference import DTYPES

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


def at_the_end(x, offset=0):
    """Return a copy of an array that begins at an offset and ends where its memory does."""
    raw = np.empty(offset + x.nbytes, np.uint8)
    raw[offset:] = x.reshape(-1).view(np.uint8)
    return raw[offset:].view(x.dtype).reshape(x.shape)


def spread(x, step):
    """Return a view with a step between elements, whose last one ends where the memory does."""
    memory = np.empty(max(0, (x.size - 1) * abs(step) + 1), x.dtype)
    memory[::step] = x
    return memory[::step]


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


def vjp(name, dy, *arguments, **options):
    y, pullback = getattr(relu_xp, f"{name}_vjp")(*arguments, **options)
    found = pullback(np.resize(dy, y.shape) if dy.shape != y.shape else dy)
    return [y, *(found if isinstance(found, tuple) else (found,))]


def functions(x, dy, weight):
    """Yield names, and functions that return arrays."""
    mask = np.zeros(x.size, np.uint8)
    for name, params in ACTIVATIONS.items():
        yield f"relu, {name}", lambda p=params: [relu_xp.relu(x, **p)]
        yield f"grad, {name}", lambda p=params: [relu_xp.relu_grad(x, **p)]
        yield f"backward, {name}", lambda p=params: [relu_xp.relu_backward(dy, x, **p)]
        yield f"vjp, {name}", lambda p=params: vjp("relu", dy, x, **p)
    yield "own mask", lambda: [*vjp("relu", dy, x, mask=mask), mask]
    x_copy, dy_copy = x.copy("K"), dy.copy("K")
    yield "in place", lambda: [relu_xp.leaky_relu(x_copy, 0.3, out=x_copy)]
    yield "in place, backward", lambda: [relu_xp.relu_backward(dy_copy, x, out=dy_copy)]
    other = np.empty((*x.shape, 2), x.dtype)[..., 1]
    yield "into every second", lambda: [relu_xp.relu(x, out=other)]
    if x.ndim > 0:
        yield "prelu", lambda: vjp("prelu", dy, x, weight, axis=x.ndim - 1)
        yield "crelu", lambda: vjp("crelu", dy, x, axis=x.ndim - 1)
        yield "bias", lambda: vjp("bias_relu", dy, x, weight)
        bias = np.resize(weight, x.shape[0]) if weight.size else weight[:0]
        three = ACTIVATIONS["everything"]
        yield "bias, everything", lambda: vjp("bias_relu", dy, x, bias, axis=0, **three)
    rng = np.random.Generator(np.random.PCG64(1))
    yield "rrelu", lambda: vjp("rrelu", dy, x, rng=rng)
    yield "squared", lambda: vjp("squared_relu", dy, x)


def combinations():
    """Yield names, and functions that return arrays."""
    pairs = list(itertools.product(DTYPES, DTYPES))
    for count, (layout, view) in itertools.product(SIZES, LAYOUTS.items()):
        for number, dtype in enumerate(DTYPES):
            _, dy_dtype = pairs[(5 * number + count) % len(pairs)]
            x = view(mixed(dtype, count, 1))
            dy = view(mixed(dy_dtype, count, 2))
            weight = mixed(dy_dtype, x.shape[-1], 3)
            with np.errstate(invalid="ignore"):  # of ml_dtypes
                weight = np.where(np.isfinite(weight), weight, weight.dtype.type(0.25))
            for name, function in functions(x, dy, weight):
                yield f"{count} {layout} {dtype} {dy_dtype}: {name}", function
        for dtype in INTEGERS:
            x = view(mixed("float64", count, 4).view(np.uint64).astype(dtype))
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


MEMORY = np.zeros(100, np.float32)
FAULTS = {  # arrays that claim more memory than they have; a stride times a length overflows
    "address": lambda: relu_xp.relu(as_strided(MEMORY, (101,), (4,))),
    "undefined": lambda: relu_xp.relu_vjp(as_strided(MEMORY, (2, 4), (4, 1 << 62))),
}

if __name__ == "__main__":
    (FAULTS[sys.argv[1]] if len(sys.argv) > 1 else main)()
