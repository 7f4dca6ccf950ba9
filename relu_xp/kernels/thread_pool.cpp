#include "thread_pool.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <system_error>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace relu_xp {
namespace {

// Time from one job of a training step to the next is mostly less.
constexpr std::chrono::microseconds kSpin{500};
// Looks, some 50 ns each, after which a waiting thread lets another one have its processor: it may
// be the one that it waits for.
constexpr int kLooksBeforeYield = 16;
void pause_or_yield(int& looks) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
  if (++looks % kLooksBeforeYield == 0) std::this_thread::yield();
}

// A plain pointer: nothing runs at exit.
std::atomic<ThreadPool*> current{nullptr};

#ifndef _WIN32
// The child has no workers, and cannot know what their locks were held for: it gets a new pool.
void forget_pool() { current = nullptr; }
#endif

}  // namespace

std::atomic<int> ThreadPool::threads_{1};

ThreadPool* ThreadPool::instance() {
#ifndef _WIN32
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  if (registered != 0) return nullptr;
#endif
  ThreadPool* pool = current;
  if (pool != nullptr) return pool;
  auto* fresh = new (std::nothrow) ThreadPool;
  if (fresh == nullptr || current.compare_exchange_strong(pool, fresh)) return fresh;
  delete fresh;  // another thread was first
  return pool;
}

void ThreadPool::parallel_for(std::size_t count, std::size_t step, std::size_t part, Task task,
                              void* context) {
  const int threads = static_cast<int>(
      std::min<std::size_t>(static_cast<std::size_t>(threads_), (count + step - 1) / step));
  bool idle = false;
  if (threads < 2 || !busy_.compare_exchange_strong(idle, true)) {
    task(context, 0, count);
    return;
  }
  if (stop_ || !start_workers(threads)) {
    busy_ = false;
    task(context, 0, count);
    return;
  }
  const auto shares = static_cast<std::size_t>(threads);
  const std::size_t steps = (count + step - 1) / step;
  const std::size_t share = (steps + shares - 1) / shares * step;
  job_ = {task, context, count, std::min(share, part), share, threads, {}};
  std::fegetenv(&job_.environment);
  for (int i = 0; i < threads; ++i) progress_[i].next = 0;
  open_ = true;
  ++generation_;
  if (sleeping_ > 0) {
    const std::scoped_lock lock(mutex_);
    wake_.notify_all();
  }
  work(0);
  open_ = false;
  // A worker counts itself active before it looks whether the job is open: from here on none
  // begins.
  for (int looks = 0; active_ != 0;) pause_or_yield(looks);
  busy_ = false;
}

void ThreadPool::shut_down() {
  stop_ = true;
  bool idle = false;
  for (int looks = 0; !busy_.compare_exchange_strong(idle, true); idle = false) {
    pause_or_yield(looks);
  }
  {
    const std::scoped_lock lock(mutex_);
    wake_.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  busy_ = false;
}

// Whether there is at least one worker; there may be fewer than asked for, if the system has no
// more.
bool ThreadPool::start_workers(int threads) {
  try {
    if (progress_size_ < threads) {
      progress_ = std::make_unique<Progress[]>(static_cast<std::size_t>(threads));
      progress_size_ = threads;
    }
    while (static_cast<int>(workers_.size()) < threads - 1) {
      const int number = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back(&ThreadPool::run_worker, this, number, generation_.load());
    }
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  return !workers_.empty() && progress_size_ >= threads;
}

void ThreadPool::run_worker(int number, std::uint64_t seen) {
  while (true) {
    const auto sleep_at = std::chrono::steady_clock::now() + kSpin;
    for (int looks = 0; generation_ == seen && !stop_;) {
      pause_or_yield(looks);
      if (looks % kLooksBeforeYield == 0 && std::chrono::steady_clock::now() > sleep_at) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return generation_ != seen || stop_; });
        --sleeping_;
      }
    }
    if (stop_) return;
    seen = generation_;
    ++active_;
    if (open_ && number < job_.threads) {
      std::fesetenv(&job_.environment);
      work(number);
    }
    --active_;
  }
}

// Takes parts of this thread's share, and then of the others'.
void ThreadPool::work(int number) {
  for (int i = 0; i < job_.threads; ++i) {
    const int owner = (number + i) % job_.threads;
    const std::size_t begin = static_cast<std::size_t>(owner) * job_.share;
    const std::size_t end = std::min(begin + job_.share, job_.count);
    while (true) {
      const std::size_t at = begin + progress_[owner].next.fetch_add(job_.part);
      if (at >= end) break;
      job_.task(job_.context, at, std::min(at + job_.part, end));
    }
  }
}

}  // namespace relu_xp
