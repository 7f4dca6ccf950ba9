"""Dask arrays: every pass is one task per chunk, computed by the backend of the chunk.

Nothing is computed during a call. Which backend serves a chunk is found out when the task runs,
where it runs; likewise the cast of the parameters, should a chunk's dtype not be the one that its
collection declares. What travels to a worker is the name of a method of the backend and the
parameters.

An operand with other chunks is rechunked. Chunks of unknown sizes are taken as they are; each task
checks whether they match.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import array_api_compat
import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

from relu_xp.backends import dask_chunks
from relu_xp.backends.base import Backend
from relu_xp.backends.numpy import NumpyBackend
from relu_xp.dispatch import backend_for
from relu_xp.parameters import CastParameters

__all__ = ["DaskBackend"]

_DEVICE = ("dask", None)  # chunks may lie anywhere, and on several devices


class _Residuals(NamedTuple):
    """The residuals of all chunks, an array of them with the chunks of x; and the parameters."""

    blocks: Any
    params: CastParameters


class DaskBackend(Backend):
    """Dask arrays, lazily, chunk by chunk."""

    def forward(self, params: CastParameters, x: Any, out: Any) -> Any:
        """Return f(x)."""
        return _map("forward", (params,), (x,))

    def forward_with_mask(
        self, params: CastParameters, x: Any, out: Any, mask: Any
    ) -> tuple[Any, _Residuals]:
        """Return f(x) and the residuals of the chunks.

        One task makes both, and two more take them apart: a pass for each would read x twice, and
        keep it until the later one has run. What takes y waits for the one that takes the
        residuals, so that no pair, with y in it, waits for the gradient to be asked for: between
        the passes of a training step only the masks are held.
        """
        return _take_apart(_map("forward_with_mask", (params,), (x,), (None, None)), params)

    def backward(self, grad_params: CastParameters, dy: Any, residuals: Any, out: Any) -> Any:
        """Return f'(x) * dy from the residuals."""
        function = functools.partial(dask_chunks.backward, grad_params)
        blocks = residuals.blocks
        return _blockwise(function, "backward", (_rechunk(dy, blocks.chunks), blocks))

    def backward_from_input(
        self, params: CastParameters, grad_params: CastParameters, dy: Any, x: Any, out: Any
    ) -> Any:
        """Return f'(x) * dy."""
        return _map_backward("backward_from_input", (params, grad_params), dy, x)

    def bias_relu(self, params: CastParameters, x: Any, bias: Any, axis: int, out: Any) -> Any:
        """Return f(x + bias)."""
        return _map_biased("bias_relu", params, x, bias, axis, (None,))

    def bias_relu_with_mask(
        self, params: CastParameters, x: Any, bias: Any, axis: int, out: Any, mask: Any
    ) -> tuple[Any, _Residuals]:
        """Return f(x + bias) and the residuals of the chunks, as `forward_with_mask` does."""
        pairs = _map_biased("bias_relu_with_mask", params, x, bias, axis, (None, None))
        return _take_apart(pairs, params)

    def bias_relu_backward(
        self, grad_params: CastParameters, dy: Any, residuals: Any, axis: int, dtype: Any, out: Any
    ) -> tuple[Any, Any]:
        """Return f'(x + bias) * dy and its sum, both made by one task a chunk.

        The sums of a chunk stay in float64 until Dask has added those of all chunks. What takes dx
        waits for them, so that no pair waits for a sum that is asked for later.
        """
        blocks = residuals.blocks
        function = functools.partial(dask_chunks.bias_relu_backward, grad_params, axis)
        arrays = _rechunk(dy, blocks.chunks), blocks
        pairs = _blockwise(function, "bias_relu_backward", arrays)
        summed = tuple(other for other in range(dy.ndim) if other != axis)
        sums = _blockwise(
            functools.partial(dask_chunks.sums_of_pair, axis),
            "sums",
            (pairs,),
            adjust_chunks=dict.fromkeys(summed, 1),
            dtype=np.float64,
        )
        dx = _blockwise(dask_chunks.first, "backward", (pairs, sums))
        return dx, _total(sums, summed, dtype, keepdims=False)

    def prelu(self, values: Any, x: Any, weight: Any, out: Any) -> Any:
        """Return f(x) or f'(x) * dy."""
        like = next(array for array in (x, values, weight) if array is not None)
        if values is not None:
            values = _rechunk(values, like.chunks)
        dtype = weight.dtype if values is None else values.dtype
        arrays = values, x, _rechunk_weight(weight, like)
        return _blockwise(dask_chunks.prelu, "prelu", arrays, dtype=dtype)

    def prelu_weight_grad(self, dy: Any, x: Any, weight: Any) -> Any:
        """Return the gradient with respect to the weight.

        The sums of a chunk stay in float64 until Dask has added those of all chunks.
        """
        summed = tuple(axis for axis, length in enumerate(weight.shape) if length == 1)
        sums = _blockwise(
            functools.partial(dask_chunks.prelu_weight_grad, summed),
            "prelu_weight_grad",
            (_rechunk(dy, x.chunks), x),
            adjust_chunks=dict.fromkeys(summed, 1),
            dtype=np.float64,
        )
        return _total(sums, summed, weight.dtype, keepdims=True)

    def squared_relu(self, x: Any, out: Any) -> Any:
        """Return relu(x)**2."""
        return _map("squared_relu", (), (x,))

    def squared_relu_backward(self, dy: Any, x: Any, out: Any) -> Any:
        """Return f'(x) * dy."""
        return _map_backward("squared_relu_backward", (), dy, x)

    def crelu(self, x: Any, axis: int, out: Any) -> Any:
        """Return relu(x) and relu(-x), of an x with one chunk along the axis."""
        twice = {axis: 2 * x.shape[axis]}
        return _map("crelu", (), (x.rechunk({axis: -1}),), (axis, None), adjust_chunks=twice)

    def crelu_mask(self, x: Any) -> Any:
        """Return which of x and -x is above 0."""
        return _map("crelu_mask", (), (x,), (), dtype=np.uint8)

    def crelu_backward(self, dy: Any, mask: Any, axis: int, out: Any) -> Any:
        """Return the gradient of `crelu`."""
        mask = mask.rechunk({axis: -1})
        chunks = (*mask.chunks[:axis], dy.shape[axis : axis + 1], *mask.chunks[axis + 1 :])
        once = {axis: mask.shape[axis]}
        arrays = _rechunk(dy, chunks), mask
        return _map("crelu_backward", (), arrays, (axis, None), adjust_chunks=once)

    def random_uniform(self, rng: Any, lower: float, upper: float, x: Any) -> Any:
        """Return random numbers, with the chunks of x: a seed is drawn now, the rest by Dask.

        Dask's own generator is accepted too.
        """
        if math.isnan(x.size):
            raise ValueError("x has chunks of unknown sizes; call x.compute_chunk_sizes() first")
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        if callable(rng):
            numbers = da.asarray(rng(x.shape)).rechunk(x.chunks)
        else:
            if isinstance(rng, np.random.Generator):
                rng = da.random.default_rng(int(rng.integers(1 << 63)))
            numbers = rng.random(x.shape, dtype=dtype, chunks=x.chunks)
        meta = meta_from_array(x)
        if not array_api_compat.is_numpy_array(meta):
            xp = array_api_compat.array_namespace(meta)
            numbers = numbers.map_blocks(xp.asarray, meta=meta, dtype=numbers.dtype)
        return numbers * (upper - lower) + lower

    def dtype_name(self, dtype: np.dtype[Any]) -> str:
        """Return the dtype's name: Dask arrays declare NumPy's dtypes."""
        return NumpyBackend().dtype_name(dtype)

    def device(self, x: Any) -> tuple[str, None]:
        """Return the library, and no device: chunks lie where Dask has put them."""
        return _DEVICE

    def copy(self, x: Any) -> Any:
        """Return x itself: Dask arrays are immutable."""
        return x

    def check_out(self, out: Any, inputs: Sequence[Any]) -> NoReturn:
        """Refuse any `out`: Dask arrays are immutable."""
        raise TypeError(
            "cannot be written: its library's arrays are immutable; omit out= or inplace="
        )

    def residuals_nbytes(self, residuals: Any) -> int:
        """Return how many bytes will be held, as the declared chunks have them."""
        blocks = residuals if isinstance(residuals, da.Array) else residuals[0]
        if math.isnan(blocks.size):
            raise ValueError(
                "what is saved for chunks of unknown sizes is not known before it is computed; "
                "call x.compute_chunk_sizes() before forward"
            )
        if not isinstance(residuals, _Residuals):
            return super().residuals_nbytes(residuals)
        meta = meta_from_array(blocks)
        backend = backend_for("saved_nbytes", "a chunk of x", meta)
        packed = backend.mask_nbytes(residuals.params, meta) is not None
        sizes = functools.reduce(np.multiply.outer, blocks.chunks, np.ones((), np.int64))
        bits = packed and residuals.params.num_branches == 2
        return int(np.sum(-(-sizes // 8) if bits else sizes))


def _map(
    name: str,
    params: tuple[CastParameters, ...],
    arrays: tuple[Any, ...],
    rest: tuple[Any, ...] = (None,),
    **options: Any,
) -> Any:
    """Return the array of what a method of the backend returns for each chunk."""
    function = functools.partial(dask_chunks.apply, name, params, rest)
    return _blockwise(function, name, arrays, **options)


def _map_backward(name: str, params: tuple[CastParameters, ...], dy: Any, x: Any) -> Any:
    """Return the same for a gradient, which may be None, and an input."""
    if dy is not None:
        dy = _rechunk(dy, x.chunks)
    return _blockwise(functools.partial(dask_chunks.apply_pair, name, params), name, (dy, x))


def _map_biased(
    name: str, params: CastParameters, x: Any, bias: Any, axis: int, rest: tuple[Any, ...]
) -> Any:
    """Return the same for x and a bias along an axis."""
    bias = _rechunk(bias, x.chunks[axis : axis + 1])
    function = functools.partial(dask_chunks.apply_biased, name, params, axis, rest)
    return _blockwise(function, name, (x, bias), vector_axis=axis)


def _blockwise(
    function: Callable[..., Any],
    name: str,
    arrays: tuple[Any, ...],
    *,
    dtype: Any = None,
    adjust_chunks: dict[int, Any] | None = None,
    vector_axis: int | None = None,
) -> Any:
    """Return the array of what a function returns for each chunk.

    An array may be None, which is passed on. Dtype and kind are by default those of the first one.
    With a `vector_axis`, the last one is 1-D, and goes along that axis.
    """
    first = next(array for array in arrays if array is not None)
    axes = tuple(range(first.ndim))
    indices = [None if array is None else axes for array in arrays]
    if vector_axis is not None:
        indices[-1] = (vector_axis,)
    return da.blockwise(
        functools.partial(dask_chunks.on_arrays, function),
        axes,
        *itertools.chain(*zip(arrays, indices, strict=True)),
        token=f"relu-{name}",
        dtype=first.dtype if dtype is None else dtype,
        meta=meta_from_array(first),
        adjust_chunks=adjust_chunks,
        align_arrays=False,  # they are, or are of unknown sizes
    )


def _total(sums: Any, axes: tuple[int, ...], dtype: Any, *, keepdims: bool) -> Any:
    """Return the sums of all chunks, added in float64 along axes, in a dtype."""
    if axes:
        add = dask_chunks.add
        sums = da.reduction(sums, add, add, axis=axes, keepdims=keepdims, dtype=np.float64)
    narrow = functools.partial(dask_chunks.narrow, dtype)
    return _blockwise(narrow, "total", (sums,), dtype=dtype)


def _rechunk(array: Any, chunks: tuple[tuple[float, ...], ...]) -> Any:
    """Return an array with other chunks, which may be of unknown sizes."""
    wanted = {}
    for axis, (own, lengths) in enumerate(zip(array.chunks, chunks, strict=True)):
        if not math.isnan(sum(own) + sum(lengths)):
            wanted[axis] = lengths
        elif len(own) != len(lengths):
            raise ValueError(
                f"axis {axis} has {len(own)} chunks and {len(lengths)}, not all of "
                "known size; call .compute_chunk_sizes() of the arrays first"
            )
    return array.rechunk(wanted)


def _rechunk_weight(weight: Any, like: Any) -> Any:
    """Return a weight with the chunks of an array; an axis of length 1 goes with any."""
    axes = zip(weight.shape, like.chunks, strict=True)
    return _rechunk(weight, tuple((1,) if length == 1 else lengths for length, lengths in axes))


def _take_apart(pairs: Any, params: CastParameters) -> tuple[Any, _Residuals]:
    """Return the first of pairs with residuals, and the residuals of all chunks."""
    blocks = _blockwise(dask_chunks.residuals_of_pair, "residuals", (pairs,))
    return _blockwise(dask_chunks.first, "forward", (pairs, blocks)), _Residuals(blocks, params)
