// The truth table in CUDA C++, and how threads share an array: the preamble of cupy.py's kernels.
//
// CuPy compiles with -ftz=true, and nothing can undo it: a comparison of floats takes a subnormal
// for zero, `x > 0 ? x : 0` becomes a max.ftz that swallows NaN, and a product flushes. Therefore
// numbers are compared by their bits, and a float32 product is one mul.rn.f32 of inline PTX.
//
// No load waits for a comparison: every pass loads all that a thread needs, then computes.

namespace relu_xp {

typedef unsigned long long Index;

constexpr int warp = 32;  // threads that run in step

template <int bytes> struct Unsigned;
template <> struct Unsigned<1> { typedef unsigned char type; };
template <> struct Unsigned<2> { typedef unsigned short type; };
template <> struct Unsigned<4> { typedef unsigned int type; };
template <> struct Unsigned<8> { typedef unsigned long long type; };

template <class To, class From> __device__ To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "two sizes");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// ---- A number in a register -------------------------------------------------------------------
//
// A number is the word that holds its bits. A 16-bit float is the upper half of a 32-bit word, and
// the lower half is whatever lies there (its neighbour, mostly): no rule below looks at it.

template <class T> struct Format {
  typedef typename Unsigned<sizeof(T)>::type Bits;
  typedef typename Unsigned<sizeof(T) == 8 ? 8 : 4>::type Word;
  static constexpr int width = 8 * sizeof(Word);
  static constexpr int shift = width - 8 * sizeof(T);
  static constexpr Word below = (Word(1) << shift) - 1;  // the half that is not the number's
  static constexpr Word sign = Word(1) << (width - 1);
  static constexpr bool half = cupy::type_traits::is_same<T, float16>::value;
  static constexpr int exponent = half ? 5 : sizeof(T) == 8 ? 11 : 8;  // bits
  static constexpr Word infinity = sign - (sign >> exponent);
  static constexpr Word one = (sign >> 1) - (sign >> exponent);
  static constexpr Word quiet = sign >> (exponent + 1);  // what makes a NaN a quiet one
};

template <class T> using Word = typename Format<T>::Word;

template <class T> __device__ Word<T> word_of(T value) {
  return Word<T>(bit_cast<typename Format<T>::Bits>(value)) << Format<T>::shift;
}

template <class T> __device__ T number_of(Word<T> word) {
  return bit_cast<T>(static_cast<typename Format<T>::Bits>(word >> Format<T>::shift));
}

// The integer that orders as the number does, NaN outermost; modulo 2**width, so that ranges may
// wrap around. The same mapping as relu_xp.activation.Rounded.order.
template <class T> __device__ Word<T> order(Word<T> word) {
  typedef typename cupy::type_traits::conditional<sizeof(T) == 8, long long, int>::type Signed;
  const Word<T> all = static_cast<Word<T>>(static_cast<Signed>(word) >> (Format<T>::width - 1));
  return word ^ (all & (Format<T>::sign - 1));
}

