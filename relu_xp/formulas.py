"""What people write for ReLU: how long it takes, and where it is wrong, on any array library.

Seven spellings come from a forum's thread, one from the textbook; `FORMULAS` has them, and this
package's `relu` after them. Nothing about them is typed in but the formulas themselves: what is
wrong is found by running each on numbers where things go wrong, and comparing bits with `relu`.
"""

from __future__ import annotations

import math
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import array_api_compat
import numpy as np

from relu_xp import training
from relu_xp.activation import FLOATING, limits
from relu_xp.backends.generic import dtype_name
from relu_xp.functional import relu

__all__ = [
    "FORMULAS",
    "OURS",
    "REPEATS",
    "SHAPE",
    "Finding",
    "Formula",
    "Measured",
    "Row",
    "choose_dtype",
    "measure",
    "unit",
    "where_wrong",
]

SHAPE = (5000, 5000)  # the thread's
REPEATS = 7

_TILES = 17  # of a row of numbers: a library's vector loops may differ from what is left at the end
_SHORT = 1e-3  # seconds: what takes less is called several times in one timing, until it is so long
_SENTENCE = 72  # characters of an error that are shown
_INT32 = (-(2**31), -1, 0, 1, 2**31 - 1)


@dataclass(frozen=True)
class Formula:
    """One way to write ReLU.

    Attributes
    ----------
    text : str
        As its author wrote it; `np` stands for the library.
    origin : str
        ``"forum"``, ``"textbook"`` or ``"relu_xp"``.
    run : function
        ``run(xp, x)`` returns f(x), with `xp` the array API namespace of `x`.
    """

    text: str
    origin: str
    run: Callable[[Any, Any], Any]


def _fancy_index(xp: Any, x: Any) -> Any:
    x[x < 0] = 0
    return x


def _textbook(xp: Any, x: Any) -> Any:
    mask = x <= 0
    out = xp.asarray(x, copy=True)  # not every library's arrays have the textbook's x.copy()
    out[mask] = 0
    return out


def _three_numbers(xp: Any, x: Any, t0: float = 0, a0: float = 0, a1: float = 1) -> Any:
    return a0 * x * (x < t0) + a1 * x * (x > t0)


FORMULAS = (
    Formula("np.maximum(x, 0)", "forum", lambda xp, x: xp.maximum(x, 0)),
    Formula("x * (x > 0)", "forum", lambda xp, x: x * (x > 0)),
    Formula("(abs(x) + x) / 2", "forum", lambda xp, x: (abs(x) + x) / 2),
    Formula("abs(x) * (x > 0)", "forum", lambda xp, x: abs(x) * (x > 0)),
    # By keyword, as libraries want it today; NumPy's third argument, deprecated, is the same.
    Formula("np.maximum(x, 0, x)", "forum", lambda xp, x: xp.maximum(x, 0, out=x)),
    Formula("x[x < 0] = 0", "forum", _fancy_index),
    Formula("a0 * x * (x < t0) + a1 * x * (x > t0)", "forum", _three_numbers),
    Formula("mask = (x <= 0); out = x.copy(); out[mask] = 0", "textbook", _textbook),
    Formula("relu_xp.relu(x)", "relu_xp", lambda xp, x: relu(x)),
)
OURS = FORMULAS[-1]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a formula.

    Attributes
    ----------
    kind : str
        ``"cannot run"``; ``"NaN lost"``, ``"NaN made"``, ``"-0.0"`` (where it is to be +0),
        ``"overflow"``, ``"subnormal"`` (flushed to 0), ``"value"`` (any other that is wrong);
        ``"dtype"`` (another than that of x), ``"writes x"``, ``"0-d"`` (a scalar, or an error),
        ``"integers"``.
    text : str
        What came, and of what: ``"NaN at -inf"``.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Row:
    """A formula, what is wrong with it, and how long it took.

    Attributes
    ----------
    formula : Formula
    findings : tuple of Finding
        Empty for a formula that is right.
    seconds : tuple of float
        A call's, of each round; empty for a formula that cannot run.
    """

    formula: Formula
    findings: tuple[Finding, ...]
    seconds: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """Seconds a call; None for a formula that cannot run."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def verdict(self) -> str:
        """What is wrong, in words."""
        return "; ".join(finding.text for finding in self.findings) or "right"


@dataclass(frozen=True)
class Measured:
    """All formulas on one array.

    Attributes
    ----------
    backend, device : str
        The array library's name, and its device in its own words.
    shape : tuple of int
    dtype : str
    seed : int
    rows : tuple of Row
        In the order of the formulas, this package's among them.
    """

    backend: str
    device: str
    shape: tuple[int, ...]
    dtype: str
    seed: int
    rows: tuple[Row, ...]

    def times_ours(self, row: Row) -> float | None:
        """Return a row's median time over that of this package's; None if it cannot run."""
        ours = next(other.median for other in self.rows if other.formula is OURS)
        return row.median / ours if row.median and ours else None

    def record(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold; times in seconds."""
        return {
            "backend": self.backend,
            "device": self.device,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "seed": self.seed,
            "formulas": [
                {
                    "formula": row.formula.text,
                    "origin": row.formula.origin,
                    "median_s": row.median,
                    "times_ours": self.times_ours(row),
                    "seconds": list(row.seconds),
                    "findings": [asdict(finding) for finding in row.findings],
                }
                for row in self.rows
            ],
        }


