"""No string of the user's ever reaches a compiler: CuPy's, or Python's own.

What CuPy's is given is recorded while numbers, dtypes and names are made to say `CANARY`. It has to
be text that is known before.
"""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from libraries import LIBRARIES

import relu_xp

MARK = "canary9"  # of which a library of NVIDIA's has no file
CANARY = MARK + "'\"\n%\\{x};)"


class HostileFloat(float):
    def __repr__(self):
        return CANARY

    __str__ = __repr__

    def __format__(self, specification):
        return CANARY


class HostileInt(int):
    __repr__ = __str__ = HostileFloat.__repr__
    __format__ = HostileFloat.__format__


class HostileFraction(Fraction):
    __repr__ = __str__ = HostileFloat.__repr__
    __format__ = HostileFloat.__format__


class HostileName(str):
    __repr__ = __str__ = HostileFloat.__repr__
    __format__ = HostileFloat.__format__


def numbers(kind):
    """Return numbers for every structure of kernels; of each a sign, a 0 or an extreme one."""
    for low in (0, 0.3, -1e-310, 1e300):
        for high in (1, 2, 1e-320):
            yield {"negative_slope": kind(low), "positive_slope": kind(high)}
            yield {
                "negative_slope": kind(low),
                "positive_slope": kind(high),
                "threshold": kind(-1),
                "max_value": kind(1e100),
            }


def hostile(number):
    if number == int(number):
        return HostileInt(number)
    return HostileFraction(number) if number == 0.3 else HostileFloat(number)


def use_all(array, numbers):
    """Call every public function, with some members."""
    x = array(np.array([[-1.0, 2.0]], np.dtype("f4", metadata={CANARY: CANARY})))
    for member in numbers:
        y, pullback = relu_xp.relu_vjp(x, **member)
        pullback(y)
        relu_xp.relu(x, **member)
        relu_xp.relu_grad(x, **member)
        relu_xp.relu_backward(y, x, **member)
        layer = relu_xp.ReLU(**member)
        layer.backward(layer.forward(x))
    y, pullback = relu_xp.prelu_vjp(x, array(np.array([0.25, 0.5], np.float32)))
    pullback(y)
    y, pullback = relu_xp.squared_relu_vjp(x)
    pullback(y)
    y, pullback = relu_xp.crelu_vjp(x)
    pullback(y)
    y, pullback = relu_xp.rrelu_vjp(x, hostile(0), hostile(0.5), rng=np.random.default_rng(0))
    pullback(y)
    relu_xp.relu(array(np.arange(3)), negative_slope=hostile(2), max_value=hostile(9))


class Odd:
    """An array, if one believes it, of a dtype that has any name."""

    shape = (1,)
    dtype = HostileName(CANARY)

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(__name__=CANARY)


def refuse_all(array):
    """Give what has to be refused: strings for numbers, and dtypes that nobody knows."""
    for text in (CANARY, HostileName("0.5"), "1", b"1"):
        for name in ("negative_slope", "threshold", "positive_slope", "max_value"):
            with pytest.raises(TypeError, match="must be a real number"):
                relu_xp.relu(array(np.ones(3)), **{name: text})
    structured = np.zeros(2, [(CANARY.replace("\n", ""), "f4")])
    for x in (structured, np.array([CANARY]), np.array([CANARY], object), Odd(), CANARY):
        with pytest.raises(TypeError):
            relu_xp.relu(x)


# ---- CuPy's: CUDA -------------------------------------------------------------------------------


@pytest.fixture
def cuda(request):
    """Return a function that runs something on CuPy's arrays, and returns the CUDA that it made."""
    from conftest import unavailable

    if reason := LIBRARIES["cupy_host"].load():
        unavailable(request.config, reason)
    import cupy_host

    def recorded(action):
        found = []

        def compiled(code):  # which is not run: that is not what is asked here
            found.append(code)
            return lambda arguments: None

        with LIBRARIES["cupy_host"].running(), mock.patch.object(cupy_host, "_compiled", compiled):
            action(cupy_host.array)
        return found

    return recorded


def test_cuda_is_the_same_whatever_the_numbers_are_called(cuda):
    plain = cuda(lambda array: use_all(array, numbers(float)))
    assert len(set(plain)) > 50
    hostile_too = cuda(lambda array: (use_all(array, numbers(hostile)), refuse_all(array)))
    assert set(hostile_too) == set(plain)
    assert not [code for code in hostile_too if MARK in code]
    other = cuda(lambda array: use_all(array, ({k: v * 1.5 for k, v in m.items()} for m in some())))
    assert set(other) == set(cuda(lambda array: use_all(array, some())))


def some():
    yield {"negative_slope": 0.3, "positive_slope": 2.5, "threshold": -1.0, "max_value": 9.0}


def test_the_check_of_cuda_can_fail(cuda):
    from relu_xp.backends import cupy

    code = cupy._PREAMBLE + f"// {HostileFloat(0.3)}"
    with mock.patch.object(cupy, "_PREAMBLE", code):
        cupy.kernel.cache_clear()
        found = cuda(lambda array: use_all(array, some()))
    cupy.kernel.cache_clear()
    assert [code for code in found if MARK in code]


# ---- There are no other ways ---------------------------------------------------------------------

COMPILERS = {"ElementwiseKernel": {"backends/cupy.py"}}
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


def test_nothing_else_in_the_package_compiles_text():
    package = Path(relu_xp.__file__).parent
    found = {}
    for file in package.rglob("*.py"):
        for name in names(file.read_text()):
            found.setdefault(name, set()).add(file.relative_to(package).as_posix())
    assert {name: found.get(name) for name in COMPILERS} == COMPILERS
    assert {name: found[name] for name in NEVER if name in found} == {}
    assert set(names("import os; os.system('x'); eval('1'); from a import RawKernel")) >= {
        "os.system",
        "eval",
        "RawKernel",
    }
