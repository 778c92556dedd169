// Products by AMX, the matrix unit of Intel's server processors since 2023. A tile is 16 rows of 64 bytes. A file defines MASKLLM_TILES,
// the name of its table, and includes this in a region with the target (MASKLLM_TARGET_BEGIN).
//
// 16 rows of the matrix, expanded to bf16, are tiles as they are, of 32 columns. The activations are put in an order of their own once: a
// tile has the same 32 columns of 16 rows of activations, so that its row p has columns 2 p and 2 p + 1 of all 16.

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "sparse_kernels.h"

#if defined(MASKLLM_EMULATED)
#include "emulated.h"  // tests/ops/emulated
#endif

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

MASKLLM_TARGET_BEGIN

namespace maskllm {
namespace {

constexpr int kSide = 16, kColumns = 32, kNumbers = kSide * kColumns;  // of a tile
constexpr int64_t kStride = kPart + 32, kRowBytes = 2 * kStride;        // of an expanded part: rows lie in different sets of the cache

int64_t steps_of(int64_t in) { return (in + kColumns - 1) / kColumns; }

// Activations come in pairs of blocks, unless there is one block alone.
int64_t blocks_of(int64_t rows) { return rows <= kSide ? 1 : (rows + 2 * kSide - 1) / (2 * kSide) * 2; }

int64_t packed_numbers(int64_t rows, int64_t in) { return blocks_of(rows) * steps_of(in) * kNumbers; }

constexpr std::align_val_t kLine{64};

struct Free {
  void operator()(void* memory) const { ::operator delete[](memory, kLine); }
};

template <class T>
std::unique_ptr<T[], Free> aligned(int64_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new[](count * sizeof(T), kLine)));
}

void pack(const uint16_t* from, int64_t rows, int64_t in, int64_t block, uint16_t* to) {
  const int64_t steps = steps_of(in);
  to += block * steps * kNumbers;
  std::memset(to, 0, steps * kNumbers * sizeof *to);
  for (int64_t row = block * kSide; row < std::min(rows, (block + 1) * kSide); ++row, to += 2) {
    const uint16_t* const x = from + row * in;
    int64_t column = 0;
    for (; column + 2 <= in; column += 2) std::memcpy(to + column * kSide, x + column, 2 * sizeof *x);
    if (column < in) to[column * kSide] = x[column];
  }
}

// The tiles of the thread are configured while an object of this class exists; oneDNN keeps its configuration from product to product.
class Configured {
 public:
  Configured() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
    } tiles;
    _tile_storeconfig(before_);
    _tile_loadconfig(&tiles);
  }
  ~Configured() {
    if (before_[0] == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(before_);
    }
  }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// 16 rows of the matrix and 16 of activations: sums [16][16], a row for each of the matrix.
void put_tile(const float* sums, const Product& product, int64_t out, int64_t row, int64_t count, int64_t input) {
  const __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(rows, _mm512_set1_epi32(kSide));
  const auto mask = static_cast<__mmask16>((1u << std::min<int64_t>(kSide, count)) - 1);
  __m512 bias = _mm512_setzero_ps();
  if (product.bias != nullptr) {
    const __m256i words = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(product.bias) + row);
    bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  for (int64_t each = 0; each < std::min<int64_t>(kSide, product.rows - input); ++each) {
    const __m512 sum = _mm512_add_ps(_mm512_i32gather_ps(places, sums + each, sizeof(float)), bias);
    auto* const to = static_cast<uint16_t*>(product.result) + (input + each) * out + row;
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(sum));
  }
}

// Tiles 0 to 3 hold sums [16 rows of the matrix, 16 rows of activations], 4 and 5 numbers of the matrix, 6 and 7 of the activations.

void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void load_sums(const float* upper, const float* beside) {
  _tile_loadd(0, upper, 64);
  _tile_loadd(1, upper + kSide * kSide, 64);
  _tile_loadd(2, beside, 64);
  _tile_loadd(3, beside + kSide * kSide, 64);
}

