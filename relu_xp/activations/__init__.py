"""The activations: each file has a function, its gradient and a layer.

See the README.md of this folder for how to add one.
"""

from relu_xp.activations._pullback import Pullback
from relu_xp.activations.bias_relu import BiasReLU, bias_relu, bias_relu_vjp
from relu_xp.activations.crelu import CReLU, crelu, crelu_vjp
from relu_xp.activations.empty_mask import empty_mask
from relu_xp.activations.prelu import PReLU, prelu, prelu_vjp
from relu_xp.activations.presets import (
    ClippedReLU,
    LeakyReLU,
    ReLU6,
    ThresholdedReLU,
    clipped_relu,
    leaky_relu,
    relu6,
    thresholded_relu,
)
from relu_xp.activations.relu import ReLU, Relu, relu, relu_backward, relu_grad, relu_vjp
from relu_xp.activations.rrelu import RReLU, rrelu, rrelu_vjp
from relu_xp.activations.squared_relu import SquaredReLU, squared_relu, squared_relu_vjp

__all__ = [
    "BiasReLU",
    "CReLU",
    "ClippedReLU",
    "LeakyReLU",
    "PReLU",
    "Pullback",
    "RReLU",
    "ReLU",
    "ReLU6",
    "Relu",
    "SquaredReLU",
    "ThresholdedReLU",
    "bias_relu",
    "bias_relu_vjp",
    "clipped_relu",
    "crelu",
    "crelu_vjp",
    "empty_mask",
    "leaky_relu",
    "prelu",
    "prelu_vjp",
    "relu",
    "relu6",
    "relu_backward",
    "relu_grad",
    "relu_vjp",
    "rrelu",
    "rrelu_vjp",
    "squared_relu",
    "squared_relu_vjp",
    "thresholded_relu",
]
