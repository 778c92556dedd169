// The products and the expansion of stored matrices, for one instruction set.
#pragma once

#include <cstdint>

#include "../include/sparse_matrix.h"

namespace maskllm {

// The most rows of activations that the memory-bound loops of vector instructions multiply, without a matrix unit (`TileKernels`). For
// more, rows of the matrix are expanded into the cache and multiplied densely.
constexpr int64_t kFewRows = 64;
// The same for a bitmask, whose loop expands rows and multiplies them in fp32: torch's product of a tile is faster from three rows on.
constexpr int64_t kFewExpandedRows = 2;

// Activations are rounded to 8 bits with one scale for this many columns.
constexpr int64_t kColumnsAScale = 128;

// How a loop reads the activations.
enum class Inputs : int { kFloat32, kBFloat16, kQuantized };

// Rows of activations in the form that the loop reads, and what becomes of the sums.
struct Product {
  const uint8_t* inputs;
  int64_t row_bytes, rows;
  void* result;  // [rows, out]
  Type type;     // of the result and the bias
  const void* bias;
};

// Whether a few rows are multiplied in integers: 2:4 and 1:4 with one scale a row, or with groups of a power of two columns that have
// at least four values (so that a 32-bit sum of four products has one scale). All other integers become fp32 numbers.
inline bool multiplies_integers(const SparseMatrix& matrix) {
  if (matrix.form == Places::kBitmask || !matrix.quantized()) return false;
  return matrix.groups <= 1 ||
         (matrix.group_size >= (matrix.form == Places::kTwoOfFour ? 8 : 16) && (matrix.group_size & (matrix.group_size - 1)) == 0);
}

// Expands columns [column, column + kPart) of a row to bf16 numbers. `index` is that of the part's first value, and then that of the next
// part's. `whole`: there is room for a multiple of 32 columns, and zeros are written after the last.
using ExpandPart = void (*)(const SparseMatrix&, int64_t row, int64_t column, int64_t& index, uint16_t* to, bool whole);
constexpr int64_t kPart = 512;

struct SparseKernels {
  // The most rows of activations for which `linear` is faster than torch's product of expanded rows; for a bitmask at most kFewExpandedRows.
  int64_t few_rows;
  // The loop's rows of activations for a matrix: their bytes in a row; `bf16` says whether inputs and values are bf16.
  Inputs (*inputs)(const SparseMatrix&, bool bf16);
  int64_t (*row_bytes)(const SparseMatrix&, Inputs);
  // Brings a row of `in` fp32 activations into that form.
  void (*prepare)(const SparseMatrix&, Inputs, const float* row, uint8_t* to);
  // Rows [begin, end) of the matrix; `begin` is a multiple of kRowsATask. `scratch` has room for 2 * (in + 64) fp32 numbers.
  void (*linear)(const SparseMatrix&, Inputs, const Product&, int64_t begin, int64_t end, float* scratch);
  // A row as dense fp32, bf16 or fp16 numbers. `scratch` as above.
  void (*expand)(const SparseMatrix&, int64_t row, Type type, void* to, float* scratch);
  // What expands parts of this matrix's rows to bf16; null if nothing does.
  ExpandPart (*expand_part)(const SparseMatrix&);
};

// Products with bf16 activations by a matrix unit.
struct TileKernels {
  // The activations in the order of the tiles take so many numbers, and `pack` puts the 16 rows of a block [16 block, 16 block + 16) there.
  int64_t (*packed_numbers)(int64_t rows, int64_t in);
  void (*pack)(const uint16_t* from, int64_t rows, int64_t in, int64_t block, uint16_t* to);
  // Rows [begin, end) of the matrix. `product` has packed inputs and a bf16 result.
  void (*linear)(const SparseMatrix&, ExpandPart, const Product&, int64_t begin, int64_t end);
};

constexpr int64_t kMaxTileRows = 128;
// Ranges of rows begin at multiples of this.
constexpr int64_t tile_rows(int64_t rows) { return rows <= 64 ? 32 : kMaxTileRows; }

// Ranges of rows begin at multiples of this, so that the loops of several rows, and with them the bits of the sums, are the same with
// any number of threads.
constexpr int64_t kRowsATask = 4;

extern const SparseKernels kSparsePortable;
#if defined(__x86_64__)
extern const SparseKernels kSparseAvx2;
extern const SparseKernels kSparseAvx512;
extern const SparseKernels kSparseAvx512Vnni;
extern const SparseKernels kSparseAvx512Vbmi;
extern const SparseKernels kSparseAvx512Bf16;
extern const TileKernels kAmxTiles;
#endif

// Adds the bias and rounds.
MASKLLM_INLINE void put(const SparseMatrix& matrix, const Product& product, int64_t input, int64_t row, float sum) {
  const int64_t at = input * matrix.out + row;
  switch (product.type) {
    case Type::kFloat32:
      if (product.bias != nullptr) sum += static_cast<const float*>(product.bias)[row];
      static_cast<float*>(product.result)[at] = sum;
      break;
    case Type::kBFloat16:
      if (product.bias != nullptr) sum += load(static_cast<const BFloat16*>(product.bias)[row]);
      store(static_cast<BFloat16*>(product.result)[at], sum);
      break;
    case Type::kFloat16:
      if (product.bias != nullptr) sum += load(static_cast<const Float16*>(product.bias)[row]);
      store(static_cast<Float16*>(product.result)[at], sum);
      break;
  }
}

}  // namespace maskllm
