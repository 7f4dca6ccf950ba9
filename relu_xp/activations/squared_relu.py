"""Squared ReLU: the functions and the layer."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from relu_xp.activations._base import Layer, resolve_floating
from relu_xp.activations._pullback import Pullback, Rule
from relu_xp.backends.base import Backend
from relu_xp.parameters import RELU, CastParameters

__all__ = ["SquaredReLU", "squared_relu", "squared_relu_vjp"]

ArrayT = TypeVar("ArrayT")


def squared_relu(x: ArrayT, /, *, out: ArrayT | None = None) -> ArrayT:
    """Return the square of a ReLU: ``relu(x)**2`` (So et al., 2021).

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64.
    out : array, like `x`, optional
        Where to write the result: `x` itself, or an array that shares no memory with it.

    Returns
    -------
    array, shape and dtype of `x`
        Infinite where the square is beyond the dtype's range.

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`; also TypeError for integers.

    Examples
    --------
    >>> import numpy as np
    >>> squared_relu(np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 9.])
    """
    return cast(ArrayT, _squared_relu("squared_relu", x, out))


def squared_relu_vjp(x: ArrayT, /, *, out: ArrayT | None = None) -> tuple[ArrayT, Pullback[ArrayT]]:
    """Return `squared_relu` and a function for its gradient.

    Parameters
    ----------
    x, out
        As for `squared_relu`.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``squared_relu(x)``; `out`, if given.
    pullback : Pullback
        ``pullback(dy)`` is ``2 * x * dy`` where x is above 0 (or NaN), exactly +0 elsewhere. What
        is kept is a copy of `x`, except in libraries whose arrays are immutable.

    Raises
    ------
    TypeError, ValueError
        As `squared_relu`.
    """
    return _squared_relu_vjp("squared_relu_vjp", x, out)


def _squared_relu(function: str, x: Any, out: Any) -> Any:
    x, backend = resolve_floating(function, x, out)
    return backend.squared_relu(x, out)


def _squared_relu_vjp(function: str, x: Any, out: Any) -> tuple[Any, Pullback[Any]]:
    x, backend = resolve_floating(function, x, out)
    residuals = backend.copy(x)  # first, since out may be x
    y = backend.squared_relu(x, out)
    return y, Pullback(Rule(_gradient, backend), backend, RELU, x, residuals)


def _gradient(backend: Backend, params: CastParameters, dy: Any, residuals: Any, out: Any) -> Any:
    return backend.squared_relu_backward(dy, residuals, out)


class SquaredReLU(Layer):
    """`relu_xp.squared_relu` as a layer (So et al., 2021).

    Parameters
    ----------
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.
    """

    def __init__(self, *, inplace: bool = False) -> None:
        self.inplace = inplace

    def _forward(self, x: Any, out: Any) -> Any:
        return _squared_relu("forward", x, out)

    def _forward_with_pullback(self, x: Any, out: Any) -> tuple[Any, Pullback[Any]]:
        return _squared_relu_vjp("forward", x, out)

    def __repr__(self) -> str:
        return self._repr()
