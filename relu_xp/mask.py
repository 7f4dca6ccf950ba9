"""What is kept between forward and backward: a mask of ours, one bit an element.

The format, the same on every device, so that each side can test the other:

- ``numpy.packbits(keep, bitorder="little")``: bit ``k`` is element ``k``, bit 1 means "the upper
  piece": the gradient takes the positive slope. Bit 0 means that it takes the negative slope, or
  is 0 at a ceiling. Padding bits are 0. The buffer may be up to 7 bytes longer than needed.
- Elements count in C order; for an x that is Fortran- but not C-contiguous, in Fortran order.
- A ceiling together with a non-zero negative slope has three pieces: one byte an element, 0 below
  the knee, 1 above it, 2 at the ceiling.
"""

from __future__ import annotations

import collections
import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from relu_xp.activation import Rounded

__all__ = ["Mask", "buffer", "mask_nbytes", "pack", "pack_part", "shaped", "unpack", "unpack_part"]

_LARGE = 1 << 17  # bytes, from which on malloc gives memory back at once
_SPARE_MOST = 1 << 26  # bytes kept for masks to come

_spare: collections.deque[npt.NDArray[np.uint8]] = collections.deque()


class Mask:
    """A packed mask and what it takes to read it.

    Parameters
    ----------
    data : array of uint8, shape (n,)
        The bytes, in the library and on the device of the array that they speak of.
    shape : tuple of int
        Shape of that array.
    fortran : bool
        Whether elements count in Fortran order.
    pieces : int
        2 for one bit an element, 3 for one byte an element.
    """

    __slots__ = ("data", "fortran", "pieces", "shape")

    def __init__(self, data: Any, shape: tuple[int, ...], fortran: bool, pieces: int) -> None:
        self.data = data
        self.shape = shape
        self.fortran = fortran
        self.pieces = pieces

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.data.nbytes)


def mask_nbytes(numbers: Rounded, x: Any) -> int:
    """Return the bytes of a mask for x. See `relu_xp.backends.Backend`."""
    size = int(x.size)
    return -(-size // 8) if numbers.pieces == 2 else size


def buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return memory for a NumPy mask, to be filled.

    That of a large mask is kept when the mask is gone, for the next of its size, as a training step
    follows the other: fresh pages cost a forward pass a fifth of its time.
    """
    if nbytes < _LARGE:
        return np.empty(nbytes, np.uint8)
    for _ in range(len(_spare)):
        try:
            memory = _spare.popleft()
        except IndexError:  # another thread took the last
            break
        if memory.size == nbytes:
            return _lend(memory)
        _spare.append(memory)
    _spare.clear()  # sizes have changed
    return _lend(np.empty(nbytes, np.uint8))


def _lend(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a view; when it and its own views are gone, the memory goes back."""
    view = np.frombuffer(memory.data, np.uint8)  # views of `memory[:]` would not keep it
    weakref.finalize(view, _take_back, memory).atexit = False
    return view


def _take_back(memory: npt.NDArray[np.uint8]) -> None:
    if memory.size + sum(other.size for other in _spare.copy()) <= _SPARE_MOST:
        _spare.append(memory)


def pack(pieces: npt.NDArray[Any], fortran: bool, count: int) -> npt.NDArray[np.uint8]:
    """Return pieces as the mask stores them, in NumPy.

    Parameters
    ----------
    pieces : ndarray of bool or uint8
        1-D in the mask's order, or of the array's shape.
    fortran : bool
        Whether the mask's elements count in Fortran order.
    count : int
        2 or 3 pieces.
    """
    ordered = pieces.T if fortran else pieces
    return np.packbits(ordered, None, "little") if count == 2 else ordered.reshape(-1)


def pack_part(mask: Mask, part: slice | None, pieces: npt.NDArray[Any]) -> None:
    """Fill in some pieces of a NumPy mask, or all of them; they start at a multiple of 8."""
    if part is None:
        mask.data[...] = pack(pieces, mask.fortran, mask.pieces)
    elif mask.pieces == 3:
        mask.data[part] = pieces
    else:
        mask.data[part.start // 8 : -(-part.stop // 8)] = pack(pieces, False, 2)


def unpack(mask: Mask) -> npt.NDArray[np.uint8]:
    """Return the pieces of a NumPy mask, as 0, 1 or 2, in its array's shape."""
    return shaped(unpack_part(mask, slice(0, math.prod(mask.shape))), mask)


def unpack_part(mask: Mask, part: slice) -> npt.NDArray[np.uint8]:
    """Return some pieces of a NumPy mask, 1-D in its order; they start at a multiple of 8."""
    if mask.pieces == 3:
        return mask.data[part]  # type: ignore[no-any-return]
    return np.unpackbits(mask.data[part.start // 8 :], None, part.stop - part.start, "little")


def shaped(flat: npt.NDArray[Any], mask: Mask) -> npt.NDArray[Any]:
    """Return 1-D elements in a mask's order as an array of its shape; a view."""
    return flat.reshape(mask.shape[::-1]).T if mask.fortran else flat.reshape(mask.shape)
