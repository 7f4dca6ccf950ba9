#include "strided.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace relu_xp {
namespace {

// ---- Copies -------------------------------------------------------------------------------------

template <class T>
void gather(const Job& job, const Operand& operand, std::size_t position, std::size_t count,
            char* buffer) {
  T* to = reinterpret_cast<T*>(buffer);
  StridedIterator(job, operand, position)
      .for_each_run(count, [&](const char* at, std::ptrdiff_t stride, std::size_t n) {
        constexpr auto size = static_cast<std::ptrdiff_t>(sizeof(T));
        if (stride == size) {
          std::memcpy(to, at, n * sizeof(T));
        } else if (stride == 0) {
          T value;
          std::memcpy(&value, at, sizeof(T));
          std::fill(to, to + n, value);
        } else if (stride == 2 * size) {  // every second element: a constant stride vectorizes
          for (std::size_t i = 0; i < n; ++i)
            std::memcpy(to + i, at + 2 * sizeof(T) * i, sizeof(T));
        } else {
          for (std::size_t i = 0; i < n; ++i, at += stride) std::memcpy(to + i, at, sizeof(T));
        }
        to += n;
      });
}

template <class T>
void scatter(const Job& job, const Operand& operand, std::size_t position, std::size_t count,
             const char* buffer) {
  const T* from = reinterpret_cast<const T*>(buffer);
  StridedIterator(job, operand, position)
      .for_each_run(count, [&](char* at, std::ptrdiff_t stride, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i, at += stride) std::memcpy(at, from + i, sizeof(T));
        from += n;
      });
}

// Calls function(word), with a word of an element's size.
template <class Function>
void with_word(std::size_t itemsize, Function function) {
  switch (itemsize) {
    case 1:
      return function(std::uint8_t{});
    case 2:
      return function(std::uint16_t{});
    case 4:
      return function(std::uint32_t{});
    default:
      return function(std::uint64_t{});
  }
}

// ---- The order of elements ----------------------------------------------------------------------

// Sorts axes by strides, from the slowest in memory to the fastest; equal ones stay as they are.
void sort_axes(const std::ptrdiff_t* strides, int* axes, int count) {
  for (int i = 1; i < count; ++i) {
    for (int k = i; k > 0; --k) {
      if (std::abs(strides[axes[k]]) <= std::abs(strides[axes[k - 1]])) break;
      std::swap(axes[k], axes[k - 1]);
    }
  }
}

// Sets which operands are contiguous in C or in Fortran order, and returns whether all are, with as
// many elements as the job: then there is no more to say of their strides.
bool set_contiguous(Job& job, bool Operand::* contiguous) {
  bool all = true;
  for (int i = 0; i < job.count; ++i) {
    Operand& operand = job.operands[i];
    operand.contiguous = operand.*contiguous;
    all &= (operand.contiguous && operand.size == job.size) || operand.constant;
  }
  return all;
}

// Sets axes, strides and contiguity for elements in the order of `axes`. Axes of length 1 are left
// out, and two that can be gone through as one in every operand are joined.
void set_axes(Job& job, const int* axes) {
  const std::ptrdiff_t* shape = job.operands[0].array_shape;
  int last = -1;
  for (int k = 0; k < job.operands[0].ndim; ++k) {
    const int axis = axes[k];
    if (shape[axis] == 1) continue;
    bool joined = last >= 0;
    for (int i = 0; i < job.count; ++i) {
      Operand& operand = job.operands[i];
      const bool broadcast = operand.constant || operand.array_shape[axis] == 1;
      operand.strides[last + 1] = broadcast ? 0 : operand.array_strides[axis];
      joined &= last >= 0 && operand.strides[last] == operand.strides[last + 1] * shape[axis];
    }
    if (joined) {
      job.shape[last] *= shape[axis];
      for (int i = 0; i < job.count; ++i) {
        job.operands[i].strides[last] = job.operands[i].strides[last + 1];
      }
    } else {
      job.shape[++last] = shape[axis];
    }
  }
  if (last < 0) {  // one element
    job.shape[++last] = 1;
    for (int i = 0; i < job.count; ++i) job.operands[i].strides[last] = 0;
  }
  job.ndim = last + 1;
  for (int i = 0; i < job.count; ++i) {
    Operand& operand = job.operands[i];
    auto expected = static_cast<std::ptrdiff_t>(operand.itemsize);
    operand.contiguous = is_aligned(operand.data, operand.itemsize);
    operand.constant = true;
    for (int axis = last; axis >= 0; --axis) {
      operand.contiguous &= job.shape[axis] == 1 || operand.strides[axis] == expected;
      operand.constant &= operand.strides[axis] == 0;
      expected *= job.shape[axis];
    }
  }
}

}  // namespace

