// 2:4 matrix products with cuSPARSELt's C API: compress a weight, multiply, search for the fastest algorithm.
//
// All tensors are row-major. The weight A is [out, in]. The input [tokens, in] is cuSPARSELt's column-major B [in, tokens]; the result
// [tokens, out] is its column-major D [out, tokens]. cuSPARSELt supports this layout for every dtype. Only fp16 and bf16 are accepted:
// of fp32 values cuSPARSELt keeps 1 of every 2, and an int8 result without a scale saturates.
#if defined(MASKLLM_CUSPARSELT)

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cusparseLt.h>
#include <torch/library.h>

#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace maskllm {
namespace {

constexpr uint32_t kAlignment = 16;
constexpr int64_t kTokens = 8;  // the number of tokens must be a multiple of this

void check(cusparseStatus_t status, std::string_view call) {
  TORCH_CHECK(status == CUSPARSE_STATUS_SUCCESS, "cuSPARSELt: ", call.substr(0, call.find('(')),
              " failed: ", cusparseLtGetErrorString(status));
}
#define MASKLLM_CHECK(call) check(call, #call)

cudaDataType type_of(at::ScalarType type) {
  TORCH_CHECK(type == at::kHalf || type == at::kBFloat16, "cuSPARSELt: ", type, "; wanted Half or BFloat16");
  return type == at::kHalf ? CUDA_R_16F : CUDA_R_16BF;
}

bool is_aligned(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0; }

// A matrix descriptor that is destroyed with this object.
class Matrix {
 public:
  static Matrix sparse(const cusparseLtHandle_t& handle, int64_t rows, int64_t columns, cudaDataType type) {
    Matrix matrix;
    MASKLLM_CHECK(cusparseLtStructuredDescriptorInit(&handle, matrix.descriptor_.get(), rows, columns, columns, kAlignment, type,
                                                     CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT));
    matrix.live_ = true;
    return matrix;
  }

  static Matrix dense(const cusparseLtHandle_t& handle, int64_t rows, int64_t columns, cudaDataType type) {
    Matrix matrix;
    MASKLLM_CHECK(
        cusparseLtDenseDescriptorInit(&handle, matrix.descriptor_.get(), rows, columns, rows, kAlignment, type, CUSPARSE_ORDER_COL));
    matrix.live_ = true;
    return matrix;
  }

  Matrix(Matrix&& other) noexcept : descriptor_(std::move(other.descriptor_)), live_(std::exchange(other.live_, false)) {}
  ~Matrix() {
    if (live_) cusparseLtMatDescriptorDestroy(descriptor_.get());
  }
  cusparseLtMatDescriptor_t* get() { return descriptor_.get(); }

 private:
  Matrix() : descriptor_(std::make_unique<cusparseLtMatDescriptor_t>()) {}
  std::unique_ptr<cusparseLtMatDescriptor_t> descriptor_;
  bool live_ = false;
};

// Bytes of a compressed weight, and of the buffer that compressing needs.
struct Sizes {
  size_t compressed = 0, buffer = 0;
  Sizes(const cusparseLtHandle_t& handle, Matrix& weight) {
    MASKLLM_CHECK(cusparseLtSpMMACompressedSize2(&handle, weight.get(), &compressed, &buffer));
  }
};

// A product's shape, dtype, bias and activation. `tokens` is a multiple of kTokens.
struct Shape {
  int64_t out, in, tokens;
  at::ScalarType type;
  const void* bias;
  std::string activation;

