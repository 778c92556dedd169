// The loops over a stored matrix that all vector instruction sets share. A file includes this after its vector operations, inside of
// its anonymous namespace and its target region.
//
// The loops gather the activations to the kept values instead of expanding the values to columns: memory limits a product of one row, so
// the arithmetic has to be cheap, and it is done on the kept values alone. A step loads the values and the places of kKept values,
// turns the places into the shuffle that picks their activations, and serves every row of activations in turn.
//
// A `Step` policy has: Vector; kKept; kValueBytes, kPlaceBytes (of a step); kInputBytes (activations of a step); kScaled (whether sums
// are multiplied by the row's only scale); kRows, kInputs (rows of the matrix and of activations at once); kUnroll;
// Loaded load(groups, values, places, scales); Vector add(Vector, Loaded, inputs); Vector zero(); float sum(Vector).

struct Groups {
  int shift, a_step;  // a step is in group step >> shift; or has `a_step` groups
  Picks picks;

  const float* of(const float* scales, int64_t step) const {
    return a_step > 1 ? scales + step * a_step : scales + (step >> shift);
  }
};

// The values `kAhead` bytes further on, and their places, are requested early: the processor's own prefetching ends at
// each page of 4 KiB, which is one row of a matrix or less. A loop with few instructions a byte waits for memory, so it requests them
// into the second cache: the first one has too few requests under way at once for the bandwidth of a server's memory.
template <class Step>
struct Prefetch {
  static constexpr int64_t kAhead = 2048;

  static void request(const uint8_t* from) { __builtin_prefetch(from, 0, Step::kValueBytes >= 64 ? 2 : 3); }
};

// A pass of the activations over W rows of the matrix: the pass `number` of `all`. Each requests an equal part of the next W rows, so that
// they are there when the first pass needs them, and no pass waits for all of their requests.
struct Pass {
  int64_t number = 0, all = 1;
};

template <class Step, int W, int R, int U>
void tile(const SparseMatrix& matrix, const Groups& groups, const Product& product, Pass pass, int64_t input, int64_t row) {
  static_assert(U == 1 || W * R == 1);
  typename Step::Vector sums[U][W][R];
  for (int u = 0; u < U; ++u) {
    for (int w = 0; w < W; ++w) {
      for (int r = 0; r < R; ++r) sums[u][w][r] = Step::zero();
    }
  }
  const uint8_t *values[W], *places[W];
  const float* scales[W];
  for (int w = 0; w < W; ++w) {
    values[w] = matrix.values + (row + w) * matrix.value_bytes;
    places[w] = matrix.row_places(row + w);
    scales[w] = matrix.scales + (row + w) * matrix.groups;
  }
  int64_t ahead[W];  // in bytes; 0 for a row that another pass requests
  for (int w = 0; w < W; ++w) ahead[w] = w % pass.all == pass.number ? W * matrix.value_bytes : 0;
  if (W > 1 && pass.number == 0) {
    for (int64_t line = 0; line < W * matrix.place_bytes; line += 64) __builtin_prefetch(places[0] + W * matrix.place_bytes + line, 0, 2);
  }
  const uint8_t* const inputs = product.inputs + input * product.row_bytes;
  const int64_t steps = matrix.kept / Step::kKept;
  int64_t step = 0;
  for (; step + U <= steps; step += U) {
    if constexpr (W * R == 1) {
      for (int line = 0; line < U * Step::kValueBytes; line += 64) {
        Prefetch<Step>::request(values[0] + step * Step::kValueBytes + Prefetch<Step>::kAhead + line);
      }
      Prefetch<Step>::request(places[0] + step * Step::kPlaceBytes + Prefetch<Step>::kAhead / 4);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      typename Step::Loaded loaded[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        if constexpr (W > 1) __builtin_prefetch(values[w] + step * Step::kValueBytes + ahead[w], 0, 2);
        loaded[w] = Step::load(groups, values[w] + (step + u) * Step::kValueBytes, places[w] + (step + u) * Step::kPlaceBytes,
                               groups.of(scales[w], step + u));
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
          sums[u][w][r] = Step::add(sums[u][w][r], loaded[w], inputs + r * product.row_bytes + (step + u) * Step::kInputBytes);
        }
      }
    }
  }
  if constexpr (U > 1) {
    for (; step < steps; ++step) {
      const auto loaded = Step::load(groups, values[0] + step * Step::kValueBytes, places[0] + step * Step::kPlaceBytes,
                                     groups.of(scales[0], step));
      sums[0][0][0] = Step::add(sums[0][0][0], loaded, inputs + step * Step::kInputBytes);
    }
  }
  if (step * Step::kKept < matrix.kept) {  // The last step is not whole: it goes through zeros, so that nothing after the row is read.
    for (int w = 0; w < W; ++w) {
      alignas(64) uint8_t some_values[Step::kValueBytes] = {}, some_places[Step::kPlaceBytes + 1] = {};  // a dense step has no places
      alignas(64) float some_scales[16] = {};
      const int64_t value_at = step * Step::kValueBytes, place_at = step * Step::kPlaceBytes;
      std::memcpy(some_values, values[w] + value_at, std::min<int64_t>(Step::kValueBytes, matrix.value_bytes - value_at));
      std::memcpy(some_places, places[w] + place_at, std::min<int64_t>(Step::kPlaceBytes, matrix.place_bytes - place_at));
      if (matrix.scales != nullptr) {
        const float* from = groups.of(scales[w], step);
        std::memcpy(some_scales, from, sizeof(float) * std::min<int64_t>(groups.a_step, scales[w] + matrix.groups - from));
      }
      const auto loaded = Step::load(groups, some_values, some_places, some_scales);
      for (int r = 0; r < R; ++r) {
        sums[0][w][r] = Step::add(sums[0][w][r], loaded, inputs + r * product.row_bytes + step * Step::kInputBytes);
      }
    }
  }
  for (int w = 0; w < W; ++w) {
    for (int r = 0; r < R; ++r) {
      float sum = Step::sum(sums[0][w][r]);
      for (int u = 1; u < U; ++u) sum += Step::sum(sums[u][w][r]);
      if (Step::kScaled) sum *= *scales[w];
      put(matrix, product, input + r, row + w, sum);
    }
  }
}

