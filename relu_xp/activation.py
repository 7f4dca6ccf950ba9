"""The family as data: four numbers, checked once, then rounded to a dtype.

Every member of the family is one function with four numbers, threshold ``t``, negative slope
``a``, positive slope ``b`` and ceiling ``c``::

    f(x)  = a*x            where x <= t               f'(x) = a    where x <= t
          = min(b*x, c)    elsewhere                        = 0    where b*x >= c
                                                            = b    elsewhere

An array works with the numbers as its own dtype holds them, so that ``a = 0`` and ``b = 1`` are
asked after rounding: `Activation.rounded` keeps one `Rounded` for every dtype seen.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import struct
from dataclasses import dataclass, field
from typing import Any

from relu_xp.tracing import compiles, compiling, constant

__all__ = [
    "FLOATING",
    "ONE",
    "ZERO",
    "Activation",
    "Rounded",
    "activation_of",
    "is_integer",
    "limits",
    "real",
    "rounded",
]

ZERO, ONE = 0.0, 1.0  # the defaults of parameters: these very objects tell that none was given


@dataclass(frozen=True)
class Activation:
    """One member of the family.

    Parameters
    ----------
    threshold : float
        ``t``, the knee; it belongs to the lower piece.
    negative_slope : float
        ``a``, the factor at and below the knee. 0 means exactly +0 there, never a product.
    positive_slope : float
        ``b``, the factor above the knee; not 0. 1 means x itself, never a product.
    max_value : float or None
        ``c``, the ceiling; None for none.

    Attributes
    ----------
    rounded : dict of str to Rounded
        The numbers as each dtype seen so far holds them (`round_to`).
    served : dict
        Of the classes and dtypes of arrays seen so far: the backend and the rounded numbers
        (`relu_xp.checks.serving`).

    Raises
    ------
    TypeError
        If one of them is not a real number (a bool is not).
    ValueError
        If one of them is NaN or infinite, if ``b`` is 0, or if there is a ceiling without
        ``b > 0`` and ``c > b*t``.
    """

    threshold: float = 0.0
    negative_slope: float = 0.0
    positive_slope: float = 1.0
    max_value: float | None = None
    rounded: dict[Any, Rounded] = field(default_factory=dict, init=False, repr=False, compare=False)
    served: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("threshold", "negative_slope", "positive_slope"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        t, b = self.threshold, self.positive_slope
        if b == 0:
            raise ValueError("positive_slope must not be 0: nothing would pass above the threshold")
        if self.max_value is not None:
            c = real("max_value", self.max_value)
            object.__setattr__(self, "max_value", c)
            if not (b > 0 and c > b * t):
                raise ValueError(
                    "max_value needs positive_slope > 0 and max_value > positive_slope*threshold, "
                    f"got max_value={c}, positive_slope={b}, threshold={t}"
                )

    def __reduce__(self) -> tuple[Any, tuple[float | None, ...]]:
        given = (self.negative_slope, self.threshold, self.positive_slope, self.max_value)
        return activation_of, given

    def round_to(self, dtype_name: str) -> Rounded:
        """Return the numbers rounded to a dtype: always the same object, kept in `rounded`.

        Parameters
        ----------
        dtype_name : str
            Its standard name, for example ``"float32"``.

        Returns
        -------
        Rounded

        Raises
        ------
        TypeError
            If the dtype is not one that the family serves.
        ValueError
            If the dtype is an integer one that cannot hold the numbers.
        """
        found = self.rounded.get(dtype_name)
        if found is None:  # another thread may be as far
            found = self.rounded.setdefault(dtype_name, Rounded(self, dtype_name))
        return found


def activation_of(
    negative_slope: float, threshold: float, positive_slope: float, max_value: float | None
) -> Activation:
    """Return the one `Activation` with these numbers; a call costs far less than building it."""
    if negative_slope is threshold is ZERO and positive_slope is ONE and max_value is None:
        return _RELU  # no argument was given, which needs no look-up
    if compiles() and compiling():
        return _unshared(negative_slope, threshold, positive_slope, max_value)
    try:
        return _activation(threshold, negative_slope, positive_slope, max_value)
    except Exception:
        pass  # one of them cannot be hashed, say: `Activation` tells better what is wrong
    return Activation(threshold, negative_slope, positive_slope, max_value)


@constant
def _unshared(
    negative_slope: float, threshold: float, positive_slope: float, max_value: float | None
) -> Activation:
    """Return one with nothing in `served`: ``torch.compile`` could make no use of it."""
    return Activation(threshold, negative_slope, positive_slope, max_value)


@constant
def rounded(
    negative_slope: float,
    threshold: float,
    positive_slope: float,
    max_value: float | None,
    dtype_name: str,
) -> Rounded:
    """Return `Activation.round_to` of the one with these numbers."""
    activation = activation_of(negative_slope, threshold, positive_slope, max_value)
    return activation.round_to(dtype_name)


# typed: True == 1, but a bool is to be refused, however often 1 was seen
_activation = functools.lru_cache(maxsize=1024, typed=True)(Activation)


def real(name: str, value: Any) -> float:
    """Return a finite real number as a float, or as an int where a float would not be exact."""
    exact: int | None = None
    cause: Exception | None = None
    number: float | None = None
    try:
        if not isinstance(value, bool) and isinstance(value, numbers.Real):
            if isinstance(value, numbers.Rational) and value.denominator == 1:
                exact = operator.index(value.numerator)
            number = float(value if exact is None else exact)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got one beyond the range of float64") from None
    except Exception as error:  # whatever a class of somebody's raises when it is asked
        cause = error
    if number is None:
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}") from cause
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if exact is not None and number != exact:
        return exact
    return number + 0.0  # -0.0 and 0.0 are the same number: keep one


class _Format:
    """A binary floating-point format: its width and the bits of its significand, in all."""

    def __init__(self, width: int, precision: int, code: str) -> None:
        self.width = width
        self.precision = precision
        self.code = code  # of struct, for the bits; bfloat16 is the upper half of a float32
        self.max_exponent = 1 << (width - precision - 1)  # every finite number is below 2 to this

    def round(self, value: float) -> float:
        """Round to nearest, ties to even, in one step: by way of float32 it would be two."""
        if self.width == 64:
            return float(value)
        limit = math.ldexp(1.0, self.max_exponent)
        if abs(value) >= limit:
            return math.copysign(math.inf, value)
        last_place = max(math.frexp(value)[1], 3 - self.max_exponent) - self.precision
        if isinstance(value, int):  # not exact in float64
            from fractions import Fraction

            units = round(Fraction(value) / Fraction(2) ** last_place)
        else:
            units = round(math.ldexp(value, -last_place))
        rounded = math.ldexp(units, last_place)
        return math.copysign(math.inf, rounded) if abs(rounded) >= limit else rounded

    def bits(self, value: float) -> int:
        """Return the bit pattern of a number that the format holds."""
        packed = int.from_bytes(struct.pack("<" + self.code, value), "little")
        return packed >> (8 * struct.calcsize(self.code) - self.width)


_FLOATING = {
    "float16": _Format(16, 11, "e"),
    "bfloat16": _Format(16, 8, "f"),
    "float32": _Format(32, 24, "f"),
    "float64": _Format(64, 53, "d"),
}
FLOATING = tuple(_FLOATING)
_INTEGER = {
    f"{prefix}int{width}": (width, low * 2 ** (width - 1), (2 + low) * 2 ** (width - 1) - 1)
    for width in (8, 16, 32, 64)
    for prefix, low in (("", -1), ("u", 0))
}
DTYPES = (*_FLOATING, *_INTEGER)
# Of the kernels: a general one computes with slopes that may be 0 or 1.
_VARIANTS = ("plain", "leaky", "clipped", "general", "general clipped")


def is_integer(dtype_name: str) -> bool:
    """Tell whether a dtype is served, but has no gradient."""
    return dtype_name in _INTEGER


def limits(dtype_name: str) -> tuple[float, float]:
    """Return the smallest and the largest positive number of a floating dtype."""
    form = _FLOATING[dtype_name]
    smallest = math.ldexp(1.0, 3 - form.max_exponent - form.precision)
    return smallest, math.ldexp(2**form.precision - 1, form.max_exponent - form.precision)


class Rounded:
    """An activation's numbers as one dtype holds them, with their bit patterns.

    Compared by identity, so that a backend may key what it derives from them by the object: there
    is one for an activation and a dtype's name in a process, and unpickling finds that.

    Attributes
    ----------
    activation : Activation
        The numbers as they were given.
    dtype_name : str
        For example ``"bfloat16"``.
    floating : bool
        Whether the dtype has gradients; the bit patterns below are there only if so.
    width : int
        Bits an element.
    threshold, negative_slope, positive_slope, max_value : float or int
        Exactly representable in the dtype, or infinite where the dtype cannot reach so far;
        ``max_value`` may be None.
    zero_below, self_above, mirrored : bool
        Whether the lower piece is +0 (``negative_slope`` is 0), the upper one x itself
        (``positive_slope`` is 1), or falls (``positive_slope`` is below 0).
    plain : bool
        Whether this is ReLU itself: threshold 0, slopes 0 and 1, no ceiling.
    pieces : int
        3 where a ceiling meets a non-zero negative slope, so that one bit an element cannot say
        which factor a gradient takes; else 2. Asked before rounding: the dtypes of x and dy may
        differ, and both must read the mask alike.
    infinity_bits, threshold_bits, ceiling_bits : int
        Bit patterns. A ceiling of 0 has those of -0.0, because -0.0 reaches it.
    record : bytes
        The numbers as the compiled kernels read them: ``Numbers`` of kernels/cpu_kernels.h.
    """

    __slots__ = (
        "activation",
        "ceiling_bits",
        "dtype_name",
        "floating",
        "infinity_bits",
        "max_value",
        "mirrored",
        "negative_slope",
        "pieces",
        "plain",
        "positive_slope",
        "record",
        "self_above",
        "threshold",
        "threshold_bits",
        "width",
        "zero_below",
    )

    def __init__(self, activation: Activation, dtype_name: str) -> None:
        self.activation = activation
        self.dtype_name = dtype_name
        self.floating = dtype_name in _FLOATING
        if self.floating:
            form = _FLOATING[dtype_name]
            self.width = form.width
        elif dtype_name in _INTEGER:
            self.width, low, high = _INTEGER[dtype_name]
        else:
            flaw = "has no order" if dtype_name.startswith("complex") else "is not supported"
            raise TypeError(
                f"{dtype_name} {flaw}; relu takes real floating or integer arrays "
                f"({', '.join(_FLOATING)}, int8 to int64, uint8 to uint64)"
            )

        def convert(name: str) -> float:
            value: float = getattr(activation, name)
            if self.floating:
                return form.round(value)
            if value != int(value) or not low <= value <= high:
                raise ValueError(
                    f"{name}={value} is not a whole number that {dtype_name} holds; convert the "
                    "array to a floating dtype first"
                )
            return int(value)

        self.threshold = t = convert("threshold")
        self.negative_slope = a = convert("negative_slope")
        self.positive_slope = b = convert("positive_slope")
        self.max_value = c = None if activation.max_value is None else convert("max_value")
        self.zero_below, self.self_above, self.mirrored = a == 0, b == 1, b < 0
        self.plain = t == 0 and self.zero_below and self.self_above and c is None
        self.pieces = 3 if c is not None and activation.negative_slope != 0 else 2
        if self.floating:
            self.infinity_bits = form.bits(math.inf)
            self.threshold_bits = form.bits(t)
            self.ceiling_bits = 0 if c is None else form.bits(c or -0.0)
        self.record = self._record()

    def _record(self) -> bytes:
        a, b, c = self.negative_slope, self.positive_slope, self.max_value
        if self.floating:
            values = [self.bits(value) for value in (self.threshold, a, b, c or 0)]
        else:
            largest = _INTEGER[self.dtype_name][2]
            words = (self.threshold, a, b, largest if c is None else c)
            values = [int(word) % 2**64 for word in words]
        if self.threshold != 0 or not self.self_above or not (self.zero_below or c is None):
            variant = "general" if c is None else "general clipped"
        elif c is not None:
            variant = "clipped"
        else:
            variant = "plain" if self.zero_below else "leaky"
        codes = DTYPES.index(self.dtype_name), _VARIANTS.index(variant), self.pieces == 3
        return struct.pack("<4Q3b5x", *values, *codes)

    def __reduce__(self) -> tuple[Any, tuple[Activation, str]]:
        return Activation.round_to, (self.activation, self.dtype_name)

    def bits(self, value: float) -> int:
        """Return the bit pattern of a number that the dtype, a floating one, holds."""
        return _FLOATING[self.dtype_name].bits(value)

    def order(self, bits: int) -> int:
        """Map a bit pattern to a signed integer that orders as the numbers do, NaN outermost."""
        sign = 1 << (self.width - 1)
        return bits if bits < sign else (sign - 1) - bits


_RELU = _activation(ZERO, ZERO, ONE, None)
