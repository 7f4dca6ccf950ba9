"""CuPy arrays: a kernel for each pass, on the array's device and the caller's current stream.

No method synchronizes with the device. Given ``out`` and a mask, nothing is allocated, but for a
bias of another dtype, and the gradient of a bias or weight with the sums that it is made of. The
kernels are in ``cupy_kernels.py``, which also decides how a strided array is handled
(`Launcher.run`); how sums are made is in ``cupy_sums.py``; the masks are those of `relu_xp.mask`.

All this is `CupyBackend`. On an AMD GPU there are no kernels: `CupyOperations` is the base class.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import cupy
import numpy as np

from relu_xp.arrays import concatenated_shape, split
from relu_xp.backends.base import Backend, draw
from relu_xp.backends.cupy_kernels import FORWARD_INTEGER, bias_spread, launcher, variant
from relu_xp.backends.cupy_sums import channel_sums
from relu_xp.backends.overlap import address_view
from relu_xp.mask import Axes, Mask, mask_nbytes, memory_order, new_like
from relu_xp.parameters import CastParameters

__all__ = ["CupyBackend", "CupyOperations"]


class CupyOperations(Backend):
    """CuPy arrays by CuPy's own operations: on an AMD GPU, since the kernels are NVIDIA's."""

    def random_uniform(self, rng: Any, lower: float, upper: float, x: cupy.ndarray) -> cupy.ndarray:
        """Return random numbers, drawn on the device if `rng` is CuPy's, else moved there."""
        with _on_device_of(x):
            return cupy.asarray(draw(rng, lower, upper, x.shape, x.dtype.name))

    def dtype_name(self, dtype: np.dtype[Any]) -> str:
        """Return the dtype's name; refuse bfloat16, which CuPy promotes to float32."""
        if dtype.name == "bfloat16":
            raise TypeError(
                "bfloat16 is not supported on an AMD GPU; convert it first, by its method "
                "astype('float32')"
            )
        return dtype.name

    def device(self, x: cupy.ndarray) -> tuple[str, int]:
        """Return the library and the device's number."""
        return "cupy", x.data.device_id

    def is_valid_out(self, out: Any, like: cupy.ndarray, other: cupy.ndarray) -> bool:
        """Return whether `out` is known to be a valid ``out=``."""
        return (
            type(out) is cupy.ndarray
            and out.flags.c_contiguous
            and (like is out or _are_apart(out, like))
            and (other is out or _are_apart(out, other))
            and out.shape == like.shape
            and out.dtype == like.dtype
            and out.data.device_id == like.data.device_id
        )

    def memory_view(self, x: cupy.ndarray) -> np.ndarray[Any, Any]:
        """Return a NumPy array with the addresses of x.

        CuPy's own `may_share_memory` says no where two imports of one memory overlap.
        """
        return address_view(x.data.ptr, x.shape, x.strides, x.itemsize)


