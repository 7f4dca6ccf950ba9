"""The truth table once more, on Python integers: slow, exact, and nothing of it from the package.

A number is a bit pattern; its value is an integer, in units of the format's smallest subnormal. NaN
is None, infinity a number beyond every other. A product is an exact integer, rounded once.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

# Every member, and numbers chosen to be awkward: each sign of each, knee and ceiling on either
# side of zero, products that overflow and underflow, numbers that a 16-bit float rounds to 0 or 1.
MEMBERS = {
    "relu": {},
    "leaky": {"negative_slope": 0.01},
    "steep": {"negative_slope": -3.5},
    "tiny-slope": {"negative_slope": 1e-8},
    "relu6": {"max_value": 6.0},
    "tiny-slope-clipped": {"negative_slope": 1e-8, "max_value": 2.0},
    "clipped-leaky": {"max_value": 0.75, "negative_slope": 0.1},
    "thresholded": {"threshold": 1.0},
    "below-zero": {"threshold": -0.5, "negative_slope": 0.25},
    "forum": {"threshold": 0.25, "negative_slope": 0.1, "positive_slope": 2.0},
    "mirrored": {"positive_slope": -1.0},
    "nearly-one": {"positive_slope": 1.0 + 1e-9, "negative_slope": 1e30},
    "negative-ceiling": {"threshold": -2.0, "max_value": -0.5},
    "zero-ceiling": {"threshold": -2.0, "max_value": 0.0, "negative_slope": 0.5},
    "everything": {
        "threshold": -0.25,
        "negative_slope": -0.3,
        "positive_slope": 1.7,
        "max_value": 1.5,
    },
}

ANY_NAN = None


class Format:
    def __init__(self, dtype):
        self.dtype = DTYPES[dtype]
        self.width = 8 * self.dtype.itemsize
        precision = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}[dtype]
        self.fraction = precision - 1
        self.sign = 1 << (self.width - 1)
        self.infinity = self.sign - (1 << self.fraction)

    @property
    def unsigned(self):
        return np.dtype(f"u{self.width // 8}")

    def value(self, bits):
        """Return a bit pattern's value in units of the smallest subnormal; None for NaN."""
        magnitude = bits & (self.sign - 1)
        if magnitude > self.infinity:
            return None
        exponent, fraction = magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1)
        if exponent:
            fraction = (fraction | 1 << self.fraction) << (exponent - 1)
        return -fraction if bits & self.sign else fraction

    def encode(self, sign, integer, shift):
        """Round integer / 2**shift units to the format, to nearest, ties to even."""
        excess = max(integer.bit_length() - self.fraction - 1, shift)
        whole, rest = integer >> excess, integer & ((1 << excess) - 1)
        half = 1 << excess >> 1
        whole += excess > 0 and (rest > half or (rest == half and whole & 1 == 1))
        # A carry past the fraction lands in the exponent, as it should.
        exponent = excess - shift
        bits = whole if whole < 1 << self.fraction else whole + (exponent << self.fraction)
        return sign | min(bits, self.infinity)

    def product(self, left, right):
        """Return the bits of the rounded product; ANY_NAN where it is NaN."""
        sign = (left ^ right) & self.sign
        values = [self.value(left), self.value(right)]
        if None in values:
            return ANY_NAN
        infinite = [pattern & (self.sign - 1) == self.infinity for pattern in (left, right)]
        if any(infinite):
            return ANY_NAN if 0 in values else sign | self.infinity
        # Units of the format are 2**-shift.
        return self.encode(sign, abs(values[0] * values[1]), self.unit_shift)

    @property
    def unit_shift(self):
        bias = (1 << (self.width - 2 - self.fraction)) - 1
        return bias + self.fraction - 1

    def round(self, number):
        """Return the bits of a real number, rounded to nearest, ties to even."""
        top, bottom = abs(number).as_integer_ratio()
        sign = self.sign if number < 0 else 0
        # The denominator is a power of two.
        return self.encode(sign, top << self.unit_shift, bottom.bit_length() - 1)


