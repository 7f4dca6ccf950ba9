"""The backend for an array, by the array's type: the libraries and their backends are listed here.

The exact type of an array that was seen before costs one lookup in `BACKENDS`. A new type goes to
the backend of its library (the first component of the name of its array namespace's module): a
built-in one, one that another package registers in the entry-point group ``relu_xp.backends``, or
`relu_xp.backends.base.Backend`, for any library of the array API standard. A backend's module is
imported when the first array of its library is passed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any, NoReturn

import array_api_compat
import numpy as np

from relu_xp import advice

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from relu_xp.backends.base import Backend

__all__ = [
    "BACKENDS",
    "ENTRY_POINTS",
    "LIBRARIES",
    "LibraryError",
    "availability",
    "backend_class",
    "backend_for",
    "backend_named",
    "format_device",
    "namespace",
    "transfer_hint",
]

ENTRY_POINTS = "relu_xp.backends"

BACKENDS: dict[type, Backend] = {}  # by the type of an array

_NAMES = {"numpy": "NumPy", "cupy": "CuPy", "torch": "PyTorch", "jax": "JAX", "dask": "Dask"}
_MODULES = {"jax": "jax.numpy", "dask": "dask.array"}

# How an array becomes one of NumPy, and that an array of the library (else by `asarray`).
_TO_NUMPY = {
    "numpy": "{}",
    "cupy": "cupy.asnumpy({})",
    "torch": "{}.numpy(force=True)",  # also where autograd records it, or on another device
    "dask": "{}.compute()",
}
_FROM_NUMPY = {"numpy": "{}", "torch": "torch.asarray({}.copy(), device='{device}')"}

# Floating dtypes that a library lacks; one that is not known may lack all of 16 bits.
_HALF = ("float16", "bfloat16")
_NO_DTYPES: dict[str, tuple[str, ...]] = {**dict.fromkeys(_NAMES, ()), "torch": ("bfloat16",)}

LIBRARIES = (*_NAMES, "array_api_strict")  # that are tested; others work too


class LibraryError(ValueError):
    """A library that was asked for by name is not available.

    Attributes
    ----------
    reason : str
        Why, in one line, without the name.
    """

    def __init__(self, name: str, reason: str, advice: str = "") -> None:
        super().__init__(f"backend {name!r} is {reason}{advice}")
        self.reason = reason


def backend_for(function: str, argument: str, x: Any) -> Backend:
    """Return the backend for an array.

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
        If `x` is not an array, is of a subclass of ``numpy.ndarray`` other than ``numpy.memmap``,
        or has NumPy's array API namespace without being an ndarray.
    """
    kind = type(x)
    backend = BACKENDS.get(kind)
    if backend is None:
        backend = BACKENDS[kind] = backend_named(_library_of(function, argument, x))
    return backend


def format_device(device: tuple[str, Hashable]) -> str:
    """Return a backend's ``device`` in words, for example "CuPy on device 0"."""
    library, number = device
    name = _NAMES.get(library, library)
    return name if number is None else f"{name} on device {number}"


def transfer_hint(
    argument: str, source: tuple[str, Hashable], target: tuple[str, Hashable], dtype: Any
) -> str:
    """Return how an array of some dtype is moved from one ``device`` to another."""
    if argument in advice.WRITTEN:
        return f"give an array of {format_device(target)}"
    library, device = target
    if source[0] == library:
        return f"move it to device {device} first"
    expression, dtype_name = advice.as_operand(argument), str(dtype).rpartition(".")[2]
    if (source[0], dtype_name) == ("torch", "bfloat16"):  # which `Tensor.numpy` refuses
        expression, dtype_name = f"{expression}.float()", "float32"
    expression = _TO_NUMPY.get(source[0], "numpy.asarray({})").format(expression)
    if dtype_name in _NO_DTYPES.get(library, _HALF):
        expression += ".astype('float32')"
    module = _MODULES.get(library, library)
    made = _FROM_NUMPY.get(library, module + ".asarray({})").format(expression, device=device)
    return f"move it first, for example {made}"


