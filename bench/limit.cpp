// What the memory of a machine can do: the loops that bench/cpu.py compares the kernels with. They
// do one thing each, on arrays that lie dense in memory, and leave out all that the kernels owe to
// their callers: NaN, other dtypes, slopes, strides, odd sizes of a mask, small arrays.
//
// bench/cpu.py compiles this file for x86-64-v4 and loads it by ctypes.

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>

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

struct Job {
  Operation operation;
  std::size_t itemsize;
  const char* in;
  char* out;
  unsigned char* mask;
  std::size_t n;
};

template <typename Format>
void run_chunk(const Job& job, std::size_t start) {
  using Element = typename Format::Element;
  constexpr void (*chunks[])(const Element*, Element*, unsigned char*, std::size_t) = {
      run_chunk<Format, kForward>, run_chunk<Format, kForwardWithMask>,
      run_chunk<Format, kBackward>};
  chunks[job.operation](reinterpret_cast<const Element*>(job.in) + start,
                        reinterpret_cast<Element*>(job.out) + start, job.mask + start / 8,
                        std::min(kChunk, job.n - start));
}

// The threads wait for a job, which they share by chunks with the thread that brings it.
struct Pool {
  std::mutex mutex;
  std::condition_variable started;
  unsigned jobs = 0;
  Job job{};
  std::atomic<std::size_t> next{0};
  std::atomic<int> busy{0};

  void work() {
    for (std::size_t start; (start = next.fetch_add(kChunk)) < job.n;) {
      job.itemsize == sizeof(float) ? run_chunk<Float32>(job, start)
                                    : run_chunk<Float16>(job, start);
    }
  }
  void wait_and_work() {
    for (unsigned done = 0;; ++done) {
      std::unique_lock<std::mutex> lock(mutex);
      started.wait(lock, [&] { return jobs != done; });
      lock.unlock();
      work();
      --busy;
    }
  }
};

Pool* const pool = new Pool;  // never destroyed: its threads wait until the process ends
std::thread* workers = nullptr;
int count = 0;

}  // namespace

extern "C" void start(int threads) {
  count = threads - 1;
  workers = new std::thread[count];
  for (int k = 0; k < count; ++k) workers[k] = std::thread(&Pool::wait_and_work, pool);
}

extern "C" void run(int operation, std::size_t itemsize, const char* in, char* out,
                    unsigned char* mask, std::size_t n) {
  // Each worker to a CPU of its own, that no two threads share one while another is idle.
  cpu_set_t cpus;
  sched_getaffinity(0, sizeof cpus, &cpus);
  for (int k = 0, cpu = 0, caller = sched_getcpu(); k < count && cpu < CPU_SETSIZE; ++cpu) {
    if (cpu == caller || !CPU_ISSET(cpu, &cpus)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(workers[k++].native_handle(), sizeof one, &one);
  }
  {
    const std::lock_guard<std::mutex> lock(pool->mutex);
    pool->job = {static_cast<Operation>(operation), itemsize, in, out, mask, n};
    pool->next = 0;
    pool->busy = count;
    ++pool->jobs;
  }
  pool->started.notify_all();
  pool->work();
  while (pool->busy) _mm_pause();
}
