// Arguments of the masked-weight kernels, in plain types. All tensors are contiguous, [out, in] and [out, in / M, C]. A block is an
// index into the flattened rows.
#pragma once

#include "masked_block.h"
#include "storage.h"

namespace maskllm {

struct MaskedWeightArgs {
  const void* weight;
  const void* logits;
  Type weight_type;  // also the type of the masked weight and of the gradients of both
  Type logits_type;
  Shard shard;
  Draw draw;
};

struct ForwardArgs : MaskedWeightArgs {
  void* masked;
};

struct BackwardArgs : MaskedWeightArgs {
  const void* grad;
  void* grad_logits;
  Type grad_logits_type;
  bool accumulate;    // add to grad_logits
  void* grad_weight;  // or null
};

// The contribution of a chunk of blocks to `stats`.
struct Sums {
  double squares = 0, certainty = 0;
};

}  // namespace maskllm
