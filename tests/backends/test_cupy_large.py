"""CuPy's kernels on arrays of more than 2**32 elements, of which the last ones are executed.

The arrays take address space only: memory that nothing touches is none.
"""

from __future__ import annotations

import math
import mmap
import sys
from unittest import mock

import numpy as np
import pytest
from passes import bias_results, check_bits

import relu_xp
from relu_xp.testing import reference

cupy_host = pytest.importorskip("cupy_host", exc_type=ImportError)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without pages is Linux's")

COUNT, BLOCKS = 2000, 24  # elements that are compared at least, and blocks that compute more

CASES = {
    "vectorized": (((1 << 32) + 1037,), 0, None, "forward_bits_vectorized"),
    "strided": (((1 << 21) + 3, 2049), 1, None, "forward_bits_strided"),
    "row": (((1 << 27) + 5, 40), 0, 1, "bias_forward_bits_row_vectorized"),
    "runs": (((1 << 23) + 7, 5, 131), 0, 1, "bias_forward_bits_runs_vectorized"),
    "any": (((1 << 27) + 3, 37), 0, 1, "bias_forward_bits_any_vectorized"),
    "strided with a bias": (((1 << 23) + 7, 5, 131), 1, 1, "bias_forward_bits_any_strided"),
    "one channel": ((3, (1 << 31) + 13), 0, 0, "bias_forward_bits_runs_vectorized"),
}


def sparse(shape, dtype):
    """Return an array of zeros of any size."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    no_reserve = 0x4000  # which mmap names since Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype).reshape(shape)


def run(case):
    """Compare the last elements of x that a case describes with NumPy's."""
    shape, gap, axis, kernel = CASES[case]
    form, rng = reference.Format("float16"), np.random.default_rng(4)
    size = math.prod(shape)
    rows = -(-COUNT // math.prod(shape[1:]))
    last = np.s_[-1:, -COUNT:] if axis == 0 else np.s_[-rows:]
    memory = [sparse((*shape[:-1], shape[-1] + gap), form.dtype) for _ in range(4)]
    x, dy, y, dx = (one[..., : shape[-1]] for one in memory)
    for host in (x, dy):
        host[last] = rng.choice(reference.specials("float16"), host[last].shape).view(form.dtype)
    mask = sparse((-(-size // 8),), np.uint8)
    count = x[last].size
    if axis is None:
        its_mask, free = np.zeros(-(-count // 8), np.uint8), np.zeros(x[last].shape, bool)
        wanted, pullback = relu_xp.relu_vjp(x[last], mask=its_mask)
        its_dx = pullback(dy[last])
    else:
        bias = rng.choice(reference.specials("float16"), shape[axis]).view(form.dtype)
        its_bias = bias[-1:] if axis == 0 else bias
        wanted, its_mask, _, free = bias_results(x[last], its_bias, dy[last], axis, {})

    def first_block(threads):
        return -(-threads // 128) - BLOCKS

    its_x, its_dy, its_y, out, packed = map(cupy_host.array, (x, dy, y, dx, mask))
    with mock.patch.object(cupy_host, "first_block", first_block):
        if axis is None:
            _, pullback = relu_xp.relu_vjp(its_x, out=its_y, mask=packed)
            pullback(its_dy, out=out)
            check_bits(dx[last], its_dx, case)
        else:
            its_bias = cupy_host.array(bias)
            relu_xp.bias_relu_vjp(its_x, its_bias, axis=axis, out=its_y, mask=packed)
    assert cupy_host.launches[0][0] == f"relu_xp_{kernel}"
    assert np.isnan(y[last][free]).all()
    check_bits(np.where(free, wanted, y[last]), wanted, case)
    start = size - count
    bits = np.unpackbits(mask[start // 8 :], bitorder="little")[start % 8 :][:count]
    check_bits(bits, np.unpackbits(its_mask, bitorder="little")[:count], case)


@pytest.mark.parametrize("case", CASES)
def test_the_last_elements(launches, case):
    run(case)
