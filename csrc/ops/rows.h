// Tensors of rows, (..., channels), as kernels see them.
#pragma once

#include <initializer_list>

#include "kernels/row_norm.h"
#include "tensor.h"

namespace mamba_ssm::ops {

/// How the leading axes of a call's inputs merge. They have one shape up to the last axis, the
/// channels, which a tensor with one value for each row lacks.
class Rows {
 public:
  /// `inputs`: x first; absent ones count for nothing. Neighboring axes merge where they do in all
  /// of them; if more than three are left, the inputs are replaced by contiguous copies.
  explicit Rows(std::initializer_list<OptionalTensor*> inputs);

  const kernels::RowAxes& axes() const { return axes_; }
  int64_t count() const { return axes_.size[0] * axes_.size[1] * axes_.size[2]; }

  /// One of the inputs, or a contiguous tensor of the same leading shape.
  kernels::View<4> view(const OptionalTensor& tensor) const;

 private:
  bool merge(std::initializer_list<OptionalTensor*> inputs);

  static constexpr int kAxes = 3;
  kernels::RowAxes axes_;
  int64_t leading_;           // number of leading axes
  int64_t innermost_[kAxes];  // of those that were merged into each axis, -1 for none
};

/// A fresh contiguous tensor of the shape of `like`.
Tensor allocate_rows(const char* op, const Tensor& like, ScalarType type);

}  // namespace mamba_ssm::ops
