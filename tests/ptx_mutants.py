"""Mutation testing of CuPy's kernels: their PTX, changed in one place, against the tests.

``python tests/ptx_mutants.py`` takes, of each kernel that short tests execute, one instruction of
each kind, changes it in one of the ways that `mutations` knows, and runs those tests (`checks`) of
the kernel, the fastest first. It prints the mutants that no test finds, and how many were found: by
a result, by an error of ptx.py, or because a kernel did not end. Mutants of an instruction that no
test executes are counted apart. See README.md, "Mutation testing".

Options: ``--count=N`` instructions of a kind, ``--ways=N`` for each, drawn at random; ``--only``
and ``--mutation``, regular expressions for the name of a kernel and for what is changed;
``--part=K --parts=N`` for every N-th kernel; ``--limit=SECONDS``.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import random
import re
import signal
import time
from unittest import mock

import cupy_host
import numpy as np
import ptx_operations
from backends import test_cupy_bias, test_cupy_faults, test_cupy_large, test_cupy_values
from libraries import LIBRARIES
from ptx import _OPERAND, _STATEMENT, Program
from ptx_operations import PtxError

from relu_xp.testing import reference

_LIBRARY = LIBRARIES["cupy_host"]
_SECONDS = 1  # of processor time, for a check of a kernel that does not end

# What a word of an opcode is replaced by; a type where its sign has a meaning.
_WORDS = {"rn": ["rz"], "rz": ["rn"], "eq": ["ne"], "ne": ["eq"], "neu": ["eq"]}
_WORDS |= {"lt": ["le", "gt"], "le": ["lt", "ge"], "gt": ["ge", "lt"], "ge": ["gt", "le"]}
_WORDS |= {"and": ["or", "xor"], "or": ["and", "xor"], "xor": ["and", "or"]}
for _one, _other in (("add", "sub"), ("shl", "shr"), ("min", "max"), ("div", "rem")):
    _WORDS |= {_one: [_other], _other: [_one]}
_SIGNS = {f"{a}{bits}": f"{b}{bits}" for a, b in ("us", "su") for bits in (8, 16, 32, 64)}
# What changes nothing: indices and sizes have no upper bit; of the 16 bits that are extended only
# the lower ones are used; and no thread has a second element, for which CuPy has a loop.
_EQUIVALENT = re.compile(
    r"sign: (?:mul\.wide|cvt\.[us]64|cvt\.u32\.u16|div|rem|max|min|shr\.u64"
    r"|setp\.\w+\.s64 %p\d+, %rd\d+, %rd\d+;).*|\w+: mov\.u32 %r\d+, %nctaid\.x;.*"
)
_SPECIAL = ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x")


def mutations(statement, before, parameters):
    """Yield pairs for an instruction: what is changed, and the new instruction.

    Parameters
    ----------
    statement : re.Match
        Of `_STATEMENT`.
    before : dict of list of str
        The registers that were written before, by prefix.
    parameters : list of str
    """
    words, operands = statement["opcode"].split("."), _OPERAND.findall(statement["operands"])
    name, kind = words[0], words[-1]
    bits = int(re.sub(r"\D", "", kind) or 0)

    def changed(number=None, operand="", opcode=words, guard=""):
        given = [operand if i == number else one for i, one in enumerate(operands)]
        return f"{guard}{'.'.join(opcode)} {', '.join(given)};"

    if name == "bra":
        if predicate := statement["predicate"]:
            yield "branch", changed(guard=f"@{'' if statement['sense'] else '!'}{predicate} ")
            yield "branch", changed()
            yield "dropped", ""
        return
    yield "dropped", ""
    for number, word in enumerate(words):
        for other in _WORDS.get(word, ()):
            yield word, changed(opcode=[*words[:number], other, *words[number + 1 :]])
    if name in ("add", "sub", "mul") and kind == "f64" and words[1] != "rn":
        yield "rounding", changed(opcode=[name, "rz", kind])
    # A subnormal of float16 is none in float32, and one of float32 is 0 in float16.
    if name in ("add", "sub", "mul", "cvt", "setp") and "f32" in words and "f16" not in words:
        after = 2 if words[1] in _WORDS else 1
        yield "ftz", changed(opcode=[*words[:after], "ftz", *words[after:]])
    widens = name == "cvt" and int(words[-2][1:].strip("f")) > bits
    has_sign = widens or name in ("setp", "shr", "div", "rem", "min", "max") or "wide" in words
    if has_sign and kind in _SIGNS and words[1] not in ("eq", "ne"):
        yield "sign", changed(opcode=[*words[:-1], _SIGNS[kind]])
    if words[1:2] == ["lo"]:
        yield "mul", changed(opcode=["add" if name == "mul" else "mul.lo", kind])
    if name in ("ld", "st") and words[1] == "global" and len(words) == 3:
        yield "width", changed(opcode=[*words[:-1], f"u{bits // 2 if bits > 8 else 16}"])
    if name in ("sub", "selp", "setp", "div", "rem") and words[1] not in ("eq", "ne", "neu"):
        swapped = [operands[0], operands[2], operands[1], *operands[3:]]
        yield "order", f"{'.'.join(words)} {', '.join(swapped)};"
    for number, text in enumerate(operands):
        if text in _SPECIAL:
            yield "register", changed(number, _SPECIAL[_SPECIAL.index(text) - 1])
        elif re.fullmatch(r"-?\d+", text):
            for step in (1, -1) if (name, text) not in (("shr", "31"), ("shr", "63")) else (-1,):
                yield "constant", changed(number, str(int(text) + step))
        elif re.fullmatch("0[fFdD][0-9A-Fa-f]+", text):
            word = f"{int(text[2:], 16) ^ 1:0{len(text) - 2}X}"
            yield "constant", changed(number, text[:2] + word)
        elif text[0] == "[" and words[1] == "param":
            its_name, offset = re.match(r"\[(\w+)\+?(\d*)", text).groups()
            other = parameters[parameters.index(its_name) - 1]
            yield "parameter", changed(number, f"[{other}]")
            yield "offset", changed(number, f"[{its_name}+{int(offset or 0) + bits // 8}]")
        elif text[0] == "[":
            register, offset = re.match(r"\[(%\w+)\+?(-?\d*)", text).groups()
            width = bits // 8 * (int(words[2][1:]) if words[2][0] == "v" else 1)
            for step in (width, -width):
                yield "offset", changed(number, f"[{register}+{int(offset or 0) + step}]")
        elif text[0] == "{" and "," in text:
            low, high, *rest = text.strip("{}").split(",")
            yield "order", changed(number, f"{{{','.join([high, low, *rest])}}}")
        elif text[0] == "%" and (number or name == "st") and "|" not in text:
            others = [one for one in before[text.rstrip("0123456789")] if one != text]
            for other in others[-1:]:
                yield "register", changed(number, other)
            if name in ("vote", "shfl") and number == len(operands) - 1:
                yield "mask", changed(number, "-1")
            if name == "shfl" and number == 2:
                yield "lane", changed(number, "3")


def mutants(text, options, rng):
    """Yield (what is changed, number of the instruction, changed text) for a kernel's PTX."""
    text = re.sub(r"//.*", "", text)
    parameters = re.findall(r"\.param\s[^,)]*?(\w+)(?:\[\d+\])?\s*[,)]", text)
    position, number = re.search(r"\.entry[^{]*\{", text).end(), 0
    before, by_kind = collections.defaultdict(list), collections.defaultdict(list)
    while statement := _STATEMENT.match(text, position):
        position = statement.end()
        if statement["opcode"]:
            here = {prefix: list(names[-6:]) for prefix, names in before.items()}
            here = collections.defaultdict(list, here)
            by_kind[statement["opcode"]].append((number, statement, here))
            number += 1
            result = _OPERAND.match(statement["operands"])
            for register in re.findall(r"%\w+", result[0] if result else ""):
                before[register.rstrip("0123456789")].append(register)
    for found in by_kind.values():
        for its_number, statement, here in rng.sample(found, min(options.count, len(found))):
            every = list(dict(map(reversed, mutations(statement, here, parameters))).items())
            for new, kind in rng.sample(every, min(options.ways, len(every))):
                what = f"{kind}: {' '.join(statement[0].split())} -> {new}"
                changed = f"{text[: statement.start()]}\n{new}{text[statement.end() :]}"
                yield what, its_number, changed


