"""Concatenated ReLU: the functions and the layer."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

from relu_xp.activations._base import Layer
from relu_xp.activations._pullback import Pullback, Rule
from relu_xp.arrays import concatenated_shape
from relu_xp.backends.base import Backend
from relu_xp.parameters import RELU, CastParameters
from relu_xp.validation import as_axis, as_integer, check_out, resolve, unknown_length

__all__ = ["CReLU", "crelu", "crelu_vjp"]

ArrayT = TypeVar("ArrayT")


def crelu(x: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None) -> ArrayT:
    """Return the concatenated ReLU: ``relu(x)``, then ``relu(-x)`` (Shang et al., 2016).

    Parameters
    ----------
    x : array, at least 1-D
        float16, bfloat16, float32 or float64.
    axis : int, optional
        Along which the two are concatenated; the second axis by default.
    out : array, library, device and dtype of `x`, optional
        Where to write the result: twice as long as `x` along the axis, sharing no memory with it.

    Returns
    -------
    array, dtype of `x`, and its shape but for twice the length along `axis`
        NaN is in both halves.

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`; also TypeError for integers or an axis that is not an integer,
        ValueError if `x` has no such axis.

    Examples
    --------
    >>> import numpy as np
    >>> crelu(np.array([[-2.0, 0.0, 3.0]]))
    array([[0., 0., 3., 2., 0., 0.]])
    """
    return cast(ArrayT, _crelu("crelu", x, axis, out))


def crelu_vjp(
    x: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None
) -> tuple[ArrayT, Pullback[ArrayT]]:
    """Return `crelu` and a function for its gradient.

    Parameters
    ----------
    x, axis, out
        As for `crelu`.

    Returns
    -------
    y : array
        ``crelu(x)``; `out`, if given.
    pullback : Pullback
        ``pullback(dy)``, dy in the shape of y, is the gradient with respect to x: the first half of
        dy where x is above 0, minus the second half where it is below, exactly +0 at 0, first minus
        second at NaN. What is kept is one byte per element of x.

    Raises
    ------
    TypeError, ValueError
        As `crelu`.
    """
    return _crelu_vjp("crelu_vjp", x, axis, out)


def _crelu(function: str, x: Any, axis: int, out: Any) -> Any:
    x, backend, axis = _resolve(function, x, axis, out)
    return backend.crelu(x, axis, out)


def _crelu_vjp(function: str, x: Any, axis: int, out: Any) -> tuple[Any, Pullback[Any]]:
    x, backend, axis = _resolve(function, x, axis, out)
    mask = backend.crelu_mask(x)
    y = backend.crelu(x, axis, out)
    shape = concatenated_shape(x.shape, axis)
    return y, Pullback(Rule(_gradient, backend, axis), backend, RELU, x, mask, shape)


def _gradient(
    backend: Backend, axis: int, params: CastParameters, dy: Any, residuals: Any, out: Any
) -> Any:
    return backend.crelu_backward(dy, residuals, axis, out)


def _resolve(function: str, x: Any, axis: int, out: Any) -> tuple[Any, Backend, int]:
    """Return x, its backend, and the axis counted from the first, if x and `out` are valid."""
    x, backend, _ = resolve(function, "x", x, RELU, floating=True)
    axis = as_axis(function, x, axis)
    if math.isnan(x.shape[axis]):
        raise unknown_length(function, axis)
    if out is not None:
        check_out(function, out, x, "x", (x,), backend, concatenated_shape(x.shape, axis))
    return x, backend, axis


class CReLU(Layer):
    """`relu_xp.crelu` as a layer (Shang et al., 2016): y is twice as long as x along an axis.

    Parameters
    ----------
    axis : int, optional
        Along which relu(x) and relu(-x) are concatenated; the second axis by default.

    Raises
    ------
    TypeError
        If it is not an integer.
    """

    _keeps_shape = False

    def __init__(self, axis: int = 1) -> None:
        self._axis = as_integer("axis", axis)

    def _forward(self, x: Any, out: Any) -> Any:
        return _crelu("forward", x, self._axis, out)

    def _forward_with_pullback(self, x: Any, out: Any) -> tuple[Any, Pullback[Any]]:
        return _crelu_vjp("forward", x, self._axis, out)

    def __repr__(self) -> str:
        return self._repr(f"axis={self._axis}")
