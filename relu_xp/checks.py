"""What the functions refuse, and how they say so.

A message names the function, the argument, what came and what to do. Everything here is asked
before a backend is called, so that a refused call has written nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

from relu_xp.activation import Activation, Rounded, is_integer, rounded
from relu_xp.backends import Backend
from relu_xp.dispatch import backend_for, describe, how_to_move
from relu_xp.tracing import compiling

__all__ = ["check_mask", "check_out", "check_place", "check_shape", "fitting", "serving", "whole"]


def serving(
    function: str, argument: str, array: Any, activation: Activation, floating: bool
) -> tuple[Backend, Rounded]:
    """Return an array's backend, and the numbers as its dtype holds them, if they suit it.

    Integers are refused if `floating`.
    """
    served: tuple[Backend, Rounded]
    try:
        served = activation.served[type(array)][array.dtype]
    except Exception:  # not seen before, or no array at all
        backend = backend_for(function, argument, array)
        served = backend, _rounded(function, argument, array, backend, activation, floating)
        if not compiling():
            activation.served.setdefault(type(array), {})[array.dtype] = served
    if floating and not served[1].floating:
        raise _no_gradient(function, argument, array, served[0])
    return served


def _rounded(
    function: str,
    argument: str,
    array: Any,
    backend: Backend,
    activation: Activation,
    floating: bool,
) -> Rounded:
    try:
        name = backend.dtype_name(array.dtype)
        if not (floating and is_integer(name)):  # which is refused, whatever the numbers
            if compiling():
                a, t = activation.negative_slope, activation.threshold
                b, c = activation.positive_slope, activation.max_value
                return rounded(a, t, b, c, name)
            return activation.round_to(name)
    except Exception as error:
        raise _renamed(error, f"{function}: {argument}: {error}") from None
    raise _no_gradient(function, argument, array, backend)


def _renamed(error: Exception, message: str) -> Exception:
    """Return an error that says more: not of its own class, which may take other arguments."""
    return (ValueError if isinstance(error, ValueError) else TypeError)(message)


def _no_gradient(function: str, argument: str, array: Any, backend: Backend) -> TypeError:
    return TypeError(
        f"{function}: {argument} has dtype {backend.dtype_name(array.dtype)}, which has no "
        "gradient; convert it to a floating dtype first"
    )


def fitting(
    function: str,
    dy: Any,
    activation: Activation,
    place: tuple[str, Hashable],
    shape: tuple[int, ...],
    seen: str,
) -> Rounded:
    """Return the numbers as the dtype of `dy` holds them, if it fits what was seen before."""
    backend, slopes = serving(function, "dy", dy, activation, floating=True)
    if backend.place(dy) != place:  # here, for the speed of small arrays
        check_place(function, "dy", dy, backend, place, seen)
    if dy.shape != shape:
        check_shape(function, "dy", dy, shape, seen)
    return slopes


def check_place(
    function: str,
    argument: str,
    array: Any,
    backend: Backend,
    place: tuple[str, Hashable],
    seen: str,
) -> None:
    """Refuse an array of another library or device than the one seen before."""
    own_place = backend.place(array)
    if own_place is not place and own_place != place:
        raise (TypeError if own_place[0] != place[0] else ValueError)(
            f"{function}: {seen} {describe(place)}, {argument} is {describe(own_place)}; "
            f"{how_to_move(argument, own_place, place)}"
        )


def check_shape(
    function: str, argument: str, array: Any, shape: tuple[int, ...], seen: str
) -> None:
    """Refuse an array of another shape than the one seen before."""
    if array.shape != shape and _differ(array.shape, shape):
        raise ValueError(
            f"{function}: {argument} has shape {tuple(array.shape)}, {seen} {tuple(shape)}"
        )


def _differ(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Tell whether two shapes differ as far as they are known: Dask has NaN for lengths to come."""
    return len(one) != len(other) or any(
        a != b for a, b in zip(one, other, strict=True) if not math.isnan(a + b)
    )


def check_out(
    function: str,
    out: Any,
    like: Any,
    argument: str,
    inputs: Sequence[Any],
    backend: Backend,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuse an `out` that is not an array like `like`, the `argument`, or cannot be written.

    `shape` is that of the result, where it is another than that of `like`.
    """
    if out is not like or shape is not None:
        place, its_backend = backend.place(like), backend_for(function, "out", out)
        seen = f"{argument} is" if shape is None else "the result has"
        check_place(function, "out", out, its_backend, place, f"{argument} is")
        check_shape(function, "out", out, like.shape if shape is None else shape, seen)
        if out.dtype != like.dtype:
            raise TypeError(
                f"{function}: out has dtype {out.dtype}, the result {like.dtype}; "
                "give an array of that dtype"
            )
    try:
        backend.check_out(out, inputs)
    except (TypeError, ValueError) as error:
        subject = f"{argument}, which is to be overwritten," if out is like else "out"
        raise _renamed(error, f"{function}: {subject} {error}") from None


def check_mask(
    function: str, mask: Any, x: Any, out: Any, numbers: Rounded, backend: Backend
) -> None:
    """Refuse a `mask` that cannot keep the pieces of `x`."""
    place, nbytes = backend.place(x), backend.mask_nbytes(numbers, x)
    if nbytes is None:
        raise TypeError(
            f"{function}: mask was given, but x is {describe(place)}, whose masks the library "
            "makes itself; leave mask= away"
        )
    its_backend = backend_for(function, "mask", mask)
    check_place(function, "mask", mask, its_backend, place, "x is")
    if mask.dtype.str != "|u1":  # a comparison with "uint8" takes longer than all the rest
        raise TypeError(f"{function}: mask has dtype {mask.dtype}; give an array of uint8")
    if mask.ndim != 1 or not mask.flags.c_contiguous:
        raise ValueError(
            f"{function}: mask has shape {mask.shape} and strides {mask.strides}; "
            "give a contiguous array with one axis"
        )
    if mask.size < nbytes:
        raise ValueError(f"{function}: mask has {mask.size} bytes, x needs {nbytes}")
    try:
        backend.check_out(mask, (x,) if out is None else (x, out))
    except (TypeError, ValueError) as error:
        raise _renamed(error, f"{function}: mask {error}") from None


def whole(name: str, value: Any) -> int:
    """Return a whole number, refusing everything else."""
    number, cause = None, None
    try:
        number = operator.index(value)
    except Exception as error:  # whatever a class of somebody's raises when it is asked
        cause = error
    if number is None or type(value) is bool:
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}") from cause
    if number.bit_length() > 63:
        raise ValueError(f"{name} must be a whole number of 64 bits at most, got a larger one")
    return number
