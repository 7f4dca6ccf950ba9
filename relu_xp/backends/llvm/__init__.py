"""NumPy arrays with kernels compiled by LLVM, where llvmlite is installed (extra ``jit``).

The results are those of `relu_xp.backends.numpy`, bit for bit, and that module serves whatever has
no kernel: integers, strides, two dtypes at once. It also serves until the kernels are there. They
are asked for when there has been work enough to be worth it, compiled or read from disk on a
thread of their own, and taken up when they are ready: no call ever waits for a compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from relu_xp.activation import Rounded
from relu_xp.backends import numpy as _numpy
from relu_xp.backends.llvm import kernels, runtime
from relu_xp.backends.llvm.crew import THREADED_BYTES
from relu_xp.backends.llvm.loader import loader
from relu_xp.backends.numpy import (
    backward_both,
    backward_squared,
    both,
    check_out,
    copy,
    dtype_name,
    gradient,
    mask_nbytes,
    pieces_of_both,
    place,
    saved_nbytes,
    sloped,
    slopes_gradient,
    squared,
    uniform,
)
from relu_xp.mask import Mask, buffer

__all__ = [
    "backward",
    "backward_both",
    "backward_from_input",
    "backward_squared",
    "both",
    "check_out",
    "copy",
    "dtype_name",
    "fits",
    "forward",
    "forward_saving",
    "gradient",
    "mask_nbytes",
    "pieces_of_both",
    "place",
    "saved_nbytes",
    "sloped",
    "slopes_gradient",
    "squared",
    "uniform",
]

_Array = npt.NDArray[Any]
_T = TypeVar("_T")

_MANY = THREADED_BYTES // 8  # elements: fewer are never worth a helper
_WORTH = 1 << 20  # elements, of which a call counts for `_CALL` at least, before kernels are made
_CALL = 1 << 10


class _Member:
    """An activation's numbers as kernels read them: a record for each kind (`runtime.RECORD`)."""

    __slots__ = (*kernels.KINDS, "_due", "_lanes", "_structure", "ready")

    forward: _Array
    forward_saving: _Array
    backward: _Array
    backward_from_input: _Array

    def __init__(self, numbers: Rounded) -> None:
        self.ready = False
        self._due = _WORTH
        self._lanes = 512 // numbers.width
        self._structure = kernels.structure_of(numbers) if numbers.floating else None
        if self._structure is not None:
            start = runtime.RECORD["constants"]
            words = np.array(kernels.constants(numbers), f"u{numbers.width // 8}")
            for kind in kernels.KINDS:
                record = np.zeros(start + len(words), np.int64)
                record[runtime.RECORD["itemsize"]] = words.itemsize
                record[start:].view(words.dtype)[: len(words)] = words
                setattr(self, kind, record)

    def mask_bytes(self, size: int) -> int:
        """Return the bytes of a packed mask, of which a kernel takes a line's at a time."""
        return -(-size // self._lanes) * (self._lanes // 8)

    def prepare(self) -> bool:
        """Take up the kernels, if they are there."""
        if self._structure not in loader.addresses:
            return False
        for name, address in loader.addresses[self._structure].items():
            kind, _, form = name.rpartition("_")
            getattr(self, kind)[runtime.RECORD[form]] = address
        self.ready = True
        return True

    def by_numpy(self, size: int, function: Callable[..., _T], *arguments: Any) -> _T:
        """Let NumPy serve, and ask for the kernels if it has had enough to do for want of them."""
        result = function(*arguments)
        if not self.ready and self._structure is not None:
            self._due -= max(size, _CALL)
            if self._due <= 0:
                self._due = _WORTH
                loader.request(self._structure)
        return result


_member = functools.lru_cache(maxsize=1024)(_Member)


def forward(numbers: Rounded, x: _Array, out: _Array | None) -> _Array:
    """Return f(x). See `relu_xp.backends.Backend`."""
    member = _member(numbers)
    size = x.size
    if member.ready or member.prepare():
        if size >= _MANY and x.flags.forc:
            loader.muster()
        y = loader.call(member.forward, size, out, x)
        if y is not None:
            return y
    return member.by_numpy(size, _numpy.forward, numbers, x, out)


def forward_saving(
    numbers: Rounded, x: _Array, out: _Array | None, mask: _Array | None
) -> tuple[_Array, Mask]:
    """Return f(x) and the packed mask. See `relu_xp.backends.Backend`."""
    member = _member(numbers)
    size = x.size
    if member.ready or member.prepare():
        if size >= _MANY and x.flags.forc:
            loader.muster()
        nbytes = size if numbers.pieces == 3 else member.mask_bytes(size)
        data = buffer(nbytes) if mask is None else mask[:nbytes]
        if data.size == nbytes:  # else the caller's has no room for the last line
            y = loader.call(member.forward_saving, size, out, x, data)
            if y is not None:
                return y, Mask(data, x.shape, x.flags.fnc, numbers.pieces)
    return member.by_numpy(size, _numpy.forward_saving, numbers, x, out, mask)


def backward(numbers: Rounded, dy: _Array, saved: Mask, out: _Array | None) -> _Array:
    """Return f'(x) * dy from the mask. See `relu_xp.backends.Backend`."""
    member = _member(numbers)
    size = dy.size
    if (member.ready or member.prepare()) and dy.flags.fnc == saved.fortran:
        if size >= _MANY and dy.flags.forc:
            loader.muster()
        data = saved.data
        if saved.pieces == 2 and data.size < (needed := member.mask_bytes(size)):
            data = np.zeros(needed, np.uint8)  # NumPy made it, or a wider dtype of x
            data[: saved.data.size] = saved.data
        dx = loader.call(member.backward, size, out, dy, data)
        if dx is not None:
            return dx
    return member.by_numpy(size, _numpy.backward, numbers, dy, saved, out)


def backward_from_input(
    numbers: Rounded, slopes: Rounded, dy: _Array, x: _Array, out: _Array | None
) -> _Array:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    member = _member(numbers)
    size = dy.size
    if slopes is numbers and (member.ready or member.prepare()):
        if size >= _MANY and dy.flags.forc:
            loader.muster()
        dx = loader.call(member.backward_from_input, size, out, dy, x)
        if dx is not None:
            return dx
    return member.by_numpy(size, _numpy.backward_from_input, numbers, slopes, dy, x, out)


def fits(out: _Array, like: _Array, other: _Array) -> bool:
    """Tell whether `out` surely may take a result. See `relu_xp.backends.Backend`."""
    return type(out) is type(like) and loader.fits(out, like, other, out.nbytes)
