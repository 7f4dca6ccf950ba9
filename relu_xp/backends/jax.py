"""JAX arrays: the passes of the base class, each compiled once.

Outside ``jax.jit`` JAX runs one operation at a time, and a pass has several. The parameters are
arguments of what is compiled, so that a new slope compiles nothing. Inside a function that is being
traced the same operations are inlined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax

from relu_xp.activations._pullback import Pullback
from relu_xp.backends.base import Backend
from relu_xp.parameters import RELU, CastParameters

__all__ = ["JaxBackend"]

_FLAGS = ("zero_below", "identity_above", "falls_above", "num_branches")
_DEFAULTS = {
    "threshold": RELU.threshold,
    "negative_slope": RELU.negative_slope,
    "positive_slope": RELU.positive_slope,
    "max_value": RELU.max_value,
}

_Arguments = tuple[tuple[int, ...], dict[str, float]]

_base = Backend()
_jit = functools.partial(jax.jit, inline=True)


class JaxBackend(Backend):
    """JAX arrays. `out` is None in every pass: `check_out` refuses arrays that are immutable."""

    def forward(self, params: CastParameters, x: Any, out: Any) -> Any:
        """Return f(x)."""
        if not params.is_floating:  # JAX may not take such an integer for an argument
            return super().forward(params, x, out)
        return _run(_base.forward, [params], x, out)

    def forward_with_mask(
        self, params: CastParameters, x: Any, out: Any, mask: Any
    ) -> tuple[Any, Any]:
        """Return f(x) and the branch codes."""
        y, residuals = _run(_base.forward_with_mask, [params], x, out, mask)
        return y, residuals

    def backward(self, grad_params: CastParameters, dy: Any, residuals: Any, out: Any) -> Any:
        """Return f'(x) * dy from the branch codes."""
        return _run(_base.backward, [grad_params], dy, residuals, out)

    def backward_from_input(
        self, params: CastParameters, grad_params: CastParameters, dy: Any, x: Any, out: Any
    ) -> Any:
        """Return f'(x) * dy."""
        return _run(_base.backward_from_input, [params, grad_params], dy, x, out)

    def bias_relu(self, params: CastParameters, x: Any, bias: Any, axis: int, out: Any) -> Any:
        """Return f(x + bias)."""
        return _run(_base.bias_relu, [params], x, bias, axis=axis, out=out)

    def bias_relu_with_mask(
        self, params: CastParameters, x: Any, bias: Any, axis: int, out: Any, mask: Any
    ) -> tuple[Any, Any]:
        """Return f(x + bias) and the branch codes of the sum."""
        options = {"axis": axis, "out": out, "mask": mask}
        y, residuals = _run(_base.bias_relu_with_mask, [params], x, bias, **options)
        return y, residuals

    def bias_relu_backward(
        self, grad_params: CastParameters, dy: Any, residuals: Any, axis: int, dtype: Any, out: Any
    ) -> tuple[Any, Any]:
        """Return f'(x + bias) * dy and its sum, from the branch codes."""
        options = {"axis": axis, "dtype": dtype, "out": out}
        dx, total = _run(_base.bias_relu_backward, [grad_params], dy, residuals, **options)
        return dx, total

    prelu = staticmethod(_jit(_base.prelu))
    prelu_weight_grad = staticmethod(_jit(_base.prelu_weight_grad))
    crelu = staticmethod(_jit(_base.crelu, static_argnums=1))
    crelu_mask = staticmethod(_jit(_base.crelu_mask))
    crelu_backward = staticmethod(_jit(_base.crelu_backward, static_argnums=2))
    squared_relu = staticmethod(_jit(_base.squared_relu))
    squared_relu_backward = staticmethod(_jit(_base.squared_relu_backward))

    def device(self, x: Any) -> tuple[str, None]:
        """Return the library: JAX moves arrays itself, and one that is traced has no device."""
        return "jax", None


def _flatten(pullback: Pullback[Any]) -> tuple[tuple[Any], tuple[Any, ...]]:
    state = dict(vars(pullback))
    return (state.pop("_residuals"),), tuple(state.items())


def _unflatten(items: tuple[Any, ...], children: tuple[Any]) -> Pullback[Any]:
    pullback: Pullback[Any] = Pullback.__new__(Pullback)
    vars(pullback).update(items, _residuals=children[0])
    return pullback


jax.tree_util.register_pytree_node(Pullback, _flatten, _unflatten)


def _run(
    function: Callable[..., Any], params: list[CastParameters], *arrays: Any, **options: Any
) -> Any:
    """Return the result of a pass, compiled for these options and any values of the parameters."""
    flags, values = zip(*map(_as_arguments, params), strict=True)
    return _compiled(function, flags, tuple(options.items()), values, *arrays)


@functools.partial(_jit, static_argnums=(0, 1, 2))
def _compiled(
    function: Callable[..., Any],
    flags: tuple[tuple[int, ...], ...],
    options: tuple[tuple[str, Any], ...],
    values: tuple[dict[str, Any], ...],
    *arrays: Any,
) -> Any:
    return function(*map(_as_parameters, flags, values), *arrays, **dict(options))


@functools.lru_cache(maxsize=1024)
def _as_arguments(params: CastParameters) -> _Arguments:
    """Return the flags, which are compiled, and those values that are not the defaults."""
    values = {name: getattr(params, name) for name in _DEFAULTS}
    given = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
    return tuple(getattr(params, name) for name in _FLAGS), given


def _as_parameters(flags: tuple[int, ...], values: dict[str, Any]) -> SimpleNamespace:
    """Return what the base class reads of `CastParameters`; the values may be traced."""
    return SimpleNamespace(**_DEFAULTS | values, **dict(zip(_FLAGS, flags, strict=True)))
