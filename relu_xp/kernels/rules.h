// The truth table for one element: its value, its gradient and its branch, for every function of
// the package. Included by the CPU kernels and by the CUDA kernels. The rule for x = 0, or in
// general for x at the threshold, is `Rules::above`: it belongs to the lower branch.
//
// Numbers are words of bits, compared as integers, which keeps subnormals and NaN apart
// from zero in every floating-point mode and under every compiler option (CuPy compiles with
// -ftz=true, which would flush them).
//
// The file that includes this one first defines RELU_XP_INLINE, what stands before a function
// (`__device__` or `inline`), and derives each of its formats from `Format` below, with static
// member functions `Word multiply(Word, Word)` and `Word add(Word, Word)`: the product and the sum
// of two numbers, rounded once.

namespace relu_xp {
// Unnamed, so that every translation unit has its own: the CPU kernels are compiled once for each
// instruction set, and the linker would keep one copy of a shared function for all of them.
namespace {  // NOLINT(*-namespaces,*-dcl59-cpp,*-anonymous-namespace-in-header)

// A binary floating-point format whose numbers are the upper `bits` bits of a word. A 16-bit number
// is a 16-bit word on a CPU and the upper half of a 32-bit word on a GPU; no rule depends on the
// bits below it.
template <class WordT, class SignedT, int bits, int exponent_bits, bool payload = true>
struct Format {
  using Word = WordT;
  using Signed = SignedT;  // of the same width
  static constexpr int width = 8 * sizeof(Word);
  static constexpr Word below = static_cast<Word>((Word(1) << (width - bits)) - 1);
  static constexpr Word sign = static_cast<Word>(Word(1) << (width - 1));
  static constexpr Word infinity = static_cast<Word>(sign - (sign >> exponent_bits));
  static constexpr Word one = static_cast<Word>((sign >> 1) - (sign >> exponent_bits));
  static constexpr Word quiet = static_cast<Word>(sign >> (exponent_bits + 1));
  // Whether a product keeps the payload of a NaN. ml_dtypes' bfloat16 keeps its sign alone.
  static constexpr bool keeps_payload = payload;
  // Whether `multiply` does that by itself, and `add` with the first NaN.
  static constexpr bool keeps_nan = false;

  RELU_XP_INLINE static Word negate(Word x) { return static_cast<Word>(x ^ sign); }
};

template <class F>
using WordOf = typename F::Word;

template <class F>
RELU_XP_INLINE bool is_nan(WordOf<F> x) {
  return static_cast<WordOf<F>>(x & (F::sign - 1)) > (F::infinity | F::below);
}

// The word that orders as the number does when it is taken as a signed integer, NaN outermost;
// modulo 2**width, so that a range of numbers is a range of words that may wrap around.
template <class F>
RELU_XP_INLINE WordOf<F> order(WordOf<F> x) {
  using Word = WordOf<F>;
  const Word negative = static_cast<Word>(static_cast<typename F::Signed>(x) >> (F::width - 1));
  return static_cast<Word>(x ^ (negative & (F::sign - 1)));
}

// The result of an operation on x, which of a NaN x is that NaN as NumPy keeps it, with its sign
// and payload; a GPU has one NaN of its own for all of them.
template <class F>
RELU_XP_INLINE WordOf<F> keep_nan(WordOf<F> x, WordOf<F> result) {
  using Word = WordOf<F>;
  const Word kept = F::keeps_payload ? x : static_cast<Word>((x & F::sign) | F::infinity);
  return is_nan<F>(x) ? static_cast<Word>(kept | F::quiet) : result;
}

// slope * x, rounded once.
template <class F>
RELU_XP_INLINE WordOf<F> product(WordOf<F> slope, WordOf<F> x) {
  const WordOf<F> result = F::multiply(slope, x);
  return F::keeps_nan ? result : keep_nan<F>(x, result);
}

// x + bias, rounded once. Of two NaN it is x.
template <class F>
RELU_XP_INLINE WordOf<F> sum(WordOf<F> x, WordOf<F> bias) {
  const WordOf<F> result = F::add(x, bias);
  return F::keeps_nan ? result : keep_nan<F>(x, keep_nan<F>(bias, result));
}

// The branches of the function: where x is, which decides about value and gradient.
enum Branch { kLower = 0, kUpper = 1, kMaximum = 2 };

// The function with four parameters. Flags say which of them are given; one that is not has its
// default (threshold 0, negative slope 0, positive slope 1, no maximum), and such a slope is no
// product.
//
// The caller computes the products: `low` is a*value and `high` is b*value. They are not used where
// the slope is not given.
template <class F, bool has_threshold, bool has_a, bool has_b, bool has_c>
class Rules {
 public:
  using Word = WordOf<F>;

