// The AVX-512 products with VNNI, VBMI, VBMI2 and BF16, and those with AMX, over emulated instructions (emulated.h), called from a test
// through ctypes.
#include <memory>
#include <vector>

#include "include/target.h"

#define MASKLLM_EMULATED
#define MASKLLM_VNNI
#define MASKLLM_VBMI
#define MASKLLM_BF16
#define MASKLLM_SPARSE kSparseEmulated
#define MASKLLM_TILES kTilesEmulated
#define MASKLLM_TARGET_BEGIN MASKLLM_TARGET_REGION("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")

namespace maskllm {
extern const struct SparseKernels kSparseEmulated;
extern const struct TileKernels kTilesEmulated;
}

#include "cpu/sparse_avx512.inl"
#include "cpu/sparse_amx.inl"

// Fields: form, type, n, m, out, in, kept, all_values, value_bytes, place_bytes, groups, group_size.
static maskllm::SparseMatrix matrix_of(const uint8_t* values, const uint8_t* places, const float* scales, const int64_t* fields) {
  maskllm::SparseMatrix matrix{};
  matrix.values = values;
  matrix.places = places;
  matrix.scales = scales;
  matrix.form = static_cast<maskllm::Places>(fields[0]);
  matrix.type = static_cast<maskllm::Values>(fields[1]);
  matrix.n = static_cast<int>(fields[2]);
  matrix.m = static_cast<int>(fields[3]);
  int64_t* const sizes[] = {&matrix.out, &matrix.in, &matrix.kept, &matrix.all_values, &matrix.value_bytes, &matrix.place_bytes,
                            &matrix.groups, &matrix.group_size};
  for (int i = 0; i < 8; ++i) *sizes[i] = fields[4 + i];
  return matrix;
}

// Returns the form of the inputs.
extern "C" int product(const uint8_t* values, const uint8_t* places, const float* scales, const int64_t* fields, const float* x,
                       int64_t rows, bool bf16, float* result) {
  using namespace maskllm;
  const SparseMatrix matrix = matrix_of(values, places, scales, fields);
  const Inputs form = kSparseEmulated.inputs(matrix, bf16);
  const int64_t row_bytes = kSparseEmulated.row_bytes(matrix, form);
  std::vector<uint8_t> inputs(rows * row_bytes);
  for (int64_t row = 0; row < rows; ++row) kSparseEmulated.prepare(matrix, form, x + row * matrix.in, inputs.data() + row * row_bytes);
  std::vector<float> scratch(2 * (matrix.in + 64));
  kSparseEmulated.linear(matrix, form, {inputs.data(), row_bytes, rows, result, Type::kFloat32, nullptr}, 0, matrix.out, scratch.data());
  return static_cast<int>(form);
}

// The dense matrix in bf16.
extern "C" void expand_to_bf16(const uint8_t* values, const uint8_t* places, const float* scales, const int64_t* fields, uint16_t* dense) {
  using namespace maskllm;
  const SparseMatrix matrix = matrix_of(values, places, scales, fields);
  std::vector<float> scratch(2 * (matrix.in + 64));
  for (int64_t row = 0; row < matrix.out; ++row) {
    kSparseEmulated.expand(matrix, row, Type::kBFloat16, dense + row * matrix.in, scratch.data());
  }
}

// The product with bf16 activations by tiles. Returns whether the matrix can be expanded for them.
extern "C" bool tiles(const uint8_t* values, const uint8_t* places, const float* scales, const int64_t* fields, const uint16_t* x,
                      int64_t rows, const uint16_t* bias, uint16_t* result) {
  using namespace maskllm;
  const SparseMatrix matrix = matrix_of(values, places, scales, fields);
  const ExpandPart expand_part = kSparseEmulated.expand_part(matrix);
  if (expand_part == nullptr) return false;
  std::vector<uint16_t> packed(kTilesEmulated.packed_numbers(rows, matrix.in));
  const int64_t blocks = packed.size() / kTilesEmulated.packed_numbers(1, matrix.in);
  for (int64_t block = 0; block < blocks; ++block) kTilesEmulated.pack(x, rows, matrix.in, block, packed.data());
  const Product product{reinterpret_cast<const uint8_t*>(packed.data()), 0, rows, result, Type::kBFloat16, bias};
  kTilesEmulated.linear(matrix, expand_part, product, 0, matrix.out);
  return true;
}
