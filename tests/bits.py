"""SHA-256 of the bits of every function on NumPy arrays, which must be the same everywhere.

``python bits.py`` prints a digest a line; relu_xp needs nothing but NumPy for it (and ml_dtypes for
bfloat16). ``python bits.py FILE...`` compares what several runs printed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import relu_xp
from relu_xp import dispatch, kernels
from relu_xp.mask import memory_order
from relu_xp.testing.reference import DTYPES, PRESETS, Format, specials

LARGE = ("relu", "leaky", "everything")  # masks of none, one and two products
INTEGERS = tuple(np.dtype(code) for code in "bhiqBHIQ")
STREAMED = (1 << 25) + 4 * 1021 * 8  # bytes: kernels store past the caches, and end within a line


def scrambled(count, seed):
    """Return random numbers of 64 bits, independent of any library's generator (splitmix64)."""
    z = np.arange(1 + seed * count, 1 + (seed + 1) * count, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def ordinary(dtype, count, seed):
    """Return numbers of either sign from 1/8 to 32: their products and sums are finite."""
    form = Format(dtype)
    words = scrambled(count, seed).astype(form.unsigned)
    step = 1 << form.fraction
    low = form.unsigned.type((form.infinity >> 1) // step * step - 3 * step)
    return (
        words % form.unsigned.type(8 * step) + low | words & form.unsigned.type(form.sign)
    ).view(form.dtype)


def mixed(dtype, count, seed):
    """Return numbers of all kinds: of each four, two of any bits, one ordinary, one special."""
    form = Format(dtype)
    words = scrambled(count, seed).astype(form.unsigned)
    words[1::4] = ordinary(dtype, count, seed)[1::4].view(form.unsigned)
    words[3::4] = specials(dtype)[words[3::4] % len(specials(dtype))]
    return words.view(form.dtype)


def every(dtype):
    """Return every number of 16 bits; of more bits, a hundred thousand."""
    form = Format(dtype)
    if form.width == 16:
        return np.arange(1 << 16, dtype=np.uint16).view(form.dtype)
    return np.concatenate([specials(dtype).view(form.dtype), mixed(dtype, 100_003, 0)])


def cube(dtype, shape, seed):
    """Return numbers in three axes: `every`, or those of a shape."""
    if shape is not None:
        return mixed(dtype, np.prod(shape), seed).reshape(shape)
    x = every(dtype)
    return np.resize(x, -(-x.size // 60) * 60).reshape(-1, 6, 10)


def vjp(x, dy, params):
    has_three = "max_value" in params and "negative_slope" in params
    mask = np.zeros(x.size if has_three else -(-x.size // 8), np.uint8)
    y, pullback = relu_xp.relu_vjp(x, mask=mask, **params)
    yield y
    yield in_c_order(mask, x) if not x.flags.forc else mask
    yield pullback(dy)


def in_c_order(mask, x):
    """Return a mask in C order, which has the elements of x in the order of memory."""
    axes = memory_order(x.shape, x.strides, x.itemsize)
    if axes is None:
        return mask
    bits = mask if mask.size == x.size else np.unpackbits(mask, None, x.size, "little")
    bits = bits.reshape([x.shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return bits.ravel() if mask.size == x.size else np.packbits(bits, None, "little")


def forwards(dtype):
    for params in PRESETS.values():
        yield relu_xp.relu(every(dtype), **params)


def gradients(dtype):
    for params in PRESETS.values():
        yield relu_xp.relu_grad(every(dtype), **params)


def vjps(dtype, dy_dtype):
    x = every(dtype)
    for params in PRESETS.values():
        yield from vjp(x, mixed(dy_dtype, x.size, 1), params)


def backwards(dtype, dy_dtype):
    x = every(dtype)
    for params in PRESETS.values():
        yield relu_xp.relu_backward(mixed(dy_dtype, x.size, 2), x, **params)


def prelus(dtype, dy_dtype, shape=None):
    x = cube(dtype, shape, 3)
    dy = mixed(dy_dtype, x.size, 4).reshape(x.shape)
    weight = np.linspace(-1.0, 1.0, x.shape[1]).astype(DTYPES[dtype])
    odd = weight.copy()
    odd[:5] = np.nan, np.inf, 0.0, -0.0, 1.0
    for axis, slopes in ((1, weight), (1, odd), (0, weight[:1]), (0, weight[0, ...])):
        y, pullback = relu_xp.prelu_vjp(x, slopes, axis=axis)
        yield y
        yield from pullback(dy)


def sums(dtype, dy_dtype):
    """The gradient of a weight where it is rounded, and neither NaN nor infinite."""
    for shape in ((5, 3, 113, 59), (513, 130), (100_003,)):
        count = np.prod(shape)
        x = ordinary(dtype, count, 16).reshape(shape)
        dy = ordinary(dy_dtype, count, 17).reshape(shape)
        for axis in range(x.ndim):
            weight = np.full(x.shape[axis], 0.25, DTYPES["float64"])
            for view in (x, np.asfortranarray(x), x[::-1]):
                gradient = relu_xp.prelu_vjp(view, weight, axis=axis)[1](dy)[1]
                assert np.isfinite(gradient).all()
                yield gradient
    x, dy = np.resize(x, (1030, 17, 61)), np.resize(dy, (1030, 17, 61))  # by several threads
    yield relu_xp.prelu_vjp(x, weight[:17])[1](dy)[1]


def rrelus(dtype, dy_dtype, shape=None):
    x = cube(dtype, shape, 5)
    y, pullback = relu_xp.rrelu_vjp(x, -0.5, 0.75, rng=np.random.Generator(np.random.PCG64(7)))
    yield y
    yield pullback(mixed(dy_dtype, x.size, 6).reshape(x.shape))
    yield relu_xp.rrelu(x, -0.5, 0.75)


def crelus(dtype, dy_dtype, shape=None):
    x = cube(dtype, shape, 7)
    for axis in range(x.ndim):
        y, pullback = relu_xp.crelu_vjp(x, axis=axis)
        yield y
        yield pullback(mixed(dy_dtype, y.size, 8).reshape(y.shape))


def squares(dtype, dy_dtype, shape=None):
    x = cube(dtype, shape, 9)
    y, pullback = relu_xp.squared_relu_vjp(x)
    yield y
    yield pullback(mixed(dy_dtype, x.size, 10).reshape(x.shape))


def biases(dtype, dy_dtype, shape=None):
    x = cube(dtype, shape, 18)
    dy = mixed(dy_dtype, x.size, 19).reshape(x.shape)
    for axis, name in enumerate(LARGE):
        bias = mixed(dtype, x.shape[axis], 20)
        y, pullback = relu_xp.bias_relu_vjp(x, bias, axis=axis, **PRESETS[name])
        yield y
        yield from pullback(dy)


def bias_sums(dtype):
    """The gradient of a bias where it is neither NaN nor infinite, in every layout and order."""
    for shape in ((5, 3, 113, 59), (513, 130), (100_003, 2), (300, 5000), (3, 2, 70, 70)):
        count = np.prod(shape)
        x, dy = (ordinary(dtype, count, seed).reshape(shape) for seed in (21, 22))
        for axis in range(x.ndim):
            bias = np.zeros(x.shape[axis])
            for view in (x, np.asfortranarray(x), x[::-1]):
                gradient = relu_xp.bias_relu_vjp(view, bias, axis=axis)[1](dy)[1]
                assert np.isfinite(gradient).all()
                yield gradient


VARIANTS = {"prelu": prelus, "rrelu": rrelus, "crelu": crelus, "squared_relu": squares}


def layouts(dtype):
    def views(seed):
        block = mixed(dtype, 12 * 14 * 18, seed).reshape(12, 14, 18)
        yield from (block, np.asfortranarray(block), block.transpose(1, 2, 0), block[::-1, :, ::-1])
        yield from (block[1::2, ::3, 5:], block[3, 4, 5:6].reshape(()), block[:0], block[:, 0, :])
        yield np.broadcast_to(block[:1, :, :1], block.shape)
        raw = np.zeros(block.nbytes + 1, np.uint8)
        raw[1:] = block.reshape(-1).view(np.uint8)
        yield raw[1:].view(block.dtype)

    for params in PRESETS.values():
        for x, dy in zip(views(11), views(12), strict=True):
            yield from vjp(x, dy, params)
            yield relu_xp.relu_backward(dy.copy("C"), x, **params)
            yield relu_xp.relu_grad(x, **params)
            yield relu_xp.relu(x, **params)


def large(dtype, nbytes=STREAMED):
    """Arrays that several threads share, into new memory and in place."""
    count = nbytes // DTYPES[dtype].itemsize
    x, dy = (np.resize(mixed(dtype, 1 << 18, seed)[5:], count) for seed in (13, 14))
    for name in LARGE:
        params = PRESETS[name]
        yield from vjp(x, dy, params)
        yield relu_xp.relu(x, **params)
        yield relu_xp.relu_backward(dy, x, **params)
        mine = x.copy()
        yield relu_xp.relu(mine, out=mine, **params)


def large_variants(dtype, shape=(1030, 17, 61)):
    for function in VARIANTS.values():
        yield from function(dtype, dtype, shape)


def integers():
    for dtype in INTEGERS:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        values = {*range(low, high, high // 97), *range(max(low, -9), 9), high}
        x = np.array(sorted(values), dtype)
        yield relu_xp.relu(x)
        yield relu_xp.relu6(x)
        yield relu_xp.relu(x, threshold=3, negative_slope=2, positive_slope=5, max_value=100)
        yield relu_xp.relu(np.resize(x, (1 << 20) + 3), max_value=7)


def groups() -> dict[str, tuple]:
    """Return a function and its arguments for the name of each line."""
    found: dict[str, tuple] = {"integers": (integers,)}
    for dtype in DTYPES:
        found[f"{dtype} forward"] = (forwards, dtype)
        found[f"{dtype} gradient"] = (gradients, dtype)
        found[f"{dtype} layouts"] = (layouts, dtype)
        found[f"{dtype} large"] = (large, dtype)
        found[f"{dtype} large, variants"] = (large_variants, dtype)
        found[f"{dtype} large, bias"] = (biases, dtype, dtype, (1030, 17, 61))
        found[f"{dtype} bias sums"] = (bias_sums, dtype)
    for dtype, dy_dtype in itertools.product(DTYPES, DTYPES):
        name = dtype if dtype == dy_dtype else f"{dtype} by {dy_dtype}"
        found[f"{name} vjp"] = (vjps, dtype, dy_dtype)
        found[f"{name} backward"] = (backwards, dtype, dy_dtype)
        for variant, function in VARIANTS.items():
            found[f"{name} {variant}"] = (function, dtype, dy_dtype)
        found[f"{name} sums"] = (sums, dtype, dy_dtype)
        found[f"{name} bias"] = (biases, dtype, dy_dtype)
    return found


def digest(arrays: Iterator[np.ndarray]) -> str:
    """Return the SHA-256 of arrays: of their dtypes, shapes and elements, NaN included."""
    found = hashlib.sha256()
    for array in arrays:
        assert type(array) is np.ndarray
        found.update(f"{array.dtype.name} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def compare(files: list[Path]) -> list[str]:
    """Return what is wrong: lines that differ or are missing (bfloat16's may be)."""
    if len(files) < 2:
        return ["one run has nothing to be compared with"]
    flaws = []
    runs = [dict(line.rsplit(" ", 1) for line in file.read_text().splitlines()) for file in files]
    for name in sorted(set().union(*runs, groups())):
        having: dict[str | None, list[str]] = {}
        for file, run in zip(files, runs, strict=True):
            having.setdefault(run.get(name), []).append(file.name)
        lacking = having.pop(None, [])
        if lacking and "bfloat16" not in name:
            flaws.append(f"{name}: missing in {', '.join(lacking)}")
        if len(having) > 1:
            flaws.append(f"{name}: {' | '.join(map(', '.join, having.values()))}")
    return flaws


def main() -> None:
    compiled = dispatch.backend_class("numpy").__name__ == "CompiledBackend"
    assert compiled == (os.environ.get(kernels.NATIVE) != "0"), kernels.reason
    instruction_set = kernels.cpu.instruction_set if kernels.cpu else "NumPy"
    asked = os.environ.get(kernels.NUM_THREADS) if kernels.cpu else None
    count = relu_xp.get_num_threads()
    assert asked is None or count == int(asked), f"{count} CPUs, not {asked}"
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    print(f"{versions}, by {instruction_set}, threads: {count}", file=sys.stderr)
    for name, (function, *arguments) in groups().items():
        print(name, digest(function(*arguments)), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("\n".join(compare([Path(file) for file in sys.argv[1:]])) or None)
    main()
