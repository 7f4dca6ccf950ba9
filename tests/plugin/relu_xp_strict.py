"""array_api_strict arrays, computed by the backend for NumPy arrays in the same memory."""

import array_api_strict
import numpy as np

from relu_xp.backends.base import Backend
from relu_xp.backends.numpy import NumpyBackend

NUMPY = NumpyBackend()


class StrictBackend(Backend):
    def forward(self, params, x, out):
        return like(x, out, NUMPY.forward(params, host(x), host(out)))

    def forward_with_mask(self, params, x, out, mask):  # mask is None: mask_nbytes returns None
        y, residuals = NUMPY.forward_with_mask(params, host(x), host(out), mask)
        return like(x, out, y), residuals  # one bit an element, where the base class has a byte

    def backward(self, grad_params, dy, residuals, out):
        return like(dy, out, NUMPY.backward(grad_params, host(dy), residuals, host(out)))


def host(x):
    return None if x is None else np.from_dlpack(x)


def like(x, out, result):
    return array_api_strict.asarray(result, device=x.device) if out is None else out
