"""A bias, then ReLU, in one pass: the functions and the layer."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar, cast

import numpy as np

from relu_xp.activations._learned import LEARNED, LearnedLayer
from relu_xp.activations._pullback import Pullback, Rule
from relu_xp.backends.base import Backend
from relu_xp.parameters import ONE, RELU, ZERO, CastParameters, Parameters, make_parameters
from relu_xp.validation import (
    as_axis,
    as_integer,
    check_device,
    check_mask,
    check_out,
    resolve,
    unknown_length,
)

__all__ = ["BiasReLU", "bias_relu", "bias_relu_vjp"]

ArrayT = TypeVar("ArrayT")


def bias_relu(
    x: ArrayT,
    bias: ArrayT,
    /,
    *,
    axis: int = -1,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return `relu` of ``x + bias``, in one pass: what follows a matrix product or a convolution.

    The bias goes along one axis. The sum is rounded to the dtype of x once; the result has the bits
    that `relu` gives for it.

    Parameters
    ----------
    x : array, at least 1-D
        float16, bfloat16, float32 or float64.
    bias : array, library and device of `x`, shape (x.shape[axis],)
        Any floating dtype: it is rounded to that of `x` first.
    axis : int, optional
        Along which the bias goes; the last axis by default. 1 for images of shape (batch, channels,
        height, width).
    negative_slope, threshold, positive_slope, max_value
        As for `relu`.
    out : array, like `x`, optional
        Where to write the result: `x` itself, or an array that shares no memory with `x` or `bias`.

    Returns
    -------
    array, shape and dtype of `x`

    Raises
    ------
    TypeError, ValueError
        As `relu`; also TypeError for integers or an axis that is not an integer, and either for an
        invalid `bias`.

    Notes
    -----
    Made of differentiable operations, in `bias` too, for the libraries that trace. These sum their
    gradient of the bias in the dtype of `x`; `bias_relu_vjp` does not.

    Examples
    --------
    >>> import numpy as np
    >>> bias_relu(np.array([[-2.0, 1.0], [3.0, 0.0]]), np.array([0.5, -0.25]))
    array([[0.  , 0.75],
           [3.5 , 0.  ]])
    """
    parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
    return cast(ArrayT, _bias_relu("bias_relu", parameters, x, bias, axis, out))


def bias_relu_vjp(
    x: ArrayT,
    bias: ArrayT,
    /,
    *,
    axis: int = -1,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
    mask: ArrayT | None = None,
) -> tuple[ArrayT, Pullback[tuple[ArrayT, ArrayT]]]:
    """Return `bias_relu` and a function for its gradients.

    Parameters
    ----------
    x, bias, axis, negative_slope, threshold, positive_slope, max_value, out
        As for `bias_relu`.
    mask : array of uint8, optional
        Where to keep the mask, as for `relu_vjp`.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``bias_relu(x, bias)``; `out`, if given.
    pullback : Pullback
        ``pullback(dy)`` is ``(dx, dbias)``: ``f'(x + bias) * dy`` in the dtype of dy, and its sum
        along all other axes, in shape and dtype of `bias`. It is summed in float64 (float32 in a
        library without it); on NumPy and CuPy arrays in an order that depends on shape and axis
        alone, so that the same numbers give the same bits. What is kept is the mask of
        ``relu(x + bias)``, as for `relu_vjp`.

    Raises
    ------
    TypeError, ValueError
        As `bias_relu`, and either for an invalid `mask`.
    """
    parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
    return _bias_relu_vjp("bias_relu_vjp", parameters, x, bias, axis, out, mask)


def _bias_relu(
    function: str,
    parameters: Parameters,
    x: Any,
    bias: Any,
    axis: int,
    out: Any,
    name: str = "bias",
) -> Any:
    x, backend, params, bias, axis = _resolve(function, parameters, x, bias, axis, out, name)
    return backend.bias_relu(params, x, bias, axis, out)


def _bias_relu_vjp(
    function: str,
    parameters: Parameters,
    x: Any,
    bias: Any,
    axis: int,
    out: Any,
    mask: Any,
    name: str = "bias",
) -> tuple[Any, Pullback[Any]]:
    x, backend, params, bias, axis = _resolve(function, parameters, x, bias, axis, out, name)
    if mask is not None:
        check_mask(function, mask, (x, bias, out), params, backend)
    y, residuals = backend.bias_relu_with_mask(params, x, bias, axis, out, mask)
    if mask is not None:
        mask = residuals.data  # what of it is in use
    rule = Rule(_gradients, backend, axis, bias.dtype)
    return y, Pullback(rule, backend, parameters, x, residuals, None, mask)


def _gradients(
    backend: Backend,
    axis: int,
    dtype: Any,
    params: CastParameters,
    dy: Any,
    residuals: Any,
    out: Any,
) -> tuple[Any, Any]:
    return backend.bias_relu_backward(params, dy, residuals, axis, dtype, out)


