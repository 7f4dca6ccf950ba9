// The CPU kernels, compiled once for each instruction set (CMakeLists.txt), each time into a
// namespace of its own. Nothing here may call an inline function of the standard library: the
// linker would keep one copy of it for all instruction sets.
//
// A kernel goes through its elements in blocks of 512 bytes, which stay in the first-level cache
// between several plain loops. Each loop has lanes of one width, so that GCC and clang vectorize
// it. Intrinsics serve what they cannot vectorize: packing bits, converting float16, streaming
// stores.

#include "cpu_kernels.h"

#include <string.h>  // memcpy

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define RELU_XP_INLINE inline

// The loop's iterations are independent: `out` may be the very memory of an input, which the
// compiler would otherwise have to take for an overlap.
#if defined(__clang__)
#define RELU_XP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety) interleave(disable)")
#else
#define RELU_XP_INDEPENDENT _Pragma("GCC ivdep")
#endif

// For functions of a block: once inlined, the length of a whole block is a constant, and loops have
// no remainder (7 % of a forward pass with a mask, float16 larger than the caches).
#define RELU_XP_ALWAYS_INLINE [[gnu::always_inline]] inline

namespace relu_xp {
namespace {

template <class To, class From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "two sizes");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace
}  // namespace relu_xp

#include "rules.h"

namespace relu_xp {
namespace {

constexpr std::size_t kBlockBytes = 512;
// Bytes. The processor's own prefetcher stops at the end of a page: to ask for what lies a page
// ahead takes 10 % to 20 % off a pass beyond the caches (25 M float32, two cores with AVX-512).
constexpr std::size_t kPrefetchDistance = 4096;
constexpr std::size_t kLine = 64;  // bytes of a cache line

inline std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

// ---- Formats ------------------------------------------------------------------------------------

// Of two NaN the first: of a mere sum compilers may swap the operands.
template <class T>
inline T add(T a, T b) {
  return a + (__builtin_isnan(a) ? T(0) : b);
}

struct Float32 : Format<std::uint32_t, std::int32_t, 32, 8> {
  using Wide = float;                      // the type that computes
  static constexpr bool keeps_nan = true;  // as the processor's multiplications do
  static Word multiply(Word a, Word b) {
    return bit_cast<Word>(bit_cast<float>(a) * bit_cast<float>(b));
  }
  static Word add(Word a, Word b) {
    return bit_cast<Word>(relu_xp::add(bit_cast<float>(a), bit_cast<float>(b)));
  }
};

struct Float64 : Format<std::uint64_t, std::int64_t, 64, 11> {
  using Wide = double;
  static constexpr bool keeps_nan = true;
  static Word multiply(Word a, Word b) {
    return bit_cast<Word>(bit_cast<double>(a) * bit_cast<double>(b));
  }
  static Word add(Word a, Word b) {
    return bit_cast<Word>(relu_xp::add(bit_cast<double>(a), bit_cast<double>(b)));
  }
};

// 16-bit numbers are multiplied in float32, where their products are exact, and added there, where
// a sum is exact or has more than twice their precision: a block at a time.
struct BFloat16 : Format<std::uint16_t, std::int16_t, 16, 8, false> {
  using Wide = float;
};

struct Float16 : Format<std::uint16_t, std::int16_t, 16, 5> {
  using Wide = float;
};

template <class F>
constexpr bool is_16_bit = sizeof(WordOf<F>) == 2;

template <class F>
constexpr std::size_t kLanes = kBlockBytes / sizeof(WordOf<F>);  // of a block

void widen(const Float32::Word* x, float* wide, std::size_t n, Float32 /*format*/) {
  memcpy(wide, x, n * sizeof(float));
}

void narrow(const float* wide, Float32::Word* x, std::size_t n, Float32 /*format*/) {
  memcpy(x, wide, n * sizeof(float));
}

void widen(const Float64::Word* x, double* wide, std::size_t n, Float64 /*format*/) {
  memcpy(wide, x, n * sizeof(double));
}

void narrow(const double* wide, Float64::Word* x, std::size_t n, Float64 /*format*/) {
  memcpy(x, wide, n * sizeof(double));
}

inline float to_float(std::uint16_t x, BFloat16 /*format*/) {
  return bit_cast<float>(static_cast<std::uint32_t>(x) << 16);
}

// The bfloat16 of a float, in the upper half of the result.
inline std::uint32_t round_to_upper_half(float number, BFloat16 /*format*/) {
  const std::uint32_t word = bit_cast<std::uint32_t>(number);
  const std::uint32_t nan = (word & 0x80000000) | 0x7fc00000;               // as ml_dtypes has it
  return is_nan<Float32>(word) ? nan : word + 0x7fff + ((word >> 16) & 1);  // ties to even
}

inline std::uint16_t from_float(float number, BFloat16 format) {
  return static_cast<std::uint16_t>(round_to_upper_half(number, format) >> 16);
}

void widen(const std::uint16_t* x, float* wide, std::size_t n, BFloat16 format) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) wide[i] = to_float(x[i], format);
}

void narrow(const float* wide, std::uint16_t* x, std::size_t n, BFloat16 format) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) x[i] = from_float(wide[i], format);
}

// One float16, where the processor has no instruction for it. Exact, and never subnormal in
// float32: no floating-point mode changes it.
inline float to_float(std::uint16_t x, Float16 /*format*/) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16;
  const std::uint32_t rest = x & 0x7fff;
  constexpr std::uint32_t bias = 112u << 23;  // the difference of the exponents' biases
  if (rest < 0x400) {                         // subnormal, or 0
    const float magnitude = static_cast<float>(rest) * (1.0f / (1 << 24));
    return bit_cast<float>(sign | bit_cast<std::uint32_t>(magnitude));
  }
  return bit_cast<float>(sign | ((rest << 13) + (rest < 0x7c00 ? bias : 2 * bias)));
}

