"""JAX arrays: the formulas of `relu_xp.backends.generic`, each pass one compiled function.

Outside `jax.jit` JAX runs an operation at a time, and a pass of the generic backend has two or
more. Compiled, it is one, and a member's numbers are its arguments. Inside a function that is being
traced it is the same operations, inlined.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple, cast

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

_jit = functools.partial(jax.jit, inline=True)


class _Structure(NamedTuple):
    """What of a member is compiled; its numbers are arguments, so that a new slope compiles none.

    `given` are those that have not their defaults, by the names that `Rounded` has for them.
    """

    given: tuple[str, ...]
    pieces: int
    zero_below: bool
    self_above: bool
    mirrored: bool


@functools.lru_cache(maxsize=1024)
def _taken_apart(numbers: Rounded) -> tuple[_Structure, tuple[float, ...]]:
    values = {name: getattr(numbers, name) for name in _DEFAULTS}
    given = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
    n = numbers
    structure = _Structure(tuple(given), n.pieces, n.zero_below, n.self_above, n.mirrored)
    return structure, tuple(given.values())


_DEFAULTS = {"threshold": 0.0, "negative_slope": 0.0, "positive_slope": 1.0, "max_value": None}


def _put_together(structure: _Structure, values: Any) -> Any:
    """Return what `generic` asks of `Rounded`, whose numbers may be traced."""
    numbers = _DEFAULTS | dict(zip(structure.given, values, strict=True))
    return types.SimpleNamespace(floating=True, **numbers, **structure._asdict())


@functools.partial(_jit, static_argnums=(0, 1))
def _run(
    function: Callable[..., Any], structures: tuple[_Structure, ...], values: Any, *arrays: Any
) -> Any:
    return function(*map(_put_together, structures, values), *arrays)


def _serve(function: Callable[..., Any], numbers: tuple[Rounded, ...], *arrays: Any) -> Any:
    """Run a pass of `generic`, compiled for the structure of its numbers."""
    if not numbers[0].floating:  # whose numbers may be beyond what JAX takes for an argument
        return function(*numbers, *arrays)
    structures, values = zip(*map(_taken_apart, numbers), strict=True)
    return _run(function, structures, values, *arrays)


# `out` is None in all that is compiled: `check_out` lets no other pass.
sloped = _jit(generic.sloped)
slopes_gradient = _jit(generic.slopes_gradient)
squared = _jit(generic.squared)
backward_squared = _jit(generic.backward_squared)
both = _jit(generic.both, static_argnums=1)
pieces_of_both = _jit(generic.pieces_of_both)
backward_both = _jit(generic.backward_both, static_argnums=2)


def forward(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f(x). See `relu_xp.backends.Backend`."""
    return _serve(generic.forward, (numbers,), x, out)


def forward_saving(numbers: Rounded, x: Any, out: Any, mask: Any) -> tuple[Any, Any]:
    """Return f(x) and the pieces: bool, or 0, 1, 2 in uint8 where there are three."""
    return cast(tuple[Any, Any], _serve(generic.forward_saving, (numbers,), x, out, mask))


def backward(numbers: Rounded, dy: Any, saved: Any, out: Any) -> Any:
    """Return f'(x) * dy from the pieces. See `relu_xp.backends.Backend`."""
    return _serve(generic.backward, (numbers,), dy, saved, out)


def backward_from_input(numbers: Rounded, slopes: Rounded, dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _serve(generic.backward_from_input, (numbers, slopes), dy, x, out)


def gradient(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f'(x). See `relu_xp.backends.Backend`."""
    return _serve(generic.gradient, (numbers,), x, out)


def place(x: Any) -> tuple[str, None]:
    """Return the library: JAX settles devices itself, and a traced array has none."""
    return "jax", None
