"""array_api_strict arrays, computed by the backend for NumPy arrays in the same memory."""

import array_api_strict

from relu_xp.arrays import to_numpy
from relu_xp.backends.base import Backend
from relu_xp.backends.numpy import NumpyBackend

NUMPY = NumpyBackend()


class StrictBackend(Backend):
    def forward(self, params, x, out):
        return self.store(like(x, NUMPY.forward(params, to_numpy(x), None)), out)

    def forward_with_mask(self, params, x, out, mask):  # mask is None: mask_nbytes returns None
        y, residuals = NUMPY.forward_with_mask(params, to_numpy(x), None, None)
        return self.store(like(x, y), out), residuals  # one bit an element; the base class: a byte

    def backward(self, grad_params, dy, residuals, out):
        dx = NUMPY.backward(grad_params, to_numpy(dy), residuals, None)
        return self.store(like(dy, dx), out)


def like(x, result):
    return array_api_strict.asarray(result, device=x.device)
