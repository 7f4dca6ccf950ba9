"""Execute PTX, the assembly that NVRTC gives to a driver, on a CPU: one kernel, all its threads.

`Program` decodes a kernel, and `Program.run` executes it with NumPy, each instruction for all
threads that have reached it: a register is an array with an element for each thread. Threads in
different places form groups by program counter. The group that is furthest behind runs first, so
that groups meet again; one that votes or shuffles waits for every thread that its mask names.

What is known are the instructions that this package's kernels consist of; none of them uses shared
memory or barriers. An error, never a guess, are an unknown instruction or modifier, a register that
is read before it is written, an access that is not aligned or lies outside of the arrays, a store
to an input, a mask that names a thread which does not arrive, and two threads that touch one byte
if one of them writes it.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from ptx_operations import BOOL, TYPES, UNSIGNED, PtxError, operation

WARP = 32  # threads
BLOCK = 128  # threads; CuPy's choice
_BATCH = 128 * BLOCK  # threads that are executed at a time: their registers stay in the caches
_ABSENT = 0xDEADBEEF  # what a shuffle gives from a thread that takes no part: undefined on a device
_ALL = slice(None)
_SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x")

_STATEMENT = re.compile(
    r"""\s*(?: (?P<label>\$\w+): | [{}] | \.pragma\s[^;]*;
    | \.reg\s+\.(?P<type>\w+)\s+(?P<register>%?[a-z]+)(?:<(?P<count>\d+)>)?\s*;
    | (?:@(?P<sense>!?)(?P<predicate>%\w+)\s+)? (?P<opcode>[a-z][\w.]*)\s*(?P<operands>[^;]*);)""",
    re.VERBOSE,
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class Instruction(NamedTuple):
    """One instruction, decoded.

    Attributes
    ----------
    text : str
    kind : str
        The name of the method of `_Batch` that executes it.
    results, operands : list of (dtype, str or ndarray)
        How each is used, and the register or the constant.
    detail : object
        The function to compute; the target of a branch and the sense of its predicate; the offset
        of an access; or a parameter's number, offset and dtype.
    """

    text: str
    kind: str
    results: list[Any] = []  # noqa: RUF012
    operands: list[Any] = []  # noqa: RUF012
    detail: Any = None


class Access(NamedTuple):
    """What the threads of a group did to memory by one instruction.

    Attributes
    ----------
    text : str
        The instruction.
    is_store : bool
    addresses, threads : ndarray
    width : int
        Bytes of each thread's access.
    """

    text: str
    is_store: bool
    addresses: np.ndarray
    threads: np.ndarray
    width: int

    def only(self, which):
        """Return the part of it that some of the threads did."""
        return self._replace(addresses=self.addresses[which], threads=self.threads[which])

    def units(self, first, size):
        """Return the indices of the units of memory that each thread touched, counted from one."""
        start = self.addresses // np.uint64(size) - np.uint64(first // size)
        return [start + np.uint64(k) for k in range(self.width // size)]


class Program:
    """A kernel: the only entry of a PTX text."""

    def __init__(self, text):
        text = re.sub(r"//.*", "", text)
        entries = re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)\s*\{(.*)\}\s*$", text, re.DOTALL)
        if len(entries) != 1:
            raise PtxError(f"{len(entries)} kernels in a text")
        self.name, parameters, body = entries[0]
        self._parameters = re.findall(r"(\w+)(?:\[\d+\])?\s*(?:,|$)", parameters)
        self.registers, self.labels, self.code = {}, {}, []
        position = 0
        while body[position:].strip():
            statement = _STATEMENT.match(body, position)
            if not statement:
                raise PtxError(f"{self.name}: not understood: {body[position : position + 80]!r}")
            position = statement.end()
            if statement["label"]:
                self.labels[statement["label"]] = len(self.code)
            elif statement["type"]:
                dtype, name = TYPES[statement["type"]], statement["register"]
                if statement["count"]:
                    dtype = dtype if dtype == BOOL else UNSIGNED[dtype.itemsize]
                    every = range(int(statement["count"]))
                    self.registers |= {f"{name}{number}": dtype for number in every}
                else:  # of a block of inline PTX; another one may give the name another type
                    self.registers[name] = UNSIGNED[8]
            elif statement["opcode"]:
                try:
                    self.code.append(self._decode(statement))
                except (KeyError, ValueError) as error:
                    text = statement[0].strip()
                    raise PtxError(f"{self.name}: not implemented: {text}") from error
        self.leaders = {*self.labels.values()}

    def _decode(self, statement):
        """Return an instruction; or raise KeyError or ValueError."""
        text, words = " ".join(statement[0].split()), statement["opcode"].split(".")
        given, kind = _OPERAND.findall(statement["operands"]), words[-1]
        if statement["predicate"] and words[0] != "bra":
            raise KeyError("a predicate")
        if words in (["bra"], ["bra", "uni"]):
            (label,), predicate = given, statement["predicate"]
            operands = self._operands([predicate], ["pred"]) if predicate else []
            return Instruction(text, "branch", [], operands, (label, statement["sense"] == "!"))
        if words == ["ret"]:
            return Instruction(text, "exit")
        if words[:-1] == ["ld", "param"]:
            name, offset = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", given[1]).groups()
            detail = self._parameters.index(name), int(offset or 0), TYPES[kind]
            return Instruction(text, "parameter", self._operands(given[:1], [kind]), [], detail)
        if words[:2] in (["ld", "global"], ["st", "global"]):
            return self._access(text, words, *(given if words[0] == "st" else given[::-1]))
        if words == ["vote", "sync", "ballot", "b32"]:
            results, operands = self._operands(given, ["u32", "pred", "u32"]), 1
            return Instruction(text, "vote", results[:operands], results[operands:])
        if words == ["shfl", "sync", "down", "b32"]:
            every = self._operands(
                [*given[0].split("|"), *given[1:]], ["u32", "pred", *4 * ["u32"]]
            )
            return Instruction(text, "shuffle", every[:2], every[2:])
        if words[0] == "mov" and "{" in "".join(given):
            return self._pack(text, kind, *given)
        result, types, function = operation(words)
        result, *operands = self._operands(given, [result, *types])
        return Instruction(text, "compute", [result], operands, function)

    def _access(self, text, words, address, data):
        """Return a load or a store of one, two or four cells."""
        *count, kind = words[2:]
        cells = _OPERAND.findall(data.strip("{}"))
        if len(cells) != {(): 1, ("v2",): 2, ("v4",): 4}[tuple(count)]:
            raise KeyError(data)
        register, offset = re.fullmatch(r"\[(%\w+)(?:\+(-?\d+))?\]", address).groups()
        cells = self._operands(cells, len(cells) * [kind])
        start = self._operands([register], ["u64"])
        detail = np.uint64(int(offset or 0) % (1 << 64))
        if words[0] == "ld":
            return Instruction(text, "load", cells, start, detail)
        return Instruction(text, "store", [], start + cells, detail)

    def _pack(self, text, kind, result, operand):
        """Return a mov that makes one register of two halves, or the reverse."""
        bits = 4 * TYPES[kind].itemsize
        splits = result[0] == "{"
        whole, halves = (operand, result) if splits else (result, operand)
        low, high = self._operands(_OPERAND.findall(halves.strip("{}")), 2 * [f"b{bits}"])
        (whole,) = self._operands([whole], [f"b{2 * bits}"])
        if splits:
            function = lambda x: (x.astype(low[0]), (x >> bits).astype(low[0]))  # noqa: E731
            return Instruction(text, "compute", [low, high], [whole], function)
        function = lambda a, b: a.astype(whole[0]) | b.astype(whole[0]) << bits  # noqa: E731
        return Instruction(text, "compute", [whole], [low, high], function)

    def _operands(self, texts, kinds):
        """Return the dtype that each operand is used with, and its register or its value."""
        found = []
        for text, kind in zip(texts, kinds, strict=True):
            dtype, source = TYPES[kind], text
            if text in self.registers:
                held = self.registers[text]
                if held.itemsize < dtype.itemsize or (held == BOOL) != (dtype == BOOL):
                    raise KeyError(text)
            elif form := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
                source = np.array(int(form[1], 16), UNSIGNED[dtype.itemsize]).view(dtype)
            elif dtype == BOOL:
                source = np.array(int(text) != 0)
            elif text not in ("_", *_SPECIAL):
                word = int(text, 0) % (1 << 8 * dtype.itemsize)
                source = np.array(word, UNSIGNED[dtype.itemsize]).view(dtype)
            found.append((dtype, source))
        return found

    def run(self, parameters, threads, readable, writable, first=0):
        """Execute the kernel, and return what it did to memory.

        Parameters
        ----------
        parameters : list of bytes
        threads : int
            Those that are needed. Whole blocks are started; CuPy starts no more than are needed if
            that is less than a block.
        readable, writable : list of (int, int)
            First and last address (exclusive) of the arrays that may be read, and written too.
        first : int, optional
            The block to begin with: those before it are not executed.

        Returns
        -------
        list of Access

        Raises
        ------
        PtxError
            What the kernel does is an error, or undefined, on a device.
        """
        blocks = -(-threads // BLOCK)
        accesses = []
        with np.errstate(all="ignore"):
            for start in range(first * BLOCK, blocks * BLOCK, _BATCH):
                count = min(_BATCH, blocks * BLOCK - start)
                batch = _Batch(self, parameters, start, count, blocks)
                batch.ranges = {"load": readable + writable, "store": writable}
                batch.run()
                accesses += batch.accesses
        _check_races(self.name, accesses, writable)
        return accesses


def _memory(size):
    """Return all of memory, from address 64 on, as an array of words of some bytes."""
    interface = {"version": 3, "typestr": f"<u{size}", "data": (64, False)}
    interface["shape"] = ((1 << 62) // size,)
    return np.asarray(type("Memory", (), {"__array_interface__": interface})())


_MEMORY = {size: _memory(size) for size in UNSIGNED}


class _Wait(Exception):  # noqa: N818
    """A thread that a mask names has not arrived."""


class _Batch:
    """Threads of whole blocks, from their first instruction to their last."""

    def __init__(self, program, parameters, first, count, blocks):
        self.program, self.parameters, self.count = program, parameters, count
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        self.accesses = []
        self.threads = np.arange(first, first + count)
        ctaid, tid = np.divmod(self.threads, BLOCK)
        self.values = {"%tid.x": tid.astype(np.uint32), "%ctaid.x": ctaid.astype(np.uint32)}
        for name, number in (("%ntid.x", BLOCK), ("%nctaid.x", blocks)):
            self.values[name] = np.full(count, number, np.uint32)
        self.written: dict[str, Any] = dict.fromkeys(self.values, True)  # True, or by thread

    def fail(self, what, instruction):
        raise PtxError(f"{self.program.name}: {what}: {instruction.text}")

    def run(self):
        """Run the group that is furthest behind, until none is left."""
        groups, waiting = {0: _ALL}, {}
        while groups:
            position = min(groups)
            lanes = groups.pop(position)
            try:
                reached = self._run_block(position, lanes)
            except _Wait:
                waiting[position] = lanes
                continue
            for next_position, those in reached:
                for other in (groups, waiting):
                    if next_position in other:
                        those = self._union(those, other.pop(next_position))
                groups[next_position] = those
        for position in waiting:
            self.fail("its mask names a thread that does not arrive", self.program.code[position])

    def _union(self, one, other):
        lanes = np.zeros(self.count, bool)
        lanes[one] = lanes[other] = True
        return self._lanes(np.flatnonzero(lanes))

    def _lanes(self, indices):
        """Return indices as a slice if they are neighbours: a view is faster than a copy."""
        if indices.size == self.count:
            return _ALL
        if indices[-1] - indices[0] + 1 == indices.size:
            return slice(int(indices[0]), int(indices[-1]) + 1)
        return indices

    def _run_block(self, start, lanes):
        """Run instructions up to a branch, a label or the end; return who goes on, and where."""
        code, position = self.program.code, start
        while True:
            if position == len(code):
                self.fail("no instruction follows", code[-1])
            instruction = code[position]
            if instruction.kind == "exit":
                return []
            if instruction.kind == "branch":
                return self._branch(position, instruction, lanes)
            if instruction.kind in ("vote", "shuffle") and position != start:
                return [(position, lanes)]  # where the group may have to wait
            values = [self._read(operand, instruction, lanes) for operand in instruction.operands]
            results = getattr(self, f"_{instruction.kind}")(instruction, lanes, *values)
            for result, value in zip(instruction.results, results, strict=True):
                self._write(result[1], value, lanes)
            position += 1
            if position in self.program.leaders:
                return [(position, lanes)]

    def _read(self, operand, instruction, lanes):
        dtype, source = operand
        if not isinstance(source, str):
            return source
        written = self.written.get(source)
        if written is not True and (written is None or not written[lanes].all()):
            self.fail(f"{source} is not written yet", instruction)
        value = self.values[source][lanes]
        if value.itemsize != dtype.itemsize:
            value = value.astype(UNSIGNED[dtype.itemsize])
        return value.view(dtype)

    def _write(self, name, value, lanes):
        if name == "_":  # a result that is not needed
            return
        held = self.program.registers[name]
        if value.itemsize < held.itemsize:  # extended by its sign, if it has one
            value = value.astype(f"{value.dtype.kind}{held.itemsize}")
        value = value.view(held)
        if lanes is _ALL:
            self.values[name] = value if value.ndim else np.full(self.count, value)
            self.written[name] = True
            return
        if name not in self.values:
            self.values[name] = np.empty(self.count, held)
            self.written[name] = np.zeros(self.count, bool)
        self.values[name][lanes] = value
        if self.written[name] is not True:
            self.written[name][lanes] = True

    def _branch(self, position, instruction, lanes):
        label, negated = instruction.detail
        target = self.program.labels[label]
        if not instruction.operands:
            return [(target, lanes)]
        taken = self._read(instruction.operands[0], instruction, lanes) != negated
        if taken.all() or not taken.any():
            return [(target if taken.all() else position + 1, lanes)]
        indices = np.arange(self.count)[lanes]
        others = self._lanes(indices[~taken])
        return [(target, self._lanes(indices[taken])), (position + 1, others)]

    def _compute(self, instruction, lanes, *values):
        results = instruction.detail(*values)
        return results if isinstance(results, tuple) else (results,)

    def _parameter(self, instruction, lanes):
        number, offset, dtype = instruction.detail
        if offset + dtype.itemsize > len(self.parameters[number]):
            self.fail("beyond the end of the parameter", instruction)
        return [np.frombuffer(self.parameters[number], dtype, 1, offset).reshape(())]

    def _load(self, instruction, lanes, start):
        cells = instruction.results
        places = zip(cells, self._cells(instruction, lanes, start, cells), strict=True)
        return [_MEMORY[dtype.itemsize][index].view(dtype) for (dtype, _), index in places]

    def _store(self, instruction, lanes, start, *values):
        cells = self._cells(instruction, lanes, start, instruction.operands[1:])
        for value, index in zip(values, cells, strict=True):
            _MEMORY[value.itemsize][index] = value.view(UNSIGNED[value.itemsize])
        return []

    def _cells(self, instruction, lanes, start, cells):
        """Return where in `_MEMORY` each cell of an access is, after all checks of it."""
        size = cells[0][0].itemsize
        width = size * len(cells)
        addresses = start + instruction.detail
        if (addresses % np.uint64(width)).any():
            self.fail(f"not aligned to {width} bytes", instruction)
        inside = np.zeros(addresses.shape, bool)
        for first, last in self.ranges[instruction.kind]:
            inside |= (addresses >= first) & (addresses <= last - width)  # a sum may wrap around
        if not inside.all():
            self.fail(f"a {instruction.kind} outside of the arrays", instruction)
        access = instruction.text, instruction.kind == "store", addresses
        self.accesses.append(Access(*access, self.threads[lanes], width))
        first = (addresses - np.uint64(64)) // np.uint64(size)
        return [first + np.uint64(k) for k in range(len(cells))]

    def _vote(self, instruction, lanes, predicate, mask):
        warp, _ = self._take_part(instruction, lanes, mask)
        votes = np.zeros(self.count, bool)
        votes[lanes] = predicate
        return [np.packbits(votes, bitorder="little").view(np.uint32)[warp] & mask]

    def _shuffle(self, instruction, lanes, value, by, clamp, mask):
        warp, lane = self._take_part(instruction, lanes, mask)
        if np.any(clamp != WARP - 1) or np.any(by >= WARP):
            self.fail("not implemented", instruction)
        values = np.full(self.count, _ABSENT, np.uint32)
        values[lanes] = value
        is_there = lane + by < WARP
        source = warp * WARP + np.where(is_there, lane + by, lane)
        return [values[source], is_there]

    def _take_part(self, instruction, lanes, mask):
        """Return warp and lane of each thread; or raise _Wait until all in the mask are here."""
        warp, lane = np.divmod(np.arange(self.count, dtype=np.uint32)[lanes], np.uint32(WARP))
        present = np.zeros(self.count, bool)
        present[lanes] = True
        masks = np.zeros(self.count // WARP, np.uint32)
        masks[warp] = mask
        if np.any(masks[warp] != mask) or not np.all(mask >> lane & 1):
            self.fail("a warp with several masks, or a mask without its own thread", instruction)
        if np.any(masks & ~np.packbits(present, bitorder="little").view(np.uint32)):
            raise _Wait
        return warp, lane


def _check_races(name, accesses, writable):
    """Raise PtxError if two threads touch a byte that one of them writes."""
    for first, last in writable:
        here = []
        for access in accesses:
            inside = (first <= access.addresses) & (access.addresses < last)
            if inside.any():
                here.append(access if inside.all() else access.only(inside))
        if not here:
            continue
        unit = min(access.width for access in here)  # bytes: no access is narrower
        places = [access.units(first, unit) for access in here]
        if (last - first) // unit > 1 << 26:  # too much memory: only what is touched is numbered
            touched = np.unique(np.concatenate([one for units in places for one in units]))
            places = [[np.searchsorted(touched, one) for one in units] for units in places]
        writers = np.full(max(int(one.max()) for units in places for one in units) + 1, -1)
        for access, units in zip(here, places, strict=True):
            for index in units if access.is_store else ():
                writers[index] = access.threads
        for access, units in zip(here, places, strict=True):
            for found in (writers[index] for index in units):
                if np.any((found != access.threads) & (found != -1)):
                    what = "two threads touch what one of them writes"
                    raise PtxError(f"{name}: {what}: {access.text}")
