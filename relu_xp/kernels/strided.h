// Runs kernels, which take contiguous memory, on arrays of any strides. Knows nothing of Python.

#ifndef RELU_XP_STRIDED_H
#define RELU_XP_STRIDED_H

#include <algorithm>
#include <cstddef>

#include "cpu_kernels.h"

namespace relu_xp {

constexpr int kMaxDims = 64;             // NumPy's limit
constexpr std::size_t kGathered = 1024;  // elements that are copied to a buffer at a time
constexpr std::size_t kBufferBytes = kGathered * sizeof(double);

// An array that a job reads or writes.
struct Operand {
  char* data;
  std::size_t size, itemsize;
  int ndim;
  const std::ptrdiff_t* array_shape;
  const std::ptrdiff_t* array_strides;  // in bytes, as all strides
  bool c_contiguous, f_contiguous;      // and aligned to the element
  bool constant;  // one value, whatever the position; `lay_out` finds that of broadcast arrays

  // What `lay_out` sets:
  bool contiguous;                   // in the order of the job
  std::ptrdiff_t strides[kMaxDims];  // of the job's axes, unless all operands are contiguous
};

inline bool is_aligned(const char* data, std::size_t itemsize) {
  return (reinterpret_cast<std::uintptr_t>(data) & (itemsize - 1)) == 0;
}

// One or two kernels that run over all elements of some arrays.
struct Job {
  Kernel kernel;
  const Params* params;
  // Where it is not null, this kernel runs before the other one and writes the branches of operand
  // `branches_of`: to the mask, or if there is none to a buffer that the other one takes as its
  // mask.
  Kernel branches = nullptr;
  const Params* branches_params = nullptr;
  int branches_of = 1;
  Operand operands[4];  // the output, then the inputs
  int count = 0;        // of operands
  unsigned char* mask = nullptr;
  Bias bias;
  bool stream = false;  // as in `Block`
  bool prefetch = false;

  // What `lay_out` sets:
  std::size_t size;
  int ndim;
  std::ptrdiff_t shape[kMaxDims];
};

// The order in which the mask of an array counts elements, as relu_xp.mask.memory_order returns it:
// writes the axes from the slowest in memory to the fastest, and returns whether that is another
// order than C's.
bool memory_order(const Operand& array, int* axes);

// Sets the order of a job's elements: that of the output in memory, or that of `axes`, where null
// stands for C order. An operand of length 1 along an axis is broadcast along it.
void lay_out(Job& job);
void lay_out(Job& job, const int* axes);

// Returns where n elements from `position` on lie contiguously: in the array itself, or copied to a
// buffer of kBufferBytes. `filled`: the buffer has earlier elements
// of the operand, at least as many.
const char* contiguous_elements(const Job& job, const Operand& operand, std::size_t position,
                                std::size_t n, char* buffer, bool filled = false);

// Runs a job, the context, over the elements from `begin` to `end`. With a mask, `begin` is a
// multiple of 8.
void run_job(void* context, std::size_t begin, std::size_t end);

// Goes through an operand's elements in the order of its job, from one position on.
class StridedIterator {
 public:
  StridedIterator(const Job& job, const Operand& operand, std::size_t position)
      : job_(job), operand_(operand), at_(operand.data) {
    for (int axis = job.ndim - 1; axis >= 0; --axis) {
      const auto length = static_cast<std::size_t>(job.shape[axis]);
      index_[axis] = static_cast<std::ptrdiff_t>(position % length);
      position /= length;
      at_ += index_[axis] * operand.strides[axis];
    }
  }

  // Calls function(address, stride, n) for runs along the last axis, `count` elements in all.
  template <class Function>
  void for_each_run(std::size_t count, Function function) {
    const int last = job_.ndim - 1;
    const std::ptrdiff_t stride = operand_.strides[last];
    while (count > 0) {
      const std::size_t rest = static_cast<std::size_t>(job_.shape[last] - index_[last]);
      const std::size_t n = std::min(count, rest);
      function(at_, stride, n);
      count -= n;
      index_[last] += static_cast<std::ptrdiff_t>(n);
      at_ += static_cast<std::ptrdiff_t>(n) * stride;
      for (int axis = last; axis > 0 && index_[axis] == job_.shape[axis]; --axis) {
        at_ += operand_.strides[axis - 1] - index_[axis] * operand_.strides[axis];
        index_[axis] = 0;
        ++index_[axis - 1];
      }
    }
  }

 private:
  const Job& job_;
  const Operand& operand_;
  char* at_;
  std::ptrdiff_t index_[kMaxDims];
};

}  // namespace relu_xp

#endif
