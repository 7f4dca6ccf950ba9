"""NumPy arrays with the compiled kernels (`relu_xp.kernels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from relu_xp.arrays import concatenated_shape, split
from relu_xp.backends.gradient_sums import round_sum, round_to
from relu_xp.backends.numpy import NumpyBackend
from relu_xp.kernels import _cpu as cpu
from relu_xp.mask import Mask, mask_nbytes, new_like
from relu_xp.parameters import RELU, CastParameters

__all__ = ["CompiledBackend"]

_Array = npt.NDArray[Any]


class CompiledBackend(NumpyBackend):
    """NumPy arrays, every pass by a compiled kernel, with the bits of `NumpyBackend`."""

    def forward(self, params: CastParameters, x: _Array, out: _Array | None) -> _Array:
        """Return f(x)."""
        return cpu.forward(params.record, x, out)

    def forward_with_mask(
        self, params: CastParameters, x: _Array, out: _Array | None, mask: _Array | None
    ) -> tuple[_Array, Mask]:
        """Return f(x) and the packed mask."""
        if mask is not None:
            mask = mask[: mask_nbytes(params, x)]
        return cpu.forward_with_mask(params.record, x, out, mask)

    def backward(
        self, grad_params: CastParameters, dy: _Array, residuals: Mask, out: _Array | None
    ) -> _Array:
        """Return f'(x) * dy from the mask."""
        return cpu.backward(grad_params.record, dy, *residuals, out)

    def backward_from_input(
        self,
        params: CastParameters,
        grad_params: CastParameters,
        dy: _Array | None,
        x: _Array,
        out: _Array | None,
    ) -> _Array:
        """Return f'(x) * dy."""
        return cpu.backward_from_input(params.record, grad_params.record, dy, x, out)

    def bias_relu(
        self, params: CastParameters, x: _Array, bias: _Array, axis: int, out: _Array | None
    ) -> _Array:
        """Return f(x + bias)."""
        return cpu.bias_relu(params.record, x, round_to(bias, x.dtype), axis, out)

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
        if mask is not None:
            mask = mask[: mask_nbytes(params, x)]
        bias = round_to(bias, x.dtype)
        return cpu.bias_relu_with_mask(params.record, x, bias, axis, out, mask)

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
        record = grad_params.record
        dx, total = cpu.bias_relu_backward(record, dy, *residuals, axis, dtype, out)
        return dx, round_to(total, dtype)

    def prelu(
        self, values: _Array | None, x: _Array | None, weight: _Array, out: _Array | None
    ) -> _Array:
        """Return f(x) or f'(x) * dy."""
        if values is not None:
            weight = round_to(weight, values.dtype)
        return cpu.prelu(values, x, weight, out)

    def prelu_weight_grad(self, dy: _Array, x: _Array, weight: _Array) -> _Array:
        """Return the gradient with respect to the weight."""
        return round_sum(cpu.prelu_weight_grad(dy, x, weight.shape), weight.dtype)

    def crelu(self, x: _Array, axis: int, out: _Array | None) -> _Array:
        """Return relu(x) and relu(-x)."""
        if out is None:
            out = np.empty(concatenated_shape(x.shape, axis), x.dtype)
        positive, negative = split(out, axis)
        cpu.forward(RELU.cast(x.dtype.name).record, x, positive)
        cpu.negated_relu(x, negative)
        return out

    def crelu_mask(self, x: _Array) -> _Array:
        """Return which of x and -x is above 0."""
        return cpu.crelu_mask(x, None)

    def crelu_backward(self, dy: _Array, mask: _Array, axis: int, out: _Array | None) -> _Array:
        """Return the gradient of `crelu`."""
        return cpu.crelu_backward(*split(dy, axis), mask, out)

    def squared_relu(self, x: _Array, out: _Array | None) -> _Array:
        """Return relu(x)**2."""
        return cpu.squared_relu(x, out)

    def squared_relu_backward(self, dy: _Array, x: _Array, out: _Array | None) -> _Array:
        """Return f'(x) * dy."""
        if x.dtype == dy.dtype:
            return cpu.squared_relu_backward(x, dy, out)
        wide = max(np.dtype(np.float32), x.dtype, dy.dtype, key=lambda dtype: dtype.itemsize)
        dx = cpu.squared_relu_backward(round_to(x, wide), round_to(dy, wide), None)
        if out is None:
            out = new_like(np, dy.dtype, dy, x)
        out[...] = round_to(dx, dy.dtype)
        return out

    def is_valid_out(self, out: Any, like: _Array, other: _Array) -> bool:
        """Return whether `out` is known to be a valid ``out=``."""
        return cpu.is_valid_out(out, like, other)
