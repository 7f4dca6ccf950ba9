"""Tables for the tests of inputs: every public call by its array arguments, valid and invalid."""

from __future__ import annotations

import mmap
import tempfile

import numpy as np
from numpy.lib.stride_tricks import as_strided

import relu_xp
from relu_xp.testing import reference

X = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
WEIGHT = np.linspace(-1, 1, 6, dtype=np.float32)


class UnexpectedError(Exception):
    """Raised by objects in these tests; nothing in the package may depend on it."""


def bits(x):
    """Return the bits of an array in C order, every NaN the same one."""
    form = reference.Format(x.dtype.name)
    patterns = np.ascontiguousarray(x).view(form.unsigned)
    nan = (patterns & (form.sign - 1)) > form.infinity
    return np.where(nan, form.sign - 1, patterns).reshape(x.shape)


# ---- Public calls --------------------------------------------------------------------------------


def halves(shape):
    """Return what an rng may return: 0.5 everywhere."""
    return np.full(shape, 0.5, np.float32)


def after(layer):
    """Return a layer after its forward pass."""
    layer.forward(X.copy())
    return layer


def pullback(name, *arguments, x=X, **options):
    """Return what a ``*_vjp`` function returns for the gradient."""
    return getattr(relu_xp, f"{name}_vjp")(x.copy(), *arguments, **options)[1]


# The parameters of these functions are the array arguments that error messages name.
CALLS = {
    "relu": lambda x, out: relu_xp.relu(x, out=out),
    "relu, general": lambda x, out: relu_xp.relu(x, negative_slope=0.5, max_value=2, out=out),
    "relu6": lambda x, out: relu_xp.relu6(x, out=out),
    "clipped_relu": lambda x, out: relu_xp.clipped_relu(x, 1.5, out=out),
    "relu_grad": lambda x, out: relu_xp.relu_grad(x, out=out),
    "relu_backward": lambda dy, x, out: relu_xp.relu_backward(dy, x, out=out),
    "relu_vjp": lambda x, out, mask: relu_xp.relu_vjp(x, out=out, mask=mask)[0],
    "pullback": lambda dy, out: pullback("relu")(dy, out=out),
    "prelu": lambda x, weight, out: relu_xp.prelu(x, weight, axis=-1, out=out),
    "prelu_vjp": lambda x, weight, out: relu_xp.prelu_vjp(x, weight, axis=-1, out=out)[0],
    "prelu pullback": lambda dy, out: pullback("prelu", WEIGHT, axis=-1)(dy, out=out)[0],
    "bias_relu": lambda x, bias, out: relu_xp.bias_relu(x, bias, out=out),
    "bias_relu_vjp": lambda x, bias, out, mask: relu_xp.bias_relu_vjp(x, bias, out=out, mask=mask)[
        0
    ],
    "bias_relu pullback": lambda dy, out: pullback("bias_relu", WEIGHT)(dy, out=out)[0],
    "rrelu": lambda x, out: relu_xp.rrelu(x, rng=halves, out=out),
    "rrelu, mean": lambda x, out: relu_xp.rrelu(x, out=out),
    "rrelu_vjp": lambda x, out: relu_xp.rrelu_vjp(x, rng=halves, out=out)[0],
    "rrelu pullback": lambda dy, out: pullback("rrelu", rng=halves)(dy, out=out),
    "crelu": lambda x: relu_xp.crelu(x, axis=-1),
    "crelu_vjp": lambda x: relu_xp.crelu_vjp(x, axis=-1)[0],
    "crelu pullback": lambda dy, out: pullback("crelu", x=X[:, :3])(dy, out=out),
    "squared_relu": lambda x, out: relu_xp.squared_relu(x, out=out),
    "squared_relu_vjp": lambda x, out: relu_xp.squared_relu_vjp(x, out=out)[0],
    "squared_relu pullback": lambda dy, out: pullback("squared_relu")(dy, out=out),
    "ReLU": lambda x, out, mask: relu_xp.ReLU().forward(x, out=out, mask=mask),
    "ReLU, evaluation": lambda x, out: relu_xp.ReLU().forward(x, training=False, out=out),
    "ReLU backward": lambda dy, out: after(relu_xp.ReLU()).backward(dy, out=out),
    "BiasReLU": lambda x, out, mask: relu_xp.BiasReLU(6).forward(x, out=out, mask=mask),
    "BiasReLU backward": lambda dy, out: after(relu_xp.BiasReLU(6)).backward(dy, out=out),
    "PReLU": lambda x, out: relu_xp.PReLU()(x, out=out),
    "PReLU backward": lambda dy, out: after(relu_xp.PReLU()).backward(dy, out=out),
    "RReLU": lambda x, out: relu_xp.RReLU(rng=halves)(x, out=out),
    "CReLU": lambda x: relu_xp.CReLU(axis=-1)(x),
    "SquaredReLU": lambda x, out: relu_xp.SquaredReLU()(x, out=out),
}


