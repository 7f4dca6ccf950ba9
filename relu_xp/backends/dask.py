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
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import array_api_compat
import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.sizeof import sizeof

from relu_xp.backends.base import Backend
from relu_xp.backends.numpy import NumpyBackend
from relu_xp.dispatch import backend_for
from relu_xp.mask import Mask
from relu_xp.parameters import CastParameters

__all__ = ["DaskBackend"]

_DEVICE = ("dask", None)  # chunks may lie anywhere, and on several devices

# Dask moves and drops results by their sizes.
sizeof.register(Mask, lambda mask: mask.data.nbytes)


class _ChunkResiduals(NamedTuple):
    """The residuals of a chunk, and its shape."""

    shape: tuple[int, ...]
    data: Any


sizeof.register(_ChunkResiduals, lambda residuals: sizeof(residuals.data))


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
        pairs = _map("forward_with_mask", (params,), (x,), (None, None))
        blocks = _blockwise(_residuals_of_pair, "residuals", (pairs,))
        return _blockwise(_first, "forward", (pairs, blocks)), _Residuals(blocks, params)

    def backward(self, grad_params: CastParameters, dy: Any, residuals: Any, out: Any) -> Any:
        """Return f'(x) * dy from the residuals."""
        function = functools.partial(_chunk_backward, grad_params)
        blocks = residuals.blocks
        return _blockwise(function, "backward", (_rechunk(dy, blocks.chunks), blocks))

    def backward_from_input(
        self, params: CastParameters, grad_params: CastParameters, dy: Any, x: Any, out: Any
    ) -> Any:
        """Return f'(x) * dy."""
        return _map_backward("backward_from_input", (params, grad_params), dy, x)

    def prelu(self, values: Any, x: Any, weight: Any, out: Any) -> Any:
        """Return f(x) or f'(x) * dy."""
        like = next(array for array in (x, values, weight) if array is not None)
        if values is not None:
            values = _rechunk(values, like.chunks)
        dtype = weight.dtype if values is None else values.dtype
        arrays = values, x, _rechunk_weight(weight, like)
        return _blockwise(_chunk_prelu, "prelu", arrays, dtype=dtype)

    def prelu_weight_grad(self, dy: Any, x: Any, weight: Any) -> Any:
        """Return the gradient with respect to the weight.

        The sums of a chunk stay in float64 until Dask has added those of all chunks.
        """
        summed = tuple(axis for axis, length in enumerate(weight.shape) if length == 1)
        sums = _blockwise(
            functools.partial(_chunk_prelu_weight_grad, summed),
            "prelu_weight_grad",
            (_rechunk(dy, x.chunks), x),
            adjust_chunks=dict.fromkeys(summed, 1),
            dtype=np.float64,
        )
        total = da.sum(sums, axis=summed, keepdims=True, dtype=np.float64)
        narrow = functools.partial(_narrow, weight.dtype)
        return _blockwise(narrow, "prelu_weight_grad", (total,), dtype=weight.dtype)

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
    return _blockwise(functools.partial(_chunk, name, params, rest), name, arrays, **options)


def _map_backward(name: str, params: tuple[CastParameters, ...], dy: Any, x: Any) -> Any:
    """Return the same for a gradient, which may be None, and an input."""
    if dy is not None:
        dy = _rechunk(dy, x.chunks)
    return _blockwise(functools.partial(_chunk_pair, name, params), name, (dy, x))


def _blockwise(
    function: Callable[..., Any],
    name: str,
    arrays: tuple[Any, ...],
    *,
    dtype: Any = None,
    adjust_chunks: dict[int, Any] | None = None,
) -> Any:
    """Return the array of what a function returns for each chunk.

    An array may be None, which is passed on. Dtype and kind are by default those of the first one.
    """
    first = next(array for array in arrays if array is not None)
    axes = tuple(range(first.ndim))
    return da.blockwise(
        functools.partial(_on_arrays, function),
        axes,
        *(part for array in arrays for part in (array, None if array is None else axes)),
        token=f"relu-{name}",
        dtype=first.dtype if dtype is None else dtype,
        meta=meta_from_array(first),
        adjust_chunks=adjust_chunks,
        align_arrays=False,  # they are, or are of unknown sizes
    )


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


def _first(pair: tuple[Any, Any], residuals: Any) -> Any:
    return pair[0]


def _residuals_of_pair(pair: tuple[Any, Any]) -> _ChunkResiduals:
    return _ChunkResiduals(pair[0].shape, pair[1])


def _chunk(
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


def _chunk_pair(name: str, params: tuple[CastParameters, ...], dy: Any, x: Any) -> Any:
    """Call a method of a chunk's backend for a gradient, which may be None."""
    if dy is not None:
        _check_chunks(dy, x)
    return _chunk(name, params, (None,), dy, x)


def _chunk_backward(params: CastParameters, dy: Any, residuals: _ChunkResiduals) -> Any:
    _check_chunks(dy, residuals)
    backend = backend_for("relu", "a chunk of x", dy)
    cast = params.parameters.cast(backend.dtype_name(dy.dtype))
    return backend.backward(cast, dy, residuals.data, None)


def _chunk_prelu(values: Any, x: Any, weight: Any) -> Any:
    if values is not None:
        _check_chunks(values, weight if x is None else x)
    return _chunk("prelu", (), (None,), values, x, weight)


def _chunk_prelu_weight_grad(summed: tuple[int, ...], dy: Any, x: Any) -> Any:
    _check_chunks(dy, x)
    xp = array_api_compat.array_namespace(x)
    shape = tuple(1 if axis in summed else length for axis, length in enumerate(x.shape))
    return _chunk("prelu_weight_grad", (), (), dy, x, xp.zeros(shape, dtype=xp.float64))


def _narrow(dtype: Any, total: Any) -> Any:
    """Return sums in a dtype, silently: they may be beyond its range."""
    with np.errstate(all="ignore"):
        return total.astype(dtype)


def _on_arrays(function: Callable[..., Any], *chunks: Any) -> Any:
    """Call a function with 0-d arrays where Dask's reductions and indexing have made scalars."""
    return function(*(np.asarray(c) if isinstance(c, np.generic) else c for c in chunks))


def _check_chunks(dy: Any, x: Any) -> None:
    """Refuse chunks whose shapes differ from what was declared."""
    if dy.shape != x.shape:
        raise ValueError(
            f"a chunk of dy has shape {dy.shape}, the one of x {x.shape}; "
            "call .compute_chunk_sizes() of both arrays, and give them equal chunks"
        )
