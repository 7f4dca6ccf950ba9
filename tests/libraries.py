"""The libraries that the tests run over, each behind the same few functions."""

from __future__ import annotations

import abc
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import warnings
from unittest import mock

import numpy as np
import pytest

FLOATING = ("float16", "bfloat16", "float32", "float64")


class Library(abc.ABC):
    """A library of arrays, and how the tests use it.

    Attributes
    ----------
    name : str
    requires : tuple of str
        The modules that must be installed; `module` is the first of them.
    dtypes : tuple of str
        Its floating dtypes.
    only_rules : bool
        Whether only tests of a dtype run over it: those of the conformance suite, and those that
        name it.
    subnormals, payloads : bool
        Whether its own operations keep subnormals (rule F4: `Backend` can do no better), and its
        ``where`` the payload of a NaN (rule F2, likewise).
    strided : bool
        Whether `array` keeps strides of any kind; such a library has a packed mask.
    writable : bool
        Whether an array can be an ``out``.
    gpu, ndarray, compiled : bool
        Whether it needs a CUDA device, has NumPy's arrays, is served by the compiled kernels.
    backend : str
        Name of the class of the backend.
    """

    name: str
    requires: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATING
    only_rules = False
    subnormals = True
    payloads = True
    strided = True
    writable = True
    gpu = False
    ndarray = False
    compiled = False
    backend: str

    @functools.cached_property
    def reason(self):
        """Why the library cannot be used, or None; found without importing a large module."""
        absent = (module for module in self.requires if not installed(module))
        return next((f"{module} is not installed" for module in absent), None)

    @property
    def module(self):
        return importlib.import_module(self.requires[0])

    def load(self):
        """Import the library and prepare it; return why it cannot be used, or None."""
        return self.reason

    @abc.abstractmethod
    def array(self, host):
        """Return an array with a NumPy array's values, dtype and, if `strided`, layout."""

    @abc.abstractmethod
    def numpy(self, x):
        """Return a NumPy array with an array's values and dtype."""

    def running(self):
        """Return the context manager that a test of the library runs in."""
        return contextlib.nullcontext()


class Numpy(Library):
    """NumPy without compiled kernels."""

    name = "numpy"
    ndarray = True
    backend = "NumpyBackend"

    def array(self, host):
        return host

    def numpy(self, x):
        assert type(x) is np.ndarray
        return x

    def running(self):
        from relu_xp.backends.numpy import NumpyBackend

        return serving_numpy(NumpyBackend)


class Compiled(Numpy):
    """NumPy arrays by the compiled kernels."""

    name = "compiled"
    compiled = True
    backend = "CompiledBackend"

    @functools.cached_property
    def reason(self):
        from relu_xp import kernels

        return kernels.reason or None

    def running(self):
        from relu_xp.backends.compiled import CompiledBackend

        return serving_numpy(CompiledBackend)


class CompiledStreaming(Compiled):
    """The same, with the code for arrays beyond the caches: two threads, streaming stores."""

    name = "compiled_streaming"

    @contextlib.contextmanager
    def running(self):
        from relu_xp.kernels import cpu

        limits, threads = cpu.set_limits(0, 0, 0), cpu.get_num_threads()
        cpu.set_num_threads(2)
        try:
            with super().running():
                yield
        finally:
            cpu.set_limits(*limits)
            cpu.set_num_threads(threads)


@contextlib.contextmanager
def serving_numpy(backend_class):
    """Serve NumPy arrays by an instance of a backend class, which the context manager returns."""
    from relu_xp import dispatch, validation

    backend = backend_class()
    backend.library = "numpy"
    validation._RESOLVED.clear(), validation._LATEST.clear()
    with mock.patch.dict(dispatch.BACKENDS, {np.ndarray: backend, np.memmap: backend}):
        yield backend
    validation._RESOLVED.clear(), validation._LATEST.clear()


