// Products with stored matrices on the CPU, and their expansion and check. Parallel over rows in torch's thread pool.
#include "../sparse_matrix.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "sparse_kernels.h"

// MKL's; null if torch has another BLAS.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace maskllm {
namespace {

// The products of this thread in MKL know of one thread. MKL chooses the order of its sums by the number of threads that it may use,
// even where it then uses one alone, as in torch's pool.
class OneThreadInMKL {
 public:
  OneThreadInMKL() : before_(MKL_Set_Num_Threads_Local == nullptr ? 0 : MKL_Set_Num_Threads_Local(1)) {}
  ~OneThreadInMKL() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  OneThreadInMKL(const OneThreadInMKL&) = delete;
  OneThreadInMKL& operator=(const OneThreadInMKL&) = delete;

 private:
  int before_;
};

// Numbers of the kernels' scratch memory: a dense row, and its integers.
std::unique_ptr<float[]> scratch_for(int64_t in) { return std::unique_ptr<float[]>(new float[2 * (in + 64)]); }

// Tasks of kRowsATask rows, at least so many of them that a thread is worth waking.
template <class Work>
void over_rows(const SparseMatrix& matrix, int64_t inputs, const Work& work) {
  const int64_t tasks = (matrix.out + kRowsATask - 1) / kRowsATask;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, kRowsATask * matrix.in * inputs));
  at::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    const auto scratch = scratch_for(matrix.in);
    work(first * kRowsATask, std::min(matrix.out, last * kRowsATask), scratch.get());
  });
}

// Rows [begin, end), written one after the other from `to` on.
void expand_range(const SparseMatrix& matrix, int64_t begin, int64_t end, Type type, void* to, float* scratch) {
  const int64_t row_bytes = matrix.in * (type == Type::kFloat32 ? 4 : 2);
  for (int64_t row = begin; row < end; ++row) {
    instruction_set().sparse->expand(matrix, row, type, static_cast<uint8_t*>(to) + (row - begin) * row_bytes, scratch);
  }
}

void few_rows(const SparseMatrix& matrix, const at::Tensor& input, const void* bias, at::Tensor& result) {
  const SparseKernels& kernels = *instruction_set().sparse;
  const int64_t rows = input.size(0);
  const Inputs form = kernels.inputs(matrix, input.scalar_type() == at::kBFloat16);
  const int64_t row_bytes = kernels.row_bytes(matrix, form);
  const at::Tensor prepared = at::empty({rows * row_bytes}, input.options().dtype(at::kByte));
  auto* const to = prepared.mutable_data_ptr<uint8_t>();
  with_values(input, "input", [&](auto value) {
    const auto* from = static_cast<const decltype(value)*>(input.const_data_ptr());
    at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, matrix.in)), [&](int64_t begin, int64_t end) {
      const auto scratch = scratch_for(matrix.in);
      for (int64_t row = begin; row < end; ++row) {
        const auto* x = from + row * matrix.in;
        for (int64_t column = 0; column < matrix.in; ++column) scratch[column] = load(x[column]);
        kernels.prepare(matrix, form, scratch.get(), to + row * row_bytes);
      }
    });
  });
  const Product product{to, row_bytes, rows, result.mutable_data_ptr(), type_of(result, "result"), bias};
  over_rows(matrix, rows, [&](int64_t begin, int64_t end, float* scratch) {
    kernels.linear(matrix, form, product, begin, end, scratch);
  });
}

