"""Dask arrays: every pass is one task a chunk, and the chunk's own backend serves inside it.

Nothing is computed during a call. Which backend that is shows when the task runs, where it runs:
it is asked for with the chunk, as for any other array. So are the numbers, should a chunk's dtype
not be the one that its collection declares. What travels to a worker is the name of a function of
the protocol and the activation's numbers, which find themselves again there (`Rounded`).

An operand that is cut otherwise is cut anew (``rechunk``). Chunks of unknown sizes are taken as
they lie; each task sees whether they match.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import array_api_compat
import dask.array as da
import numpy as np
from dask.sizeof import sizeof

from relu_xp.activation import Rounded
from relu_xp.backends.numpy import dtype_name  # its arrays declare their dtypes as NumPy's
from relu_xp.dispatch import backend_for
from relu_xp.mask import Mask

__all__ = [
    "backward",
    "backward_both",
    "backward_from_input",
    "backward_squared",
    "both",
    "check_out",
    "copy",
    "dtype_name",
    "fits",
    "forward",
    "forward_saving",
    "gradient",
    "mask_nbytes",
    "pieces_of_both",
    "place",
    "saved_nbytes",
    "sloped",
    "slopes_gradient",
    "squared",
    "uniform",
]

_PLACE = ("dask", None)  # chunks may lie anywhere, and on several devices

# Dask moves and drops results by their sizes.
sizeof.register(Mask, lambda mask: mask.data.nbytes)


class _SavedChunk(NamedTuple):
    """What a chunk's backend has saved, and the shape of the chunk."""

    shape: tuple[int, ...]
    data: Any


sizeof.register(_SavedChunk, lambda saved: sizeof(saved.data))


class _Saved:
    """The saved states of all chunks, an array of them cut as x; and what they are made of."""

    __slots__ = ("blocks", "numbers")

    def __init__(self, numbers: Rounded, blocks: Any) -> None:
        self.numbers = numbers
        self.blocks = blocks


