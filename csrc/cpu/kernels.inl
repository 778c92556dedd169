// The loops over blocks, included once for each instruction set. MASKLLM_ISA names the set, and the function attribute MASKLLM_TARGET
// selects it. No file is compiled for the set as a whole: the linker merges equal inline functions of all files, so one compiled for
// AVX-512 could run on a processor without it.

#include <algorithm>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace maskllm {
namespace {

constexpr int kLanes = 32;

// While an object of this class exists, numbers below 1.2e-38 count as zero. The gradients of improbable candidates are that small, and
// x86 needs over a hundred cycles for each operation on such a number.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#endif
};

// Transfers between memory and lanes. A whole tile with 4 or 6 fp32 values or four 16-bit values per block goes through 64-bit words
// (little-endian). The compiler turns these loops over groups of one, two or three words into shuffles. Element by element, the transfer
// would take as long as the arithmetic. All other tiles go element by element.

template <int Words>
MASKLLM_TARGET void read_words(const float* from, float (*lanes)[kLanes]) {
  uint64_t words[Words * kLanes];
  uint32_t bits[2 * Words][kLanes];
  std::memcpy(words, from, sizeof words);
  for (int i = 0; i < kLanes; ++i) {
    MASKLLM_UNROLL
    for (int h = 0; h < Words; ++h) {
      bits[2 * h][i] = static_cast<uint32_t>(words[Words * i + h]);
      bits[2 * h + 1][i] = static_cast<uint32_t>(words[Words * i + h] >> 32);
    }
  }
  std::memcpy(lanes, bits, sizeof bits);
}

template <int Words>
MASKLLM_TARGET void write_words(float* to, bool accumulate, const float (*lanes)[kLanes]) {
  uint32_t bits[2 * Words][kLanes];
  uint64_t words[Words * kLanes];
  std::memcpy(bits, lanes, sizeof bits);
  for (int i = 0; i < kLanes; ++i) {
    MASKLLM_UNROLL
    for (int h = 0; h < Words; ++h) words[Words * i + h] = bits[2 * h][i] | static_cast<uint64_t>(bits[2 * h + 1][i]) << 32;
  }
  if (!accumulate) {
    std::memcpy(to, words, sizeof words);
    return;
  }
  float values[2 * Words * kLanes];
  std::memcpy(values, words, sizeof values);
  for (int i = 0; i < 2 * Words * kLanes; ++i) to[i] += values[i];
}

template <class Half>
MASKLLM_TARGET void read_fours(const Half* from, float (*lanes)[kLanes]) {
  uint64_t words[kLanes];
  std::memcpy(words, from, sizeof words);
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < kLanes; ++i) lanes[j][i] = load(Half{static_cast<uint16_t>(words[i] >> 16 * j)});
  }
}

template <class Half>
MASKLLM_TARGET void write_fours(Half* to, const float (*lanes)[kLanes]) {
  uint32_t bits[4][kLanes];
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < kLanes; ++i) {
      Half half;
      store(half, lanes[j][i]);
      bits[j][i] = half.bits;
    }
  }
  uint64_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    words[i] = (bits[0][i] | bits[1][i] << 16) | static_cast<uint64_t>(bits[2][i] | bits[3][i] << 16) << 32;
  }
  std::memcpy(to, words, sizeof words);
}

// Reads a tile of `count` blocks with `size` values each. Lanes from `count` on become zero.
template <class Value>
MASKLLM_TARGET void read_as(const Value* from, int size, int count, float (*lanes)[kLanes]) {
  if constexpr (std::is_same_v<Value, float>) {
    if (count == kLanes && size == 4) return read_words<2>(from, lanes);
    if (count == kLanes && size == 6) return read_words<3>(from, lanes);
  } else {
    if (count == kLanes && size == 4) return read_fours(from, lanes);
  }
  for (int j = 0; j < size; ++j) {
    for (int i = 0; i < kLanes; ++i) lanes[j][i] = i < count ? load(from[i * size + j]) : 0.0f;
  }
}

template <class Value>
MASKLLM_TARGET void write_as(Value* to, bool accumulate, int size, int count, const float (*lanes)[kLanes]) {
  if constexpr (std::is_same_v<Value, float>) {
    if (count == kLanes && size == 4) return write_words<2>(to, accumulate, lanes);
    if (count == kLanes && size == 6) return write_words<3>(to, accumulate, lanes);
  } else {
    if (count == kLanes && size == 4 && !accumulate) return write_fours(to, lanes);
  }
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < size; ++j) {
      store(to[i * size + j], accumulate ? load(to[i * size + j]) + lanes[j][i] : lanes[j][i]);
    }
  }
}

MASKLLM_TARGET void read(const void* from, Type type, int64_t block, int size, int count, float (*lanes)[kLanes]) {
  const int64_t start = block * size;
  switch (type) {
    case Type::kFloat32:
      return read_as(static_cast<const float*>(from) + start, size, count, lanes);
    case Type::kBFloat16:
      return read_as(static_cast<const BFloat16*>(from) + start, size, count, lanes);
    case Type::kFloat16:
      return read_as(static_cast<const Float16*>(from) + start, size, count, lanes);
  }
}

