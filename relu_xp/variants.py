"""Members that four numbers do not describe: PReLU, RReLU, CReLU and SquaredReLU.

They compare with 0 as `relu_xp.relu` does (the knee is of the lower piece, NaN of the upper one), a
slope of 0 makes exactly +0, and nothing of the caller's is kept for the gradient. They take
floating dtypes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from relu_xp.activation import ONE, ZERO, Activation, activation_of, real
from relu_xp.backends import Backend, doubled
from relu_xp.checks import check_out, check_place, check_shape, fitting, serving, whole
from relu_xp.functional import forward, forward_saving

__all__ = [
    "VariantPullback",
    "crelu",
    "crelu_vjp",
    "prelu",
    "prelu_vjp",
    "rrelu",
    "rrelu_vjp",
    "squared_relu",
    "squared_relu_vjp",
]

ArrayT = TypeVar("ArrayT")
GradientT = TypeVar("GradientT", covariant=True)

LOWER, UPPER = 1 / 8, 1 / 3  # of RReLU's slopes, as its authors and PyTorch have them

_RELU = activation_of(ZERO, ZERO, ONE, None)


class VariantPullback(Generic[GradientT]):
    """The gradient of one forward pass of a variant; called any number of times."""

    __slots__ = ("_backend", "_compute", "_dx_shape", "_nbytes", "_place", "_shape")

    def __init__(
        self,
        backend: Backend,
        x: Any,
        shape: tuple[int, ...],
        nbytes: float,
        compute: Callable[..., GradientT],
    ) -> None:
        self._backend = backend
        self._compute = compute
        self._dx_shape = x.shape
        self._nbytes = nbytes
        self._place = backend.place(x)
        self._shape = shape

    def __call__(self, dy: Any, /, *, out: Any = None) -> GradientT:
        """Return the gradient with respect to the input.

        Parameters
        ----------
        dy : array, shape of y
            Gradient with respect to the output; any floating dtype, any layout, x's library and
            device.
        out : array, library, device and dtype of `dy`, shape of x, optional
            Where to write the gradient by x: `dy` itself, if y has the shape of x, or an array that
            shares no memory with it.

        Returns
        -------
        array, shape of x, dtype of `dy`
            Of `prelu_vjp` two: with the gradient with respect to the weight.

        Raises
        ------
        TypeError
            If `dy` is not floating, or of another library.
        ValueError
            If `dy` has another shape or device, or `out` is not lawful.
        """
        return self.backward("pullback", dy, out)

    def backward(self, function: str, dy: Any, out: Any, *more: Any) -> GradientT:
        """Return the gradient, naming `function` where something is refused.

        PReLU's takes one more: memory for the gradient of the weight, used if it fits.
        """
        fitting(function, dy, _RELU, self._place, self._shape, "forward saw")
        shape = None if self._shape == self._dx_shape else self._dx_shape
        if out is not None and (shape is not None or not self._backend.fits(out, dy, dy)):
            check_out(function, out, dy, "dy", (dy,), self._backend, shape)
        return self._compute(dy, out, *more)

    @property
    def saved_nbytes(self) -> int:
        """Bytes held for the gradient.

        Raises
        ------
        ValueError
            If Dask does not know the size of x before it is computed.
        """
        if math.isnan(self._nbytes):
            raise ValueError(
                "what is saved for chunks of unknown sizes is not known before it is computed; "
                "call x.compute_chunk_sizes() before forward"
            )
        return int(self._nbytes)


def prelu(x: ArrayT, weight: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None) -> ArrayT:
    """Apply a parametric ReLU: a leaky ReLU whose negative slope is learned (He et al., 2015).

    ``f(x) = weight * x`` where ``x <= 0``, else x.

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64.
    weight : array, shape (), (1,) or (x.shape[axis],), library and device of `x`
        The slope for all of x, or one for each channel; any floating dtype. It is rounded to the
        dtype of `x` first, and a slope of 0 then means exactly +0.
    axis : int, optional
        Where the channels are; the second axis by default.
    out : array, like `x`, optional
        Where to write the result: `x` itself, or an array that shares no memory with it.

    Returns
    -------
    array, shape and dtype of `x`

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`; also TypeError for integers or an axis that is no whole number, and
        either for a `weight` that does not fit.

    Notes
    -----
    Made of differentiable operations, in `weight` too, for the libraries that trace.

    Examples
    --------
    >>> import numpy as np
    >>> prelu(np.array([[-2.0, -2.0], [3.0, 0.0]]), np.array([0.5, 0.25]))
    array([[-1. , -0.5],
           [ 3. ,  0. ]])
    """
    return cast(ArrayT, prelu_forward("prelu", x, weight, axis, out))


def prelu_vjp(
    x: ArrayT, weight: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None
) -> tuple[ArrayT, VariantPullback[tuple[ArrayT, ArrayT]]]:
    """Apply `prelu` and return a function for its gradients.

    Parameters
    ----------
    x, weight, axis, out
        As for `prelu`.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``prelu(x, weight)``; `out`, if given.
    pullback : VariantPullback
        ``pullback(dy)`` is ``(dx, dweight)``: f'(x) * dy in the dtype of dy, and the sum of x * dy
        over what is at or below 0, in shape and dtype of `weight`, summed in float64 (float32 in a
        library without it). A NaN or an infinity above 0 does not reach it. What is kept is a copy
        of `x`, except in libraries whose arrays are immutable, and one of `weight`.

    Raises
    ------
    TypeError, ValueError
        As `prelu`.
    """
    return prelu_saving("prelu_vjp", x, weight, axis, out)


def prelu_forward(
    function: str, x: Any, weight: Any, axis: int, out: Any, name: str = "weight"
) -> Any:
    """Return `prelu`, naming `function` where something is refused."""
    backend, _ = _serving(function, x)
    slopes, *_ = _slopes(function, name, backend, x, weight, axis)
    _check_out(function, out, x, weight, backend)
    return backend.sloped(x, x, slopes, out)


def prelu_saving(
    function: str, x: Any, weight: Any, axis: int, out: Any, name: str = "weight"
) -> tuple[Any, VariantPullback[Any]]:
    """Return `prelu` and its pullback, naming `function` where something is refused."""
    backend, width = _serving(function, x)
    slopes, slope_width, there, back = _slopes(function, name, backend, x, weight, axis)
    _check_out(function, out, x, weight, backend)
    saved, kept = backend.copy(x), backend.copy(slopes)

    def compute(dy: Any, out: Any, gradient: Any = None) -> tuple[Any, Any]:
        # The weight's gradient comes first: out may be dy.
        if _reusable(backend, gradient, kept[back], dy, out):
            backend.slopes_gradient(dy, saved, kept, gradient[there])
        else:
            gradient = backend.slopes_gradient(dy, saved, kept, None)[back]
        return backend.sloped(dy, saved, kept, out), gradient

    y = backend.sloped(x, x, slopes, out)
    nbytes = (_size(x) * width + _size(slopes) * slope_width) / 8
    return y, VariantPullback(backend, x, x.shape, nbytes, compute)


def rrelu(
    x: ArrayT,
    /,
    lower: float = LOWER,
    upper: float = UPPER,
    *,
    rng: Any = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Apply a randomized leaky ReLU (Xu et al., 2015).

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
        taken. NumPy's serves arrays of every library (drawn on the CPU, and moved; on Dask it gives
        the seed for Dask's own), CuPy's draws on the device. A function takes a shape and returns
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
    bounds, mean = checked_bounds(lower, upper)
    if rng is None:
        return forward("rrelu", mean, x, out, floating=True)
    backend, _ = _serving("rrelu", x, out)
    slopes, _ = _drawn_slopes("rrelu", backend, x, *bounds, rng)
    return cast(ArrayT, backend.sloped(x, x, slopes, out))


def rrelu_vjp(
    x: ArrayT,
    /,
    lower: float = LOWER,
    upper: float = UPPER,
    *,
    rng: Any = None,
    out: ArrayT | None = None,
) -> tuple[ArrayT, Any]:
    """Apply `rrelu` and return a function for its gradient.

    Parameters
    ----------
    x, lower, upper, rng, out
        As for `rrelu`.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``rrelu(x)``; `out`, if given.
    pullback : VariantPullback, or relu_xp.Pullback without `rng`
        ``pullback(dy)`` is ``f'(x) * dy``, with the slopes that were drawn. What is kept is f'(x),
        in float32 (float64 for such an x), or a mask without `rng`.

    Raises
    ------
    TypeError, ValueError
        As `rrelu`.
    """
    bounds, mean = checked_bounds(lower, upper)
    if rng is None:
        return forward_saving("rrelu_vjp", mean, x, out, None)
    return rrelu_saving("rrelu_vjp", x, *bounds, rng, out)


def checked_bounds(lower: float, upper: float) -> tuple[tuple[float, float], Activation]:
    """Return the bounds of RReLU's slopes, if they are lawful, and what it is in evaluation."""
    lower, upper = real("lower", lower), real("upper", upper)
    if lower > upper:
        raise ValueError(f"lower must not be above upper, got lower={lower}, upper={upper}")
    if math.isinf(upper - lower):
        raise ValueError(f"upper - lower must be finite, got lower={lower}, upper={upper}")
    return (lower, upper), activation_of(lower + (upper - lower) / 2, ZERO, ONE, None)


def rrelu_saving(
    function: str, x: Any, lower: float, upper: float, rng: Any, out: Any
) -> tuple[Any, VariantPullback[Any]]:
    """Return `rrelu` with slopes drawn, and its pullback."""
    backend, _ = _serving(function, x, out)
    slopes, width = _drawn_slopes(function, backend, x, lower, upper, rng)
    saved = backend.sloped(None, x, slopes, None)

    def compute(dy: Any, out: Any) -> Any:
        return backend.sloped(dy, None, saved, out)

    y = backend.sloped(x, None, saved, out)
    return y, VariantPullback(backend, x, x.shape, _size(x) * width / 8, compute)


def crelu(x: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None) -> ArrayT:
    """Apply a concatenated ReLU: ``relu(x)`` and, behind it, ``relu(-x)`` (Shang et al., 2016).

    Parameters
    ----------
    x : array, at least 1-D
        float16, bfloat16, float32 or float64.
    axis : int, optional
        Along which the two are concatenated; the second axis by default.
    out : array, library, device and dtype of `x`, optional
        Where to write the result; twice as long as `x` along the axis, and of other memory.

    Returns
    -------
    array, dtype of `x`, and its shape but for twice the length along `axis`
        NaN is in both halves.

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`; also TypeError for integers or an axis that is no whole number,
        ValueError if `x` has no such axis.

    Examples
    --------
    >>> import numpy as np
    >>> crelu(np.array([[-2.0, 0.0, 3.0]]))
    array([[0., 0., 3., 2., 0., 0.]])
    """
    return cast(ArrayT, crelu_forward("crelu", x, axis, out))


def crelu_vjp(
    x: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None
) -> tuple[ArrayT, VariantPullback[ArrayT]]:
    """Apply `crelu` and return a function for its gradient.

    Parameters
    ----------
    x, axis, out
        As for `crelu`.

    Returns
    -------
    y : array
        ``crelu(x)``; `out`, if given.
    pullback : VariantPullback
        ``pullback(dy)``, dy in the shape of y, is the gradient by x: the first half of dy where x
        is above 0, minus the second where it is below, exactly +0 at 0, the difference of both at
        NaN. What is kept is one byte an element of x.

    Raises
    ------
    TypeError, ValueError
        As `crelu`.
    """
    return crelu_saving("crelu_vjp", x, axis, out)


def crelu_forward(function: str, x: Any, axis: int, out: Any) -> Any:
    """Return `crelu`, naming `function` where something is refused."""
    backend, axis = _crelu(function, x, axis, out)
    return backend.both(x, axis, out)


def crelu_saving(function: str, x: Any, axis: int, out: Any) -> tuple[Any, VariantPullback[Any]]:
    """Return `crelu` and its pullback, naming `function` where something is refused."""
    backend, axis = _crelu(function, x, axis, out)
    pieces = backend.pieces_of_both(x)

    def compute(dy: Any, out: Any) -> Any:
        return backend.backward_both(dy, pieces, axis, out)

    y = backend.both(x, axis, out)
    return y, VariantPullback(backend, x, doubled(x.shape, axis), _size(x), compute)


def squared_relu(x: ArrayT, /, *, out: ArrayT | None = None) -> ArrayT:
    """Apply the square of a ReLU: ``relu(x)**2`` (So et al., 2021).

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
    return cast(ArrayT, squared_relu_forward("squared_relu", x, out))


