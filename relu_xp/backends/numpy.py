"""NumPy arrays without compiled kernels: the array-API code, and what NumPy needs in addition.

That is packed masks, the layout of results, typed parameters (NumPy would make float32 of a
bfloat16 array and a Python float), no warnings about NaN, and one choice between two NaN, which
differs between NumPy's versions. The bits are those of the compiled kernels, but for what a
processor does in its flush-to-zero modes. Nothing is promised about its speed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from relu_xp.arrays import concatenated_shape
from relu_xp.backends.base import Backend, draw
from relu_xp.backends.gradient_sums import round_sum, round_to, sum_channels, sum_weight_grad
from relu_xp.backends.overlap import check_overlap
from relu_xp.mask import Axes, Mask, is_broadcast, mask_nbytes, memory_order, new_like, pack, unpack
from relu_xp.parameters import DTYPES, CastParameters

__all__ = ["NumpyBackend"]

_Array = npt.NDArray[Any]

_DEVICE = ("numpy", None)

_silent = np.errstate(all="ignore")  # as a decorator: NaN, infinities and subnormals are no errors


class NumpyBackend(Backend):
    """NumPy arrays by the array API; `CompiledBackend` overrides all passes."""

    @_silent
    def forward(self, params: CastParameters, x: _Array, out: _Array | None) -> _Array:
        """Return f(x)."""
        return _store(super().forward(_typed(params, x.dtype), x, None), out, x)

    @_silent
    def forward_with_mask(
        self, params: CastParameters, x: _Array, out: _Array | None, mask: _Array | None
    ) -> tuple[_Array, Mask]:
        """Return f(x) and the packed mask."""
        axes = memory_order(x.shape, x.strides, x.itemsize)
        codes = np.asarray(self.branch_codes(_typed(params, x.dtype), x))
        packed = pack(codes, axes, params.num_branches)
        if mask is None:
            mask = packed
        else:
            mask = mask[: packed.size]
            mask[...] = packed
        return self.forward(params, x, out), Mask(mask, axes)

    @_silent
    def backward(
        self, grad_params: CastParameters, dy: _Array, residuals: Mask, out: _Array | None
    ) -> _Array:
        """Return f'(x) * dy from the mask."""
        codes = unpack(residuals, dy.shape, grad_params.num_branches)
        dx = super().backward(_typed(grad_params, dy.dtype), dy, codes, None)
        return _store(dx, out, dy, axes=residuals.axes)

    @_silent
    def backward_from_input(
        self,
        params: CastParameters,
        grad_params: CastParameters,
        dy: _Array | None,
        x: _Array,
        out: _Array | None,
    ) -> _Array:
        """Return f'(x) * dy."""
        if dy is None:
            dy = np.broadcast_to(np.ones((), x.dtype), x.shape)
        typed, typed_grad = _typed(params, x.dtype), _typed(grad_params, dy.dtype)
        return _store(super().backward_from_input(typed, typed_grad, dy, x, None), out, x)

    @_silent
    def bias_relu(
        self, params: CastParameters, x: _Array, bias: _Array, axis: int, out: _Array | None
    ) -> _Array:
        """Return f(x + bias)."""
        return _store(self.forward(params, _add(x, bias, axis), None), out, x)

    @_silent
    def bias_relu_with_mask(
        self,
        params: CastParameters,
        x: _Array,
        bias: _Array,
        axis: int,
        out: _Array | None,
        mask: _Array | None,
    ) -> tuple[_Array, Mask]:
        """Return f(x + bias) and the packed mask."""
        y, residuals = self.forward_with_mask(params, _add(x, bias, axis), None, mask)
        return _store(y, out, x), residuals

    @_silent
    def bias_relu_backward(
        self,
        grad_params: CastParameters,
        dy: _Array,
        residuals: Mask,
        axis: int,
        dtype: np.dtype[Any],
        out: _Array | None,
    ) -> tuple[_Array, _Array]:
        """Return f'(x + bias) * dy, and its sum."""
        dx = self.backward(grad_params, dy, residuals, out)
        return dx, round_sum(sum_channels(dx, axis), dtype)

    @_silent
    def prelu(
        self, values: _Array | None, x: _Array | None, weight: _Array, out: _Array | None
    ) -> _Array:
        """Return f(x) or f'(x) * dy."""
        if values is None:
            values = np.broadcast_to(np.ones((), weight.dtype), (weight if x is None else x).shape)
        weight = round_to(weight, values.dtype)
        zero = np.zeros((), values.dtype)
        low = np.where(weight == 0, zero, _multiply(weight, values))
        is_lower = weight != 1 if x is None else x <= 0
        likes = [a for a in (values, x, weight) if a is not None and a.shape == values.shape]
        return _store(np.where(is_lower, low, values), out, *likes)

    @_silent
    def prelu_weight_grad(self, dy: _Array, x: _Array, weight: _Array) -> _Array:
        """Return the gradient with respect to the weight."""
        return round_sum(sum_weight_grad(dy, x, weight.shape), weight.dtype)

    @_silent
    def crelu(self, x: _Array, axis: int, out: _Array | None) -> _Array:
        """Return relu(x) and relu(-x)."""
        if out is None:
            out = np.empty(concatenated_shape(x.shape, axis), x.dtype)
        super().crelu(x, axis, out)
        return out

    @_silent
    def crelu_mask(self, x: _Array) -> _Array:
        """Return which of x and -x is above 0."""
        return _store(super().crelu_mask(x), None, x)

    @_silent
    def crelu_backward(self, dy: _Array, mask: _Array, axis: int, out: _Array | None) -> _Array:
        """Return the gradient of `crelu`."""
        return _store(super().crelu_backward(dy, mask, axis, None), out, mask)

    @_silent
    def squared_relu(self, x: _Array, out: _Array | None) -> _Array:
        """Return relu(x)**2."""
        return _store(super().squared_relu(x, None), out, x)

    @_silent
    def squared_relu_backward(self, dy: _Array, x: _Array, out: _Array | None) -> _Array:
        """Return f'(x) * dy."""
        wide = max(np.dtype(np.float32), x.dtype, dy.dtype, key=lambda dtype: dtype.itemsize)
        high = x.astype(wide)
        dx = round_to(_multiply(high + high, dy.astype(wide)), dy.dtype)
        return _store(np.where(x <= 0, np.zeros((), dy.dtype), dx), out, dy, x)

    def random_uniform(self, rng: Any, lower: float, upper: float, x: _Array) -> Any:
        """Return random numbers."""
        return draw(rng, lower, upper, x.shape, x.dtype.name)

    def namespace(self, x: Any) -> Any:
        """Return NumPy in the array API standard."""
        return _NAMESPACE

    def dtype_name(self, dtype: np.dtype[Any]) -> str:
        """Return the dtype's name; refuse another byte order."""
        if not dtype.isnative:
            advice = f"; convert it first, by its method astype({dtype.name!r})"
            raise TypeError(
                f"byte-swapped dtype {dtype.str} is not supported{advice * (dtype.name in DTYPES)}"
            )
        if dtype.kind == "V" and not dtype.isbuiltin:  # named by its class
            return "void"
        return dtype.name

    def device(self, x: _Array) -> tuple[str, None]:
        """Return the library: all NumPy arrays share one device."""
        return _DEVICE

    def copy(self, x: _Array) -> _Array:
        """Return a copy in the same layout, or of a broadcast view in C order."""
        return x.copy("C" if is_broadcast(x) else "K")

    def check_out(self, out: _Array, inputs: Sequence[_Array]) -> None:
        """Refuse an `out` that is read-only, or that overlaps an input without being it."""
        if not out.flags.writeable:
            raise ValueError("is read-only; give an array that may be written")
        check_overlap(out, inputs)

    def mask_nbytes(self, params: CastParameters, x: _Array) -> int:
        """Return the bytes of a mask."""
        return mask_nbytes(params, x)


