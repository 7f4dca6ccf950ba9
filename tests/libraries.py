"""The libraries that the conformance suite runs over, each behind the same few functions."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import shutil
import warnings
from unittest import mock

import numpy as np
import pytest

FLOATING = ("float16", "bfloat16", "float32", "float64")


class Library:
    """NumPy without compiled kernels, and what the others are told by.

    Attributes
    ----------
    dtypes : tuple of str
        The floating dtypes that the library has.
    subnormals : bool
        Whether its own operations keep them (rule F4: the generic backend can do no better).
    payloads : bool
        Whether its own select keeps the payload of a NaN (rule F2, likewise).
    strided : bool
        Whether `array` keeps strides of any kind, and memory; such a library has a packed mask.
    writable : bool
        Whether an array can be an ``out``.
    ndarray, compiled : bool
        Whether arrays are NumPy's, whether the compiled kernels serve them.
    """

    name = "numpy"
    dtypes = FLOATING
    subnormals = True
    payloads = True
    strided = True
    writable = True
    gpu = False
    backend = "numpy"  # that is to serve its arrays

    @property
    def ndarray(self):
        return self.backend in ("numpy", "native")

    @property
    def compiled(self):
        return self.backend == "native"

    def load(self):
        """Import the library; return why it cannot be, or None."""
        return

    def array(self, host):
        """Return an array of the library with a NumPy array's values, dtype and, if `strided`,
        memory."""
        return host

    def numpy(self, x):
        """Return a NumPy array with an array's values and dtype."""
        assert type(x) is np.ndarray
        return x

    def running(self):
        """Return the context manager that a test of the library runs in."""
        if self.ndarray:
            return serving_numpy(f"relu_xp.backends.{self.backend}")
        return contextlib.nullcontext()


class Native(Library):
    """NumPy arrays by the compiled kernels."""

    name = "native"
    backend = "native"

    def load(self):
        from relu_xp import kernels

        return kernels.reason or None


class Streaming(Native):
    """The same, as for arrays beyond the caches: every call by two threads past the caches."""

    name = "native_streaming"

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
def serving_numpy(module):
    """Let a backend serve NumPy arrays, and no other."""
    from relu_xp import activation, dispatch

    def forget():
        activation._RELU.served.clear()
        activation._activation.cache_clear()

    backend = importlib.import_module(module)
    forget()
    with mock.patch.dict(dispatch.BACKENDS, {np.ndarray: backend, np.memmap: backend}):
        yield
    forget()


class ArrayApiStrict(Library):
    name = "array_api_strict"
    backend = "generic"
    dtypes = ("float32", "float64")
    strided = False

    def load(self):
        return _missing("array_api_strict")

    @contextlib.contextmanager
    def running(self):
        """Let NumPy warn of what overflows or meets a signalling NaN: it is inside."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(overflow|invalid value) encountered in")
            yield

    def array(self, host):
        import array_api_strict

        return array_api_strict.asarray(host.copy(order="K"))

    def numpy(self, x):
        import array_api_strict

        assert type(x) is type(array_api_strict.asarray(0.0))
        return np.from_dlpack(x)


class Torch(Library):
    name = "torch"
    backend = "torch"
    strided = False

    def load(self):
        return _missing("torch")

    def array(self, host):
        import torch

        host = host.copy(order="K")
        if host.dtype.name == "bfloat16":
            return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(host)

    def numpy(self, x):
        import torch

        assert type(x) is torch.Tensor
        if x.dtype == torch.bfloat16:
            import ml_dtypes

            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()


class TorchElsewhere(Torch):
    """The same, as for tensors that NumPy cannot see: a GPU's, and whatever is being traced."""

    name = "torch_elsewhere"

    def running(self):
        from relu_xp.backends import torch

        return mock.patch.object(torch, "_views", return_value=None)


class Jax(Library):
    name = "jax"
    backend = "jax"
    subnormals = False
    payloads = False  # of bfloat16: XLA selects in float32
    strided = False
    writable = False

    def load(self):
        reason = _missing("jax")
        if reason is None:
            import jax

            jax.config.update("jax_enable_x64", True)
        return reason

    def array(self, host):
        import jax.numpy as jnp

        return jnp.asarray(host)

    def numpy(self, x):
        import jax

        assert isinstance(x, jax.Array)
        return np.asarray(x)


class Dask(Library):
    """NumPy arrays cut into chunks, several along each axis."""

    name = "dask"
    backend = "dask"
    strided = False
    writable = False

    def load(self):
        return _missing("dask.array")

    def array(self, host):
        import dask.array

        return dask.array.from_array(
            host.copy(order="K"), chunks=tuple(-(-n // 2) or 1 for n in host.shape)
        )

    def numpy(self, x):
        import dask.array

        assert type(x) is dask.array.Array
        computed = x.compute()
        scalar = x.ndim == 0 and x.name.startswith("getitem-")  # which Dask's own indexing makes
        assert type(computed) is np.ndarray or scalar
        assert (computed.shape, computed.dtype) == (x.shape, x.dtype)
        return np.asarray(computed)


class CupyHost(Library):
    """CuPy's arrays over host memory, its kernels compiled with g++: see cupy_host.py."""

    name = "cupy_host"
    backend = "cupy"

    def load(self):
        if shutil.which("g++") is None:
            return "g++ is not installed"
        for module in ("cupy", "cuda.pathfinder"):
            if reason := _missing(module):
                return reason
        from cuda.pathfinder import find_nvidia_header_directory

        if find_nvidia_header_directory("cudart") is None:
            return "the CUDA headers are not installed"
        return None

    def array(self, host):
        import cupy_host

        return cupy_host.array(host)

    def numpy(self, x):
        import cupy
        import cupy_host

        assert type(x) is cupy.ndarray
        return cupy_host.to_numpy(x)

    def running(self):
        import cupy_host

        return cupy_host.installed()


class Cupy(Library):
    name = "cupy"
    backend = "cupy"
    gpu = True

    def load(self):
        if reason := _missing("cupy"):
            return reason
        import cupy

        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return f"no CUDA device: {error}"
        return None if count else "no CUDA device"

    def array(self, host):
        """Copy the whole memory under a view, and view the copy likewise."""
        import cupy

        if host.size == 0:
            return cupy.empty(host.shape, host.dtype)
        low, high = np.lib.array_utils.byte_bounds(host)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        pointer = cupy.asarray(memory).data + (host.__array_interface__["data"][0] - low)
        return cupy.ndarray(host.shape, host.dtype, pointer, strides=host.strides)

    def numpy(self, x):
        import cupy

        assert type(x) is cupy.ndarray
        return cupy.asnumpy(x)


_ALL = (
    Library,
    Native,
    Streaming,
    ArrayApiStrict,
    Torch,
    TorchElsewhere,
    Jax,
    Dask,
    CupyHost,
    Cupy,
)
LIBRARIES = {library.name: library() for library in _ALL}


def _missing(module):
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} is not installed: {error}"
    return None


def parameter(library, *rest):
    """Return a pytest parameter for a library; marked if it needs a GPU."""
    marks = [pytest.mark.gpu] if library.gpu else []
    return pytest.param(library, *rest, marks=marks, id="-".join((library.name, *rest)))