template <class Step>
void product_of(const SparseMatrix& matrix, const Groups& groups, const Product& product, int64_t begin, int64_t end) {
  int64_t row = begin;
  if (product.rows > 1) {
    const int64_t left = product.rows % Step::kInputs;
    const Pass first{0, std::min<int64_t>(Step::kRows, product.rows / Step::kInputs + left / 2 + left % 2)};
    for (; row + Step::kRows <= end; row += Step::kRows) {
      Pass pass = first;
      int64_t input = 0;
      for (; input + Step::kInputs <= product.rows; input += Step::kInputs, ++pass.number) {
        tile<Step, Step::kRows, Step::kInputs, 1>(matrix, groups, product, pass, input, row);
      }
      for (; input + 2 <= product.rows; input += 2, ++pass.number) {
        tile<Step, Step::kRows, 2, 1>(matrix, groups, product, pass, input, row);
      }
      if (input < product.rows) tile<Step, Step::kRows, 1, 1>(matrix, groups, product, pass, input, row);
    }
  }
  for (; row < end; ++row) {
    for (int64_t input = 0; input < product.rows; ++input) tile<Step, 1, 1, Step::kUnroll>(matrix, groups, product, {}, input, row);
  }
}

// The columns of 16 that a row keeps, from `column` on, a multiple of 16.
template <Places F>
inline uint32_t kept_of_16(const SparseMatrix& matrix, const uint8_t* places, int64_t column) {
  if (column + 16 <= matrix.in) {
    if (F == Places::kBitmask) return places[column / 8] | places[column / 8 + 1] << 8;
    if (F == Places::kTwoOfFour) return kTwoOfFourMask[places[column / 8]] | kTwoOfFourMask[places[column / 8 + 1]] << 8;
    return kOneOfFourMask[places[column / 16]];
  }
  const uint32_t low = kept_byte(matrix, places, column / 8);
  return column + 8 < matrix.in ? low | kept_byte(matrix, places, column / 8 + 1) << 8 : low;
}