class CupyBackend(CupyOperations):
    """CuPy arrays by fused kernels."""

    def forward(
        self, params: CastParameters, x: cupy.ndarray, out: cupy.ndarray | None
    ) -> cupy.ndarray:
        """Return f(x)."""
        with _on_device_of(x):
            y = new_like(cupy, x.dtype, x) if out is None else out
            if params.is_floating:
                launcher("forward", params, params).run(_axes(x), x, y)
            else:
                c = np.iinfo(x.dtype).max if params.max_value is None else params.max_value
                slopes = params.negative_slope, params.positive_slope
                FORWARD_INTEGER(x, params.threshold, *slopes, c, y)
        return y

    def forward_with_mask(
        self,
        params: CastParameters,
        x: cupy.ndarray,
        out: cupy.ndarray | None,
        mask: cupy.ndarray | None,
    ) -> tuple[cupy.ndarray, Mask]:
        """Return f(x) and the packed mask."""
        nbytes, axes = mask_nbytes(params, x), _axes(x)
        name = "forward_bits" if params.num_branches == 2 else "forward_bytes"
        with _on_device_of(x):
            y = new_like(cupy, x.dtype, x) if out is None else out
            data = cupy.ndarray(nbytes, np.uint8) if mask is None else mask[:nbytes]
            launcher(name, params, params).run(axes, x, y, data)
        return y, Mask(data, axes)

    def backward(
        self, params: CastParameters, dy: cupy.ndarray, residuals: Mask, out: cupy.ndarray | None
    ) -> cupy.ndarray:
        """Return f'(x) * dy from the mask."""
        name = "backward_bits" if params.num_branches == 2 else "backward_bytes"
        with _on_device_of(dy):
            dx = new_like(cupy, dy.dtype, dy, axes=residuals.axes) if out is None else out
            launcher(name, params, params).run(residuals.axes, dy, residuals.data, dx)
        return dx

    def backward_from_input(
        self,
        params: CastParameters,
        grad_params: CastParameters,
        dy: cupy.ndarray | None,
        x: cupy.ndarray,
        out: cupy.ndarray | None,
    ) -> cupy.ndarray:
        """Return f'(x) * dy."""
        name, inputs = ("gradient", (x,)) if dy is None else ("backward_from_input", (dy, x))
        with _on_device_of(x):
            dx = new_like(cupy, inputs[0].dtype, x) if out is None else out
            launcher(name, params, grad_params).run(_axes(x), *inputs, dx)
        return dx

    def bias_relu(
        self,
        params: CastParameters,
        x: cupy.ndarray,
        bias: cupy.ndarray,
        axis: int,
        out: cupy.ndarray | None,
    ) -> cupy.ndarray:
        """Return f(x + bias)."""
        with _on_device_of(x):
            y = new_like(cupy, x.dtype, x) if out is None else out
            _run_with_bias("forward", params, bias, axis, _axes(x), x, y)
        return y

    def bias_relu_with_mask(
        self,
        params: CastParameters,
        x: cupy.ndarray,
        bias: cupy.ndarray,
        axis: int,
        out: cupy.ndarray | None,
        mask: cupy.ndarray | None,
    ) -> tuple[cupy.ndarray, Mask]:
        """Return f(x + bias) and the packed mask."""
        nbytes, axes = mask_nbytes(params, x), _axes(x)
        name = "forward_bits" if params.num_branches == 2 else "forward_bytes"
        with _on_device_of(x):
            y = new_like(cupy, x.dtype, x) if out is None else out
            data = cupy.ndarray(nbytes, np.uint8) if mask is None else mask[:nbytes]
            _run_with_bias(name, params, bias, axis, axes, x, y, data)
        return y, Mask(data, axes)

    def bias_relu_backward(
        self,
        params: CastParameters,
        dy: cupy.ndarray,
        residuals: Mask,
        axis: int,
        dtype: np.dtype[Any],
        out: cupy.ndarray | None,
    ) -> tuple[cupy.ndarray, cupy.ndarray]:
        """Return dx and the bias's gradient.

        One pass computes both where dy and dx are dense in the mask's order of axes; elsewhere a
        second one reads dx. The sums are the same, to the bit.
        """
        name = "backward_bits" if params.num_branches == 2 else "backward_bytes"
        data, axes = residuals
        channels = channel_sums(dy.shape, axis, axis, axes)
        with _on_device_of(dy):
            dx = new_like(cupy, dy.dtype, dy, axes=axes) if out is None else out
            run = launcher(f"bias_{name}", params, params).run_and_sum
            sums = run(axes, channels, dy, data, dx)
            if sums is None:
                launcher(name, params, params).run(axes, dy, data, dx)
                sums = channels.sum_strided("channel_sums", dx)
            return dx, channels.total(sums, dtype)

    def prelu(
        self,
        values: cupy.ndarray | None,
        x: cupy.ndarray | None,
        weight: cupy.ndarray,
        out: cupy.ndarray | None,
    ) -> cupy.ndarray:
        """Return f(x) or f'(x) * dy."""
        operands: Any
        if values is None:
            name, operands = "slopes", (x,)
        elif x is None:
            name, operands = "scale", (values,)
        elif x is values:
            name, operands = "prelu_forward", (x,)
        else:
            name, operands = "prelu", (values, x)
        with _on_device_of(weight):
            if out is None:
                dtype = weight.dtype if values is None else values.dtype
                shape = operands[0].shape
                out = new_like(cupy, dtype, *[a for a in (*operands, weight) if a.shape == shape])
            variant(name)(*operands, weight, out)
        return out

    def prelu_weight_grad(
        self, dy: cupy.ndarray, x: cupy.ndarray, weight: cupy.ndarray
    ) -> cupy.ndarray:
        """Return the gradient with respect to the weight.

        The same inputs give the same bits.
        """
        kept = [axis for axis, length in enumerate(weight.shape) if length != 1]
        if kept and kept != list(range(kept[0], kept[-1] + 1)):
            # The kernel has one run of axes that are kept: here they become the last ones.
            summed = [axis for axis in range(x.ndim) if axis not in kept]
            dy, x = dy.transpose(summed + kept), x.transpose(summed + kept)
            kept = list(range(len(summed), x.ndim))
        first, last = (kept[0], kept[-1]) if kept else (0, -1)
        channels = channel_sums(x.shape, first, last)
        with _on_device_of(x):
            sums = channels.sum_strided("sums", dy, x)
            return channels.total(sums, weight.dtype).reshape(weight.shape)

    def squared_relu(self, x: cupy.ndarray, out: cupy.ndarray | None) -> cupy.ndarray:
        """Return relu(x)**2."""
        with _on_device_of(x):
            y = new_like(cupy, x.dtype, x) if out is None else out
            variant("squared_relu")(x, y)
        return y

    def squared_relu_backward(
        self, dy: cupy.ndarray, x: cupy.ndarray, out: cupy.ndarray | None
    ) -> cupy.ndarray:
        """Return f'(x) * dy."""
        with _on_device_of(x):
            dx = new_like(cupy, dy.dtype, dy, x) if out is None else out
            variant("squared_relu_backward")(dy, x, dx)
        return dx

    def crelu(self, x: cupy.ndarray, axis: int, out: cupy.ndarray | None) -> cupy.ndarray:
        """Return relu(x) and relu(-x)."""
        with _on_device_of(x):
            if out is None:
                out = cupy.ndarray(concatenated_shape(x.shape, axis), x.dtype)
            variant("crelu")(x, *split(out, axis))
        return out

    def crelu_mask(self, x: cupy.ndarray) -> cupy.ndarray:
        """Return which of x and -x is above 0."""
        with _on_device_of(x):
            mask = new_like(cupy, np.dtype(np.uint8), x)
            variant("crelu_mask")(x, mask)
        return mask

    def crelu_backward(
        self, dy: cupy.ndarray, mask: cupy.ndarray, axis: int, out: cupy.ndarray | None
    ) -> cupy.ndarray:
        """Return the gradient of `crelu`."""
        with _on_device_of(dy):
            dx = new_like(cupy, dy.dtype, mask) if out is None else out
            variant("crelu_backward")(*split(dy, axis), mask, dx)
        return dx

    def copy(self, x: cupy.ndarray) -> cupy.ndarray:
        """Return a copy of x."""
        with _on_device_of(x):
            y = new_like(cupy, x.dtype, x)
            variant("copy")(x, y)
        return y

    def store(self, result: cupy.ndarray, out: cupy.ndarray) -> cupy.ndarray:
        """Return `out`, to which a result is written."""
        with _on_device_of(out):
            variant("copy")(result, out)
        return out

    def dtype_name(self, dtype: np.dtype[Any]) -> str:
        """Return the dtype's name."""
        return dtype.name

    def mask_nbytes(self, params: CastParameters, x: cupy.ndarray) -> int:
        """Return the bytes of a mask."""
        return mask_nbytes(params, x)


