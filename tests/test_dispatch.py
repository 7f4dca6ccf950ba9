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
from relu_xp.backends import numpy as numpy_backend
from relu_xp.testing.conformance import check_signatures

HEAVY = (
    "cupy",
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
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_loads_nothing_heavy():
    use = "import numpy, relu_xp; relu_xp.ReLU().forward(numpy.ones(3))"
    assert loaded_after(use) == set()


def test_the_check_of_imports_can_fail(require):
    require("tqdm")
    assert loaded_after("import relu_xp, tqdm") == {"tqdm"}


def test_signatures_equal_the_protocols(require, native):
    modules = [numpy_backend, generic]
    names = ("native", "cupy", "torch", "jax", "dask")
    modules += [require(f"relu_xp.backends.{name}") for name in names]
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
        return types.ModuleType("foreign_arrays.api.v1")


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


def test_a_third_partys_backend_is_named_without_importing_it(monkeypatch):
    asked = []

    def entry_points(*, group, name):
        asked.append((group, name))
        points = {"foreign": [types.SimpleNamespace(value="foreign.relu")]}
        return points.get(name, [])

    monkeypatch.setattr(dispatch.importlib.metadata, "entry_points", entry_points)
    assert dispatch.module_of("foreign") == "foreign.relu"
    assert dispatch.module_of("unknown") == "relu_xp.backends.generic"
    for name in ("cupy", "torch", "jax", "dask"):
        assert dispatch.module_of(name) == f"relu_xp.backends.{name}"
    assert asked == [("relu_xp.backends", "foreign"), ("relu_xp.backends", "unknown")], "ours first"


def test_kernels_serve_numpy_where_they_can_be_had(native, monkeypatch):
    assert dispatch.kernels().cpu is native
    assert dispatch.module_of("numpy") == "relu_xp.backends.native" == dispatch.COMPILED
    monkeypatch.setattr(dispatch.kernels(), "cpu", None)
    assert dispatch.module_of("numpy") == "relu_xp.backends.numpy"
    assert dispatch.module_of("torch") == "relu_xp.backends.torch"


@pytest.mark.parametrize("variable", [None, "1", "", "0"])
def test_kernels_can_be_left_unused(native, python, variable):
    script = """
        import sys
        import numpy
        import relu_xp

        assert "relu_xp.kernels" not in sys.modules, "before an array is there"
        assert relu_xp.relu(numpy.array([-1.0, 2.0])).tolist() == [0, 2]
        print(*sorted({"relu_xp.backends.native", "relu_xp.kernels._cpu"} & set(sys.modules)))
        print(relu_xp.dispatch.kernels().reason)
    """
    off = variable == "0"
    names = "" if off else "relu_xp.backends.native relu_xp.kernels._cpu"
    reason = "switched off by RELU_XP_NATIVE=0" if off else ""
    assert python(script, RELU_XP_NATIVE=variable) == f"{names}\n{reason}\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ModuleNotFoundError('no such module')", "not compiled: no C++ compiler when"),
        ("ImportError('version GLIBCXX')", "not loaded: version GLIBCXX"),
    ],
)
def test_numpy_serves_where_the_module_cannot_be_had(python, error, reason):
    script = f"""
        import sys

        class Finder:
            def find_spec(name, path=None, target=None):
                if name == "relu_xp.kernels._cpu":
                    raise {error}

        sys.meta_path.insert(0, Finder)
        import numpy
        import relu_xp

        assert relu_xp.relu(numpy.array([-1.0, 2.0])).tolist() == [0, 2]
        print(relu_xp.dispatch.backend_for("f", "x", numpy.ones(1)).__name__)
        print(relu_xp.dispatch.kernels().reason)
    """
    module, found = python(script).splitlines()
    assert module == "relu_xp.backends.numpy"
    assert found.startswith(reason)


def test_a_tensor_makes_all_kinds_of_tensors_known(require, monkeypatch):
    """Before `torch.compile` meets one of another kind: it cannot trace the search."""
    torch = require("torch")
    from relu_xp.backends import torch as backend

    class Tensor(torch.Tensor):
        pass

    monkeypatch.setattr(dispatch, "BACKENDS", {})
    dispatch.backend_for("f", "x", np.ones(1))
    assert set(dispatch.BACKENDS) == {np.ndarray}
    assert dispatch.backend_for("f", "x", torch.ones(1)) is backend
    assert set(dispatch.BACKENDS) == {np.ndarray, torch.Tensor, torch.nn.Parameter}
    assert dispatch.BACKENDS[torch.Tensor] is dispatch.BACKENDS[torch.nn.Parameter] is backend
    assert dispatch.backend_for("f", "x", torch.ones(1).as_subclass(Tensor)) is backend
    assert dispatch.BACKENDS[Tensor] is backend
    monkeypatch.setattr(dispatch, "_load", None)
    assert dispatch.backend_for("f", "x", torch.ones(1)) is backend


