// The gradients of parameters, which are sums over the elements of arrays: in float64, in an order
// that the shape alone decides, which is that of relu_xp.backends.numpy. Knows nothing of Python.

#ifndef RELU_XP_GRADIENT_SUMS_H
#define RELU_XP_GRADIENT_SUMS_H

#include <atomic>

#include "strided.h"

namespace relu_xp {

// The gradient of PReLU's slopes: the sum of dy * x over all x at or below 0. Parts of whole rows
// of the first axis are summed by themselves, axis by axis, and then added in turn.
class WeightGrad {
 public:
  WeightGrad(Kernel dy_to_double, Kernel x_to_double)
      : dy_to_double_(dy_to_double), x_to_double_(x_to_double) {}

  Job& job() { return job_; }  // operands dy and x, to be laid out in C order

  // To be called once the job is laid out; `sum_shape` has the length 1 along axes that are summed.
  void set_shape(const std::ptrdiff_t* sum_shape);
  std::ptrdiff_t units() const { return (rows_ + step_ - 1) / step_; }
  std::ptrdiff_t num_partial_sums() const { return units() * part_sums_; }
  void set_partial_sums(double* sums) { partial_sums_ = sums; }
  double* partial_sums() const { return partial_sums_; }

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
  bool summed_[kMaxDims] = {};      // axes
  bool rows_summed_ = false;        // the first axis
  std::ptrdiff_t rows_ = 0;         // of the first axis
  std::ptrdiff_t row_size_ = 0;     // elements of one
  std::ptrdiff_t row_sums_ = 0;     // sums of one
  std::ptrdiff_t step_ = 0;         // rows of a part
  std::ptrdiff_t part_sums_ = 0;    // sums of a whole part
  double* partial_sums_ = nullptr;  // of all parts
  std::atomic<bool> no_memory_{false};
};

// Where in memory the axis of the channels is, the other axes being in C order: it is in C order
// too, or the last one, or the first one.
enum Channels { kInOrder, kLast, kFirst };

// The backward pass of a bias and ReLU: dx, and its sum over all axes but one.
//
// An array is outer x channels x inner elements. A line of it is one of the outer rows, or several
// of them if they are short; some lines in turn are a part. The elements of a channel are added to
// several lanes, in turn, in all lines of a part. Then the lanes of a channel are added to one sum,
// and the sums of all parts in turn. Threads share the parts, and segments of the channels.
//
// Where the channels are last in memory, elements that follow one another belong to different
// channels. Then all lanes of a part are kept until the end, and threads share segments of them.
// Where they are first, threads share segments of all pairs of a channel and a part, which follow
// one another.
class BiasGrad {
 public:
  // `kernel` computes dx and adds it to sums, if both passes are one, or else adds it alone.
  BiasGrad(const Params* params, Kernel kernel) : params_(params), kernel_(kernel) {}

  // Operand dx, and dy if both passes are one: both contiguous then, in one order of axes.
  Job& job() { return job_; }
  void set_mask(unsigned char* mask) { mask_ = mask; }
  void set_shape(const std::ptrdiff_t* shape, int ndim, int axis, Channels order);
  std::ptrdiff_t units() const { return order_ == kFirst ? segments_ : parts_ * segments_; }
  std::ptrdiff_t num_partial_sums() const {
    return parts_ * channels_ * (order_ == kLast ? rows_ * lanes_ : 1);
  }
  void set_partial_sums(double* sums) { partial_sums_ = sums; }
  double* partial_sums() const { return partial_sums_; }

  // Computes some of the units of the context, a BiasGrad: in any order, from any thread.
  static void run(void* context, std::size_t begin, std::size_t end);
  // Adds the sums of all parts to `total`; returns true, since no part needs memory.
  bool add_parts(double* total) const;

 private:
  void run_last(std::ptrdiff_t part, std::ptrdiff_t segment) const;
  void run_first(std::ptrdiff_t segment, double* lanes) const;
  void run_unit(std::ptrdiff_t part, std::ptrdiff_t segment, double* lanes) const;
  void add_elements(std::ptrdiff_t first, std::ptrdiff_t count, Sums sums,
                    std::ptrdiff_t before = 0) const;

  const Params* params_;
  Kernel kernel_;
  Job job_{};
  unsigned char* mask_ = nullptr;
  std::ptrdiff_t size_ = 0, channels_ = 0, inner_ = 0;
  std::ptrdiff_t rows_ = 0, line_size_ = 0;  // of a line
  std::ptrdiff_t lanes_ = 0;                 // of a channel
  std::ptrdiff_t part_lines_ = 0, parts_ = 0;
  std::ptrdiff_t segment_size_ = 0, segments_ = 0;  // in channels, lanes or pairs
  Channels order_ = kInOrder;
  double* partial_sums_ = nullptr;  // of all parts
};

}  // namespace relu_xp

#endif