// Each thread expands rows of the matrix to a tile in its cache, and torch multiplies the tile on that thread alone: in bf16 where the
// processor has such instructions, else in fp32, which is faster there than torch's own bf16. The tiles, and with them the bits of the
// sums, do not depend on the number of threads. A matrix of one tile is multiplied in parts of the activations' rows, because a task
// alone would run outside of the pool, and torch would share its product among all threads.
void many_rows(const SparseMatrix& matrix, const at::Tensor& input, const std::optional<at::Tensor>& bias, at::Tensor& result) {
  const bool half = instruction_set().bf16 && input.scalar_type() == at::kBFloat16;
  const at::Tensor x = (half ? input : input.to(at::kFloat)).detach();
  const at::Tensor added = bias.has_value() ? bias->to(x.scalar_type()).detach() : at::Tensor();
  // Large tiles, since a product first copies all of its inputs into an order of its own; and tiles enough for 16 threads.
  const int64_t tile_rows = std::clamp<int64_t>((matrix.out / 16 + 15) / 16 * 16, 64, x.size(0) <= 512 ? 256 : 512);
  const int64_t tiles = (matrix.out + tile_rows - 1) / tile_rows, rows = x.size(0);
  const int64_t part_rows = tiles > 1 ? rows : std::min(std::clamp<int64_t>(rows / 16, 128, 512), (rows + 1) / 2);
  const int64_t parts = (rows + part_rows - 1) / part_rows;
  at::parallel_for(0, tiles * parts, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView no_gradients;
    const OneThreadInMKL one_thread;
    const auto scratch = scratch_for(matrix.in);
    at::Tensor tile = at::empty({tile_rows, matrix.in}, x.options());
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task / parts * tile_rows, count = std::min(tile_rows, matrix.out - begin);
      const int64_t row = task % parts * part_rows, some = std::min(part_rows, rows - row);
      if (task == first || row == 0) {
        expand_range(matrix, begin, begin + count, type_of(tile, "tile"), tile.mutable_data_ptr(), scratch.get());
      }
      const at::Tensor weight = tile.narrow(0, 0, count).t(), inputs = x.narrow(0, row, some);
      at::Tensor part = result.narrow(0, row, some).narrow(1, begin, count);
      if (result.scalar_type() != x.scalar_type()) {
        part.copy_(added.defined() ? at::addmm(added.narrow(0, begin, count), inputs, weight) : at::mm(inputs, weight));
      } else if (added.defined()) {
        at::addmm_out(part, added.narrow(0, begin, count), inputs, weight);
      } else {
        at::mm_out(part, inputs, weight);
      }
    }
  });
}

// By a matrix unit: each thread expands parts of rows to bf16 in its cache, and multiplies them there.
void by_tiles(const SparseMatrix& matrix, ExpandPart expand_part, const at::Tensor& input, const void* bias, at::Tensor& result) {
  const TileKernels& tiles = *instruction_set().tiles;
  const int64_t rows = input.size(0), numbers = tiles.packed_numbers(rows, matrix.in), some = tile_rows(rows);
  const at::Tensor packed = at::empty({numbers}, input.options());
  auto* const to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  const auto* const from = static_cast<const uint16_t*>(input.const_data_ptr());
  at::parallel_for(0, numbers / tiles.packed_numbers(1, matrix.in), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) tiles.pack(from, rows, matrix.in, block, to);
  });
  const Product product{reinterpret_cast<const uint8_t*>(to), 0, rows, result.mutable_data_ptr(), Type::kBFloat16, bias};
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (some * matrix.in));  // a thread is worth waking
  at::parallel_for(0, (matrix.out + some - 1) / some, grain, [&](int64_t begin, int64_t end) {
    tiles.linear(matrix, expand_part, product, begin * some, std::min(matrix.out, end * some));
  });
}

// What expands the matrix for products by tiles with these activations; null if other loops are faster: those that gather for a few rows,
// and for many torch's own, which reads them less often from behind the second cache.
ExpandPart tiled(const SparseMatrix& matrix, const at::Tensor& input) {
  const InstructionSet& set = instruction_set();
  if (set.tiles == nullptr || input.scalar_type() != at::kBFloat16 || input.size(0) > 512 || matrix.in == 0) return nullptr;
  const Inputs form = set.sparse->inputs(matrix, true);
  const int64_t gathered = form == Inputs::kQuantized ? 10 : (form == Inputs::kBFloat16 ? 4 : 0);  // most rows of 2:4
  return input.size(0) > gathered * (matrix.form == Places::kOneOfFour ? 2 : 1) ? set.sparse->expand_part(matrix) : nullptr;
}

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& places,
                         const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& row_starts,
                         const std::optional<at::Tensor>& bias, int64_t n, int64_t m, int64_t bits, int64_t group_size) {
  TORCH_CHECK(input.dim() >= 1, "input is a scalar; wanted [..., in]");
  const SparseMatrix matrix = sparse_matrix({values, places, scales, row_starts}, input.size(-1), n, m, bits, group_size);
  const auto [flat, shape] = activations(input, bias, matrix);
  const int64_t rows = flat.size(0);
  at::Tensor result = at::empty({rows, matrix.out}, input.options());
  if (rows > 0 && matrix.out > 0) {
    if (const ExpandPart expand_part = tiled(matrix, flat)) {
      by_tiles(matrix, expand_part, flat, bias.has_value() ? bias->const_data_ptr() : nullptr, result);
    } else if (const int64_t few = instruction_set().sparse->few_rows;
               rows <= (matrix.form == Places::kBitmask ? std::min(few, kFewExpandedRows) : few)) {
      few_rows(matrix, flat, bias.has_value() ? bias->const_data_ptr() : nullptr, result);
    } else {
      many_rows(matrix, flat, bias, result);
    }
  }
  return result.view(shape);
}