class TestNamespace:
    """A library by its name, or why it cannot be had."""

    @staticmethod
    def library(monkeypatch, name="broken", **attributes):
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    @staticmethod
    def reason(name):
        with pytest.raises(dispatch.LibraryError) as refused:
            dispatch.namespace(name)
        assert type(refused.value) is dispatch.LibraryError
        assert str(refused.value).startswith(f"backend {name!r} is {refused.value.reason}")
        assert dispatch.availability(name) == refused.value.reason
        advice = str(refused.value).removeprefix(f"backend {name!r} is {refused.value.reason}")
        return refused.value.reason, advice

    def test_it_is_the_compatible_one_where_there_is_one(self, require):
        assert dispatch.namespace("numpy").__name__ == "array_api_compat.numpy"
        assert dispatch.availability("numpy") is None
        for name, wanted in (
            ("array_api_strict", "array_api_strict"),
            ("torch", "array_api_compat.torch"),
            ("jax", "jax.numpy"),
            ("dask", "array_api_compat.dask.array"),
        ):
            require(name)
            assert dispatch.namespace(name).__name__ == wanted

    @pytest.mark.parametrize("name", ["no_such", "no such", "", "a.b", "../numpy"])
    def test_what_is_not_installed(self, monkeypatch, name):
        class Finder:
            @staticmethod
            def find_spec(name):
                return name in ("numpy", "jax", "array_api_strict") or None

        monkeypatch.setattr(dispatch, "PathFinder", Finder)
        assert self.reason(name) == ("not installed", "; there is numpy, jax, array_api_strict")

    def test_what_is_absent_is_not_advised(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "jax", None)
        monkeypatch.setitem(sys.modules, "jax.numpy", None)
        reason, advice = self.reason("jax")
        assert reason == "not installed"
        assert advice.startswith("; there is numpy")
        assert "jax" not in advice

    @pytest.mark.parametrize("attributes", [{}, {"asarray": lambda x: x}], ids=["none", "lists"])
    def test_what_is_no_array_library(self, monkeypatch, attributes):
        self.library(monkeypatch, **attributes)
        assert self.reason("broken") == ("not an array API library", "")

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (RuntimeError("no driver"), "no driver"),
            (RuntimeError("\n====\n  no driver: install one\n\nread the manual"), "no driver: in"),
            (RuntimeError(), "RuntimeError"),
            (RuntimeError("\n---\n"), "RuntimeError"),
            (ModuleNotFoundError("No module named 'dep'", name="dep"), "No module named 'dep'"),
        ],
        ids=["line", "page", "nothing", "rule", "dependency"],
    )
    def test_what_does_not_work(self, monkeypatch, error, reason):
        def asarray(x):
            assert x == [0.0]
            raise error

        self.library(monkeypatch, asarray=asarray)
        found, advice = self.reason("broken")
        assert found.startswith(f"not available: {reason}")
        assert "\n" not in found
        assert advice == ""

    def test_the_first_cause_is_told(self, monkeypatch):
        def asarray(x):
            try:
                try:
                    raise OSError("libcuda.so.1 is missing")
                except OSError as error:
                    raise ImportError("see the manual") from error
            except ImportError as error:
                raise RuntimeError("see the other manual") from error

        self.library(monkeypatch, asarray=asarray)
        assert self.reason("broken") == ("not available: libcuda.so.1 is missing", "")
        with pytest.raises(dispatch.LibraryError) as refused:
            dispatch.namespace("broken")
        assert isinstance(refused.value.__cause__, RuntimeError)


def test_how_an_array_is_moved():
    move = dispatch.how_to_move
    for source, target, wanted in (
        (("cupy", 0), ("cupy", 1), "move it to device 1 first"),
        (("cupy", 0), ("numpy", None), "move it first, for example cupy.asnumpy(dy)"),
        (("numpy", None), ("cupy", 0), "move it first, for example cupy.asarray(dy)"),
        (("torch", "cpu"), ("numpy", None), "move it first, for example numpy.asarray(dy)"),
        (("numpy", None), ("jax", None), "move it first, for example jax.numpy.asarray(dy)"),
        (("numpy", None), ("dask", None), "move it first, for example dask.array.asarray(dy)"),
        (("cupy", 0), ("other", 0), "move it first, for example other.asarray(dy)"),
    ):
        assert move("dy", source, target) == wanted


