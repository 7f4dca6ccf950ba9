"""The vector kernels and the function that calls them, as LLVM IR.

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
import platform
from typing import NamedTuple

from relu_xp.activation import Rounded

__all__ = [
    "BOARD",
    "KEEP_ORDER",
    "KINDS",
    "MACHINES",
    "NAMES",
    "RECORD",
    "THREAD_BYTES",
    "Structure",
    "constants",
    "kernels",
    "runtime",
    "structure_of",
    "structures",
]

DTYPE_NAMES = ("float16", "bfloat16", "float32", "float64")
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
    """Return all structures that there are."""
    choices = itertools.product(DTYPE_NAMES, *[(False, True)] * 4)
    every = itertools.starmap(Structure, choices)
    return [structure for structure in every if structure.ceiling or not structure.three]


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


def kernels(structure: Structure) -> str:
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
        if self.structure.three:
            data = self.emit(f"zext {self.bools} {keep} to {self.bytes}")
            if clipped is not None:
                two = f"{self.bytes} splat (i8 2), {self.bytes} {data}"
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


# How a kernel is called, by every kernel and thread alike.
#
# The board is an array of 64-bit words. Words that several threads write lie on lines of their own.
BOARD = {
    "save_thread": 0,  # addresses of functions of Python's and NumPy's C API, and the system's
    "restore_thread": 1,
    "as_ssize_t": 2,
    "incref": 3,
    "acquire_lock": 4,
    "release_lock": 5,
    "new_like": 6,
    "give_way": 7,
    "none": 8,  # and of None
    "release_bytes": 9,  # of `out`, from which on the GIL is released ...
    "threaded_bytes": 10,  # ... several threads are used ...
    "stream_bytes": 11,  # ... and stores go past the caches
    "patience": 12,  # looks at `published` before a helper goes to sleep
    "threads": 13,
    "kernel": 14,  # the job: the arguments of its kernel, and the elements of a block
    "constants": 15,
    "out": 16,
    "in": 17,
    "other": 18,
    "size": 19,
    "block": 20,
    "cpu": 21,  # the caller's
    "get_cpu": 22,  # addresses of functions of Linux, 0 elsewhere
    "get_affinity": 23,
    "set_affinity": 24,
    "busy": 32,  # 1 while a caller owns the board
    "published": 40,  # jobs so far
    "open": 48,  # 1 while helpers may begin
    "active": 56,  # helpers within `take`
    "stop": 64,
    "taken": 72,  # and on, for every thread: blocks taken of its share ...
    "asleep": 80,  # ... and, a helper's, whether it sleeps, and the lock that it then waits for
    "bell": 81,
}
THREAD_BYTES = 2 * _LINE  # from one thread's words to the next one's

_BLOCK_STEP = 4096  # elements; a block is a multiple, so that the mask begins at a byte
_BLOCK_MOST = 1 << 17  # less than a whole share only where the caches do not hold that anyway
# Looks, each some 50 ns, after which a waiting thread lets another have its CPU: it may be the one
# that it waits for.
_GIVE_WAY = 16
_CPU_SET = 128  # bytes of a cpu_set_t
_C_CONTIGUOUS, _F_CONTIGUOUS, _ALIGNED = 0x1, 0x2, 0x100  # flags of NumPy's arrays
KEEP_ORDER = 2  # NPY_KEEPORDER

# How a processor is told that it waits for another.
_PAUSE = dict.fromkeys(("x86_64", "amd64"), ("llvm.x86.sse2.pause", "", "")) | dict.fromkeys(
    ("aarch64", "arm64"), ("llvm.aarch64.hint", "i32", "i32 1")
)

MACHINES = tuple(_PAUSE)  # those that this has been thought through for

# A record is what `call` is told of one kernel of one activation; its constants follow.
RECORD = {"plain": 0, "stream": 1, "itemsize": 2, "constants": 3}


def runtime(header: int) -> str:
    """Return the module that calls kernels: three functions as Python calls them (METH_FASTCALL).

    ``call(record, size, out, in[, other])`` runs a kernel over whole arrays and returns `out`, or
    if that is None a fresh array like `in` (which costs a third of `numpy.empty_like` here). It
    returns None and has done nothing where there is no kernel, or an array's elements are not in
    one piece and order.

    ``help(number)`` takes part in jobs as thread `number`, without the GIL, until it is to stop.
    Between two jobs it looks for the next one for a while, since to be woken takes longer than most
    jobs; then it sleeps. ``ring()`` wakes all who sleep.

    A helper that finds itself on the caller's CPU goes to another: where Linux puts a thread that
    is woken it stays for many jobs, which on one CPU take longer than without help.

    For a job each thread has a share of the blocks, so that what its cache holds it meets again,
    and then helps with the others' shares. There is one job at a time: who finds the board busy
    works alone, since the CPUs are busy as well.

    Parameters
    ----------
    header : int
        Bytes of a Python object's header, after which come the fields of NumPy's array: data,
        number of dimensions, shape, strides, base, dtype, flags; 8 bytes each (C struct
        ``PyArrayObject_fields``, part of NumPy's ABI).
    """

    def load(name: str, base: str, offset: int, kind: str = "i64") -> str:
        return f"""\
  %{name}_at = getelementptr i8, ptr %{base}, i64 {offset}
  %{name} = load {kind}, ptr %{name}_at"""

    def data(name: str, owner: str) -> str:
        return load(name, owner, header, "ptr")

    def flags(name: str, owner: str) -> str:
        return load(name, owner, header + 48, "i32")

    def board(name: str, kind: str = "i64") -> str:
        return load(name, "board", 8 * BOARD[name], kind)

    def word(name: str) -> str:
        return f"%{name}_at = getelementptr i8, ptr %board, i64 {8 * BOARD[name]}"

    def record(name: str, kind: str) -> str:
        return load(name, "record", 8 * RECORD[name], kind)

    def post(name: str, kind: str, value: str) -> str:
        return f"""\
  %post_{name} = getelementptr i8, ptr %board, i64 {8 * BOARD[name]}
  store {kind} {value}, ptr %post_{name}"""

    hint, parameter, argument = _PAUSE[platform.machine().lower()]
    arguments = "ptr %constants, ptr %out, ptr %in, ptr %other"

    return f"""
define ptr @call(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
{data("board", "self")}
{load("record_array", "args", 0, "ptr")}
{load("size_object", "args", 8, "ptr")}
{load("out_given", "args", 16, "ptr")}
{load("in_array", "args", 24, "ptr")}
  %four = icmp ult i64 %count, 5
  %last = select i1 %four, i64 24, i64 32
  %other_array_at = getelementptr i8, ptr %args, i64 %last
  %other_array = load ptr, ptr %other_array_at
{data("record", "record_array")}
{record("plain", "ptr")}
{board("none", "ptr")}
{board("incref", "ptr")}
  %fresh = icmp eq ptr %out_given, %none
  %like_out = select i1 %fresh, ptr %in_array, ptr %out_given
{flags("out_flags", "like_out")}
{flags("in_flags", "in_array")}
{flags("other_flags", "other_array")}
  %two_flags = and i32 %out_flags, %in_flags
  %all_flags = and i32 %two_flags, %other_flags
  %c = and i32 %all_flags, {_C_CONTIGUOUS | _ALIGNED}
  %f = and i32 %all_flags, {_F_CONTIGUOUS | _ALIGNED}
  %in_c = icmp eq i32 %c, {_C_CONTIGUOUS | _ALIGNED}
  %in_f = icmp eq i32 %f, {_F_CONTIGUOUS | _ALIGNED}
  %in_order = or i1 %in_c, %in_f
  %ready = icmp ne ptr %plain, null
  %can = and i1 %in_order, %ready
  br i1 %can, label %get_out, label %refuse
refuse:
  call void %incref(ptr %none)
  ret ptr %none
get_out:
  br i1 %fresh, label %allocate, label %take_given
take_given:
  call void %incref(ptr %out_given)
  br label %begin
allocate:
{board("new_like", "ptr")}
  %out_new = call ptr %new_like(ptr %in_array, i32 {KEEP_ORDER}, ptr null, i32 0)
  %failed = icmp eq ptr %out_new, null
  br i1 %failed, label %no_memory, label %begin
no_memory:
  ret ptr null
begin:
  %out_array = phi ptr [%out_given, %take_given], [%out_new, %allocate]
{board("as_ssize_t", "ptr")}
  %size = call i64 %as_ssize_t(ptr %size_object)
{data("out", "out_array")}
{data("in", "in_array")}
{data("other", "other_array")}
  %constants = getelementptr i8, ptr %record, i64 {8 * RECORD["constants"]}
{record("itemsize", "i64")}
  %bytes = mul i64 %size, %itemsize
{board("release_bytes")}
  %long = icmp uge i64 %bytes, %release_bytes
  br i1 %long, label %release, label %short
short:
  call void %plain({arguments}, i64 0, i64 %size)
  br label %end
release:
{board("save_thread", "ptr")}
  %state = call ptr %save_thread()
{record("stream", "ptr")}
{board("stream_bytes")}
  %beyond_cache = icmp uge i64 %bytes, %stream_bytes
  %out_is_in = icmp eq ptr %out, %in
  %out_is_other = icmp eq ptr %out, %other
  %in_place = or i1 %out_is_in, %out_is_other
  %apart = xor i1 %in_place, true
  %streams = and i1 %beyond_cache, %apart
  %kernel = select i1 %streams, ptr %stream, ptr %plain
{board("threads")}
  %several = icmp ugt i64 %threads, 1
{board("threaded_bytes")}
  %worth = icmp uge i64 %bytes, %threaded_bytes
  %shared = and i1 %several, %worth
  br i1 %shared, label %claim, label %alone
alone:
  call void %kernel({arguments}, i64 0, i64 %size)
  br label %acquire
claim:
  {word("busy")}
  %claimed = cmpxchg ptr %busy_at, i64 0, i64 1 seq_cst seq_cst
  %free = extractvalue {{ i64, i1 }} %claimed, 1
  br i1 %free, label %publish, label %alone
publish:
{post("kernel", "ptr", "%kernel")}
{post("constants", "ptr", "%constants")}
{post("out", "ptr", "%out")}
{post("in", "ptr", "%in")}
{post("other", "ptr", "%other")}
{post("size", "i64", "%size")}
  %part = udiv i64 %size, %threads
  %more = add i64 %part, {_BLOCK_STEP}
  %rounded = and i64 %more, {-_BLOCK_STEP}
  %block = call i64 @llvm.umin.i64(i64 %rounded, i64 {_BLOCK_MOST})
{post("block", "i64", "%block")}
{board("get_cpu", "ptr")}
  %cpu_known = icmp ne ptr %get_cpu, null
  br i1 %cpu_known, label %tell_cpu, label %prepare
tell_cpu:
  %cpu = call i32 %get_cpu()
  %cpu_wide = sext i32 %cpu to i64
{post("cpu", "i64", "%cpu_wide")}
  br label %prepare
prepare:
  {word("taken")}
  br label %clear
clear:
  %thread = phi i64 [0, %prepare], [%thread_next, %clear]
  %offset = mul i64 %thread, {THREAD_BYTES}
  %count_at = getelementptr i8, ptr %taken_at, i64 %offset
  store i64 0, ptr %count_at
  %thread_next = add i64 %thread, 1
  %cleared = icmp eq i64 %thread_next, %threads
  br i1 %cleared, label %open, label %clear
open:
  {word("open")}
  store atomic i64 1, ptr %open_at seq_cst, align 8
  {word("published")}
  %before = atomicrmw add ptr %published_at, i64 1 seq_cst
  call void @wake(ptr %board)
  call void @take(ptr %board, i64 0)
  store atomic i64 0, ptr %open_at seq_cst, align 8
  {word("active")}
{board("give_way", "ptr")}
  br label %wait
wait:
  %waits = phi i64 [0, %open], [%waits_next, %waited]
  %active = load atomic i64, ptr %active_at seq_cst, align 8
  %alone_again = icmp eq i64 %active, 0
  br i1 %alone_again, label %leave, label %pause
pause:
  call void @{hint}({argument})
  %waits_next = add i64 %waits, 1
  %waits_part = and i64 %waits_next, {_GIVE_WAY - 1}
  %waits_long = icmp eq i64 %waits_part, 0
  br i1 %waits_long, label %polite, label %waited
polite:
  %yielded = call i32 %give_way()
  br label %waited
waited:
  br label %wait
leave:
  store atomic i64 0, ptr %busy_at seq_cst, align 8
  br label %acquire
acquire:
{board("restore_thread", "ptr")}
  call void %restore_thread(ptr %state)
  br label %end
end:
  ret ptr %out_array
}}

