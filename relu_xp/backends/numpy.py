"""NumPy arrays without compiled kernels: the array-API code, and what NumPy needs added.

What is added: packed masks, the layout of results, typed numbers (NumPy would make float32 of a
bfloat16 array and a Python float), silence about NaN, and one choice between two NaN, which NumPy's
versions make differently. The bits are those of `relu_xp.backends.native`, but for what a processor
does in its flush-to-zero modes. Only plain ReLU is fast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from relu_xp.activation import Activation, Rounded
from relu_xp.backends import check_memory, doubled, drawn, generic
from relu_xp.mask import Mask, mask_nbytes, memory_order, pack, unpack

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

_PART = 1 << 16  # elements of the slopes' gradient that are summed by themselves
_ROW = 1 << 10  # elements that are summed side by side
_PLACE = ("numpy", None)


class _Namespace:
    """NumPy in the array API standard; loaded when it is needed, since that loads all of NumPy."""

    @staticmethod
    def where(condition: Any, x: Any, y: Any, /) -> Any:
        """Choose, without a promotion of Python numbers to bfloat16: NumPy 2.0 crashes there."""
        dtype = getattr(x, "dtype", None) or y.dtype
        return np.where(condition, np.asarray(x, dtype), np.asarray(y, dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.array_namespace(np.empty(0)), name)


generic.NAMESPACES.update(dict.fromkeys((np.ndarray, np.memmap), _Namespace()))


@functools.lru_cache(maxsize=1024)
def _typed(numbers: Rounded, dtype: np.dtype[Any]) -> Any:
    """Return the numbers as 0-d arrays of a dtype, for `relu_xp.backends.generic`."""
    names = ("threshold", "negative_slope", "positive_slope", "max_value")
    values = {name: getattr(numbers, name) for name in names}
    typed = {n: None if value is None else np.array(value, dtype) for n, value in values.items()}
    for name in ("zero_below", "self_above", "mirrored", "pieces"):
        typed[name] = getattr(numbers, name)
    return SimpleNamespace(**typed)


@functools.cache
def _maximum_obeys(dtype: np.dtype[Any]) -> bool:
    """Whether ``numpy.maximum(x, 0)`` is plain ReLU to the bit in a dtype, on this machine.

    So it is for integers, and for float32 and float64 on x86-64, where it is one instruction and a
    blend. Elsewhere a maximum may keep -0.0 or quiet a signalling NaN; nothing promises any of
    that, so it is tried once.
    """
    if dtype.kind in "iu":
        return True
    if dtype.kind != "f" or dtype.itemsize < 4:
        return False
    numbers = Rounded(Activation(), dtype.name)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sign = 1 << (numbers.width - 1)
    inf = numbers.infinity_bits
    positive = np.array([0, 1, inf >> 1, inf, inf + 1, sign - 1], unsigned)
    bits = np.tile(np.concatenate([positive, positive | unsigned.type(sign)]), 20)
    kept = (bits != 0) & ((bits < sign) | (bits > sign + inf))
    x, expected = bits.view(dtype), np.where(kept, bits, 0)
    parts = (np.s_[:], np.s_[::-1], np.s_[3::3], np.s_[:4], np.s_[4:8], np.s_[8:12])
    try:
        with np.errstate(all="raise"):
            return all(
                np.array_equal(np.maximum(x[p], dtype.type(0)).view(unsigned), expected[p])
                for p in parts
            )
    except FloatingPointError:
        return False


def forward(numbers: Rounded, x: _Array, out: _Array | None) -> _Array:
    """Return f(x). See `relu_xp.backends.Backend`."""
    if numbers.plain and _maximum_obeys(x.dtype):
        y = np.empty_like(x, subok=False) if out is None else out
        np.maximum(x, x.dtype.type(0), out=y)
        return y
    with np.errstate(all="ignore"):
        return _store(generic.forward(_typed(numbers, x.dtype), x, None), x, out)


def forward_saving(
    numbers: Rounded, x: _Array, out: _Array | None, mask: _Array | None
) -> tuple[_Array, Mask]:
    """Return f(x) and the packed mask. See `relu_xp.backends.Backend`."""
    axes = memory_order(x.shape, x.strides, x.itemsize)
    with np.errstate(all="ignore"):
        pieces = np.asarray(generic.branches(_typed(numbers, x.dtype), x))
    packed = pack(pieces, axes, numbers.pieces)
    if mask is None:
        mask = packed
    else:
        mask = mask[: packed.size]
        mask[...] = packed
    return forward(numbers, x, out), Mask(mask, axes)


def backward(numbers: Rounded, dy: _Array, saved: Mask, out: _Array | None) -> _Array:
    """Return f'(x) * dy from the mask. See `relu_xp.backends.Backend`."""
    pieces = unpack(saved, dy.shape, numbers.pieces)
    if numbers.pieces == 2:
        pieces = pieces.view(np.bool_)
    with np.errstate(all="ignore"):
        return _store(generic.backward(_typed(numbers, dy.dtype), dy, pieces, None), dy, out)


