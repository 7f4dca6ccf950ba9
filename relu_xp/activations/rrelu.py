"""Randomized leaky ReLU: the functions and the layer."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar, cast

import numpy as np

from relu_xp.activations._base import (
    Layer,
    forward,
    forward_with_pullback,
    resolve_floating,
)
from relu_xp.activations._pullback import Pullback, Rule
from relu_xp.backends.base import Backend
from relu_xp.parameters import RELU, CastParameters, Parameters, as_real, make_parameters
from relu_xp.validation import check_device, check_shape, resolve

__all__ = ["RReLU", "rrelu", "rrelu_vjp"]

ArrayT = TypeVar("ArrayT")

LOWER, UPPER = 1 / 8, 1 / 3  # of the slopes, as the authors and PyTorch have them


def rrelu(
    x: ArrayT,
    /,
    lower: float = LOWER,
    upper: float = UPPER,
    *,
    rng: Any = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return the randomized leaky ReLU (Xu et al., 2015).

    In training each element that is at or below 0 has a negative slope of its own, drawn uniformly
    from `lower` to `upper`; in evaluation all have the mean, ``(lower + upper) / 2``.

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64.
    lower, upper : float, optional
        Bounds of the slopes.
    rng : numpy.random.Generator, cupy.random.Generator, or function, optional
        Draws the slopes, one for each element whether it is needed or not; without it the mean is
        taken. NumPy's is for arrays of every library (drawn on the CPU, and moved; on Dask it draws
        the seed of Dask's own), CuPy's draws on the device. A function takes a shape and returns
        numbers from [0, 1) in the library of `x`: for JAX,
        ``lambda shape: jax.random.uniform(key, shape)``.
    out : array, like `x`, optional
        Where to write the result: `x` itself, or an array that shares no memory with it.

    Returns
    -------
    array, shape and dtype of `x`

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`; also TypeError for integers and for an `rng` that cannot draw, ValueError
        if `lower` is above `upper`.

    Examples
    --------
    >>> import numpy as np
    >>> rrelu(np.array([-8.0, 2.0]), 0.25, 0.75)
    array([-4.,  2.])
    >>> y = rrelu(np.array([-8.0, 2.0]), 0.25, 0.75, rng=np.random.default_rng(0))
    >>> bool(-6 <= y[0] <= -2), float(y[1])
    (True, 2.0)
    """
    bounds, mean = _check_bounds(lower, upper)
    if rng is None:
        return forward("rrelu", mean, x, out, floating=True)
    x, backend = resolve_floating("rrelu", x, out)
    slopes = _random_slopes("rrelu", backend, x, bounds, rng)
    return cast(ArrayT, backend.prelu(x, x, slopes, out))


def rrelu_vjp(
    x: ArrayT,
    /,
    lower: float = LOWER,
    upper: float = UPPER,
    *,
    rng: Any = None,
    out: ArrayT | None = None,
) -> tuple[ArrayT, Pullback[ArrayT]]:
    """Return `rrelu` and a function for its gradient.

    Parameters
    ----------
    x, lower, upper, rng, out
        As for `rrelu`.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``rrelu(x)``; `out`, if given.
    pullback : Pullback
        ``pullback(dy)`` is ``f'(x) * dy``, with the slopes that were drawn. What is kept is f'(x),
        in float32 (float64 for such an x), or a mask without `rng`.

    Raises
    ------
    TypeError, ValueError
        As `rrelu`.
    """
    bounds, mean = _check_bounds(lower, upper)
    if rng is None:
        return forward_with_pullback("rrelu_vjp", mean, x, out, None)
    return _rrelu_vjp("rrelu_vjp", x, bounds, rng, out)


def _check_bounds(lower: float, upper: float) -> tuple[tuple[float, float], Parameters]:
    """Return the bounds of RReLU's slopes, if they are valid, and the parameters in evaluation."""
    lower, upper = as_real("lower", lower), as_real("upper", upper)
    if lower > upper:
        raise ValueError(f"lower must not be above upper, got lower={lower}, upper={upper}")
    if math.isinf(upper - lower):
        raise ValueError(f"upper - lower must be finite, got lower={lower}, upper={upper}")
    return (lower, upper), make_parameters(lower + (upper - lower) / 2, 0.0, 1.0, None)


def _rrelu_vjp(
    function: str, x: Any, bounds: tuple[float, float], rng: Any, out: Any
) -> tuple[Any, Pullback[Any]]:
    """Return `rrelu` with random slopes, and its pullback."""
    x, backend = resolve_floating(function, x, out)
    slopes = _random_slopes(function, backend, x, bounds, rng)
    derivative = backend.prelu(None, x, slopes, None)  # first, since out may be x
    y = backend.prelu(x, None, derivative, out)
    return y, Pullback(Rule(_gradient, backend), backend, RELU, x, derivative)


def _gradient(backend: Backend, params: CastParameters, dy: Any, residuals: Any, out: Any) -> Any:
    return backend.prelu(dy, None, residuals, out)


def _random_slopes(
    function: str, backend: Backend, x: Any, bounds: tuple[float, float], rng: Any
) -> Any:
    """Return a slope for each element of x."""
    try:
        slopes = backend.random_uniform(rng, *bounds, x)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"{function}: rng must draw arrays of random numbers, as numpy.random.default_rng() "
            f"does, got {type(rng).__name__} ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from error
    what = "what rng returned"
    slopes, its_backend, _ = resolve(function, what, slopes, RELU, floating=True)
    check_device(function, what, slopes, its_backend, backend.device(x), "x is")
    check_shape(function, what, slopes, x.shape, "x has")
    return slopes


class RReLU(Layer):
    """`relu_xp.rrelu` as a layer (Xu et al., 2015).

    ``forward(x)`` draws a slope for each element, ``forward(x, training=False)`` takes the mean.
    `repr` omits the generator.

    Parameters
    ----------
    lower, upper : float, optional
        Bounds of the slopes.
    rng : numpy.random.Generator, cupy.random.Generator, or function, optional
        As for `relu_xp.rrelu`; by default NumPy's, freshly seeded.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.

    Raises
    ------
    TypeError, ValueError
        If a bound is not a finite real number, or `lower` is above `upper`.
    """

    def __init__(
        self,
        lower: float = LOWER,
        upper: float = UPPER,
        *,
        rng: Any = None,
        inplace: bool = False,
    ) -> None:
        self._bounds, self._parameters = _check_bounds(lower, upper)
        self.rng = np.random.default_rng() if rng is None else rng
        self.inplace = inplace

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of the slopes."""
        return self._bounds

    @functools.cached_property
    def activation(self) -> Parameters:
        """The four parameters of the layer in evaluation."""
        return self._parameters

    def _forward(self, x: Any, out: Any) -> Any:
        return forward("forward", self._parameters, x, out, floating=True)

    def _forward_with_pullback(self, x: Any, out: Any) -> tuple[Any, Pullback[Any]]:
        return _rrelu_vjp("forward", x, self._bounds, self.rng, out)

    def __repr__(self) -> str:
        return self._repr(*map(repr, self._bounds))