bool memory_order(const Operand& array, int* axes) {
  int sorted[kMaxDims];
  int count = 0;
  for (int axis = 0; axis < array.ndim; ++axis) {
    axes[axis] = axis;
    if (array.array_shape[axis] != 1) sorted[count++] = axis;
  }
  if (array.c_contiguous || array.size == 0) return false;
  sort_axes(array.array_strides, sorted, count);
  auto expected = static_cast<std::ptrdiff_t>(array.itemsize);
  for (int i = count - 1; i >= 0; --i) {
    if (array.array_strides[sorted[i]] != expected) return false;
    expected *= array.array_shape[sorted[i]];
  }
  bool permuted = false;
  for (int axis = 0, i = 0; axis < array.ndim; ++axis) {
    if (array.array_shape[axis] == 1) continue;
    permuted |= sorted[i] != axis;
    axes[axis] = sorted[i++];
  }
  return permuted;
}

void lay_out(Job& job) {
  const Operand& out = job.operands[0];
  job.size = out.size;
  if (set_contiguous(job, &Operand::c_contiguous) || set_contiguous(job, &Operand::f_contiguous)) {
    return;
  }
  int axes[kMaxDims];
  for (int axis = 0; axis < out.ndim; ++axis) axes[axis] = axis;
  sort_axes(out.array_strides, axes, out.ndim);
  set_axes(job, axes);
}

void lay_out(Job& job, const int* axes) {
  job.size = job.operands[0].size;
  if (set_contiguous(job, &Operand::c_contiguous) && axes == nullptr) return;
  int c_order[kMaxDims];
  for (int axis = 0; axis < job.operands[0].ndim; ++axis) c_order[axis] = axis;
  set_axes(job, axes == nullptr ? c_order : axes);
}

const char* contiguous_elements(const Job& job, const Operand& operand, std::size_t position,
                                std::size_t n, char* buffer, bool filled) {
  if (operand.contiguous) return operand.data + position * operand.itemsize;
  with_word(operand.itemsize, [&](auto word) {
    if (!operand.constant) {
      gather<decltype(word)>(job, operand, position, n, buffer);
    } else if (!filled) {
      std::memcpy(&word, operand.data, sizeof(word));
      std::fill_n(reinterpret_cast<decltype(word)*>(buffer), n, word);
    }
  });
  return buffer;
}

void run_job(void* context, std::size_t begin, std::size_t end) {
  const Job& job = *static_cast<const Job*>(context);
  const Operand& out = job.operands[0];
  alignas(64) char buffers[4][kBufferBytes];
  unsigned char branches[kGathered];
  bool direct = job.branches == nullptr;
  for (int i = 0; i < job.count; ++i) direct &= job.operands[i].contiguous;
  const std::size_t step = direct ? end - begin : kGathered;
  for (std::size_t at = begin; at < end; at += step) {
    Block block{};
    block.count = std::min(step, end - at);
    for (int i = 1; i < job.count; ++i) {
      const Operand& input = job.operands[i];
      block.in[i - 1] = contiguous_elements(job, input, at, block.count, buffers[i], at > begin);
      if (job.prefetch && input.contiguous) block.prefetch |= 1u << (i - 1);
    }
    block.mask = job.mask;
    block.first = at;
    block.bias = &job.bias;
    if (job.branches != nullptr) {
      if (job.mask == nullptr) {
        block.mask = branches;
        block.first = 0;
      }
      Block first = block;
      first.in[0] = block.in[job.branches_of - 1];
      first.prefetch = block.prefetch >> (job.branches_of - 1) & 1;
      job.branches(*job.branches_params, first);
    }
    block.stream = job.stream && out.contiguous;
    block.out = out.contiguous ? out.data + at * out.itemsize : buffers[0];
    job.kernel(*job.params, block);
    if (!out.contiguous) {
      with_word(out.itemsize,
                [&](auto word) { scatter<decltype(word)>(job, out, at, block.count, block.out); });
    }
  }
}

}  // namespace relu_xp
