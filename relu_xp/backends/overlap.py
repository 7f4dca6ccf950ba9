"""Whether arrays share memory, decided exactly and with bounded work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["address_view", "check_overlap"]

_Array = npt.NDArray[Any]

# Bound of NumPy's search for a shared byte: some 1 ms. Views made by slicing take 1 us.
_MAX_WORK: Any = 100_000  # an int; NumPy's annotations allow two values only


def address_view(
    address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> _Array:
    """Return a NumPy array with the addresses of another library's, whose elements are not read."""
    return np.asarray(_AddressView(address, shape, strides, itemsize))


class _AddressView:
    def __init__(
        self, address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{itemsize}",
            "data": (address, False),
            "shape": tuple(shape),
            "strides": tuple(strides),
        }


def check_overlap(out: _Array, inputs: Sequence[_Array]) -> None:
    """Refuse an `out` that shares memory with itself, or with an input that is not the same view.

    Parameters
    ----------
    out : ndarray
        This and the inputs may be views of addresses; no element is read.
    inputs : sequence of ndarray

    Raises
    ------
    ValueError
    """
    if not out.flags.forc and _overlaps_itself(out):
        raise ValueError("is a broadcast view, whose elements share memory; give an array")
    for x in inputs:
        if out is not x and _share_memory(out, x) and not _are_same_view(out, x):
            raise ValueError(
                "overlaps an input without being the same view; "
                "give an array that shares no memory with it"
            )


def _share_memory(left: _Array, right: _Array) -> bool:
    """Return whether two arrays have a byte in common; True where that takes too much work."""
    try:
        return np.shares_memory(left, right, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: _Array) -> bool:
    """Return whether two elements of an array share memory.

    Two such elements differ in their index along some axis. Both can be moved along it, by the same
    distance, until one of them is the first there: so the first is compared with all others.
    """
    parts = [array.swapaxes(0, axis) for axis in range(array.ndim)]
    return any(_share_memory(part[:1], part[1:]) for part in parts)


def _are_same_view(left: _Array, right: _Array) -> bool:
    return (
        left.ctypes.data == right.ctypes.data
        and (left.shape, left.itemsize) == (right.shape, right.itemsize)
        and _used_strides(left) == _used_strides(right)
    )


def _used_strides(array: _Array) -> list[int]:
    axes = zip(array.strides, array.shape, strict=True)
    return [stride for stride, length in axes if length != 1]
