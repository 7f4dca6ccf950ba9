"""The functions: say, check, choose, call.

Each takes an array of any array API library and returns one of the same library, device and shape.
What is computed is `relu_xp.activation`'s table; where, a backend's business (`relu_xp.dispatch`).
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from relu_xp.activation import ONE, ZERO, Activation, activation_of
from relu_xp.backends import Backend
from relu_xp.checks import check_mask, check_out, fitting, serving

__all__ = [
    "Pullback",
    "clipped_relu",
    "leaky_relu",
    "relu",
    "relu6",
    "relu_backward",
    "relu_grad",
    "relu_vjp",
    "thresholded_relu",
]

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
    """Apply a rectified linear unit to every element (Nair and Hinton, 2010).

    ``f(x) = negative_slope * x`` where ``x <= threshold``, else
    ``min(positive_slope * x, max_value)``. NaN stays NaN; with a negative slope of 0, everything at
    or below a threshold of 0 becomes +0, -0.0 and -inf included.

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32, float64, or an integer dtype that holds the numbers.
    negative_slope : float, optional
        Factor at and below the threshold. 0 means exactly +0, never a product.
    threshold : float, optional
        The knee; it belongs to the lower piece.
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
        If `x` is not an array or its dtype has no order (bool, complex, object), if a number is
        not real, or if `out` is of another library or dtype or cannot be written at all.
    ValueError
        If a number is NaN, infinite or impossible, if it does not fit an integer dtype, or if
        `out` is of another device or shape, read-only, broadcast or overlapping.

    Notes
    -----
    The numbers are checked as they are given, and then rounded to the dtype of `x`: in float16 a
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
        "relu", activation_of(negative_slope, threshold, positive_slope, max_value), x, out
    )


