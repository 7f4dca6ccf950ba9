"""Parametric ReLU: the functions and the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np

from relu_xp.activations._learned import LEARNED, LearnedLayer
from relu_xp.activations._pullback import Pullback, Rule
from relu_xp.backends.base import Backend
from relu_xp.parameters import RELU, CastParameters, as_real
from relu_xp.validation import as_axis, as_integer, check_device, check_out, resolve, unknown_length

__all__ = ["PReLU", "prelu", "prelu_vjp"]

ArrayT = TypeVar("ArrayT")


def prelu(
    x: ArrayT, weight: ArrayT, /, *, axis: int | None = None, out: ArrayT | None = None
) -> ArrayT:
    """Return the parametric ReLU: a leaky ReLU whose negative slope is learned (He et al., 2015).

    ``f(x) = weight * x`` where ``x <= 0``, else x.

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64.
    weight : array, library and device of `x`
        One slope, of shape () or (1,); one for each channel, of shape ``(x.shape[axis],)``; or an
        array with two or more axes that broadcasts to the shape of `x` as in NumPy, such as
        ``(64, 1, 1)`` or ``x.shape[1:]``. Any floating dtype: it is rounded to that of `x` first,
        and a slope of 0 then means exactly +0.
    axis : int, optional
        Where the channels are, for a weight with one axis. By default the second axis; or the last
        one, if the weight has the length of that one and not of the second. Give -1 where the
        channels are always last, as in x of shape (batch, time, channels) and in ONNX: without it
        an x with as many times as channels takes the slopes along the times.
    out : array, like `x`, optional
        Where to write the result: `x` itself, or an array that shares no memory with it.

    Returns
    -------
    array, shape and dtype of `x`

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`; also TypeError for integers or an axis that is not an integer, and
        either for an invalid `weight`.

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
    return cast(ArrayT, _prelu("prelu", x, weight, axis, out))


def prelu_vjp(
    x: ArrayT, weight: ArrayT, /, *, axis: int | None = None, out: ArrayT | None = None
) -> tuple[ArrayT, Pullback[tuple[ArrayT, ArrayT]]]:
    """Return `prelu` and a function for its gradients.

    Parameters
    ----------
    x, weight, axis, out
        As for `prelu`.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``prelu(x, weight)``; `out`, if given.
    pullback : Pullback
        ``pullback(dy)`` is ``(dx, dweight)``: f'(x) * dy in the dtype of dy, and the sum of x * dy
        over what is at or below 0, in shape and dtype of `weight`, summed in float64 (float32 in a
        library without it). Where x is above 0 or NaN nothing is added. What is kept is a copy of
        `x`, except in libraries whose arrays are immutable, and one of `weight`.

    Raises
    ------
    TypeError, ValueError
        As `prelu`.
    """
    return _prelu_vjp("prelu_vjp", x, weight, axis, out)


def _prelu(
    function: str, x: Any, weight: Any, axis: int | None, out: Any, name: str = "weight"
) -> Any:
    x, backend, _, expanded = _resolve(function, x, weight, axis, out, name)
    return backend.prelu(x, x, expanded, out)


def _prelu_vjp(
    function: str, x: Any, weight: Any, axis: int | None, out: Any, name: str = "weight"
) -> tuple[Any, Pullback[Any]]:
    x, backend, shape, expanded = _resolve(function, x, weight, axis, out, name)
    residuals = backend.copy(x), backend.copy(expanded)  # first, since out may be x
    y = backend.prelu(x, x, expanded, out)
    return y, Pullback(Rule(_gradients, backend, shape), backend, RELU, x, residuals)


def _gradients(
    backend: Backend,
    shape: tuple[int, ...],
    params: CastParameters,
    dy: Any,
    residuals: Any,
    out: Any,
) -> tuple[Any, Any]:
    """Return dx, and the weight's gradient in a shape."""
    x, weight = residuals
    weight_grad = backend.prelu_weight_grad(dy, x, weight)  # first, since out may be dy
    return backend.prelu(dy, x, weight, out), _reshape(backend, weight_grad, shape)


def _reshape(backend: Backend, array: Any, shape: tuple[int, ...]) -> Any:
    return array if array.shape == shape else backend.namespace(array).reshape(array, shape)


def _resolve(
    function: str, x: Any, weight: Any, axis: int | None, out: Any, name: str
) -> tuple[Any, Backend, tuple[int, ...], Any]:
    """Return x, its backend, the weight's shape, and the weight with as many axes as x."""
    x, backend, _ = resolve(function, "x", x, RELU, floating=True)
    weight, its_backend, _ = resolve(function, name, weight, RELU, floating=True)
    check_device(function, name, weight, its_backend, backend.device(x), "x is")
    if axis is not None:
        axis = as_integer(f"{function}: axis", axis)
    shape = tuple(weight.shape)
    expanded = _reshape(backend, weight, _expanded_shape(function, name, x, shape, axis))
    if out is not None and not backend.is_valid_out(out, x, weight):
        check_out(function, out, x, "x", (x, weight), backend)
    return x, backend, shape, expanded


def _expanded_shape(
    function: str, name: str, x: Any, shape: tuple[int, ...], axis: int | None
) -> tuple[int, ...]:
    """Return the shape that a weight gets: with an axis for each one of x."""
    ndim = len(x.shape)
    if any(map(math.isnan, shape)):
        raise ValueError(f"{function}: {name} has a shape that is not known, {shape}")
    if shape in ((), (1,)):
        return (1,) * ndim
    if len(shape) == 1:
        axis = _channel_axis(function, name, x, shape[0], axis)
        return (1,) * axis + shape + (1,) * (ndim - axis - 1)
    expanded = (1,) * (ndim - len(shape)) + shape
    for i, (own, length) in enumerate(zip(expanded, x.shape, strict=False)):
        if own != 1 and math.isnan(length):
            raise unknown_length(function, i)
    if len(shape) > ndim or any(
        own not in (1, length) for own, length in zip(expanded, x.shape, strict=True)
    ):
        raise ValueError(
            f"{function}: {name} has shape {shape}, which does not broadcast to the shape of x, "
            f"{tuple(x.shape)}; give one slope, one for each channel, or a shape that does"
        )
    return expanded


def _channel_axis(function: str, name: str, x: Any, count: int, axis: int | None) -> int:
    """Return the axis of x that has a channel for each of the slopes."""
    if axis is None:
        if not len(x.shape):
            raise ValueError(f"{function}: {name} has {count} slopes, but x has no axes")
        second, last = x.shape[1:2], x.shape[-1:]
        fits_last = count in last and count not in second and not any(map(math.isnan, second))
        axis = -1 if fits_last or not second else 1
    axis = as_axis(function, x, axis)
    if math.isnan(x.shape[axis]):
        raise unknown_length(function, axis)
    if count != x.shape[axis]:
        raise ValueError(
            f"{function}: {name} has {count} slopes, but x has {x.shape[axis]} channels "
            f"along axis {axis} (shape {tuple(x.shape)})"
        )
    return axis


class PReLU(LearnedLayer):
    """`relu_xp.prelu` as a layer, whose negative slope is learned (He et al., 2015).

    `params` is the list ``[weight]`` and `grads` the list of its gradient, as the layers of "Deep
    Learning from Scratch 2" have them: an optimiser written for those updates `params` in place,
    and finds the gradient in the array that was there before (in another one where the library's
    arrays cannot be written).

    The weight lies in one library. For another one make the layer with `xp`, or move it:
    ``layer.params[0] = cupy.asarray(layer.params[0])``. In a pickle an array on a GPU becomes a
    NumPy array, and its list another one. After that, and after ``joblib.load``, which makes an
    array of each reference to one, collect the layer's arrays again. `repr` shows neither the
    values nor the library.

    Parameters
    ----------
    num_parameters : int or tuple of int, optional
        1 for one slope, the number of channels, or the weight's shape: as for `prelu`, for example
        ``(64, 1, 1)``.
    init : float, optional
        The first value of every slope.
    axis : int, optional
        Where the channels are, for a weight with one axis; the second axis by default.
    xp : module, optional
        Array API namespace of the weight; NumPy by default.
    dtype : dtype of that library, optional
        The weight's; float32 by default.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.

    Raises
    ------
    TypeError, ValueError
        If a number is of the wrong kind, one in `num_parameters` below 1, or `init` not finite in
        `dtype`; TypeError also if `xp` is no array library, or `dtype` not a floating one.

    Examples
    --------
    >>> import numpy as np
    >>> layer = PReLU()
    >>> layer.forward(np.array([[-2.0, 4.0]]))
    array([[-0.5,  4. ]])
    >>> layer.backward(np.ones((1, 2)))
    array([[0.25, 1.  ]])
    >>> layer.grads
    [array([-2.], dtype=float32)]
    """

    _role = "PReLU's weight"

    def __init__(
        self,
        num_parameters: int | Sequence[int] = 1,
        init: float = 0.25,
        axis: int = 1,
        *,
        xp: Any = np,
        dtype: Any = None,
        inplace: bool = False,
    ) -> None:
        lengths = num_parameters if isinstance(num_parameters, tuple | list) else [num_parameters]
        shape = tuple([as_integer("num_parameters", length) for length in lengths])
        if shape and min(shape) < 1:
            raise ValueError(f"num_parameters must be at least 1, got {num_parameters}")
        self._count = shape[0] if len(shape) == 1 else shape
        self._init = as_real("init", init)
        self._axis = as_integer("axis", axis)
        self.inplace = inplace
        weight = self._learn(shape, self._init, xp, dtype)
        if not math.isfinite(float(weight[(0,) * len(shape)])):
            raise ValueError(f"init must be finite in {weight.dtype}, got {init}")

    def _forward(self, x: Any, out: Any) -> Any:
        return _prelu("forward", x, self._learned(), self._axis, out, LEARNED)

    def _forward_with_pullback(self, x: Any, out: Any) -> tuple[Any, Pullback[Any]]:
        return _prelu_vjp("forward", x, self._learned(), self._axis, out, LEARNED)

    def __repr__(self) -> str:
        return self._repr(str(self._count), f"init={self._init}", f"axis={self._axis}")
