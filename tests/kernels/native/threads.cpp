// The thread pool under load, for the sanitizers: sixteen threads call it at once, with large and
// small arrays and in two rounding modes, while another one changes the number of threads;
// meanwhile the process forks and the child calls it too; at last it is shut down while calls are
// being made.
//
//   threads ROUNDS FORKS    exits with 1 where a call has left elements out, or rounded wrongly

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu_kernels.h"
#include "thread_pool.h"

namespace {

using relu_xp::ThreadPool;

constexpr int kCallers = 16;
constexpr std::size_t kStep = 4096;

#ifdef RELU_XP_X86
const relu_xp::KernelTable& table = relu_xp::v2::kernels;
#else
const relu_xp::KernelTable& table = relu_xp::baseline::kernels;
#endif

std::atomic<bool> failed{false};
std::atomic<int> calls{0};

struct Call {
  std::vector<float> x, y;
  std::vector<unsigned char> mask;
  int rounding;
};

void forward(void* context, std::size_t begin, std::size_t end) {
  auto& call = *static_cast<Call*>(context);
  if (std::fegetround() != call.rounding) failed = true;  // a worker's is its caller's
  relu_xp::Params params{};
  params.positive_slope = 0x3f800000;
  params.dtype = relu_xp::kFloat32;
  relu_xp::Block block{};
  block.in[0] = reinterpret_cast<const char*>(call.x.data() + begin);
  block.out = reinterpret_cast<char*>(call.y.data() + begin);
  block.mask = call.mask.data() + begin / 8;
  block.count = end - begin;
  table.floating[relu_xp::kFloat32][relu_xp::kForwardBits][relu_xp::kPlain](params, block);
}

void check(std::size_t count, int seed) {
  Call call{std::vector<float>(count), std::vector<float>(count, -1.0f),
            std::vector<unsigned char>((count + 7) / 8), seed % 2 == 0 ? FE_TONEAREST : FE_UPWARD};
  std::fesetround(call.rounding);
  for (std::size_t i = 0; i < count; ++i) {
    call.x[i] =
        static_cast<float>(static_cast<int>((i * 7 + static_cast<std::size_t>(seed)) % 13) - 6);
  }
  ThreadPool::instance()->parallel_for(count, kStep, 4 * kStep, forward, &call);
  for (std::size_t i = 0; i < count; ++i) {
    const bool kept = (call.mask[i / 8] >> (i % 8) & 1) != 0;
    if (kept != (call.x[i] > 0) || call.y[i] != (kept ? call.x[i] : 0.0f)) failed = true;
  }
  ++calls;
}

void call_many_times(int caller, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    check(static_cast<std::size_t>(1000 + 23456 * ((caller + round) % 5)), caller + round);
  }
}

// Whether a child of this process gets its calls done; those of the parent go on meanwhile.
bool fork_and_call() {
  const pid_t child = fork();
  if (child == 0) {
    check(100000, 3);
    _exit(failed ? 1 : 0);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc == 3 ? static_cast<int>(std::strtol(argv[1], nullptr, 10)) : 0;
  const int forks = argc == 3 ? static_cast<int>(std::strtol(argv[2], nullptr, 10)) : 0;
  if (rounds < 1) {
    std::fprintf(stderr, "threads: the numbers of rounds and of forks must be given\n");
    return 2;
  }
  ThreadPool::set_threads(4);
  std::vector<std::thread> callers;
  callers.reserve(kCallers);
  std::atomic<bool> done{false};
  std::thread changer([&] {
    for (int i = 0; !done; ++i) {
      ThreadPool::set_threads(1 + i % 6);
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  for (int i = 0; i < kCallers; ++i) callers.emplace_back(call_many_times, i, rounds);
  for (int i = 0; i < forks; ++i) {
    if (!fork_and_call()) failed = true;
  }
  for (std::thread& caller : callers) caller.join();
  callers.clear();
  for (int i = 0; i < kCallers; ++i) callers.emplace_back(call_many_times, i, rounds);
  ThreadPool::instance()->shut_down();
  for (std::thread& caller : callers) caller.join();
  done = true;
  changer.join();
  if (!fork_and_call()) failed = true;  // a child has a pool again
  std::printf("%d calls of %d threads%s\n", calls.load(), kCallers, failed ? ": WRONG" : "");
  return failed ? 1 : 0;
}
