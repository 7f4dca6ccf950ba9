"""NumPy arrays with the compiled kernels (`relu_xp.kernels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from relu_xp.activation import ONE, ZERO, Rounded, activation_of
from relu_xp.backends import doubled, halves
from relu_xp.backends.numpy import (
    check_out,
    copy,
    dtype_name,
    mask_nbytes,
    place,
    rounded,
    saved_nbytes,
    store_sum,
    uniform,
)
from relu_xp.kernels import _cpu as cpu
from relu_xp.mask import Mask

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

_RELU = activation_of(ZERO, ZERO, ONE, None)


def forward(numbers: Rounded, x: _Array, out: _Array | None) -> _Array:
    """Return f(x). See `relu_xp.backends.Backend`."""
    return cpu.forward(numbers.record, x, out)


def forward_saving(
    numbers: Rounded, x: _Array, out: _Array | None, mask: _Array | None
) -> tuple[_Array, Mask]:
    """Return f(x) and the packed mask. See `relu_xp.backends.Backend`."""
    if mask is not None:
        mask = mask[: mask_nbytes(numbers, x)]
    return cpu.forward_with_mask(numbers.record, x, out, mask)


def backward(numbers: Rounded, dy: _Array, saved: Mask, out: _Array | None) -> _Array:
    """Return f'(x) * dy from the mask. See `relu_xp.backends.Backend`."""
    return cpu.backward(numbers.record, dy, *saved, out)


def backward_from_input(
    numbers: Rounded, slopes: Rounded, dy: _Array, x: _Array, out: _Array | None
) -> _Array:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return cpu.backward_from_input(numbers.record, slopes.record, dy, x, out)


def gradient(numbers: Rounded, x: _Array, out: _Array | None) -> _Array:
    """Return f'(x). See `relu_xp.backends.Backend`."""
    return cpu.backward_from_input(numbers.record, numbers.record, None, x, out)


def sloped(values: _Array | None, x: _Array | None, slopes: _Array, out: _Array | None) -> _Array:
    """Return f(x) or f'(x) * dy. See `relu_xp.backends.Backend`."""
    return cpu.prelu(values, x, slopes if values is None else rounded(slopes, values.dtype), out)


def slopes_gradient(dy: _Array, x: _Array, slopes: _Array, out: _Array | None) -> _Array:
    """Return the gradient by the slopes. See `relu_xp.backends.Backend`."""
    return store_sum(cpu.slopes_gradient(dy, x, slopes.shape), slopes.dtype, out)


def squared(x: _Array, out: _Array | None) -> _Array:
    """Return relu(x)**2. See `relu_xp.backends.Backend`."""
    return cpu.squared_relu(x, out)


def backward_squared(dy: _Array, x: _Array, out: _Array | None) -> _Array:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    if x.dtype == dy.dtype:
        return cpu.squared_relu_backward(x, dy, out)
    wide = max(np.dtype(np.float32), x.dtype, dy.dtype, key=lambda dtype: dtype.itemsize)
    dx = cpu.squared_relu_backward(rounded(x, wide), rounded(dy, wide), None)
    if out is None:
        return rounded(dx, dy.dtype)
    with np.errstate(all="ignore"):
        out[...] = dx
    return out


def fits(out: Any, like: _Array, other: _Array) -> bool:
    """Whether `out` certainly may take a result. See `relu_xp.backends.Backend`."""
    return cpu.fits(out, like, other)


def both(x: _Array, axis: int, out: _Array | None) -> _Array:
    """Return relu(x) and relu(-x). See `relu_xp.backends.Backend`."""
    if out is None:
        out = np.empty(doubled(x.shape, axis), x.dtype)
    positive, negative = halves(out, axis)
    cpu.forward(_RELU.round_to(x.dtype.name).record, x, positive)
    cpu.negated_relu(x, negative)
    return out


def pieces_of_both(x: _Array) -> _Array:
    """Return which of both is above 0. See `relu_xp.backends.Backend`."""
    return cpu.crelu_branches(x, None)


def backward_both(dy: _Array, pieces: _Array, axis: int, out: _Array | None) -> _Array:
    """Return the gradient of `both`. See `relu_xp.backends.Backend`."""
    return cpu.crelu_backward(*halves(dy, axis), pieces, out)
