"""CuPy's kernels as compiled for five architectures: PTX and machine code, without a device."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from libraries import LIBRARIES, unavailable
from passes import run_all

from relu_xp.parameters import DTYPES, is_integer
from relu_xp.testing import reference

cupy_host = pytest.importorskip("cupy_host", exc_type=ImportError)
kernels = pytest.importorskip("relu_xp.backends.cupy_kernels")
if reason := LIBRARIES["cupy_host"].load():
    pytest.skip(reason, allow_module_level=True)
pytestmark = pytest.mark.slow

ARCHITECTURES = (75, 80, 90, 100, 120)
FLOATING = reference.DTYPES
FLAT, CUBE, STRIDED = (1, True), (3, True), (3, False)  # axes, and whether they are in C order
# The layouts that the kernels of a pass come in: whether they are vectorized, and of what. Operands
# that are dense in another order of their axes are permuted first: they come as "cube".
FORMS = {
    "flat": (True, FLAT),
    "cube": (True, CUBE),
    "misaligned": (False, FLAT),
    "strided": (False, STRIDED),
}


def of_each(names):
    """Return a decorator that runs a test over kernels and over the floating dtypes."""
    by_name = pytest.mark.parametrize("name", names)
    return lambda function: pytest.mark.parametrize("t", FLOATING)(by_name(function))


def given_letters(name):
    """Return every choice of parameters that a preset can give to a pass, as letters.

    Of a pass with a bias, which is made of the same parts, the first and the last one.
    """
    if name.startswith("bias_"):
        every = given_letters(re.sub("^bias_|_(row|runs|any)$", "", name))
        return [every[0], every[-1]]
    letters = "".join(form[1:] for form in kernels.PASSES[name].activations).replace("-", "")
    chosen = itertools.product((False, True), repeat=len(letters))
    every = ["".join(itertools.compress(letters, one)) for one in chosen]
    if name == "forward_bits":  # a ceiling and a negative slope make three branches
        return [given for given in every if not {"a", "c"} <= {*given}]
    if name == "forward_bytes":  # in which the slope may be one that x's dtype rounds to 0
        return [given for given in every if "c" in given]
    return [given for given in every if "c" in given or "f" not in given]


def source(kernel, layout, small=True, **dtypes):
    """Return what CuPy generates for a kernel, given the dtypes of its types T, X and W."""
    dtypes = {letter: FLOATING.get(name) or np.dtype(name) for letter, name in dtypes.items()}
    arrays = [p if is_array(p) else None for p in kernel.params[:-1]]
    types = [p and dtypes.get(p.ctype, p.dtype) for p in arrays]
    layouts = [p and (FLAT if p.name in ("mask", "bias", "sums") else layout) for p in arrays]
    layouts.append(FLAT if all(p.raw for p in arrays if p) else layout)
    return cupy_host.source(kernel, types, layouts, small)[0]


def is_array(p):
    """Whether a kernel's parameter is an array: `a` is a weight, or one of ReLU's parameters."""
    scalars = p.ctype == "unsigned long long" or p.name in (*"tbcf",)
    return not scalars and (p.name != "a" or p.ctype == "W")


def sources(name, t, forms=tuple(FORMS), small=True, architecture=90):
    """Return all sources of a kernel for a dtype, by (form, dtype of x, and what else differs).

    That is the parameters given to a pass, and the dtype of a weight. For another architecture than
    sm_90 the parameters are none or all.
    """
    found = {}
    for form in forms:
        vectorized, layout = FORMS[form]
        if re.search("_(row|runs)$", name) and not vectorized:
            continue  # there is one strided kernel, "any"
        if name in kernels.PASSES:
            every = given_letters(name)
            for given in every if architecture == 90 else (every[0], every[-1]):
                one = kernels.kernel(name, given, vectorized)
                for x in FLOATING if name == "backward_from_input" else (t,):
                    found[form, x, given] = source(one, layout, small, T=t, X=x)
        elif form != "misaligned":  # to which nothing else is like "flat"
            used = {p.ctype for p in kernels.variant(name).params[:-1]}
            dtypes = [FLOATING if letter in used else (t,) for letter in "XW"]
            for x, w in itertools.product(*dtypes):
                found[form, x, w] = source(kernels.variant(name), layout, small, T=t, X=x, W=w)
    return found


def ptx_of(name, found):
    """Return the PTX of each source."""
    merged = cupy_host.merge(found.values(), kernels._PREAMBLE)
    parts = re.split(r"\.visible \.entry ", cupy_host.compile_for(merged, 90, ptx=True))[1:]
    for number, part in enumerate(parts):
        assert re.match(rf"relu_xp_{name}_(\w+_)?{number}\(", part)
    return dict(zip(found, parts, strict=True))


def check_compiles(codes, architecture, preamble=kernels._PREAMBLE):
    cubin = cupy_host.compile_for(cupy_host.merge(codes, preamble), architecture)
    assert cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@of_each([*kernels.PASSES, *kernels.VARIANTS])
def test_every_kernel_compiles(name, t, architecture):
    """For sm_90 all parameters, both kernels, aligned and not, contiguous and not."""
    some = ("flat", "strided") if name in kernels.PASSES else ("flat",)
    found = sources(name, t, FORMS if architecture == 90 else some, architecture=architecture)
    check_compiles(found.values(), architecture)


@pytest.mark.parametrize("t", [t for t in FLOATING if t != "bfloat16"])
def test_the_code_for_sm_75_is_that_for_sm_90(t):
    """But for bfloat16: what the other tests execute for sm_90 need not be executed for sm_75."""
    codes = []
    for name in (*kernels.PASSES, *kernels.VARIANTS):
        found = sources(name, t, ("flat", "strided")).items()
        found = [code for (_, *dtypes), code in found if "bfloat16" not in dtypes]
        codes += found[0], found[-1]
    merged = cupy_host.merge(codes, kernels._PREAMBLE)
    old, new = (cupy_host.compile_for(merged, one, ptx=True).split(".entry ") for one in (75, 90))
    assert old[1:] == new[1:]
    assert len(old) == len(codes) + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integer_kernels_compile(architecture):
    integers = filter(is_integer, DTYPES)
    codes = [
        source(kernels.FORWARD_INTEGER, form, T=t) for t in integers for form in (FLAT, STRIDED)
    ]
    check_compiles(codes, architecture, preamble="")


def test_indices_of_64_bits_compile():
    for name in kernels.PASSES:
        codes = sources(name, "float16", small=False).values()
        assert all("CIndexer<1, 0>" in code or "CIndexer<3, 0>" in code for code in codes)
        check_compiles(codes, 90)


def test_a_source_is_what_cupy_compiles_also_alone():
    """Merged or not: the exact source, for each pass and dtype."""
    for name, t in itertools.product(kernels.PASSES, FLOATING):
        code = source(kernels.kernel(name, given_letters(name)[-1], True), FLAT, T=t, X=t)
        assert cupy_host.compile_for(code, 90)[:4] == b"\x7fELF"


def test_every_kernel_that_runs_is_compiled_here(launches):
    possible = {
        kernels.kernel(name, given, vectorized).kernel.name  # a HostKernel
        for name in kernels.PASSES
        for given in given_letters(name)
        for vectorized in (True, False)
    }
    arrays = [cupy_host.array(np.ones(1, dtype)) for dtype in FLOATING.values()]
    for params, x, dy in itertools.product(reference.PRESETS.values(), arrays, arrays):
        run_all(x, dy, params)
    assert {name for name, _ in launches} <= possible


@of_each([*kernels.PASSES, *kernels.VARIANTS])
def test_what_the_compiler_made(name, t):
    """F4: nothing is flushed. No array in local memory; 16 bytes an access; loads come first."""
    for (form, x, rest), ptx in ptx_of(name, sources(name, t)).items():
        what = f"{form} {x} {rest}"
        assert not re.search(r"\.ftz\b", ptx), what
        assert not re.search(r"\b(ld|st)\.local\b|\.local \.align", ptx), what
        if name in kernels.PASSES:
            check_products(ptx, products(name, t, x, rest), what)
            if name.startswith("bias_"):
                check_bias(ptx, name, t, form, what)
            else:
                check_memory(ptx, expected_accesses(name, t, x, form), what)
        elif name not in ("sums", "channel_sums", "add_up"):  # which have a loop
            assert len(loading_blocks(ptx, what)) == 1, what


def products(name, t, x, given):
    """Return the dtypes that a pass multiplies in."""
    if name == "gradient":  # whose slopes are its results; b*x is compared with a ceiling
        return {t} if {*"bc"} <= {*given} else set()
    return {t for letter in given if letter in "ab"} | {x for letter in given if letter == "f"}


def check_products(ptx, dtypes, what):
    """A product is one instruction that -ftz leaves alone, and there is none that is not due."""
    wanted = {"mul.rn.f64" if dtype == "float64" else "mul.rn.f32" for dtype in dtypes}
    assert set(re.findall(r"\b(?:mul|fma)\S*\.(?:f16|bf16|f32|f64)\S*", ptx)) == wanted, what


def check_bias(ptx, name, t, form, what):
    """A sum is one instruction that -ftz leaves alone; all vectors are loaded before any store."""
    width = "f64" if t == "float64" else "f32"
    wanted = "add.f64" if "backward" in name else f"add.rn.{width}"
    assert set(re.findall(r"\badd\.(?:\w+\.)*(?:f|bf)\d+\S*", ptx)) == {wanted}, what
    divisions = [len(re.findall(rf"\b(?:div|rem)\.u{bits}\b", ptx)) for bits in (32, 64)]
    assert divisions[0] >= divisions[1] > 0, what  # of 32 bits where the numbers have no more
    vectors = re.findall(r"\b(ld|st)\.global\.v(?:4\.u32|2\.u64)\b", ptx)
    loads, stores = wide_accesses(name) if FORMS[form][0] else (0, 0)
    assert vectors == ["ld"] * loads + ["st"] * stores, what


def wide_accesses(name):
    """Return how many vectors a thread loads and stores at once."""
    if name.startswith("bias_backward"):
        return 4, 4
    inputs = 2 if name == "backward_from_input" or name.endswith("_row") else 1
    return inputs * kernels._CHUNKS, kernels._CHUNKS


def expected_accesses(name, t, x, form):
    """Return the sizes in bytes of all loads, and of all stores, of each path of a kernel."""
    sizes = [FLOATING[dtype].itemsize for dtype in (t, x)]

    def path(count):
        mask = 1 if name.endswith("bits") or count == 1 else count
        inputs = {"backward": [sizes[0], None], "backward_from_input": sizes}
        loads = inputs.get(re.sub("_(bits|bytes)$", "", name), [sizes[0]])
        stores = [sizes[0], None] if name in ("forward_bits", "forward_bytes") else [sizes[0]]
        return tuple([mask if s is None else s * count for s in a] for a in (loads, stores))

    if not FORMS[form][0]:
        return [path(1)]
    loads, stores = path(16 // max(sizes))
    assert 16 in loads
    return [path(1), (loads * kernels._CHUNKS, stores * kernels._CHUNKS)]


def check_memory(ptx, paths, what):
    """Each path has its loads in one block, before any store; and the stores are what they are."""
    loads = [sorted(s for kind, s in block if kind == "ld") for block in loading_blocks(ptx, what)]
    assert sorted(loads) == sorted(sorted(path[0]) for path in paths), what
    stores = sorted(size for block in accesses(ptx) for kind, size in block if kind == "st")
    assert stores == sorted(size for path in paths for size in path[1]), what


def loading_blocks(ptx, what):
    """Return the accesses of each block that loads, which does so before it stores."""
    loading = [block for block in accesses(ptx) if "ld" in dict(block)]
    for block in loading:
        kinds = [kind for kind, _ in block]
        assert kinds == sorted(kinds), what
    return loading


def accesses(ptx):
    """Return the loads from and the stores to global memory of each block, with their bytes."""
    found = []
    for block in re.split(r"\n\$L\w+:|\bbra[.\w]*\s[^\n]*", ptx):
        sizes = re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.[a-z]+(\d+)", block)
        assert len(sizes) == len(re.findall(r"\b(?:ld|st)\.global", block))
        found.append([(kind, int(n or 1) * int(bits) // 8) for kind, n, bits in sizes])
    return found


def test_the_checks_can_fail():
    """The obvious kernels flush subnormals, or lose NaN, under CuPy's -ftz=true."""

    def ptx_of_naive(arguments, operation):
        naive = cupy_host.cupy.ElementwiseKernel(arguments, "T y", operation, "naive")
        return cupy_host.compile_for(source(naive, FLAT, T="float32"), 90, ptx=True)

    for operation in ("y = x > 0 ? x : T(0)", "y = x * T(0.01)", "y = max(x, T(0))"):
        assert re.search(r"\.ftz\b", ptx_of_naive("T x", operation)), operation
    late = ptx_of_naive("T dy, T x, T a", "if (x > 0) { y = a * dy; } else { y = 0; }")
    with pytest.raises(AssertionError):
        check_memory(late, [([4, 4], [4])], "late")
    with pytest.raises(AssertionError):
        check_products(late, {"float32"}, "late")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@of_each(kernels.PASSES)
