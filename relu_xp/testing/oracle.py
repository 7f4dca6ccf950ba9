"""The truth table once more, on Python integers: slow, exact, and nothing of it from the package.

A number is a bit pattern; its value is an integer, in units of the format's smallest subnormal. NaN
is None, infinity a number beyond every other. A product is an exact integer, rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "DTYPES",
    "MEMBERS",
    "Expected",
    "Format",
    "Member",
    "backward",
    "forward",
    "gradient",
    "gradients",
    "is_nan",
    "is_tiny",
    "members",
    "patterns",
    "pieces",
    "specials",
]

_Bits = npt.NDArray[Any]  # bit patterns, in the unsigned integers of the format's width

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.float16)}
try:
    import ml_dtypes
except ModuleNotFoundError:  # then NumPy has no bfloat16, and nothing can be compared with it
    pass
else:
    DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
DTYPES |= {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}

# Every member, and numbers chosen to be awkward: each sign of each, knee and ceiling on either
# side of zero, products that overflow and underflow, numbers that a 16-bit float rounds to 0 or 1.
MEMBERS: dict[str, dict[str, float]] = {
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

ANY_NAN = None  # where a product makes the NaN: it has no payload to keep


class Format:
    """A binary floating-point format.

    Parameters
    ----------
    dtype : str
        Its name, for example ``"bfloat16"``.

    Attributes
    ----------
    name : str
    unsigned : numpy.dtype
        Of its bit patterns.
    width, fraction : int
        Bits, in all and of the fraction.
    sign, infinity : int
        Bit patterns: the sign alone, and of +inf.
    unit_shift : int
        The smallest subnormal is 2 to minus this.
    """

    def __init__(self, dtype: str) -> None:
        self.name = dtype
        self.width = int(dtype[-2:])
        self.unsigned = np.dtype(f"u{self.width // 8}")
        precision = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}[dtype]
        self.fraction = precision - 1
        bias = (1 << (self.width - 2 - self.fraction)) - 1
        self.unit_shift = bias + self.fraction - 1
        self.sign = 1 << (self.width - 1)
        self.infinity = self.sign - (1 << self.fraction)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's dtype."""
        return DTYPES[self.name]

    def value(self, bits: int) -> int | None:
        """Return a bit pattern's value in units of the smallest subnormal; None for NaN."""
        magnitude = bits & (self.sign - 1)
        if magnitude > self.infinity:
            return None
        exponent, fraction = magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1)
        if exponent:
            fraction = (fraction | 1 << self.fraction) << (exponent - 1)
        return -fraction if bits & self.sign else fraction

    def encode(self, sign: int, integer: int, shift: int) -> int:
        """Round integer / 2**shift units to the format, to nearest, ties to even."""
        excess = max(integer.bit_length() - self.fraction - 1, shift)
        whole, rest = integer >> excess, integer & ((1 << excess) - 1)
        half = 1 << excess >> 1
        whole += excess > 0 and (rest > half or (rest == half and whole & 1 == 1))
        # A carry past the fraction lands in the exponent, as it should.
        exponent = excess - shift
        bits = whole if whole < 1 << self.fraction else whole + (exponent << self.fraction)
        return sign | min(bits, self.infinity)

    def product(self, left: int, right: int) -> int | None:
        """Return the bits of the rounded product; ANY_NAN where it is NaN."""
        sign = (left ^ right) & self.sign
        values = self.value(left), self.value(right)
        if values[0] is None or values[1] is None:
            return ANY_NAN
        infinite = [pattern & (self.sign - 1) == self.infinity for pattern in (left, right)]
        if any(infinite):
            return ANY_NAN if 0 in values else sign | self.infinity
        # Units of the format are 2**-shift.
        return self.encode(sign, abs(values[0] * values[1]), self.unit_shift)

    def round(self, number: float) -> int:
        """Return the bits of a real number, rounded to nearest, ties to even."""
        top, bottom = abs(number).as_integer_ratio()
        sign = self.sign if number < 0 else 0
        # The denominator is a power of two.
        return self.encode(sign, top << self.unit_shift, bottom.bit_length() - 1)