def squared_relu_vjp(
    x: ArrayT, /, *, out: ArrayT | None = None
) -> tuple[ArrayT, VariantPullback[ArrayT]]:
    """Apply `squared_relu` and return a function for its gradient.

    Parameters
    ----------
    x, out
        As for `squared_relu`.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``squared_relu(x)``; `out`, if given.
    pullback : VariantPullback
        ``pullback(dy)`` is ``2 * x * dy`` where x is above 0 (or NaN), exactly +0 elsewhere. What
        is kept is a copy of `x`, except in libraries whose arrays are immutable.

    Raises
    ------
    TypeError, ValueError
        As `squared_relu`.
    """
    return squared_relu_saving("squared_relu_vjp", x, out)


def squared_relu_forward(function: str, x: Any, out: Any) -> Any:
    """Return `squared_relu`, naming `function` where something is refused."""
    backend, _ = _serving(function, x, out)
    return backend.squared(x, out)


def squared_relu_saving(function: str, x: Any, out: Any) -> tuple[Any, VariantPullback[Any]]:
    """Return `squared_relu` and its pullback, naming `function` where something is refused."""
    backend, width = _serving(function, x, out)
    saved = backend.copy(x)

    def compute(dy: Any, out: Any) -> Any:
        return backend.backward_squared(dy, saved, out)

    y = backend.squared(x, out)
    return y, VariantPullback(backend, x, x.shape, _size(x) * width / 8, compute)


