// The method on W blocks side by side (MaskLLM, arXiv 2409.17481, section 3.2), forward and backward. maskllm/ops/reference.py has the
// same formulas in PyTorch operators.
#pragma once

#include "pattern.h"
#include "philox.h"

namespace maskllm {

struct Draw {
  Key key;
  float scale;                // kappa
  float inverse_temperature;  // 1 / tau
  float gradient_scale;       // kappa / tau
  float twice_weight_reg;     // 2 lambda
  bool hard;
};

// score = scale * (l - max l). Subtracting the block's largest logit does not change the softmax. It prevents large logits from
// overflowing and from losing the noise to rounding. `score` may be `logit`.
template <class P, int W>
MASKLLM_INLINE void scaled_scores(const P& p, float scale, const float (&logit)[P::capacity][W], float (&score)[P::capacity][W]) {
  float largest[W];
  MASKLLM_LANES
  for (int i = 0; i < W; ++i) largest[i] = logit[0][i];
  MASKLLM_UNROLL
  for (int c = 1; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) largest[i] = largest[i] < logit[c][i] ? logit[c][i] : largest[i];
  }
  MASKLLM_UNROLL
  for (int c = 0; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) score[c][i] = scale * (logit[c][i] - largest[i]);
  }
}

// Replaces score by exp(score - max score) and puts the sum into `sum`.
template <class P, int W>
MASKLLM_INLINE void exponentials(const P& p, float (&score)[P::capacity][W], float (&sum)[W]) {
  float largest[W];
  MASKLLM_LANES
  for (int i = 0; i < W; ++i) {
    largest[i] = score[0][i];
    sum[i] = 0.0f;
  }
  MASKLLM_UNROLL
  for (int c = 1; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) largest[i] = largest[i] < score[c][i] ? score[c][i] : largest[i];
  }
  MASKLLM_UNROLL
  for (int c = 0; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) {
      score[c][i] = exp_of(score[c][i] - largest[i]);
      sum[i] += score[c][i];
    }
  }
}

// y = softmax((scale * l + g) / temperature).
template <class P, int W>
MASKLLM_INLINE void probabilities(const P& p, const Draw& d, const uint32_t (&block_low)[W], const uint32_t (&block_high)[W],
                                  const float (&logit)[P::capacity][W], float (&y)[P::capacity][W]) {
  scaled_scores<P, W>(p, d.scale, logit, y);
  MASKLLM_UNROLL
  for (int first = 0; first < p.candidates; first += kDrawsPerCall) {
    float draw[kDrawsPerCall][W];
    draw_six<W>(d.key, block_low, block_high, first / kDrawsPerCall, draw);
    MASKLLM_UNROLL
    for (int k = 0; k < kDrawsPerCall; ++k) {
      const int c = first + k;
      if (c < p.candidates) {
        MASKLLM_LANES
        for (int i = 0; i < W; ++i) y[c][i] = (y[c][i] + gumbel_of(draw[k][i])) * d.inverse_temperature;
      }
    }
  }
  float sum[W];
  exponentials<P, W>(p, y, sum);
  MASKLLM_LANES
  for (int i = 0; i < W; ++i) sum[i] = 1.0f / sum[i];
  MASKLLM_UNROLL
  for (int c = 0; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) y[c][i] *= sum[i];
  }
}

// The largest entry of softmax(scale * l), which is 1 / sum of exp(scale * (l - max l)).
template <class P, int W>
MASKLLM_INLINE void certainty_of(const P& p, float scale, const float (&logit)[P::capacity][W], float (&certainty)[W]) {
  float score[P::capacity][W];
  scaled_scores<P, W>(p, scale, logit, score);
  exponentials<P, W>(p, score, certainty);
  MASKLLM_LANES
  for (int i = 0; i < W; ++i) certainty[i] = 1.0f / certainty[i];
}

// Index of the largest value, the lowest index of equal values.
template <class P, int W>
MASKLLM_INLINE void first_argmax(const P& p, const float (&value)[P::capacity][W], int32_t (&best)[W]) {
  float largest[W];
  MASKLLM_LANES
  for (int i = 0; i < W; ++i) {
    largest[i] = value[0][i];
    best[i] = 0;
  }
  MASKLLM_UNROLL
  for (int c = 1; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) {
      const bool above = value[c][i] > largest[i];
      largest[i] = above ? value[c][i] : largest[i];
      best[i] = above ? c : best[i];
    }
  }
}

// m = y S; if `hard`, the row of S of the most probable candidate.
template <class P, int W>
MASKLLM_INLINE void mask_of(const P& p, bool hard, const float (&y)[P::capacity][W], float (&mask)[P::capacity_m][W]) {
  int32_t best[W];
  if (hard) first_argmax<P, W>(p, y, best);
  MASKLLM_UNROLL
  for (int j = 0; j < p.m; ++j) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) mask[j][i] = 0.0f;
  }
  MASKLLM_UNROLL
  for (int c = 0; c < p.candidates; ++c) {
    MASKLLM_UNROLL
    for (int j = 0; j < p.m; ++j) {
      if (!p.keeps(c, j)) continue;
      if (hard) {
        MASKLLM_LANES
        for (int i = 0; i < W; ++i) mask[j][i] = best[i] == c ? 1.0f : mask[j][i];
      } else {
        MASKLLM_LANES
        for (int i = 0; i < W; ++i) mask[j][i] += y[c][i];
      }
    }
  }
}

// Takes the gradient of the masked weight in `grad`, y and m. Puts dL/dl into `y` and dL/dW into `grad`.
// G = grad - 2 lambda W m; dL/dW = G m; with a = S (G W), dL/dl = kappa / tau * y (a - sum_c y_c a_c).
template <class P, int W>
MASKLLM_INLINE void gradients(const P& p, const Draw& d, const float (&weight)[P::capacity_m][W], const float (&mask)[P::capacity_m][W],
                              float (&grad)[P::capacity_m][W], float (&y)[P::capacity][W]) {
  float product[P::capacity_m][W], expected[W];
  MASKLLM_UNROLL
  for (int j = 0; j < p.m; ++j) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) {
      const float g = grad[j][i] - d.twice_weight_reg * (weight[j][i] * mask[j][i]);
      product[j][i] = g * weight[j][i];
      grad[j][i] = g * mask[j][i];
    }
  }
  float a[P::capacity][W];
  MASKLLM_LANES
  for (int i = 0; i < W; ++i) expected[i] = 0.0f;
  MASKLLM_UNROLL
  for (int c = 0; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) a[c][i] = 0.0f;
    MASKLLM_UNROLL
    for (int j = 0; j < p.m; ++j) {
      if (!p.keeps(c, j)) continue;
      MASKLLM_LANES
      for (int i = 0; i < W; ++i) a[c][i] += product[j][i];
    }
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) expected[i] += y[c][i] * a[c][i];
  }
  MASKLLM_UNROLL
  for (int c = 0; c < p.candidates; ++c) {
    MASKLLM_LANES
    for (int i = 0; i < W; ++i) y[c][i] = y[c][i] * (a[c][i] - expected[i]) * d.gradient_scale;
  }
}

}  // namespace maskllm
