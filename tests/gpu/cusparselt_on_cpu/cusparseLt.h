// Stands in for cuSPARSELt's header and library, so that csrc/cuda/cusparselt.cpp runs on a CPU. It multiplies, refuses what the
// library documents as invalid, checks that every object is alive when it is used, and records the calls. Its compressed weight is the
// dense one.
#pragma once
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

enum cudaDataType { CUDA_R_16F, CUDA_R_16BF };
enum cusparseStatus_t { CUSPARSE_STATUS_SUCCESS, CUSPARSE_STATUS_INVALID_VALUE };
enum cusparseLtMatmulAlgAttribute_t {
  CUSPARSELT_MATMUL_ALG_CONFIG_ID,
  CUSPARSELT_MATMUL_SPLIT_K,
  CUSPARSELT_MATMUL_SPLIT_K_MODE,
  CUSPARSELT_MATMUL_SPLIT_K_BUFFERS
};
enum {
  CUSPARSE_OPERATION_NON_TRANSPOSE,
  CUSPARSE_COMPUTE_32F,
  CUSPARSE_ORDER_ROW,
  CUSPARSE_ORDER_COL,
  CUSPARSELT_SPARSITY_50_PERCENT,
  CUSPARSELT_MATMUL_ALG_DEFAULT,
  CUSPARSELT_MATMUL_BIAS_POINTER,
  CUSPARSELT_MATMUL_ACTIVATION_RELU,
  CUSPARSELT_MATMUL_ACTIVATION_GELU
};

namespace fake {
inline std::string calls;  // one a line
inline int live = 0;       // handles, descriptors, selections and plans

// Alive from `start` to `end`.
struct Object {
  int* alive;
  void start() { alive = new int(1), ++live; }
  void end() { delete alive, alive = nullptr, --live; }
  bool dead() const { return alive == nullptr || *alive != 1; }
};
}  // namespace fake

struct cusparseLtHandle_t : fake::Object {};
struct cusparseLtMatDescriptor_t : fake::Object {
  int64_t rows, columns;
  cudaDataType type;
};
struct cusparseLtMatmulDescriptor_t {
  const cusparseLtMatDescriptor_t *a, *b;
  const void* bias;
  int activation;
};
struct cusparseLtMatmulAlgSelection_t : fake::Object {
  int numbers[4];
};
struct cusparseLtMatmulPlan_t : fake::Object {
  const cusparseLtMatmulDescriptor_t* product;
  cusparseLtMatmulAlgSelection_t* selection;
};

#define FAKE_REFUSE(condition) \
  if (condition) return CUSPARSE_STATUS_INVALID_VALUE
#define FAKE_CALL(name, ...) inline cusparseStatus_t cusparseLt##name(__VA_ARGS__)

inline const char* cusparseLtGetErrorString(cusparseStatus_t) { return "invalid value"; }

FAKE_CALL(Init, cusparseLtHandle_t* handle) { return handle->start(), CUSPARSE_STATUS_SUCCESS; }
FAKE_CALL(Destroy, cusparseLtHandle_t* handle) { return handle->end(), CUSPARSE_STATUS_SUCCESS; }

