"""Blocks of consecutive float32 patterns, and what is expected of them: see test_exhaustive.py.

A block shares sign and exponent. Within one, numbers are ordered, so that the start of a branch is
found by bisection with the reference on Python integers; the products are those of integers,
rounded once. In a module of its own, since the processes of a pool import it by its name.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools

import numpy as np
from libraries import LIBRARIES

import relu_xp
from relu_xp.testing import reference

FORM = reference.Format("float32")
FRACTION, HIDDEN = FORM.fraction, 1 << FORM.fraction
SIZE = 1 << 17  # patterns of a block: few calls, and arrays that stay in the caches
BLOCKS = (1 << FORM.width) // SIZE
BATCH = 256  # blocks that a process takes at a time
STEP = 2371  # odd: from one block of dy to the next

PRESETS = {"relu": {}, "relu6": {"max_value": 6.0}, "leaky_relu": {"negative_slope": 0.01}}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

CONTEXT = contextlib.ExitStack()  # of a process that checks blocks


class Block:
    """Patterns in a row, from `start` up to `stop`."""

    def __init__(self, number):
        self.start = number % BLOCKS * SIZE
        self.stop = self.start + SIZE
        self.patterns = np.arange(self.start, self.stop, dtype=np.uint32)
        self.numbers = self.patterns.view(np.float32)

    def runs(self, preset):
        """Yield each branch with the slice of the patterns that lie on it."""
        begin = self.start
        while begin < self.stop:
            branch = preset.branch(begin)
            rest = range(begin, self.stop)
            end = begin + bisect.bisect(rest, False, key=lambda bits: preset.branch(bits) != branch)
            yield branch, slice(begin - self.start, end - self.start)
            begin = end

    def times(self, slope):
        """Return the bits of the rounded products, NaN as all ones.

        The slope is from 2**-14 to 2**20, or the opposite of such a number.
        """
        sign = (self.start ^ slope) & FORM.sign
        field = (self.start & FORM.infinity) >> FRACTION
        first = self.start & (HIDDEN - 1)
        if field == FORM.infinity >> FRACTION:
            found = np.full(SIZE, 0xFFFFFFFF, np.uint32)
            if not first:
                found[0] = sign | FORM.infinity
            return found
        # A number is a significand times 2**exponent, in units of the smallest subnormal.
        exponent = max(field, 1) - 1
        first |= HIDDEN if field else 0
        its_exponent = ((slope & FORM.infinity) >> FRACTION) - 1 - FORM.unit_shift
        its_significand = slope & (HIDDEN - 1) | HIDDEN
        exact = np.arange(first, first + SIZE, dtype=np.int64) * its_significand
        found = np.empty(SIZE, np.uint32)
        begin = 0
        while begin < SIZE:  # once for each length that a product has
            length = int(exact[begin]).bit_length()
            end = int(np.searchsorted(exact, 1 << length))
            # What the significand has no place for is dropped, or what lies below the unit.
            drop = max(length - FRACTION - 1, -exponent - its_exponent)
            whole = exact[begin:end]
            if drop > 0:
                whole += (whole >> drop & 1) + ((1 << (drop - 1)) - 1)  # ties to even
                whole >>= drop
            else:
                whole <<= -drop
            # A carry past the significand adds one to the exponent, which is the right result.
            whole += exponent + its_exponent + drop << FRACTION
            found[begin:end] = np.minimum(whole, FORM.infinity, out=whole)
            begin = end
        found |= np.uint32(sign)
        return found


@functools.cache
def preset_of(name):
    return reference.Preset(FORM, **PRESETS[name])


def expected(name, x, dy):
    """Return f(x), f'(x) and f'(x) * dy of a preset, as bits, and where the last are products."""
    preset = preset_of(name)
    y, dx = x.patterns.copy(), dy.patterns.copy()
    gradient = np.full(SIZE, FORM.round(1.0), np.uint32)
    products = slice(0)
    for branch, run in x.runs(preset):
        if branch == 2:
            y[run] = preset.max_value
            gradient[run] = dx[run] = 0
        elif branch == 0 and preset.zero_below:
            y[run] = gradient[run] = dx[run] = 0
        elif branch == 0:
            products = run
            y[run] = x.times(preset.negative_slope)[run]
            gradient[run] = preset.negative_slope
            dx[run] = dy.times(preset.negative_slope)[run]
    return y, gradient, dx, products


def compare(what, got, wanted, x, dy, products=slice(0)):
    """Raise AssertionError unless the bits are those expected; a product's NaN may be any."""
    got = got.view(np.uint32)
    if np.array_equal(got, wanted):
        return
    wrong = got != wanted
    wrong[products] &= ~(
        reference.is_nan(FORM, got[products]) & reference.is_nan(FORM, wanted[products])
    )
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} wrong; x {x.patterns[wrong][0]:#x}, dy {dy.patterns[wrong][0]:#x}, "
        f"got {got[wrong][0]:#x}, expected {wanted[wrong][0]:#x}"
    )


def check(library, number):
    """Compare the results of a library for a block of x and another one of dy."""
    x, dy = Block(number), Block(number * STEP)
    array, its_dy = library.array(x.numbers), library.array(dy.numbers)
    for name, params in PRESETS.items():
        y, gradient, dx, products = expected(name, x, dy)
        saved_y, pullback = relu_xp.relu_vjp(array, **params)
        for what, result, wanted, free in (
            ("relu", relu_xp.relu(array, **params), y, slice(0)),
            ("relu_grad", relu_xp.relu_grad(array, **params), gradient, slice(0)),
            ("relu_vjp", saved_y, y, slice(0)),
            ("pullback", pullback(its_dy), dx, products),
        ):
            compare(f"{name}, {what}", library.numpy(result), wanted, x, dy, free)


def initialize(name):
    """Prepare a process for a library, with one thread."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        # Freed memory is kept: to fetch new pages for each array takes three quarters of the time.
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
    relu_xp.set_num_threads(1)
    LIBRARIES[name].load()
    CONTEXT.enter_context(LIBRARIES[name].running())


def sweep(name, first):
    """Check a batch of blocks, and return how many patterns these are.

    PTX takes 100 times longer than compiled code: of it a sixteenth, of each sign and exponent.
    """
    step = 16 if name == "cupy_host" else 1
    for number in range(first + first // BATCH % step, first + BATCH, step):
        check(LIBRARIES[name], number)
    return BATCH * SIZE
