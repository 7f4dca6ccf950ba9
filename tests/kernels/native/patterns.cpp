// Digests of the kernels' outputs for every 16-bit number, and for special and other numbers of 32
// and 64 bits: a line for each dtype, operation and activation. All instruction sets, compilers and
// processors must print the same lines.
//
//   patterns NAME    with the kernels of an instruction set: v2, v3, v4 or baseline

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "cpu_kernels.h"

namespace {

using relu_xp::Block;
using relu_xp::KernelTable;
using Words = std::vector<std::uint64_t>;

const KernelTable* table_of(const std::string& name) {
#ifdef RELU_XP_X86
  if (name == "v2") return &relu_xp::v2::kernels;
  if (name == "v3") return &relu_xp::v3::kernels;
  if (name == "v4") return &relu_xp::v4::kernels;
#else
  if (name == "baseline") return &relu_xp::baseline::kernels;
#endif
  return nullptr;
}

struct Format {
  const char* name;
  relu_xp::Dtype dtype;
  int bits;
  int exponent_bits;

  int fraction_bits() const { return bits - 1 - exponent_bits; }
  std::uint64_t sign() const { return std::uint64_t{1} << (bits - 1); }
  std::uint64_t infinity() const { return sign() - (std::uint64_t{1} << fraction_bits()); }
  bool is_nan(std::uint64_t word) const { return (word & (sign() - 1)) > infinity(); }

  // The bits of a number that the format holds exactly.
  std::uint64_t word(double value) const {
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(word));
    const std::uint64_t magnitude = word & ~(std::uint64_t{1} << 63);
    if (magnitude == 0) return 0;
    const std::uint64_t bias = 1023 - ((std::uint64_t{1} << (exponent_bits - 1)) - 1);
    return (word >> 63) * sign() | (magnitude - (bias << 52)) >> (52 - fraction_bits());
  }
};

constexpr Format kFormats[] = {{"float16", relu_xp::kFloat16, 16, 5},
                               {"bfloat16", relu_xp::kBFloat16, 16, 8},
                               {"float32", relu_xp::kFloat32, 32, 8},
                               {"float64", relu_xp::kFloat64, 64, 11}};

struct Activation {
  const char* name;
  relu_xp::Variant variant;
  double threshold, negative_slope, positive_slope, max_value;
};

constexpr double kSlope = 171.0 / 1024;  // eight bits: bfloat16 has no more
constexpr Activation kActivations[] = {
    {"relu", relu_xp::kPlain, 0, 0, 1, 0},
    {"thresholded", relu_xp::kPlain, 1.5, 0, 1, 0},
    {"thresholded below 0", relu_xp::kPlain, -1.5, 0, 1, 0},
    {"leaky", relu_xp::kLeaky, 0, kSlope, 1, 0},
    {"negative", relu_xp::kLeaky, 0, -2.5, 1, 0},
    {"relu6", relu_xp::kClipped, 0, 0, 1, 6},
    {"clipped below 0", relu_xp::kClipped, -3, 0, 1, -0.5},
    {"two slopes", relu_xp::kGeneral, 0.25, kSlope, 1.75, 0},
    {"falling", relu_xp::kGeneral, 0, 0, -kSlope, 0},
    {"everything", relu_xp::kGeneralClipped, -0.5, kSlope, 1.75, 20},
};

struct Operation {
  const char* name;
  int number;
  const char* inputs;  // x, d(y), s(lopes) or m(ask), an array each
  char mask = ' ';     // b(its) or m(ask)
  bool writes_mask = false;
  bool biased = false;  // with a bias for each element: the last input
  int itemsize = 0;     // of the output, if it has another dtype
};