class Member:
    """A member's numbers in one format, as bits."""

    def __init__(self, form, threshold=0.0, negative_slope=0.0, positive_slope=1.0, max_value=None):
        self.form = form
        self.threshold = form.value(form.round(threshold))
        self.negative_slope = form.round(negative_slope)
        self.positive_slope = form.round(positive_slope)
        self.ceiling_bits = None if max_value is None else form.round(max_value)

    def low(self, bits):
        if self.form.value(self.negative_slope) == 0:
            return 0
        return self.form.product(self.negative_slope, bits)

    def high(self, bits):
        if self.positive_slope == self.form.round(1.0):
            return bits
        return self.form.product(self.positive_slope, bits)

    def piece(self, bits):
        value = self.form.value(bits)
        if value is not None and value <= self.threshold:
            return 0
        high = self.high(bits)
        if self.ceiling_bits is not None and high is not ANY_NAN:
            scaled = self.form.value(high)
            if scaled is not None and scaled >= self.form.value(self.ceiling_bits):
                return 2
        return 1

    def forward(self, bits):
        return (self.low, self.high, lambda _: self.ceiling_bits)[self.piece(bits)](bits)

    def backward(self, piece, gradient):
        return (self.low, self.high, lambda _: 0)[piece](gradient)


def members(dtype):
    form = Format(dtype)
    return {name: Member(form, **numbers) for name, numbers in MEMBERS.items()}


@functools.cache
def specials(dtype):
    """Return bit patterns where things go wrong: both zeros, subnormals, limits, NaN of all kinds,
    and the neighbourhood of every knee and ceiling."""
    form = Format(dtype)
    found = {0, 1, 2, (1 << form.fraction) - 1, 1 << form.fraction, form.infinity - 1}
    found |= {form.infinity, form.infinity + 1, form.sign - 1}
    found |= {form.infinity | 1 << (form.fraction - 1), form.infinity | 5}
    for numbers in MEMBERS.values():
        b = numbers.get("positive_slope", 1.0)
        for number in (numbers.get("threshold", 0.0), (numbers.get("max_value") or 1.0) / b, 1e30):
            bits = form.round(number) & (form.sign - 1)
            found |= {bits, bits + 1, max(bits - 1, 0)}
    patterns = sorted(found | {bits | form.sign for bits in found})
    return np.array(patterns, form.unsigned)


@functools.cache
def patterns(dtype):
    """Return every bit pattern of a 16-bit format; of a wider one, the specials and 3,000 more."""
    form = Format(dtype)
    if form.width == 16:
        return np.arange(1 << 16, dtype=np.uint16)
    rng = np.random.default_rng(20)
    more = rng.integers(0, 1 << form.width, 3000, dtype=form.unsigned, endpoint=False)
    near = DTYPES[dtype].type(rng.standard_normal(1000)).view(form.unsigned)
    return np.concatenate([specials(dtype), more, near])


@functools.cache
def gradients(dtype, count):
    """Return bit patterns to go back with: as various, and against different x."""
    form = Format(dtype)
    rng = np.random.default_rng(21)
    drawn = rng.integers(0, 1 << form.width, count, dtype=form.unsigned, endpoint=False)
    drawn[::3] = rng.choice(specials(dtype), drawn[::3].size)
    return drawn


class Expected:
    """Bits, and where any NaN will do (a product's NaN has no payload to keep)."""

    def __init__(self, form, bits):
        self.form = form
        self.any_nan = np.array([b is ANY_NAN for b in bits], bool)
        self.bits = np.array([form.sign - 1 if b is ANY_NAN else b for b in bits], form.unsigned)


@functools.cache
def forward(dtype, member):
    form = Format(dtype)
    return Expected(form, list(map(members(dtype)[member].forward, patterns(dtype).tolist())))


@functools.cache
def pieces(dtype, member):
    return np.array(list(map(members(dtype)[member].piece, patterns(dtype).tolist())))


@functools.cache
def backward(dtype, gradient_dtype, member):
    chosen = pieces(dtype, member).tolist()
    dy = gradients(gradient_dtype, len(chosen)).tolist()
    back = members(gradient_dtype)[member].backward
    return Expected(Format(gradient_dtype), list(map(back, chosen, dy)))


@functools.cache
def gradient(dtype, member):
    numbers = members(dtype)[member]
    one = Format(dtype).round(1.0)
    return Expected(
        Format(dtype), [numbers.backward(piece, one) for piece in pieces(dtype, member).tolist()]
    )