// Volatile: else the product moves into a branch of its own, one an element, and threads part.
__device__ inline float multiply(float slope, float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm volatile("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(slope), "f"(x));
  return result;
#else
  return slope * x;
#endif
}

__device__ inline double multiply(double slope, double x) {
#ifdef __CUDA_ARCH__
  double result;
  asm volatile("mul.rn.f64 %0, %1, %2;" : "=d"(result) : "d"(slope), "d"(x));
  return result;
#else
  return slope * x;
#endif
}

// slope * x, rounded once. The product of two 16-bit floats is exact in float32, and that of two
// float16 is no subnormal there. Of a NaN x, which a GPU would replace by a NaN of its own, is kept
// what NumPy keeps: sign and payload, of a bfloat16 the sign.
template <class T> __device__ Word<T> product(Word<T> slope, Word<T> x) {
  typedef Format<T> F;
  Word<T> result, nan = x | F::quiet;
  if constexpr (sizeof(T) == 8) {
    result = bit_cast<Word<T>>(multiply(bit_cast<double>(slope), bit_cast<double>(x)));
  } else if constexpr (sizeof(T) == 4) {
    result = bit_cast<Word<T>>(multiply(bit_cast<float>(slope), bit_cast<float>(x)));
  } else if constexpr (F::half) {
    result = word_of(T(multiply(float(number_of<T>(slope)), float(number_of<T>(x)))));
  } else {  // bfloat16 is the upper half of a float32
    const float exact = multiply(bit_cast<float>(slope), bit_cast<float>(x & ~F::below));
#if __CUDA_ARCH__ >= 800
    // An instruction instead of seven, with which a leaky pass would be bound by arithmetic.
    unsigned short rounded;
    asm volatile("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(exact));
    result = static_cast<unsigned int>(rounded) << 16;
#else
    result = bit_cast<unsigned int>(exact);  // to nearest, ties to even
    const bool number = (result & (F::sign - 1)) <= F::infinity;
    result += number ? (F::below >> 1) + (result >> 16 & 1u) : 0;
#endif
    nan = (x & F::sign) | F::infinity | F::quiet;
  }
  return (x & (F::sign - 1)) > (F::infinity | F::below) ? nan : result;
}

// ---- The rules --------------------------------------------------------------------------------

// One member of the family. Four flags say which of its numbers are given; one that is not has its
// default (t = 0, a = 0, b = 1, no c), and those slopes are never products.
template <class T, bool has_t, bool has_a, bool has_b, bool has_c> struct Family {
  typedef Format<T> F;
  Word<T> span, a, b, c;

  __device__ Family(T t, T a, T b, T c)
      : span((key(has_t ? word_of(t) : 0) - lowest) | F::below),
        a(word_of(a)), b(word_of(b)), c(word_of(c)) {}

  // !(x <= t), NaN included: -inf ... t is the range of `span` from `lowest`, NaN lies outside.
  __device__ bool above(Word<T> x) const { return order<T>(x) - lowest > span; }

  // y >= c, NaN excluded: likewise the range from c to +inf. -0.0 reaches a ceiling of 0.
  __device__ bool reaches(Word<T> y) const {
    const Word<T> first = key(c == 0 ? F::sign : c);
    return order<T>(y) - first <= ((F::infinity - first) | F::below);
  }

  // b * value or a * value.
  __device__ Word<T> scale(bool above, Word<T> value) const {
    Word<T> high = value, low = 0;
    if constexpr (has_a && has_b) {
      high = low = product<T>(above ? b : a, value);
    } else if constexpr (has_a) {
      low = product<T>(a, value);
    } else if constexpr (has_b) {
      high = product<T>(b, value);
    }
    return above ? high : low;
  }

  // 0 at or below the knee, 1 above it, 2 at the ceiling.
  __device__ int piece(Word<T> x) const {
    const bool high = above(x), top = has_c && reaches(scale(true, x));
    return high ? top ? 2 : 1 : 0;
  }

  __device__ Word<T> forward(Word<T> x, int& piece) const {
    const bool high = above(x);
    const Word<T> y = scale(high, x);
    const bool top = has_c && high && reaches(y);
    piece = top ? 2 : high;
    return top ? c : y;
  }

  // `dy` is a gradient, and this family's slopes are those for it.
  __device__ Word<T> backward(int piece, Word<T> dy) const {
    const Word<T> dx = scale(piece == 1, dy);
    return piece == 2 ? 0 : dx;
  }

 private:
  static constexpr Word<T> lowest = F::sign - 1 - F::infinity + F::sign - F::below;  // of -inf
  __device__ static Word<T> key(Word<T> word) { return order<T>(word) & ~F::below; }
};

template <class T, bool has_t, bool has_a, bool has_b, bool has_c>
__device__ Family<T, has_t, has_a, has_b, has_c> family(T t, T a, T b, T c) {
  return {t, a, b, c};
}

// ---- Beyond four numbers ----------------------------------------------------------------------
//
// One element of the members that four numbers do not describe: relu_xp.variants.

// Conversions that -ftz leaves alone, rounded once.
__device__ inline double widened(double x) { return x; }
__device__ inline double widened(float x) {
#ifdef __CUDA_ARCH__
  double result;
  asm volatile("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(x));
  return result;
#else
  return x;
#endif
}
template <class T> __device__ double widened(T x) { return widened(float(x)); }

template <class T> __device__ T nearest(double x) {
  if constexpr (sizeof(T) == 8) return x;
  float result;
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) {
    asm volatile("cvt.rn.f32.f64 %0, %1;" : "=f"(result) : "d"(x));
    return result;
  }
  asm volatile("cvt.rz.f32.f64 %0, %1;" : "=f"(result) : "d"(x));
#else
  result = static_cast<float>(x);
  if constexpr (sizeof(T) == 4) return result;
  if (fabs(widened(result)) > fabs(x)) result = nextafterf(result, 0.0f);
#endif
  // Towards zero, and then to an odd number: so the next rounding is as if it were the only one.
  const unsigned int inexact = widened(result) != x;
  return T(bit_cast<float>(bit_cast<unsigned int>(result) | inexact));
}

template <class T, class W> __device__ T rounded(W x) {
  if constexpr (cupy::type_traits::is_same<T, W>::value) return x;
  return nearest<T>(widened(x));
}

template <class X> __device__ bool above_zero(X x) {
  return family<X, false, false, false, false>(X(), X(), X(), X()).above(word_of(x));
}

template <class T> __device__ bool is_one(T x) {
  return word_of(x) == Format<T>::one;
}

template <class X> __device__ X opposite(X x) {
  return number_of<X>(word_of(x) ^ Format<X>::sign);
}

// The value itself, or slope * value, of which a slope of 0 makes +0.
template <class T> __device__ T sloped(T value, bool above, T slope) {
  const Word<T> factor = word_of(slope), result = product<T>(factor, word_of(value));
  return number_of<T>(above ? word_of(value) : factor << 1 ? result : 0);
}

template <class X, class W> __device__ W factor(X x, W slope) {
  const Word<W> all = above_zero(x) ? 0 : ~Word<W>(0);  // no branch, in which the slope would load
  return number_of<W>((word_of(slope) & all) | (Format<W>::one & ~all));
}

template <class T> __device__ T squared(T x) {
  const Word<T> result = product<T>(word_of(x), word_of(x));
  return number_of<T>(above_zero(x) ? result : 0);
}

template <class T, class X> __device__ T backward_squared(T dy, X x) {
  T result;
  if constexpr (sizeof(T) == 8 || sizeof(X) == 8) {
    result = nearest<T>(multiply(multiply(2.0, widened(x)), widened(dy)));
  } else {
    result = T(multiply(multiply(2.0f, float(x)), float(dy)));
  }
  return number_of<T>(above_zero(x) ? word_of(result) : 0);
}

template <class T> __device__ T rectified(T x) {
  return number_of<T>(above_zero(x) ? word_of(x) : 0);
}

template <class X> __device__ int pieces_of_both(X x) {
  return above_zero(x) + 2 * above_zero(opposite(x));
}

template <class T> __device__ T backward_both(T first, T second, int pieces) {
  const T difference = nearest<T>(widened(first) - widened(second));
  const Word<T> one = pieces & 1 ? word_of(first) : word_of(opposite(second));
  return number_of<T>(pieces == 0 ? 0 : pieces == 3 ? word_of(difference) : one);
}

// x * dy where x is at or below 0, else 0; exact, of all but float64.
template <class T, class X> __device__ double below_zero(T dy, X x) {
  const double result = multiply(widened(x), widened(dy));
  return above_zero(x) ? 0.0 : result;
}

// ---- Elements in memory -----------------------------------------------------------------------

// `count` neighbours, moved as one access of count * sizeof(T) bytes.
template <class T, int count> struct Elements {
  static constexpr int words = count * sizeof(T) / sizeof(Word<T>);
  struct alignas(count * sizeof(T)) Memory { Word<T> word[words]; } all;

  __device__ void load(const T* from) { all = *reinterpret_cast<const Memory*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<Memory*>(to) = all; }

  __device__ Word<T> get(int k) const {
    if constexpr (words == count) return all.word[k];
    return k % 2 ? all.word[k / 2] : all.word[k / 2] << 16;
  }

  __device__ void set(int k, Word<T> word) {  // in turn: the second half-word keeps the first
    if constexpr (words == count) {
      all.word[k] = word;
    } else {
      all.word[k / 2] = k % 2 ? (word & 0xffff0000u) | all.word[k / 2] : word >> 16;
    }
  }
};

template <class T> struct Elements<T, 1> {
  T one;
  __device__ void load(const T* from) { one = *from; }
  __device__ void store(T* to) const { *to = one; }
  __device__ Word<T> get(int) const { return word_of(one); }
  __device__ void set(int, Word<T> word) { one = number_of<T>(word); }
};

// The pieces of `count` neighbours, on their way to a mask or from it. `first` is the first one's
// place in the mask; `active` are the threads of the warp that call `store`, all of them together.

template <int count> struct Unsaved {
  __device__ void set(int, int) {}
  __device__ void store(unsigned char*, Index, unsigned int) const {}
};

template <int count> struct Bits {  // the first thread of those that share a byte writes it
  unsigned int all = 0;
  __device__ void load(const unsigned char* mask, Index first) {
    all = mask[first / 8] >> (first % 8);
  }
  __device__ int get(int k) const { return all >> k & 1; }
  __device__ void set(int k, int piece) { all |= (piece == 1 ? 1u : 0u) << k; }
  __device__ void store(unsigned char* mask, Index first, unsigned int active) const {
    unsigned int byte = all;
    if constexpr (count == 1) {
      byte = __ballot_sync(active, all) >> (first % warp);
    } else {
#pragma unroll
      for (int have = count; have < 8; have *= 2) {
        byte |= __shfl_down_sync(active, byte, have / count) << have;
      }
    }
    if (first % 8 == 0) mask[first / 8] = static_cast<unsigned char>(byte);
  }
};

template <int count> struct Bytes {
  typedef typename Unsigned<count>::type Memory;
  Memory all = 0;
  __device__ void load(const unsigned char* mask, Index first) {
    all = *reinterpret_cast<const Memory*>(mask + first);
  }
  __device__ int get(int k) const { return static_cast<int>(all >> 8 * k & 3); }
  __device__ void set(int k, int piece) { all |= static_cast<Memory>(piece) << 8 * k; }
  __device__ void store(unsigned char* mask, Index first, unsigned int) const {
    *reinterpret_cast<Memory*>(mask + first) = all;
  }
};

// ---- The passes -------------------------------------------------------------------------------
//
// A pass loads `count` elements `at` a place of its arrays, whose place in the mask is `first`, and
// finishes them.

template <class T, class F, template <int> class Pieces> struct Forward {
  static constexpr int together = 16 / sizeof(T);
  F family;
  const T* x;
  T* y;
  unsigned char* mask;

  template <int count> struct Loaded { Elements<T, count> x; };

  template <int count> __device__ void load(Loaded<count>& loaded, Index at, Index) const {
    loaded.x.load(x + at);
  }
  template <int count>
  __device__ void finish(const Loaded<count>& loaded, Index at, Index first,
                         unsigned int active) const {
    Elements<T, count> result;
    Pieces<count> pieces;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      int piece;
      result.set(k, family.forward(loaded.x.get(k), piece));
      pieces.set(k, piece);
    }
    result.store(y + at);
    pieces.store(mask, first, active);
  }
};

template <class T, class F> struct Gradient {
  static constexpr int together = 16 / sizeof(T);
  F family;
  const T* x;
  T* g;

  template <int count> struct Loaded { Elements<T, count> x; };

  template <int count> __device__ void load(Loaded<count>& loaded, Index at, Index) const {
    loaded.x.load(x + at);
  }
  template <int count>
  __device__ void finish(const Loaded<count>& loaded, Index at, Index, unsigned int) const {
    const Word<T> one = Format<T>::one;
    Elements<T, count> result;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      result.set(k, family.backward(family.piece(loaded.x.get(k)), one));
    }
    result.store(g + at);
  }
};

