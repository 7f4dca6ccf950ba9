"""CuPy's kernels: an ElementwiseKernel for each pass, with the parameters as its arguments.

What is computed for an element is written in ``relu_xp/kernels``, in ``rules.h`` and
``cuda_kernels.cuh``. A pass of ReLU has two kernels:

- *vectorized*, for operands that are dense in memory in one order of their axes and aligned to 16
  bytes: its arguments are ``raw``, and a thread moves 16 bytes at a time;
- *strided*, for every other layout: an element per thread, at CuPy's own indices.

A pass that also sums its results for each channel has two kernels for dense arrays: *vectorized*,
and one without vectors.

A parameter that has its default (0, 0, 1, none) is no argument, and its rule is not compiled: plain
ReLU takes arrays only, which has the least call overhead. Another value of a slope compiles
nothing.
"""

from __future__ import annotations

import functools
import itertools
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy

from relu_xp.mask import Axes
from relu_xp.parameters import CastParameters

if TYPE_CHECKING:
    from relu_xp.backends.cupy_sums import ChannelSums

__all__ = [
    "FORWARD_INTEGER",
    "PASSES",
    "VARIANTS",
    "Launcher",
    "bias_spread",
    "kernel",
    "launcher",
    "variant",
]

_ALIGNMENT = 16  # bytes, of every operand of a vectorized kernel
_WARP = 32  # threads
_CHUNKS = 2  # of 16 bytes that a thread of a vectorized kernel moves


def _source() -> str:
    """Return what the kernels are compiled from: NVRTC takes one text, and no file beside it."""
    folder = resources.files("relu_xp.kernels")
    kernels, rules = (
        folder.joinpath(name).read_text("utf-8") for name in ("cuda_kernels.cuh", "rules.h")
    )
    return kernels.replace('#include "rules.h"\n', rules)


_PREAMBLE = _source()


class _Pass(NamedTuple):
    """A pass of ``cuda_kernels.cuh``: its C++ type and its operands."""

    type: str  # with a {} for each activation
    activations: tuple[str, ...]  # a dtype, and the letters of t, a, b, c; - where it is not used
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sums: bool = False  # whether its results are summed for each channel too


_X, _Y, _DY, _DX, _MASK = "T x", "T y", "T dy", "T dx", "uint8 mask"

PASSES = {
    "forward": _Pass("Forward<NoMask, {}>", ("Ttabc",), (_X,), (_Y,)),
    "forward_bits": _Pass("Forward<Bits, {}>", ("Ttabc",), (_X,), (_Y, _MASK)),
    "forward_bytes": _Pass("Forward<Bytes, {}>", ("Ttabc",), (_X,), (_Y, _MASK)),
    "gradient": _Pass("Gradient<{}>", ("Ttabc",), (_X,), ("T g",)),
    "backward_bits": _Pass("Backward<Bits, {}>", ("T-ab-",), (_DY, _MASK), (_DX,)),
    "backward_bytes": _Pass("Backward<Bytes, {}>", ("T-ab-",), (_DY, _MASK), (_DX,)),
    # t, f and c choose the branch: they are cast to the dtype of x, and f is b in that dtype.
    "backward_from_input": _Pass(
        "BackwardFromInput<{}, {}>", ("T-ab-", "Xt-fc"), (_DY, "X x"), (_DX,)
    ),
}
# How the bias goes along x (Biased, in cuda_kernels.cuh): "row" where it is the last axis in memory
# and vectors begin at multiples of their length; "runs" where a vector has two channels at most.
_BIAS = ("T bias", "uint64 channels", "uint64 inner")
for _name, _spread in itertools.product(
    ("forward", "forward_bits", "forward_bytes"), ("Row", "Runs", "Any")
):
    _pass = PASSES[_name]
    PASSES[f"bias_{_name}_{_spread.lower()}"] = _pass._replace(
        type=f"{_pass.type[:-1]}, Biased<T, k{_spread}>>", inputs=(*_BIAS, _X)
    )
for _name in ("backward_bits", "backward_bytes"):
    PASSES[f"bias_{_name}"] = PASSES[_name]._replace(sums=True)

_STRIDES = ("outer_stride", "channel_stride", "inner_stride")
_SUMS = ("outer", "channels", "inner", "rows", "columns", *_STRIDES)


