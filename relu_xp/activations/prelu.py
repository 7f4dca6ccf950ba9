"""Parametric ReLU: the functions and the layer."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import array_api_compat
import numpy as np

from relu_xp.activations._base import Layer, Pullback
from relu_xp.arrays import to_numpy
from relu_xp.backends.base import Backend
from relu_xp.dispatch import backend_for
from relu_xp.parameters import RELU, CastParameters, as_real
from relu_xp.validation import as_axis, as_integer, check_device, check_out, resolve, unknown_length

__all__ = ["PReLU", "prelu", "prelu_vjp"]

ArrayT = TypeVar("ArrayT")


def prelu(x: ArrayT, weight: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None) -> ArrayT:
    """Return the parametric ReLU: a leaky ReLU whose negative slope is learned (He et al., 2015).

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
    x: ArrayT, weight: ArrayT, /, *, axis: int = 1, out: ArrayT | None = None
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


def _prelu(function: str, x: Any, weight: Any, axis: int, out: Any, name: str = "weight") -> Any:
    backend, weight, _ = _resolve(function, x, weight, axis, out, name)
    return backend.prelu(x, x, weight, out)


def _prelu_vjp(
    function: str, x: Any, weight: Any, axis: int, out: Any, name: str = "weight"
) -> tuple[Any, Pullback[Any]]:
    backend, weight, rule = _resolve(function, x, weight, axis, out, name)
    residuals = backend.copy(x), backend.copy(weight)  # first, since out may be x
    y = backend.prelu(x, x, weight, out)
    return y, Pullback(partial(rule.gradients, backend), backend, RELU, x, residuals)


class _Rule(NamedTuple):
    """The gradients, and the indices that expand a weight to the axes of x and squeeze it back."""

    expand: tuple[Any, ...]
    squeeze: tuple[Any, ...]

    def gradients(
        self, backend: Backend, params: CastParameters, dy: Any, residuals: Any, out: Any, /
    ) -> Any:
        """Return dx and the weight's gradient, which comes first, since out may be dy."""
        x, weight = residuals
        weight_grad = backend.prelu_weight_grad(dy, x, weight)[self.squeeze]
        return backend.prelu(dy, x, weight, out), weight_grad


def _resolve(
    function: str, x: Any, weight: Any, axis: int, out: Any, name: str
) -> tuple[Backend, Any, _Rule]:
    """Return the backend, a weight with as many axes as x, and the rule, if all is valid."""
    backend, _ = resolve(function, "x", x, RELU, floating=True)
    its_backend, _ = resolve(function, name, weight, RELU, floating=True)
    check_device(function, name, weight, its_backend, backend.device(x), "x is")
    ndim = len(x.shape)
    axis = as_integer(f"{function}: axis", axis)
    if len(weight.shape) > 1:
        raise ValueError(
            f"{function}: {name} has shape {tuple(weight.shape)}; give one slope, or an array "
            "with one axis, that of the channels"
        )
    rule = _Rule((None,) * ndim, (0,) * ndim)
    if len(weight.shape) and not ndim and weight.shape[0] == 1:
        rule = _Rule((0,), (None,))
    elif len(weight.shape):
        axis = 0 if weight.shape[0] == 1 else _channel_axis(function, name, x, weight, axis)
        rule = _Rule(
            tuple(slice(None) if i == axis else None for i in range(ndim)),
            tuple(slice(None) if i == axis else 0 for i in range(ndim)),
        )
    if out is not None and not backend.is_valid_out(out, x, weight):
        check_out(function, out, x, "x", (x, weight), backend)
    # With an ellipsis a 0-d array stays an array.
    rule = _Rule((*rule.expand, ...), (*rule.squeeze, ...))
    return backend, weight[rule.expand], rule


def _channel_axis(function: str, name: str, x: Any, weight: Any, axis: int) -> int:
    """Return the axis of x that has a channel for each of the slopes."""
    axis = as_axis(function, x, axis)
    if math.isnan(x.shape[axis]):
        raise unknown_length(function, axis)
    if weight.shape[0] != x.shape[axis]:
        raise ValueError(
            f"{function}: {name} has {weight.shape[0]} slopes, but x has {x.shape[axis]} channels "
            f"along axis {axis} (shape {tuple(x.shape)})"
        )
    return axis


_WEIGHT = "layer.params[0]"  # in messages


