// PReLU with one slope for a long run of elements.

#ifndef RELU_XP_PRELU_H
#define RELU_XP_PRELU_H

#include "strided.h"

namespace relu_xp {

// Whether `run_channels` may run a job of kPrelu, whose slopes stay the same over long runs.
bool has_channels(const Job& job);

// Runs it as `run_job` does; each run of elements with one slope is a leaky ReLU.
void run_channels(void* context, std::size_t begin, std::size_t end);

}  // namespace relu_xp

#endif