void store_sums(float* upper, float* beside) {
  _tile_stored(0, upper, 64);
  _tile_stored(1, upper + kSide * kSide, 64);
  _tile_stored(2, beside, 64);
  _tile_stored(3, beside + kSide * kSide, 64);
}

// 32 rows of the matrix times 32 of activations, added to the four sums.
void multiply_two(const uint16_t* upper, const uint16_t* first, const uint16_t* second, int64_t steps) {
  const uint16_t* const lower = upper + kSide * kStride;
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, upper + step * kColumns, kRowBytes);
    _tile_loadd(5, lower + step * kColumns, kRowBytes);
    _tile_loadd(6, first + step * kNumbers, 64);
    _tile_loadd(7, second + step * kNumbers, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// 32 rows of the matrix times 16 of activations. Every other step has sums of its own, so that fewer wait for those before them.
void multiply_one(const uint16_t* upper, const uint16_t* first, int64_t steps) {
  const uint16_t* const lower = upper + kSide * kStride;
  for (int64_t step = 0; step < steps; step += 2) {
    _tile_loadd(4, upper + step * kColumns, kRowBytes);
    _tile_loadd(5, lower + step * kColumns, kRowBytes);
    _tile_loadd(6, first + step * kNumbers, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (step + 1 == steps) break;
    _tile_loadd(4, upper + (step + 1) * kColumns, kRowBytes);
    _tile_loadd(5, lower + (step + 1) * kColumns, kRowBytes);
    _tile_loadd(7, first + (step + 1) * kNumbers, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Parts of `some` rows of the matrix are expanded into the cache, and multiplied with all activations.
void linear(const SparseMatrix& matrix, ExpandPart expand_part, const Product& product, int64_t begin, int64_t end) {
  const Configured configured;
  const int64_t some = tile_rows(product.rows), steps = steps_of(matrix.in), pairs = (product.rows + 2 * kSide - 1) / (2 * kSide);
  const auto* const packed = reinterpret_cast<const uint16_t*>(product.inputs);
  const bool one = product.rows <= kSide, stay = pairs == 1 && some == 2 * kSide;  // the sums stay in their tiles
  const auto part = aligned<uint16_t>(some * kStride);
  const auto sums = aligned<float>(some * pairs * 2 * kSide);  // tiles, those of 16 rows of activations after each other
  int64_t index[kMaxTileRows];
  for (int64_t row = begin; row < end; row += some) {
    const int64_t count = std::min(some, end - row);
    for (int64_t each = 0; each < count; ++each) index[each] = matrix.first_value(row + each);
    for (int64_t column = 0; column < matrix.in; column += kPart) {
      for (int64_t each = 0; each < count; ++each) expand_part(matrix, row + each, column, index[each], part.get() + each * kStride, true);
      const int64_t step = column / kColumns, here = std::min(kPart / kColumns, steps - step);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint16_t* const first = packed + (2 * pair * steps + step) * kNumbers;
        for (int64_t each = 0; each < count; each += 2 * kSide) {
          float* const to = sums.get() + (2 * pair * some + each) * kSide;
          float* const beside = to + some * kSide;
          if (column == 0) {
            zero_sums();
          } else if (!stay) {
            load_sums(to, beside);
          }
          if (one) {
            multiply_one(part.get(), first, here);
          } else {
            multiply_two(part.get() + each * kStride, first, first + steps * kNumbers, here);
          }
          if (!stay || column + kPart >= matrix.in) store_sums(to, beside);
        }
      }
    }
    if (one) {
      for (int64_t i = 0; i < some * kSide; ++i) sums[i] += sums[some * kSide + i];
    }
    for (int64_t input = 0; input < product.rows; input += kSide) {
      for (int64_t each = 0; each < count; each += kSide) {
        put_tile(sums.get() + (input / kSide * some + each) * kSide, product, matrix.out, row + each, count - each, input);
      }
    }
  }
}

}  // namespace

const TileKernels MASKLLM_TILES = {packed_numbers, pack, linear};

}  // namespace maskllm

MASKLLM_TARGET_END