// Numbers of 4 bits from number `first` on. Writes one more than `count` if that ends within a byte.
inline void unpack_nibbles(const uint8_t* __restrict packed, int64_t first, int64_t count, int8_t* __restrict to) {
  packed += first / 2;
  if (first % 2 != 0 && count > 0) {
    *to++ = static_cast<int8_t>((*packed++ >> 4) ^ 8) - 8;
    --count;
  }
  for (int64_t pair = 0; pair < (count + 1) / 2; ++pair) {
    to[2 * pair] = static_cast<int8_t>(((packed[pair] & 15) ^ 8) - 8);
    to[2 * pair + 1] = static_cast<int8_t>(((packed[pair] >> 4) ^ 8) - 8);
  }
}

// The kept values of a row: those from `first` on, before `all`. Numbers of 4 bits are bytes in the caller's scratch memory.
struct Kept {
  const uint8_t* values;
  int64_t first, all;
};

template <Values V>
Kept kept_values(const SparseMatrix& matrix, int64_t row, int8_t* scratch) {
  const int64_t first = matrix.first_value(row);
  if constexpr (V == Values::kInt4) {
    unpack_nibbles(matrix.values, first, matrix.row_starts != nullptr ? matrix.row_starts[row + 1] - first : matrix.kept, scratch);
    return {reinterpret_cast<const uint8_t*>(scratch), 0, matrix.in + 64};
  } else {
    return {matrix.values, first, matrix.all_values};
  }
}

// A row as fp32 numbers with zeros to the next multiple of 16 columns. `scratch` takes in + 64 bytes.
template <Places F, Values V>
void expand_floats(const SparseMatrix& matrix, int64_t row, float* to, int8_t* scratch) {
  constexpr int kBytes = V == Values::kFloat32 ? 4 : (V == Values::kBFloat16 || V == Values::kFloat16 ? 2 : 1);
  const uint8_t* const places = matrix.row_places(row);
  const Kept kept = kept_values<V>(matrix, row, scratch);
  const uint8_t* const values = kept.values;
  const int64_t all = kept.all;
  int64_t index = kept.first;
  const float* const scales = matrix.scales + row * matrix.groups;
  const bool whole = matrix.groups == 1 || matrix.group_size % 16 == 0;  // 16 columns have one scale
  float scale = 1.0f;
  int64_t next = matrix.scales == nullptr || !whole ? matrix.in : 0, group = 0;  // the column at which another scale begins
  for (int64_t column = 0; column < matrix.in; column += 16) {
    if (column == next) {
      scale = scales[group++];
      next += matrix.group_size;
    }
    const uint32_t mask = kept_of_16<F>(matrix, places, column);
    if (index + 16 <= all) {
      expand_16<V>(values, index, mask, scale, to + column);
    } else {
      alignas(64) uint8_t last[64] = {};
      std::memcpy(last, values + index * kBytes, (all - index) * kBytes);
      expand_16<V>(last, 0, mask, scale, to + column);
    }
    index += __builtin_popcount(mask);
  }
  if (!whole) {
    for (int64_t column = 0; column < matrix.in; ++column) to[column] *= scales[column / matrix.group_size];
  }
}

template <Places F>
void expand_form(const SparseMatrix& matrix, int64_t row, float* to, int8_t* scratch) {
  switch (matrix.type) {
    case Values::kFloat32:
      return expand_floats<F, Values::kFloat32>(matrix, row, to, scratch);
    case Values::kBFloat16:
      return expand_floats<F, Values::kBFloat16>(matrix, row, to, scratch);
    case Values::kFloat16:
      return expand_floats<F, Values::kFloat16>(matrix, row, to, scratch);
    case Values::kInt8:
      return expand_floats<F, Values::kInt8>(matrix, row, to, scratch);
    case Values::kInt4:
      return expand_floats<F, Values::kInt4>(matrix, row, to, scratch);
  }
}

void expand_to_floats(const SparseMatrix& matrix, int64_t row, float* to, float* scratch) {
  auto* const bytes = reinterpret_cast<int8_t*>(scratch);
  if (matrix.form == Places::kTwoOfFour) return expand_form<Places::kTwoOfFour>(matrix, row, to, bytes);
  if (matrix.form == Places::kOneOfFour) return expand_form<Places::kOneOfFour>(matrix, row, to, bytes);
  expand_form<Places::kBitmask>(matrix, row, to, bytes);
}

