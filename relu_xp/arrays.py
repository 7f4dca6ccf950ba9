"""Conversion of any library's arrays to NumPy, and back."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

__all__ = ["from_numpy", "to_numpy"]


def to_numpy(x: Any) -> npt.NDArray[Any]:
    """Return an array's values on the host, with its dtype; the memory may be the array's own.

    Parameters
    ----------
    x : array, any library

    Returns
    -------
    ndarray, shape and dtype of `x`

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