  auto key() const { return std::tie(out, in, tokens, type, bias, activation); }
  bool operator<(const Shape& other) const { return key() < other.key(); }
};

// Descriptors, algorithm and plan of one product. They point to each other, so this object does not move.
class Product {
 public:
  // `choice` is what `choice()` of a search returned. If it is empty, the library's default algorithm is used.
  Product(const cusparseLtHandle_t& handle, const Shape& shape, at::IntArrayRef choice)
      : handle_(handle),
        a_(Matrix::sparse(handle, shape.out, shape.in, type_of(shape.type))),
        b_(Matrix::dense(handle, shape.in, shape.tokens, type_of(shape.type))),
        d_(Matrix::dense(handle, shape.out, shape.tokens, type_of(shape.type))),
        compressed_bytes_(static_cast<int64_t>(Sizes(handle, a_).compressed)) {
    MASKLLM_CHECK(cusparseLtMatmulDescriptorInit(&handle_, &product_, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                                 CUSPARSE_OPERATION_NON_TRANSPOSE, a_.get(), b_.get(), d_.get(), d_.get(),
                                                 CUSPARSE_COMPUTE_32F));
    if (shape.bias != nullptr) {
      MASKLLM_CHECK(cusparseLtMatmulDescSetAttribute(&handle_, &product_, CUSPARSELT_MATMUL_BIAS_POINTER, &shape.bias,
                                                     sizeof shape.bias));
    }
    if (!shape.activation.empty()) {
      TORCH_CHECK(shape.activation == "relu" || shape.activation == "gelu", "cuSPARSELt: activation '", shape.activation,
                  "'; wanted relu or gelu");
      const int on = 1;
      MASKLLM_CHECK(cusparseLtMatmulDescSetAttribute(
          &handle_, &product_,
          shape.activation == "relu" ? CUSPARSELT_MATMUL_ACTIVATION_RELU : CUSPARSELT_MATMUL_ACTIVATION_GELU, &on, sizeof on));
    }
    MASKLLM_CHECK(cusparseLtMatmulAlgSelectionInit(&handle_, &selection_.value, &product_, CUSPARSELT_MATMUL_ALG_DEFAULT));
    selection_.live = true;
    if (!choice.empty()) choose(choice);
    MASKLLM_CHECK(cusparseLtMatmulPlanInit(&handle_, &plan_.value, &product_, &selection_.value));
    plan_.live = true;
    size_t bytes = 0;
    MASKLLM_CHECK(cusparseLtMatmulGetWorkspace(&handle_, &plan_.value, &bytes));
    workspace_bytes_ = static_cast<int64_t>(bytes);
  }

  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  // `input` and `output` are contiguous, aligned and have the shape's number of tokens.
  void multiply(const at::Tensor& compressed, const at::Tensor& input, at::Tensor& output) {
    call(cusparseLtMatmul, "cusparseLtMatmul", compressed, input, output);
  }

  void search(const at::Tensor& compressed, const at::Tensor& input, at::Tensor& output) {
    call(cusparseLtMatmulSearch, "cusparseLtMatmulSearch", compressed, input, output);
  }

  // The algorithm's configuration, split-k, split-k mode and split-k buffers; the last two are 0 without split-k.
  std::vector<int64_t> choice() const {
    std::vector<int64_t> values;
    for (const cusparseLtMatmulAlgAttribute_t attribute : kChoice) {
      int value = 0;
      if (values.size() < 2 || values[1] > 1) {
        MASKLLM_CHECK(cusparseLtMatmulAlgGetAttribute(&handle_, &selection_.value, attribute, &value, sizeof value));
      }
      values.push_back(value);
    }
    return values;
  }

 private:
  static constexpr cusparseLtMatmulAlgAttribute_t kChoice[] = {CUSPARSELT_MATMUL_ALG_CONFIG_ID, CUSPARSELT_MATMUL_SPLIT_K,
                                                               CUSPARSELT_MATMUL_SPLIT_K_MODE, CUSPARSELT_MATMUL_SPLIT_K_BUFFERS};

  struct Selection {
    cusparseLtMatmulAlgSelection_t value;
    bool live = false;
    ~Selection() {
      if (live) cusparseLtMatmulAlgSelectionDestroy(&value);
    }
  };
  struct Plan {
    cusparseLtMatmulPlan_t value;
    bool live = false;
    ~Plan() {
      if (live) cusparseLtMatmulPlanDestroy(&value);
    }
  };

