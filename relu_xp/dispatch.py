"""Array -> backend: the only place that knows which libraries exist.

An exact ``type(x)`` seen before costs one look-up in `BACKENDS`, and even that only once for each
activation and dtype (`Activation.served`). A new one goes to the backend of its library (the first
component of the name of its array namespace's module): one of ours, one that another package brings
through the entry-point group ``relu_xp.backends``, or the generic one. A backend's module is
imported when the first array of its library arrives.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Hashable
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any, NoReturn, cast

import array_api_compat
import numpy as np

from relu_xp.backends import Backend
from relu_xp.tracing import constant

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "BACKENDS",
    "COMPILED",
    "ENTRY_POINTS",
    "LIBRARIES",
    "LibraryError",
    "availability",
    "backend_for",
    "describe",
    "how_to_move",
    "kernels",
    "module_of",
    "namespace",
]

ENTRY_POINTS = "relu_xp.backends"

BACKENDS: dict[type, Backend] = {}

_BUILT_IN = {name: f"relu_xp.backends.{name}" for name in ("numpy", "cupy", "torch", "jax", "dask")}
COMPILED = "relu_xp.backends.native"  # for NumPy arrays, where there are compiled kernels
_GENERIC = "relu_xp.backends.generic"
_NAMES = {"numpy": "NumPy", "cupy": "CuPy", "torch": "PyTorch", "jax": "JAX", "dask": "Dask"}
_MODULES = {"jax": "jax.numpy", "dask": "dask.array"}

LIBRARIES = (*_NAMES, "array_api_strict")  # those that are tested; any other serves by its name


class LibraryError(ValueError):
    """A library that was asked for by name and cannot be had.

    Attributes
    ----------
    reason : str
        Why, in one line, without the name.
    """

    def __init__(self, name: str, reason: str, advice: str = "") -> None:
        super().__init__(f"backend {name!r} is {reason}{advice}")
        self.reason = reason


def backend_for(function: str, argument: str, x: Any) -> Backend:
    """Return the backend that serves an array.

    Parameters
    ----------
    function, argument : str
        Names for the message.
    x : array

    Returns
    -------
    Backend

    Raises
    ------
    TypeError
        If `x` is not an array, or a subclass of ``numpy.ndarray`` with rules of its own, or only
        says that it is NumPy's.
    """
    kind = type(x)
    _meet(kind)
    backend = BACKENDS.get(kind)
    if backend is None:
        backend = BACKENDS[kind] = _load(_library_of(function, argument, x))
    return backend


@constant
def _meet(kind: type) -> None:
    """Note what serves PyTorch's tensors: ``torch.compile`` cannot trace what finds it."""
    torch = sys.modules.get("torch")
    if torch is not None and kind not in BACKENDS and issubclass(kind, torch.Tensor):
        BACKENDS.update(dict.fromkeys((kind, torch.Tensor, torch.nn.Parameter), _load("torch")))


def describe(place: tuple[str, Hashable]) -> str:
    """Put a backend's ``place`` into words, for example "CuPy on device 0"."""
    library, device = place
    name = _NAMES.get(library, library)
    return name if device is None else f"{name} on device {device}"


def how_to_move(argument: str, source: tuple[str, Hashable], target: tuple[str, Hashable]) -> str:
    """Say how an array gets from one ``place`` to another."""
    if source[0] == target[0]:
        return f"move it to device {target[1]} first"
    if (source[0], target[0]) == ("cupy", "numpy"):
        return f"move it first, for example cupy.asnumpy({argument})"
    module = _MODULES.get(target[0], target[0])
    return f"move it first, for example {module}.asarray({argument})"


def namespace(name: str) -> Any:
    """Import an array library by name, and make an array to see that it works.

    Parameters
    ----------
    name : str
        Of the library's package, for example ``"cupy"`` or ``"jax"``.

    Returns
    -------
    module
        Its array API namespace, the one of array_api_compat where there is one.

    Raises
    ------
    LibraryError
        If it is not installed, does not work on this machine, or is not an array library.
    """
    module = _MODULES.get(name, name)
    try:
        if not name.isidentifier():
            raise ModuleNotFoundError(name=name)
        library = importlib.import_module(module)
        if not hasattr(library, "asarray"):
            raise LibraryError(name, "not an array API library")
        try:
            return array_api_compat.array_namespace(library.asarray([0.0]))
        except TypeError:
            raise LibraryError(name, "not an array API library") from None
    except LibraryError:
        raise
    except (Exception, SystemExit) as error:  # a broken installation, or driver, raises anything
        if isinstance(error, ModuleNotFoundError) and error.name in (name, module):
            here = (n for n in LIBRARIES if n != name and PathFinder.find_spec(n))
            advice = f"; there is {', '.join(here)}"
            raise LibraryError(name, "not installed", advice) from None
        raise LibraryError(name, f"not available: {_in_one_line(error)}") from error


def availability(name: str) -> str | None:
    """Return None if `namespace` would serve a library, else why not, in one line."""
    try:
        namespace(name)
    except LibraryError as error:
        return error.reason
    return None


def module_of(name: str) -> str:
    """Return the module of the backend that serves a library's arrays, without importing it."""
    entry_point = _third_party(name)
    if entry_point is not None:
        return entry_point.value
    if name == "numpy" and kernels().cpu is not None:
        return COMPILED
    return _BUILT_IN.get(name, _GENERIC)


def kernels() -> Any:
    """Return `relu_xp.kernels`, which loads the compiled module at the first call."""
    return importlib.import_module("relu_xp.kernels")


def _in_one_line(error: BaseException) -> str:
    """Return what an error says, or the one that caused it: CuPy wraps its own in a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if any(map(str.isalnum, line))), type(error).__name__)


def _library_of(function: str, argument: str, x: Any) -> str:
    kind = type(x)
    if kind in (np.ndarray, np.memmap):
        return "numpy"
    if issubclass(kind, np.ndarray):
        raise TypeError(
            f"{function}: {argument} is a {kind.__module__}.{kind.__qualname__}, whose own rules "
            f"(a mask, a shape) would be lost; convert it first, for example "
            f"numpy.asarray({argument})"
        )
    if issubclass(kind, np.generic):
        _refuse(function, argument, x)
    try:
        library = array_api_compat.array_namespace(x, use_compat=False)
        name = str(library.__name__).partition(".")[0]
        if name == "numpy":  # compiled code reads the very memory of NumPy's arrays
            raise TypeError(f"{kind.__name__} is not a class of NumPy")
        return name
    except Exception as error:  # whatever an object that is no array does when it is asked
        _refuse(function, argument, x, None if isinstance(error, TypeError) else error)


def _refuse(function: str, argument: str, x: Any, cause: Exception | None = None) -> NoReturn:
    kind = "the NumPy scalar " * issubclass(type(x), np.generic) + type(x).__name__
    raise TypeError(
        f"{function}: {argument} must be an array, got {kind}; "
        f"convert it first, for example numpy.asarray({argument})"
    ) from cause


def _load(library: str) -> Backend:
    entry_point = _third_party(library)
    if entry_point is not None:
        return cast(Backend, entry_point.load())
    return cast(Backend, importlib.import_module(module_of(library)))


def _third_party(library: str) -> EntryPoint | None:
    """Return the entry point of another package's backend; ours come first."""
    if library in _BUILT_IN:
        return None
    import importlib.metadata  # takes as long as all the rest of the package

    return next(iter(importlib.metadata.entry_points(group=ENTRY_POINTS, name=library)), None)
