"""Interrupts, calls within calls, memory next to an array, and random calls: nothing crashes."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from libraries import LIBRARIES, unavailable
from operands import (
    CALLS,
    INVALID,
    NOT_WRITABLE,
    UNUSUAL,
    UnexpectedError,
    Wrapper,
    X,
    contents,
    halves,
    operand,
    operands,
    pretender,
    raising,
    roles,
    subclass,
    wrapper,
)

import relu_xp
from relu_xp.testing import reference

TESTS = Path(__file__).parent


@pytest.mark.libraries("ndarray")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_is_not_suppressed(xp, error):
    """Raised inside an argument's own code; the layer and the arrays stay as they were."""
    layer = relu_xp.ReLU()
    layer.forward(X)
    nbytes = layer.saved_nbytes
    makers = {
        "namespace": wrapper(error()),
        "subclass": subclass(__getattribute__=raising(error)),
        "dtype": subclass(dtype=property(raising(error))),
        "attributes": pretender(__getattribute__=raising(error)),
    }
    for kind, make in makers.items():
        refused = (error, TypeError) if kind in ("subclass", "dtype") else error
        for name in (
            "relu",
            "relu_backward",
            "relu_vjp",
            "prelu",
            "bias_relu",
            "crelu",
            "squared_relu",
        ):
            given = operands(name)
            role, before = next(iter(given)), contents(given)
            with pytest.raises(refused):
                CALLS[name](**given | {role: make(given[role])})
            assert contents(given) == before
        for function in (layer.forward, layer.backward):
            with pytest.raises(refused):
                function(make(X))
            assert layer.saved_nbytes == nbytes
    number = type("Number", (float,), {"__float__": raising(error)})
    with pytest.raises(error):
        relu_xp.relu(X, negative_slope=number(1))
    np.testing.assert_array_equal(layer.backward(X), np.maximum(X, 0))


# ---- A call within a call ------------------------------------------------------------------------


@pytest.mark.libraries("ndarray")
def test_an_rng_that_calls_its_layer(xp):
    """The outer call ends last: backward is that of its x."""
    layer, shapes = relu_xp.RReLU(0.25, 0.75), []

    def rng(shape):
        shapes.append(shape)
        if len(shapes) == 1:
            layer.forward(np.full((3, 2), -1, np.float32))
            np.testing.assert_array_equal(layer.backward(np.ones((3, 2), np.float32)), 0.5)
            with pytest.raises(RuntimeError):
                layer.backward(np.ones((3, 2), np.float32))
            layer.forward(np.ones(7, np.float32))
        return halves(shape)

    layer.rng = rng
    y = layer.forward(X)
    np.testing.assert_array_equal(y, np.where(X > 0, X, X / 2))
    np.testing.assert_array_equal(layer.backward(X), y)
    assert shapes == [X.shape, (3, 2), (7,)]


@pytest.mark.libraries("ndarray")
def test_a_namespace_that_calls_the_layer(xp):
    layer = relu_xp.ReLU()

    class Caller(Wrapper):
        def __array_namespace__(self, api_version=None):
            layer.forward(-X)
            raise UnexpectedError

    for call in (
        lambda: layer.forward(Caller(X)),
        lambda: layer.forward(X.copy(), out=Caller(X)),
        lambda: layer.forward(X.copy(), mask=Caller(X)),
        lambda: layer.backward(Caller(X)),
    ):
        layer.forward(X)
        with pytest.raises(TypeError, match="must be an array, got Caller"):
            call()
        np.testing.assert_array_equal(layer.backward(X), np.where(X < 0, X, 0))


# ---- Memory next to an array ---------------------------------------------------------------------

