"""relu_xp.testing, as its users have it: in a project of their own, and for a backend of theirs."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import unavailable

import relu_xp
from relu_xp import dispatch
from relu_xp.testing import _names, check_gradient, conformance, oracle

PLUGIN = Path(__file__).parent / "plugin"
LAYERS = [
    relu_xp.ReLU(),
    relu_xp.LeakyReLU(),
    relu_xp.LeakyReLU(-2.0),
    relu_xp.ReLU6(),
    relu_xp.ClippedReLU(3.0, negative_slope=0.25, threshold=-1.0),
    relu_xp.ThresholdedReLU(0.3),
    relu_xp.ReLU(threshold=-2.0, max_value=0.0),
    relu_xp.ReLU(negative_slope=0.1, threshold=0.25, positive_slope=2.0, max_value=1.5),
]
# Every knee and ceiling of those, what lies beside them, and what is far from all.
KNEES = [-3, -2, -1, -1e-7, -0.0, 0, 1e-9, 1e-4, 0.25, 0.3, 0.75, 1, 3, 6, 6.00001, 20, 100]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", dispatch.LIBRARIES)
def test_every_layer_passes(name, dtype, request):
    try:
        xp = dispatch.namespace(name)
    except dispatch.LibraryError as error:
        unavailable(request.config, f"{name} is {error.reason}", gpu=name == "cupy")
    if name == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    kind = getattr(xp, dtype, None)
    if name in ("numpy", "dask"):
        kind = oracle.DTYPES[dtype]
    if kind is None:
        assert (name, dtype[-2:]) in (("array_api_strict", "16"), ("cupy", "16"))
        return
    numbers = KNEES if name != "dask" else KNEES[4:9]  # which takes its time
    x = xp.astype(xp.asarray(np.array(numbers, np.float32)), kind)
    for layer in LAYERS:
        check_gradient(layer, x)
        assert layer.saved_nbytes == 0, "the caller's layer was used"


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (relu_xp.relu, (), {}),
        (relu_xp.relu, (), {"negative_slope": 3.0, "max_value": 6}),
        (relu_xp.relu_vjp, (), {"threshold": 0.3}),
        (relu_xp.leaky_relu, (0.2,), {}),
        (relu_xp.relu6, (), {"negative_slope": 0.1}),
        (relu_xp.clipped_relu, (), {"max_value": 3}),
        (relu_xp.thresholded_relu, (), {}),
        (lambda x, **options: relu_xp.relu_vjp(x, **options), (), {"max_value": 3}),
    ],
)
def test_every_function_passes(function, arguments, options):
    for dtype in ("float32", "float64"):
        x = np.array(KNEES, dtype).reshape(1, 17)
        check_gradient(function, x, *arguments, **options)
        check_gradient(function, x, *arguments, dy=np.cos(x), **options)
        check_gradient(function, np.array(2, dtype), *arguments, **options)


class Layer:
    """As a textbook has it; with the backward pass that it is given."""

    def __init__(self, backward, forward=lambda x: np.maximum(x, 0)):
        self.functions = forward, backward

    def forward(self, x):
        self.x = x
        return self.functions[0](x)

    def backward(self, dy):
        return self.functions[1](dy, self.x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("backward", "element"),
    [
        (lambda dy, x: dy * (x >= 0), r"x\[4\] = -0 is .*, expected 0 on the knee"),
        (lambda dy, x: dy * np.heaviside(x, 0.5), r"x\[4\] = -0 is .*, expected 0 on the knee"),
        (lambda dy, x: dy * (x != 0), r"x\[0\] = -3 is .*, expected 0 by differences"),
        (lambda dy, x: dy, r"x\[0\] = -3 is "),
        (lambda dy, x: dy * (x > 0) / 2, r"x\[6\] = \S+ is .*, expected .* by differences"),
        (lambda dy, x: dy * (x > 0) * 1.02, r"x\[6\] = \S+ is .*, expected .* by differences"),
        (lambda dy, x: dy * (x > 0) * (x < 6), r"x\[13\] = 6 is -?0, expected .* by differences"),
        (lambda dy, x: np.where(x > 0, np.nan, 0), r"x\[6\] = \S+ is nan, expected"),
        (lambda dy, x: (dy * (x > 0))[:-1], r"x has shape \(16,\), expected \(17,\)"),
    ],
)
def test_a_wrong_layer_fails(backward, element, dtype):
    x = np.array([-3, -2, -1, -0.5, -0.0, 0, 0.01, 0.1, 0.25, 0.3, 0.75, 1, 3, 6, 7, 20, 100])
    check_gradient(Layer(lambda dy, x: dy * (x > 0)), x.astype(dtype))
    with pytest.raises(
        AssertionError, match=f"^check_gradient: .*Layer.* with respect to {element}"
    ):
        check_gradient(Layer(backward), x.astype(dtype))


def test_a_wrong_layer_of_ours_fails():
    class Wrong(relu_xp.ReLU6):
        def backward(self, dy):
            return 1.5 * super().backward(dy)

    check_gradient(relu_xp.ReLU6(), np.array(KNEES))
    with pytest.raises(AssertionError, match=r"x\[6\] = 1e-09 is \S+, expected \S+ by differences"):
        check_gradient(Wrong(), np.array(KNEES))


def test_at_a_knee_of_ours_what_is_written_is_expected(monkeypatch):
    """Also where the differences cannot tell: at a ceiling, and below a steeper slope."""
    for layer, place in ((relu_xp.ReLU6(), 6.0), (relu_xp.LeakyReLU(3.0, threshold=0.5), 0.5)):
        check_gradient(layer, np.array([place]))
        with monkeypatch.context() as patched:
            patched.setattr(type(layer), "backward", lambda self, dy: dy)
            with pytest.raises(AssertionError, match="on the knee"):
                check_gradient(layer, np.array([place]))


class Network:
    """Two dense layers, a leaky ReLU between them, and tanh at the end."""

    def __init__(self, xp=np, factor=1.0):
        rng = np.random.default_rng(0)
        shapes = ((5, 7), (7,), (7, 3))
        self.params = [xp.asarray(rng.standard_normal(shape)) for shape in shapes]
        self.activation = relu_xp.LeakyReLU()
        self.factor = factor

    def forward(self, x):
        w, b, v = self.params
        self.x, self.h = x, self.activation.forward(x @ w + b)
        self.y = self.h @ v
        return self.y / (1 + self.y**2)

    def backward(self, dy):
        w, _, v = self.params
        dy = dy * (1 - self.y**2) / (1 + self.y**2) ** 2
        dh = self.activation.backward(dy @ v.T)
        self.grads = [self.x.T @ dh, self.factor * dh.sum(0), self.h.T @ dy]
        return dh @ w.T


def test_a_network_passes_with_its_parameters():
    x = np.random.default_rng(1).standard_normal((4, 5))
    network = Network()
    before = [p.copy() for p in network.params]
    check_gradient(network, x)
    np.testing.assert_equal(network.params, before)
    with pytest.raises(AssertionError, match=r"respect to params\[1\]\[0\] = .* by differences"):
        check_gradient(Network(factor=1.01), x)
    network = Network()
    network.params.pop()
    network.forward = lambda x: x
    network.backward = lambda dy: dy
    with pytest.raises(AssertionError, match=r"1 gradients, expected one for each of x, params\[0"):
        check_gradient(network, x)


def test_a_network_of_jax_passes(require):
    """Whose parameters cannot be written, only replaced."""
    jnp = require("jax").numpy
    require("jax").config.update("jax_enable_x64", True)
    check_gradient(Network(jnp), jnp.asarray(np.random.default_rng(1).standard_normal((2, 5))))


def test_arrays_among_the_arguments_are_differentiated_too():
    def prelu_vjp(x, weight, factor=1.0):
        def pullback(dy):
            dweight = factor * (np.where(x > 0, 0, x) * dy).sum(0)
            return np.where(x > 0, dy, weight * dy), dweight

        return np.where(x > 0, x, weight * x), pullback

    x, weight = np.array([[0.0, 1, -2], [3, -1, 0]]), np.array([0.2, 2, -0.3])
    check_gradient(prelu_vjp, x, weight)
    check_gradient(prelu_vjp, x, weight, 1.0)
    with pytest.raises(AssertionError, match=r"respect to argument 2\[1\] = 2 is"):
        check_gradient(prelu_vjp, x, weight, factor=0.5)
    with pytest.raises(AssertionError, match="2 gradients, expected one for each of x$"):
        check_gradient(lambda x: prelu_vjp(x, weight), x)


def test_curved_functions_and_those_that_are_longer_than_x():
    rng = np.random.default_rng(2)
    for dtype in ("float16", "float32", "float64"):
        x = np.concatenate([rng.standard_normal(200), KNEES[3:7]]).astype(dtype)
        check_gradient(Layer(lambda dy, x: 3 * dy * x * x, lambda x: x**3), x)
        check_gradient(
            Layer(lambda dy, x: 2 * dy * np.maximum(x, 0), lambda x: np.maximum(x, 0) ** 2), x
        )
        both = Layer(
            lambda dy, x: dy[: x.size] * (x > 0) - dy[x.size :] * (x < 0),
            lambda x: np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)]),
        )
        check_gradient(both, x)
        with pytest.raises(AssertionError, match="by differences"):
            check_gradient(Layer(lambda dy, x: 3.1 * dy * x * x, lambda x: x**3), x)


def test_random_numbers_repeat():
    def vjp(x, rng):
        slopes = rng.uniform(0.1, 0.3, x.shape)
        return np.where(x > 0, x, slopes * x), lambda dy: np.where(x > 0, dy, slopes * dy)

    rng = np.random.default_rng(3)
    before = rng.bit_generator.state
    check_gradient(vjp, np.array(KNEES), rng=rng)
    assert rng.bit_generator.state == before


def test_nothing_of_the_callers_is_written():
    x, dy = np.array(KNEES), np.ones(17)
    layer = relu_xp.ReLU(inplace=True)
    check_gradient(layer, x, dy=dy)
    np.testing.assert_array_equal(x, KNEES)
    np.testing.assert_array_equal(dy, np.ones(17))


def test_what_cannot_be_checked_is_refused():
    x = np.ones(2)
    for function in (3, abs, relu_xp.relu_grad, np.tanh):
        with pytest.raises(TypeError, match="check_gradient: .* is neither a layer with forward"):
            check_gradient(function, x)
    for bad, error, message in (
        ([1.0], TypeError, "check_gradient: x must be an array, got list; convert it first"),
        (np.ones(2, int), TypeError, "check_gradient: x has dtype int64, which has no gradient"),
        (np.array([np.inf]), ValueError, "check_gradient: x must be finite"),
        (np.ones(0), ValueError, "check_gradient: x is empty"),
    ):
        with pytest.raises(error, match=message):
            check_gradient(relu_xp.ReLU(), bad)
    with pytest.raises(TypeError, match="check_gradient: a layer takes x alone; give its numbers"):
        check_gradient(relu_xp.ReLU(), x, negative_slope=0.5)
    with pytest.raises(ValueError, match=r"dy has shape \(3,\), y has \(2,\)"):
        check_gradient(relu_xp.ReLU(), x, dy=np.ones(3))
    with pytest.raises(TypeError, match="check_gradient: dy must be an array, got list"):
        check_gradient(relu_xp.ReLU(), x, dy=[1.0, 1.0])
    for option in ("out", "mask"):
        with pytest.raises(
            TypeError, match=f"check_gradient: relu_vjp is called without {option}="
        ):
            check_gradient(relu_xp.relu_vjp, x, **{option: np.ones(2)})
    narrow = Layer(lambda dy, x: dy, lambda x: x + np.ones(2, np.float16) * (1 / (x.itemsize == 2)))
    with np.errstate(all="raise"), pytest.raises(TypeError, match="x is float16, so that the diff"):
        check_gradient(narrow, np.ones(2, np.float16))
    network = Layer(lambda dy, x: dy, lambda x: abs(x) + abs(x[::-1]))
    with pytest.raises(ValueError, match="all of x lies on knees; give other numbers too"):
        check_gradient(network, np.zeros(2))


def run_pytest(folder, *arguments, path=(), status=0):
    """Run pytest in a folder as in a project of its own; return what it printed."""
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -W error\n")
    here = Path(relu_xp.__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    before = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(here), *before])
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    """A user's project: a conftest, and a test that names no library."""
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent("""
        import pytest
        from relu_xp.testing import check_gradient

        pytest_plugins = ["relu_xp.testing"]
        """)
    )
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        import relu_xp
        from relu_xp.testing import check_gradient


        def test_network(xp):
            check_gradient(relu_xp.LeakyReLU(0.5), xp.asarray([-1.0, 0.0, 2.0]))
        """)
    )
    return tmp_path


def test_names_of_libraries_are_read_as_they_are_written():
    assert _names("numpy") == ["numpy"]
    assert _names("numpy, cupy") == ["numpy", "cupy"]
    for text in ("", "numpy,", "numpy,,cupy", "numpy,numpy"):
        with pytest.raises(argparse.ArgumentTypeError, match="has an empty name, or one twice"):
            _names(text)


def test_a_users_project(project):
    printed = run_pytest(project, "-v", "-rs", "-W", "ignore")
    for name in dispatch.LIBRARIES:
        reason = dispatch.availability(name)
        outcome = "PASSED" if reason is None else "SKIPPED"
        assert f"test_network[{name}] {outcome}" in printed
        assert reason is None or f"{name} is {reason[:40]}" in printed
    assert "test_network[numpy] PASSED" in printed


def test_the_libraries_that_are_named_have_to_be_there(project, require):
    require("array_api_strict")
    printed = run_pytest(project, "-v", "--xp", "numpy, array_api_strict")
    assert "relu_xp: numpy by relu_xp.backends." in printed
    assert "2 passed" in printed
    printed = run_pytest(project, "--xp", "numpy,nothing_of_the_kind", status=1)
    assert "1 passed, 1 error" in printed
    assert "nothing_of_the_kind is not installed" in printed
    for names in ("", "numpy,", "numpy,numpy"):
        assert "--xp" in run_pytest(project, "--xp", names, status=4)


def test_a_gpu_that_is_required_and_absent_is_a_failure(project):
    if dispatch.availability("cupy") is None:
        pytest.skip("there is a CUDA device")
    for chosen in (("--xp", "numpy,cupy"), ("-k", "numpy or cupy")):
        printed = run_pytest(project, *chosen, "--require-gpu", status=1)
        assert "1 passed, " in printed
        assert "1 error" in printed
        assert "cupy is not " in printed
    printed = run_pytest(project, "-k", "numpy or cupy", "-rs")
    assert "1 passed, 1 skipped" in printed
    assert "cupy is not " in printed
    printed = run_pytest(project, "--xp", "numpy", "--require-gpu", status=4)
    assert "--require-gpu needs cupy among the libraries of --xp" in printed


def test_a_project_may_have_an_xp_of_its_own(project):
    with (project / "conftest.py").open("a") as file:
        file.write("\n@pytest.fixture(params=['mine'])\ndef xp():\n    import numpy\n")
        file.write("    return numpy\n")
    assert "test_network[mine] PASSED" in run_pytest(project, "-v")


@pytest.fixture(scope="session")
def installed(request, tmp_path_factory):
    """A folder in which pip has installed the package of tests/plugin."""
    if importlib.util.find_spec("array_api_strict") is None:
        unavailable(request.config, "array_api_strict is not installed")
    if importlib.util.find_spec("pip") is None:
        unavailable(request.config, "pip is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, PLUGIN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "hatchling" in done.stderr:
        unavailable(request.config, f"pip cannot get hatchling: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


LINE = ("-p", "relu_xp.testing", "--pyargs", "relu_xp.testing.conformance")


def test_a_third_partys_backend_passes(installed, tmp_path):
    printed = run_pytest(tmp_path, *LINE, "--xp", "array_api_strict", path=[installed])
    assert "relu_xp: array_api_strict by relu_xp_strict" in printed
    assert " passed, " in printed
    assert "failed" not in printed
    source = (PLUGIN / "relu_xp_strict.py").read_text()
    assert len(source.splitlines()) <= 50


BUGS = {  # what is replaced in tests/plugin/relu_xp_strict.py, by what, and which rule sees it
    "test_forward": (
        "numpy.forward(numbers, host(x), host(out))",
        "np.maximum(host(x), 0)",  # of relu, whatever the numbers
    ),
    "test_vjp": (
        "numpy.backward(numbers, host(dy), saved, host(out))",
        "host(dy) * np.float32(0) + numpy.backward(numbers, host(dy), saved, None)",  # G3
    ),
    "test_what_is_saved": (
        "return like(x, out, y), saved ",
        "saved = x\n    return like(x, out, y), saved",
    ),
    "test_nothing_is_written": (
        "numpy.backward(numbers, host(dy), saved, host(out))",
        "numpy.backward(numbers, host(dy), saved, host(dy))",
    ),
    "test_out_is_written": ("if out is None else out", ""),
    "test_the_backend_has": ("def gradient(numbers, x, out):", "def gradient(numbers, x, out=0):"),
}


@pytest.mark.parametrize("test", BUGS)
def test_a_backend_with_a_bug_does_not(installed, tmp_path, test):
    right, wrong = BUGS[test]
    source = (PLUGIN / "relu_xp_strict.py").read_text()
    assert source.count(right) == 1
    (tmp_path / "relu_xp_strict.py").write_text(source.replace(right, wrong))
    printed = run_pytest(
        tmp_path,
        *(*LINE, "-x", "-k", test, "--xp", "array_api_strict"),
        path=[tmp_path, installed],
        status=1,
    )
    assert "1 failed" in printed


def test_the_suite_over_our_own_libraries_is_the_whole_suite():
    import test_truth_table

    tests = {name for name in vars(conformance) if name.startswith("test_")}
    assert tests == {name for name in vars(test_truth_table) if name.startswith("test_")}
    assert len(tests) >= 19


@pytest.mark.parametrize(
    ("name", "dtypes", "exact"),
    [
        ("numpy", tuple(oracle.DTYPES), True),
        ("array_api_strict", ("float32", "float64"), True),
        ("torch", ("float16", "float32", "float64"), True),
        ("jax", ("float16", "bfloat16", "float32"), False),
    ],
)
def test_what_a_library_can_do_is_found_out(name, dtypes, exact, require):
    """A limit that is seen where there is none would hide what the suite is to find."""
    require(name)
    library = conformance.Library(dispatch.namespace(name))
    assert library.dtypes[: len(dtypes)] == dtypes  # JAX has float64 too if it has been told
    assert library.subnormals == exact
    assert library.payloads == exact


def test_the_oracle_shares_nothing_with_what_it_judges():
    tree = ast.parse(Path(oracle.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert not any(name.startswith("relu_xp") for name in names)
    assert "numpy" in names
    assert all(getattr(node, "level", 0) == 0 for node in imports)


def test_neither_pytest_nor_ml_dtypes_is_needed(python):
    printed = python("""
        import sys
        sys.modules["pytest"] = sys.modules["ml_dtypes"] = None
        import numpy, relu_xp
        from relu_xp.testing import check_gradient, oracle

        check_gradient(relu_xp.ReLU(), numpy.ones(3))
        print(*oracle.DTYPES)
        try:
            import relu_xp.testing.conformance
        except ModuleNotFoundError as error:
            print(error)
    """)
    assert printed.splitlines() == [
        "float16 float32 float64",
        "relu_xp.testing.conformance needs pytest: pip install pytest",
    ]