def leaky_relu(
    x: ArrayT,
    /,
    negative_slope: float = 0.01,
    *,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Apply a leaky ReLU: a negative slope of 0.01 by default (Maas et al., 2013). See `relu`."""
    return forward(
        "leaky_relu", activation_of(negative_slope, threshold, positive_slope, max_value), x, out
    )


def relu6(
    x: ArrayT,
    /,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    out: ArrayT | None = None,
) -> ArrayT:
    """Apply ReLU with a ceiling of 6, where its gradient is 0 (Krizhevsky, 2010). See `relu`."""
    return forward("relu6", activation_of(negative_slope, threshold, positive_slope, 6.0), x, out)


def clipped_relu(
    x: ArrayT,
    /,
    max_value: float = 20.0,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    out: ArrayT | None = None,
) -> ArrayT:
    """Apply ReLU with a ceiling, 20 by default, where its gradient is 0 (Hannun et al., 2014).

    See `relu`.
    """
    return forward(
        "clipped_relu", activation_of(negative_slope, threshold, positive_slope, max_value), x, out
    )


def thresholded_relu(
    x: ArrayT,
    /,
    threshold: float = 1.0,
    *,
    negative_slope: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Apply ReLU with its knee at a threshold, 1 by default: x above it (not x - 1), else 0.

    Konda et al., 2014. See `relu`.
    """
    return forward(
        "thresholded_relu",
        activation_of(negative_slope, threshold, positive_slope, max_value),
        x,
        out,
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
    activation = activation_of(negative_slope, threshold, positive_slope, max_value)
    backend, numbers = serving("relu_grad", "x", x, activation, floating=True)
    if out is not None and not backend.fits(out, x, x):
        check_out("relu_grad", out, x, "x", (x,), backend)
    gradient: ArrayT = backend.gradient(numbers, x, out)
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
    activation = activation_of(negative_slope, threshold, positive_slope, max_value)
    backend, numbers = serving("relu_backward", "x", x, activation, floating=True)
    slopes = fitting("relu_backward", dy, activation, backend.place(x), cast(Any, x).shape, "x is")
    if out is not None and not backend.fits(out, dy, x):
        check_out("relu_backward", out, dy, "dy", (dy, x), backend)
    dx: ArrayT = backend.backward_from_input(numbers, slopes, dy, x, out)
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
) -> tuple[ArrayT, Pullback]:
    """Apply `relu` and return a function for its gradient (a vector-Jacobian product).

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64.
    negative_slope, threshold, positive_slope, max_value, out
        As for `relu`.
    mask : array of uint8, library and device of `x`, shape (n,), optional
        Contiguous memory to keep the mask in, instead of fresh memory: ``n`` is at least
        ``(x.size + 7) // 8``, or ``x.size`` where a ceiling meets a negative slope. It stays the
        caller's: the pullback reads it, so leave it as it is until the last call of that. NumPy
        and CuPy only.

    Returns
    -------
    y : array, shape and dtype of `x`
        ``relu(x)``; `out`, if given.
    pullback : Pullback
        ``pullback(dy)`` is ``f'(x) * dy``. It keeps neither `x` nor `y`, so both may be
        overwritten, but a mask: one bit an element for arrays of NumPy, CuPy, Dask (whose chunks
        are such) and PyTorch on a CPU; one byte where a ceiling meets a negative slope, and
        elsewhere.

    Raises
    ------
    TypeError, ValueError
        As `relu`; also TypeError for an integer `x`, and either for a `mask` that does not fit.
    """
    activation = activation_of(negative_slope, threshold, positive_slope, max_value)
    return forward_saving("relu_vjp", activation, x, out, mask)


class Pullback:
    """The gradient of one forward pass; made by `relu_vjp`, called any number of times."""

    __slots__ = ("_activation", "_backend", "_mask", "_place", "_saved", "_shape")

    def __init__(
        self, activation: Activation, backend: Backend, x: Any, saved: Any, mask: Any
    ) -> None:
        self._activation = activation
        self._backend = backend
        self._mask = mask  # the caller's: nobody else has ours
        self._place = backend.place(x)
        self._shape = x.shape
        self._saved = saved

    def __call__(self, dy: ArrayT, /, *, out: ArrayT | None = None) -> ArrayT:
        """Return ``f'(x) * dy``.

        Parameters
        ----------
        dy : array, shape of x
            Gradient with respect to y; any floating dtype, any layout, x's library and device.
        out : array, library, device, shape and dtype of `dy`, optional
            Where to write the result: `dy` itself, or an array that shares no memory with it, or
            with the mask.

        Returns
        -------
        array, shape and dtype of `dy`

        Raises
        ------
        TypeError
            If `dy` is not floating, or of another library.
        ValueError
            If `dy` has another shape or device, or `out` is not lawful.
        """
        return self.backward("pullback", dy, out)

    def backward(self, function: str, dy: ArrayT, out: ArrayT | None) -> ArrayT:
        """Return ``f'(x) * dy``, naming `function` where something is refused."""
        backend = self._backend
        slopes = fitting(function, dy, self._activation, self._place, self._shape, "forward saw")
        if out is not None:
            if self._mask is not None:
                check_out(function, out, dy, "dy", (dy, self._mask), backend)
            elif not backend.fits(out, dy, dy):
                check_out(function, out, dy, "dy", (dy,), backend)
        dx: ArrayT = backend.backward(slopes, dy, self._saved, out)
        return dx

    @property
    def saved_nbytes(self) -> int:
        """Bytes held for the gradient.

        Raises
        ------
        ValueError
            If Dask does not know the size of x before it is computed.
        """
        return self._backend.saved_nbytes(self._saved)


def forward(
    function: str,
    activation: Activation,
    x: ArrayT,
    out: ArrayT | None,
    floating: bool = False,
) -> ArrayT:
    """Return ``f(x)``, naming `function` where something is refused.

    Integers are, if `floating`.
    """
    backend, numbers = serving(function, "x", x, activation, floating)
    if out is not None and not backend.fits(out, x, x):
        check_out(function, out, x, "x", (x,), backend)
    y: ArrayT = backend.forward(numbers, x, out)
    return y


def forward_saving(
    function: str, activation: Activation, x: ArrayT, out: ArrayT | None, mask: Any
) -> tuple[ArrayT, Pullback]:
    """Return ``f(x)`` and its pullback, naming `function` where something is refused."""
    backend, numbers = serving(function, "x", x, activation, floating=True)
    if out is not None and not backend.fits(out, x, x):
        check_out(function, out, x, "x", (x,), backend)
    if mask is not None:
        check_mask(function, mask, x, out, numbers, backend)
    y, saved = backend.forward_saving(numbers, x, out, mask)
    return y, Pullback(activation, backend, x, saved, mask)
