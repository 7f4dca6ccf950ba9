"""The packed mask that is kept between forward and backward: one bit per element.

The format, the same on every device:

- ``numpy.packbits(keep, bitorder="little")``: bit ``k`` is element ``k``, bit 1 means that the
  gradient takes the positive slope. Bit 0 means that it takes the negative slope, or is 0 at a
  ceiling. Padding bits are 0.
- Elements are numbered in memory order where x is dense: C-contiguous, maybe after a permutation of
  its axes. For every other x they are numbered in C order.
- A ceiling together with a non-zero negative slope has three branches: one byte per element, 0 at
  or below the threshold, 1 above it, 2 at the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relu_xp.parameters import CastParameters

__all__ = ["Mask", "is_broadcast", "mask_nbytes", "memory_order", "new_like", "pack", "unpack"]

Axes = tuple[int, ...]


class Mask(NamedTuple):
    """A packed mask, and the order of the elements in it.

    Attributes
    ----------
    data : array of uint8, shape (n,)
        The bytes, in the library and on the device of the array that was masked.
    axes : tuple of int or None
        That array's axes from the slowest in memory to the fastest; None for C order.
    """

    data: Any
    axes: Axes | None


def mask_nbytes(params: CastParameters, x: Any) -> int:
    """Return the bytes of a mask for x."""
    size = int(x.size)
    return -(-size // 8) if params.num_branches == 2 else size


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
        None for a C-contiguous array, and for one that is not dense in memory: the elements of both
        are numbered in C order.
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
    in_memory = iter(ordered)
    return tuple(axis if length == 1 else next(in_memory) for axis, length in enumerate(shape))


def is_broadcast(x: Any) -> bool:
    """Return whether elements share memory, as in a view that broadcasting has made.

    The strides of such an array are no layout for a result.
    """
    return 0 in x.strides and any(
        stride == 0 and length > 1 for stride, length in zip(x.strides, x.shape, strict=True)
    )


def new_like(xp: Any, dtype: Any, *arrays: Any, axes: Axes | None = None) -> Any:
    """Return an empty array in the layout of the first array that is not a broadcast view.

    Without one it is in C order after a permutation of the axes.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    dtype : dtype
    *arrays : array
        Of one shape.
    axes : tuple of int, optional
        The axes from the slowest in memory to the fastest.
    """
    for array in arrays:
        if array.flags.c_contiguous:
            return xp.ndarray(array.shape, dtype)
        if not is_broadcast(array):
            return xp.empty_like(array, dtype)
    shape = arrays[0].shape
    if axes is None:
        return xp.ndarray(shape, dtype)
    empty = xp.ndarray([shape[axis] for axis in axes], dtype)
    return empty.transpose([axes.index(axis) for axis in range(len(axes))])


def pack(codes: npt.NDArray[Any], axes: Axes | None, num_branches: int) -> npt.NDArray[np.uint8]:
    """Return branch codes as the mask stores them.

    Parameters
    ----------
    codes : ndarray of bool or uint8
        Of the shape of the array that was masked.
    axes : tuple of int or None
        The order of the elements, as in `Mask`.
    num_branches : int
        2 or 3.
    """
    ordered = codes if axes is None else codes.transpose(axes)
    return np.packbits(ordered, None, "little") if num_branches == 2 else ordered.reshape(-1)


def unpack(mask: Mask, shape: tuple[int, ...], num_branches: int) -> npt.NDArray[Any]:
    """Return the branch codes of a NumPy mask: bool for two branches, else 0, 1 or 2 in uint8.

    Parameters
    ----------
    mask : Mask
    shape : tuple of int
        Of the array that was masked.
    num_branches : int
        2 or 3.
    """
    size = math.prod(shape)
    if num_branches == 2:
        flat = np.unpackbits(mask.data, None, size, "little").view(np.bool_)
    else:
        flat = mask.data[:size]
    if mask.axes is None:
        return flat.reshape(shape)
    ordered = flat.reshape([shape[axis] for axis in mask.axes])
    return ordered.transpose(np.argsort(mask.axes))