inline std::uint16_t from_float(float number, Float16 /*format*/) {
  const std::uint32_t word = bit_cast<std::uint32_t>(number);
  const std::uint32_t sign = (word >> 16) & 0x8000;
  const std::uint32_t rest = word & 0x7fffffff;
  std::uint32_t result;
  if (rest > 0x7f800000) {
    result = 0x7e00 | ((rest >> 13) & 0x3ff);
  } else if (rest >= 0x477ff000) {  // 65520 and above
    result = 0x7c00;
  } else if (rest >= 0x38800000) {  // 2**-14, the smallest normal number
    const std::uint32_t scaled = rest - (112u << 23);
    result = (scaled + 0xfff + ((scaled >> 13) & 1)) >> 13;
  } else if (rest <= 0x33000000) {  // 2**-25, half of the smallest subnormal number
    result = 0;
  } else {
    const std::uint32_t significand = (rest & 0x7fffff) | 0x800000;
    const std::uint32_t shift = 126 - (rest >> 23);
    const std::uint32_t half = (1u << (shift - 1)) - 1;
    result = (significand + half + ((significand >> shift) & 1)) >> shift;
  }
  return static_cast<std::uint16_t>(sign | result);
}

// float32 of one vector of float16. Their words are stored together: a store of each half would
// have to leave the store buffer before the whole vector can be loaded.
#if defined(__AVX512F__)
struct Floats {
  __m512 first, second;
};
inline __m512 convert(const std::uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Floats load_float16(const std::uint16_t* x) { return {convert(x), convert(x + 16)}; }
inline void store_float16(Floats wide, std::uint16_t* x) {
  const __m256i first = _mm512_cvtps_ph(wide.first, _MM_FROUND_TO_NEAREST_INT);
  const __m256i second = _mm512_cvtps_ph(wide.second, _MM_FROUND_TO_NEAREST_INT);
  _mm512_storeu_si512(x, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}
#elif defined(__F16C__)
struct Floats {
  __m256 first, second;
};
inline __m256 convert(const std::uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Floats load_float16(const std::uint16_t* x) { return {convert(x), convert(x + 8)}; }
inline void store_float16(Floats wide, std::uint16_t* x) {
  const __m128i first = _mm256_cvtps_ph(wide.first, _MM_FROUND_TO_NEAREST_INT);
  const __m128i second = _mm256_cvtps_ph(wide.second, _MM_FROUND_TO_NEAREST_INT);
  const __m256i words = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), words);
}
#else
struct Floats {
  float first, second;
};
inline Floats load_float16(const std::uint16_t* x) {
  return {to_float(x[0], Float16()), to_float(x[1], Float16())};
}
inline void store_float16(Floats wide, std::uint16_t* x) {
  x[0] = from_float(wide.first, Float16());
  x[1] = from_float(wide.second, Float16());
}
#endif
constexpr std::size_t kFloats = sizeof(Floats) / sizeof(float);

void widen(const std::uint16_t* x, float* wide, std::size_t n, Float16 format) {
  std::size_t i = 0;
  for (; n - i >= kFloats; i += kFloats) {
    const Floats floats = load_float16(x + i);
    memcpy(wide + i, &floats, sizeof floats);
  }
  if (n % kFloats == 0) return;
  for (; i < n; ++i) wide[i] = to_float(x[i], format);
}

void narrow(const float* wide, std::uint16_t* x, std::size_t n, Float16 format) {
  std::size_t i = 0;
  for (; n - i >= kFloats; i += kFloats) {
    Floats floats;
    memcpy(&floats, wide + i, sizeof floats);
    store_float16(floats, x + i);
  }
  if (n % kFloats == 0) return;
  for (; i < n; ++i) x[i] = from_float(wide[i], format);
}

// ---- Products -----------------------------------------------------------------------------------

// The slope of an element: one for all of them, or one for each.
template <class Word>
inline Word slope_at(Word slope, std::size_t /*i*/) {
  return slope;
}
template <class Word>
inline Word slope_at(const Word* slopes, std::size_t i) {
  return slopes[i];
}

inline std::uint32_t pair_at(std::uint16_t slope, std::size_t /*i*/) { return slope * 0x10001u; }
inline std::uint32_t pair_at(const std::uint16_t* words, std::size_t i) {
  std::uint32_t pair;
  memcpy(&pair, words + 2 * i, sizeof pair);
  return pair;
}

inline Floats slope_floats(std::uint16_t slope, std::size_t /*i*/) {
  const float factor = to_float(slope, Float16());
  return {decltype(Floats::first)() + factor, decltype(Floats::first)() + factor};
}
inline Floats slope_floats(const std::uint16_t* slopes, std::size_t i) {
  return load_float16(slopes + i);
}

// Writes slope * value, rounded once, for a block; `slope` is a word, or points to one for each
// value.
template <class F, class Slope>
RELU_XP_ALWAYS_INLINE void multiply(Slope slope, const WordOf<F>* value, WordOf<F>* result,
                                    std::size_t n, F /*format*/) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) result[i] = product<F>(slope_at(slope, i), value[i]);
}

// Two bfloat16 in a word of 32 bits are the upper halves of two float32 after a shift and a mask:
// lanes of one width (leaky ReLU beyond the caches, 25 M elements on one core: 5.2 ms; with lanes
// that are widened and narrowed 6.3).
template <class Slope>
RELU_XP_ALWAYS_INLINE void multiply(Slope slope, const std::uint16_t* value, std::uint16_t* result,
                                    std::size_t n, BFloat16 format) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < n / 2; ++i) {
    const std::uint32_t slopes = pair_at(slope, i), values = pair_at(value, i);
    const float first = bit_cast<float>(slopes << 16) * bit_cast<float>(values << 16);
    const float second =
        bit_cast<float>(slopes & 0xffff0000) * bit_cast<float>(values & 0xffff0000);
    const std::uint32_t both = round_to_upper_half(first, format) >> 16 |
                               (round_to_upper_half(second, format) & 0xffff0000);
    memcpy(result + 2 * i, &both, sizeof both);
  }
  if (n % 2 != 0) {
    const float factor = to_float(slope_at(slope, n - 1), format);
    result[n - 1] = from_float(factor * to_float(value[n - 1], format), format);
  }
}