def test_what_the_assembler_made(request, name, t, architecture):
    """The machine's own instructions: 16 bytes an access, no spill, no branch for an element.

    The code for 64 bits of a division is apart, and has branches of its own.
    """
    if cupy_host.disassembler() is None:
        unavailable(request.config, "nvdisasm is not installed")
    found = sources(name, t, ("flat", "cube"), architecture=architecture).items()
    codes = [code for (_, x, _), code in found if x == t]
    merged = cupy_host.merge(codes, kernels._PREAMBLE)
    made = cupy_host.disassemble(cupy_host.compile_for(merged, architecture))
    assert len(made) == len(codes)
    for its_name, lines in made.items():
        text = "\n".join(lines)
        wide = {kind: len(re.findall(rf"\b{kind}\.E\S*\.128\b", text)) for kind in ("LDG", "STG")}
        loads, stores = wide_accesses(name)
        repeated = 1
        if name.startswith("bias_backward"):  # whose loop the compiler may unroll
            repeated = wide["LDG"] // loads
        assert wide["LDG"] == loads * repeated > 0, its_name
        assert wide["STG"] >= stores, its_name  # of a shuffle there is a copy, out of line
        assert not re.search(r"\b(LDL|STL)\b|\b[FD](ADD|MUL|FMA)\S*\.FTZ\b", text), its_name
        if not name.startswith("bias_"):
            assert len(re.findall(r"\bBRA\b", text)) <= (20 if "SHFL" in text else 12), its_name
        registers = map(int, re.findall(r"\bR(\d+)\b", text))
        # Or only half of the threads fit. A pass that sums has fewer of them.
        limit = 128 if name.startswith("bias_backward") else 80 if name.endswith("_any") else 64
        assert max(registers) < limit, its_name
