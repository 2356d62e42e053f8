// The stable-ABI tensor, how kernels see it, and how results are allocated.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "kernels/types.h"

namespace mamba_ssm::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Real tensors, for the checks.
struct StableAccess {
  using Tensor = torch::stable::Tensor;
  using Size = int64_t;
  static Size size(const Tensor& tensor, int64_t i) { return tensor.size(i); }
  static Size stride(const Tensor& tensor, int64_t i) { return tensor.stride(i); }
  static std::string device(const Tensor& tensor);
};

using StableChecks = Checks<StableAccess>;

/// The kernels' tag of a type that passed the checks; complex types count as pairs of reals.
kernels::DType dtype_of(ScalarType type);

/// `tensor` as a kernel sees it, dimension by dimension.
template <int kRank>
kernels::View<kRank> view(const Tensor& tensor) {
  kernels::View<kRank> v;
  v.data = tensor.data_ptr();
  v.dtype = dtype_of(tensor.scalar_type());
  const int64_t reals = is_complex(tensor.scalar_type()) ? 2 : 1;
  for (int i = 0; i < kRank; ++i) v.stride[i] = reals * tensor.stride(i);
  v.imag = reals - 1;
  return v;
}

template <int kRank>
kernels::View<kRank> view(const OptionalTensor& tensor) {
  return tensor ? view<kRank>(*tensor) : kernels::View<kRank>{};
}

/// A fresh contiguous tensor on the device of `like`. Out of memory is reported with `op`, the size
/// and the device.
Tensor allocate(const char* op, const Tensor& like, const std::vector<int64_t>& sizes,
                ScalarType type);

/// A fresh tensor with the sizes, type and, where dense, the memory layout of `like`.
Tensor allocate_like(const char* op, const Tensor& like);
/// None for none.
OptionalTensor allocate_like(const char* op, const OptionalTensor& like);

/// A fresh (batch, dim, columns) tensor stored as (batch, columns, dim).
Tensor allocate_columns(const char* op, const Tensor& like, int64_t batch, int64_t dim,
                        int64_t columns);

/// Bytes for the partial results of a launch; empty for 0 bytes.
class Workspace {
 public:
  Workspace(const char* op, const Tensor& like, size_t bytes);
  void* data() const { return tensor_ ? tensor_->data_ptr() : nullptr; }

 private:
  OptionalTensor tensor_;
};

/// Element i of an int32 or int64 tensor of rank 1 in CPU memory.
int64_t index_at(const Tensor& tensor, int64_t i);

/// On CPU: every value of the index tensor (n) is below `limit`. On CUDA nothing is read: the
/// kernels treat such values as padding.
void check_index_below(const StableChecks& checks, const char* name, const OptionalTensor& tensor,
                       int64_t limit);

}  // namespace mamba_ssm::ops
