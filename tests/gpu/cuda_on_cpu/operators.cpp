// The operators of csrc/cuda as operators `maskllm_emulated::*` on CPU tensors.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, device, name) _TORCH_LIBRARY_IMPL(maskllm_emulated, CPU, name, C10_UID)

#include "cuda/operators.cpp"
#include "cuda/sparse_operators.cpp"