def forward(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f(x). See `relu_xp.backends.Backend`."""
    return _map("forward", (numbers,), (x,))


def forward_saving(numbers: Rounded, x: Any, out: Any, mask: Any) -> tuple[Any, _Saved]:
    """Return f(x) and the saved states of the chunks.

    One task makes both, and two more take them apart: a pass for each would read x twice, and keep
    it until the later one has run. What takes y waits for the one that takes the saved state, so
    that no pair, with y in it, waits for the gradient to be asked for: between the passes of a
    training step nothing is held but the masks.
    """
    pairs = _map("forward_saving", (numbers,), (x,), (None, None))
    blocks = _blockwise(_saved_chunk, "saved", (pairs,))
    return _blockwise(_first, "forward", (pairs, blocks)), _Saved(numbers, blocks)


def backward(numbers: Rounded, dy: Any, saved: _Saved, out: Any) -> Any:
    """Return f'(x) * dy from what was saved. See `relu_xp.backends.Backend`."""
    function = functools.partial(_chunk_backward, numbers)
    return _blockwise(function, "backward", (_cut(dy, saved.blocks.chunks), saved.blocks))


def backward_from_input(numbers: Rounded, slopes: Rounded, dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _map_back("backward_from_input", (numbers, slopes), dy, x)


def gradient(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f'(x). See `relu_xp.backends.Backend`."""
    return _map("gradient", (numbers,), (x,))


def sloped(values: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return f(x) or f'(x) * dy. See `relu_xp.backends.Backend`."""
    like = next(array for array in (x, values, slopes) if array is not None)
    if values is not None:
        values = _cut(values, like.chunks)
    dtype = slopes.dtype if values is None else values.dtype
    return _blockwise(_chunk_sloped, "sloped", (values, x, _cut_slopes(slopes, like)), dtype=dtype)


def slopes_gradient(dy: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return the gradient by the slopes. See `relu_xp.backends.Backend`.

    The sums of a chunk stay in float64 until the engine has added those of all.
    """
    summed = tuple(axis for axis, length in enumerate(slopes.shape) if length == 1)
    sums = _blockwise(
        functools.partial(_chunk_slopes_gradient, summed),
        "slopes_gradient",
        (_cut(dy, x.chunks), x),
        adjust_chunks=dict.fromkeys(summed, 1),
        dtype=np.float64,
    )
    total = da.sum(sums, axis=summed, keepdims=True, dtype=np.float64)
    narrow = functools.partial(_narrow, slopes.dtype)
    return _blockwise(narrow, "slopes_gradient", (total,), dtype=slopes.dtype)


def squared(x: Any, out: Any) -> Any:
    """Return relu(x)**2. See `relu_xp.backends.Backend`."""
    return _map("squared", (), (x,))


def backward_squared(dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _map_back("backward_squared", (), dy, x)


def both(x: Any, axis: int, out: Any) -> Any:
    """Return relu(x) and relu(-x), of an x that is made one chunk along the axis first."""
    twice = {axis: 2 * x.shape[axis]}
    return _map("both", (), (x.rechunk({axis: -1}),), (axis, None), adjust_chunks=twice)


def pieces_of_both(x: Any) -> Any:
    """Return which of both is above 0. See `relu_xp.backends.Backend`."""
    return _map("pieces_of_both", (), (x,), (), dtype=np.uint8)


def backward_both(dy: Any, pieces: Any, axis: int, out: Any) -> Any:
    """Return the gradient of `both`. See `relu_xp.backends.Backend`."""
    pieces = pieces.rechunk({axis: -1})
    dy = _cut(dy, (*pieces.chunks[:axis], dy.shape[axis : axis + 1], *pieces.chunks[axis + 1 :]))
    once = {axis: pieces.shape[axis]}
    return _map("backward_both", (), (dy, pieces), (axis, None), adjust_chunks=once)


def uniform(rng: Any, lower: float, upper: float, x: Any) -> Any:
    """Return random numbers, cut as x: NumPy's generator draws a seed now, the engine the rest.

    Dask's own generator serves too.
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
    if not array_api_compat.is_numpy_array(x._meta):
        xp = array_api_compat.array_namespace(x._meta)
        numbers = numbers.map_blocks(xp.asarray, meta=x._meta, dtype=numbers.dtype)
    return numbers * (upper - lower) + lower


def copy(x: Any) -> Any:
    """Return x itself: nobody can write it."""
    return x


def place(x: Any) -> tuple[str, None]:
    """Return the library, and no device: chunks lie where the engine has put them."""
    return _PLACE


def fits(out: Any, like: Any, other: Any) -> bool:
    """Return False: `check_out` says why."""
    return False


def check_out(out: Any, inputs: Sequence[Any]) -> NoReturn:
    """Refuse any `out`: what a Dask array names is never changed."""
    raise TypeError(
        "cannot be written: its library's arrays are immutable; leave out= or inplace= away"
    )


def mask_nbytes(numbers: Rounded, x: Any) -> None:
    """Return None: the masks are those of the chunks, made where they are."""


def saved_nbytes(saved: _Saved) -> int:
    """Return the bytes that will be held, as the declared chunks have them."""
    if math.isnan(saved.blocks.size):
        raise ValueError(
            "what is saved for chunks of unknown sizes is not known before it is computed; call "
            "x.compute_chunk_sizes() before forward"
        )
    backend = backend_for("saved_nbytes", "chunk", saved.blocks._meta)
    packed = backend.mask_nbytes(saved.numbers, saved.blocks._meta) is not None
    sizes = functools.reduce(np.multiply.outer, saved.blocks.chunks, np.ones((), np.int64))
    bits = packed and saved.numbers.pieces == 2
    return int(np.sum(-(-sizes // 8) if bits else sizes))


def _map(
    name: str,
    numbers: tuple[Rounded, ...],
    arrays: tuple[Any, ...],
    rest: tuple[Any, ...] = (None,),
    **options: Any,
) -> Any:
    """Return the array of what a function of the protocol makes of each chunk."""
    return _blockwise(functools.partial(_chunk, name, numbers, rest), name, arrays, **options)


def _map_back(name: str, numbers: tuple[Rounded, ...], dy: Any, x: Any) -> Any:
    """Return the same of a gradient and what it belongs to."""
    function = functools.partial(_chunk_back, name, numbers)
    return _blockwise(function, name, (_cut(dy, x.chunks), x))


def _blockwise(
    function: Callable[..., Any],
    name: str,
    arrays: tuple[Any, ...],
    *,
    dtype: Any = None,
    adjust_chunks: dict[int, Any] | None = None,
) -> Any:
    """Return the array of what a function makes of each chunk, of the first array's kind.

    In place of an array, None is passed on.
    """
    first = next(array for array in arrays if array is not None)
    axes = tuple(range(first.ndim))
    return da.blockwise(
        functools.partial(_on_arrays, function),
        axes,
        *(part for array in arrays for part in (array, None if array is None else axes)),
        token=f"relu-{name}",
        dtype=first.dtype if dtype is None else dtype,
        meta=first._meta,
        adjust_chunks=adjust_chunks,
        align_arrays=False,  # they are, or are of unknown sizes
    )


def _cut(array: Any, chunks: tuple[tuple[float, ...], ...]) -> Any:
    """Return an array cut into chunks, which may be of unknown sizes."""
    wanted = {}
    for axis, (own, lengths) in enumerate(zip(array.chunks, chunks, strict=True)):
        if not math.isnan(sum(own) + sum(lengths)):
            wanted[axis] = lengths
        elif len(own) != len(lengths):
            raise ValueError(
                f"axis {axis} is cut into {len(own)} and into {len(lengths)} chunks, not all of "
                "known size; call .compute_chunk_sizes() of the arrays first"
            )
    return array.rechunk(wanted)


def _cut_slopes(slopes: Any, like: Any) -> Any:
    """Return slopes cut as an array that they go with; an axis of length 1 goes with any."""
    axes = zip(slopes.shape, like.chunks, strict=True)
    return _cut(slopes, tuple((1,) if length == 1 else lengths for length, lengths in axes))


def _first(pair: tuple[Any, Any], saved: Any) -> Any:
    return pair[0]


def _saved_chunk(pair: tuple[Any, Any]) -> _SavedChunk:
    return _SavedChunk(pair[0].shape, pair[1])


def _chunk(name: str, numbers: tuple[Rounded, ...], rest: tuple[Any, ...], *arrays: Any) -> Any:
    """Call a function of the protocol; `numbers` belong to the arrays, the last to the first."""
    backend = backend_for("relu", "chunk", next(array for array in arrays if array is not None))
    held = [
        each.activation.round_to(backend.dtype_name(array.dtype))
        for each, array in zip(reversed(numbers), arrays, strict=False)
    ]
    return getattr(backend, name)(*reversed(held), *arrays, *rest)


def _chunk_back(name: str, numbers: tuple[Rounded, ...], dy: Any, x: Any) -> Any:
    """Call a function of the protocol for a gradient."""
    _check_chunks(dy, x)
    return _chunk(name, numbers, (None,), dy, x)


def _chunk_backward(numbers: Rounded, dy: Any, saved: _SavedChunk) -> Any:
    _check_chunks(dy, saved)
    return _chunk("backward", (numbers,), (None,), dy, saved.data)


def _chunk_sloped(values: Any, x: Any, slopes: Any) -> Any:
    if values is not None:
        _check_chunks(values, slopes if x is None else x)
    return _chunk("sloped", (), (None,), values, x, slopes)


def _chunk_slopes_gradient(summed: tuple[int, ...], dy: Any, x: Any) -> Any:
    _check_chunks(dy, x)
    xp = array_api_compat.array_namespace(x)
    shape = tuple(1 if axis in summed else length for axis, length in enumerate(x.shape))
    return _chunk("slopes_gradient", (), (None,), dy, x, xp.zeros(shape, dtype=xp.float64))


def _narrow(dtype: Any, total: Any) -> Any:
    """Return sums in a dtype, silently: they may be beyond its range."""
    with np.errstate(all="ignore"):
        return total.astype(dtype)


def _on_arrays(function: Callable[..., Any], *chunks: Any) -> Any:
    """Call a function with arrays where Dask's own reductions and indexing have made scalars."""
    return function(*(np.asarray(c) if isinstance(c, np.generic) else c for c in chunks))


def _check_chunks(dy: Any, x: Any) -> None:
    """Refuse what was declared otherwise, or not at all."""
    if dy.shape != x.shape:
        raise ValueError(
            f"a chunk of dy has shape {dy.shape}, the one of x {x.shape}; "
            "call .compute_chunk_sizes() of both arrays, and cut them alike"
        )
