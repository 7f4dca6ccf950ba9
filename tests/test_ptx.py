"""The interpreter of PTX: what it computes, and what it stops at. It needs no other library."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import WARP, Program
from ptx_operations import TYPES, PtxError, operation

from relu_xp.testing import reference

pytestmark = pytest.mark.libraries()

# A thread has its number in %r1, and addresses of its own element in x (%rd4) and y (%rd5).
KERNEL = """
.version 8.0
.target sm_90
.visible .entry kernel(.param .u64 kernel_x, .param .align 8 .b8 kernel_y[16])
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [kernel_x];
    ld.param.u64 %rd2, [kernel_y+8];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    {body}
    $END:
    ret;
}}
"""


def execute(body, threads=128):
    """Return y and the accesses of a block of 128 threads; x is 100, 101, ..."""
    x, y = np.arange(100, 228, dtype=np.uint32), np.zeros(128, np.uint32)
    ranges = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in (x, y)]
    parameters = [np.uint64(ranges[0][0]).tobytes(), np.array([7, ranges[1][0]]).tobytes()]
    program = Program(KERNEL.format(body=body))
    return y, program.run(parameters, threads, ranges[:1], ranges[1:])


def test_what_is_loaded_is_stored():
    y, accesses = execute("ld.global.u32 %r2, [%rd4];\nst.global.u32 [%rd5], %r2;")
    assert y.tolist() == list(range(100, 228))
    assert [(a.is_store, a.width, len(a.threads)) for a in accesses] == [
        (False, 4, 128),
        (True, 4, 128),
    ]
    assert np.diff(accesses[0].addresses).tolist() == [4] * 127


def test_whole_blocks_are_started():
    assert execute("st.global.u32 [%rd5], %r1;", threads=1)[0].tolist() == list(range(128))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # Each way of a branch; where they meet all threads vote.
        (
            """setp.lt.u32 %p1, %r1, 7; @%p1 bra $A; mov.u32 %r2, 5; bra.uni $B;
            $A: mov.u32 %r2, 6; $B: setp.eq.s32 %p2, %r2, 6;
            vote.sync.ballot.b32 %r3, %p2, -1; st.global.u32 [%rd5], %r3;""",
            lambda i: 0x7F if i < WARP else 0,
        ),
        # A loop with another count for each thread, and a vote behind it.
        (
            """mov.u32 %r2, 0; $A: add.s32 %r2, %r2, 3; setp.le.u32 %p1, %r2, %r1; @%p1 bra $A;
            and.b32 %r3, %r2, 1; setp.ne.s32 %p2, %r3, 0;
            vote.sync.ballot.b32 %r4, %p2, -1; xor.b32 %r4, %r4, %r2; st.global.u32 [%rd5], %r4;""",
            lambda i: (
                sum(
                    (3 * (j // 3 + 1) & 1) << j % 32 for j in range(i // 32 * 32, i // 32 * 32 + 32)
                )
                ^ 3 * (i // 3 + 1)
            ),
        ),
        # The threads that a mask does not name are elsewhere.
        (
            """and.b32 %r2, %r1, 1; setp.eq.s32 %p1, %r2, 0; @%p1 bra $END;
            vote.sync.ballot.b32 %r3, %p1, 0xAAAAAAAA; add.s32 %r3, %r3, 9;
            st.global.u32 [%rd5], %r3;""",
            lambda i: 9 * (i % 2),
        ),
        (
            "shfl.sync.down.b32 %r2|%p1, %r1, 30, 31, -1; st.global.u32 [%rd5], %r2;",
            lambda i: i + 30 if i % 32 < 2 else i,
        ),
        # What comes from a thread that takes no part.
        (
            """and.b32 %r2, %r1, 31; setp.gt.u32 %p1, %r2, 7; @%p1 bra $END;
            shfl.sync.down.b32 %r2|%p1, %r1, 4, 31, 255; st.global.u32 [%rd5], %r2;""",
            lambda i: i + 4 if i % 32 < 4 else 0xDEADBEEF if i % 32 < 8 else 0,
        ),
        (
            """cvt.u16.u32 %rs1, %r1; mov.b32 %r2, {%rs1, 7};
            { .reg .b16 low; mov.b32 {low, %rs3}, %r2; } mov.b32 {%rs2, _}, %r2;
            cvt.u32.u16 %r3, %rs3; shl.b32 %r3, %r3, 16; cvt.s32.s16 %r4, %rs2;
            or.b32 %r2, %r3, %r4; st.global.u32 [%rd5], %r2;""",
            lambda i: 7 << 16 | i,
        ),
    ],
    ids=["branch", "loop", "some vote", "shuffle", "absent", "halves"],
)
def test_threads(body, expected):
    assert execute(body)[0].tolist() == [expected(i) for i in range(128)]


FAULTS = {
    "misaligned": ("ld.global.u64 %rd6, [%rd4];", "not aligned to 8 bytes"),
    "misaligned vector": ("ld.global.v2.u32 {%r2, %r3}, [%rd4];", "not aligned to 8 bytes"),
    "behind the array": ("ld.global.u32 %r2, [%rd4+4];", "a load outside of the arrays"),
    "before the array": ("ld.global.u32 %r2, [%rd4+-4];", "a load outside of the arrays"),
    "at the end of memory": (
        "mov.b64 %rd6, -4; ld.global.u32 %r2, [%rd6];",
        "a load outside of the arrays",
    ),
    "behind the output": ("st.global.u32 [%rd5+4], %r1;", "a store outside of the arrays"),
    "to an input": ("st.global.u32 [%rd4], %r1;", "a store outside of the arrays"),
    "not written": ("st.global.u32 [%rd5], %r9;", "not implemented"),  # nor declared
    "never written": ("st.global.u32 [%rd5], %r8;", "%r8 is not written yet"),
    "not written by some": (
        """setp.lt.u32 %p1, %r1, 7; @%p1 bra $A; mov.u32 %r2, 1;
        $A: st.global.u32 [%rd5], %r2;""",
        "%r2 is not written yet",
    ),
    "vote without a thread": (
        """setp.eq.u32 %p1, %r1, 99; @%p1 bra $END;
        vote.sync.ballot.b32 %r2, %p1, -1; st.global.u32 [%rd5], %r2;""",
        "names a thread that does not arrive: vote",
    ),
    "shuffle without a thread": (
        """setp.eq.u32 %p1, %r1, 99; @%p1 bra $END;
        shfl.sync.down.b32 %r2|%p1, %r1, 1, 31, -1; st.global.u32 [%rd5], %r2;""",
        "names a thread that does not arrive: shfl",
    ),
    "two votes": (
        """setp.lt.u32 %p1, %r1, 7; @%p1 bra $A; vote.sync.ballot.b32 %r2, %p1, -1; bra $END;
        $A: vote.sync.ballot.b32 %r2, %p1, -1;""",
        "names a thread that does not arrive",
    ),
    "a mask without itself": ("vote.sync.ballot.b32 %r2, 1, 1;", "a mask without its own thread"),
    "several masks": (
        "or.b32 %r2, %r1, -2; vote.sync.ballot.b32 %r3, 1, %r2;",
        "a warp with several masks",
    ),
    "two writers": ("st.global.u32 [%rd2], %r1;", "two threads touch what one of them writes: st"),
    "two writers of one value": ("st.global.u32 [%rd2], 5;", "two threads touch"),
    "a byte of another": (
        "mov.u16 %rs1, 5; st.global.u32 [%rd5], %r1; st.global.u8 [%rd2+9], %rs1;",
        "two threads touch what one of them writes",
    ),
    "a reader": (
        """xor.b32 %r2, %r1, 1; mul.wide.u32 %rd6, %r2, 4; add.s64 %rd6, %rd2, %rd6;
        st.global.u32 [%rd5], %r1; ld.global.u32 %r3, [%rd6];""",
        "two threads touch what one of them writes: ld",
    ),
    "a reader in another warp, before": (
        """xor.b32 %r2, %r1, 64; mul.wide.u32 %rd6, %r2, 4; add.s64 %rd6, %rd2, %rd6;
        ld.global.u32 %r3, [%rd6]; st.global.u32 [%rd5], %r1;""",
        "two threads touch what one of them writes: ld",
    ),
    "half of a vector": (
        """mov.u16 %rs1, 5; setp.gt.u32 %p1, %r1, 1; @%p1 bra $END; mul.wide.u32 %rd6, %r1, 6;
        add.s64 %rd6, %rd2, %rd6; setp.eq.s32 %p1, %r1, 1; @%p1 bra $A;
        st.global.v2.u32 [%rd6], {%r1, %r1}; bra $END; $A: st.global.u16 [%rd6], %rs1;""",
        "two threads touch what one of them writes",
    ),
    "an unknown instruction": ("bar.sync 0;", "not implemented: bar.sync 0"),
    "an unknown modifier": ("add.rn.sat.f32 %f1, %f2, %f3;", "not implemented: add.rn.sat.f32"),
    "a predicate": ("@%p1 mov.u32 %r2, 1;", "not implemented: @%p1 mov.u32"),
    "an unknown type": ("add.f16x2 %r2, %r3, %r4;", "not implemented: add.f16x2"),
    "a register too narrow": ("add.s32 %r2, %rs1, 1;", "not implemented: add.s32 %r2, %rs1"),
    "too few operands": ("add.s32 %r2, %r1;", "not implemented: add.s32 %r2, %r1"),
    "shared memory": ("ld.shared.u32 %r2, [%rd4];", "not implemented: ld.shared"),
    "not PTX": ("call (%r2), f, (%r1)", "not (understood|implemented)"),
    "a division by 0": ("div.u32 %r2, %r1, %r1;", "division by 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_device_would_not_do(fault):
    body, message = FAULTS[fault]
    with pytest.raises(PtxError, match=message):
        execute(body)


# ---- Operations ----------------------------------------------------------------------------------

FORMATS = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}


def words_of(kind, count=300):
    """Return the specials of a format, and random bits; of a small one each pattern."""
    form = reference.Format(FORMATS[kind])
    found = reference.specials(form.name)
    if form.width > 16:
        limits = np.iinfo(form.unsigned)
        more = np.random.default_rng(1).integers(0, limits.max, count, form.unsigned, endpoint=True)
        halves = (found.astype(object) + (form.infinity >> 1)) % (limits.max + 1)
        return np.concatenate([found, more, np.array(halves.tolist(), form.unsigned)])
    return np.arange(1 << 16, dtype=np.uint16)[:: 1 if count > 300 else 61]


def check_words(form, got, wanted):
    """A NaN of arithmetic is the canonical one."""
    canonical = (form.sign - 1) if form.name != "float64" else 0x7FFFFFFFFFFFFFFF
    wanted = [canonical if word is None else word for word in wanted]
    assert np.asarray(got).view(form.unsigned).tolist() == wanted


@pytest.mark.parametrize(
    "words", ["mul.rn.f32", "mul.rn.f64", "add.rn.f32", "add.rn.f64", "add.f32", "add.f64"]
)
def test_products_and_sums(words):
    name, *_, kind = words.split(".")
    form = reference.Format(FORMATS[kind])
    a = words_of(kind)
    b = np.random.default_rng(2).permutation(a)
    function = operation(words.split("."))[2]
    with np.errstate(all="ignore"):
        got = function(a.view(TYPES[kind]), b.view(TYPES[kind]))
    exact = form.product if name == "mul" else form.sum
    wanted = [exact(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    check_words(form, got, wanted)


@pytest.mark.parametrize(
    "words",
    [
        "cvt.f64.f32",
        "cvt.rn.f32.f64",
        "cvt.f32.f16",
        "cvt.f32.bf16",
        "cvt.rn.f16.f32",
        "cvt.rn.bf16.f32",
        "cvt.rn.f16.f64",
    ],
)
def test_conversions(words):
    *_, to, source = words.split(".")
    form, narrow = reference.Format(FORMATS[source]), reference.Format(FORMATS[to])
    bits = words_of(source, 2000)
    with np.errstate(all="ignore"):
        got = operation(words.split("."))[2](bits.view(TYPES[source]))
    nan = [form.value(int(word)) is None for word in bits]
    wanted = [None if n else narrow.convert(int(w), form) for w, n in zip(bits, nan, strict=True)]
    check_words(narrow, got, wanted)


@pytest.mark.parametrize(("mode", "direction"), [("rz", 0), ("rm", -1), ("rp", 1)])
@pytest.mark.parametrize(
    "words", ["cvt.MODE.f32.f64", "mul.MODE.f32", "add.MODE.f32", "cvt.MODE.f16.f32"]
)
def test_other_roundings(words, mode, direction):
    """The nearest number of that side, of exact values as Python's integers have them."""
    words = words.replace("MODE", mode).split(".")
    result, types, function = operation(words)
    form, narrow = reference.Format(FORMATS[types[0]]), reference.Format(FORMATS[result])
    a = words_of(types[0])
    b = np.random.default_rng(3).permutation(a)
    operands = [a, b][: len(types)]
    with np.errstate(all="ignore"):
        got = function(*[x.view(TYPES[t]) for x, t in zip(operands, types, strict=True)])
    shift = 2 * form.unit_shift if words[0] == "mul" else form.unit_shift
    checked = 0
    columns = [array.tolist() for array in (got.view(narrow.unsigned), *operands)]
    for word, *given in zip(*columns, strict=True):
        values = [form.value(one) for one in given]
        if None in values or any(one & (form.sign - 1) == form.infinity for one in given):
            continue
        exact = {"cvt": sum, "add": sum, "mul": np.prod}[words[0]](np.array(values, object))
        scale = shift - narrow.unit_shift
        toward = direction or (-1 if exact > 0 else 1)
        near = narrow.value(word)
        step = word + (1 if (toward < 0) == (word & narrow.sign == 0) else -1)
        if word & (narrow.sign - 1) == 0:
            step = 1 | (narrow.sign if toward > 0 else 0)
        beyond = narrow.value(step)  # the neighbour on the other side

        near, beyond = (
            x * (1 << 5000 if abs(x) == narrow.value(narrow.infinity) else 1 << scale)
            for x in (near, beyond)
        )
        assert (near - exact) * toward >= 0 > (beyond - exact) * toward
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("words", ["mul.rn.ftz.f32", "add.ftz.f32", "setp.gt.ftz.f32"])
def test_flushing(words):
    tiny, one = np.array([1e-40, -1e-40], np.float32), np.array([1.0, 0.0], np.float32)
    function = operation(words.split("."))[2]
    assert function(tiny, one * 0).tolist() == [0, 0]
    if words[:3] == "mul":
        assert function(one, np.float32(1e-40) * one).tolist() == [0, 0]
    elif words[:3] == "add":
        assert np.signbit(function(tiny, tiny)).tolist() == [False, True]


