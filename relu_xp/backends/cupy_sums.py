"""Sums in float64 for each channel, in an order that the shape alone fixes: no atomic operation.

Threads add up parts of a channel, and a second kernel adds their sums. What is summed, and by which
kernel, is the caller's: all of them deal the elements to the same sums, in the same order.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import cupy
import numpy as np

from relu_xp.backends.cupy_kernels import variant
from relu_xp.mask import Axes

__all__ = ["ChannelSums", "channel_sums"]

# Sums at most, where there are so many elements: with eight of them to a thread (float16) that is
# 32,768 threads with 64 bytes under way each, what a large GPU's memory needs; and 2 MiB.
_SUMS = 1 << 18
_TERMS = 8  # of a sum at least
_STEP = 8  # columns of a thread at most: the numbers of 16 bits that make 16 bytes
_WARP = 32
_AT_ONCE = 1024  # sums of a channel that one kernel adds up; more take two


class ChannelSums(NamedTuple):
    """How an array is summed, seen as outer x channels x inner elements.

    Element (row, channel, k) is part of sum (channel, row % rows, k % columns).

    Attributes
    ----------
    outer, channels, inner : int
    rows, columns : int
        They divide the terms evenly; `columns` is a multiple of 8 where that is possible.
    strides : tuple of int or None
        Of outer, channels and inner, in elements, for an array that is dense in memory; 0 where
        there is one index. None if there are no such strides.
    """

    outer: int
    channels: int
    inner: int
    rows: int
    columns: int
    strides: tuple[int, int, int] | None

    def empty(self) -> cupy.ndarray:
        """Return the memory of the sums."""
        return cupy.ndarray((self.channels, self.rows * self.columns), np.float64)

    def has_vectors(self, count: int) -> bool:
        """Return whether `count` elements side by side always belong to as many sums."""
        if self.strides is None:
            return False
        if self.strides[1] == 1:
            return self.channels % count == 0
        return self.strides[2] == 1 and self.inner % count == self.columns % count == 0

    def sum_strided(self, name: str, *arrays: cupy.ndarray) -> cupy.ndarray:
        """Return the sums by one of the kernels that take arrays of any layout."""
        sums = self.empty()
        variant(name)(*arrays, *self[:5], sums, size=sums.size)
        return sums

    def total(self, sums: cupy.ndarray, dtype: np.dtype[Any]) -> cupy.ndarray:
        """Return the sum of each channel, rounded to a dtype."""
        count = self.rows * self.columns
        if count > _AT_ONCE:
            groups = -(-count // (_AT_ONCE // 4))
            sums, count = _add_up(sums, count, groups, np.dtype(np.float64)), groups
        return _add_up(sums, count, 1, dtype).reshape(self.channels)


def _add_up(sums: cupy.ndarray, count: int, groups: int, dtype: np.dtype[Any]) -> cupy.ndarray:
    """Return the sums of each channel added up, `groups` sums of them left."""
    terms = -(-count // groups)
    lanes = min(_WARP, 1 << (-(-terms // 4) - 1).bit_length())
    totals = cupy.ndarray((len(sums), groups), dtype)
    variant("add_up")(sums, count, groups, lanes, totals, size=totals.size * lanes)
    return totals


@functools.lru_cache(maxsize=1024)
def channel_sums(
    shape: tuple[int, ...], first: int, last: int, axes: Axes | None = None
) -> ChannelSums:
    """Return how an array is summed whose axes from `first` to `last` number the channels.

    Parameters
    ----------
    shape : tuple of int
    first, last : int
        The last one is included.
    axes : tuple of int, optional
        The array's axes from the slowest in memory to the fastest; only the strides depend on it.
    """
    groups = (range(first), range(first, last + 1), range(last + 1, len(shape)))
    outer, channels, inner = (math.prod([shape[axis] for axis in group]) for group in groups)
    share = max(1, min(_SUMS // max(1, channels), outer * inner // _TERMS))  # sums of a channel
    step = _STEP if inner % _STEP == 0 and share >= _STEP else 1
    columns = step * _evenly(inner // step, share // step)
    rows = _evenly(outer, share // columns)
    strides = [0] * len(shape)
    stride = 1
    for axis in reversed(axes or range(len(shape))):
        strides[axis] = stride
        stride *= shape[axis]
    merged = []
    for group in groups:
        long = [axis for axis in group if shape[axis] != 1]
        if any(strides[a] != strides[b] * shape[b] for a, b in itertools.pairwise(long)):
            return ChannelSums(outer, channels, inner, rows, columns, None)
        merged.append(strides[long[-1]] if long else 0)
    return ChannelSums(outer, channels, inner, rows, columns, (merged[0], merged[1], merged[2]))


def _evenly(length: int, most: int) -> int:
    """Return into how many parts to deal a length: `most` or fewer, about equally long."""
    longest = -(-length // most)
    return -(-length // longest) if longest else 1
