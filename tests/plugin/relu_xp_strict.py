"""relu_xp on array_api_strict arrays, by the kernels for NumPy arrays: they share memory."""

import array_api_strict
import numpy as np

from relu_xp.backends import numpy
from relu_xp.backends.generic import *  # noqa: F403  all that needs no better here


def forward(numbers, x, out):
    return like(x, out, numpy.forward(numbers, host(x), host(out)))


def forward_saving(numbers, x, out, mask):  # mask is None: generic's mask_nbytes takes none
    y, saved = numpy.forward_saving(numbers, host(x), host(out), mask)
    return like(x, out, y), saved  # one bit an element, where generic saves a byte


def backward(numbers, dy, saved, out):
    return like(dy, out, numpy.backward(numbers, host(dy), saved, host(out)))


def backward_from_input(numbers, slopes, dy, x, out):
    dx = numpy.backward_from_input(numbers, slopes, host(dy), host(x), host(out))
    return like(dy, out, dx)


def gradient(numbers, x, out):
    return like(x, out, numpy.gradient(numbers, host(x), host(out)))


def saved_nbytes(saved):
    return numpy.saved_nbytes(saved)


def host(x):
    """Return an array's memory as a NumPy array; None stays None."""
    return None if x is None else np.from_dlpack(x)


def like(x, out, result):
    """Return `out`, whose memory has been written, or the result on the device of `x`."""
    return array_api_strict.asarray(result, device=x.device) if out is None else out