@functools.cache
def kernel(name: str, given: str, vectorized: bool) -> cupy.ElementwiseKernel:
    """Return the kernel of a pass that takes some of the parameters.

    Parameters
    ----------
    name : str
        Of the pass, in `PASSES`.
    given : str
        The letters of the parameters that are arguments; the others have their defaults.
    vectorized : bool
        Whether a thread moves 16 bytes at a time, or one element.
    """
    pass_type, activations, inputs, outputs, sums = PASSES[name]
    scalars, types, fields = [], [], []
    for form in activations:
        dtype, letters = form[0], form[1:]
        scalars += [f"{dtype} {letter}" for letter in letters if letter in given]
        has = ", ".join(str(letter in given).lower() for letter in letters)
        types.append(f"Activation<{dtype}, {has}>")
        values = ", ".join(letter if letter in given else f"{dtype}()" for letter in letters)
        fields.append(f"{{{values}}}")

    def argument(declared: str) -> tuple[str, str]:
        """Return how an argument is declared, and what it is in C++."""
        dtype, array = declared.split()
        if dtype == "uint64":
            return declared, array
        if vectorized or sums or array in ("bias", "mask"):
            return f"raw {declared}", f"&{array}[0]"
        return declared, f"&{array}"

    arrays = [argument(declared) for declared in inputs + outputs]
    fields += [expression for _, expression in arrays]
    declared = [declaration for declaration, _ in arrays] + ["raw float64 sums"] * sums
    run = "strided(pass, i, _ind.size())"
    if sums:
        scalars += [f"uint64 {number}" for number in _SUMS]
        count = "decltype(pass)::kVector" if vectorized else "1"
        run = f"backward_and_sum<{count}>(pass, {{{', '.join(_SUMS)}, &sums[0]}}, i)"
    elif vectorized:
        run = f"vectorized<{_CHUNKS}>(pass, i, _ind.size(), {outputs[0].split()[1]}.size())"
    return cupy.ElementwiseKernel(
        ", ".join(scalars + declared[: len(inputs)]),
        ", ".join(declared[len(inputs) :]),
        f"using namespace relu_xp; "
        f"const {pass_type.format(*types)} pass = {{{', '.join(fields)}}}; {run};",
        "_".join(filter(None, ("relu_xp", name, given, "vectorized" if vectorized else "strided"))),
        preamble=_PREAMBLE,
    )


FORWARD_INTEGER = cupy.ElementwiseKernel(
    "T x, T t, T a, T b, T c",
    "T y",
    """
    const T value = x;
    typedef unsigned long long U;  // in which products wrap around, as NumPy's do
    const T high = static_cast<T>(static_cast<U>(b) * static_cast<U>(value));
    const T low = static_cast<T>(static_cast<U>(a) * static_cast<U>(value));
    y = value > t ? high < c ? high : c : low;
    """,
    "relu_xp_forward_integer",
)


def _sum_of(inputs: str, term: str) -> tuple[str, str, str]:
    """Return a kernel for the sums of `cupy_sums`, of arrays of any layout, in C order."""
    return (
        f"{inputs}, uint64 outer, uint64 channels, uint64 inner, uint64 rows, uint64 columns",
        "raw float64 sums",
        f"""
        const Index column = i % columns, channel = i / columns % channels;
        const Index first = i / columns / channels;
        double all = 0;
        for (Index row = first; row < outer; row += rows) {{
          const Index start = (row * channels + channel) * inner;
          for (Index k = start + column; k < start + inner; k += columns) {{ {term}; }}
        }}
        sums[(channel * rows + first) * columns + column] = all
        """,
    )


# Passes of the other activations, an element per thread: inputs, outputs, operation.
VARIANTS = {
    "prelu": ("T v, X x, W a", "T y", "y = prelu(above_zero(x), v, round_to<T>(a))"),
    "prelu_forward": ("T x, W a", "T y", "y = prelu(above_zero(x), x, round_to<T>(a))"),
    "scale": (
        "T v, W a",
        "T y",
        "const T s = round_to<T>(a); y = prelu(word_of(s) == Float<T>::one, v, s)",
    ),
    "slopes": ("X x, W a", "W y", "y = prelu(above_zero(x), number_of<W>(Float<W>::one), a)"),
    "squared_relu": ("T x", "T y", "y = squared_relu(x)"),
    "squared_relu_backward": ("T dy, X x", "T dx", "dx = squared_relu_backward(dy, x)"),
    "crelu": (
        "T x",
        "T y, T z",
        """
        const Word<T> word = word_of(x);
        y = number_of<T>(relu<Float<T>>(word));
        z = number_of<T>(relu<Float<T>>(Float<T>::negate(word)))
        """,
    ),
    "crelu_mask": ("X x", "uint8 p", "p = crelu_branch<Float<X>>(word_of(x))"),
    "crelu_backward": ("T dy, T dz, uint8 p", "T dx", "dx = crelu_backward(p, dy, dz)"),
    "sums": _sum_of(
        "raw T dy, raw X x",
        "const T gradient = dy[k]; const X input = x[k]; all += prelu_weight_term(gradient, input)",
    ),
    "channel_sums": _sum_of("raw T dx", "const T term = dx[k]; all += to_double(term)"),
    "add_up": (
        "raw float64 sums, uint64 count, uint64 groups, uint64 lanes",
        "raw W totals",
        "add_up(&sums[0], &totals[0], i, _ind.size(), count, groups, lanes)",
    ),
    "round_to": ("X x", "W y", "y = round_to<W>(x)"),
    "copy": ("T x", "T y", "y = x"),
}


