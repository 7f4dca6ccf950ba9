"""The truth table on Python integers: slow, exact, and independent of the rest of the package.

A number is a bit pattern; its value is an integer, in units of the format's smallest subnormal. NaN
is None, infinity an integer beyond every finite value. A product or a sum is an exact integer,
rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_Bits = npt.NDArray[Any]  # bit patterns, in the unsigned integers of the format's width

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.float16)}
try:
    import ml_dtypes
except ModuleNotFoundError:  # then NumPy has no bfloat16
    pass
else:
    DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
DTYPES |= {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}

# The presets, and difficult parameters: either sign of each, threshold and ceiling on either side
# of zero, products that overflow and underflow, values that a 16-bit float rounds to 0 or 1.
PRESETS: dict[str, dict[str, float]] = {
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
    "falling": {"positive_slope": -1.0},
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

ANY_NAN = None  # a NaN that a product makes, whose payload is not specified


class Format:
    """A binary floating-point format.

    Attributes
    ----------
    name : str
        Of its dtype, for example ``"bfloat16"``.
    unsigned : numpy.dtype
        Of its bit patterns.
    width, fraction : int
        Bits, in all and of the fraction.
    sign, infinity : int
        Bit patterns: the sign alone, and of +inf.
    unit_shift : int
        The smallest subnormal is 2 to minus this.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.width = int(name[-2:])
        self.unsigned = np.dtype(f"u{self.width // 8}")
        self.fraction = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[name]
        bias = (1 << (self.width - 2 - self.fraction)) - 1
        self.unit_shift = bias + self.fraction - 1
        self.sign = 1 << (self.width - 1)
        self.infinity = self.sign - (1 << self.fraction)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's dtype."""
        return DTYPES[self.name]

    def value(self, bits: int) -> int | None:
        """Return the value of a bit pattern in units of the smallest subnormal; None for NaN."""
        magnitude = bits & (self.sign - 1)
        if magnitude > self.infinity:
            return None
        exponent, fraction = magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1)
        if exponent:
            fraction = (fraction | 1 << self.fraction) << (exponent - 1)
        return -fraction if bits & self.sign else fraction

    def encode(self, sign: int, integer: int, shift: int) -> int:
        """Return the bits of integer / 2**shift units, rounded to nearest, ties to even."""
        excess = max(integer.bit_length() - self.fraction - 1, shift)
        whole, rest = integer >> excess, integer & ((1 << excess) - 1)
        half = 1 << excess >> 1
        whole += excess > 0 and (rest > half or (rest == half and whole & 1 == 1))
        # A carry out of the fraction adds one to the exponent, which is the right result.
        exponent = excess - shift
        bits = whole if whole < 1 << self.fraction else whole + (exponent << self.fraction)
        return sign | min(bits, self.infinity)

    def product(self, left: int, right: int) -> int | None:
        """Return the bits of the rounded product; ANY_NAN where it is NaN."""
        sign = (left ^ right) & self.sign
        values = self.value(left), self.value(right)
        if values[0] is None or values[1] is None:
            return ANY_NAN
        if self.infinity in (left & (self.sign - 1), right & (self.sign - 1)):
            return ANY_NAN if 0 in values else sign | self.infinity
        return self.encode(sign, abs(values[0] * values[1]), self.unit_shift)

    def sum(self, left: int, right: int) -> int | None:
        """Return the bits of the rounded sum; ANY_NAN where it is NaN."""
        values = self.value(left), self.value(right)
        infinite = {bits for bits in (left, right) if bits & (self.sign - 1) == self.infinity}
        if values[0] is None or values[1] is None or len(infinite) == 2:
            return ANY_NAN
        if infinite:
            return infinite.pop()
        total = values[0] + values[1]
        sign = self.sign if total < 0 else 0
        return left & right & self.sign if total == 0 else self.encode(sign, abs(total), 0)

    def convert(self, bits: int, form: Format) -> int:
        """Return the bits of a number of another format, rounded; of a NaN those of one."""
        value, sign = form.value(bits), self.sign if bits & form.sign else 0
        if value is None:
            return self.sign - 1
        if bits & (form.sign - 1) == form.infinity:
            return sign | self.infinity
        return self.encode(sign, abs(value) << self.unit_shift, form.unit_shift)

    def round(self, number: float) -> int:
        """Return the bits of a real number, rounded to nearest, ties to even."""
        numerator, denominator = abs(number).as_integer_ratio()  # a power of two
        sign = self.sign if number < 0 else 0
        return self.encode(sign, numerator << self.unit_shift, denominator.bit_length() - 1)


