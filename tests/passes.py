"""All passes of ReLU at once, and what compares the results of different arrays."""

from __future__ import annotations

import numpy as np

import relu_xp


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


def check_bits(got, wanted, what, any_nan=False):
    """Raise AssertionError unless NumPy arrays have equal bits; or any NaN, where there is one."""
    assert got.dtype == wanted.dtype
    differ = got.view(f"u{got.itemsize}") != wanted.view(f"u{got.itemsize}")
    if any_nan:
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
