"""One ReLU family, one set of rules, for every array library."""

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
from relu_xp.layers import (
    ClippedReLU,
    CReLU,
    LeakyReLU,
    PReLU,
    ReLU,
    Relu,
    ReLU6,
    RReLU,
    SquaredReLU,
    ThresholdedReLU,
)
from relu_xp.threads import get_num_threads, set_num_threads
from relu_xp.variants import (
    VariantPullback,
    crelu,
    crelu_vjp,
    prelu,
    prelu_vjp,
    rrelu,
    rrelu_vjp,
    squared_relu,
    squared_relu_vjp,
)

__version__ = "0.1.0"

__all__ = [
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
    "VariantPullback",
    "clipped_relu",
    "crelu",
    "crelu_vjp",
    "get_num_threads",
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
    "set_num_threads",
    "squared_relu",
    "squared_relu_vjp",
    "thresholded_relu",
]