class Preset:
    """The four parameters in one format, as bits, and both passes of one element."""

    def __init__(
        self,
        form: Format,
        threshold: float = 0.0,
        negative_slope: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
    ) -> None:
        self.form = form
        self.threshold = form.value(form.round(threshold))
        self.negative_slope = form.round(negative_slope)
        self.positive_slope = form.round(positive_slope)
        self.max_value = None if max_value is None else form.round(max_value)
        self._ceiling = None if self.max_value is None else form.value(self.max_value)
        self.zero_below = form.value(self.negative_slope) == 0
        self.identity_above = self.positive_slope == form.round(1.0)

    def lower(self, bits: int) -> int | None:
        """Return a*x, or 0 for a = 0."""
        return 0 if self.zero_below else self.form.product(self.negative_slope, bits)

    def upper(self, bits: int) -> int | None:
        """Return b*x, or x for b = 1."""
        return bits if self.identity_above else self.form.product(self.positive_slope, bits)

    def branch(self, bits: int) -> int:
        """Return 0 where x <= t, 2 at the ceiling, else 1."""
        value = self.form.value(bits)
        if value is not None and self.threshold is not None and value <= self.threshold:
            return 0
        if self._ceiling is not None and (upper := self.upper(bits)) is not ANY_NAN:
            scaled = self.form.value(upper)
            if scaled is not None and scaled >= self._ceiling:
                return 2
        return 1

    def forward(self, bits: int) -> int | None:
        """Return f(x)."""
        return (self.lower, self.upper, lambda _: self.max_value)[self.branch(bits)](bits)

    def backward(self, branch: int, dy: int) -> int | None:
        """Return f'(x) * dy, given the branch of x."""
        return (self.lower, self.upper, lambda _: 0)[branch](dy)


def presets(dtype: str) -> dict[str, Preset]:
    """Return every one of `PRESETS` in a format."""
    form = Format(dtype)
    return {name: Preset(form, **parameters) for name, parameters in PRESETS.items()}


@functools.cache
def specials(dtype: str) -> _Bits:
    """Return difficult bit patterns.

    Both zeros, subnormals, limits, NaN of all kinds, and the neighbours of every threshold and
    ceiling.
    """
    form = Format(dtype)
    found = {0, 1, 2, (1 << form.fraction) - 1, 1 << form.fraction, form.infinity - 1}
    found |= {form.infinity, form.infinity + 1, form.sign - 1}
    found |= {form.infinity | 1 << (form.fraction - 1), form.infinity | 5}
    for parameters in PRESETS.values():
        b = parameters.get("positive_slope", 1.0)
        ceiling = parameters.get("max_value") or 1.0
        for number in (parameters.get("threshold", 0.0), ceiling / b, 1e30):
            bits = form.round(number) & (form.sign - 1)
            found |= {bits, bits + 1, max(bits - 1, 0)}
    return np.array(sorted(found | {bits | form.sign for bits in found}), form.unsigned)


@functools.cache
def patterns(dtype: str, dy_dtype: str | None = None) -> _Bits:
    """Return bit patterns for x: the specials and 4,000 more.

    All of a 16-bit format, unless they are for a `dy_dtype` that differs.
    """
    form = Format(dtype)
    if form.width == 16 and dy_dtype in (None, dtype):
        return np.arange(1 << 16, dtype=np.uint16)
    rng = np.random.default_rng(20)
    more = rng.integers(0, 1 << form.width, 3000, dtype=form.unsigned, endpoint=False)
    near = DTYPES[dtype].type(rng.standard_normal(1000)).view(form.unsigned)
    return np.concatenate([specials(dtype), more, near])


