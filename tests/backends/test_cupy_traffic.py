"""What CuPy's vectorized kernels move between memory and the threads, counted without a device.

Memory moves sectors of 32 bytes. The accesses of a warp are those of the PTX as it is executed. The
table in bench/README.md is `table`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ptx import BLOCK, WARP

import relu_xp
from relu_xp.backends.overlap import address_view
from relu_xp.testing import reference

cupy_host = pytest.importorskip("cupy_host", exc_type=ImportError)
kernels = pytest.importorskip("relu_xp.backends.cupy_kernels")

SECTOR = 32  # bytes
SHAPE = (128, 128)  # whole tiles of each dtype
PARAMETERS = {"bits": {}, "bytes": {"negative_slope": 0.5, "max_value": 3.0}}
SMALL = {"bias", "sums"}  # arrays that stay in the caches


def launch(name, dtype):
    """Run a kernel on dense, aligned arrays; return kernel, arguments and what it accessed."""
    x, dy = ones(SHAPE, dtype), ones(SHAPE, dtype)
    axis = 0 if name.endswith("runs") else 1
    bias = ones(SHAPE[0] + 1, dtype)
    bias = bias[1:] if name.endswith("any") else bias[:-1]
    params = PARAMETERS["bytes" if "_bytes" in name else "bits"]
    has_mask, has_bias = "_bits" in name or "_bytes" in name, name.startswith("bias_")
    cupy_host.traces.clear()
    if has_mask and has_bias:
        _, pullback = relu_xp.bias_relu_vjp(x, bias, axis=axis, **params)
    elif has_mask:
        _, pullback = relu_xp.relu_vjp(x, **params)
    elif has_bias:
        relu_xp.bias_relu(x, bias, axis=axis)
    elif name == "backward_from_input":
        relu_xp.relu_backward(dy, x)
    else:
        {"forward": relu_xp.relu, "gradient": relu_xp.relu_grad}[name](x)
    if "backward_b" in name:
        cupy_host.traces.clear()
        pullback(dy)
    trace = cupy_host.traces[0]  # sums for each channel are added up by another kernel
    assert re.fullmatch(rf"relu_xp_{name}(_[abctf]+)?_vectorized", trace[0].name)
    return trace


def ones(shape, dtype):
    """Return an array that begins where one on a device does."""
    dtype = reference.DTYPES[dtype]
    pointer = cupy_host.allocate(int(np.prod(shape)) * dtype.itemsize)
    x = cupy_host.cupy.ndarray(shape, dtype, pointer)
    address_view(x.data.ptr, x.shape, x.strides, x.itemsize).view(dtype)[...] = 1
    return x


def traffic(kernel, arguments, accesses):
    """Return bytes an element that a kernel moves, and sectors of its accesses over the fewest.

    A sector that a block of threads reads counts once: they share a cache. So does one that it
    writes.
    """
    pairs = zip(kernel.params, arguments, strict=False)  # the last parameter is the index
    small = [a for parameter, a in pairs if parameter.name in SMALL]
    moved, sectors, fewest = set(), 0, 0
    for access in accesses:
        first = access.addresses[0]
        if any(a.data.ptr <= first < a.data.ptr + a.nbytes for a in small):
            continue
        sector, warp = (access.addresses // SECTOR).tolist(), access.threads // WARP
        blocks = zip((access.threads // BLOCK).tolist(), sector, strict=True)
        moved |= {(access.is_store, *pair) for pair in blocks}
        sectors += len(set(zip(warp.tolist(), sector, strict=True)))
        distinct = np.unique(np.stack([warp, access.addresses]), axis=1)[0]
        fewest += sum(-(-n * access.width // SECTOR) for n in np.unique_counts(distinct).counts)
    return len(moved) * SECTOR / np.prod(SHAPE), sectors / fewest


def floor(name, dtype):
    """Return the bytes an element of the arrays, each read or written once."""
    arrays = 3 if name == "backward_from_input" else 2
    mask = 1 if "bytes" in name else 1 / 8 if "bits" in name else 0
    return arrays * reference.DTYPES[dtype].itemsize + mask


@pytest.mark.parametrize("name", kernels.PASSES)
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_no_more_is_moved_than_has_to_be(launches, name, dtype):
    moved, share = traffic(*launch(name, dtype))
    assert floor(name, dtype) <= moved <= 1.02 * floor(name, dtype)
    assert share == 1


@pytest.mark.parametrize(
    ("operation", "moved", "share"),
    [
        ("y[i] = x[i]", 8, 1),
        ("int k = i / 512 + i % 512 * 32; y[k] = x[k]", 64, 8),  # columns of 512 elements
        ("int k = i / 16 * 16 + i % 4 * 4 + i / 4 % 4; y[k] = x[k]", 8, 1),
        ("int k = i / 128 * 128 + i % 8 * 16 + i / 8 % 16; y[k] = x[k]", 8, 2),
    ],
)
def test_what_is_not_coalesced_shows(launches, operation, moved, share):
    """A warp's elements together, in columns, in another order, and in other warps' places."""
    kernel = cupy_host.cupy.ElementwiseKernel("raw T x", "raw T y", operation, "copy")
    arrays = ones(SHAPE, "float32"), ones(SHAPE, "float32")
    cupy_host.HostKernel(kernel)(*arrays, size=arrays[0].size)
    assert traffic(*cupy_host.traces[-1]) == (moved, share)


def table():
    """Return the table of bench/README.md."""
    dtypes = ("float16", "float32", "float64")
    lines = [f"| kernel | {' | '.join(dtypes)} |", "|---|---|---|---|"]
    for name in kernels.PASSES:
        cells = [f"{traffic(*launch(name, d))[0]:.6g} of {floor(name, d):.6g}" for d in dtypes]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_is_computed(launches):
    readme = Path(__file__).parents[2] / "bench" / "README.md"
    assert table() in readme.read_text("utf-8")
