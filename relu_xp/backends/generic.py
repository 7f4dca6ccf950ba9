"""The specification, in the standard array API alone: serves every library without its own backend.

Nothing here looks at a value from Python, writes an array or forces a lazy one, so that tracing
(JAX, ``torch.compile``) and automatic differentiation go through. The numbers are Python scalars
that the dtype holds exactly, which the standard combines with an array without changing its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import array_api_compat
import numpy as np

from relu_xp.activation import Rounded
from relu_xp.backends import address_view, check_memory, drawn, halves

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

# By class, of those that a backend has noted: ``torch.compile`` warns of the cache that finds them.
NAMESPACES: dict[type, Any] = {}


def forward(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f(x). See `relu_xp.backends.Backend`."""
    xp = _namespace(x)
    lower, low = x <= numbers.threshold, _low(numbers, x)
    if numbers.zero_below and numbers.mirrored:
        x = xp.where(lower, low, x)  # in its derivative the last: it makes +0 of a dead unit's -0.0
    high = _high(numbers, x)
    if numbers.max_value is not None:
        high = xp.where(high >= numbers.max_value, numbers.max_value, high)
    return _store(xp.where(lower, low, high), out)


def forward_saving(numbers: Rounded, x: Any, out: Any, mask: Any) -> tuple[Any, Any]:
    """Return f(x) and the pieces: bool, or 0, 1, 2 in uint8 where there are three."""
    pieces = branches(numbers, x)  # first: out may be x
    return forward(numbers, x, out), pieces


def backward(numbers: Rounded, dy: Any, saved: Any, out: Any) -> Any:
    """Return f'(x) * dy from the pieces. See `relu_xp.backends.Backend`."""
    xp = _namespace(dy)
    high, low = _high(numbers, dy), _low(numbers, dy)
    upper = saved
    if numbers.pieces == 3:
        upper = saved == 1
        if not numbers.zero_below:  # else it is 0 already, and a scalar
            low = xp.where(saved == 2, 0, low)
    return _store(xp.where(upper, high, low), out)