INTEGERS = [0, 1, 2, 3, 7, 31, 32, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def signed(x, bits):
    return x - (1 << bits) if x >> (bits - 1) else x


INTEGER_OPERATIONS = {
    "add.s32": lambda a, b: a + b,
    "sub.s64": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.wide.u32": lambda a, b: a * b,
    "mul.wide.s32": lambda a, b: signed(a, 32) * signed(b, 32),
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b,
    "shr.s32": lambda a, b: signed(a, 32) >> min(b, 31),
    "shr.u16": lambda a, b: a >> b,
    "div.u32": lambda a, b: a // b,
    "div.s32": lambda a, b: int(np.fix(signed(a, 32) / signed(b, 32))),
    "rem.u64": lambda a, b: a % b,
    "rem.s32": lambda a, b: int(np.fmod(signed(a, 32), signed(b, 32))),
    "max.u64": max,
    "min.s32": lambda a, b: min(signed(a, 32), signed(b, 32)),
    "setp.lt.s32": lambda a, b: signed(a, 32) < signed(b, 32),
    "setp.lt.u32": lambda a, b: a < b,
    "setp.ne.s16": lambda a, b: a != b,
    "xor.b64": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a,
    "neg.s32": lambda a: -a,
    "popc.b32": lambda a: bin(a).count("1"),
    "cvt.s64.s32": lambda a: signed(a, 32),
    "cvt.u64.u32": lambda a: a,
    "cvt.u16.u32": lambda a: a,
    "mad.lo.s32": lambda a, b: a * b + 5,
    "bfi.b32": lambda a, b: b & ~0x3F8 | a << 3 & 0x3F8,
    "bfi.b64": lambda a, b: b & 0xFFFFFFFF | a << 32,
}


@pytest.mark.parametrize("name", INTEGER_OPERATIONS)
def test_operations_on_integers(name):
    result, types, function = operation(name.split("."))
    more = {"mad.lo.s32": [5], "bfi.b32": [3, 7], "bfi.b64": [32, 32]}.get(name, [])
    count = len(types) - len(more)
    bits = 8 * TYPES[types[0]].itemsize
    pairs = [(a, b) for a in INTEGERS for b in INTEGERS if a >> bits == 0 == b >> bits]
    if name[:3] in ("div", "rem"):
        pairs = [(a, b) for a, b in pairs if b and (a, b) != (1 << 31, 0xFFFFFFFF)]

    def array(values, kind):
        dtype = TYPES[kind]
        return np.array(values, np.dtype(f"u{dtype.itemsize}")).view(dtype)

    columns = list(zip(*pairs, strict=True))[:count]
    given = [array(column, kind) for column, kind in zip(columns, types, strict=False)]
    given += [array([n] * len(pairs), k) for n, k in zip(more, types[count:], strict=True)]
    got = np.asarray(function(*given))
    wanted = [INTEGER_OPERATIONS[name](*pair[:count]) for pair in pairs]
    if result == "pred":
        assert got.tolist() == wanted
    else:
        width = 8 * TYPES[result].itemsize
        mask = (1 << width) - 1
        assert [int(one) & mask for one in got.tolist()] == [one & mask for one in wanted]


@pytest.mark.parametrize("comparison", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_nan(comparison):
    a, b = np.array([1.0, np.nan, 2.0]), np.array([1.0, 1.0, np.nan])
    for unordered in ("", "u"):
        function = operation(["setp", comparison + unordered, "f64"])[2]
        assert function(a, b).tolist() == [
            comparison in ("eq", "le", "ge"),
            *2 * [unordered == "u"],
        ]


@pytest.mark.parametrize(
    "words",
    ["add.rz.f64", "mul.s32", "cvt.f32.f64", "cvt.rn.f64.f32", "cvt.rn.f32.s32", "mul.hi.u32",
     "setp.f32", "setp.equ.s32", "mov.sat.f32", "fma.rn.f32", "cvt.rm.bf16.f32", "add.ftz.f64",
     "abs.rn.f32", "rcp.approx.ftz.f32", "cvta.to.shared.u64", "max.f32", "neg.sat.f32",
     "mul.f32", "mul.ftz.f32", "mul.f64", "add.bf16", "neg.bf16", "setp.lt.bf16"],
)  # fmt: skip
def test_what_is_not_known_is_refused(words):
    with pytest.raises((KeyError, ValueError)):
        operation(words.split("."))
