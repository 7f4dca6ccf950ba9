#include "prelu.h"

#include <cstring>

namespace relu_xp {
namespace {

constexpr std::uint64_t kInfinity[kFloatingDtypes] = {0x7c00, 0x7f80, 0x7f800000,
                                                      0x7ff0000000000000};

}  // namespace

// Shorter runs are not worth a call each.
bool has_channels(const Job& job) {
  const Operand &out = job.operands[0], &values = job.operands[1], &slopes = job.operands[2],
                &x = job.operands[3];
  return out.contiguous && values.contiguous && x.contiguous && !slopes.contiguous &&
         slopes.strides[job.ndim - 1] == 0 && job.shape[job.ndim - 1] >= 256;
}

// No slopes are gathered: 16x64x56x56 float32 takes a third less time.
void run_channels(void* context, std::size_t begin, std::size_t end) {
  const Job& job = *static_cast<const Job*>(context);
  const Operand &out = job.operands[0], &values = job.operands[1], &x = job.operands[3];
  const int dtype = job.params->dtype;
  const std::size_t itemsize = values.itemsize;
  std::size_t at = begin;
  const auto run_leaky = [&](const char* slope, std::ptrdiff_t /*stride*/, std::size_t n) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, slope, itemsize);  // little-endian
    const std::uint64_t magnitude = bits & ((std::uint64_t{1} << (8 * itemsize - 1)) - 1);
    if (magnitude > kInfinity[dtype]) {  // a NaN slope is kept as it is
      run_job(context, at, at + n);
    } else {
      Params params = *job.params;
      params.negative_slope = magnitude == 0 ? 0 : bits;
      const bool same = values.data == x.data;
      Block block{};
      block.count = n;
      block.out = out.data + at * itemsize;
      block.in[0] = values.data + at * itemsize;
      block.in[1] = x.data + at * itemsize;
      block.stream = job.stream;
      block.prefetch = job.prefetch ? same ? 1 : 3 : 0;
      const auto& kernels = active_kernels->floating[dtype][same ? kForward : kBackwardFromInput];
      kernels[magnitude == 0 ? kPlain : kLeaky](params, block);
    }
    at += n;
  };
  StridedIterator(job, job.operands[2], begin).for_each_run(end - begin, run_leaky);
}

}  // namespace relu_xp