class Member:
    """A member's numbers in one format, as bits."""

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
        self.ceiling_bits = None if max_value is None else form.round(max_value)
        self.ceiling = None if self.ceiling_bits is None else form.value(self.ceiling_bits)
        self.flat = form.value(self.negative_slope) == 0
        self.itself = self.positive_slope == form.round(1.0)

    def low(self, bits: int) -> int | None:
        """Return a*x, or 0 for a = 0."""
        return 0 if self.flat else self.form.product(self.negative_slope, bits)

    def high(self, bits: int) -> int | None:
        """Return b*x, or x for b = 1."""
        return bits if self.itself else self.form.product(self.positive_slope, bits)

    def piece(self, bits: int) -> int:
        """Return 0 where x <= t, 2 at the ceiling, else 1."""
        value, threshold = self.form.value(bits), self.threshold
        if value is not None and threshold is not None and value <= threshold:
            return 0
        if self.ceiling is not None and (high := self.high(bits)) is not ANY_NAN:
            scaled = self.form.value(high)
            if scaled is not None and scaled >= self.ceiling:
                return 2
        return 1

    def forward(self, bits: int) -> int | None:
        """Return f(x)."""
        return (self.low, self.high, lambda _: self.ceiling_bits)[self.piece(bits)](bits)

    def backward(self, piece: int, gradient: int) -> int | None:
        """Return f'(x) * dy, given the piece that x lies in."""
        return (self.low, self.high, lambda _: 0)[piece](gradient)


def members(dtype: str) -> dict[str, Member]:
    """Return every one of `MEMBERS` in a format."""
    form = Format(dtype)
    return {name: Member(form, **numbers) for name, numbers in MEMBERS.items()}


@functools.cache
def specials(dtype: str) -> _Bits:
    """Return bit patterns where things go wrong.

    Both zeros, subnormals, limits, NaN of all kinds, and the neighbourhood of every knee and
    ceiling.
    """
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
def patterns(dtype: str) -> _Bits:
    """Return every bit pattern of a 16-bit format; of a wider one, the specials and 4,000 more."""
    form = Format(dtype)
    if form.width == 16:
        return np.arange(1 << 16, dtype=np.uint16)
    rng = np.random.default_rng(20)
    more = rng.integers(0, 1 << form.width, 3000, dtype=form.unsigned, endpoint=False)
    near = DTYPES[dtype].type(rng.standard_normal(1000)).view(form.unsigned)
    return np.concatenate([specials(dtype), more, near])


@functools.cache
def gradients(dtype: str, count: int) -> _Bits:
    """Return bit patterns to go back with: as various, and against different x."""
    form = Format(dtype)
    rng = np.random.default_rng(21)
    drawn = rng.integers(0, 1 << form.width, count, dtype=form.unsigned, endpoint=False)
    drawn[::3] = rng.choice(specials(dtype), drawn[::3].size)
    return drawn


def is_nan(form: Format, bits: _Bits) -> npt.NDArray[np.bool_]:
    """Tell which bit patterns are NaN."""
    nan: npt.NDArray[np.bool_] = (bits & (form.sign - 1)) > form.infinity
    return nan


def is_tiny(bits: _Bits) -> npt.NDArray[np.bool_]:
    """Tell what may be flushed: subnormals, and the smallest normal, which may be a rounded one."""
    fraction = {2: 7, 4: 23, 8: 52}[bits.itemsize]  # of 16 bits, the format with the most exponents
    magnitude = bits & ((1 << (8 * bits.itemsize - 1)) - 1)
    tiny: npt.NDArray[np.bool_] = (magnitude > 0) & (magnitude <= 1 << fraction)
    return tiny


class Expected:
    """What is to come out, bit for bit, and where any NaN will do.

    Parameters
    ----------
    form : Format
    bits : iterable of int or None
        Bit patterns, and ANY_NAN.
    """

    def __init__(self, form: Format, bits: Iterable[int | None]) -> None:
        self.form = form
        found = list(bits)
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
        """Compare with a result, wherever the library's own operations can be right.

        Parameters
        ----------
        got : ndarray
            The result, on the host.
        *inputs : ndarray of unsigned integers, shape of `got`
            Bit patterns that it was made of, for the message.
        subnormals, payloads : bool, optional
            Whether the library keeps subnormals, and the payload of a NaN that it selects.

        Raises
        ------
        AssertionError
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
def forward(dtype: str, member: str) -> Expected:
    """Return f(x) of `patterns`."""
    return Expected(Format(dtype), map(members(dtype)[member].forward, patterns(dtype).tolist()))


@functools.cache
def pieces(dtype: str, member: str) -> npt.NDArray[np.int_]:
    """Return the piece of each of `patterns`."""
    return np.array(list(map(members(dtype)[member].piece, patterns(dtype).tolist())))


@functools.cache
def backward(dtype: str, gradient_dtype: str, member: str) -> Expected:
    """Return f'(x) * dy of `patterns` and as many `gradients`."""
    chosen = pieces(dtype, member).tolist()
    dy = gradients(gradient_dtype, len(chosen)).tolist()
    back = members(gradient_dtype)[member].backward
    return Expected(Format(gradient_dtype), map(back, chosen, dy))


@functools.cache
def gradient(dtype: str, member: str) -> Expected:
    """Return f'(x) of `patterns`."""
    numbers = members(dtype)[member]
    one = Format(dtype).round(1.0)
    back = (numbers.backward(piece, one) for piece in pieces(dtype, member).tolist())
    return Expected(Format(dtype), back)