template <class Slope>
RELU_XP_ALWAYS_INLINE void multiply(Slope slope, const std::uint16_t* value, std::uint16_t* result,
                                    std::size_t n, Float16 format) {
  std::size_t i = 0;
  for (; n - i >= kFloats; i += kFloats) {
    const Floats factors = slope_floats(slope, i), values = load_float16(value + i);
    store_float16({factors.first * values.first, factors.second * values.second}, result + i);
  }
  if (n % kFloats == 0) return;
  for (; i < n; ++i) {
    const float factor = to_float(slope_at(slope, i), format);
    result[i] = from_float(factor * to_float(value[i], format), format);
  }
}

// ---- Masks --------------------------------------------------------------------------------------

// The branches of a block, in words of its format; with room for a vector behind the last.
template <class F>
struct Branches {
  alignas(kLine) WordOf<F> words[kLanes<F> + kLine / sizeof(WordOf<F>)];
};

template <class Word>
RELU_XP_ALWAYS_INLINE void to_bytes(const Word* branches, unsigned char* bytes, std::size_t n) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) bytes[i] = static_cast<unsigned char>(branches[i]);
}

template <class Word>
RELU_XP_ALWAYS_INLINE void from_bytes(const unsigned char* bytes, Word* branches, std::size_t n) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) branches[i] = bytes[i];
}

// The lowest bits of one vector of words (of 64 bytes; elsewhere of as many bytes as there are
// words), and the words of 0 and 1 that such bits stand for.
#if defined(__AVX512BW__)
template <class Word>
using Packed = Word;

inline std::uint64_t pack_vector(const std::uint16_t* words) {
  return _mm512_test_epi16_mask(_mm512_loadu_si512(words), _mm512_set1_epi16(1));
}
inline std::uint64_t pack_vector(const std::uint32_t* words) {
  return _mm512_test_epi32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(1));
}
inline std::uint64_t pack_vector(const std::uint64_t* words) {
  return _mm512_test_epi64_mask(_mm512_loadu_si512(words), _mm512_set1_epi64(1));
}
inline void unpack_vector(std::uint64_t bits, std::uint16_t* words) {
  _mm512_storeu_si512(words, _mm512_maskz_set1_epi16(static_cast<__mmask32>(bits), 1));
}
inline void unpack_vector(std::uint64_t bits, std::uint32_t* words) {
  _mm512_storeu_si512(words, _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), 1));
}
inline void unpack_vector(std::uint64_t bits, std::uint64_t* words) {
  _mm512_storeu_si512(words, _mm512_maskz_set1_epi64(static_cast<__mmask8>(bits), 1));
}
#else
template <class Word>
using Packed = unsigned char;

inline std::uint64_t pack_vector(const unsigned char* bytes) {
  std::uint64_t result = 0;
#if defined(__AVX2__)
  for (int k = 0; k < 2; ++k) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * k));
    const int half = _mm256_movemask_epi8(_mm256_slli_epi16(all, 7));
    result |= static_cast<std::uint64_t>(static_cast<std::uint32_t>(half)) << (32 * k);
  }
#else
  for (int k = 0; k < 8; ++k) {
    std::uint64_t word;
    memcpy(&word, bytes + 8 * k, 8);
    result |= ((word & 0x0101010101010101) * 0x0102040810204080 >> 56) << (8 * k);
  }
#endif
  return result;
}

inline void unpack_vector(std::uint64_t bits, unsigned char* bytes) {
#if defined(__AVX2__)
  const __m256i each = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i byte_of =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  for (int k = 0; k < 2; ++k) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits >> (32 * k)));
    const __m256i one = _mm256_and_si256(_mm256_shuffle_epi8(all, byte_of), each);
    const __m256i result = _mm256_and_si256(_mm256_cmpeq_epi8(one, each), _mm256_set1_epi8(1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 32 * k), result);
  }
#else
  for (int k = 0; k < 8; ++k) {
    const std::uint64_t byte = bits >> (8 * k) & 0xff;
    const std::uint64_t each = byte * 0x0101010101010101 & 0x8040201008040201;
    const std::uint64_t result = (each + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
    memcpy(bytes + 8 * k, &result, 8);
  }
#endif
}
#endif

// Writes the branches of a block as bits, from bit `start` of the mask on. Earlier bits of the
// first byte are kept; the padding of the last byte is 0.
template <class F>
RELU_XP_ALWAYS_INLINE void pack(Branches<F>& branches, unsigned char* mask, std::size_t start,
                                std::size_t n) {
  using P = Packed<WordOf<F>>;
  constexpr std::size_t count = kLine / sizeof(P);
  P bytes[sizeof(P) == 1 ? kLanes<F> + kLine : 1];
  P* packed = bytes;
  if constexpr (sizeof(P) == 1) {
    to_bytes(branches.words, bytes, n);
  } else {
    packed = branches.words;
  }
  memset(packed + n, 0, kLine);
  const std::size_t shift = start % 8;
  unsigned char* byte = mask + start / 8;
  // Bits that do not fill a byte wait for those that come next.
  std::uint64_t waiting = shift == 0 ? 0 : *byte & ((1u << shift) - 1);
  std::size_t i = 0;
  for (; i + count <= n; i += count, byte += count / 8) {
    const std::uint64_t bits = pack_vector(packed + i);
    const std::uint64_t word = bits << shift | waiting;
    waiting = shift == 0 ? 0 : bits >> (count - shift);
    memcpy(byte, &word, count / 8);
  }
  const std::size_t rest = n - i + shift;
  if (rest > 0) {
    const std::uint64_t bits = pack_vector(packed + i);
    const std::uint64_t word = bits << shift | waiting;
    memcpy(byte, &word, smaller((rest + 7) / 8, 8));
    if (rest > 64) byte[8] = static_cast<unsigned char>(bits >> (64 - shift));
  }
}

