// What CUDA source needs to be compiled and run by a C++ compiler: see cupy_host.py. It precedes
// the source that CuPy generates. Kernels run on one warp, whose threads are coroutines: each runs
// until it votes, shuffles or ends; then the next one runs.

#include <setjmp.h>
#include <ucontext.h>

#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using std::ptrdiff_t;
#define __CUDACC_VER_MAJOR__ 13
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline

struct Dimension {
  unsigned int x;
};
static Dimension blockIdx = {0}, threadIdx = {0};
static const Dimension blockDim = {32}, gridDim = {1};

inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline float min(float a, float b) { return a < b ? a : b; }
inline float max(float a, float b) { return a > b ? a : b; }

namespace host {

constexpr int warp = 32;
static jmp_buf scheduler, threads[warp];
// Contexts only start a thread: to swap two of them takes a call of the operating system, which is
// a hundred times slower than a jump.
static ucontext_t contexts[warp];
static char stacks[warp][1 << 16];
static bool started[warp], ended[warp];
static unsigned int calls[warp], values[2][warp];

__attribute__((noinline)) static void resume(int lane) {
  threadIdx.x = lane;
  if (_setjmp(scheduler)) return;
  if (started[lane]) _longjmp(threads[lane], 1);
  started[lane] = true;
  setcontext(&contexts[lane]);
}

__attribute__((noinline)) static void yield_to_scheduler(int lane) {
  if (!_setjmp(threads[lane])) _longjmp(scheduler, 1);
}

// Return the slot of `values` with what each thread has given to this call. When a thread resumes,
// all that its mask names must have reached the same call.
static unsigned int exchange(unsigned int mask, unsigned int value) {
  const int lane = threadIdx.x;
  const unsigned int call = calls[lane]++;
  values[call % 2][lane] = value;
  yield_to_scheduler(lane);
  for (int other = 0; other < warp; ++other) {
    if ((mask >> other & 1) && calls[other] <= call) {
      std::fprintf(stderr, "thread %d waits for %d, which does not arrive\n", lane, other);
      std::abort();
    }
  }
  if (!(mask >> lane & 1)) std::abort();
  return call % 2;
}

template <class Body>
void run(Body body) {
  static Body* current;
  current = &body;
  for (int lane = 0; lane < warp; ++lane) {
    started[lane] = ended[lane] = false;
    calls[lane] = 0;
    getcontext(&contexts[lane]);
    contexts[lane].uc_stack.ss_sp = stacks[lane];
    contexts[lane].uc_stack.ss_size = sizeof(stacks[lane]);
    void (*entry)() = [] {
      (*current)();
      ended[threadIdx.x] = true;
      _longjmp(scheduler, 1);
    };
    makecontext(&contexts[lane], entry, 0);
  }
  for (int left = warp; left;) {
    left = 0;
    for (int lane = 0; lane < warp; ++lane) {
      if (!ended[lane]) resume(lane);
      left += !ended[lane];
    }
  }
}

}  // namespace host

inline unsigned int __ballot_sync(unsigned int mask, int vote) {
  const unsigned int slot = host::exchange(mask, vote != 0);
  unsigned int all = 0;
  for (int lane = 0; lane < host::warp; ++lane) {
    if (mask >> lane & 1) all |= host::values[slot][lane] << lane;
  }
  return all;
}

inline unsigned int __shfl_down_sync(unsigned int mask, unsigned int value, int by) {
  const unsigned int slot = host::exchange(mask, value);
  const int lane = threadIdx.x + by;
  if (lane >= host::warp) return value;
  return mask >> lane & 1 ? host::values[slot][lane] : 0xdeadbeefu;  // undefined on a device
}

inline double __shfl_down_sync(unsigned int mask, double value, int by) {
  unsigned int words[2];
  std::memcpy(words, &value, sizeof(value));
  for (unsigned int& word : words) word = __shfl_down_sync(mask, word, by);
  std::memcpy(&value, words, sizeof(value));
  return value;
}

#include <cupy/carray.cuh>