// A dense weight by the same loops: on processors without bf16 instructions, torch's own do not reach the memory's bandwidth.
at::Tensor dense_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && input.dim() >= 1 && input.size(-1) == weight.size(1), "input is ", input.sizes(), " and weight ",
              weight.sizes(), "; wanted [..., in] and [out, in]");
  check_shape(weight, "weight", input.scalar_type(), weight.sizes());
  SparseMatrix matrix{};
  matrix.form = Places::kAll;
  matrix.type = values_of(8 * weight.element_size(), weight);
  matrix.values = static_cast<const uint8_t*>(weight.const_data_ptr());
  matrix.out = weight.size(0);
  matrix.in = matrix.kept = weight.size(1);
  matrix.all_values = weight.numel();
  matrix.value_bytes = matrix.in * weight.element_size();
  const auto [flat, shape] = activations(input, bias, matrix);
  at::Tensor result = at::empty({flat.size(0), matrix.out}, input.options());
  if (result.numel() > 0) few_rows(matrix, flat, bias.has_value() ? bias->const_data_ptr() : nullptr, result);
  return result.view(shape);
}

at::Tensor sparse_expand(const at::Tensor& values, const at::Tensor& places, const std::optional<at::Tensor>& scales,
                         const std::optional<at::Tensor>& row_starts, int64_t in_features, int64_t n, int64_t m, int64_t bits,
                         int64_t group_size, at::ScalarType dtype) {
  const SparseMatrix matrix = sparse_matrix({values, places, scales, row_starts}, in_features, n, m, bits, group_size);
  at::Tensor dense = at::empty({matrix.out, matrix.in}, values.options().dtype(dtype));
  const Type type = type_of(dense, "dtype");
  auto* const to = static_cast<uint8_t*>(dense.mutable_data_ptr());
  over_rows(matrix, 1, [&](int64_t begin, int64_t end, float* scratch) {
    expand_range(matrix, begin, end, type, to + begin * matrix.in * dense.element_size(), scratch);
  });
  return dense;
}

struct Found {
  Fault fault;
  int64_t row, index;
};

// The first place in a row that is not one, in blocks.
int64_t bad_place(const SparseMatrix& matrix, const uint8_t* places) {
  const int64_t blocks = matrix.in / 4, whole = blocks / 2;
  uint32_t bad = 0;
  for (int64_t byte = 0; byte < whole; ++byte) {  // p0 < p1 in both halves
    const uint32_t b = places[byte];
    bad |= static_cast<uint32_t>((b & 3u) >= (b >> 2 & 3u)) | static_cast<uint32_t>((b >> 4 & 3u) >= b >> 6);
  }
  if (blocks % 2 != 0) bad |= (places[whole] & 3u) >= (places[whole] >> 2 & 3u);
  if (bad == 0) return -1;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint32_t two = places[block / 2] >> 4 * (block & 1) & 15u;
    if ((two & 3u) >= two >> 2) return block;
  }
  return -1;
}

uint64_t word_at(const uint8_t* from, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, from, std::min<int64_t>(8, bytes));
  return word;
}

// The first block of a bitmask that does not keep N of M.
int64_t bad_block(const SparseMatrix& matrix, const uint8_t* places) {
  const int64_t blocks = matrix.in / matrix.m;
  const uint64_t ones = matrix.m == 64 ? ~uint64_t{0} : (uint64_t{1} << matrix.m) - 1;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t bit = block * matrix.m, byte = bit / 8, shift = bit % 8;
    uint64_t word = word_at(places + byte, matrix.place_bytes - byte) >> shift;
    if (shift + matrix.m > 64) word |= static_cast<uint64_t>(places[byte + 8]) << (64 - shift);
    if (__builtin_popcountll(word & ones) != matrix.n) return block;
  }
  return -1;
}

// The bits after the last block or column.
uint32_t padding_of(const SparseMatrix& matrix, const uint8_t* places) {
  const int64_t bits = matrix.form == Places::kOneOfFour ? matrix.in / 2 : matrix.in;  // 2:4 has 4 bits for 4 columns
  return bits % 8 == 0 ? 0 : places[matrix.place_bytes - 1] >> bits % 8;
}

int64_t count_of(const SparseMatrix& matrix, const uint8_t* places) {
  int64_t count = 0;
  for (int64_t byte = 0; byte < matrix.place_bytes; byte += 8) {
    count += __builtin_popcountll(word_at(places + byte, matrix.place_bytes - byte));
  }
  return count - __builtin_popcount(padding_of(matrix, places));
}