constexpr Operation kOperations[] = {
    {"forward", relu_xp::kForward, "x"},
    {"forward with bits", relu_xp::kForwardBits, "x", 'b', true},
    {"branches", relu_xp::kBranches, "x", 'm', true},
    {"backward from bits", relu_xp::kBackwardBits, "d", 'b'},
    {"backward from bytes", relu_xp::kBackwardBytes, "d", 'm'},
    {"backward from input", relu_xp::kBackwardFromInput, "dx"},
    {"forward, bias", relu_xp::kBiasForward, "xs", ' ', false, true},
    {"bits, bias", relu_xp::kBiasForwardBits, "xs", 'b', true, true},
    {"branches, bias", relu_xp::kBiasBranches, "xs", 'm', true, true},
    {"prelu", relu_xp::kPrelu, "dsx"},
    {"prelu from bytes", relu_xp::kPreluBytes, "ds", 'm'},
    {"scale", relu_xp::kScale, "ds"},
    {"squared", relu_xp::kSquaredRelu, "x"},
    {"squared, backward", relu_xp::kSquaredReluBackward, "xd"},
    {"negated", relu_xp::kNegatedRelu, "x"},
    {"crelu, mask", relu_xp::kCreluMask, "x", ' ', false, false, 1},
    {"crelu, backward", relu_xp::kCreluBackward, "dsm"},
    {"to double", relu_xp::kToDouble, "x", ' ', false, false, 8}};
// Operations that add elements to sums.
constexpr Operation kSummed[] = {
    {"backward from bits, sums", relu_xp::kBackwardBitsSum, "d", 'b'},
    {"backward from bytes, sums", relu_xp::kBackwardBytesSum, "d", 'm'},
    {"sums", relu_xp::kSumChannels, "x"}};

