"""What PTX instructions compute, as functions of NumPy arrays: the part of ptx.py without threads.

`operation` returns the function of an instruction. Where the hardware leaves a result open, the one
here is such that tests notice: the NaN of arithmetic is NVIDIA's canonical one, without payload.
"""

from __future__ import annotations

import operator

import numpy as np

BOOL = np.dtype(bool)
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
TYPES = {f"{kind}{8 * size}": np.dtype(f"{letter}{size}")
         for kind, letter in zip("ubs", "uui", strict=True) for size in UNSIGNED}  # fmt: skip
TYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)}
TYPES |= {"pred": BOOL, "bf16": UNSIGNED[2]}

_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
_COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_FLOATS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_FLOATS |= {"abs": np.abs, "neg": np.negative}
_INTEGERS = {"add": np.add, "sub": np.subtract, "neg": np.negative}
_INTEGERS |= {"min": np.minimum, "max": np.maximum}


class PtxError(AssertionError):
    """What would be undefined, or an error, on a device; or is not implemented here."""


def operation(words):
    """Return what an instruction computes.

    Parameters
    ----------
    words : list of str
        Of the opcode: its name, its modifiers and its type.

    Returns
    -------
    result : str
        The type of the result.
    operands : list of str
        The types of the operands.
    function : function

    Raises
    ------
    KeyError or ValueError
        The instruction, or one of its modifiers, is not implemented.
    """
    name, *modifiers, kind = words
    if "ftz" in modifiers:
        if "f32" not in words:
            raise KeyError("ftz")
        modifiers.remove("ftz")
        result, operands, function = operation([name, *modifiers, kind])
        return result, operands, _flushing(function)
    if "bf16" in words and name != "cvt":
        raise KeyError("bf16")
    is_float, result, operands = kind[0] == "f", kind, [kind, kind]
    if name in ("add", "sub", "mul") and is_float:
        # A product without a rounding may be fused with a sum, and is then rounded otherwise.
        (mode,) = modifiers if name == "mul" else modifiers or ["rn"]
        function = _arithmetic(_FLOATS[name], kind, mode)
    elif name == "mul":
        (half,) = modifiers
        function = {"lo": _multiply_low, "wide": _multiply_wide}[half]
        result = f"{kind[0]}{16 * TYPES[kind].itemsize}" if half == "wide" else kind
    elif name == "mad" and modifiers == ["lo"] and not is_float:
        operands, function = [kind] * 3, lambda a, b, c: _multiply_low(a, b) + c
    elif name == "cvt":
        *modes, result = modifiers
        (mode,) = modes or [""]
        operands, function = [kind], _conversion(result, kind, mode)
    elif name == "setp":
        (comparison,) = modifiers
        result, function = "pred", _comparison(comparison, is_float)
    elif name == "mov" or words[:3] == ["cvta", "to", "global"]:
        if name == "mov" and modifiers:
            raise KeyError(modifiers)
        operands, function = [kind], np.copy
    elif modifiers:
        raise KeyError(modifiers)
    elif name == "selp":
        operands, function = [kind, kind, "pred"], lambda a, b, first: np.where(first, a, b)
    elif name in ("shl", "shr"):
        operands, function = [kind, "u32"], _shift(name)
    elif name == "bfi":
        operands, function = [kind, kind, "u32", "u32"], _insert_bits
    elif name == "popc":
        result, operands, function = "u32", [kind], np.bitwise_count
    elif name in ("div", "rem") and not is_float:
        function = _division(name)
    else:
        function = _LOGIC.get(name) or (_FLOATS if is_float else _INTEGERS)[name]
        operands = [kind] * function.nin
        if is_float:
            function = _arithmetic(function, kind, "rn")
    return result, operands, function


def _flushing(function):
    """Return a function that takes, and returns, zeros for the subnormals of float32."""

    def flush(x):
        is_tiny = x.dtype == np.float32 and np.abs(x) < np.finfo(np.float32).tiny
        return np.where(is_tiny, np.copysign(x.dtype.type(0), x), x) if np.any(is_tiny) else x

    return lambda *operands: flush(function(*map(flush, operands)))


