"""All passes of ReLU at once, and what compares the results of different arrays."""

from __future__ import annotations

import numpy as np

import relu_xp
from relu_xp.testing import reference


def run_all(x, dy, params):
    """Return f(x), again with a mask, f'(x), and f'(x) * dy from the mask and from x."""
    y, pullback = relu_xp.relu_vjp(x, **params)
    return [
        relu_xp.relu(x, **params),
        y,
        relu_xp.relu_grad(x, **params),
        pullback(dy),
        relu_xp.relu_backward(dy, x, **params),
    ]


def _along(bias, x, axis):
    """Return the bias in the shape of x."""
    return np.broadcast_to(bias.reshape((-1,) + (1,) * (x.ndim - 1 - axis)), x.shape)


@np.errstate(all="ignore")  # ml_dtypes warns of NaN
def _sum_of(x, bias, axis):
    """Return x + bias, rounded once, and where its NaN is that of neither."""
    form = reference.Format(x.dtype.name)
    bias = _along(bias, x, axis)
    total = np.ascontiguousarray(x + bias)
    words = total.view(form.unsigned)
    quiet = form.unsigned.type(1 << (form.fraction - 1))
    for operand in (bias, x):
        nan = np.ascontiguousarray(operand).view(form.unsigned)
        if x.dtype.name == "bfloat16":  # of which ml_dtypes keeps the sign
            nan = nan & form.unsigned.type(form.sign) | form.unsigned.type(form.infinity)
        words[...] = np.where(np.isnan(operand), nan | quiet, words)
    return total, np.isnan(total) & ~np.isnan(x) & ~np.isnan(bias)


def bias_results(x, bias, dy, axis, params):
    """Return y, the bytes of the mask, and dx, as NumPy has them; and where y is any NaN."""
    total, free = _sum_of(x, bias, axis)
    has_bytes = {"negative_slope", "max_value"} <= {*params}
    mask = np.zeros(x.size if has_bytes else -(-x.size // 8), np.uint8)
    with np.errstate(all="ignore"):
        y, pullback = relu_xp.relu_vjp(total, mask=mask, **params)
        return y, mask, pullback(dy), free


def check_bits(got, wanted, what, any_nan=False):
    """Raise AssertionError unless NumPy arrays have equal bits; or any NaN, where there is one."""
    assert got.dtype == wanted.dtype
    differ = got.view(f"u{got.itemsize}") != wanted.view(f"u{got.itemsize}")
    if any_nan:
        with np.errstate(invalid="ignore"):  # ml_dtypes warns of NaN
            differ &= ~(np.isnan(got) & np.isnan(wanted))
    assert not differ.any(), (what, got[differ][:5], wanted[differ][:5])


def fenced(xp, host, offset):
    """Return a copy of an array some elements behind an aligned address.

    And a function that returns the bytes around it, which are 0x5A.
    """
    memory = np.full(host.nbytes + 1280, 0x5A, np.uint8)
    memory = memory[-memory.ctypes.data % 256 :]
    start = 256 + offset * host.itemsize
    inside = slice(start, start + host.nbytes)
    memory[inside] = host.reshape(-1).view(np.uint8)
    copy = xp.array(memory)
    view = copy[inside].view(host.dtype).reshape(host.shape)
    return view, lambda: np.delete(xp.numpy(copy), inside)
