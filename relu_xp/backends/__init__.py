"""What a backend is: a module with these functions, same names and signatures in each.

The arrays decide which backend serves (`relu_xp.dispatch`). By the time that one is called,
`relu_xp.functional` has checked that the arrays come from its library and agree in device, shape
and dtype, and has rounded the activation's numbers to the dtype (rule N1). What is left to the
backend is the truth table.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from relu_xp.activation import Rounded

__all__ = ["Backend", "check_memory"]


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


def check_memory(
    out: Any,
    inputs: Sequence[Any],
    may_share_memory: Callable[[Any, Any], bool],
    address: Callable[[Any], int],
) -> None:
    """Refuse an `out` whose own elements overlap, or that overlaps an input without being it.

    Parameters
    ----------
    out : strided array
    inputs : sequence of strided arrays
    may_share_memory : function
        Whether the bounds of two arrays meet.
    address : function
        Where an array's first element lies.

    Raises
    ------
    ValueError
    """
    if not out.flags.forc and _overlaps_itself(out):
        raise ValueError("is a broadcast view, whose elements share memory; give an array")
    for x in inputs:
        if out is x or not may_share_memory(out, x):
            continue
        same = address(out) == address(x) and out.itemsize == x.itemsize
        if not same or _steps(out) != _steps(x):
            raise ValueError(
                "overlaps an input without being the same view; "
                "give an array that shares no memory with it"
            )


def _steps(array: Any) -> list[int]:
    """Return the strides that are ever taken."""
    axes = zip(array.strides, array.shape, strict=True)
    return [stride for stride, length in axes if length != 1]


def _overlaps_itself(array: Any) -> bool:
    """Tell whether two elements of a strided array may share memory.

    Exact for views made by slicing, transposing and broadcasting; for stranger ones it may say yes
    without need.
    """
    reach = array.itemsize
    axes = zip(map(abs, array.strides), array.shape, strict=True)
    for stride, length in sorted(axis for axis in axes if axis[1] != 1):
        if length == 0:
            return False
        if stride < reach:
            return True
        reach += stride * (length - 1)
    return False
