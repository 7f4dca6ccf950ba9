"""No string of a caller's ever reaches a compiler: CuPy's, or Python's own.

The source that CuPy is given is recorded while parameters, dtypes and names print `CANARY`.
"""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from libraries import LIBRARIES, unavailable

import relu_xp

MARK = "canary9"  # in no header of NVIDIA's
CANARY = MARK + "'\"\n%\\{x};)"


class Printed:
    def __repr__(self):
        return CANARY

    __str__ = __repr__

    def __format__(self, specification):
        return CANARY


class Float(Printed, float):
    pass


class Int(Printed, int):
    pass


class Ratio(Printed, Fraction):
    pass


class Name(Printed, str):
    pass


def printed(number):
    """Return a number that prints the canary."""
    kind = Int if number == int(number) else Ratio if number == 0.3 else Float
    return kind(number)


def parameters(kind):
    """Yield parameters for every structure of kernels: of each a sign, a 0 or an extreme one."""
    for low in (0, 0.3, -1e-310, 1e300):
        for high in (1, 2, 1e-320):
            slopes = {"negative_slope": kind(low), "positive_slope": kind(high)}
            yield slopes
            yield slopes | {"threshold": kind(-1), "max_value": kind(1e100)}


def call_all(array, presets):
    """Call every public function, the ReLU family with some parameters."""
    x = array(np.array([[-1.0, 2.0]], np.dtype("f4", metadata={CANARY: CANARY})))
    for params in presets:
        y, pullback = relu_xp.relu_vjp(x, **params)
        pullback(y)
        relu_xp.relu(x, **params)
        relu_xp.relu_grad(x, **params)
        relu_xp.relu_backward(y, x, **params)
        layer = relu_xp.ReLU(**params)
        layer.backward(layer.forward(x))
    weight = array(np.array([0.25, 0.5], np.float32))
    for y, pullback in (
        relu_xp.prelu_vjp(x, weight),
        relu_xp.squared_relu_vjp(x),
        relu_xp.crelu_vjp(x),
        relu_xp.rrelu_vjp(x, printed(0), printed(0.5), rng=np.random.default_rng(0)),
    ):
        pullback(y)
    relu_xp.relu(array(np.arange(3)), negative_slope=printed(2), max_value=printed(9))


class Pretender:
    """An object like an array, with the canary for a dtype and a library."""

    shape = (1,)
    dtype = Name(CANARY)

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(__name__=CANARY)


def call_with_invalid(array):
    for text in (CANARY, Name("0.5"), "1", b"1"):
        for name in ("negative_slope", "threshold", "positive_slope", "max_value"):
            with pytest.raises(TypeError, match="must be a real number"):
                relu_xp.relu(array(np.ones(3)), **{name: text})
    structured = np.zeros(2, [(CANARY.replace("\n", ""), "f4")])
    for x in (structured, np.array([CANARY]), np.array([CANARY], object), Pretender(), CANARY):
        with pytest.raises(TypeError):
            relu_xp.relu(x)


# ---- CuPy: CUDA ----------------------------------------------------------------------------------

ALL_GIVEN = {"negative_slope": 0.3, "positive_slope": 2.5, "threshold": -1.0, "max_value": 9.0}


@pytest.fixture
def cuda(request):
    """Return a function that calls another one with CuPy arrays, and returns all CUDA sources."""
    if reason := LIBRARIES["cupy_host"].load():
        unavailable(request.config, reason)
    import cupy_host

    def sources(action):
        found = []

        def compiled(code, architecture):  # but not executed
            found.append(code)
            return mock.Mock()

        with LIBRARIES["cupy_host"].running(), mock.patch.object(cupy_host, "compiled", compiled):
            action(cupy_host.array)
        return found

    return sources


def test_no_parameter_is_in_the_source(cuda):
    plain = cuda(lambda array: call_all(array, parameters(float)))
    assert len(set(plain)) > 50
    found = cuda(lambda array: (call_all(array, parameters(printed)), call_with_invalid(array)))
    assert set(found) == set(plain)
    assert not [code for code in found if MARK in code]
    others = {name: value * 1.5 for name, value in ALL_GIVEN.items()}
    found = [set(cuda(lambda array, p=p: call_all(array, [p]))) for p in (ALL_GIVEN, others)]
    assert found[0] == found[1]


def test_the_check_can_fail(cuda):
    from relu_xp.backends import cupy_kernels

    source = cupy_kernels._PREAMBLE + f"// {Float(0.3)}"
    with mock.patch.object(cupy_kernels, "_PREAMBLE", source):
        cupy_kernels.kernel.cache_clear()
        found = cuda(lambda array: call_all(array, [ALL_GIVEN]))
    cupy_kernels.kernel.cache_clear()
    assert [code for code in found if MARK in code]


# ---- Python --------------------------------------------------------------------------------------

COMPILERS = {"ElementwiseKernel": {"backends/cupy_kernels.py"}}
NEVER = {"eval", "exec", "compile", "RawKernel", "RawModule", "ReductionKernel", "llvmlite"}
NEVER |= {"fuse", "jitify", "os.system", "os.popen", "subprocess", "load_inline"}


def names(source):
    """Return the names that a module uses: ``b``, and of ``a.b`` both that and ``b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node) != "re.compile":
            yield from (node.attr, ast.unparse(node))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_other_module_compiles_text():
    package = Path(relu_xp.__file__).parent
    found = {}
    for file in package.rglob("*.py"):
        for name in names(file.read_text()):
            found.setdefault(name, set()).add(file.relative_to(package).as_posix())
    assert {name: found.get(name) for name in COMPILERS} == COMPILERS
    assert {name: found[name] for name in NEVER if name in found} == {}
    example = names("import os; os.system('x'); eval('1'); from a import RawKernel")
    assert set(example) >= {"os.system", "eval", "RawKernel"}