MASKLLM_TARGET void write(void* to, Type type, bool accumulate, int64_t block, int size, int count, const float (*lanes)[kLanes]) {
  const int64_t start = block * size;
  switch (type) {
    case Type::kFloat32:
      return write_as(static_cast<float*>(to) + start, accumulate, size, count, lanes);
    case Type::kBFloat16:
      return write_as(static_cast<BFloat16*>(to) + start, accumulate, size, count, lanes);
    case Type::kFloat16:
      return write_as(static_cast<Float16*>(to) + start, accumulate, size, count, lanes);
  }
}

// Philox counter words of the tile that starts at local block `block`. A tile may span several rows of the shard.
MASKLLM_TARGET void counters(const Shard& shard, int64_t block, uint32_t (&low)[kLanes], uint32_t (&high)[kLanes]) {
  int64_t row = block / shard.blocks, column = block % shard.blocks;
  for (int filled = 0; filled < kLanes; ++row, column = 0) {
    const int64_t first = shard.global_block(row, column) - filled;
    const int end = static_cast<int>(std::min<int64_t>(kLanes, filled + shard.blocks - column));
    for (; filled < end; ++filled) {
      low[filled] = counter_low(first + filled);
      high[filled] = counter_high(first + filled);
    }
  }
}

// A tile of kLanes blocks with its probabilities and mask.
template <class P>
struct Tile {
  float weight[P::capacity_m][kLanes], logit[P::capacity][kLanes], y[P::capacity][kLanes], mask[P::capacity_m][kLanes];
};

template <class P>
MASKLLM_TARGET void draw_tile(const P& p, const MaskedWeightArgs& args, int64_t block, int count, Tile<P>& tile) {
  uint32_t low[kLanes], high[kLanes];
  counters(args.shard, block, low, high);
  read(args.weight, args.weight_type, block, p.m, count, tile.weight);
  read(args.logits, args.logits_type, block, p.candidates, count, tile.logit);
  probabilities<P, kLanes>(p, args.draw, low, high, tile.logit, tile.y);
  mask_of<P, kLanes>(p, args.draw.hard, tile.y, tile.mask);
}

template <class P>
MASKLLM_TARGET void forward_of(const P& p, const ForwardArgs& args, int64_t begin, int64_t end, Sums* sums) {
  Tile<P> tile;
  for (int64_t block = begin; block < end; block += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - block));
    draw_tile(p, args, block, count, tile);
    for (int j = 0; j < p.m; ++j) {
      MASKLLM_LANES
      for (int i = 0; i < kLanes; ++i) tile.mask[j][i] *= tile.weight[j][i];
    }
    write(args.masked, args.weight_type, false, block, p.m, count, tile.mask);
    if (sums != nullptr) {
      float squares[kLanes] = {}, certainty[kLanes];
      certainty_of<P, kLanes>(p, args.draw.scale, tile.logit, certainty);
      for (int j = 0; j < p.m; ++j) {
        MASKLLM_LANES
        for (int i = 0; i < kLanes; ++i) squares[i] += tile.mask[j][i] * tile.mask[j][i];
      }
      for (int i = 0; i < count; ++i) {
        sums->squares += squares[i];
        sums->certainty += certainty[i];
      }
    }
  }
}

template <class P>
MASKLLM_TARGET void backward_of(const P& p, const BackwardArgs& args, int64_t begin, int64_t end) {
  Tile<P> tile;
  float grad[P::capacity_m][kLanes];
  for (int64_t block = begin; block < end; block += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - block));
    draw_tile(p, args, block, count, tile);
    read(args.grad, args.weight_type, block, p.m, count, grad);
    gradients<P, kLanes>(p, args.draw, tile.weight, tile.mask, grad, tile.y);
    write(args.grad_logits, args.grad_logits_type, args.accumulate, block, p.candidates, count, tile.y);
    if (args.grad_weight != nullptr) write(args.grad_weight, args.weight_type, false, block, p.m, count, grad);
  }
}

bool is(const AnyPattern& p, int m, int candidates) { return p.m == m && p.candidates == candidates; }

// 1:4 and 3:4 both have four candidates. Their first candidates differ.
bool is_two_of_four(const AnyPattern& p) { return is(p, 4, 6); }
bool is_one_of_four(const AnyPattern& p) { return is(p, 4, 4) && p.kept[0] == 1; }

void forward(const AnyPattern& p, const ForwardArgs& args, int64_t begin, int64_t end, Sums* sums) {
  [[maybe_unused]] const FlushDenormals flush;
  if (is_two_of_four(p)) return forward_of(TwoOfFour{}, args, begin, end, sums);
  if (is_one_of_four(p)) return forward_of(OneOfFour{}, args, begin, end, sums);
  forward_of(p, args, begin, end, sums);
}

void backward(const AnyPattern& p, const BackwardArgs& args, int64_t begin, int64_t end) {
  [[maybe_unused]] const FlushDenormals flush;
  if (is_two_of_four(p)) return backward_of(TwoOfFour{}, args, begin, end);
  if (is_one_of_four(p)) return backward_of(OneOfFour{}, args, begin, end);
  backward_of(p, args, begin, end);
}

}  // namespace

#define MASKLLM_CONCAT_(a, b) a##b
#define MASKLLM_CONCAT(a, b) MASKLLM_CONCAT_(a, b)
const CpuKernels MASKLLM_CONCAT(k, MASKLLM_CONCAT(MASKLLM_ISA, Kernels)) = {forward, backward};

}  // namespace maskllm
