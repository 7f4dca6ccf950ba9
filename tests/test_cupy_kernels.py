"""CuPy's kernels without a device: compiled for five architectures, read, and run on the CPU."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from libraries import LIBRARIES

import relu_xp
from relu_xp.testing import oracle

ARCHITECTURES = (75, 80, 90, 100, 120)
INTEGERS = tuple(f"{sign}int{width}" for sign in ("", "u") for width in (8, 16, 32, 64))
PASSES = (
    "forward",
    "forward_bits",
    "forward_bytes",
    "gradient",
    "backward_bits",
    "backward_bytes",
    "backward_from_input",
)
VARIANTS = (
    "prelu",
    "prelu_forward",
    "scale",
    "slopes",
    "squared_relu",
    "squared_relu_backward",
    "crelu",
    "crelu_mask",
    "crelu_backward",
    "sums",
    "round_to",
    "copy",
)
FLAT, CUBE, STRIDED = (1, True), (3, True), (3, False)  # axes, and whether they are in C order
# The layouts that the kernels of a pass come in: whether they are vectorized, and of what. Operands
# that are dense in another order of their axes are permuted first: they come as "cube".
FORMS = {
    "flat": (True, FLAT),
    "cube": (True, CUBE),
    "misaligned": (False, FLAT),
    "strided": (False, STRIDED),
}


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


@pytest.fixture(scope="module")
def disassemble(backend, request):
    import cupy_host
    from conftest import unavailable

    if cupy_host.disassembler() is None:
        unavailable(request.config, "nvdisasm is not installed")
    return cupy_host.disassemble


def members(name):
    """Return every choice of numbers that a member can give to a pass, as letters."""
    slopes = ["", "a", "b", "ab"]
    if name == "backward_from_input":
        return [s + rest for s in slopes for rest in ("", "t", "c", "tc", "fc", "tfc")]
    if name in ("backward_bits", "backward_bytes"):
        return slopes
    every = [
        "".join(x for x in "tabc" if x in s + rest) for s in slopes for rest in ("", "t", "c", "tc")
    ]
    if name == "forward_bits":  # a maximum and a negative slope make three branches
        return [given for given in every if not {"a", "c"} <= {*given}]
    if name == "forward_bytes":  # in which the slope may be one that x's dtype rounds to 0
        return [given for given in every if "c" in given]
    return every


def source(kernel, t, x, layout, small=True):
    """Return what CuPy generates for dtypes T and X."""
    import cupy_host

    of = {"T": _dtype(t), "X": _dtype(x)}
    types, layouts = [], []
    for p in kernel.params[:-1]:
        is_array = p.name in ("x", "y", "g", "dy", "dx", "mask")
        types.append(of.get(p.ctype, p.dtype) if is_array else None)
        layouts.append((FLAT if p.name == "mask" else layout) if is_array else None)
    raw = all(p.raw for p, given in zip(kernel.params, types, strict=False) if given is not None)
    return cupy_host.source(kernel, types, [*layouts, FLAT if raw else layout], small)[0]


def _dtype(name):
    return oracle.DTYPES.get(name) or np.dtype(name)


def sources(backend, name, t, forms=tuple(FORMS), small=True):
    """Return all sources of a pass for a dtype, by (form, x's dtype, numbers given)."""
    found = {}
    for form, given in itertools.product(forms, members(name)):
        vectorized, layout = FORMS[form]
        kernel = backend.kernel(name, given, vectorized)
        for x in oracle.DTYPES if name == "backward_from_input" else (t,):
            found[form, x, given] = source(kernel, t, x, layout, small)
    return found


def every_pass(function):
    return pytest.mark.parametrize("t", oracle.DTYPES)(
        pytest.mark.parametrize("name", PASSES)(function)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@every_pass
def test_every_kernel_compiles(backend, name, t, architecture):
    """All members, both kernels, aligned and not, contiguous and not."""
    import cupy_host

    forms = tuple(FORMS) if architecture == 90 else ("flat", "strided")
    found = sources(backend, name, t, forms)
    cubin = cupy_host.compile_for(cupy_host.merge(found.values(), backend._PREAMBLE), architecture)
    assert cubin[:4] == b"\x7fELF"


def test_the_members_that_are_compiled_are_all_there_are(backend):
    possible = {
        backend.kernel(name, given, vectorized).name
        for name in PASSES
        for given in members(name)
        for vectorized in (True, False)
    }
    with LIBRARIES["cupy_host"].running() as launches:
        import cupy_host

        dtypes = oracle.DTYPES.values()
        for numbers, x, dy in itertools.product(oracle.MEMBERS.values(), dtypes, dtypes):
            run_all(cupy_host.array(np.ones(1, x)), cupy_host.array(np.ones(1, dy)), numbers)
    assert {name for name, _ in launches} <= possible


def run_all(x, dy, numbers):
    """Run all passes of a member; return y, the mask's bytes and the gradients."""
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    gradients = pullback(dy), relu_xp.relu_backward(dy, x, **numbers)
    forward, slope = (f(x, **numbers) for f in (relu_xp.relu, relu_xp.relu_grad))
    return forward, y, pullback._saved.data, *gradients, slope


def test_a_source_is_what_cupy_compiles_also_alone(backend):
    """Merged or not: the exact source, for each pass and dtype."""
    import cupy_host

    for name, t in itertools.product(PASSES, oracle.DTYPES):
        kernel = backend.kernel(name, members(name)[-1], True)
        assert cupy_host.compile_for(source(kernel, t, t, FLAT), 90)[:4] == b"\x7fELF"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integer_kernels_compile(backend, architecture):
    import cupy_host

    for t, layout in itertools.product(INTEGERS, (FLAT, STRIDED)):
        code = source(backend.FORWARD_INTEGER, t, t, layout)
        assert cupy_host.compile_for(code, architecture)[:4] == b"\x7fELF"


def test_indices_of_64_bits_compile(backend):
    import cupy_host

    for name in PASSES:
        codes = sources(backend, name, "float16", small=False).values()
        assert all("CIndexer<1, 0>" in code or "CIndexer<3, 0>" in code for code in codes)
        merged = cupy_host.merge(codes, backend._PREAMBLE)
        assert cupy_host.compile_for(merged, 90)[:4] == b"\x7fELF"


@every_pass
def test_what_the_compiler_made(backend, name, t):
    """F4: nothing is flushed. No array in local memory; 16 bytes an access; loads come first."""
    import cupy_host

    found = sources(backend, name, t)
    merged = cupy_host.merge(found.values(), backend._PREAMBLE)
    made = re.split(r"\.visible \.entry ", cupy_host.compile_for(merged, 90, ptx=True))[1:]
    for number, ((form, x, given), ptx) in enumerate(zip(found, made, strict=True)):
        what = f"{form} {x} {given}"
        assert re.match(rf"relu_xp_{name}_\w+_{number}\(", ptx), what
        assert not re.search(r"\.ftz\b", ptx), what
        assert not re.search(r"\b(ld|st)\.local\b|\.local \.align", ptx), what
        check_products(ptx, products(name, t, x, given), what)
        check_memory(ptx, expected_accesses(backend, name, t, x, form), what)


def products(name, t, x, given):
    """Return the dtypes that a pass multiplies in."""
    if name == "gradient":  # whose slopes are its results; b*x is compared with a maximum
        return {t} if {*"bc"} <= {*given} else set()
    return {t for letter in given if letter in "ab"} | {x for letter in given if letter == "f"}


def check_products(ptx, dtypes, what):
    """A product is one instruction that -ftz leaves alone, and there is none that is not due."""
    wanted = {"mul.rn.f64" if dtype == "float64" else "mul.rn.f32" for dtype in dtypes}
    assert set(re.findall(r"\b(?:mul|fma)\S*\.(?:f16|bf16|f32|f64)\S*", ptx)) == wanted, what


def expected_accesses(backend, name, t, x, form):
    """Return the sizes in bytes of all loads, and of all stores, of each path of a kernel."""
    sizes = [oracle.DTYPES[dtype].itemsize for dtype in (t, x)]

    def path(count):
        mask = 1 if name.endswith("bits") or count == 1 else count
        inputs = {
            "forward": [sizes[0]],
            "gradient": [sizes[0]],
            "backward": [sizes[0], None],
            "backward_from_input": sizes,
        }[name.removesuffix("_bits").removesuffix("_bytes")]
        outputs = [sizes[0], None] if name in ("forward_bits", "forward_bytes") else [sizes[0]]
        return tuple([mask if s is None else s * count for s in a] for a in (inputs, outputs))

    if not FORMS[form][0]:
        return [path(1)]
    loads, stores = path(16 // max(sizes))
    assert 16 in loads
    return [path(1), (loads * backend._CHUNKS, stores * backend._CHUNKS)]


def check_memory(ptx, paths, what):
    """Each path has its loads in one block, before any store; and the stores are what they are."""
    blocks = [accesses(block) for block in basic_blocks(ptx)]
    loading = [block for block in blocks if any(kind == "ld" for kind, _ in block)]
    loads = [sorted(size for kind, size in block if kind == "ld") for block in loading]
    assert sorted(loads) == sorted(sorted(path[0]) for path in paths), what
    for block in loading:
        kinds = [kind for kind, _ in block]
        assert kinds == sorted(kinds), what
    stores = sorted(size for block in blocks for kind, size in block if kind == "st")
    assert stores == sorted(size for path in paths for size in path[1]), what


def accesses(block):
    """Return the loads from and the stores to global memory, with their sizes in bytes."""
    found = re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.[a-z]+(\d+)", block)
    assert len(found) == len(re.findall(r"\b(?:ld|st)\.global", block))
    return [(kind, int(count or 1) * int(bits) // 8) for kind, count, bits in found]


def basic_blocks(ptx):
    return re.split(r"\n\$L\w+:|\bbra[.\w]*\s[^\n]*", ptx)


@pytest.mark.parametrize("architecture", [75, 80, 90, 100, 120])
@every_pass
def test_what_the_assembler_made(backend, disassemble, name, t, architecture):
    """The machine's own instructions: 16 bytes an access, no spill, no branch for an element."""
    import cupy_host

    found = {
        key: code
        for key, code in sources(backend, name, t, ("flat", "cube")).items()
        if key[1] == t
    }
    cubin = cupy_host.compile_for(cupy_host.merge(found.values(), backend._PREAMBLE), architecture)
    instructions = disassemble(cubin)
    assert len(instructions) == len(found)
    for kernel, lines in instructions.items():
        text = "\n".join(lines)
        wide = {kind: len(re.findall(rf"\b{kind}\.E\S*\.128\b", text)) for kind in ("LDG", "STG")}
        operands = 2 if name == "backward_from_input" else 1
        assert wide["LDG"] == operands * backend._CHUNKS, kernel
        assert wide["STG"] >= backend._CHUNKS, kernel  # of a shuffle there is a copy, out of line
        assert not re.search(r"\b(LDL|STL)\b", text), kernel
        assert len(re.findall(r"\bBRA\b", text)) <= (20 if "SHFL" in text else 12), kernel
        assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < 64, kernel  # half of the threads


def variant_sources(backend, name, t):
    """Return all sources of a variant's kernel for a dtype, by (x's dtype, the slopes', layout)."""
    import cupy_host

    kernel = backend.variant(name)
    counts = ("outer", "channels", "inner", "rows", "columns")
    of = {"T": (t,), "X": oracle.DTYPES, "W": oracle.DTYPES}
    used = {p.ctype for p in kernel.params[:-1]}
    found = {}
    for x, w, layout in itertools.product(
        of["X"] if "X" in used else (t,), of["W"] if "W" in used else (t,), (FLAT, CUBE, STRIDED)
    ):
        dtypes = {"T": _dtype(t), "X": _dtype(x), "W": _dtype(w)}
        types = [
            None if p.name in counts else dtypes.get(p.ctype, p.dtype) for p in kernel.params[:-1]
        ]
        layouts = [None if p.name in counts else layout for p in kernel.params]
        found[x, w, layout] = cupy_host.source(kernel, types, layouts)[0]
    return found


@pytest.mark.parametrize("t", oracle.DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
class TestVariants:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_every_kernel_compiles(self, backend, name, t, architecture):
        import cupy_host

        found = variant_sources(backend, name, t)
        if architecture != 90:
            found = {key: code for key, code in found.items() if key[2] == FLAT}
        merged = cupy_host.merge(found.values(), backend._PREAMBLE)
        assert cupy_host.compile_for(merged, architecture)[:4] == b"\x7fELF"

    def test_nothing_is_flushed_and_nothing_waits(self, backend, name, t):
        """F4; no array in local memory; all loads in one block, before any store."""
        import cupy_host

        found = variant_sources(backend, name, t)
        merged = cupy_host.merge(found.values(), backend._PREAMBLE)
        made = re.split(r"\.visible \.entry ", cupy_host.compile_for(merged, 90, ptx=True))[1:]
        for (x, w, layout), ptx in zip(found, made, strict=True):
            what = f"{x} {w} {layout}"
            assert not re.search(r"\.ftz\b", ptx), what
            assert not re.search(r"\b(ld|st)\.local\b|\.local \.align", ptx), what
            if name != "sums":
                blocks = [accesses(block) for block in basic_blocks(ptx)]
                loading = [block for block in blocks if any(kind == "ld" for kind, _ in block)]
                assert len(loading) == 1, what
                kinds = [kind for kind, _ in loading[0]]
                assert kinds == sorted(kinds), what


def test_the_variants_are_all_there_are(backend):
    assert set(backend.VARIANTS) == set(VARIANTS)


def test_the_checks_can_fail(backend):
    """What Chainer and thinc would write flushes, or swallows NaN, under CuPy's -ftz=true."""
    import cupy
    import cupy_host

    for operation in ("y = x > 0 ? x : T(0)", "y = x * T(0.01)", "y = max(x, T(0))"):
        naive = cupy.ElementwiseKernel("T x", "T y", operation, "naive")
        ptx = cupy_host.compile_for(source(naive, "float32", None, FLAT), 90, ptx=True)
        assert re.search(r"\.ftz\b", ptx), operation
    late = cupy.ElementwiseKernel(
        "T dy, T x, T a", "T dx", "if (x > 0) { dx = a * dy; } else { dx = 0; }", "late"
    )
    ptx = cupy_host.compile_for(source(late, "float32", None, FLAT), 90, ptx=True)
    with pytest.raises(AssertionError):
        check_memory(ptx, [([4, 4], [4])], "late")
    with pytest.raises(AssertionError):
        check_products(ptx, {"float32"}, "late")


def test_numbers_are_arguments_not_source(backend):
    """A new slope compiles nothing; what a number's absence leaves out is compiled for itself."""
    with LIBRARIES["cupy_host"].running() as launches:
        import cupy_host

        before = cupy_host._compiled.cache_info().misses
        x = cupy_host.array(np.array([-1.0, 2.0], np.float32))
        for slope in (0.3, 0.1, 0.7, -3.0):
            relu_xp.relu(x, negative_slope=slope, threshold=slope / 8, max_value=5 + slope)
        assert cupy_host._compiled.cache_info().misses <= before + 1
        relu_xp.relu(x)
        relu_xp.relu(x, negative_slope=1e-60)  # which float32 rounds to 0
    assert [name for name, _ in launches] == [
        *["relu_xp_forward_tac_vectorized"] * 4,
        *["relu_xp_forward_vectorized"] * 2,
    ]


# ---- The source run on the CPU ------------------------------------------------------------------


# Numbers that a dtype rounds to 0, to infinity or to a subnormal.
EXTREMES = {
    "slope to zero": {"positive_slope": 1e-320},
    "slopes overflow": {"positive_slope": -1e300, "negative_slope": 1e300, "threshold": 1e-6},
    "knee overflows": {"threshold": 1e300, "negative_slope": 1e-40},
    "knee below all": {"threshold": -1e300, "positive_slope": 2.0, "max_value": 1e-40},
    "ceiling overflows": {"threshold": -1e-40, "max_value": 1e300, "negative_slope": -1.0},
}


@pytest.mark.parametrize("dy_dtype", oracle.DTYPES)
@pytest.mark.parametrize("x_dtype", oracle.DTYPES)
def test_the_same_bits_as_numpy(backend, x_dtype, dy_dtype):
    """Every member, 65,536 patterns or the specials and random ones, NaN payloads and products."""
    x = oracle.patterns(x_dtype).view(oracle.DTYPES[x_dtype])
    dy = oracle.gradients(dy_dtype, x.size).view(oracle.DTYPES[dy_dtype])
    with LIBRARIES["cupy_host"].running(), np.errstate(all="ignore"):
        import cupy_host

        for member, numbers in (oracle.MEMBERS | EXTREMES).items():
            got = run_all(cupy_host.array(x), cupy_host.array(dy), numbers)
            for one, wanted in zip(got, run_all(x, dy, numbers), strict=True):
                check_bits(cupy_host.to_numpy(one), wanted, f"{member} {wanted.dtype}")


def check_bits(got, wanted, what):
    """Compare all bits, but those of infinity * 0: each processor has a NaN of its own for that."""
    assert got.dtype == wanted.dtype
    wanted = wanted[: got.size]  # a mask may be longer than needed
    unsigned = f"u{got.itemsize}"
    differ = got.view(unsigned) != wanted.view(unsigned)
    if differ.any() and what.startswith(("nearly-one", "slope")):
        differ &= ~(np.isnan(got) & np.isnan(wanted))
    assert not differ.any(), (what, got[differ][:5], wanted[differ][:5])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_tails_and_misaligned_views(backend, dtype):
    """0 to 33 elements, and those around whole tiles; each start within 16 bytes; fences intact."""
    itemsize = oracle.DTYPES[dtype].itemsize
    tile = 32 * backend._CHUNKS * (16 // itemsize)
    sizes = [
        *range(34),
        *(k * tile + rest for k in (1, 2, 5) for rest in (-9, -1, 0, 1, 8, 31, 33)),
    ]
    rng = np.random.default_rng(7)
    source = rng.choice(oracle.specials(dtype), max(sizes)).view(oracle.DTYPES[dtype])
    other = rng.choice(oracle.specials(dtype), max(sizes)).view(oracle.DTYPES[dtype])
    starts, some = range(0, 16 // itemsize + 1), (0, 7, 33, tile + 33)
    with LIBRARIES["cupy_host"].running() as launches, np.errstate(all="ignore"):
        import cupy_host

        for size, numbers in itertools.product(
            sizes, ({}, {"negative_slope": 0.5, "max_value": 2.0})
        ):
            x, dy = source[:size], other[:size]
            wanted = run_all(x, dy, numbers)
            nbytes = -(-size // 8) if not numbers else size
            moved = itertools.product(starts, (0, 1, 8)) if size in some else ((0, 0),)
            for start, mask_start in moved:
                memory = [cupy_host.fenced(a, start) for a in (x, dy, x, dy, x)]
                mask = cupy_host.fenced(np.zeros(nbytes, np.uint8), mask_start)
                xs, dys, y, dx, g = (view for view, _ in memory)
                aligned = start * itemsize % 16 == 0
                launches.clear()
                _, pullback = relu_xp.relu_vjp(xs, out=y, mask=mask[0], **numbers)
                pullback(dys, out=dx)
                form = "vectorized" if aligned and mask_start == 0 else "strided"
                assert size == 0 or all(name.endswith(form) for name, _ in launches)
                for one, bits in zip((y, mask[0], dx), wanted[1:4], strict=True):
                    check_bits(cupy_host.to_numpy(one), bits, f"{size} {start}")
                launches.clear()
                relu_xp.relu(xs, out=y, **numbers)
                relu_xp.relu_backward(dys, xs, out=dx, **numbers)
                relu_xp.relu_grad(xs, out=g, **numbers)
                form = "vectorized" if aligned else "strided"
                assert size == 0 or all(name.endswith(form) for name, _ in launches)
                for one, bits in zip((y, dx, g), (wanted[0], *wanted[4:]), strict=True):
                    check_bits(cupy_host.to_numpy(one), bits, f"{size} {start}")
                assert all(intact() for _, intact in (*memory, mask)), (size, start)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_slope_that_is_nan_is_the_result(backend, dtype):
    """Sign and payload, also of a NaN that is multiplied; above 0 nothing is multiplied."""
    form = oracle.Format(dtype)
    nan = form.sign | form.infinity | (form.infinity >> 1 & ~form.infinity) | 3
    quiet = form.infinity | form.infinity >> 1 | 1
    one = oracle.DTYPES[dtype].type(1).view(form.unsigned)
    words = np.array([form.sign | one, one, quiet, form.sign | form.infinity, 0], form.unsigned)
    slopes = np.full(5, nan, form.unsigned)
    with LIBRARIES["cupy_host"].running():
        import cupy_host

        x, a = (cupy_host.array(bits.view(oracle.DTYPES[dtype])) for bits in (words, slopes))
        for got, upper in (
            (backend.sloped(x, x, a, None), words),
            (backend.sloped(None, x, a, None), np.full(5, one, form.unsigned)),
        ):
            wanted = [nan, upper[1], upper[2], nan, nan]
            assert cupy_host.to_numpy(got).view(form.unsigned).tolist() == wanted
        for got in (backend.sloped(x, None, a, None),):
            assert cupy_host.to_numpy(got).view(form.unsigned).tolist() == slopes.tolist()


def test_float64_is_rounded_to_16_bits_once(backend):
    """By way of float32 to nearest it would be twice: 1 + 2**-11 is halfway to the next float16."""
    import cupy_host

    x = np.array([(1 + 2.0**-11 - 2.0**-40) / 2])
    with LIBRARIES["cupy_host"].running():
        _, pullback = relu_xp.squared_relu_vjp(cupy_host.array(x))
        dx = pullback(cupy_host.array(np.ones(1, np.float16)))
        assert cupy_host.to_numpy(dx).tolist() == [1.0]
    for name, key in (
        ("squared_relu_backward", ("float64", "float16", FLAT)),
        ("prelu", ("float16", "float64", FLAT)),
        ("round_to", ("float16", "float16", FLAT)),
    ):
        ptx = cupy_host.compile_for(variant_sources(backend, name, "float16")[key], 90, ptx=True)
        conversions = re.findall(r"\bcvt\.\w+\.f32\.f64\b", ptx)
        assert set(conversions) == {"cvt.rz.f32.f64"}, name


def test_a_subnormal_slope_of_a_narrower_dtype_is_no_zero(backend):
    import cupy_host

    slope = np.array([1e-40], np.float32)
    with LIBRARIES["cupy_host"].running():
        y = backend.sloped(*[cupy_host.array(np.array([-2.0]))] * 2, cupy_host.array(slope), None)
        assert cupy_host.to_numpy(y).tolist() == [-2.0 * float(slope[0])]
    code = variant_sources(backend, "prelu_forward", "float64")["float64", "float32", FLAT]
    ptx = cupy_host.compile_for(code, 90, ptx=True)
    assert set(re.findall(r"\bcvt\S*\.f64\.f32\b", ptx)) == {"cvt.f64.f32"}


HOST_CHECKS = {
    "apart": (
        '"if (i != 3) y[i] = __ballot_sync(0xff, 1);"',
        -6,
        "waits for 3, which does not come",
    ),
    "misaligned": ('"*(double2*)&y[1] = {0.0, 0.0};"', -4, ""),
}


@pytest.mark.parametrize("flaw", HOST_CHECKS)
def test_what_stops_a_device_stops_the_host(backend, flaw):
    """The checks of votes and of alignment can fail."""
    operation, status, message = HOST_CHECKS[flaw]
    preamble = "struct alignas(16) double2 { double x, y; };"
    script = f"""
        import cupy, numpy, cupy_host
        kernel = cupy.ElementwiseKernel(
            "raw T x", "raw T y", {operation}, "{flaw}", preamble="{preamble}"
        )
        x = cupy_host.array(numpy.ones(8, numpy.int32))
        cupy_host.HostKernel(kernel, [])(x, x, size=8)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == status, done.stderr
    assert message in done.stderr


# ---- Which kernel runs --------------------------------------------------------------------------


def layouts():
    """Return arrays of one shape in several layouts, and which kernel is to run on each."""
    host = np.arange(6 * 8, dtype=np.float32).reshape(6, 8) - 20
    wide = np.zeros((6, 16), np.float32)
    tall = np.zeros((12, 8), np.float32)
    flat = np.zeros(49, np.float32)
    return {
        "C": (host, "vectorized"),
        "Fortran": (np.asfortranarray(host), "vectorized"),
        "columns": (wide[:, ::2], "strided"),
        "rows": (tall[::2], "strided"),
        "reversed": (host.copy()[::-1], "strided"),
        "part of rows": (wide[:, :8], "strided"),
        "misaligned": (flat[1:].reshape(6, 8), "strided"),
        "broadcast": (np.broadcast_to(host[0], (6, 8)), "strided"),
    }


@pytest.mark.parametrize("layout", layouts())
def test_the_layout_chooses_the_kernel(backend, layout):
    """One launch a call. An aligned array takes the fast kernel always, a strided one never."""
    host, form = layouts()[layout]
    with LIBRARIES["cupy_host"].running() as launches:
        import cupy_host

        x = cupy_host.array(host)
        alike, otherwise = (
            cupy_host.array(np.ones((6, 8), np.float32, order=order))
            for order in ("FC" if layout == "Fortran" else "CF")
        )

        def check(wanted, function, *arrays, **options):
            launches.clear()
            result = function(*arrays, **options)
            ((name, _),) = launches
            assert name == f"relu_xp_{wanted}"
            return result

        for kind, numbers in {"bits": {}, "bytes": {"negative_slope": 0.5, "max_value": 3}}.items():
            ac, a = ("_ac", "_a") if numbers else ("", "")
            check(f"forward{ac}_{form}", relu_xp.relu, x, **numbers)
            check(f"forward{ac}_strided", relu_xp.relu, x, **numbers, out=otherwise)
            _, pullback = check(f"forward_{kind}{ac}_{form}", relu_xp.relu_vjp, x, **numbers)
            for dy, its_form in ((alike, "vectorized"), (otherwise, "strided"), (x, form)):
                check(f"backward_{kind}{a}_{its_form}", pullback, dy)
                both = "vectorized" if form == its_form == "vectorized" else "strided"
                check(f"backward_from_input{ac}_{both}", relu_xp.relu_backward, dy, x, **numbers)


@pytest.mark.parametrize(
    "numbers", [{}, {"negative_slope": 0.5, "max_value": 3.0}], ids=["bits", "bytes"]
)
def test_dense_arrays_take_the_vectorized_kernel_in_any_order_of_axes(backend, numbers):
    """As NHWC seen as NCHW. The mask counts in memory order, and results keep the layout."""
    rng = np.random.default_rng(11)
    shapes = ((2, 3, 4, 5), (3, 1, 2, 8))
    with LIBRARIES["cupy_host"].running() as launches:
        import cupy_host

        for shape, axes in itertools.product(shapes, itertools.permutations(range(4))):
            memory, gradient = rng.standard_normal((2, *shape)).astype(np.float32) * 4
            x, dy = (cupy_host.array(host.transpose(axes)) for host in (memory, gradient))
            launches.clear()
            *results, mask, dx, from_input, slope = run_all(x, dy, numbers)
            results += [dx, from_input, slope]
            assert len(launches) == len(results)
            assert all(name.endswith("_vectorized") for name, _ in launches), axes
            assert len({str(arrays) for _, arrays in launches if len(arrays) == 2}) == 1
            branches = (memory > 0) * (1 + (memory >= numbers.get("max_value", np.inf)))
            packed = branches.ravel() if numbers else np.packbits(memory > 0, bitorder="little")
            np.testing.assert_array_equal(cupy_host.to_numpy(mask), packed)
            with np.errstate(all="ignore"):
                wanted = run_all(memory, gradient, numbers)
            for got, in_memory_order in zip(results, (*wanted[:2], *wanted[3:]), strict=True):
                assert steps(got) == steps(x)
                host = cupy_host.to_numpy(got)
                np.testing.assert_array_equal(host, in_memory_order.transpose(axes))
            # A gradient of another layout goes element by element, and so may the output.
            launches.clear()
            _, pullback = relu_xp.relu_vjp(x, **numbers)
            flat = cupy_host.array(np.ascontiguousarray(gradient.transpose(axes)))
            np.testing.assert_array_equal(
                cupy_host.to_numpy(pullback(flat)), cupy_host.to_numpy(dx)
            )
            form = "vectorized" if steps(flat) == steps(x) else "strided"
            assert launches[-1][0].endswith(form)


def steps(x):
    """Return the strides that are ever taken."""
    return [stride for stride, length in zip(x.strides, x.shape, strict=True) if length != 1]


def test_small_and_empty_arrays(backend):
    with LIBRARIES["cupy_host"].running() as launches:
        import cupy_host

        for shape, form in (((), "strided"), ((1,), "vectorized"), ((1, 1, 1), "vectorized")):
            x = cupy_host.array(np.full(shape, 3.0, np.float32))
            launches.clear()
            assert relu_xp.relu_vjp(x)[1](x).shape == shape
            assert [name.rpartition("_")[2] for name, _ in launches] == [form] * 2
        for empty in ((0,), (3, 0)):
            x = cupy_host.array(np.ones(empty, np.float32))
            assert relu_xp.relu_vjp(x)[1](x).shape == empty


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("numbers", [{}, {"negative_slope": 0.5, "max_value": 3.0}], ids=str)
def test_given_memory_nothing_is_allocated(backend, order, numbers):
    import cupy

    with LIBRARIES["cupy_host"].running():
        import cupy_host

        x, dy, y, dx = (
            cupy_host.array(np.ones((40, 50), np.float32, order=order)) for _ in range(4)
        )
        mask = cupy_host.array(np.zeros(2000, np.uint8))

        def allocate(size):
            raise AssertionError(f"{size} bytes were allocated")

        with cupy.cuda.using_allocator(allocate):
            _, pullback = relu_xp.relu_vjp(x, out=y, mask=mask, **numbers)
            pullback(dy, out=dx)
            relu_xp.relu_backward(dy, x, out=dx, **numbers)
            relu_xp.relu_grad(x, out=dx, **numbers)
            relu_xp.relu(x[::2], out=y[::2])
            with pytest.raises(AssertionError, match="were allocated"):
                relu_xp.relu_vjp(x, out=y)
            layer = relu_xp.ReLU(inplace=True, **numbers)
            layer.forward(x, mask=mask)
            layer.backward(dy)


def test_out_of_memory_leaves_all_as_it_was(backend):
    """CuPy's own error; what was saved before is still there, and the next call works."""
    import cupy

    def allocate(size):
        raise cupy.cuda.memory.OutOfMemoryError(size, 0)

    with LIBRARIES["cupy_host"].running():
        import cupy_host

        x = cupy_host.array(np.array([-2.0, 4.0], np.float32))
        y = cupy_host.array(np.zeros(2, np.float32))
        layer = relu_xp.LeakyReLU(0.5)
        layer.forward(x)
        for options in ({}, {"out": y}):  # for the result, and for the mask
            with (
                cupy.cuda.using_allocator(allocate),
                pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating"),
            ):
                layer.forward(x, **options)
        assert cupy_host.to_numpy(y).tolist() == [0, 0]
        assert cupy_host.to_numpy(layer.backward(x)).tolist() == [-1, 4]


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
        for given, there in (("out", host.copy()), ("mask", np.zeros(8, np.uint8))):
            with pytest.raises(ValueError, match=f"x is CuPy on device 0, {given} is CuPy on dev"):
                relu_xp.relu_vjp(cupy_host.array(host), **{given: cupy_host.array(there, 1)})
        assert entered == [1, "left"]


def test_two_imports_of_one_memory_overlap(backend):
    """Of DLPack and bare pointers CuPy knows no owner, and takes two starts for two memories."""
    import cupy

    with LIBRARIES["cupy_host"].running():
        import cupy_host

        host = np.zeros(9, np.float32)
        x, out = cupy_host.array(host[:8]), cupy_host.array(host[1:])
        assert not cupy.may_share_memory(x, out)
        mask = cupy_host.array(host.view(np.uint8)[5:13])
        backwards = cupy_host.array(host[:0:-1])
        for call in (
            lambda: relu_xp.relu(x, out=out),
            lambda: relu_xp.relu(x, out=backwards),
            lambda: relu_xp.relu_backward(out, x, out=out),
            lambda: relu_xp.relu_vjp(x, mask=mask),
        ):
            with pytest.raises(ValueError, match="overlaps an input"):
                call()
        whole = cupy_host.array(host)
        x, out = (cupy.ndarray((8,), np.float32, whole.data + offset) for offset in (0, 4))
        with pytest.raises(ValueError, match="overlaps an input"):
            relu_xp.relu(x, out=out)
        apart = cupy_host.array(np.zeros(8, np.float32))
        assert relu_xp.relu(x, out=apart) is apart
