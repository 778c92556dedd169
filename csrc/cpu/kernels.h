// The CPU kernels of the instruction sets, and the selection of one.
#pragma once

#include <string>
#include <vector>

#include "../include/masked_weight_args.h"

namespace maskllm {

// Of sparse_kernels.h.
struct SparseKernels;
struct TileKernels;

// The masked-weight kernels. Each works on blocks [begin, end) of the flattened tensor.
struct CpuKernels {
  // `sums` may be null.
  void (*forward)(const AnyPattern&, const ForwardArgs&, int64_t begin, int64_t end, Sums* sums);
  void (*backward)(const AnyPattern&, const BackwardArgs&, int64_t begin, int64_t end);
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

// What the processor can run.
struct InstructionSet {
  const char* name;
  const CpuKernels* masked_weight;
  const SparseKernels* sparse;
  bool bf16;  // torch's bf16 products are faster than its fp32 products
  const TileKernels* tiles;  // null without
};

// The set in use: the widest one that this processor has, unless `use_instruction_set` selected another.
const InstructionSet& instruction_set();

// The names of the sets that this processor can run, widest first; and the selection of one (std::invalid_argument for another).
std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string& name);

}  // namespace maskllm