define ptr @help(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
{data("board", "self")}
{board("as_ssize_t", "ptr")}
{board("none", "ptr")}
{board("incref", "ptr")}
{board("save_thread", "ptr")}
{board("restore_thread", "ptr")}
{board("patience")}
{load("number_object", "args", 0, "ptr")}
  %number = call i64 %as_ssize_t(ptr %number_object)
  {word("taken")}
  %offset = mul i64 %number, {THREAD_BYTES}
  %mine_at = getelementptr i8, ptr %taken_at, i64 %offset
  %asleep_at = getelementptr i8, ptr %mine_at, i64 {_LINE}
  %bell_at = getelementptr i8, ptr %mine_at, i64 {_LINE + 8}
  %bell = load ptr, ptr %bell_at
{board("acquire_lock", "ptr")}
{board("give_way", "ptr")}
  {word("published")}
  {word("open")}
  {word("active")}
  {word("stop")}
  %state = call ptr %save_thread()
  %jobs = load atomic i64, ptr %published_at seq_cst, align 8
  %last_but_one = sub i64 %jobs, 1
  br label %watch
watch:
  %seen = phi i64 [%last_but_one, %entry], [%now, %leave], [%now, %again]
  br label %look
look:
  %looks = phi i64 [0, %watch], [%next, %stay], [%next, %polite]
  %now = load atomic i64, ptr %published_at seq_cst, align 8
  %news = icmp ne i64 %now, %seen
  br i1 %news, label %join, label %idle
idle:
  call void @{hint}({argument})
  %next = add i64 %looks, 1
  %tired = icmp ugt i64 %next, %patience
  %stop = load atomic i64, ptr %stop_at seq_cst, align 8
  %stopped = icmp ne i64 %stop, 0
  %done = or i1 %tired, %stopped
  br i1 %done, label %rest, label %stay
stay:
  %part = and i64 %next, {_GIVE_WAY - 1}
  %long = icmp eq i64 %part, 0
  br i1 %long, label %polite, label %look
polite:
  call void @step_aside(ptr %board)
  %yielded = call i32 %give_way()
  br label %look
rest:
  br i1 %stopped, label %return, label %lie_down
lie_down:
  store atomic i64 1, ptr %asleep_at seq_cst, align 8
  %latest = load atomic i64, ptr %published_at seq_cst, align 8
  %late_stop = load atomic i64, ptr %stop_at seq_cst, align 8
  %missed = icmp ne i64 %latest, %seen
  %missed_stop = icmp ne i64 %late_stop, 0
  %no_sleep = or i1 %missed, %missed_stop
  br i1 %no_sleep, label %get_up, label %sleep
get_up:
  %was_asleep = atomicrmw xchg ptr %asleep_at, i64 0 seq_cst
  %not_woken = icmp eq i64 %was_asleep, 1
  br i1 %not_woken, label %again, label %sleep
sleep:
  %locked = call i32 %acquire_lock(ptr %bell, i32 1)
  br label %again
again:
  br label %watch
join:
  %before = atomicrmw add ptr %active_at, i64 1 seq_cst
  %open = load atomic i64, ptr %open_at seq_cst, align 8
  %is_open = icmp ne i64 %open, 0
  br i1 %is_open, label %work, label %leave
work:
  call void @step_aside(ptr %board)
  call void @take(ptr %board, i64 %number)
  br label %leave
leave:
  %after = atomicrmw sub ptr %active_at, i64 1 seq_cst
  br label %watch
return:
  call void %restore_thread(ptr %state)
  call void %incref(ptr %none)
  ret ptr %none
}}