def backward_from_input(
    numbers: Rounded, slopes: Rounded, dy: _Array, x: _Array, out: _Array | None
) -> _Array:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    typed, typed_slopes = _typed(numbers, x.dtype), _typed(slopes, dy.dtype)
    with np.errstate(all="ignore"):
        return _store(generic.backward_from_input(typed, typed_slopes, dy, x, None), x, out)


def gradient(numbers: Rounded, x: _Array, out: _Array | None) -> _Array:
    """Return f'(x). See `relu_xp.backends.Backend`."""
    ones = np.broadcast_to(np.ones((), x.dtype), x.shape)
    return backward_from_input(numbers, numbers, ones, x, out)


def sloped(values: _Array | None, x: _Array | None, slopes: _Array, out: _Array | None) -> _Array:
    """Return f(x) or f'(x) * dy. See `relu_xp.backends.Backend`."""
    if values is None:
        values = np.broadcast_to(np.ones((), slopes.dtype), (slopes if x is None else x).shape)
    slopes = rounded(slopes, values.dtype)
    zero = np.zeros((), values.dtype)
    with np.errstate(all="ignore"):
        low = np.where(slopes == 0, zero, _product(slopes, values))
        lower = slopes != 1 if x is None else x <= 0
        return _store(np.where(lower, low, values), values, out)


