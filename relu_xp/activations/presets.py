"""The presets of ReLU: leaky, with a ceiling, with a threshold."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from relu_xp.activations._base import forward
from relu_xp.activations.relu import ReLU
from relu_xp.parameters import ONE, ZERO, make_parameters

__all__ = [
    "ClippedReLU",
    "LeakyReLU",
    "ReLU6",
    "ThresholdedReLU",
    "clipped_relu",
    "leaky_relu",
    "relu6",
    "thresholded_relu",
]

ArrayT = TypeVar("ArrayT")


def leaky_relu(
    x: ArrayT,
    /,
    negative_slope: float = 0.01,
    *,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return leaky ReLU: a negative slope of 0.01 by default (Maas et al., 2013). See `relu`."""
    return forward(
        "leaky_relu", make_parameters(negative_slope, threshold, positive_slope, max_value), x, out
    )


class LeakyReLU(ReLU):
    """`ReLU` with a negative slope, 0.01 by default (Maas et al., 2013).

    All other parameters and methods are those of `ReLU`.
    """

    _positional = "negative_slope"

    def __init__(
        self,
        negative_slope: float = 0.01,
        *,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)


def relu6(
    x: ArrayT,
    /,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return ReLU with a ceiling of 6, where its gradient is 0 (Krizhevsky, 2010). See `relu`."""
    return forward("relu6", make_parameters(negative_slope, threshold, positive_slope, 6.0), x, out)


class ReLU6(ReLU):
    """`ReLU` with a ceiling of 6, where its gradient is 0 (Krizhevsky, 2010)."""

    _defaults: ClassVar[dict[str, Any]] = {**ReLU._defaults, "max_value": 6.0}

    def __init__(
        self,
        *,
        negative_slope: float = 0.0,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, 6.0, inplace)


def clipped_relu(
    x: ArrayT,
    /,
    max_value: float = 20.0,
    *,
    negative_slope: float = ZERO,
    threshold: float = ZERO,
    positive_slope: float = ONE,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return ReLU with a ceiling, 20 by default, where its gradient is 0 (Hannun et al., 2014).

    See `relu`.
    """
    return forward(
        "clipped_relu",
        make_parameters(negative_slope, threshold, positive_slope, max_value),
        x,
        out,
    )


class ClippedReLU(ReLU):
    """`ReLU` with a ceiling, 20 by default (Hannun et al., 2014), where its gradient is 0."""

    _positional = "max_value"

    def __init__(
        self,
        max_value: float = 20.0,
        *,
        negative_slope: float = 0.0,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)


def thresholded_relu(
    x: ArrayT,
    /,
    threshold: float = 1.0,
    *,
    negative_slope: float = ZERO,
    positive_slope: float = ONE,
    max_value: float | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Return ReLU with a threshold, 1 by default: x above it (not x - 1), else 0.

    Konda et al., 2014. See `relu`.
    """
    return forward(
        "thresholded_relu",
        make_parameters(negative_slope, threshold, positive_slope, max_value),
        x,
        out,
    )


class ThresholdedReLU(ReLU):
    """`ReLU` with a threshold, 1 by default (Konda et al., 2014)."""

    _positional = "threshold"

    def __init__(
        self,
        threshold: float = 1.0,
        *,
        negative_slope: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)