def test_a_place_in_words():
    for place, wanted in (
        (("numpy", None), "NumPy"),
        (("cupy", 0), "CuPy on device 0"),
        (("torch", "cpu"), "PyTorch on device cpu"),
        (("jax", None), "JAX"),
        (("dask", None), "Dask"),
        (("other", "x"), "other on device x"),
    ):
        assert dispatch.describe(place) == wanted


def test_an_unknown_library_is_generic():
    class Unknown(Foreign):
        pass

    assert dispatch.backend_for("f", "x", Unknown(np.ones(1))) is generic
    assert dispatch.BACKENDS.pop(Unknown) is generic


def test_a_place_is_a_library_and_a_device(require):
    """The generic backend tells it of any: by the name of the library itself, not of a wrapper."""
    strict, torch, jax = (require(name) for name in ("array_api_strict", "torch", "jax"))
    there = strict.Device("device1")
    for x, place in (
        (strict.ones(1), ("array_api_strict", strict.Device("CPU_DEVICE"))),
        (strict.ones(1, device=there), ("array_api_strict", there)),
        (torch.ones(1), ("torch", torch.device("cpu"))),
        (jax.numpy.ones(1), ("jax", None)),
    ):
        assert generic.place(x) == place

    class Placed(Foreign):
        device = "elsewhere"

    assert generic.place(Placed(np.ones(1))) == ("foreign_arrays", "elsewhere")


def test_sums_are_of_float32_where_there_is_no_float64(require, monkeypatch):
    strict = require("array_api_strict")

    class Narrow(types.ModuleType):
        def __getattr__(self, name):
            return getattr(strict, name)

        @staticmethod
        def __array_namespace_info__():
            return types.SimpleNamespace(dtypes=lambda **_: {"float32": strict.float32})

    x, dy, slopes = (
        strict.asarray(values, dtype=strict.float32)
        for values in ([-3e38, -3e38, -3e38], [1.0, 1.0, -1.0], [0.5])
    )
    for namespace, expected in ((strict, np.float32(-3e38)), (Narrow("narrow"), -np.inf)):
        monkeypatch.setattr(generic, "_namespace", lambda _, namespace=namespace: namespace)
        with np.errstate(over="ignore"):
            gradient = generic.slopes_gradient(dy, x, slopes, None)
        assert gradient.dtype == strict.float32
        assert float(gradient[0]) == expected


def test_results_stay_on_the_device_of_x(require):
    strict = require("array_api_strict")
    here, there = (strict.Device(name) for name in ("CPU_DEVICE", "device1"))
    x, elsewhere = (strict.asarray([-1.0, 2.0], device=device) for device in (there, here))
    y, pullback = relu_xp.relu_vjp(x)
    results = [y, pullback(x), relu_xp.relu_grad(x), relu_xp.crelu(x, axis=0)]
    results.append(relu_xp.rrelu(x, rng=np.random.default_rng(0)))
    assert {result.device for result in results} == {there}
    for call, seen in (
        (lambda: pullback(elsewhere), "pullback: forward saw"),
        (lambda: relu_xp.relu_backward(elsewhere, x), "relu_backward: x is"),
        (lambda: relu_xp.relu(x, out=elsewhere), "relu: x is"),
    ):
        with pytest.raises(ValueError, match=f"^{seen} ") as refused:
            call()
        assert str(refused.value).endswith(f"; move it to device {there} first")


@pytest.mark.parametrize("namespace", [None, 3, RuntimeError("no"), AttributeError("no")])
def test_what_only_pretends_to_be_an_array_is_refused(namespace):
    class Pretender(Foreign):
        def __array_namespace__(self, api_version=None):
            if isinstance(namespace, Exception):
                raise namespace
            return namespace

    message = "^relu: x must be an array, got Pretender; convert it fir"
    with pytest.raises(TypeError, match=message) as refused:
        relu_xp.relu(Pretender(np.ones(2)))
    cause = refused.value.__cause__
    assert cause is namespace if isinstance(namespace, Exception) else cause is not None
    assert Pretender not in dispatch.BACKENDS


def test_no_cause_where_the_message_says_it_all():
    with pytest.raises(TypeError, match="^relu: x must be an array, got list") as refused:
        relu_xp.relu([1.0])
    assert refused.value.__cause__ is None


def test_a_type_is_looked_up_once(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "BACKENDS", {})
    loaded = []
    load = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda name: loaded.append(name) or load(name))
    memmap = np.memmap(tmp_path / "x", np.float32, "w+", shape=3)
    for _ in range(2):
        for x in (np.ones(3), memmap):
            assert dispatch.backend_for("f", "x", x).__name__ == dispatch.module_of("numpy")
    assert loaded == ["numpy", "numpy"]
    assert set(dispatch.BACKENDS) == {np.ndarray, np.memmap}


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
        subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(script)], check=True)

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
