"""JAX arrays: the formulas of `relu_xp.backends.generic`, each pass one compiled function.

Outside `jax.jit` JAX runs an operation at a time, and a pass of the generic backend has two or
more. Compiled, with a member's numbers, it is one. Inside a function that is being traced it is
the same operations, inlined.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax

from relu_xp.activation import Rounded
from relu_xp.backends import generic
from relu_xp.backends.generic import (
    check_out,
    copy,
    dtype_name,
    fits,
    mask_nbytes,
    saved_nbytes,
    uniform,
)

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

# The numbers are known by identity. `out` is None in all of these: `check_out` lets no other pass.
_jit = functools.partial(jax.jit, static_argnums=0, inline=True)
_forward = _jit(generic.forward)
_forward_saving = _jit(generic.forward_saving)
_backward = _jit(generic.backward)
_backward_from_input = _jit(generic.backward_from_input, static_argnums=(0, 1))
_gradient = _jit(generic.gradient)
_sloped = _jit(generic.sloped, static_argnums=())
_slopes_gradient = _jit(generic.slopes_gradient, static_argnums=())
_squared = _jit(generic.squared, static_argnums=())
_backward_squared = _jit(generic.backward_squared, static_argnums=())
_both = _jit(generic.both, static_argnums=1)
_pieces_of_both = _jit(generic.pieces_of_both, static_argnums=())
_backward_both = _jit(generic.backward_both, static_argnums=2)


def forward(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f(x). See `relu_xp.backends.Backend`."""
    return _forward(numbers, x, out)


def forward_saving(numbers: Rounded, x: Any, out: Any, mask: Any) -> tuple[Any, Any]:
    """Return f(x) and the pieces: bool, or 0, 1, 2 in uint8 where there are three."""
    return cast(tuple[Any, Any], _forward_saving(numbers, x, out, mask))


def backward(numbers: Rounded, dy: Any, saved: Any, out: Any) -> Any:
    """Return f'(x) * dy from the pieces. See `relu_xp.backends.Backend`."""
    return _backward(numbers, dy, saved, out)


def backward_from_input(numbers: Rounded, slopes: Rounded, dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _backward_from_input(numbers, slopes, dy, x, out)


def gradient(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f'(x). See `relu_xp.backends.Backend`."""
    return _gradient(numbers, x, out)


def sloped(values: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return f(x) or f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _sloped(values, x, slopes, out)


def slopes_gradient(dy: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return the gradient by the slopes. See `relu_xp.backends.Backend`."""
    return _slopes_gradient(dy, x, slopes, out)


def squared(x: Any, out: Any) -> Any:
    """Return relu(x)**2. See `relu_xp.backends.Backend`."""
    return _squared(x, out)


def backward_squared(dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _backward_squared(dy, x, out)


def both(x: Any, axis: int, out: Any) -> Any:
    """Return relu(x) and relu(-x). See `relu_xp.backends.Backend`."""
    return _both(x, axis, out)


def pieces_of_both(x: Any) -> Any:
    """Return which of both is above 0. See `relu_xp.backends.Backend`."""
    return _pieces_of_both(x)


def backward_both(dy: Any, pieces: Any, axis: int, out: Any) -> Any:
    """Return the gradient of `both`. See `relu_xp.backends.Backend`."""
    return _backward_both(dy, pieces, axis, out)


def place(x: Any) -> tuple[str, None]:
    """Return the library: JAX settles devices itself, and a traced array has none."""
    return "jax", None