template <class T, class F, template <int> class Pieces> struct Backward {
  static constexpr int together = 16 / sizeof(T);
  F family;
  const T* dy;
  const unsigned char* mask;
  T* dx;

  template <int count> struct Loaded { Elements<T, count> dy; Pieces<count> pieces; };

  template <int count> __device__ void load(Loaded<count>& loaded, Index at, Index first) const {
    loaded.dy.load(dy + at);
    loaded.pieces.load(mask, first);
  }
  template <int count>
  __device__ void finish(const Loaded<count>& loaded, Index at, Index, unsigned int) const {
    Elements<T, count> result;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      result.set(k, family.backward(loaded.pieces.get(k), loaded.dy.get(k)));
    }
    result.store(dx + at);
  }
};

template <template <int> class Pieces, class F, class T>
__device__ Forward<T, F, Pieces> forward(F family, const T* x, T* y, unsigned char* mask = nullptr) {
  return {family, x, y, mask};
}

template <class F, class T> __device__ Gradient<T, F> gradient(F family, const T* x, T* g) {
  return {family, x, g};
}

template <template <int> class Pieces, class F, class T>
__device__ Backward<T, F, Pieces> backward(F family, const T* dy, const unsigned char* mask, T* dx) {
  return {family, dy, mask, dx};
}