# Every array begins after, or ends before, a page that cannot be accessed.
PAGES = """
    import ctypes, mmap, sys
    import numpy as np

    tests, name, beyond = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.insert(0, tests)
    import relu_xp
    from libraries import LIBRARIES
    from operands import halves
    from relu_xp.testing import reference

    protect = ctypes.CDLL(None).mprotect

    class Room:
        def __init__(self, pages):
            self.map = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
            memory = np.frombuffer(self.map, np.uint8)
            for number in (0, pages + 1):
                address = ctypes.c_void_p(memory.ctypes.data + number * mmap.PAGESIZE)
                assert protect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
            self.memory = memory[mmap.PAGESIZE : (pages + 1) * mmap.PAGESIZE]

        def place(self, host, at_end):
            part = self.memory[-host.nbytes or len(self.memory) :] if at_end else self.memory
            part[: host.nbytes] = host.view(np.uint8)
            return part[: host.nbytes].view(host.dtype)

    LAYOUTS = {
        "contiguous": lambda a: a,
        "strided": lambda a: a[::-2],
        "Fortran": lambda a: a.reshape(len(a) // 3, 3, order="F"),
        "columns": lambda a: a.reshape(len(a) // 3, 3)[:, ::-2],
    }

    def run(params, x, dy, out, mask):
        relu_xp.relu(x, out=out, **params)
        relu_xp.relu_grad(x, out=out, **params)
        relu_xp.relu_backward(dy, x, out=out, **params)
        relu_xp.relu_backward(dy, x, out=x, **params)
        relu_xp.relu_vjp(x, out=out, mask=mask, **params)[1](dy, out=dy)
        relu_xp.relu_vjp(x, out=x, mask=mask, **params)[1](dy, out=out)
        if params:
            return
        row = dy if dy.ndim == 1 else dy[:, 0]
        relu_xp.squared_relu_vjp(x, out=x)[1](dy, out=out)
        relu_xp.rrelu_vjp(x, rng=halves, out=x)[1](dy, out=out)
        relu_xp.prelu(x, row[:1], axis=0, out=out)
        relu_xp.prelu_vjp(x, row, axis=0)[1](out, out=x)
        relu_xp.bias_relu(x, row, axis=0, out=out)
        relu_xp.bias_relu_vjp(x, row, axis=0, mask=mask)[1](dy, out=x)
        relu_xp.crelu_vjp(x, axis=0)[1](np.concatenate([dy, dy]), out=out)
        relu_xp.relu(x.view(f"i{x.itemsize}"), out=out.view(f"i{x.itemsize}"))

    def check(dtype, size, rooms, layout, at_end):
        hosts = np.random.default_rng(size).standard_normal((3, size)).astype(dtype)
        for params in {}, {"threshold": -0.5}, {"negative_slope": 0.1, "max_value": 0.75}:
            views = [LAYOUTS[layout](room.place(h, at_end)) for room, h in zip(rooms, hosts)]
            nbytes = views[0].size if len(params) > 1 else -(-views[0].size // 8)
            views.append(rooms[3].place(np.zeros(nbytes, np.uint8), at_end))
            if beyond:  # one element too long
                longer = np.lib.stride_tricks.as_strided
                views = [longer(view, (len(view) + 1,), view.strides) for view in views]
            run(params, *map(library.array, views))

    library = LIBRARIES[name]
    assert library.load() is None
    few, many = [Room(1) for _ in range(4)], [Room(80) for _ in range(4)]
    for dtype in reference.DTYPES.values():
        with library.running(), np.errstate(all="ignore"):
            for size in (*range(3 * beyond, 21), 33, 36, 48, 51, 63, 64, 65, 66, 129, 30_003):
                for layout in ["contiguous"] if size % 3 or beyond else LAYOUTS:
                    for at_end in (False, True)[beyond:]:
                        check(dtype, size, few if size < 200 else many, layout, at_end)
"""


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("name", ["numpy", "compiled", "compiled_streaming"])
def test_no_memory_beside_an_array_is_accessed(request, python, name, beyond):
    """With views one element too long the process ends by SIGSEGV.

    Of CuPy's kernels ptx.py checks each access, in all tests.
    """
    if sys.platform != "linux":
        unavailable(request.config, "mprotect is called as on Linux")
    if reason := LIBRARIES[name].load():
        unavailable(request.config, reason)
    status = -signal.SIGSEGV if beyond else 0
    python(PAGES, TESTS, name, beyond, timeout=300, status=status)


# ---- Random calls --------------------------------------------------------------------------------

SHAPES = (4, 6), (4, 6), (), (1,), (0, 3), (3, 0), (7,), (2, 3, 4), (70, 33), (9000,)
DTYPES = [*reference.DTYPES.values(), *map(np.dtype, "bhilqBHILQ?Fe"), np.dtype(">f4")]
ODD = UNUSUAL | NOT_WRITABLE | INVALID


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.libraries("ndarray")
def test_random_calls(xp):
    """Any argument may be refused; no call ends the process or spoils the next one."""
    rng, done, calls = random.Random(xp.name), 0, 3000

    def array(role, shape):
        x = np.resize(operand("", role, (*shape, 7)), shape)
        if role == "mask":
            x = np.zeros(rng.choice([0, 1, 3, x.size, 9000]), rng.choice("BBBbHf"))
        x = x.astype(rng.choice(DTYPES)) if rng.random() < 0.3 else x
        kind = rng.choice(sorted(ODD))
        return ODD[kind](x) if rng.random() < 0.3 and kind != "far apart" else x

    for _ in range(calls):
        name, shape = rng.choice(sorted(CALLS)), rng.choice(SHAPES)
        with contextlib.suppress(Exception):
            given = {r: array(r, shape if rng.random() < 0.9 else (4, 6)) for r in roles(name)}
            if rng.random() < 0.2:  # overlapping, or the same array
                x = given[role := rng.choice(sorted(given))]
                view = rng.choice([np.s_[:], np.s_[1:], np.s_[::-1], np.s_[..., :-1]])
                given["out" if "out" in given else role] = x[view]
            CALLS[name](**given)
            done += 1
    assert calls / 10 < done < calls * 9 / 10
    np.testing.assert_array_equal(relu_xp.relu_vjp(X)[1](X), np.maximum(X, 0))