def _run_with_bias(
    name: str,
    params: CastParameters,
    bias: cupy.ndarray,
    axis: int,
    axes: Axes | None,
    x: cupy.ndarray,
    *outputs: cupy.ndarray,
) -> None:
    """Run a forward pass of x + bias."""
    if bias.dtype != x.dtype or not bias.flags.c_contiguous:
        rounded = cupy.ndarray(bias.shape, x.dtype)
        variant("round_to")(bias, rounded)
        bias = rounded
    order = range(x.ndim) if axes is None else axes
    inner = math.prod([x.shape[other] for other in order[order.index(axis) + 1 :]])
    spread = bias_spread(params, bias, inner)
    launcher(f"bias_{name}", params, params, spread).run(
        axes, x, *outputs, bias=(bias, bias.size, inner)
    )


def _are_apart(out: cupy.ndarray, x: cupy.ndarray) -> bool:
    """Return whether x is contiguous, and before or behind an `out` that is so too."""
    start, first = out.data.ptr, x.data.ptr
    apart: bool = start + out.nbytes <= first or first + x.nbytes <= start
    return apart and x.flags.c_contiguous


def _axes(x: cupy.ndarray) -> Axes | None:
    """Return the order of the elements in the mask of x."""
    return None if x.flags.c_contiguous else memory_order(x.shape, x.strides, x.itemsize)


def _on_device_of(x: cupy.ndarray) -> contextlib.AbstractContextManager[Any]:
    device = x.data.device_id
    if cupy.cuda.runtime.getDevice() == device:
        return _NO_CHANGE
    return cupy.cuda.Device(device)  # type: ignore[no-any-return]


_NO_CHANGE = contextlib.nullcontext()