def _arithmetic(function, kind, mode, original=ptx_operations._arithmetic):
    """Round sums and products of float64 toward zero too, of which ptx.py has no need."""
    if (kind, mode) != ("f64", "rz"):
        return original(function, kind, mode)

    nearest = original(function, kind, "rn")

    def toward_zero(a, b):
        near, exact = nearest(a, b), function(a.astype("g"), b.astype("g"))
        return np.where(abs(near) > abs(exact), np.nextafter(near, 0), near)

    return toward_zero


def checks():
    """Return tests of CuPy's kernels that are short, by their names and arguments."""
    found = {}

    def add(function, *arguments):
        found[f"{function.__name__} {arguments}"] = functools.partial(function, *arguments)

    xp = _LIBRARY
    for dtype in reference.DTYPES:
        add(test_cupy_faults.check, dtype)
        for shape in test_cupy_values.SHAPES:
            add(test_cupy_values.test_a_weight_of_every_dtype, xp, dtype, shape)
            add(test_cupy_values.test_other_activations, xp, dtype, shape)
            for params in test_cupy_values.PRESETS:
                add(test_cupy_values.test_relu, xp, dtype, shape, params)
        for shape in test_cupy_values.WEIGHT_SHAPES:
            add(test_cupy_values.test_a_weights_gradient_is_complete, xp, dtype, shape)
        add(test_cupy_values.test_a_bias_of_every_dtype, xp, dtype)
        add(test_cupy_values.test_neighbours_of_thresholds_and_ceilings, xp, dtype)
        for case, params in itertools.product(test_cupy_bias.SMALL, test_cupy_bias.ALL_PARAMS):
            add(test_cupy_bias.test_small_arrays, xp, dtype, *case, params)
        add(test_cupy_bias.test_a_total_is_rounded_once, xp, dtype)
        add(test_cupy_bias.test_sums_are_of_float64_and_rounded_once, xp, dtype)
    for shape, axis in (((1003, 3), 1), ((40, 3, 16, 24), 1), ((2, 3, 5, 7, 8), 2), ((9000,), 0)):
        add(test_cupy_bias.test_sums_are_complete, _LIBRARY, shape, axis)
    for case in test_cupy_large.CASES:
        add(test_cupy_large.run, case)
    for shape, kind in itertools.product(test_cupy_values.SHAPES, ("int8", "int32", "uint64")):
        add(test_cupy_values.test_integers, xp, kind, shape)
    return found