// The first integer in `bytes` that is smaller than the negative of the largest, or -1.
int64_t bad_value(const uint8_t* values, int64_t bytes, bool nibbles) {
  uint32_t bad = 0;
  if (nibbles) {
    for (int64_t i = 0; i < bytes; ++i) {
      bad |= static_cast<uint32_t>((values[i] & 15u) == 8u) | static_cast<uint32_t>(values[i] >> 4 == 8u);
    }
  } else {
    for (int64_t i = 0; i < bytes; ++i) bad |= static_cast<uint32_t>(values[i] == 128u);
  }
  if (bad == 0) return -1;
  for (int64_t i = 0; i < bytes * (nibbles ? 2 : 1); ++i) {
    if (nibbles ? (values[i / 2] >> 4 * (i & 1) & 15) == 8 : values[i] == 128) return i;
  }
  return -1;
}

// The first fault of one kind in the rows, or kFine.
template <class Work>
Found first_of(const SparseMatrix& matrix, Fault fault, const Work& work) {
  std::atomic<int64_t> first{matrix.out};
  at::parallel_for(0, matrix.out, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, matrix.in)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (work(row) < 0) continue;
      int64_t seen = first.load();
      while (row < seen && !first.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  });
  if (first.load() == matrix.out) return {Fault::kFine, 0, 0};
  return {fault, first.load(), work(first.load())};
}

Found first_fault(const SparseMatrix& matrix) {
  Found found{Fault::kFine, 0, 0};
  const auto check = [&](Fault fault, const auto& work) {
    if (found.fault == Fault::kFine) found = first_of(matrix, fault, work);
  };
  if (matrix.row_starts != nullptr) {
    const int64_t* const starts = matrix.row_starts;
    const int64_t a_byte = matrix.type == Values::kInt4 ? 2 : 1;
    for (int64_t row = 0; row < matrix.out; ++row) {
      const int64_t end = starts[row + 1];
      const bool all = end <= matrix.all_values && (end + a_byte - 1) / a_byte * a_byte == matrix.all_values;
      if (end < starts[row] || (row == 0 && starts[0] != 0) || (row + 1 == matrix.out && !all)) return {Fault::kRowStarts, row, 0};
    }
    check(Fault::kCount, [&](int64_t row) {
      return count_of(matrix, matrix.row_places(row)) == starts[row + 1] - starts[row] ? int64_t{-1} : int64_t{0};
    });
  }
  if (matrix.form == Places::kTwoOfFour) check(Fault::kPlaces, [&](int64_t row) { return bad_place(matrix, matrix.row_places(row)); });
  if (matrix.form == Places::kBitmask && matrix.row_starts == nullptr) {
    check(Fault::kCount, [&](int64_t row) { return bad_block(matrix, matrix.row_places(row)); });
  }
  check(Fault::kPadding, [&](int64_t row) { return padding_of(matrix, matrix.row_places(row)) == 0 ? int64_t{-1} : int64_t{0}; });
  if (matrix.scales != nullptr) {
    check(Fault::kScale, [&](int64_t row) {
      for (int64_t group = 0; group < matrix.groups; ++group) {
        const float scale = matrix.scales[row * matrix.groups + group];
        if (!(scale > 0.0f) || std::isinf(scale)) return group;
      }
      return int64_t{-1};
    });
    const bool nibbles = matrix.type == Values::kInt4;
    if (matrix.row_starts == nullptr) {
      check(Fault::kValue,
            [&](int64_t row) { return bad_value(matrix.values + row * matrix.value_bytes, matrix.value_bytes, nibbles); });
    } else if (found.fault == Fault::kFine) {
      const int64_t index = bad_value(matrix.values, matrix.all_values / (nibbles ? 2 : 1), nibbles);
      if (index >= 0) found = {Fault::kValue, 0, index};
    }
  }
  return found;
}

at::Tensor sparse_check(const at::Tensor& values, const at::Tensor& places, const std::optional<at::Tensor>& scales,
                        const std::optional<at::Tensor>& row_starts, int64_t in_features, int64_t n, int64_t m, int64_t bits,
                        int64_t group_size) {
  const Found found = first_fault(sparse_matrix({values, places, scales, row_starts}, in_features, n, m, bits, group_size));
  at::Tensor result = at::empty({3}, values.options().dtype(at::kLong));
  auto* const to = result.mutable_data_ptr<int64_t>();
  to[0] = static_cast<int64_t>(found.fault);
  to[1] = found.row;
  to[2] = found.index;
  return result;
}

}  // namespace
}  // namespace maskllm

TORCH_LIBRARY_IMPL(maskllm, CPU, library) {
  library.impl("sparse_linear", maskllm::sparse_linear);
  library.impl("dense_linear", maskllm::dense_linear);
  library.impl("sparse_expand", maskllm::sparse_expand);
  library.impl("sparse_check", maskllm::sparse_check);
}