def unit(seconds: Iterable[float]) -> tuple[float, str]:
    """Return the factor and the name of the unit that suits times: ms, or us for short ones."""
    return (1e3, "ms") if max(seconds) >= 1e-3 else (1e6, "us")


def choose_dtype(setting: training.Setting, name: str | None = None) -> str:
    """Return the name of a floating dtype that a library has, as it is set up.

    Parameters
    ----------
    setting : relu_xp.training.Setting
    name : str, optional
        The one that is wanted; by default float64, or float32 where there is no other (JAX).

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If the library has no such dtype; the message tells those it has.
    """
    here = [one for one in FLOATING if _dtype(setting.namespace, one) is not None]
    if name is None:
        return "float64" if "float64" in here else "float32"
    if name not in here:
        extra = " (bfloat16: pip install ml-dtypes)" if setting.backend == "numpy" else ""
        raise ValueError(f"{setting.backend} has no {name} here; there is {', '.join(here)}{extra}")
    return name


def where_wrong(formula: Formula, xp: Any, dtype: str) -> tuple[Finding, ...]:
    """Run a formula where things go wrong, and tell what does.

    Infinities, NaN, both zeros, the smallest and the largest number of the dtype; then a 0-d array
    and the extremes of int32. What is right is `relu` of NumPy's float64, which holds all of the
    numbers, to the sign of zero; any NaN is as good as another.

    Parameters
    ----------
    formula : Formula
    xp : module
        Array API namespace.
    dtype : str
        A floating dtype of the library.

    Returns
    -------
    tuple of Finding
        Empty if all is right.
    """
    smallest, largest = limits(dtype)
    row = [-math.inf, -1.0, -0.0, 0.0, smallest, 1.0, largest, math.inf, math.nan]
    kind = _dtype(xp, dtype)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of overflow, say: here it is counted
        x = xp.asarray(row * _TILES, dtype=kind)
        try:
            y = formula.run(xp, x)
            came = _values(y)
        except Exception as error:  # of any kind: each library has its own
            return (Finding("cannot run", f"cannot run: {_in_short(error)}"),)
        found = [Finding(*both) for both in _differences(row, came)]
        if dtype_name(y.dtype) != dtype:
            found.append(Finding("dtype", f"{dtype} becomes {dtype_name(y.dtype)}"))
        if list(map(repr, _values(x))) != list(map(repr, row * _TILES)):
            found.append(Finding("writes x", "writes x"))
        found += _zero_dimensional(formula, xp.asarray(-1.0, dtype=kind), xp)
        found += _integers(formula, xp)
    return tuple(found)


