"""CuPy's kernels, compiled for five architectures and read, without a device."""

from __future__ import annotations

import re

import numpy as np
import oracle
import pytest
from libraries import LIBRARIES

import relu_xp

ARCHITECTURES = (75, 80, 90, 100, 120)
INTEGERS = tuple(f"{sign}int{width}" for sign in ("", "u") for width in (8, 16, 32, 64))
KERNELS = (
    "forward",
    "forward_bits",
    "forward_bytes",
    "backward_bits",
    "backward_bytes",
    "backward_from_input",
)


@pytest.fixture(scope="module")
def backend(request):
    from conftest import unavailable

    for module in ("cupy", "cuda.pathfinder"):
        try:
            __import__(module)
        except ImportError as error:
            unavailable(request.config, f"{module} is not installed: {error}")
    from cuda.pathfinder import find_nvidia_header_directory
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        unavailable(request.config, f"NVRTC is not installed: {error}")
    if find_nvidia_header_directory("cudart") is None:
        unavailable(request.config, "the CUDA headers are not installed")
    from relu_xp.backends import cupy

    return cupy


def sources(kernel, contiguous=True):
    """Yield every source that CuPy generates for a kernel: the dtypes, and the source."""
    import cupy_host

    names = [p.name for p in kernel.params[:-1]]
    arrays = {"x", "y", "dy", "dx", "mask"}
    types = {p.ctype for p in kernel.params if p.ctype in ("T", "X")}
    kinds = INTEGERS if kernel.name == "relu_xp_forward_integer" else tuple(oracle.DTYPES)
    for t in kinds:
        for x in kinds if "X" in types else (t,):
            of = {"T": _dtype(t), "X": _dtype(x)}
            given = [
                of.get(p.ctype, p.dtype) if name in arrays else None
                for name, p in zip(names, kernel.params, strict=False)
            ]
            flat = (1, True)
            layout = flat if contiguous else (3, False)
            layouts = [
                None if g is None else flat if p.raw and p.name == "mask" else layout
                for g, p in zip(given, kernel.params, strict=False)
            ]
            raw = all(p.raw for p, g in zip(kernel.params, given, strict=False) if g is not None)
            index = flat if raw else (layout[0], True)
            code, _ = cupy_host.source(kernel, given, [*layouts, index])
            yield (t, x), code


def _dtype(name):
    return oracle.DTYPES.get(name) or np.dtype(name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [*KERNELS, "forward_integer"])