  RELU_XP_INLINE Rules(Word threshold, Word c)
      : span_(static_cast<Word>((key(has_threshold ? threshold : Word(0)) - kLowest) | F::below)),
        first_(key(static_cast<Word>(c & ~F::below) == 0 ? F::sign : c)),
        c_(c) {}

  // Whether x <= threshold is false, NaN included: -inf ... threshold is a range of words, in which
  // no NaN lies.
  RELU_XP_INLINE bool above(Word x) const {
    if (!has_threshold) return at_least_zero(x) & (static_cast<Word>(x & ~F::below) != 0);
    return static_cast<Word>(order<F>(x) - kLowest) > span_;
  }

  // y >= c, NaN excluded: the range from c to +inf. -0.0 reaches a maximum of 0.
  RELU_XP_INLINE bool at_max(Word y) const {
    const Word last = static_cast<Word>((F::infinity - first_) | F::below);
    return static_cast<Word>(order<F>(y) - first_) <= last;
  }

  // A value scaled by the slope of its side of the threshold.
  RELU_XP_INLINE static Word scaled(bool above, Word value, Word low, Word high) {
    return above ? (has_b ? high : value) : (has_a ? low : Word(0));
  }

  RELU_XP_INLINE Word branch(Word x, Word high) const {
    const bool upper = above(x);
    const bool maximum = has_c && (upper & at_max(has_b ? high : x));
    // Choices, not a sum: from them a GPU's compiler sees what `backward` makes of each branch.
    return upper ? maximum ? Word(kMaximum) : Word(kUpper) : Word(kLower);
  }

  RELU_XP_INLINE Word forward(Word x, Word low, Word high) const {
    // Where +0 gives +0 anyhow, the cheaper test is enough.
    constexpr bool plain = !has_threshold && !has_a && !has_b && !has_c;
    const bool upper = plain ? at_least_zero(x) : above(x);
    const Word y = scaled(upper, x, low, high);
    return has_c && (upper & at_max(has_b ? high : x)) ? c_ : y;  // y itself, as `branch` has it
  }

  RELU_XP_INLINE static Word backward(Word branch, Word dy, Word low, Word high) {
    const Word dx = scaled(branch == kUpper, dy, low, high);
    return branch == kMaximum ? Word(0) : dx;
  }

 private:
  // Whether x is +0, greater, or NaN: as signed integers, all of these lie above -inf.
  RELU_XP_INLINE static bool at_least_zero(Word x) {
    using Signed = typename F::Signed;
    return static_cast<Signed>(x) > static_cast<Signed>(F::sign | F::infinity | F::below);
  }
  // Numbers that a word holds only the upper bits of differ in those alone.
  RELU_XP_INLINE static constexpr Word key(Word x) {
    return static_cast<Word>(static_cast<Word>(x ^ ((x & F::sign) != 0 ? F::sign - 1 : Word(0))) &
                             ~F::below);
  }
  // order(-inf)
  static constexpr Word kLowest = static_cast<Word>(F::sign - 1 - F::infinity + F::sign - F::below);

  Word span_;   // of the words from -inf to the threshold
  Word first_;  // of the words from the maximum to +inf
  Word c_;
};

// Whether x <= 0 is false, NaN included.
template <class F>
RELU_XP_INLINE bool above_zero(WordOf<F> x) {
  return Rules<F, false, false, false, false>(0, 0).above(x);
}

template <class F>
RELU_XP_INLINE WordOf<F> relu(WordOf<F> x) {
  return above_zero<F>(x) ? x : WordOf<F>(0);
}

// slope * value; a slope of 0 gives exactly +0, one that is NaN itself.
template <class F>
RELU_XP_INLINE WordOf<F> apply_slope(WordOf<F> slope, WordOf<F> product) {
  using Word = WordOf<F>;
  const bool zero = static_cast<Word>(slope & (F::sign - 1) & ~F::below) == 0;
  return is_nan<F>(slope) ? slope : zero ? Word(0) : product;
}

// Of CReLU, relu(x) beside relu(-x): 1 where x is above 0, plus 2 where -x is; NaN is in both.
template <class F>
RELU_XP_INLINE WordOf<F> crelu_branch(WordOf<F> x) {
  using Word = WordOf<F>;
  const Word upper = above_zero<F>(x), lower = above_zero<F>(F::negate(x));
  return static_cast<Word>(upper + lower + lower);
}

// `first` and `second` are the gradients of the two halves, and `difference` is first - second.
template <class F>
RELU_XP_INLINE WordOf<F> crelu_backward(WordOf<F> branch, WordOf<F> first, WordOf<F> second,
                                        WordOf<F> difference) {
  const WordOf<F> one = branch == 1 ? first : F::negate(second);
  return branch == 0 ? WordOf<F>(0) : branch == 3 ? difference : one;
}

}  // namespace
}  // namespace relu_xp
