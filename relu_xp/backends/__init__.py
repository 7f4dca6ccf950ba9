"""What a backend is: a module with these functions, same names and signatures in each.

The arrays decide which backend serves (`relu_xp.dispatch`). By the time that one is called,
`relu_xp.functional` has checked that the arrays come from its library and agree in device, shape
and dtype, and has rounded the activation's numbers to the dtype (rule N1). What is left to the
backend is the truth table.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from relu_xp.activation import Rounded

__all__ = ["Backend", "address_view", "check_memory", "doubled", "drawn", "halves"]


class Backend(Protocol):
    """The functions of a backend module.

    ``out`` is None, or an array that `check_out` has let pass: write the result there and return
    that very array. Otherwise return a fresh one, in the layout of x, or of dy where there is no x,
    if the library has layouts. No argument but ``out`` is ever written.
    """

    def forward(self, numbers: Rounded, x: Any, out: Any) -> Any:
        """Return f(x); `x` may have an integer dtype."""

    def forward_saving(self, numbers: Rounded, x: Any, out: Any, mask: Any) -> tuple[Any, Any]:
        """Return f(x) and what `backward` needs, which must share no memory with x or f(x).

        `mask` is None, or a 1-D contiguous array of uint8 to keep that in, of at least as many
        elements as `mask_nbytes` says.
        """

    def backward(self, numbers: Rounded, dy: Any, saved: Any, out: Any) -> Any:
        """Return f'(x) * dy from what was saved; `numbers` are rounded to the dtype of `dy`."""

    def backward_from_input(
        self, numbers: Rounded, slopes: Rounded, dy: Any, x: Any, out: Any
    ) -> Any:
        """Return f'(x) * dy.

        `numbers` are rounded to the dtype of `x` and choose the piece; `slopes` are the same
        numbers rounded to the dtype of `dy`.
        """

    def gradient(self, numbers: Rounded, x: Any, out: Any) -> Any:
        """Return f'(x), that is f'(x) * dy for a dy of ones like `x`."""

    # What members need that four numbers do not describe (`relu_xp.variants`); their arrays have
    # floating dtypes. Each compares x with 0 as plain ReLU does: NaN lies above.

    def sloped(self, values: Any, x: Any, slopes: Any, out: Any) -> Any:
        """Return `values` where x is above 0, and ``slopes * values`` elsewhere.

        So f(x) with x for `values`, and f'(x) * dy with dy. A slope of 0 makes exactly +0. `slopes`
        may have axes of length 1 where x is longer, and are first rounded to the dtype of `values`.
        `values` of None stand for ones in the dtype of `slopes`. With x of None all are multiplied,
        but for a slope of 1, which returns the very value: `slopes` are then f'(x), as saved.
        """

    def slopes_gradient(self, dy: Any, x: Any, slopes: Any, out: Any) -> Any:
        """Return the sum of ``x * dy`` over what is at or below 0, in shape and dtype of `slopes`.

        Summed in float64 where the library has it; the same inputs give the same bits.
        """

    def squared(self, x: Any, out: Any) -> Any:
        """Return ``x**2`` where x is above 0, +0 elsewhere."""

    def backward_squared(self, dy: Any, x: Any, out: Any) -> Any:
        """Return ``2 * x * dy`` where x is above 0, +0 elsewhere.

        Multiplied in the wider of both dtypes, float32 at least, and rounded to that of `dy`.
        """

    def both(self, x: Any, axis: int, out: Any) -> Any:
        """Return ``relu(x)`` and ``relu(-x)``, concatenated along an axis."""

    def pieces_of_both(self, x: Any) -> Any:
        """Return in uint8: 1 where x is above 0, 2 where -x is, 3 where both are (NaN), else 0."""

    def backward_both(self, dy: Any, pieces: Any, axis: int, out: Any) -> Any:
        """Return the gradient of `both`, from `pieces_of_both`.

        Of the halves of `dy` along the axis: the first where 1, minus the second where 2, their
        difference where 3, +0 where 0.
        """

    def uniform(self, rng: Any, lower: float, upper: float, x: Any) -> Any:
        """Return numbers from `lower` to `upper`, as many as x has, drawn with `rng`.

        float64 for an x of float64, else float32; of x's library and device. `rng` has NumPy's
        ``random(size, dtype=...)``, or is a function of a shape; both draw from [0, 1).
        """

    def copy(self, x: Any) -> Any:
        """Return x in memory that nobody else writes: x itself where arrays are immutable."""

    def dtype_name(self, dtype: Any) -> str:
        """Return a dtype's standard name, for example ``"float32"``; raise TypeError for none."""

    def place(self, x: Any) -> tuple[str, Hashable]:
        """Return the library's name and the device, which is None where all arrays share one."""

    def fits(self, out: Any, like: Any, other: Any) -> bool:
        """Tell, quickly, whether `out` surely may take a result; False makes `check_out` look.

        Whether it is an array of the class, place, shape and dtype of `like`, may be written, and
        overlaps neither that nor `other`, unless it is the same view. It may be anything.
        """

    def check_out(self, out: Any, inputs: Sequence[Any]) -> None:
        """Refuse an `out` that cannot be written, or that overlaps an input without being it.

        With a TypeError where no array of the library can be, else a ValueError; its message goes
        on after the name of the argument.
        """

    def mask_nbytes(self, numbers: Rounded, x: Any) -> int | None:
        """Return how many bytes of a caller's `forward_saving` needs; None if it takes no mask."""

    def saved_nbytes(self, saved: Any) -> int:
        """Return how many bytes the saved state holds."""


