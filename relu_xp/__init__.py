"""One ReLU family, one set of rules, for every array library."""

from relu_xp.dispatch import warmup
from relu_xp.functional import (
    Pullback,
    clipped_relu,
    leaky_relu,
    relu,
    relu6,
    relu_backward,
    relu_grad,
    relu_vjp,
    thresholded_relu,
)
from relu_xp.layers import ClippedReLU, LeakyReLU, ReLU, Relu, ReLU6, ThresholdedReLU

__version__ = "0.1.0"

__all__ = [
    "ClippedReLU",
    "LeakyReLU",
    "Pullback",
    "ReLU",
    "ReLU6",
    "Relu",
    "ThresholdedReLU",
    "clipped_relu",
    "leaky_relu",
    "relu",
    "relu6",
    "relu_backward",
    "relu_grad",
    "relu_vjp",
    "thresholded_relu",
    "warmup",
]
