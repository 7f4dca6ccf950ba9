#include "gradient_sums.h"

#include <cstring>
#include <memory>
#include <new>

namespace relu_xp {
namespace {

constexpr std::ptrdiff_t kPartElements = std::ptrdiff_t{1} << 16;
constexpr std::ptrdiff_t kRow = 1024;  // elements that are summed side by side

void add(double* total, const double* terms, std::ptrdiff_t count) {
  active_kernels->add(total, terms, static_cast<std::size_t>(count));
}

// Adds `count` rows of `width` numbers up, in place: the last ones to the first ones, until one row
// is left.
void fold(double* rows, std::ptrdiff_t count, std::ptrdiff_t width) {
  for (; count > 1; count -= count / 2) {
    add(rows, rows + (count - count / 2) * width, count / 2 * width);
  }
}

}  // namespace

void WeightGrad::set_shape(const std::ptrdiff_t* sum_shape) {
  const Operand& x = job_.operands[1];
  rows_ = x.ndim == 0 ? 1 : x.array_shape[0];
  row_size_ = static_cast<std::ptrdiff_t>(x.size) / rows_;
  step_ = std::min(rows_, std::max<std::ptrdiff_t>(1, kPartElements / row_size_));
  row_sums_ = 1;
  for (int axis = 0; axis < x.ndim; ++axis) {
    summed_[axis] = sum_shape[axis] == 1;
    if (axis > 0) row_sums_ *= sum_shape[axis];
  }
  rows_summed_ = x.ndim > 0 && summed_[0];
  part_sums_ = rows_summed_ ? row_sums_ : step_ * row_sums_;
}

std::ptrdiff_t WeightGrad::rows_of(std::ptrdiff_t part) const {
  return std::min(step_, rows_ - part * step_);
}

void WeightGrad::write_terms(std::ptrdiff_t first, std::ptrdiff_t count, double* terms) const {
  alignas(64) char buffer[kBufferBytes];
  alignas(64) double x[kGathered];
  const Params unused{};
  for (std::ptrdiff_t done = 0; done < count; done += kGathered) {
    Block block{};
    block.count = std::min(kGathered, static_cast<std::size_t>(count - done));
    double* const to[] = {terms + done, x};
    const Kernel to_double[] = {dy_to_double_, x_to_double_};
    for (int i = 0; i < 2; ++i) {
      const Operand& operand = job_.operands[i];
      block.in[0] = contiguous_elements(job_, operand, static_cast<std::size_t>(first + done),
                                        block.count, buffer);
      block.out = reinterpret_cast<char*>(to[i]);
      to_double[i](unused, block);
    }
    active_kernels->weight_grad_terms(terms + done, x, block.count);
  }
}

// Sums `terms` along the axes that are summed, in place; returns how many sums there are.
std::ptrdiff_t WeightGrad::reduce(std::ptrdiff_t rows, double* terms) const {
  std::ptrdiff_t outer = 1, inner = rows * row_size_;
  for (int axis = 0; axis < job_.operands[1].ndim; ++axis) {
    const std::ptrdiff_t length = axis == 0 ? rows : job_.operands[1].array_shape[axis];
    inner /= length;
    if (!summed_[axis]) {
      outer *= length;
      continue;
    }
    for (std::ptrdiff_t i = 0; i < outer; ++i) {
      double* row = terms + i * length * inner;
      std::ptrdiff_t rest = length;
      if (inner > 1) {
        for (std::ptrdiff_t k = 1; k < length; ++k) add(row, row + k * inner, inner);
      } else {
        if (length > 2 * kRow) {
          for (std::ptrdiff_t k = kRow; k < length; k += kRow) {
            add(row, row + k, std::min(kRow, length - k));
          }
          rest = kRow;
        }
        fold(row, rest, 1);
      }
      std::memmove(terms + i * inner, row, static_cast<std::size_t>(inner) * sizeof(double));
    }
  }
  return outer;
}

void WeightGrad::run(void* context, std::size_t begin, std::size_t end) {
  auto& self = *static_cast<WeightGrad*>(context);
  const auto size = static_cast<std::size_t>(self.step_ * self.row_size_);
  const std::unique_ptr<double[]> terms(new (std::nothrow) double[size]);
  if (terms == nullptr) {
    self.no_memory_ = true;
    return;
  }
  for (auto part = static_cast<std::ptrdiff_t>(begin); part < static_cast<std::ptrdiff_t>(end);
       ++part) {
    const std::ptrdiff_t rows = self.rows_of(part);
    self.write_terms(part * self.step_ * self.row_size_, rows * self.row_size_, terms.get());
    const std::ptrdiff_t count = self.reduce(rows, terms.get());
    std::memcpy(self.partial_sums_ + part * self.part_sums_, terms.get(),
                static_cast<std::size_t>(count) * sizeof(double));
  }
}

bool WeightGrad::add_parts(double* total) const {
  if (no_memory_) return false;
  for (std::ptrdiff_t part = 0; part < units(); ++part) {
    const std::ptrdiff_t count = rows_summed_ ? row_sums_ : rows_of(part) * row_sums_;
    add(total, partial_sums_ + part * part_sums_, count);
    if (!rows_summed_) total += count;
  }
  return true;
}

// ---- A bias -------------------------------------------------------------------------------------

namespace {

constexpr std::ptrdiff_t kShortLine = 512;  // elements, which a line of several rows has at most
constexpr std::ptrdiff_t kLanes = 128;  // of a channel: so many additions need not wait for others
constexpr std::ptrdiff_t kSegmentLanes = 4096;  // at most: 32 KiB, most of the first-level cache
// Lanes, and sums of parts, are few beside the elements, and there are parts for many threads.
constexpr std::ptrdiff_t kElementsPerLane = 32, kPartSize = 1 << 15, kMaxParts = 64;
constexpr std::ptrdiff_t kMinUnits = 16, kSegmentSize = 4096;
// Elements of a line that are copied at a time, before those of the next line: where they lie far
// from one another, the cache lines that they share with those stay in the first-level cache.
constexpr std::ptrdiff_t kTile = 256;

std::ptrdiff_t divide_up(std::ptrdiff_t a, std::ptrdiff_t b) { return (a + b - 1) / b; }

std::ptrdiff_t clamp(std::ptrdiff_t value, std::ptrdiff_t low, std::ptrdiff_t high) {
  return std::max(low, std::min(value, high));
}

}  // namespace

void BiasGrad::set_shape(const std::ptrdiff_t* shape, int ndim, int axis, Channels order) {
  std::ptrdiff_t outer = 1;
  inner_ = 1;
  channels_ = shape[axis];
  for (int i = 0; i < axis; ++i) outer *= shape[i];
  for (int i = axis + 1; i < ndim; ++i) inner_ *= shape[i];
  const std::ptrdiff_t row_size = channels_ * inner_;
  size_ = outer * row_size;

  // What decides the order of additions
  rows_ = clamp(kShortLine / row_size, 1, outer);
  line_size_ = rows_ * row_size;
  const std::ptrdiff_t lines = divide_up(outer, rows_);
  lanes_ = rows_ > 1 ? inner_ : std::min(inner_, kLanes);
  const std::ptrdiff_t most = lines * inner_ / (kElementsPerLane * lanes_);
  part_lines_ = divide_up(lines, clamp(std::min(size_ / kPartSize, most), 1, kMaxParts));
  parts_ = divide_up(lines, part_lines_);

  // What does not
  order_ = order;
  if (order == kFirst) {
    segment_size_ = divide_up(channels_ * parts_, kMaxParts);
    segments_ = divide_up(channels_ * parts_, segment_size_);
    return;
  }
  const std::ptrdiff_t all = order == kLast ? rows_ * lanes_ : channels_;
  const std::ptrdiff_t wanted = divide_up(all, divide_up(kMinUnits, parts_));
  segment_size_ = std::max(wanted, divide_up(kSegmentSize, order == kLast ? channels_ : inner_));
  if (order == kInOrder) segment_size_ = std::min(segment_size_, kSegmentLanes / lanes_);
  segment_size_ = clamp(segment_size_, 1, all);
  segments_ = divide_up(all, segment_size_);
}

// Adds elements from `first` on to the sums of their channels, of which so many others precede them
// in the line; computes them, if both passes are one.
void BiasGrad::add_elements(std::ptrdiff_t first, std::ptrdiff_t count, Sums sums,
                            std::ptrdiff_t before) const {
  const Operand& dx = job_.operands[0];
  alignas(64) char buffer[kBufferBytes];
  const bool one_pass = job_.count == 2;
  const auto step = one_pass ? count : static_cast<std::ptrdiff_t>(kGathered);
  for (std::ptrdiff_t done = 0; done < count; done += step) {
    Block block{};
    block.first = static_cast<std::size_t>(first + done);
    block.count = static_cast<std::size_t>(std::min(step, count - done));
    sums.start = static_cast<std::size_t>(before + done);
    block.sums = &sums;
    if (one_pass) {
      const Operand& dy = job_.operands[1];
      block.out = dx.data + block.first * dx.itemsize;
      block.in[0] = dy.data + block.first * dy.itemsize;
      block.mask = mask_;
      block.stream = job_.stream;
      block.prefetch = job_.prefetch ? 1 : 0;
    } else {
      block.in[0] = contiguous_elements(job_, dx, block.first, block.count, buffer);
    }
    kernel_(*params_, block);
  }
}

// The lanes of a line, in all its rows, are `all`; `lane` is the first one of the segment.
void BiasGrad::run_last(std::ptrdiff_t part, std::ptrdiff_t segment) const {
  const std::ptrdiff_t all = rows_ * lanes_, lane = segment * segment_size_;
  const std::ptrdiff_t count = std::min(segment_size_, all - lane);
  Sums sums;
  sums.data = partial_sums_ + (part * all + lane) * channels_;
  sums.lanes = sums.run = sums.size = static_cast<std::size_t>(count * channels_);
  std::fill_n(sums.data, sums.size, 0.0);
  const std::ptrdiff_t end = std::min((part + 1) * part_lines_ * line_size_, size_);
  for (std::ptrdiff_t line = part * part_lines_ * line_size_; line < end; line += line_size_) {
    const std::ptrdiff_t length = std::min(line_size_, end - line) / channels_;
    for (std::ptrdiff_t k = lane; k < length; k += all) {
      add_elements(line + k * channels_, std::min(count, length - k) * channels_, sums);
    }
  }
}

void BiasGrad::run_first(std::ptrdiff_t segment, double* lanes) const {
  const std::ptrdiff_t size = size_ / channels_, step = part_lines_ * rows_ * inner_;
  Sums sums;
  sums.data = lanes;
  sums.lanes = sums.size = static_cast<std::size_t>(rows_ * lanes_);
  sums.run = static_cast<std::size_t>(rows_ * inner_);
  const std::ptrdiff_t end = std::min((segment + 1) * segment_size_, channels_ * parts_);
  for (std::ptrdiff_t pair = segment * segment_size_; pair < end; ++pair) {
    const std::ptrdiff_t channel = pair / parts_, part = pair % parts_;
    std::fill_n(lanes, sums.size, 0.0);
    add_elements(channel * size + part * step, std::min(step, size - part * step), sums);
    fold(lanes, rows_, lanes_);
    fold(lanes, lanes_, 1);
    partial_sums_[part * channels_ + channel] = lanes[0];
  }
}

void BiasGrad::run_unit(std::ptrdiff_t part, std::ptrdiff_t segment, double* lanes) const {
  const std::ptrdiff_t first = segment * segment_size_;
  const std::ptrdiff_t count = std::min(segment_size_, channels_ - first);
  Sums sums;
  sums.data = lanes;
  sums.size = static_cast<std::size_t>(rows_ * count * lanes_);
  sums.lanes = static_cast<std::size_t>(lanes_);
  sums.run = static_cast<std::size_t>(inner_);
  if (lanes_ == inner_) sums.lanes = sums.run = sums.size;  // the same order, in longer loops
  std::fill_n(lanes, sums.size, 0.0);
  const std::ptrdiff_t begin = part * part_lines_ * line_size_;
  const std::ptrdiff_t end = std::min(begin + part_lines_ * line_size_, size_);
  const bool one_pass = job_.count == 2;
  if (segments_ == 1 && (one_pass || rows_ > 1)) {
    add_elements(begin, end - begin, sums);
  } else {
    const std::ptrdiff_t length = count * inner_;
    // A lane gets all that a channel has in a line before what it has in the next one.
    const std::ptrdiff_t tile = lanes_ == inner_ ? kTile : inner_;
    const std::ptrdiff_t step = one_pass ? length : tile;
    for (std::ptrdiff_t at = 0; at < length; at += step) {
      for (std::ptrdiff_t line = begin; line < end; line += line_size_) {
        add_elements(line + first * inner_ + at, std::min(step, length - at), sums, at);
      }
    }
  }
  fold(lanes, rows_, count * lanes_);
  double* to = partial_sums_ + part * channels_ + first;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    fold(lanes + i * lanes_, lanes_, 1);
    to[i] = lanes[i * lanes_];
  }
}

void BiasGrad::run(void* context, std::size_t begin, std::size_t end) {
  const auto& self = *static_cast<const BiasGrad*>(context);
  alignas(64) double lanes[kSegmentLanes];
  for (auto unit = static_cast<std::ptrdiff_t>(begin); unit < static_cast<std::ptrdiff_t>(end);
       ++unit) {
    const std::ptrdiff_t part = unit / self.segments_, segment = unit % self.segments_;
    if (self.order_ == kLast) {
      self.run_last(part, segment);
    } else if (self.order_ == kFirst) {
      self.run_first(unit, lanes);
    } else {
      self.run_unit(part, segment, lanes);
    }
  }
}

bool BiasGrad::add_parts(double* total) const {
  const std::ptrdiff_t size = num_partial_sums() / parts_;
  for (std::ptrdiff_t part = 0; part < parts_; ++part) {
    double* sums = partial_sums_ + part * size;
    if (order_ == kLast) {
      fold(sums, rows_, lanes_ * channels_);
      fold(sums, lanes_, channels_);
    }
    add(total, sums, channels_);
  }
  return true;
}

}  // namespace relu_xp