// Writes bits, from bit `start` of the mask on, as the branches of a block: 0 and 1.
template <class F>
RELU_XP_ALWAYS_INLINE void unpack(const unsigned char* mask, std::size_t start,
                                  Branches<F>& branches, std::size_t n) {
  using P = Packed<WordOf<F>>;
  constexpr std::size_t count = kLine / sizeof(P);
  P bytes[sizeof(P) == 1 ? kLanes<F> + kLine : 1];
  P* packed = bytes;
  if constexpr (sizeof(P) != 1) packed = branches.words;
  const std::size_t shift = start % 8;
  const unsigned char* byte = mask + start / 8;
  std::size_t i = 0;
  for (; i + count <= n; i += count, byte += count / 8) {
    std::uint64_t bits = 0;
    memcpy(&bits, byte, count / 8);
    if (shift != 0) {
      bits = bits >> shift | static_cast<std::uint64_t>(byte[count / 8]) << (count - shift);
    }
    unpack_vector(bits, packed + i);
  }
  if (i < n) {
    const std::size_t rest = n - i + shift;
    std::uint64_t bits = 0;
    memcpy(&bits, byte, smaller((rest + 7) / 8, 8));
    bits >>= shift;
    if (rest > 64) bits |= static_cast<std::uint64_t>(byte[8]) << (64 - shift);
    unpack_vector(bits, packed + i);
  }
  if constexpr (sizeof(P) == 1) from_bytes(bytes, branches.words, n);
}

// ---- Blocks -------------------------------------------------------------------------------------

// Moves a block to whole lines of memory, past the caches.
inline void stream_block(const unsigned char* from, void* to) {
#if defined(__AVX512F__)
  for (std::size_t k = 0; k < kBlockBytes / sizeof(__m512i); ++k) {
    _mm512_stream_si512(static_cast<__m512i*>(to) + k, _mm512_load_si512(from + 64 * k));
  }
#elif defined(__SSE2__)
  for (std::size_t k = 0; k < kBlockBytes / sizeof(__m128i); ++k) {
    const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(from) + k);
    _mm_stream_si128(static_cast<__m128i*>(to) + k, part);
  }
#else
  memcpy(to, from, kBlockBytes);
#endif
}

// A block of any length, apart from the loop over whole ones.
template <class Out, class Function>
[[gnu::noinline]] void run_part(Function& function, std::size_t start, std::size_t n, Out* out) {
  function(start, n, out);
}

// Calls function(start, n, out) for one block after the other, which writes n elements to `out`.
//
// To store past the caches, it writes whole lines to a buffer that are then moved to aligned lines
// of the output: an ordinary store reads a line before it writes it, which for an array beyond the
// caches is a third of all traffic, and a streaming store of part of a line costs a quarter.
template <class Out, class Function>
inline void for_each_block(const Block& block, Function function) {
  constexpr std::size_t whole = kBlockBytes / sizeof(Out);
  alignas(kLine) unsigned char buffer[kBlockBytes];
  Out* out = reinterpret_cast<Out*>(block.out);
  std::size_t start = 0;
  if (block.stream) {
    const std::size_t skip = (kLine - reinterpret_cast<std::uintptr_t>(out) % kLine) % kLine;
    start = smaller(skip / sizeof(Out), block.count);
    if (start > 0) run_part(function, 0, start, out);
  }
  for (; start + whole <= block.count; start += whole) {
    function(start, whole, block.stream ? reinterpret_cast<Out*>(buffer) : out + start);
    if (block.stream) stream_block(buffer, out + start);
  }
  if (start < block.count) run_part(function, start, block.count - start, out + start);
#if defined(__SSE2__)
  if (block.stream) _mm_sfence();  // streaming stores are ordered by nothing less
#endif
}

// An input of words at an element, of which what lies a while ahead is asked for.
template <class F>
inline const WordOf<F>* input(const Block& block, int which, std::size_t start) {
  const WordOf<F>* at = reinterpret_cast<const WordOf<F>*>(block.in[which]) + start;
  if ((block.prefetch >> which & 1) != 0) {
    const char* ahead = reinterpret_cast<const char*>(at) + kPrefetchDistance;
    for (std::size_t k = 0; k < kBlockBytes; k += kLine) __builtin_prefetch(ahead + k);
  }
  return at;
}

// ---- A bias -------------------------------------------------------------------------------------

// Writes x + bias, rounded once, for a block.
template <class F>
RELU_XP_ALWAYS_INLINE void add(const WordOf<F>* x, const WordOf<F>* bias, WordOf<F>* result,
                               std::size_t n) {
  if constexpr (is_16_bit<F>) {
    alignas(kLine) float wide[kLanes<F>], wide_bias[kLanes<F>];
    widen(x, wide, n, F());
    widen(bias, wide_bias, n, F());
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) wide[i] = add(wide[i], wide_bias[i]);
    narrow(wide, result, n, F());
  } else {
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) result[i] = sum<F>(x[i], bias[i]);
  }
}

// x + bias, computed where it is used.
template <class F>
struct Sum {
  const WordOf<F>*x, *bias;
  WordOf<F> operator[](std::size_t i) const { return sum<F>(x[i], bias[i]); }
};

// The input of an activation, in blocks one after the other: x, or if `biased` x + bias. If
// `in_place`, the sum is computed where it is used, once; otherwise it is written to a buffer
// first.
template <class F, bool biased, bool in_place>
class Input {
 public:
  explicit Input(const Block& block) : block_(block) {}

