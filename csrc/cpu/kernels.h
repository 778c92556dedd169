// The CPU kernels of one instruction set, and the choice among those that the processor has.
#pragma once

#include <string>
#include <vector>

#include "../include/masked_weight_args.h"

namespace maskllm {

// Each works on blocks [begin, end) of the flattened tensor.
struct CpuKernels {
  const char* name;
  // `sums` may be null.
  void (*forward)(const AnyPattern&, const ForwardArgs&, int64_t begin, int64_t end, Sums* sums);
  void (*backward)(const AnyPattern&, const BackwardArgs&, int64_t begin, int64_t end);
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

// The widest set this processor has, unless `use_instruction_set` named another.
const CpuKernels& cpu_kernels();

// Names this processor can run, widest first, and the choice of one (throws std::invalid_argument for any other).
std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string& name);

}  // namespace maskllm
