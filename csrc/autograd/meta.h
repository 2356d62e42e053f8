// What Meta kernels share: the checks of the real kernels, and the layouts these allocate.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <string>

#include "dispatch.h"
#include "ops/checks.h"

namespace mamba_ssm {

/// Torch's own tensors, for the checks: sizes may be symbols.
struct MetaAccess {
  using Tensor = at::Tensor;
  using Size = c10::SymInt;
  static Size size(const Tensor& tensor, int64_t i) { return tensor.sym_size(i); }
  static Size stride(const Tensor& tensor, int64_t i) { return tensor.sym_stride(i); }
  static std::string device(const Tensor& tensor) { return tensor.device().str(); }
};

using MetaChecks = ops::Checks<MetaAccess>;

inline OptionalTensor empty_like(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(at::empty_like(*tensor)) : std::nullopt;
}

/// A contiguous tensor of the shape of `like`.
inline Tensor empty_rows(const Tensor& like, at::ScalarType type) {
  return at::empty_symint(like.sym_sizes(), like.options().dtype(type));
}

/// (batch, dim, columns) stored as (batch, columns, dim).
inline Tensor empty_columns(const Tensor& like, const c10::SymInt& batch, const c10::SymInt& dim,
                            const c10::SymInt& columns) {
  return at::empty_symint({batch, columns, dim}, like.options()).transpose(1, 2);
}

}  // namespace mamba_ssm