def doubled(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """Return a shape of twice the length along an axis (not negative)."""
    return tuple(n * (1 + (i == axis)) for i, n in enumerate(shape))


def halves(y: Any, axis: int) -> tuple[Any, Any]:
    """Return the halves of an array along an axis (not negative), as views if there are such."""
    middle = y.shape[axis] // 2
    before = (slice(None),) * axis
    return y[(*before, slice(None, middle), ...)], y[(*before, slice(middle, None), ...)]


def drawn(rng: Any, lower: float, upper: float, shape: tuple[int, ...], dtype_name: str) -> Any:
    """Return what `Backend.uniform` does, in the library that `rng` draws in."""
    if callable(rng):
        numbers = rng(shape)
    else:
        numbers = rng.random(shape, dtype="float64" if dtype_name == "float64" else "float32")
    with np.errstate(all="ignore"):
        slopes = numbers * (upper - lower) + lower
    return np.asarray(slopes) if isinstance(slopes, np.generic) else slopes  # of a 0-d array


def address_view(
    address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> np.ndarray[Any, Any]:
    """Return a NumPy array with the addresses of another library's, which must not be read."""
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


# What NumPy may spend on one question, 1 ms or so; views made by slicing take 1 us.
_MAX_WORK: Any = 100_000  # an int, of which NumPy's annotations know two values alone


def check_memory(out: np.ndarray[Any, Any], inputs: Sequence[np.ndarray[Any, Any]]) -> None:
    """Refuse an `out` that shares memory with itself or with an input that it is not.

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


def _share_memory(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays have a byte in common; True where that would take long to find out."""
    try:
        return np.shares_memory(left, right, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: np.ndarray[Any, Any]) -> bool:
    """Whether two elements of an array share memory.

    Two elements differ in their index along some axis. Both can be moved along it, by the same
    distance, until one of them is the first there: so the first is compared with all others.
    """
    parts = [array.swapaxes(0, axis) for axis in range(array.ndim)]
    return any(_share_memory(part[:1], part[1:]) for part in parts)


def _are_same_view(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    return (
        left.ctypes.data == right.ctypes.data
        and (left.shape, left.itemsize) == (right.shape, right.itemsize)
        and _steps(left) == _steps(right)
    )


def _steps(array: np.ndarray[Any, Any]) -> list[int]:
    """Return the strides that are ever taken."""
    axes = zip(array.strides, array.shape, strict=True)
    return [stride for stride, length in axes if length != 1]