def measure(
    backend: str | None = None,
    *,
    shape: Sequence[int] = SHAPE,
    dtype: str | None = None,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: bool = False,
) -> Measured:
    """Time every formula on one array, in turn, and tell where each is wrong.

    The numbers are even between -0.5 and 0.5, as in the thread. Every formula is called before the
    clock starts, a device is waited for, and what writes its input gets a fresh copy each time,
    made before the clock starts.

    Parameters
    ----------
    backend : str, optional
        An array library's name, as for `relu_xp.training.choose`.
    shape : sequence of int, optional
    dtype : str, optional
        As for `choose_dtype`.
    repeats : int, optional
        Rounds, at least 1.
    seed : int, optional
        Of the numbers, at least 0.
    progress : bool, optional
        Whether to show a progress bar on stderr, where tqdm is installed.

    Returns
    -------
    Measured

    Raises
    ------
    ValueError
        If the library, or the dtype, cannot be had, no array can have the shape, `repeats` is below
        1 or `seed` below 0.
    MemoryError
        If the array, or what a formula makes of it, does not fit.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    setting = training.choose(backend)
    xp, dtype = setting.namespace, choose_dtype(setting, dtype)
    what = f"{shape_text(shape)} of {dtype}"
    findings = {formula: where_wrong(formula, xp, dtype) for formula in FORMULAS}
    kinds = {formula: {finding.kind for finding in findings[formula]} for formula in FORMULAS}
    running = [formula for formula in FORMULAS if "cannot run" not in kinds[formula]]
    seconds: dict[Formula, list[float]] = {formula: [] for formula in FORMULAS}
    with _bar((1 + repeats) * len(running), setting.backend, progress) as bar, _memory(what):
        x = _random(xp, shape, dtype, seed)

        def timing(formula: Formula, calls: int) -> float:
            took = 0.0
            for _ in range(calls):
                fresh = xp.asarray(x, copy=True) if "writes x" in kinds[formula] else x
                _settled(fresh)
                start = time.perf_counter()
                y = _settled(formula.run(xp, fresh))
                took += time.perf_counter() - start
                del y, fresh  # the next ones may want their memory
            return took / calls

        calls = {}
        for formula in running:
            took = min(timing(formula, 1) for _ in range(2))  # the first compiles
            calls[formula] = math.ceil(_SHORT / max(took, _SHORT / 1000))
            bar.update()
        for number in range(repeats):
            for formula in running[:: -1 if number % 2 else 1]:
                seconds[formula].append(timing(formula, calls[formula]))
                bar.update()
    rows = tuple(Row(one, findings[one], tuple(seconds[one])) for one in FORMULAS)
    return Measured(setting.backend, setting.device, tuple(shape), dtype, seed, rows)


def _dtype(xp: Any, name: str) -> Any:
    """Return a library's dtype, or None where it has none of that name as it is set up."""
    try:
        dtype = getattr(xp, name, None)
        if dtype is None:  # a library may take NumPy's without a name of its own for it
            dtype = np.dtype(name if hasattr(np, name) else _ml_dtype(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX's, that it makes another
            return dtype if dtype_name(xp.zeros(1, dtype=dtype).dtype) == name else None
    except Exception:  # each library refuses in its own way
        return None


def _ml_dtype(name: str) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, name)


def _differences(row: Sequence[float], came: Sequence[float]) -> list[tuple[str, str]]:
    """Return kind and text of what came of a row's numbers, repeated, that should not have."""
    right = relu(np.array(row)).tolist()
    places: dict[tuple[str, str], dict[str, None]] = {}
    for number, value in enumerate(came):
        x, wanted = row[number % len(row)], right[number % len(row)]
        if not _same(value, wanted):
            wrong = _kind(x, value, wanted), _label(value)
            places.setdefault(wrong, {})[_label(x)] = None
    return [(kind, f"{what} at {', '.join(where)}") for (kind, what), where in places.items()]


def _same(value: float, wanted: float) -> bool:
    if math.isnan(value) or math.isnan(wanted):
        return math.isnan(value) and math.isnan(wanted)
    return value == wanted and math.copysign(1, value) == math.copysign(1, wanted)


def _kind(x: float, value: float, wanted: float) -> str:
    if math.isnan(wanted):
        return "NaN lost"
    if math.isnan(value):
        return "NaN made"
    if value == wanted:
        return "-0.0"
    if math.isinf(value) and math.isfinite(x):
        return "overflow"
    return "subnormal" if value == 0 and 0 < x < 1 else "value"


def _label(number: float) -> str:
    if isinstance(number, int):
        return str(number)
    if math.isnan(number):
        return "NaN"
    return "-0.0" if repr(number) == "-0.0" else f"{number:.2g}"


def _zero_dimensional(formula: Formula, x: Any, xp: Any) -> list[Finding]:
    kind = type(x)
    try:
        y = formula.run(xp, x)
    except Exception as error:
        return [Finding("0-d", f"0-d: {_in_short(error)}")]
    return [] if isinstance(y, kind) else [Finding("0-d", "0-d gives a scalar")]


def _integers(formula: Formula, xp: Any) -> list[Finding]:
    try:
        y = formula.run(xp, xp.asarray(_INT32 * _TILES, dtype=xp.int32))
        came, dtype = _values(y), dtype_name(y.dtype)
    except Exception as error:
        return [Finding("integers", f"int32: {_in_short(error)}")]
    texts = [] if dtype == "int32" else [f"int32 becomes {dtype}"]
    texts += [f"{text} (int32)" for _, text in _differences(_INT32, came)]
    return [Finding("integers", text) for text in texts]


def _values(y: Any) -> list[float]:
    """Return the numbers of an array with one axis."""
    if array_api_compat.is_dask_array(y):
        y = y.compute()
    if hasattr(y, "tolist"):  # exact, and quick; the standard has it not
        return [value if isinstance(value, int) else float(value) for value in y.tolist()]
    return [float(y[k]) for k in range(y.shape[0])]


def _settled(y: Any) -> Any:
    """Return an array whose values are there."""
    if array_api_compat.is_dask_array(y):
        return y.persist()
    if array_api_compat.is_jax_array(y):
        return y.block_until_ready()
    if array_api_compat.is_cupy_array(y):
        import cupy

        cupy.cuda.get_current_stream().synchronize()
    elif array_api_compat.is_torch_array(y) and y.is_cuda:
        import torch

        torch.cuda.synchronize(y.device)
    return y


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as the command line has it, for example ``"5000x5000"``."""
    return "x".join(map(str, shape))


def _random(xp: Any, shape: Sequence[int], dtype: str, seed: int) -> Any:
    """Return the numbers that are timed; nothing of NumPy's is kept where `xp` is another."""
    drawn = np.float64 if dtype == "float64" else np.float32
    try:
        host = np.random.default_rng(seed).random(tuple(shape), drawn)
    except (OverflowError, ValueError) as error:
        lengths = ", ".join(map(str, shape))
        raise ValueError(f"no array can have the shape ({lengths}): {error}") from None
    host -= 0.5
    return _settled(xp.asarray(host, dtype=_dtype(xp, dtype)))


@contextmanager
def _memory(what: str) -> Iterator[None]:
    """Raise whatever a library raises where memory ends as a MemoryError of one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch and JAX raise a RuntimeError.
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        raise MemoryError(f"{what} does not fit in memory: {_in_short(error)}") from error


def _bar(total: int, title: str, progress: bool) -> Any:
    """Return tqdm's bar; where it is not installed, or not wanted, one that shows nothing."""
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, desc=title, unit="timing")
    return nullcontext(_NoBar())


class _NoBar:
    def update(self) -> None:
        """Do nothing."""


def _in_short(error: BaseException) -> str:
    """Return what an error says, in one line that is not long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return textwrap.shorten(text, _SENTENCE, placeholder=" ...")
