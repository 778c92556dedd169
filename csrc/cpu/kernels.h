// The CPU kernels of one instruction set, and the selection of an instruction set.
#pragma once

#include <string>
#include <vector>

#include "../include/masked_weight_args.h"

namespace maskllm {

// Each kernel works on blocks [begin, end) of the flattened tensor.
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

// The kernels in use: the widest set that this processor has, unless `use_instruction_set` selected another.
const CpuKernels& cpu_kernels();

// The names of the sets that this processor can run, widest first; and the selection of one (std::invalid_argument for another).
std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string& name);

}  // namespace maskllm
