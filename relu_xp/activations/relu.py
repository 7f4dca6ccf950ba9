"""ReLU with its four parameters: the functions and the layer. Its presets are in ``presets.py``."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, TypeVar, cast

from relu_xp.activations._base import Layer, forward, forward_with_pullback
from relu_xp.activations._pullback import Pullback
from relu_xp.parameters import ONE, ZERO, Parameters, make_parameters
from relu_xp.validation import check_grad_output, check_out, resolve

__all__ = ["ReLU", "Relu", "relu", "relu_backward", "relu_grad", "relu_vjp"]

ArrayT = TypeVar("ArrayT")


def relu(
    x: ArrayT,
    /,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return the rectified linear unit of every element (Nair and Hinton, 2010).

    ``f(x) = negative_slope * x`` where ``x <= threshold``, else
    ``min(positive_slope * x, max_value)``. NaN stays NaN; with a negative slope of 0, everything at
    or below a threshold of 0 becomes +0, -0.0 and -inf included.

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32, float64, or an integer dtype that holds the parameters. In all
        functions and layers a NumPy scalar is taken as the 0-d array that it stands for.
    negative_slope : float, or 0-d array of NumPy's, optional
        Factor at and below the threshold. 0 means exactly +0, never a product.
    threshold : float, optional
        Where the slope changes; an x that equals it belongs to the lower branch.
    positive_slope : float, optional
        Factor above the threshold, not 0. 1 means x itself, never a product.
    max_value : float, optional
        Ceiling; there is none by default. Needs ``positive_slope > 0`` and
        ``max_value > positive_slope * threshold``.
    out : array, same library, device, shape and dtype as `x`, optional
        Where to write the result: `x` itself, or an array that shares no memory with it.

    Returns
    -------
    array, shape and dtype of `x`
        `out`, if given.

    Raises
    ------
    TypeError
        If `x` is not an array or its dtype is not supported (bool, complex, object), if a
        parameter is not real, or if `out` is of another library or dtype or cannot be written.
    ValueError
        If a parameter is NaN, infinite or invalid, if an integer dtype does not hold it, or if
        `out` is of another device or shape, read-only, broadcast or overlapping.

    Notes
    -----
    The parameters are checked as they are given, and then rounded to the dtype of `x`: in float16 a
    `max_value` of 1e-9 is 0, and a `threshold` of 1e9 is infinite. Either slope may be negative.
    Made of differentiable operations for the libraries that trace (JAX, PyTorch).

    Examples
    --------
    >>> import numpy as np
    >>> relu(np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 3.])
    >>> relu(np.array([-2.0, 0.0, 3.0]), negative_slope=0.5, max_value=2.0)
    array([-1.,  0.,  2.])
    """
    return forward(
        "relu", make_parameters(negative_slope, threshold, positive_slope, max_value), x, out
    )


