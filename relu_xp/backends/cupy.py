"""CuPy arrays: one ElementwiseKernel a rule, the numbers passed as arguments.

CuPy compiles every kernel with ``-ftz=true``, and nothing can undo it: a float comparison takes a
subnormal for zero, ``x > 0 ? x : 0`` becomes a ``max.ftz`` that swallows NaN, and a product
flushes. Therefore

- a float is compared by its bits, as an integer that orders as the numbers do (`order` below, the
  same mapping as `relu_xp.activation.Rounded.order`), NaN outermost;
- a float32 product is one ``mul.rn.f32`` of inline PTX, which ``-ftz`` leaves alone; a bfloat16
  product goes through it and is rounded on its bits; float16 goes through float32 without
  meeting a subnormal of it, and float64 is never flushed.

All loads of an element are issued together: one that waits for a comparison would add its latency
to the other's. Reading each operand into a local first is not enough, since NVRTC moves a load into
the only branch that needs it; so both candidates are computed and one is selected (`choose`).

Kernels run on the array's device and on the caller's current stream, and nothing here waits for
them. The masks are those of `relu_xp.mask`; the thread that makes a byte has its eight elements.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from relu_xp.activation import Rounded
from relu_xp.backends import check_memory
from relu_xp.mask import Mask, shaped

__all__ = [
    "KERNELS",
    "backward",
    "backward_from_input",
    "check_out",
    "dtype_name",
    "fits",
    "forward",
    "forward_saving",
    "ones_like",
    "place",
    "saved_nbytes",
]

_PREAMBLE = r"""
namespace relu_xp {

template <int bytes> struct word;
template <> struct word<2> { typedef unsigned short type; typedef short signed_type; };
template <> struct word<4> { typedef unsigned int type; typedef int signed_type; };
template <> struct word<8> { typedef unsigned long long type; typedef long long signed_type; };

template <class T> __device__ typename word<sizeof(T)>::type bits_of(T value) {
  typename word<sizeof(T)>::type bits;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T> __device__ T from_bits(typename word<sizeof(T)>::type bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// The integer that orders as the number does; modulo 2**width, so that ranges may wrap around.
template <class T> __device__ typename word<sizeof(T)>::type order(T value) {
  typedef typename word<sizeof(T)>::type U;
  typedef typename word<sizeof(T)>::signed_type S;
  const U bits = bits_of(value);
  const U all = static_cast<U>(static_cast<S>(bits) >> (8 * sizeof(T) - 1));
  return static_cast<U>(bits ^ static_cast<U>(all >> 1 & all));
}

// !(value <= t), NaN included: -inf ... t is the range of `span` from -inf, and NaN lies outside.
template <class T> __device__ bool above(T value, unsigned long long infinity,
                                         unsigned long long span) {
  typedef typename word<sizeof(T)>::type U;
  return static_cast<U>(order(value) + static_cast<U>(infinity) + U(1)) > static_cast<U>(span);
}

// value >= c, NaN excluded: likewise the range from c to +inf.
template <class T> __device__ bool reaches(T value, unsigned long long infinity,
                                           unsigned long long span) {
  typedef typename word<sizeof(T)>::type U;
  return static_cast<U>(static_cast<U>(infinity) - order(value)) <= static_cast<U>(span);
}

// slope * x, rounded once. The product of two 16-bit floats is exact in float32.
__device__ inline float product32(float slope, float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(slope), "f"(x));
  return result;
#else
  return slope * x;
#endif
}

template <class T> __device__ T product(T slope, T x) {
  using cupy::type_traits::is_same;
  if constexpr (is_same<T, double>::value) {
    return slope * x;
  } else if constexpr (is_same<T, float>::value) {
    return product32(slope, x);
  } else if constexpr (is_same<T, bfloat16>::value) {
    const unsigned int left = bits_of(slope), right = bits_of(x);
    const unsigned int exact =
        bits_of(product32(from_bits<float>(left << 16), from_bits<float>(right << 16)));
    const bool nan = (exact & 0x7fffffffu) > 0x7f800000u;
    const unsigned int nearest = exact + 0x7fffu + (exact >> 16 & 1u);
    return from_bits<T>(static_cast<unsigned short>(nan ? exact >> 16 | 0x40u : nearest >> 16));
  } else {
    return T(product32(float(slope), float(x)));
  }
}

template <class T> __device__ T lower(T a, T x) {
  return bits_of(a) == 0 ? a : product(a, x);  // a = 0: exactly +0
}

template <class T> __device__ T upper(T b, T x) {
  return bits_of(b) == bits_of(T(1.0f)) ? x : product(b, x);  // b = 1: x itself
}

// 0 at or below the knee, 1 above it, 2 at the ceiling.
template <class T> __device__ int piece(T x, unsigned long long infinity, unsigned long long span,
                                        T b, bool capped, unsigned long long ceiling_span) {
  const bool ceiling = capped & reaches(upper(b, x), infinity, ceiling_span);
  return above(x, infinity, span) ? ceiling ? 2 : 1 : 0;
}

// Both candidates first, then a select: a load that only one branch needs would sink into it.
template <class T> __device__ T choose(int piece, T value, T a, T b, T ceiling) {
  const T high = upper(b, value), low = lower(a, value);
  const T rest = piece == 2 ? ceiling : low;
  return piece == 1 ? high : rest;
}

}  // namespace relu_xp
"""

_PIECE = "relu_xp::piece(value, infinity, span, {b}, capped, ceiling_span)"
_CHOOSE = "uint64 infinity, uint64 span, bool capped, uint64 ceiling_span"


def _kernel(name: str, in_params: str, out_params: str, operation: str) -> cupy.ElementwiseKernel:
    return cupy.ElementwiseKernel(
        in_params, out_params, operation, f"relu_xp_{name}", preamble=_PREAMBLE
    )


KERNELS = {
    "forward": _kernel(
        "forward",
        f"T x, {_CHOOSE}, T a, T b, T c",
        "T y",
        f"""
        const T value = x;
        y = relu_xp::choose({_PIECE.format(b="b")}, value, a, b, c);
        """,
    ),
    "forward_bits": _kernel(  # a thread a byte of the mask: eight elements
        "forward_bits",
        f"raw T x, {_CHOOSE}, T a, T b, T c",
        "raw T y, raw uint8 mask",
        f"""
        const ptrdiff_t first = 8 * i;
        const ptrdiff_t rest = x.size() - first;
        const int count = rest < 8 ? static_cast<int>(rest) : 8;
        unsigned int byte = 0;
        for (int k = 0; k < count; ++k) {{
            const T value = x[first + k];
            const int piece = {_PIECE.format(b="b")};
            y[first + k] = relu_xp::choose(piece, value, a, b, c);
            byte |= static_cast<unsigned int>(piece == 1) << k;
        }}
        mask[i] = static_cast<unsigned char>(byte);
        """,
    ),
    "forward_bytes": _kernel(
        "forward_bytes",
        f"T x, {_CHOOSE}, T a, T b, T c",
        "T y, uint8 mask",
        f"""
        const T value = x;
        const int piece = {_PIECE.format(b="b")};
        y = relu_xp::choose(piece, value, a, b, c);
        mask = static_cast<unsigned char>(piece);
        """,
    ),
    "backward_bits": _kernel(
        "backward_bits",
        "T dy, raw uint8 mask, T a, T b",
        "T dx",
        """
        const T value = dy;
        const int byte = mask[i >> 3];
        dx = relu_xp::choose(byte >> (i & 7) & 1, value, a, b, T(0.0f));
        """,
    ),
    "backward_bytes": _kernel(
        "backward_bytes",
        "T dy, uint8 mask, T a, T b",
        "T dx",
        """
        const T value = dy;
        const int piece = mask;
        dx = relu_xp::choose(piece, value, a, b, T(0.0f));
        """,
    ),
    "backward_from_input": _kernel(
        "backward_from_input",
        f"T dy, X x, {_CHOOSE}, X factor, T a, T b",
        "T dx",
        f"""
        const T gradient = dy;
        const X value = x;
        dx = relu_xp::choose({_PIECE.format(b="factor")}, gradient, a, b, T(0.0f));
        """,
    ),
    "forward_integer": _kernel(
        "forward_integer",
        "T x, T t, T a, T b, T c",
        "T y",
        """
        const T value = x;
        typedef unsigned long long U;  // in which products wrap around, as NumPy's do
        const T high = static_cast<T>(static_cast<U>(b) * static_cast<U>(value));
        const T low = static_cast<T>(static_cast<U>(a) * static_cast<U>(value));
        y = value > t ? high < c ? high : c : low;
        """,
    ),
}


@functools.lru_cache(maxsize=1024)
def _choose(numbers: Rounded) -> tuple[int, int, bool, int]:
    """Return the arguments by which a kernel chooses the piece."""
    infinity, capped = numbers.infinity_bits, numbers.max_value is not None
    minus_infinity = infinity | 1 << (numbers.width - 1)
    span = numbers.order(numbers.threshold_bits) - numbers.order(minus_infinity)
    ceiling_span = numbers.order(infinity) - numbers.order(numbers.ceiling_bits) if capped else 0
    return infinity, span, capped, ceiling_span


def forward(numbers: Rounded, x: cupy.ndarray, out: cupy.ndarray | None) -> cupy.ndarray:
    """Return f(x). See `relu_xp.backends.Backend`."""
    a, b, c = numbers.negative_slope, numbers.positive_slope, numbers.max_value
    with _on_device_of(x):
        y = cupy.empty_like(x) if out is None else out
        if numbers.floating:
            KERNELS["forward"](x, *_choose(numbers), a, b, c or 0.0, y)
        else:
            c = np.iinfo(x.dtype).max if c is None else c
            KERNELS["forward_integer"](x, numbers.threshold, a, b, c, y)
    return y


def forward_saving(
    numbers: Rounded, x: cupy.ndarray, out: cupy.ndarray | None
) -> tuple[cupy.ndarray, Mask]:
    """Return f(x) and the packed mask. See `relu_xp.backends.Backend`."""
    slopes = numbers.negative_slope, numbers.positive_slope, numbers.max_value or 0.0
    fortran = x.flags.f_contiguous and not x.flags.c_contiguous
    with _on_device_of(x):
        y = cupy.empty_like(x) if out is None else out
        if numbers.pieces == 2:
            data = cupy.empty((x.size + 7) // 8, np.uint8)
            views = [_flat(array.T if fortran else array) for array in (x, y)]
            KERNELS["forward_bits"](
                views[0], *_choose(numbers), *slopes, views[1], data, size=data.size
            )
        else:
            data = cupy.empty(x.size, np.uint8)
            mask = Mask(data, x.shape, fortran, 3)
            KERNELS["forward_bytes"](x, *_choose(numbers), *slopes, y, shaped(data, mask))
    return y, Mask(data, x.shape, fortran, numbers.pieces)


def backward(
    numbers: Rounded, dy: cupy.ndarray, saved: Mask, out: cupy.ndarray | None
) -> cupy.ndarray:
    """Return f'(x) * dy from the mask. See `relu_xp.backends.Backend`."""
    slopes = numbers.negative_slope, numbers.positive_slope
    with _on_device_of(dy):
        dx = cupy.empty_like(dy) if out is None else out
        if saved.pieces == 3:
            KERNELS["backward_bytes"](dy, shaped(saved.data, saved), *slopes, dx)
        elif saved.fortran:
            KERNELS["backward_bits"](dy.T, saved.data, *slopes, dx.T)
        else:
            KERNELS["backward_bits"](dy, saved.data, *slopes, dx)
    return dx


def backward_from_input(
    numbers: Rounded,
    slopes: Rounded,
    dy: cupy.ndarray,
    x: cupy.ndarray,
    out: cupy.ndarray | None,
) -> cupy.ndarray:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    with _on_device_of(x):
        dx = cupy.empty_like(x, dy.dtype) if out is None else out
        KERNELS["backward_from_input"](
            dy,
            x,
            *_choose(numbers),
            numbers.positive_slope,
            slopes.negative_slope,
            slopes.positive_slope,
            dx,
        )
    return dx


def ones_like(x: cupy.ndarray) -> cupy.ndarray:
    """Return ones of x's shape, dtype and device, all of them one element."""
    with _on_device_of(x):
        return cupy.broadcast_to(cupy.ones((), x.dtype), x.shape)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the dtype's name."""
    return dtype.name


def place(x: cupy.ndarray) -> tuple[str, int]:
    """Return the library and the device's number."""
    return "cupy", x.data.device_id


def fits(out: Any, like: Any, other: Any) -> bool:
    """Return False: beside what a call costs here, `check_out` costs nothing."""
    return False


def check_out(out: cupy.ndarray, inputs: Sequence[cupy.ndarray]) -> None:
    """Refuse an `out` that overlaps itself, or that overlaps an input without being it."""
    check_memory(out, inputs, cupy.may_share_memory, lambda array: array.data.ptr)


def saved_nbytes(saved: Mask) -> int:
    """Return the bytes of the mask."""
    return saved.nbytes


def _flat(x: cupy.ndarray) -> cupy.ndarray:
    """Return a contiguous array as 1-D, so that kernels do not compile per number of dimensions."""
    return x.reshape(-1) if x.flags.c_contiguous else x


def _on_device_of(x: cupy.ndarray) -> contextlib.AbstractContextManager[Any]:
    device = x.data.device_id
    if cupy.cuda.runtime.getDevice() == device:
        return contextlib.nullcontext()
    return cupy.cuda.Device(device)  # type: ignore[no-any-return]
