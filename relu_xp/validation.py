"""The checks of arguments, and the messages of their errors.

A message names the function, the argument, what was given and what to do. Everything is checked
before a backend computes, so that a refused call has written nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relu_xp.dispatch import backend_for, format_device, transfer_hint
from relu_xp.parameters import FLOATING, CastParameters, Parameters, is_integer, unsupported

if TYPE_CHECKING:
    from relu_xp.backends.base import Backend

__all__ = [
    "as_axis",
    "as_integer",
    "check_device",
    "check_grad_output",
    "check_mask",
    "check_out",
    "check_shape",
    "is_scalar",
    "resolve",
    "unknown_length",
]

# Backend, parameters, and whether each array is to be checked.
_Resolved = tuple["Backend", CastParameters, bool]

_RESOLVED: dict[tuple[type, Any, Parameters], _Resolved] = {}
_MAX_RESOLVED = 4096
# The latest of each type, compared by identity: 0.1 us less of the 0.5 us that a small array takes.
_LATEST: dict[type, tuple[Any, Parameters, Backend, CastParameters, bool]] = {}


def resolve(
    function: str, argument: str, array: Any, parameters: Parameters, floating: bool
) -> tuple[Any, Backend, CastParameters]:
    """Return an array, its backend, and the parameters in its dtype.

    A NumPy scalar is returned as the 0-d array that it stands for.

    Raises
    ------
    TypeError
        If it is not an array, or its dtype is not supported: an integer dtype is not if `floating`.
        Also if the backend cannot take it (`Backend.why_unsupported`).
    ValueError
        If an integer dtype does not hold the parameters.
    """
    try:
        dtype, latest, backend, params, needs_check = _LATEST[type(array)]
        if dtype is not array.dtype or latest is not parameters:
            dtype = array.dtype
            backend, params, needs_check = _RESOLVED[type(array), dtype, parameters]
            _LATEST[type(array)] = dtype, parameters, backend, params, needs_check
    except Exception:  # seen for the first time, or no array
        if is_scalar(array):
            return resolve(function, argument, np.asarray(array), parameters, floating)
        backend = backend_for(function, argument, array)
        params = _cast(function, argument, array, backend, parameters, floating)
        needs_check = backend.checks_arrays or not params.is_floating
        if len(_RESOLVED) >= _MAX_RESOLVED:
            _RESOLVED.clear()
        _RESOLVED[type(array), array.dtype, parameters] = backend, params, needs_check
        _LATEST[type(array)] = array.dtype, parameters, backend, params, needs_check
    if needs_check:
        if floating and not params.is_floating:
            raise _no_gradient(function, argument, array, backend)
        if reason := backend.why_unsupported(array):
            raise TypeError(f"{function}: {argument} {reason[0]}; convert it first, {reason[1]}")
    return array, backend, params


def is_scalar(x: Any) -> bool:
    """Return whether x is a NumPy scalar. `isinstance` would ask x for its class."""
    return issubclass(type(x), np.generic)


def _cast(
    function: str,
    argument: str,
    array: Any,
    backend: Backend,
    parameters: Parameters,
    floating: bool,
) -> CastParameters:
    try:
        name = backend.dtype_name(array.dtype)
        if floating and name not in FLOATING and not is_integer(name):
            raise unsupported(name, integers=False)
        if not (floating and is_integer(name)):  # which is refused, whatever the parameters
            return parameters.cast(name)
    except Exception as error:
        raise _with_message(error, f"{function}: {argument}: {error}") from None
    raise _no_gradient(function, argument, array, backend)


def _with_message(error: Exception, message: str) -> Exception:
    """Return a ValueError or TypeError: the error's own class may take other arguments."""
    return (ValueError if isinstance(error, ValueError) else TypeError)(message)


def _no_gradient(function: str, argument: str, array: Any, backend: Backend) -> TypeError:
    return TypeError(
        f"{function}: {argument} has dtype {backend.dtype_name(array.dtype)}, which has no "
        "gradient; convert it to a floating dtype first"
    )


def check_grad_output(
    function: str,
    dy: Any,
    parameters: Parameters,
    device: tuple[str, Hashable],
    shape: tuple[int, ...],
    seen: str,
) -> tuple[Any, CastParameters]:
    """Return `dy` and the parameters in its dtype; refuse another library, device or shape."""
    dy, backend, grad_params = resolve(function, "dy", dy, parameters, floating=True)
    if backend.device(dy) != device:  # compared here too: a call is a tenth of a small array's time
        check_device(function, "dy", dy, backend, device, seen)
    if dy.shape != shape:
        check_shape(function, "dy", dy, shape, seen)
    return dy, grad_params