def slopes_gradient(dy: _Array, x: _Array, slopes: _Array, out: _Array | None) -> _Array:
    """Return the gradient by the slopes. See `relu_xp.backends.Backend`.

    Parts of whole rows of the first axis are summed by themselves, and then added in turn: the same
    order as that of the compiled kernels.
    """
    axes = tuple(axis for axis, length in enumerate(slopes.shape) if length == 1)
    total: _Array = np.zeros(slopes.shape)
    if not x.ndim:
        dy, x, total = dy.reshape(1), x.reshape(1), total.reshape(1)
    step = max(1, len(x) * _PART // max(1, x.size))
    with np.errstate(all="ignore"):
        for start in range(0, len(x) if x.size else 0, step):
            part = slice(start, start + step)
            below = x[part] <= 0
            terms = np.where(below, x[part].astype(np.float64), 0) * np.where(
                below, dy[part].astype(np.float64), 0
            )
            to = total[part] if len(total) == len(x) else total
            to += _sum(np.ascontiguousarray(terms), axes)
    return store_sum(total.reshape(slopes.shape), slopes.dtype, out)


def squared(x: _Array, out: _Array | None) -> _Array:
    """Return relu(x)**2. See `relu_xp.backends.Backend`."""
    with np.errstate(all="ignore"):
        return _store(generic.squared(x, None), x, out)


def backward_squared(dy: _Array, x: _Array, out: _Array | None) -> _Array:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    wide = max(np.dtype(np.float32), x.dtype, dy.dtype, key=lambda dtype: dtype.itemsize)
    with np.errstate(all="ignore"):
        high = x.astype(wide)
        dx = rounded(_product(high + high, dy.astype(wide)), dy.dtype)
        return _store(np.where(x <= 0, np.zeros((), dy.dtype), dx), dy, out)


def both(x: _Array, axis: int, out: _Array | None) -> _Array:
    """Return relu(x) and relu(-x). See `relu_xp.backends.Backend`."""
    if out is None:
        out = np.empty(doubled(x.shape, axis), x.dtype)
    with np.errstate(all="ignore"):
        generic.both(x, axis, out)
    return out


def pieces_of_both(x: _Array) -> _Array:
    """Return which of both is above 0. See `relu_xp.backends.Backend`."""
    with np.errstate(all="ignore"):
        return _store(generic.pieces_of_both(x), x, None)


def backward_both(dy: _Array, pieces: _Array, axis: int, out: _Array | None) -> _Array:
    """Return the gradient of `both`. See `relu_xp.backends.Backend`."""
    with np.errstate(all="ignore"):
        return _store(generic.backward_both(dy, pieces, axis, None), pieces, out)


def uniform(rng: Any, lower: float, upper: float, x: _Array) -> Any:
    """Return random numbers. See `relu_xp.backends.Backend`."""
    return drawn(rng, lower, upper, x.shape, x.dtype.name)


def copy(x: _Array) -> _Array:
    """Return x in memory that nobody else writes. See `relu_xp.backends.Backend`."""
    return x.copy("K")


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the dtype's name; refuse a foreign byte order."""
    if not dtype.isnative:
        raise TypeError(
            f"byte-swapped dtype {dtype.str} is not supported; convert it first, "
            f"for example x.astype({dtype.name!r})"
        )
    if dtype.kind == "V" and not dtype.isbuiltin:  # whose name is that of a class of somebody's
        return "void"
    return dtype.name


def place(x: _Array) -> tuple[str, None]:
    """Return the library and device: all NumPy arrays share one."""
    return _PLACE


def fits(out: Any, like: _Array, other: _Array) -> bool:
    """Return False: beside what a call costs here, `check_out` costs nothing."""
    return False


def check_out(out: _Array, inputs: Sequence[_Array]) -> None:
    """Refuse an `out` that cannot be written, or that overlaps an input without being it."""
    if not out.flags.writeable:
        raise ValueError("is read-only; give an array that may be written")
    check_memory(out, inputs)


def saved_nbytes(saved: Mask) -> int:
    """Return the bytes of the mask."""
    return int(saved.data.nbytes)


def rounded(x: _Array, dtype: np.dtype[Any]) -> _Array:
    """Return an array in a dtype, silently: it may be beyond its range."""
    with np.errstate(all="ignore"):
        return x.astype(dtype, copy=False)


def store_sum(total: _Array, dtype: np.dtype[Any], out: _Array | None) -> _Array:
    """Return a sum in a dtype, where given in `out`; one NaN stands for all of them."""
    gradient = np.empty(total.shape, dtype) if out is None else out
    with np.errstate(all="ignore"):
        total[np.isnan(total)] = np.nan
        gradient[...] = total
    return gradient


def _store(y: Any, like: _Array, out: _Array | None) -> _Array:
    """Return a result in `out`, or in the layout of an array."""
    result: _Array = np.asarray(y)
    if out is None:
        if result.strides == like.strides and result.flags.owndata:
            return result
        out = np.empty_like(like, result.dtype, subok=False)
    out[...] = result
    return out


def _product(x: _Array, y: _Array) -> _Array:
    """Return x*y, or x where that is NaN: of two NaN, NumPy's versions take one or the other."""
    product: _Array = np.where(np.isnan(x), x, np.multiply(x, y))
    return product


def _sum(x: _Array, axes: Sequence[int]) -> _Array:
    """Return the sum of a C-contiguous array along axes, which are then of length 1.

    `numpy.sum` adds neighbours in an order that depends on its version. What it adds row by row,
    it adds in turn; neighbours are added in rows of `_ROW`, and those by halves.
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
        while (length := rest.shape[1]) > 1:
            half = length // 2
            rest[:, :half] += rest[:, length - half :]
            rest = rest[:, : length - half]
        x = rest.reshape(*outer, *[1] * (x.ndim - axis))
    return x
