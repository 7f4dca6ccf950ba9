"""One row per function: its name, how it and its gradient are called, and its layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import relu_xp
from relu_xp.testing import reference

DTYPES = reference.DTYPES  # name of a floating dtype -> NumPy's dtype
NOTHING_SAVED = r"^backward: nothing is saved; call forward\(x\) first.*retain=True.*relu_vjp"
PARAMETERS = ("negative_slope", "threshold", "positive_slope", "max_value")


# Masks of bits and of bytes; with the last ones f(x) lies in another branch than x.
CASES = {
    "relu": {},
    "ceiling": {"max_value": 0.5},
    "three branches": {"negative_slope": 0.25, "max_value": 0.5},
    "threshold": {"threshold": -0.5, "positive_slope": 2.0},
    "other branch": {"threshold": 0.5, "positive_slope": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A function, with the keywords that it and its layer are given in a test.

    Attributes
    ----------
    name : str
        The function's; `vjp` is the name of the one that returns a pullback.
    layer : type
    keywords : dict
        Of the function and its layer.
    fixed : dict
        What a preset fixes, so that `relu_vjp` has to be given it too.
    draws : bool
        Whether the layer draws random slopes in training.
    options : set of str
        The keyword-only parameters of the function, without ``out``.
    saved : function or None
        From x to the bytes that are saved for the gradient; None for a packed mask.
    """

    name: str
    layer: type
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    draws: bool = False
    options: frozenset[str] = frozenset(PARAMETERS)
    saved: Callable[[Any], int] | None = None

    @property
    def preset(self):
        """Whether the four parameters describe the function."""
        return issubclass(self.layer, relu_xp.ReLU)

    @property
    def vjp(self):
        return "relu_vjp" if self.preset else f"{self.name}_vjp"

    @property
    def learns(self):
        """Whether the function takes an array after x, and its layer has that in ``params``."""
        return self.name in ("prelu", "bias_relu")

    def layer_arguments(self, channels):
        """Return the arguments of the layer that the function does not have."""
        return (channels,) * (self.name == "bias_relu")

    def learned(self, xp, x):
        """Return the arrays that the function takes after x."""
        if not self.learns:
            return ()
        return (xp.array(slope() if self.name == "prelu" else bias(last_length(x))),)

    def call(self, xp, x, **options):
        """Return y."""
        return getattr(relu_xp, self.name)(x, *self.learned(xp, x), **self.keywords, **options)

    def call_vjp(self, xp, x, **options):
        """Return y and the pullback, as in training."""
        if self.draws:
            options.setdefault("rng", np.random.default_rng(0))
        options = {**self.keywords, **self.fixed, **options}
        return getattr(relu_xp, self.vjp)(x, *self.learned(xp, x), **options)

    def make_layer(self, xp, channels=10, **options):
        """Return a layer for a last axis of some length, whose arrays are those of a library."""
        if self.draws:
            options.setdefault("rng", np.random.default_rng(0))
        layer = self.layer(*self.layer_arguments(channels), **self.keywords, **options)
        if self.name == "bias_relu":
            layer.params[0][:] = bias(channels)
        for arrays in (layer.params, layer.grads):
            arrays[:] = [xp.array(array) for array in arrays]
        return layer


def slope():
    return np.full(1, 0.25, np.float32)


def last_length(x):
    try:
        return int(x.shape[-1])
    except Exception:  # no array, or one without axes or a known shape
        return 1


def bias(channels):
    return np.linspace(-1, 1, channels, dtype=np.float32)


ROWS = {
    "relu": Row("relu", relu_xp.ReLU),
    "relu, all parameters": Row(
        "relu",
        relu_xp.ReLU,
        {"negative_slope": 0.1, "threshold": 0.5, "positive_slope": 2.0, "max_value": 6.0},
    ),
    "leaky_relu": Row("leaky_relu", relu_xp.LeakyReLU, {"negative_slope": 0.2}),
    "relu6": Row("relu6", relu_xp.ReLU6, {"negative_slope": 0.1}, {"max_value": 6.0}),
    "clipped_relu": Row("clipped_relu", relu_xp.ClippedReLU, {"max_value": 3.0, "threshold": -1.0}),
    "thresholded_relu": Row(
        "thresholded_relu", relu_xp.ThresholdedReLU, {"threshold": 2.0, "positive_slope": 0.5}
    ),
    "prelu": Row("prelu", relu_xp.PReLU, options=frozenset({"axis"}), saved=lambda x: x.nbytes + 4),
    "bias_relu": Row("bias_relu", relu_xp.BiasReLU, options=frozenset({"axis", *PARAMETERS})),
    "rrelu": Row(
        "rrelu",
        relu_xp.RReLU,
        {"lower": 0.25, "upper": 0.75},
        draws=True,
        options=frozenset({"rng"}),
        saved=lambda x: x.size * max(x.itemsize, 4),
    ),
    "crelu": Row("crelu", relu_xp.CReLU, options=frozenset({"axis"}), saved=lambda x: x.size),
    "squared_relu": Row(
        "squared_relu", relu_xp.SquaredReLU, options=frozenset(), saved=lambda x: x.nbytes
    ),
}
OTHERS = [name for name, row in ROWS.items() if not row.preset]

each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


class NumPy:
    """What a row needs of a library, for arrays of NumPy."""

    @staticmethod
    def array(host):
        return host


def x_gradient(result):
    """Return dx of what a pullback returns: that of a learned array may come with it."""
    return result[0] if isinstance(result, tuple) else result
