"""The vector kernels, as LLVM IR.

One kernel does one thing to the elements from ``start`` to ``stop`` of contiguous arrays::

    void kernel(ptr numbers, ptr out, ptr in, ptr other, i64 start, i64 stop)

    forward              out = f(in)
    forward_saving       out = f(in), other = the packed mask
    backward             out = f'(x) * in, from other = the packed mask
    backward_from_input  out = f'(x) * in, from other = x

It takes one 64-byte line an iteration, floats by their bits, and the rest of less than a line with
masked loads and stores. Each comes in two forms. ``_stream`` writes whole aligned lines past the
caches: a plain store reads a line before it writes it, which for an array beyond the caches is a
third of all traffic. It wants an `out` that is no input.

IR and not C, because a user has no compiler; IR and not Numba, because it has no 16-bit floats on
a CPU. No optimiser runs over it: what is written here is what the machine does, and unrolled it
would be slower.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from relu_xp.activation import FLOATING, Rounded

__all__ = [
    "KINDS",
    "NAMES",
    "Structure",
    "constants",
    "source",
    "structure_of",
    "structures",
]

KINDS = ("forward", "forward_saving", "backward", "backward_from_input")
NAMES = tuple(f"{kind}_{form}" for kind in KINDS for form in ("plain", "stream"))

_ATTRIBUTES = 'nounwind "min-legal-vector-width"="512" "prefer-vector-width"="512"'
_LINE = 64  # bytes
# Bytes. The processor's own prefetcher stops at the end of a page: to ask for a line a page ahead
# takes 10 % off a forward pass beyond the caches and 20 % off one that saves a mask or works in
# place (25 M float32, two cores with AVX-512; 2 to 16 KiB are alike).
_AHEAD = 4096

# What a kernel reads through ``numbers``, in this order.
_CONSTANTS = (
    "origin",
    "threshold",
    "negative_slope",
    "positive_slope",
    "max_value",
    "ceiling_rank",
    "ceiling_span",
)


class Structure(NamedTuple):
    """What of an activation is compiled; the numbers themselves are arguments.

    Attributes
    ----------
    dtype_name : str
        float16, bfloat16, float32 or float64.
    low, scaled, ceiling : bool
        Whether there is a negative slope, a positive slope other than 1, a ceiling.
    three : bool
        Whether the mask has three pieces (`relu_xp.activation.Rounded.pieces`).
    """

    dtype_name: str
    low: bool = False
    scaled: bool = False
    ceiling: bool = False
    three: bool = False

    @property
    def width(self) -> int:
        """Bits an element."""
        return {"float32": 32, "float64": 64}.get(self.dtype_name, 16)


def structure_of(numbers: Rounded) -> Structure:
    """Return the structure that serves an activation's numbers, which are floating ones."""
    return Structure(
        numbers.dtype_name,
        numbers.negative_slope != 0,
        numbers.positive_slope != 1,
        numbers.max_value is not None,
        numbers.pieces == 3,
    )


def structures() -> list[Structure]:
    """Return all structures that an activation can have."""
    choices = itertools.product(FLOATING, *[(False, True)] * 4)
    every = itertools.starmap(Structure, choices)
    # A ceiling and a slope make three pieces, even where the slope is then rounded to 0.
    return [s for s in every if s.ceiling or not s.three if s.three or not (s.low and s.ceiling)]


def constants(numbers: Rounded) -> list[int]:
    """Return the words, of the dtype's width, that a kernel reads through ``numbers``.

    The test that chooses is one unsigned comparison, for every threshold, width and NaN: ``rank``
    counts the bit patterns upwards from -inf, so that NaN of either sign lies beyond +inf.
    """
    modulus, sign = 1 << numbers.width, 1 << (numbers.width - 1)
    origin = numbers.order(numbers.infinity_bits | sign)

    def rank(bits: int) -> int:
        return numbers.order(bits) - origin

    ceiling = rank(numbers.ceiling_bits)
    words = {
        "origin": origin,
        "threshold": rank(numbers.threshold_bits),
        "negative_slope": numbers.bits(numbers.negative_slope),
        "positive_slope": numbers.bits(numbers.positive_slope),
        "max_value": 0 if numbers.max_value is None else numbers.bits(numbers.max_value),
        "ceiling_rank": ceiling,
        "ceiling_span": rank(numbers.infinity_bits) - ceiling,
    }
    return [words[name] % modulus for name in _CONSTANTS]