  // Calls function(x) for the next n elements.
  template <class Function>
  RELU_XP_ALWAYS_INLINE void next(std::size_t start, std::size_t /*n*/, Function function) {
    function(input<F>(block_, 0, start));
  }

 private:
  const Block& block_;
};

template <class F, bool in_place>
class Input<F, true, in_place> {
 public:
  using Word = WordOf<F>;

  explicit Input(const Block& block) : block_(block), bias_(*block.bias) {
    channel_ = block.first / bias_.run % bias_.channels;
    at_ = block.first % bias_.run;
    if (repeats()) {  // often enough that any block has its bias in one piece
      for (std::size_t i = 0; i < bias_.channels + kLanes<F>; ++i) {
        repeated_[i] = data()[i % bias_.channels];
      }
    }
  }

  template <class Function>
  RELU_XP_ALWAYS_INLINE void next(std::size_t start, std::size_t n, Function function) {
    const Word* x = input<F>(block_, 0, start);
    const Word* bias = next_bias(n);
    if constexpr (in_place) {
      function(Sum<F>{x, bias});
    } else {
      add<F>(x, bias, sum_, n);
      function(static_cast<const Word*>(sum_));
    }
  }

 private:
  bool repeats() const { return bias_.run == 1 && bias_.channels < kLanes<F>; }
  const Word* data() const { return reinterpret_cast<const Word*>(bias_.data); }

  const Word* next_bias(std::size_t n) {
    const std::size_t channel = channel_;
    if (repeats()) {
      channel_ = (channel + n) % bias_.channels;
      return repeated_ + channel;
    }
    if (bias_.run == 1 && channel + n <= bias_.channels) {
      channel_ = channel + n == bias_.channels ? 0 : channel + n;
      return data() + channel;
    }
    for (std::size_t i = 0; i < n;) {
      if (bias_.run == 1) {
        const std::size_t count = smaller(n - i, bias_.channels - channel_);
        memcpy(repeated_ + i, data() + channel_, count * sizeof(Word));
        i += count;
        channel_ = channel_ + count == bias_.channels ? 0 : channel_ + count;
        continue;
      }
      const std::size_t count = smaller(n - i, bias_.run - at_);
      const Word word = data()[channel_];
      for (std::size_t k = i; k < i + count; ++k) repeated_[k] = word;
      i += count;
      at_ += count;
      if (at_ == bias_.run) {
        at_ = 0;
        channel_ = channel_ + 1 == bias_.channels ? 0 : channel_ + 1;
      }
    }
    return repeated_;
  }

  const Block& block_;
  const Bias bias_;
  std::size_t channel_ = 0, at_ = 0;  // of the next element: its channel, its place in the run
  alignas(kLine) Word repeated_[2 * kLanes<F>];
  alignas(kLine) Word sum_[kLanes<F>];
};

// Adds elements, in blocks one after the other, to the sums of their channels.
template <class F>
class ChannelSums {
 public:
  explicit ChannelSums(const Sums& sums) : sums_(sums) {
    at_ = sums.start % sums.run;
    lane_ = at_ % sums.lanes;
    first_ = sums.start / sums.run * sums.lanes % sums.size;
  }

  RELU_XP_ALWAYS_INLINE void add(const WordOf<F>* x, std::size_t n) {
    if (sums_.size == 1) return add_to_one(x, n);
    if (n <= count_to_end()) return add_in_order(x, n);  // a loop whose length may be a constant
    for (std::size_t i = 0; i < n;) {
      const std::size_t count = smaller(n - i, count_to_end());
      add_in_order(x + i, count);
      i += count;
    }
  }

 private:
  // Elements of the channel that follow one another in lanes.
  std::size_t count_to_end() const { return smaller(sums_.run - at_, sums_.lanes - lane_); }

  // Each addition waits for the one before: the sum stays in a register meanwhile.
  RELU_XP_ALWAYS_INLINE void add_to_one(const WordOf<F>* x, std::size_t n) {
    using Wide = typename F::Wide;
    double total = *sums_.data;
    if constexpr (is_16_bit<F>) {
      Wide wide[kLanes<F>];
      widen(x, wide, n, F());
      for (std::size_t i = 0; i < n; ++i) total += wide[i];
    } else {
      for (std::size_t i = 0; i < n; ++i) total += bit_cast<Wide>(x[i]);
    }
    *sums_.data = total;
  }

  RELU_XP_ALWAYS_INLINE void add_in_order(const WordOf<F>* x, std::size_t n) {
    using Wide = typename F::Wide;
    double* to = sums_.data + first_ + lane_;
    if constexpr (is_16_bit<F>) {
      Wide wide[kLanes<F>];
      widen(x, wide, n, F());
      RELU_XP_INDEPENDENT
      for (std::size_t i = 0; i < n; ++i) to[i] += wide[i];
    } else {
      RELU_XP_INDEPENDENT
      for (std::size_t i = 0; i < n; ++i) to[i] += bit_cast<Wide>(x[i]);
    }
    at_ += n;
    lane_ = lane_ + n == sums_.lanes ? 0 : lane_ + n;
    if (at_ == sums_.run) {
      at_ = lane_ = 0;
      first_ = first_ + sums_.lanes == sums_.size ? 0 : first_ + sums_.lanes;
    }
  }

  const Sums sums_;
  // Of the next element: its place in the channel, its lane, and the channel's first lane.
  std::size_t at_ = 0, lane_ = 0, first_ = 0;
};

// ---- The function with four parameters ----------------------------------------------------------

// One activation in one format, and the products of a block.
template <class F, Variant variant>
class Activation {
 public:
  using Word = WordOf<F>;
  static constexpr bool general = variant == kGeneral || variant == kGeneralClipped;
  static constexpr bool has_a = general || variant == kLeaky;
  static constexpr bool has_b = general;
  static constexpr bool has_c = variant == kClipped || variant == kGeneralClipped;
  using Rule = Rules<F, general, has_a, has_b, has_c>;
  // Whether products are computed in the loop that uses them, or before it for the whole block. GCC
  // vectorizes such a loop only where its length is a constant.
  static constexpr bool inline_products = variant == kLeaky && !is_16_bit<F>;
  // Whether the loop that selects computes its input too: not where there are products of it.
  static constexpr bool in_place = !has_a && !is_16_bit<F>;