def namespace(name: str) -> Any:
    """Import an array library by name, and make an array to see that it works.

    Parameters
    ----------
    name : str
        The library's package, for example ``"cupy"`` or ``"jax"``.

    Returns
    -------
    module
        Its array API namespace, that of array_api_compat where there is one.

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
            advice = f"; installed are {', '.join(here)}"
            raise LibraryError(name, "not installed", advice) from None
        raise LibraryError(name, f"not available: {_first_line(error)}") from error


def availability(name: str) -> str | None:
    """Return None if `namespace` returns a library, else why not, in one line."""
    try:
        namespace(name)
    except LibraryError as error:
        return error.reason
    return None


def backend_class(library: str) -> type[Backend]:
    """Return the class of the backend for a library's arrays.

    Raises
    ------
    ImportError
        If the library is not installed, or another package's backend cannot be imported.
    TypeError
        If another package's entry point is not a subclass of ``Backend``.
    """
    if library in _BUILT_IN:
        return _BUILT_IN[library]()
    from relu_xp.backends.base import Backend

    entry_point = _third_party(library)
    if entry_point is None:
        return Backend
    found = entry_point.load()
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise TypeError(
            f"entry point {library} = {entry_point.value!r} of the group {ENTRY_POINTS} must be a "
            "subclass of relu_xp.backends.base.Backend"
        )
    return found


# The imports are literal, so that tools which collect a program's modules find them.


def _numpy() -> type[Backend]:
    from relu_xp import kernels

    if kernels.cpu is not None:
        from relu_xp.backends.compiled import CompiledBackend

        return CompiledBackend
    from relu_xp.backends.numpy import NumpyBackend

    return NumpyBackend


def _cupy() -> type[Backend]:
    from cupy.cuda import runtime

    from relu_xp.backends.cupy import CupyBackend, CupyOperations

    return CupyOperations if runtime.is_hip else CupyBackend


def _torch() -> type[Backend]:
    from relu_xp.backends.torch import TorchBackend

    return TorchBackend


def _jax() -> type[Backend]:
    from relu_xp.backends.jax import JaxBackend

    return JaxBackend


def _dask() -> type[Backend]:
    from relu_xp.backends.dask import DaskBackend

    return DaskBackend


_BUILT_IN: dict[str, Callable[[], type[Backend]]] = {
    "numpy": _numpy,
    "cupy": _cupy,
    "torch": _torch,
    "jax": _jax,
    "dask": _dask,
}


@functools.cache
def backend_named(library: str) -> Backend:
    """Return the backend for a library's arrays, always the same one."""
    backend = backend_class(library)()
    backend.library = library
    return backend


def _third_party(library: str) -> EntryPoint | None:
    import importlib.metadata  # takes as long to import as the rest of the package

    return next(iter(importlib.metadata.entry_points(group=ENTRY_POINTS, name=library)), None)


def _first_line(error: BaseException) -> str:
    """Return the message of an error, or of its first cause: CuPy's message is a page long."""
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
            f"(a mask, a shape) would be lost{advice.about_subclass(argument, x)}"
        )
    if issubclass(kind, np.generic):
        _refuse(function, argument, x)
    try:
        library = array_api_compat.array_namespace(x, use_compat=False)
        name = str(library.__name__).partition(".")[0]
        if name == "numpy":  # compiled code reads the memory of a NumPy array
            raise TypeError(f"{kind.__name__} is not a class of NumPy")
        return name
    except Exception as error:  # an object that is no array may raise anything
        _refuse(function, argument, x, None if isinstance(error, TypeError) else error)


def _refuse(function: str, argument: str, x: Any, cause: Exception | None = None) -> NoReturn:
    kind = "the NumPy scalar " * issubclass(type(x), np.generic) + type(x).__name__
    raise TypeError(
        f"{function}: {argument} must be an array, got {kind}{advice.about_object(argument, x)}"
    ) from cause