std::uint64_t scrambled(std::uint64_t z) {  // splitmix64
  z *= 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Every number of 16 bits; of more bits, the limits of every kind of number, and random ones.
Words words_of(const Format& format) {
  Words found;
  if (format.bits == 16) {
    for (std::uint64_t word = 0; word < 0x10000; ++word) found.push_back(word);
    return found;
  }
  const std::uint64_t one = format.word(1) >> format.fraction_bits();
  const std::uint64_t last = (std::uint64_t{1} << format.fraction_bits()) - 1;
  const std::uint64_t top = format.infinity() >> format.fraction_bits();
  for (const std::uint64_t exponent : {std::uint64_t{0}, std::uint64_t{1}, one - 3, one - 1, one,
                                       one + 1, one + 2, one + 4, top - 1, top}) {
    for (const std::uint64_t fraction :
         {std::uint64_t{0}, std::uint64_t{1}, last / 2, last / 2 + 1, last - 1, last}) {
      const std::uint64_t word = exponent << format.fraction_bits() | fraction;
      found.push_back(word);
      found.push_back(word | format.sign());
    }
  }
  const std::uint64_t all = format.sign() | (format.sign() - 1);
  for (std::uint64_t i = 0; i < 20011; ++i) found.push_back(scrambled(i) & all);
  return found;
}

// An array of `itemsize` bytes an element, at an address that is aligned to that alone.
class Array {
 public:
  Array(std::size_t count, std::size_t itemsize)
      : itemsize_(itemsize), size_(count * itemsize), memory_(size_ + 2 * kEdge, kFill) {}
  Array(const Words& words, std::size_t itemsize) : Array(words.size(), itemsize) {
    for (std::size_t i = 0; i < words.size(); ++i) {  // little-endian
      std::memcpy(data() + i * itemsize, &words[i], itemsize);
    }
  }

  char* data() { return reinterpret_cast<char*>(memory_.data() + kEdge); }
  unsigned char* bytes() { return memory_.data() + kEdge; }
  std::size_t size() const { return size_; }
  std::uint64_t word(std::size_t i) const {
    std::uint64_t found = 0;
    std::memcpy(&found, memory_.data() + kEdge + i * itemsize_, itemsize_);
    return found;
  }
  // Whether nothing was written before and behind it.
  bool is_whole() const {
    const auto filled = [](unsigned char byte) { return byte == kFill; };
    return std::all_of(memory_.begin(), memory_.begin() + kEdge, filled) &&
           std::all_of(memory_.end() - kEdge, memory_.end(), filled);
  }

 private:
  static constexpr std::ptrdiff_t kEdge = 24;
  static constexpr unsigned char kFill = 0xa5;
  std::size_t itemsize_, size_;
  std::vector<unsigned char> memory_;
};

class Digest {  // FNV-1a
 public:
  void add(std::uint64_t word) {
    for (int i = 0; i < 8; ++i) value_ = (value_ ^ (word >> (8 * i) & 0xff)) * 0x100000001b3;
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325;
};

bool failed = false;

// The arrays that the operations of a format read and write.
struct Operands {
  explicit Operands(const Format& format)
      : itemsize(static_cast<std::size_t>(format.bits / 8)),
        x(words_of(format), itemsize),
        dy(shuffled(words_of(format)), itemsize),
        slopes(shuffled(shuffled(words_of(format))), itemsize),
        count(x.size() / itemsize),
        bits((count + 7) / 8, 1),
        mask(count, 1) {}

  static Words shuffled(const Words& words) {
    Words found = words;
    for (std::size_t i = 0; i < words.size(); ++i) {
      found[i] = words[(i * 40503 + 12345) % words.size()];  // a prime, and so a permutation
    }
    return found;
  }

  Array* named(char name) {
    switch (name) {
      case 'x':
        return &x;
      case 'd':
        return &dy;
      case 's':
        return &slopes;
      case 'b':
        return &bits;
      default:
        return name == 'm' ? &mask : nullptr;
    }
  }

  std::size_t itemsize;
  Array x, dy, slopes;
  std::size_t count;
  Array bits, mask;
};

relu_xp::Params params_of(const Format& format, const Operation& operation,
                          const Activation& activation) {
  relu_xp::Params params{};
  params.threshold = format.word(activation.threshold);
  params.negative_slope = format.word(activation.negative_slope);
  params.positive_slope = format.word(activation.positive_slope);
  params.max_value = format.word(activation.max_value);
  params.dtype = format.dtype;
  params.variant = operation.number < relu_xp::kPrelu ? activation.variant : relu_xp::kPlain;
  return params;
}

// Runs a kernel and prints a digest of its output. A NaN at an index where no input has one counts
// as any NaN: x86 makes negative ones, and Arm positive ones.
void run(const KernelTable& table, const Format& format, const Operation& operation,
         const Activation& activation, Operands& operands) {
  const relu_xp::Params params = params_of(format, operation, activation);
  const std::string inputs = operation.inputs;
  const bool other_dtype = operation.itemsize != 0;
  Array* mask = operands.named(operation.mask);
  for (const bool stream : {false, true}) {
    Array out(operands.count,
              other_dtype ? static_cast<std::size_t>(operation.itemsize) : operands.itemsize);
    Block block{};
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      block.in[i] = operands.named(inputs[i])->data();
    }
    block.out = out.data();
    block.mask = mask == nullptr ? nullptr : mask->bytes();
    block.count = operands.count;
    relu_xp::Bias bias;
    if (operation.biased) {
      bias.data = operands.named(inputs.back())->data();
      bias.channels = operands.count;
    }
    block.bias = &bias;
    block.stream = stream && operation.number != relu_xp::kBranches &&
                   operation.number != relu_xp::kBiasBranches;
    table.floating[format.dtype][operation.number][params.variant](params, block);
    Digest digest;
    for (std::size_t i = 0; i < operands.count; ++i) {
      std::uint64_t word = out.word(i);
      if (!other_dtype && format.is_nan(word)) {
        const bool given = std::any_of(inputs.begin(), inputs.end(), [&](char name) {
          return name != 'm' && format.is_nan(operands.named(name)->word(i));
        });
        if (!given) word = format.infinity() + 1;
      }
      digest.add(word);
    }
    for (std::size_t i = 0; operation.writes_mask && i < mask->size(); ++i) {
      digest.add(mask->word(i));
    }
    std::printf("%s %s, %s%s %016llx\n", format.name, operation.name, activation.name,
                stream ? ", streamed" : "", static_cast<unsigned long long>(digest.value()));
    if (!out.is_whole() || (mask != nullptr && !mask->is_whole())) {
      std::printf("%s %s wrote beside its output\n", format.name, operation.name);
      failed = true;
    }
  }
}

// Adds numbers to the digest; a NaN counts as any NaN.
void add_numbers(Digest& digest, const std::vector<double>& numbers) {
  for (const double number : numbers) {
    std::uint64_t word = 0;
    std::memcpy(&word, &number, sizeof(word));
    digest.add(kFormats[3].is_nan(word) ? kFormats[3].infinity() + 1 : word);
  }
}

// Runs a kernel that adds to sums, in pieces of so many elements, and prints a digest of its output
// and of all sums.
void run_sums(const KernelTable& table, const Format& format, const Operation& operation,
              const Activation& activation, Operands& operands) {
  const relu_xp::Params params = params_of(format, operation, activation);
  Array* mask = operands.named(operation.mask);
  struct {
    std::size_t piece, run, lanes, size;
  } const shapes[] = {{operands.count, 4999, 997, 4 * 997}, {64, 1, 1, 1}};
  for (const auto& shape : shapes) {
    Digest digest;
    Array out(operands.count, operands.itemsize);
    for (std::size_t first = 0; first < operands.count; first += shape.piece) {
      std::vector<double> totals(shape.size);
      relu_xp::Sums sums;
      sums.data = totals.data();
      sums.size = shape.size;
      sums.lanes = shape.lanes;
      sums.run = shape.run;
      Block block{};
      block.in[0] = operands.named(operation.inputs[0])->data() + first * operands.itemsize;
      block.out = out.data() + first * operands.itemsize;
      block.mask = mask == nullptr ? nullptr : mask->bytes();
      block.first = first;
      block.count = std::min(shape.piece, operands.count - first);
      block.sums = &sums;
      table.floating[format.dtype][operation.number][params.variant](params, block);
      add_numbers(digest, totals);
    }
    for (std::size_t i = 0; i < operands.count; ++i) {
      const std::uint64_t word = out.word(i);
      digest.add(format.is_nan(word) ? format.infinity() + 1 : word);
    }
    std::printf("%s %s of %zu lanes, %s %016llx\n", format.name, operation.name, shape.size,
                activation.name, static_cast<unsigned long long>(digest.value()));
  }
}

// The kernels of a sum of products of doubles.
void run_doubles(const KernelTable& table, Operands& operands) {
  std::vector<double> x(operands.count), terms(operands.count);
  std::memcpy(x.data(), operands.x.data(), operands.x.size());
  std::memcpy(terms.data(), operands.dy.data(), operands.dy.size());
  Digest digest;
  table.weight_grad_terms(terms.data(), x.data(), operands.count);
  add_numbers(digest, terms);
  table.add(x.data(), terms.data(), operands.count);
  add_numbers(digest, x);
  std::printf("terms of a slope's gradient, and a sum %016llx\n",
              static_cast<unsigned long long>(digest.value()));
}

// ReLU of all integers of 8 and 16 bits, and of random ones: as it is, with a maximum, with slopes.
void run_integers(const KernelTable& table) {
  for (int i = 0; i < relu_xp::kDtypes - relu_xp::kInt8; ++i) {
    const bool is_signed = i % 2 == 0;
    const int bits = 8 << (i / 2);
    const std::uint64_t all = ~std::uint64_t{0} >> (64 - bits);
    const std::uint64_t largest = is_signed ? all >> 1 : all;
    Words words;
    for (std::uint64_t word = 0; word < 0x10000; ++word) {
      words.push_back((bits <= 16 ? word : scrambled(word)) & all);
    }
    const auto itemsize = static_cast<std::size_t>(bits / 8);
    Array x(words, itemsize);
    for (const relu_xp::Params& params :
         {relu_xp::Params{0, 0, 1, largest, 0, 0, 0, {}}, relu_xp::Params{5, 0, 1, 90, 0, 0, 0, {}},
          relu_xp::Params{2, 3, 5, 100, 0, 0, 0, {}}}) {
      Array out(words.size(), itemsize);
      Block block{};
      block.in[0] = x.data();
      block.out = out.data();
      block.count = words.size();
      table.integer[i](params, block);
      Digest digest;
      for (std::size_t k = 0; k < words.size(); ++k) digest.add(out.word(k));
      std::printf("%sint%d, maximum %llu %016llx\n", is_signed ? "" : "u", bits,
                  static_cast<unsigned long long>(params.max_value),
                  static_cast<unsigned long long>(digest.value()));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const KernelTable* table = argc == 2 ? table_of(argv[1]) : nullptr;
  if (table == nullptr) {
    std::fprintf(stderr, "patterns: the instruction set must be named\n");
    return 2;
  }
  for (const Format& format : kFormats) {
    Operands operands(format);
    for (const Activation& activation : kActivations) {
      const bool last = &activation == std::end(kActivations) - 1;  // the mask has all branches
      for (const Operation& operation : kOperations) {
        if (last || operation.number < relu_xp::kPrelu) {
          run(*table, format, operation, activation, operands);
        }
      }
      for (const Operation& operation : kSummed) {
        if (last || operation.number < relu_xp::kPrelu) {
          run_sums(*table, format, operation, activation, operands);
        }
      }
    }
    if (format.dtype == relu_xp::kFloat64) run_doubles(*table, operands);
  }
  run_integers(*table);
  return failed ? 1 : 0;
}
