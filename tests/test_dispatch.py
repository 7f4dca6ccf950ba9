"""Which backend serves, what is loaded for it, and what a library that traces sees."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

import relu_xp
from relu_xp import dispatch
from relu_xp.backends import Backend, generic
from relu_xp.backends import llvm as llvm_backend
from relu_xp.backends import numpy as numpy_backend
from relu_xp.testing.conformance import check_signatures

HEAVY = (
    "cupy",
    "llvmlite",
    "dask",
    "distributed",
    "torch",
    "jax",
    "matplotlib",
    "sklearn",
    "tqdm",
    "scipy",
)


def loaded_after(statement):
    """Return which heavy modules a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy():
    use = "import numpy, relu_xp; relu_xp.ReLU().forward(numpy.ones(3))"
    assert loaded_after(use) == set()


def test_the_check_of_imports_can_fail(require):
    require("tqdm")
    assert loaded_after("import relu_xp, tqdm") == {"tqdm"}


def test_signatures_equal_the_protocols(require):
    modules = [numpy_backend, llvm_backend, generic]
    modules += [require(f"relu_xp.backends.{name}") for name in ("cupy", "torch", "jax", "dask")]
    wanted = [name for name in vars(Backend) if inspect.isfunction(vars(Backend)[name])]
    wanted = sorted(name for name in wanted if not name.startswith("_"))
    for module in modules:
        assert sorted(module.__all__) == wanted, module.__name__
        check_signatures(module)


def test_each_library_has_its_backend(xp):
    backend = dispatch.backend_for("f", "x", xp.array(np.ones(2, np.float32)))
    assert backend.__name__ == f"relu_xp.backends.{xp.backend}"


class Foreign:
    """An array of a library that nobody knows: a NumPy array in a coat."""

    dtype = "float32"

    def __init__(self, host):
        self.host = host

    @property
    def shape(self):
        return self.host.shape

    def __array_namespace__(self, api_version=None):
        return types.ModuleType("foreign_arrays.api")


@pytest.fixture
def entry_point(monkeypatch):
    """A third party's backend, found by the first component of its namespace's name."""
    calls = []

    def record(name):
        def function(*arguments):
            calls.append(name)
            return ("foreign", "cpu:0") if name == "place" else (arguments[1], name)

        return function

    names = ("forward", "forward_saving", "backward", "place")
    backend = types.SimpleNamespace(**{name: record(name) for name in names})
    backend.dtype_name = str
    point = types.SimpleNamespace(load=lambda: backend)

    def entry_points(*, group, name):
        return [point] if (group, name) == ("relu_xp.backends", "foreign_arrays") else []

    monkeypatch.setattr(dispatch.importlib.metadata, "entry_points", entry_points)
    yield calls
    dispatch.BACKENDS.pop(Foreign, None)


def test_a_third_party_adds_its_own(entry_point):
    x = Foreign(np.ones(3))
    assert relu_xp.relu(x) == (x, "forward")
    y, pullback = relu_xp.relu_vjp(x)
    assert y is x
    assert pullback(x) == (x, "backward")
    with pytest.raises(TypeError, match="saw foreign on device cpu:0, dy is NumPy; .*foreign.asar"):
        pullback(np.ones(3))
    assert entry_point.count("forward") == 1


def test_an_unknown_library_is_generic():
    class Unknown(Foreign):
        pass

    assert dispatch.backend_for("f", "x", Unknown(np.ones(1))) is generic
    assert dispatch.BACKENDS.pop(Unknown) is generic


@pytest.mark.parametrize("namespace", [None, 3, RuntimeError("no"), AttributeError("no")])
def test_what_only_pretends_to_be_an_array_is_refused(namespace):
    class Pretender(Foreign):
        def __array_namespace__(self, api_version=None):
            if isinstance(namespace, Exception):
                raise namespace
            return namespace

    with pytest.raises(TypeError, match="^relu: x must be an array, got Pretender; convert it fir"):
        relu_xp.relu(Pretender(np.ones(2)))
    assert Pretender not in dispatch.BACKENDS


def test_dtypes_of_two_libraries_do_not_meet(require):
    """array_api_strict warns when a dtype of its own is compared with one of NumPy's."""
    strict = require("array_api_strict")
    for dtype in ("float32", "float64"):
        relu_xp.relu(np.ones(2, dtype), threshold=0.125)
        relu_xp.relu(strict.ones(2, dtype=getattr(strict, dtype)), threshold=0.125)


class TestTracing:
    """relu is made of differentiable operations."""

    x = np.array([-np.inf, -2.0, -0.0, 0.0, 1.0, 3.0, np.inf], np.float32)

    @pytest.mark.parametrize(
        "numbers", [{}, {"negative_slope": 0.5}, {"max_value": 2.0, "threshold": -1.0}]
    )
    def test_torch_autograd(self, require, numbers):
        torch = require("torch")
        x = torch.from_numpy(self.x.copy()).requires_grad_()
        dy = torch.linspace(1, 2, 7)
        relu_xp.relu(x, **numbers).backward(dy)
        np.testing.assert_array_equal(
            x.grad.numpy(), relu_xp.relu_backward(dy.numpy(), self.x, **numbers)
        )

    def test_torch_compile(self, require):
        """To machine code, in a process of its own: it minds who has imported distutils."""
        require("torch")
        script = """
            import torch, relu_xp

            @torch.compile(fullgraph=True)
            def f(x):
                return relu_xp.relu(x * 2, negative_slope=0.5).sum()

            x = torch.tensor([-2.0, -0.0, 0.0, 1.0, 3.0], requires_grad=True)
            f(x).backward()
            assert x.grad.tolist() == [1, 1, 1, 2, 2]
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)

    @pytest.mark.parametrize(
        "numbers", [{}, {"negative_slope": 0.5}, {"max_value": 2.0, "threshold": -1.0}]
    )
    def test_jax(self, require, numbers):
        jax = require("jax")
        x, dy = jax.numpy.asarray(self.x), jax.numpy.linspace(1, 2, 7, dtype="float32")

        def f(x):
            return relu_xp.relu(x, **numbers)

        wanted = relu_xp.relu_backward(np.asarray(dy), self.x, **numbers)
        _, vjp = jax.vjp(f, x)
        np.testing.assert_array_equal(vjp(dy)[0], wanted)
        _, vjp = jax.vjp(jax.jit(f), x)
        np.testing.assert_array_equal(vjp(dy)[0], wanted)
        np.testing.assert_array_equal(jax.vmap(f)(x[:, None])[:, 0], f(x))
        finite = x[1:-1]
        np.testing.assert_array_equal(
            jax.vmap(jax.grad(f))(finite), relu_xp.relu_grad(self.x[1:-1], **numbers)
        )

        @jax.jit
        def round_trip(x, dy):
            y, pullback = relu_xp.relu_vjp(x, **numbers)
            return y, pullback(dy)

        y, dx = round_trip(x, dy)
        np.testing.assert_array_equal(y, relu_xp.relu(self.x, **numbers))
        np.testing.assert_array_equal(dx, wanted)