def _canonical(x, kind):
    """Return numbers with the canonical NaN for every NaN."""
    x[np.isnan(x)] = np.array(_NAN[kind], UNSIGNED[x.itemsize]).view(x.dtype)
    return x


def _round(exact, dtype, mode, error=0.0):
    """Return float64 numbers plus an error, rounded to another format."""
    near = exact.astype(dtype)
    if mode == "rn":
        return near
    excess = (near.astype(np.float64) - exact) - error
    toward, beyond = {
        "rz": (0, np.where(exact < 0, excess < 0, excess > 0)),
        "rm": (-np.inf, excess > 0),
        "rp": (np.inf, excess < 0),
    }[mode]
    return np.where(beyond, np.nextafter(near, dtype.type(toward)), near)


def _arithmetic(function, kind, mode):
    if mode == "rn":
        return lambda *operands: _canonical(function(*operands), kind)
    if kind != "f32" or mode not in ("rz", "rm", "rp"):
        raise KeyError(mode)

    def directed(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        exact, error = function(a, b), 0.0  # a product is exact in float64
        if function is not np.multiply:
            b = function(0.0, b)
            rest = exact - a
            error = np.nan_to_num((a - (exact - rest)) + (b - rest), posinf=0, neginf=0)
        return _canonical(_round(exact, TYPES[kind], mode, error), kind)

    return directed


def _conversion(result, source, mode):
    dtype = TYPES[result]
    if ("f" in result) != ("f" in source) or (result == source and "f" in source):
        raise KeyError(f"{result}.{source}")
    widens = dtype.itemsize > TYPES[source].itemsize
    if ("f" in result and not widens) != bool(mode):  # wanted where a number is rounded only
        raise KeyError(mode)
    if "f" not in result:
        return lambda x: x.astype(dtype)  # extended by its sign, or cut off
    if result == "bf16":
        half = {"rn": 0x7FFF, "rz": 0}[mode]
        if source != "f32":
            raise KeyError(source)

        def to_bfloat16(x):
            word = x.view(np.uint32)
            word = word + np.uint32(half) + (word >> 16 & np.uint32(mode == "rn"))
            return np.where(np.isnan(x), _NAN[result], word >> 16).astype(dtype)

        return to_bfloat16

    def between_floats(x):
        if source == "bf16":
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return _canonical(_round(x.astype(np.float64), dtype, mode or "rn"), result)

    return between_floats


def _comparison(name, is_float):
    """Return a comparison, which is false at NaN; or true, if its name has a u at the end."""
    if not is_float:
        return _COMPARISONS[name]
    unordered = name not in _COMPARISONS and name[-1] == "u"
    function = _COMPARISONS[name[:-1] if unordered else name]

    def compare(a, b):
        nan = np.isnan(a) | np.isnan(b)
        return np.where(nan, unordered, function(a, b))

    return compare


def _multiply_low(a, b):
    return np.multiply(a, b, dtype=a.dtype)


def _multiply_wide(a, b):
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _division(name):
    def divide(a, b):
        if not np.all(b):
            raise PtxError("division by 0")
        remainder = np.fmod(a, b)  # of a's sign
        return remainder if name == "rem" else (a - remainder) // b

    return divide


def _shift(name):
    def shift(a, count):
        bits = 8 * a.itemsize
        inside = np.minimum(count, bits - 1).astype(a.dtype)
        if name == "shr" and a.dtype.kind == "i":
            return a >> inside
        return np.where(count < bits, a << inside if name == "shl" else a >> inside, 0)

    return shift


def _insert_bits(a, b, start, length):
    start, length = start.astype(a.dtype), length.astype(a.dtype)
    if np.any(start == 0) or np.any(start + length > 8 * a.itemsize):
        raise PtxError("bfi from bit 0, or of more bits than there are")
    mask = ((a.dtype.type(1) << length) - a.dtype.type(1)) << start
    return (b & ~mask) | (a << start & mask)
