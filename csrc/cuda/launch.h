// Starts a kernel. The .cu files use no other syntax of nvcc's own, so that tests/gpu/cuda_on_cpu compiles them with a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace maskllm {

// `blocks` blocks of `threads` threads.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace maskllm
