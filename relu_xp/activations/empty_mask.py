"""An array for the argument `mask` of functions and layers."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from relu_xp.arrays import from_numpy
from relu_xp.dispatch import format_device
from relu_xp.parameters import ONE, ZERO, make_parameters
from relu_xp.validation import resolve

__all__ = ["empty_mask"]

ArrayT = TypeVar("ArrayT")


def empty_mask(
    x: ArrayT,
    /,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
) -> ArrayT:
    """Return an array for the argument `mask`, large enough for x.

    `relu_vjp`, `bias_relu_vjp` and the ``forward`` of the layers `ReLU` (with its presets) and
    `BiasReLU` take it. With ``out=`` too, the passes of any number of batches allocate nothing, but
    for the sums of a bias's gradient.

    Parameters
    ----------
    x : array, any shape
        float16, bfloat16, float32 or float64, of NumPy or CuPy. Only its size matters.
    negative_slope, threshold, positive_slope, max_value
        Those of the function or layer; for a layer ``**layer.activation._asdict()``.

    Returns
    -------
    array of uint8, shape (n,), library and device of `x`
        One byte for 8 elements, or one for each with both a ceiling and a negative slope. Its
        contents are arbitrary.

    Raises
    ------
    TypeError, ValueError
        As `relu`; also TypeError for integers, and for a library whose functions take no `mask`.

    Examples
    --------
    >>> import numpy as np
    >>> import relu_xp
    >>> x = np.array([-1.0, 0.0, 2.0])
    >>> mask = relu_xp.empty_mask(x)
    >>> y, pullback = relu_xp.relu_vjp(x, mask=mask)
    >>> mask
    array([4], dtype=uint8)
    """
    parameters = make_parameters(negative_slope, threshold, positive_slope, max_value)
    x, backend, params = resolve("empty_mask", "x", x, parameters, floating=True)
    nbytes = backend.mask_nbytes(params, x)
    if nbytes is None:
        raise TypeError(
            f"empty_mask: x is {format_device(backend.device(x))}, whose masks the library makes "
            "itself; omit mask="
        )
    mask: ArrayT = from_numpy(np.empty(nbytes, np.uint8), x)
    return mask