  // Mode and buffers of split-k may be set only if split-k is above 1.
  void choose(at::IntArrayRef choice) {
    TORCH_CHECK(choice.size() == std::size(kChoice), "cuSPARSELt: an algorithm is ", std::size(kChoice), " numbers; got ",
                choice.size());
    for (size_t i = 0; i < (choice[1] > 1 ? std::size(kChoice) : 2); ++i) {
      TORCH_CHECK(choice[i] >= std::numeric_limits<int>::min() && choice[i] <= std::numeric_limits<int>::max(),
                  "cuSPARSELt: the algorithm's number ", choice[i], " does not fit into 32 bits");
      const int value = static_cast<int>(choice[i]);
      MASKLLM_CHECK(cusparseLtMatmulAlgSetAttribute(&handle_, &selection_.value, kChoice[i], &value, sizeof value));
    }
  }

  template <class Call>
  void call(Call function, std::string_view name, const at::Tensor& compressed, const at::Tensor& input, at::Tensor& output) {
    TORCH_CHECK(compressed.numel() == compressed_bytes_, "cuSPARSELt: the compressed weight has ", compressed.numel(),
                " bytes; this GPU wants ", compressed_bytes_, " for this shape");
    at::Tensor workspace = at::empty({workspace_bytes_}, input.options().dtype(at::kByte));
    const float one = 1, zero = 0;
    cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    void* const to = output.mutable_data_ptr();
    check(function(&handle_, &plan_.value, &one, compressed.const_data_ptr(), input.const_data_ptr(), &zero, to, to,
                   workspace.mutable_data_ptr(), &stream, 1),
          name);
  }

  const cusparseLtHandle_t& handle_;
  Matrix a_, b_, d_;
  int64_t compressed_bytes_, workspace_bytes_ = 0;
  cusparseLtMatmulDescriptor_t product_;
  Selection selection_;
  Plan plan_;
};

// The library on one device, for one thread: cuSPARSELt wants a handle for each. The plans of earlier products are kept.
class Library {
 public:
  static Library& on(int device) {
    static thread_local std::map<int, std::unique_ptr<Library>> libraries;
    std::unique_ptr<Library>& library = libraries[device];
    if (!library) library = std::make_unique<Library>();
    return *library;
  }

  const cusparseLtHandle_t& handle() const { return handle_.value; }

  Product& product(const Shape& shape, at::IntArrayRef choice) {
    std::pair<Shape, std::vector<int64_t>> key(shape, choice.vec());
    if (const auto found = products_.find(key); found != products_.end()) return *found->second;
    auto made = std::make_unique<Product>(handle_.value, shape, choice);
    if (products_.size() >= kMostProducts) products_.clear();
    return *products_.emplace(std::move(key), std::move(made)).first->second;
  }

 private:
  static constexpr size_t kMostProducts = 1024;  // bounds the memory if every call has another number of tokens

  struct Handle {
    cusparseLtHandle_t value;
    Handle() { MASKLLM_CHECK(cusparseLtInit(&value)); }
    ~Handle() { cusparseLtDestroy(&value); }
  };

  Handle handle_;  // destroyed last
  std::map<std::pair<Shape, std::vector<int64_t>>, std::unique_ptr<Product>> products_;
};

at::Tensor compress(const at::Tensor& weight) {
  const c10::cuda::CUDAGuard guard(weight.device());
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && is_aligned(weight), "cuSPARSELt: weight is ", weight.sizes(),
              "; wanted a contiguous [out, in] that starts at a multiple of ", kAlignment, " bytes");
  const cusparseLtHandle_t& handle = Library::on(weight.get_device()).handle();
  Matrix matrix = Matrix::sparse(handle, weight.size(0), weight.size(1), type_of(weight.scalar_type()));
  const Sizes sizes(handle, matrix);
  const auto bytes = weight.options().dtype(at::kByte);
  at::Tensor compressed = at::empty({static_cast<int64_t>(sizes.compressed)}, bytes);
  at::Tensor buffer = at::empty({static_cast<int64_t>(sizes.buffer)}, bytes);
  MASKLLM_CHECK(cusparseLtSpMMACompress2(&handle, matrix.get(), 1, CUSPARSE_OPERATION_NON_TRANSPOSE, weight.const_data_ptr(),
                                         compressed.mutable_data_ptr(), buffer.mutable_data_ptr(),
                                         c10::cuda::getCurrentCUDAStream()));
  return compressed;
}

