#include "tensor.h"

#include <stdexcept>

namespace mamba_ssm::ops {
namespace {

/// Runs `make` and, when torch cannot allocate, says how much was wanted where: the stable ABI
/// drops torch's own text.
template <class Make>
Tensor allocate_or_explain(const char* op, const Tensor& like, int64_t bytes, Make make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw std::runtime_error(std::string(op) + ": " + (like.is_cuda() ? "CUDA out of" : "out of") +
                             " memory allocating " + std::to_string(bytes) + " bytes on " +
                             StableAccess::device(like));
  }
}

int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Double:
    case ScalarType::ComplexFloat:
      return 8;
    case ScalarType::ComplexDouble:
      return 16;
    default:
      return 4;
  }
}

}  // namespace

kernels::DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return kernels::DType::kFloat16;
    case ScalarType::BFloat16:
      return kernels::DType::kBFloat16;
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return kernels::DType::kFloat64;
    case ScalarType::Int:
      return kernels::DType::kInt32;
    case ScalarType::Long:
      return kernels::DType::kInt64;
    default:
      return kernels::DType::kFloat32;
  }
}

Tensor allocate(const char* op, const Tensor& like, const std::vector<int64_t>& sizes,
                ScalarType type) {
  int64_t bytes = element_size(type);
  for (int64_t size : sizes) bytes *= size;
  return allocate_or_explain(op, like, bytes,
                             [&] { return torch::stable::new_empty(like, sizes, type); });
}

Tensor allocate_like(const char* op, const Tensor& like) {
  return allocate_or_explain(op, like, like.numel() * element_size(like.scalar_type()),
                             [&] { return torch::stable::empty_like(like); });
}

OptionalTensor allocate_like(const char* op, const OptionalTensor& like) {
  return like ? OptionalTensor(allocate_like(op, *like)) : std::nullopt;
}

Tensor allocate_columns(const char* op, const Tensor& like, int64_t batch, int64_t dim,
                        int64_t columns) {
  return torch::stable::transpose(allocate(op, like, {batch, columns, dim}, like.scalar_type()), 1,
                                  2);
}

Workspace::Workspace(const char* op, const Tensor& like, size_t bytes) {
  if (bytes > 0) tensor_ = allocate(op, like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

std::string StableAccess::device(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

int64_t index_at(const Tensor& tensor, int64_t i) {
  const int64_t offset = i * tensor.stride(0);
  return tensor.scalar_type() == ScalarType::Int
             ? static_cast<const int32_t*>(tensor.data_ptr())[offset]
             : static_cast<const int64_t*>(tensor.data_ptr())[offset];
}

void check_index_below(const StableChecks& checks, const char* name, const OptionalTensor& tensor,
                       int64_t limit) {
  if (!tensor || !tensor->is_cpu()) return;
  for (int64_t i = 0; i < tensor->size(0); ++i) {
    const int64_t value = index_at(*tensor, i);
    if (value >= limit) {
      checks.fail(std::string(name) + "[" + std::to_string(i) + "] must be below " +
                  std::to_string(limit) + ", got " + std::to_string(value));
    }
  }
}

}  // namespace mamba_ssm::ops
