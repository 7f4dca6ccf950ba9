"""The base class of all backends: every pass in the Python array API standard.

This is the readable specification of what is computed, and the backend of every library that has
none of its own. A backend is a subclass that overrides what it does better; see the README.md of
this folder.

When a method is called, the arrays are known to come from one library and to agree in device, shape
and dtype, and the parameters are cast to the dtype (rule N1). No method reads an element into a
Python number, writes an array other than ``out`` or computes a lazy array, so that tracing (JAX,
``torch.compile``) and automatic differentiation work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, SupportsIndex

import array_api_compat
import numpy as np

from relu_xp.arrays import split
from relu_xp.backends.overlap import check_overlap
from relu_xp.mask import Mask
from relu_xp.parameters import CastParameters

__all__ = ["Backend", "draw"]


class Backend:
    """Every pass in the array API standard; subclasses override what they do better.

    ``out`` is None, or an array that `check_out` has accepted: the result is written there, and
    that is returned. Otherwise the result is a new array; where the library has layouts, in that of
    x or of dy, but never of a broadcast view. No other argument is written.

    Attributes
    ----------
    library : str
        The name by which `relu_xp.dispatch.backend_named` has made this object, if it has: a
        pickle then contains nothing else.
    checks_arrays : bool
        Whether `why_unsupported` is to be called for every array.
    """

    library = ""
    checks_arrays = False

    # ReLU with its four parameters

    def forward(self, params: CastParameters, x: Any, out: Any) -> Any:
        """Return f(x); `x` may have an integer dtype."""
        xp = self.namespace(x)
        is_lower, low = x <= params.threshold, _below(params, x)
        if params.zero_below and params.falls_above:
            x = xp.where(is_lower, low, x)  # so that the derivative of a dead unit is +0, not -0.0
        high = _above(params, x)
        if params.max_value is not None:
            high = xp.where(high >= params.max_value, params.max_value, high)
        return self.store(xp.where(is_lower, low, high), out)

    def forward_with_mask(
        self, params: CastParameters, x: Any, out: Any, mask: Any
    ) -> tuple[Any, Any]:
        """Return f(x) and the residuals that `backward` needs: here, the branch codes.

        They share no memory with x or f(x). `mask` is None, or a 1-D contiguous array of uint8 for
        the residuals, of at least as many elements as `mask_nbytes` returns.
        """
        codes = self.branch_codes(params, x)  # first, since out may be x
        return self.forward(params, x, out), codes

    def backward(self, grad_params: CastParameters, dy: Any, residuals: Any, out: Any) -> Any:
        """Return f'(x) * dy from the residuals; the parameters are cast to the dtype of `dy`."""
        xp = self.namespace(dy)
        high, low = _above(grad_params, dy), _below(grad_params, dy)
        is_upper = residuals
        if grad_params.num_branches == 3:
            is_upper = residuals == 1
            if not grad_params.zero_below:  # else it is 0 already, and a scalar
                low = xp.where(residuals == 2, 0, low)
        return self.store(xp.where(is_upper, high, low), out)

    def backward_from_input(
        self, params: CastParameters, grad_params: CastParameters, dy: Any, x: Any, out: Any
    ) -> Any:
        """Return f'(x) * dy, or f'(x) if `dy` is None.

        `params` are cast to the dtype of `x`, and decide the branch; `grad_params` are cast to that
        of `dy`.
        """
        if dy is None:
            dy = self.namespace(x).ones_like(x)
        return Backend.backward(self, grad_params, dy, self.branch_codes(params, x), out)

    def branch_codes(self, params: CastParameters, x: Any) -> Any:
        """Return True where the gradient takes the positive slope.

        With three branches in uint8: 0 at or below the threshold, 1 above it, 2 at the ceiling.
        """
        xp = self.namespace(x)
        is_upper = ~(x <= params.threshold)  # not x > t, which is False for NaN
        if params.max_value is None:
            return is_upper
        at_max = _above(params, x) >= params.max_value
        if params.num_branches == 2:
            return is_upper & ~at_max
        return xp.astype(is_upper, xp.uint8) + xp.astype(is_upper & at_max, xp.uint8)

    # f of x + bias, where the bias is 1-D and goes along an axis (not negative)

    def bias_relu(self, params: CastParameters, x: Any, bias: Any, axis: int, out: Any) -> Any:
        """Return f(x + bias); the bias, then the sum are rounded to the dtype of x."""
        return self.forward(params, self._add_bias(x, bias, axis), out)

    def bias_relu_with_mask(
        self, params: CastParameters, x: Any, bias: Any, axis: int, out: Any, mask: Any
    ) -> tuple[Any, Any]:
        """Return f(x + bias) and the residuals of the sum, as `forward_with_mask` does."""
        return self.forward_with_mask(params, self._add_bias(x, bias, axis), out, mask)

    def bias_relu_backward(
        self, grad_params: CastParameters, dy: Any, residuals: Any, axis: int, dtype: Any, out: Any
    ) -> tuple[Any, Any]:
        """Return dx = f'(x + bias) * dy, and the bias's gradient, in a dtype.

        That is the sum of dx along the other axes, in float64 where the library has it; the same
        inputs give the same bits.
        """
        dx = self.backward(grad_params, dy, residuals, out)
        xp, others = self.namespace(dx), tuple(i for i in range(len(dx.shape)) if i != axis)
        total = xp.astype(dx, _widest(xp))
        return dx, xp.astype(xp.sum(total, axis=others) if others else total, dtype)

    def _add_bias(self, x: Any, bias: Any, axis: int) -> Any:
        xp = self.namespace(x)
        bias = xp.reshape(bias, (-1,) + (1,) * (len(x.shape) - 1 - axis))
        return x + xp.astype(bias, x.dtype, copy=False)

    # Activations with other parameters. Arrays are floating; x is compared with 0 as in ReLU.

    def prelu(self, values: Any, x: Any, weight: Any, out: Any) -> Any:
        """Return `values` where x is above 0 or NaN, and ``weight * values`` elsewhere.

        That is f(x) if `values` are x, and f'(x) * dy if they are dy. A weight of 0 gives exactly
        +0. `weight` may have axes of length 1 where x is longer, and is first rounded to the dtype
        of `values`. If `values` is None, they are ones in the dtype of `weight`. If x is None,
        `weight` is f'(x): all values are multiplied, except that a weight of 1 gives the value
        itself.
        """
        # The values are selected before the product. If all were multiplied, a NaN or an infinity
        # that is not selected would, by automatic differentiation, make the weight's gradient NaN.
        # For that gradient a weight of 0 is multiplied too; the sum then turns -0.0 into +0.
        xp = self.namespace(weight)
        if values is None:
            values = xp.ones_like(weight)
        weight = xp.astype(weight, values.dtype, copy=False)
        low = values if x is None else xp.where(x <= 0, values, 0)
        is_zero = weight == 0
        product = xp.where(is_zero & ~xp.isfinite(low), 0, low) * weight
        zero = xp.astype(product != 0, product.dtype)  # a compiler would omit a constant 0
        product = xp.where(is_zero, product + zero, product)
        is_lower = weight != 1 if x is None else x <= 0
        return self.store(xp.where(is_lower, product, values), out)

    def prelu_weight_grad(self, dy: Any, x: Any, weight: Any) -> Any:
        """Return the sum of ``x * dy`` where x is at or below 0, in shape and dtype of `weight`.

        It is summed in float64 where the library has it; the same inputs give the same bits.
        """
        xp = self.namespace(x)
        wide = _widest(xp)
        terms = xp.astype(xp.where(x <= 0, x, 0), wide) * xp.astype(xp.where(x <= 0, dy, 0), wide)
        axes = tuple(axis for axis, length in enumerate(weight.shape) if length == 1)
        if axes:
            terms = xp.sum(terms, axis=axes, keepdims=True)
        return xp.astype(terms, weight.dtype)

    def crelu(self, x: Any, axis: int, out: Any) -> Any:
        """Return ``relu(x)`` and ``relu(-x)``, concatenated along an axis."""
        xp = self.namespace(x)
        pair = xp.where(x <= 0, 0, x), xp.where(x >= 0, 0, -x)
        return self.store(xp.concat(pair, axis=axis), out)

    def crelu_mask(self, x: Any) -> Any:
        """Return in uint8: 1 where x is above 0, 2 where -x is, 3 where both are (NaN), else 0."""
        xp = self.namespace(x)
        return xp.astype(~(x <= 0), xp.uint8) + 2 * xp.astype(~(x >= 0), xp.uint8)

    def crelu_backward(self, dy: Any, mask: Any, axis: int, out: Any) -> Any:
        """Return the gradient of `crelu`, from `crelu_mask`.

        Of the halves of `dy` along the axis: the first where the mask is 1, minus the second where
        it is 2, their difference where it is 3, +0 where it is 0.
        """
        xp = self.namespace(dy)
        first, second = split(dy, axis)
        difference = xp.where(mask == 3, first - second, 0)
        dx = xp.where(mask == 1, first, xp.where(mask == 2, -second, difference))
        return self.store(dx, out)

    def squared_relu(self, x: Any, out: Any) -> Any:
        """Return ``x**2`` where x is above 0, +0 elsewhere."""
        high = self.namespace(x).where(x <= 0, 0, x)
        return self.store(high * high, out)

    def squared_relu_backward(self, dy: Any, x: Any, out: Any) -> Any:
        """Return ``2 * x * dy`` where x is above 0, +0 elsewhere.

        It is multiplied in the wider of both dtypes, float32 at least, and rounded to that of `dy`.
        """
        xp = self.namespace(x)
        wide = max((xp.float32, x.dtype, dy.dtype), key=lambda dtype: xp.finfo(dtype).bits)
        high = xp.astype(x, wide)
        dx = xp.astype((high + high) * xp.astype(dy, wide), dy.dtype)
        return self.store(xp.where(x <= 0, 0, dx), out)

    def random_uniform(self, rng: Any, lower: float, upper: float, x: Any) -> Any:
        """Return numbers from `lower` to `upper`, as many as x has, drawn with `rng`.

        float64 for an x of float64, else float32; of x's library and device. `rng` has NumPy's
        ``random(size, dtype=...)``, or is a function of a shape; both draw from [0, 1).
        """
        numbers = draw(rng, lower, upper, tuple(x.shape), self.dtype_name(x.dtype))
        if not isinstance(numbers, np.ndarray):
            return numbers
        return self.namespace(x).asarray(numbers, device=self.device(x)[1])

    # Arrays

    def namespace(self, x: Any) -> Any:
        """Return the array API namespace of an array."""
        return array_api_compat.array_namespace(x)

    def dtype_name(self, dtype: Any) -> str:
        """Return a dtype's standard name, for example ``"float32"``."""
        return str(dtype).rpartition(".")[2]

    def why_unsupported(self, x: Any) -> tuple[str, str] | None:
        """Return None if the passes can take x, whatever its dtype; else why not, and a remedy.

        Both are words for a message: the first follows the name of the argument, the second
        ``convert it first,``.
        """
        return None

    def device(self, x: Any) -> tuple[str, Hashable]:
        """Return the library's name and the device, which is None where all arrays share one."""
        library = array_api_compat.array_namespace(x, use_compat=False).__name__
        return library.partition(".")[0], array_api_compat.device(x)

    def copy(self, x: Any) -> Any:
        """Return a copy of x, or x itself where arrays are immutable."""
        if not array_api_compat.is_writeable_array(x):
            return x
        return self.namespace(x).asarray(x, copy=True)

    def store(self, result: Any, out: Any) -> Any:
        """Return a result, written to `out` unless that is None."""
        if out is None:
            return result
        try:
            out[...] = result
        except (RuntimeError, ValueError) as error:  # for example a leaf that requires a gradient
            raise ValueError(f"out cannot be written: {error}") from error
        return out

    def is_valid_out(self, out: Any, like: Any, other: Any) -> bool:
        """Return whether a quick test shows that `out` is valid; if not, it is checked in full.

        That is, an array of the class, device, shape and dtype of `like` that may be written, and
        is `like` or `other` or shares no memory with them. `other` may have any shape and dtype.
        """
        return False

    def check_out(self, out: Any, inputs: Sequence[Any]) -> None:
        """Refuse an `out` that cannot be written, or that overlaps an input without being it.

        With a TypeError where no array of the library can be written, else a ValueError; its
        message begins after the name of the argument.
        """
        if not array_api_compat.is_writeable_array(out):
            raise TypeError(
                "cannot be written: its library's arrays are immutable; omit out= or inplace="
            )
        view = self.memory_view(out)
        if view is not None:
            others = [self.memory_view(x) for x in inputs if x is not out]
            check_overlap(view, [other for other in others if other is not None])

    def memory_view(self, x: Any) -> np.ndarray[Any, Any] | None:
        """Return a NumPy array with the addresses of x, or None: overlaps are not detected then."""
        try:
            return np.from_dlpack(x)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            return None  # traced, or on another device

    def mask_nbytes(self, params: CastParameters, x: Any) -> int | None:
        """Return how many bytes a caller's `mask` needs for x; None if the backend takes none."""
        return None

    def residuals_nbytes(self, residuals: Any) -> int:
        """Return how many bytes the residuals have: a mask, an array, or a tuple of these."""
        if isinstance(residuals, Mask):
            return int(residuals.data.nbytes)
        if isinstance(residuals, tuple):
            return sum(map(self.residuals_nbytes, residuals))
        return int(math.prod(residuals.shape)) * _itemsize(self.dtype_name(residuals.dtype))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        from relu_xp.dispatch import backend_named  # which imports this module

        if self.library:
            return backend_named, (self.library,)
        return super().__reduce_ex__(protocol)


def draw(rng: Any, lower: float, upper: float, shape: tuple[int, ...], dtype_name: str) -> Any:
    """Return the numbers of `Backend.random_uniform`, in the library in which `rng` draws."""
    if callable(rng):
        numbers = rng(shape)
    else:
        numbers = rng.random(shape, dtype="float64" if dtype_name == "float64" else "float32")
    with np.errstate(all="ignore"):
        scaled = numbers * (upper - lower) + lower
    return np.asarray(scaled) if isinstance(scaled, np.generic) else scaled  # of a 0-d array


def _widest(xp: Any) -> Any:
    return xp.__array_namespace_info__().dtypes().get("float64", xp.float32)


def _above(params: CastParameters, x: Any) -> Any:
    return x if params.identity_above else x * params.positive_slope


def _below(params: CastParameters, x: Any) -> Any:
    return 0 if params.zero_below else x * params.negative_slope


@functools.cache
def _itemsize(dtype_name: str) -> int:
    digits = "".join(filter(str.isdigit, dtype_name))
    return int(digits) // 8 if digits else 1  # bool
