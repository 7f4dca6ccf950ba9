// Which instruction sets the processor has.

#include <cstring>

#include "cpu_kernels.h"

#ifdef RELU_XP_X86
#include <cpuid.h>
#endif

namespace relu_xp {
namespace {

#ifdef RELU_XP_X86
// The highest of x86-64-v1 to -v4 that the processor and the system have. GCC 11 and clang 14 do
// not know __builtin_cpu_supports("x86-64-v3"), nor the features that are read from CPUID here.
int x86_64_level() {
  __builtin_cpu_init();
  unsigned a, b, d, basic = 0, extended = 0;
  if (__get_cpuid(1, &a, &b, &basic, &d) == 0) return 1;
  if (__get_cpuid(0x80000001, &a, &b, &extended, &d) == 0) return 1;
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return 1;
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  (basic & bit_F16C) != 0 && (basic & bit_MOVBE) != 0 &&
                  (extended & bit_LZCNT) != 0;
  if (!v3) return 2;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : 3;
}
#endif

}  // namespace

const InstructionSet* find_instruction_set(const char* name) {
#ifdef RELU_XP_X86
  static const int level = x86_64_level();
  static const InstructionSet sets[] = {{"x86-64-v4", level >= 4, &v4::kernels},
                                        {"x86-64-v3", level >= 3, &v3::kernels},
                                        {"x86-64-v2", level >= 2, &v2::kernels}};
#else
  static const InstructionSet sets[] = {{"baseline", true, &baseline::kernels}};
#endif
  for (const InstructionSet& set : sets) {
    if (name == nullptr ? set.available : std::strcmp(set.name, name) == 0) return &set;
  }
  return nullptr;
}

}  // namespace relu_xp
