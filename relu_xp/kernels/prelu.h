// What PReLU needs beside its elementwise kernels.

#ifndef RELU_XP_PRELU_H
#define RELU_XP_PRELU_H

#include <atomic>

#include "strided.h"

namespace relu_xp {

// Whether `run_channels` may run a job of kPrelu, whose slopes stay the same over long runs.
bool has_channels(const Job& job);

// Runs it as `run_job` does; each run of elements with one slope is a leaky ReLU.
void run_channels(void* context, std::size_t begin, std::size_t end);

// The gradient of PReLU's slopes: the sum of dy * x over all x at or below 0, in float64. The shape
// alone decides the order of additions, which is that of relu_xp.backends.numpy: parts of whole
// rows of the first axis are summed by themselves, axis by axis, and then added in turn.
class WeightGrad {
 public:
  WeightGrad(Kernel dy_to_double, Kernel x_to_double)
      : dy_to_double_(dy_to_double), x_to_double_(x_to_double) {}

  Job& job() { return job_; }  // operands dy and x, to be laid out in C order

  // To be called once the job is laid out; `sum_shape` has the length 1 along axes that are summed.
  void set_shape(const std::ptrdiff_t* sum_shape);
  std::ptrdiff_t parts() const { return (rows_ + step_ - 1) / step_; }
  // Doubles for the sums of all parts.
  std::ptrdiff_t num_partial_sums() const { return parts() * part_sums_; }
  void set_partial_sums(double* sums) { partial_sums_ = sums; }

  // Sums some of the parts of the context, a WeightGrad: in any order, from any thread.
  static void run(void* context, std::size_t begin, std::size_t end);
  // Adds the sums of all parts to `total`; returns false if a part had no memory.
  bool add_parts(double* total) const;

 private:
  void write_terms(std::ptrdiff_t first, std::ptrdiff_t count, double* terms) const;
  std::ptrdiff_t reduce(std::ptrdiff_t rows, double* terms) const;
  std::ptrdiff_t rows_of(std::ptrdiff_t part) const;

  Job job_{};
  Kernel dy_to_double_, x_to_double_;
  bool summed_[kMaxDims] = {};    // axes
  bool rows_summed_ = false;      // the first axis
  std::ptrdiff_t rows_ = 0;       // of the first axis
  std::ptrdiff_t row_size_ = 0;   // elements of one
  std::ptrdiff_t row_sums_ = 0;   // sums of one
  std::ptrdiff_t step_ = 0;       // rows of a part
  std::ptrdiff_t part_sums_ = 0;  // sums of a whole part
  double* partial_sums_ = nullptr;
  std::atomic<bool> no_memory_{false};
};

}  // namespace relu_xp

#endif
