// What the memory of a machine can do: the loops that bench/cpu.py compares the kernels with. They
// do one thing each, on arrays that are dense in memory, and omit what the kernels must handle
// beside it: NaN, other dtypes, slopes, strides, odd sizes of a mask, small arrays.
//
// bench/baselines.py compiles this file for x86-64-v4, with OpenMP, and loads it by ctypes.

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

enum Operation { kForward, kForwardWithMask, kBackward };

constexpr std::size_t kLine = 64;
constexpr std::size_t kAhead = 4096;  // bytes; the processor's own prefetcher stops at a page's end
constexpr std::size_t kChunk = 1 << 16;  // elements, which a thread takes at a time

// One line of elements: which are above 0, and those alone.
struct Float32 {
  using Element = float;
  static std::uint32_t above(__m512i x) {
    return _mm512_cmp_ps_mask(_mm512_castsi512_ps(x), _mm512_setzero_ps(), _CMP_GT_OQ);
  }
  static __m512i select(std::uint32_t bits, __m512i x) {
    return _mm512_maskz_mov_epi32(static_cast<__mmask16>(bits), x);
  }
};
struct Float16 {
  using Element = std::int16_t;  // compared as an integer
  static std::uint32_t above(__m512i x) {
    return _mm512_cmpgt_epi16_mask(x, _mm512_setzero_si512());
  }
  static __m512i select(std::uint32_t bits, __m512i x) { return _mm512_maskz_mov_epi16(bits, x); }
};

// `mask` has a bit for each of the n elements, and 8 more bytes that may be read.
template <typename Format, Operation operation, typename Element = typename Format::Element>
void run_chunk(const Element* in, Element* out, unsigned char* mask, std::size_t n) {
  constexpr std::size_t lanes = kLine / sizeof(Element);
  std::uint64_t word = 0;  // bits that are not yet stored, `fill` of them
  unsigned fill = 0;
  const auto put = [&](std::uint64_t bits, unsigned count) {
    word |= bits << fill;
    fill += count;
    if (fill >= 32) {
      const auto full = static_cast<std::uint32_t>(word);
      std::memcpy(mask, &full, sizeof full);
      mask += sizeof full;
      word >>= 32;
      fill -= 32;
    }
  };
  const auto get = [&](std::size_t i) {
    std::uint64_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof bits);
    return static_cast<std::uint32_t>(bits >> (i % 8));
  };
  const auto element = [&](std::size_t i) {
    const bool above = operation == kBackward ? get(i) & 1 : in[i] > 0;
    out[i] = above ? in[i] : Element(0);
    if (operation == kForwardWithMask) put(above, 1);
  };

  std::size_t i = 0;
  while (i < n && reinterpret_cast<std::uintptr_t>(out + i) % kLine) element(i++);
  for (; i + lanes <= n; i += lanes) {
    _mm_prefetch(reinterpret_cast<const char*>(in + i) + kAhead, _MM_HINT_T0);
    const __m512i line = _mm512_loadu_si512(in + i);
    const std::uint32_t bits = operation == kBackward ? get(i) : Format::above(line);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), Format::select(bits, line));
    if (operation == kForwardWithMask) put(bits, lanes);
  }
  while (i < n) element(i++);
  std::memcpy(mask, &word, (fill + 7) / 8);
  _mm_sfence();
}

// Moves this thread, the k-th, to the k-th CPU other than the caller's: two threads must not share
// one while another is idle.
void pin(int k, int caller, const cpu_set_t& cpus) {
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (cpu == caller || !CPU_ISSET(cpu, &cpus) || --k) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
  }
}

template <typename Format, typename Element = typename Format::Element>
void run_all(int operation, const void* in, void* out, unsigned char* mask, std::size_t n,
             int threads) {
  constexpr void (*chunks[])(const Element*, Element*, unsigned char*, std::size_t) = {
      run_chunk<Format, kForward>, run_chunk<Format, kForwardWithMask>,
      run_chunk<Format, kBackward>};
  cpu_set_t cpus;
  sched_getaffinity(0, sizeof cpus, &cpus);
  const int caller = sched_getcpu();
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_thread_num()) pin(omp_get_thread_num(), caller, cpus);
#pragma omp for schedule(dynamic)
    for (std::size_t start = 0; start < n; start += kChunk) {
      chunks[operation](static_cast<const Element*>(in) + start, static_cast<Element*>(out) + start,
                        mask + start / 8, std::min(kChunk, n - start));
    }
  }
}

}  // namespace

extern "C" void run(int operation, std::size_t itemsize, const void* in, void* out,
                    unsigned char* mask, std::size_t n, int threads) {
  const auto all = itemsize == sizeof(float) ? run_all<Float32> : run_all<Float16>;
  all(operation, in, out, mask, n, threads);
}
