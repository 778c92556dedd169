// 2:4 matrix products with cuSPARSELt's C API: compress a weight, multiply, search for the fastest algorithm.
//
// All tensors are row-major. The weight A is [out, in]. The input [tokens, in] is cuSPARSELt's column-major B [in, tokens]; the result
// [tokens, out] is its column-major D [out, tokens]. cuSPARSELt supports this layout for every dtype.
#if defined(MASKLLM_CUSPARSELT)

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cusparseLt.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace maskllm {
namespace {

constexpr uint32_t kAlignment = 16;

void check(cusparseStatus_t status, const char* call) {
  TORCH_CHECK(status == CUSPARSE_STATUS_SUCCESS, "cuSPARSELt: ", call, " failed: ", cusparseLtGetErrorString(status));
}
#define MASKLLM_CHECK(call) check(call, #call)

// One handle per thread and device, which the library requires.
cusparseLtHandle_t& handle_of(int device) {
  struct Handle {
    cusparseLtHandle_t value;
    Handle() { MASKLLM_CHECK(cusparseLtInit(&value)); }
    ~Handle() { cusparseLtDestroy(&value); }
  };
  static thread_local std::map<int, std::unique_ptr<Handle>> handles;
  std::unique_ptr<Handle>& handle = handles[device];
  if (!handle) handle = std::make_unique<Handle>();
  return handle->value;
}

struct Types {
  cudaDataType value;
  cusparseComputeType compute;
};

Types types_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return {CUDA_R_16F, CUSPARSE_COMPUTE_32F};
    case at::kBFloat16:
      return {CUDA_R_16BF, CUSPARSE_COMPUTE_32F};
    case at::kFloat:
      return {CUDA_R_32F, CUSPARSE_COMPUTE_32F};  // multiplied as TF32
    case at::kChar:
      return {CUDA_R_8I, CUSPARSE_COMPUTE_32I};
    default:
      TORCH_CHECK(false, "cuSPARSELt: ", tensor.scalar_type(), "; wanted Half, BFloat16, Float or Char");
  }
}

// A matrix descriptor that is destroyed with this object.
class Matrix {
 public:
  static Matrix sparse(cusparseLtHandle_t& handle, int64_t rows, int64_t columns, cudaDataType type) {
    Matrix matrix;
    MASKLLM_CHECK(cusparseLtStructuredDescriptorInit(&handle, matrix.descriptor_.get(), rows, columns, columns, kAlignment, type,
                                                     CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT));
    matrix.live_ = true;
    return matrix;
  }

