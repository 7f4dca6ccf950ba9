"""Which backend serves an array, what is imported for it, and the errors where there is none."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
import types

import numpy as np
import pytest

import relu_xp
from relu_xp import dispatch
from relu_xp.backends.base import Backend

HEAVY = "cupy dask distributed torch jax matplotlib sklearn tqdm scipy"
LOADED = f"print(*sorted(set({HEAVY.split()!r}) & set(sys.modules)))"


@pytest.fixture
def no_backends(monkeypatch):
    """No type of array has been seen, and no entry point."""
    monkeypatch.setattr(dispatch, "BACKENDS", {})
    again = functools.cache(dispatch.backend_named.__wrapped__)
    monkeypatch.setattr(dispatch, "backend_named", again)


# ---- Imports -------------------------------------------------------------------------------------


def test_nothing_large_is_imported_for_numpy(python, require):
    use = "import sys, numpy, relu_xp\nrelu_xp.ReLU().forward(numpy.ones(3))\n"
    assert python(use + LOADED) == "\n"
    require("tqdm")
    assert python(f"import sys, tqdm\n{LOADED}") == "tqdm\n", "the test can fail"


@pytest.mark.parametrize(
    ("variable", "error", "reason"),
    [
        *((variable, None, "") for variable in (None, "1", "")),
        ("0", None, "switched off by RELU_XP_NATIVE=0"),
        (None, "ModuleNotFoundError('no such module')", "not compiled: no C++ compiler when"),
        (None, "ImportError('version GLIBCXX')", "not loaded: version GLIBCXX"),
    ],
)
def test_numpy_is_served_with_the_compiled_module_or_without(
    native, python, variable, error, reason
):
    script = f"""
        import sys

        class Finder:
            def find_spec(name, path=None, target=None):
                if name == "relu_xp.kernels._cpu":
                    raise {error}

        if {error}:
            sys.meta_path.insert(0, Finder)
        import numpy
        import relu_xp

        assert "relu_xp.kernels" not in sys.modules, "before the first array"
        assert relu_xp.relu(numpy.array([-1.0, 2.0])).tolist() == [0, 2]
        print(type(relu_xp.dispatch.backend_for("f", "x", numpy.ones(1))).__name__)
        print(*sorted({{"relu_xp.backends.compiled", "relu_xp.kernels._cpu"}} & set(sys.modules)))
        print(relu_xp.kernels.reason)
    """
    backend, modules, found = python(script, RELU_XP_NATIVE=variable).split("\n")[:3]
    assert backend == ("NumpyBackend" if reason else "CompiledBackend")
    assert modules == ("" if reason else "relu_xp.backends.compiled relu_xp.kernels._cpu")
    assert found.startswith(reason)


# ---- Backends ------------------------------------------------------------------------------------


def test_each_library_has_its_backend(xp):
    backend = dispatch.backend_for("f", "x", xp.array(np.ones(2, np.float32)))
    assert type(backend).__name__ == xp.backend
    assert isinstance(backend, Backend)


def test_a_type_is_looked_up_once(no_backends, monkeypatch, tmp_path):
    loaded = []
    load = dispatch.backend_named
    monkeypatch.setattr(dispatch, "backend_named", lambda name: loaded.append(name) or load(name))
    memmap = np.memmap(tmp_path / "x", np.float32, "w+", shape=3)
    for _ in range(2):
        for x in (np.ones(3), memmap):
            assert type(dispatch.backend_for("f", "x", x)) is dispatch.backend_class("numpy")
    assert loaded == ["numpy", "numpy"]
    assert set(dispatch.BACKENDS) == {np.ndarray, np.memmap}


class NewArray:
    """An array of a library that has no backend of its own."""

    dtype = "float32"

    def __init__(self, host):
        self.host = host
        self.shape = host.shape

    def __array_namespace__(self, api_version=None):
        return types.ModuleType("new_library.api.v1")


def entry_point(monkeypatch, found):
    """Let another package serve `new_library` and NumPy; return what is looked up."""
    asked = []

    def entry_points(*, group, name):
        asked.append((group, name))
        point = types.SimpleNamespace(load=lambda: found, value="module:Class")
        return [point] if name in ("new_library", "numpy") else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    return asked


class NewBackend(Backend):
    def forward(self, params, x, out):
        return x, "forward"

    def forward_with_mask(self, params, x, out, mask):
        return x, "residuals"

    def backward(self, grad_params, dy, residuals, out):
        return dy, residuals

    def device(self, x):
        return "new_library", "cpu:0"


def test_another_package_brings_a_backend(no_backends, monkeypatch):
    """It is found by the first component of the name of the array namespace."""
    asked = entry_point(monkeypatch, NewBackend)
    x = NewArray(np.ones(3))
    for _ in range(2):
        assert relu_xp.relu(x) == (x, "forward")
        y, pullback = relu_xp.relu_vjp(x)
        assert y is x
        assert pullback(x) == (x, "residuals")
    with pytest.raises(TypeError, match="saw new_library on device cpu:0, dy is NumPy; .*new_lib"):
        pullback(np.ones(3))
    assert asked == [("relu_xp.backends", "new_library")]
    assert dispatch.backend_class("new") is Backend, "of a library that has no other"
    assert dispatch.backend_class("numpy") is not NewBackend, "what is built in comes first"


@pytest.mark.parametrize("found", [NewBackend(), NewArray, None], ids=["instance", "class", "None"])
def test_what_another_package_brings_is_a_subclass(no_backends, monkeypatch, found):
    entry_point(monkeypatch, found)
    with pytest.raises(TypeError, match="new_library = .*must be a subclass of .*Backend"):
        dispatch.backend_class("new_library")


def test_dtypes_of_two_libraries_are_not_compared(require):
    """array_api_strict warns when a dtype of its own is compared with one of NumPy's."""
    strict = require("array_api_strict")
    for dtype in ("float32", "float64"):
        relu_xp.relu(np.ones(2, dtype), threshold=0.125)
        relu_xp.relu(strict.ones(2, dtype=getattr(strict, dtype)), threshold=0.125)