def _serving(function: str, x: Any, out: Any = None) -> tuple[Backend, int]:
    """Return the backend and the bits of an element, if x and an `out` like it are lawful."""
    backend, numbers = serving(function, "x", x, _RELU, floating=True)
    _check_out(function, out, x, x, backend)
    return backend, numbers.width


def _check_out(function: str, out: Any, x: Any, other: Any, backend: Backend) -> None:
    """Refuse an `out`, which may be None, that is not like x, or overlaps one of both."""
    if out is not None and not backend.fits(out, x, other):
        check_out(function, out, x, "x", (x, other), backend)


def _slopes(
    function: str, name: str, backend: Backend, x: Any, weight: Any, axis: int
) -> tuple[Any, int, tuple[Any, ...], tuple[Any, ...]]:
    """Return a weight with as many axes as x, if it fits, its width, and indices there and back."""
    its_backend, numbers = serving(function, name, weight, _RELU, floating=True)
    check_place(function, name, weight, its_backend, backend.place(x), "x is")
    ndim = len(x.shape)
    axis = whole(f"{function}: axis", axis)
    if len(weight.shape) > 1:
        raise ValueError(
            f"{function}: {name} has shape {tuple(weight.shape)}; give one slope, or an array "
            "with one axis, that of the channels"
        )
    there: tuple[Any, ...]
    back: tuple[Any, ...]
    if not len(weight.shape):
        there, back = (None,) * ndim, (0,) * ndim
    elif not ndim and weight.shape[0] == 1:
        there, back = (0,), (None,)
    else:
        axis = 0 if weight.shape[0] == 1 else _channels(function, name, x, weight, axis)
        there = tuple(slice(None) if i == axis else None for i in range(ndim))
        back = tuple(slice(None) if i == axis else 0 for i in range(ndim))
    # With an ellipsis a 0-d array stays an array.
    return weight[(*there, ...)], numbers.width, (*there, ...), (*back, ...)