class ArrayApiStrict(Library):
    name = "array_api_strict"
    requires = ("array_api_strict",)
    backend = "Backend"
    dtypes = ("float32", "float64")
    strided = False

    @contextlib.contextmanager
    def running(self):
        """Ignore NumPy's warnings of an overflow or a signalling NaN: it computes inside."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(overflow|invalid value) encountered in")
            yield

    def array(self, host):
        return self.module.asarray(host.copy(order="K"))

    def numpy(self, x):
        assert type(x) is type(self.module.asarray(0.0))
        return np.from_dlpack(x)


class Torch(Library):
    name = "torch"
    requires = ("torch",)
    backend = "TorchBackend"
    strided = False

    def array(self, host):
        host = host.copy(order="K")
        if host.dtype.name == "bfloat16":
            return self.module.from_numpy(host.view(np.int16)).view(self.module.bfloat16)
        return self.module.from_numpy(host)

    def numpy(self, x):
        assert type(x) is self.module.Tensor
        if x.dtype == self.module.bfloat16:
            import ml_dtypes

            return x.view(self.module.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()


class TorchElsewhere(Torch):
    """The same without access to the memory, as for tensors on a GPU or while being traced."""

    name = "torch_elsewhere"

    def running(self):
        from relu_xp.backends.torch import TorchBackend

        return mock.patch.object(TorchBackend, "_views", return_value=None)


class Jax(Library):
    name = "jax"
    requires = ("jax",)
    backend = "JaxBackend"
    subnormals = False
    payloads = False  # of bfloat16: XLA selects in float32
    strided = False
    writable = False

    def load(self):
        if self.reason is None:
            self.module.config.update("jax_enable_x64", True)
        return self.reason

    def array(self, host):
        return self.module.numpy.asarray(host)

    def numpy(self, x):
        assert isinstance(x, self.module.Array)
        return np.asarray(x)


class Dask(Library):
    """NumPy arrays cut into chunks, several along each axis."""

    name = "dask"
    requires = ("dask",)
    backend = "DaskBackend"
    strided = False
    writable = False

    def array(self, host):
        import dask.array

        chunks = tuple(-(-n // 2) or 1 for n in host.shape)
        return dask.array.from_array(host.copy(order="K"), chunks=chunks)

    def numpy(self, x):
        import dask.array

        assert type(x) is dask.array.Array
        computed = x.compute()
        scalar = x.ndim == 0 and x.name.startswith("getitem-")  # which Dask's own indexing makes
        assert type(computed) is np.ndarray or scalar
        assert (computed.shape, computed.dtype) == (x.shape, x.dtype)
        return np.asarray(computed)


class CupyHost(Library):
    """CuPy's arrays over host memory, the PTX of its kernels executed: see cupy_host.py."""

    name = "cupy_host"
    requires = ("cupy", "cuda.pathfinder")
    backend = "CupyBackend"

    @functools.cached_property
    def reason(self):
        if reason := super().reason:
            return reason
        from cuda.pathfinder import find_nvidia_header_directory

        if find_nvidia_header_directory("cudart") is None:
            return "the CUDA headers are not installed"
        return None

    def array(self, host):
        import cupy_host

        return cupy_host.array(host)

    def numpy(self, x):
        import cupy_host

        assert type(x) is self.module.ndarray
        return cupy_host.to_numpy(x)

    def running(self):
        import cupy_host

        return cupy_host.installed()


class CupyHost75(CupyHost):
    """The same as compiled for sm_75, which rounds to bfloat16 by other code; all else is equal."""

    name = "cupy_host_75"
    dtypes = ("bfloat16",)
    only_rules = True
    architecture = 75

    @contextlib.contextmanager
    def running(self):
        import cupy_host

        change = mock.patch.object(cupy_host, "architecture", self.architecture)
        with change, super().running() as launches:
            yield launches


class CupyHost120(CupyHost75):
    """The same for sm_120, which NVRTC compiles with a newer LLVM."""

    name = "cupy_host_120"
    dtypes = FLOATING
    architecture = 120


class Cupy(Library):
    name = "cupy"
    requires = ("cupy",)
    backend = "CupyBackend"
    gpu = True

    @functools.cached_property
    def reason(self):
        if reason := super().reason:
            return reason
        runtime = self.module.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            return f"no CUDA device: {error}"
        return None if count else "no CUDA device"

    def array(self, host):
        """Copy the whole memory under a view, and return the same view of the copy."""
        cupy = self.module
        if host.size == 0:
            return cupy.empty(host.shape, host.dtype)
        low, high = np.lib.array_utils.byte_bounds(host)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        pointer = cupy.asarray(memory).data + (host.__array_interface__["data"][0] - low)
        return cupy.ndarray(host.shape, host.dtype, pointer, strides=host.strides)

    def numpy(self, x):
        assert type(x) is self.module.ndarray
        return self.module.asnumpy(x)


_ALL = (Numpy, Compiled, CompiledStreaming, ArrayApiStrict, Torch, TorchElsewhere, Jax, Dask)
LIBRARIES = {
    library.name: library() for library in (*_ALL, CupyHost, CupyHost75, CupyHost120, Cupy)
}


def installed(module):
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is absent; None in sys.modules
        return False


def unavailable(config, reason, gpu=False):
    """Skip a test with a visible reason, or fail it where the options ask for that."""
    if config.getoption("--require-gpu" if gpu else "--no-skip"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def parameter(library, *rest):
    """Return a pytest parameter for a library; marked if it needs a GPU."""
    marks = [pytest.mark.gpu] if library.gpu else []
    return pytest.param(library, *rest, marks=marks, id="-".join((library.name, *rest)))