def relu_grad(
    x: ArrayT,
    /,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return the derivative ``f'(x)`` of `relu` at every element.

    ``negative_slope`` where ``x <= threshold``, 0 at the ceiling, else ``positive_slope``, also
    at NaN.

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64.
    negative_slope, threshold, positive_slope, max_value, out
        As for `relu`.

    Returns
    -------
    array, shape and dtype of `x`

    Raises
    ------
    TypeError, ValueError
        As `relu`; also TypeError for an integer `x`.
    """
    parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
    x, backend, params = resolve("relu_grad", "x", x, parameters, floating=True)
    if out is not None and not backend.is_valid_out(out, x, x):
        check_out("relu_grad", out, x, "x", (x,), backend)
    gradient: ArrayT = backend.backward_from_input(params, params, None, x, out)
    return gradient


def relu_backward(
    dy: ArrayT,
    x: ArrayT,
    /,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return the gradient ``f'(x) * dy`` of `relu`, from its input.

    A select, not a product: where ``f'(x)`` is 0 the result is +0, even if `dy` is NaN or
    infinite there.

    Parameters
    ----------
    dy : array, shape of `x`
        Gradient with respect to the output; any floating dtype, any layout.
    x : array
        The input of the forward pass; float16, bfloat16, float32 or float64.
    negative_slope, threshold, positive_slope, max_value
        As for `relu`. Threshold and ceiling are rounded to the dtype of `x`, the slopes to that of
        `dy`.
    out : array, library, device, shape and dtype of `dy`, optional
        Where to write the result: `dy` itself, `x` itself, or an array that shares no memory with
        either.

    Returns
    -------
    array, shape of `x`, dtype of `dy`

    Raises
    ------
    TypeError, ValueError
        As `relu`; also TypeError for an integer or for two libraries, ValueError for two devices
        or shapes.
    """
    parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
    x, backend, params = resolve("relu_backward", "x", x, parameters, floating=True)
    shape = cast(Any, x).shape
    device = backend.device(x)
    dy, grad_params = check_grad_output("relu_backward", dy, parameters, device, shape, "x is")
    if out is not None and not backend.is_valid_out(out, dy, x):
        check_out("relu_backward", out, dy, "dy", (dy, x), backend)
    dx: ArrayT = backend.backward_from_input(params, grad_params, dy, x, out)
    return dx


def relu_vjp(
    x: ArrayT,
    /,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
    mask: ArrayT | None = None,
) -> tuple[ArrayT, Pullback[ArrayT]]:
    """Return `relu` and a function for its gradient (a vector-Jacobian product).

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64.
    negative_slope, threshold, positive_slope, max_value, out
        As for `relu`.
    mask : array of uint8, library and device of `x`, shape (n,), optional
        Contiguous memory to keep the mask in, instead of a new array: ``n`` is at least
        ``(x.size + 7) // 8``, or ``x.size`` with both a ceiling and a negative slope. The pullback
        reads it: do not write it before the last call of the pullback. NumPy and CuPy only.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``relu(x)``; `out`, if given.
    pullback : Pullback
        ``pullback(dy)`` is ``f'(x) * dy``. It keeps neither `x` nor `y`, so both may be
        overwritten, but a mask: one bit an element for arrays of NumPy, CuPy, Dask (with chunks of
        these) and PyTorch on a CPU; one byte with both a ceiling and a negative slope, and in other
        libraries.

    Raises
    ------
    TypeError, ValueError
        As `relu`; also TypeError for an integer `x`, and either for an invalid `mask`.
    """
    parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
    return forward_with_pullback("relu_vjp", parameters, x, out, mask)


class ReLU(Layer):
    """`relu_xp.relu` with a backward pass, for arrays of any library (Nair and Hinton, 2010).

    The layer holds the mask of its latest `forward` (what `relu_xp.relu_vjp` keeps, mostly one bit
    an element; never the input or output, so both may be overwritten), and `backward` consumes it.
    For a layer that is used twice in one pass, and inside functions that JAX or PyTorch trace, use
    `relu_xp.relu_vjp`.

    Parameters
    ----------
    negative_slope, threshold, positive_slope, max_value : float, optional
        As for `relu_xp.relu`.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy. False by default: the
        arguments are not written.

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`, for the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ReLU()
    >>> layer.forward(np.array([[1.0, -0.5], [0.0, 3.0]]))
    array([[1., 0.],
           [0., 3.]])
    >>> layer.backward(np.ones((2, 2)))
    array([[1., 0.],
           [0., 1.]])
    """

    # What `repr` omits, being the default, and what it gives first, by position.
    _defaults: ClassVar[dict[str, Any]] = {
        "negative_slope": 0.0,
        "threshold": 0.0,
        "positive_slope": 1.0,
        "max_value": None,
    }
    _positional: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        negative_slope: float = 0.0,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)

    def _set(
        self,
        negative_slope: float,
        threshold: float,
        positive_slope: float,
        max_value: float | None,
        inplace: bool,
    ) -> None:
        self._parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
        self.inplace = inplace

    @functools.cached_property  # which a subclass may assign, as other projects' layers do
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
        x : array, any shape
            float16, bfloat16, float32 or float64; with ``training=False`` also integers.
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
            As `relu_xp.relu`; also TypeError for integers while training. What an earlier call
            saved is then kept.
        """
        if self._inplace:
            out = self._out_in_place("forward", x, out)
        if not training:
            return forward("forward", self._parameters, x, out)
        y, self._pullback = forward_with_pullback("forward", self._parameters, x, out, mask)
        return y

    def __repr__(self) -> str:
        given: list[str] = []
        for name, default in self._defaults.items():
            value = getattr(self._parameters, name)
            if name == self._positional:
                given.insert(0, repr(value))
            elif value != default:
                given.append(f"{name}={value!r}")
        return self._repr(*given)


Relu = ReLU  # the name of the textbook's class
