"""The activations that the general tests of the conformance suite run over, and their inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat
import numpy as np

import relu_xp
from relu_xp.arrays import from_numpy
from relu_xp.testing._library import Bits

RELU: dict[str, dict[str, Any]] = {
    "relu": {},
    "three-branches": {"negative_slope": 0.5, "max_value": 2.0},
    "threshold": {"threshold": 0.5, "positive_slope": 0.5},  # f(x) is in another branch than x
}


def _prelu_vjp(x: Any, **options: Any) -> tuple[Any, Any]:
    weight = from_numpy(np.full(1, 0.25, np.float32), x)
    return relu_xp.prelu_vjp(x, weight, axis=0, **options)


def _rrelu_vjp(x: Any, **options: Any) -> tuple[Any, Any]:
    return relu_xp.rrelu_vjp(x, rng=np.random.default_rng(2), **options)


def _bias_relu_vjp(x: Any, **options: Any) -> tuple[Any, Any]:
    bias = from_numpy(np.cos(np.arange(x.shape[0], dtype=np.float32)), x)
    return relu_xp.bias_relu_vjp(x, bias, axis=0, **options)


# By name, the function that returns y and a pullback, whose first or only result is dx.
VJPS: dict[str, Callable[..., tuple[Any, Any]]] = {
    **{name: functools.partial(relu_xp.relu_vjp, **RELU[name]) for name in RELU},
    "prelu": _prelu_vjp,
    "rrelu": _rrelu_vjp,
    "crelu": functools.partial(relu_xp.crelu_vjp, axis=0),
    "squared_relu": relu_xp.squared_relu_vjp,
    "bias_relu": _bias_relu_vjp,
    "bias_relu, three-branches": functools.partial(_bias_relu_vjp, **RELU["three-branches"]),
}


def dx_of(result: Any) -> Any:
    """Return the first or only result of a pullback."""
    return result[0] if isinstance(result, tuple) else result


def views(x: Any, host: Bits) -> Iterator[tuple[Any, Bits]]:
    """Return those (12, 12) views of a (24, 24) array that the library has, and the host's."""
    xp = array_api_compat.array_namespace(x)
    for part in (np.s_[:12, :12], np.s_[1::2, ::2], np.s_[11::-1, ::-2]):
        with contextlib.suppress(Exception):  # PyTorch has no negative steps
            yield x[part], host[part]
    yield xp.permute_dims(x[:12, 12:], (1, 0)), host[:12, 12:].T
    for part in (np.s_[:1, :12], np.s_[:12, :1], np.s_[:1, :1]):
        yield xp.broadcast_to(x[part], (12, 12)), np.broadcast_to(host[part], (12, 12))