  static Matrix dense(cusparseLtHandle_t& handle, int64_t rows, int64_t columns, cudaDataType type) {
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

// The four numbers of an algorithm, as `search` returns them: configuration, split-k, split-k mode, split-k buffers.
constexpr cusparseLtMatmulAlgAttribute_t kChoice[] = {CUSPARSELT_MATMUL_ALG_CONFIG_ID, CUSPARSELT_MATMUL_SPLIT_K,
                                                      CUSPARSELT_MATMUL_SPLIT_K_MODE, CUSPARSELT_MATMUL_SPLIT_K_BUFFERS};

// Everything that one product needs. The compressed weight depends on its own shape only, so the number of tokens may vary.
class Product {
 public:
  Product(const at::Tensor& input, int64_t out, const std::optional<at::Tensor>& bias, const std::string& activation)
      : handle_(handle_of(input.get_device())),
        types_(types_of(input)),
        a_(Matrix::sparse(handle_, out, input.size(1), types_.value)),
        b_(Matrix::dense(handle_, input.size(1), input.size(0), types_.value)),
        d_(Matrix::dense(handle_, out, input.size(0), types_.value)) {
    MASKLLM_CHECK(cusparseLtMatmulDescriptorInit(&handle_, &product_, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                                 CUSPARSE_OPERATION_NON_TRANSPOSE, a_.get(), b_.get(), d_.get(), d_.get(),
                                                 types_.compute));
    if (bias.has_value()) {
      const void* pointer = bias->const_data_ptr();
      MASKLLM_CHECK(
          cusparseLtMatmulDescSetAttribute(&handle_, &product_, CUSPARSELT_MATMUL_BIAS_POINTER, &pointer, sizeof pointer));
    }
    if (!activation.empty()) {
      TORCH_CHECK(activation == "relu" || activation == "gelu", "cuSPARSELt: activation '", activation, "'; wanted relu or gelu");
      const int on = 1;
      MASKLLM_CHECK(cusparseLtMatmulDescSetAttribute(
          &handle_, &product_, activation == "relu" ? CUSPARSELT_MATMUL_ACTIVATION_RELU : CUSPARSELT_MATMUL_ACTIVATION_GELU, &on,
          sizeof on));
    }
    MASKLLM_CHECK(cusparseLtMatmulAlgSelectionInit(&handle_, &algorithm_, &product_, CUSPARSELT_MATMUL_ALG_DEFAULT));
  }

  ~Product() {
    if (planned_) cusparseLtMatmulPlanDestroy(&plan_);
    cusparseLtMatmulAlgSelectionDestroy(&algorithm_);
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  // An empty `choice` means the library's default algorithm.
  void plan(at::IntArrayRef choice) {
    TORCH_CHECK(choice.empty() || choice.size() == std::size(kChoice), "cuSPARSELt: an algorithm is ", std::size(kChoice),
                " numbers; got ", choice.size());
    for (size_t i = 0; i < choice.size(); ++i) {
      const int value = static_cast<int>(choice[i]);
      MASKLLM_CHECK(cusparseLtMatmulAlgSetAttribute(&handle_, &algorithm_, kChoice[i], &value, sizeof value));
    }
    MASKLLM_CHECK(cusparseLtMatmulPlanInit(&handle_, &plan_, &product_, &algorithm_));
    planned_ = true;
  }

  // Multiplies, or searches for the fastest algorithm.
  void run(const at::Tensor& compressed, const at::Tensor& input, at::Tensor& output, bool search) {
    size_t bytes = 0;
    MASKLLM_CHECK(cusparseLtMatmulGetWorkspace(&handle_, &plan_, &bytes));
    at::Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, input.options().dtype(at::kByte));
    const float one = 1, zero = 0;
    cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    void* const to = output.mutable_data_ptr();
    if (search) {
      MASKLLM_CHECK(cusparseLtMatmulSearch(&handle_, &plan_, &one, compressed.const_data_ptr(), input.const_data_ptr(), &zero, to, to,
                                           workspace.mutable_data_ptr(), &stream, 1));
    } else {
      MASKLLM_CHECK(cusparseLtMatmul(&handle_, &plan_, &one, compressed.const_data_ptr(), input.const_data_ptr(), &zero, to, to,
                                     workspace.mutable_data_ptr(), &stream, 1));
    }
  }

  std::vector<int64_t> choice() {
    std::vector<int64_t> values;
    for (const cusparseLtMatmulAlgAttribute_t attribute : kChoice) {
      int value = 0;
      MASKLLM_CHECK(cusparseLtMatmulAlgGetAttribute(&handle_, &algorithm_, attribute, &value, sizeof value));
      values.push_back(value);
    }
    return values;
  }

 private:
  cusparseLtHandle_t& handle_;
  Types types_;
  Matrix a_, b_, d_;
  cusparseLtMatmulDescriptor_t product_;
  cusparseLtMatmulAlgSelection_t algorithm_;
  cusparseLtMatmulPlan_t plan_;
  bool planned_ = false;
};

at::Tensor compress(const at::Tensor& weight) {
  const c10::cuda::CUDAGuard guard(weight.device());
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight is ", weight.sizes(), "; wanted a contiguous [out, in]");
  cusparseLtHandle_t& handle = handle_of(weight.get_device());
  Matrix matrix = Matrix::sparse(handle, weight.size(0), weight.size(1), types_of(weight).value);
  size_t size = 0, buffer_size = 0;
  MASKLLM_CHECK(cusparseLtSpMMACompressedSize2(&handle, matrix.get(), &size, &buffer_size));
  const auto bytes = weight.options().dtype(at::kByte);
  at::Tensor compressed = at::empty({static_cast<int64_t>(size)}, bytes);
  at::Tensor buffer = at::empty({static_cast<int64_t>(buffer_size)}, bytes);
  MASKLLM_CHECK(cusparseLtSpMMACompress2(&handle, matrix.get(), 1, CUSPARSE_OPERATION_NON_TRANSPOSE, weight.const_data_ptr(),
                                         compressed.mutable_data_ptr(), buffer.mutable_data_ptr(),
                                         c10::cuda::getCurrentCUDAStream()));
  return compressed;
}

at::Tensor output_for(const at::Tensor& input, int64_t out, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(input.dim() == 2 && input.is_contiguous(), "input is ", input.sizes(), "; wanted a contiguous [tokens, in]");
  TORCH_CHECK(!bias.has_value() || (bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == out &&
                                    bias->device() == input.device() &&
                                    bias->scalar_type() == (input.scalar_type() == at::kChar ? at::kFloat : input.scalar_type())),
              "bias must be a contiguous [", out, "] of the input's dtype (Float for Char) on its device");
  return at::empty({input.size(0), out}, input.options());
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& compressed, int64_t out, const std::optional<at::Tensor>& bias,
                  const std::string& activation, at::IntArrayRef algorithm) {
  const c10::cuda::CUDAGuard guard(input.device());
  at::Tensor output = output_for(input, out, bias);
  Product product(input, out, bias, activation);
  product.plan(algorithm);
  product.run(compressed, input, output, false);
  return output;
}

std::vector<int64_t> search(const at::Tensor& input, const at::Tensor& compressed, int64_t out, const std::optional<at::Tensor>& bias,
                            const std::string& activation) {
  const c10::cuda::CUDAGuard guard(input.device());
  at::Tensor output = output_for(input, out, bias);
  Product product(input, out, bias, activation);
  product.plan({});
  product.run(compressed, input, output, true);
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
