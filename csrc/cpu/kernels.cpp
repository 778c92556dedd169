// Selects CPU kernels at run time: the widest instruction set that the processor has.
#include "kernels.h"

#include <ATen/cpu/Utils.h>

#include <atomic>
#include <stdexcept>

#include "sparse_kernels.h"

namespace maskllm {
namespace {

std::vector<InstructionSet> available() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool vbmi = vnni && __builtin_cpu_supports("avx512vbmi");
  const bool bf16 = vbmi && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
  // The system has to be asked for the tiles' registers.
  const bool amx = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && at::cpu::init_amx();
  if (amx) sets.push_back({"avx512_amx", &kAvx512Kernels, &kSparseAvx512Bf16, true, &kAmxTiles});
  if (bf16) sets.push_back({"avx512_bf16", &kAvx512Kernels, &kSparseAvx512Bf16, true, nullptr});
  if (vbmi) sets.push_back({"avx512_vbmi", &kAvx512Kernels, &kSparseAvx512Vbmi, false, nullptr});
  if (vnni) sets.push_back({"avx512_vnni", &kAvx512Kernels, &kSparseAvx512Vnni, false, nullptr});
  if (avx512) sets.push_back({"avx512", &kAvx512Kernels, &kSparseAvx512, false, nullptr});
  if (avx2) sets.push_back({"avx2", &kAvx2Kernels, &kSparseAvx2, false, nullptr});
#endif
  sets.push_back({"portable", &kPortableKernels, &kSparsePortable, false, nullptr});
  return sets;
}

const std::vector<InstructionSet>& sets() {
  static const std::vector<InstructionSet> all = available();
  return all;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{&sets().front()};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : sets()) names.emplace_back(set.name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : sets()) {
    if (name == set.name) {
      chosen().store(&set);
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one this processor has");
}

}  // namespace maskllm