// `choice` has the numbers as x's dtype holds them, `family` as that of dy does.
template <class T, class X, class F, class C> struct BackwardFromInput {
  static constexpr int together = 16 / (sizeof(T) > sizeof(X) ? sizeof(T) : sizeof(X));
  F family;
  C choice;
  const T* dy;
  const X* x;
  T* dx;

  template <int count> struct Loaded { Elements<T, count> dy; Elements<X, count> x; };

  template <int count> __device__ void load(Loaded<count>& loaded, Index at, Index) const {
    loaded.dy.load(dy + at);
    loaded.x.load(x + at);
  }
  template <int count>
  __device__ void finish(const Loaded<count>& loaded, Index at, Index, unsigned int) const {
    Elements<T, count> result;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      result.set(k, family.backward(choice.piece(loaded.x.get(k)), loaded.dy.get(k)));
    }
    result.store(dx + at);
  }
};

template <class F, class C, class T, class X>
__device__ BackwardFromInput<T, X, F, C> backward_from_input(F family, C choice, const T* dy,
                                                            const X* x, T* dx) {
  return {family, choice, dy, x, dx};
}

// ---- Threads ----------------------------------------------------------------------------------

// The threads of i's warp that there are: the last warp may not be full.
__device__ inline unsigned int active(Index i, Index threads) {
  const Index rest = threads - i / warp * warp;
  return rest < warp ? (1u << rest) - 1 : ~0u;
}