def check_device(
    function: str,
    argument: str,
    array: Any,
    backend: Backend,
    device: tuple[str, Hashable],
    seen: str,
) -> None:
    """Refuse an array of another library (TypeError) or device (ValueError)."""
    own_device = backend.device(array)
    if own_device is not device and own_device != device:
        advice = transfer_hint(argument, own_device, device, array.dtype)
        raise (TypeError if own_device[0] != device[0] else ValueError)(
            f"{function}: {seen} {format_device(device)}, {argument} is "
            f"{format_device(own_device)}; {advice}"
        )


def check_shape(
    function: str, argument: str, array: Any, shape: tuple[int, ...], seen: str
) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape and _differ(array.shape, shape):
        raise ValueError(
            f"{function}: {argument} has shape {tuple(array.shape)}, {seen} {tuple(shape)}"
        )


def _differ(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    """Return whether shapes differ; NaN, a length that Dask has not computed, equals any."""
    return len(left) != len(right) or any(
        a != b for a, b in zip(left, right, strict=True) if not math.isnan(a + b)
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

    `inputs` are the arrays that it must not overlap. `shape` is that of the result, where it is not
    the shape of `like`. Callers ask `Backend.is_valid_out` first: this takes longer than a pass
    over a small array.
    """
    subject = f"{argument}, which is to be overwritten," if out is like else "out"
    try:
        if out is not like or shape is not None:
            _check_like(function, out, like, argument, backend, shape)
        _check_writable(function, subject, out, inputs, backend)
    except (TypeError, ValueError):
        try:
            backend.check_out(like, ())
        except TypeError as error:  # no array of the library can be written
            raise TypeError(f"{function}: {subject} {error}") from None
        except ValueError:  # this one is read-only, say
            pass
        raise


def _check_like(
    function: str,
    out: Any,
    like: Any,
    argument: str,
    backend: Backend,
    shape: tuple[int, ...] | None,
) -> None:
    device, its_backend = backend.device(like), backend_for(function, "out", out)
    check_device(function, "out", out, its_backend, device, f"{argument} is")
    if reason := backend.why_unsupported(out):
        raise TypeError(f"{function}: out {reason[0]}; give an array like the result")
    if shape is None:
        check_shape(function, "out", out, like.shape, f"{argument} is")
    else:
        check_shape(function, "out", out, shape, "the result has")
    if out.dtype != like.dtype:
        raise TypeError(
            f"{function}: out has dtype {out.dtype}, the result {like.dtype}; "
            "give an array of that dtype"
        )


def _check_writable(
    function: str, subject: str, out: Any, inputs: Sequence[Any], backend: Backend
) -> None:
    try:
        backend.check_out(out, inputs)
    except (TypeError, ValueError) as error:
        raise _with_message(error, f"{function}: {subject} {error}") from None


def check_mask(
    function: str, mask: Any, arrays: Sequence[Any], params: CastParameters, backend: Backend
) -> None:
    """Refuse a `mask` that cannot store the branches of x, the first of some arrays.

    It must not overlap any of them; they may be None.
    """
    x = arrays[0]
    device, nbytes = backend.device(x), backend.mask_nbytes(params, x)
    if nbytes is None:
        raise TypeError(
            f"{function}: mask was given, but x is {format_device(device)}, whose masks the "
            "library makes itself; omit mask="
        )
    its_backend = backend_for(function, "mask", mask)
    check_device(function, "mask", mask, its_backend, device, "x is")
    if mask.dtype.str != "|u1":  # a comparison with "uint8" takes longer than all the rest
        raise TypeError(f"{function}: mask has dtype {mask.dtype}; give an array of uint8")
    if mask.ndim != 1 or not mask.flags.c_contiguous:
        raise ValueError(
            f"{function}: mask has shape {mask.shape} and strides {mask.strides}; "
            "give a contiguous array with one axis"
        )
    if mask.size < nbytes:
        raise ValueError(f"{function}: mask has {mask.size} bytes, x needs {nbytes}")
    others = [array for array in arrays if array is not None]
    if not all(backend.is_valid_out(mask, mask, other) for other in others):
        _check_writable(function, "mask", mask, others, backend)


def as_integer(name: str, value: Any) -> int:
    """Return an integer of at most 64 bits; refuse everything else."""
    number, cause = None, None
    try:
        number = operator.index(value)
    except Exception as error:  # the methods of a caller's class may raise anything
        cause = error
    if number is None or type(value) is bool:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from cause
    if number.bit_length() > 63:
        raise ValueError(f"{name} must be an integer of at most 64 bits, got a larger one")
    return number


def as_axis(function: str, x: Any, axis: Any) -> int:
    """Return an axis of x, counted from the first."""
    number, ndim = as_integer(f"{function}: axis", axis), len(x.shape)
    if not -ndim <= number < ndim:
        last = "; the last one is axis=-1" if ndim else ""
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}, and no axis {number}{last}")
    return number % ndim


def unknown_length(function: str, axis: int) -> ValueError:
    """Return the error for an axis whose length Dask does not know."""
    return ValueError(
        f"{function}: x has an unknown number of channels along axis {axis}; "
        "call x.compute_chunk_sizes() first"
    )
