// A fork-join pool of worker threads for the CPU kernels.

#ifndef RELU_XP_THREAD_POOL_H
#define RELU_XP_THREAD_POOL_H

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace relu_xp {

// One caller at a time uses the workers; a caller that finds them busy works alone, since the
// processors are busy as well. Between two calls a worker spins for a while, since to be woken
// takes longer than most jobs, and then waits for a condition variable.
//
// The pool is never destroyed: at exit `shut_down` joins the workers, and after a fork the child
// gets a new pool and leaves the old one, whose threads it does not have, alone.
class ThreadPool {
 public:
  using Task = void (*)(void* context, std::size_t begin, std::size_t end);

  // The pool of this process, made at the first call, also in a child after a fork. Null if there
  // is no memory for it.
  static ThreadPool* instance();

  ThreadPool() = default;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls task(context, begin, end) for parts of [0, count), from this thread and from workers, and
  // returns when all of them are done. A part begins at a multiple of `step` and has `part`
  // elements at most, a multiple of `step` too. The task must not throw.
  void parallel_for(std::size_t count, std::size_t step, std::size_t part, Task task,
                    void* context);

  // Threads that take part in a call, the caller included; of this process and its children.
  static int threads() { return threads_; }
  static void set_threads(int threads) { threads_ = threads; }

  // Joins the workers. Calls that come later run on their caller's thread alone.
  void shut_down();

 private:
  // What a call asks for; written while no worker is active.
  struct Job {
    Task task;
    void* context;
    std::size_t count;
    std::size_t part;  // elements taken at a time
    std::size_t
        share;  // elements of a thread, the same in each call: its cache may still hold them
    int threads;
    std::fenv_t environment;  // the caller's: a worker rounds, and keeps subnormals, as it does
  };
  // How far a thread's share has been taken, by itself or by those who have finished theirs.
  struct alignas(64) Progress {
    std::atomic<std::size_t> next{0};
  };

  bool start_workers(int threads);
  void run_worker(int number, std::uint64_t seen);
  void work(int number);

  static std::atomic<int> threads_;
  std::atomic<bool> busy_{false};  // a caller owns job_ and workers_
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> open_{false};  // workers may begin
  std::atomic<int> active_{0};     // workers that may look at job_
  std::atomic<bool> stop_{false};
  std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  Job job_{};
  std::unique_ptr<Progress[]> progress_;
  int progress_size_ = 0;
  std::vector<std::thread> workers_;
};

}  // namespace relu_xp

#endif