def outcome(check, programs):
    """Return how a check ends with programs for kernels: "" if it finds nothing."""

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        with mock.patch.object(cupy_host, "compiled", lambda code, _: programs[code]):
            check()
    except PtxError:
        return "found by an error"
    except AssertionError:
        return "found by a result"
    except TimeoutError:
        return "found by time"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        cupy_host.launches.clear()
    return ""


class _Recorder(list):
    """The instructions of a program, and which of them were executed."""

    def __init__(self, instructions):
        super().__init__(instructions)
        self.executed = set()

    def __getitem__(self, position):
        self.executed.add(position)
        return super().__getitem__(position)


def recorded():
    """Run all checks; return, of each kernel by its code, its program and [seconds, check]."""
    kernels = {}
    for name, check in checks().items():
        seen = set()

        def compiled(code, architecture, seen=seen):
            if code not in kernels:
                program = Program(cupy_host.ptx_of(code, architecture))
                program.code = _Recorder(program.code)
                kernels[code] = program, []
            seen.add(code)
            return kernels[code][0]

        with mock.patch.object(cupy_host, "compiled", compiled):
            check()  # compiles
            cupy_host.launches.clear()
            start = time.process_time()
            check()
            cupy_host.launches.clear()
        for code in seen:
            kernels[code][1].append((time.process_time() - start, name, check))
    return kernels


def run(kernels, options):
    """Make mutants of kernels, and print what becomes of them."""
    # Those of one name whose instructions are the same, for arrays of other layouts, are one.
    alike = collections.defaultdict(list)
    for code, (program, _) in kernels.items():
        alike[program.name, *(one.text.split()[0] for one in list(program.code))].append(code)
    order = random.Random(options.seed).sample(sorted(alike.values()), len(alike))
    totals, start = collections.Counter(), time.monotonic()
    print(f"{len(kernels)} kernels, {len(order)} of them different", flush=True)
    for number, codes in list(enumerate(order))[options.part :: options.parts]:
        name = kernels[codes[0]][0].name
        if not re.search(options.only, name) or time.monotonic() - start > options.limit:
            continue
        totals["kernels"] += 1
        its_checks = sorted({one[1]: one for code in codes for one in kernels[code][1]}.values())
        its_checks = its_checks[:5] + its_checks[5 :: max(1, len(its_checks) // 5)]
        texts = [cupy_host.ptx_of(code, cupy_host.architecture) for code in codes]
        drawn = [mutants(text, options, random.Random(number)) for text in texts]
        for together in zip(*drawn, strict=True):
            what, position, _ = together[0]
            if not re.search(options.mutation, what):
                continue
            try:
                changed = {c: Program(one[-1]) for c, one in zip(codes, together, strict=True)}
            except PtxError:  # ptx.py does not know the instruction
                continue
            if _EQUIVALENT.match(what):
                found = "equivalent"
            elif not any(position in kernels[code][0].code.executed for code in codes):
                found = "not executed"
            else:
                programs = {code: program for code, (program, _) in kernels.items()} | changed
                found = next(
                    filter(None, (outcome(one[2], programs) for one in its_checks)), "left"
                )
            totals["mutants"] += 1
            totals[found] += 1
            if found in ("left", "not executed"):
                print(f"{found}: {name} {its_checks[0][1]}: {what}", flush=True)
        print(f"{dict(totals)}, {time.monotonic() - start:.0f} s", flush=True)


def main():
    """Read the options, and run."""
    parser = argparse.ArgumentParser()
    for name, default in (("count", 1), ("ways", 1), ("seed", 1), ("part", 0), ("parts", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="")
    parser.add_argument("--mutation", default="")
    parser.add_argument("--limit", type=float, default=1e9)
    options = parser.parse_args()
    patterns = {dtype: _some(dtype) for dtype in reference.DTYPES}
    with (
        _LIBRARY.running(),
        mock.patch.object(ptx_operations, "_arithmetic", _arithmetic),
        mock.patch.object(reference, "patterns", lambda dtype, dy_dtype=None: patterns[dtype]),
    ):
        run(recorded(), options)


def _some(dtype):
    """Return some of the patterns of a dtype, specials first."""
    words = reference.patterns(dtype)
    rng = np.random.default_rng(1)
    return np.concatenate([reference.specials(dtype), rng.choice(words, 500)])


if __name__ == "__main__":
    main()
