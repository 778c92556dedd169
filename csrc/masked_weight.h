// Converts the operators' arguments to the kernels' arguments, for CPU and CUDA. maskllm/ops/masked_weight.py declares the operators
// and checks a user's arguments. The checks here prevent a direct caller from reading out of bounds.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "include/masked_weight_args.h"
#include "tensors.h"

namespace maskllm {

struct MaskedWeightCall {
  const at::Tensor& weight;
  const at::Tensor& mask_logits;
  int64_t n, m, key, sample;
  at::IntArrayRef shard;
  double scale, temperature, weight_reg;
  bool hard;
};

inline void check_like(const at::Tensor& tensor, const at::Tensor& like, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.sizes() == like.sizes() && tensor.device() == like.device(), name, " is ",
              tensor.sizes(), " on ", tensor.device(), tensor.is_contiguous() ? "" : ", not contiguous", "; wanted a contiguous ",
              like.sizes(), " on ", like.device());
}

inline void fill(const MaskedWeightCall& call, const AnyPattern& pattern, MaskedWeightArgs& args) {
  const at::Tensor &weight = call.weight, &logits = call.mask_logits;
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) % call.m == 0, "weight is ", weight.sizes(), "; wanted [out, in], in a multiple of ",
              call.m);
  const int64_t blocks = weight.size(1) / call.m;
  TORCH_CHECK(logits.dim() == 3 && logits.size(0) == weight.size(0) && logits.size(1) == blocks &&
                  logits.size(2) == pattern.candidates,
              "mask_logits is ", logits.sizes(), "; wanted [", weight.size(0), ", ", blocks, ", ", pattern.candidates, "]");
  TORCH_CHECK(weight.is_contiguous() && logits.is_contiguous(), "weight and mask_logits must be contiguous");
  TORCH_CHECK(weight.device() == logits.device(), "weight is on ", weight.device(), " and mask_logits on ", logits.device());
  TORCH_CHECK(call.shard.size() == 5, "shard has ", call.shard.size(), " numbers; wanted 5");
  args.weight = weight.const_data_ptr();
  args.logits = logits.const_data_ptr();
  args.weight_type = type_of(weight, "weight");
  args.logits_type = type_of(logits, "mask_logits");
  args.shard = {blocks, call.shard[0], call.shard[1], call.shard[2], call.shard[3], call.shard[4]};
  const auto key = static_cast<uint64_t>(call.key), sample = static_cast<uint64_t>(call.sample);
  args.draw.key = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(sample),
                   static_cast<uint32_t>(sample >> 32)};
  args.draw.scale = static_cast<float>(call.scale);
  args.draw.inverse_temperature = static_cast<float>(1 / call.temperature);
  args.draw.gradient_scale = static_cast<float>(call.scale / call.temperature);
  args.draw.twice_weight_reg = static_cast<float>(2 * call.weight_reg);
  args.draw.hard = call.hard;
}

inline BackwardArgs backward_args(const MaskedWeightCall& call, const AnyPattern& pattern, const at::Tensor& grad,
                                  at::Tensor& grad_logits, bool accumulate, const std::optional<at::Tensor>& grad_weight) {
  BackwardArgs args;
  fill(call, pattern, args);
  check_like(grad, call.weight, "grad");
  TORCH_CHECK(grad.scalar_type() == call.weight.scalar_type(), "grad is ", grad.scalar_type(), "; wanted the weight's dtype");
  // Megatron's main_grad is a view into a flat buffer, with the parameter's shape.
  check_like(grad_logits, call.mask_logits, "grad_logits");
  args.grad = grad.const_data_ptr();
  args.grad_logits = grad_logits.mutable_data_ptr();
  args.grad_logits_type = type_of(grad_logits, "grad_logits");
  args.accumulate = accumulate;
  args.grad_weight = nullptr;
  if (grad_weight.has_value()) {
    check_like(*grad_weight, call.weight, "grad_weight");
    TORCH_CHECK(grad_weight->scalar_type() == call.weight.scalar_type(), "grad_weight is ", grad_weight->scalar_type(),
                "; wanted the weight's dtype");
    args.grad_weight = grad_weight->mutable_data_ptr();
  }
  return args;
}

}  // namespace maskllm
