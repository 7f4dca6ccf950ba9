// The CPU kernels: one table of functions for each instruction set.

#ifndef RELU_XP_CPU_KERNELS_H
#define RELU_XP_CPU_KERNELS_H

// Masks are packed by words.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The kernels are for little-endian processors; without them relu_xp computes with NumPy."
#endif

#include <cstddef>
#include <cstdint>

namespace relu_xp {

enum Dtype : std::int8_t {
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64,
  kFloatingDtypes,
  kInt8 = kFloatingDtypes,  // then uint8, int16, uint16, ... uint64
  kUInt8,
  kDtypes = kInt8 + 8
};

// Which of an activation's parameters are not the default. In a `general` variant all may be given,
// and the slopes may still be 0 or 1, which are no products.
enum Variant : std::int8_t { kPlain, kLeaky, kClipped, kGeneral, kGeneralClipped, kVariants };

// An activation's parameters in one dtype: relu_xp.parameters.CastParameters.record.
struct Params {
  std::uint64_t threshold;  // bit patterns
  std::uint64_t negative_slope;
  std::uint64_t positive_slope;
  std::uint64_t max_value;  // of an integer dtype without one: the largest integer
  std::int8_t dtype;
  std::int8_t variant;
  std::int8_t three_branches;  // the mask has a byte an element, instead of a bit
  std::int8_t unused[5];
};
static_assert(sizeof(Params) == 40, "struct.pack writes 40 bytes");

// A bias along one axis: element k of an array belongs to channel k / run % channels.
struct Bias {
  const char* data = nullptr;  // a word for each channel
  std::size_t channels = 1;
  std::size_t run = 1;
};

// Sums of the channels of an array, each kept in some lanes: element k of a channel, which has
// `run` elements, is added to lane k % lanes. The channels follow one another, and start again.
struct Sums {
  double* data = nullptr;
  std::size_t size = 1;  // lanes of all channels
  std::size_t lanes = 1;
  std::size_t run = 1;
  std::size_t start = 0;  // of the block's first element: how many come before it
};

// `count` contiguous elements; each operand is aligned to its elements. An output may be the very
// memory of an input, and overlaps none otherwise.
struct Block {
  char* out;
  const char* in[3];
  unsigned char* mask;  // bits or bytes, that of the block's first element at index `first`
  std::size_t first;    // index of that element, in the mask and for the bias
  std::size_t count;
  bool stream;        // write past the caches: `out` is no input, and larger than they are
  unsigned prefetch;  // a bit for each input that is larger than the caches
  const Bias* bias;   // of those operations that take one
  const Sums* sums;   // likewise
};

using Kernel = void (*)(const Params&, const Block&);

// What a kernel computes from its inputs, in[0], in[1] ..., which have the dtype of `out`.
enum Operation {
  kForward,              // out = f(x)
  kForwardBits,          // out = f(x), mask = bits
  kBranches,             // mask = bytes, of x
  kBackwardBits,         // out = f'(x) * dy, from the mask
  kBackwardBytes,        //
  kBackwardFromInput,    // out = f'(x) * dy, from dy and x
  kBiasForward,          // kForward of x + bias
  kBiasForwardBits,      // kForwardBits
  kBiasBranches,         // kBranches
  kBackwardBitsSum,      // kBackwardBits, and out added to sums
  kBackwardBytesSum,     // kBackwardBytes
  kPrelu,                // out = value where x is above 0, else slope * value: value, slope, x.
                         // This operation and those below have the variant kPlain alone
  kPreluBytes,           // likewise, where the mask has the branches of x
  kScale,                // out = value where slope is 1, else slope * value
  kSquaredRelu,          // out = relu(x)**2
  kSquaredReluBackward,  // out = 2 * x * dy where x is above 0, else 0
  kNegatedRelu,          // out = relu(-x)
  kCreluMask,            // out = bytes, of x
  kCreluBackward,        // out = the gradient of CReLU from first, second and bytes
  kToDouble,             // out = x in double precision
  kSumChannels,          // x added to sums
  kOperations
};

struct KernelTable {
  Kernel floating[kFloatingDtypes][kOperations][kVariants];
  Kernel integer[kDtypes - kInt8];  // kForward
  // dy[i] *= x[i] where x[i] is at or below 0, else dy[i] = +0
  void (*weight_grad_terms)(double* dy, const double* x, std::size_t count);
  // total[i] += terms[i]
  void (*add)(double* total, const double* terms, std::size_t count);
};

#ifdef RELU_XP_X86
namespace v2 {
extern const KernelTable kernels;
}
namespace v3 {
extern const KernelTable kernels;
}
namespace v4 {
extern const KernelTable kernels;
}
#else
namespace baseline {
extern const KernelTable kernels;
}
#endif

struct InstructionSet {
  const char* name;
  bool available;  // on this processor
  const KernelTable* kernels;
};

// The instruction set of a name, or null; without a name the best one that is available.
const InstructionSet* find_instruction_set(const char* name);

extern const KernelTable* active_kernels;  // of the instruction set in use

}  // namespace relu_xp

#endif