void expand(const SparseMatrix& matrix, int64_t row, Type type, void* to, float* scratch) {
  const int64_t room = matrix.in + 64;
  if (type == Type::kFloat32 && matrix.in % 16 == 0) return expand_to_floats(matrix, row, static_cast<float*>(to), scratch);
  expand_to_floats(matrix, row, scratch, scratch + room);
  if (type == Type::kFloat32) {
    std::memcpy(to, scratch, matrix.in * sizeof(float));
  } else if (type == Type::kBFloat16) {
    auto* const out = static_cast<BFloat16*>(to);
    for (int64_t column = 0; column < matrix.in; ++column) store(out[column], scratch[column]);
  } else {
    auto* const out = static_cast<Float16*>(to);
    for (int64_t column = 0; column < matrix.in; ++column) store(out[column], scratch[column]);
  }
}

// Products by way of expanded rows, for every layout without a loop that gathers.
void product_of_expanded(const SparseMatrix& matrix, const Product& product, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    expand_to_floats(matrix, row, scratch, scratch + matrix.in + 64);
    for (int64_t input = 0; input < product.rows; ++input) {
      const auto* const x = reinterpret_cast<const float*>(product.inputs + input * product.row_bytes);
      put(matrix, product, input, row, dot(scratch, x, matrix.in));
    }
  }
}

// The groups of a step of `columns` columns.
Groups groups_of(const SparseMatrix& matrix, int64_t columns) {
  Groups groups{62, 1, {}};
  if (matrix.groups <= 1) return groups;
  if (matrix.group_size >= columns) {
    groups.shift = __builtin_ctzll(matrix.group_size / columns);
  } else {
    groups.a_step = static_cast<int>(columns / matrix.group_size);
    groups.picks = picks_of(groups.a_step);
  }
  return groups;
}

// A row of activations as 8-bit numbers, a scale for each kColumnsAScale columns. `arrange` puts those of a step of `columns` columns in
// the order of its loop; `lanes` scales follow them.
template <int columns, int lanes>
void quantize(const float* row, int64_t in, uint8_t* to) {
  alignas(64) uint8_t numbers[columns];
  for (int64_t first = 0; first < in; first += columns, to += columns + lanes * sizeof(float)) {
    float scales[lanes];
    for (int64_t begin = 0; begin < columns; begin += kColumnsAScale) {
      // The scale belongs to the aligned kColumnsAScale columns, of which a short step sees a part.
      const int64_t from = (first + begin) / kColumnsAScale * kColumnsAScale, count = std::min<int64_t>(kColumnsAScale, in - from);
      uint32_t largest = 0;
      for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(row[from + i]) & 0x7fffffffu);
      const bool finite = largest < 0x7f800000u;
      const float most = finite && float_of(largest) > 1e-30f ? float_of(largest) : 0.0f;
      const float scale = finite ? most / 127.0f : float_of(0x7fc00000u), inverse = most > 0.0f ? 127.0f / most : 0.0f;
      const int64_t width = std::min<int64_t>(kColumnsAScale, columns), here = std::clamp<int64_t>(in - first - begin, 0, width);
      for (int64_t i = 0; i < here; ++i) {
        // Adding 1.5 * 2^23 rounds to the nearest whole number, which is then in the low bits.
        const uint32_t whole = bits_of(row[first + begin + i] * inverse + 12582912.0f) + kZero;
        numbers[begin + i] = static_cast<uint8_t>(whole);
      }
      for (int64_t i = here; i < width; ++i) numbers[begin + i] = kZero;
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t column = lane * (columns / lanes);
        if (column >= begin && column < begin + kColumnsAScale) scales[lane] = count > 0 ? scale : 0.0f;
      }
    }
    arrange<columns>(numbers, to);
    std::memcpy(to + columns, scales, sizeof scales);
  }
}

