// Selects CPU kernels at run time: the widest instruction set that the processor has.
#include "kernels.h"

#include <atomic>
#include <stdexcept>

namespace maskllm {
namespace {

std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) sets.push_back(&kAvx512Kernels);
  if (avx2) sets.push_back(&kAvx2Kernels);
#endif
  sets.push_back(&kPortableKernels);
  return sets;
}

std::atomic<const CpuKernels*>& chosen() {
  static std::atomic<const CpuKernels*> kernels{available().front()};
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const CpuKernels* set : available()) names.emplace_back(set->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const CpuKernels* set : available()) {
    if (name == set->name) {
      chosen().store(set);
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one this processor has");
}

}  // namespace maskllm
