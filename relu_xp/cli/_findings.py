"""How people write ReLU, and where it is wrong.

Seven formulas come from a forum's thread, one from a textbook; `relu` of this package follows them.
Only the formulas are written down here: what is wrong is found by running each on values at the
limits of a dtype and comparing the results with `relu`.
"""

from __future__ import annotations

import importlib
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from relu_xp import relu
from relu_xp.arrays import to_numpy
from relu_xp.parameters import float_limits

_REPEATS = 17  # of the tested values: vector loops may treat the end of an array differently
_INT32 = [-(2**31), -1, 0, 1, 2**31 - 1] * _REPEATS


class Formula(NamedTuple):
    """One way to write ReLU: as its author wrote it, and as a function of a library and x."""

    text: str
    origin: str  # "forum", "textbook" or "relu_xp"
    run: Callable[..., Any]


def _fancy_index(xp: Any, x: Any) -> Any:
    x[x < 0] = 0
    return x


def _textbook(xp: Any, x: Any) -> Any:
    mask = x <= 0
    out = xp.asarray(x, copy=True)  # x.copy() is not in the array API standard
    out[mask] = 0
    return out


FORMULAS = (
    Formula("np.maximum(x, 0)", "forum", lambda xp, x: xp.maximum(x, 0)),
    Formula("x * (x > 0)", "forum", lambda xp, x: x * (x > 0)),
    Formula("(abs(x) + x) / 2", "forum", lambda xp, x: (abs(x) + x) / 2),
    Formula("abs(x) * (x > 0)", "forum", lambda xp, x: abs(x) * (x > 0)),
    # By keyword: NumPy's third positional argument, deprecated, has the same effect.
    Formula("np.maximum(x, 0, x)", "forum", lambda xp, x: xp.maximum(x, 0, out=x)),
    Formula("x[x < 0] = 0", "forum", _fancy_index),
    Formula(
        "a0 * x * (x < t0) + a1 * x * (x > t0)",
        "forum",
        lambda xp, x, t0=0, a0=0, a1=1: a0 * x * (x < t0) + a1 * x * (x > t0),
    ),
    Formula("mask = (x <= 0); out = x.copy(); out[mask] = 0", "textbook", _textbook),
    Formula("relu_xp.relu(x)", "relu_xp", lambda xp, x: relu(x)),
)


def where_wrong(formula: Formula, xp: Any, dtype: str) -> list[str]:
    """Return all that is wrong with a formula on a library's arrays of a dtype.

    The formula is run on infinities, NaN, both zeros, the smallest and the largest number of the
    dtype, then on a 0-d array and on the limits of int32. What is right is `relu` of NumPy's
    float64, which holds all of these values, with the sign of zero; every NaN counts as equal.
    """
    smallest, largest = float_limits(dtype)
    values = [-math.inf, -1.0, -0.0, 0.0, smallest, 1.0, largest, math.inf, math.nan]
    values *= _REPEATS
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # for example about an overflow, which is a finding here
        x = xp.asarray(values, dtype=dtype_of(xp, dtype))
        try:
            y = formula.run(xp, x)
            found = _differences(values, y)
        except Exception as error:  # of any class: each library has its own
            return [f"cannot run: {in_short(error)}"]
        if _name(y.dtype) != dtype:
            found.append(f"{dtype} becomes {_name(y.dtype)}")
        if repr(_to_list(x)) != repr(values):
            found.append("writes x")
        try:
            x = xp.asarray(-1.0, dtype=dtype_of(xp, dtype))
            if not isinstance(formula.run(xp, x), type(x)):
                found.append("0-d gives a scalar")
        except Exception as error:
            found.append(f"0-d: {in_short(error)}")
        try:
            y = formula.run(xp, xp.asarray(_INT32, dtype=xp.int32))
            if _name(y.dtype) != "int32":
                found.append(f"int32 becomes {_name(y.dtype)}")
            found += [f"{text} (int32)" for text in _differences(_INT32, y)]
        except Exception as error:
            found.append(f"int32: {in_short(error)}")
    return found


def dtype_of(xp: Any, name: str) -> Any:
    """Return a library's dtype, or None if it has none of that name as it is configured."""
    try:
        dtype = getattr(xp, name, None) or getattr(importlib.import_module("ml_dtypes"), name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns that it chooses another dtype
            return dtype if _name(xp.zeros(1, dtype=dtype).dtype) == name else None
    except Exception:  # each library refuses in its own way
        return None


def in_short(error: BaseException) -> str:
    """Return an error's class and message in one short line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 72, placeholder=" ...")


def _name(dtype: Any) -> str:
    """Return a dtype's name without that of its library."""
    return str(dtype).rpartition(".")[2]


def _differences(values: Sequence[float], results: Any) -> list[str]:
    """Return each wrong result for the values, and where it is."""
    expected = relu(np.array(values)).tolist()
    places: dict[str, dict[str, None]] = {}
    for x, right, y in zip(values, expected, _to_list(results), strict=True):
        if repr(float(y)) != repr(float(right)):  # with the sign of zero; NaN is NaN
            places.setdefault(_label(y), {})[_label(x)] = None
    return [f"{wrong} at {', '.join(labels)}" for wrong, labels in places.items()]


def _label(number: float) -> str:
    text = str(number) if isinstance(number, int) else f"{number:.2g}"
    return {"nan": "NaN", "-0": "-0.0"}.get(text, text)


def _to_list(y: Any) -> list[float]:
    """Return the values of an array with one axis."""
    host = y if hasattr(y, "tolist") else to_numpy(y)
    return [value if isinstance(value, int) else float(value) for value in host.tolist()]
