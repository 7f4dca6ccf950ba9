"""All passes of ReLU at once, to compare what different arrays give."""

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