class _Namespace:
    """NumPy in the array API standard, which is loaded at first use: it imports all of NumPy."""

    @staticmethod
    def where(condition: Any, x: Any, y: Any, /) -> Any:
        """Return `numpy.where` of arrays: NumPy 2.0 crashes if a number is promoted to bfloat16."""
        dtype = getattr(x, "dtype", None) or y.dtype
        return np.where(condition, np.asarray(x, dtype), np.asarray(y, dtype))

    reshape = staticmethod(np.reshape)
    zeros_like = staticmethod(np.zeros_like)

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.array_namespace(np.empty(0)), name)


_NAMESPACE = _Namespace()


@functools.lru_cache(maxsize=1024)
def _typed(params: CastParameters, dtype: np.dtype[Any]) -> Any:
    """Return the parameters as 0-d arrays of a dtype."""
    typed: dict[str, Any] = {
        name: getattr(params, name)
        for name in ("zero_below", "identity_above", "falls_above", "num_branches")
    }
    for name in ("threshold", "negative_slope", "positive_slope", "max_value"):
        value = getattr(params, name)
        typed[name] = None if value is None else np.array(value, dtype)
    return SimpleNamespace(**typed)


def _store(y: Any, out: _Array | None, *likes: _Array, axes: Axes | None = None) -> _Array:
    """Return a result in `out`, or in the layout that `new_like` gives it."""
    result: _Array = np.asarray(y)
    if out is None:
        if result.strides == likes[0].strides and result.flags.owndata:
            return result
        out = new_like(np, result.dtype, *map(np.asarray, likes), axes=axes)
    out[...] = result
    return out


def _multiply(x: _Array, y: _Array) -> _Array:
    """Return x*y, or x where that is NaN: of two NaN, NumPy's versions take one or the other."""
    product: _Array = np.where(np.isnan(x), x, np.multiply(x, y))
    return product


def _add(x: _Array, bias: _Array, axis: int) -> _Array:
    """Return x + bias, or x where that is NaN, with its elements in the order of a mask of x."""
    bias = round_to(bias, x.dtype).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
    total = np.add(x, np.where(np.isnan(x), np.zeros((), x.dtype), bias))
    if memory_order(x.shape, x.strides, x.itemsize) is None:
        return np.ascontiguousarray(total)
    return _store(total, None, x)