class PReLU(Layer):
    """`relu_xp.prelu` as a layer, whose negative slope is learned (He et al., 2015).

    `params` is the list ``[weight]`` and `grads` the list of its gradient, as the layers of "Deep
    Learning from Scratch 2" have them: an optimiser written for those updates `params` in place,
    and finds the gradient in the array that was there before (in another one where the library's
    arrays cannot be written).

    The weight lies in one library. For another one make the layer with `xp`, or move it:
    ``layer.params[0] = cupy.asarray(layer.params[0])``. In a pickle it is a NumPy array; `repr`
    shows neither its values nor its library.

    Parameters
    ----------
    num_parameters : int, optional
        1 for one slope, or the number of channels.
    init : float, optional
        The first value of every slope.
    axis : int, optional
        Where the channels are; the second axis by default.
    xp : module, optional
        Array API namespace of the weight; NumPy by default.
    dtype : dtype of that library, optional
        The weight's; float32 by default.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.

    Raises
    ------
    TypeError, ValueError
        If a number is of the wrong kind, `num_parameters` below 1, or `init` not finite in `dtype`;
        TypeError also if `xp` is no array library, or `dtype` not a floating one.

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

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        axis: int = 1,
        *,
        xp: Any = np,
        dtype: Any = None,
        inplace: bool = False,
    ) -> None:
        self._count = as_integer("num_parameters", num_parameters)
        if self._count < 1:
            raise ValueError(f"num_parameters must be at least 1, got {num_parameters}")
        self._init = as_real("init", init)
        self._axis = as_integer("axis", axis)
        self.inplace = inplace
        if not hasattr(xp, "full"):
            raise TypeError(
                f"xp must be an array library, such as the module cupy, got {type(xp).__name__}"
            )
        dtype = xp.float32 if dtype is None else dtype
        with np.errstate(all="ignore"):
            weight = xp.full((self._count,), self._init, dtype=dtype)
        resolve("PReLU", "the weight", weight, RELU, floating=True)  # refuses other dtypes
        if not math.isfinite(float(weight[0])):
            raise ValueError(f"init must be finite in {weight.dtype}, got {init}")
        self._params = [weight]
        self._grads = [xp.zeros((self._count,), dtype=dtype)]

    @property
    def params(self) -> list[Any]:
        """``[weight]``, shape (num_parameters,)."""
        return self._params

    @property
    def grads(self) -> list[Any]:
        """``[gradient]``, likewise; 0 before the first `backward`."""
        return self._grads

    def _forward(self, x: Any, out: Any) -> Any:
        return _prelu("forward", x, self._params[0], self._axis, out, _WEIGHT)

    def _forward_with_pullback(self, x: Any, out: Any) -> tuple[Any, Pullback[Any]]:
        return _prelu_vjp("forward", x, self._params[0], self._axis, out, _WEIGHT)

    def _backward(self, pullback: Pullback[Any], dy: Any, out: Any) -> Any:
        dx, weight_grad = pullback.backward("backward", dy, out)
        self._grads[0] = _store(self._grads[0], weight_grad, (dy, dx))
        return dx

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_params", "_grads"):  # a machine that loads it may have no GPU
            state[name] = [_on_the_host(array) for array in state[name]]
        return state

    def __copy__(self) -> PReLU:
        again = type(self).__new__(type(self))
        again.__dict__.update(super().__getstate__())
        again._params, again._grads = list(self._params), list(self._grads)
        return again

    def __deepcopy__(self, memo: dict[int, Any]) -> PReLU:
        again = type(self).__new__(type(self))
        again.__dict__.update(copy.deepcopy(super().__getstate__(), memo))
        return again

    def __repr__(self) -> str:
        return self._repr(str(self._count), f"init={self._init}", f"axis={self._axis}")


def _on_the_host(array: Any) -> Any:
    """Return an array as a NumPy array; where NumPy has no such dtype, of float32."""
    try:
        return to_numpy(array)
    except TypeError:
        xp = array_api_compat.array_namespace(array)
        return to_numpy(xp.astype(array, xp.float32))


def _store(array: Any, weight_grad: Any, others: tuple[Any, Any]) -> Any:
    """Return an array with the weight's gradient, or that itself if the array cannot be written.

    Nor is it written if it is of another kind, or shares memory with the others.
    """
    backend = backend_for("backward", "dy", weight_grad)
    if type(array) is not type(weight_grad) or any(array is other for other in others):
        return weight_grad
    like = weight_grad.shape, weight_grad.dtype, backend.device(weight_grad)
    if (array.shape, array.dtype, backend.device(array)) != like:
        return weight_grad
    try:
        backend.check_out(array, others)
    except (TypeError, ValueError):
        return weight_grad
    return backend.store(weight_grad, array)