define ptr @ring(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
{data("board", "self")}
{board("none", "ptr")}
{board("incref", "ptr")}
  call void @wake(ptr %board)
  call void %incref(ptr %none)
  ret ptr %none
}}

define internal void @wake(ptr %board) nounwind {{
entry:
{board("threads")}
{board("release_lock", "ptr")}
  {word("taken")}
  br label %test
test:
  %number = phi i64 [1, %entry], [%next, %skip]
  %some = icmp ult i64 %number, %threads
  br i1 %some, label %look, label %done
look:
  %offset = mul i64 %number, {THREAD_BYTES}
  %its_at = getelementptr i8, ptr %taken_at, i64 %offset
  %asleep_at = getelementptr i8, ptr %its_at, i64 {_LINE}
  %bell_at = getelementptr i8, ptr %its_at, i64 {_LINE + 8}
  %asleep = load atomic i64, ptr %asleep_at seq_cst, align 8
  %is_asleep = icmp eq i64 %asleep, 1
  br i1 %is_asleep, label %claim, label %skip
claim:
  %was_asleep = atomicrmw xchg ptr %asleep_at, i64 0 seq_cst
  %mine = icmp eq i64 %was_asleep, 1
  br i1 %mine, label %release, label %skip
release:
  %bell = load ptr, ptr %bell_at
  call void %release_lock(ptr %bell)
  br label %skip
skip:
  %next = add i64 %number, 1
  br label %test
done:
  ret void
}}

