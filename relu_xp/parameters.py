"""The four parameters of the ReLU family: validated once, then cast to an array's dtype.

Every preset is one function with a threshold ``t``, a negative slope ``a``, a positive slope ``b``
and a ceiling ``c``::

    f(x)  = a*x            where x <= t               f'(x) = a    where x <= t
          = min(b*x, c)    elsewhere                        = 0    where b*x >= c
                                                            = b    elsewhere

Whether ``a`` is 0 and ``b`` is 1 is decided after the cast (rule N1). For a gradient of another
dtype than x the slopes are cast to the dtype of the gradient.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import struct
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "DTYPES",
    "FLOATING",
    "ONE",
    "RELU",
    "ZERO",
    "CastParameters",
    "Parameters",
    "as_real",
    "float_limits",
    "is_integer",
    "make_parameters",
    "unsupported",
]

ZERO, ONE = 0.0, 1.0  # defaults of the functions, which `make_parameters` compares by identity


class Parameters(NamedTuple):
    """Threshold, slopes and ceiling, as `make_parameters` has validated them.

    Attributes
    ----------
    threshold : float
        ``t``, which belongs to the lower branch.
    negative_slope : float
        ``a``, the factor where ``x <= t``. 0 gives exactly +0 there, never a product.
    positive_slope : float
        ``b``, the factor above the threshold; not 0. 1 gives x itself, never a product.
    max_value : float or None
        ``c``, the ceiling; None for none.
    """

    threshold: float = 0.0
    negative_slope: float = 0.0
    positive_slope: float = 1.0
    max_value: float | None = None

    def cast(self, dtype_name: str) -> CastParameters:
        """Return the parameters in a dtype, given by its standard name.

        Raises
        ------
        TypeError
            If the dtype is not supported.
        ValueError
            If it is an integer dtype that does not hold the parameters.
        """
        return _cast(self, dtype_name)


RELU = Parameters()


def make_parameters(
    negative_slope: float, threshold: float, positive_slope: float, max_value: float | None
) -> Parameters:
    """Return validated parameters.

    Raises
    ------
    TypeError
        If one of them is not a real number (a bool is not; a 0-d array of NumPy's is).
    ValueError
        If one of them is NaN or infinite, if `positive_slope` is 0, or if there is a ceiling
        without ``positive_slope > 0`` and ``max_value > positive_slope * threshold``.
    """
    if negative_slope is threshold is ZERO and positive_slope is ONE and max_value is None:
        return RELU  # half of the time of a lookup in the cache
    try:
        return _cached(negative_slope, threshold, positive_slope, max_value)
    except Exception:  # an argument that has no hash, say: `_validate` raises the right error
        pass
    return _validate(negative_slope, threshold, positive_slope, max_value)


def _validate(a: float, t: float, b: float, c: float | None) -> Parameters:
    t, a, b = as_real("threshold", t), as_real("negative_slope", a), as_real("positive_slope", b)
    if b == 0:
        raise ValueError("positive_slope must not be 0: nothing would pass above the threshold")
    if c is not None:
        c = as_real("max_value", c)
        if not (b > 0 and c > b * t):
            raise ValueError(
                "max_value needs positive_slope > 0 and max_value > positive_slope*threshold, "
                f"got max_value={c}, positive_slope={b}, threshold={t}"
            )
    return Parameters(t, a, b, c)


# typed: True == 1, but a bool is refused
_cached = functools.lru_cache(maxsize=1024, typed=True)(_validate)


def as_real(name: str, value: Any) -> float:
    """Return a finite real number as a float, or as an int where a float is not exact."""
    exact: int | None = None
    cause: Exception | None = None
    number: float | None = None
    advice = ""
    try:
        if getattr(value, "shape", None) == ():  # numbers of a file that numpy.load has read
            if isinstance(value, np.ndarray):
                value = value[()]
            elif str(getattr(value, "dtype", "")).rpartition(".")[2] in DTYPES:
                advice = f"; give float({name})"
        if not isinstance(value, bool) and isinstance(value, numbers.Real):
            if isinstance(value, numbers.Rational) and value.denominator == 1:
                exact = operator.index(value.numerator)
            number = float(value if exact is None else exact)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got one beyond the range of float64") from None
    except Exception as error:  # the methods of a caller's class may raise anything
        cause = error
    if number is None:
        kind = type(value).__name__
        raise TypeError(f"{name} must be a real number, got {kind}{advice}") from cause
    if not math.isfinite(number):
        omit = "; omit it, and there is no ceiling" * (name == "max_value" and number > 0)
        raise ValueError(f"{name} must be finite, got {number}{omit}")
    if exact is not None and number != exact:
        return exact
    return number + 0.0  # -0.0 is stored as 0.0


class _Format:
    """A binary floating-point format: its width, and the bits of its significand."""

    def __init__(self, width: int, precision: int, code: str) -> None:
        self.width = width
        self.precision = precision
        self.code = code  # for `struct`; bfloat16 is the upper half of a float32
        self.max_exponent = 1 << (width - precision - 1)  # every finite number is below 2 to this

    def round(self, value: float) -> float:
        """Return the nearest number of the format, ties to even, rounded in one step."""
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
        """Return the bit pattern of a number of the format."""
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


def is_integer(dtype_name: str) -> bool:
    """Return whether a dtype is supported in the forward pass only."""
    return dtype_name in _INTEGER


def unsupported(dtype_name: str, integers: bool = True) -> TypeError:
    """Return the error for a dtype, where integers are supported or not."""
    taken = ", ".join(_FLOATING) + ", int8 to int64, uint8 to uint64" * integers
    return TypeError(f"unsupported dtype {dtype_name}; give an array of {taken}")


def float_limits(dtype_name: str) -> tuple[float, float]:
    """Return the smallest and the largest positive number of a floating dtype."""
    form = _FLOATING[dtype_name]
    smallest = math.ldexp(1.0, 3 - form.max_exponent - form.precision)
    return smallest, math.ldexp(2**form.precision - 1, form.max_exponent - form.precision)


class CastParameters:
    """Parameters in one dtype. Compared by identity, so that they are quick keys of a cache.

    Attributes
    ----------
    parameters : Parameters
        The parameters before the cast.
    dtype_name : str
        For example ``"bfloat16"``.
    is_floating : bool
        Whether the dtype has gradients.
    width : int
        Bits per element.
    threshold, negative_slope, positive_slope, max_value : float or int
        Numbers of the dtype, or infinite beyond its range; ``max_value`` may be None.
    zero_below, identity_above, falls_above : bool
        Whether ``negative_slope`` is 0, ``positive_slope`` is 1, ``positive_slope`` is below 0.
    num_branches : int
        3 with both a ceiling and a non-zero negative slope, where one bit per element does not say
        which factor a gradient takes; else 2. Decided before the cast: the dtypes of x and dy may
        differ, and the mask has one format.
    record : bytes
        What the compiled kernels read: ``Params`` of kernels/cpu_kernels.h.
    """

    __slots__ = (
        "dtype_name",
        "falls_above",
        "identity_above",
        "is_floating",
        "max_value",
        "negative_slope",
        "num_branches",
        "parameters",
        "positive_slope",
        "record",
        "threshold",
        "width",
        "zero_below",
    )

    def __init__(self, parameters: Parameters, dtype_name: str) -> None:
        self.parameters = parameters
        self.dtype_name = dtype_name
        self.is_floating = dtype_name in _FLOATING
        if not self.is_floating and dtype_name not in _INTEGER:
            raise unsupported(dtype_name)
        self.width = _FLOATING[dtype_name].width if self.is_floating else _INTEGER[dtype_name][0]
        c = parameters.max_value
        self.threshold = self._convert("threshold")
        self.negative_slope = self._convert("negative_slope")
        self.positive_slope = self._convert("positive_slope")
        self.max_value = None if c is None else self._convert("max_value")
        self.zero_below = self.negative_slope == 0
        self.identity_above = self.positive_slope == 1
        self.falls_above = self.positive_slope < 0
        self.num_branches = 3 if c is not None and parameters.negative_slope != 0 else 2
        self.record = self._record()

    def _convert(self, name: str) -> float:
        value: float = getattr(self.parameters, name)
        if self.is_floating:
            return _FLOATING[self.dtype_name].round(value)
        _, low, high = _INTEGER[self.dtype_name]
        if value != int(value) or not low <= value <= high:
            raise ValueError(
                f"{name}={value} is not an integer that {self.dtype_name} holds; convert the "
                "array to a floating dtype first"
            )
        return int(value)

    def _record(self) -> bytes:
        t, a, b, c = self.threshold, self.negative_slope, self.positive_slope, self.max_value
        if self.is_floating:
            values = [_FLOATING[self.dtype_name].bits(value) for value in (t, a, b, c or 0)]
        else:
            highest = _INTEGER[self.dtype_name][2]
            values = [int(value) % 2**64 for value in (t, a, b, highest if c is None else c)]
        if t != 0 or not self.identity_above or not (self.zero_below or c is None):
            variant = "general" if c is None else "general clipped"
        elif c is not None:
            variant = "clipped"
        else:
            variant = "plain" if self.zero_below else "leaky"
        codes = DTYPES.index(self.dtype_name), _VARIANTS.index(variant), self.num_branches == 3
        return struct.pack("<4Q3b5x", *values, *codes)

    def __reduce__(self) -> tuple[Any, tuple[Parameters, str]]:
        return _cast, (self.parameters, self.dtype_name)


# Of the compiled kernels; in a general one the slopes may have any value, 0 and 1 too.
_VARIANTS = ("plain", "leaky", "clipped", "general", "general clipped")


@functools.lru_cache(maxsize=4096)
def _cast(parameters: Parameters, dtype_name: str) -> CastParameters:
    return CastParameters(parameters, dtype_name)