def _resolve(
    function: str, parameters: Parameters, x: Any, bias: Any, axis: int, out: Any, name: str
) -> tuple[Any, Backend, CastParameters, Any, int]:
    """Return x, its backend, the parameters, the bias, and the axis counted from the first."""
    x, backend, params = resolve(function, "x", x, parameters, floating=True)
    bias, its_backend, _ = resolve(function, name, bias, parameters, floating=True)
    check_device(function, name, bias, its_backend, backend.device(x), "x is")
    axis = as_axis(function, x, axis)
    length = x.shape[axis]
    if tuple(bias.shape) != (length,):
        if math.isnan(length):
            raise unknown_length(function, axis)
        if math.isnan(math.prod(bias.shape)):
            raise ValueError(
                f"{function}: {name} has an unknown length; call {name}.compute_chunk_sizes() first"
            )
        raise ValueError(
            f"{function}: {name} has shape {tuple(bias.shape)}, but x has {length} channels along "
            f"axis {axis} (shape {tuple(x.shape)}); give a bias of shape ({length},), or axis="
        )
    if out is not None and not backend.is_valid_out(out, x, bias):
        check_out(function, out, x, "x", (x, bias), backend)
    return x, backend, params, bias, axis


class BiasReLU(LearnedLayer):
    """`relu_xp.bias_relu` as a layer, which learns the bias: what follows a matrix product.

    `params` is the list ``[bias]`` and `grads` the list of its gradient, updated, moved and pickled
    as those of `relu_xp.PReLU`. The layer saves a mask, as `relu_xp.ReLU` does, never the input or
    output. `repr` shows neither the bias nor its library.

    Parameters
    ----------
    num_features : int
        Length of the bias, which is 0 at first.
    axis : int, optional
        Along which it goes; the last axis by default. 1 for images of shape (batch, channels,
        height, width).
    negative_slope, threshold, positive_slope, max_value : float, optional
        As for `relu_xp.relu`.
    xp : module, optional
        Array API namespace of the bias; NumPy by default.
    dtype : dtype of that library, optional
        The bias's; float32 by default.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`, for the parameters. TypeError also if `num_features` or `axis` is not an
        integer, `xp` no array library, or `dtype` not a floating one; ValueError also if
        `num_features` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.array([[1.0, -2.0]]), np.array([[1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    >>> layer = BiasReLU(3)
    >>> layer.params[0][:] = [0.5, -3.0, 2.0]
    >>> layer.forward(x @ weight)
    array([[1.5, 0. , 0.5]])
    >>> dx = layer.backward(np.ones((1, 3))) @ weight.T
    >>> layer.grads
    [array([1., 0., 1.], dtype=float32)]
    """

    _role = "BiasReLU's bias"

    def __init__(
        self,
        num_features: int,
        axis: int = -1,
        *,
        negative_slope: float = 0.0,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
        xp: Any = np,
        dtype: Any = None,
        inplace: bool = False,
    ) -> None:
        self._count = as_integer("num_features", num_features)
        if self._count < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        self._axis = as_integer("axis", axis)
        self._parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
        self.inplace = inplace
        self._learn((self._count,), 0.0, xp, dtype)

    @functools.cached_property
    def activation(self) -> Parameters:
        """The layer's four parameters."""
        return self._parameters

    def forward(
        self,
        x: ArrayT,
        /,
        *,
        training: bool = True,
        out: ArrayT | None = None,
        mask: ArrayT | None = None,
    ) -> ArrayT:
        """Return y, and save what `backward` needs.

        Parameters
        ----------
        x : array, at least 1-D
            float16, bfloat16, float32 or float64.
        training : bool, optional
            False saves nothing, and keeps what an earlier call saved.
        out : array, like `x`, optional
            Where to write the result. Not for a layer that works in place.
        mask : array of uint8, optional
            Where to keep the mask, as for `relu_xp.relu_vjp`. Not used with ``training=False``.

        Returns
        -------
        array, shape and dtype of `x`

        Raises
        ------
        TypeError, ValueError
            As `relu_xp.bias_relu`. What an earlier call saved is then kept.
        """
        if self._inplace:
            out = self._out_in_place("forward", x, out)
        arguments = "forward", self._parameters, x, self._learned(), self._axis, out
        if not training:
            return cast(ArrayT, _bias_relu(*arguments, LEARNED))
        y, self._pullback = _bias_relu_vjp(*arguments, mask, LEARNED)
        return cast(ArrayT, y)

    def __repr__(self) -> str:
        given = [f"axis={self._axis}"] * (self._axis != -1)
        for name in ("negative_slope", "threshold", "positive_slope", "max_value"):
            value = getattr(self._parameters, name)
            if value != getattr(RELU, name):
                given.append(f"{name}={value!r}")
        return self._repr(str(self._count), *given)