  explicit Activation(const Params& params)
      : rule_(static_cast<Word>(params.threshold), static_cast<Word>(params.max_value)),
        a_(static_cast<Word>(params.negative_slope)),
        b_(static_cast<Word>(params.positive_slope)) {}

  // `x` is an array of words, or a `Sum`.
  template <class X>
  RELU_XP_ALWAYS_INLINE void forward(X x, Word* y, std::size_t n) {
    const Rule rule = rule_;
    const Word* low = multiply_low(x, n);
    const Word* high = multiply_high(x, n);
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) {
      y[i] = rule.forward(x[i], low_at(low, x, i), has_b ? high[i] : Word(0));
    }
  }

  template <class X>
  RELU_XP_ALWAYS_INLINE void forward(X x, Word* y, Word* branches, std::size_t n) {
    const Rule rule = rule_;
    const Word* low = multiply_low(x, n);
    const Word* high = multiply_high(x, n);
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) {
      const Word value = x[i], its_high = has_b ? high[i] : Word(0);
      y[i] = rule.forward(value, low_at(low, x, i), its_high);
      branches[i] = rule.branch(value, its_high);
    }
  }

  RELU_XP_ALWAYS_INLINE void branches(const Word* x, Word* result, std::size_t n) {
    const Rule rule = rule_;
    const Word* high = has_c ? multiply_high(x, n) : nullptr;
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) {
      result[i] = rule.branch(x[i], has_b && has_c ? high[i] : Word(0));
    }
  }

  RELU_XP_ALWAYS_INLINE void backward(const Word* branches, const Word* dy, Word* dx,
                                      std::size_t n) {
    const Word* low = multiply_low(dy, n);
    const Word* high = multiply_high(dy, n);
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) {
      dx[i] = Rule::backward(branches[i], dy[i], low_at(low, dy, i), has_b ? high[i] : Word(0));
    }
  }

 private:
  // a * value of a block, or zeros.
  template <class Values>
  const Word* multiply_low(Values value, std::size_t n) {
    if constexpr (has_a && !inline_products) {
      if (!general || a_ != 0) multiply(a_, value, low_, n, F());
      return low_;
    }
    return nullptr;
  }

  template <class Values>
  Word low_at(const Word* low, Values value, std::size_t i) const {
    if constexpr (inline_products) return product<F>(a_, value[i]);
    return has_a ? low[i] : Word(0);
  }

  // b * value of a block, or the values themselves.
  template <class Values>
  const Word* multiply_high(Values value, std::size_t n) {
    if constexpr (has_b) {
      if (b_ == F::one) return value;
      multiply(b_, value, high_, n, F());
      return high_;
    }
    return nullptr;
  }

  Rule rule_;
  Word a_, b_;
  Word low_[has_a && !inline_products ? kLanes<F> : 1] = {};
  Word high_[has_b ? kLanes<F> : 1];
};

template <class F, Variant variant, bool biased>
void forward(const Params& params, const Block& block) {
  Activation<F, variant> activation(params);
  // Without products all elements can be one block (100,000 float32 with SSE: 9 us, else 14).
  if (!activation.has_a && !biased && !block.stream && block.prefetch == 0) {
    auto* y = reinterpret_cast<WordOf<F>*>(block.out);
    return activation.forward(input<F>(block, 0, 0), y, block.count);
  }
  Input<F, biased, activation.in_place> inputs(block);
  for_each_block<WordOf<F>>(
      block, [&](std::size_t start, std::size_t n, auto* y) __attribute__((always_inline)) {
        inputs.next(start, n,
                    [&](auto x) __attribute__((always_inline)) { activation.forward(x, y, n); });
      });
}

template <class F, Variant variant, bool biased>
void forward_bits(const Params& params, const Block& block) {
  Activation<F, variant> activation(params);
  Input<F, biased, activation.in_place> inputs(block);
  unsigned char* mask = block.mask + block.first / 8;  // where a byte begins
  for_each_block<WordOf<F>>(
      block, [&](std::size_t start, std::size_t n, auto* y) __attribute__((always_inline)) {
        Branches<F> branches;
        if constexpr (biased) {
          inputs.next(start, n, [&](auto x) __attribute__((always_inline)) {
            activation.forward(x, y, branches.words, n);
          });
        } else {  // the same, but 4 % faster beyond the caches
          activation.forward(input<F>(block, 0, start), y, branches.words, n);
        }
        pack<F>(branches, mask, start, n);
      });
}

template <class F, Variant variant, bool biased>
void branches(const Params& params, const Block& block) {
  Activation<F, variant> activation(params);
  Input<F, biased, false> inputs(block);
  for (std::size_t start = 0; start < block.count; start += kLanes<F>) {
    const std::size_t n = smaller(kLanes<F>, block.count - start);
    WordOf<F> words[kLanes<F>];
    inputs.next(start, n, [&](const WordOf<F>* x) __attribute__((always_inline)) {
      activation.branches(x, words, n);
    });
    to_bytes(words, block.mask + block.first + start, n);
  }
}

template <class F, Variant variant, bool bits, bool summed>
void backward(const Params& params, const Block& block) {
  Activation<F, variant> activation(params);
  ChannelSums<F> sums(summed ? *block.sums : Sums());
  for_each_block<WordOf<F>>(
      block, [&](std::size_t start, std::size_t n, auto* dx) __attribute__((always_inline)) {
        Branches<F> branches;
        if constexpr (bits) {
          unpack<F>(block.mask, block.first + start, branches, n);
        } else {
          from_bytes(block.mask + block.first + start, branches.words, n);
        }
        activation.backward(branches.words, input<F>(block, 0, start), dx, n);
        if constexpr (summed) sums.add(dx, n);
      });
}

