"""What a task of Dask's computes: a pass on one chunk, by the backend of that chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from dask.sizeof import sizeof

from relu_xp.backends.base import Backend
from relu_xp.backends.gradient_sums import round_to
from relu_xp.dispatch import backend_for
from relu_xp.mask import Mask
from relu_xp.parameters import CastParameters

__all__ = [
    "ChunkResiduals",
    "add",
    "apply",
    "apply_biased",
    "apply_pair",
    "backward",
    "bias_relu_backward",
    "first",
    "narrow",
    "on_arrays",
    "prelu",
    "prelu_weight_grad",
    "residuals_of_pair",
    "sums_of_pair",
]

# Dask moves and drops results by their sizes.
sizeof.register(Mask, lambda mask: mask.data.nbytes)


class ChunkResiduals(NamedTuple):
    """The residuals of a chunk, and its shape."""

    shape: tuple[int, ...]
    data: Any


sizeof.register(ChunkResiduals, lambda residuals: sizeof(residuals.data))


def first(pair: tuple[Any, Any], second: Any) -> Any:
    """Return the first of a pair, once `second` has been taken from it."""
    return pair[0]


def residuals_of_pair(pair: tuple[Any, Any]) -> ChunkResiduals:
    """Return the residuals, of a pair of f(x) and these."""
    return ChunkResiduals(pair[0].shape, pair[1])


def sums_of_pair(axis: int, pair: tuple[Any, Any]) -> Any:
    """Return the sums, of a pair of dx and these, with axes of length 1 where it is summed."""
    dx, sums = pair
    return sums.reshape(tuple(-1 if i == axis else 1 for i in range(dx.ndim)))


def apply(
    name: str, params: tuple[CastParameters, ...], rest: tuple[Any, ...], *arrays: Any
) -> Any:
    """Call a method of a chunk's backend; `params` belong to the arrays, the last to the first."""
    like = next(array for array in arrays if array is not None)
    backend = backend_for("relu", "a chunk of x", like)
    cast = [
        each.parameters.cast(backend.dtype_name((like if array is None else array).dtype))
        for each, array in zip(reversed(params), arrays, strict=False)
    ]
    return getattr(backend, name)(*reversed(cast), *arrays, *rest)


def apply_pair(name: str, params: tuple[CastParameters, ...], dy: Any, x: Any) -> Any:
    """Call a method of a chunk's backend for a gradient, which may be None."""
    if dy is not None:
        _check_chunks(dy, x)
    return apply(name, params, (None,), dy, x)


def apply_biased(
    name: str, params: CastParameters, axis: int, rest: tuple[Any, ...], x: Any, bias: Any
) -> Any:
    """Call a method of a chunk's backend for x and a bias along an axis."""
    if bias.shape != x.shape[axis : axis + 1]:
        raise ValueError(
            f"a chunk of the bias has shape {bias.shape}, the one of x {x.shape}, along axis {axis}"
            "; call .compute_chunk_sizes() of x first"
        )
    return apply(name, (params,), (axis, *rest), x, bias)


def backward(params: CastParameters, dy: Any, residuals: ChunkResiduals) -> Any:
    """Return f'(x) * dy."""
    backend, cast = _for_dy(params, dy, residuals)
    return backend.backward(cast, dy, residuals.data, None)


def bias_relu_backward(
    params: CastParameters, axis: int, dy: Any, residuals: ChunkResiduals
) -> tuple[Any, Any]:
    """Return f'(x + bias) * dy, and its sums in float64."""
    backend, cast = _for_dy(params, dy, residuals)
    xp = array_api_compat.array_namespace(dy)
    wide = xp.empty(0, dtype=xp.float64).dtype
    return backend.bias_relu_backward(cast, dy, residuals.data, axis, wide, None)


def _for_dy(
    params: CastParameters, dy: Any, residuals: ChunkResiduals
) -> tuple[Backend, CastParameters]:
    """Return the backend of a chunk of dy, and the parameters that its dtype holds."""
    _check_chunks(dy, residuals)
    backend = backend_for("relu", "a chunk of x", dy)
    return backend, params.parameters.cast(backend.dtype_name(dy.dtype))


def prelu(values: Any, x: Any, weight: Any) -> Any:
    """Return PReLU's f(x) or f'(x) * dy."""
    if values is not None:
        _check_chunks(values, weight if x is None else x)
    return apply("prelu", (), (None,), values, x, weight)


def prelu_weight_grad(summed: tuple[int, ...], dy: Any, x: Any) -> Any:
    """Return the weight's gradient in float64, with axes of length 1 where it is summed."""
    _check_chunks(dy, x)
    xp = array_api_compat.array_namespace(x)
    shape = tuple(1 if axis in summed else length for axis, length in enumerate(x.shape))
    return apply("prelu_weight_grad", (), (), dy, x, xp.zeros(shape, dtype=xp.float64))


def add(sums: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """Return the sum along axes, silently: infinities may cancel."""
    with np.errstate(all="ignore"):
        return sums.sum(axis=axis, keepdims=keepdims)


def narrow(dtype: Any, total: Any) -> Any:
    """Return sums in a dtype, silently: they may be beyond its range. One NaN stands for all."""
    xp = array_api_compat.array_namespace(total)
    total = xp.where(xp.isnan(total), xp.nan, total)
    return round_to(total, dtype) if isinstance(total, np.ndarray) else total.astype(dtype)


def on_arrays(function: Callable[..., Any], *chunks: Any) -> Any:
    """Call a function with 0-d arrays where Dask's reductions and indexing have made scalars."""
    return function(*(np.asarray(c) if isinstance(c, np.generic) else c for c in chunks))


def _check_chunks(dy: Any, x: Any) -> None:
    """Refuse chunks whose shapes differ from what was declared."""
    if dy.shape != x.shape:
        raise ValueError(
            f"a chunk of dy has shape {dy.shape}, the one of x {x.shape}; "
            "call .compute_chunk_sizes() of both arrays, and give them equal chunks"
        )
