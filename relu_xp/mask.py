"""What is kept between forward and backward: a packed mask, one bit an element.

The format, the same on every device:

- ``numpy.packbits(keep, bitorder="little")``: bit ``k`` is element ``k``, bit 1 means that the
  gradient takes the positive slope. Bit 0 means that it takes the negative slope, or is 0 at a
  ceiling. Padding bits are 0.
- Elements count in the order of memory where x is dense: C-contiguous, or so after a permutation of
  its axes. For every other x they count in C order.
- A ceiling together with a non-zero negative slope has three branches: one byte an element, 0 at or
  below the threshold, 1 above it, 2 at the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relu_xp.activation import Rounded

__all__ = ["Mask", "mask_nbytes", "memory_order", "pack", "unpack"]

Axes = tuple[int, ...]


class Mask(NamedTuple):
    """A packed mask, and the order in which it counts elements.

    Attributes
    ----------
    data : array of uint8, shape (n,)
        The bytes, in the library and on the device of the array that they speak of.
    axes : tuple of int or None
        The array's axes from the slowest in memory to the fastest; None for C order.
    """

    data: Any
    axes: Axes | None


def mask_nbytes(numbers: Rounded, x: Any) -> int:
    """Return the bytes of a mask for x. See `relu_xp.backends.Backend`."""
    size = int(x.size)
    return -(-size // 8) if numbers.pieces == 2 else size


def memory_order(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Axes | None:
    """Return the axes of a dense array from the slowest in memory to the fastest.

    Parameters
    ----------
    shape, strides : sequence of int
        Strides in bytes.
    itemsize : int
        Bytes of an element.

    Returns
    -------
    tuple of int or None
        None for a C-contiguous array, and for one that is not dense in memory: both count in C
        order.
    """
    # Axes of length 1 keep their position.
    long = [axis for axis, length in enumerate(shape) if length != 1]
    ordered = sorted(long, key=lambda axis: -strides[axis])
    if ordered == long or 0 in shape:
        return None
    expected = itemsize
    for axis in reversed(ordered):
        if strides[axis] != expected:
            return None
        expected *= shape[axis]
    places = iter(ordered)
    return tuple(axis if length == 1 else next(places) for axis, length in enumerate(shape))


def pack(pieces: npt.NDArray[Any], axes: Axes | None, count: int) -> npt.NDArray[np.uint8]:
    """Return a NumPy array of branches as the mask stores them.

    Parameters
    ----------
    pieces : ndarray of bool or uint8
        Of the shape of the array that they speak of.
    axes : tuple of int or None
        The order in which elements count, as in `Mask`.
    count : int
        2 or 3 branches.
    """
    ordered = pieces if axes is None else pieces.transpose(axes)
    return np.packbits(ordered, None, "little") if count == 2 else ordered.reshape(-1)


def unpack(mask: Mask, shape: tuple[int, ...], count: int) -> npt.NDArray[np.uint8]:
    """Return the branches of a NumPy mask, as 0, 1 or 2, for an array of a shape.

    Parameters
    ----------
    mask : Mask
    shape : tuple of int
    count : int
        2 or 3 branches.
    """
    size = math.prod(shape)
    flat = np.unpackbits(mask.data, None, size, "little") if count == 2 else mask.data[:size]
    if mask.axes is None:
        return flat.reshape(shape)
    ordered = flat.reshape([shape[axis] for axis in mask.axes])
    return ordered.transpose(np.argsort(mask.axes))