template <class F, Variant variant>
void backward_from_input(const Params& params, const Block& block) {
  Activation<F, variant> activation(params);
  for_each_block<WordOf<F>>(
      block, [&](std::size_t start, std::size_t n, auto* dx) __attribute__((always_inline)) {
        alignas(kLine) WordOf<F> branches[kLanes<F>];
        activation.branches(input<F>(block, 1, start), branches, n);
        activation.backward(branches, input<F>(block, 0, start), dx, n);
      });
}

// ---- Other activations --------------------------------------------------------------------------

template <class F, bool from_mask>
void prelu(const Params& /*params*/, const Block& block) {
  using Word = WordOf<F>;
  for_each_block<Word>(
      block, [&](std::size_t start, std::size_t n, auto* y) __attribute__((always_inline)) {
        const Word* value = input<F>(block, 0, start);
        const Word* slope = input<F>(block, 1, start);
        const Word* x = from_mask ? nullptr : input<F>(block, 2, start);
        Word low[kLanes<F>], branches[kLanes<F>];
        if constexpr (from_mask) from_bytes(block.mask + block.first + start, branches, n);
        if constexpr (is_16_bit<F>) multiply(slope, value, low, n, F());
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) {
          const bool upper = from_mask ? branches[i] != kLower : above_zero<F>(x[i]);
          Word scaled;
          if constexpr (is_16_bit<F>) {
            scaled = low[i];
          } else {
            scaled = product<F>(slope[i], value[i]);
          }
          y[i] = upper ? value[i] : apply_slope<F>(slope[i], scaled);
        }
      });
}

template <class F>
void scale(const Params& /*params*/, const Block& block) {
  using Word = WordOf<F>;
  for_each_block<Word>(
      block, [&](std::size_t start, std::size_t n, auto* y) __attribute__((always_inline)) {
        const Word* value = input<F>(block, 0, start);
        const Word* slope = input<F>(block, 1, start);
        Word low[kLanes<F>];
        multiply(slope, value, low, n, F());
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) {
          y[i] = slope[i] == F::one ? value[i] : apply_slope<F>(slope[i], low[i]);
        }
      });
}

template <class F>
void squared_relu(const Params& /*params*/, const Block& block) {
  using Word = WordOf<F>;
  for_each_block<Word>(
      block, [&](std::size_t start, std::size_t n, auto* y) __attribute__((always_inline)) {
        const Word* x = input<F>(block, 0, start);
        Word square[kLanes<F>];
        multiply(x, x, square, n, F());
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) y[i] = above_zero<F>(x[i]) ? square[i] : Word(0);
      });
}

template <class F>
void squared_relu_backward(const Params& /*params*/, const Block& block) {
  using Word = WordOf<F>;
  for_each_block<Word>(
      block, [&](std::size_t start, std::size_t n, auto* dx) __attribute__((always_inline)) {
        const Word* x = input<F>(block, 0, start);
        const Word* dy = input<F>(block, 1, start);
        typename F::Wide gradient[kLanes<F>], factor[kLanes<F>];
        Word result[kLanes<F>];
        widen(x, gradient, n, F());
        widen(dy, factor, n, F());
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) gradient[i] = (gradient[i] + gradient[i]) * factor[i];
        narrow(gradient, result, n, F());
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) {
          dx[i] = above_zero<F>(x[i]) ? keep_nan<F>(x[i], result[i]) : Word(0);
        }
      });
}

template <class F>
void negated_relu(const Params& /*params*/, const Block& block) {
  for_each_block<WordOf<F>>(
      block, [&](std::size_t start, std::size_t n, auto* y) __attribute__((always_inline)) {
        const WordOf<F>* x = input<F>(block, 0, start);
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) y[i] = relu<F>(F::negate(x[i]));
      });
}

template <class F>
void crelu_mask(const Params& /*params*/, const Block& block) {
  for (std::size_t start = 0; start < block.count; start += kLanes<F>) {
    const std::size_t n = smaller(kLanes<F>, block.count - start);
    const WordOf<F>* x = input<F>(block, 0, start);
    WordOf<F> words[kLanes<F>];
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) words[i] = crelu_branch<F>(x[i]);
    to_bytes(words, reinterpret_cast<unsigned char*>(block.out) + start, n);
  }
}

template <class F>
void crelu_backward(const Params& /*params*/, const Block& block) {
  using Word = WordOf<F>;
  for_each_block<Word>(
      block, [&](std::size_t start, std::size_t n, auto* dx) __attribute__((always_inline)) {
        const Word* first = input<F>(block, 0, start);
        const Word* second = input<F>(block, 1, start);
        typename F::Wide wide[kLanes<F>], minus[kLanes<F>];
        Word branches[kLanes<F>], difference[kLanes<F>];
        from_bytes(reinterpret_cast<const unsigned char*>(block.in[2]) + start, branches, n);
        widen(first, wide, n, F());
        widen(second, minus, n, F());
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) wide[i] -= minus[i];
        narrow(wide, difference, n, F());
        RELU_XP_INDEPENDENT
        for (std::size_t i = 0; i < n; ++i) {
          dx[i] = crelu_backward<F>(branches[i], first[i], second[i], difference[i]);
        }
      });
}

template <class F>
void to_double(const Params& /*params*/, const Block& block) {
  double* out = reinterpret_cast<double*>(block.out);
  for (std::size_t start = 0; start < block.count; start += kLanes<F>) {
    const std::size_t n = smaller(kLanes<F>, block.count - start);
    typename F::Wide wide[kLanes<F>];
    widen(input<F>(block, 0, start), wide, n, F());
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < n; ++i) out[start + i] = wide[i];
  }
}