def _channels(function: str, name: str, x: Any, weight: Any, axis: int) -> int:
    """Return the axis of x that has a channel for each of the slopes."""
    axis = _axis(function, x, axis)
    if math.isnan(x.shape[axis]):
        raise _of_unknown_length(function, axis)
    if weight.shape[0] != x.shape[axis]:
        raise ValueError(
            f"{function}: {name} has {weight.shape[0]} slopes, but x has {x.shape[axis]} channels "
            f"along axis {axis} (shape {tuple(x.shape)})"
        )
    return axis


def _of_unknown_length(function: str, axis: int) -> ValueError:
    return ValueError(
        f"{function}: x has an unknown number of channels along axis {axis}; "
        "call x.compute_chunk_sizes() first"
    )


def _reusable(backend: Backend, array: Any, like: Any, dy: Any, out: Any) -> bool:
    """Tell whether an array, which may be None, can take what belongs into one `like` it.

    It must not be needed for dx.
    """
    if type(array) is not type(like) or array.shape != like.shape or array.dtype != like.dtype:
        return False
    if array is dy or array is out:
        return False
    try:
        backend.check_out(array, (like, dy) if out is None else (like, dy, out))
    except (TypeError, ValueError):
        return False
    return backend.place(array) == backend.place(like)


def _axis(function: str, x: Any, axis: int) -> int:
    """Return an axis of x, a whole number, counted from the first."""
    ndim = len(x.shape)
    if not -ndim <= axis < ndim:
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}, and no axis {axis}")
    return axis % ndim


def _crelu(function: str, x: Any, axis: int, out: Any) -> tuple[Backend, int]:
    """Return the backend and the axis counted from the first, if x and out fit."""
    backend, _ = _serving(function, x)
    axis = _axis(function, x, whole(f"{function}: axis", axis))
    if math.isnan(x.shape[axis]):
        raise _of_unknown_length(function, axis)
    if out is not None:
        check_out(function, out, x, "x", (x,), backend, doubled(x.shape, axis))
    return backend, axis


def _size(x: Any) -> float:
    """Return the number of elements; NaN where Dask does not know it."""
    size: float = math.prod(x.shape)
    return size


def _drawn_slopes(
    function: str, backend: Backend, x: Any, lower: float, upper: float, rng: Any
) -> tuple[Any, int]:
    """Return a slope for each element, and the bits of one."""
    try:
        slopes = backend.uniform(rng, lower, upper, x)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"{function}: rng must draw arrays of random numbers, as numpy.random.default_rng() "
            f"does, got {type(rng).__name__} ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from error
    what = "what rng drew"
    its_backend, numbers = serving(function, what, slopes, _RELU, floating=True)
    check_place(function, what, slopes, its_backend, backend.place(x), "x is")
    check_shape(function, what, slopes, x.shape, "x has")
    return slopes, numbers.width