// Checks the operands and returns the product's shape, its tokens rounded up.
Shape shape_of(const at::Tensor& input, const at::Tensor& compressed, int64_t out, const std::optional<at::Tensor>& bias,
               const std::string& activation) {
  TORCH_CHECK(input.dim() == 2 && input.size(0) > 0, "cuSPARSELt: input is ", input.sizes(), "; wanted [tokens, in], tokens > 0");
  TORCH_CHECK(compressed.scalar_type() == at::kByte && compressed.is_contiguous() && compressed.device() == input.device() &&
                  is_aligned(compressed),
              "cuSPARSELt: the compressed weight is ", compressed.scalar_type(), " on ", compressed.device(),
              "; wanted contiguous Byte on ", input.device(), " that starts at a multiple of ", kAlignment, " bytes");
  TORCH_CHECK(!bias.has_value() || (bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == out &&
                                    bias->device() == input.device() && bias->scalar_type() == input.scalar_type() &&
                                    is_aligned(*bias)),
              "cuSPARSELt: bias must be a contiguous [", out, "] of ", input.scalar_type(), " on ", input.device(),
              " that starts at a multiple of ", kAlignment, " bytes");
  const int64_t tokens = (input.size(0) + kTokens - 1) / kTokens * kTokens;
  return {out, input.size(1), tokens, input.scalar_type(), bias.has_value() ? bias->const_data_ptr() : nullptr, activation};
}

// The input as cuSPARSELt reads it: `tokens` contiguous rows. Rows that are added have any values: each row has its own result.
at::Tensor padded(const at::Tensor& input, int64_t tokens) {
  if (input.size(0) == tokens && input.is_contiguous() && is_aligned(input)) return input;
  at::Tensor rows = at::empty({tokens, input.size(1)}, input.options());
  rows.narrow(0, 0, input.size(0)).copy_(input);
  return rows;
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& compressed, int64_t out, const std::optional<at::Tensor>& bias,
                  const std::string& activation, at::IntArrayRef algorithm) {
  const c10::cuda::CUDAGuard guard(input.device());
  const Shape shape = shape_of(input, compressed, out, bias, activation);
  at::Tensor output = at::empty({shape.tokens, out}, input.options());
  Library::on(input.get_device()).product(shape, algorithm).multiply(compressed, padded(input, shape.tokens), output);
  return output.narrow(0, 0, input.size(0));
}

std::vector<int64_t> search(const at::Tensor& input, const at::Tensor& compressed, int64_t out, const std::optional<at::Tensor>& bias,
                            const std::string& activation) {
  const c10::cuda::CUDAGuard guard(input.device());
  const Shape shape = shape_of(input, compressed, out, bias, activation);
  at::Tensor output = at::empty({shape.tokens, out}, input.options());
  Product product(Library::on(input.get_device()).handle(), shape, {});  // not a kept one: the search changes it
  product.search(compressed, padded(input, shape.tokens), output);
  return product.choice();
}

}  // namespace
}  // namespace maskllm

TORCH_LIBRARY_IMPL(maskllm, CUDA, library) {
  library.impl("cusparselt_compress", maskllm::compress);
  library.impl("cusparselt_linear", maskllm::linear);
  library.impl("cusparselt_search", maskllm::search);
}

#endif