template <class F>
void sum_channels(const Params& /*params*/, const Block& block) {
  ChannelSums<F> sums(*block.sums);
  for (std::size_t start = 0; start < block.count; start += kLanes<F>) {
    sums.add(input<F>(block, 0, start), smaller(kLanes<F>, block.count - start));
  }
}

void weight_grad_terms(double* dy, const double* x, std::size_t count) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) {
    const double term = dy[i] * x[i];
    dy[i] = above_zero<Float64>(bit_cast<std::uint64_t>(x[i])) ? 0.0 : term;
  }
}

void add(double* total, const double* terms, std::size_t count) {
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) total[i] += terms[i];
}

// ---- Integers -----------------------------------------------------------------------------------

// Products wrap around, as NumPy's do.
template <class T>
inline T wrapping_product(std::uint64_t slope, T x) {
  return static_cast<T>(slope * static_cast<std::uint64_t>(x));
}

template <class T>
void forward_integer(const Params& params, const Block& block) {
  const T* x = reinterpret_cast<const T*>(block.in[0]);
  T* y = reinterpret_cast<T*>(block.out);
  const T t = static_cast<T>(params.threshold), c = static_cast<T>(params.max_value);
  const std::uint64_t a = params.negative_slope, b = params.positive_slope;
  const std::size_t count = block.count;  // which a store to y might change
  if (a == 0 && b == 1) {
    RELU_XP_INDEPENDENT
    for (std::size_t i = 0; i < count; ++i) {
      const T high = x[i] < c ? x[i] : c;
      y[i] = x[i] > t ? high : T(0);
    }
    return;
  }
  RELU_XP_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) {
    const T low = wrapping_product(a, x[i]), product = wrapping_product(b, x[i]);
    const T high = product < c ? product : c;
    y[i] = x[i] > t ? high : low;
  }
}

// ---- The table ----------------------------------------------------------------------------------

// The branches do not depend on the negative slope, and a gradient not on the maximum.
template <class F, Variant variant, Variant for_branches, Variant for_gradient>
constexpr void fill_variant(Kernel (&table)[kOperations][kVariants]) {
  table[kForward][variant] = forward<F, variant, false>;
  table[kForwardBits][variant] = forward_bits<F, variant, false>;
  table[kBranches][variant] = branches<F, for_branches, false>;
  table[kBackwardFromInput][variant] = backward_from_input<F, variant>;
  table[kBackwardBits][variant] = backward<F, for_gradient, true, false>;
  table[kBackwardBytes][variant] = backward<F, for_gradient, false, false>;
}

// With a bias a general variant serves all that are not plain: with a kernel for each the module is
// a quarter larger (3.5 MB instead of 2.7), and takes as much longer to compile. Bytes are of three
// branches.
template <class F, Variant variant, Variant general, Variant for_gradient>
constexpr void fill_bias_variant(Kernel (&table)[kOperations][kVariants]) {
  table[kBiasForward][variant] = forward<F, general, true>;
  table[kBiasForwardBits][variant] = forward_bits<F, general, true>;
  table[kBiasBranches][variant] = branches<F, kGeneralClipped, true>;
  table[kBackwardBitsSum][variant] = backward<F, for_gradient, true, true>;
  table[kBackwardBytesSum][variant] = backward<F, kGeneral, false, true>;
}

template <class F>
constexpr void fill(Kernel (&table)[kOperations][kVariants]) {
  fill_variant<F, kPlain, kPlain, kPlain>(table);
  fill_variant<F, kLeaky, kPlain, kLeaky>(table);
  fill_variant<F, kClipped, kClipped, kPlain>(table);
  fill_variant<F, kGeneral, kGeneral, kGeneral>(table);
  fill_variant<F, kGeneralClipped, kGeneralClipped, kGeneral>(table);
  fill_bias_variant<F, kPlain, kPlain, kPlain>(table);
  fill_bias_variant<F, kLeaky, kGeneral, kGeneral>(table);
  fill_bias_variant<F, kClipped, kGeneralClipped, kPlain>(table);
  fill_bias_variant<F, kGeneral, kGeneral, kGeneral>(table);
  fill_bias_variant<F, kGeneralClipped, kGeneralClipped, kGeneral>(table);
  table[kPrelu][kPlain] = prelu<F, false>;
  table[kPreluBytes][kPlain] = prelu<F, true>;
  table[kScale][kPlain] = scale<F>;
  table[kSquaredRelu][kPlain] = squared_relu<F>;
  table[kSquaredReluBackward][kPlain] = squared_relu_backward<F>;
  table[kNegatedRelu][kPlain] = negated_relu<F>;
  table[kCreluMask][kPlain] = crelu_mask<F>;
  table[kCreluBackward][kPlain] = crelu_backward<F>;
  table[kToDouble][kPlain] = to_double<F>;
  table[kSumChannels][kPlain] = sum_channels<F>;
}

constexpr KernelTable make_table() {
  KernelTable table{};
  fill<Float16>(table.floating[kFloat16]);
  fill<BFloat16>(table.floating[kBFloat16]);
  fill<Float32>(table.floating[kFloat32]);
  fill<Float64>(table.floating[kFloat64]);
  table.integer[0] = forward_integer<std::int8_t>;
  table.integer[1] = forward_integer<std::uint8_t>;
  table.integer[2] = forward_integer<std::int16_t>;
  table.integer[3] = forward_integer<std::uint16_t>;
  table.integer[4] = forward_integer<std::int32_t>;
  table.integer[5] = forward_integer<std::uint32_t>;
  table.integer[6] = forward_integer<std::int64_t>;
  table.integer[7] = forward_integer<std::uint64_t>;
  table.weight_grad_terms = weight_grad_terms;
  table.add = add;
  return table;
}

}  // namespace

namespace RELU_XP_TARGET {
// Constant, so that no code of this instruction set runs before it is known that the processor has
// it.
extern constexpr KernelTable kernels = make_table();
}  // namespace RELU_XP_TARGET

}  // namespace relu_xp
