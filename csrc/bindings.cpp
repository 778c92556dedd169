// The extension module maskllm.ops._kernels. Importing it registers the compiled operators with torch. Its functions describe the
// build, select CPU instructions for tests and benchmarks, and give the tests access to the shared arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"

namespace {

// maskllm/ops/extension.py searches the file for this text before it loads it: an extension built for another torch may crash.
#if defined(MASKLLM_CUDA_VERSION)
const char kBuiltWith[] = "maskllm kernels built with torch=" MASKLLM_TORCH_VERSION ";cuda=" MASKLLM_CUDA_VERSION ";";
#else
const char kBuiltWith[] = "maskllm kernels built with torch=" MASKLLM_TORCH_VERSION ";";
#endif

// The draws k of one block, one per candidate.
std::vector<int64_t> draws(uint64_t key, uint64_t sample, int64_t block, int candidates) {
  const maskllm::Key words = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(sample),
                              static_cast<uint32_t>(sample >> 32)};
  const uint32_t low[1] = {maskllm::counter_low(block)}, high[1] = {maskllm::counter_high(block)};
  std::vector<int64_t> result;
  for (int call = 0; static_cast<int>(result.size()) < candidates; ++call) {
    float six[maskllm::kDrawsPerCall][1];
    maskllm::draw_six<1>(words, low, high, call, six);
    for (const auto& draw : six) result.push_back(static_cast<int64_t>(draw[0]));
  }
  result.resize(candidates);
  return result;
}

float exp_value(float x) { return maskllm::exp_of(x); }
float log_value(float x) { return maskllm::log_of(x); }
float gumbel_value(float draw) { return maskllm::gumbel_of(draw); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("built_with") = kBuiltWith;
#if defined(MASKLLM_CUDA_VERSION)
  module.attr("cuda_version") = MASKLLM_CUDA_VERSION;
  module.attr("cuda_architectures") = MASKLLM_CUDA_ARCHITECTURES;
#else
  module.attr("cuda_version") = pybind11::none();
  module.attr("cuda_architectures") = pybind11::none();
#endif
#if defined(MASKLLM_CUSPARSELT)
  module.attr("has_cusparselt") = true;
#else
  module.attr("has_cusparselt") = false;
#endif
  module.def("instruction_sets", maskllm::instruction_sets, "Instruction sets of the CPU kernels this processor can run, widest first.");
  module.def("instruction_set", [] { return maskllm::instruction_set().name; }, "The instruction set in use.");
  module.def("use_instruction_set", maskllm::use_instruction_set, "Use another of `instruction_sets()`.");
  module.def("draws", draws, "The 21-bit draws of one block, one per candidate, which become the noise.");
  module.def("exp", pybind11::vectorize(exp_value), "The kernels' e^x of an fp32 array of non-positive numbers.");
  module.def("log", pybind11::vectorize(log_value), "The kernels' natural logarithm of an fp32 array of positive numbers.");
  module.def("gumbel", pybind11::vectorize(gumbel_value), "The kernels' Gumbel noise of an fp32 array of draws k + 0.5.");
}