@functools.cache
def variant(name: str) -> cupy.ElementwiseKernel:
    """Return the kernel of one of `VARIANTS`."""
    inputs, outputs, operation = VARIANTS[name]
    return cupy.ElementwiseKernel(
        inputs,
        outputs,
        f"using namespace relu_xp; {operation};",
        f"relu_xp_{name}",
        preamble=_PREAMBLE,
    )


class Launcher:
    """A pass with its parameters, and the two kernels that take them.

    Parameters
    ----------
    name : str
        Of the pass, in `PASSES`.
    params, grad_params : CastParameters
        The parameters in the dtypes of x and of dy: the same object where there is one dtype.
    spread : str, optional
        How the bias goes along x: the end of the name of a pass.
    """

    __slots__ = ("_count", "_scalars", "_strided", "_tile", "_vectorized")

    def __init__(
        self, name: str, params: CastParameters, grad_params: CastParameters, spread: str = ""
    ) -> None:
        values = {
            "t": params.threshold,
            "a": grad_params.negative_slope,
            "b": grad_params.positive_slope,
            "f": 1.0 if params.max_value is None else params.positive_slope,
            "c": params.max_value,
        }
        defaults = {"t": 0.0, "a": 0.0, "b": 1.0, "f": 1.0, "c": None}
        forms = PASSES[name + spread].activations
        letters = "".join(form[1:] for form in forms).replace("-", "")
        given = "".join(letter for letter in letters if values[letter] != defaults[letter])
        self._scalars = [values[letter] for letter in given]
        self._vectorized = kernel(name + spread, given, True)
        self._strided = kernel(name + "_any" if spread else name, given, False)
        self._count = 8 * _ALIGNMENT // max(params.width, grad_params.width)
        self._tile = _WARP * _CHUNKS * self._count

    def run(self, axes: Axes | None, *arrays: cupy.ndarray, bias: tuple[Any, ...] = ()) -> None:
        """Run the kernel that the layout of inputs and outputs allows.

        Elements count in C order after the permutation of axes, from which a mask, having one axis,
        is exempt. `bias` are the arguments for it.
        """
        if axes is not None:
            arrays = _permuted(axes, arrays)
        for array in arrays:
            if array.data.ptr % _ALIGNMENT or not array.flags.c_contiguous or not array.ndim:
                self._strided(*self._scalars, *bias, *arrays)
                return
        # Flat views would spare a kernel per number of dimensions (0.15 s to compile), and cost a
        # fifth of each call.
        size, tile = arrays[0].size, self._tile
        threads = size - size // tile * (tile - _WARP)
        self._vectorized(*self._scalars, *bias, *arrays, size=threads)

    def run_and_sum(
        self, axes: Axes | None, to: ChannelSums, *arrays: cupy.ndarray
    ) -> cupy.ndarray | None:
        """Return the sums of a pass that also sums its results.

        Return None, and run nothing, if inputs and outputs are not dense in that order of axes.
        """
        if axes is not None:
            arrays = _permuted(axes, arrays)
        if to.strides is None or not all(array.flags.c_contiguous for array in arrays):
            return None
        sums = to.empty()
        size, run = sums.size, self._strided
        if to.has_vectors(self._count) and not any(a.data.ptr % _ALIGNMENT for a in arrays):
            size, run = size // self._count, self._vectorized
        run(*self._scalars, *to[:5], *to.strides, *arrays, sums, size=size)
        return sums


def bias_spread(params: CastParameters, bias: cupy.ndarray, inner: int) -> str:
    """Return how a bias goes along x, if the channel is the same for `inner` elements in a row."""
    count = 8 * _ALIGNMENT // params.width
    if inner == 1 and bias.size % count == 0 and bias.data.ptr % _ALIGNMENT == 0:
        return "_row"
    return "_runs" if inner >= count else "_any"


def _permuted(axes: Axes, arrays: tuple[cupy.ndarray, ...]) -> tuple[cupy.ndarray, ...]:
    return tuple([a if a.ndim == 1 else a.transpose(axes) for a in arrays])


launcher = functools.lru_cache(maxsize=1024)(Launcher)
