"""A library under test: its arrays from and to NumPy, and what its own operations keep."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from relu_xp.arrays import to_numpy
from relu_xp.testing import reference

Bits = npt.NDArray[Any]


class Library:
    """A library, and what the conformance suite needs to know of it.

    Attributes
    ----------
    name : str
    dtypes : tuple of str
        The floating dtypes that it has and exchanges with NumPy.
    subnormals : bool
        Whether its own operations keep them.
    payloads : bool
        Whether its own ``where`` keeps the payload of a NaN.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._type = type(xp.asarray([0.0]))
        self.name = str(xp.__name__)
        with warnings.catch_warnings(action="ignore"):
            self.dtypes = tuple(filter(self._has, reference.DTYPES))
            self.subnormals = all(map(self._keeps_subnormals, self.dtypes))
            self.payloads = all(map(self._keeps_payloads, self.dtypes))

    def array(self, host: Bits) -> Any:
        """Return an array of the library with a NumPy array's values and dtype."""
        return self._xp.asarray(host.copy())

    def numpy(self, x: Any) -> Bits:
        """Return a NumPy array with the values and dtype of an array of the library."""
        assert isinstance(x, self._type), f"got {type(x)}, expected {self._type}"
        return to_numpy(x)

    def _has(self, dtype: str) -> bool:
        host = np.ones(1, reference.DTYPES[dtype])
        try:
            return bool(self.numpy(self.array(host)).dtype == host.dtype)
        except Exception:  # a library may raise anything at a dtype that it does not have
            return False

    def _keeps_subnormals(self, dtype: str) -> bool:
        form = reference.Format(dtype)
        normal = np.array([1 << form.fraction], form.unsigned)
        half = self.array(np.full(1, 0.5, form.dtype))
        product = self.numpy(self.array(normal.view(form.dtype)) * half).view(form.unsigned)
        return self._keeps(normal >> 1, form) and np.array_equal(product, normal >> 1)

    def _keeps_payloads(self, dtype: str) -> bool:
        form, bits = reference.Format(dtype), reference.specials(dtype)
        return self._keeps(bits[reference.is_nan(form, bits)], form)

    def _keeps(self, bits: Bits, form: reference.Format) -> bool:
        x = self.array(bits.view(form.dtype))
        kept = self.numpy(self._xp.where(x <= 0, self._xp.zeros_like(x), x))
        return np.array_equal(kept.view(form.unsigned), bits)


library_of = functools.cache(Library)


def array_of(library: Library, patterns: Bits, dtype: str) -> Any:
    """Return an array of the library with these bit patterns."""
    return library.array(patterns.view(reference.DTYPES[dtype]))


def check(library: Library, result: Any, expected: reference.Expected, *inputs: Bits) -> None:
    """Raise AssertionError unless a result has the bits expected, as far as the library can."""
    kept = {"subnormals": library.subnormals, "payloads": library.payloads}
    expected.check(library.numpy(result), *inputs, **kept)