define internal void @step_aside(ptr %board) nounwind {{
entry:
  {word("cpu")}
  %cpu = load atomic i64, ptr %cpu_at monotonic, align 8
{board("get_cpu", "ptr")}
  %known = icmp ne ptr %get_cpu, null
  br i1 %known, label %look, label %done
look:
  %own = call i32 %get_cpu()
  %own_cpu = sext i32 %own to i64
  %same = icmp eq i64 %own_cpu, %cpu
  %counted = icmp ult i64 %cpu, {8 * _CPU_SET}
  %crowded = and i1 %same, %counted
  br i1 %crowded, label %move, label %done
move:
{board("get_affinity", "ptr")}
{board("set_affinity", "ptr")}
  %all = alloca [{_CPU_SET} x i8], align 8
  %others = alloca [{_CPU_SET} x i8], align 8
  %error = call i32 %get_affinity(i32 0, i64 {_CPU_SET}, ptr %all)
  %failed = icmp slt i32 %error, 0
  br i1 %failed, label %done, label %go
go:
  %set = load <{_CPU_SET // 8} x i64>, ptr %all, align 8
  store <{_CPU_SET // 8} x i64> %set, ptr %others, align 8
  %byte = lshr i64 %cpu, 3
  %byte_at = getelementptr i8, ptr %others, i64 %byte
  %eight = load i8, ptr %byte_at
  %bit = and i64 %cpu, 7
  %shift = trunc i64 %bit to i8
  %one = shl i8 1, %shift
  %without = xor i8 %one, -1
  %seven = and i8 %eight, %without
  store i8 %seven, ptr %byte_at
  %away = call i32 %set_affinity(i32 0, i64 {_CPU_SET}, ptr %others)
  %back = call i32 %set_affinity(i32 0, i64 {_CPU_SET}, ptr %all)
  br label %done
done:
  ret void
}}

define internal void @take(ptr %board, i64 %number) nounwind {{
entry:
{board("kernel", "ptr")}
{board("constants", "ptr")}
{board("out", "ptr")}
{board("in", "ptr")}
{board("other", "ptr")}
{board("size")}
{board("block")}
{board("threads")}
  {word("taken")}
  %size_less_one = sub i64 %size, 1
  %last_block = udiv i64 %size_less_one, %block
  %last_of_share = udiv i64 %last_block, %threads
  %share = add i64 %last_of_share, 1
  br label %next_share
next_share:
  %step = phi i64 [0, %entry], [%step_next, %exhausted]
  %all_done = icmp eq i64 %step, %threads
  br i1 %all_done, label %done, label %a_share
a_share:
  %sum = add i64 %number, %step
  %whose = urem i64 %sum, %threads
  %offset = mul i64 %whose, {THREAD_BYTES}
  %count_at = getelementptr i8, ptr %taken_at, i64 %offset
  %base = mul i64 %whose, %share
  br label %next_block
next_block:
  %nth = atomicrmw add ptr %count_at, i64 1 seq_cst
  %index = add i64 %base, %nth
  %start = mul i64 %index, %block
  %of_share = icmp ult i64 %nth, %share
  %of_array = icmp ult i64 %start, %size
  %is_block = and i1 %of_share, %of_array
  br i1 %is_block, label %run, label %exhausted
run:
  %whole = add i64 %start, %block
  %stop = call i64 @llvm.umin.i64(i64 %whole, i64 %size)
  call void %kernel({arguments}, i64 %start, i64 %stop)
  br label %next_block
exhausted:
  %step_next = add i64 %step, 1
  br label %next_share
done:
  ret void
}}

declare void @{hint}({parameter})
declare i64 @llvm.umin.i64(i64, i64)
"""


def _mangled(vector: str) -> str:
    """Return a vector type as the name of an intrinsic has it."""
    return "v" + vector.strip("<>").replace(" x ", "")
