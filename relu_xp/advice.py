"""What to do with an argument that is no array: advice that works when it is followed, or none."""

from __future__ import annotations

from typing import Any

import numpy as np

from relu_xp.parameters import DTYPES, is_integer

__all__ = ["WRITTEN", "about_object", "about_subclass", "as_operand"]

WRITTEN = ("out", "mask")  # arguments whose content would be lost in a converted copy

# How an object becomes an array, by a method that it has. The method is not called: the array may
# be huge, and in a file.
_CONVERSIONS = {
    "toarray": "{}.toarray()",  # of scipy.sparse
    "todense": "{}.todense()",  # of jax.experimental.sparse
    "__array__": "numpy.asarray({})",
}


def about_object(argument: str, x: Any) -> str:
    """Return the end of a message that refuses an object which is no array; it may be empty."""
    try:
        advice = _replacement(argument, x) if argument in WRITTEN else _conversion(argument, x)
    except Exception:  # of a method of x, or of NumPy: it cannot be converted
        return ""
    return f"; {advice}" if advice else ""


def about_subclass(argument: str, x: np.ndarray[Any, Any]) -> str:
    """Return the same for an instance of a subclass of ``numpy.ndarray``."""
    view = np.asarray(x)
    return f"; {_for_example('numpy.asarray({})', argument)}" if _is_served(view.dtype) else ""


def as_operand(argument: str) -> str:
    """Return a name for an expression; "what rng returned", for example, is none."""
    return "it" if " " in argument else argument


def _for_example(call: str, argument: str) -> str:
    return f"convert it first, for example {call.format(as_operand(argument))}"


def _conversion(argument: str, x: Any) -> str:
    method = next((name for name in _CONVERSIONS if hasattr(x, name)), None)
    if method is not None:
        dtypes = [x.dtype] if hasattr(x, "dtype") else list(x.dtypes)  # of a DataFrame
    else:
        first = x
        for _ in range(64):  # more axes than an array has
            if isinstance(first, (list, tuple, range)):
                first = first[0]
        if not isinstance(first, (int, float, np.generic, np.ndarray)):
            memoryview(first)  # raises a TypeError where there is no memory to read
        dtypes = [np.asarray(x).dtype]
    if not dtypes or not all(map(_is_served, dtypes)):
        return ""
    call = _CONVERSIONS[method or "__array__"]
    if any(is_integer(dtype.name) for dtype in dtypes):  # floating numbers have a gradient too
        call = call.replace("({})", "({}, float)")
    return _for_example(call, argument)


def _replacement(argument: str, x: Any) -> str:
    if isinstance(x, (list, tuple)) and len(x) == 1 and hasattr(x[0], "shape"):
        return f"pass the array itself, {argument}=y instead of {argument}=(y,)"
    if argument == "mask":
        return "give a contiguous array of uint8 with one axis"
    if isinstance(x, np.generic) and _is_served(x.dtype):
        return f"give an array, for example numpy.empty((), {x.dtype.name!r})"
    return "give an array like the result"


def _is_served(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.isnative and dtype.name in DTYPES