def test_every_kernel_compiles(backend, name, architecture):
    import cupy_host

    for contiguous in (True, False):
        for _, code in sources(backend.KERNELS[name], contiguous):
            assert cupy_host.compile_for(code, architecture)[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", [*KERNELS, "forward_integer"])
def test_nothing_is_flushed_or_spilled(backend, name):
    """F4: no instruction of any kernel has -ftz on it; and no array went to local memory."""
    import cupy_host

    for types, code in sources(backend.KERNELS[name]):
        ptx = cupy_host.compile_for(code, 90, ptx=True)
        assert ".visible .entry relu_xp_" in ptx
        assert not re.search(r"\.ftz\b", ptx), types
        assert not re.search(r"\b(ld|st)\.local\b|\.local \.align", ptx), types
        if types[0] in ("float32", "bfloat16") and name != "forward_integer":
            assert "mul.rn.f32" in ptx, types


def test_the_check_for_flushing_can_fail(backend):
    """What Chainer and thinc would write flushes, or swallows NaN, under CuPy's -ftz=true."""
    import cupy
    import cupy_host

    for operation in ("y = x > 0 ? x : T(0)", "y = x * T(0.01)", "y = max(x, T(0))"):
        naive = cupy.ElementwiseKernel("T x", "T y", operation, "naive")
        code, _ = cupy_host.source(naive, ["f4", "f4"], [(1, True)] * 3)
        assert re.search(r"\.ftz\b", cupy_host.compile_for(code, 90, ptx=True)), operation


@pytest.mark.parametrize(("name", "loads"), [("backward_bits", 2), ("backward_from_input", 2)])
def test_loads_are_issued_together(backend, name, loads):
    """No load waits for a comparison: a basic block that loads one operand loads them all."""
    import cupy_host

    for types, code in sources(backend.KERNELS[name]):
        for block in basic_blocks(cupy_host.compile_for(code, 90, ptx=True)):
            assert block.count("ld.global") in (0, loads), types


def test_the_check_for_loads_can_fail(backend):
    import cupy
    import cupy_host

    late = cupy.ElementwiseKernel(
        "T dy, T x, T a", "T dx", "if (x > 0) { dx = a * dy; } else { dx = 0; }", "late"
    )
    flat = (1, True)
    code, _ = cupy_host.source(late, ["f4", "f4", None, "f4"], [flat, flat, None, flat, flat])
    blocks = basic_blocks(cupy_host.compile_for(code, 90, ptx=True))
    assert {block.count("ld.global") for block in blocks} == {0, 1}


def basic_blocks(ptx):
    return re.split(r"\n\$L\w+:|\bbra[.\w]*\s[^\n]*", ptx)


def test_numbers_are_arguments_not_source(backend):
    """One kernel a rule: a new slope compiles nothing."""
    assert set(backend.KERNELS) == {*KERNELS, "forward_integer"}
    with LIBRARIES["cupy_host"].running():
        import cupy_host

        before = cupy_host._compiled.cache_info().misses
        x = cupy_host.array(np.array([-1.0, 2.0], np.float32))
        for slope in (0.0, 0.1, 0.7, -3.0):
            relu_xp.relu(x, negative_slope=slope, threshold=slope / 8, max_value=5 + slope)
        assert cupy_host._compiled.cache_info().misses <= before + 1


def test_launches(backend):
    """Exactly one launch a call, flat where the layout allows it."""
    with LIBRARIES["cupy_host"].running() as launches:
        import cupy_host

        flat, shape = [(1, True)], (6, 8)
        for order in "CF":
            host = np.array(np.ones(shape, np.float32), order=order)
            x = cupy_host.array(host)
            launches.clear()
            _, pullback = relu_xp.relu_vjp(x)
            assert launches == [("relu_xp_forward_bits", flat * 3)]
            launches.clear()
            pullback(x)
            assert launches == [("relu_xp_backward_bits", flat * 3)]
        x = cupy_host.array(np.ones((6, 16), np.float32)[:, ::2])
        launches.clear()
        relu_xp.relu(x)
        assert launches == [("relu_xp_forward", [(2, False), (2, True)])]
        launches.clear()
        relu_xp.relu_vjp(x)[1](x)
        assert [name for name, _ in launches] == ["relu_xp_forward_bits", "relu_xp_backward_bits"]
        for empty in ((0,), (3, 0)):
            x = cupy_host.array(np.ones(empty, np.float32))
            assert relu_xp.relu_vjp(x)[1](x).shape == empty


def test_integers(backend):
    with LIBRARIES["cupy_host"].running():
        import cupy_host

        for dtype in map(np.dtype, INTEGERS):
            info = np.iinfo(dtype)
            host = np.array([info.min, 0, 1, 2, 7, info.max], dtype)
            x = cupy_host.array(host)
            for numbers in ({}, {"max_value": 6}, {"threshold": 1, "negative_slope": 3}):
                got = cupy_host.to_numpy(relu_xp.relu(x, **numbers))
                assert got.dtype == dtype
                np.testing.assert_array_equal(got, relu_xp.relu(host, **numbers))


def test_two_libraries_and_two_devices_are_refused(backend):
    with LIBRARIES["cupy_host"].running():
        import cupy_host

        host = np.ones(3, np.float32)
        _, pullback = relu_xp.relu_vjp(cupy_host.array(host))
        with pytest.raises(
            TypeError,
            match=r"^pullback: forward saw CuPy on device 0, dy is NumPy; move it first, for "
            r"example cupy\.asarray\(dy\)$",
        ):
            pullback(host)
        with pytest.raises(
            ValueError, match="^pullback: forward saw CuPy on device 0, dy is CuPy on device 1; "
        ):
            pullback(cupy_host.array(host, device=1))
        with pytest.raises(TypeError, match=r"dy is CuPy on device 0; .* cupy\.asnumpy\(dy\)$"):
            relu_xp.relu_vjp(host)[1](cupy_host.array(host))


def test_kernels_run_on_the_device_of_the_array(backend, monkeypatch):
    """Another device is entered for the launch, the current one is not entered again."""
    import cupy

    entered = []

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            entered.append(self.number)

        def __exit__(self, *error):
            entered.append("left")

    with LIBRARIES["cupy_host"].running():
        import cupy_host

        monkeypatch.setattr(cupy.cuda, "Device", Device)
        host = np.array([-1.0, 2.0], np.float32)
        relu_xp.relu(cupy_host.array(host))
        assert entered == []
        relu_xp.relu(cupy_host.array(host, device=1), out=cupy_host.array(host.copy(), device=1))
        assert entered == [1, "left"]


def test_two_arrays_over_one_memory_overlap_though_neither_has_a_base(backend, require):
    """CuPy knows an owner only for views of its own: of DLPack and pointers it does not."""
    cupy = require("cupy")
    with LIBRARIES["cupy_host"].running():
        import cupy_host

        whole = cupy_host.array(np.zeros(9, np.float32))
        x, out = (cupy.ndarray((8,), np.float32, whole.data + offset) for offset in (0, 4))
        assert x.base is None
        with pytest.raises(ValueError, match="overlaps an input"):
            relu_xp.relu(x, out=out)