def roles(name):
    """Return the names of the arrays that a call takes."""
    code = CALLS[name].__code__
    return code.co_varnames[: code.co_argcount]


def is_backward(name):
    return "pullback" in name or "backward" in name


PAIRS = [(name, role) for name in CALLS for role in roles(name)]


def operand(name, role, shape=X.shape):
    """Return a valid argument."""
    if role == "mask":
        return np.zeros(-(-int(np.prod(shape)) // 8), np.uint8)
    if role in ("weight", "bias"):
        return np.linspace(-1, 1, shape[-1], dtype=np.float32)
    if (name, role) == ("crelu pullback", "out"):
        return np.zeros((4, 3), np.float32)
    start = 1 if role == "dy" else -2
    return np.linspace(start, 2.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def operands(name, shape=X.shape):
    return {role: operand(name, role, shape) for role in roles(name)}


def contents(given):
    """Return the bytes of the NumPy arrays among arguments, to compare before and after."""
    return {r: a.tobytes() if type(a) is np.ndarray else None for r, a in given.items()}


# ---- Invalid arrays ------------------------------------------------------------------------------


def raising(error):
    """Return a method that raises an error."""

    def method(*arguments, **options):
        raise error

    return method


def subclass(base=np.ndarray, **attributes):
    return lambda host: host.copy().view(type("Subclass", (base,), attributes))


def pretender(**attributes):
    """Return a maker of objects that have a shape, a dtype and other attributes of an array."""
    return lambda a: type("Pretender", (), {"shape": a.shape, "dtype": a.dtype, **attributes})()


class Wrapper:
    """A NumPy array inside an object with its attributes and a namespace."""

    namespace = np

    def __init__(self, host):
        self.host = host.copy()

    def __getattr__(self, name):
        if name == "host":
            raise AttributeError
        return getattr(self.host, name)

    def __array_namespace__(self, api_version=None):
        if isinstance(self.namespace, BaseException):
            raise self.namespace
        return self.namespace


def wrapper(namespace):
    return type("Wrapper", (Wrapper,), {"namespace": namespace})


class Bytes(bytes):
    """Bytes with an array's attributes, whose memory looks like the fields of a NumPy array."""

    dtype, shape, size, ndim, nbytes, flags = X.dtype, X.shape, X.size, 2, X.nbytes, X.flags

    def __array_namespace__(self, api_version=None):
        return np


BYTES = Bytes(b"\0" * 32 + (0x503).to_bytes(4, "little") + b"\0" * 60)
INTERFACE = {"version": 3, "typestr": "<f4", "data": (16, False), "shape": (1 << 40,)}
raises = raising(UnexpectedError)

INVALID = {
    "subclass": subclass(),
    "subclass, no attributes": subclass(__getattribute__=raises),
    "subclass, false size": subclass(shape=(1 << 40,), size=1 << 40, nbytes=1 << 42),
    "subclass, no dtype": subclass(dtype=property(raising(UnicodeDecodeError("", b"", 0, 1, "")))),
    "subclass of memmap": lambda a: a.view(type("Subclass", (np.memmap,), {})),
    "masked array": lambda a: np.ma.masked_array(a.copy(), a > 0),
    "matrix": lambda a: a.copy().view(np.matrix),
    "structured": lambda a: np.zeros(a.shape, [("it", "f4")]),
    "void named float": lambda a: a.astype("f4").view((type("float", (np.void,), {}), 4)),
    "byte-swapped": lambda a: a.astype(np.dtype("f4").newbyteorder()),
    **{
        dtype: lambda a, dtype=dtype: a.astype(dtype)
        for dtype in ("O", "F", "?", "U4", "g", "m8[s]")
    },
    "strings": lambda a: a.astype("S4").astype(np.dtypes.StringDType()),
    "list": lambda a: a.tolist(),
    "number": lambda a: 1.0,
    "NumPy scalar": lambda a: np.str_("1"),
    "memoryview": lambda a: memoryview(a.copy()),
    "class": lambda a: np.ndarray,
    "wrapper": Wrapper,
    "bytes as an array": lambda a: BYTES,
    "namespace None": wrapper(None),
    "namespace raises": wrapper(UnexpectedError()),
    "namespace is absent": wrapper(AttributeError()),
    "namespace recurses": wrapper(RecursionError()),
    "namespace without name": wrapper(object()),
    "namespace is a class": wrapper(type("numpy", (), {"__getattr__": raises})()),
    "every attribute raises": pretender(__getattribute__=raises),
    "its class raises": pretender(__class__=property(raises)),
    "its class is another": pretender(__class__=np.ndarray, __array_priority__=1e9),
    "protocols raise": pretender(__dlpack__=raises, __dlpack_device__=raises, __array__=raises),
    "false interface": pretender(__array_interface__=INTERFACE, __array_struct__=object()),
    "no truth, no text": pretender(__bool__=raises, __eq__=raises, __repr__=raises),
}


# ---- Unusual valid arrays ------------------------------------------------------------------------


def field(a):
    """Return a field of a structured array: strided, and misaligned."""
    records = np.zeros(a.shape, [("head", "u1"), ("it", a.dtype), ("tail", "u2")])
    records["it"] = a
    return records["it"]


def far_apart(a):
    """Return rows more than 2**31 bytes apart, the last first, in a file with holes."""
    step = (1 << 31) + 4096
    with tempfile.TemporaryFile() as file:
        file.truncate(step * len(a))
        memory = mmap.mmap(file.fileno(), 0)
    view = np.ndarray(a.shape, a.dtype, memory, 0, (step, *a.strides[1:]))[::-1]
    view[...] = a
    return view


def mapped(a, mode="r+"):
    """Return an array in a file."""
    with tempfile.TemporaryFile() as file:
        a.tofile(file)
        return np.memmap(file, a.dtype, mode, shape=a.shape)


def unused_stride(a):
    """Return an array with a large stride along an axis of one element."""
    one = np.expand_dims(a.copy(), 1)
    return as_strided(one, one.shape, (one.strides[0], 2**62, *one.strides[2:]))


UNUSUAL = {
    "field": field,
    "misaligned": lambda a: np.frombuffer(bytearray(b"0" + a.tobytes()), "f4", -1, 1).reshape(
        a.shape
    ),
    "strided": lambda a: np.repeat(a[::-1], 2, 0)[::-2],
    "Fortran": np.asfortranarray,
    "far apart": far_apart,
    "unused stride": unused_stride,
    "mapped": mapped,
    "64 axes": lambda a: a.copy().reshape((1,) * (64 - a.ndim) + a.shape),
    "dtype with metadata": lambda a: a.astype(np.dtype("f4", metadata={"note": 1})),
}
NOT_WRITABLE = {
    "mapped to be read": lambda a: mapped(a, "r"),
    "of bytes": lambda a: np.frombuffer(a.tobytes(), np.float32).reshape(a.shape),
    "broadcast": lambda a: np.broadcast_to(a.ravel()[:1], a.shape),
    "windows": lambda a: as_strided(a, a.shape, (a.itemsize, 2 * a.itemsize)),
}