Inputs inputs(const SparseMatrix& matrix, bool bf16) {
  if (multiplies_integers(matrix)) return Inputs::kQuantized;
  const bool gathers = matrix.form == Places::kTwoOfFour || matrix.form == Places::kOneOfFour;
  if (kBFloat16Products && bf16 && gathers && matrix.type == Values::kBFloat16) return Inputs::kBFloat16;
  return Inputs::kFloat32;
}

int64_t row_bytes(const SparseMatrix& matrix, Inputs inputs) {
  if (inputs == Inputs::kQuantized) {
    const int64_t columns = kIntKept * (matrix.form == Places::kTwoOfFour ? 2 : 4);
    return (matrix.in + columns - 1) / columns * (columns + kIntKept);
  }
  return (matrix.in + 127) / 128 * 128 * (inputs == Inputs::kBFloat16 ? 2 : 4);
}

void prepare(const SparseMatrix& matrix, Inputs inputs, const float* row, uint8_t* to) {
  if (inputs == Inputs::kQuantized) {
    if (matrix.form == Places::kTwoOfFour) return quantize<kIntKept * 2, kIntKept / 4>(row, matrix.in, to);
    return quantize<kIntKept * 4, kIntKept / 4>(row, matrix.in, to);
  }
  const int64_t bytes = row_bytes(matrix, inputs);
  if (inputs == Inputs::kFloat32) {
    std::memcpy(to, row, matrix.in * 4);
    std::memset(to + matrix.in * 4, 0, bytes - matrix.in * 4);
  } else {
    auto* const words = reinterpret_cast<BFloat16*>(to);
    for (int64_t column = 0; column < matrix.in; ++column) store(words[column], row[column]);
    std::memset(to + matrix.in * 2, 0, bytes - matrix.in * 2);
  }
}

template <Places F, Values V>
void quantized_product(const SparseMatrix& matrix, const Product& product, int64_t begin, int64_t end) {
  const Groups groups = groups_of(matrix, kIntKept * (F == Places::kTwoOfFour ? 2 : 4));
  if (matrix.groups == 1) return product_of<IntegerStep<F, V, Grouping::kOne>>(matrix, groups, product, begin, end);
  if (groups.a_step == 1) return product_of<IntegerStep<F, V, Grouping::kWide>>(matrix, groups, product, begin, end);
  product_of<IntegerStep<F, V, Grouping::kFine>>(matrix, groups, product, begin, end);
}

template <Places F>
void float_product(const SparseMatrix& matrix, const Product& product, int64_t begin, int64_t end) {
  const Groups none{62, 1, {}};
  if (matrix.type == Values::kFloat32) return product_of<FloatStep<F, Values::kFloat32>>(matrix, none, product, begin, end);
  if (matrix.type == Values::kBFloat16) return product_of<FloatStep<F, Values::kBFloat16>>(matrix, none, product, begin, end);
  product_of<FloatStep<F, Values::kFloat16>>(matrix, none, product, begin, end);
}

template <Places F>
void gathered_product(const SparseMatrix& matrix, Inputs inputs, const Product& product, int64_t begin, int64_t end) {
  if (inputs == Inputs::kQuantized) {
    if (matrix.type == Values::kInt8) return quantized_product<F, Values::kInt8>(matrix, product, begin, end);
    return quantized_product<F, Values::kInt4>(matrix, product, begin, end);
  }
  if (inputs == Inputs::kBFloat16) return bf16_product<F>(matrix, Groups{62, 1, {}}, product, begin, end);
  float_product<F>(matrix, product, begin, end);
}

void linear(const SparseMatrix& matrix, Inputs inputs, const Product& product, int64_t begin, int64_t end, float* scratch) {
  if (matrix.form == Places::kBitmask || (matrix.quantized() && inputs != Inputs::kQuantized)) {
    return product_of_expanded(matrix, product, begin, end, scratch);
  }
  if (matrix.form == Places::kAll) return float_product<Places::kAll>(matrix, product, begin, end);
  if (matrix.form == Places::kTwoOfFour) return gathered_product<Places::kTwoOfFour>(matrix, inputs, product, begin, end);
  gathered_product<Places::kOneOfFour>(matrix, inputs, product, begin, end);
}