// One element a thread, of arrays that have any layout: the pass points to the element itself.
template <class Pass> __device__ void one(const Pass& pass, Index i, Index threads) {
  typename Pass::template Loaded<1> loaded;
  pass.load(loaded, 0, i);
  pass.finish(loaded, 0, i, active(i, threads));
}

// n elements in a row, aligned to 16 bytes. A warp moves a tile: each of its threads `chunks` times
// 16 bytes, side by side with its neighbours', all loads before the first store. What is left over
// are `threads` more than the tiles need, with one element each.
template <int chunks, class Pass>
__device__ void many(const Pass& pass, Index i, Index threads, Index n) {
  constexpr int count = Pass::together;
  constexpr Index step = warp * count, tile = chunks * step;
  const Index tiles = n / tile;
  if (i / warp < tiles) {
    const Index first = i / warp * tile + i % warp * count;
    typename Pass::template Loaded<count> loaded[chunks];
#pragma unroll
    for (int k = 0; k < chunks; ++k) pass.load(loaded[k], first + k * step, first + k * step);
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      pass.finish(loaded[k], first + k * step, first + k * step, ~0u);
    }
  } else {
    const Index place = i + tiles * (tile - warp);
    typename Pass::template Loaded<1> loaded;
    pass.load(loaded, place, place);
    pass.finish(loaded, place, place, active(i, threads));
  }
}

}  // namespace relu_xp