FAKE_CALL(StructuredDescriptorInit, const cusparseLtHandle_t* handle, cusparseLtMatDescriptor_t* matrix, int64_t rows, int64_t columns,
          int64_t, uint32_t, cudaDataType type, int, int) {
  FAKE_REFUSE(handle->dead() || rows <= 0 || columns <= 0 || rows % 16 != 0 || columns % 16 != 0);
  *matrix = {{}, rows, columns, type};
  return matrix->start(), CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(DenseDescriptorInit, const cusparseLtHandle_t* handle, cusparseLtMatDescriptor_t* matrix, int64_t rows, int64_t columns,
          int64_t, uint32_t, cudaDataType type, int) {
  FAKE_REFUSE(handle->dead() || rows <= 0 || columns <= 0 || columns % 8 != 0);
  *matrix = {{}, rows, columns, type};
  return matrix->start(), CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(MatDescriptorDestroy, cusparseLtMatDescriptor_t* matrix) { return matrix->end(), CUSPARSE_STATUS_SUCCESS; }

FAKE_CALL(SpMMACompressedSize2, const cusparseLtHandle_t* handle, const cusparseLtMatDescriptor_t* matrix, size_t* size, size_t* buffer) {
  FAKE_REFUSE(handle->dead() || matrix->dead());
  *size = matrix->rows * matrix->columns * 2, *buffer = 32;
  return CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(SpMMACompress2, const cusparseLtHandle_t* handle, const cusparseLtMatDescriptor_t* matrix, int, int, const void* from, void* to,
          void*, cudaStream_t) {
  FAKE_REFUSE(handle->dead() || matrix->dead());
  std::memcpy(to, from, matrix->rows * matrix->columns * 2);
  return CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(MatmulDescriptorInit, const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* product, int, int,
          const cusparseLtMatDescriptor_t* a, const cusparseLtMatDescriptor_t* b, const cusparseLtMatDescriptor_t*,
          const cusparseLtMatDescriptor_t*, int) {
  *product = {a, b, nullptr, 0};
  return CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(MatmulDescSetAttribute, const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* product, int attribute, const void* value,
          size_t size) {
  if (attribute == CUSPARSELT_MATMUL_BIAS_POINTER) {
    std::memcpy(&product->bias, value, size);
  } else {
    product->activation = attribute;
  }
  return CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(MatmulAlgSelectionInit, const cusparseLtHandle_t*, cusparseLtMatmulAlgSelection_t* selection,
          const cusparseLtMatmulDescriptor_t*, int) {
  *selection = {{}, {0, 1, 0, 0}};
  return selection->start(), CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(MatmulAlgSelectionDestroy, cusparseLtMatmulAlgSelection_t* selection) { return selection->end(), CUSPARSE_STATUS_SUCCESS; }

// There are configurations 0 to 50. Mode and buffers of split-k exist only with split-k.
FAKE_CALL(MatmulAlgSetAttribute, const cusparseLtHandle_t*, cusparseLtMatmulAlgSelection_t* selection,
          cusparseLtMatmulAlgAttribute_t attribute, const void* value, size_t size) {
  int number;
  std::memcpy(&number, value, size);
  FAKE_REFUSE((attribute == CUSPARSELT_MATMUL_ALG_CONFIG_ID && number > 50) || (attribute >= 2 && selection->numbers[1] <= 1));
  selection->numbers[attribute] = number;
  return CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(MatmulAlgGetAttribute, const cusparseLtHandle_t*, const cusparseLtMatmulAlgSelection_t* selection,
          cusparseLtMatmulAlgAttribute_t attribute, void* value, size_t size) {
  FAKE_REFUSE(attribute >= 2 && selection->numbers[1] <= 1);
  std::memcpy(value, &selection->numbers[attribute], size);
  return CUSPARSE_STATUS_SUCCESS;
}

// Configuration 49 exists, but it does not fit this product.
FAKE_CALL(MatmulPlanInit, const cusparseLtHandle_t*, cusparseLtMatmulPlan_t* plan, const cusparseLtMatmulDescriptor_t* product,
          cusparseLtMatmulAlgSelection_t* selection) {
  const int* const numbers = selection->numbers;
  FAKE_REFUSE(selection->dead() || numbers[0] == 49);
  fake::calls += "plan " + std::to_string(product->b->columns);
  for (int i = 0; i < 4; ++i) fake::calls += " " + std::to_string(numbers[i]);
  fake::calls += "\n";
  *plan = {{}, product, selection};
  return plan->start(), CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(MatmulPlanDestroy, cusparseLtMatmulPlan_t* plan) { return plan->end(), CUSPARSE_STATUS_SUCCESS; }

FAKE_CALL(MatmulGetWorkspace, const cusparseLtHandle_t*, const cusparseLtMatmulPlan_t*, size_t* bytes) {
  *bytes = 64;
  return CUSPARSE_STATUS_SUCCESS;
}

FAKE_CALL(Matmul, const cusparseLtHandle_t* handle, const cusparseLtMatmulPlan_t* plan, const void*, const void* a, const void* b,
          const void*, const void*, void* d, void* workspace, cudaStream_t*, int) {
  FAKE_REFUSE(handle->dead() || plan->dead() || plan->selection->dead() || plan->product->a->dead() || plan->product->b->dead());
  fake::calls += "multiply\n";
  std::memset(workspace, 1, 64);
  const cusparseLtMatmulDescriptor_t& product = *plan->product;
  const at::ScalarType type = product.a->type == CUDA_R_16F ? at::kHalf : at::kBFloat16;
  const int64_t out = product.a->rows, in = product.a->columns, tokens = product.b->columns;
  const auto tensor = [&](const void* data, at::IntArrayRef sizes) { return at::from_blob(const_cast<void*>(data), sizes, type); };
  at::Tensor result = at::matmul(tensor(b, {tokens, in}).to(at::kDouble), tensor(a, {out, in}).to(at::kDouble).t());
  if (product.bias != nullptr) result = result + tensor(product.bias, {out});
  if (product.activation == CUSPARSELT_MATMUL_ACTIVATION_RELU) result = at::relu(result);
  if (product.activation == CUSPARSELT_MATMUL_ACTIVATION_GELU) result = at::gelu(result, "tanh");
  tensor(d, {tokens, out}).copy_(result);
  return CUSPARSE_STATUS_SUCCESS;
}

// Finds an algorithm with split-k for more than 16 tokens, and one without for fewer.
FAKE_CALL(MatmulSearch, const cusparseLtHandle_t* handle, cusparseLtMatmulPlan_t* plan, const void* one, const void* a, const void* b,
          const void* zero, const void* c, void* d, void* workspace, cudaStream_t* streams, int count) {
  const bool split = plan->product->b->columns > 16;
  const int found[4] = {5, split ? 4 : 1, split ? 1 : 0, split ? 2 : 0};
  std::memcpy(plan->selection->numbers, found, sizeof found);
  return cusparseLtMatmul(handle, plan, one, a, b, zero, c, d, workspace, streams, count);
}
