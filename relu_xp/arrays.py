"""Arrays of any library: to NumPy and back, and their halves along an axis."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import array_api_compat
import numpy as np
import numpy.typing as npt

__all__ = ["concatenated_shape", "from_numpy", "portable", "split", "to_numpy"]

_HOST = (1, 3)  # of the DLPack standard: memory of the CPU, and such memory that CUDA has pinned


def to_numpy(x: Any) -> npt.NDArray[Any]:
    """Return an array's values on the host, with its dtype; the memory may be the array's own.

    Parameters
    ----------
    x : array, any library

    Returns
    -------
    ndarray, shape and dtype of `x`
        It is not to be written: NumPy before 2.2.5 makes it read-only.

    Raises
    ------
    TypeError
        If the array or its dtype cannot be converted.
    """
    if hasattr(x, "detach"):  # a PyTorch tensor, which autograd may record
        x = x.detach()
    try:
        return np.from_dlpack(x)
    except Exception:  # no DLPack, a dtype that it does not know, or another device
        pass
    try:
        host = np.asarray(x)
    except Exception:  # for example CuPy, which copies to the host only on request
        host = np.asarray(array_api_compat.to_device(x, "cpu"))
    if host.dtype.hasobject:
        raise TypeError(f"{type(x).__name__} does not become a NumPy array")
    return host


def from_numpy(host: npt.NDArray[Any], like: Any) -> Any:
    """Return a copy of a NumPy array, in the library and on the device of `like`."""
    xp = array_api_compat.array_namespace(like)
    return xp.asarray(host.copy(), device=array_api_compat.device(like))


def concatenated_shape(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """Return a shape of twice the length along an axis (not negative)."""
    return tuple(n * (1 + (i == axis)) for i, n in enumerate(shape))


def split(y: Any, axis: int) -> tuple[Any, Any]:
    """Return the halves of an array along an axis (not negative), as views if possible."""
    middle = y.shape[axis] // 2
    before = (slice(None),) * axis
    return y[(*before, slice(None, middle), ...)], y[(*before, slice(middle, None), ...)]


def portable(arrays: Any) -> Any:
    """Return a list for a pickle that a machine without a GPU can load.

    An array on a GPU becomes a NumPy array, a single one if it is in several lists. Everything else
    stays the object that it is, so that a pickle knows that it is the same as elsewhere.

    Parameters
    ----------
    arrays : list
        Anything else is returned as it is.
    """
    if not isinstance(arrays, list):
        return arrays
    replaced = [_HostCopy.of(array) if _on_a_gpu(array) else array for array in arrays]
    return arrays if all(map(operator.is_, replaced, arrays)) else replaced


def _on_a_gpu(array: Any) -> bool:
    try:
        return array.__dlpack_device__()[0] not in _HOST
    except Exception:  # no array, or one without memory of its own
        return False


class _HostCopy:
    """An array that is pickled as a NumPy array."""

    _known: ClassVar[WeakValueDictionary[int, _HostCopy]] = WeakValueDictionary()

    def __init__(self, array: Any) -> None:
        self._array = array

    @classmethod
    def of(cls, array: Any) -> _HostCopy:
        """Return the same object for the same array, as long as it is in use."""
        known = cls._known.get(id(array))
        if known is None:
            known = cls._known[id(array)] = cls(array)
        return known

    def __reduce__(self) -> tuple[Any, ...]:
        array = self._array
        try:
            host = to_numpy(array)
        except TypeError:  # PyTorch's bfloat16, of which NumPy knows nothing
            xp = array_api_compat.array_namespace(array)
            host = to_numpy(xp.astype(array, xp.float32))
        return np.array, (host,)  # which can be written, and owns its memory
