"""The gradients of parameters, which are sums over the elements of NumPy arrays.

They are summed in float64, in an order that the shape alone decides, which is that of the compiled
kernels: kernels/gradient_sums.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["round_sum", "round_to", "sum_channels", "sum_weight_grad"]

_Array = npt.NDArray[Any]

_PART = 1 << 16  # elements of the weight's gradient that are summed by themselves
_ROW = 1 << 10  # elements that are summed side by side

# As in kernels/gradient_sums.cpp
_SHORT_LINE, _LANES = 512, 128
_ELEMENTS_PER_LANE, _PART_SIZE, _MAX_PARTS = 32, 1 << 15, 64


def round_to(x: _Array, dtype: np.dtype[Any]) -> _Array:
    """Return an array in a dtype, rounded once, silently: it may be beyond its range."""
    if x.dtype is dtype:
        return x
    with np.errstate(all="ignore"):
        if x.itemsize == 8 and dtype.kind == "V":
            # ml_dtypes rounds float64 to float32 on the way to bfloat16. What lies between two
            # numbers of float32 becomes the one whose last bit is 1, which is no tie of bfloat16.
            narrow = x.astype(np.float32)
            bits = narrow.view(np.uint32)
            bits -= abs(narrow) > abs(x)
            bits |= narrow != x
            x = narrow
        return x.astype(dtype, copy=False)


def round_sum(total: _Array, dtype: np.dtype[Any]) -> _Array:
    """Return a sum in a dtype; one NaN stands for all of them."""
    total[np.isnan(total)] = np.nan
    return round_to(total, dtype)


def sum_weight_grad(dy: _Array, x: _Array, shape: tuple[int, ...]) -> _Array:
    """Return the sum of x * dy where x is at or below 0, along the axes of length 1 in a shape.

    Parts of whole rows of the first axis are summed by themselves, and then added in turn.
    """
    axes = tuple(axis for axis, length in enumerate(shape) if length == 1)
    total: _Array = np.zeros(shape)
    if not x.ndim:
        dy, x, total = dy.reshape(1), x.reshape(1), total.reshape(1)
    step = max(1, len(x) * _PART // max(1, x.size))
    for start in range(0, len(x) if x.size else 0, step):
        part = slice(start, start + step)
        is_lower = x[part] <= 0
        terms = np.where(is_lower, x[part].astype(np.float64), 0) * np.where(
            is_lower, dy[part].astype(np.float64), 0
        )
        to = total[part] if len(total) == len(x) else total
        to += _sum(np.ascontiguousarray(terms), axes)
    return total.reshape(shape)


def sum_channels(dx: _Array, axis: int) -> _Array:
    """Return the sum along all axes but one.

    The array is outer x channels x inner elements. A line of it is one of the outer rows, or
    several of them if they are short; some lines in turn are a part. The elements of a channel are
    added to several lanes, in turn, in all lines of a part. Then the lanes of a channel are added
    to one sum, and the sums of all parts in turn.
    """
    outer, channels = math.prod(dx.shape[:axis]), dx.shape[axis]
    total: _Array = np.zeros(channels)
    if dx.size == 0:
        return total
    inner = dx.size // outer // channels
    dx = dx.reshape(outer, channels, inner)
    rows = max(1, min(_SHORT_LINE // (channels * inner), outer))  # of a line
    lines = -(-outer // rows)
    lanes = inner if rows > 1 else min(inner, _LANES)
    most = lines * inner // (_ELEMENTS_PER_LANE * lanes)
    parts = max(1, min(dx.size // _PART_SIZE, most, _MAX_PARTS))
    step = rows * -(-lines // parts)
    for start in range(0, outer, step):
        part = dx[start : start + step]
        padded = np.zeros((-(-len(part) // rows) * rows, channels, -(-inner // lanes) * lanes))
        padded[: len(part), :, :inner] = part
        pieces = padded.reshape(-1, rows * channels, padded.shape[2] // lanes, lanes).swapaxes(1, 2)
        sums = np.add.reduce(pieces.reshape(-1, rows * channels * lanes), 0)
        total += _fold(_fold(sums.reshape(rows, -1)).reshape(channels, lanes).T)
    return total


def _sum(x: _Array, axes: Sequence[int]) -> _Array:
    """Return the sum of a C-contiguous array along axes, which are then of length 1.

    `numpy.sum` adds the elements of a row in an order that depends on its version, and whole rows
    one after the other. So a long row is cut into rows of `_ROW` elements, which are added; then
    the halves of the remaining row are added until one element is left.
    """
    for axis in axes:
        *outer, length = x.shape[: axis + 1]
        if x.size > math.prod(outer) * length:
            x = np.add.reduce(x, axis, keepdims=True)
            continue
        rest = x.reshape(-1, length)
        if length > 2 * _ROW:
            whole = length // _ROW * _ROW
            rows, rest = rest[:, :whole].reshape(-1, whole // _ROW, _ROW), rest[:, whole:]
            total = np.add.reduce(rows, 1)
            total[:, : rest.shape[1]] += rest
            rest = total
        x = _fold(rest.T).reshape(*outer, *[1] * (x.ndim - axis))
    return x


def _fold(rows: _Array) -> _Array:
    """Return the sum of rows, which are overwritten: the last ones are added to the first ones."""
    while (count := len(rows)) > 1:
        half = count // 2
        rows[:half] += rows[count - half :]
        rows = rows[: count - half]
    total: _Array = rows[0]
    return total