@functools.cache
def gradients(dtype: str, count: int) -> _Bits:
    """Return bit patterns for dy: as varied as those of x, in another order."""
    form = Format(dtype)
    rng = np.random.default_rng(21)
    found = rng.integers(0, 1 << form.width, count, dtype=form.unsigned, endpoint=False)
    found[::3] = rng.choice(specials(dtype), found[::3].size)
    return found


def is_nan(form: Format, bits: _Bits) -> npt.NDArray[np.bool_]:
    """Return which bit patterns are NaN."""
    nan: npt.NDArray[np.bool_] = (bits & (form.sign - 1)) > form.infinity
    return nan


def is_tiny(bits: _Bits) -> npt.NDArray[np.bool_]:
    """Return what may be flushed: subnormals, and the smallest normal, which may be a rounded one.

    Of 16-bit patterns as the format with more exponents, bfloat16, has them.
    """
    fraction = {2: 7, 4: 23, 8: 52}[bits.itemsize]
    magnitude = bits & ((1 << (8 * bits.itemsize - 1)) - 1)
    tiny: npt.NDArray[np.bool_] = (magnitude > 0) & (magnitude <= 1 << fraction)
    return tiny


class Expected:
    """The expected bit patterns, with ANY_NAN where any NaN is right."""

    def __init__(self, form: Format, bits: Iterable[int | None]) -> None:
        found = list(bits)
        self.form = form
        self.any_nan = np.array([b is ANY_NAN for b in found], bool)
        self.bits: _Bits = np.array(
            [form.sign - 1 if b is ANY_NAN else b for b in found], form.unsigned
        )

    def check(
        self,
        got: npt.NDArray[Any],
        *inputs: _Bits,
        subnormals: bool = True,
        payloads: bool = True,
    ) -> None:
        """Raise AssertionError unless a result is right, as far as the library can have it so.

        Parameters
        ----------
        got : ndarray
            The result, on the host.
        *inputs : ndarray of unsigned integers, shape of `got`
            Bit patterns of which it was computed.
        subnormals, payloads : bool, optional
            Whether the library keeps subnormals, and the payload of a NaN that it selects.
        """
        form = self.form
        assert got.dtype == form.dtype, f"the result has dtype {got.dtype}, expected {form.dtype}"
        bits = got.view(form.unsigned)
        assert bits.shape == self.bits.shape, f"shape {bits.shape}, expected {self.bits.shape}"
        wrong = bits != self.bits
        any_nan = self.any_nan if payloads else is_nan(form, self.bits)
        wrong[any_nan] = ~is_nan(form, bits[any_nan])
        if not subnormals:
            for patterns in (*inputs, self.bits):
                wrong &= ~is_tiny(patterns)
        assert not wrong.any(), (
            f"{wrong.sum()} wrong; x, dy, ...: {[hex(i[wrong][0]) for i in inputs]}, "
            f"got {bits[wrong][0]:#x}, expected {self.bits[wrong][0]:#x}"
        )


@functools.cache
def forward(dtype: str, preset: str) -> Expected:
    """Return f(x) of `patterns`."""
    return Expected(Format(dtype), map(presets(dtype)[preset].forward, patterns(dtype).tolist()))


@functools.cache
def backward(dtype: str, dy_dtype: str, preset: str) -> Expected:
    """Return f'(x) * dy of `patterns` and as many `gradients`."""
    x = patterns(dtype, dy_dtype)
    branches = map(presets(dtype)[preset].branch, x.tolist())
    dy = gradients(dy_dtype, x.size).tolist()
    return Expected(Format(dy_dtype), map(presets(dy_dtype)[preset].backward, branches, dy))


@functools.cache
def gradient(dtype: str, preset: str) -> Expected:
    """Return f'(x) of `patterns`."""
    form, its = Format(dtype), presets(dtype)[preset]
    one = form.round(1.0)
    factors = [its.backward(branch, one) for branch in range(3)]
    return Expected(form, (factors[its.branch(bits)] for bits in patterns(dtype).tolist()))