def source(structure: Structure) -> str:
    """Return a module with every kernel of one structure: KIND_plain and KIND_stream."""
    writer = _Writer(structure)
    functions = [writer.function(kind, stream) for kind in KINDS for stream in (False, True)]
    return "\n".join([*functions, writer.declarations(), "!0 = !{i32 1}\n"])


class _Writer:
    """Writes one structure's kernels, an instruction at a time."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.width = width = structure.width
        self.lanes = lanes = 8 * _LINE // width
        self.word = f"i{width}"
        self.vector = f"<{lanes} x i{width}>"
        self.bools = f"<{lanes} x i1>"
        self.bytes = f"<{lanes} x i8>"
        self.bits = f"i{lanes}"
        self.lines: list[str] = []
        self.count = 0

    def emit(self, instruction: str, name: str | None = None) -> str:
        """Write an instruction, and return the name of its value."""
        self.count += 1
        name = name or f"%v{self.count}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, text: str) -> None:
        """Write a label, or an instruction without a value."""
        self.lines.append(text if text.endswith(":") else f"  {text}")

    def splat(self, value: str, name: str | None = None) -> str:
        """Return a vector of one word."""
        v = self.vector
        first = self.emit(f"insertelement {v} poison, {self.word} {value}, i64 0")
        zeros = f"<{self.lanes} x i32> zeroinitializer"
        return self.emit(f"shufflevector {v} {first}, {v} poison, {zeros}", name)

    def address(self, base: str, index: str, kind: str) -> str:
        """Return where element `index` of an array begins."""
        return self.emit(f"getelementptr {kind}, ptr {base}, i64 {index}")

    def load(self, base: str, index: str, live: str | None, ahead: bool = True) -> str:
        """Return a line from element `index` on; of it, where given, the live lanes only.

        Unless `ahead` is false, ask also for the line that will be needed a while later.
        """
        v, at = self.vector, self.address(base, index, self.word)
        if live is not None:
            return self.masked_load(v, at, self.width // 8, live)
        if ahead:
            later = self.address(at, str(_AHEAD), "i8")
            self.do(f"call void @llvm.prefetch.p0(ptr {later}, i32 0, i32 3, i32 1)")
        return self.emit(f"load {v}, ptr {at}, align {self.width // 8}")

    def masked_load(self, vector: str, at: str, align: int, live: str) -> str:
        """Return the live lanes of a vector, the others 0."""
        return self.emit(
            f"call {vector} @llvm.masked.load.{_mangled(vector)}.p0"
            f"(ptr {at}, i32 {align}, {self.bools} {live}, {vector} zeroinitializer)"
        )

    def store(self, vector: str, value: str, at: str, align: int, live: str | None) -> None:
        """Store a vector; of it, where given, the live lanes only."""
        if live is None:
            self.do(f"store {vector} {value}, ptr {at}, align {align}")
        else:
            self.do(
                f"call void @llvm.masked.store.{_mangled(vector)}.p0"
                f"({vector} {value}, ptr {at}, i32 {align}, {self.bools} {live})"
            )

    def declarations(self) -> str:
        """Declare the intrinsics."""
        lines = ["declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"]
        for v in (self.vector, self.bytes):
            name = _mangled(v)
            lines += [
                f"declare {v} @llvm.masked.load.{name}.p0(ptr, i32 immarg, {self.bools}, {v})",
                f"declare void @llvm.masked.store.{name}.p0({v}, ptr, i32 immarg, {self.bools})",
            ]
        return "\n".join(lines)

    # What the table says, for one line of elements.

    def rank(self, bits: str) -> str:
        """Return how many bit patterns a number lies above -inf; NaN: more than any number."""
        v, w = self.vector, self.width
        sign = self.emit(f"ashr {v} {bits}, splat ({self.word} {w - 1})")
        flip = self.emit(f"lshr {v} {sign}, splat ({self.word} 1)")
        key = self.emit(f"xor {v} {bits}, {flip}")
        return self.emit(f"sub {v} {key}, %origin")

    def upper(self, x: str) -> str:
        """Tell where ``x <= t`` is false."""
        return self.emit(f"icmp ugt {self.vector} {self.rank(x)}, %threshold")

    def below(self, high: str) -> str:
        """Tell where ``high >= c`` is false."""
        above = self.emit(f"sub {self.vector} {self.rank(high)}, %ceiling_rank")
        return self.emit(f"icmp ugt {self.vector} {above}, %ceiling_span")

    def times(self, bits: str, slope: str) -> str:
        """Return a product, rounded once: those of 16-bit floats are exact in float32."""
        v, lanes = self.vector, self.lanes
        if self.structure.dtype_name != "bfloat16":
            kind = {16: "half", 32: "float", 64: "double"}[self.width]
            f = f"<{lanes} x {kind}>"
            a, b = (self.emit(f"bitcast {v} {value} to {f}") for value in (bits, slope))
            product = self.emit(f"fmul {f} {a}, {b}")
            return self.emit(f"bitcast {f} {product} to {v}")
        i, f = f"<{lanes} x i32>", f"<{lanes} x float>"
        floats = []
        for value in (bits, slope):
            wide = self.emit(f"zext {v} {value} to {i}")
            shifted = self.emit(f"shl {i} {wide}, splat (i32 16)")
            floats.append(self.emit(f"bitcast {i} {shifted} to {f}"))
        product = self.emit(f"fmul {f} {floats[0]}, {floats[1]}")
        is_nan = self.emit(f"fcmp uno {f} {product}, {product}")
        exact = self.emit(f"bitcast {f} {product} to {i}")
        top = self.emit(f"lshr {i} {exact}, splat (i32 16)")
        odd = self.emit(f"and {i} {top}, splat (i32 1)")
        half = self.emit(f"add {i} {odd}, splat (i32 {0x7FFF})")  # ties to even
        up = self.emit(f"add {i} {exact}, {half}")
        rounded = self.emit(f"lshr {i} {up}, splat (i32 16)")
        sign = self.emit(f"and {i} {top}, splat (i32 {0x8000})")
        nan = self.emit(f"or {i} {sign}, splat (i32 {0x7FC0})")  # as ml_dtypes has it
        chosen = self.emit(f"select <{lanes} x i1> {is_nan}, {i} {nan}, {i} {rounded}")
        return self.emit(f"trunc {i} {chosen} to {v}")

    def choose(self, condition: str, yes: str, no: str) -> str:
        """Select by lane."""
        v = self.vector
        return self.emit(f"select {self.bools} {condition}, {v} {yes}, {v} {no}")

    def high(self, bits: str) -> str:
        """Return the product with the positive slope, or the number itself."""
        return self.times(bits, "%positive_slope") if self.structure.scaled else bits

    def low(self, bits: str) -> str:
        """Return the product with the negative slope, or +0."""
        return self.times(bits, "%negative_slope") if self.structure.low else "zeroinitializer"

    def value(self, x: str) -> str:
        """Return f(x)."""
        high = self.high(x)
        if self.structure.ceiling:
            high = self.choose(self.below(high), high, "%max_value")
        return self.choose(self.upper(x), high, self.low(x))

    def pieces(self, x: str) -> tuple[str, str | None]:
        """Tell where the positive slope counts, and, of three pieces, where the ceiling does."""
        upper = self.upper(x)
        if not self.structure.ceiling:
            return upper, None
        below = self.below(self.high(x))
        keep = self.emit(f"and {self.bools} {upper}, {below}")
        if not self.structure.three:
            return keep, None
        return keep, self.emit(f"xor {self.bools} {upper}, {keep}")

    def gradient(self, dy: str, keep: str, clipped: str | None) -> str:
        """Return f'(x) * dy."""
        dx = self.choose(keep, self.high(dy), self.low(dy))
        return dx if clipped is None else self.choose(clipped, "zeroinitializer", dx)

    # The mask: see relu_xp.mask.

    def write_mask(self, x: str, index: str, live: str | None) -> None:
        """Store the pieces of a line that begins at a multiple of 8."""
        keep, clipped = self.pieces(x)
        if clipped is not None:
            one = self.emit(f"zext {self.bools} {keep} to {self.bytes}")
            two = f"{self.bytes} splat (i8 2), {self.bytes} {one}"
            data = self.emit(f"select {self.bools} {clipped}, {two}")
            self.store(self.bytes, data, self.address("%other", index, "i8"), 1, live)
            return
        if live is not None:
            keep = self.emit(f"and {self.bools} {keep}, {live}")
        bits = self.emit(f"bitcast {self.bools} {keep} to {self.bits}")
        at = self.address("%other", self.emit(f"lshr i64 {index}, 3"), "i8")
        self.do(f"store {self.bits} {bits}, ptr {at}, align 1")

    def read_mask(self, index: str, live: str | None, aligned: bool) -> tuple[str, str | None]:
        """Return what `pieces` does, from the mask.

        Where a line begins within a byte (not `aligned`), twice the bits are read.
        """
        if self.structure.three:
            at = self.address("%other", index, "i8")
            if live is None:
                data = self.emit(f"load {self.bytes}, ptr {at}, align 1")
            else:
                data = self.masked_load(self.bytes, at, 1, live)
            keep = self.emit(f"icmp eq {self.bytes} {data}, splat (i8 1)")
            return keep, self.emit(f"icmp eq {self.bytes} {data}, splat (i8 2)")
        at = self.address("%other", self.emit(f"lshr i64 {index}, 3"), "i8")
        if aligned:
            bits = self.emit(f"load {self.bits}, ptr {at}, align 1")
        else:
            double = f"i{2 * self.lanes}"
            both = self.emit(f"load {double}, ptr {at}, align 1")
            within = self.emit(f"and i64 {index}, 7")
            if double != "i64":
                within = self.emit(f"trunc i64 {within} to {double}")
            shifted = self.emit(f"lshr {double} {both}, {within}")
            bits = self.emit(f"trunc {double} {shifted} to {self.bits}")
        return self.emit(f"bitcast {self.bits} {bits} to {self.bools}"), None

    # The kernels.

    def result(self, kind: str, line: str, index: str, live: str | None, aligned: bool) -> str:
        """Return the line of `out` for one of `in` that begins at an element."""
        if kind == "backward":
            return self.gradient(line, *self.read_mask(index, live, aligned))
        if kind == "backward_from_input":
            return self.gradient(line, *self.pieces(self.load("%other", index, live)))
        return self.value(line)

    def step(self, kind: str, index: str, live: str | None) -> None:
        """Write one line of `out`, and of the mask."""
        line = self.load("%in", index, live)
        result = self.result(kind, line, index, live, aligned=True)
        if kind == "forward_saving":
            self.write_mask(line, index, live)
        at = self.address("%out", index, self.word)
        self.store(self.vector, result, at, self.width // 8, live)

    def function(self, kind: str, stream: bool) -> str:
        """Return one kernel."""
        self.lines, self.count = [], 0
        self.do("entry:")
        for number, name in enumerate(_CONSTANTS):
            at = self.address("%numbers", str(number), self.word)
            value = self.emit(f"load {self.word}, ptr {at}, align {self.width // 8}")
            self.splat(value, f"%{name}")
        (self.stream if stream else self.plain)(kind)
        form = "stream" if stream else "plain"
        return "\n".join(
            [
                f"define void @{kind}_{form}"
                "(ptr %numbers, ptr %out, ptr %in, ptr %other, i64 %start, i64 %stop) "
                f"{_ATTRIBUTES} {{",
                *self.lines,
                "}\n",
            ]
        )

    def plain(self, kind: str) -> None:
        """Write line after line, and then what is less than one."""
        self.do("br label %test")
        self.do("test:")
        self.do("%i = phi i64 [%start, %entry], [%next, %line]")
        self.do(f"%next = add i64 %i, {self.lanes}")
        self.do("%more = icmp ule i64 %next, %stop")
        self.do("br i1 %more, label %line, label %rest")
        self.do("line:")
        self.step(kind, "%i", None)
        self.do("br label %test")
        self.do("rest:")
        self.do("%some = icmp ult i64 %i, %stop")
        self.do("br i1 %some, label %partial, label %done")
        self.do("partial:")
        left = self.emit("sub i64 %stop, %i")
        if self.width != 64:
            left = self.emit(f"trunc i64 {left} to {self.word}")
        lanes = ", ".join(f"{self.word} {lane}" for lane in range(self.lanes))
        ends = self.splat(left)
        self.step(kind, "%i", self.emit(f"icmp ult {self.vector} <{lanes}>, {ends}"))
        self.do("br label %done")
        self.do("done:")
        self.do("ret void")

    def stream(self, kind: str) -> None:
        """Write aligned lines; the mask, which counts from `start`, goes at its own pace.

        The plain kernel writes the first line, so that the aligned ones may begin within it, and
        all from the last on. Two lines are left to it, for `read_mask` reads that far.
        """
        plain = f"call void @{kind}_plain(ptr %numbers, ptr %out, ptr %in, ptr %other, "
        begin = self.address("%out", "%start", self.word)
        number = self.emit(f"ptrtoint ptr {begin} to i64")
        negative = self.emit(f"sub i64 0, {number}")
        skipped = self.emit(f"and i64 {negative}, {_LINE - 1}")
        self.do(f"%head = udiv i64 {skipped}, {self.width // 8}")
        self.do(f"%first = add i64 %start, {self.lanes}")
        self.do("%short = icmp ult i64 %stop, %first")
        self.do("%end = select i1 %short, i64 %stop, i64 %first")
        self.do(plain + "i64 %start, i64 %end)")
        self.do("br label %test")
        self.do("test:")
        self.do("%i = phi i64 [%start, %entry], [%next, %line]")
        self.do("%aligned = add i64 %i, %head")
        self.do(f"%reach = add i64 %aligned, {2 * self.lanes}")
        self.do(f"%next = add i64 %i, {self.lanes}")
        self.do("%more = icmp ule i64 %reach, %stop")
        self.do("br i1 %more, label %line, label %rest")
        self.do("line:")
        if kind == "forward_saving":
            self.write_mask(self.load("%in", "%i", None, ahead=False), "%i", None)
        line = self.load("%in", "%aligned", None)
        result = self.result(kind, line, "%aligned", None, aligned=False)
        at = self.address("%out", "%aligned", self.word)
        self.do(f"store {self.vector} {result}, ptr {at}, align {_LINE}, !nontemporal !0")
        self.do("br label %test")
        self.do("rest:")
        self.do("fence seq_cst")  # such stores are ordered by nothing less
        self.do(plain + "i64 %i, i64 %stop)")
        self.do("ret void")


def _mangled(vector: str) -> str:
    """Return a vector type as the name of an intrinsic has it."""
    return "v" + vector.strip("<>").replace(" x ", "")
