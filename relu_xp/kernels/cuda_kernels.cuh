// The CUDA kernels: the formats that rules.h computes with, vector access to memory, masks by
// ballot and shuffle, and how threads share an array. backends/cupy_kernels.py replaces the
// #include by rules.h itself: both are the preamble of the kernels that CuPy generates and NVRTC
// compiles.
//
// CuPy compiles with -ftz=true, and no later option undoes that: products, sums and conversions of
// floats flush subnormals. Those that must not are inline PTX.
//
// No load waits for a comparison: every pass loads all that a thread needs, then computes.

#define RELU_XP_INLINE __device__
#include "rules.h"

namespace relu_xp {

using Index = unsigned long long;

constexpr int kWarp = 32;  // threads that execute together

// ---- Formats ------------------------------------------------------------------------------------

template <bool condition, class A, class B>
using If = typename cupy::type_traits::conditional<condition, A, B>::type;
template <int bytes>
using Unsigned = If<bytes == 8, unsigned long long,
                    If<bytes == 4, unsigned int, If<bytes == 2, unsigned short, unsigned char>>>;

template <class To, class From>
__device__ To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "two sizes");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// Products, sums and conversions, rounded once, that keep subnormals. Volatile: otherwise the
// compiler moves each product into a branch of its own, and the threads of a warp diverge.
__device__ inline float multiply(float a, float b) {
  asm volatile("mul.rn.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
__device__ inline double multiply(double a, double b) {
  asm volatile("mul.rn.f64 %0, %0, %1;" : "+d"(a) : "d"(b));
  return a;
}
__device__ inline float add(float a, float b) {
  asm volatile("add.rn.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
__device__ inline double add(double a, double b) {
  asm volatile("add.rn.f64 %0, %0, %1;" : "+d"(a) : "d"(b));
  return a;
}
__device__ inline double to_double(float x) {
  double result;
  asm volatile("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(x));
  return result;
}
__device__ inline float round_to_float(double x) {
  float result;
  asm volatile("cvt.rn.f32.f64 %0, %1;" : "=f"(result) : "d"(x));
  return result;
}
__device__ inline float truncate_to_float(double x) {
  float result;
  asm volatile("cvt.rz.f32.f64 %0, %1;" : "=f"(result) : "d"(x));
  return result;
}

// The format of one of CuPy's types.
template <class T>
struct Float;

template <class T>
using Word = WordOf<Float<T>>;

template <class T>
__device__ Word<T> word_of(T number) {
  return static_cast<Word<T>>(bit_cast<Unsigned<sizeof(T)>>(number))
         << 8 * (sizeof(Word<T>) - sizeof(T));
}

template <class T>
__device__ T number_of(Word<T> word) {
  return bit_cast<T>(static_cast<Unsigned<sizeof(T)>>(word >> 8 * (sizeof(Word<T>) - sizeof(T))));
}

// For sm_100 and later NVRTC turns an exclusive or with the sign into neg.ftz.f32, which flushes
// subnormals and loses NaN's payload, or into neg.f64. Inline PTX is left alone.
template <>
struct Float<float> : Format<unsigned int, int, 32, 8> {
  __device__ static Word negate(Word x) {
    asm("xor.b32 %0, %0, 0x80000000;" : "+r"(x));
    return x;
  }
  __device__ static Word multiply(Word slope, Word x) {
    return bit_cast<Word>(relu_xp::multiply(bit_cast<float>(slope), bit_cast<float>(x)));
  }
  __device__ static Word add(Word x, Word bias) {
    return bit_cast<Word>(relu_xp::add(bit_cast<float>(x), bit_cast<float>(bias)));
  }
};

template <>
struct Float<double> : Format<unsigned long long, long long, 64, 11> {
  __device__ static Word negate(Word x) {
    asm("xor.b64 %0, %0, 0x8000000000000000;" : "+l"(x));
    return x;
  }
  __device__ static Word multiply(Word slope, Word x) {
    return bit_cast<Word>(relu_xp::multiply(bit_cast<double>(slope), bit_cast<double>(x)));
  }
  __device__ static Word add(Word x, Word bias) {
    return bit_cast<Word>(relu_xp::add(bit_cast<double>(x), bit_cast<double>(bias)));
  }
};

// float16 or bfloat16, which CuPy defines only for kernels with such an argument. A number is the
// upper half of a word, whose lower half may hold anything (its neighbour, mostly). Products and
// sums are computed in float32: a product is exact there, and a sum has so many more bits that to
// round it again gives what rounding once would.
template <class T>
constexpr bool is_half = cupy::type_traits::is_same<T, float16>::value;

template <class T>
struct Float : Format<unsigned int, int, 16, is_half<T> ? 5 : 8, is_half<T>> {
  using Word = unsigned int;

  __device__ static Word multiply(Word slope, Word x) {
    return round(relu_xp::multiply(exact(slope), exact(x)));
  }
  __device__ static Word add(Word x, Word bias) {
    return round(relu_xp::add(exact(x), exact(bias)));
  }

 private:
  __device__ static float exact(Word x) {
    if constexpr (is_half<T>) return number_of<T>(x);  // a subnormal is none in float32
    return bit_cast<float>(x & 0xffff0000u);
  }

  __device__ static Word round(float x) {
    if constexpr (is_half<T>) return word_of(T(x));
#if __CUDA_ARCH__ >= 800
    // One instruction instead of seven, with which a leaky ReLU would be bound by arithmetic.
    unsigned short bits;
    asm volatile("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return static_cast<Word>(bits) << 16;
#else
    const Word word = bit_cast<Word>(x);
    const Word half = 0x7fff + (word >> 16 & 1);  // ties to even
    return is_nan<Float<float>>(word) ? word : word + half;
#endif
  }
};

// ---- The function with four parameters ----------------------------------------------------------

// One activation in one format. The flags are those of `Rules`.
template <class T, bool has_threshold, bool has_a, bool has_b, bool has_c>
class Activation {
 public:
  using Number = T;
  using F = Float<T>;
  using Word = WordOf<F>;
  using Rule = Rules<F, has_threshold, has_a, has_b, has_c>;

  __device__ Activation(T threshold, T a, T b, T c)
      : rule_(word_of(threshold), word_of(c)), a_(word_of(a)), b_(word_of(b)) {}

  __device__ Word branch(Word x) const {
    if constexpr (has_b && has_c) return rule_.branch(x, product<F>(b_, x));
    return rule_.branch(x, x);
  }

  __device__ Word forward(Word x, Word& branch) const {
    const Word scaled = scale(rule_.above(x), x);
    branch = rule_.branch(x, scaled);
    return rule_.forward(x, scaled, scaled);
  }

  __device__ Word gradient(Word x) const { return Rule::backward(branch(x), F::one, a_, b_); }

  __device__ Word backward(Word branch, Word dy) const {
    const Word scaled = scale(branch == kUpper, dy);
    return Rule::backward(branch, dy, scaled, scaled);
  }

 private:
  // The product of a value and the slope of its side of the threshold: where both slopes are given,
  // to choose one of them takes one instruction, a second product several.
  __device__ Word scale(bool above, Word value) const {
    if constexpr (has_a && has_b) return product<F>(above ? b_ : a_, value);
    if constexpr (has_a) return product<F>(a_, value);
    if constexpr (has_b) return product<F>(b_, value);
    return value;
  }

  Rule rule_;
  Word a_, b_;
};

// ---- One element of other activations -----------------------------------------------------------
//
// Of numbers instead of words: the arguments may have two formats.

template <class X>
__device__ bool above_zero(X x) {
  return above_zero<Float<X>>(word_of(x));
}

template <class T>
__device__ double to_double(T x) {
  return to_double(static_cast<float>(x));
}
__device__ inline double to_double(double x) { return x; }

template <class T, class W>
__device__ T round_to(W number) {
  if constexpr (cupy::type_traits::is_same<T, W>::value) return number;
  const double x = to_double(number);
  if constexpr (sizeof(T) == 8) return x;
  if constexpr (sizeof(T) == 4) return round_to_float(x);
  // Toward zero, and if that is inexact to an odd word: rounding again gives what rounding once
  // would.
  const float truncated = truncate_to_float(x);
  const unsigned int inexact = to_double(truncated) != x;
  return T(bit_cast<float>(bit_cast<unsigned int>(truncated) | inexact));
}

template <class T>
__device__ T prelu(bool above, T value, T slope) {
  using F = Float<T>;
  const Word<T> word = word_of(value), factor = word_of(slope);
  const Word<T> low = apply_slope<F>(factor, product<F>(factor, word));
  return number_of<T>(above ? word : low);
}

// x * dy where x is at or below 0, else 0; exact, except of float64.
template <class T, class X>
__device__ double prelu_weight_term(T dy, X x) {
  const double term = multiply(to_double(x), to_double(dy));
  return above_zero(x) ? 0.0 : term;
}

template <class T>
__device__ T squared_relu(T x) {
  const Word<T> square = product<Float<T>>(word_of(x), word_of(x));
  return number_of<T>(above_zero(x) ? square : 0);
}

template <class T, class X>
__device__ T squared_relu_backward(T dy, X x) {
  T dx;
  if constexpr (sizeof(T) == 8 || sizeof(X) == 8) {
    dx = round_to<T>(multiply(multiply(2.0, to_double(x)), to_double(dy)));
  } else {
    dx = T(multiply(multiply(2.0f, static_cast<float>(x)), static_cast<float>(dy)));
  }
  return number_of<T>(above_zero(x) ? word_of(dx) : 0);
}

template <class T>
__device__ T crelu_backward(int branch, T first, T second) {
  const T difference = round_to<T>(to_double(first) - to_double(second));
  return number_of<T>(
      crelu_backward<Float<T>>(branch, word_of(first), word_of(second), word_of(difference)));
}

// ---- Elements in memory -------------------------------------------------------------------------

// `count` neighbours, moved by one access of count * sizeof(T) bytes.
template <class T, int count>
class Elements {
 public:
  __device__ void load(const T* from) { all_ = *reinterpret_cast<const Memory*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<Memory*>(to) = all_; }

  __device__ Word<T> get(int k) const {
    if constexpr (pairs) return k % 2 ? all_.cell[k / 2] : all_.cell[k / 2] << 16;
    return static_cast<Word<T>>(all_.cell[k]) << shift;
  }

  __device__ void set(int k, Word<T> word) {  // in order: the second of a pair keeps the first
    if constexpr (pairs) {
      all_.cell[k / 2] = k % 2 ? (word & 0xffff0000u) | all_.cell[k / 2] : word >> 16;
    } else {
      all_.cell[k] = static_cast<Cell>(word >> shift);
    }
  }

 private:
  static constexpr bool pairs = sizeof(T) == 2 && count > 1;  // two numbers in a cell
  using Cell = Unsigned<pairs ? 4 : sizeof(T)>;
  static constexpr int shift = 8 * (sizeof(Word<T>) - sizeof(Cell));
  struct alignas(count * sizeof(T)) Memory {
    Cell cell[count * sizeof(T) / sizeof(Cell)];
  } all_;
};

// The branches of `count` neighbours, read from a mask or written to it. `first` is the index of
// the first one in the mask; `active` are the threads of the warp that call `store`, all together.

template <int count>
struct NoMask {
  __device__ void set(int, int) {}
  __device__ void store(unsigned char*, Index, unsigned int) const {}
};

template <int count>
class Bits {
 public:
  __device__ void load(const unsigned char* mask, Index first) {
    all_ = mask[first / 8] >> (first % 8);
  }
  __device__ unsigned int get(int k) const { return all_ >> k & 1; }
  __device__ void set(int k, int branch) { all_ |= (branch == kUpper ? 1u : 0u) << k; }
  __device__ void store(unsigned char* mask, Index first, unsigned int active) const {
    unsigned int byte = all_;
    if constexpr (count == 1) {
      byte = __ballot_sync(active, all_) >> (first % kWarp);
    } else {
#pragma unroll
      for (int have = count; have < 8; have *= 2) {
        byte |= __shfl_down_sync(active, byte, have / count) << have;
      }
    }
    // Of the threads that share a byte, the first one has all its bits.
    if (first % 8 == 0) mask[first / 8] = static_cast<unsigned char>(byte);
  }

 private:
  unsigned int all_ = 0;
};

template <int count>
class Bytes {
 public:
  __device__ void load(const unsigned char* mask, Index first) {
    all_ = *reinterpret_cast<const Memory*>(mask + first);
  }
  __device__ unsigned int get(int k) const { return all_ >> 8 * k & 3; }
  __device__ void set(int k, int branch) { all_ |= static_cast<Memory>(branch) << 8 * k; }
  __device__ void store(unsigned char* mask, Index first, unsigned int) const {
    *reinterpret_cast<Memory*>(mask + first) = all_;
  }

 private:
  using Memory = Unsigned<count>;
  Memory all_ = 0;
};

// ---- The passes ---------------------------------------------------------------------------------
//
// A pass goes over arrays by parts of `count` neighbours: `load` reads a part from index `at` of
// the arrays and index `first` of the mask, `store` computes its results and writes them. `kVector`
// elements make an access of 16 bytes.

// How a vectorized pass finds the biases of its neighbours: they are neighbours too, and aligned as
// the elements are; there are two at most; or there may be any number of them.
enum Spread { kRow, kRuns, kAny };

// The input of a forward pass: here x, below x + bias.
template <class T>
struct Plain {
  const T* x;

  template <int count>
  struct Part {
    Elements<T, count> x;

    __device__ void load(const Plain& input, Index at, Index) { x.load(input.x + at); }
    __device__ Word<T> get(int k) const { return x.get(k); }
  };
};

// Element k, in the mask's order, belongs to channel k / inner % channels.
template <class T, Spread spread>
struct Biased {
  const T* bias;
  Index channels, inner;
  const T* x;

  template <int count>
  struct Part {
    Elements<T, count> x, bias;

    __device__ void load(const Biased& input, Index at, Index first) {
      x.load(input.x + at);
      const Index run = spread == kRow ? first : first / input.inner;
      Index channel = run % input.channels;
      if constexpr (count == 1 || spread == kRow) {
        bias.load(input.bias + channel);
      } else if constexpr (spread == kRuns) {
        const Index left = (run + 1) * input.inner - first;
        const Index next = channel + 1 == input.channels ? 0 : channel + 1;
        const Word<T> here = word_of(input.bias[channel]), behind = word_of(input.bias[next]);
#pragma unroll
        for (int k = 0; k < count; ++k) bias.set(k, k < left ? here : behind);
      } else {
        Index position = first - run * input.inner;
#pragma unroll
        for (int k = 0; k < count; ++k) {
          bias.set(k, word_of(input.bias[channel]));
          if (++position == input.inner) {
            position = 0;
            if (++channel == input.channels) channel = 0;
          }
        }
      }
    }

    __device__ Word<T> get(int k) const { return sum<Float<T>>(x.get(k), bias.get(k)); }
  };
};

template <template <int> class Mask, class A, class Input = Plain<typename A::Number>>
struct Forward {
  using T = typename A::Number;
  static constexpr int kVector = 16 / sizeof(T);
  A activation;
  Input input;
  T* y;
  unsigned char* mask;

  template <int count>
  struct Part {
    typename Input::template Part<count> x;

    __device__ void load(const Forward& pass, Index at, Index first) {
      x.load(pass.input, at, first);
    }

    __device__ void store(const Forward& pass, Index at, Index first, unsigned int active) const {
      Elements<T, count> y;
      Mask<count> branches;
#pragma unroll
      for (int k = 0; k < count; ++k) {
        Word<T> branch;
        y.set(k, pass.activation.forward(x.get(k), branch));
        branches.set(k, branch);
      }
      y.store(pass.y + at);
      branches.store(pass.mask, first, active);
    }
  };
};

template <class A>
struct Gradient {
  using T = typename A::Number;
  static constexpr int kVector = 16 / sizeof(T);
  A activation;
  const T* x;
  T* g;

  template <int count>
  struct Part {
    Elements<T, count> x;

    __device__ void load(const Gradient& pass, Index at, Index) { x.load(pass.x + at); }

    __device__ void store(const Gradient& pass, Index at, Index, unsigned int) const {
      Elements<T, count> g;
#pragma unroll
      for (int k = 0; k < count; ++k) g.set(k, pass.activation.gradient(x.get(k)));
      g.store(pass.g + at);
    }
  };
};

template <template <int> class Mask, class A>
struct Backward {
  using T = typename A::Number;
  static constexpr int kVector = 16 / sizeof(T);
  A activation;
  const T* dy;
  const unsigned char* mask;
  T* dx;

  template <int count>
  struct Part {
    Elements<T, count> dy, dx;
    Mask<count> branches;

    __device__ void load(const Backward& pass, Index at, Index first) {
      dy.load(pass.dy + at);
      branches.load(pass.mask, first);
    }

    __device__ void store(const Backward& pass, Index at, Index, unsigned int) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        dx.set(k, pass.activation.backward(branches.get(k), dy.get(k)));
      }
      dx.store(pass.dx + at);
    }
  };
};

// `activation` has the slopes in the format of dy; `of_x` has the parameters that select the
// branch, in the format of x.
template <class A, class OfX>
struct BackwardFromInput {
  using T = typename A::Number;
  using X = typename OfX::Number;
  static constexpr int kVector = 16 / (sizeof(T) > sizeof(X) ? sizeof(T) : sizeof(X));
  A activation;
  OfX of_x;
  const T* dy;
  const X* x;
  T* dx;

  template <int count>
  struct Part {
    Elements<T, count> dy;
    Elements<X, count> x;

    __device__ void load(const BackwardFromInput& pass, Index at, Index) {
      dy.load(pass.dy + at);
      x.load(pass.x + at);
    }

    __device__ void store(const BackwardFromInput& pass, Index at, Index, unsigned int) const {
      Elements<T, count> dx;
#pragma unroll
      for (int k = 0; k < count; ++k) {
        dx.set(k, pass.activation.backward(pass.of_x.branch(x.get(k)), dy.get(k)));
      }
      dx.store(pass.dx + at);
    }
  };
};

// ---- Threads ------------------------------------------------------------------------------------

// The threads that the warp of thread i has: the last warp may not be full.
__device__ inline unsigned int active_threads(Index i, Index threads) {
  const Index rest = threads - i / kWarp * kWarp;
  return rest < kWarp ? (1u << rest) - 1 : ~0u;
}

// One element a thread, of arrays of any layout: the pass has the addresses of that very element.
template <class Pass>
__device__ void strided(const Pass& pass, Index i, Index threads) {
  typename Pass::template Part<1> part;
  part.load(pass, 0, i);
  part.store(pass, 0, i, active_threads(i, threads));
}

// n contiguous elements, aligned to 16 bytes. A warp moves a tile: each of its threads `chunks`
// times 16 bytes, beside those of its neighbours, all loads before the first store. For what is
// left over there are `threads` beyond those of the tiles, with one element each.
template <int chunks, class Pass>
__device__ void vectorized(const Pass& pass, Index i, Index threads, Index n) {
  constexpr int count = Pass::kVector;
  constexpr Index step = kWarp * count, tile = chunks * step;
  const Index tiles = n / tile;
  if (i / kWarp < tiles) {
    const Index first = i / kWarp * tile + i % kWarp * count;
    typename Pass::template Part<count> parts[chunks];
#pragma unroll
    for (int k = 0; k < chunks; ++k) parts[k].load(pass, first + k * step, first + k * step);
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      parts[k].store(pass, first + k * step, first + k * step, ~0u);
    }
  } else {
    const Index at = i + tiles * (tile - kWarp);
    typename Pass::template Part<1> part;
    part.load(pass, at, at);
    part.store(pass, at, at, active_threads(i, threads));
  }
}

// ---- Sums for each channel ----------------------------------------------------------------------

// The sums of an array seen as outer x channels x inner elements: element (row, channel, k) is part
// of sum (channel, row % rows, k % columns). The array is dense in memory in any order of its axes;
// strides count elements, and are 0 for one of length 1.
struct Sums {
  Index outer, channels, inner;
  Index rows, columns;
  Index outer_stride, channel_stride, inner_stride;
  double* sums;
};

// A backward pass that also sums its results. A thread has `count` sums, of neighbours in memory,
// in registers; threads beside each other have neighbours too.
template <int count, class Pass>
__device__ void backward_and_sum(const Pass& pass, const Sums& to, Index i) {
  constexpr int batch = 4;  // parts that a thread loads before it stores one
  const bool across = to.channel_stride == 1;
  Index row, channel, column;
  if (to.outer_stride == 1) {
    row = i % to.rows, channel = i / to.rows % to.channels, column = i / to.rows / to.channels;
  } else if (across) {
    const Index threads = to.channels / count;
    channel = i % threads * count, column = i / threads % to.columns;
    row = i / threads / to.columns;
  } else {
    const Index threads = to.columns / count;
    column = i % threads * count, channel = i / threads % to.channels;
    row = i / threads / to.channels;
  }
  const Index runs = (to.inner - column + to.columns - 1) / to.columns;  // in a row
  const Index parts = (to.outer - row + to.rows - 1) / to.rows * runs;
  const Index step = to.columns * to.inner_stride;
  const Index next_row = to.rows * to.outer_stride - (runs - 1) * step;  // modulo 2**64
  Index at = row * to.outer_stride + channel * to.channel_stride + column * to.inner_stride;
  double all[count] = {};
  for (Index done = 0, run = 0; done < parts; done += batch) {
    typename Pass::template Part<count> part[batch];
    Index its[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      its[k] = at;
      if (done + k < parts) part[k].load(pass, at, at);
      const bool last = ++run == runs;
      at += last ? next_row : step;
      run = last ? 0 : run;
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (done + k >= parts) break;
      part[k].store(pass, its[k], its[k], 0);
#pragma unroll
      for (int j = 0; j < count; ++j) {
        all[j] += to_double(number_of<typename Pass::T>(part[k].dx.get(j)));
      }
    }
  }
  double* sums = to.sums + (channel * to.rows + row) * to.columns + column;
#pragma unroll
  for (int j = 0; j < count; ++j) sums[j * (across ? to.rows * to.columns : 1)] = all[j];
}

// Add up n sums of each channel: into `groups` sums, by `lanes` threads each, a power of 2 up to a
// warp.
template <class W>
__device__ void add_up(const double* sums, W* totals, Index i, Index threads, Index n, Index groups,
                       Index lanes) {
  const Index step = groups * lanes, channel = i / step, first = i % step;  // first < n
  const Index terms = (n - first + step - 1) / step;
  const double* term = sums + channel * n + first;
  double all = 0;
#pragma unroll 4
  for (Index k = 0; k < terms; ++k) all += term[k * step];
  const unsigned int active = active_threads(i, threads);
  for (Index by = lanes / 2; by > 0; by /= 2) all += __shfl_down_sync(active, all, by);
  if (i % lanes == 0) totals[i / lanes] = round_to<W>(all);
}

}  // namespace relu_xp