def backward_from_input(numbers: Rounded, slopes: Rounded, dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return backward(slopes, dy, branches(numbers, x), out)


def gradient(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f'(x). See `relu_xp.backends.Backend`."""
    ones = _namespace(x).ones_like(x)
    return backward_from_input(numbers, numbers, ones, x, out)


def sloped(values: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return f(x) or f'(x) * dy. See `relu_xp.backends.Backend`.

    What a slope is multiplied by is chosen first: through a product of all, automatic
    differentiation would let a NaN above 0 into the slope's own gradient. That is why a slope of 0
    is multiplied too, and +0 then made by a sum.
    """
    xp = _namespace(slopes)
    if values is None:
        values = xp.ones_like(slopes)
    slopes = xp.astype(slopes, values.dtype, copy=False)
    low = values if x is None else xp.where(x <= 0, values, 0)
    nothing = slopes == 0
    product = xp.where(nothing & ~xp.isfinite(low), 0, low) * slopes
    zero = xp.astype(product != 0, product.dtype)  # a constant 0 a compiler would leave out
    product = xp.where(nothing, product + zero, product)
    lower = slopes != 1 if x is None else x <= 0
    return _store(xp.where(lower, product, values), out)


def slopes_gradient(dy: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return the gradient by the slopes. See `relu_xp.backends.Backend`."""
    xp = _namespace(x)
    wide = xp.__array_namespace_info__().dtypes().get("float64", xp.float32)
    terms = xp.astype(xp.where(x <= 0, x, 0), wide) * xp.astype(xp.where(x <= 0, dy, 0), wide)
    axes = tuple(axis for axis, length in enumerate(slopes.shape) if length == 1)
    if axes:
        terms = xp.sum(terms, axis=axes, keepdims=True)
    return _store(xp.astype(terms, slopes.dtype), out)


def squared(x: Any, out: Any) -> Any:
    """Return relu(x)**2. See `relu_xp.backends.Backend`."""
    high = _namespace(x).where(x <= 0, 0, x)
    return _store(high * high, out)


def backward_squared(dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    xp = _namespace(x)
    wide = max((xp.float32, x.dtype, dy.dtype), key=lambda dtype: xp.finfo(dtype).bits)
    high = xp.astype(x, wide)
    dx = xp.astype((high + high) * xp.astype(dy, wide), dy.dtype)
    return _store(xp.where(x <= 0, 0, dx), out)


def both(x: Any, axis: int, out: Any) -> Any:
    """Return relu(x) and relu(-x). See `relu_xp.backends.Backend`."""
    xp = _namespace(x)
    pair = xp.where(x <= 0, 0, x), xp.where(x >= 0, 0, -x)
    return _store(xp.concat(pair, axis=axis), out)


def pieces_of_both(x: Any) -> Any:
    """Return which of both is above 0. See `relu_xp.backends.Backend`."""
    xp = _namespace(x)
    return xp.astype(~(x <= 0), xp.uint8) + 2 * xp.astype(~(x >= 0), xp.uint8)


def backward_both(dy: Any, pieces: Any, axis: int, out: Any) -> Any:
    """Return the gradient of `both`. See `relu_xp.backends.Backend`."""
    xp = _namespace(dy)
    first, second = halves(dy, axis)
    difference = xp.where(pieces == 3, first - second, 0)
    dx = xp.where(pieces == 1, first, xp.where(pieces == 2, -second, difference))
    return _store(dx, out)


def uniform(rng: Any, lower: float, upper: float, x: Any) -> Any:
    """Return random numbers. See `relu_xp.backends.Backend`."""
    numbers = drawn(rng, lower, upper, tuple(x.shape), dtype_name(x.dtype))
    if not isinstance(numbers, np.ndarray):
        return numbers
    return _namespace(x).asarray(numbers, device=place(x)[1])


def copy(x: Any) -> Any:
    """Return x in memory that nobody else writes. See `relu_xp.backends.Backend`."""
    if not array_api_compat.is_writeable_array(x):
        return x
    return _namespace(x).asarray(x, copy=True)


def dtype_name(dtype: Any) -> str:
    """Return the dtype's name, without its library's."""
    return str(dtype).rpartition(".")[2]


def place(x: Any) -> tuple[str, Hashable]:
    """Return the library and device.

    JAX settles devices itself: an array of its may be spread over several, and one that is being
    traced has none.
    """
    library = array_api_compat.array_namespace(x, use_compat=False).__name__.partition(".")[0]
    device = None if library == "jax" else array_api_compat.device(x)
    return library, device


def fits(out: Any, like: Any, other: Any) -> bool:
    """Return False: beside what a call costs here, `check_out` costs nothing."""
    return False


def check_out(out: Any, inputs: Sequence[Any]) -> None:
    """Refuse an `out` that cannot be written, or that overlaps an input without being it."""
    if not array_api_compat.is_writeable_array(out):
        raise TypeError(
            "cannot be written: its library's arrays are immutable; leave out= or inplace= away"
        )
    seen = _memory(out)
    if seen is not None:
        others = [_memory(x) for x in inputs if x is not out]
        check_memory(seen, [other for other in others if other is not None])


def mask_nbytes(numbers: Rounded, x: Any) -> None:
    """Return None: what is saved is an array of bool, made by the library."""


def saved_nbytes(saved: Any) -> int:
    """Return the bytes of the pieces, one an element."""
    return math.prod(saved.shape)


def _namespace(x: Any) -> Any:
    return NAMESPACES.get(type(x)) or array_api_compat.array_namespace(x)


def _high(numbers: Rounded, x: Any) -> Any:
    return x if numbers.self_above else x * numbers.positive_slope


def _low(numbers: Rounded, x: Any) -> Any:
    if numbers.zero_below:
        return 0
    return x * numbers.negative_slope


def branches(numbers: Rounded, x: Any) -> Any:
    """Return the pieces: bool, or 0, 1, 2 in uint8 where there are three."""
    xp = _namespace(x)
    upper = ~(x <= numbers.threshold)  # not x > t: that is false for NaN
    if numbers.max_value is None:
        return upper
    ceiling = _high(numbers, x) >= numbers.max_value
    if numbers.pieces == 2:
        return upper & ~ceiling
    return xp.astype(upper, xp.uint8) + xp.astype(upper & ceiling, xp.uint8)


def _store(y: Any, out: Any) -> Any:
    if out is None:
        return y
    try:
        out[...] = y
    except (RuntimeError, ValueError) as error:  # a leaf that requires a gradient, say
        raise ValueError(f"out cannot be written: {error}") from error
    return out


def _memory(x: Any) -> np.ndarray[Any, Any] | None:
    """Return a NumPy array with x's addresses, or None if they cannot be known.

    PyTorch is asked for a pointer: it exports neither bfloat16 nor what requires a gradient.
    """
    try:
        if hasattr(x, "data_ptr"):
            size = x.element_size()
            return address_view(x.data_ptr(), x.shape, [size * s for s in x.stride()], size)
        return np.from_dlpack(x)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        return None  # being traced, or on another device; the caller is trusted