@pytest.mark.parametrize(("is_hip", "name"), [(False, "CupyBackend"), (True, "CupyOperations")])
def test_the_kernels_of_cupy_are_not_for_amd_gpus(require, monkeypatch, is_hip, name):
    monkeypatch.setattr(require("cupy").cuda.runtime, "is_hip", is_hip)
    monkeypatch.setattr(dispatch, "availability", lambda name: name != "cupy" and "not asked for")
    assert dispatch.backend_class("cupy").__name__ == name
    with contextlib.redirect_stdout(io.StringIO()) as out:
        relu_xp.show_versions()
    assert re.search(rf"^  cupy +relu_xp\.backends\.cupy\.{name}$", out.getvalue(), re.MULTILINE)


def test_bfloat16_on_an_amd_gpu_is_refused(require, monkeypatch, no_backends):
    """CuPy's own operations make float32 of it; the array here is of this machine's memory."""
    cupy, ml_dtypes = require("cupy"), require("ml_dtypes")
    monkeypatch.setattr(cupy.cuda.runtime, "is_hip", True)
    host = np.ones(3, ml_dtypes.bfloat16)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, device_id=1)
    x = cupy.ndarray(host.shape, host.dtype, cupy.cuda.MemoryPointer(memory, 0))
    with pytest.raises(TypeError, match=r"^relu: x: bfloat16 .*AMD GPU; .*astype\('float32'\)$"):
        relu_xp.relu(x)
    backend = dispatch.backend_named("cupy")
    assert backend.device(x) == ("cupy", 1)
    assert backend.dtype_name(np.dtype("float16")) == "float16"


# ---- Libraries by name ---------------------------------------------------------------------------


def error_of(name):
    """Return the reason why a library is not available, and the advice after it."""
    with pytest.raises(dispatch.LibraryError) as refused:
        dispatch.namespace(name)
    reason = refused.value.reason
    assert dispatch.availability(name) == reason
    assert str(refused.value).startswith(f"backend {name!r} is {reason}")
    return reason, str(refused.value).removeprefix(f"backend {name!r} is {reason}")


def broken(monkeypatch, **attributes):
    """Return the reason and advice about a module with some attributes."""
    module = types.ModuleType("broken")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "broken", module)
    return error_of("broken")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(("numpy", "array_api_compat.numpy"), ("torch", "array_api_compat.torch")),
        *(("jax", "jax.numpy"), ("dask", "array_api_compat.dask.array")),
        ("array_api_strict", "array_api_strict"),
    ],
)
def test_the_namespace_of_a_library(require, name, module):
    require(name)
    assert dispatch.namespace(name).__name__ == module
    assert dispatch.availability(name) is None


@pytest.mark.parametrize("name", ["no_such", "no such", "", "a.b", "../numpy", "jax"])
def test_a_library_that_is_not_installed(monkeypatch, name):
    found = {"numpy", "jax", "array_api_strict"}
    finder = types.SimpleNamespace(find_spec=lambda name: name in found or None)
    monkeypatch.setattr(dispatch, "PathFinder", finder)
    for module in ("jax", "jax.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    reason, advice = error_of(name)
    assert reason == "not installed"
    assert advice.endswith(
        " numpy, array_api_strict" if name == "jax" else " jax, array_api_strict"
    )


def test_a_module_that_is_no_array_library(monkeypatch):
    assert broken(monkeypatch) == ("not an array API library", "")
    assert broken(monkeypatch, asarray=list) == ("not an array API library", "")


def caused_by(cause, error):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no driver"), "no driver"),
        (RuntimeError("\n====\n  no driver: install one\n\nread the manual"), "no driver: install"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("\n---\n"), "RuntimeError"),
        (SystemExit("stop"), "stop"),
        (ModuleNotFoundError("No module named 'dep'", name="dep"), "No module named 'dep'"),
        (
            caused_by(caused_by(OSError("no libcuda"), ImportError("a")), RuntimeError("b")),
            "no libcuda",
        ),
    ],
    ids=["line", "page", "empty", "rule", "exit", "dependency", "causes"],
)
def test_a_library_that_does_not_work(monkeypatch, error, reason):
    """The reason is one line: the first of the first cause."""

    def asarray(x):
        assert x == [0.0]
        raise error from error.__cause__

    found, advice = broken(monkeypatch, asarray=asarray)
    assert found.startswith(f"not available: {reason}")
    assert "\n" not in found
    assert advice == ""


def test_devices_in_words():
    names = {"numpy": "NumPy", "cupy": "CuPy", "torch": "PyTorch", "jax": "JAX", "dask": "Dask"}
    for library, name in {**names, "other": "other"}.items():
        assert dispatch.format_device((library, None)) == name
        assert dispatch.format_device((library, "x:1")) == f"{name} on device x:1"
